"""What is told of this machine, by a stand-in for the tool that knows its GPUs, and the room that its disk has."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from emloc_ray.config.reading import parse_config
from emloc_ray.config.schema import RunConfig
from emloc_ray.errors import ConfigError
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.modeling import attention
from emloc_ray.planning.gpu_speeds import ask_gpus
from emloc_ray.planning.machine import (
    Speeds,
    check_disk,
    check_kernel,
    check_num_gpus,
    check_packages,
    check_resources,
    cpu_flops,
    gpu_bytes,
    kept_for_the_day,
    lacks,
    time_products,
    with_disk_of,
)

pytestmark = pytest.mark.usefixtures("asked_anew")


def nvidia_smi(folder: Path, script: str) -> None:
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)


@pytest.mark.parametrize(
    ("script", "mib"),
    [
        ("printf '81559\\n24564\\n'", 24564),
        ("echo '[N/A]'", float("inf")),  # memory that CPU and GPU share
        ("echo no driver; exit 9", float("inf")),
        ("true", float("inf")),
        (None, float("inf")),
    ],
)
def test_the_smallest_gpu_s_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, mib: float
) -> None:
    if script is not None:
        nvidia_smi(tmp_path, script)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_bytes() == mib * 2**20


def test_a_thread_s_speed_is_that_of_a_processor() -> None:
    state = torch.get_rng_state()
    assert 1e8 < time_products() < 1e13
    assert torch.equal(torch.get_rng_state(), state)  # the caller's numbers are its own


@contextlib.contextmanager
def rough_float64() -> Iterator[None]:
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("setting", [rough_float64(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16)])
def test_a_thread_s_speed_is_of_float32_on_the_cpu_whatever_the_caller_has_set(setting: Any) -> None:
    products: set[tuple[torch.dtype, str, str]] = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.mm.default:
                precision = torch.get_float32_matmul_precision()
                products.update((tensor.dtype, tensor.device.type, precision) for tensor in args)
            return func(*args, **(kwargs or {}))

    with setting, Products():
        time_products()
    assert products == {(torch.float32, "cpu", "highest")}


def test_plans_of_two_threads_time_the_cpu_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two timings at once left the process with one thread: the second put back what the first had set."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    begun, again, timings = threading.Event(), threading.Event(), []

    def timing() -> float:
        timings.append(5.0)
        (again if begun.is_set() else begun).set()
        again.wait(0.3)  # for a second one
        return 5.0

    def second() -> float:
        begun.wait(10)
        return cpu_flops()

    monkeypatch.setattr("emloc_ray.planning.machine.time_products", timing)
    cpu_flops.cache_clear()
    try:
        with ThreadPoolExecutor(2) as threads:
            calls = [threads.submit(cpu_flops), threads.submit(second)]
            assert [call.result() for call in calls] == [5.0, 5.0]
    finally:
        cpu_flops.cache_clear()
    assert timings == [5.0]


def test_a_disk_is_timed_where_weights_come_from_it(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(2**22))
    speeds = Speeds(1e10, host_bytes=2**20)
    assert with_disk_of(speeds, [file], 2**20) is speeds  # memory holds them
    assert with_disk_of(speeds, [tmp_path / "missing.safetensors"], 2**22) is speeds
    found = with_disk_of(speeds, [file], 2**22)
    assert found.disk_measured
    assert 1e5 < found.disk != speeds.disk
    assert found.moving(True, 2**22) == found.moving(False, 2**22) == found.disk


def test_a_speed_is_measured_once_a_day(tmp_path: Path) -> None:
    path, measured = tmp_path / "cache" / "speed.json", iter((5.0, 6.0, 7.0))
    assert [kept_for_the_day(path, lambda: next(measured)) for _ in range(2)] == [5.0, 5.0]
    kept = json.loads(path.read_text())
    assert kept["floating-point operations a second and thread"] == 5.0
    path.write_text(json.dumps({**kept, "day": "2020-02-02"}))
    assert kept_for_the_day(path, lambda: next(measured)) == 6.0
    path.write_text("[1")
    assert kept_for_the_day(path, lambda: next(measured)) == 7.0
    assert kept_for_the_day(Path("/proc/nowhere/speed.json"), lambda: 8.0) == 8.0


def test_room_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []
    usage = shutil.disk_usage(tmp_path)

    def disk_usage(path: Path) -> Any:
        asked.append(path)
        return usage._replace(free=2**30)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    run = RunDirectory(tmp_path / "not" / "yet")
    check_disk(run, 2**30)
    with pytest.raises(ConfigError, match=r"needs about 1\.01 GiB, and its disk has 1\.00 GiB free"):
        check_disk(run, 2**30 + 1)
    assert asked == [tmp_path, tmp_path]


def of(**finetune: Any) -> RunConfig:
    values = {"run_dir": "x", "model": {"source": "x"}, "data": {"train": {"path": "x"}}, "ray": {"num_gpus": 1}}
    return parse_config({**values, "finetune": finetune}).with_gpus(1)


def test_a_gpu_too_old_for_bfloat16_is_told_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, "echo 9.0; echo 7.5")
    monkeypatch.setenv("PATH", str(tmp_path))
    check_packages(of())
    check_packages(of(bf16=True, gpus_per_worker=0))
    with pytest.raises(ConfigError, match=r"bf16 needs a GPU of compute capability 8 or higher, .* one of 7\.5: leave"):
        check_packages(of(bf16=True))


def test_a_gpu_too_old_for_tf32_is_told_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, "echo 9.0; echo 7.5")
    monkeypatch.setenv("PATH", str(tmp_path))
    check_packages(of(tf32=False))
    check_packages(of(tf32=True, gpus_per_worker=0))
    with pytest.raises(ConfigError, match=r"^finetune\.tf32 needs a GPU of compute .* one of 7\.5: leave it out\.$"):
        check_packages(of(tf32=True))


def test_gpus_that_torch_does_not_see_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, "echo 81559")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"this machine has 0 \(torch sees no others: a build without CUDA"):
        check_resources(of(), 4, 0)


def test_gpus_that_a_ray_started_here_would_only_count_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_num_gpus(of())
    check_num_gpus(of_attention(None, num_gpus=None))
    check_num_gpus(of_attention(None, num_gpus=2, address="auto"))
    with pytest.raises(ConfigError, match=r"^ray\.num_gpus is 2, and torch sees 1 GPU of this machine: [^\n]*\.$"):
        check_num_gpus(of_attention(None, num_gpus=2))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"use_liger_kernel": True}, "finetune.use_liger_kernel needs the liger_kernel package"),
        ({"optim": "paged_adamw_8bit"}, "finetune.optim: paged_adamw_8bit needs the bitsandbytes package"),
    ],
)
def test_packages_that_are_missing_are_told(monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], words: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=words):
        check_packages(of(**keys))


def of_attention(name: str | None, gpus: float = 1, **ray: Any) -> RunConfig:
    values = {"run_dir": "x", "model": {"source": "x", "attn_implementation": name}, "data": {"train": {"path": "x"}}}
    return parse_config({**values, "ray": {"num_gpus": 1, **ray}}).with_gpus(gpus)


FLASH = "flash_attention_2"


@pytest.mark.parametrize(
    ("config", "capability", "words"),
    [
        (of_attention(FLASH, gpus=0), 9.0, "computes on GPUs alone, and calibration has none: leave it out, or set"),
        (of_attention(FLASH), 7.5, "needs a GPU of compute capability 8 or higher, this machine has one of 7.5: leave"),
        (of_attention(FLASH), 9.0, "flash_attention_2 needs the flash-attn package, or kernels, which fetches it"),
        (of_attention(f"a/flash-attn3@{'0123456789' * 4}"), 9.0, "789 needs the kernels package: pip install"),
    ],
)
def test_attention_that_this_machine_cannot_compute_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: RunConfig, capability: float, words: str
) -> None:
    monkeypatch.setattr(attention, "is_kernels_available", lambda: False)
    nvidia_smi(tmp_path, f"echo {capability}")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        check_kernel(config)
    assert words in str(caught.value)
    assert str(caught.value).count("\n") == 0
    check_kernel(of_attention("sdpa", gpus=0))
    joined = of_attention(FLASH, address="auto")
    check_kernel(joined)  # what is installed there is not known here
    nvidia_smi(tmp_path, f"case $1 in *memory*) echo 1;; *) echo {capability};; esac")
    ask_gpus.cache_clear()
    found = lacks([config, config, joined])  # as one of its nodes: of each kernel one sentence, in the configs' order
    names = dict.fromkeys([config.model.attn_implementation, FLASH])
    assert [sentence.partition(" needs ")[0] for sentence in found] == [
        f"model.attn_implementation: {n}" for n in names
    ]
