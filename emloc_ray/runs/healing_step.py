"""The healing as a step of a run, between the factorization and the fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from emloc_ray.errors import ConfigError
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.io.runs.resume import begun_with, discard_unless
from emloc_ray.io.store.node_cache import discard
from emloc_ray.planning.training import healing_run, healing_split
from emloc_ray.runs.steps import NOT_LEARNED, Inputs, Steps, without

if TYPE_CHECKING:
    from emloc_ray.stages.jobs import Jobs
    from emloc_ray.stages.ray.tasks import Progress, Resources

_OWN = {"max_steps", "num_train_epochs", "loss_on"}  # what the healing has instead of the fine-tuning's


def heal_emulator(steps: Steps, jobs: Jobs, content: Callable[[], Inputs]) -> None:
    """Makes ``emulator_healed/``; without a healing it leaves nothing of one behind, and later stages build on the emulator.

    ``content`` gives what tells the original from others where runs share what they make of it.
    """
    prepared, run = jobs.prepared, steps.directory
    out_dir, place, healing = run.path("emulator_healed"), run.path("healing"), prepared.config.emulator.heals
    if healing is None:
        steps.leave_out("heal", steps.inputs["factorize"], out_dir)
        discard(place)
        return
    from emloc_ray.stages.heal.heal import heal
    from emloc_ray.stages.jobs import resources

    training = healing_run(prepared, healing)
    if not training.layout.adapted:
        raise ConfigError(f"emulator.healing.r is {healing.r}, and no linear was given a rank above it: lower it.")
    inputs: Inputs = {
        "factorize": steps.inputs["factorize"],
        "data": steps.inputs[f"data/{healing_split(prepared.config)}"],
        "options": jobs.model_options,
        "healing": healing.model_dump(mode="json"),
        "finetune": without(training.config.finetune, NOT_LEARNED | _OWN),
        "ranks": prepared.layout.ranks,
        "quantization": prepared.config.emulator.quantization,
        "seed": prepared.config.seed,
    }
    if prepared.zero_config is not None:
        inputs["deepspeed"] = prepared.zero_config

    def execute(progress: Progress, granted: Resources) -> dict[str, Any]:
        # Shards of another training, be it of the same inputs, are of another adapter.
        if not begun_with(place, inputs):
            discard(out_dir)
        for path in (place, out_dir):
            discard_unless(path, inputs)
        job = jobs.healing(healing, f"heal-{fingerprint(inputs)}")
        return heal(job, jobs.base_config(), granted, progress, steps.reporter.note)

    asked = resources(prepared.config.finetune)
    steps.run("heal", inputs, [out_dir], execute, asked, resumes=True, shared=content())
    discard(place)  # what the stage could go on from: not before it is recorded
