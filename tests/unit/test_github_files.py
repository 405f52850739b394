"""The files that only GitHub and pre-commit read hold what they name: commands, targets, versions."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from emloc_ray.io.formats.yaml_text import read_yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def jobs(name: str) -> dict[str, Any]:
    return dict(read_yaml((WORKFLOWS / name).read_text())["jobs"])


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_a_file_is_yaml_of_its_kind(path: Path) -> None:
    wanted = {"workflows": {"name", "on", "permissions", "jobs"}, "ISSUE_TEMPLATE": {"name", "description", "body"}}
    if path.name != "config.yml":
        assert wanted[path.parent.name] <= read_yaml(path.read_text()).keys()


def test_ci_runs_what_is_there_from_the_lowest_python_on() -> None:
    ci = jobs("ci.yml")
    commands = [step["run"] for job in ci.values() for step in job["steps"] if "run" in step]
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", "\n".join(commands), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert ".ci/run" in commands
    assert f">={ci['check']['strategy']['matrix']['python'][0]}" == PROJECT["requires-python"]
    extras = re.search(r"'\.\[([\w,]+)\]'", "\n".join(commands))
    assert extras is not None
    assert set(extras[1].split(",")) <= PROJECT["optional-dependencies"].keys()


def test_a_release_of_this_version_would_pass_its_check() -> None:
    version = PROJECT["version"]
    lines = {name: (ROOT / name).read_text().splitlines() for name in ("emloc_ray/__init__.py", "CHANGELOG.md")}
    assert f'__version__ = "{version}"' in lines["emloc_ray/__init__.py"]
    assert f"## {version}" in lines["CHANGELOG.md"]


@pytest.mark.parametrize("path", sorted(WORKFLOWS.glob("*.yml")), ids=lambda path: path.name)
def test_no_foreign_action_has_a_token_that_writes_to_the_repository(path: Path) -> None:
    of_all = read_yaml(path.read_text())["permissions"]
    for name, job in jobs(path.name).items():
        foreign = [step for step in job["steps"] if not step.get("uses", "actions/").startswith("actions/")]
        assert not foreign or job.get("permissions", of_all).get("contents") != "write", name


def test_hooks_run_tools_that_the_tests_install() -> None:
    hooks = read_yaml((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    for tool in {hook["entry"].split()[0] for hook in hooks}:
        assert any(requirement.startswith(tool) for requirement in PROJECT["optional-dependencies"]["test"]), tool
        assert shutil.which(tool, path=str(Path(sys.executable).parent)), tool
