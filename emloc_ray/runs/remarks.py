"""Remarks on a run where nothing is wrong: each function gives a sentence, or None."""

import filecmp
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from emloc_ray.config.base import Section, StageConfig
from emloc_ray.config.emulator import EmulatorConfig
from emloc_ray.config.finetune import FinetuneConfig
from emloc_ray.config.schema import WORKER_SECTIONS, CorrectionConfig, RunConfig
from emloc_ray.data.processors import IMAGE_SIDE
from emloc_ray.io.available_memory import available_bytes
from emloc_ray.modeling.matching import lookup
from emloc_ray.planning.gpu_speeds import speed_of
from emloc_ray.planning.layout import Layout
from emloc_ray.planning.machine import WITH_MODELS, cpu_capabilities, gpu_without_bfloat16, has_bfloat16
from emloc_ray.planning.measured import measured_for
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.model_bytes import model_dtype
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.training import healing_training, warmup_in_steps
from emloc_ray.planning.work import num_sequences, num_slots, packed, rows_trained, steps_trained
from emloc_ray.stages.order import STEPS
from emloc_ray.text import counted, listed, size, size_up

_FIRST_TENSOR_CORES = 7.0  # compute capability: Volta
_MUCH = 0.1  # of the blocks' parameters
MANY_EPOCHS = 20
"""As often as a row may be read without a remark."""

_BY_SCORES = ("reduce_lr_on_plateau", "greedy")  # schedules that go by the loss of the scores


def over_budget(config: RunConfig, planned: Mapping[str, int]) -> str | None:
    """Names the stages that are ``planned`` to hold more bytes than ``memory_budget``."""
    budget = planned.get("inference") if config.memory_budget == "inference" else config.memory_budget
    if budget is None:
        return None
    above = {name: held for name, held in planned.items() if name != "inference" and held > budget}
    if not above:
        return None
    if config.budget_is_default:
        more = ", ".join(f"{name} by {size(held - budget)}" for name, held in above.items())
        return (
            f"Inference of the original takes {size(budget)}, and a worker at its smallest batch takes more: {more};"
            " lower data.max_seq_length, or set memory_budget to what a worker has."
        )
    return (
        f"memory_budget is {size(budget)} a worker, but the plan says"
        f" {', '.join(f'{name} {size(held)}' for name, held in above.items())}:"
        " see emloc-ray plan --memory-budget for settings that fit."
    )


def smaller_batches(prepared: Prepared) -> str | None:
    """What was made smaller than the config says, to stay within the budget."""
    written, config, memory = prepared.written_config, prepared.config, MemoryModel(prepared)
    bound = memory.budget
    if written is None or bound is None:
        return None
    section, changed = config.finetune, []
    if section.per_device_train_batch_size != written.finetune.per_device_train_batch_size:
        changed.append(
            f"training reads a step's rows as {section.gradient_accumulation_steps} × {section.per_device_train_batch_size}"
        )
    if section.gradient_checkpointing and not written.finetune.gradient_checkpointing:
        changed.append("training computes blocks again in the backward pass (gradient checkpointing)")
    for name in ("calibration", "evaluation"):
        rows = getattr(config, name).batch_size
        if rows != getattr(written, name).batch_size:
            alone = name == "evaluation" and memory.evaluation_rows() > rows
            changed.append(f"{name} reads {counted(rows, 'row')} a pass{' of the emulator' if alone else ''}")
    if not changed:
        return None
    whose = ", which inference of the original takes" if config.memory_budget == "inference" else ""
    return f"To stay within {size_up(bound)}{whose}, {listed(changed, 4)}; memory_budget: null leaves all as it is."


def idle_cpus(configs: Iterable[RunConfig], cpus: float) -> str | None:
    """Says so where a cluster has ``cpus``, and its only run leaves all but one idle."""
    run, *others = configs
    if others or cpus < 2:
        return None
    stages = (getattr(run, section) for section in WORKER_SECTIONS)
    if any(stage.gpus or stage.num_workers * stage.cpus_per_worker > 1 for stage in stages):
        return None
    return (
        f"The cluster has {cpus:g} CPUs, and no stage asks for more than one: set cpus_per_worker in calibration, finetune and"
        " evaluation, and num_workers in emulator."
    )


def idle_calibrators(prepared: Prepared) -> str | None:
    """Says so where calibration has fewer shards of rows than workers."""
    section, working = prepared.config.calibration, num_slots(prepared)
    if working == section.num_workers or not prepared.layout.differs:
        return None
    return (
        f"calibration.num_workers is {section.num_workers}, and {working} of them {'has' if working == 1 else 'have'} a shard of"
        " rows: the others are not asked for; lower calibration.rows_per_shard to use them."
    )


