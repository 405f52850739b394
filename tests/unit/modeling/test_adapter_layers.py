"""Every adapter method on factorized layers: as PEFT computes it on the dense ``W_E``, saved under the original's names."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import (
    CASES,
    FITTING,
    IDS,
    ON_LINEARS,
    PROMPTS,
    TARGETS,
    attached,
    fits,
    logits,
    parameters,
    settings,
    train,
    trained,
)
from dense_weights import dense_weight
from peft import PeftModel, get_peft_model
from tiny import make_model, save_emulator, save_quantized_emulator
from torch import nn
from transformers import AutoModelForCausalLM

from emloc_ray.data.formats import Tokens
from emloc_ray.modeling.adapter import attach_adapter, detach_adapter, load_adapter, save_trained_adapter
from emloc_ray.modeling.adapter_files import CONFIG_NAME, WEIGHTS_NAME, Adapter
from emloc_ray.modeling.adapter_layers import FactorizedDora, keep_gains
from emloc_ray.modeling.adapter_methods import adapter_config
from emloc_ray.modeling.architecture import block_linears
from emloc_ray.modeling.emulator import FactorizedLinear, PivotedLinear
from emloc_ray.modeling.loading import load_model
from emloc_ray.modeling.loss import token_loss
from emloc_ray.modeling.scoring import complete

NO_CHANGE = [case for case in ON_LINEARS if case != "loha"]  # which begins at random here


def dense_emulator(model_dir: Path, emulator_dir: Path) -> Any:
    """The original with ``W_E`` in place of ``W``: what PEFT knows how to adapt by itself."""
    model, emulator = AutoModelForCausalLM.from_pretrained(model_dir), load_model(emulator_dir)
    for name, module in emulator.named_modules():
        if isinstance(module, FactorizedLinear) or hasattr(getattr(module, "weight", None), "quant_state"):
            if name.endswith((".up", ".down")):
                continue
            target = model.get_submodule(name)
            weight = dense_weight(module)
            target.weight.data = weight if isinstance(target, torch.nn.Linear) else weight.T.contiguous()
    return model


def named(case: str, family: str, emulator_dir: Callable[[str], Path]) -> dict[str, Any]:
    return settings(case, family, [name for name, _ in load_model(emulator_dir(family)).named_modules()])


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, attention_mask=torch.ones_like(IDS)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("case", "family"), parameters(FITTING))
def test_factors_do_what_peft_does_on_the_dense_product(
    case: str, family: str, tmp_path: Path, emulator_dir: Callable[[str], Path], tiny_model_dir: Callable[..., Path]
) -> None:
    model = trained(tmp_path / "a", emulator_dir(family), case, family)
    dense = get_peft_model(
        dense_emulator(tiny_model_dir(family), emulator_dir(family)),
        adapter_config(**named(case, family, emulator_dir)),
    ).eval()
    dense.load_adapter(tmp_path / "a", "default", is_trainable=True)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    bare = load_model(emulator_dir(family))
    assert float((logits(model) - logits(bare)).abs().max()) > 1e-2  # the adapter shows
    found, expected = gradients(model), gradients(dense)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-3, atol=2e-5, msg=lambda text, name=name: name + text
        )
    assert not [name for name, p in model.named_parameters() if p.requires_grad and name not in found]


# Every method on a Llama; of what other families have beside it, Conv1D and biases, one each that adds and one that scales.
IN_4_BITS = [(case, "llama") for case in ON_LINEARS] + [
    (case, family) for family in ("gpt2", "qwen2") for case in ("dora", "ia3")
]


@pytest.fixture(scope="module")
def quantized_dir(
    tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """An emulator of that family in 4 bits, half of whose linears are factors; do not write to it."""

    def make(family: str) -> Path:
        names = [spec.name for spec in block_linears(make_model(family))]
        ranks = dict.fromkeys(names[: len(names) // 2], 8)
        return save_quantized_emulator(tiny_model_dir(family), tmp_path_factory.mktemp("quantized") / "e", ranks)

    return functools.cache(make)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "family"), parameters(IN_4_BITS))
def test_in_4_bits_it_is_what_peft_does_on_the_unpacked_weights(
    case: str, family: str, tmp_path: Path, quantized_dir: Callable[[str], Path], tiny_model_dir: Callable[..., Path]
) -> None:
    """Of factors, and of linears that are in 4 bits without."""
    emulator_dir = quantized_dir(family)
    bare, fresh = logits(load_model(emulator_dir)), attached(emulator_dir, case, family).eval()
    if case in NO_CHANGE:
        torch.testing.assert_close(logits(fresh), bare, rtol=1e-5, atol=1e-5)
    bases = {type(module.base_layer).__name__ for module in fresh.modules() if hasattr(module, "base_layer")}
    assert bases == {"FactorizedLinear", "ExactLinear4bit"}
    model = trained(tmp_path / "a", emulator_dir, case, family)
    dense = PeftModel.from_pretrained(dense_emulator(tiny_model_dir(family), emulator_dir), tmp_path / "a").eval()
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    assert float((logits(model) - bare).abs().max()) > 1e-2


@pytest.mark.parametrize("case", ["lora", "dora", "ia3", "lokr"])
def test_on_pivoted_factors_it_is_the_same(case: str, tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    model_dir = tiny_model_dir("qwen2")  # biases
    emulator_dir = save_emulator(model_dir, tmp_path / "e", storage="pivoted")
    model = trained(tmp_path / "a", emulator_dir, case, "qwen2")
    assert "PivotedLinear" in {type(m.base_layer).__name__ for m in model.modules() if hasattr(m, "base_layer")}
    dense = PeftModel.from_pretrained(dense_emulator(model_dir, emulator_dir), tmp_path / "a").eval()
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    assert float((logits(model) - logits(load_model(emulator_dir))).abs().max()) > 1e-2


@pytest.mark.parametrize("case", NO_CHANGE)
def test_a_fresh_adapter_changes_nothing(case: str, emulator_dir: Callable[[str], Path]) -> None:
    model = attached(emulator_dir("llama"), case, "llama").eval()
    torch.testing.assert_close(logits(model), logits(load_model(emulator_dir("llama"))), rtol=1e-5, atol=1e-5)


def test_an_orthogonal_beginning_leaves_every_base_as_it_is(
    tmp_path: Path, quantized_dir: Callable[[str], Path], tiny_model_dir: Callable[..., Path]
) -> None:
    """Factors, and linears in 4 bits, whose dtype PEFT would give A and B. The product of these is 0."""
    bare = load_model(quantized_dir("llama"))
    before, expected = copy.deepcopy(bare.state_dict()), logits(bare)
    names = [name for name, _ in bare.named_modules()]
    options = {**settings("lora", "llama", names), "init_lora_weights": "orthogonal"}
    model = attach_adapter(bare, adapter_config(**options)).eval()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    train(model)
    save_trained_adapter(model, tmp_path / "a", targets=TARGETS["llama"], base_model="x")
    again = load_adapter(load_model(quantized_dir("llama")), tmp_path / "a")
    torch.testing.assert_close(logits(model.eval()), logits(again), rtol=1e-5, atol=1e-5)
    assert float((logits(model) - expected).abs().max()) > 1e-2
    original = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"))
    ours = load_adapter(load_model(tiny_model_dir("llama")), tmp_path / "a")
    plain = PeftModel.from_pretrained(original, tmp_path / "a")
    torch.testing.assert_close(logits(ours), logits(plain), rtol=1e-5, atol=1e-5)
    after = detach_adapter(model).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_dora_begins_with_the_lengths_of_the_emulator_s_rows(emulator_dir: Callable[[str], Path]) -> None:
    model = attached(emulator_dir("llama"), "dora", "llama")
    layers = [module for module in model.modules() if isinstance(getattr(module, "base_layer", None), FactorizedLinear)]
    assert len(layers) == 5
    for layer in layers:
        expected = dense_weight(layer.base_layer).norm(dim=1)
        torch.testing.assert_close(layer.lora_magnitude_vector["default"].weight.data, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dora_s_gains_on_the_original_are_the_emulator_s(
    family: str, tmp_path: Path, emulator_dir: Callable[[str], Path], tiny_model_dir: Callable[..., Path]
) -> None:
    """As magnitudes that are longer by as much as the original's rows are."""
    model = trained(tmp_path / "a", emulator_dir(family), "dora", family)
    kept, scaled = (load_adapter(load_model(tiny_model_dir(family)), tmp_path / "a").eval() for _ in range(2))
    keep_gains(kept, model)
    for name, layer in model.named_modules():
        if isinstance(getattr(layer, "base_layer", None), FactorizedLinear):
            other = scaled.get_submodule(name)
            weight = other.base_layer.weight if family == "llama" else other.base_layer.weight.T
            update = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            longer = (weight + update).norm(dim=1) / (dense_weight(layer.base_layer) + update).norm(dim=1)
            other.lora_magnitude_vector["default"].weight.data.mul_(longer)
    torch.testing.assert_close(logits(kept), logits(scaled), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [FactorizedLinear, PivotedLinear])
