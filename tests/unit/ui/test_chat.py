"""Asking the original and the fine-tuned model: each answers what it was trained to, of what a row's prompt is in training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from rich.console import Console
from tiny import EOS, make_model, make_tokenizer
from tokenizers.processors import TemplateProcessing

from emloc_ray.data.formats import encode, sequences
from emloc_ray.ui import chat
from emloc_ray.ui.chat import Pair, talk

PROMPT = "the sum of"


def pair_of(tokenizer: Any, adapter: Any, family: str = "llama", max_new_tokens: int = 8) -> Pair:
    """A tiny model with an adapter, whose virtual tokens say something."""
    torch.manual_seed(0)
    model = get_peft_model(make_model(family), adapter).eval()
    for name, parameter in model.named_parameters():
        if "prompt_encoder" in name:
            parameter.data.normal_()
    return Pair(model, tokenizer, None, plain=True, max_new_tokens=max_new_tokens)


@torch.no_grad()
def greedy(model: Any, ids: list[int], steps: int) -> list[int]:
    row = list(ids)
    while len(row) < len(ids) + steps and row[len(ids) :][-1:] != [EOS]:
        row.append(int(model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
    return row[len(ids) :]


@pytest.mark.parametrize("kind", [PrefixTuningConfig, PromptTuningConfig])
def test_virtual_tokens_are_before_each_answer_of_the_fine_tuned(tokenizer: Any, kind: Any) -> None:
    pair = pair_of(tokenizer, kind(task_type="CAUSAL_LM", num_virtual_tokens=5))
    ids = tokenizer(PROMPT)["input_ids"]
    models = {"original": pair.model.get_base_model(), "fine-tuned": pair.model}
    expected = {
        name: tokenizer.decode(greedy(model, ids, 8), skip_special_tokens=True) for name, model in models.items()
    }
    assert pair.answers(PROMPT) == expected
    assert expected["original"] != expected["fine-tuned"]


@pytest.mark.parametrize("has_encoder", [False, True])
def test_a_plain_prompt_ends_as_those_of_the_training_s_rows(
    has_encoder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the tokenizer appends: a decoder goes on after a prompt, an encoder reads one with its end."""
    tokenizer, asked = make_tokenizer(), []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A <eos>", special_tokens=[("<eos>", EOS)])
    assert tokenizer(PROMPT)["input_ids"][-1] == EOS
    model = make_model("llama")
    model.config.is_encoder_decoder = has_encoder
    pair = Pair(get_peft_model(model, LoraConfig(target_modules=["q_proj"])), tokenizer, None, True, 8)

    def continuations(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        asked.extend(prompts)
        return [[]]

    monkeypatch.setattr(chat, "continuations", continuations)
    pair.answers(PROMPT)
    row = {"prompt": PROMPT, "completion": " it"}
    prompt = sequences(row, "prompt_completion", tokenizer, "row 1", has_encoder)[0][:1]
    assert asked == [encode([prompt], tokenizer)[0].input_ids] * 2
    assert (asked[0][-1] == EOS) is has_encoder


@pytest.mark.parametrize("virtual", [0, 5])
def test_answers_end_with_the_model_s_last_position(tokenizer: Any, virtual: int) -> None:
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=virtual or 1)
    adapter = prefix if virtual else LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    pair = pair_of(tokenizer, adapter, "gpt2", max_new_tokens=256)
    pair.plain = False
    most, wrapped = 128 - virtual, len(tokenizer("<|user|><eos><|assistant|>")["input_ids"])
    said = iter(["a" * (most - wrapped - 1), "/new", "b" * (most - wrapped), "c", ""])
    console = Console(record=True, width=300)
    talk(console, pair, lambda prompt: next(said))
    text = console.export_text()
    assert text.count("fine-tuned") == 2
    assert (
        text.count(f"A prompt of {most} tokens, with what was said before it, leaves none of the model's {most}") == 1
    )
    assert [[turn["content"] for turn in turns][:-1] for turns in pair.turns.values()] == [["c"], ["c"]]
