"""The docstring task: exact rows from a made tree, clean splits, and enough rows from what is installed here."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from emloc_ray.demos.docstrings import LEAD, TASK
from emloc_ray.demos.python_sources import SourceTask, write_task
from emloc_ray.demos.splits import SPLIT_FRACTIONS
from emloc_ray.errors import DataError

ANY_NUMBER = replace(TASK, min_rows=0)


def _put(root: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def _function(name: str, docstring: str, body: str = "return value") -> str:
    return f'def {name}(value):\n    """{docstring}"""\n    {body}\n\n\n'


def _tables(out_dir: Path) -> dict[str, pa.Table]:
    return {name: pq.read_table(out_dir / f"{name}.parquet") for name in SPLIT_FRACTIONS}


def _rows(root: Path, task: SourceTask = ANY_NUMBER) -> list[dict[str, str]]:
    out_dir = root.parent / f"{root.name}_out"
    counts = write_task(out_dir, task, [root])
    tables = _tables(out_dir)
    assert counts == {name: table.num_rows for name, table in tables.items()}
    return [row for table in tables.values() for row in table.to_pylist()]


def _completions(root: Path, task: SourceTask = ANY_NUMBER) -> list[str]:
    return sorted(row["completion"] for row in _rows(root, task))


def _many_modules(root: Path) -> Path:
    return _put(
        root,
        {
            f"pkg/m{i}.py": "".join(
                _function(f"f{i}_{j}", f"Return item {j} of list {i}.", f"return items[{i}][{j}]") for j in range(5)
            )
            for i in range(60)
        },
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    """Each split's rows as the sources installed here give them; fewer than the default, to save time."""
    out_dir = tmp_path_factory.mktemp("installed")
    write_task(out_dir, replace(TASK, max_rows=4_000))
    return {name: table.to_pylist() for name, table in _tables(out_dir).items()}


def test_a_method_becomes_the_expected_row(tmp_path: Path) -> None:
    source = '''
class Shelf:
    """Holds books."""

    @property
    def books(self) -> list[str]:
        """Return the ``titles`` of every :class:`~shelf.Book`, e.g. for
        printing. More is said here.

        Example:
            >>> Shelf().books
        """
        found = []

        def visit(book):
            """Look at one book."""
            found.append(book)
        self.walk(visit)
        return found
'''
    (row,) = _rows(_put(tmp_path / "src", {"library/shelf.py": source}))
    assert row == {
        "prompt": "def books(self) -> list[str]:\n    found = []\n    def visit(book):\n        found.append(book)\n"
        "    self.walk(visit)\n    return found" + LEAD,
        "completion": "Return the titles of every Book, e.g. for printing.",
        "module": "library.shelf",
    }


def test_the_prompt_is_cut_at_a_line_border(tmp_path: Path) -> None:
    body = "\n    ".join(f"value += {number}" for number in range(100))
    root = _put(tmp_path / "src", {"long.py": _function("grow", "Add up the first numbers.", body)})
    code = "def grow(value):\n    value += 0\n    value += 1"
    for spare in (0, 14):
        (row,) = _rows(root, replace(ANY_NUMBER, max_prompt_chars=len(code + LEAD) + spare))
        assert row["prompt"] == code + LEAD
    (row,) = _rows(root, replace(ANY_NUMBER, max_prompt_chars=len(code + LEAD) + 15))
    assert row["prompt"] == code + "\n    value += 2" + LEAD


@pytest.mark.parametrize(
    ("docstring", "completion"),
    [
        ("Return the value", "Return the value."),
        ("Return the value.\n\n    :param value: it", "Return the value."),
        ("Return the value\n    :param value: it", "Return the value."),
        ("Return the value of :attr:`a.b` or of\n    :attr:`c`.", "Return the value of a.b or of c."),
        ("Return 1.5 times the value! Or not.", None),
        ("Return value.", None),
        (" ".join(["Return", *["very"] * 29, "old."]), None),
        ("value(x) -> y", None),
        (">>> value(1)", None),
        (":param value: the value that is returned", None),
        (".. deprecated:: 1.0 use another one", None),
        ("Deprecated since the first version.", None),
        ("See :func:`another` for what is done.", None),
        ("TODO: write down what it does.", None),
        ("{inheritdoc} and the value.", None),
        ("Return the na\u00efve value.", None),
        ("Return the value that is\n    most often given", None),
        ("Return the value of the", None),
        ("This is called by the value.", None),
    ],
)
def test_only_a_sentence_of_prose_is_a_completion(tmp_path: Path, docstring: str, completion: str | None) -> None:
    root = _put(tmp_path / "src", {"one.py": _function("f", docstring)})
    assert _completions(root) == ([] if completion is None else [completion])


@pytest.mark.parametrize(
    "source",
    [
        'def f():\n    """Return the value given."""\n',
        'def f():\n    """Return the value given."""\n    pass\n',
        'def f():\n    """Return the value given."""\n    ...\n',
        'def f():\n    """Return the value given."""\n    raise NotImplementedError("later")\n',
        'def f(): """Return the value given."""; return 1\n',
        'def __len__(self):\n    """Return the value given."""\n    return 1\n',
        'def f():\n    """Return the value given."""\n    # return the VALUE given\n    return 1\n',
        '# Code generated by a tool.\ndef f():\n    """Return the value given."""\n    return 1\n',
    ],
)
def test_functions_that_teach_nothing_are_left_out(tmp_path: Path, source: str) -> None:
    assert _completions(_put(tmp_path / "src", {"one.py": source})) == []


