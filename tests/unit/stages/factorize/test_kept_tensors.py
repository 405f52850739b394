"""What an emulator keeps of the original's files, beside its linears."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bare_runs import tiny_run
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from emloc_ray.core.integer_forms import IntegerForms
from emloc_ray.stages.context import Context
from emloc_ray.stages.factorize.factorize import finish_emulator
from emloc_ray.stages.factorize.kept_tensors import copy_rest, rest_of_shards
from emloc_ray.stages.factorize.stage import factorization_job

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def _head_too(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def _another_head(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING] + 1


def _masks(tensors: dict[str, Tensor]) -> None:
    tensors |= {f"transformer.h.{block}.attn.bias": torch.ones(1, 1, 128, 128) for block in (0, 1)}


@pytest.mark.parametrize(
    ("family", "change", "left_out"),
    [
        ("llama", _head_too, {HEAD}),
        ("llama", _another_head, set()),
        ("gpt2", _masks, {"transformer.h.0.attn.bias", "transformer.h.1.attn.bias"}),
        ("mixtral", _head_too, {HEAD}),
    ],
)
def test_what_the_model_does_not_use_or_has_already_is_left_out(
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    family: str,
    change: Callable[[dict[str, Tensor]], None],
    left_out: set[str],
) -> None:
    """A budget in bytes counts each weight of the model once. Another head is another weight, which transformers does not tie."""
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    tensors: dict[str, Tensor] = {}
    for file in tiny_model_dir(family, tied=True).iterdir():
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        elif not file.name.endswith(".index.json"):
            (model_dir / file.name).write_bytes(file.read_bytes())
    change(tensors)
    save_file(tensors, model_dir / "model.safetensors", {"format": "pt"})
    prepared = tiny_run(tmp_path, model_dir, emulator={"budget": "3 bits"})
    context = Context(prepared, model_dir)
    job = factorization_job(context)
    assert {*job.unused, *job.tied} >= left_out
    kept = [part.entry for parts in rest_of_shards(job) for part in parts]
    names = {entry.name for entry in kept}
    assert not names & left_out
    if left_out:
        layout = prepared.layout
        assert sum(entry.num_bytes for entry in kept) == 4 * (layout.num_parameters - layout.parameters_targeted)
    else:
        assert HEAD in names
    whole = dataclasses.replace(job, ranks={}, integers=IntegerForms())
    for number, parts in enumerate(rest_of_shards(whole)):
        copy_rest(parts, job.out_dir / f"model-{number}.safetensors")
    config = AutoConfig.from_pretrained(model_dir)
    finish_emulator(sorted(job.out_dir.glob("*.safetensors")), config, model_dir, {}, "factors", None)
    ids = torch.randint(2, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    models = [AutoModelForCausalLM.from_pretrained(place) for place in (model_dir, job.out_dir)]
    with torch.no_grad():
        one, other = (model(ids).logits for model in models)
    torch.testing.assert_close(other, one)
