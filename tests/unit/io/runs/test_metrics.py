"""metrics.json: what was written comes back, and nothing else."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from emloc_ray.errors import ArtifactError
from emloc_ray.io.runs.metrics import read_metrics, write_metrics

METRICS: dict[str, Any] = {
    "evaluation": {"merged": {"loss": 0.1 + 0.2}},
    "é": [math.inf, (1, None)],
    "ranks": {8: 1},
}
READ: dict[str, Any] = {**METRICS, "é": [math.inf, [1, None]], "ranks": {"8": 1}}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_metrics(tmp_path / "metrics.json", METRICS)
    return tmp_path / "metrics.json"


def test_what_was_written_comes_back(place: Path) -> None:
    assert read_metrics(place) == READ
    assert read_metrics(place.with_name("other.json")) == {}


def test_another_layout_is_the_same_content(place: Path) -> None:
    place.write_text(json.dumps(json.loads(place.read_text()), separators=(",", ":")))
    assert read_metrics(place) == READ


def test_the_locale_changes_nothing(place: Path) -> None:
    code = (
        "import pathlib, sys\n"
        "from emloc_ray.io.runs.metrics import read_metrics\n"
        "assert not sys.flags.utf8_mode\n"
        "print(len(read_metrics(pathlib.Path(sys.argv[1]))))"
    )
    ascii_alone = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(place)], env=ascii_alone, capture_output=True, text=True, timeout=300
    )
    assert done.stdout == "3\n", done.stderr


@pytest.mark.parametrize(
    ("before", "after"),
    [("merged", "mergee"), ("merged", "\\ud800"), ('"loss": 0.3', '"loss": 0.4'), ("1,", '"1",')],
    ids=["a key", "half of a surrogate pair", "a number", "another kind"],
)
def test_a_change_is_told(place: Path, before: str, after: str) -> None:
    written = place.read_text()
    assert before in written
    place.write_text(written.replace(before, after))
    with pytest.raises(ArtifactError, match=r"metrics\.json was changed after it was written: remove it, and give"):
        read_metrics(place)


@pytest.mark.parametrize(
    ("content", "what"), [("{", "is not JSON"), ("[" * 10**6, "is not JSON"), ("[]", "holds no mapping")]
)
def test_what_is_no_mapping_is_told(place: Path, content: str, what: str) -> None:
    place.write_text(content)
    with pytest.raises(ArtifactError, match=f"metrics.json {what}: remove it, and give the run's command again"):
        read_metrics(place)
