"""Rows with images as tokens and pixels: the processor's own, truncation that cuts no image, bad rows told or counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from other_vlms import llava_onevision
from small_runs import write_jsonl
from test_images import place, png, row, torn
from test_tokenizing import inline  # noqa: F401
from transformers import AutoConfig, AutoProcessor
from vlms import VLMS, build_vlm, image_tokenizer, save_vlm

from emloc_ray.data import processors
from emloc_ray.data.formats import Tokens, sequences, truncate
from emloc_ray.data.processors import ImageInputs, example, open_processor
from emloc_ray.data.reading import scan
from emloc_ray.data.splits import RowSelection
from emloc_ray.data.token_shards import TokenShards, collate
from emloc_ray.data.tokenizing import TokenizeOptions, row_lengths, tokenize_splits
from emloc_ray.errors import ConfigError, DataError
from emloc_ray.modeling.inputs import label_mask, model_call
from emloc_ray.modeling.loading import load_model
from emloc_ray.modeling.loss import token_loss
from emloc_ray.stages.finetune.batches import collate_together

GREY = (120, 120, 120)


def tokens_of(options: TokenizeOptions, *rows: dict[str, Any]) -> list[Tokens | None]:
    """The one sequence of each row; None for a bad row that is skipped."""
    made = list(options.tokens((place("/tmp", number), each) for number, each in enumerate(rows)))
    assert all(row is None or len(row) == 1 for row in made)
    return [row and row[0] for row in made]


def two_turns() -> dict[str, Any]:
    """Two questions, an image each, and answers."""
    made = row({"type": "image", "image": png()})
    made["messages"] += row({"type": "image", "image": png(GREY)})["messages"]
    return made


@pytest.mark.parametrize("family", VLMS)
def test_tokens_are_the_processor_s_and_the_answers_are_completion(vlm_dir: Callable[[str], Path], family: str) -> None:
    directory = vlm_dir(family)
    processor = AutoProcessor.from_pretrained(directory)
    [found] = tokens_of(TokenizeOptions(str(directory), "messages", 512), two_turns())
    assert found is not None
    bare = [{**turn, "content": turn["content"]} for turn in two_turns()["messages"]]
    text = processor.apply_chat_template(
        [
            {
                "role": turn["role"],
                "content": [{"type": "text", "text": turn["content"]}]
                if isinstance(turn["content"], str)
                else [{k: v for k, v in part.items() if k != "image"} for part in turn["content"]],
            }
            for turn in bare
        ],
        tokenize=False,
    )
    from emloc_ray.data.images import decode

    expected = processor(
        text=[text], images=[[decode(png()), decode(png(GREY))]], return_tensors="pt", add_special_tokens=False
    )
    assert found.input_ids == expected["input_ids"][0].tolist()
    answers = [t for t, is_answer in zip(found.input_ids, found.completion_mask, strict=True) if is_answer]
    assert processor.tokenizer.decode(answers) == "red<eos>red<eos>"
    assert [image.content for image in found.images] == [png(), png(GREY)]
    batch = collate([found], 0, ImageInputs(directory))
    for key, value in expected.items():
        if key not in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
            assert torch.equal(batch[key], value), key
    width = len(found.input_ids)
    for name in {"mm_token_type_ids", "token_type_ids"} & set(expected):
        assert torch.equal(batch[name][:, :width], expected[name])
        assert not batch[name][:, width:].any()


def test_a_cut_that_could_lose_part_of_an_image_drops_the_row(vlm_dir: Callable[[str], Path]) -> None:
    options = TokenizeOptions(str(vlm_dir("LLaVA")), "messages", 512)
    [found] = tokens_of(options, two_turns())
    assert found is not None
    second = found.images[1].end
    assert found.images[0].end < second < len(found)
    assert truncate(found, second - 1) is None  # though the first answer is whole
    cut = truncate(found, second + 2)
    assert cut is not None
    assert (len(cut), cut.images) == (second + 2, found.images)


def test_text_on_a_model_that_reads_images(vlm_dir: Callable[[str], Path]) -> None:
    directory = vlm_dir("Qwen2-VL")
    options = TokenizeOptions(str(directory), "messages", 512)
    [found] = tokens_of(options, row())
    assert found is not None
    assert not found.images
    assert set(collate([found], 0, ImageInputs(directory))) == {"input_ids", "attention_mask", "completion_mask"}


@pytest.mark.parametrize("family", VLMS)
def test_a_text_with_a_token_that_stands_for_an_image(vlm_dir: Callable[[str], Path], family: str) -> None:
    options = TokenizeOptions(str(vlm_dir(family)), "messages", 512)
    asked = {"type": "text", "text": "What does <image> mean?"}
    later = row({"type": "image", "image": png()})["messages"][:1]  # after the last answer: nobody reads it
    for made in (
        row(asked),
        row({"type": "image", "image": png()}, asked),
        {"messages": row(asked)["messages"] + later},
    ):
        with pytest.raises(DataError, match="row 1: a text holds <image>, which stands for an image"):
            tokens_of(options, made)


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (
            "{% for m in messages %}{{ m.role }}{{ m.content[-1].text }}{{ eos_token }}{% endfor %}",
            "processor refuses its images .*0 <image> tokens and 2 images",
        ),
        (
            "{{ '<image>' }}{% for m in messages %}{{ m.role }}{{ m.content[-1].text }}{{ eos_token }}{% endfor %}",
            "1 <image> tokens and 2 images",
        ),
        ("{{ raise_exception('no such role') }}", "chat template refuses its messages .no such role"),
        ("{{ messages[0].content + 'a' }}", "chat template refuses its messages"),
    ],
)
def test_a_chat_template_of_another_model_is_told(tmp_path: Path, template: str, complaint: str) -> None:
    directory = save_vlm("LLaVA", tmp_path / "model")
    (directory / "chat_template.jinja").write_text(template)
    shown = [{"type": "image", "image": png()}] * 2
    with pytest.raises(DataError, match=f"row 1: .*{complaint}"):
        tokens_of(TokenizeOptions(str(directory), "messages", 512), row(*shown))


def test_what_a_processor_s_template_marks_is_learnt() -> None:
    processor = build_vlm("LLaVA")[1]
    text = "{{ message['content'][0]['text'] }}"
    processor.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>{% if message['role'] == 'assistant' %}It says {% generation %}"
        f"{text}{{{{ eos_token }}}}{{% endgeneration %}}{{% else %}}{text}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    [parts] = sequences({"messages": chat}, "messages", processor.tokenizer, "row 1", processor=processor)
    assert [(part.text, part.is_completion) for part in parts] == [
        ("<user>a<assistant>", False),
        ("It says ", False),
        ("b<eos>", True),
    ]
    processor.chat_template = processor.chat_template.replace("]['text'] }}", "]['type'] }}")
    with pytest.raises(DataError, match="writes no turns of role assistant"):
        sequences({"messages": chat}, "messages", processor.tokenizer, "row 1", processor=processor)


def test_a_tokenizer_s_template_is_given_text() -> None:
    """Those of models that read text alone know no parts, and would write a list down as Python does."""
    tokenizer = image_tokenizer("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    _, processor = build_vlm("LLaVA")
    processor.chat_template = None
    for beside in (None, processor):
        [found] = sequences(row(), "messages", tokenizer, "here", processor=beside)
        assert "".join(segment.text for segment in found) == "What colour?<eos>red<eos>"


@pytest.mark.parametrize("family", VLMS)
@torch.no_grad()
def test_tokens_of_an_image_are_no_labels(vlm_dir: Callable[[str], Path], family: str) -> None:
    directory = vlm_dir(family)
    [found] = tokens_of(TokenizeOptions(str(directory), "messages", 512), two_turns())
    assert found is not None
    batch, config = collate([found], 0, ImageInputs(directory)), AutoConfig.from_pretrained(directory)
    image = config.image_token_id
    shown = batch["input_ids"] == image
    assert shown.any()
    labels = label_mask(batch, "all", config)
    assert torch.equal(labels, (batch["attention_mask"].bool() & ~shown).index_fill(1, torch.tensor([0]), False))
    assert image not in model_call(config, batch, "all").targets


@pytest.mark.parametrize("family", VLMS)
@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_a_blank_image_has_every_part_run_and_changes_no_loss(
    vlm_dir: Callable[[str], Path], family: str, loss_on: str
) -> None:
    directory = vlm_dir(family)
    model, images = load_model(directory).requires_grad_(True), ImageInputs(directory)
    rows = [Tokens([5, 6, 7, 8, 9], [False] * 3 + [True] * 2), Tokens([5, 6, 7], [False] * 2 + [True])]
    alone = token_loss(model, collate(rows, 0, images), loss_on)
    together = token_loss(model, collate_together(rows, ImageInputs(directory).blank_row(), 0, images), loss_on)
    assert together.num_tokens == alone.num_tokens
    assert together.loss_sum.item() == pytest.approx(alone.loss_sum.item(), rel=1e-5)
    together.loss_sum.backward()
    linears = [
        m for n, m in model.named_modules() if "vis" in n and n.endswith(("q_proj", "qkv")) and "layers.2" not in n
    ]
    assert linears
    for linear in linears:
        assert linear.weight.grad is not None
        assert not linear.weight.grad.any()
    shown = ImageInputs(directory).blank_row()
    assert len(collate_together([*rows, shown], shown, 0, images)["input_ids"]) == 3


def test_an_image_for_a_model_that_reads_none(tiny_model_dir: Callable[..., Path]) -> None:
    directory = tiny_model_dir("llama")
    assert open_processor(str(directory)) is None
    assert example(directory) == {}
    with pytest.raises(DataError, match="row 1: it shows an image, and the model has no processor"):
        tokens_of(TokenizeOptions(str(directory), "messages", 512), row({"type": "image", "image": png()}))
    with pytest.raises(ConfigError, match="holds no processor"):
        ImageInputs(directory)([[png()]], torch.zeros(1, 4, dtype=torch.long))


def test_images_are_not_packed(vlm_dir: Callable[[str], Path]) -> None:
    options = TokenizeOptions(str(vlm_dir("LLaVA")), "messages", 512, packing=True)
    with pytest.raises(DataError, match=r"row 2: it shows an image, and data\.packing"):
        tokens_of(options, row(), two_turns())


def test_images_in_several_turns_of_which_a_processor_makes_fewer_tokens_together(tmp_path: Path) -> None:
    """The pixels would be those of fewer tokens than the row has."""
    llava_onevision().save_pretrained(tmp_path)
    options = TokenizeOptions(str(tmp_path), "messages", 512)
    shown = {"type": "image", "image": png()}
    with pytest.raises(
        DataError, match=r"row 2: it shows images in several turns, and the model's processor makes fewer"
    ):
        tokens_of(options, row(shown, shown), two_turns())
    later = {"messages": row()["messages"] + row(shown)["messages"]}
    kept = tokens_of(replace(options, skip_bad_rows=True), row(shown, shown), two_turns(), later)
    assert [tokens and len(tokens.images) for tokens in kept] == [2, None, 1]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Twelve rows: four with an image, four without, and four that are bad, each in its way."""
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "cut.png").write_bytes(torn())
    good = [row({"type": "image", "path": "a.png"}) for _ in range(4)] + [row() for _ in range(4)]
    bad = [row({"type": "image", "path": "absent.png"}), row({"type": "image", "path": "cut.png"}), {"messages": []}]
    path = write_jsonl(tmp_path / "rows.jsonl", [*good[:2], *bad, *good[2:]])
    with path.open("a") as file:
        file.write("{no json}\n")
    return path


