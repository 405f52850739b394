"""The adapter section: a method's keys are PEFT's, with its types and sensible bounds; what does not go with it is told."""

from __future__ import annotations

from typing import Any

import pytest
from test_schema import config, error_of

from emloc_ray.config.reading import parse_config, unknown_key


@pytest.mark.parametrize(
    ("adapter", "settings"),
    [
        ({}, {"r": 8, "lora_alpha": 16, "use_rslora": False, "use_dora": False}),
        ({"method": "rslora", "r": 4}, {"r": 4, "use_rslora": True, "use_dora": False}),
        ({"method": "dora"}, {"use_dora": True, "use_rslora": False}),
        ({"init_lora_weights": "orthogonal"}, {"init_lora_weights": "orthogonal"}),
        ({"method": "loha", "alpha": 4}, {"alpha": 4}),
        ({"method": "lokr", "r": 3, "rank_pattern": {"q": 2}}, {"r": 3, "rank_pattern": {"q": 2}}),
        ({"method": "ia3", "exclude_modules": ["q"]}, {}),
        ({"method": "prompt_tuning", "num_virtual_tokens": 4}, {"num_virtual_tokens": 4}),
    ],
)
def test_a_method_s_settings_are_what_was_set(adapter: dict[str, Any], settings: dict[str, Any]) -> None:
    made = config(adapter=adapter)
    found = made.adapter.settings
    assert {key: found[key] for key in settings} == settings
    assert made.adapter.is_lora or found == settings
    assert parse_config(made.model_dump(mode="json")) == made  # as a run writes it down
    assert parse_config(made.model_dump(mode="json")).adapter.settings == found


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"method": "houlsby"}, "'lora', 'rslora', 'dora', 'loha'"),
        ({"method": "loha", "lora_alpha": 4}, "the nearest is alpha, for adapter.method loha, and lora_alpha is LoRA's"),
        ({"method": "loha", "alfa": 4}, "adapter.alfa is not a key: the nearest is alpha"),
        ({"method": "loha", "alpha": "much"}, "adapter.alpha is 'much': input should be a valid integer"),
        ({"method": "ia3", "r": 4}, "adapter.r is not a key"),
        ({"method": "prompt_tuning"}, "adapter.num_virtual_tokens is missing"),
        ({"method": "prefix_tuning", "num_virtual_tokens": 2, "target_modules": ["q"]}, "adapter.target_modules is not a key"),
        ({"method": "prefix_tuning", "num_virtual_tokens": 2, "prefix_projection": True}, "no training could continue"),
        ({"method": "prompt_tuning", "num_virtual_tokens": 2, "token_dim": 8}, "set by emloc_ray itself"),
        ({"method": "prompt_tuning", "num_virtual_tokens": 2, "prompt_tuning_init": "no"}, "'TEXT', 'SAMPLE_VOCAB' or"),
        ({"method": "vera", "peft_type": "LORA"}, "adapter.peft_type is not to be set"),
        ({"method": "dora", "use_dora": False}, "adapter.use_dora is not to be set"),
        ({"task_type": "SEQ_CLS"}, "adapter.task_type is not to be set"),
        ({"alpha": 4}, "adapter.alpha is not a key: the nearest is lora_alpha"),
        ({"use_dora": True}, "adapter.use_dora is not to be set (adapter.method dora does that)"),
        ({"bias": "all"}, "adapter.bias is not to be set (biases are the original's own)"),
        ({"method": "dora", "modules_to_save": ["lm_head"]}, "it trains weights of the emulator"),
        ({"layers_to_transform": [0]}, "name the layers in adapter.target_modules"),
        ({"target_parameters": ["experts.down_proj"]}, "name experts' linears in adapter.target_modules"),
        ({"fan_in_fan_out": True}, "set by emloc_ray itself"),
        ({"init_lora_weights": "pissa"}, "'pissa' is not supported, as it changes the base's weights"),
        ({"init_lora_weights": "eva"}, "'eva' is not supported, as it reads the base's weights or inputs"),
        ({"init_lora_weights": "orthogonal", "rank_pattern": {"q": 3}}, "orthogonal pairs ranks, and 3 is odd"),
        ({"method": ["lora"]}, "adapter.method is ['lora']"),
        ({"method": "loha", "alpha": 0}, "adapter.alpha is 0: input should be greater than 0"),
        ({"method": "loha", "rank_dropout": 1.0}, "adapter.rank_dropout is 1.0: input should be less than 1"),
        ({"method": "lokr", "module_dropout": -0.1}, "adapter.module_dropout is -0.1"),
        ({"method": "lokr", "rank_dropout_scale": "yes"}, "adapter.rank_dropout_scale is the text 'yes'"),
        ({"method": "vera", "d_initial": 0.0}, "adapter.d_initial is 0.0"),
        ({"method": "vera", "vera_dropout": float("nan")}, "adapter.vera_dropout is nan"),
        ({"method": "vera", "projection_prng_key": 2**64}, "adapter.projection_prng_key is"),
        ({"method": "prefix_tuning", "num_virtual_tokens": 0}, "adapter.num_virtual_tokens is 0"),
        ({"method": "prefix_tuning", "num_virtual_tokens": "5"}, "adapter.num_virtual_tokens is '5'"),
        ({"method": "prompt_tuning", "num_virtual_tokens": 2, "prompt_tuning_init": "TEXT"}, "init_text is missing"),
        ({"method": "prompt_tuning", "num_virtual_tokens": 2, "prompt_tuning_init_text": "a"}, "init_text is not read"),
    ],
)  # fmt: skip
def test_keys_and_values_that_are_not_the_method_s(adapter: dict[str, Any], said: str) -> None:
    found = error_of(adapter=adapter)
    assert said in found
    assert "\n" not in found or adapter == {"method": "prompt_tuning"}


