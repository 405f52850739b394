"""Artifacts of a tiny Llama that the stages' plain functions work on, made without Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from stage_artifacts import Artifacts, write_lora, write_tokens
from torch import Tensor
from transformers import AutoConfig

from emloc_ray.core.ranks import rank_for_ratio
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.formats.grams import reduce_slots, write_gram_index, write_gram_shard
from emloc_ray.modeling.architecture import block_linears, empty_model, trace_inputs
from emloc_ray.modeling.block_weights import BlockWeights
from emloc_ray.stages.calibrate.job import CalibrationJob
from emloc_ray.stages.calibrate.resident_slot import ResidentSlot


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """What runs as a worker's function sets torch's threads: set them back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def artifacts(tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Tokens, Grams and an adapter on q_proj and down_proj; read them, do not write to them."""
    root = tmp_path_factory.mktemp("artifacts")
    model_dir = tiny_model_dir("llama")
    model = empty_model(AutoConfig.from_pretrained(model_dir))
    specs = tuple(block_linears(model))
    by_name = {spec.name: spec for spec in specs}
    names = trace_inputs(model, specs).groups
    tokens = write_tokens(root / "tokens", 20, 5)
    job = CalibrationJob(model_dir, tokens, tuple(tuple(group) for group in names), (0, 4), batch_size=3)
    slot = ResidentSlot(job, root / "slot.safetensors", 1)
    for number in range(4):
        slot.accumulate(number)
    slot.commit()
    firsts = [group[0] for group in names]
    grams = reduce_slots([root / "slot.safetensors"], firsts)
    write_gram_shard(root / "calibration" / "grams-1.safetensors", grams)
    write_gram_index(
        root / "calibration",
        names,
        dict.fromkeys(firsts, "grams-1.safetensors"),
        {name: gram.num_tokens for name, gram in grams.items()},
    )
    write_lora(root / "adapter", tuple(s for s in specs if s.name.endswith(("q_proj", "down_proj"))))
    ranks = {s.name: rank for s in specs if (rank := rank_for_ratio(s.out_features, s.in_features, 0.5))}
    groups = tuple(tuple(by_name[name] for name in group) for group in names)
    return Artifacts(root, model_dir, specs, groups, ranks, job)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The checkpoints that are opened from here on."""
    directories: list[Path] = []
    open_checkpoint = Checkpoint.__init__

    def noted(checkpoint: Checkpoint, directory: Path) -> None:
        directories.append(directory)
        open_checkpoint(checkpoint, directory)

    monkeypatch.setattr(Checkpoint, "__init__", noted)
    return directories


@pytest.fixture
def block_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each weight inside a block was brought, of models whose blocks come and go."""
    counts: Counter[str] = Counter()
    read = BlockWeights.read

    def counted(weights: BlockWeights, names: Sequence[str]) -> Tensor:
        if names[0].startswith(tuple(weights.blocks)):
            counts[names[0]] += 1
        return read(weights, names)

    monkeypatch.setattr(BlockWeights, "read", counted)
    return counts
