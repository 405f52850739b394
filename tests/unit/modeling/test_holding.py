"""A model whose blocks come and go computes what the whole model does: logits, adapters' gradients, sums of gradients."""

from __future__ import annotations

import contextlib
import functools
import json
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from families import FAMILIES as FAMILY_CONFIGS
from families import save
from safetensors.torch import save_file
from shared_keys import HAS_MISTRAL, MISTRAL, TRANSFORMERS
from stage_artifacts import random_rows
from tiny import PAD, random_model, save_emulator, save_model
from torch import Tensor

from emloc_ray.data.token_shards import collate
from emloc_ray.errors import ArtifactError
from emloc_ray.io.formats.checkpoint import INDEX_NAME, SINGLE_NAME
from emloc_ray.modeling import loss
from emloc_ray.modeling.adapter import attach_adapter, load_adapter, save_trained_adapter
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import block_linears, block_names, empty_model, trace_inputs
from emloc_ray.modeling.block_weights import BlockWeights
from emloc_ray.modeling.gradient_hooks import GradientHooks
from emloc_ray.modeling.gram_hooks import GramHooks
from emloc_ray.modeling.holding import Offloaded, open_model
from emloc_ray.modeling.inputs import model_call
from emloc_ray.modeling.loss import call_loss, token_loss
from emloc_ray.modeling.pinned import Pinned
from emloc_ray.modeling.scoring import complete, score_rows

OFFLOADED = ("offloaded", "all_offloaded")
FAMILIES = ("Llama", "Qwen2", "GPT-2", "Gemma 3", "Mixtral", "gpt-oss", "T5")
BATCH = collate(random_rows(), PAD)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save(family, tmp_path_factory.mktemp("held") / "model")
        return made[family]

    return get


def names_of(model: Any) -> list[str]:
    return [spec.name for spec in block_linears(empty_model(model.config))]


def trained(model: Any) -> Any:
    torch.manual_seed(0)
    targets = [name for name in names_of(model) if not name.endswith("k_proj")]
    config = adapter_config(r=2, lora_alpha=4, target_modules=targets, lora_dropout=0.2, init_lora_weights=False)
    return attach_adapter(model, config).train()


def gradients(model: Any) -> dict[str, Tensor]:
    torch.manual_seed(1)
    base = model.get_base_model()
    call_loss(model, model_call(base.config, BATCH, "completion").to(base.device), base).loss_sum.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("hold", OFFLOADED)
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_those_of_the_whole_model(
    family: str, hold: str, saved: Callable[[str], Path]
) -> None:
    whole, held = open_model(saved(family)), open_model(saved(family), hold)
    with torch.no_grad():
        one, other = (token_loss(model, BATCH, "all") for model in (whole, held))
    assert float(one.loss_sum) == float(other.loss_sum)
    resident = trained(whole)
    resident.gradient_checkpointing_enable({"use_reentrant": False})
    expected, found = gradients(resident), gradients(trained(held))
    assert expected.keys() == found.keys()
    assert len(found) > 10
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert not [
        name
        for name, p in held.named_parameters()
        if "layers.1" in name and not p.isnan().all() and not p.requires_grad
    ]


@pytest.mark.parametrize(("hold", "often"), [("offloaded", [1, 2, 1]), ("all_offloaded", [2, 2, 2])])
def test_a_pass_with_gradients_turns_at_a_block_that_is_there(
    hold: str, often: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, "llama", num_hidden_layers=3)
    held, read = trained(open_model(tmp_path, hold)), Counter[str]()
    inner = BlockWeights.read

    def counted(weights: BlockWeights, names: Sequence[str]) -> Tensor:
        read[names[0]] += 1
        return inner(weights, names)

    gradients(held)
    monkeypatch.setattr(BlockWeights, "read", counted)
    gradients(held)
    assert [read[f"model.layers.{number}.mlp.up_proj.weight"] for number in range(3)] == often


