"""The scripts of cluster/ on hosts that are addresses of this machine, by stand-ins for ssh and Slurm."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_runs import make_values

from emloc_ray.io.available_memory import memory_bytes
from emloc_ray.io.formats.yaml_text import write_yaml
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.runs.log import read_events

pytestmark = pytest.mark.deep

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SECONDS = 480
HEAD, WORKER = "127.0.0.2", "127.0.0.3"

# Each host has a home and a local disk of its own.
_SSH = """#!/usr/bin/env bash
host=${3#*@}
export HOME=$HOSTS/${host##*.}/home SCRATCH=$HOSTS/${host##*.}
mkdir -p "$HOME"
exec bash -c "${*:4}"
"""

# A step on its nodes, here one after another on this machine; what is sent to srun ends the step's processes.
_SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
    [[ $1 == --nodelist=* ]] && list=${1#*=}
    [[ $1 == --cpus-per-task=* ]] && export SLURM_CPUS_PER_TASK=${1#*=}
    shift
done
for node in ${list//,/ }; do
    RAY_TMPDIR=$HOSTS/${node##*.} SLURM_TMPDIR=$HOSTS/${node##*.} setsid "$@" &
    pids+=($!)
done
trap 'for pid in "${pids[@]}"; do pkill -TERM --session "$pid"; done' TERM
wait
wait
"""

_SCONTROL = """#!/usr/bin/env bash
tr ',' '\\n' <<<"$3"
"""

# In place of emloc-ray: says which nodes the cluster has as it begins.
_DRIVER = """#!{python}
import os, sys, ray
ray.init(sys.argv[-1].removeprefix("ray.address="), log_to_driver=False)
nodes = [node for node in ray.nodes() if node["Alive"]]
print("arguments", sys.argv[1:-1])
print("resources", sorted((n["Resources"].get("CPU", 0), n["Resources"].get("GPU", 0)) for n in nodes))
held = [n["Resources"]["memory"] + n["Resources"]["object_store_memory"] for n in nodes]
print("memory", all(0.6 <= each / {memory} <= 0.9 for each in held))
umask = ray.remote(num_cpus=1)(lambda: oct(os.umask(0o022)))
print("umasks", {{*ray.get([umask.remote() for _ in range(8)])}})
"""


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the hosts' disks, short enough for the names of sockets, and a PATH that stand-ins are put first on."""
    folder = Path(tempfile.mkdtemp(prefix="emloc-"))
    (folder / "bin").mkdir()
    monkeypatch.setenv("HOSTS", str(folder))
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("RAY_AUTH_MODE")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def stand_in(hosts: Path, name: str, text: str) -> None:
    path = hosts / "bin" / name
    path.write_text(text)
    path.chmod(0o755)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def left_behind(hosts: Path) -> list[str]:
    """Processes that know of the folder."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if str(hosts) in line and process.info["pid"] != os.getpid():
            found.append(line)
    return found


def call(*command: str, **variables: str) -> str:
    done = subprocess.run(
        command,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def submitted(hosts: Path, command: Sequence[str]) -> subprocess.Popen[bytes]:
    """A job that was handed in, or could not be: the log has said which."""
    with (hosts / "job.log").open("wb") as log:
        job = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "RAY_AUTH_MODE": "token"})
    while job.poll() is None and "submitted successfully" not in (hosts / "job.log").read_text():
        time.sleep(0.1)
    return job


def call_and_scrape(hosts: Path, *command: str) -> str:
    """Runs a job and gives the lines of our metrics that the nodes had for Prometheus meanwhile."""
    found = hosts / "2" / "ray" / "prom_metrics_service_discovery.json"
    scraped: set[str] = set()
    deadline = time.monotonic() + SECONDS
    job = submitted(hosts, command)
    while "No available agent" in (hosts / "job.log").read_text():  # the head's helper is slower than the head to start
        assert time.monotonic() < deadline
        time.sleep(1)
        job = submitted(hosts, command)
    while job.poll() is None:
        assert time.monotonic() < deadline, (hosts / "job.log").read_text()
        targets = (
            [target for part in json.loads(found.read_text()) for target in part["targets"]] if found.is_file() else []
        )
        for target in targets:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics", timeout=5) as page:
                scraped |= {line for line in page.read().decode().splitlines() if "emloc_ray_units" in line}
        time.sleep(0.3)
    assert job.returncode == 0, (hosts / "job.log").read_text()
    return "\n".join(sorted(scraped))


def listed(address: str, kind: str, token: str) -> list[dict[str, Any]]:
    """What Ray's state API tells of one kind."""
    asked = urllib.request.Request(f"{address}/api/v0/{kind}?limit=1000&detail=true")
    asked.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(asked) as answer:
        return json.load(answer)["data"]["result"]["result"]


def test_a_job_on_bare_hosts(hosts: Path, tmp_path: Path, tiny_model_dir: Callable[..., Path], task_file: Path) -> None:
    stand_in(hosts, "ssh", _SSH)
    job, dashboard = tmp_path / "job", free_port()
    job.mkdir()
    # What starts a Ray of its own elsewhere joins the cluster's here.
    values = make_values(tmp_path / "run", tiny_model_dir("llama"), task_file, ray={"num_cpus": 1})
    (job / "my.yaml").write_text(write_yaml(values))
    settings = {
        "EMLOC_BIN": str(BIN),
        "RAY_PORT": str(free_port()),
        "DASHBOARD_PORT": str(dashboard),
        "RAY_OPTIONS": "--num-cpus=1",
        "RAY_metrics_report_interval_ms": "300",  # the stand-in for ssh passes the environment on
    }
    script, nodes = str(ROOT / "cluster" / "hosts.sh"), (HEAD, f"root@{WORKER}")
    address = f"http://127.0.0.1:{dashboard}"
    try:
        assert "127.0.0.3: started" in call(script, "start", *nodes, **settings)
        token = hosts / "3" / "home" / ".ray" / "auth_token"
        assert token.read_text() == (hosts / "home" / ".ray" / "auth_token").read_text()
        assert token.stat().st_mode & 0o777 == 0o600
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{address}/api/jobs/")
        submit = ("ray", "job", "submit", "--address", address, "--working-dir", str(job), "--")
        metrics = call_and_scrape(hosts, *submit, "emloc-ray", "run", "my.yaml", "--until", "calibrate")
        assert re.search(r'emloc_ray_units_done\{.*Stage="calibrate"', metrics, re.IGNORECASE), metrics
        tasks = listed(address, "tasks", token.read_text())
    finally:
        stopped = call(script, "stop", *nodes, **settings)
    assert stopped.count("stopped") == 2
    assert left_behind(hosts) == []
    assert set(RunDirectory(tmp_path / "run").manifest()["stages"]) == {"data", "calibrate"}
    assert read_events(RunDirectory(tmp_path / "run"))[-1]["event"] == "run_finished"
    assert len({task["node_id"] for task in tasks if task["node_id"]}) == 2
    assert {"calibrate: slot 0", "calibrate: slot 1"} <= {task["name"] for task in tasks}


def test_a_slurm_job_of_two_parts(hosts: Path) -> None:
    stand_in(hosts, "srun", _SRUN)
    stand_in(hosts, "scontrol", _SCONTROL)
    stand_in(hosts, "emloc-ray", _DRIVER.format(python=sys.executable, memory=memory_bytes()))
    mask = os.umask(0o022)
    told = call(
        str(ROOT / "cluster" / "slurm.sh"),
        "my.yaml",
        "finetune.max_steps=5",
        SLURM_JOB_ID=str(free_port()),
        SLURM_HET_SIZE="2",
        SLURM_JOB_NODELIST=HEAD,
        SLURM_JOB_NODELIST_HET_GROUP_0=HEAD,
        SLURM_JOB_NODELIST_HET_GROUP_1=WORKER,
        SLURM_CPUS_PER_TASK="3",
        SLURM_CPUS_PER_TASK_HET_GROUP_0="3",
        SLURM_CPUS_PER_TASK_HET_GROUP_1="2",
    )
    assert "arguments ['run', 'my.yaml', 'finetune.max_steps=5']" in told
    os.umask(mask)
    assert "resources [(2.0, 0), (3.0, 0)]" in told
    assert "memory True" in told
    assert "umasks {'0o22'}" in told
    assert left_behind(hosts) == []
