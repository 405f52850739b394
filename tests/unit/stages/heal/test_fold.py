"""What is folded into the factors of an emulator, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_weights import dense_weight
from healings import RANK, Healing, R, fold_alone, tensors
from pretend_device import pretend_device
from tiny import save_emulator
from transformers import AutoConfig, AutoModelForCausalLM

from emloc_ray.core.gram import Gram
from emloc_ray.core.healing import ranks_before_healing
from emloc_ray.core.integer_forms import IntegerForms
from emloc_ray.core.ranks import Storage
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.errors import ArtifactError
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.formats.grams import write_gram_index, write_gram_shard
from emloc_ray.modeling.adapter import load_adapter
from emloc_ray.modeling.architecture import block_linears, empty_model
from emloc_ray.modeling.emulator import FactorizedLinear, PivotedLinear
from emloc_ray.modeling.emulator_weights import emulator_weight
from emloc_ray.modeling.loading import load_model
from emloc_ray.modeling.nf4 import dequantize_nf4, quantize_nf4
from emloc_ray.stages.heal import fold
from emloc_ray.stages.heal.fold import pieces, write_pieces


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mixtral", "qwen3_moe"])
def test_the_healed_emulator_computes_as_emulator_and_lora(healing: Callable[..., Healing], family: str) -> None:
    found = healing(family)
    healed, loading = AutoModelForCausalLM.from_pretrained(found.fold.out_dir, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    healed = load_model(found.fold.out_dir)
    ids = torch.tensor([TokenShards(found.tokens).row(8).input_ids])
    emulator = load_model(found.emulator)
    with torch.no_grad():
        before = emulator(input_ids=ids).logits
        together = load_adapter(emulator, found.job.out_dir).eval()(input_ids=ids).logits
        after = healed(input_ids=ids).logits
    torch.testing.assert_close(after, together, rtol=1e-4, atol=1e-4 * float(together.abs().max()))
    assert float((after - before).abs().max()) > 100 * float((after - together).abs().max())


def test_parameters_are_those_of_the_same_ranks_without_healing(healing: Callable[..., Healing]) -> None:
    found = healing("llama")
    # What a factorization at the final ranks stores, and what this one started from.
    assert ranks_before_healing(found.fold.ranks, R) == {**found.ranks, found.small: RANK - R}
    model = load_model(found.fold.out_dir)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FactorizedLinear)}
    assert {name: layer.down.out_features for name, layer in layers.items()} == found.fold.ranks
    specs = {spec.name: spec for spec in block_linears(empty_model(AutoConfig.from_pretrained(found.model_dir)))}
    for name, layer in layers.items():
        held = sum(weight.numel() for weight in (layer.up.weight, layer.down.weight))
        assert held == found.fold.ranks[name] * (specs[name].out_features + specs[name].in_features)


def test_all_else_is_copied_byte_for_byte(healing: Callable[..., Healing]) -> None:
    found = healing("llama", "bfloat16")
    before, after = tensors(found.emulator), tensors(found.fold.out_dir)
    assert before.keys() == after.keys()
    grown = {f"{name}.{part}.weight": part for name in found.healed for part in ("up", "down")}
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype == torch.bfloat16
        kept = after[name]
        if name in grown:
            kept = kept[:, :RANK] if grown[name] == "up" else kept[:RANK]
            assert kept.shape != after[name].shape
        assert torch.equal(kept.view(torch.int16), tensor.view(torch.int16)), name
    assert {file.name for file in found.emulator.glob("tokenizer*")} == {
        file.name for file in found.fold.out_dir.glob("tokenizer*")
    }


def test_shards_of_a_killed_fold_stay_and_the_rest_is_the_same(healing: Callable[..., Healing], tmp_path: Path) -> None:
    found = healing("llama")
    job = replace(found.fold, out_dir=tmp_path / "healed")
    first, *_ = pieces(job)
    write_pieces(job, [first])
    inode = first.file.stat().st_ino
    write_pieces(job, pieces(job))
    assert first.file.stat().st_ino == inode
    for piece in pieces(found.fold):
        assert (job.out_dir / piece.file.name).read_bytes() == piece.file.read_bytes()


def test_what_all_linears_are_folded_from_is_opened_once(
    healing: Callable[..., Healing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, opened = healing("llama"), list[str]()
    widths = {name: tensors(found.fold.out_dir)[f"{name}.down.weight"].shape[1] for name in found.healed}
    grams = write_grams(tmp_path / "grams", {name: torch.eye(width) for name, width in widths.items()})
    for kind in (fold.Adapter, fold.GramStore):

        def made(place: Path, kind: Any = kind) -> Any:
            opened.append(kind.__name__)
            return kind(place)

        monkeypatch.setattr(fold, kind.__name__, made)
    forms = IntegerForms(dict.fromkeys(found.healed, 4), {}, 16)
    job = replace(found.fold, out_dir=tmp_path / "healed", integers=forms, calibration_dir=grams)
    write_pieces(job, pieces(job))
    assert opened == ["Adapter", "GramStore"]
    assert len(found.healed) > 1


def test_an_adapter_of_another_rank_is_refused(healing: Callable[..., Healing], tmp_path: Path) -> None:
    found = healing("llama")
    wrong = {**found.fold.ranks, found.healed[0]: RANK + R + 1}
    job = replace(found.fold, out_dir=tmp_path, ranks=wrong)
    name = f"{found.healed[0]}.up.weight"
    piece = next(piece for piece in pieces(job) if name in {entry.name for entry in piece.entries})
    with pytest.raises(ArtifactError, match=f"{found.healed[0]} would grow to rank {RANK + R}, not {RANK + R + 1}"):
        write_pieces(job, [piece])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "packed"), [("qwen2", False), ("gpt2", False), ("llama", True)])
def test_pivoted_factors_are_pivoted_anew(
    healing: Callable[..., Healing], tmp_path: Path, family: str, packed: bool
) -> None:
    found = healing(family)
    emulator = save_emulator(found.model_dir, tmp_path / "emulator", RANK, "pivoted")
    linears = tuple(spec.name for spec in block_linears(empty_model(AutoConfig.from_pretrained(found.model_dir))))
    job = replace(
        found.fold,
        emulator_dir=emulator,
        out_dir=tmp_path / "healed",
        in_4bit=linears if packed else (),
        kept_wide=("lm_head",) if packed else (),
        storage="pivoted",
    )
    fold_alone(job, found.model_dir)
    healed, plain = load_model(job.out_dir), load_model(found.fold.out_dir)
    layers = {name: module for name, module in healed.named_modules() if isinstance(module, PivotedLinear)}
    assert {name: layer.down.out_features for name, layer in layers.items()} == job.ranks
    for name, layer in layers.items():
        weight, expected = dense_weight(layer), dense_weight(plain.get_submodule(name))
        assert float((weight - expected).norm() / expected.norm()) < (0.5 if packed else 1e-5), name
    if not packed:
        assert tensors(job.out_dir).keys() >= {f"{name}.order" for name in job.ranks}
        ids = torch.tensor([TokenShards(found.tokens).row(8).input_ids])
        with torch.no_grad():
            torch.testing.assert_close(healed(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_4_bits_are_those_of_the_grown_factors(healing: Callable[..., Healing], tmp_path: Path, family: str) -> None:
    found = healing(family)
    specs = block_linears(empty_model(AutoConfig.from_pretrained(found.model_dir)))
    job = replace(
        found.fold,
        out_dir=tmp_path / "healed",
        in_4bit=tuple(spec.name for spec in specs),
        transposed=tuple(spec.name for spec in specs if spec.transposed),
        kept_wide=("lm_head",),
    )
    fold_alone(job, found.model_dir)
    wide, packed = tensors(found.fold.out_dir), tensors(job.out_dir)
    for spec in specs:
        for part in (".up", ".down") if spec.name in job.ranks else ("",):
            prefix = f"{spec.name}{part}."
            held = {key.removeprefix(prefix): t for key, t in packed.items() if key.startswith(prefix)}
            weight = wide[f"{prefix}weight"]
            expected = quantize_nf4(weight.T if spec.transposed and not part else weight, weight.dtype)
            assert torch.equal(dequantize_nf4({k: t for k, t in held.items() if k != "bias"}), dequantize_nf4(expected))
    model = load_model(job.out_dir)
    ids = torch.tensor([TokenShards(found.tokens).row(8).input_ids])
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits, load_model(found.fold.out_dir)(input_ids=ids).logits
    assert float((ours - theirs).norm() / theirs.norm()) < 0.5


def write_grams(directory: Path, matrices: dict[str, torch.Tensor]) -> Path:
    directory.mkdir()
    write_gram_shard(directory / "grams.safetensors", {name: Gram(matrix, 99) for name, matrix in matrices.items()})
    places = dict.fromkeys(matrices, "grams.safetensors")
    write_gram_index(directory, [[name] for name in matrices], places, dict.fromkeys(matrices, 99))
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "storage"), [("llama", "factors"), ("qwen2", "pivoted"), ("gpt2", "factors"), ("mixtral", "factors")]
)
def test_integers_are_those_of_the_grown_factors(
    healing: Callable[..., Healing], tmp_path: Path, family: str, storage: Storage
) -> None:
    found = healing(family)
    emulator = save_emulator(found.model_dir, tmp_path / "emulator", RANK, storage)
    job = replace(found.fold, emulator_dir=emulator, storage=storage)
    wide, generator, lost = tensors(found.fold.out_dir), torch.Generator().manual_seed(0), list[float]()
    grown = {name: wide[f"{name}.up.weight"] @ wide[f"{name}.down.weight"] for name in found.healed}
    inputs = {name: torch.randn(200, w.shape[1], generator=generator) for name, w in grown.items()}
    scaled = {name: x * torch.logspace(0, 2, x.shape[1]) for name, x in inputs.items()}
    seen = {name: x.T @ x for name, x in scaled.items()}
    forms = IntegerForms(dict.fromkeys(found.healed, 4), {}, 16)
    for matrices in (seen, {name: torch.eye(len(gram)) for name, gram in seen.items()}):
        out = tmp_path / f"{len(lost)}"
        grams = write_grams(tmp_path / f"grams-{len(lost)}", matrices)
        fold_alone(replace(job, out_dir=out, integers=forms, calibration_dir=grams), found.model_dir)
        stored, error = tensors(out), 0.0
        for name, whole in grown.items():
            weight = emulator_weight(Checkpoint(out), name, whole.shape[1])
            assert weight is not None
            difference = weight.rows() - whole
            error += float((difference @ seen[name] * difference).sum() / (whole @ seen[name] * whole).sum())
        lost.append(error / len(grown))
        assert not {f"{name}.up.weight" for name in grown} & stored.keys()
        assert torch.equal(stored[f"{found.small}.up.weight"], tensors(emulator)[f"{found.small}.up.weight"])
    assert lost[0] < 0.1**2
    assert lost[0] < 0.7 * lost[1]
    ids = torch.tensor([TokenShards(found.tokens).row(8).input_ids])
    with torch.no_grad():
        theirs = load_model(found.fold.out_dir)(input_ids=ids).logits
        ours = load_model(tmp_path / "1")(input_ids=ids).logits
    assert 0 < float((ours - theirs).norm() / theirs.norm()) < 0.5


def test_without_grams_they_are_rounded_by_their_weights_alone(healing: Callable[..., Healing], tmp_path: Path) -> None:
    found = healing("llama")
    wide, forms = tensors(found.fold.out_dir), IntegerForms(dict.fromkeys(found.healed, 4), {}, 16)
    fold_alone(replace(found.fold, out_dir=tmp_path / "healed", integers=forms), found.model_dir)
    for name in found.healed:
        whole = wide[f"{name}.up.weight"] @ wide[f"{name}.down.weight"]
        weight = emulator_weight(Checkpoint(tmp_path / "healed"), name, whole.shape[1])
        assert weight is not None
        assert 0 < float((weight.rows() - whole).norm() / whole.norm()) < 0.2, name


@pytest.mark.slow
def test_where_a_gpu_is_they_are_rounded_there_as_on_the_cpu(healing: Callable[..., Healing], tmp_path: Path) -> None:
    found, device = healing("llama"), pretend_device()
    widths = {name: tensors(found.fold.out_dir)[f"{name}.down.weight"].shape[1] for name in found.healed}
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(200, width, generator=generator) for name, width in widths.items()}
    grams = write_grams(tmp_path / "grams", {name: x.T @ x for name, x in inputs.items()})
    forms = IntegerForms(dict.fromkeys(found.healed, 4), {}, 16)
    here, there = (
        replace(found.fold, out_dir=tmp_path / name, integers=forms, calibration_dir=grams)
        for name in ("here", "there")
    )
    write_pieces(there, pieces(there), device)
    for job in (here, there):  # whose shards stay
        fold_alone(job, found.model_dir)
    for name, width in widths.items():
        ours, theirs = (emulator_weight(Checkpoint(job.out_dir), name, width) for job in (here, there))
        assert ours is not None
        assert theirs is not None
        torch.testing.assert_close(ours.rows(), theirs.rows(), rtol=1e-3, atol=1e-5)
