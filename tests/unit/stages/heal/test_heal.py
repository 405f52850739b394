"""Healing without Ray: the teacher's shards, the training towards them, and what is folded into the factors."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_weights import dense_weight
from PIL import Image
from safetensors.torch import load_file
from stage_artifacts import Artifacts, write_tokens
from tiny import make_emulator, save_emulator
from transformers import AutoConfig, AutoModelForCausalLM
from vlms import save_vlm

from emloc_ray.core.gram import Gram
from emloc_ray.core.healing import ranks_before_healing
from emloc_ray.core.integer_forms import IntegerForms
from emloc_ray.core.ranks import Storage
from emloc_ray.data.ingest import SampleOrder
from emloc_ray.data.processors import ImageInputs
from emloc_ray.data.reading import Place
from emloc_ray.data.token_shards import TokenShards, collate, shard_name, write_index, write_shard
from emloc_ray.data.tokenizing import TokenizeOptions
from emloc_ray.errors import ArtifactError, NumericsError
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.formats.grams import write_gram_index, write_gram_shard
from emloc_ray.io.formats.teacher_shards import TeacherShards, teacher_shard, write_teacher_index
from emloc_ray.modeling.adapter import load_adapter
from emloc_ray.modeling.architecture import block_linears, empty_model
from emloc_ray.modeling.emulator import FactorizedLinear, PivotedLinear, write_emulator_config
from emloc_ray.modeling.loading import copy_tokenizer, load_model
from emloc_ray.modeling.loss import TopLogProbs, token_loss
from emloc_ray.modeling.quantization import dequantize, emulator_weight, quantize
from emloc_ray.stages.factorize.factorize import finish_emulator
from emloc_ray.stages.finetune import training
from emloc_ray.stages.finetune.job import FinetuneJob
from emloc_ray.stages.finetune.session import LoneSession, own_environment
from emloc_ray.stages.finetune.trainer import EmulatorTrainer
from emloc_ray.stages.finetune.training import train
from emloc_ray.stages.heal.fold import FoldJob, pieces, write_piece
from emloc_ray.stages.heal.heal import in_parts
from emloc_ray.stages.heal.teacher import TeacherJob, teach_part, teach_shard

RANK, R, STEPS = 8, 4, 24


@pytest.fixture(autouse=True)
def own_environment_variables() -> Iterator[None]:
    with own_environment():
        yield


def teacher_job(model_dir: Path, tokens: Path, out: Path, **changes: Any) -> TeacherJob:
    order = SampleOrder(len(TokenShards(tokens)), 4, 0, 1, 0)
    return replace(TeacherJob(model_dir, tokens, out, order, STEPS, 300, batch_size=3), **changes)


def training_job(emulator: Path, tokens: Path, root: Path, healed: tuple[str, ...]) -> FinetuneJob:
    options = {"target_modules": list(healed), "r": R, "lora_alpha": 8, "task_type": "CAUSAL_LM"}
    return FinetuneJob(
        emulator_dir=emulator,
        tokens_dir=tokens,
        out_dir=root / "adapter",
        storage_dir=root,
        name="heal",
        adapter={"method": "lora", **options},
        portable_targets=list(healed),
        base_model="the/original",
        max_steps=STEPS,
        batch_size=4,
        loss_on="all",
        training_arguments={"save_steps": 12, "logging_steps": 1, "learning_rate": 0.003, "disable_tqdm": True},
        teacher_dir=root / "teacher",
        stage="heal",
    )


def test_the_bar_says_what_it_counts() -> None:
    moved, details = list[tuple[int, int]](), list[str]()
    parts, said = in_parts({"pieces": 2, "steps": 8}, lambda *counts: moved.append(counts), details.append)
    parts[0](1, 2)
    said("loss 1.2")
    parts[1](4, 8)
    assert moved == [(1, 10), (6, 10)]
    assert details == ["1 of 2 pieces", "4 of 8 steps, loss 1.2"]


def taught(job: TeacherJob) -> TeacherJob:
    teach_part(job, 0, 1)
    write_teacher_index(job.out_dir, [rows[0] for rows in job.shards()])
    return job


def fold_alone(job: FoldJob, model_dir: Path) -> None:
    """What :func:`emloc_ray.stages.heal.fold.fold` does, without Ray."""
    for piece in pieces(job):
        write_piece(job, piece)
    kept_wide = job.kept_wide if job.in_4bit else None
    files = [piece.file for piece in pieces(job)]
    base = AutoConfig.from_pretrained(model_dir)
    finish_emulator(files, base, job.emulator_dir, job.ranks, job.storage, kept_wide, job.integers)


class Healing:
    """A family's emulator, all but one linear factorized, with the LoRA that was distilled into it."""

    def __init__(self, model_dir: Path, root: Path) -> None:
        self.model_dir, self.emulator = model_dir, save_emulator(model_dir, root / "emulator", RANK)
        self.tokens = write_tokens(root / "tokens", 20, 5)
        self.ranks: dict[str, int] = json.loads((self.emulator / "config.json").read_text())["ranks"]
        # One layer too small to be healed.
        self.small, *self.healed = sorted(self.ranks)
        taught(teacher_job(model_dir, self.tokens, root / "teacher"))
        self.job = training_job(self.emulator, self.tokens, root, tuple(self.healed))
        self.outcome = train(self.job, LoneSession(root / "heal"))
        final = {**self.ranks, **dict.fromkeys(self.healed, RANK + R)}
        self.fold = FoldJob(self.emulator, self.job.out_dir, root / "healed", final, tuple(self.healed))
        fold_alone(self.fold, model_dir)


