"""A pruned model is trained on in all its weights, on the calibration's rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ablations.aligning import BATCH, align
from ablations.pruning import Kept, prune
from tiny import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from emloc_ray.modeling.architecture import block_linears

ROWS = [{"prompt": f"x = {number}\n" * (1 + number % 3), "completion": f"return {number}"} for number in range(20)]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pruned model in bfloat16, and rows."""
    root = tmp_path_factory.mktemp("aligned")
    original = save_model(root / "original", num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4)
    AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16).save_pretrained(original)
    prune(original, root / "small", "random", 0.6, 0, None)
    rows = root / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return root / "small", rows


def row_losses(model_dir: Path, rows: list[dict[str, str]], max_length: int) -> tuple[float, int]:
    """The summed loss of each row alone, and its labels."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir).float(), AutoTokenizer.from_pretrained(model_dir)
    total, count = 0.0, 0
    for row in rows:
        text = row["prompt"] + row["completion"]
        ids = [*tokenizer(text)["input_ids"][: max_length - 1], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
        count += len(ids) - 1
    return total, count


def test_it_learns_from_every_token_of_its_rows_and_stays_the_model_that_it_was(
    pruned: tuple[Path, Path], tmp_path: Path
) -> None:
    small, rows = pruned
    losses = align(small, rows, tmp_path / "aligned", max_length=16, rate=1e-2)
    total, count = row_losses(small, ROWS[:BATCH], 16)
    assert len(losses) == 3  # of 20 rows
    assert losses[0] == pytest.approx(total / count, rel=1e-4)
    assert losses[2] < losses[0]
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (small, tmp_path / "aligned"))
    assert after.dtype == torch.bfloat16
    assert all(not torch.equal(before.get_parameter(n), p) for n, p in after.named_parameters() if p.ndim == 2)
    assert [spec.name for spec in block_linears(after)] == [spec.name for spec in block_linears(before)]
    assert Kept.read(tmp_path / "aligned" / "kept.json") == Kept.read(small / "kept.json")
    assert AutoTokenizer.from_pretrained(tmp_path / "aligned")("a b")["input_ids"]


def test_text_rows_are_read_too(pruned: tuple[Path, Path], tmp_path: Path) -> None:
    small, rows = pruned
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": row["prompt"] + row["completion"]}) + "\n" for row in ROWS))
    assert align(small, texts, tmp_path / "one", 16) == align(small, rows, tmp_path / "other", 16)
