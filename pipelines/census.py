"""The census: every causal-LM and image-text type of the installed transformers, tiny, through every stage, without Ray.

    python pipelines/census.py                       # all types that have no row yet: most of an hour
    python pipelines/census.py --only llama,gpt_oss  # these, anew
    python pipelines/census.py --again fails         # those with this outcome, anew

A type's default config is made tiny by rules (few layers, one of each kind; narrow; 300 tokens). First plain transformers and
PEFT have to build, save, load and train it: that is the ``baseline``. Then it is validated, calibrated resident, offloaded
and block by block with the same sums, factorized, trained for two steps, corrected and merged; the merged model has to
predict what the adapter does on the original. Rows are text. Each type has a process of its own and a minute.

``pipelines/results/census.json`` keeps a row for each type. Outcomes: ``works``; ``refused``, with the sentence; ``fails``,
with the error; ``no baseline``, with the reason: transformers', PEFT's, or that the rules make no such config.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from censusing.baseline import build, plain_training
from censusing.pipeline import STAGES, run_stages
from censusing.tiny_configs import tiny_config
from tokenizer import byte_level
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from emloc_ray.errors import EmlocError

RESULTS = Path(__file__).parent / "results" / "census.json"
_LIMIT_S = 60
_TEXT_IDS = 250  # of the vocabulary: higher ones may stand for images and the like
Row = dict[str, Any]


def all_types() -> list[str]:
    """The types, causal language models first."""
    return list(dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]))


def row_of(model_type: str, limit_s: float = _LIMIT_S) -> Row:
    """The type's row, from a process of its own that is ended after ``limit_s`` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        file, begin = Path(folder) / "row.json", time.monotonic()
        child = os.fork()
        if not child:
            _write_row(model_type, Path(folder), file)
            os._exit(0)
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() - begin > limit_s:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.02)
        row: Row = json.loads(file.read_text()) if file.is_file() else {"baseline": False}
        if "outcome" not in row:  # it was killed
            outcome = "fails" if row["baseline"] else "no baseline"
            row |= {"outcome": outcome, "why": f"ended by a signal, or after {limit_s:.0f} s"}
        seconds = round(time.monotonic() - begin, 1)
    kind = "causal-lm" if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "image-text"
    return {"kind": kind, **row, "seconds": seconds}


def row_here(model_type: str) -> Row:
    """The type's row, from this process."""
    with tempfile.TemporaryDirectory() as folder:
        _write_row(model_type, Path(folder), Path(folder) / "row.json")
        return json.loads((Path(folder) / "row.json").read_text())


def _write_row(model_type: str, folder: Path, file: Path) -> None:
    """Runs the type, in the child; the row is written before each part, for a parent that finds it dead."""
    warnings.simplefilter("ignore")
    row: Row = {"baseline": False, "outcome": "no baseline"}
    done: dict[str, float] = {}
    try:
        ids = torch.randint(2, _TEXT_IDS, (2, 16), generator=torch.Generator().manual_seed(1))
        model = build(tiny_config(model_type), folder / "model")
        byte_level().save_pretrained(folder / "model")
        row |= {"parameters": model.num_parameters()}
        del model
        plain_training(folder / "model", ids, folder / "plain")
        row |= {"baseline": True, "outcome": "works"}
        file.write_text(json.dumps({key: value for key, value in row.items() if key != "outcome"}))
        run_stages(folder / "model", folder / "run", ids, done)
    except EmlocError as error:
        row |= {"outcome": "refused" if row["baseline"] else row["outcome"], "why": str(error)}
    except BaseException as error:  # noqa: BLE001  whatever ends it is its row
        row |= {"outcome": "fails" if row["baseline"] else row["outcome"], **_described(error)}
    if row["outcome"] in ("fails", "refused"):
        row["stage"] = next(
            stage for stage in STAGES if stage not in done and not (stage == "by_blocks" and len(done) > 3)
        )
    file.write_text(json.dumps({**row, "why": _shown(row["why"], folder)} if "why" in row else row))


def _shown(text: str, folder: Path) -> str:
    return " ".join(text.replace(f"{folder}/", "").split())[:300]


def _described(error: BaseException) -> Row:
    """The error, and the last line of ours or of transformers' that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "emloc_ray" in frame.filename or "transformers/models" in frame.filename]
    last = (ours or frames)[-1]
    place = f"{Path(last.filename).name}:{last.lineno}"
    return {"why": f"{type(error).__name__}: {error}", "at": place}


def write_results(path: Path, rows: dict[str, Row]) -> None:
    """The JSON, its rows in the order of their names."""
    versions = {"transformers": transformers.__version__, "peft": peft.__version__}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows))
    head = f'"kind": "census",\n "versions": {json.dumps(versions)}'
    path.write_text(f'{{{head},\n "rows": {{\n{lines}\n }}}}\n')


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked for; prints each row and the sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="types, separated by commas")
    parser.add_argument("--again", help="the outcome of the types to run anew")
    parser.add_argument("--limit", type=float, default=_LIMIT_S, help="seconds a type")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    rows: dict[str, Row] = json.loads(given.out.read_text())["rows"] if given.out.is_file() else {}
    types = given.only.split(",") if given.only else [name for name in all_types() if name not in rows]
    if given.again:
        types = [name for name, row in rows.items() if row["outcome"] == given.again]
    torch.set_num_threads(1)
    row_here("llama")  # what stages import as they run is then there for all
    gc.collect()
    gc.freeze()  # what is imported is not looked through again by each collection in a child
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in types:
        rows[name] = row_of(name, given.limit)
        write_results(given.out, rows)
        print(f"{name}: {rows[name]['outcome']} ({rows[name]['seconds']} s) {rows[name].get('why', '')}", flush=True)
    counts = Counter(row["outcome"] for row in rows.values())
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
