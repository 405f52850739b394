"""Evaluate: every variant of the model on the held-out rows, a slice of them a task."""

import filecmp
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftModel

from emloc_ray.config.steps import ON_EMULATOR, VARIANTS, served_variant
from emloc_ray.data.formats import Tokens
from emloc_ray.data.processors import ImageInputs
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.store.node_cache import ensure
from emloc_ray.modeling.adapter import detach_adapter, load_adapter
from emloc_ray.modeling.adapter_files import CONFIG_NAME, WEIGHTS_NAME, Adapter
from emloc_ray.modeling.adapter_merging import compute_as_merged
from emloc_ray.modeling.holding import Offloaded, open_model
from emloc_ray.modeling.scoring import Score, complete, prompt_length, score_rows
from emloc_ray.stages.ray.losses import Losses, Tell, unheard
from emloc_ray.stages.ray.tasks import Progress, Resources, run_tasks, silent

_ROWS_AT_ONCE = 512  # rows of like length share a batch among these


@dataclass(frozen=True)
class EvaluationJob:
    """Artifact paths and flat settings of the stage."""

    model_dir: Path
    emulator_dir: Path
    trained_adapter_dir: Path
    corrected_adapter_dir: Path
    merged_dir: Path | None  # None where the adapter cannot be merged
    tokens_dir: Path
    max_seq_length: int
    loss_on: str = "completion"
    batch_size: int = 8
    rows_on_original: int = 8  # of a batch of all that is not the emulator
    pad_token_id: int = 0
    num_generations: int = 4
    num_exact_match: int = 32
    max_new_tokens: int = 32
    prompts_at_once: int = 8
    variants: tuple[str, ...] = VARIANTS
    model_options: dict[str, Any] = field(default_factory=dict)
    hold: str = "resident"  # of the original and the merged model
    finished_adapter_dir: Path | None = None  # None where it is left as corrected
    images: ImageInputs | None = None

    @property
    def scored(self) -> tuple[str, ...]:
        """Those of the variants that there are."""
        lacking = {"merged": self.merged_dir is None, "finished": self.finished_adapter_dir is None}
        return tuple(name for name in self.variants if not lacking.get(name, False))

    @property
    def families(self) -> tuple[str, ...]:
        """The models that are loaded, each for some of the variants."""
        return tuple(dict.fromkeys(map(self.family, self.scored)))

    def family(self, variant: str) -> str:
        """The model that is loaded for a variant: the original for all where it is the emulator too. One whose weights come and
        go is merged on the way: they come once for all."""
        family = "emulator" if variant in ON_EMULATOR else "merged" if variant == "merged" else "original"
        if family == "emulator" and self.emulator_dir == self.model_dir:
            return "original"
        return "original" if family == "merged" and self.hold != "resident" else family

    def adapter(self, variant: str) -> Path | None:
        """What a variant has of adapters, to be plugged in or merged."""
        final = self.finished_adapter_dir or self.corrected_adapter_dir
        adapters = {"emulator_adapter": self.trained_adapter_dir, "uncorrected": self.trained_adapter_dir}
        adapters |= {"corrected": self.corrected_adapter_dir, "finished": final, "merged": final}
        return adapters.get(variant)

    @property
    def generating(self) -> tuple[str, str]:
        """The variants that complete prompts: before and after."""
        return ("original", served_variant(self.scored))


@dataclass(frozen=True)
class VariantResult:
    """One variant on one slice of the rows."""

    variant: str
    score: Score
    completions: tuple[str, ...] = ()


