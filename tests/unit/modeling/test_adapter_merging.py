"""An adapter's tensors folded into a checkpoint by row chunks: what PEFT's own merge makes of the whole model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import FITTING, PROMPTS, logits, parameters, settings
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from emloc_ray.core.merging import squared_row_norms
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.modeling import adapter_merging
from emloc_ray.modeling.adapter_files import Adapter
from emloc_ray.modeling.adapter_merging import changed_tensors, compute_as_merged, merged_chunks
from emloc_ray.modeling.adapter_methods import update_rank
from emloc_ray.modeling.architecture import LinearSpec, StoredRows, block_linears, empty_model
from emloc_ray.modeling.block_weights import BlockWeights
from emloc_ray.modeling.loading import load_model

MERGED = [(case, family) for case, family in FITTING if case not in PROMPTS]


@pytest.mark.parametrize(("case", "family"), parameters(MERGED))
def test_every_tensor_is_as_peft_merges_it(
    case: str, family: str, adapter_dir: Callable[[str, str], Path], tiny_model_dir: Callable[..., Path]
) -> None:
    model_dir, adapter = tiny_model_dir(family), Adapter(adapter_dir(case, family))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), adapter_dir(case, family))
    expected = plain.merge_and_unload().state_dict()
    specs = block_linears(empty_model(AutoConfig.from_pretrained(model_dir)))
    changed = changed_tensors(adapter, specs)
    assert {change.spec.name for parts in changed.values() for change in parts.values()} == set(adapter.names)
    for entry in Checkpoint(model_dir):
        if entry.name not in changed:
            assert torch.equal(entry.read_rows(), expected[entry.name]), entry.name
            continue
        whole = torch.cat(list(merged_chunks(entry, adapter, changed[entry.name], 2**20)))
        torch.testing.assert_close(whole, expected[entry.name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(whole, entry.read_rows()), entry.name
        chunked = torch.cat(list(merged_chunks(entry, adapter, changed[entry.name], 1)))
        assert torch.equal(chunked, whole), entry.name  # no bit depends on the chunks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("case", "family"), parameters(MERGED))
def test_a_model_computes_as_merged(
    case: str, family: str, dtype: str, adapter_dir: Callable[[str, str], Path], tiny_model_dir: Callable[..., Path]
) -> None:
    """In float32 with the weights as a checkpoint of the dtype holds them."""
    model_dir, adapter = tiny_model_dir(family, dtype=dtype), Adapter(adapter_dir(case, family))
    specs = block_linears(empty_model(AutoConfig.from_pretrained(model_dir)))
    expected = load_model(model_dir, dtype="float32")
    changed = changed_tensors(adapter, specs)
    for entry in Checkpoint(model_dir):
        if entry.name in changed:
            whole = torch.cat(list(merged_chunks(entry, adapter, changed[entry.name], 2**20)))
            expected.get_parameter(entry.name).data = whole.float()
    model = load_model(model_dir, dtype="float32")
    before = logits(model)
    compute_as_merged(model, adapter, BlockWeights(model_dir))
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits(model), before, rtol=1e-3)
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in expected.named_parameters()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_norms_of_rows_are_computed_once(
    dtype: str,
    adapter_dir: Callable[[str, str], Path],
    tiny_model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model_dir, adapter = tiny_model_dir("llama"), Adapter(adapter_dir("dora", "llama"))
    model, computed = load_model(model_dir, dtype=dtype), []
    compute_as_merged(model, adapter, BlockWeights(model_dir, dtype=dtype))

    def norms(*args: Any) -> torch.Tensor:
        computed.append(args)
        return squared_row_norms(*args)

    monkeypatch.setattr(adapter_merging, "squared_row_norms", norms)
    first, second = logits(model), logits(model)
    assert torch.equal(first, second)
    assert len(computed) == len(adapter.names)


@pytest.mark.parametrize("case", ["lora", "dora"])
def test_what_a_narrower_model_rounds_of_a_weight_is_merged_too(
    case: str, adapter_dir: Callable[[str, str], Path], tiny_model_dir: Callable[..., Path]
) -> None:
    """Else updates below half a step of bfloat16 would be lost, which the merged checkpoint holds."""
    model_dir, adapter, given = tiny_model_dir("llama"), Adapter(adapter_dir(case, "llama")), []
    model = load_model(model_dir, dtype="bfloat16")
    name = adapter.names[0]
    compute_as_merged(model, adapter, BlockWeights(model_dir, dtype="bfloat16"))
    linear = model.get_submodule(name)
    linear.register_forward_hook(lambda module, args, output: given.append((args[0], output)))
    logits(model)
    entry = Checkpoint(model_dir).entry(f"{name}.weight")
    changes = changed_tensors(adapter, block_linears(empty_model(AutoConfig.from_pretrained(model_dir))))[entry.name]
    weight = torch.cat(list(merged_chunks(entry, adapter, changes, 2**20))).bfloat16()
    read, output = given[0]
    assert torch.equal(output, torch.nn.functional.linear(read, weight))


@pytest.mark.parametrize(
    "case", [case for case, family in MERGED if family == "qwen2"] + ["lora", "loha", "lokr", "vera"]
)
def test_a_weight_is_merged_where_the_checkpoint_holds_its_rows(
    case: str, tmp_path: Path, adapter_dir: Callable[[str, str], Path], tiny_model_dir: Callable[..., Path]
) -> None:
    family = "qwen2" if ("qwen2" in (f for c, f in MERGED if c == case)) else "llama"
    model_dir = tiny_model_dir(family)
    adapter, checkpoint = Adapter(adapter_dir(case, family)), Checkpoint(model_dir)
    specs = [s for s in block_linears(empty_model(AutoConfig.from_pretrained(model_dir))) if s.name in adapter.names]
    whole = merged(adapter, specs, checkpoint)
    # Each weight in two tensors of unequal sizes, the second of them a slice of a larger one, whose other is not adapted.
    tensors: dict[str, torch.Tensor] = {}
    placed = []
    for spec in specs:
        weight, cut = checkpoint.read(spec.weight_name), spec.out_features // 4 + 1
        other = torch.ones_like(weight[cut:])
        tensors |= {f"{spec.name}.one": weight[:cut].clone(), f"{spec.name}.two": torch.stack([other, weight[cut:]])}
        stored = (StoredRows(f"{spec.name}.one"), StoredRows(f"{spec.name}.two", cut, 1))
        bias = None
        if spec.has_bias:
            tensors[f"{spec.name}.biases"] = checkpoint.read(f"{spec.name}.bias")[None]
            bias = StoredRows(f"{spec.name}.biases", 0, 0)
        placed.append(dataclasses.replace(spec, stored=stored, stored_bias=bias))
    save_file(tensors, tmp_path / "model.safetensors")
    found = merged(adapter, placed, Checkpoint(tmp_path))
    for spec in specs:
        apart = found[f"{spec.name}.two"]
        assert torch.equal(apart[0], torch.ones_like(apart[0]))
        assert torch.equal(torch.cat([found[f"{spec.name}.one"], apart[1]]), whole[spec.weight_name]), spec.name
        if f"{spec.name}.bias" in whole:
            assert torch.equal(found[f"{spec.name}.biases"][0], whole[f"{spec.name}.bias"])


def merged(adapter: Adapter, specs: Sequence[LinearSpec], checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor that changes, put together of small chunks."""
    changed = changed_tensors(adapter, specs)
    entries = {name: checkpoint.entry(name) for name in changed}
    chunks = {name: list(merged_chunks(entry, adapter, changed[name], 2000)) for name, entry in entries.items()}
    return {name: torch.cat([c.reshape(-1) for c in found]).view(entries[name].shape) for name, found in chunks.items()}


