"""The benchmark of the data path: rows of any number, the tiny model whose tokenizer reads them, and what that took."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizer import byte_level
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.figures import Figures, figure

_WORDS = ("the", "sum", "of", "two", "numbers", "is", "what", "a", "function", "takes", "and", "gives", "back")

POWERS = (3, 6)  # of ten: few rows, and many
_SPEEDS = {"rows/s": "into shards", "batch rows/s": "into batches"}


def data(out: Path) -> Figures:
    """Rows to shards to batches, 10⁶ of them against 10³, from JSONL and from a single Parquet row group.

    Memory is anonymous: most of it is the libraries, imported in each process.
    """
    _save_tiny_model(out / "data-model")
    few, many = POWERS
    figures: Figures = {}
    for kind, write in (("JSONL", _write_jsonl), ("Parquet, one row group", _write_parquet)):
        rows = out / f"rows.{kind.partition(',')[0].lower()}"
        measured = {}
        for power in POWERS:
            write(rows, 10**power)
            measured[power] = _probe(out / "data-model", rows)
            rows.unlink()
        begin, baseline = f"10^{many} rows of {kind}", f"(baseline: 10^{few} rows)"
        for name in ("driver", "worker", "object store"):
            sizes = [max(measured[power][name] / 2**20, 0.01) for power in (many, few)]
            figures[f"{begin}, peak of the {name}"] = figure(sizes[0], sizes[1], f"MiB {baseline}")
        for name, where in _SPEEDS.items():
            rates = [measured[power][name] for power in (many, few)]
            line = figure(rates[0], rates[1], f"rows/s {baseline}")
            figures[f"{begin}, {where}"] = {**line, "ratio": rates[0] / rates[1]}
    return figures


def _probe(model: Path, rows: Path) -> dict[str, float]:
    """What a process of its own measured."""
    script = Path(__file__).with_name("data_probe.py")
    with tempfile.TemporaryDirectory(dir=rows.parent) as folder:
        command = [sys.executable, str(script), str(model), str(rows), folder]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def _save_tiny_model(directory: Path) -> None:
    """A Llama of a few thousand weights and a byte-level tokenizer of 512 tokens."""
    tokenizer = byte_level((row["prompt"] + row["completion"] for row in _rows(1000)), 512)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=512
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _rows(count: int) -> Iterator[dict[str, str]]:
    """Rows of about thirty tokens, no two alike."""
    for number in range(count):
        words = " ".join(_WORDS[(number * step + step) % len(_WORDS)] for step in range(1, 9))
        yield {"prompt": f"Row {number}: {words}\n", "completion": f"its number is {number}"}


def _write_jsonl(path: Path, count: int) -> None:
    """One object a line."""
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in _rows(count))


def _write_parquet(path: Path, count: int) -> None:
    """One row group, the hardest case: it can only be read from its beginning."""
    pq.write_table(pa.Table.from_pylist(list(_rows(count))), path, row_group_size=count)
