"""Every command of the README and every config in configs/ is real."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from emloc_ray.config_reading import load_config, parse_config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def emloc_ray(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from emloc_ray.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_is_valid_and_carries_its_exact_command(path: Path) -> None:
    load_config(path)
    command = f"emloc-ray run configs/{path.name}"
    assert command in path.read_text().split("run_dir")[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_plans(path: Path, tmp_path: Path) -> None:
    done = emloc_ray("plan", str(path), f"run_dir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "whole model" in done.stdout
    assert not (tmp_path / "run").exists()


def test_the_readme_names_real_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert {"quickstart", "test"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_readmes_verbs_exist() -> None:
    commands = re.findall(r"^emloc-ray (\w+) .*$", README, re.MULTILINE)
    assert {"validate", "plan", "run", "status", "report"} <= set(commands)
    for verb in set(commands):
        assert emloc_ray(verb, "--help").returncode == 0, verb


def test_the_readmes_config_is_valid() -> None:
    block = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert block is not None
    config = parse_config(yaml.safe_load(block.group(1)))
    assert config.emulator.compression_ratio == 0.5


def test_ci_runs_the_readmes_test_command() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert ["make", "test"] in [shlex.split(line, comments=True) for line in lines]
