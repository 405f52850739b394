"""What all tests share: their tiers, tiny models on disk, one local Ray for the tests that ask for it, no network.

Imports what is heavy where it is used: a test of plain functions starts without torch.
"""

from __future__ import annotations

import functools
import gc
import os
import sys

# Before torch, transformers, rich or ray is imported, here or in a subprocess.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    OMP_NUM_THREADS="1",  # two test processes on two cores
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    TERM="xterm",  # rich takes a dumb terminal for 80 columns wide, whatever COLUMNS says
)
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
# A Ray Train group looks at its workers every two seconds, and gives one that hangs half a minute to end.
os.environ.update(RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2", TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S="3")
# Ray's workers inherit what a store asks for.
os.environ.update(AWS_ACCESS_KEY_ID="tests", AWS_SECRET_ACCESS_KEY="tests", AWS_EC2_METADATA_DISABLED="true")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

for _name in ("COLUMNS", "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "NO_COLOR", "CLICOLOR_FORCE"):
    os.environ.pop(_name, None)  # each changes what a command prints

# The machine's speed is no property of the code.
settings.register_profile("emloc", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("emloc")

TESTS = Path(__file__).parent
STARTS = {"ray_session": "ray", "s3_port": "server", "azure_port": "server", "browser": "browser"}
# What a machine may lack. On CI any other skip is a failure.
ALLOWED_SKIPS = (
    "no GPU here",
    "KUBERAY_CRDS names no folder",
    "may not mount a file system",
    "no mount namespace of one's own",
    "this file system keeps no attributes",
    "needs 7 GiB of free memory",
    "there is no azurite-blob here",
    "no C++ compiler here",
    "transformers has no Mistral Large 4",
    "no triton here",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks each test by what it starts; ``quick`` those of units and old runs that start nothing and are not slow. The shared
    Ray's come last."""
    for item in items:
        marks = {STARTS[name] for name in STARTS.keys() & set(item.fixturenames)}  # type: ignore[attr-defined]
        room = item.path.relative_to(TESTS).parts[0]
        marks |= {"ray"} if room in ("integration", "e2e") and not item.get_closest_marker("without_ray") else set()
        for mark in marks:
            item.add_marker(mark)
        busy = {mark.name for mark in item.iter_markers()} & {*STARTS.values(), "slow", "deep", "gpu"}
        if room in ("unit", "compat") and not busy:
            item.add_marker("quick")
        elif not busy <= {"server", "slow"}:
            item.add_marker(
                pytest.mark.filterwarnings("default", "ignore::DeprecationWarning", "ignore::FutureWarning")
            )
    # Tests that start a Ray of their own, or none, must not meet the shared one; some families are run on it.
    items.sort(key=lambda item: bool({"ray_session", "family_run"} & set(item.fixturenames)))  # type: ignore[attr-defined]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Registers the pretend device before anything is differentiated: autograd counts the devices there are once a process."""
    if any("device" in item.path.relative_to(TESTS).parts for item in session.items):
        from pretend_device import pretend_device

        pretend_device()


_frozen_modules = 0  # how many were imported when the collector was last told to leave them alone


@pytest.hookimpl(tryfirst=True)  # before a test may be skipped
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A Ray that an earlier test started and left ends before a test that has none.

    What was imported is no garbage: each opened model would look through it all, which takes longer than to open a tiny one.
    """
    global _frozen_modules
    if len(sys.modules) > 1.05 * _frozen_modules:
        gc.collect()
        gc.freeze()
        _frozen_modules = len(sys.modules)
    ray = sys.modules.get("ray")
    if ray is not None and item.get_closest_marker("ray") is None and ray.is_initialized():
        ray.shutdown()


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A test that starts Ray says so: by ``ray_session``, or by its mark."""
    ray = sys.modules.get("ray")
    if ray is not None and item.get_closest_marker("ray") is None and ray.is_initialized():
        ray.shutdown()
        pytest.fail("starts Ray, but is not marked 'ray'")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """On CI a skip fails, but for :data:`ALLOWED_SKIPS` and what the variable ``ALLOWED_SKIPS`` holds."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is None or not os.environ.get("CI"):
        return
    allowed = (*ALLOWED_SKIPS, *filter(None, os.environ.get("ALLOWED_SKIPS", "").split(",")))
    reasons = {str(report.longrepr[2]) for report in terminal.stats.get("skipped", []) if report.longrepr}
    unexpected = sorted(reason for reason in reasons if not any(words in reason for words in allowed))
    if unexpected:
        terminal.write_line(f"unexpected skips: {'; '.join(unexpected)}", red=True)
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_disks() -> Iterator[None]:
    """No machine is switched off while tests run, and to kill a process loses nothing of what it wrote."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """The tiny byte-level tokenizer, with pad, eos and a chat template; do not change it."""
    from tiny import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_model_dir(family="llama", dtype="float32", tied=False)``: a sharded checkpoint with its tokenizer.

    Made once a session for each choice: read it, copy it, but do not write to it.
    """
    from tiny import save_model

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
    from tiny import save_emulator

    return functools.cache(lambda family: save_emulator(tiny_model_dir(family), tmp_path_factory.mktemp("e") / family))


@pytest.fixture(scope="session")
def vlm_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``vlm_dir(family)``: a saved vision-language model with its processor; do not write to it."""
    from vlms import save_vlm

    return functools.cache(lambda family: save_vlm(family, tmp_path_factory.mktemp("vlm") / "model"))


@pytest.fixture(scope="session")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task as JSONL."""
    from small_runs import task_rows, write_jsonl

    return write_jsonl(tmp_path_factory.mktemp("task") / "rows.jsonl", task_rows())


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """The port of one S3 server for every test that asks for it."""
    from faulting.s3 import s3_server

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
        _system_config={  # here alone: other tests see nodes die, and workers that hold what earlier stages left
            "health_check_failure_threshold": 60,
            # Beside the processes of a training group Ray ends idle workers, and the next stage's import everything anew.
            "idle_worker_killing_time_threshold_ms": 600_000,
        },
    )
    yield
    ray.shutdown()
