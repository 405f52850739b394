"""What a family that reads images has beside what all have (test_families.py): its pixels, and parts at ratios of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import cases
from image_rows import NUM_ROWS
from PIL import Image
from small_runs import FinishedRun
from transformers import AutoProcessor
from vlms import VLMS

from emloc_ray.config.reading import parse_config
from emloc_ray.data.processors import ImageInputs
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.formats.grams import GramStore
from emloc_ray.planning.prepared import prepare


@pytest.fixture(scope="module", params=cases(VLMS))
def run(request: pytest.FixtureRequest, family_run: Callable[[str], FinishedRun]) -> FinishedRun:
    """A family's run."""
    return family_run(request.param)


def test_every_image_came_through(run: FinishedRun) -> None:
    shown = 0
    for split in ("train", "selection", "eval"):
        shards = TokenShards(run.root / "data" / "tokens" / split)
        rows = [shards.row(position) for position in range(len(shards))]
        assert shards.index["images"] == sum(len(row.images) for row in rows)
        shown += shards.index["images"]
        assert all(image.end <= row.completion_mask.index(True) for row in rows for image in row.images)
    assert shown == NUM_ROWS * 5 // 6


def test_every_part_has_its_grams_and_its_update(run: FinishedRun) -> None:
    """Vision tower, projector and language model alike."""
    store = GramStore(run.root / "calibration")
    linears = [name for names in store.index["groups"].values() for name in names]
    ours, theirs = Checkpoint(run.root / "merged"), Checkpoint(run.model_dir)
    changed = [name for name in theirs.entries if not torch.equal(ours.read(name), theirs.read(name))]
    for part in ("vision_tower|visual", "projector|merger", "language_model|model.layers"):
        of_part = [name for name in theirs.entries if any(piece in name for piece in part.split("|"))]
        if not any(name.endswith(".weight") and len(theirs.entry(name).shape) == 2 for name in of_part):
            continue  # Gemma 3's projection is a parameter of its own
        for names in (linears, changed):
            assert any(piece in name for piece in part.split("|") for name in names), part


def test_each_part_is_at_its_own_ratio_and_images_are_processed_as_before(run: FinishedRun) -> None:
    layout = prepare(parse_config(run.values)).layout
    for spec in layout.specs:
        part = "projector" in spec.name or "merger" in spec.name
        ratio = 0.6 if part and "visual" not in spec.name else 0.7 if "vis" in spec.name else 0.5
        kept = layout.kept(spec) / spec.num_parameters
        assert kept <= ratio
        assert kept > ratio - (spec.out_features + spec.in_features) / spec.num_parameters
    for folder in ("emulator", "merged"):
        processor = AutoProcessor.from_pretrained(run.root / folder)
        assert processor.chat_template
        assert (
            processor.image_processor.to_dict()
            == AutoProcessor.from_pretrained(run.model_dir).image_processor.to_dict()
        )


@torch.no_grad()
def test_pixels_are_those_of_the_processor(run: FinishedRun) -> None:
    """What the worker makes of a batch is what the processor makes of the same rows, text and all."""
    processor = AutoProcessor.from_pretrained(run.model_dir)
    folder = run.root.parent / "rows"
    texts, images = [], []
    for number in (0, 1, 3):
        shown = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which?"}]}
        texts.append(processor.apply_chat_template([shown], tokenize=False))
        images.append([Image.open(folder / f"{number}.png")])
    expected = processor(text=texts, images=images, padding=True, return_tensors="pt")
    content = [[(folder / f"{number}.png").read_bytes()] for number in (0, 1, 3)]
    found = ImageInputs(run.model_dir)(content, expected["input_ids"])
    assert set(found) == set(expected) - {"input_ids", "attention_mask"}
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key
