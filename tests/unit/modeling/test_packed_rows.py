"""Packed rows: the losses and gradients of the rows alone; models that mix them are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stage_artifacts import half_rows
from tiny import PAD, make_config, make_model
from torch import Tensor, nn
from transformers import JambaConfig, JambaForCausalLM, LlamaForCausalLM, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from emloc_ray.data.packing import join, pack_rows
from emloc_ray.data.token_shards import collate
from emloc_ray.errors import ConfigError
from emloc_ray.modeling.adapter import attach_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.loss import token_loss
from emloc_ray.modeling.packing import as_one_row, check_rows_apart, packs_known, why_rows_mix

LENGTHS = (13, 5, 8, 3, 11, 2)


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
    rows = half_rows(*LENGTHS)
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


def test_packed_rows_are_found_as_transformers_finds_them() -> None:
    """But where no pack has a second row: that is a mask here, and there None."""
    packs = collate([join(half_rows(5, 2)), join(half_rows(4, 1, 4))], PAD, multiple=1)["position_ids"]
    alone = torch.arange(9).expand(2, -1)
    for positions in (packs, packs[:1], alone):
        expected = masking_utils.find_packed_sequence_indices(positions)
        with packs_known({"position_ids": positions}):
            found: Any = masking_utils.find_packed_sequence_indices(positions)
        assert torch.equal(found, torch.zeros_like(found) if expected is None else expected)
    with packs_known({"position_ids": None}):
        assert masking_utils.find_packed_sequence_indices(packs) is None
    assert masking_utils.find_packed_sequence_indices(packs) is not None


def test_flash_attention_is_given_the_bounds_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer, so that none looks for them in the positions; as transformers would find them there."""
    seen: list[dict[str, Any]] = []

    def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return sdpa_attention_forward(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", attend)
    batch = as_one_row(collate([join(half_rows(5, 2)), join(half_rows(4, 3))], PAD, multiple=8))
    model = make_model("llama", attn_implementation="sdpa")
    token_loss(model, batch, "all")
    (expected, _), (longest, _) = prepare_fa_kwargs_from_position_ids(batch["position_ids"])
    for given in seen[-model.config.num_hidden_layers :]:  # without those of a pass that tries the head
        for of in "qk":
            assert given[f"cu_seq_lens_{of}"].dtype == torch.int32
            assert given[f"cu_seq_lens_{of}"].tolist() == expected.tolist() == [0, 5, 7, 8, 12, 15, 16]
            assert type(given[f"max_length_{of}"]) is int
            assert given[f"max_length_{of}"] == int(longest) == 5


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