def test_dora_s_lengths_know_nothing_of_a_bias(kind: type[FactorizedLinear]) -> None:
    torch.manual_seed(0)
    layer = kind(24, 40, 8, bias=True).to(torch.bfloat16)
    (layer.bias if kind is PivotedLinear else layer.up.bias).data.fill_(100.0)
    adapted = FactorizedDora(fan_in_fan_out=False)
    lora_a, lora_b = torch.randn(4, 24), torch.randn(40, 4)
    expected = (dense_weight(layer).float() + 2 * lora_b @ lora_a).norm(dim=1)
    torch.testing.assert_close(adapted.norms(layer, lora_a, lora_b, 2.0), expected, rtol=2e-2, atol=0)
    assert bool((layer(torch.zeros(1, 24, dtype=torch.bfloat16)) == 100).all())  # it is back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_s_lengths_are_the_same_in_mixed_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = FactorizedLinear(24, 40, 8, bias=False).to(dtype)
    lora_a, lora_b = nn.Linear(24, 4, bias=False), nn.Linear(4, 40, bias=False)
    expected = FactorizedDora(fan_in_fan_out=False).norms(layer, lora_a.weight, lora_b.weight, 2.0)
    mixed = FactorizedDora(fan_in_fan_out=False)
    mixed.weight = nn.Parameter(torch.ones(40))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mixed.norms(layer, lora_a.weight, lora_b.weight, 2.0), expected)
        added = mixed(torch.randn(3, 24), lora_A=lora_a, lora_B=lora_b, scaling=2.0, base_layer=layer)
    added.square().sum().backward()
    # Autocast may keep what it makes of A and B where no gradient is wanted, for where one is.
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in (lora_a.weight, lora_b.weight))


