"""The steps of a run, and the models that its evaluation scores, by name and in order."""

from collections.abc import Container
from typing import Literal, get_args

# The names in the manifest and in the log.
STEP_NAMES = (
    "import",
    "data",
    "calibrate",
    "gradients",
    "allocate",
    "factorize",
    "refine",
    "heal",
    "finetune",
    "correct",
    "finish",
    "merge",
    "evaluate",
)
# The verbs on the command line that run up to a stage, and what each leaves: it runs up to its last step.
RESULTS = {
    "calibrate": "the Grams of the calibration data",
    "factorize": "the emulator, refined where the config asks for it",
    "heal": "the healed emulator, where the config asks for healing",
    "finetune": "the adapter trained on the emulator",
    "correct": "the corrected adapter, with its steps on the original where the config asks for them",
    "merge": "the merged model",
    "evaluate": "the evaluation on held-out data",
}
VERBS = tuple(RESULTS)

Variant = Literal["original", "emulator", "emulator_adapter", "uncorrected", "corrected", "finished", "merged"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
ON_EMULATOR = ("emulator", "emulator_adapter")


def served_variant(scored: Container[str]) -> Variant:
    """What is served of those that were ``scored``: the merged model, else the original with its finished adapter, else with the
    corrected one."""
    return "merged" if "merged" in scored else "finished" if "finished" in scored else "corrected"
