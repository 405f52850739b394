"""The steps of a run, in order."""

from emloc_ray.stages.calibrate.stage import CALIBRATE, GRADIENTS
from emloc_ray.stages.correct.stage import CORRECT
from emloc_ray.stages.evaluate.stage import EVALUATE
from emloc_ray.stages.factorize.stage import ALLOCATE, FACTORIZE
from emloc_ray.stages.finetune.stage import FINETUNE
from emloc_ray.stages.finish import FINISH
from emloc_ray.stages.heal.stage import HEAL
from emloc_ray.stages.importing import IMPORT
from emloc_ray.stages.merge.stage import MERGE
from emloc_ray.stages.refine.stage import REFINE
from emloc_ray.stages.stage import Stage
from emloc_ray.stages.tokens.stage import DATA

STEPS: tuple[Stage, ...] = (
    IMPORT,
    DATA,
    CALIBRATE,
    GRADIENTS,
    ALLOCATE,
    FACTORIZE,
    REFINE,
    HEAL,
    FINETUNE,
    CORRECT,
    FINISH,
    MERGE,
    EVALUATE,
)


def up_to(verb: str) -> tuple[Stage, ...]:
    """The steps up to the last one of a verb."""
    last = max(number for number, stage in enumerate(STEPS) if stage.verb == verb)
    return STEPS[: last + 1]
