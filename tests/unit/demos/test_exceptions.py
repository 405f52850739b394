"""The exception task: exact rows from a made tree, none that gives its name away, and no name on more than its share."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq

from emloc_ray.demos.exceptions import LEAD, TASK, generate
from emloc_ray.demos.splits import SPLIT_FRACTIONS

FUNCTION = '''
class Shelf:
    def take(self, title):
        """Takes a book."""
        if title not in self.titles:

            raise KeyError(
                f"No book {title}"
            ) from None
        return self.titles.pop(title)
'''


def _rows(root: Path, text: str, **changes: float) -> list[dict[str, str]]:
    for number in range(4):
        (root / "library").mkdir(parents=True, exist_ok=True)
        (root / "library" / f"shelf{number}.py").write_text(text.replace("NUMBER", str(number)))
    task = replace(TASK, min_rows=0, **{"max_rows": 8, "max_share": 1.0, **changes})  # type: ignore[arg-type]
    counts = generate(root / "out", task, [root])
    tables = {name: pq.read_table(root / "out" / f"{name}.parquet") for name in SPLIT_FRACTIONS}
    assert counts == {name: table.num_rows for name, table in tables.items()}
    return [row for table in tables.values() for row in table.to_pylist()]


def test_the_last_lines_up_to_a_raise_become_the_expected_row(tmp_path: Path) -> None:
    (row,) = _rows(tmp_path, FUNCTION, max_prompt_chars=150)
    assert row["prompt"] == (
        "        if title not in self.titles:\n"
        "            raise ____(\n"
        '                f"No book {title}"\n'
        "            ) from None" + LEAD
    )
    assert row["completion"] == "KeyError"


def test_what_is_no_row(tmp_path: Path) -> None:
    raised = [
        "OwnError('x')",
        "IndexError",
        "IndexError()",
        "IndexError(x)",
        "ValueError('x')",
        "errors.OwnError('x')",
        "IndexError('ä')",
    ]
    raised += ["IndexError('an IndexError')"]
    assert _rows(tmp_path, "".join(f"def f{i}(x):\n    raise {text}\n" for i, text in enumerate(raised))) == []


def test_no_name_is_on_more_than_its_share(tmp_path: Path) -> None:
    text = "".join(f"def f{i}(x):\n    raise IndexError('NUMBER is {i}')\n" for i in range(4))
    text += "def g(x):\n    raise TypeError('NUMBER is text')\n"
    rows = _rows(tmp_path, text, max_share=0.25)
    assert Counter(row["completion"] for row in rows) == {"IndexError": 2, "TypeError": 2}
    assert len({row["prompt"] for row in rows}) == 4
