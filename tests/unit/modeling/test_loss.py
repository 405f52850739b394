"""The loss with logits only where labels are, against transformers' own full-logits loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from stage_artifacts import half_rows
from tiny import FAMILIES, PAD, VOCABULARY, make_model
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

from emloc_ray.data.token_shards import collate
from emloc_ray.modeling import loss
from emloc_ray.modeling.adapter import attach_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.inputs import label_mask, model_call
from emloc_ray.modeling.loss import call_loss, token_loss


def batch_of(*lengths: int) -> dict[str, torch.Tensor]:
    """Rows of these lengths; about half of each is completion, and one row has it in two pieces."""
    rows = half_rows(*lengths)
    rows[0].completion_mask[0] = rows[0].completion_mask[1] = True
    return collate(rows, PAD)


def reference(model: Any, batch: dict[str, torch.Tensor], loss_on: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Mean loss by transformers, correct tokens by argmax of all logits, number of labels."""
    mask = batch["attention_mask"].bool() & (batch["completion_mask"] if loss_on == "completion" else True)
    labels = batch["input_ids"].masked_fill(~mask, -100)
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
    shifted, guesses = labels[:, 1:], output.logits[:, :-1].argmax(-1)
    return output.loss, ((guesses == shifted) & (shifted != -100)).sum(), int((shifted != -100).sum())


@pytest.mark.parametrize("share", [1, 16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize("lengths", [(16,), (16, 16), (13, 5, 8)])
def test_equals_the_full_loss_with_gradients(
    monkeypatch: pytest.MonkeyPatch, family: str, loss_on: str, lengths: tuple[int, ...], share: int
) -> None:
    monkeypatch.setattr(loss, "CHUNK_SHARE", share)
    batch = batch_of(*lengths)
    ours, theirs = make_model(family), make_model(family)
    mean, correct, count = reference(theirs, batch, loss_on)
    result = token_loss(ours, batch, loss_on)
    assert result.num_tokens == count
    assert int(result.num_correct) == int(correct)
    torch.testing.assert_close(result.loss_sum / count, mean, rtol=1e-5, atol=1e-6)
    mean.backward()
    (result.loss_sum / count).backward()
    for (name, ours_p), theirs_p in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_p.grad, theirs_p.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_bfloat16_logits_are_summed_in_float32() -> None:
    result = token_loss(make_model("llama", dtype="bfloat16"), batch_of(16, 9), "all")
    assert result.loss_sum.dtype == torch.float32


def test_the_head_sees_labels_only_and_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_SHARE", 1)
    model, batch = make_model("llama"), batch_of(13, 5)
    seen: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[:-1].numel()))
    count = token_loss(model, batch, "completion").num_tokens
    assert seen == [count]
    handle.remove()
    assert not model.lm_head._forward_pre_hooks
    assert model(input_ids=batch["input_ids"]).logits.shape[:2] == batch["input_ids"].shape


def test_the_hook_goes_even_where_the_forward_fails() -> None:
    model = make_model("llama")
    with pytest.raises(IndexError):
        token_loss(model, {**batch_of(8), "input_ids": torch.full((1, 8), 10**6)}, "all")
    assert not model.lm_head._forward_pre_hooks


class Wrapper(nn.Module):
    """As DDP: the head is the inner model's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def test_a_wrapped_model() -> None:
    model, batch = make_model("llama"), batch_of(13, 5)
    wrapped = call_loss(Wrapper(model), model_call(model.config, batch, "completion"), model)
    assert torch.equal(wrapped.loss_sum, token_loss(model, batch, "completion").loss_sum)


def in_mixed_precision(model: Any) -> Any:
    """With an adapter, and with what accelerate puts around a model where bf16 is asked for."""
    made: Any = attach_adapter(model, adapter_config(target_modules=["layers.0.mlp.down_proj"], r=2, lora_alpha=4))
    made.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(made.forward))
    return made


def test_the_head_is_tried_without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    # Which may keep what it makes of weights there, where no gradient is wanted, for the pass that wants them.
    monkeypatch.setattr(loss, "CHUNK_SHARE", 21)
    model, mixed = make_model("llama"), []
    model.lm_head.register_forward_hook(lambda *_: mixed.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        token_loss(model, batch_of(13, 5), "all")
    assert mixed == [False, True]


@pytest.mark.parametrize("around", [lambda model: model, in_mixed_precision], ids=["bare", "mixed precision"])
def test_no_more_logits_than_a_chunk_are_made(monkeypatch: pytest.MonkeyPatch, around: Callable[[Any], Any]) -> None:
    monkeypatch.setattr(loss, "CHUNK_SHARE", 21)  # three tokens
    bare, batch = make_model("llama"), batch_of(13, 5)
    model = around(bare)
    rows: list[int] = []
    linear = torch.nn.functional.linear

    def recorded(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight is bare.lm_head.weight:
            rows.append(x.shape[:-1].numel())
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", recorded)
    assert token_loss(model, batch, "all").num_tokens == 16
    assert sum(rows[1:]) == 16  # after the single token that was tried
    assert max(rows) == 3
    assert "forward" not in vars(bare.lm_head)


def test_logits_that_are_changed_after_the_head_are_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=0.1)).eval()
    monkeypatch.setattr(loss, "CHUNK_SHARE", 1)
    whole = token_loss(capped, batch_of(16, 9), "all")
    monkeypatch.setattr(loss, "CHUNK_SHARE", 64)
    assert torch.equal(token_loss(capped, batch_of(16, 9), "all").loss_sum, whole.loss_sum)


class Masked(LlamaForCausalLM):
    """As Chameleon, which allows no image token in its answer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits[..., 3] = -1e4
        return output


