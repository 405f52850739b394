"""Keys passed on to transformers and Ray: unknown ones beside other errors, and secrets. PEFT's: test_adapter_keys.py."""

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