@pytest.mark.parametrize("learns", [False, True])
def test_the_head_comes_once_for_all_chunks_of_a_batch_s_labels(
    learns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, "llama")
    held, read = trained(open_model(tmp_path, "all_offloaded")), Counter[str]()
    inner = BlockWeights.read

    def counted(weights: BlockWeights, names: Sequence[str]) -> Tensor:
        read[names[0]] += 1
        return inner(weights, names)

    monkeypatch.setattr(loss, "CHUNK_SHARE", 16)
    gradients(held)
    monkeypatch.setattr(BlockWeights, "read", counted)
    for _ in range(2):
        if learns:
            gradients(held)
        else:
            with torch.no_grad():
                token_loss(held.get_base_model(), BATCH, "completion")
    assert read["lm_head.weight"] == read["model.embed_tokens.weight"] == 2


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Any]:
    """``as_on_gpu(model)``: what holds a model, which takes the CPU for a GPU from then on."""
    stream, empty = mock.MagicMock(), torch.empty
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))

    def of(model: Any) -> Any:
        held = model.get_submodule(block_names(model)[0]).forward.func.__self__
        monkeypatch.setattr(held, "copies", stream)
        return held

    return of


@pytest.fixture
def sent(as_on_gpu: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[str]]:
    """``sent(model)``: the parts of a held model in the order in which they are sent to a GPU, from then on."""

    def of(model: Any) -> list[str]:
        held, names = as_on_gpu(model), []

        def traced(part: Any) -> list[Tensor]:
            names.append(part.parameters[0].names[0])
            return [held.weights.read(place.names) for place in part.parameters]

        monkeypatch.setattr(held, "sent", traced)
        return names

    return of


@pytest.mark.parametrize("learns", [False, True])
def test_nothing_is_sent_in_vain_where_embedding_and_head_come_too(
    learns: bool, tmp_path: Path, sent: Callable[[Any], list[str]]
) -> None:
    save_model(tmp_path, "llama", num_hidden_layers=3)
    held = open_model(tmp_path, "all_offloaded")
    names = sent(held)
    model, batches = trained(held) if learns else held, []
    for _ in range(3):
        names.clear()
        if learns:
            gradients(model)
        else:
            with torch.no_grad():
                token_loss(held, BATCH, "all")
        batches.append([name.split(".")[2 if "layers" in name else -2] for name in names])
    back = ["2", "1", "0"] if learns else []
    assert batches[1:] == [["embed_tokens", "0", "1", "2", "lm_head", *back]] * 2


@pytest.mark.parametrize("hold", OFFLOADED)
def test_a_completion_sends_a_decoder_s_blocks_once_a_token(
    hold: str, tmp_path: Path, sent: Callable[[Any], list[str]]
) -> None:
    config = FAMILY_CONFIGS["T5"]()
    config.num_layers = config.num_decoder_layers = 3
    random_model(config).save_pretrained(tmp_path)
    held = open_model(tmp_path, hold)
    names, tokens = sent(held), 5
    for _ in range(2):
        names.clear()
        held.generate(input_ids=torch.arange(4, 9)[None], min_new_tokens=tokens, max_new_tokens=tokens)
    often = Counter(name.split(".layer.")[0] for name in names if ".block." in name)
    # Where no head comes between, the last token does not know that it is, and the next one's first follows its example.
    extra = [int(hold == "offloaded"), 0, 0]
    assert [often[f"encoder.block.{number}"] - 1 for number in range(3)] == extra
    assert [often[f"decoder.block.{number}"] - tokens for number in range(3)] == extra


def test_workers_that_begin_together_stop_pinning_as_memory_fills(
    tmp_path: Path, as_on_gpu: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path, "llama", num_hidden_layers=4)
    workers = [as_on_gpu(open_model(tmp_path, "offloaded")).model for _ in range(3)]
    made: list[weakref.ref[Pinned]] = []
    inner = Pinned.of

    def of(weights: Sequence[Tensor]) -> Pinned:
        pinned = inner(weights)
        made.append(weakref.ref(pinned))
        return pinned

    def num_pinned() -> int:
        return sum(pinned() is not None for pinned in made)

    monkeypatch.setattr(Pinned, "of", of)
    monkeypatch.setattr("emloc_ray.modeling.pinned.memory_bytes", lambda: 16 * 2**20)
    monkeypatch.setattr("emloc_ray.modeling.pinned.available_bytes", lambda: (16 - num_pinned()) * 2**20)
    with torch.no_grad():
        logits = [worker(BATCH["input_ids"]).logits for _ in range(2) for worker in workers]
    assert num_pinned() == 8  # of a MiB each, where half of the memory stays
    assert all(torch.equal(one, logits[0]) for one in logits)


