"""A pass without weights goes the way of a real one: what is read together, what runs for images alone, what carries on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from vlms import VLMS, build_vlm, save_vlm

from emloc_ray.data.processors import example
from emloc_ray.modeling.architecture import (
    block_names,
    empty_model,
    learned_positions,
    load_config,
    towers,
    unfactorable,
)
from emloc_ray.modeling.block_flow import block_flow
from emloc_ray.modeling.meta_pass import MetaPass
from emloc_ray.planning.skeleton import skeleton_of

BETWEEN = {
    "LLaVA": ["model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"],
    "InternVL": ["model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"],
    "Gemma 3 (vision)": [],  # its projection is a parameter and no linear
    "Qwen2-VL": ["model.visual.merger.mlp.0", "model.visual.merger.mlp.2"],
    "Qwen2.5-VL": ["model.visual.merger.mlp.0", "model.visual.merger.mlp.2"],
    "Qwen3-VL": ["model.visual.merger.linear_fc1", "model.visual.merger.linear_fc2"],
    "Qwen3.5": ["model.visual.merger.linear_fc1", "model.visual.merger.linear_fc2"],
}


def test_values_that_depend_on_no_weight_stay() -> None:
    weight = torch.zeros(3, 4, device="meta")
    mask = torch.tensor([True, False, True])
    with MetaPass():
        beside = mask.to(weight.device)
        assert weight[mask].shape == weight[beside].shape == (2, 4)
        assert int(beside.sum()) == 2
        places = torch.arange(3, device=weight.device)
        assert weight[places < 2].shape == (2, 4)
        assert weight.to(places.device).is_meta
        assert (weight + torch.ones(4)).is_meta
        weight[mask] = 1.0
        assert weight.sum().item() == 0  # only weights could tell


@pytest.mark.slow
@pytest.mark.parametrize("family", VLMS)
def test_a_real_pass_reads_what_the_traced_one_does(family: str, tmp_path: Path) -> None:
    save_vlm(family, tmp_path)
    config, shown = load_config(tmp_path), example(tmp_path)
    skeleton = skeleton_of(config, empty_model(config), shown)
    flow = block_flow(config, example=shown)
    assert list(flow.between) == BETWEEN[family]
    assert set(flow.between.values()) == ({"model.language_model.layers.0"} if BETWEEN[family] else set())
    model, _ = build_vlm(family)
    read: dict[str, torch.Tensor] = {}
    ran: list[str] = []
    for spec in skeleton.specs:
        module = model.get_submodule(spec.name)
        module.register_forward_pre_hook(lambda m, args, name=spec.name: read.update({name: args[0]}))
    for name in flow.order:
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: ran.append(name))
    with torch.no_grad():
        model(**shown, use_cache=False)
        assert tuple(ran) == flow.order
        for group in skeleton.groups:
            assert len({read[spec.name].data_ptr() for spec in group}) == 1
        assert len({read[group[0].name].data_ptr() for group in skeleton.groups}) > len(skeleton.groups) // 2
        assert {spec.stream for spec in skeleton.specs if not spec.name.startswith("model.language")} == {"other"}
        assert {spec.stream for spec in skeleton.specs if spec.name.startswith("model.language")} == {"row"}
        for block, count in skeleton.image.block_tokens.items():
            inside = next(s for s in skeleton.specs if s.block == block and not s.between)
            assert read[inside.name].shape[:-1].numel() == count
        ran.clear()
        model(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
        assert ran == [name for position, name in enumerate(flow.order) if position not in flow.optional]


def test_a_merger_beside_the_blocks_is_read_by_the_second_text_block(tmp_path: Path) -> None:
    save_vlm("Qwen3-VL", tmp_path)
    flow = block_flow(load_config(tmp_path), example=example(tmp_path))
    names = dict(enumerate(flow.order))
    needed = {names[position] for position in flow.needs[flow.order.index("model.language_model.layers.1")]}
    assert needed == {"model.visual.deepstack_merger_list.0", "model.language_model.layers.0"}


def test_blocks_of_images_that_cannot_be_followed_are_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counts_pixels(self: CLIPVisionEmbeddings, pixel_values: torch.Tensor, **options: Any) -> torch.Tensor:
        return self.patch_embedding(pixel_values)[pixel_values.nonzero()]

    save_vlm("LLaVA", tmp_path)
    config, shown = load_config(tmp_path), example(tmp_path)
    monkeypatch.setattr(CLIPVisionEmbeddings, "forward", counts_pixels)
    flow = block_flow(config, example=shown)
    assert flow.order == tuple(block_names(empty_model(config)))
    assert {name for name in flow.order if "vision_tower" in name} == {flow.order[k] for k in flow.optional}
    assert flow.needs[-1] == set(range(len(flow.order) - 1))


def test_what_is_of_an_image_alone_is_no_bound_of_a_text(tmp_path: Path) -> None:
    model, _ = build_vlm("LLaVA")
    assert towers(model) == ["model.vision_tower"] or towers(model)[0] == "model.vision_tower"
    assert learned_positions(model) is None  # the tower has an embedding of positions
    kinds = unfactorable(model)
    assert kinds["model.vision_tower.embeddings.patch_embedding"] == "Conv2d"
    assert kinds["model.language_model.embed_tokens"] == "Embedding"
    assert not any("proj" in name for name in kinds)
