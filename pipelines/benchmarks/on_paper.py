"""Every stage of 8 B and 70 B on 16 cores and on one H100, by arithmetic.

    PYTHONPATH=. python pipelines/benchmarks/on_paper.py

Operations and bytes are counted from shapes, as the stages do them; times are these over the speeds below, the slower of
computing and moving, without starting anything. Then, of 70 B, what calibrating block by block holds and what correcting
multiplies. cluster/README.md has all that this prints.
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
REFINED, HEALED, FINISHED = 25, 100, 3  # steps, of a block and of training, where these stages are asked for
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
# 67 in float32 and (tensor cores) in float64, of which 40 % and 60 % are; 50 GB/s by PCIe 5. Of eigendecompositions 0.3 and
# 1 TFLOPS are assumed.
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


def gradients(model: Model, machine: Machine) -> Work:
    """What ``predictions`` and ``sensitivity`` weigh by: with checkpointing three passes a token, and half of every sum over a
    linear's outputs, in one wave."""
    tokens = CALIBRATED * LENGTH
    sums = model.blocks * _squares(model)
    return Work(tokens * (6.0 * (model.dense + model.head) + sums), disk=model.weights + 2 * sums, rounds=2)


def allocate(model: Model, machine: Machine) -> Work:
    """By ``sensitivity``: of each linear both Cholesky factors, ``L_oᵀ W``, ``W G Wᵀ`` of the smaller side, its eigenvalues."""
    work = Work(disk=model.weights + model.gram_bytes + 2.0 * model.blocks * _squares(model))
    for spec in model.linears:
        small, large = sorted((float(spec.out_features), float(spec.in_features)))
        work.products += model.blocks * (
            (small**3 + large**3) / 3
            + spec.num_parameters * (spec.out_features + 2.0 * spec.in_features)
            + 2.0 * small**2 * large
        )
        work.eigen += model.blocks * 4 / 3 * small**3
    return work


def _squares(model: Model) -> float:
    return sum(float(spec.out_features) ** 2 for spec in model.linears)


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


def round_to_4_bits(model: Model, machine: Machine) -> Work:
    """In place of factorizing: of each linear ``9 out · in²`` (:func:`emloc_ray.planning.training.rounding_work`), on CPUs 2.5
    times as long as of plain products, as measured there; of each group two Cholesky factors."""
    longer = 2.5 if machine.transfer == float("inf") else 1.0
    rounding = 9.0 * sum(spec.num_parameters * spec.in_features for spec in model.linears)
    roots = 2 / 3 * sum(float(group[0].in_features) ** 3 for group in model.groups)
    written = 4.25 / 8 * model.dense + 2.0 * model.others
    return Work(products=model.blocks * longer * (rounding + roots), disk=model.weights + model.gram_bytes + written)


def finetune(model: Model, machine: Machine) -> Work:
    """With checkpointing three passes a token, frozen weights having no gradients; a quarter of the tokens are labels."""
    return Work(STEPS * ROWS * LENGTH * 6.0 * (model.kept + model.head / 4), disk=2.0 * (model.kept + model.others))


def refine(model: Model, machine: Machine) -> Work:
    """Both models' rows through each block, the emulator's once more to be scored, and steps on a block's factors alone."""
    scored = CALIBRATED * LENGTH * 2.0 * (model.dense + 2 * model.kept)
    steps = REFINED * ROWS * LENGTH * 6.0 * model.kept
    return Work(scored + steps, disk=model.weights + 2 * 2.0 * (model.kept + model.others), rounds=1)


def heal(model: Model, machine: Machine) -> Work:
    """A pass of the original for its top logits, then steps as in fine-tuning on all tokens; the factors written anew."""
    tokens = HEALED * ROWS * LENGTH
    passes = tokens * (2.0 * (model.dense + model.head) + 6.0 * (model.kept + model.head))
    return Work(passes, disk=model.weights + 3 * 2.0 * (model.kept + model.others), rounds=HEALED)