def default_emulator(configs: Iterable[RunConfig]) -> str | None:
    """The remark on configs whose emulator has its defaults, but for workers. Values count: a budget may have written them."""
    workers = {*StageConfig.model_fields}
    if all(config.emulator.model_dump(exclude_defaults=True, exclude=workers) for config in configs):
        return None
    measured = measured_for(EmulatorConfig())
    assert measured is not None
    return (
        f"emulator is at its defaults, the paper's half of the ranks, which closed {100 * measured.gap_closed:.0f} % of the gap"
        " to LoRA on the original: emloc-ray plan CONFIG --memory-budget SIZE says what closes more."
    )


def emulated_bfloat16(configs: Iterable[RunConfig], capabilities: Mapping[str, Any]) -> str | None:
    """Says so where CPUs train in bfloat16 and this machine's has no instructions for it. On such a CPU the forward product
    of 256 rows and 2048 × 2048 weights took 4 times as long as in float32, the backward one 200 times."""
    if has_bfloat16(capabilities) or not any(
        config.finetune.gpus == 0 and config.finetune.bf16 is True for config in configs
    ):
        return None
    return (
        "finetune.bf16 is set, and this machine's CPU has no bfloat16 instructions: on such workers training takes many times"
        " as long as in float32; leave it out."
    )


def bfloat16_beyond_gpus(prepared: Prepared) -> str | None:
    """Says so where weights are bfloat16 and a GPU of this machine computes that in float32, without its tensor cores; products
    in it then took twice as long as in float32 on a T4 (https://github.com/openxla/xla/issues/12429)."""
    config = prepared.config
    on_gpus = any(getattr(config, section).gpus for section in WITH_MODELS)
    if (
        config.ray.joins
        or not on_gpus
        or model_dtype(prepared) != torch.bfloat16
        or (old := gpu_without_bfloat16()) is None
    ):
        return None
    name, capability = old
    sentence = (
        f"The model's weights are bfloat16, which {name} (compute capability {capability:.1f}) has no instructions for: products"
        " are made in float32"
    )
    if capability < _FIRST_TENSOR_CORES:
        return f"{sentence}; set model.dtype: float32, in which weights take twice the memory and nothing is converted."
    sheet = speed_of(name)
    times = "several" if sheet is None else f"{sheet.flops / sheet.float32_flops:.0f}"
    return (
        f"{sentence}, at {times} times float16's time or more; set model.dtype: float16 with finetune.fp16: true, or model.dtype:"
        " float32, in which weights take twice the memory."
    )


def unscaled_float16(prepared: Prepared) -> str | None:
    """Says so where training computes in float16 without scaling the loss: of rows with many labels most of a module's gradients
    were zero (https://arxiv.org/abs/1710.03740, section 3.2)."""
    section, joins = prepared.config.finetune, prepared.config.ray.joins
    is_scaled = bool((section.model_extra or {}).get("fp16"))
    on_gpus = section.gpus and (joins or gpu_without_bfloat16() is None)
    in_bfloat16 = section.bf16 is True or (section.bf16 == "auto" and on_gpus)
    if model_dtype(prepared) != torch.float16 or is_scaled or in_bfloat16:
        return None
    return (
        "The model's weights are float16, and training would compute its gradients in it, in which small ones are zero: set"
        f" {'finetune.fp16: true, or ' if section.gpus else ''}model.dtype: float32, in which weights take twice the memory."
    )


def unread_correction(section: CorrectionConfig) -> str | None:
    """Names the settings of the correction that its method does not read."""
    unread = [f"correction.{key}" for key in section.unread if _is_changed(section, key)]
    if not unread:
        return None
    if section.method == "auto":
        return f"{_not_read(unread)}: auto tries its own; set correction.method to use yours."
    return f"{_not_read(unread)} by correction.method {section.method}: leave {'them' if unread[1:] else 'it'} out."


def unread_choice(section: FinetuneConfig) -> str | None:
    """Names the settings that say which adapter is better, where nothing is chosen or ended by them."""
    stops, keeps = section.early_stopping_patience is not None, section.load_best_model_at_end
    schedule = (section.model_extra or {}).get("lr_scheduler_type")
    if schedule in _BY_SCORES and _is_changed(section, "metric_for_best_model"):
        return f"finetune.metric_for_best_model is not read by lr_scheduler_type {schedule}: it goes by the emulator's loss."
    if not (stops or keeps) and _is_changed(section, "metric_for_best_model"):
        advice = "set load_best_model_at_end or early_stopping_patience, or leave it out"
        return f"finetune.metric_for_best_model is not read: {advice}."
    if not stops and _is_changed(section, "early_stopping_threshold"):
        return "finetune.early_stopping_threshold is not read: set early_stopping_patience, or leave it out."
    return None


