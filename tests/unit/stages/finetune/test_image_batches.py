"""A training's batches of images: processed by another thread than the one that trains."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import PAD
from torch import Tensor
from vlms import save_vlm

from emloc_ray.data.formats import Tokens
from emloc_ray.data.ingest import SampleOrder
from emloc_ray.data.processors import ImageInputs
from emloc_ray.data.token_shards import collate, shard_name, write_index, write_shard
from emloc_ray.modeling.loading import load_model
from emloc_ray.stages.finetune.batches import CALL, RankBatches


def test_they_are_made_ahead_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_vlm("LLaVA", tmp_path / "model")
    blank = ImageInputs(directory).blank_row()
    rows = [Tokens([*blank.input_ids, 7 + number], [False] * len(blank) + [True], blank.images) for number in range(4)]
    write_shard(tmp_path / shard_name(0), rows, with_images=True)
    write_index(tmp_path, [4], {"images": 4})
    order, model = SampleOrder(4, 2, 0, 1, seed=0), load_model(directory)
    job: Any = SimpleNamespace(
        tokens_dir=tmp_path,
        images=ImageInputs(directory),
        pad_token_id=PAD,
        pack_length=None,
        teacher_dir=None,
        loss_on="completion",
        steps_before=0,
        max_steps=3,
    )
    threads: list[threading.Thread] = []
    process = ImageInputs.__call__

    def recorded(self: ImageInputs, images: Sequence[Sequence[bytes]], input_ids: Tensor) -> dict[str, Tensor]:
        threads.append(threading.current_thread())
        return process(self, images, input_ids)

    monkeypatch.setattr(ImageInputs, "__call__", recorded)
    batches = RankBatches(job, order, 1)
    batches.trainer = SimpleNamespace(model=model, state=SimpleNamespace(global_step=1))  # type: ignore[assignment]
    found = list(batches)
    assert len(threads) == 2
    assert threading.main_thread() not in threads
    for batch, numbers in zip(found, order.batches(1, 3), strict=True):
        expected = collate([rows[number] for number in numbers], PAD, ImageInputs(directory))
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert torch.equal(batch["pixel_values"], expected["pixel_values"])
        assert "attention_mask" not in batch
        assert len(batch[CALL].targets) == 2
