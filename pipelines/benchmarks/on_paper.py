"""Every stage of 8 B and 70 B on 16 cores and on one H100, by arithmetic.

    PYTHONPATH=. python pipelines/benchmarks/on_paper.py

Operations and bytes are counted from shapes, as the stages do them; times are these over the speeds below, the slower of
computing and moving, without starting anything. cluster/README.md has the table that this prints.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1]))

from benchmarks.gpu.shapes import SHAPES, llama_config
from emloc_ray.core.ranks import rank_for_ratio, rank_multiple
from emloc_ray.modeling.architecture import LinearSpec, block_linears, empty_model, trace_inputs
from emloc_ray.text import duration

RATIO, R, LENGTH, ROWS = 0.5, 8, 512, 8  # of the emulator, the adapter, a row, a batch
CALIBRATED, STEPS, SCORED, SELECTED = 128, 1000, 256, 0.1  # rows, steps, rows, share of the trained tokens
VARIANTS = (4, 2)  # of the original and of the emulator, that evaluation scores
_STEPS_OF_A_LAYER = 5  # of subspace iteration, to the first look and one more
_WIDER = 1.3  # columns a rank there


@dataclass(frozen=True)
class Machine:
    """Speeds that are reached: operations a second of passes, of float32 and float64 products and of eigendecompositions;
    bytes a second of its disk and to its GPU; bytes that its weights may take, where blocks come and go beyond."""

    name: str
    passes: float
    products: float
    wide: float
    eigen: float
    disk: float = 2e9
    transfer: float = float("inf")
    room: float = float("inf")


# A core: two AVX-512 units at 3 GHz are 192 GFLOPS in float32, of which half is reached. An H100 SXM: 989 TFLOPS in bfloat16,
# 67 in float32 and (tensor cores) in float64, of which 40 % and 60 % are; 50 GB/s by PCIe 5.
MACHINES = (
    Machine("16 cores", 1.5e12, 1.5e12, 0.75e12, 0.3e12),
    Machine("one H100", 0.4 * 989e12, 0.6 * 67e12, 0.6 * 67e12, 1e12, transfer=50e9, room=72e9),
)


@dataclass
class Work:
    """What a stage does: operations by kind, bytes from and to disk, and how often the original's weights are gone through."""

    passes: float = 0.0
    products: float = 0.0
    wide: float = 0.0
    eigen: float = 0.0
    disk: float = 0.0
    rounds: int = 0

    @property
    def operations(self) -> float:
        """Of all kinds."""
        return self.passes + self.products + self.wide + self.eigen

    def seconds(self, machine: Machine, weights: float) -> float:
        """The slower of computing, reading and writing, and moving weights that do not fit."""
        kinds = ("passes", "products", "wide", "eigen")
        computing = sum(getattr(self, kind) / getattr(machine, kind) for kind in kinds)
        moving = self.rounds * weights / machine.transfer if weights > machine.room else 0.0
        return max(computing, self.disk / machine.disk, moving)


@dataclass(frozen=True)
class Model:
    """A model in bfloat16: the linears of one of its equal blocks, by group, and how many blocks and other weights it has."""

    name: str
    groups: tuple[tuple[LinearSpec, ...], ...]
    blocks: int
    others: int
    head: int
    ranks: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, sizes: dict[str, int]) -> Model:
        """From its config, by one block on the meta device."""
        block = empty_model(llama_config({**sizes, "num_hidden_layers": 1}))
        specs = block_linears(block)
        by_name = {spec.name: spec for spec in specs}
        groups = tuple(tuple(by_name[name] for name in group) for group in trace_inputs(block, specs).groups)
        embedding = sizes["vocab_size"] * sizes["hidden_size"]
        shapes = {spec.name: (spec.out_features, spec.in_features) for spec in specs}
        ranks = {n: rank_for_ratio(*s, RATIO, multiple=rank_multiple(*s)) or min(s) for n, s in shapes.items()}
        return cls(name, groups, sizes["num_hidden_layers"], 2 * embedding, embedding, ranks)

    @property
    def linears(self) -> list[LinearSpec]:
        """Of a block."""
        return [spec for group in self.groups for spec in group]

    @property
    def dense(self) -> int:
        """Parameters of the blocks' linears."""
        return self.blocks * sum(spec.num_parameters for spec in self.linears)

    @property
    def kept(self) -> int:
        """Those of the emulator's."""
        return self.blocks * sum(self.ranks[s.name] * (s.out_features + s.in_features) for s in self.linears)

    @property
    def weights(self) -> float:
        """Bytes of the original."""
        return 2.0 * (self.dense + self.others)

    @property
    def gram_bytes(self) -> float:
        """Of all Grams, as triangles in float32."""
        return self.blocks * sum(2.0 * group[0].in_features ** 2 for group in self.groups)


