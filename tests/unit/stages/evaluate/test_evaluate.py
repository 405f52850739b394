"""Evaluating a slice of the held-out rows: the variants, their scores, and that slices add up."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stage_artifacts import Artifacts
from tiny import save_emulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from emloc_ray.config.steps import VARIANTS
from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import TokenShards, shard_name, write_index, write_shard
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.modeling.adapter_files import Adapter, LoraModule, write_adapter
from emloc_ray.modeling.scoring import Score, score_rows
from emloc_ray.stages.evaluate import evaluate
from emloc_ray.stages.evaluate.evaluate import EvaluationJob, VariantResult, evaluate_slice
from emloc_ray.stages.merge.merge import MergeJob, merge_shard
from emloc_ray.stages.ray.tasks import Resources


@pytest.fixture(scope="session")
def job(artifacts: Artifacts, tmp_path_factory: pytest.TempPathFactory) -> EvaluationJob:
    """An emulator, a corrected adapter that is the trained one, and a merged model, for real."""
    root = tmp_path_factory.mktemp("evaluation")
    shutil.copytree(artifacts.model_dir, root / "merged")
    merging = MergeJob(artifacts.model_dir, artifacts.adapter_dir, root / "merged", artifacts.specs)
    for shard in Checkpoint(artifacts.model_dir).shards:
        merge_shard(merging, shard, root / "merged" / shard.file.name)
    return EvaluationJob(
        model_dir=artifacts.model_dir,
        emulator_dir=save_emulator(artifacts.model_dir, root / "emulator"),
        trained_adapter_dir=artifacts.adapter_dir,
        corrected_adapter_dir=artifacts.adapter_dir,
        finished_adapter_dir=artifacts.adapter_dir,
        merged_dir=root / "merged",
        tokens_dir=artifacts.tokens_dir,
        max_seq_length=64,
        num_generations=2,
        num_exact_match=3,
        max_new_tokens=3,
    )


def all_variants(job: EvaluationJob, num_parts: int = 1) -> dict[str, Score]:
    results = [
        result
        for family in ("original", "emulator", "merged")
        for part in range(num_parts)
        for result in evaluate_slice(job, family, part, num_parts)
    ]
    return {v: sum((r.score for r in results if r.variant == v), Score()) for v in VARIANTS}


@pytest.fixture(scope="session")
def scores(job: EvaluationJob) -> dict[str, Score]:
    """Of all variants on all rows at once."""
    return all_variants(job)


def brute_force(model: Any, job: EvaluationJob) -> tuple[float, int]:
    """Summed loss and count of completion tokens, one row at a time, with transformers' own logits."""
    shards = TokenShards(job.tokens_dir)
    total, count = 0.0, 0
    for position in range(len(shards)):
        row = shards.row(position)
        with torch.no_grad():
            logs = torch.log_softmax(model(input_ids=torch.tensor([row.input_ids])).logits[0].double(), -1)
        for place in range(1, len(row)):
            if row.completion_mask[place]:
                total -= float(logs[place - 1, row.input_ids[place]])
                count += 1
    return total, count


def test_scores_are_those_of_the_models_themselves(job: EvaluationJob, scores: dict[str, Score]) -> None:
    assert job.merged_dir is not None
    original = AutoModelForCausalLM.from_pretrained(job.model_dir)
    for variant, model in (
        ("original", original),
        ("emulator", AutoModelForCausalLM.from_pretrained(job.emulator_dir)),
        ("merged", AutoModelForCausalLM.from_pretrained(job.merged_dir)),
    ):
        total, count = brute_force(model, job)
        assert scores[variant].num_tokens == count
        assert scores[variant].loss_sum == pytest.approx(total, rel=1e-5)
    with torch.no_grad():  # the adapter by hand
        for name in (adapter := Adapter(job.trained_adapter_dir)).names:
            lora = adapter.module(name)
            original.get_submodule(name).weight += lora.scale * lora.lora_b @ lora.lora_a
    total, _ = brute_force(original, job)
    for variant in ("uncorrected", "corrected", "merged"):
        assert scores[variant].loss_sum == pytest.approx(total, rel=1e-5)
    assert scores["emulator_adapter"].loss_sum != pytest.approx(scores["emulator"].loss_sum, rel=1e-4)


