"""Ray Data reads, formats and tokenizes every split into token shards with fixed boundaries."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emloc_ray.data.formats import Tokens, check_row, pack, tokenize_row, truncate
from emloc_ray.data.reading import SourceFile, read_rows
from emloc_ray.data.splits import RowSelection
from emloc_ray.data.token_shards import shard_name, write_index, write_shard
from emloc_ray.errors import DataError

_COUNTS = ("rows", "tokens", "truncated_rows", "truncated_tokens", "dropped_rows")


@dataclass(frozen=True)
class TokenizeOptions:
    """How rows become tokens; equal options and equal rows give equal shards."""

    tokenizer: str
    format: str
    max_seq_length: int
    packing: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True)
class ShardTokenizer:
    """Turns a unit of rows into a shard file: a Ray Data function without state, so that it can run anywhere again."""

    options: TokenizeOptions
    sources: dict[str, Sequence[SourceFile]]
    out_dir: Path

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        results = [self._unit(json.loads(unit)) for unit in batch["unit"]]
        return {key: np.array([result[key] for result in results]) for key in results[0]}

    def _unit(self, unit: dict[str, Any]) -> dict[str, Any]:
        counts = dict.fromkeys(_COUNTS, 0)
        kept: list[Tokens] = []
        sources = self.sources[unit["split"]]
        tokenizer = _tokenizer(self.options.tokenizer, self.options.trust_remote_code)
        for file, numbers in unit["parts"]:
            for number, row in read_rows(sources[file], numbers):
                where = f"{sources[file].path}, row {number + 1}"
                check_row(row, self.options.format, where)
                tokens = tokenize_row(row, self.options.format, tokenizer, where)
                cut = truncate(tokens, self.options.max_seq_length)
                counts["truncated_rows"] += len(tokens) > self.options.max_seq_length
                counts["truncated_tokens"] += max(0, len(tokens) - self.options.max_seq_length)
                counts["dropped_rows"] += cut is None
                if cut is not None:
                    kept.append(cut)
        if self.options.packing:
            kept = pack(kept, self.options.max_seq_length)
        write_shard(self.out_dir / unit["split"] / shard_name(unit["shard"]), kept)
        counts.update(rows=len(kept), tokens=sum(map(len, kept)))
        return {"split": unit["split"], "shard": unit["shard"], **counts}


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    # Rows are cut to max_seq_length here and counted, so the tokenizer's own warning would mislead.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def tokenize_splits(
    splits: dict[str, RowSelection],
    options: TokenizeOptions,
    out_dir: Path,
    *,
    rows_per_shard: dict[str, int],
    num_workers: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, int]]:
    """Writes ``out_dir/SPLIT/shard-*.arrow`` and an index for each split; returns what was counted.

    Raises:
        DataError: for the first bad row, with file, row and field; or where a split keeps no row.
    """
    import ray.data

    # Wrapped in Ray Data's own exception, ours would be lost on its way here.
    ray.data.DataContext.get_current().raise_original_map_exception = True
    units = [
        {"split": split, "shard": number, "parts": parts}
        for split, selection in splits.items()
        for number, parts in enumerate(selection.units(rows_per_shard[split]))
    ]
    dataset = ray.data.from_items([{"unit": json.dumps(unit)} for unit in units]).map_batches(
        ShardTokenizer(options, {name: s.sources for name, s in splits.items()}, out_dir),
        batch_size=1,
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=num_workers),
    )
    results = []
    for result in dataset.iter_rows():
        results.append(result)
        progress(len(results), len(units))
    return {split: _write_split_index(split, results, options, out_dir / split) for split in splits}


def _write_split_index(
    split: str, results: list[dict[str, Any]], options: TokenizeOptions, directory: Path
) -> dict[str, int]:
    shards = sorted((r for r in results if r["split"] == split), key=lambda r: r["shard"])
    counts = {key: int(sum(shard[key] for shard in shards)) for key in _COUNTS}
    if counts["rows"] == 0:
        raise DataError(
            f"data.{split}: no row keeps a completion token within data.max_seq_length {options.max_seq_length}:"
            " raise it."
        )
    write_index(directory, [int(shard["rows"]) for shard in shards], {**counts, "options": asdict(options)})
    return counts
