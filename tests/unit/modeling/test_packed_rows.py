"""Packed rows: the losses and gradients of the rows alone; models that mix them are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import PAD, VOCABULARY, make_config, make_model
from torch import Tensor, nn
from transformers import JambaConfig, JambaForCausalLM, LlamaForCausalLM

from emloc_ray.data.formats import Tokens
from emloc_ray.data.packing import join, pack_rows
from emloc_ray.data.token_shards import collate
from emloc_ray.errors import ConfigError
from emloc_ray.modeling.adapter import attach_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.loss import token_loss
from emloc_ray.modeling.packing import as_one_row, check_rows_apart, why_rows_mix

LENGTHS = (13, 5, 8, 3, 11, 2)


def rows_of(lengths: tuple[int, ...]) -> list[Tokens]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in lengths:
        ids = torch.randint(2, VOCABULARY, (length,), generator=generator).tolist()
        rows.append(Tokens(ids, [position >= length // 2 for position in range(length)]))
    return rows


def trained(model: Any, batches: list[dict[str, Tensor]], loss_on: str) -> tuple[float, int, list[Tensor]]:
    """The loss over all batches, the labels, and the gradients of the adapter."""
    model.zero_grad()
    losses = [token_loss(model, batch, loss_on) for batch in batches]
    loss = torch.stack([part.loss_sum for part in losses]).sum()
    count = sum(part.num_tokens for part in losses)
    (loss / count).backward()
    return float(loss.detach() / count), count, [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral"])
def test_packed_rows_are_trained_on_as_alone(family: str, loss_on: str, attention: str) -> None:
    model = make_model(family, attn_implementation=attention)
    targets = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "v_proj", "o_proj"]
    model = attach_adapter(model, adapter_config(target_modules=targets, r=4, lora_alpha=8))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    rows = rows_of(LENGTHS)
    alone = trained(model, [collate([row], PAD) for row in rows], loss_on)
    packs = pack_rows([len(row) for row in rows], 16)
    assert len(packs) < len(rows)
    sequences = [join([rows[row] for row in packs[number]]) for number in range(len(packs))]
    packed = collate(sequences, PAD)
    for batch in (packed, as_one_row(packed)):  # as flash attention takes them
        loss, count, gradients = trained(model, [batch], loss_on)
        assert count == alone[1]
        assert loss == pytest.approx(alone[0], rel=1e-5)
        for ours, theirs in zip(gradients, alone[2], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    check_rows_apart(model, torch.float32)


class Forgetful(LlamaForCausalLM):
    """Drops the positions that it is given."""

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **others: Any) -> Any:
        return super().forward(input_ids, **others)


def test_a_model_in_which_packed_rows_see_each_other_is_refused() -> None:
    model = Forgetful(make_config("llama"))
    assert why_rows_mix(model) is None
    with pytest.raises(
        ConfigError, match="does not go with a llama model, in which a packed row sees the one before it"
    ):
        check_rows_apart(model, torch.float32)


def test_a_model_with_a_state_is_refused_by_what_it_says_of_itself() -> None:
    with torch.device("meta"):
        jamba = JambaForCausalLM(
            JambaConfig(
                vocab_size=64,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                use_mamba_kernels=False,
            )
        )
    assert "carries a state from token to token" in (why_rows_mix(jamba) or "")

    class Unplaced(nn.Module):
        config = make_model("llama").config

        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids

    assert why_rows_mix(Unplaced()) == "takes no positions"
    assert why_rows_mix(make_model("qwen2")) is None