def evaluate_slice(job: EvaluationJob, family: str, part: int, num_parts: int) -> list[VariantResult]:
    """Every variant that one base model serves, on rows ``part, part + num_parts, …`` of the held-out split. Where the model's
    weights come and go, all variants go through its blocks together."""
    shards = TokenShards(job.tokens_dir)
    positions = range(part, len(shards), num_parts)
    num_prompts = max(job.num_generations, job.num_exact_match)
    prompts = [shards.row(position) for position in positions if position < num_prompts]
    variants = [name for name in job.scored if job.family(name) == family]
    same_as = _same_scores(job, family, variants)
    to_run = [variant for variant in variants if variant not in same_as]

    def measure(variant: str, model: Any) -> VariantResult:
        score = _score(job, family, model, shards, positions, variant)
        completes = any(name in job.generating for name in variants if same_as.get(name, name) == variant)
        return VariantResult(variant, score, tuple(_completions(job, model, prompts) if completes else ()))

    directories = {"original": job.model_dir, "emulator": job.emulator_dir, "merged": job.merged_dir}
    adapters = [None if variant == family else job.adapter(variant) for variant in to_run]
    hold = "resident" if family == "emulator" else job.hold
    models = list(zip(to_run, adapters, strict=True))
    results = dict(zip(to_run, _measure_each(job, directories[family], hold, models, measure), strict=True))
    return [replace(results[same_as.get(variant, variant)], variant=variant) for variant in variants]


def _same_scores(job: EvaluationJob, family: str, variants: Sequence[str]) -> dict[str, str]:
    """Variants that need no pass of their own, each with the variant whose score it has."""
    same = {"emulator": "original", "emulator_adapter": "uncorrected"} if family == "original" else {}
    if {"corrected", "uncorrected"} <= {*variants} and _is_as_trained(job):
        same["corrected"] = "uncorrected"
    return {one: other for one, other in same.items() if {one, other} <= {*variants}}


def _measure_each(
    job: EvaluationJob,
    directory: Path | None,
    hold: str,
    named: Sequence[tuple[str, Path | None]],
    measure: Callable[[str, Any], VariantResult],
) -> list[VariantResult]:
    """``measure(name, model)`` of a base model with each of the adapters: one after another, or together where the base's weights
    come and go. ``merged`` is then computed from the weights as they come."""
    assert directory is not None
    if hold == "resident":
        model, results = open_model(directory, **job.model_options), []
        for name, adapter in named:
            bare = detach_adapter(model) if isinstance(model, PeftModel) else model
            model = bare if adapter is None else load_adapter(bare, adapter)
            results.append(measure(name, model.eval()))
        return results
    held = Offloaded(directory, ends_offloaded=hold == "all_offloaded", num_models=len(named), **job.model_options)
    passes = []
    for model, (name, adapter) in zip(held.models, named, strict=True):
        if name == "merged" and adapter is not None:
            compute_as_merged(model, Adapter(adapter), held.weights)
        elif adapter is not None:
            model = load_adapter(model, adapter)
        passes.append(functools.partial(measure, name, model.eval()))
    return held.in_step(passes)


def _score(job: EvaluationJob, family: str, model: Any, shards: TokenShards, positions: range, name: str) -> Score:
    """The score of the rows at ``positions``, held :data:`_ROWS_AT_ONCE` at a time."""
    total = Score()
    for start in range(0, len(positions), _ROWS_AT_ONCE):
        total += score_rows(
            model,
            [shards.row(position) for position in positions[start : start + _ROWS_AT_ONCE]],
            batch_size=job.batch_size if family == "emulator" else job.rows_on_original,
            loss_on=job.loss_on,
            pad_token_id=job.pad_token_id,
            name=name,
            images=job.images,
        )
    return total


def _is_as_trained(job: EvaluationJob) -> bool:
    """Whether the correction left every byte of the adapter, so that one score is both variants'."""
    folders = (job.trained_adapter_dir, job.corrected_adapter_dir)
    for folder in folders:
        ensure(folder)
    names = (CONFIG_NAME, WEIGHTS_NAME)
    same, *_ = filecmp.cmpfiles(*folders, names, shallow=False)
    return len(same) == len(names)