def test_so_are_logits_that_are_changed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Masked(make_model("llama").config).eval(), batch_of(16, 9)
    whole = token_loss(model, batch, "all")
    monkeypatch.setattr(loss, "CHUNK_SHARE", 21)
    in_chunks = Masked(model.config).eval()
    in_chunks.load_state_dict(model.state_dict())
    assert torch.equal(token_loss(in_chunks, batch, "all").loss_sum, whole.loss_sum)


def test_the_random_state_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_SHARE", 64)
    model = make_model("llama", attention_dropout=0.5).train()
    state = torch.get_rng_state()
    with torch.random.fork_rng():
        first = token_loss(model, batch_of(16), "all").loss_sum
    assert torch.equal(torch.get_rng_state(), state)
    with torch.random.fork_rng():
        assert torch.equal(token_loss(model, batch_of(16), "all").loss_sum, first)


def test_trying_the_head_asks_no_gpu_but_the_model_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train shows each worker all of its node's: torch warned that it initializes every one."""
    model, batch = make_model("llama"), batch_of(16)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(loss, "CHUNK_SHARE", 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert token_loss(model, batch, "all").num_tokens == 15


def test_labels_are_never_first_tokens_nor_padding() -> None:
    batch = batch_of(13, 5)
    everything, completion = label_mask(batch, "all"), label_mask(batch, "completion")
    assert not everything[:, 0].any()
    assert not completion[:, 0].any()
    assert int(everything.sum()) == 12 + 4
    assert not (completion & ~everything).any()
    assert batch["completion_mask"][0, 0]  # the batch itself is not changed


def test_ddp_that_looks_for_unused_parameters_finds_them_all_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loss, "CHUNK_SHARE", 16)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, batch = make_model("llama"), batch_of(13, 5)
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        for _ in range(2):
            call_loss(wrapped, model_call(model.config, batch, "all"), model).loss_sum.backward()
    finally:
        torch.distributed.destroy_process_group()
    expected = make_model("llama")
    (2 * token_loss(expected, batch, "all").loss_sum).backward()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_weights_that_zero_3_scatters_are_there_for_each_chunk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import deepspeed

    monkeypatch.setattr(loss, "CHUNK_SHARE", 21)  # three tokens
    monkeypatch.setattr(nn.functional, "linear", nn.functional.linear)  # DeepSpeed puts its own there, for good
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
        model, plain, batch = make_model("llama"), make_model("llama"), batch_of(13, 5)
        settings: dict[str, Any] = {
            "train_batch_size": 1,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
        }
        settings["zero_optimization"] = {"stage": 3, "stage3_param_persistence_threshold": 0}
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        rows: list[int] = []
        compute_loss = loss.label_loss

        def recorded(logits: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            rows.append(len(wanted))
            return compute_loss(logits, wanted)

        for _ in range(3):  # the first is traced, the others fetch ahead by that trace
            assert model.lm_head.weight.numel() == 0
            plain.zero_grad()
            expected = token_loss(plain, batch, "all")
            expected.loss_sum.backward()
            with monkeypatch.context() as patched:
                patched.setattr(loss, "label_loss", recorded)
                result = call_loss(engine, model_call(model.config, batch, "all"), model)
                engine.backward(result.loss_sum)
            assert int(result.num_correct) == int(expected.num_correct)
            torch.testing.assert_close(result.loss_sum, expected.loss_sum, rtol=1e-5, atol=1e-6)
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                gradient = deepspeed.utils.safe_get_full_grad(ours)
                torch.testing.assert_close(gradient, theirs.grad, rtol=1e-4, atol=1e-6)
            engine.step()
            with torch.no_grad():
                for parameter in plain.parameters():
                    parameter -= 1e-3 * parameter.grad
        assert max(rows) == 3
        assert sum(rows) == 3 * 2 * 16  # made again for the gradient
        engine.destroy()
    finally:
        deepspeed.comm.destroy_process_group()
