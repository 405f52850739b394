"""Rows of any number, and the tiny model whose tokenizer reads them: what the benchmark of the data path is fed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_WORDS = ("the", "sum", "of", "two", "numbers", "is", "what", "a", "function", "takes", "and", "gives", "back")


def save_tiny_model(directory: Path) -> None:
    """A Llama of a few thousand weights and a byte-level tokenizer of 512 tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special, alphabet = ["<pad>", "<eos>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator((row["prompt"] + row["completion"] for row in _rows(1000)), trainer)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=512
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>").save_pretrained(directory)


def _rows(count: int) -> Iterator[dict[str, str]]:
    """Rows of about thirty tokens, no two alike."""
    for number in range(count):
        words = " ".join(_WORDS[(number * step + step) % len(_WORDS)] for step in range(1, 9))
        yield {"prompt": f"Row {number}: {words}\n", "completion": f"its number is {number}"}


def write_jsonl(path: Path, count: int) -> None:
    """One object a line."""
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in _rows(count))


def write_parquet(path: Path, count: int) -> None:
    """One row group, the hardest case: it can only be read from its beginning."""
    pq.write_table(pa.Table.from_pylist(list(_rows(count))), path, row_group_size=count)
