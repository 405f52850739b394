"""Keys passed on to transformers and Ray: unknown ones, those that would harm, secrets. PEFT's: test_adapter_keys.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_schema import config, error_of

from emloc_ray.config.reading import load_config
from emloc_ray.errors import ConfigError
from emloc_ray.io.runs.directory import CONFIG, RunDirectory


def test_unknown_keys_are_told_beside_a_bad_value_of_their_section() -> None:
    text = error_of(finetune={"learning_rate": -1, "weight_decai": 1}, ray={"address": 3, "num_cpu": 1})
    for key in ("finetune.learning_rate", "finetune.weight_decai", "ray.address", "ray.num_cpu"):
        assert sum(line.startswith(f"the config: {key} ") for line in text.splitlines()) == 1


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"push_to_hub": True}, "finetune.push_to_hub would push the adapter as trained on the emulator"),
        ({"hub_model_id": "me/mine"}, "finetune.hub_model_id would push"),
        ({"dataloader_num_workers": 4}, "finetune.dataloader_num_workers is not read"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant: true gives no gradients"),
        ({"gradient_checkpointing_kwargs": {"early": True}}, "kwargs.early is not a key: the nearest is early_stop"),
        ({"activation_checkpointing": True}, "newer name of finetune.gradient_checkpointing: write that"),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}},
            "gradient_accumulation_steps says",
        ),
        ({"log_level": "warn"}, "finetune.log_level is 'warn': the nearest is warning."),
        ({"log_level_replica": "INFO"}, "finetune.log_level_replica is 'INFO': give one of detail, debug, info"),
        ({"save_strategy": "best"}, "finetune.load_best_model_at_end for the adapter"),
        ({"save_strategy": "epoch"}, "save_strategy: epoch would come once, after the last step"),
        ({"logging_strategy": "epoch"}, "leave it out, and set finetune.logging_steps."),
        ({"neftune_noise_alpha": -1.0}, "finetune.neftune_noise_alpha is -1.0"),
        ({"per_device_eval_batch_size": 0}, "finetune.per_device_eval_batch_size is 0"),
        ({"adam_epsilon": 0.0}, "finetune.adam_epsilon is 0.0"),
        ({"bf16_full_eval": True}, "finetune.bf16_full_eval is not read: scores while training are the loss alone"),
        ({"save_only_model": True}, "finetune.save_only_model would save no optimizer"),
        (
            {"label_smoothing_factor": 0.1},
            "finetune.label_smoothing_factor is not supported, as the loss is the labels'",
        ),
        ({"do_train": True}, "finetune.do_train is set by emloc_ray itself"),
        ({"ddp_backend": "gloo"}, "finetune.ddp_backend is set by emloc_ray itself"),
        ({"eval_on_start": True}, "eval_on_start needs validation losses"),
        ({"num_workers": 2, "gpus_per_worker": 0.5}, "NCCL takes no two workers on one GPU"),
        ({"bf16": "yes"}, "finetune.bf16 is 'yes'"),
    ],
)
def test_what_would_be_ignored_or_harm_is_refused(keys: dict[str, Any], words: str) -> None:
    assert words in error_of(finetune=keys)


def test_an_argument_of_ray_init_is_of_its_type() -> None:
    assert "ray.object_store_memory is '10GiB': input should be a valid integer" in error_of(
        ray={"object_store_memory": "10GiB"}
    )


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"finetune": {"hub_token": "hush"}}, "finetune.hub_token"),
        ({"finetune": {"lr_scheduler_kwargs": {"api_key": "hush"}}}, "finetune.lr_scheduler_kwargs.api_key"),
        ({"ray": {"_redis_password": "hush"}}, "ray._redis_password"),
        ({"ray": {"runtime_env": {"pip": ["git+https://hush@github.com/a/b.git"]}}}, "ray.runtime_env.pip"),
        ({"ray": {"runtime_env": {"config": [{"CLIENT-SECRET": "hush"}]}}}, "ray.runtime_env.config.CLIENT-SECRET"),
        ({"ray": {"runtime_env": {"password": 20240131}}}, "ray.runtime_env.password"),
        ({"ray": {"runtime_env": {"working_dir": "https://a.net/b.zip?sv=1&sig=hush"}}}, "ray.runtime_env.working_dir"),
    ],
)
def test_a_secret_is_refused_and_not_repeated(sections: dict[str, Any], key: str) -> None:
    text = error_of(**sections)
    assert f"{key} is a secret, and a run writes its config to a file: remove it" in text
    assert "hush" not in text
    assert "20240131" not in text


def test_environment_variables_are_taken_unless_hidden(tmp_path: Path) -> None:
    runtime_env = {"env_vars": {"WANDB_API_KEY": "hush"}}
    made = config(
        finetune={"lr_scheduler_kwargs": {"api_key": None}},
        ray={"runtime_env": runtime_env, "resources": {"api_key": 1}},
    )
    assert made.ray.init_options["runtime_env"] == runtime_env
    run = RunDirectory(tmp_path / "mine")
    run.create(made.model_dump(mode="json"))
    assert not [file for file in run.root.iterdir() if "hush" in file.read_text()]
    with pytest.raises(ConfigError, match=r"env_vars\.WANDB_API_KEY was hidden when this config was written"):
        load_config(run.path(CONFIG))
    again = load_config(run.path(CONFIG), ["ray.runtime_env.env_vars.WANDB_API_KEY=hush"])
    assert again == made