@pytest.mark.parametrize(("case", "family"), parameters(FITTING))
def test_saved_it_loads_on_the_emulator_and_on_the_original(
    case: str, family: str, tmp_path: Path, emulator_dir: Callable[[str], Path], tiny_model_dir: Callable[..., Path]
) -> None:
    model = trained(tmp_path / "a", emulator_dir(family), case, family)
    assert {file.name for file in (tmp_path / "a").iterdir()} == {CONFIG_NAME, WEIGHTS_NAME}
    loaded = load_adapter(load_model(emulator_dir(family)), tmp_path / "a").eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    original = AutoModelForCausalLM.from_pretrained(tiny_model_dir(family))
    bare = logits(original)
    plain = PeftModel.from_pretrained(original, tmp_path / "a").eval()
    assert float((logits(plain) - bare).abs().max()) > 1e-2
    assert torch.equal(logits(detach_adapter(plain)), bare)
    config = json.loads((tmp_path / "a" / CONFIG_NAME).read_text())
    assert (config["base_model_name_or_path"], config["inference_mode"]) == ("the/original", True)
    assert config.get("fan_in_fan_out", family == "gpt2") == (family == "gpt2")
    missing = {key for key in config.get("feedforward_modules", []) if key not in config["target_modules"]}
    assert not missing


