"""The most memory that a worker of the data or of the correction takes for itself, in bytes, beside its imports.

python tests/measured_worker.py data VOCABULARY TOKENS FOLDER
python tests/measured_worker.py correct HIDDEN INTERMEDIATE R FOLDER
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measured_run import Meter
from stage_artifacts import write_lora
from tiny import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from emloc_ray.core.correction import Candidate, Difference, canonical_form
from emloc_ray.data.reading import scan
from emloc_ray.data.splits import RowSelection
from emloc_ray.data.tokenizing import ShardTokenizer, TokenizeOptions
from emloc_ray.data.units import shard_units
from emloc_ray.modeling.adapter_files import Adapter
from emloc_ray.modeling.architecture import block_linears, empty_model
from emloc_ray.stages.correct.correct import finish
from emloc_ray.stages.correct.job import CorrectionJob, module_groups
from emloc_ray.stages.correct.modules import CorrectableModule, write_modules

ROWS = 512


def save_tokenizer(size: int, directory: Path) -> Path:
    """One of so many tokens, of one byte or two."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(itertools.islice(itertools.product(bytes_, bytes_), size - len(bytes_) - 1))
    tokens = ["<eos>", *bytes_, *(first + second for first, second in merges)]
    core = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(directory)
    (directory / "config.json").write_text("{}")
    return directory


def tokenize(meter: Meter, vocabulary: int, tokens: int, folder: Path) -> None:
    """Two batches of rows of about so many tokens."""
    letters = itertools.cycle("abcdefghijklmnopqrstuvwxyz ")
    rows = ("".join(itertools.islice(letters, 2 * tokens)) for _ in range(ROWS))
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    selection = RowSelection.all_rows((scan(data),))
    make_tokenizer().save_pretrained(folder / "tiny")
    (folder / "tiny" / "config.json").write_text("{}")
    save_tokenizer(vocabulary, folder / "large")

    def work(tokenizer: str, selection: RowSelection) -> None:
        options = TokenizeOptions(str(folder / tokenizer), "text", tokens)
        worker = ShardTokenizer(options, {"train": selection}, folder / "of" / tokenizer)
        worker({"unit": [json.dumps(unit) for unit in shard_units("train", selection, ROWS)]})

    work("tiny", selection.sample(1, 0))  # imports
    with meter.during("data"):
        work("large", selection)


def correct(meter: Meter, hidden: int, intermediate: int, r: int, folder: Path) -> None:
    """The adapter of one block."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=1, num_attention_heads=8, vocab_size=300
    )
    specs = tuple(block_linears(empty_model(config)))
    adapter = Adapter(write_lora(folder / "adapter", specs, r))
    places: dict[str, Any] = {
        "model_dir": folder,
        "emulator_dir": folder,
        "selection_dir": folder,
        "tokens_dir": folder,
    }
    job = CorrectionJob(
        **places,
        calibration_dir=None,
        adapter_dir=adapter.directory,
        out_dir=folder / "out",
        specs=specs,
        candidates=(Candidate("adapted"),),
    )

    def module(name: str) -> CorrectableModule:
        lora = adapter.module(name)
        form = canonical_form(lora.lora_a, lora.lora_b)
        wide, inner = torch.ones_like(form.b), torch.eye(form.b.shape[1]).double()
        return CorrectableModule(
            lora, form, Difference(wide, wide.clone(), inner, 1e9, 0.0, wide.clone(), inner.clone())
        )

    for group in module_groups(job, adapter.names):
        write_modules(group.path, [module(spec.name) for spec in group.specs])
    with meter.during("correct"):
        finish(job)


def main() -> None:
    """Works, and says it."""
    torch.set_num_threads(1)
    meter, ways = Meter(), dict[str, Callable[..., None]](data=tokenize, correct=correct)
    ways[sys.argv[1]](meter, *map(int, sys.argv[2:-1]), Path(sys.argv[-1]))
    sys.stdout.write(f"{meter.peaks[sys.argv[1]]}\n")


if __name__ == "__main__":
    main()