@pytest.fixture(scope="module")
def healing(
    tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Healing]:
    """``healing(family, dtype)``, made once."""
    made: dict[tuple[str, str], Healing] = {}

    def get(family: str, dtype: str = "float32") -> Healing:
        if (family, dtype) not in made:
            root = tmp_path_factory.mktemp("healing")
            made[family, dtype] = Healing(tiny_model_dir(family, dtype=dtype), root)
        return made[family, dtype]

    return get


def test_the_teacher_says_what_the_original_does(artifacts: Artifacts, tmp_path: Path) -> None:
    job = taught(teacher_job(artifacts.model_dir, artifacts.tokens_dir, tmp_path, num_logits=5))
    model, stored = load_model(artifacts.model_dir), TeacherShards(tmp_path)
    shards = TokenShards(artifacts.tokens_dir)
    for position in range(20):
        ids = torch.tensor([shards.row(position).input_ids])
        with torch.no_grad():
            expected = model(input_ids=ids).logits[0, :-1].log_softmax(-1).topk(5)
        found = stored.row(position)
        assert torch.equal(found[0].long(), expected.indices)
        torch.testing.assert_close(found[1].float(), expected.values, rtol=1e-3, atol=1e-3)
    assert job.shards() == [list(range(20))]


def test_only_the_rows_that_are_trained_on_are_asked_for(artifacts: Artifacts, tmp_path: Path) -> None:
    job = teacher_job(artifacts.model_dir, artifacts.tokens_dir, tmp_path, micro_steps=3)
    rows = [row for shard in job.shards() for row in shard]
    assert rows == sorted(set(job.order.micro_steps(0, 3).tolist()))
    assert len(rows) == 12
    two = replace(job, order=replace(job.order, world_size=2), micro_steps=2)
    both = {row for rank in (0, 1) for row in replace(two.order, rank=rank).micro_steps(0, 2).tolist()}
    assert [row for shard in two.shards() for row in shard] == sorted(both)