def test_slices_add_up(job: EvaluationJob, scores: dict[str, Score]) -> None:
    sliced = all_variants(replace(job, num_generations=0, num_exact_match=0), 2)
    for variant in VARIANTS:
        assert sliced[variant].num_tokens == scores[variant].num_tokens
        assert sliced[variant].num_correct == scores[variant].num_correct
        assert sliced[variant].loss_sum == pytest.approx(scores[variant].loss_sum, rel=1e-5)


def test_only_the_first_rows_are_completed_by_the_first_and_the_last_model(job: EvaluationJob) -> None:
    results = [r for family in ("original", "emulator", "merged") for r in evaluate_slice(job, family, 0, 2)]
    completed = {result.variant: len(result.completions) for result in results}
    assert completed == {**dict.fromkeys(VARIANTS, 0), "original": 2, "merged": 2}  # rows 0 and 2 of 0, 1, 2
    quiet = replace(job, num_generations=0, num_exact_match=0)
    assert all(r.completions == () for r in evaluate_slice(quiet, "merged", 0, 1))


def test_a_variant_alone_is_scored_as_among_all(job: EvaluationJob, scores: dict[str, Score]) -> None:
    for variant in VARIANTS:
        alone = replace(job, variants=(variant,), num_generations=0, num_exact_match=0)
        [family] = alone.families
        [found] = evaluate_slice(alone, family, 0, 1)
        assert found.variant == variant
        assert found.score.loss_sum == pytest.approx(scores[variant].loss_sum, rel=1e-6)
    assert replace(job, merged_dir=None).scored == VARIANTS[:-1]
    few = replace(job, variants=("original", "corrected"))
    assert few.generating == ("original", "corrected")
    assert {r.variant: len(r.completions) for r in evaluate_slice(few, "original", 0, 2)} == {
        "original": 2,
        "corrected": 2,
    }