def _completions(job: EvaluationJob, model: Any, rows: Sequence[Tokens]) -> list[str]:
    if not rows:
        return []
    tokenizer = _tokenizer(job)
    return complete(
        model,
        tokenizer,
        rows,
        max_new_tokens=job.max_new_tokens,
        batch_size=job.prompts_at_once,
        images=job.images,
    )


def _tokenizer(job: EvaluationJob) -> Any:
    from transformers import AutoTokenizer

    directory = job.merged_dir or job.model_dir
    ensure(directory, weights=False)
    trusted = job.model_options.get("trust_remote_code", False)
    return AutoTokenizer.from_pretrained(directory, trust_remote_code=trusted)


def evaluate(
    job: EvaluationJob, resources: Resources, progress: Progress = silent, tell: Tell = unheard
) -> dict[str, Any]:
    """Scores the job's variants, ``merged`` where there is one. Returns ``evaluation`` as in metrics.json, ``exact_match`` and
    ``generations``."""
    num_parts = min(resources.num_workers, len(TokenShards(job.tokens_dir)))
    work = list(itertools.product(job.families, range(num_parts)))
    pieces = [
        (f"part {part + 1} of {num_parts} of the {family} model", (family, part, num_parts)) for family, part in work
    ]
    results = run_tasks(evaluate_slice, job, pieces, resources, Losses("evaluate", tell), progress)
    by_piece = list(zip(work, results, strict=True))
    evaluation = {}
    for variant in job.scored:
        scores = [r.score for _, slice_results in by_piece for r in slice_results if r.variant == variant]
        evaluation[variant] = sum(scores, Score()).metrics()
    texts = {v: _interleave(by_piece, v, num_parts) for v in job.generating}
    return {
        "num_workers": num_parts,
        "evaluation": evaluation,
        **compare_texts(job, texts),
    }


def _interleave(by_piece: Sequence[Any], variant: str, num_parts: int) -> list[str]:
    by_part = {part: r.completions for (_, part), results in by_piece for r in results if r.variant == variant}
    lines = itertools.zip_longest(*(by_part[part] for part in range(num_parts)))
    return [text for line in lines for text in line if text is not None]


def compare_texts(job: EvaluationJob, texts: dict[str, list[str]]) -> dict[str, Any]:
    """The share of prompts whose generated text is the reference, by variant, and the first samples; the keys of metrics.json.
    A reference of more than ``max_new_tokens``, or that ``max_seq_length`` cut, is not matched: no completion ends there."""
    tokenizer = _tokenizer(job)
    shards = TokenShards(job.tokens_dir)
    samples, asked, matches = [], 0, dict.fromkeys(job.generating, 0)
    count = min(len(shards), len(texts[job.generating[1]]))
    for position in range(count):
        row = shards.row(position)
        cut = prompt_length(row)
        prompt = tokenizer.decode(row.input_ids[:cut], skip_special_tokens=True)
        # The first answer, which is what is generated: a conversation or packed rows go on after it.
        end = next((n for n in range(cut, len(row)) if not row.completion_mask[n]), len(row))
        reference = tokenizer.decode(row.input_ids[cut:end], skip_special_tokens=True).strip()
        answers = {variant: texts[variant][position] for variant in job.generating}
        is_ended = row.input_ids[end - 1] == tokenizer.eos_token_id
        is_whole = is_ended or end < len(row) or len(row) < job.max_seq_length
        asks = position < job.num_exact_match and not row.completion_mask[0]  # a plain text has no prompt
        if asks and is_whole and end - cut - is_ended <= job.max_new_tokens:
            asked += 1
            for variant, text in answers.items():
                matches[variant] += text == reference
        if position < job.num_generations:
            samples.append({"prompt": prompt, "reference": reference, **answers})
    exact = {variant: hits / asked for variant, hits in matches.items()} if asked else {}
    return {"exact_match": {**exact, "num_prompts": asked} if exact else {}, "generations": samples}