def test_bad_and_unwanted_files_are_skipped(tmp_path: Path) -> None:
    unwanted = [
        "tests/a.py",
        "test_a.py",
        "_vendor/a.py",
        "pkg/site-packages/a.py",
        "a-b/a.py",
        "a_pb2.py",
        "a.txt",
        "emloc_ray/a.py",
    ]
    files: dict[str, str | bytes] = {
        name: _function(f"f{i}", f"Return the unwanted value {i}.", f"return {i}") for i, name in enumerate(unwanted)
    }
    files |= {
        "syntax.py": "def f(:\n",
        "null.py": b"x = 1\0\n",
        "not_utf8.py": b"x = '\xff'\n",
        "no_codec.py": b"# -*- coding: klingon -*-\n",
        "deep.py": "x = " + "-" * 50_000 + "1",
        "long_chain.py": "if x:\n    pass\n" + "elif x:\n    pass\n" * 1_500,
        "huge.py": _function("huge", "Return the huge value.") + "#" * 1_000_000,
        "latin.py": "# -*- coding: latin-1 -*-\n# \u00e9\n".encode("latin-1")
        + _function("g", "Keep it safe.").encode(),
        "escape.py": _function("h", "Return a pattern for digits.", "return '\\d' + value"),
    }
    root = _put(tmp_path / "src", files)
    (root / "dangling.py").symlink_to(root / "nowhere.py")
    assert _completions(root) == ["Keep it safe.", "Return a pattern for digits."]


def test_duplicates_are_kept_once(tmp_path: Path) -> None:
    same_completion = {
        f"c{i}.py": _function(f"f{i}", f"{'Return  the' if i else 'Return THE'} only value.", f"return {i}")
        for i in range(8)
    }
    same_prompt = {f"p{i}.py": _function("same", f"Describe it in way {i}.") for i in range(8)}
    completions = _completions(_put(tmp_path / "src", same_completion | same_prompt))
    assert len(completions) == 2
    assert completions[0].startswith("Describe it in way")
    assert completions[1].lower() == "return the only value."


def test_caps_hold_for_modules_packages_and_all(tmp_path: Path) -> None:
    root = _many_modules(tmp_path / "src")
    _put(root, {"other.py": _function("f", "Return another thing.")})
    task = replace(ANY_NUMBER, max_rows_per_module=2, max_rows_per_package=31)
    modules = [row["module"] for row in _rows(root, task)]
    assert len([module for module in modules if module.startswith("pkg.")]) == 31
    assert max(modules.count(module) for module in modules) == 2
    assert "other" in modules
    assert len(_rows(root, replace(ANY_NUMBER, max_rows=17))) == 17


def test_no_module_stands_in_two_splits_and_all_get_some(tmp_path: Path) -> None:
    counts = write_task(tmp_path / "out", ANY_NUMBER, [_many_modules(tmp_path / "src")])
    modules = [set(table["module"].to_pylist()) for table in _tables(tmp_path / "out").values()]
    assert sum(len(names) for names in modules) == len(set.union(*modules)) == 60
    assert list(counts) == list(SPLIT_FRACTIONS)
    assert sum(counts.values()) == 300
    assert max(counts, key=lambda name: counts[name]) == "train"
    assert min(counts.values()) > 0


def test_the_same_sources_and_seed_give_the_same_files_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = os.walk
    contents: list[list[bytes]] = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        out_dir = tmp_path / f"{name}_out"
        write_task(out_dir, replace(ANY_NUMBER, max_rows=100, seed=seed), [_many_modules(tmp_path / name)])
        assert sorted(path.name for path in out_dir.iterdir()) == sorted(
            f"{split}.parquet" for split in SPLIT_FRACTIONS
        )
        # The next trees are listed back to front, as another file system might.
        monkeypatch.setattr(os, "walk", lambda root: [(at, subs, names[::-1]) for at, subs, names in walk(root)][::-1])
        contents.append([(out_dir / f"{split}.parquet").read_bytes() for split in SPLIT_FRACTIONS])
    assert contents[0] == contents[1]
    assert contents[0] != contents[2]


def test_too_few_rows_is_an_error_that_says_where(tmp_path: Path) -> None:
    root = _put(tmp_path / "src", {"one.py": _function("f", "Return the value.")})
    with pytest.raises(DataError, match=r"found 1 usable .*src.* needs 3000") as caught:
        write_task(tmp_path / "out", TASK, [root])
    assert str(root) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.deep
def test_the_installed_sources_give_enough_clean_rows(installed: dict[str, list[dict[str, str]]]) -> None:
    rows = [row for split in installed.values() for row in split]
    assert len(rows) >= 3_000
    assert all(len(row["prompt"]) <= 280 and row["prompt"].endswith(LEAD) for row in rows)
    assert all(row["completion"].endswith(".") and 3 <= len(row["completion"].split()) <= 30 for row in rows)
    assert not [row for row in rows if row["completion"].rstrip(".").lower() in " ".join(row["prompt"].lower().split())]
    assert len({row["completion"].lower() for row in rows}) == len({row["prompt"] for row in rows}) == len(rows)
    assert not [row["module"] for row in rows if "test" in row["module"].split(".")]
    shares = {name: len(split) / len(rows) for name, split in installed.items()}
    assert shares == pytest.approx(SPLIT_FRACTIONS, abs=0.04)


def test_no_module_is_imported_to_be_read(tmp_path: Path) -> None:
    root = _put(tmp_path / "src", {"explosive_module.py": _function("f", "Return the value.") + "raise SystemExit\n"})
    assert _completions(root) == ["Return the value."]
    assert "explosive_module" not in sys.modules