def finish(model: Model, machine: Machine) -> Work:
    """Steps on the original itself."""
    return _steps_on_original(model, FINISHED)


def lora_on_the_original(model: Model, machine: Machine) -> Work:
    """What fine-tuning without an emulator takes."""
    return _steps_on_original(model, STEPS)


def _steps_on_original(model: Model, steps: int) -> Work:
    """As fine-tuning on the emulator; where blocks come and go, once forward and once for the backward pass."""
    return Work(steps * ROWS * LENGTH * 6.0 * (model.dense + model.head / 4), disk=model.weights, rounds=2 * steps)


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


STAGES = (
    calibrate,
    gradients,
    allocate,
    factorize,
    round_to_4_bits,
    refine,
    heal,
    finetune,
    correct,
    finish,
    merge,
    evaluate,
    lora_on_the_original,
)


def table() -> str:
    """The Markdown of both models."""
    models = [Model.of("8 B", SHAPES["full"].model), Model.of("70 B", SHAPES["full"].large)]
    names = [f"{model.name}, {what}" for model in models for what in ("TFLOP", "GB", *(m.name for m in MACHINES))]
    lines = [f"| stage | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for stage in STAGES:
        cells = []
        for model in models:
            work = stage(model, MACHINES[-1])
            cells += [f"{work.operations / 1e12:,.0f}", f"{work.disk / 1e9:,.0f}"]
            cells += [duration(stage(model, machine).seconds(machine, model.weights)) for machine in MACHINES]
        lines.append(f"| {stage.__name__.replace('lora_', 'LoRA ').replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def correction_table() -> str:
    """The Markdown of what the correction multiplies, of 70 B parameters."""
    model = Model.of("70 B", SHAPES["full"].large)
    squares = model.blocks * sum(float(spec.in_features) ** 2 for spec in model.linears)
    deltas = model.blocks * sum(2.0 * spec.num_parameters * spec.in_features for spec in model.linears)
    products = {
        ("`G Q`", "2 r in², each linear"): 2 * R * squares,
        ("`W [Q, GQ]`", "4 r out · in"): 4.0 * R * model.dense,
        ("`W_E [Q, GQ]`", "4 r of what the emulator keeps"): 4.0 * R * model.kept,
    }
    lines = ["| product | operations | TFLOP |", "| --- | --- | --- |"]
    lines += [f"| {what} | {how} | {count / 1e12:.1f} |" for (what, how), count in products.items()]
    lines.append(f"| in all | | {sum(products.values()) / 1e12:.1f} |")
    lines.append(f"| not made: `Δ G` | 2 out · in² | {round(deltas / 1e12, -2):,.0f} |")
    return "\n".join(lines)


def blocks_table() -> str:
    """The Markdown of what calibrating 70 B parameters block by block holds, 256 rows of 512 tokens on a worker's disk."""
    model = Model.of("70 B", SHAPES["full"].large)
    hidden = 2.0 * model.groups[0][0].in_features
    block = sum(4.0 * group[0].in_features ** 2 for group in model.groups)
    lines = ["| what | size |", "| --- | --- |"]
    lines += [
        f"| Grams of all blocks, in all | {model.blocks * block / 1e9:.0f} GB: out of reach for `resident` |",
        f"| Grams of one block: in a worker; while they are summed, on some node | {block / 1e9:.0f} GB;"
        f" {1.5 * block / 1e9:.0f} GB |",
        f"| a block's weights; the embedding | {2 * model.dense / model.blocks / 1e9:.1f} GB; {2 * model.head / 1e9:.0f} GB |",
        f"| hidden states of two blocks, 256 rows of 512 tokens, on a worker's disk | {2 * hidden * 256 * 512 / 1e9:.1f} GB,"
        f" {2 * hidden / 1e3:.0f} kB a token |",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), blocks_table(), correction_table(), sep="\n\n")
