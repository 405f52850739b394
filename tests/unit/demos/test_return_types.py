"""The task of return types: exact rows from a made tree, whole functions alone, and no type on more than its share."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from emloc_ray.demos.python_sources import write_task
from emloc_ray.demos.return_types import LEAD, TASK
from emloc_ray.demos.splits import SPLIT_FRACTIONS

FUNCTION = '''
class Shelf:
    def holds(
        self, title: str
    ) -> bool:
        """Whether it holds a book."""

        return title in self.titles
'''


def _rows(root: Path, text: str, **changes: float) -> list[dict[str, str]]:
    for number in range(4):
        (root / "library").mkdir(parents=True, exist_ok=True)
        (root / "library" / f"shelf{number}.py").write_text(text.replace("NUMBER", str(number)))
    task = replace(TASK, min_rows=0, **{"max_rows": 8, "max_share": 1.0, **changes})  # type: ignore[arg-type]
    counts = write_task(root / "out", task, [root])
    tables = {name: pq.read_table(root / "out" / f"{name}.parquet") for name in SPLIT_FRACTIONS}
    assert counts == {name: table.num_rows for name, table in tables.items()}
    return [row for table in tables.values() for row in table.to_pylist()]


def test_a_short_function_becomes_the_expected_row(tmp_path: Path) -> None:
    (row,) = _rows(tmp_path, FUNCTION)
    assert row["prompt"] == ("def holds(\n    self, title: str\n) -> ____:\n    return title in self.titles" + LEAD)
    assert row["completion"] == "bool"


def test_what_is_no_row(tmp_path: Path) -> None:
    functions = [
        "def a(x):\n    return x",
        "def b(x) -> Shelf:\n    return x",
        "def c(x) -> list[int]:\n    return x",
        "def __len__(x) -> int:\n    return 1",
        "def d(x) -> 'int':\n    return x",
        "def e(x: ä) -> int:\n    return x",
        "def f(x) -> int:\n    y = x\n    return " + "x + " * 80 + "y",
    ]
    assert _rows(tmp_path, "\n".join(functions)) == []


def test_what_returns_nothing_is_a_row(tmp_path: Path) -> None:
    assert [row["completion"] for row in _rows(tmp_path, "async def put(x) -> None:\n    x.put()\n")] == ["None"]


@pytest.mark.parametrize("written", ["->int", "->  (int)", "-> \\\n  int", "-> (\n  int\n)"])
def test_a_file_whose_annotations_are_written_otherwise_makes_rows_too(tmp_path: Path, written: str) -> None:
    assert [row["completion"] for row in _rows(tmp_path, f"def put(x) {written}:\n    return x.put()\n")] == ["int"]


def test_no_type_is_on_more_than_its_share(tmp_path: Path) -> None:
    text = "".join(f"def f{i}(x) -> int:\n    return NUMBER + {i}\n" for i in range(4))
    text += "def g(x) -> str:\n    return 'NUMBER'\n"
    rows = _rows(tmp_path, text, max_share=0.25)
    assert Counter(row["completion"] for row in rows) == {"int": 2, "str": 2}
    assert len({row["prompt"] for row in rows}) == 4
