"""Config files: overrides, merge keys, texts that are no booleans, and what is no config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_schema import MINIMAL, config, error_of

from emloc_ray.config.adapter import AdapterConfig
from emloc_ray.config.reading import check_config, load_config, put, read_override
from emloc_ray.errors import ConfigError
from emloc_ray.io.formats.yaml_text import write_yaml


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(write_yaml(MINIMAL))
    return file


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("finetune", "fp16", "yes"),
        ("finetune", "gradient_checkpointing_kwargs.use_reentrant", "no"),
        ("finetune", "liger_kernel_config.rope", "Off"),
        ("ray", "log_to_driver", "no"),
        ("ray", "runtime_env.eager_install", "off"),
        ("adapter", "init_weights", "no"),
    ],
)
def test_a_text_is_never_passed_on_as_true(path: Path, section: str, key: str, value: str) -> None:
    overrides = ["adapter={method: vera}"] if section == "adapter" else []
    with pytest.raises(ConfigError, match=rf"{section}\.{key} is the text '{value}': write true or false\."):
        load_config(path, [*overrides, f"{section}.{key}={value}"])
    load_config(path, [*overrides, f"{section}.{key}=false"])


def test_yes_and_no_are_text_where_text_is_meant(path: Path) -> None:
    made = load_config(
        path,
        [
            "finetune.save_strategy=no",
            "ray.runtime_env.env_vars.DEBUG=on",
            "adapter={method: lokr, init_weights: lycoris}",
            "finetune.gradient_checkpointing=no",
        ],
    )
    assert made.finetune.model_extra == {"save_strategy": "no"}
    assert made.finetune.gradient_checkpointing is False
    assert made.ray.init_options == {"runtime_env": {"env_vars": {"DEBUG": "on"}}}


def test_ray_init_arguments_pass_through() -> None:
    made = config(ray={"num_cpus": 2, "object_store_memory": 10**8})
    assert made.ray.init_options == {"num_cpus": 2, "object_store_memory": 10**8}


# Paths.


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.train", ""),
        ("data.train", {"path": ""}),
        ("data.train.path", ["a.jsonl", " "]),
        ("data.train.path", {"": 1}),
        ("data.calibration.path", ""),
        ("data.image_roots", [""]),
        ("model", ""),
        ("run_dir", ""),
    ],
)
def test_an_empty_path_is_not_the_working_directory(key: str, value: Any) -> None:
    values: dict[str, Any] = {**MINIMAL}
    put(values, tuple(key.split(".")), value, key)
    assert " is empty: write a path, or . for the working directory." in check_config(values)[1][0]


def test_an_empty_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROWS", "")
    expected = "data.train.path is empty (ROWS is set to nothing): write a path, or . for the working directory."
    assert check_config({**MINIMAL, "data": {"train": {"path": "${ROWS}"}}})[1] == [expected]


# Files and overrides.


def test_file_with_overrides(path: Path) -> None:
    made = load_config(
        path,
        [
            "seed=7",
            "finetune.learning_rate=1e-4",
            "finetune.weight_decay=5e-2",
            "adapter.target_modules=[q_proj, v_proj]",
            "adapter.rank_pattern={q_proj: 4}",
            "correction.clamp=null",
            "data.packing=true",
            "data.train.num_samples=12",
            "model.source=a=b",
        ],
    )
    assert made.seed == 7
    assert made.finetune.learning_rate == 1e-4
    assert made.finetune.model_extra == {"weight_decay": 0.05}
    assert made.adapter.target_modules == ["q_proj", "v_proj"]
    assert made.adapter.rank_pattern == {"q_proj": 4}
    assert made.correction.clamp is None
    assert made.data.packing is True
    assert made.data.train is not None
    assert (made.data.train.path, made.data.train.num_samples) == ("train.jsonl", 12)
    assert made.model.source == "a=b"


def test_scientific_notation_is_a_number_in_the_file_too(path: Path) -> None:
    path.write_text(path.read_text() + "\nfinetune:\n  learning_rate: 3e-5\n  weight_decay: 1E-2\n")
    made = load_config(path)
    assert made.finetune.learning_rate == 3e-5
    assert made.finetune.model_extra == {"weight_decay": 0.01}


def test_empty_section_takes_overrides(path: Path) -> None:
    path.write_text(path.read_text() + "\nadapter:\n")
    assert load_config(path, ["adapter.r=4"]).adapter == AdapterConfig(r=4)


def test_a_section_left_empty_is_its_defaults(path: Path) -> None:
    path.write_text(path.read_text() + "\nadapter:\n")
    assert load_config(path).adapter == AdapterConfig()


def test_the_last_override_wins(path: Path) -> None:
    assert load_config(path, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("override", ["seed", "=3", " =3", ".=3", "finetune..max_steps=3"])
def test_override_without_key_or_value(path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"is not key\.path=value"):
        load_config(path, [override])


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run_dir=runs/try #2", "runs/try #2"),
        ("data.train.path=rows #1.jsonl", "rows #1.jsonl"),
        ("finetune.run_name=#1", "#1"),
        ("finetune.run_name=2026-12-01", "2026-12-01"),
        ("finetune.max_steps= 5 ", 5),
        ("correction.clamp=null", None),
        ("correction.clamp=", None),
        ('run_dir="a #b" # c', "a #b"),
        ("adapter.target_modules=[q, v] # two", ["q", "v"]),
    ],
)
def test_a_text_in_an_override_has_no_comment(override: str, value: object) -> None:
    assert read_override(override)[1] == value


def test_override_reaching_into_a_value(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reaches into data\.train\.path, which is a value"):
        load_config(path, ["data.train.path.glob=x"])


def test_a_section_that_a_base_leaves_out_takes_keys(path: Path) -> None:
    base = path.with_name("without.yaml")
    base.write_text(path.read_text() + "emulator: {healing: false, refinement: false}\n")
    path.write_text("base: without.yaml\nemulator: {healing: {steps: 5}}\n")
    emulator = load_config(path, ["emulator.refinement.steps=20"]).emulator
    assert emulator.healing is not None
    assert emulator.refinement is not None
    assert (emulator.healing.steps, emulator.refinement.steps) == (5, 20)


def test_override_that_is_no_yaml(path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^Override adapter\.target_modules has a value that is not YAML"):
        load_config(path, ["adapter.target_modules=[q_proj"])


def test_misspelt_override_has_its_nearest_and_the_file(path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"and its overrides: finetune\.max_stps is not a key: the nearest is max_steps"
    ):
        load_config(path, ["finetune.max_stps=3"])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("a: [", "is not YAML"), ("", "holds no keys"), ("- a\n- b\n", "holds no keys"), ("just text", "holds no keys")],
)
def test_file_that_is_no_config(path: Path, text: str, complaint: str) -> None:
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml does not exist"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize("section", ["model", "finetune", "ray"])
def test_a_key_that_is_no_string(section: str) -> None:
    assert f"{section}.1 is no text, as keys are: write the name of a key." in error_of(**{section: {1: 1}})


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("adapter.r: 8", "adapter.r has dots, as overrides have: in a file write adapter: {r: …}."),
        (
            "data.train.path: a",
            "data.train.path has dots, as overrides have: in a file write data: {train: {path: …}}.",
        ),
        ("model.dtpye: x", "model.dtpye is not a key: the nearest is dtype."),
        (
            "adapter: {rank_pattern: {1: 2}}",
            "adapter.rank_pattern has the key 1, which is no text: write it in quotes.",
        ),
        (
            "adapter: {init_lora_weights: null}",
            "adapter.init_lora_weights is None: input should be 'gaussian' or 'orthogonal'.",
        ),
    ],
)
def test_a_key_of_a_file_that_is_not_one_is_one_sentence(path: Path, lines: str, said: str) -> None:
    path.write_text(f"{path.read_text()}\n{lines}\n")
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    assert str(refused.value) == f"{path}: {said}"


def test_a_path_as_the_key_of_a_share_is_its_text(tmp_path: Path) -> None:
    shares = {tmp_path / "a.jsonl": 1, tmp_path / "b.jsonl": 3}
    config = load_config({**MINIMAL, "data": {"train": {"path": shares}}})
    assert config.data.train is not None
    assert config.data.train.path == {str(path): share for path, share in shares.items()}


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("run_dir: x\nadapter: {r: 4}\nadapter: {r: 8}\n", 3, 'there is a second key "adapter"'),
        ("ray:\n  _redis_password: hush\n  _redis_password: hush\n", 3, 'there is a second key "_redis_password"'),
        ("run_dir: x\nmodel:\n\tsource: y\n", 3, "there is a tab where YAML takes only spaces"),
        ("run_dir: x\ndata: {train: *.jsonl}\n", 2, "a text that begins with * names an alias, of which there is none"),
        ("run_dir: 2024-13-45\n", None, "month must be in"),
    ],
)
def test_a_fault_in_the_yaml_names_its_file_and_line(tmp_path: Path, text: str, line: int | None, what: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "a.yaml")
    assert f"a.yaml is not YAML ({f'line {line}: ' if line else ''}{what}" in str(caught.value)
    assert "hush" not in str(caught.value)


def test_merge_keys_bring_another_section_s(tmp_path: Path) -> None:
    text = f"{write_yaml(MINIMAL)}calibration: &two {{num_workers: 2}}\nmerge: {{<<: *two, cpus_per_worker: 3}}\n"
    (tmp_path / "a.yaml").write_text(text)
    made = load_config(tmp_path / "a.yaml")
    assert (made.calibration.num_workers, made.merge.num_workers, made.merge.cpus_per_worker) == (2, 2, 3)
    (tmp_path / "a.yaml").write_text(text.replace("cpus_per_worker: 3", "cpus_per_worker: 3, cpus_per_worker: 4"))
    with pytest.raises(ConfigError, match=r"line \d+: there is a second key .cpus_per_worker"):
        load_config(tmp_path / "a.yaml")


def test_a_config_that_is_no_text_or_a_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes("run_dir: é".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_config(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(tmp_path)


def test_a_bare_value_is_its_section_s_own_key(path: Path) -> None:
    path.write_text("run_dir: r\nmodel: tiny\ndata: {train: a.jsonl}\n")
    config = load_config(path, ["model.dtype=bfloat16", "data.train.num_samples=4"])
    assert (config.model.source, config.model.dtype) == ("tiny", "bfloat16")
    assert config.data.train is not None
    assert (config.data.train.path, config.data.train.num_samples) == ("a.jsonl", 4)
    above = path.parent / "above.yaml"
    above.write_text(f"base: {path.name}\nmodel: {{dtype: float16}}\ndata: {{train: {{num_samples: 3}}}}\n")
    config = load_config(above, ["model=other", "data.train=*.jsonl"])
    assert (config.model.source, config.model.dtype) == ("other", "float16")
    assert config.data.train is not None
    assert (config.data.train.path, config.data.train.num_samples) == ("*.jsonl", 3)


@pytest.mark.parametrize(
    "override",
    [
        "seed.token=hf_aaa",
        "ray.token={hf_aaa",
        "ray.token=hf_aaa: {",
        "ray.token:hf_aaa",
        "ray..token=hf_aaa",
        "--ray.token=hf_aaa",
        "run_dir=s3://token/${UNSET}?token=hf_aaa",
        "data.image_roots=s3://token?token=hf_aaa",
    ],
)
def test_a_refused_override_does_not_show_its_value(path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"token|seed is|hidden") as caught:
        load_config(path, [override])
    assert "hf_aaa" not in str(caught.value)


class Adapter:
    def __repr__(self) -> str:
        return "Adapter(\n" + "r=8, " * 999 + ")"


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": Adapter()}, "model is {}: it is a section, give it keys of its own (source, "),
        ({"model": {"source": Adapter()}}, "model.source is {}: input should be a valid string"),
        ({"finetune": Adapter()}, "finetune is {}: it is a section"),
        ({"finetune": {"weight_decay": Adapter()}}, "finetune.weight_decay is {}: "),
        ({"finetune": {"gradient_checkpointing_kwargs": Adapter()}}, "finetune.gradient_checkpointing_kwargs is {}: "),
        ({"memory_budget": Adapter()}, "memory_budget: {} is no size"),
        ({"emulator": {"budget": Adapter()}}, "emulator.budget: {} is no budget"),
    ],
)
def test_an_object_is_named_by_its_type(sections: dict[str, Any], said: str) -> None:
    message = error_of(**sections)
    assert said.format("an object of the type Adapter") in message
    assert "r=8" not in message


@pytest.mark.parametrize("value", ["x", 1.5, [None, 1], {"a": 1}])
def test_a_plain_value_is_shown_whole(value: Any) -> None:
    assert f"seed is {value!r}: " in error_of(seed=value)
