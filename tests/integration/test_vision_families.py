"""Every vision-language family through every stage: images by path, URL and bytes, beside rows that show none."""

from __future__ import annotations

import base64
import dataclasses
import http.server
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from small_runs import FinishedRun, make_values, run_values, write_jsonl
from transformers import AutoModelForImageTextToText, AutoProcessor
from vlms import VLMS, save_vlm

import emloc_ray  # noqa: F401
from emloc_ray.config_reading import parse_config
from emloc_ray.data.processors import ImageInputs
from emloc_ray.data.token_shards import TokenShards, collate
from emloc_ray.data.vqa import VqaTask, examples
from emloc_ray.io.checkpoint import Checkpoint
from emloc_ray.io.grams import GramStore
from emloc_ray.jobs import Jobs
from emloc_ray.modeling.inputs import model_call
from emloc_ray.modeling.loading import load_model
from emloc_ray.preparation import prepare
from emloc_ray.stages.calibrate import calibrate
from emloc_ray.stages.cluster import Resources

ONE = {"num_workers": 1}
NUM_ROWS = 48


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[[Path], str]]:
    """``serve(folder)``: the URL of a server of a folder's files."""
    servers = []

    def start(folder: Path) -> str:
        handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()


def write_task(folder: Path, url: str) -> Path:
    """Questions about charts, their images named in every way in turn; every sixth row shows none."""
    rows = []
    for number, example in enumerate(examples(VqaTask(num_rows=NUM_ROWS, image_size=40, kinds=("chart",)))):
        (folder / f"{number}.png").write_bytes(example.image)
        ways: list[dict[str, Any]] = [
            {"path": f"{number}.png"},
            {"url": f"{url}/{number}.png"},
            {"image": f"{folder}/{number}.png"},
            {"image": base64.b64encode(example.image).decode()},
            {"image": f"{url}/{number}.png"},
        ]
        shown = [] if number % 6 == 5 else [{"type": "image", **ways[number % 6]}]
        asked = [*shown, {"type": "text", "text": example.question}]
        rows.append(
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": example.answer}]}
        )
    return write_jsonl(folder / "rows.jsonl", rows)


@pytest.fixture(scope="module", params=VLMS)
def run(
    request: pytest.FixtureRequest,
    ray_session: None,
    tmp_path_factory: pytest.TempPathFactory,
    serve: Callable[[Path], str],
) -> FinishedRun:
    """A family's run, from a checkpoint as transformers saves it to the merged model."""
    root = tmp_path_factory.mktemp("vision")
    model_dir = save_vlm(request.param, root / "model")
    (root / "rows").mkdir()
    data = write_task(root / "rows", serve(root / "rows"))
    values = make_values(
        root / "run",
        model_dir,
        data,
        data={"format": "messages", "max_seq_length": 128},
        calibration={**ONE, "num_calibration_samples": 16},
        emulator={**ONE, "ratios": {r".*(vision_tower|visual)\..*": 0.7, r".*(projector|merger)\..*": 0.6}},
        finetune=ONE,
        correction={"method": "covariance"},
        merge=ONE,
        evaluation=ONE,
    )
    return FinishedRun(root / "run", values, model_dir, run_values(values))


def batch(run: FinishedRun, split: str = "eval") -> dict[str, torch.Tensor]:
    shards = TokenShards(run.root / "data" / "tokens" / split)
    return collate([shards.row(position) for position in range(len(shards))], 0, ImageInputs(run.model_dir))


@torch.no_grad()
def logits(model: Any, run: FinishedRun) -> torch.Tensor:
    call = model_call(model.config, batch(run))
    found: torch.Tensor = model(**call.inputs).logits[call.predicting]
    return found


def opened(directory: Path) -> tuple[Any, dict[str, Any]]:
    model, said = AutoModelForImageTextToText.from_pretrained(directory, output_loading_info=True)
    return model.eval(), said


