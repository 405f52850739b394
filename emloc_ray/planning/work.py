"""How much a run reads and computes: its rows, their tokens, and the multiply-adds of a token."""

from __future__ import annotations

from typing import Any

from emloc_ray.data.formats import EXTRA_FIELDS, FIELDS
from emloc_ray.data.images import encoded_bytes, image_parts
from emloc_ray.data.reading import Place, Row, read_rows
from emloc_ray.planning.layout import Layout
from emloc_ray.planning.prepared import UNKNOWN_ROWS, Prepared
from emloc_ray.planning.sizes import Lengths

_CHARACTERS_PER_TOKEN = 3.5
_VQA_TOKENS = 24.0  # of a question and its answer
_VQA_BYTES = 2000.0  # of its image
_IMAGE_BYTES = 100e3  # of a photograph that was not read
# Corrections that auto tries at most.
_CANDIDATES = 7


def row_lengths(prepared: Prepared) -> Lengths:
    """Tokens a row, estimated from the first rows' characters and images.

    Rows of the docstring task are about 80 tokens long. Rows of the hub, which are not here before the run, count as long as
    rows may be.
    """
    data, sources = prepared.config.data, prepared.files.get("train")
    limit, shown = data.max_seq_length, prepared.layout.image.row_tokens
    if data.generate == "vqa":
        asked = _VQA_TOKENS + shown
        return Lengths(min(asked, limit), min(asked + _VQA_TOKENS, limit), 1.0, _VQA_BYTES)
    if data.packing or (not sources and data.generate is None):
        images = limit // shown if shown and data.format == "messages" and not data.packing else 0
        # As many images as fit count for memory, which may run out; one counts for the disk.
        return Lengths(limit, limit, images, _IMAGE_BYTES if images else 0.0)
    if not sources:
        return Lengths(80.0, min(limit, 256.0))
    numbers = range(min(200, sources[0].num_rows))
    tokens, images, size = [], 0, 0
    fields, extra = FIELDS[data.format], EXTRA_FIELDS[data.format]
    for number, row in read_rows(sources[0], numbers, fields, extra, data.on_error == "skip"):
        count = 0
        if data.format == "messages":
            count = sum(1 for _ in image_parts(row))
            size += encoded_bytes(row, Place.of(sources[0], number).folder)
        tokens.append(_characters(row) / _CHARACTERS_PER_TOKEN + shown * count)
        images += count
    mean = min(sum(tokens) / len(tokens), limit)
    return Lengths(mean, min(1.25 * max(tokens), limit), images / len(tokens), size / len(tokens))


def _characters(row: Row) -> int:
    """The characters of a row's text; images inside messages have none."""
    turns = row.get("messages")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return sum(len(value) for value in row.values() if isinstance(value, str))
    contents = [turn.get("content") for turn in turns]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    return sum(len(str(part.get("text") or "") if isinstance(part, dict) else str(part)) for part in parts)


def num_steps(config: Any, num_rows: int) -> int:
    """Optimizer steps of a run: ``max_steps``, or what ``num_train_epochs`` of the rows make."""
    finetune = config.finetune
    if finetune.max_steps > 0:
        return int(finetune.max_steps)
    rows_per_step = finetune.per_device_train_batch_size * finetune.gradient_accumulation_steps * finetune.num_workers
    return max(1, round(finetune.num_train_epochs * num_rows / rows_per_step))


def num_train_rows(prepared: Prepared) -> int:
    """Rows to train on, estimated where they are made or downloaded later."""
    return sum(source.num_rows for source in prepared.files.get("train", ())) or UNKNOWN_ROWS


def rows_trained(prepared: Prepared) -> int:
    """Rows that all steps of the fine-tuning read together."""
    finetune = prepared.config.finetune
    rows = finetune.per_device_train_batch_size * finetune.gradient_accumulation_steps * finetune.num_workers
    return rows * num_steps(prepared.config, num_train_rows(prepared))


def rows_selected_on(prepared: Prepared) -> float:
    """Rows that all candidates of the correction read together; none where there is nothing to choose."""
    section = prepared.config.correction
    if section.method != "auto" or not prepared.layout.differs:
        return 0
    rows: float = section.num_selection_samples * _CANDIDATES
    return rows if section.max_share is None else min(rows, section.max_share * rows_trained(prepared))


def tokens_calibrated(prepared: Prepared, lengths: Lengths) -> float:
    """Tokens of a calibration pass; none where the emulator is the original."""
    return prepared.calibration_tokens(lengths.mean) if prepared.layout.differs else 0.0


def block_work(layout: Layout) -> float:
    """Multiply-adds of a token in the blocks' linears of the original."""
    return sum(spec.token_share * spec.num_parameters for spec in layout.specs)


def emulator_work(layout: Layout) -> float:
    """Multiply-adds of a token in the blocks' linears of the emulator."""
    return sum(spec.token_share * layout.kept(spec) for spec in layout.specs)


def head_work(layout: Layout) -> float:
    """Multiply-adds of a token in the head, where a quarter of the tokens are labels."""
    return layout.head_parameters * 0.25