@pytest.mark.usefixtures("inline")
def test_bad_rows_are_skipped_and_counted_or_end_the_run(
    rows_file: Path, tmp_path: Path, vlm_dir: Callable[[str], Path]
) -> None:
    selection = RowSelection.all_rows([scan(rows_file)])
    options = TokenizeOptions(str(vlm_dir("InternVL")), "messages", 512, skip_bad_rows=True)
    counts = tokenize_splits({"s": selection}, options, tmp_path / "out", rows_per_shard={"s": 5}, num_workers=1)["s"]
    assert (counts["rows"], counts["skipped_rows"], counts["images"]) == (8, 4, 4)
    shards = TokenShards(tmp_path / "out" / "s")
    assert shards.has_images
    shown = [len(shards.row(position).images) for position in range(8)]
    assert shown == [1, 1, 1, 1, 0, 0, 0, 0]
    assert shards.row(0).images[0].content == png()
    assert [bool(length) for length in row_lengths(selection, options, 1)] == [True] * 2 + [False] * 3 + [True] * 6 + [
        False
    ]
    strict = TokenizeOptions(str(vlm_dir("InternVL")), "messages", 512)
    with pytest.raises(DataError, match=rf"{rows_file}, row 3: image 1 .*absent\.png is not there"):
        tokenize_splits({"s": selection}, strict, tmp_path / "strict", rows_per_shard={"s": 5}, num_workers=1)


