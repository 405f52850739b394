"""What to train on within a budget: the original or an emulator, whole or offloaded, in more or fewer bits, side by side."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from emloc_ray.config.emulator import DECIDED, EmulatorConfig, RefinementConfig
from emloc_ray.config.schema import RunConfig
from emloc_ray.errors import ConfigError
from emloc_ray.planning.budget import RATIOS, solve_for_budget, training_bytes, with_config
from emloc_ray.planning.costs import busy_seconds, with_base
from emloc_ray.planning.emulator_budget import spend_evenly
from emloc_ray.planning.holding import blocks_share
from emloc_ray.planning.layout import layout_under
from emloc_ray.planning.lengths import Lengths
from emloc_ray.planning.machine import Speeds
from emloc_ray.planning.measured import REFINED_STEPS, Measured, closed_by, measured_for
from emloc_ray.planning.memory import BASE_BYTES, MemoryModel, total
from emloc_ray.planning.model_bytes import file_dtype
from emloc_ray.planning.model_checks import check_healing
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.work import training_cost
from emloc_ray.text import described_bits, duration, size, size_up

_WHOLE = {"compression_ratio": 1.0, "residual_rank": 0, "storage": "factors"}
_IN_ALL_BITS = {"quantization": "none"}
_ORIGINAL = {**_WHOLE, **_IN_ALL_BITS}
_FEW_BITS = ("nf4", "int4", "int3", "int2")
# Below those of int3.
_BUDGETS = tuple(f"{tenths / 10:g} bits" for tenths in (32, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 11, 10, 9, 8))
_REFINED = RefinementConfig(steps=REFINED_STEPS)  # of what the plan proposes itself
_ALIKE = 0.03  # of the gap closed: what three seeds hardly tell apart
_AS_FAST = 1.1  # times a step: what a plan does not tell apart


@dataclass(frozen=True)
class Alternative:
    """One thing to train on, with the settings that fit the budget best, or the leanest where none does.

    ``needed``: bytes of a worker's fine-tuning, or of the gradients that its emulator asks for, where these do not fit.
    ``step_seconds``: of an optimizer step, the slower of computing and of moving weights. ``measured``: the share of the gap
    that it closed in a benchmark, where there is one. ``unneeded``: an emulator, though the original fits.
    """

    name: str
    memory: MemoryModel
    needed: int
    fits: bool
    step_seconds: float
    measured: Measured | None
    unneeded: bool = False

    @property
    def config(self) -> RunConfig:
        """Its settings."""
        return self.memory.config


@dataclass(frozen=True)
class Choice:
    """All alternatives within a budget, and the one to take.

    One is left out where a faster one closes more in equal time. Of what closed within :data:`_ALIKE` of the largest measured
    share of the gap, the fastest is taken; of those within :data:`_AS_FAST` times its step, what closed most. Where none was
    measured it is the first that fits.
    """

    asked: RunConfig
    budget: int
    alternatives: tuple[Alternative, ...]
    recommended: Alternative
    speeds: Speeds

    @property
    def sentence(self) -> str:
        """The recommendation."""
        best, finetune = self.recommended, self.recommended.config.finetune
        ratio = best.config.emulator.compression_ratio
        at_ratio = "" if ratio == 1 or best.config.emulator.budget else f" (ratio {ratio:g})"
        text = f"Within {size_up(self.budget)}: train on {best.name}{at_ratio},"
        text += f" {size(best.needed)} a worker and {duration(best.step_seconds)} a step"
        if finetune.gradient_accumulation_steps > 1:
            text += f" of {finetune.gradient_accumulation_steps} × {finetune.per_device_train_batch_size} rows"
        if ratio == 1:
            text += "; no emulator is needed"
        if best.memory.finetuning_hold() != "resident":
            text += f"; its {size(best.memory.weights)} of weights wait in the host's memory"
        return text + "."

    @property
    def overrides(self) -> list[str]:
        """The overrides on the command line that make the recommended run."""
        old, new = (_settings(config) for config in (self.asked, self.recommended.config))
        changed = [f"{key}={value}" for key, value in new.items() if value != old.get(key)]
        if new["emulator.budget"] not in ("null", old["emulator.budget"]):  # which decides these
            given = [f"emulator.{key}" for key in DECIDED if key in self.asked.emulator.model_fields_set]
            changed += [f"{key}=null" for key in given if key not in new]
        asked: Any = self.asked.memory_budget
        if asked != "inference":
            whole = ((unit, asked // held) for unit, held in (("GiB", 2**30), ("MiB", 2**20)) if asked % held == 0)
            asked = next((f"{number}{unit}" for unit, number in whole), int(asked))
        return [f"memory_budget={asked}", *changed, *_solved(self.recommended.config)]


def choose_training(
    prepared: Prepared, lengths: Lengths, speeds: Speeds, runs: Callable[[Prepared], bool] = lambda run: True
) -> Choice:
    """Plans every alternative within the config's ``memory_budget``, without starting anything. What ``runs`` denies is not
    recommended where there is another. Raises ConfigError where none fits; it says what the leanest one needs."""
    budget = int(MemoryModel(prepared).budget or 0)
    alternatives = tuple(_alternatives(prepared, budget, lengths, speeds))
    fit = [one for one in alternatives if one.fits and not one.unneeded]
    if not fit:
        least = min(alternatives, key=lambda one: one.needed)
        parts = with_base(least.memory.finetuning_parts())
        lowers = budget > parts["base"] + parts.get("weights", 0)  # what no setting below lowers
        raise ConfigError(
            f"Nothing can be trained within {size_up(budget)}: the least, of {least.name}, is {size_up(least.needed)}: give that"
            f" much{', or lower data.max_seq_length or the size of the adapter' if lowers else ''}."
        )
    best = next((one for one in _by_merit(fit) if runs(one.memory.prepared)), None) or next(_by_merit(fit))
    return Choice(prepared.config, budget, alternatives, best, speeds)


def _by_merit(fit: Sequence[Alternative]) -> Iterator[Alternative]:
    """What fits, in the order of recommendation."""
    left = list(fit)
    while left:
        best = _best([(one, one.measured.gap_closed) for one in left if one.measured is not None]) or left[0]
        yield best
        left.remove(best)


def _best(measured: Sequence[tuple[Alternative, float]]) -> Alternative | None:
    in_time = [
        (one, closed) for one, closed in measured if not any(_overtakes(*other, one, closed) for other in measured)
    ]
    most = max((closed for _, closed in in_time), default=0.0)
    alike = [(one, closed) for one, closed in in_time if closed >= most - _ALIKE]
    limit = _AS_FAST * min((one.step_seconds for one, _ in alike), default=0.0)
    as_fast = [(one, closed) for one, closed in alike if one.step_seconds <= limit]
    return max(as_fast, key=lambda pair: pair[1], default=(None, 0.0))[0]


def _overtakes(other: Alternative, closed_other: float, one: Alternative, closed: float) -> bool:
    """Whether ``other`` is faster, and closes more than ``one`` in the steps that ``one`` has time for meanwhile."""
    if one.step_seconds <= _AS_FAST * other.step_seconds:
        return False
    return closed_other > closed * closed_by(other.step_seconds / one.step_seconds)


class _Candidates:
    """Every alternative within a budget, solved for when first asked for."""

    def __init__(self, prepared: Prepared, memory_budget: int, lengths: Lengths, speeds: Speeds) -> None:
        self.prepared, self.memory_budget, self.lengths, self.speeds = prepared, memory_budget, lengths, speeds

    def solve(
        self,
        name: str,
        changed: Prepared,
        ratios: Sequence[float],
        largest_batch: int | None = None,
        unneeded: bool = False,
    ) -> Alternative:
        """A way to train at the largest of the ``ratios`` and the largest batch that fit the memory, refined where that fits."""
        memory = solve_for_budget(changed, self.memory_budget, self.lengths, ratios, largest_batch)
        refines = memory.config.emulator.refines is not None
        if refines and BASE_BYTES + total(memory.refinement_parts()) > self.memory_budget:
            memory = MemoryModel(_refined(memory.prepared, None), self.lengths)
        step = busy_seconds(training_cost(memory, 1), changed.config.finetune, self.speeds, memory.weights)
        needs_gradients = memory.config.emulator.asks_for_gradients is not None and memory.layout.gradient_linears
        gradients = int(memory.least_for_gradients()) if needs_gradients else 0
        needed = max(training_bytes(memory), gradients if gradients > self.memory_budget else 0)
        measured = measured_for(memory.config.emulator)
        return Alternative(name, memory, needed, needed <= self.memory_budget, step, measured, unneeded)

    @functools.cached_property
    def resident(self) -> Alternative:
        return self.solve("the original", _changed(self.prepared, _ORIGINAL, "resident"), (1.0,))

    def originals(self) -> Iterator[Alternative]:
        """The original, whole and with its blocks offloaded."""
        hold, section = self.prepared.config.model.hold, self.prepared.config.finetune
        if hold == "resident" or not self.resident.fits:
            yield self.resident
        else:  # the same training; stages beside which the original does not fit have its blocks come and go
            changed = MemoryModel(_changed(self.resident.memory.prepared, {}, "auto"), self.lengths)
            yield dataclasses.replace(self.resident, memory=changed)
        if hold != "resident":
            changed_to = _changed(self.prepared, _ORIGINAL, "offloaded" if self.resident.fits else "auto")
            rows = section.per_device_train_batch_size * section.gradient_accumulation_steps
            offloaded = self.solve("the original, its blocks offloaded", changed_to, (1.0,), largest_batch=rows)
            if offloaded.memory.finetuning_hold() != "resident":  # which some methods need
                yield offloaded

    @functools.cached_property
    def in_few_bits(self) -> dict[str, Alternative]:
        """The original in each number of bits."""
        unrefined: dict[str, Any] = {"refinement": None}  # with which NF4 is refused
        runs = {
            b: _changed(self.prepared, {**_WHOLE, "quantization": b, **(unrefined if b == "nf4" else {})})
            for b in _FEW_BITS
        }
        return {b: self.solve(f"the original in {described_bits(b)}", run, (1.0,)) for b, run in runs.items()}

    @functools.cached_property
    def of_budget(self) -> Alternative | None:
        """An emulator of the config's own budget, where it has one."""
        budget = self.prepared.config.emulator.budget
        if budget is None:
            return None
        changed = _changed(self.prepared, {"budget": budget})
        return self.solve(f"an emulator of {budget}", changed, RATIOS, unneeded=self.resident.fits)

    def emulators(self) -> Iterator[Alternative]:
        """One of the config's budget, and one of factors in all bits."""
        if self.of_budget is not None:
            yield self.of_budget
        changed = _changed(self.prepared, {**_IN_ALL_BITS, "residual_rank": 0})
        yield self.solve("an emulator", changed, RATIOS, unneeded=self.resident.fits)

    def below_int3(self) -> Iterator[Alternative]:
        """An emulator of the largest budget below that of int3 that fits, or of a smaller one that closed more as it leaves
        memory for refinement, or else of the smallest, where the config's own budget does not fit."""
        if self.of_budget is not None and self.of_budget.fits:
            return
        unneeded, solved = self.resident.fits or self.in_few_bits["int3"].fits, list[Alternative]()
        for bits, run in _of_budgets(self.prepared):
            emulator = self.solve(f"an emulator of {bits}", run, RATIOS, unneeded=unneeded)
            solved.append(emulator)
            if unneeded or (emulator.fits and emulator.config.emulator.refinement == run.config.emulator.refinement):
                break
        fit = [one for one in solved if one.fits] or solved[-1:]
        yield from sorted(fit, key=lambda one: -one.measured.gap_closed if one.measured else 0.0)[:1]


