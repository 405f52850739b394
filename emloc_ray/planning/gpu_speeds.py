"""How fast GPUs are by their names, from their vendor's data sheets: what a plan is timed by where none is measured."""

import functools
import subprocess
from dataclasses import dataclass

_QUERY = ("nvidia-smi", "--format=csv,noheader,nounits")
_REACHED = 0.7  # of a data sheet's figure, as assumed of large matrix products: none was timed here


@dataclass(frozen=True)
class GpuSpeed:
    """The speed of one GPU, as a large piece of work reaches it: operations a second of dense products in bfloat16 (float16 where
    it has no bfloat16), accumulated in float32, and of products of float32 without TF32, which take no tensor core; bytes a
    second from the host over PCI Express, and of its own memory."""

    flops: float
    float32_flops: float
    link: float
    memory: float


def _sheet(tera: float, float32: float, generation: int, memory: float) -> GpuSpeed:
    """A data sheet's dense TFLOPS, its ``FP32`` ones, its generation of PCI Express with 16 lanes, 12.5 GB/s of which are reached
    of the third, and its memory's GB/s."""
    link = 12.5e9 * 2.0 ** (generation - 3)
    return GpuSpeed(_REACHED * tera * 1e12, _REACHED * float32 * 1e12, link, _REACHED * memory * 1e9)


# By what a name holds, all of it; the first that fits. Figures are of NVIDIA's data sheets (https://resources.nvidia.com,
# "... Tensor Core GPU Datasheet", and of GeForce the architectures' whitepapers): rows BFLOAT16 or FP16 Tensor Core, halved
# where they are given with sparsity alone, FP32, and memory bandwidth. Of cards in several forms the fastest is meant. Of the
# A10G: https://d1.awsstatic.com/product-marketing/ec2/NVIDIA_AWS_A10G_DataSheet_FINAL_02_17_2022.pdf
_SHEETS: tuple[tuple[tuple[str, ...], GpuSpeed], ...] = (
    (("B200",), _sheet(2250, 75, 5, 8000)),
    (("H200", "NVL"), _sheet(835.5, 60, 5, 4800)),
    (("H200",), _sheet(989, 67, 5, 4800)),
    (("H100", "PCIe"), _sheet(756, 51, 5, 2000)),
    (("H100", "NVL"), _sheet(835.5, 60, 5, 3900)),
    (("H100",), _sheet(989, 67, 5, 3350)),
    (("A100",), _sheet(312, 19.5, 4, 2039)),
    (("A30",), _sheet(165, 10.3, 4, 933)),
    (("A40",), _sheet(149.7, 37.4, 4, 696)),
    (("A10G",), _sheet(70, 35, 4, 600)),
    (("A10",), _sheet(125, 31.2, 4, 600)),
    (("L40S",), _sheet(362, 91.6, 4, 864)),
    (("L40",), _sheet(181, 90.5, 4, 864)),
    (("L4",), _sheet(121, 30.3, 4, 300)),
    (("RTX A6000",), _sheet(154.8, 38.7, 4, 768)),
    (("RTX 5090",), _sheet(209.5, 104.8, 5, 1792)),
    (("RTX 4090",), _sheet(165.2, 82.6, 4, 1008)),
    (("RTX 3090",), _sheet(71, 35.6, 4, 936)),
    (("V100",), _sheet(125, 15.7, 3, 900)),
    (("T4",), _sheet(65, 8.1, 3, 320)),
)


def speed_of(name: str) -> GpuSpeed | None:
    """The speed of a GPU of that name, as ``nvidia-smi`` gives it; None of one that no data sheet here is of."""
    words = name.replace("-", " ")
    return next((speed for parts, speed in _SHEETS if all(f" {part} " in f" {words} " for part in parts)), None)


@functools.cache
def ask_gpus(what: str) -> tuple[str, ...]:
    """What ``nvidia-smi`` says of each of this machine's GPUs; torch would make a CUDA context, which holds memory, to say so."""
    command = (*_QUERY, f"--query-gpu={what}")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in answer.splitlines() if line.strip())


def slowest_gpu() -> GpuSpeed | None:
    """The slowest of this machine's GPUs; None where it has none, or one that is not known."""
    speeds = [speed_of(name) for name in ask_gpus("name")]
    known = [speed for speed in speeds if speed is not None]
    return min(known, key=lambda speed: speed.flops) if known and len(known) == len(speeds) else None
