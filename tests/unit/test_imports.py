"""Imports run one way: down the rooms of the package, and without a circle."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import emloc_ray

ROOT = Path(emloc_ray.__file__).parent
# From the top down: a file imports from its own room and from those below it.
ROOMS = ("ui", "runs", "stages", "planning", "config", "demos", "modeling", "data", "io", "core", "text", "errors")
LONGEST_CHAIN = 18  # modules, each imported by the one before it
NO_RAY = ("errors", "core", "io", "modeling")


def modules() -> list[Path]:
    """Every module of the package, but its own ``__init__``, which names what all rooms offer."""
    return [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@functools.cache
def imports(path: Path, at_import: bool = False) -> list[str]:
    """The full names of all that a file imports, inside functions too; ``at_import``: of what its import imports alone."""
    names: list[str] = []
    tree = ast.parse(path.read_text())
    for node in tree.body if at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and called(node.func) in ("import_module", "__import__"):
            names += [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return names


def called(function: ast.expr) -> str | None:
    """The last part of the name that is called."""
    return getattr(function, "attr", None) or getattr(function, "id", None)


def rooms_of(path: Path) -> set[str]:
    """The rooms that a file imports from."""
    names = [name.split(".") for name in imports(path)]
    return {name[1] for name in names if name[0] == "emloc_ray" and len(name) > 1}


@functools.cache
def module_of(name: str) -> Path | None:
    """The file of ours that a dotted name is, or is in."""
    parts = name.split(".")[1:] if name.startswith("emloc_ray.") else []
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath(*parts[:length])
        if path.with_suffix(".py").is_file():
            return path.with_suffix(".py")
        if path.is_dir():
            return path / "__init__.py"
    return None


def test_every_folder_is_a_room_and_every_import_runs_down() -> None:
    assert {room(path) for path in modules()} == set(ROOMS)
    arrows = {
        (str(path.relative_to(ROOT)), name)
        for path in modules()
        for name in rooms_of(path)
        if ROOMS.index(name) < ROOMS.index(room(path))
    }
    assert arrows == set()


def test_no_circle_of_modules() -> None:
    graph = {path: {module_of(name) for name in imports(path)} - {None, path} for path in modules()}
    # Opening an emulator imports its model; registering its type must not.
    graph[ROOT / "modeling/emulator_type.py"] -= {ROOT / "modeling/emulator.py"}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(modules())


def test_no_chain_of_modules_is_longer_than_a_reader_follows() -> None:
    graph: dict[Path | None, set[Path | None]] = {
        path: {module_of(name) for name in imports(path, at_import=True)} - {None, path} for path in modules()
    }

    @functools.cache
    def chain(path: Path | None) -> tuple[Path | None, ...]:
        return (path, *max(map(chain, graph.get(path, ())), key=len, default=()))

    longest = max(map(chain, graph), key=len)
    assert len(longest) <= LONGEST_CHAIN, " > ".join(str(path) for path in longest)


def test_the_rooms_below_the_stages_never_import_ray() -> None:
    assert "ray.data" in imports(ROOT / "data" / "ingest.py")  # the parser sees imports inside functions
    reaching = [
        path for path in modules() if room(path) in NO_RAY and any(n.split(".")[0] == "ray" for n in imports(path))
    ]
    assert reaching == []


def test_core_is_torch_only() -> None:
    kernels = {"rounding_kernel.py": {"triton"}}  # torch brings it where there is CUDA; imported there alone
    for path in (ROOT / "core").glob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - {"emloc_ray"} - sys.stdlib_module_names
        assert outside <= {"torch"} | kernels.get(path.name, set()), path


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_stages_and_configs_are_known_before_what_takes_seconds_is_imported() -> None:
    names = ["emloc_ray.stages.order"] + [
        f"emloc_ray.config.{path.stem}" for path in modules() if room(path) == "config" and path.name != "__init__.py"
    ]
    heavy = {"ray", "peft", "transformers.modeling_utils"}
    code = (
        f"import importlib, sys\n[importlib.import_module(n) for n in {names!r}]\nprint({heavy!r} & {{*sys.modules}})"
    )
    assert in_a_fresh_process(code).strip() == "set()"


def test_every_public_name_is_there() -> None:
    for name in emloc_ray.__all__:
        assert getattr(emloc_ray, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = emloc_ray.nothing_of_that_name