def _alternatives(prepared: Prepared, budget: int, lengths: Lengths, speeds: Speeds) -> Iterator[Alternative]:
    candidates = _Candidates(prepared, budget, lengths, speeds)
    yield from candidates.originals()
    yield from candidates.in_few_bits.values()
    yield from candidates.emulators()
    yield from candidates.below_int3()


def _settings(config: RunConfig) -> dict[str, Any]:
    """What alternatives differ in, beside what is solved for."""
    emulator = config.emulator
    settings = {"model.hold": config.model.hold, "emulator.budget": emulator.budget or "null"}
    if emulator.refinement is None:
        settings["emulator.refinement"] = "null"
    else:
        settings["emulator.refinement.steps"] = str(emulator.refinement.steps)
    keys = ("storage", "objective", *(("quantization", "residual_rank") if emulator.budget is None else ()))
    return settings | {f"emulator.{key}": getattr(emulator, key) for key in keys}


def _solved(config: RunConfig) -> list[str]:
    """What :func:`solve_for_budget` solves for, as the command line takes it."""
    finetune, emulator = config.finetune, config.emulator
    batch = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    own = {} if emulator.heals is None else emulator.heals.model_dump(include=batch, exclude_none=True)
    return [
        *(f"emulator.healing.{key}={value}" for key, value in own.items()),
        *([] if emulator.budget is not None else [f"emulator.compression_ratio={emulator.compression_ratio:g}"]),
        f"finetune.per_device_train_batch_size={finetune.per_device_train_batch_size}",
        f"finetune.gradient_accumulation_steps={finetune.gradient_accumulation_steps}",
        f"finetune.gradient_checkpointing={str(finetune.gradient_checkpointing).lower()}",
    ]


