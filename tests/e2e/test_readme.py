"""Every command of the READMEs and every config in configs/ is real."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from families import FAMILIES
from typer.testing import CliRunner, Result
from vlms import VLMS, save_vlm

from emloc_ray.config.reading import load_config, parse_config
from emloc_ray.io.formats.yaml_text import read_yaml
from emloc_ray.runs.batch.tasks import read_batch
from emloc_ray.ui.cli import app

pytestmark = pytest.mark.without_ray

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = {
    name: (ROOT / name / "README.md").read_text() for name in (".", "emloc_ray", "configs", "pipelines", "cluster")
}
FILES = sorted((ROOT / "configs").glob("*.yaml"))
BATCHES = [path for path in FILES if {"tasks", "grid"} & read_yaml(path.read_text()).keys()]
CONFIGS = [path for path in FILES if path not in BATCHES]


@pytest.fixture(autouse=True)
def at_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the README's commands are given."""
    monkeypatch.chdir(ROOT)


def emloc_ray(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_is_valid_and_carries_its_exact_command(path: Path) -> None:
    load_config(path)
    command = f"emloc-ray run configs/{path.name}"
    assert command in path.read_text().split("run_dir")[0]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_plans(path: Path, tmp_path: Path) -> None:
    overrides = [f"run_dir={tmp_path / 'run'}"]
    if load_config(path).data.generate == "vqa":  # its model is on the hub: a tiny one of the same family stands for it
        overrides += [f"model.source={save_vlm('InternVL', tmp_path / 'model')}", "adapter.r=8", "ray.num_gpus=1"]
    done = emloc_ray("plan", str(path), *overrides)
    assert done.exit_code == 0, done.output
    assert "whole model" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", BATCHES, ids=lambda path: path.name)
def test_a_batch_is_valid_and_carries_its_exact_command(path: Path) -> None:
    assert len(read_batch(path).tasks) > 1
    command = f"emloc-ray batch configs/{path.name}"
    assert command in path.read_text().split("run_dir")[0]


@pytest.mark.parametrize("path", BATCHES, ids=lambda path: path.name)
def test_every_task_of_a_batch_fits_its_model_and_data(path: Path, tmp_path: Path) -> None:
    done = emloc_ray("batch", str(path), f"run_dir={tmp_path / 'run'}", "--dry-run")
    assert done.exit_code == 0, done.output
    assert f"{len(read_batch(path).tasks)} tasks" in done.stdout
    assert not (tmp_path / "run").exists()


def test_every_yaml_file_of_configs_is_tested() -> None:
    named = {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")} - {
        p.relative_to(ROOT) for p in FILES
    }
    bases = {read_yaml(path.read_text())["base"] for path in BATCHES}
    others = {path.relative_to("configs").as_posix() for path in named}
    # tests/unit/ablations/test_ablation_config.py reads them, tests/integration/test_ablation.py runs or checks them.
    assert {path for path in others if not path.startswith("ablations/")} <= bases


@pytest.mark.deep
def test_every_cell_of_an_ablation_fits_its_model() -> None:
    some = [
        "seeds=[0]",
        "datasets=[names, code]",
        "methods=[lora, paper_auto, structured_pruning]",
    ]  # others: test_ablation.py
    command = [sys.executable, "pipelines/ablation.py", "configs/ablations/baselines.yaml", *some, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "6 cells" in done.stdout


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200
    assert len(README.split()) <= 2500


def test_every_link_of_the_pages_leads_somewhere() -> None:
    for folder, page in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page):
            path, _, anchor = target.partition("#")
            file = ROOT / folder / (path or "README.md")
            assert file.exists(), f"{folder}/README.md: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{folder}/README.md: {target}"


def test_the_readme_names_real_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make ([\w-]+)", README, re.MULTILINE)
    assert {"quickstart", "check", "test", "test-deep", "test-all"} <= set(targets)
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_page_of_models_names_the_families_that_are_tested() -> None:
    named = re.search(r"test_families\.py`\), on .* each: (.*?)\. What", PAGES["emloc_ray"])
    assert named is not None
    assert named[1].split(", ") == [*FAMILIES, *VLMS]


def test_the_readmes_verbs_exist() -> None:
    commands = {
        verb for page in PAGES.values() for verb in re.findall(r"^emloc-ray ((?:cache )?\w+) .*$", page, re.MULTILINE)
    }
    assert {"validate", "plan", "run", "status", "report", "batch", "cancel", "cache list", "cache prune"} <= commands
    for verb in commands:
        assert emloc_ray(*verb.split(), "--help").exit_code == 0, verb


def readme_yaml(folder: str, name: str) -> str:
    """The YAML block of that folder's page whose first line says its name."""
    block = re.search(rf"```yaml\n(# {re.escape(name)}\n.*?)```", PAGES[folder], re.DOTALL)
    assert block is not None
    return block.group(1)


def test_the_readmes_config_is_valid() -> None:
    values = read_yaml(readme_yaml(".", "my.yaml"))
    parse_config(values)
    [block] = re.findall(r"```yaml\n(emulator:.*?)```", README, re.DOTALL)  # in the place of the same sections
    config = parse_config({**values, **read_yaml(block)})
    assert config.emulator.budget_bits == 2.4


def test_the_readmes_batch_is_valid(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(readme_yaml(".", "my.yaml"))
    (tmp_path / "many.yaml").write_text(readme_yaml("configs", "many.yaml"))
    batch = read_batch(tmp_path / "many.yaml")
    assert len(batch.tasks) == 6
    assert {task.priority for task in batch.tasks} == {0, 1}
    cancelled = re.search(r"^emloc-ray cancel \S+ (\S+)", PAGES["configs"], re.MULTILINE)
    assert cancelled is not None
    assert cancelled[1] in {task.name for task in batch.tasks}


RECIPES = re.findall(r"^\| \[(\w+\.yaml)\]", PAGES["configs"], re.MULTILINE)[:3]
SMALL_EMULATORS = re.findall(r"```yaml\n(emulator:.*?)```", PAGES["configs"], re.DOTALL)


@pytest.mark.parametrize("block", SMALL_EMULATORS, ids=["bits", "budget"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_emulator_of_few_bytes_goes_into_each_recipe_that_the_page_names(
    recipe: str, block: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(f"base: {ROOT / 'configs' / recipe}\n{block}")
    emulator = load_config(tmp_path / "mine.yaml").emulator
    assert emulator.bits == 2 or (emulator.budget_bits == 2.4 and emulator.healing is None)


def test_the_readmes_troubleshooting_quotes_what_is_said() -> None:
    table = README.split("| what you see |", 1)[1].split("\n\n", 1)[0]
    said = "\n".join(path.read_text() for path in (ROOT / "emloc_ray").rglob("*.py"))
    quoted = re.findall(r'^\| "([^"]+)"', table, re.MULTILINE)
    assert quoted
    assert [message for message in quoted if message not in said] == []


def test_ci_runs_the_readmes_test_commands() -> None:
    lines = [shlex.split(line, comments=True) for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    assert [line[1] for line in lines if line[:1] == ["make"]] == [".venv/installed", "test-all"]
