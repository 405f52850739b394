"""Fixtures for all tests: tiny models on disk, one local Ray for the tests that ask for it, no network."""

from __future__ import annotations

import functools
import os

# Before transformers or ray is imported, here or in a subprocess.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# A machine that stands still for a minute is no dead one: Ray's processes would end one another, and with them, without a
# word, their driver, which is the process of all tests. By variables, for most is read before a session's own settings come.
os.environ.update(
    RAY_gcs_rpc_server_reconnect_timeout_s="600",
    RAY_health_check_timeout_ms="60000",
    RAY_agent_register_timeout_ms="300000",
    RAY_raylet_client_num_connect_attempts="60",
    RAY_worker_register_timeout_seconds="300",
    RAY_grpc_keepalive_timeout_ms="120000",
)
# Ray's workers inherit what a store asks for.
os.environ.update(AWS_ACCESS_KEY_ID="tests", AWS_SECRET_ACCESS_KEY="tests", AWS_EC2_METADATA_DISABLED="true")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from s3_server import s3_server
from small_runs import task_rows, write_jsonl
from tiny import make_tokenizer, save_emulator, save_model
from transformers.utils import logging as transformers_logging
from vlms import save_vlm

transformers_logging.disable_progress_bar()
torch.set_num_threads(2)

# The machine's speed is no property of the code.
settings.register_profile("emloc", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("emloc")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tiny byte-level tokenizer, with pad, eos and a chat template; do not change it."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model_dir(family="llama", dtype="float32", tied=False)``: a sharded checkpoint with its tokenizer.

    Made once a session for each choice: read it, copy it, but do not write to it.
    """
    made: dict[Any, Path] = {}

    def get(family: str = "llama", **options: Any) -> Path:
        key = (family, tuple(sorted(options.items())))
        if key not in made:
            made[key] = save_model(tmp_path_factory.mktemp("tiny") / family, family, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def emulator_dir(
    tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """``emulator_dir(family)``: an emulator of that tiny model; do not write to it."""
    return functools.cache(lambda family: save_emulator(tiny_model_dir(family), tmp_path_factory.mktemp("e") / family))


@pytest.fixture(scope="session")
def vlm_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``vlm_dir(family)``: a saved vision-language model with its processor; do not write to it."""
    return functools.cache(lambda family: save_vlm(family, tmp_path_factory.mktemp("vlm") / "model"))


@pytest.fixture(scope="session")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task as JSONL."""
    return write_jsonl(tmp_path_factory.mktemp("task") / "rows.jsonl", task_rows())


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """The port of one S3 server for every test that asks for it."""
    with s3_server() as port:
        yield port


@pytest.fixture
def node_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this node's own."""
    monkeypatch.setenv("EMLOC_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray of two CPUs for every test that asks for it."""
    import ray

    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.1",
        _system_config={"health_check_failure_threshold": 60},  # here alone: other tests see nodes die
    )
    yield
    ray.shutdown()
