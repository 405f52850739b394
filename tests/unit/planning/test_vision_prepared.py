"""What is found out of a vision-language model and its rows before anything starts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from small_runs import write_jsonl
from vlms import save_mllama, save_vlm

from emloc_ray.config.reading import parse_config
from emloc_ray.data import images
from emloc_ray.errors import ConfigError
from emloc_ray.io.formats.yaml_text import read_yaml
from emloc_ray.modeling.matching import matches
from emloc_ray.planning.costs import with_base
from emloc_ray.planning.first_rows import sequences_a_row
from emloc_ray.planning.memory import MemoryModel, total
from emloc_ray.planning.plan import make_plan
from emloc_ray.planning.prepared import Prepared, prepare
from emloc_ray.runs.remarks import left_dense, long_images
from emloc_ray.stages.factorize.stage import unseen_linears
from emloc_ray.stages.order import STEPS
from emloc_ray.stages.tokens.stage import may_change, skipped_rows, split_inputs

Make = Callable[..., Prepared]


def shown(count: int = 1) -> dict[str, Any]:
    asked = [{"type": "image", "path": "a.png"}] * count + [{"type": "text", "text": "What is it?"}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "a cat"}]}


@pytest.fixture
def prepared(tmp_path: Path, vlm_dir: Callable[[str], Path]) -> Make:
    """``prepared(family, rows, section={…})``."""

    def make(
        family: str = "LLaVA", rows: list[Any] | None = None, model_dir: Path | None = None, **sections: Any
    ) -> Prepared:
        path = write_jsonl(tmp_path / "rows.jsonl", [shown()] * 20 if rows is None else rows)
        (tmp_path / "a.png").touch()
        data = {"train": {"path": str(path)}, "format": "messages", **sections.pop("data", {})}
        source = str(model_dir or vlm_dir(family))
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
    with pytest.raises(ConfigError, match=f"adapter.method is {method}, whose virtual tokens would move images"):
        prepared(adapter={"method": method, "num_virtual_tokens": 4})


@pytest.mark.slow
def test_the_readme_s_example_is_right(prepared: Make) -> None:
    readme = (Path(__file__).parents[3] / "emloc_ray" / "README.md").read_text()
    block = str(re.findall(r"```yaml\n(data: \{format: messages.*?)```", readme, re.DOTALL)[0])
    values = read_yaml(block)
    row = json.loads(re.findall("# train.jsonl: (.*)", block)[0])
    data = {key: value for key, value in values["data"].items() if key != "train"}
    for family in ("LLaVA", "InternVL"):
        layout = prepared(family, rows=[row] * 20, data=data, emulator=values["emulator"]).layout
        kept = {spec.name: layout.kept(spec) / spec.num_parameters for spec in layout.specs}
        assert {kept[name] for name in kept if "projector" in name} == {1}
        assert 0.5 < max(kept[name] for name in kept if "vision_tower" in name) <= 0.7
        assert max(kept[name] for name in kept if "language_model" in name) <= 0.5
    visual = re.findall(r"# Qwen-VL: (\S+)", block)[0]
    assert prepared("Qwen2-VL", emulator={"ratios": {visual: 0.7}})


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
    with pytest.raises(ConfigError, match=r"names no linear of the blocks, only .*patch_embedding \(Conv2d\)"):
        prepared(emulator={"target_modules": ["patch_embedding"]})


@pytest.mark.slow
def test_a_processor_without_a_chat_template_is_told(prepared: Make, tmp_path: Path) -> None:
    model_dir = save_vlm("LLaVA", tmp_path / "bare")
    (model_dir / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="processor and tokenizer have no chat template: save one") as caught:
        prepared(model_dir=model_dir)
    assert "\n" not in str(caught.value)
    rows = [{"prompt": "a", "completion": "b"}] * 20
    assert prepared(model_dir=model_dir, rows=rows, data={"format": "prompt_completion"}).layout.ranks


def test_packing_is_refused_where_a_row_shows_an_image(prepared: Make) -> None:
    with pytest.raises(ConfigError, match=r"rows\.jsonl, row 1: it shows an image, and data\.packing"):
        prepared(data={"packing": True})
    assert prepared(rows=[shown(0)] * 20, data={"packing": True}).layout.ranks
    with pytest.raises(ConfigError, match=r"finetune\.packing needs .* this one shows images beside the text"):
        prepared(finetune={"packing": True})


def test_bad_rows_end_validation_unless_they_are_skipped(prepared: Make) -> None:
    rows = [{"messages": []}, *[shown()] * 20]
    with pytest.raises(ConfigError, match=r"rows\.jsonl, row 1: field 'messages'"):
        prepared(rows=rows)
    ready = prepared(rows=rows, data={"on_error": "skip"})
    assert ready.files["train"][0].num_rows == 21
    assert skipped_rows(ready.config, "train", {"skipped_rows": 0}) is None
    assert skipped_rows(ready.config, "train", {"skipped_rows": 3}) == (
        "data.train: 3 bad rows skipped; data.on_error: fail names the first."
    )


def test_rows_of_no_known_form_are_skipped_by_the_plan_too(prepared: Make) -> None:
    bad = [{"messages": 5}, {"messages": [5]}, {"messages": [{"role": "user", "content": 5}]}, {"other": 1}]
    ready = prepared(rows=[*bad, *[shown()] * 20], data={"on_error": "skip"})
    assert ready.lengths.images == pytest.approx(20 / 24)


def test_no_image_that_a_row_holds_is_decoded_for_a_plan(prepared: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    monkeypatch.setattr(images, "decode", decoded.append)
    held = shown()
    held["messages"][0]["content"][0] = {"type": "image", "base64": "iVBORw0KGgo="}
    for rows in ([held] * 20, [*[shown(0)] * 19, held]):
        assert sequences_a_row(prepared(rows=rows)) == 1.0
    assert not decoded


def test_an_image_file_that_is_missing_is_told_before_the_start(prepared: Make, tmp_path: Path) -> None:
    lost = shown()
    lost["messages"][0]["content"][0]["path"] = "lost.png"
    rows = [*[shown()] * 20, lost]
    with pytest.raises(ConfigError, match=r"rows\.jsonl, row 21: image 1 lost\.png is not there: fix the path"):
        prepared(rows=rows)
    ready = prepared(rows=rows, data={"on_error": "skip"})
    assert ready.files["train"][0].num_rows == 21


def test_changed_images_redo_the_tokens_and_are_not_shared(prepared: Make, tmp_path: Path) -> None:
    plain = prepared(rows=[shown(0)] * 20)
    assert not may_change(plain)
    first = prepared()
    assert may_change(first)
    assert split_inputs(first) == split_inputs(prepare(first.config))
    (tmp_path / "a.png").write_bytes(b"longer")
    assert split_inputs(first) != split_inputs(prepare(first.config))


def test_images_for_a_model_that_reads_none(prepared: Make, tiny_model_dir: Callable[..., Path]) -> None:
    directory = tiny_model_dir("llama")
    with pytest.raises(ConfigError, match=r"row 1: it shows an image, and the model has no processor"):
        prepared(model_dir=directory)
    with pytest.raises(ConfigError, match=r"^data\.generate: vqa shows images, and the model has no processor that"):
        prepared(model_dir=directory, data={"generate": "vqa", "train": None})


def test_a_processor_whose_inputs_for_an_image_depend_on_the_text_reads_text_alone(
    prepared: Make, tmp_path: Path
) -> None:
    """Mllama's makes a mask for each token of the text beside the image."""
    model_dir = save_mllama(tmp_path / "mllama")
    with pytest.raises(ConfigError, match=r"row 1: it shows an image, and the model has no processor that makes"):
        prepared(model_dir=model_dir)
    assert prepared(rows=[shown(0)] * 20, model_dir=model_dir).layout.image.row_tokens == 0


