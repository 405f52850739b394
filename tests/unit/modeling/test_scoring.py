"""Scores and completions of rows: the same whatever the batch, and the same as row by row with no padding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from stage_artifacts import half_rows
from tiny import EOS, FAMILIES, PAD, VOCABULARY, make_model, random_model
from torch.nn.functional import log_softmax
from transformers import Ovis2Config

from emloc_ray.data.formats import Tokens
from emloc_ray.errors import NumericsError
from emloc_ray.modeling import loss as loss_module
from emloc_ray.modeling.scoring import Score, complete, losses_by_row, prompt_length, score_rows


@torch.no_grad()
def by_hand(model: Any, many: list[Tokens], loss_on: str) -> tuple[float, int, int]:
    loss, correct, count = 0.0, 0, 0
    for row in many:
        scores = log_softmax(model(input_ids=torch.tensor([row.input_ids])).logits[0].double(), -1)
        for position in range(1, len(row)):
            if row.completion_mask[position] or loss_on == "all":
                loss -= float(scores[position - 1, row.input_ids[position]])
                correct += int(scores[position - 1].argmax()) == row.input_ids[position]
                count += 1
    return loss, correct, count


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_score_is_row_by_row_whatever_the_batch(family: str, loss_on: str, batch_size: int) -> None:
    model, many = make_model(family), half_rows(13, 5, 8, 21, 2)
    score = score_rows(model, many, batch_size=batch_size, loss_on=loss_on, pad_token_id=PAD, name="x")
    loss, correct, count = by_hand(model, many, loss_on)
    assert score.num_tokens == count
    assert score.num_correct == correct
    assert score.loss_sum == pytest.approx(loss, rel=1e-5)
    assert score.metrics() == {
        "loss": score.loss_sum / count,
        "token_accuracy": correct / count,
        "num_tokens": count,
    }


@pytest.mark.parametrize("share", [1, 64])
@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_losses_by_row_are_the_rows_own_in_their_order(
    loss_on: str, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_SHARE", share)  # logits at once, or a token's at a time
    model, many = make_model("llama"), half_rows(13, 5, 1, 8, 21, 2)
    found = losses_by_row(model, many, batch_size=4, loss_on=loss_on, pad_token_id=PAD)
    expected = [by_hand(model, [row], loss_on) for row in many]
    assert found.counts.tolist() == [count for _, _, count in expected]
    assert found.sums.tolist() == pytest.approx([loss for loss, _, _ in expected], rel=1e-5)


def test_scores_of_disjoint_rows_add_up() -> None:
    assert Score(1.5, 2, 3) + Score(0.5, 1, 4) == Score(2.0, 3, 7)
    assert Score().metrics() == {"loss": 0.0, "token_accuracy": 0.0, "num_tokens": 0}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_names_the_model(bad: float) -> None:
    model = make_model("llama")
    model.model.norm.weight.data[0] = bad
    with pytest.raises(NumericsError, match="loss of the merged model is NaN or Inf"):
        score_rows(model, half_rows(8), batch_size=1, loss_on="all", pad_token_id=PAD, name="merged")


@pytest.mark.parametrize(
    ("mask", "expected"),
    [([False, False, True, True], 2), ([True] * 6, 3), ([True, False, False, False], 2), ([False, True], 1)],
)
def test_prompt_length(mask: list[bool], expected: int) -> None:
    assert prompt_length(Tokens([5] * len(mask), mask)) == expected


@torch.no_grad()
def greedy(model: Any, prompt: list[int], steps: int) -> list[int]:
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_completions_are_greedy_whatever_the_batch(tokenizer: Any, family: str, batch_size: int) -> None:
    model, many = make_model(family), half_rows(13, 6, 20, 9)
    texts = complete(model, tokenizer, many, max_new_tokens=6, batch_size=batch_size)
    expected = [greedy(model, row.input_ids[: prompt_length(row)], 6) for row in many]
    assert texts == [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in expected]


def test_a_padding_token_that_the_model_does_not_embed_is_none(tokenizer: Any) -> None:
    model, many = make_model("llama"), half_rows(13, 6, 20)
    added = copy.deepcopy(tokenizer)
    added.add_tokens([f"<|{number}|>" for number in range(VOCABULARY)])
    added.pad_token = f"<|{VOCABULARY - 1}|>"
    assert added.pad_token_id >= VOCABULARY
    texts = complete(model, added, many, max_new_tokens=6, batch_size=3)
    assert texts == complete(model, tokenizer, many, max_new_tokens=6, batch_size=3)


def test_completions_are_greedy_whatever_the_model_s_generation_config_asks_for(tokenizer: Any) -> None:
    model, many = make_model("llama"), half_rows(13, 6)
    plain = complete(model, tokenizer, many, max_new_tokens=8, batch_size=2)
    asked = {"repetition_penalty": 5.0, "num_beams": 3, "no_repeat_ngram_size": 1, "min_length": 40}
    for key, value in asked.items():
        setattr(model.generation_config, key, value)
    assert complete(model, tokenizer, many, max_new_tokens=8, batch_size=2) == plain


@pytest.mark.parametrize("virtual", [0, 5])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_completions_end_with_the_model_s_last_position(tokenizer: Any, virtual: int, batch_size: int) -> None:
    """Of the rows whose prompt leaves too few alone: what another row says does not depend on its batch."""
    model, room = make_model("gpt2"), 128 - virtual
    if virtual:
        config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual)
        model = get_peft_model(model, config).eval()
    many = half_rows(6, 2 * room - 8, 20, 2 * room - 2)  # the halves before are prompts
    texts = complete(model, tokenizer, many, max_new_tokens=9, batch_size=batch_size)
    expected = [greedy(model, row.input_ids[:count], min(9, room - count)) for row in many for count in [len(row) // 2]]
    assert texts == [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in expected]


def test_an_adapter_does_not_take_a_vision_tower_s_positions_for_the_text_s(tokenizer: Any) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    ends: dict[str, Any] = {"vocab_size": VOCABULARY, "eos_token_id": EOS, "pad_token_id": PAD}
    config = Ovis2Config(
        vision_config={**sizes, "image_size": 28, "patch_size": 14, "vocab_size": 64},  # four patches
        text_config={**sizes, **ends, "model_type": "qwen2", "num_key_value_heads": 2},
        image_token_id=VOCABULARY - 1,
        visual_indicator_token_ids=[*range(VOCABULARY - 6, VOCABULARY - 1)],
        **{**ends, "hidden_size": 32},
    )
    model, many = random_model(config), half_rows(20, 9)
    plain = complete(model, tokenizer, many, max_new_tokens=6, batch_size=2)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).eval()  # which changes nothing yet
    assert complete(adapted, tokenizer, many, max_new_tokens=6, batch_size=2) == plain


class Told:
    """Wraps a model whose head is made to prefer chosen tokens, one after another."""

    def __init__(self, sequence: list[int]) -> None:
        self.model = make_model("llama")
        self.sequence, self.step = sequence, 0
        self.model.lm_head.register_forward_hook(self.prefer)

    def prefer(self, module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        wanted = self.sequence[min(self.step, len(self.sequence) - 1)]
        self.step += 1
        return torch.nn.functional.one_hot(torch.full(output.shape[:-1], wanted), VOCABULARY).float()


def test_completions_stop_at_the_end_of_the_sequence(tokenizer: Any) -> None:
    word = tokenizer(" the sum")["input_ids"]
    model = Told([*word, EOS, word[0]]).model
    assert complete(model, tokenizer, half_rows(6), max_new_tokens=20, batch_size=1) == ["the sum"]


def test_no_rows_no_work(tokenizer: Any) -> None:
    model = make_model("llama")
    assert complete(model, tokenizer, [], max_new_tokens=3, batch_size=2) == []
    assert score_rows(model, [], batch_size=2, loss_on="all", pad_token_id=PAD, name="x") == Score()
