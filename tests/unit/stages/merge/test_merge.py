"""Merging one shard: adapted tensors changed once rounded, all others byte for byte, the header as it was."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faulting.s3 import uri
from stage_artifacts import Artifacts, write_lora
from transformers import AutoConfig, AutoModelForCausalLM

from emloc_ray.io.formats.checkpoint import INDEX_NAME, Checkpoint, read_shard, write_index
from emloc_ray.io.store.node_cache import exists, mirror
from emloc_ray.modeling.adapter_files import Adapter
from emloc_ray.modeling.architecture import block_linears, empty_model
from emloc_ray.modeling.loading import copy_checkpoint
from emloc_ray.stages.merge.merge import MergeJob, merge_shard, output_shards, write_weight_index


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_is_the_rounded_sum_or_untouched(
    family: str, dtype: str, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    model_dir = tiny_model_dir(family, dtype=dtype)
    specs = tuple(block_linears(empty_model(AutoConfig.from_pretrained(model_dir))))
    adapted = {
        spec.weight_name: spec for spec in specs if spec.name.endswith(("v_proj", "down_proj", "c_attn", "c_proj"))
    }
    adapter = Adapter(write_lora(tmp_path / "adapter", tuple(adapted.values())))
    job = MergeJob(model_dir, adapter.directory, tmp_path, specs)
    changed = 0
    for shard in Checkpoint(model_dir).shards:
        target = tmp_path / shard.file.name
        changed += merge_shard(job, shard, target)
        merged = read_shard(target)
        assert merged.header == shard.header
        assert target.stat().st_size == shard.file.stat().st_size
        for before, after in zip(shard.entries, merged.entries, strict=True):
            weight, result = before.read_rows(), after.read_rows()
            if before.name not in adapted:
                assert torch.equal(result, weight), before.name
                continue
            spec = adapted[before.name]
            lora = adapter.module(spec.name)
            product = lora.scale * (lora.lora_b @ lora.lora_a)
            expected = weight.float() + (product.T if spec.transposed else product)
            if dtype == "float32":
                torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-7)
            else:
                assert torch.equal(result, expected.to(weight.dtype)), before.name
            assert not torch.equal(result, weight)
    assert changed == len(adapted)


def test_no_bit_depends_on_the_chunks(artifacts: Artifacts, tmp_path: Path) -> None:
    job = MergeJob(artifacts.model_dir, artifacts.adapter_dir, tmp_path, artifacts.specs)
    shards = Checkpoint(artifacts.model_dir).shards
    for shard in shards:
        merge_shard(job, shard, tmp_path / "whole")
        merge_shard(replace(job, chunk_bytes=4096), shard, tmp_path / "chunked")
        assert (tmp_path / "whole").read_bytes() == (tmp_path / "chunked").read_bytes()
    assert len(shards) > 1


def test_an_adapter_that_was_sent_is_merged_as_that_on_disk(artifacts: Artifacts, tmp_path: Path) -> None:
    job = MergeJob(artifacts.model_dir, artifacts.adapter_dir, tmp_path, artifacts.specs)
    adapter = pickle.dumps(Adapter(job.adapter_dir))
    for shard in Checkpoint(artifacts.model_dir).shards:
        sent = pickle.loads(adapter)
        changed = merge_shard(job, shard, tmp_path / "sent", sent)
        assert changed == merge_shard(job, shard, tmp_path / "plain")
        assert (tmp_path / "sent").read_bytes() == (tmp_path / "plain").read_bytes()


def test_shards_are_cut_to_the_size_asked_and_hold_the_same_tensors(artifacts: Artifacts, tmp_path: Path) -> None:
    job = MergeJob(artifacts.model_dir, artifacts.adapter_dir, tmp_path, artifacts.specs)
    shards = Checkpoint(artifacts.model_dir).shards
    assert [name for name, _ in output_shards(shards, None)] == [shard.file.name for shard in shards]
    assert output_shards(shards, 10**9) == output_shards(shards, None)
    limit = 40_000
    found: dict[str, torch.Tensor] = {}
    for name, part in output_shards(shards, limit):
        merge_shard(job, part, tmp_path / name)
        entries = read_shard(tmp_path / name).entries
        assert len(entries) == 1 or sum(entry.num_bytes for entry in entries) <= limit
        found |= {entry.name: entry.read_rows() for entry in entries}
    for shard in shards:
        merge_shard(job, shard, tmp_path / "whole")
        for entry in read_shard(tmp_path / "whole").entries:
            assert torch.equal(found.pop(entry.name), entry.read_rows())
    assert not found


@pytest.mark.parametrize("max_shard_size", [None, 40_000])
def test_tied_weights_stay_tied(
    max_shard_size: int | None, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    model_dir, merged = tiny_model_dir("llama", tied=True), tmp_path / "merged"
    specs = tuple(block_linears(empty_model(AutoConfig.from_pretrained(model_dir))))
    adapter = write_lora(tmp_path / "adapter", tuple(spec for spec in specs if spec.name.endswith("v_proj")))
    job = MergeJob(model_dir, adapter, merged, specs)
    original = Checkpoint(model_dir)
    named = output_shards(original.shards, max_shard_size)
    for name, shard in named:
        merge_shard(job, shard, merged / name)
    files = {entry.name: name for name, shard in named for entry in shard.entries}
    write_index(merged, files, original.num_bytes, 0)
    shutil.copyfile(model_dir / "config.json", merged / "config.json")
    found = Checkpoint(merged)
    assert set(found.entries) == set(original.entries)
    assert "lm_head.weight" not in found
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(model.lm_head.weight, original.read("model.embed_tokens.weight"))


def test_an_index_beside_a_whole_file_is_left(artifacts: Artifacts, tmp_path: Path) -> None:
    job = MergeJob(tmp_path / "model", artifacts.adapter_dir, tmp_path / "merged", artifacts.specs)
    AutoModelForCausalLM.from_pretrained(artifacts.model_dir).save_pretrained(job.model_dir)
    shutil.copyfile(artifacts.model_dir / INDEX_NAME, job.model_dir / INDEX_NAME)
    shards = Checkpoint(job.model_dir).shards
    write_weight_index(job, shards, output_shards(shards, None))
    assert not (job.out_dir / INDEX_NAME).exists()


def test_the_index_is_found_where_this_node_s_copy_is_gone(
    artifacts: Artifacts, s3_port: int, node_cache: Path
) -> None:
    root = mirror(uri(s3_port, "merged/run"))
    copy_checkpoint(artifacts.model_dir, root / "model", lambda done, total: None)
    job = MergeJob(root / "model", artifacts.adapter_dir, root / "merged", artifacts.specs)
    shards = Checkpoint(job.model_dir).shards
    (job.model_dir / INDEX_NAME).unlink()
    write_weight_index(job, shards, output_shards(shards, None))
    assert exists(job.out_dir / INDEX_NAME)
