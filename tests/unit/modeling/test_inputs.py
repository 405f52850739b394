from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import PAD, make_model

from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import collate
from emloc_ray.modeling.inputs import has_encoder, label_mask, model_call
from emloc_ray.modeling.loss import token_loss

ROWS = [Tokens(list(range(5, 15)), [False] * 6 + [True] * 4), Tokens([20, 21, 22, 23, 24], [False] * 2 + [True] * 3)]


@pytest.fixture(scope="module")
def t5() -> Any:
    return families.build("T5")


def test_a_decoder_predicts_each_label_from_the_tokens_before_it() -> None:
    call = model_call(make_model("llama").config, collate(ROWS, PAD))
    assert call.targets.tolist() == [11, 12, 13, 14, 22, 23, 24]
    rows, places = call.predicting
    assert rows.tolist() == [0, 0, 0, 0, 1, 1, 1]
    length = call.inputs["input_ids"].shape[1]
    assert (places + length).tolist() == [5, 6, 7, 8, 1, 2, 3]
    assert call.counts == (4, 3)
    assert call.counted["row"].sum() == 15
    assert call.counted.keys() == {"row"}


def test_an_encoder_reads_the_prompt_and_a_decoder_the_completion_one_place_later(t5: Any) -> None:
    call = model_call(t5.config, collate(ROWS, PAD))
    assert has_encoder(t5.config)
    assert call.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10], [20, 21, PAD, PAD, PAD, PAD]]
    assert call.inputs["attention_mask"].tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]
    start = t5.config.decoder_start_token_id
    assert call.inputs["decoder_input_ids"].tolist() == [[start, 11, 12, 13], [start, 22, 23, PAD]]
    assert call.targets.tolist() == [11, 12, 13, 14, 22, 23, 24]
    assert {stream: int(mask.sum()) for stream, mask in call.counted.items()} == {"row": 8, "decoder": 7}


@torch.no_grad()
def test_the_loss_beside_an_encoder_is_transformers_own(t5: Any) -> None:
    expected = 0.0
    for row in ROWS:
        first = row.completion_mask.index(True)
        given_ids, labels = torch.tensor([row.input_ids[:first]]), torch.tensor([row.input_ids[first:]])
        expected += float(t5(input_ids=given_ids, labels=labels).loss) * labels.numel()
    found = token_loss(t5, collate(ROWS, PAD), "completion")
    assert found.num_tokens == 7
    assert float(found.loss_sum) == pytest.approx(expected, rel=1e-5)


def test_later_turns_of_a_conversation_are_read_and_not_learned(t5: Any) -> None:
    row = Tokens([5, 6, 11, 12, 7, 8, 9, 13], [False, False, True, True, False, False, False, True])
    batch = collate([row, ROWS[1]], PAD)
    call = model_call(t5.config, batch)
    start = t5.config.decoder_start_token_id
    assert call.inputs["decoder_input_ids"].tolist() == [[start, 11, 12, 7, 8, 9], [start, 22, 23, PAD, PAD, PAD]]
    assert call.targets.tolist() == [11, 12, 13, 22, 23, 24]
    assert len(call.targets) == int(label_mask(batch, "completion").sum())
    assert int(call.counted["decoder"].sum()) == 9


def test_what_else_is_in_a_batch_is_handed_on() -> None:
    batch = {**collate(ROWS, PAD), "pixel_values": torch.ones(2, 3), "labels": torch.zeros(2, 16)}
    assert model_call(make_model("llama").config, batch).inputs.keys() == {
        "input_ids",
        "attention_mask",
        "pixel_values",
    }


def test_nothing_padded_needs_no_mask() -> None:
    batch = collate([Tokens([5] * 8, [True] * 8)], PAD)
    assert model_call(make_model("llama").config, batch).inputs["attention_mask"] is None


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4))
def test_no_token_is_lost_between_encoder_and_decoder(lengths: list[tuple[int, int]]) -> None:
    rows = [Tokens([*range(50, 50 + p), *range(90, 90 + c)], [False] * p + [True] * c) for p, c in lengths]
    call = model_call(families.FAMILIES["T5"](), collate(rows, PAD))
    mask = call.counted["row"]
    assert call.inputs["input_ids"][mask].tolist() == [i for p, _ in lengths for i in range(50, 50 + p)]
    assert call.targets.tolist() == [i for _, c in lengths for i in range(90, 90 + c)]


def test_labels_are_completion_tokens_or_all_but_the_first() -> None:
    batch = collate(ROWS, PAD)
    assert label_mask(batch, "completion").sum() == 7
    assert label_mask(batch, "all").sum() == 13