def test_peft_s_keys_that_say_what_holds_are_taken() -> None:
    """As in its examples, and in the configs that it saves."""
    said = {"bias": "none", "task_type": "CAUSAL_LM", "modules_to_save": None, "use_dora": False, "peft_type": "LORA"}
    others: dict[str, Any] = {
        "fan_in_fan_out": False,
        "layers_to_transform": None,
        "inference_mode": False,
        "loftq_config": {},
    }
    assert config(adapter={"r": 4, **said, **others}) == config(adapter={"r": 4})
    assert config(adapter={"method": "dora", "use_dora": True}) == config(adapter={"method": "dora"})
    loha = {"method": "loha", "alpha": 8}  # its own are kept, whatever PEFT's default
    assert config(adapter={**loha, "peft_type": "LOHA", "task_type": "SEQ_2_SEQ_LM"}) == config(adapter=loha)


def test_a_prompt_s_beginning_is_peft_s_own() -> None:
    begun = {"method": "prompt_tuning", "num_virtual_tokens": 2, "prompt_tuning_init": "TEXT"}
    assert (
        config(adapter={**begun, "prompt_tuning_init_text": "say it"}).adapter.settings["prompt_tuning_init"] == "TEXT"
    )
    assert config(adapter={**begun, "prompt_tuning_init": "SAMPLE_VOCAB"}).adapter.is_prompt


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ([], "adapter.target_modules is empty: give at least 1 item."),
        (3, "adapter.target_modules is 3: input should be a valid string or a valid list."),
        ([3], "adapter.target_modules.0 is 3: input should be a valid string."),
    ],
)
def test_a_key_of_several_types_is_told_once(targets: Any, said: str) -> None:
    assert error_of(adapter={"target_modules": targets}) == f"the config: {said}"


def test_a_prefix_turns_gradient_checkpointing_off() -> None:
    adapter = {"method": "prefix_tuning", "num_virtual_tokens": 2}
    assert config(adapter=adapter).finetune.gradient_checkpointing is False
    assert config(adapter={**adapter, "method": "prompt_tuning"}).finetune.gradient_checkpointing is True
    assert "holds prefix_tuning's prefix" in error_of(adapter=adapter, finetune={"gradient_checkpointing": True})


def test_what_does_not_go_with_a_method() -> None:
    said = error_of(adapter={"method": "ia3"}, finetune={"deepspeed": "zero.json"}, correction={"method": "projection"})
    assert "lora or rslora, not with ia3" in said
    assert "projection corrects updates of weights" in said
    assert config(adapter={"method": "rslora"}, finetune={"deepspeed": "zero.json"}).finetune.deepspeed
    assert config(adapter={"method": "dora"}, correction={"method": "projection"})


def test_keys_of_any_method_may_head_a_table_of_tasks() -> None:
    assert unknown_key("adapter.num_virtual_tokens") is None
    assert unknown_key("adapter.method") is None
    assert "adapter.numm" in (unknown_key("adapter.numm") or "")
