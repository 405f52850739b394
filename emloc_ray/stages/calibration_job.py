"""What every calibration slot needs to know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from emloc_ray.modeling.loss import label_mask

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class CalibrationJob:
    """Artifact paths and flat settings; ``groups`` are linears that read the same tensor.

    ``waves`` splits the groups into parts whose Grams are gathered one part after the other, each in a pass of its own.
    ``shards`` are the token shards that count, ``[begin, end)``.
    """

    model_dir: Path
    tokens_dir: Path
    groups: Groups
    shards: tuple[int, int]
    tokens: str = "all"
    batch_size: int = 8
    pad_token_id: int = 0
    model_options: tuple[tuple[str, Any], ...] = ()
    mode: str = "resident"
    waves: tuple[Groups, ...] | None = None

    def shards_of(self, slot: int, num_slots: int) -> range:
        """The token shards of a slot: every ``num_slots``-th from its own number on."""
        return range(self.shards[0] + slot, self.shards[1], num_slots)


def counted_tokens(batch: dict[str, Tensor], tokens: str) -> Tensor:
    """Which tokens ``(rows, length)`` of a batch count: all but padding, or those of the completion."""
    return batch["attention_mask"].bool() if tokens == "all" else label_mask(batch, "completion")