def test_an_adapter_that_was_left_as_it_was_is_scored_once(job: EvaluationJob, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def noted(*arguments: Any, name: str, **keys: Any) -> Score:
        names.append(name)
        return score_rows(*arguments, name=name, **keys)

    monkeypatch.setattr(evaluate, "score_rows", noted)
    scores = {result.variant: result.score for result in evaluate_slice(job, "original", 0, 1)}
    assert names == ["original", "uncorrected", "finished"]
    assert scores["corrected"] == scores["uncorrected"] != scores["original"]


def test_the_emulator_alone_is_scored_on_fewer_rows_at_once(
    job: EvaluationJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: dict[str, int] = {}

    def noted(*arguments: Any, name: str, batch_size: int, **keys: Any) -> Score:
        batches[name] = batch_size
        return score_rows(*arguments, name=name, batch_size=batch_size, **keys)

    monkeypatch.setattr(evaluate, "score_rows", noted)
    for family in job.families:
        evaluate_slice(replace(job, batch_size=1, rows_on_original=4), family, 0, 1)
    assert {name for name, rows in batches.items() if rows == 1} == {"emulator", "emulator_adapter"}
    assert {batches[name] for name in ("original", "uncorrected", "merged")} == {4}


@pytest.mark.slow
@pytest.mark.parametrize("hold", ["offloaded", "all_offloaded"])
def test_weights_that_come_and_go_come_once_for_all_variants(
    hold: str, job: EvaluationJob, block_reads: Counter[str], tmp_path: Path
) -> None:
    trained = Adapter(job.trained_adapter_dir)
    modules = [trained.module(name) for name in trained.names]
    halved = [replace(module, lora_b=module.lora_b / 2) for module in modules]
    write_adapter(tmp_path / "halved", trained.config, halved)
    resident = replace(job, corrected_adapter_dir=tmp_path / "halved", batch_size=2, rows_on_original=2)
    apart = {result.variant: result for name in resident.families for result in evaluate_slice(resident, name, 0, 1)}
    offloaded = replace(resident, hold=hold)
    assert offloaded.families == ("original", "emulator")
    alone = evaluate_slice(replace(offloaded, variants=("original",)), "original", 0, 1)
    once = Counter(block_reads)
    block_reads.clear()
    together = evaluate_slice(offloaded, "original", 0, 1)
    assert [result.variant for result in together] == ["original", "uncorrected", "corrected", "finished", "merged"]
    assert block_reads == once
    assert once
    assert alone[0].score.loss_sum == pytest.approx(apart["original"].score.loss_sum, rel=1e-6)
    for result in together:
        assert result.score.loss_sum == pytest.approx(apart[result.variant].score.loss_sum, rel=1e-5)
        assert result.completions == apart[result.variant].completions


def test_an_emulator_that_is_the_original_is_scored_as_that(job: EvaluationJob) -> None:
    plain = replace(job, emulator_dir=job.model_dir)
    assert plain.families == ("original", "merged")
    scores = {result.variant: result.score for result in evaluate_slice(plain, "original", 0, 1)}
    assert scores["emulator"] == scores["original"] != scores["emulator_adapter"] == scores["uncorrected"]
    alone = replace(plain, variants=("emulator_adapter",))
    [found] = evaluate_slice(alone, "original", 0, 1)
    assert found.score.loss_sum == pytest.approx(scores["uncorrected"].loss_sum, rel=1e-6)


def test_the_corrected_adapter_is_the_one_that_is_read(job: EvaluationJob, tmp_path: Path) -> None:
    trained = Adapter(job.trained_adapter_dir)
    modules = [trained.module(name) for name in trained.names]
    silent = [LoraModule(m.name, m.lora_a, torch.zeros_like(m.lora_b), 1.0) for m in modules]
    write_adapter(tmp_path / "silent", trained.config, silent)
    silenced = replace(job, corrected_adapter_dir=tmp_path / "silent")
    scores = {result.variant: result.score for result in evaluate_slice(silenced, "original", 0, 1)}
    assert scores["corrected"].loss_sum == pytest.approx(scores["original"].loss_sum, rel=1e-6)
    assert scores["uncorrected"].loss_sum != pytest.approx(scores["original"].loss_sum, rel=1e-4)


def test_the_reference_is_the_answer_that_was_asked_for(job: EvaluationJob, tmp_path: Path) -> None:
    """A conversation, or packed rows, go on after it."""
    tokenizer = AutoTokenizer.from_pretrained(job.model_dir)
    turns = [("ask one", False), ("first answer", True), ("ask two", False), ("second answer", True)]
    parts = [(tokenizer.encode(f" {text}", add_special_tokens=False), is_answer) for text, is_answer in turns]
    ids = [token for tokens, _ in parts for token in tokens]
    mask = [is_answer for tokens, is_answer in parts for _ in tokens]
    write_shard(tmp_path / shard_name(0), [Tokens(ids, mask)])
    write_index(tmp_path, [1], {})
    answer = tokenizer.decode(parts[1][0]).strip()
    texts = {"original": ["something else"], "merged": [answer]}
    found = evaluate.compare_texts(replace(job, tokens_dir=tmp_path, max_new_tokens=32), texts)
    assert found["generations"][0]["reference"] == answer
    assert found["exact_match"] == {"original": 0.0, "merged": 1.0, "num_prompts": 1}


def test_a_reference_that_no_completion_is_as_long_as_is_not_matched(job: EvaluationJob, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(job.model_dir)
    answers = [
        [*tokenizer.encode("a" * length, add_special_tokens=False), tokenizer.eos_token_id] for length in (40, 5)
    ]
    write_shard(tmp_path / shard_name(0), [Tokens([5, *ids], [False] + [True] * len(ids)) for ids in answers])
    write_index(tmp_path, [2], {})
    few = replace(job, tokens_dir=tmp_path, max_new_tokens=5)
    texts = {variant: ["a" * 5] * 2 for variant in few.generating}
    assert evaluate.compare_texts(few, texts)["exact_match"] == {"original": 1.0, "merged": 1.0, "num_prompts": 1}
    none = evaluate.compare_texts(replace(few, max_new_tokens=4), texts)
    assert none["exact_match"] == {}
    assert len(none["generations"]) == 2


def test_a_reference_that_was_cut_is_not_matched(job: EvaluationJob, tmp_path: Path) -> None:
    """Of three rows of at most four tokens the first goes on, as the row did; the others end in time. A plain text before them
    asks nothing."""
    tokenizer = AutoTokenizer.from_pretrained(job.model_dir)
    answers = [[20, 21, 22], [20, 21, tokenizer.eos_token_id], [20, 21]]
    rows = [Tokens([5, *ids], [False] + [True] * len(ids)) for ids in answers]
    write_shard(tmp_path / shard_name(0), [Tokens([20, 21, 22], [True] * 3), *rows])
    write_index(tmp_path, [4], {})
    short = replace(job, tokens_dir=tmp_path, max_seq_length=4, max_new_tokens=32, num_exact_match=4)
    perfect = ["", tokenizer.decode([20, 21, 22, 23]).strip(), *[tokenizer.decode([20, 21]).strip()] * 2]
    texts = dict.fromkeys(short.generating, perfect)
    exact = dict.fromkeys(short.generating, 1.0)
    assert evaluate.compare_texts(short, texts)["exact_match"] == {**exact, "num_prompts": 2}


def test_texts_of_several_workers_stand_beside_their_own_references(
    job: EvaluationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of five rows one worker completes the first, the third and the fifth."""
    tokenizer = AutoTokenizer.from_pretrained(job.model_dir)
    answers = [tokenizer.encode(f"answer {number}", add_special_tokens=False) for number in range(5)]
    write_shard(tmp_path / shard_name(0), [Tokens([5, *ids], [False] + [True] * len(ids)) for ids in answers])
    write_index(tmp_path, [5], {})

    def here(function: Any, shared: EvaluationJob, pieces: Any, *others: Any) -> list[Any]:
        texts = [tokenizer.decode(ids).strip() for ids in answers]
        parts = [(family, tuple(texts[part::number])) for _, (family, part, number) in pieces]
        return [[VariantResult(family, Score(1.0, 1, 1), completed)] for family, completed in parts]

    monkeypatch.setattr(evaluate, "run_tasks", here)
    few = replace(job, tokens_dir=tmp_path, variants=("original", "merged"), max_new_tokens=32)
    few = replace(few, num_exact_match=4, num_generations=5)
    found = evaluate.evaluate(few, Resources(num_workers=2))
    assert found["exact_match"] == {"original": 1.0, "merged": 1.0, "num_prompts": 4}
    assert [sample["merged"] for sample in found["generations"]] == [f"answer {number}" for number in range(5)]


def test_of_many_rows_each_is_scored_once(job: EvaluationJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / shard_name(0), [Tokens([number % 300, 5], [False, True]) for number in range(2500)])
    write_index(tmp_path, [2500], {})
    seen: list[int] = []

    def noted(model: Any, rows: Sequence[Tokens], **keys: Any) -> Score:
        seen.extend(row.input_ids[0] for row in rows)
        return Score(0.0, 0, len(rows))

    monkeypatch.setattr(evaluate, "score_rows", noted)
    few = replace(job, tokens_dir=tmp_path, variants=("original",), num_exact_match=0, num_generations=0)
    found = [evaluate_slice(few, "original", part, 2)[0].score.num_tokens for part in range(2)]
    assert found == [1250, 1250]
    assert sorted(seen) == sorted(number % 300 for number in range(2500))
