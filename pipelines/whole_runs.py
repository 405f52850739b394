"""Benchmarks of whole stages: Ray against the same functions in one process, a training step, growth with size."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from figures import CONFIG, Figures, calibrated, emulated, figure, interleaved
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, TrainingArguments

import emloc_ray
from emloc_ray.config import RunConfig
from emloc_ray.core.ranks import rank_for_ratio
from emloc_ray.data.formats import Tokens
from emloc_ray.data.ingest import SampleOrder, read_micro_steps
from emloc_ray.data.token_shards import TokenShards, collate, shard_name, write_index, write_shard
from emloc_ray.io.checkpoint import Checkpoint
from emloc_ray.io.grams import GramStore, StoredGram, reduce_slots, write_gram_index, write_gram_shard
from emloc_ray.jobs import Jobs
from emloc_ray.modeling.adapter import attach_adapter, lora_config, save_trained_adapter
from emloc_ray.modeling.architecture import block_linears, empty_model, shared_inputs
from emloc_ray.modeling.loading import load_model
from emloc_ray.modeling.loss import label_mask, token_loss
from emloc_ray.preparation import prepare
from emloc_ray.stages.calibration_job import CalibrationJob
from emloc_ray.stages.correct import correct_adapter
from emloc_ray.stages.evaluate import evaluate_slice
from emloc_ray.stages.factorize import FactorizationJob, factorize_group
from emloc_ray.stages.finetune import EmulatorTrainer, FinetuneJob, RankBatches
from emloc_ray.stages.merge import merge_shard, output_shards
from emloc_ray.stages.resident_slot import ResidentSlot

THREADS = 2
_SIZES = {"small": (8, 2, 8), "large": (96, 24, 64)}  # calibration rows, steps, held-out rows


def ray_overhead(out: Path) -> Figures:
    """The stages from calibrate to evaluate, of the quickstart's model, at two sizes of work.

    What starting Ray and its workers takes is the same at both: the ratio compares what the added work adds to each side.
    """
    seconds: dict[str, list[float]] = {"ray": [], "plain": []}
    for size in _SIZES:
        config = _sized(out, size)
        emloc_ray.run(config, until="calibrate", fresh=True)  # imports the model, makes the tokens
        for side, action in (("ray", _run_on_ray), ("plain", _run_plain)):
            begin = time.perf_counter()
            action(config)
            seconds[side].append(time.perf_counter() - begin)
            print(f"{size} {side}: {seconds[side][-1]:.1f} s", file=sys.stderr, flush=True)
        shutil.rmtree(config.run_dir)
    added = {side: large - small for side, (small, large) in seconds.items()}
    (small_ray, _), (small_plain, _) = seconds["ray"], seconds["plain"]
    start = small_ray - added["ray"] / added["plain"] * small_plain
    return {
        "work on Ray against the same functions in one process": figure(added["ray"], added["plain"], "s"),
        "starting Ray and six stages' workers": figure(start, small_plain, "s (baseline: the small run's work)"),
    }


def _sized(out: Path, size: str) -> RunConfig:
    samples, steps, held_out = _SIZES[size]
    return emloc_ray.load_config(
        CONFIG,
        [
            f"run_dir={out / f'overhead-{size}'}",
            f"calibration.num_calibration_samples={samples}",
            *(f"{section}.num_workers=1" for section in ("calibration", "emulator", "evaluation")),
            *(f"{section}.cpus_per_worker={THREADS}" for section in ("calibration", "emulator", "evaluation")),
            f"finetune.max_steps={steps}",
            f"evaluation.num_samples={held_out}",
            "correction.method=projection",
            "evaluation.num_exact_match=0",
            "evaluation.num_generations=0",
        ],
    )


def _run_on_ray(config: RunConfig) -> None:
    emloc_ray.run(config, begin="calibrate")


def _run_plain(config: RunConfig) -> None:
    """The stages' own functions, one after the other, no Ray; from the adapter on they read what the run left."""
    torch.set_num_threads(THREADS)
    prepared = prepare(config)
    jobs = Jobs(prepared, prepared.run.path("model"))
    plain = prepared.run.root.with_name(prepared.run.name + "-plain")
    grams = _calibrate_plain(jobs, plain)
    factorization = jobs.factorization()
    for number, group in enumerate(factorization.groups):
        factorize_group(factorization, group, grams.stored(group[0].name), plain / "emulator" / f"{number}.safetensors")
    _train_plain(jobs.finetuning("plain"), plain)
    correct_adapter(dataclasses.replace(jobs.correction(), out_dir=plain / "adapter"))
    merging = jobs.merging()
    for name, shard in output_shards(Checkpoint(jobs.model_dir).shards, None):
        merge_shard(merging, shard, plain / "merged" / name)
    for family in ("original", "emulator", "merged"):
        evaluate_slice(jobs.evaluation(), family, 0, 1, THREADS)
    shutil.rmtree(plain)


def _calibrate_plain(jobs: Jobs, plain: Path) -> GramStore:
    job = jobs.calibration()
    slot = ResidentSlot(job, plain / "slot.safetensors", THREADS)
    for number in job.shards_of(0, 1):
        slot.accumulate(number)
    slot.commit()
    names = [group[0] for group in job.groups]
    grams = reduce_slots([slot.path], names)
    write_gram_shard(plain / "calibration" / "grams.safetensors", grams)
    files = dict.fromkeys(names, "grams.safetensors")
    write_gram_index(plain / "calibration", job.groups, files, {name: gram.num_tokens for name, gram in grams.items()})
    return GramStore(plain / "calibration")


