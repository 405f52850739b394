"""GPUs by the names that nvidia-smi gives them."""

from __future__ import annotations

from pathlib import Path

import pytest

from emloc_ray.planning.gpu_speeds import slowest_gpu, speed_of

pytestmark = pytest.mark.usefixtures("asked_anew")


@pytest.mark.parametrize(
    ("name", "tera", "float32", "memory"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 67, 3350),
        ("NVIDIA H100 PCIe", 756, 51, 2000),
        ("NVIDIA H100 NVL", 835.5, 60, 3900),
        ("NVIDIA H200", 989, 67, 4800),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5, 2039),
        ("NVIDIA A100-PCIE-40GB", 312, 19.5, 2039),
        ("NVIDIA A10", 125, 31.2, 600),
        ("NVIDIA A10G", 70, 35, 600),
        ("NVIDIA L4", 121, 30.3, 300),
        ("NVIDIA L40", 181, 90.5, 864),
        ("NVIDIA L40S", 362, 91.6, 864),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6, 1008),
        ("NVIDIA GeForce RTX 3090", 71, 35.6, 936),
        ("NVIDIA RTX A6000", 154.8, 38.7, 768),
        ("Tesla T4", 65, 8.1, 320),
        ("Tesla V100-SXM2-16GB", 125, 15.7, 900),
    ],
)
def test_a_data_sheet_s_figures(name: str, tera: float, float32: float, memory: float) -> None:
    speed = speed_of(name)
    assert speed is not None
    assert speed.flops == pytest.approx(0.7 * tera * 1e12)
    assert speed.float32_flops == pytest.approx(0.7 * float32 * 1e12)
    assert 12e9 < speed.link < 51e9
    assert speed.memory == pytest.approx(0.7 * memory * 1e9)


@pytest.mark.parametrize("name", ["NVIDIA GeForce GTX 1080", "NVIDIA A1000 Laptop GPU", ""])
def test_others_are_not_taken_for_one(name: str) -> None:
    assert speed_of(name) is None


@pytest.mark.parametrize(
    ("script", "tera"),
    [
        ("printf 'NVIDIA H100 PCIe\\nNVIDIA L4\\n'", 121),
        ("printf 'NVIDIA H100 PCIe\\nNVIDIA New\\n'", None),
        ("exit 9", None),
        ("true", None),
    ],
)
def test_the_slowest_of_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, tera: float | None
) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    speed = slowest_gpu()
    assert (None if speed is None else speed.flops) == (None if tera is None else pytest.approx(0.7 * tera * 1e12))