@pytest.mark.usefixtures("inline")
def test_all_rows_bad(tmp_path: Path, vlm_dir: Callable[[str], Path]) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": []}] * 3)
    options = TokenizeOptions(str(vlm_dir("LLaVA")), "messages", 512, skip_bad_rows=True)
    selection = RowSelection.all_rows([scan(path)])
    with pytest.raises(
        DataError, match=r"data\.s: no row of the good ones \(3 are bad\) keeps its images and a completion"
    ):
        tokenize_splits({"s": selection}, options, tmp_path / "out", rows_per_shard={"s": 5}, num_workers=1)
    texts = RowSelection.all_rows(
        [scan(write_jsonl(tmp_path / "texts.jsonl", [{"prompt": "a b c", "completion": "d"}]))]
    )
    short = TokenizeOptions(str(vlm_dir("LLaVA")), "prompt_completion", 2)
    with pytest.raises(DataError, match=r"no row keeps a completion token within data\.max_seq_length 2: raise it"):
        tokenize_splits({"s": texts}, short, tmp_path / "short", rows_per_shard={"s": 5}, num_workers=1)


def test_token_types_of_another_meaning_are_refused(
    vlm_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = vlm_dir("Gemma 3 (vision)")
    kind = type(open_processor(str(directory)))
    zeros = lambda self, ids: [[0] * len(row) for row in ids]  # noqa: E731
    assert "token_type_ids" in example(directory)
    monkeypatch.setattr(kind, "create_mm_token_type_ids", zeros)
    monkeypatch.setattr(
        processors, "blank_image_tokens", lambda *_: {"input_ids": torch.ones(1, 2), "token_type_ids": torch.ones(1, 2)}
    )
    with pytest.raises(ConfigError, match="token types do not follow from the tokens alone"):
        example(directory)


def test_a_processor_without_token_types_needs_none(
    vlm_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = vlm_dir("LLaVA")
    monkeypatch.setattr(processors, "blank_image_tokens", lambda *_: {"input_ids": torch.ones(1, 2)})
    monkeypatch.setattr(type(open_processor(str(directory))), "create_mm_token_type_ids", None)
    assert set(example(directory)) == {"input_ids"}
