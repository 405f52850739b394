"""The connection to Ray, as far as it can be told without one."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Any

import pytest
from ray._private import auto_init_hook
from ray.exceptions import AuthenticationError

from emloc_ray.config.reading import parse_config
from emloc_ray.config.schema import RayConfig
from emloc_ray.errors import ConfigError, StageError
from emloc_ray.stages.ray import nodes, session
from emloc_ray.stages.ray.session import connection

NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@pytest.mark.parametrize("kind", [AuthenticationError, ConnectionError, Exception])
def test_a_cluster_that_lets_nobody_in_is_a_sentence(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise kind("no authentication token was found")

    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "init", refuse)
    with (
        pytest.raises(StageError, match=r"could not be started or reached \(no authentication token was found"),
        connection("10.0.0.1:6379"),
    ):
        pass


@pytest.mark.parametrize(("address", "advice"), [(None, "the machine may be busy"), ("10.0.0.1:6379", "check the ray")])
def test_a_machine_that_is_too_busy_for_ray_is_told(
    address: str | None, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(**options: Any) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "init", wait)
    with pytest.raises(StageError, match=rf"timed out during startup\): {advice}"), connection(address):
        pass


@pytest.mark.parametrize(
    ("given", "variable", "address"),
    [(None, "", "local"), (None, "10.0.0.1:6379", None), ("auto", "", "auto"), ("auto", "10.0.0.1:6379", "auto")],
)
def test_a_ray_that_somebody_else_started_here_is_not_joined_unasked(
    given: str | None, variable: str, address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an address ``ray.init`` takes the newest that it finds on the machine."""
    asked: list[str | None] = []
    monkeypatch.setenv("RAY_ADDRESS", variable)
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "init", lambda address, **options: asked.append(address))
    monkeypatch.setattr(session, "tell_workers", lambda: None)
    monkeypatch.setattr(session.ray, "shutdown", lambda: None)
    with connection(given) as started:
        assert started == (address == "local")
    assert asked == [address]


def test_a_thread_that_is_left_starts_no_other_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr(auto_init_hook, "enable_auto_connect", True)
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "init", lambda address=None, **options: asked.append(address))
    monkeypatch.setattr(session, "tell_workers", lambda: None)
    monkeypatch.setattr(session.ray, "shutdown", lambda: None)
    with pytest.raises(KeyboardInterrupt), connection():
        raise KeyboardInterrupt
    auto_init_hook.auto_init_ray()  # which ray.wait, get, cancel and kill do first
    assert asked == ["local"]