class _PlainBatches(RankBatches):
    """The same batches, read without Ray Data."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for step in range(self.job.max_steps):
            table = read_micro_steps(self.job.tokens_dir, self.order, step, step + 1)
            columns = table["input_ids"].to_pylist(), table["completion_mask"].to_pylist()
            batch = collate([Tokens(*row) for row in zip(*columns, strict=True)], self.job.pad_token_id)
            labels = batch["input_ids"].masked_fill(~label_mask(batch, self.job.loss_on), -100)
            yield {**batch, "labels": labels}


def _train_plain(job: FinetuneJob, plain: Path) -> None:
    arguments = TrainingArguments(
        output_dir=str(plain / "training"),
        max_steps=job.max_steps,
        per_device_train_batch_size=job.batch_size,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        **job.training_arguments,
    )
    model = attach_adapter(load_model(job.emulator_dir, **job.model_options), lora_config(**job.adapter))
    order = SampleOrder(len(TokenShards(job.tokens_dir)), job.batch_size, 0, 1, job.seed)
    EmulatorTrainer(job, _PlainBatches(job, order, 1), model=model, args=arguments).train()
    save_trained_adapter(model, plain / "adapter_emulator", targets=job.portable_targets, base_model=job.base_model)


def training_step(out: Path) -> Figures:
    """Steps of LoRA on every linear of the quickstart's emulator, and of the original: 8 rows, no checkpointing."""
    _, run = calibrated(out)
    shards = TokenShards(run / "data" / "tokens" / "calibration")
    batch = collate([shards.row(position) for position in range(8)], 0)
    actions = []
    for directory in (emulated(run, out), run / "model"):
        targets = [spec.name for spec in block_linears(empty_model(AutoConfig.from_pretrained(run / "model")))]
        model = attach_adapter(load_model(directory), lora_config(target_modules=targets, r=8, lora_alpha=16)).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        actions.append(functools.partial(_step, model, optimizer, batch))
    seconds = interleaved(actions, repeats=9)
    return {"a training step on the emulator against one on the original": figure(*seconds, "s")}


def _step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    result = token_loss(model, batch, "completion")
    (result.loss_sum / result.num_tokens).backward()
    optimizer.step()
    optimizer.zero_grad()


def growth(out: Path) -> Figures:
    """Calibrating and factorizing random models of 1, 2 and 4 times a depth, and one over 1, 2 and 4 times the rows.

    The ratio is the smallest, times how much more there was, over the larger: 1 is linear, more is better; of the peak
    memory that rows take, 1 is flat.
    """
    found: Figures = {}
    measured = {depth: _grown(out, depth, 64) for depth in (6, 12, 24)}
    measured_rows = {rows: _grown(out, 6, rows) for rows in (128, 256)}
    for what in ("seconds", "peak"):
        unit, scale = ("s", 1.0) if what == "seconds" else ("MiB", 2.0**20)
        base = measured[6][what] / scale
        for times, depth in ((2, 12), (4, 24)):
            ours = measured[depth][what] / scale
            found[f"{what} at {times} × the depth"] = figure(
                ours, times * base, f"{unit} (baseline: {times} × one depth)"
            )
        for times, rows in ((2, 128), (4, 256)):
            expected = base if what == "peak" else times * measured[6]["calibrate_seconds"]
            ours = measured_rows[rows]["peak" if what == "peak" else "calibrate_seconds"] / scale
            found[f"{what} at {times} × the calibration rows"] = figure(ours, expected, unit)
    return found


def _grown(out: Path, depth: int, rows: int) -> dict[str, float]:
    """A calibration and factorization in a process of its own, the least of three."""
    command = [sys.executable, __file__, str(out / f"growth-{depth}"), str(depth), str(rows)]
    outputs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(3)]
    found: list[dict[str, float]] = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {key: min(each[key] for each in found) for key in found[0]}


def _grow(directory: Path, depth: int, num_rows: int) -> None:
    """Prints seconds and the peak resident set above the imports."""
    torch.set_num_threads(THREADS)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=depth,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1000,
    )
    if not (directory / "config.json").is_file():
        LlamaForCausalLM(config).save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    rows = [Tokens(torch.randint(3, 1000, (128,), generator=generator).tolist(), [True] * 128) for _ in range(num_rows)]
    tokens = directory / f"tokens-{num_rows}"
    for number in range(num_rows // 32):
        write_shard(tokens / shard_name(number), rows[32 * number : 32 * (number + 1)])
    write_index(tokens, [32] * (num_rows // 32), {})
    baseline = psutil.Process().memory_info().rss
    begin = time.perf_counter()
    model = empty_model(config)
    specs = {spec.name: spec for spec in block_linears(model)}
    names = tuple(tuple(group) for group in shared_inputs(model, list(specs.values())))
    slot = ResidentSlot(
        CalibrationJob(directory, tokens, names, (0, num_rows // 32)), directory / "slot.safetensors", THREADS
    )
    for number in range(num_rows // 32):
        slot.accumulate(number)
    calibrate_seconds = time.perf_counter() - begin
    for group in names:
        grams = {group[0]: slot.hooks.grams[group[0]]}
        write_gram_shard(directory / "grams.safetensors", grams)
        ranks = {name: rank_for_ratio(specs[name].out_features, specs[name].in_features, 0.5) or 1 for name in group}
        work = tuple(specs[name] for name in group)
        job = FactorizationJob(directory, directory, (work,), ranks)
        gram = StoredGram(directory / "grams.safetensors", group[0])
        factorize_group(job, work, gram, directory / "factors.safetensors")
    seconds = time.perf_counter() - begin
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")) - baseline
    print(json.dumps({"seconds": seconds, "calibrate_seconds": calibrate_seconds, "peak": peak}))


if __name__ == "__main__":
    _grow(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
