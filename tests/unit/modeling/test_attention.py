"""Attention kernels that do not come with torch, by their names and packages."""

from __future__ import annotations

import importlib.metadata

import pytest
from tiny import make_config, make_model
from transformers import LlamaForCausalLM

from emloc_ray.errors import ConfigError
from emloc_ray.modeling import attention
from emloc_ray.modeling.attention import check_takes_kernel, is_flash, missing_package, needs_kernel

FLASH, HUB = ("flash_attention_2", "flash_attention_3", "flash_attention_4"), "kernels-community/flash-attn3"


def test_a_kernel_is_told_by_its_name() -> None:
    others = ("sdpa", "eager", "flex_attention", "flash_attention_9", None)
    assert all(needs_kernel(name) and is_flash(name) for name in (*FLASH, HUB))
    assert not any(needs_kernel(name) for name in others)
    assert needs_kernel("someone/attention@main")
    assert not is_flash("someone/attention")
    assert not is_flash(None)


def test_either_flash_attention_s_own_package_serves_or_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "is_kernels_available", lambda: False)
    monkeypatch.setattr(importlib.metadata, "version", {"flash-attn": "2.8"}.__getitem__)
    assert missing_package(FLASH[0]) is None
    assert "kernels" in (missing_package(HUB) or "")
    monkeypatch.undo()
    monkeypatch.setattr(attention, "is_kernels_available", lambda: True)
    assert missing_package(HUB) is None
    assert missing_package(FLASH[1]) is None


def test_a_model_that_takes_no_flash_attention_is_told_of() -> None:
    class Own(LlamaForCausalLM):
        _supports_flash_attn = False

    check_takes_kernel(make_model("llama"), FLASH[0])
    model = Own(make_config("llama"))
    check_takes_kernel(model, "someone/attention")
    with pytest.raises(ConfigError, match="Own does not take FlashAttention: leave it out"):
        check_takes_kernel(model, HUB)