@pytest.mark.parametrize("connected", [False, True])
def test_a_run_leaves_ray_as_it_came_upon_it(connected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And takes back what an interrupt before it left."""
    logger = logging.getLogger("ray.train")
    with monkeypatch.context() as patch:
        patch.setattr(logger, "level", logging.INFO)
        patch.setattr(auto_init_hook, "enable_auto_connect", True)
        patch.setattr(session.ray, "is_initialized", lambda: False)
        patch.setattr(session.ray, "init", lambda address=None, **options: None)
        patch.setattr(session, "tell_workers", lambda: None)
        patch.setattr(session.ray, "shutdown", lambda: None)
        with contextlib.suppress(KeyboardInterrupt), connection():
            raise KeyboardInterrupt
        assert not auto_init_hook.enable_auto_connect
        patch.setattr(session.ray, "is_initialized", lambda: connected)
        with connection():
            assert logger.level == (logging.INFO if connected else logging.CRITICAL)
        assert logger.level == logging.INFO
        assert auto_init_hook.enable_auto_connect


def test_keys_that_a_connection_from_before_leaves_unread_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(session.ray, "is_initialized", lambda: True)
        patch.setattr(session, "tell_workers", lambda: None)
        for given in (RayConfig(), RayConfig(num_cpus=4), RayConfig(address="ray://prod:10001", num_cpus=4)):
            with connection(given.address, note=notes.append, **given.init_options) as started:
                assert not started
    first, second = notes
    assert "leaves ray.num_cpus unread: call ray.shutdown() before the run" in first
    assert "leaves ray.address unread" in second


@pytest.fixture
def pretended_ray(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of Ray, which is there from ``init`` to ``shutdown``."""
    asked: list[str] = []
    monkeypatch.setattr(session.ray, "is_initialized", lambda: asked[-1:] == ["init"])
    monkeypatch.setattr(session.ray, "init", lambda **options: asked.append("init"))
    monkeypatch.setattr(session.ray, "shutdown", lambda: asked.append("shutdown"))
    monkeypatch.setattr(session, "tell_workers", lambda: None)
    monkeypatch.setattr(auto_init_hook, "enable_auto_connect", True)
    return asked


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_of_two_runs_in_two_threads_the_last_shuts_ray_down(
    pretended_ray: list[str], error: type[BaseException] | None
) -> None:
    notes: list[str] = []
    begun, over = threading.Event(), threading.Event()

    def run_beside() -> None:
        with connection(note=notes.append, num_cpus=3) as started:
            assert not started
            begun.set()
            over.wait(60)

    beside = threading.Thread(target=run_beside)
    with contextlib.suppress(ValueError, KeyboardInterrupt), connection() as started:
        assert started
        beside.start()
        assert begun.wait(60)
        if error is not None:
            raise error
    assert pretended_ray == ["init"]
    assert auto_init_hook.enable_auto_connect  # Ray is there
    over.set()
    beside.join()
    assert pretended_ray == ["init", "shutdown"]
    assert notes == [
        "This process has connected to Ray already, which leaves ray.num_cpus unread: start this run once no other runs."
    ]


def test_two_runs_that_begin_at_once_start_one_ray(pretended_ray: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)

    def init_slowly(**options: Any) -> None:
        time.sleep(0.2)
        pretended_ray.append("init")

    def begin() -> None:
        both.wait(60)
        with connection():
            both.wait(60)

    monkeypatch.setattr(session.ray, "init", init_slowly)
    threads = [threading.Thread(target=begin) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pretended_ray == ["init", "shutdown"]


def test_a_ray_of_the_caller_s_outlives_all_runs(pretended_ray: list[str]) -> None:
    pretended_ray.append("init")
    with connection() as first, connection() as second:
        assert (first, second) == (False, False)
    assert pretended_ray == ["init"]
    pretended_ray.clear()


def test_a_ray_that_refuses_is_asked_anew(pretended_ray: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(session.ray, "init", lambda **options: 1 / 0)
        with pytest.raises(StageError), connection():
            pass
    with connection() as started:
        assert started
    assert pretended_ray == ["init", "shutdown"]


def variables_of_workers(monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, str]:
    """What ``ray.init`` is asked to set for every worker."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session.ray, "init", lambda address, **settings: asked.append(settings))
    monkeypatch.setattr(session, "tell_workers", lambda: None)
    monkeypatch.setattr(session.ray, "shutdown", lambda: None)
    with connection(**options):
        pass
    return asked[0]["runtime_env"]["env_vars"]


def test_workers_allocators_grow_their_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set as they start: Ray Train uses a worker's GPU before it runs anything of ours.
    for each in NAMES:
        monkeypatch.delenv(each, raising=False)
    variables = variables_of_workers(monkeypatch, runtime_env={"env_vars": {"DEBUG": "on"}})
    assert [variables.get(each) for each in NAMES] == [None, "expandable_segments:True"]
    assert variables["DEBUG"] == "on"


@pytest.mark.parametrize("name", NAMES)
def test_what_a_user_asks_of_the_allocator_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in NAMES:
        monkeypatch.delenv(each, raising=False)
    own = {name: "max_split_size_mb:64"}
    variables = variables_of_workers(monkeypatch, runtime_env={"env_vars": own})
    assert {key: value for key, value in variables.items() if key in NAMES} == own
    monkeypatch.setenv(name, own[name])
    assert not variables_of_workers(monkeypatch).keys() & set(NAMES)  # a Ray that is started here has them itself
    assert variables_of_workers(monkeypatch, address="10.0.0.1:6379").keys() & set(NAMES)


@pytest.mark.parametrize(
    ("there", "grown", "gpus"), [(2.0, None, 2), (0.0, {"GPU": 8, "CPU": 64}, 8), (4.0, {"CPU": 64}, 4), (0.0, {}, 0)]
)
def test_gpus_are_those_that_are_there_or_that_an_autoscaler_may_add(
    there: float, grown: dict[str, int] | None, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session.ray, "cluster_resources", lambda: {"GPU": there})
    monkeypatch.setattr(nodes.state, "get_max_resources_from_cluster_config", lambda: grown)
    monkeypatch.setattr(nodes.state, "get_cluster_config", lambda: None)
    assert session.gpus_within_reach() == gpus


def test_nodes_say_how_much_the_smallest_gpu_holds(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A joined cluster's, whose head may have none."""
    assert session.smallest_gpu_bytes() is None
    with_gpus = [{**node, "Resources": {**node["Resources"], "GPU": 1.0}} for node in session.ray.nodes()]
    monkeypatch.setattr(session.ray, "nodes", lambda: with_gpus)
    monkeypatch.setattr("emloc_ray.planning.machine.gpu_bytes", lambda: float("inf"))
    assert session.smallest_gpu_bytes() is None  # no nvidia-smi there
    monkeypatch.setattr("emloc_ray.planning.machine.gpu_bytes", lambda: 24 * 2.0**30)
    assert session.smallest_gpu_bytes() == 24 * 2**30


def test_a_node_that_lacks_a_package_is_named(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A joined cluster's, whose driver's machine may have it."""
    values = {"run_dir": "x", "model": {"source": "x"}, "data": {"train": {"path": "x"}}}
    config = parse_config({**values, "finetune": {"use_liger_kernel": True}})
    session.check_nodes([parse_config(values)])
    with pytest.raises(ConfigError, match=r"^node [\d.]+: finetune\.use_liger_kernel needs the liger_kernel package"):
        session.check_nodes([config, config])
