"""Block by block gives what the whole pass gives: Grams, outputs, and the flow between blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from faulting.s3 import uri
from other_vlms import PADDING, row_with_images
from tiny import PAD, VOCABULARY, make_model
from transformers import (
    AutoModelForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from vlms import build_vlm

from emloc_ray.data.processors import ImageInputs
from emloc_ray.data.token_shards import collate
from emloc_ray.errors import ArtifactError, StageError
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.store.node_cache import mirror
from emloc_ray.modeling.architecture import block_linears, block_names, empty_model, trace_inputs
from emloc_ray.modeling.gram_hooks import GramHooks
from emloc_ray.modeling.inputs import model_call
from emloc_ray.modeling.loading import copy_checkpoint, load_model
from emloc_ray.modeling.replay import BlockOutput, BlockReplay


def models() -> dict[str, Any]:
    return {
        "llama, tied": make_model("llama", tied=True),
        "qwen2": make_model("qwen2"),
        "gpt2": make_model("gpt2"),
        "opt": make_model("opt"),
        # Every second block sees a sliding window: its mask is another one.
        "gemma3": build("Gemma 3"),
        "mistral": build("Mistral"),
        "mixtral": make_model("mixtral"),
        "qwen2_moe": make_model("qwen2_moe"),
    }


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(2, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask, "completion_mask": mask.bool()}


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(models()))
def test_grams_block_by_block_are_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    models()[family].save_pretrained(tmp_path, max_shard_size="100KB")
    empty = empty_model(AutoModelForCausalLM.from_pretrained(tmp_path).config)
    specs = block_linears(empty)
    groups = trace_inputs(empty, specs).groups
    data = batch()
    whole = GramHooks(load_model(tmp_path), groups)
    whole.forward(data)

    replay = BlockReplay(tmp_path)
    block_of = {spec.name: spec.block for spec in specs}
    outputs: Any = {}
    seen = 0
    for position, name in enumerate(replay.flow.order):
        replay.load_block(position)
        hooks = GramHooks(replay.model, [group for group in groups if block_of[group[0]] == name])
        call = model_call(replay.model.config, data)
        with hooks.counting(call.counted):
            outputs[position] = replay.forward(position, call.inputs, outputs)
        for known in list(outputs):
            if replay.flow.last_use(known) <= position and known != position:
                outputs[known] = outputs[known].shapes()
        hooks.remove()
        for linear, gram in hooks.grams.items():
            torch.testing.assert_close(gram.symmetric(), whole.grams[linear].symmetric(), rtol=1e-5, atol=1e-5)
            seen += 1
    assert seen == len(groups) == len(whole.grams)


@pytest.mark.parametrize("family", PADDING)
def test_an_image_passes_through_the_blocks_as_through_the_whole_model(family: str, tmp_path: Path) -> None:
    """A tower's too, whose processor pads patches: how many are real, its code asks for the tokens' places."""
    model, processor = build_vlm(family, PADDING)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    rows = [row_with_images(processor, sizes) for sizes in ([(24, 24)], [(90, 40)], [])]
    call = model_call(model.config, collate(rows, PAD, ImageInputs(tmp_path)))
    replay = BlockReplay(tmp_path)
    outputs: dict[int, BlockOutput] = {}
    given: dict[str, Any] = {}
    assert set(replay.flow.order) == set(block_names(model))
    for name in replay.flow.order:
        model.get_submodule(name).register_forward_hook(lambda m, args, made, name=name: given.update({name: made}))
    with torch.no_grad():
        model(**call.inputs, use_cache=False)
    for position, name in enumerate(replay.flow.order):
        replay.load_block(position)
        made = replay.forward(position, call.inputs, outputs)
        assert made is not None
        torch.testing.assert_close(made.tensors, BlockOutput.of(given[name], name).tensors)
        outputs[position] = made


def test_one_block_is_in_memory_at_a_time(tmp_path: Path) -> None:
    make_model("llama", num_hidden_layers=3).save_pretrained(tmp_path)
    replay = BlockReplay(tmp_path)
    replay.load_block(0)
    replay.load_block(2)
    loaded = {name for name, parameter in replay.model.named_parameters() if not parameter.is_meta}
    assert {name.split(".")[2] for name in loaded if ".layers." in name} == {"2"}
    assert loaded - {name for name in loaded if ".layers." in name} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
    }
    torch.testing.assert_close(
        replay.model.get_submodule("model.layers.2.mlp.up_proj").weight.data,
        Checkpoint(tmp_path).read("model.layers.2.mlp.up_proj.weight"),
    )


def test_what_was_not_kept_is_nan_where_it_is_read_after_all(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    replay = BlockReplay(tmp_path)
    replay.load_block(0)
    first = replay.forward(0, model_call(replay.model.config, batch()).inputs, {})
    assert first.shapes().tensors[0].is_meta
    replay.load_block(1)
    second = replay.forward(1, model_call(replay.model.config, batch()).inputs, {0: first.shapes()})
    assert bool(torch.isnan(second.tensors[0]).all())  # type: ignore[arg-type]


def test_bfloat16_stays_bfloat16(tmp_path: Path) -> None:
    make_model("llama", dtype="bfloat16").save_pretrained(tmp_path)
    replay = BlockReplay(tmp_path)
    replay.load_block(0)
    assert replay.forward(0, model_call(replay.model.config, batch()).inputs, {}).tensors[0].dtype == torch.bfloat16


def test_what_transformers_keeps_in_float32_is_read_so(tmp_path: Path) -> None:
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    narrow: Any = T5ForConditionalGeneration(config)
    narrow.to(torch.float16).save_pretrained(tmp_path)
    replay, whole = BlockReplay(tmp_path), load_model(tmp_path)
    replay.load_block(0)
    held = {name: p.dtype for name, p in replay.model.named_parameters() if not p.is_meta}
    assert {name: held[name] for name in held} == {n: p.dtype for n, p in whole.named_parameters() if n in held}
    assert set(held.values()) == {torch.float16, torch.float32}


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    model = make_model("llama")
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    replay = BlockReplay(tmp_path)
    with pytest.raises(ArtifactError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        replay.load_block(1)


def test_a_block_that_returns_something_else_is_refused() -> None:
    with pytest.raises(StageError, match=r"block 3 returns dict: set model\.hold to offloaded"):
        BlockOutput.of({}, "block 3")
    assert BlockOutput.of([torch.ones(1)], "block 3").value("cpu") == (torch.ones(1),)  # openai-gpt's


def test_a_node_that_holds_nothing_of_the_model_fetches_it(s3_port: int, node_cache: Path, tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path / "here", max_shard_size="100KB")
    root = mirror(uri(s3_port, "replayed"))
    copy_checkpoint(tmp_path / "here", root / "model", lambda done, total: None)
    replay = BlockReplay(tmp_path / "other" / root.name / "model")
    replay.load_block(0)
    assert not any(parameter.is_meta for parameter in replay.model.model.layers[0].parameters())