def unread_at_ratio_one(section: EmulatorConfig) -> str | None:
    """Names the settings of factors that are not read where nothing is factorized; integers of weights alone are rounded so."""
    if section.budget is not None or section.compression_ratio != 1:
        return None
    keys, defaults = ("ratios", "allocation", "objective", "storage", "rank_multiple"), EmulatorConfig()
    unread = [f"emulator.{key}" for key in keys if getattr(section, key) not in (getattr(defaults, key), "weights")]
    if not unread:
        return None
    return (
        f"{_not_read(unread)}: at compression_ratio 1.0 nothing is factorized; give a ratio below it, with"
        " emulator.target_modules for some linears alone."
    )


def unread_group_size(section: EmulatorConfig) -> str | None:
    """Says so where groups of columns have a size, and nothing is stored in integers."""
    if section.budget is not None or section.bits is not None or not _is_changed(section, "group_size"):
        return None
    return f"emulator.group_size is not read: quantization {section.quantization} has groups of its own; leave it out."


def unread_patterns(config: RunConfig, layout: Layout) -> str | None:
    """Names the keys of pattern tables whose linears are not compressed, or not adapted."""
    unread = [
        f"{section}.{table}.{pattern}"
        for section, table, chosen in (
            ("emulator", "ratios", layout.compressed),
            ("adapter", "rank_pattern", layout.adapted),
            ("adapter", "alpha_pattern", layout.adapted),
        )
        for pattern in getattr(getattr(config, section), table)
        if _names_any(pattern, layout.by_name) and not _names_any(pattern, chosen)
    ]
    if not unread:
        return None
    return (
        f"{_not_read(unread)}: the section's target_modules or exclude_modules leave those linears out; change these."
    )


def _names_any(pattern: str, names: Iterable[str]) -> bool:
    return any(lookup(name, {pattern: True}, False) for name in names)


def _is_changed(section: Section, key: str) -> bool:
    return bool(getattr(section, key) != type(section).model_fields[key].default)


def _not_read(keys: Sequence[str]) -> str:
    return f"{listed(keys, len(keys))} {'are' if keys[1:] else 'is'} not read"


def unread_residuals(config: RunConfig, layout: Layout) -> str | None:
    """Says so where factors are asked for beside integers, and no linear has any, or one has fewer."""
    asked = config.emulator.residual_rank
    ranks = {name: layout.residual_ranks.get(name, 0) for name in layout.compressed if name not in layout.ranks}
    if not ranks and asked:
        what = f"emulator.residual_rank: {asked} is not read: it is of targeted linears that stay dense, and all are"
        return f"{what} factorized; give compression_ratio: 1.0, or leave it out."
    lowered = [f"{rank} in {name}" for name, rank in ranks.items() if rank < asked]
    if not lowered:
        return None
    return (
        f"emulator.residual_rank: {asked} is lowered to {listed(lowered, 1)}, as ranks end at a linear's smaller side, and where"
        " it would take 16 bits a weight."
    )


def left_dense(layout: Layout) -> str | None:
    """Names the modules that a pattern names and that cannot be factored."""
    if not layout.left_dense:
        return None
    named = listed([f"{name} ({kind})" for name, kind in layout.left_dense.items()], 1)
    return f"Only the blocks' linears, but for routers, are factored or adapted: {named}, which a pattern names, stays as it is."


def left_in_blocks(layout: Layout) -> str | None:
    """Says so where much of the blocks is no linears, as experts that only their own module computes with."""
    left = sum(layout.left_in_blocks.values())
    blocks = left + sum(spec.num_parameters for spec in layout.specs)
    if left < _MUCH * blocks:
        return None
    kind = max(layout.left_in_blocks, key=layout.left_in_blocks.__getitem__)
    return (
        f"{left / blocks:.0%} of the blocks' parameters are no linears, most of them in {kind}: these stay as they are, without"
        " adapters."
    )


def long_images(prepared: Prepared) -> str | None:
    """Says so where rows show images, and one of ordinary size is longer than a row may be."""
    limit, tokens = prepared.config.data.max_seq_length, prepared.layout.image.row_tokens
    if tokens < limit or not prepared.lengths.images:
        return None
    return (
        f"An image of {IMAGE_SIDE} × {IMAGE_SIDE} pixels takes {tokens} tokens of this model, data.max_seq_length is {limit}:"
        " rows whose images do not fit are dropped; raise it."
    )