@pytest.mark.parametrize("case", CASES)
def test_a_training_goes_on_from_what_it_saved(case: str, tmp_path: Path, emulator_dir: Callable[[str], Path]) -> None:
    """As the Trainer does it: the saved adapter over a fresh one of the same name."""
    model = trained(tmp_path / "a", emulator_dir("llama"), case, "llama")
    fresh = attached(emulator_dir("llama"), case, "llama")
    fresh.load_adapter(tmp_path / "a", "default", is_trainable=True)
    torch.testing.assert_close(logits(fresh.eval()), logits(model), rtol=1e-5, atol=1e-5)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    assert before == {name for name, p in fresh.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("case", CASES)
def test_loaded_to_be_trained_on_all_of_it_learns(
    case: str, tmp_path: Path, emulator_dir: Callable[[str], Path]
) -> None:
    model = trained(tmp_path / "a", emulator_dir("llama"), case, "llama")
    loaded = load_adapter(load_model(emulator_dir("llama")), tmp_path / "a", trainable=True)
    torch.testing.assert_close(logits(loaded.eval()), logits(model), rtol=1e-5, atol=1e-5)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert learning == gradients(loaded.train()).keys()


@pytest.mark.parametrize("case", ON_LINEARS)
def test_an_emulator_takes_no_merge_of_any_method(case: str, emulator_dir: Callable[[str], Path]) -> None:
    model = attached(emulator_dir("llama"), case, "llama")
    with pytest.raises(TypeError, match="merge the corrected adapter into the original"):
        model.merge_and_unload()


def test_no_weight_of_the_dense_shape_is_made(emulator_dir: Callable[[str], Path]) -> None:
    for case in ON_LINEARS:
        model = attached(emulator_dir("llama"), case, "llama")
        left = [type(module).__name__ for module in model.modules() if "StandIn" in type(module).__name__]
        assert not left
        bases = [module.base_layer for module in model.modules() if hasattr(module, "base_layer")]
        assert sum(isinstance(base, FactorizedLinear) for base in bases) == 5
        assert not any(base.weight.numel() for base in bases if isinstance(base, FactorizedLinear))


@pytest.mark.parametrize("case", ["loha", "loha of full rank", "lokr", "lokr decomposed"])
def test_on_dense_linears_it_is_what_peft_does_and_keeps_no_more_than_it(
    case: str, tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    model_dir = tiny_model_dir("llama")
    model = trained(tmp_path / "a", model_dir, case, "llama")
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_dir), tmp_path / "a", is_trainable=True
    )
    kept, kept_by_peft = (kept_updates(adapted.train()) for adapted in (model, plain))
    assert kept < kept_by_peft if case == "loha of full rank" else kept == 0 < kept_by_peft
    torch.testing.assert_close(logits(model.eval()), logits(plain.eval()), rtol=1e-4, atol=1e-4)
    expected = gradients(plain)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-5)
    adapted_logits = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), adapted_logits, rtol=1e-4, atol=1e-4)


def kept_updates(model: Any) -> int:
    """Tensors as large as an adapted weight that a pass keeps for its backward pass, beside the model's own parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {frozenset(m.base_layer.weight.shape) for m in model.modules() if hasattr(m, "base_layer")}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 2 and frozenset(tensor.shape) in shapes:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(input_ids=IDS, labels=IDS)
    return len(kept.keys() - own)


@pytest.mark.parametrize("case", ["loha", "lokr"])
def test_rank_dropout_leaves_out_outputs(case: str, emulator_dir: Callable[[str], Path]) -> None:
    model = attached(emulator_dir("llama"), case, "llama")
    train(model)
    layer = next(m for n, m in model.named_modules() if n.endswith("0.self_attn.q_proj"))
    x = torch.randn(3, 64)
    whole = layer._get_delta_activations("default", x)
    layer.rank_dropout["default"], layer.rank_dropout_scale["default"] = 0.5, True
    torch.manual_seed(1)
    part = layer.train()._get_delta_activations("default", x)
    torch.manual_seed(1)
    kept = (torch.rand(64) > 0.5).float()
    torch.testing.assert_close(part, whole * kept / kept.mean())
    assert torch.equal(layer.eval()._get_delta_activations("default", x), whole)


@pytest.mark.parametrize("dtype", ["bfloat16"])
@pytest.mark.parametrize("case", ON_LINEARS)
def test_a_half_precision_emulator_trains(
    case: str, dtype: str, tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    directory = save_emulator(tiny_model_dir("llama", dtype=dtype), tmp_path / "e")
    model = attached(directory, case, "llama").train()
    train(model, 1)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert logits(model.eval()).dtype == torch.bfloat16


@pytest.mark.parametrize("case", [*PROMPTS, "lora"])
@pytest.mark.parametrize("chunked", [False, True])
def test_the_loss_is_transformers_own(
    case: str, chunked: bool, emulator_dir: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Virtual tokens stand before the row's: positions count from the end."""
    if chunked:
        monkeypatch.setattr("emloc_ray.modeling.loss.CHUNK_SHARE", 16)
    model = attached(emulator_dir("llama"), case, "llama")
    train(model)
    model.eval()
    mask = torch.ones_like(IDS)
    mask[1, 7:] = 0
    batch = {"input_ids": IDS, "attention_mask": mask, "completion_mask": mask}
    found = token_loss(model, batch, "all")
    labels = IDS.masked_fill(mask == 0, -100)
    labels[:, 0] = -100  # which virtual tokens would predict
    expected = model(input_ids=IDS, attention_mask=mask, labels=labels).loss
    assert float(found.loss_sum.detach() / found.num_tokens) == pytest.approx(float(expected.detach()), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_prompt_of_real_tokens_is_those_tokens(
    family: str, tmp_path: Path, emulator_dir: Callable[[str], Path], tiny_model_dir: Callable[..., Path]
) -> None:
    """Virtual tokens set to what real ones are: embeddings, or keys and values in the cache."""
    bare = load_model(emulator_dir(family))
    before = torch.tensor([[7, 90, 41, 5, 12]])
    whole = bare(input_ids=torch.cat([before.expand(2, -1), IDS], dim=1)).logits[:, 5:]
    cache = bare(input_ids=before, use_cache=True).past_key_values
    states = torch.stack(
        [state[0].transpose(0, 1) for layer in cache.layers for state in (layer.keys, layer.values)], 1
    )
    embeddings = bare.get_input_embeddings()(before)[0]
    for case, content in (("prefix", states.flatten(1)), ("prompt", embeddings)):
        model = attached(emulator_dir(family), case, family).eval()
        model.prompt_encoder["default"].embedding.weight.copy_(content)
        torch.testing.assert_close(logits(model), whole, rtol=1e-4, atol=1e-4)


def test_a_prompt_of_a_text_begins_with_its_embeddings_and_names_no_place_of_the_training(
    tmp_path: Path, emulator_dir: Callable[[str], Path], tiny_model_dir: Callable[..., Path], tokenizer: Any
) -> None:
    PROMPT = "prompt_encoder.default.embedding.weight"
    told = {"num_virtual_tokens": 6, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "say it"}
    model_dir, bare = tiny_model_dir("llama"), load_model(emulator_dir("llama"))
    config = adapter_config("prompt_tuning", **told, tokenizer_name_or_path=str(model_dir))
    model = attach_adapter(bare, config)
    ids = tokenizer("say it")["input_ids"]
    expected = bare.get_input_embeddings()(torch.tensor((6 * ids)[:6]))
    assert torch.equal(model.get_parameter(PROMPT), expected)
    save_trained_adapter(model, tmp_path / "a", targets=[], base_model="the/original")
    assert json.loads((tmp_path / "a" / CONFIG_NAME).read_text())["tokenizer_name_or_path"] == "the/original"
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), tmp_path / "a")
    assert torch.equal(plain.get_parameter(PROMPT), expected)