def test_shards_that_are_there_stay(artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emloc_ray.io.formats.teacher_shards.MAX_ROWS", 6)
    whole = taught(teacher_job(artifacts.model_dir, artifacts.tokens_dir, tmp_path / "whole"))
    assert len(whole.shards()) == 4
    job = replace(whole, out_dir=tmp_path / "broken")
    teach_part(job, 1, 3)  # of three workers' shards one's, before a kill
    [there] = job.out_dir.iterdir()
    inode = there.stat().st_ino
    taught(job)
    assert there.stat().st_ino == inode
    for number in range(4):
        assert teacher_shard(job.out_dir, number).read_bytes() == teacher_shard(whole.out_dir, number).read_bytes()


def test_an_original_whose_logits_are_no_numbers_is_told(artifacts: Artifacts, tmp_path: Path) -> None:
    model = load_model(artifacts.model_dir)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    job = teacher_job(artifacts.model_dir, artifacts.tokens_dir, tmp_path)
    with pytest.raises(NumericsError, match=r"training row \d+ are NaN or Inf"):
        teach_shard(job, model, [0, 1])


def divergence_of(found: Healing, model_dir: Path, rows: list[int]) -> float:
    """A model's, from what the teacher says of some rows, in nats a label."""
    shards, teacher = TokenShards(found.tokens), TeacherShards(found.job.storage_dir / "teacher")
    told = [teacher.row(row) for row in rows]
    tops = TopLogProbs(torch.cat([ids for ids, _ in told]), torch.cat([values for _, values in told]))
    batch = collate([shards.row(row) for row in rows], 0)
    with torch.no_grad():
        result = token_loss(load_model(model_dir), batch, "all", teacher=tops)
    return float(result.loss_sum) / result.num_tokens


def test_training_brings_the_emulator_nearer_to_the_original(healing: Callable[..., Healing]) -> None:
    found = healing("llama")
    losses = [json.loads(line)["loss"] for line in found.job.log_path.read_text().splitlines()]
    assert found.outcome["steps"] == len(losses) == STEPS
    # Before the first step B is zero.
    first = SampleOrder(20, 4, 0, 1, 0).micro_steps(0, 1).tolist()
    assert losses[0] == pytest.approx(divergence_of(found, found.emulator, first), rel=1e-4)
    before, after = (divergence_of(found, place, list(range(20))) for place in (found.emulator, found.fold.out_dir))
    assert after < 0.9 * before
    assert abs(divergence_of(found, found.model_dir, list(range(20)))) < 1e-3 * before


def test_gradients_flow_into_the_lora_alone(
    healing: Callable[..., Healing], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = healing("llama")
    trained: set[str] = set()

    class Watching(EmulatorTrainer):
        def gradients_are_finite(self) -> bool:
            trained.update(name for name, parameter in self.model.named_parameters() if parameter.grad is not None)
            return super().gradients_are_finite()

    monkeypatch.setattr(training, "EmulatorTrainer", Watching)
    job = replace(found.job, storage_dir=tmp_path, out_dir=tmp_path / "adapter", max_steps=1)
    train(job, LoneSession(tmp_path / "heal"))
    expected = {f"base_model.model.{name}.lora_{part}.default.weight" for name in found.healed for part in "AB"}
    assert trained == expected


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


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


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
    write_piece(job, first)
    inode = first.file.stat().st_ino
    for piece in pieces(job):
        write_piece(job, piece)
    assert first.file.stat().st_ino == inode
    for piece in pieces(found.fold):
        assert (job.out_dir / piece.file.name).read_bytes() == piece.file.read_bytes()


def test_an_adapter_of_another_rank_is_refused(healing: Callable[..., Healing], tmp_path: Path) -> None:
    found = healing("llama")
    wrong = {**found.fold.ranks, found.healed[0]: RANK + R + 1}
    job = replace(found.fold, out_dir=tmp_path, ranks=wrong)
    name = f"{found.healed[0]}.up.weight"
    piece = next(piece for piece in pieces(job) if name in {entry.name for entry in piece.entries})
    with pytest.raises(ArtifactError, match=f"{found.healed[0]} would grow to rank {RANK + R}, not {RANK + R + 1}"):
        write_piece(job, piece)


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
            expected = quantize(weight.T if spec.transposed and not part else weight, weight.dtype)
            assert torch.equal(dequantize({k: t for k, t in held.items() if k != "bias"}), dequantize(expected))
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


@pytest.mark.parametrize(
    ("family", "storage"), [("llama", "factors"), ("qwen2", "pivoted"), ("gpt2", "factors"), ("mixtral", "factors")]
)
def test_integers_are_those_of_the_grown_factors(
    healing: Callable[..., Healing], tmp_path: Path, family: str, storage: Storage
) -> None:
    found = healing(family)
    emulator = save_emulator(found.model_dir, tmp_path / "emulator", RANK, storage)
    fold = replace(found.fold, emulator_dir=emulator, storage=storage)
    wide, generator, lost = tensors(found.fold.out_dir), torch.Generator().manual_seed(0), list[float]()
    grown = {name: wide[f"{name}.up.weight"] @ wide[f"{name}.down.weight"] for name in found.healed}
    inputs = {name: torch.randn(200, w.shape[1], generator=generator) for name, w in grown.items()}
    scaled = {name: x * torch.logspace(0, 2, x.shape[1]) for name, x in inputs.items()}
    seen = {name: x.T @ x for name, x in scaled.items()}
    forms = IntegerForms(dict.fromkeys(found.healed, 4), {}, 16)
    for matrices in (seen, {name: torch.eye(len(gram)) for name, gram in seen.items()}):
        out = tmp_path / f"{len(lost)}"
        grams = write_grams(tmp_path / f"grams-{len(lost)}", matrices)
        fold_alone(replace(fold, out_dir=out, integers=forms, calibration_dir=grams), found.model_dir)
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


@pytest.mark.deep
def test_a_model_that_sees_is_healed_on_its_images(tmp_path: Path) -> None:
    model_dir = save_vlm("LLaVA", tmp_path / "model")
    options = TokenizeOptions(str(model_dir), "messages", 128)
    made = [(Place(f"row {number}"), asked_about((40 * number, 120, 120))) for number in range(5)]
    rows = [tokens for row in options.tokens(iter(made)) for tokens in row or ()]
    tokens_dir = tmp_path / "tokens"
    write_shard(tokens_dir / shard_name(0), rows, with_images=True)
    write_index(tokens_dir, [len(rows)], {"tokens": sum(map(len, rows)), "images": len(rows)})
    images = ImageInputs(model_dir)
    teacher = taught(teacher_job(model_dir, tokens_dir, tmp_path / "teacher", images=images))
    config = AutoConfig.from_pretrained(model_dir)
    ranks = {spec.name: RANK for spec in block_linears(empty_model(config))}
    emulator = tmp_path / "emulator"
    save_factors(model_dir, emulator, ranks)
    job = training_job(emulator, tokens_dir, tmp_path, tuple(ranks))
    train(replace(job, teacher_dir=teacher.out_dir, images=images), LoneSession(tmp_path / "heal"))
    losses = [json.loads(line)["loss"] for line in job.log_path.read_text().splitlines()]
    assert sum(losses[-5:]) < sum(losses[:5])


def asked_about(colour: tuple[int, int, int]) -> dict[str, Any]:
    """A question about an image of one colour."""
    stream = io.BytesIO()
    Image.new("RGB", (12, 8), colour).save(stream, "PNG")
    asked = [{"type": "image", "image": stream.getvalue()}, {"type": "text", "text": "What colour?"}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "red"}]}


def save_factors(model_dir: Path, directory: Path, ranks: dict[str, int]) -> None:
    """An emulator of any model in which all linears are cut by a plain SVD."""
    model = make_emulator(load_model(model_dir), ranks)
    model.save_pretrained(directory, save_original_format=False)
    write_emulator_config(directory, model.config, ranks)
    copy_tokenizer(model_dir, directory)
