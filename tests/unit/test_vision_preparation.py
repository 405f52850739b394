"""What is found out of a vision-language model and its rows before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import write_jsonl
from vlms import save_vlm

from emloc_ray.config_reading import parse_config
from emloc_ray.errors import ConfigError
from emloc_ray.memory import MemoryModel, total
from emloc_ray.modeling.matching import matches
from emloc_ray.planner import make_plan, row_lengths
from emloc_ray.preparation import Prepared, prepare
from emloc_ray.remarks import left_dense, skipped_rows, thin_calibration

Make = Callable[..., Prepared]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``models(family)``: a saved model; do not write to it."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_vlm(family, tmp_path_factory.mktemp("vlm") / "model")
        return made[family]

    return get


def shown(count: int = 1) -> dict[str, Any]:
    asked = [{"type": "image", "path": "a.png"}] * count + [{"type": "text", "text": "What is it?"}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "a cat"}]}


@pytest.fixture
def prepared(tmp_path: Path, models: Callable[[str], Path]) -> Make:
    """``prepared(family, rows, section={…})``."""

    def make(
        family: str = "LLaVA", rows: list[Any] | None = None, model_dir: Path | None = None, **sections: Any
    ) -> Prepared:
        path = write_jsonl(tmp_path / "rows.jsonl", [shown()] * 20 if rows is None else rows)
        data = {"train": {"path": str(path)}, "format": "messages", **sections.pop("data", {})}
        source = str(model_dir or models(family))
        return prepare(
            parse_config({"run_dir": str(tmp_path / "run"), "model": {"source": source}, "data": data, **sections})
        )

    return make


def test_tower_projector_and_language_model_have_ratios_of_their_own(prepared: Make) -> None:
    ratios = {r".*vision_tower\..*": 0.3, r".*projector\..*": 1.0}
    layout = prepared(emulator={"compression_ratio": 0.6, "ratios": ratios}).layout
    assert layout.ranks["model.vision_tower.encoder.layers.0.self_attn.q_proj"] == 4  # ⌊0.3 · 32 · 32 / 64⌋
    assert layout.ranks["model.language_model.layers.0.self_attn.q_proj"] == 9
    assert not any("projector" in name for name in layout.ranks)
    assert any("projector" in name for name in layout.adapted)


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
def test_virtual_tokens_do_not_go_with_images(prepared: Make, method: str) -> None:
    with pytest.raises(
        ConfigError, match=f"adapter.method is {method}, whose virtual tokens would move a model's images"
    ):
        prepared(adapter={"method": method, "num_virtual_tokens": 4})


def test_suffixes_do_not_reach_what_is_no_target(prepared: Make) -> None:
    """In Qwen-VL the patch convolution is called proj, as the tower's linears are: PEFT would adapt it too."""
    layout = prepared("Qwen2-VL", adapter={"target_modules": ["proj", "q_proj"]}).layout
    assert all(name.endswith(("attn.proj", "q_proj")) for name in layout.adapted)
    assert layout.left_dense == {"model.visual.patch_embed.proj": "Conv3d"}
    assert not matches("model.visual.patch_embed.proj", layout.portable_targets)
    assert all(matches(name, layout.portable_targets) for name in layout.adapted)


@pytest.mark.parametrize("key", ["target_modules", "ratios"])
def test_a_module_that_cannot_be_factored_is_named_and_stays(prepared: Make, key: str) -> None:
    patterns = {"target_modules": ["fc1", "patch_embedding"], "ratios": {"patch_embedding": 0.5}}
    layout = prepared(emulator={key: patterns[key]}).layout
    assert not any("patch" in name for name in layout.ranks)
    said = str(left_dense(layout))
    assert "model.vision_tower.embeddings.patch_embedding (Conv2d), which a pattern names, stays as it is" in said
    assert left_dense(prepared().layout) is None


def test_only_modules_that_cannot_be_factored(prepared: Make) -> None:
    with pytest.raises(ConfigError, match=r"names no linear, only .*patch_embedding \(Conv2d\)"):
        prepared(emulator={"target_modules": ["patch_embedding"]})


def test_a_processor_without_a_chat_template_is_told(prepared: Make, tmp_path: Path) -> None:
    model_dir = save_vlm("LLaVA", tmp_path / "bare")
    (model_dir / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="processor and tokenizer have no chat template: save one") as caught:
        prepared(model_dir=model_dir)
    assert "\n" not in str(caught.value)
    rows = [{"prompt": "a", "completion": "b"}] * 20
    assert prepared(model_dir=model_dir, rows=rows, data={"format": "prompt_completion"}).layout.ranks


def test_packing_is_refused_where_a_row_shows_an_image(prepared: Make) -> None:
    with pytest.raises(ConfigError, match=r"rows\.jsonl, row 1 shows an image, which data\.packing"):
        prepared(data={"packing": True})
    assert prepared(rows=[shown(0)] * 20, data={"packing": True}).layout.ranks


def test_bad_rows_end_validation_unless_they_are_skipped(prepared: Make) -> None:
    rows = [{"messages": []}, *[shown()] * 20]
    with pytest.raises(ConfigError, match=r"rows\.jsonl, row 1: field 'messages'"):
        prepared(rows=rows)
    assert prepared(rows=rows, data={"on_error": "skip"}).files["train"][0].num_rows == 21
    assert skipped_rows("train", {"skipped_rows": 0}) is None
    assert skipped_rows("train", {"skipped_rows": 3}) == (
        "data.train: 3 bad rows skipped; data.on_error: fail names the first."
    )


def test_linears_that_no_token_came_to_are_told(prepared: Make) -> None:
    ready = prepared()
    assert "no token to some linears" in str(thin_calibration(ready.config, 0, ready.layout))


def test_the_plan_counts_an_image_s_tokens_and_patches(prepared: Make) -> None:
    none = prepared(rows=[shown(0)] * 20)
    words = row_lengths(none)
    assert MemoryModel(none, words).blocks[0].multiple == 0
    one = prepared()
    assert one.layout.image.block_tokens["model.vision_tower.encoder.layers.0"] == 17
    lengths = row_lengths(one)
    assert lengths.images == 1
    assert lengths.mean == pytest.approx(words.mean + one.layout.image.row_tokens)
    assert MemoryModel(one, lengths).blocks[0].multiple == pytest.approx(17 / lengths.longest)
    assert total(MemoryModel(one, lengths).stage("calibrate")) > 0
    assert make_plan(one).parameters == one.layout.num_parameters


def test_encoded_images_in_rows_are_no_text(prepared: Make) -> None:
    big = shown()
    big["messages"][0]["content"][0] = {"type": "image", "base64": "A" * 100_000}
    assert row_lengths(prepared(rows=[json.loads(json.dumps(big))] * 20)).longest < 200