def test_what_torch_keeps_pinned_of_an_earlier_model_goes_first(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[str] = []
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: released.append("pinned"), raising=False)
    open_model(saved("Llama"), "offloaded")
    assert not released
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    open_model(saved("Llama"), "offloaded")
    assert released == ["pinned"]
    monkeypatch.delattr(torch.accelerator, "empty_host_cache")  # older torch has none
    open_model(saved("Llama"), "offloaded")


@pytest.mark.parametrize("family", ["Llama", "Mixtral", "T5"])
def test_sums_are_those_of_the_whole_model(family: str, saved: Callable[[str], Path]) -> None:
    sums: list[list[Any]] = []
    for hold in ("resident", "offloaded"):
        model = open_model(saved(family), hold)
        empty = empty_model(model.config)
        trace = trace_inputs(empty, block_linears(empty))
        grams = GramHooks(model, trace.groups, trace.streams)
        grams.forward(BATCH)
        grams.remove()
        hooks = GradientHooks(model, names_of(model), trace.streams, checkpointing=hold == "resident")
        hooks.forward(BATCH, "all", [0, 1, 2, 3])
        sums.append([*grams.grams.values(), *hooks.grams.values()])
    for one, other in zip(*sums, strict=True):
        assert one.num_tokens == other.num_tokens
        torch.testing.assert_close(one.symmetric(), other.symmetric(), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not HAS_MISTRAL, reason="transformers has no Mistral Large 4")
def test_grams_of_blocks_that_share_keys_and_values_are_those_of_the_whole_model(tmp_path: Path) -> None:
    config = TRANSFORMERS.MistralLarge4Config(**MISTRAL)
    torch.manual_seed(0)
    TRANSFORMERS.MistralLarge4ForConditionalGeneration(config).save_pretrained(tmp_path)
    empty = empty_model(config)
    trace = trace_inputs(empty, block_linears(empty))
    sums = []
    for hold in ("resident", "offloaded"):
        hooks = GramHooks(open_model(tmp_path, hold), trace.groups, trace.streams)
        hooks.forward(BATCH)
        sums.append({name: gram.symmetric() for name, gram in hooks.grams.items()})
    assert sums[0].keys() == sums[1].keys()
    assert all(torch.equal(gram, sums[1][name]) for name, gram in sums[0].items())


def test_tied_embeddings_and_another_dtype(tmp_path: Path) -> None:
    save_model(tmp_path, "llama", tied=True)
    choices: list[dict[str, Any]] = [{}, {"dtype": "bfloat16"}]
    for options in choices:
        for hold in OFFLOADED:
            models = open_model(tmp_path, **options), open_model(tmp_path, hold, **options)
            one, other = (model(input_ids=torch.arange(9)[None]).logits for model in models)
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