def test_ia3_scales_biases_of_what_linears_give(
    adapter_dir: Callable[[str, str], Path], tiny_model_dir: Callable[..., Path]
) -> None:
    specs = block_linears(empty_model(AutoConfig.from_pretrained(tiny_model_dir("gpt2"))))
    biases = {name for name in changed_tensors(Adapter(adapter_dir("ia3", "gpt2")), specs) if name.endswith(".bias")}
    assert biases == {f"transformer.h.{at}.attn.{part}.bias" for at in range(2) for part in ("c_attn", "c_proj")}


@pytest.mark.parametrize(("case", "family"), parameters(pair for pair in MERGED if pair[0] != "ia3"))
def test_the_rank_that_is_planned_is_that_of_the_update(
    case: str, family: str, adapter_dir: Callable[[str, str], Path], tiny_model_dir: Callable[..., Path]
) -> None:
    adapter = Adapter(adapter_dir(case, family))
    specs = block_linears(empty_model(AutoConfig.from_pretrained(tiny_model_dir(family))))
    options = settings(case, family, [spec.name for spec in specs])
    for spec in specs:
        if spec.name in adapter.names:
            update = adapter.update(spec)
            assert update.shape == (spec.out_features, spec.in_features)
            rank = int(torch.linalg.matrix_rank(update.rows(0, spec.out_features).double(), rtol=1e-5))
            assert rank == update_rank(options["method"], options, spec)