def calibrate(model: Model, machine: Machine) -> Work:
    """A forward pass block by block, and half of every Gram."""
    tokens = CALIBRATED * LENGTH
    grams = model.blocks * sum(group[0].in_features ** 2 for group in model.groups)
    return Work(tokens * (2.0 * model.dense + grams), disk=model.weights + model.gram_bytes, rounds=1)


def factorize(model: Model, machine: Machine) -> Work:
    """On CPUs 2.5 times the products with the Gram, as measured there; on a GPU subspace iteration."""
    work = Work(disk=model.weights + model.gram_bytes + 2.0 * (model.kept + model.others))
    for group in model.groups:
        for spec in group:
            out_features, in_features, rank = spec.out_features, spec.in_features, model.ranks[spec.name]
            if machine.transfer == float("inf"):
                work.products += model.blocks * 5.0 * spec.num_parameters * max(in_features, 2 * rank)
                continue
            width = _WIDER * rank
            work.products += model.blocks * (
                in_features**3 / 3 / len(group)
                + spec.num_parameters * in_features
                + (_STEPS_OF_A_LAYER + 2) * 4.0 * spec.num_parameters * width
            )
            work.wide += (
                model.blocks
                * (_STEPS_OF_A_LAYER + 1)
                * (2.0 * (out_features + in_features) * width**2 + 2 * width**3 / 3)
            )
            work.eigen += model.blocks * 10.0 * width**3
    return work


def finetune(model: Model, machine: Machine) -> Work:
    """With checkpointing three passes a token, frozen weights having no gradients; a quarter of the tokens are labels."""
    return Work(STEPS * ROWS * LENGTH * 6.0 * (model.kept + model.head / 4), disk=2.0 * (model.kept + model.others))


def correct(model: Model, machine: Machine) -> Work:
    """``(W − W_E) Q`` and ``G Q`` of every linear, and candidates on a tenth of the tokens that were trained on."""
    batches = int(SELECTED * STEPS)
    algebra = model.blocks * sum(
        4.0 * spec.num_parameters * R + 2.0 * spec.in_features**2 * R for spec in model.linears
    )
    passes = batches * ROWS * LENGTH * 2.0 * (model.dense + model.head / 4)
    return Work(passes, algebra, disk=2 * model.weights + model.gram_bytes, rounds=batches)


def merge(model: Model, machine: Machine) -> Work:
    """``W + s B A``, every shard read and written."""
    return Work(products=2.0 * model.dense * R, disk=2 * model.weights)


def evaluate(model: Model, machine: Machine) -> Work:
    """All variants on the held-out rows; completions left out."""
    on_original, on_emulator = VARIANTS
    blocks = on_original * model.dense + on_emulator * model.kept + sum(VARIANTS) * model.head / 4
    read = on_original * model.weights + on_emulator * 2.0 * (model.kept + model.others)
    return Work(SCORED * LENGTH * 2.0 * blocks, disk=read, rounds=on_original * SCORED // ROWS)


STAGES = (calibrate, factorize, finetune, correct, merge, evaluate)


def table() -> str:
    """The Markdown of both models."""
    models = [Model.of("8 B", SHAPES["full"].model), Model.of("70 B", SHAPES["full"].large)]
    names = [f"{model.name}, {what}" for model in models for what in ("TFLOP", "GB", *(m.name for m in MACHINES))]
    lines = [f"| stage | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for stage in STAGES:
        cells = []
        for model in models:
            found = stage(model, MACHINES[-1])
            cells += [f"{found.operations / 1e12:,.0f}", f"{found.disk / 1e9:,.0f}"]
            cells += [duration(stage(model, machine).seconds(machine, model.weights)) for machine in MACHINES]
        lines.append(f"| {stage.__name__} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
