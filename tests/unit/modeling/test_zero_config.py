"""A DeepSpeed JSON as ``finetune.deepspeed`` takes it: completed, or refused in one sentence."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainingArguments

from emloc_ray.errors import ConfigError
from emloc_ray.modeling.zero_config import check_zero_config, read_zero_config


def write(path: Path, content: Any) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_what_is_left_out_follows_the_config(tmp_path: Path) -> None:
    content = {"zero_optimization": {"stage": 2}, "gradient_clipping": 0.5, "bf16": {"enabled": False}}
    made = read_zero_config(write(tmp_path / "zero.json", content))
    assert made["zero_optimization"] == {"stage": 2}
    assert made["gradient_clipping"] == 0.5
    assert made["bf16"] == {"enabled": False}
    assert {key for key, value in made.items() if value == "auto"} == {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    }


@pytest.mark.parametrize(("said", "made"), [({}, True), ("auto", True), (False, False)])
def test_zero_3_checkpoints_hold_the_adapter_alone(tmp_path: Path, said: Any, made: bool) -> None:
    key = "stage3_gather_16bit_weights_on_model_save"
    zero = {"stage": 3, **({} if said == {} else {key: said})}
    content = read_zero_config(write(tmp_path / "zero.json", {"zero_optimization": zero}))
    assert content["zero_optimization"][key] is made


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{'stage': 2}", "is not JSON (Expecting property name"),
        ("[2]", "zero_optimization.stage names none: give 0, 1, 2 or 3."),
        ({}, "zero_optimization.stage names none"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4: give 0, 1, 2 or 3."),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is True"),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage is 'auto'"),
        ({"zero_optimization": {"stage": 1}, "tensor_parallel": {"autotp_size": 2}}, "asks for tensor_parallel"),
    ],
)
def test_a_file_that_will_not_do_is_refused_by_name(tmp_path: Path, content: Any, words: str) -> None:
    path = write(tmp_path / "zero.json", content)
    with pytest.raises(ConfigError) as caught:
        read_zero_config(path)
    assert str(caught.value).startswith(f"finetune.deepspeed {path}")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\)"):
        read_zero_config(str(tmp_path / "none.json"))
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        read_zero_config(str(tmp_path))
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_zero_config(str(tmp_path / "bytes.json"))


def test_a_relative_path_is_one_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "zero.json", {"zero_optimization": {"stage": 1}})
    monkeypatch.chdir(tmp_path)
    assert read_zero_config("zero.json")["zero_optimization"]["stage"] == 1


def test_the_missing_package_is_told_with_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "zero.json", {"zero_optimization": {"stage": 1}})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the deepspeed package: pip install 'emloc-ray\[deepspeed\]'\."):
        read_zero_config(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"train_batch_size": 24}, None),
        ({"train_micro_batch_size_per_gpu": 8}, "train_micro_batch_size_per_gpu=8, finetune says per_device"),
        ({"train_batch_size": 12}, "train_batch_size=12"),
        ({"gradient_clipping": 0.3}, "gradient_clipping=0.3"),
        ({"bf16": {"enabled": True}}, "bf16.enabled=True"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, "optimizer.params.lr=1.0"),
    ],
)
def test_numbers_that_differ_from_the_configs_are_told(
    tmp_path: Path, changes: dict[str, Any], words: str | None
) -> None:
    path = write(tmp_path / "zero.json", {"zero_optimization": {"stage": 2}, **changes})
    arguments = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4, gradient_accumulation_steps=2
    )
    wanted, content = SimpleNamespace(**vars(arguments)), read_zero_config(path)
    if words is None:
        check_zero_config(path, content, wanted, 3)
    else:
        with pytest.raises(ConfigError) as caught:
            check_zero_config(path, content, wanted, 3)
        assert words in str(caught.value)
        assert str(caught.value).endswith('set "auto" there, or the same here.')


@pytest.mark.parametrize("wrong", [{"bf16": True}, {"optimizer": "Adam"}])
def test_a_value_of_another_type_is_told(tmp_path: Path, wrong: dict[str, Any]) -> None:
    path = write(tmp_path / "zero.json", {"zero_optimization": {"stage": 2}, **wrong})
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ConfigError, match="another type than DeepSpeed takes") as caught:
        check_zero_config(path, read_zero_config(path), arguments, 2)
    assert "\n" not in str(caught.value)
