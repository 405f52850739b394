"""What Ray is asked for, where it is started here and where it runs already."""

from __future__ import annotations

import pytest

from emloc_ray.stages.cluster import _init_settings

OPTIONS = {"num_cpus": 4, "object_store_memory": 10**8, "runtime_env": {"env_vars": {"A": "1"}}}


def test_a_new_ray_gets_what_the_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for address in (None, "local"):
        settings = _init_settings(address, False, OPTIONS)
        assert settings["num_cpus"] == 4
        assert settings["include_dashboard"] is False


def test_a_running_ray_is_joined_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    joined = _init_settings("auto", True, OPTIONS)
    assert set(joined) == {"log_to_driver", "logging_level", "runtime_env"}
    assert joined["runtime_env"]["env_vars"].keys() == {"A", "MALLOC_MMAP_THRESHOLD_"}
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")  # as Ray sets it for a job
    assert _init_settings(None, True, OPTIONS) == joined
    assert "num_cpus" in _init_settings("local", True, OPTIONS)