def max_positions(prepared: Prepared) -> int | None:
    """The positions that the model was made for; None where its config does not say."""
    positions = getattr(prepared.model_config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


def beyond_positions(prepared: Prepared) -> str | None:
    """Says so where rows may be longer than those that the model was made for; one with a table of positions refuses them."""
    limit, positions = prepared.config.data.max_seq_length, max_positions(prepared)
    if positions is None or limit <= positions:
        return None
    return (
        f"data.max_seq_length is {limit}, and the model was made for {positions} positions (max_position_embeddings): what is"
        " beyond them is new to it."
    )


def repeated_rows(prepared: Prepared) -> str | None:
    """Says so where all steps together read every row many times."""
    rows, times = prepared.num_rows(), rows_trained(prepared) / packed(prepared, num_sequences(prepared))
    if not prepared.knows_rows("train") or times < MANY_EPOCHS:
        return None
    return f"Training reads {counted(rows, 'row')} about {times:.0f} times each: give more rows, or fewer steps."


def copied_rows(prepared: Prepared) -> str | None:
    """Says so where a file of held-out rows is a copy of one that is trained on; the same file twice is an error."""
    trained = [source for source in prepared.files.get("train", ()) if not source.is_stored]
    for name in ("eval", "selection", "validation"):
        for held_out in prepared.files.get(name, ()):
            for source in () if held_out.is_stored else trained:
                if source.num_rows == held_out.num_rows and filecmp.cmp(source.path, held_out.path, shallow=False):
                    return (
                        f"data.{name} reads {held_out.name}, a copy of {source.name}, which is trained on: give it rows of its"
                        f" own, or leave data.{name} out to have rows of train kept for it."
                    )
    return None


def late_warmup(prepared: Prepared) -> str | None:
    """Says so where the learning rate does not reach its peak before the steps end, of the fine-tuning or of the healing."""
    config, healing = prepared.config, prepared.config.emulator.heals
    trainings = [("there are", config.finetune, steps_trained(prepared))]
    if healing is not None:
        section = healing_training(config, healing, prepared.layout).section
        trainings.append(("emulator.healing has", section, healing.steps))
    for which, section, steps in trainings:
        if (warmup := warmup_in_steps(section)) >= steps:
            return (
                f"finetune.warmup_steps is {warmup:g}, and {which} {steps} steps: the learning rate ends before its peak;"
                " lower it."
            )
    return None


def moved_for_completions(prepared: Prepared) -> str | None:
    """Says what completions move where the original's blocks come over a GPU's link or from disk: its weights for each token."""
    section, memory = prepared.config.evaluation, MemoryModel(prepared)
    prompts, hold = max(section.num_generations, section.num_exact_match), memory.evaluation_plan().hold
    if not prompts or hold == "resident" or not (section.gpus or memory.weights > available_bytes()):
        return None
    moved = size(memory.moved(hold, 1, 1))
    return (
        f"Evaluation completes {counted(prompts, 'prompt')} on the offloaded original, {min(prompts, memory.prompts_at_once())}"
        f" together: its weights move once for each token, up to {section.max_new_tokens} × {moved} a time; lower"
        " evaluation.max_new_tokens, num_exact_match and num_generations for less."
    )


def of_settings(prepared: Prepared, planned: Mapping[str, int]) -> list[str]:
    """The remarks on the config, its model and its rows; ``planned``: bytes of a worker in each stage."""
    config = prepared.config
    remarks = (
        bfloat16_beyond_gpus(prepared),
        unscaled_float16(prepared),
        smaller_batches(prepared),
        over_budget(config, planned),
        unread_correction(config.correction),
        unread_choice(config.finetune),
        unread_at_ratio_one(config.emulator),
        unread_group_size(config.emulator),
        unread_patterns(config, prepared.layout),
        unread_residuals(config, prepared.layout),
        left_dense(prepared.layout),
        left_in_blocks(prepared.layout),
        long_images(prepared),
        beyond_positions(prepared),
        repeated_rows(prepared),
        copied_rows(prepared),
        late_warmup(prepared),
        idle_calibrators(prepared),
        moved_for_completions(prepared),
        *(stage.note_if_left_out(config) for stage in STEPS if not stage.wanted(prepared)),
    )
    return [remark for remark in remarks if remark is not None]


def said_once(configs: Iterable[RunConfig], cpus: float) -> list[str]:
    """The remarks that a batch makes once: on its configs, a cluster that has so many CPUs, and this machine's CPU."""
    configs = list(configs)
    remarks = default_emulator(configs), idle_cpus(configs, cpus), emulated_bfloat16(configs, cpu_capabilities())
    return [remark for remark in remarks if remark is not None]
