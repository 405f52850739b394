"""PEFT's configs of the methods: which fields may be given, which linears IA³ scales, how many parameters are trained."""

from __future__ import annotations

from typing import Any

import pytest
from adapter_cases import CASES, settings
from peft import get_peft_model
from tiny import make_config, make_model

from emloc_ray.config.adapter import AdapterConfig
from emloc_ray.errors import ConfigError
from emloc_ray.modeling.adapter_methods import (
    CONFIGS,
    adapter_config,
    count_parameters,
    default_targets,
    feedforward_names,
    method_fields,
    refused_field,
)
from emloc_ray.modeling.architecture import block_linears, empty_model


def names(family: str = "llama") -> list[str]:
    return [spec.name for spec in block_linears(empty_model(make_config(family)))]


def test_every_method_of_the_config_is_one_here() -> None:
    methods = AdapterConfig.model_fields["method"].annotation.__args__
    assert set(methods) == {"lora", "rslora", "dora", *CONFIGS}


@pytest.mark.parametrize("case", CASES)
def test_the_config_is_peft_s_with_what_was_given(case: str) -> None:
    options = settings(case, "llama", names())
    config = adapter_config(**options)
    method, own = CASES[case]
    assert type(config).__name__ == CONFIGS.get(method, "LoraConfig")
    assert all(getattr(config, key) == value for key, value in own.items())
    assert config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] in CONFIGS])
def test_parameters_are_counted_without_weights(case: str) -> None:
    options = settings(case, "llama", names())
    expected, _ = get_peft_model(make_model("llama"), adapter_config(**options)).get_nb_trainable_parameters()
    assert count_parameters(empty_model(make_config("llama")), options.pop("method"), options) == expected > 0


def test_a_prompt_of_a_text_is_counted_as_any() -> None:
    options: dict[str, Any] = {"num_virtual_tokens": 3, "prompt_tuning_init": "TEXT"}
    model = empty_model(make_config("llama"))
    assert count_parameters(model, "prompt_tuning", {**options, "prompt_tuning_init_text": "say it"}) == 3 * 64
    with pytest.raises(ConfigError, match="prompt_tuning_init_text can't be None"):
        count_parameters(model, "prompt_tuning", options)


@pytest.mark.parametrize(
    ("family", "method", "options", "named"),
    [
        ("gpt2", "loha", {}, "Conv1D"),
        ("gpt2", "lokr", {}, "Conv1D"),
        ("llama", "loha", {"r": 0}, "`r` should be a positive integer"),
        ("llama", "ia3", {"feedforward_modules": ["nothing"]}, "subset of `target_modules`"),
    ],
)
def test_what_does_not_fit_the_model_is_a_sentence(
    family: str, method: str, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        count_parameters(empty_model(make_config(family)), method, {"target_modules": names(family), **options})
    assert named in str(caught.value)
    assert method in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ia3_s_defaults_are_peft_s_own() -> None:
    assert default_targets("ia3", "llama", names("llama")) == ["k_proj", "v_proj", "down_proj"]
    assert default_targets("ia3", "mixtral", names("mixtral")) == ["k_proj", "v_proj"]  # w2 is fused with its likes
    assert default_targets("loha", "llama", names("llama")) is None
    adapted = ["layers.0.k_proj", "layers.0.down_proj"]
    assert feedforward_names(None, "llama", adapted) == ["layers.0.down_proj"]
    assert feedforward_names(["k_proj"], "unheard-of", adapted) == ["layers.0.k_proj"]
    assert feedforward_names([], "unheard-of", adapted) == []
    for wanted, call in (
        ("adapter.target_modules", lambda: default_targets("ia3", "unheard-of", adapted)),
        ("adapter.feedforward_modules", lambda: feedforward_names(None, "unheard-of", adapted)),
        ("adapter.feedforward_modules: 'o_proj' matches none", lambda: feedforward_names(["o_proj"], "llama", adapted)),
    ):
        with pytest.raises(ConfigError, match=wanted):
            call()


def test_fields_that_follow_from_model_and_run_are_not_for_the_config() -> None:
    for method in CONFIGS:
        taken = method_fields(method)
        for key in ("task_type", "peft_type", "base_model_name_or_path", "inference_mode", "modules_to_save"):
            assert key not in taken
            assert refused_field(method, key) or key == "modules_to_save"
    assert "alpha" in method_fields("loha")
    assert refused_field("loha", "alpha") is None
    assert refused_field("loha", "no_such_key") is None
