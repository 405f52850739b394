"""An adapter's start is the best of its rank for what the emulator lacks, and what is added to it is the training's alone."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from ablations.starts import closing, write_added
from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from emloc_ray.modeling.adapter_files import Adapter, LoraModule, write_adapter


def energy(difference: Tensor, gram: Tensor) -> float:
    return float((difference @ gram * difference).sum())


@pytest.mark.parametrize("weighed", [False, True])
def test_a_start_leaves_what_no_rank_can_take(weighed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rest = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.0, 1.0, 0.3, 2.0])
    gram = x.T @ x if weighed else torch.eye(5, dtype=torch.float64)
    module = closing("linear", rest, gram.float() if weighed else None, 2, 0.5)
    left = energy(rest - module.scale * module.lora_b.double() @ module.lora_a.double(), gram)
    values = torch.linalg.svdvals(rest @ torch.linalg.cholesky(gram))
    assert left == pytest.approx(float((values[2:] ** 2).sum()), rel=1e-4)
    # Neither factor is the larger: the norms of A's rows are those of s B's columns times s.
    torch.testing.assert_close(module.lora_a.norm(dim=1), module.scale * module.lora_b.norm(dim=0), rtol=1e-4, atol=0)


def test_what_was_added_is_what_the_training_made_of_the_start(tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["linear"]).to_dict()
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    generator = torch.Generator().manual_seed(1)
    for name in ("begun", "trained"):
        a, b = torch.randn(2, 5, generator=generator), torch.randn(4, 2, generator=generator)
        write_adapter(tmp_path / name, config, [LoraModule("linear", a, b, 3.0)])
    write_added(tmp_path / "added", Adapter(tmp_path / "begun"), Adapter(tmp_path / "trained"))

    x = torch.randn(7, 5, generator=generator)
    outputs = {}
    for name in ("begun", "trained", "added"):
        model = nn.Sequential()
        linear = nn.Linear(5, 4, bias=False)
        nn.init.zeros_(linear.weight)
        model.add_module("linear", linear)
        outputs[name] = PeftModel.from_pretrained(model, str(tmp_path / name))(x)
    torch.testing.assert_close(outputs["added"], outputs["trained"] - outputs["begun"])
    assert all(not torch.allclose(outputs[a], outputs[b]) for a, b in itertools.combinations(outputs, 2))