def _of_budgets(prepared: Prepared) -> Iterator[tuple[str, Prepared]]:
    """Each budget that its linears have forms for, and its healing factors to grow, the largest first, with the run under it: by
    predictions, whose gradients every budget asks for. It is refined, as the figures are of, unless it heals, after which
    refinement was not measured, or its blocks are not by themselves."""
    config, itemsize = prepared.config, file_dtype(prepared).itemsize
    own = config.emulator.model_dump(exclude=set(DECIDED))
    alone = not blocks_share(prepared.model_config, config.model.trust_remote_code)
    if config.emulator.refinement is None and config.emulator.healing is None and alone:
        own["refinement"] = _REFINED.model_dump()
    for bits in _BUDGETS:
        emulator = EmulatorConfig.model_validate({**own, "objective": "predictions", "budget": bits})
        changed = config.model_copy(update={"emulator": emulator})
        dense = config.model_copy(update={"emulator": emulator.model_copy(update={"budget": None})})
        try:
            layout = spend_evenly(layout_under(prepared.layout, dense), emulator, itemsize)
            check_healing(changed, layout)
        except ConfigError:
            continue
        yield bits, dataclasses.replace(prepared, config=changed, layout=layout)


def _refined(prepared: Prepared, refinement: RefinementConfig | None) -> Prepared:
    emulator = prepared.config.emulator.model_copy(update={"refinement": refinement})
    return dataclasses.replace(prepared, config=prepared.config.model_copy(update={"emulator": emulator}))


def _changed(prepared: Prepared, emulator: dict[str, Any], hold: str | None = None) -> Prepared:
    """The run with the changed settings of its emulator and, unless None, of ``model.hold``."""
    config = prepared.config
    sections = {
        "emulator": config.emulator.model_copy(update={"budget": None, **emulator}),
        "model": config.model.model_copy(update={"hold": hold or config.model.hold}),
    }
    return with_config(prepared, config.model_copy(update=sections))
