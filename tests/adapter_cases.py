"""Adapters of every method, trained a little on an emulator of a tiny model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCABULARY

from emloc_ray.modeling.adapter import attach_adapter, save_trained_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.loading import load_model

IDS = torch.randint(2, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
}
# By a name of the case: the method and its settings.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {"r": 4, "lora_alpha": 8}),
    "rslora": ("rslora", {"r": 4, "lora_alpha": 8, "use_rslora": True}),
    "dora": ("dora", {"r": 4, "lora_alpha": 8, "use_dora": True}),
    "dora with dropout": ("dora", {"r": 4, "lora_alpha": 8, "use_dora": True, "lora_dropout": 0.3}),
    "loha": ("loha", {"r": 2, "alpha": 5, "init_weights": False}),
    "loha of full rank": ("loha", {"r": 9, "alpha": 5, "rank_pattern": {"v_proj": 3}}),
    "lokr": ("lokr", {"r": 2, "alpha": 6, "alpha_pattern": {"q_proj": 3}}),
    "lokr decomposed": ("lokr", {"r": 2, "decompose_both": True, "decompose_factor": 4}),
    "vera": ("vera", {"r": 16}),
    "ia3": ("ia3", {}),
    "prefix": ("prefix_tuning", {"num_virtual_tokens": 5}),
    "prompt": ("prompt_tuning", {"num_virtual_tokens": 5}),
}
PROMPTS = ("prefix", "prompt")
ON_LINEARS = tuple(name for name in CASES if name not in PROMPTS)
MAIN_ROAD = ("lora", "dora")


def fits(case: str, family: str) -> bool:
    """Whether PEFT takes the method on the family: its LoHa and LoKr know no Conv1D."""
    if family == "qwen2":  # for what it has beside a Llama, biases
        return case in ("dora", "dora with dropout", "ia3")
    return family != "gpt2" or CASES[case][0] not in ("loha", "lokr")


FITTING = [(case, family) for case in CASES for family in TARGETS if fits(case, family)]


def parameters(pairs: Iterable[tuple[str, str]]) -> list[Any]:
    """Cases and families as parameters of a test, slow but for the methods of the main road."""
    return [pytest.param(*pair, marks=() if pair[0] in MAIN_ROAD else pytest.mark.slow) for pair in pairs]


def settings(case: str, family: str, names: list[str]) -> dict[str, Any]:
    """As ``adapter_config`` takes them, with full names of the linears."""
    method, own = CASES[case]
    full = [name for name in names if name.rsplit(".", 1)[-1] in TARGETS[family]]
    forward = [name for name in full if "down_proj" in name or "mlp.c_proj" in name]
    found = {"method": method, **own, "target_modules": full, "fan_in_fan_out": family == "gpt2"}
    return {**found, "feedforward_modules": forward} if method == "ia3" else found


def attached(emulator_dir: Path, case: str, family: str) -> Any:
    """A fresh adapter on an emulator."""
    model = load_model(emulator_dir)
    names = [name for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in TARGETS[family]]
    torch.manual_seed(0)
    return attach_adapter(model, adapter_config(**settings(case, family, names)))


def train(model: Any, steps: int = 3) -> None:
    """A few large steps, so that the update shows; no two elements of a vector are moved alike."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS, attention_mask=torch.ones_like(IDS)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trained(directory: Path, emulator_dir: Path, case: str, family: str) -> Any:
    """An adapter trained on an emulator and saved; gives the model in evaluation mode."""
    model = attached(emulator_dir, case, family)
    train(model)
    save_trained_adapter(model, directory, targets=TARGETS[family], base_model="the/original")
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """At the row's own positions: what stands before them is the adapter's."""
    found = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return found[:, -IDS.shape[1] :]