def test_a_processor_that_takes_no_image_is_told(prepared: Make, tmp_path: Path) -> None:
    model_dir = save_vlm("LLaVA", tmp_path / "odd")
    (model_dir / "chat_template.jinja").write_text("{{ raise_exception('no such role') }}")
    with pytest.raises(ConfigError, match=r"its processor takes no image .no such role.: fix its files"):
        prepared(model_dir=model_dir)


def test_a_projector_that_is_missing_is_told(prepared: Make, tmp_path: Path) -> None:
    model_dir = save_vlm("LLaVA", tmp_path / "odd")
    index = json.loads((model_dir / "model.safetensors.index.json").read_text())
    lost = next(name for name in index["weight_map"] if "projector" in name and name.endswith("linear_1.weight"))
    shard = model_dir / index["weight_map"].pop(lost)
    save_file({name: tensor for name, tensor in load_file(shard).items() if name != lost}, shard, {"format": "pt"})
    (model_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"holds no model\.multi_modal_projector\.linear_1\.weight .1 linears"):
        prepared(model_dir=model_dir)


def test_rows_of_the_hub_may_be_full_of_images(prepared: Make) -> None:
    ready = prepared(data={"train": {"path": "hf:some/rows"}, "max_seq_length": 512})
    lengths = ready.lengths
    assert lengths.images == 512 // ready.layout.image.row_tokens > 1
    assert lengths.image_bytes == 100e3


