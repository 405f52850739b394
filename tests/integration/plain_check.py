"""Reads finished runs as anyone would, with plain transformers and PEFT; run as a script, prints a line of JSON for each.

python plain_check.py MODEL_DIR RUN_DIR [MODEL_DIR RUN_DIR]...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = ["add 3 and 4: ", "The quick brown fox jumps over the lazy dog.", "x"]


def check(model_dir: Path, run_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "merged")
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    inputs.pop("token_type_ids", None)
    mask = inputs["attention_mask"].bool()
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").eval()
    merged, loading = AutoModelForCausalLM.from_pretrained(run_dir / "merged", dtype="auto", output_loading_info=True)
    with torch.no_grad():
        original = base(**inputs).logits[mask].float()
        plain = merged.eval()(**inputs).logits[mask].float()
        adapted = PeftModel.from_pretrained(base, run_dir / "adapter").eval()(**inputs).logits[mask].float()
    try:
        AutoModelForCausalLM.from_pretrained(run_dir / "emulator")
        emulator_error = None
    except ValueError as error:
        emulator_error = str(error)
    result = {
        "difference": float((adapted - plain).abs().max()),
        "moved": float((plain - original).abs().max()),
        "scale": float(original.abs().max()),
        "merged_dtype": str(merged.dtype),
        "unused": sorted(loading["missing_keys"]) + sorted(loading["unexpected_keys"]),
        "emulator_error": emulator_error,
        "imported": "emloc_ray" in sys.modules,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    places = [Path(argument) for argument in sys.argv[1:]]
    for model_dir, run_dir in zip(places[::2], places[1::2], strict=True):
        check(model_dir, run_dir)