def test_every_image_came_through(run: FinishedRun) -> None:
    shown = 0
    for split in ("train", "selection", "eval"):
        shards = TokenShards(run.root / "data" / "tokens" / split)
        rows = [shards.row(position) for position in range(len(shards))]
        assert shards.index["images"] == sum(len(row.images) for row in rows)
        shown += shards.index["images"]
        assert all(image.end <= row.completion_mask.index(True) for row in rows for image in row.images)
    assert shown == NUM_ROWS * 5 // 6


@torch.no_grad()
def test_calibrate(run: FinishedRun) -> None:
    """The Grams are the sums over every token and patch, each row run alone, in float64; all three parts have some."""
    model = load_model(run.model_dir).double()
    store = GramStore(run.root / "calibration")
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def reading(name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            sums[name] = sums.get(name, torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype)) + x.T @ x
            counts[name] = counts.get(name, 0) + len(x)

        return hook

    groups = store.index["groups"]
    for name in (name for names in groups.values() for name in names):
        model.get_submodule(name).register_forward_pre_hook(reading(name))
    shards = TokenShards(run.root / "data" / "tokens" / "calibration")
    for position in range(len(shards)):
        row = collate([shards.row(position)], 0, ImageInputs(run.model_dir), multiple=1)
        model(**model_call(model.config, row).inputs)
    for names in groups.values():
        for name in names:  # one sum stands for all that read the same tensor
            # A layer whose output nobody reads still reads its input.
            assert counts[name] == store.num_tokens(name)
            scale = float(sums[name].diagonal().max())
            torch.testing.assert_close(store.read(name).double(), sums[name], rtol=1e-3, atol=1e-5 * scale)
    for part in ("vision_tower|visual.blocks", "projector|merger", "language_model"):
        assert any(piece in name for piece in part.split("|") for name in sums), part


def test_streamed(run: FinishedRun, tmp_path: Path) -> None:
    """Block by block, the Grams are those of the whole model, the projector's too."""
    job = Jobs(prepare(parse_config(run.values)), run.model_dir).calibration()
    calibrate(dataclasses.replace(job, mode="streamed", waves=None), tmp_path, Resources())
    ours, whole = GramStore(tmp_path), GramStore(run.root / "calibration")
    assert ours.index["num_tokens"] == whole.index["num_tokens"]
    for name in whole.index["groups"]:
        scale = float(whole.read(name).diagonal().max())
        torch.testing.assert_close(ours.read(name), whole.read(name), rtol=1e-4, atol=1e-5 * scale)


def test_factorize(run: FinishedRun) -> None:
    """The emulator opens by the original's Auto class, each part at its own ratio, and processes images as the original."""
    _, said = opened(run.root / "emulator")
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
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


def test_finetune(run: FinishedRun) -> None:
    evaluation = run.metrics["evaluation"]
    assert evaluation["emulator_adapter"]["loss"] < evaluation["emulator"]["loss"] - 0.05
    assert run.metrics["exact_match"]["num_prompts"] == 2


def test_correct_and_merge(run: FinishedRun) -> None:
    """Plain PEFT opens the adapter on the original, images and all; the merged model gives the same, and is a plain one."""
    merged, said = opened(run.root / "merged")
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    original, _ = opened(run.model_dir)
    before = logits(original, run)
    adapted = logits(PeftModel.from_pretrained(original, run.root / "adapter").eval(), run)
    difference, scale = (logits(merged, run) - adapted).abs().max(), adapted.abs().max()
    assert float(difference) <= 1e-4 * float(scale)
    assert float((adapted - before).abs().max()) > 1e-3 * float(scale)
    ours, theirs = Checkpoint(run.root / "merged"), Checkpoint(run.model_dir)
    assert ours.entries.keys() == theirs.entries.keys()
    changed = {name for name in theirs.entries if not torch.equal(ours.read(name), theirs.read(name))}
    for part in ("vision_tower|visual", "projector|merger", "language_model|model.layers"):
        assert any(piece in name for piece in part.split("|") for name in changed), part


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
