"""What the first rows tell before a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import CHAT_TEMPLATE

from emloc_ray.planning.first_rows import first_rows
from emloc_ray.planning.prepared import Prepared
from emloc_ray.ui.config_verbs import validation_lines

# As GLM's: an answer ends where the next turn begins.
NO_END = CHAT_TEMPLATE.replace("{{ eos_token }}", "")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, NO_END], ids=["end", "no end"])
def test_answers_without_an_end_are_told(
    template: str, prepared: Callable[..., Prepared], tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    model, rows = Path(shutil.copytree(tiny_model_dir(), tmp_path / "model")), tmp_path / "chats.jsonl"
    (model / "chat_template.jinja").write_text(template)
    turns = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Yes."}]
    rows.write_text((json.dumps({"messages": turns}) + "\n") * 12)
    run = prepared(data={"train": {"path": str(rows)}, "max_seq_length": 64}, model={"source": str(model)})
    said = [line for line in validation_lines(run, "my.yaml") if "has a token at which generation stops" in line]
    assert len(said) == (template == NO_END)
    first = first_rows(run)
    assert first is not None
    last = first.sequences[0].input_ids[-1]  # where generation stops at it too
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [last]}))
    again = first_rows(run)
    assert again is not None
    assert again.no_end is None


def test_texts_end_by_themselves(prepared: Callable[..., Prepared]) -> None:
    first = first_rows(prepared())
    assert first is not None
    assert first.no_end is None