def test_a_prompt_learns_under_gradient_checkpointing(emulator_dir: Callable[[str], Path]) -> None:
    """A prefix does not, whose cache that drops: a config may not ask for both."""
    model = attached(emulator_dir("llama"), "prompt", "llama").train()
    plain = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(model), plain)


@pytest.mark.parametrize("case", PROMPTS)
def test_completions_are_greedy_whatever_the_padding(
    case: str, tmp_path: Path, emulator_dir: Callable[[str], Path], tokenizer: Any
) -> None:
    model = trained(tmp_path / "a", emulator_dir("llama"), case, "llama")
    rows = [Tokens([5, 9, 33, 70, 2], [False] * 4 + [True]), Tokens([40, 8], [False, True])]
    found = complete(model, tokenizer, rows, max_new_tokens=4, batch_size=2)
    for row, text in zip(rows, found, strict=True):
        ids = torch.tensor([row.input_ids[: row.completion_mask.index(True)]])
        for _ in range(4):
            with torch.no_grad():
                step = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, step], dim=1)
            if int(step) == tokenizer.eos_token_id:
                break
        begin = row.completion_mask.index(True)
        assert text == tokenizer.decode(ids[0, begin:], skip_special_tokens=True).strip()


def test_another_method_after_one_was_taken_off(
    adapter_dir: Callable[[str, str], Path], tiny_model_dir: Callable[..., Path]
) -> None:
    lokr, prefix = (adapter_dir(case, "llama") for case in ("lokr", "prefix"))
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir("llama"))
    alone = logits(load_adapter(copy.deepcopy(model), lokr).eval())
    model = detach_adapter(load_adapter(model, prefix))
    assert torch.equal(logits(load_adapter(model, lokr).eval()), alone)


def test_peft_s_loha_and_lokr_know_no_conv1d(emulator_dir: Callable[[str], Path]) -> None:
    assert not fits("loha", "gpt2")
    with pytest.raises(TypeError, match="Conv1D"):
        attached(emulator_dir("gpt2"), "lokr", "gpt2")


@pytest.mark.slow
def test_the_names_of_every_method_are_the_original_s(adapter_dir: Callable[[str, str], Path]) -> None:
    for case in ON_LINEARS:
        adapter = Adapter(adapter_dir(case, "llama"))
        assert len(adapter.names) == len(set(adapter.names)) == 6
        assert all(name.startswith("model.layers.") for name in adapter.names)
