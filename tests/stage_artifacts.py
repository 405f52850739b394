"""Where the artifacts of a tiny model are, and small ones made for the stages' tests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from emloc_ray.core.correction import Candidate
from emloc_ray.core.gram import Gram
from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import shard_name, write_index, write_shard
from emloc_ray.io.formats.grams import GramStore, StoredGram, write_gram_index, write_gram_shard
from emloc_ray.modeling.adapter_files import LoraModule, write_adapter
from emloc_ray.modeling.architecture import LinearSpec, block_linears, empty_model
from emloc_ray.stages.calibrate.job import CalibrationJob
from emloc_ray.stages.correct.job import CorrectionJob
from emloc_ray.stages.factorize.job import FactorizationJob


@dataclass(frozen=True)
class Artifacts:
    """Paths and layout of one tiny model's calibration and adapter."""

    root: Path
    model_dir: Path
    specs: tuple[LinearSpec, ...]
    groups: tuple[tuple[LinearSpec, ...], ...]
    ranks: dict[str, int]
    calibration_job: CalibrationJob

    @property
    def calibration_dir(self) -> Path:
        return self.root / "calibration"

    @property
    def tokens_dir(self) -> Path:
        return self.root / "tokens"

    @property
    def adapter_dir(self) -> Path:
        return self.root / "adapter"

    def correction(self, emulator_dir: Path, root: Path, candidate: Candidate, **more: Any) -> CorrectionJob:
        """Of its adapter, for an emulator of its model, into ``root``."""
        paths = self.model_dir, emulator_dir, self.calibration_dir, self.adapter_dir, root / "corrected"
        job = CorrectionJob(*paths, self.tokens_dir, self.tokens_dir, self.specs, (candidate,))
        return replace(job, **more)


def random_rows(*lengths: int, seed: int = 0) -> list[Tokens]:
    """Rows of these lengths, by default of four; the first three tokens of each are its prompt."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randint(2, 300, (length,), generator=generator).tolist() for length in lengths or (13, 5, 16, 8)]
    return [Tokens(ids, [position >= 3 for position in range(len(ids))]) for ids in made]


def half_rows(*lengths: int, seed: int = 0) -> list[Tokens]:
    """Rows of these lengths; the second half of each is its completion."""
    rows = random_rows(*lengths, seed=seed)
    return [Tokens(row.input_ids, [position >= len(row) // 2 for position in range(len(row))]) for row in rows]


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds."""
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def write_tokens(directory: Path, count: int, rows_per_shard: int) -> Path:
    """Random rows of several lengths, half of each completion."""
    rows = half_rows(*(4 + number % 9 for number in range(count)), seed=1)
    parts = [rows[start : start + rows_per_shard] for start in range(0, count, rows_per_shard)]
    for number, part in enumerate(parts):
        write_shard(directory / shard_name(number), part)
    write_index(directory, [len(part) for part in parts], {"tokens": sum(map(len, rows))})
    return directory


def write_lora(directory: Path, specs: tuple[LinearSpec, ...], r: int = 4) -> Path:
    """A trained-looking adapter on some linears."""
    generator = torch.Generator().manual_seed(2)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 8}
    config["target_modules"] = [spec.name for spec in specs]
    modules = [
        LoraModule(
            spec.name,
            torch.randn(r, spec.in_features, generator=generator) * 0.1,
            torch.randn(spec.out_features, r, generator=generator) * 0.1,
            8 / r,
        )
        for spec in specs
    ]
    write_adapter(directory, config, modules)
    return directory


def gpt2_group(model_dir: Path, root: Path) -> tuple[FactorizationJob, tuple[LinearSpec, ...], StoredGram]:
    """One Conv1D of a tiny GPT-2 under an identity Gram, so that plain norms measure its error."""
    specs = block_linears(empty_model(AutoConfig.from_pretrained(model_dir)))
    spec = next(spec for spec in specs if spec.name.endswith("0.attn.c_attn"))
    write_gram_shard(root / "grams" / "grams.safetensors", {spec.name: Gram(torch.eye(spec.in_features), 64)})
    write_gram_index(root / "grams", [[spec.name]], {spec.name: "grams.safetensors"}, {spec.name: 64})
    job = FactorizationJob(model_dir, root / "unused", ((spec,),), {spec.name: 16})
    return job, (spec,), GramStore(root / "grams").stored(spec.name)