def test_images_that_no_row_holds_are_told(prepared: Make) -> None:
    assert long_images(prepared()) is None
    assert long_images(prepared(rows=[shown(0)] * 20, data={"max_seq_length": 8})) is None
    said = str(long_images(prepared(data={"max_seq_length": 8})))
    assert "448 × 448 pixels takes 25 tokens of this model, data.max_seq_length is 8" in said


def test_linears_that_no_token_came_to_are_told(prepared: Make) -> None:
    ready = prepared()
    tower = [spec.name for spec in ready.layout.specs if "vision" in spec.name]
    assert tower
    assert f"no token to {len(tower)} linears, {tower[0]} among them" in str(unseen_linears(tower, ready.layout))
    assert unseen_linears([], ready.layout) is None
    assert unseen_linears(["lm_head"], ready.layout) is None  # nothing follows from its tokens


def test_the_plan_counts_an_image_s_tokens_and_patches(prepared: Make) -> None:
    none = prepared(rows=[shown(0)] * 20)
    words = none.lengths
    assert MemoryModel(none).blocks[0].multiple == 0
    one = prepared()
    assert one.layout.image.block_tokens["model.vision_tower.encoder.layers.0"] == 17
    lengths = one.lengths
    assert lengths.images == 1
    assert lengths.mean == pytest.approx(words.mean + one.layout.image.row_tokens)
    assert MemoryModel(one).blocks[0].multiple == pytest.approx(17 / lengths.longest)
    assert total(with_base(MemoryModel(one).calibration_parts())) > 0
    assert make_plan(STEPS, one).parameters == one.layout.num_parameters


def test_encoded_images_in_rows_are_no_text(prepared: Make) -> None:
    big = shown()
    big["messages"][0]["content"][0] = {"type": "image", "base64": "A" * 100_000}
    ready = prepared(rows=[json.loads(json.dumps(big))] * 20)
    assert ready.lengths.longest < 200
    # They are kept on disk as encoded, beside the tokens.
    assert ready.lengths.image_bytes == 75_000

    def disk_bytes(row: dict[str, Any], **sections: Any) -> int:
        plan = make_plan(STEPS, prepared(rows=[row] * 20, memory_budget=None, **sections))
        return next(stage.disk_bytes for stage in plan.stages if stage.name == "data")

    # Of each row once, and of the 16 that are left to train on once more, to calibrate on.
    images = 36 * 75_000
    assert images < disk_bytes(big) < images + 36 * 1000
    assert disk_bytes(big) == disk_bytes(big, emulator={"compression_ratio": 1.0})
    assert disk_bytes(shown(0)) < 36 * 1000
