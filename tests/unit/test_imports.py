"""Imports run one way: errors ← core, io ← modeling, data ← stages ← the rest; ray in stages and up."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import emloc_ray

ROOT = Path(emloc_ray.__file__).parent
LAYERS = {
    "errors": 0,
    "config_base": 0,
    "config": 1,
    "core": 1,
    "io": 1,
    "modeling": 2,
    "data": 2,
    "layout": 3,
    "split_checks": 3,
    "preparation": 3,
    "stages": 4,
}
TOP = 5  # pipeline, planner, report, …: modules of the package's top level
LAST = {"cli": 6, "__main__": 6}
NO_RAY = ("errors", "core", "io", "modeling")


def modules() -> list[Path]:
    """Every module of the package, but its own ``__init__``, which names what all layers offer."""
    return [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def part(path: Path) -> str:
    """The package or top-level module that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def layer(name: str) -> int:
    return {**LAYERS, **LAST}.get(name, TOP)


def imports(path: Path) -> list[str]:
    """The full names of all modules imported anywhere in a file, inside functions too, relative ones resolved."""
    found: list[str] = []
    package = ("emloc_ray", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            found += [f"{source}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found += [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    return found


def ours(path: Path) -> set[str]:
    """The parts of the package that a file imports."""
    names = [name.split(".") for name in imports(path)]
    return {name[1] for name in names if name[0] == "emloc_ray" and len(name) > 1}


def test_the_parser_sees_every_kind_of_import() -> None:
    assert {"core", "io", "modeling", "data"} <= ours(ROOT / "stages" / "calibrate.py") | ours(
        ROOT / "stages" / "correct.py"
    )
    assert "ray.data" in imports(ROOT / "data" / "ingest.py")  # inside a function
    assert len(modules()) > 30


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_imports_from_a_later_layer(path: Path) -> None:
    late = {name for name in ours(path) if layer(name) > layer(part(path))}
    assert not late, f"{path} imports from {late}"


@pytest.mark.parametrize(
    "path", [path for path in modules() if part(path) in NO_RAY], ids=lambda path: str(path.relative_to(ROOT))
)
def test_never_ray(path: Path) -> None:
    assert not [name for name in imports(path) if name.split(".")[0] == "ray"]


def test_core_is_torch_only() -> None:
    for path in (ROOT / "core").glob("*.py"):
        assert ours(path) <= {"core", "errors"}, path
        outside = {name.split(".")[0] for name in imports(path)} - {"emloc_ray"} - sys.stdlib_module_names
        assert outside <= {"torch"}, path


def test_errors_and_config_stand_alone() -> None:
    assert ours(ROOT / "errors.py") == set()
    assert ours(ROOT / "config.py") <= {"errors", "config_base"}


def test_data_does_not_reach_into_stages_nor_modeling() -> None:
    for path in (ROOT / "data").glob("*.py"):
        assert ours(path) <= {"data", "io", "core", "errors"}, path


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_and_all_that_needs_no_ray_imports_none() -> None:
    names = [
        ".".join(("emloc_ray", *path.relative_to(ROOT).with_suffix("").parts))
        for path in modules()
        if part(path) in (*NO_RAY, "config") and path.name != "__init__.py"
    ]
    code = f"import emloc_ray, importlib, sys\n[importlib.import_module(n) for n in {names!r}]\nprint('ray' in sys.modules)"
    assert in_a_fresh_process(code).strip() == "False"


def test_every_public_name_is_there() -> None:
    for name in emloc_ray.__all__:
        assert getattr(emloc_ray, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = emloc_ray.nothing_of_that_name
