"""Several Ray nodes on this machine, as processes of their own: one is taken away, one is added; one does not see the run."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from faulting.nodes import Nodes, kill, workers
from plain_stages import merge, train
from safetensors.torch import load_file
from small_runs import GROUP, make_values, run_values

from emloc_ray.config.reading import parse_config
from emloc_ray.io.formats.yaml_text import write_yaml
from emloc_ray.io.runs.directory import CARD
from emloc_ray.planning.prepared import prepare
from emloc_ray.stages.context import Context
from emloc_ray.stages.correct.correct import correct_adapter
from emloc_ray.stages.correct.stage import correction_job
from emloc_ray.stages.finetune.stage import finetune_job
from emloc_ray.stages.merge.stage import merge_job
from emloc_ray.stages.ray.spans import Span, listening

pytestmark = pytest.mark.deep

SECONDS = 240
BY_SLOTS, BY_RANKS = ("calibration", "emulator"), ("adapter_emulator", "merged")


def start(config: Path, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    code = "from emloc_ray.ui.cli import main; main()"
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-c", code, "run", str(config), *arguments], stdout=file, stderr=subprocess.STDOUT
        )


def write_config(root: Path, values: dict[str, Any]) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    path = root / "config.yaml"
    path.write_text(write_yaml(values))
    return path


def artifacts(run: Path) -> dict[str, bytes]:
    files = [path for name in BY_SLOTS for path in (run / name).rglob("*") if path.is_file() and path.name != CARD]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def tensors(run: Path) -> dict[str, torch.Tensor]:
    files = [path for name in BY_RANKS for path in (run / name).glob("*.safetensors")]
    return {f"{path.parent.name}: {name}": tensor for path in files for name, tensor in load_file(path).items()}


def test_a_node_that_goes_and_one_that_comes_leave_no_trace(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], task_file: Path
) -> None:
    finetune = {**GROUP, "max_steps": 4, "save_steps": 2}
    values = make_values(tmp_path / "many" / "run", tiny_model_dir("llama"), task_file, finetune=finetune)
    log = tmp_path / "log.txt"
    with Nodes(cpus=1) as nodes:
        values["ray"] = {"address": nodes.cluster.address}
        driver = start(write_config(tmp_path / "many", values), log, "--until", "merge")
        try:
            address = nodes.kill_node(node_of_a_slot(nodes, driver, log))
            nodes.add()
            assert driver.wait(SECONDS) == 0, log.read_text()
        finally:
            driver.kill()
        alive = {node["NodeManagerAddress"] for node in nodes.alive()}
    assert len(alive) == 3
    assert address not in alive
    assert re.search("calibrate: slot [01].* lost its worker because .*; restarted", log.read_text())

    # On one node, whose two slots add in the same order; from there in this process, by one rank, whose sums are in another.
    values |= {"run_dir": str(tmp_path / "one" / "run"), "ray": {"num_cpus": 2}}
    values["finetune"] |= {"num_workers": 1, "per_device_train_batch_size": 8}
    driver = start(write_config(tmp_path / "one", values), log, "--until", "factorize")
    try:
        assert driver.wait(SECONDS) == 0, log.read_text()
    finally:
        driver.kill()
    many, one = tmp_path / "many" / "run", tmp_path / "one" / "run"
    found, expected = artifacts(many), artifacts(one)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    context = Context(prepare(parse_config(values)), tiny_model_dir("llama"))
    train(finetune_job(context, "training"))
    correct_adapter(correction_job(context))
    merge(merge_job(context))
    ours, theirs = tensors(many), tensors(one)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def node_of_a_slot(nodes: Nodes, driver: subprocess.Popen[bytes], log: Path) -> Any:
    """A node other than the head, once a slot of the calibration is on it."""
    deadline = time.monotonic() + SECONDS
    while True:
        assert driver.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        for node in nodes.cluster.worker_nodes:
            if any("slot" in name for _, name in workers(node)):
                return node
        time.sleep(0.05)


def test_slots_are_summed_where_they_are_and_not_where_the_driver_is(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], task_file: Path
) -> None:
    values = make_values(tmp_path / "run", tiny_model_dir("llama"), task_file, model={"hold": "block_by_block"})
    with Nodes(cpus=1, head_cpus=0) as nodes:
        values["ray"] = {"address": nodes.cluster.address}
        pids: dict[str, int] = {}

        def hear(span: Span) -> None:
            if span.unit.startswith("the sum of block"):
                pids[span.unit] = int(span.worker.split()[1])

        try:
            with listening(hear), addresses_of_workers(nodes) as addresses:
                run_values(values, until="calibrate")
        finally:
            ray.shutdown()
        slots = {node.node_ip_address for node in nodes.cluster.worker_nodes}
    assert len(pids) == 2
    assert {addresses[pid] for pid in pids.values()} <= slots


@contextlib.contextmanager
def addresses_of_workers(nodes: Nodes) -> Iterator[dict[int, str]]:
    """The address of each worker's node by its process, also of workers that have ended since: Ray ends idle ones."""
    addresses: dict[int, str] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            for node in nodes.all():
                addresses.update((process.pid, node.node_ip_address) for process, _ in workers(node))

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield addresses
    finally:
        over.set()
        looking.join()


def test_a_node_that_does_not_see_the_run_ends_it_at_once(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], task_file: Path
) -> None:
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode != 0:
        pytest.skip("no mount namespace of one's own is allowed here")
    hidden = tmp_path / "hidden"
    values = make_values(hidden / "run", tiny_model_dir("llama"), task_file)
    with Nodes(cpus=1, count=0) as nodes, blind_node(nodes.cluster.address, hidden):
        deadline = time.monotonic() + SECONDS
        while len(nodes.alive()) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        values["ray"] = {"address": nodes.cluster.address}
        driver = start(write_config(tmp_path, values), tmp_path / "log.txt")
        try:
            assert driver.wait(SECONDS) == 2
        finally:
            driver.kill()
    told = (tmp_path / "log.txt").read_text()
    assert f"run_dir: node 127.0.0.9 does not see {hidden / 'run'} as it is here: name a directory on a file" in told
    assert "s3://BUCKET/RUN" in told
    assert "Making token shards" not in told
    assert sorted(path.name for path in (hidden / "run").iterdir()) == [
        ".lock",
        "config.yaml",
        "log.jsonl",
        "manifest.json",
    ]


@contextlib.contextmanager
def blind_node(address: str, directory: Path) -> Iterator[None]:
    """A Ray node to which the directory is another, empty one, as on a machine that does not mount it."""
    directory.mkdir()
    join = f"{sys.executable} -m ray.scripts.scripts start --address={address} --node-ip-address=127.0.0.9 --num-cpus=1"
    command = ["unshare", "-m", "sh", "-c", f"mount -t tmpfs tmpfs {directory} && exec {join} --block"]
    node = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            kill([psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)])
        node.wait(30)
