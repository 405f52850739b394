"""What a training is made from, a run's fine-tuning and its healing alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emloc_ray.config.adapter import AdapterConfig
    from emloc_ray.config.finetune import FinetuneConfig
    from emloc_ray.planning.layout import Layout


@dataclass(frozen=True)
class Training:
    """A training's settings, its adapter, the layout of the model that it trains on, and the split that it reads."""

    section: FinetuneConfig
    adapter: AdapterConfig
    layout: Layout
    split: str = "train"
