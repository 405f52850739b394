"""An adapter's tensors folded into a checkpoint by row chunks: what PEFT's own merge makes of the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_cases import FITTING, PROMPTS, trained
from peft import PeftModel
from tiny import save_emulator
from transformers import AutoConfig, AutoModelForCausalLM

from emloc_ray.io.checkpoint import Checkpoint
from emloc_ray.modeling.adapter import Adapter
from emloc_ray.modeling.adapter_merging import changed_tensors, merged_chunks
from emloc_ray.modeling.adapter_methods import update_rank
from emloc_ray.modeling.architecture import block_linears, empty_model

MERGED = [(case, family) for case, family in FITTING if case not in PROMPTS]


@pytest.mark.parametrize(("case", "family"), MERGED)
def test_every_tensor_is_as_peft_merges_it(
    case: str, family: str, tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    model_dir = tiny_model_dir(family)
    trained(tmp_path / "a", save_emulator(model_dir, tmp_path / "e"), case, family)
    adapter = Adapter(tmp_path / "a")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), tmp_path / "a")
    expected = plain.merge_and_unload().state_dict()
    specs = block_linears(empty_model(AutoConfig.from_pretrained(model_dir)))
    changed = changed_tensors(adapter, specs)
    assert {spec.name for spec in changed.values()} == set(adapter.names)
    for entry in Checkpoint(model_dir):
        if entry.name not in changed:
            assert torch.equal(entry.read_rows(), expected[entry.name]), entry.name
            continue
        whole = torch.cat(list(merged_chunks(entry, adapter, changed[entry.name], 2**20)))
        torch.testing.assert_close(whole, expected[entry.name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(whole, entry.read_rows()), entry.name
        chunked = torch.cat(list(merged_chunks(entry, adapter, changed[entry.name], 1)))
        assert torch.equal(chunked, whole), entry.name  # no bit depends on the chunks


def test_ia3_scales_biases_of_what_linears_give(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    model_dir = tiny_model_dir("gpt2")
    trained(tmp_path / "a", save_emulator(model_dir, tmp_path / "e"), "ia3", "gpt2")
    specs = block_linears(empty_model(AutoConfig.from_pretrained(model_dir)))
    biases = {name for name in changed_tensors(Adapter(tmp_path / "a"), specs) if name.endswith(".bias")}
    assert biases == {f"transformer.h.{at}.attn.{part}.bias" for at in range(2) for part in ("c_attn", "c_proj")}


@pytest.mark.parametrize(("case", "family"), [pair for pair in MERGED if pair[0] != "ia3"])
def test_the_rank_that_is_planned_is_that_of_the_update(
    case: str, family: str, tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    from adapter_cases import settings

    model_dir = tiny_model_dir(family)
    trained(tmp_path / "a", save_emulator(model_dir, tmp_path / "e"), case, family)
    adapter = Adapter(tmp_path / "a")
    specs = block_linears(empty_model(AutoConfig.from_pretrained(model_dir)))
    options = settings(case, family, [spec.name for spec in specs])
    for spec in specs:
        if spec.name in adapter.names:
            update = adapter.update(spec)
            assert update.shape == (spec.out_features, spec.in_features)
            rank = int(torch.linalg.matrix_rank(update.rows(0, spec.out_features).double(), rtol=1e-5))
            assert rank == update_rank(options["method"], options, spec)