@pytest.mark.parametrize("equal", [False, True])
def test_a_head_of_its_own_is_read_though_the_config_ties_it(equal: bool, tmp_path: Path) -> None:
    original = save_model(tmp_path / "original", "llama")
    if equal:
        state = open_model(original).state_dict()
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        save_file(state, original / SINGLE_NAME, {"format": "pt"})
        (original / INDEX_NAME).unlink()
    for directory in (original, save_emulator(original, tmp_path / "emulator")):
        config = json.loads((directory / "config.json").read_text())
        config.get("base_config", config)["tie_word_embeddings"] = True
        (directory / "config.json").write_text(json.dumps(config))
        whole = open_model(directory)
        assert (whole.lm_head.weight is whole.model.embed_tokens.weight) == equal
        for hold in OFFLOADED:
            held = open_model(directory, hold)
            assert torch.equal(held(BATCH["input_ids"]).logits, whole(BATCH["input_ids"]).logits)
            assert (held.lm_head.weight is held.model.embed_tokens.weight) == (equal and hold == "offloaded")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tables_of_positions_that_no_checkpoint_holds_are_computed(dtype: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 32}
    tokens: dict[str, Any] = {"vocab_size": 300, "pad_token_id": PAD, "decoder_start_token_id": 1, "eos_token_id": 1}
    config = transformers.MarianConfig(forced_eos_token_id=1, **tokens, **sizes)
    transformers.MarianMTModel(config).save_pretrained(tmp_path)
    ids = BATCH["input_ids"]
    whole = open_model(tmp_path, dtype=dtype)(ids, decoder_input_ids=ids).logits
    for hold in OFFLOADED:
        assert torch.equal(open_model(tmp_path, hold, dtype=dtype)(ids, decoder_input_ids=ids).logits, whole)


def test_completions_and_emulators(
    saved: Callable[[str], Path], emulator_dir: Callable[[str], Path], tokenizer: Any
) -> None:
    for directory in (saved("Llama"), emulator_dir("llama")):
        found = [
            complete(open_model(directory, hold), tokenizer, random_rows(), max_new_tokens=4, batch_size=2)
            for hold in ("resident", "offloaded")
        ]
        assert found[0] == found[1]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Qwen2", "Mixtral", "T5"])
def test_passes_in_step_are_those_one_after_another(
    family: str, saved: Callable[[str], Path], tmp_path: Path, tokenizer: Any
) -> None:
    directory = saved(family)
    for number in range(2):
        attached = trained(open_model(directory))
        for parameter in attached.parameters():
            parameter.data.mul_(1 + number)
        targets = sorted(attached.peft_config["default"].target_modules)
        save_trained_adapter(attached, tmp_path / str(number), targets=targets, base_model="")

    def passes(models: list[Any]) -> list[Callable[[], Any]]:
        adapted = [load_adapter(model, tmp_path / str(number)) for number, model in enumerate(models[1:])]
        return [functools.partial(scored_and_completed, model.eval(), tokenizer) for model in (models[0], *adapted)]

    alone = [one() for one in passes([open_model(directory) for _ in range(3)])]
    held = Offloaded(directory, num_models=3)
    together = held.in_step(passes(held.models))
    for (score, texts), (expected, expected_texts) in zip(together, alone, strict=True):
        assert score.loss_sum == pytest.approx(expected.loss_sum, rel=1e-6)
        assert texts == expected_texts
    assert len({score.loss_sum for score, _ in together}) == 3


def scored_and_completed(model: Any, tokenizer: Any) -> Any:
    score = score_rows(model, random_rows(), batch_size=2, loss_on="all", pad_token_id=PAD, name="x")
    return score, complete(model, tokenizer, random_rows()[:2], max_new_tokens=3, batch_size=2)


def test_an_error_of_one_pass_ends_all(saved: Callable[[str], Path]) -> None:
    held = Offloaded(saved("Llama"), num_models=2)
    ids, ended = torch.arange(5)[None], []

    def goes_on() -> None:
        for _ in range(3):
            held.models[0](input_ids=ids)
        ended.append(True)

    def fails() -> None:
        held.models[1](input_ids=ids)
        raise ValueError("no number")

    with pytest.raises(ValueError, match="no number"):
        held.in_step([torch.no_grad()(goes_on), torch.no_grad()(fails)])
    assert not ended
    assert torch.isfinite(held.model(input_ids=ids).logits).all()


def test_a_missing_weight_is_named(saved: Callable[[str], Path], tmp_path: Path) -> None:
    model = open_model(save_model(tmp_path / "whole", "llama"))
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path / "part", state_dict=state)
    held = open_model(tmp_path / "part", "offloaded")
    with pytest.raises(ArtifactError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        held(input_ids=torch.arange(5)[None])
