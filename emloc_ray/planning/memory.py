"""What one worker of every stage holds at its peak, part by part, from shapes alone.

Parts that are never there at the same time are not added up: a pass is at its head or inside a block, a stage reads
layers before it opens the model. Not counted, because it depends on the machine: the pages of code that a library maps at
its first call (some 15 MiB), and what its kernels pack weights into.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

from emloc_ray.io.formats.shards import chunk_limit
from emloc_ray.io.formats.teacher_shards import BYTES_PER_LOGIT, rows_per_shard
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.planning.holding import (
    GradientPlan,
    allowed,
    blocks_share,
    choose,
    held_bytes,
    moved_bytes,
    plan_gradients,
)
from emloc_ray.planning.machine import available_bytes, gpu_bytes
from emloc_ray.planning.model_bytes import DIVERGENCE_COPIES, LOSS_COPIES, ModelBytes
from emloc_ray.planning.optimizers import optimizer_bytes
from emloc_ray.planning.sizes import FLOAT, gradient_bytes, gram_bytes, in_waves

Parts = dict[str, float]  # bytes by what holds them

BASE_BYTES = 450 * 2**20  # a worker with torch, transformers and peft imported
_GPU_SHARE = 0.92  # of a GPU's memory: the rest goes to CUDA's context and to what its allocator leaves between tensors
_HALF, _DOUBLE = 2, 8
_ROWS = 1024  # of a layer that the correction turns to float64 at a time
_BEGUN = 4  # corrections that auto scores in one pass where weights come and go
_WAVES = 6  # of gradients, a pass each, that a budget left out may ask for: inference of a model in bfloat16 takes five


class Held(NamedTuple):
    """How the original is held for a pass, and all that its worker holds then."""

    hold: str
    parts: Parts


class MemoryModel(ModelBytes):
    """Predicts from a layout, a config and row lengths; every method gives bytes by part, ``total`` adds them up."""

    @functools.cached_property
    def held(self) -> dict[str, int]:
        """Bytes of the original's weights, by how it is held."""
        return held_bytes(self.layout, self.itemsize, self._tied)

    def moved(self, hold: str, rows: float, batch_size: int) -> float:
        """Bytes of the original's weights that come to the device while ``rows`` go through it forward."""
        return math.ceil(rows / batch_size) * moved_bytes(self.layout, self.itemsize, self._tied)[hold]

    @property
    def _tied(self) -> bool:
        return bool(getattr(self.model_config, "tie_word_embeddings", False))

    def calibrate(self) -> Parts:
        """What a worker holds, however the calibration holds the model."""
        return self.calibrate_blocks() if self.calibration_hold() == "block_by_block" else self.calibrate_whole()

    def calibrate_whole(self) -> Parts:
        """The model, the Grams of the largest wave, and a pass without the head."""
        largest = max((sum(map(gram_bytes, wave)) for wave in self.waves()), default=0)
        held = self.held[self.calibration_hold()]
        return {"weights": held, "grams": largest, "activations": self._counting(self._calibration_tokens())}

    def calibrate_blocks(self) -> Parts:
        """The weights outside the blocks and of the largest block, its Grams, and one token shard's hidden states: what the
        block reads and what it gives, for all the shard's rows."""
        inside = max(block.num_parameters for block in self.blocks if not block.is_between)
        outside = self.layout.num_parameters - sum(s.num_parameters for s in self.layout.specs if not s.between)
        # The head is never reached; where it is the embedding too, that stays.
        head = 0 if getattr(self.model_config, "tie_word_embeddings", False) else self.layout.head_parameters
        names = [block.name for block in self.blocks]
        grams = max(sum(gram_bytes(group) for group in self._groups() if group[0].block == name) for name in names)
        section = self.config.calibration
        rows = min(section.rows_per_shard, section.num_calibration_samples or section.rows_per_shard)
        shard = rows * self.lengths.longest * self.layout.hidden_size * self.itemsize
        return {
            "weights": (inside + outside - head) * self.itemsize,
            "grams": grams,
            "hidden states": 2 * shard,
            "activations": self._counting(self._calibration_tokens()),
        }

    def hidden_state_disk_bytes(self) -> int:
        """What calibration block by block keeps on disk at any time: two blocks' outputs for every calibration token."""
        return int(2 * self.calibration_tokens * self.layout.hidden_size * self.itemsize)

    def calibration_hold(self) -> str:
        """As the config says; ``auto``: resident where all Grams fit beside the model, else block by block.

        Where blocks read what is inside others, as shared keys and values, offloaded takes the place of block by block.
        """
        asked, room = self.config.model.hold, self.worker_bytes("calibration") - BASE_BYTES
        counting = self._counting(self._calibration_tokens())
        if asked == "auto" and self.weights + sum(map(gram_bytes, self._groups())) + counting <= room:
            return "resident"
        if self.may_stream():
            return "block_by_block"
        largest = max(map(gram_bytes, self._groups()), default=0)
        return choose(asked if asked == "resident" else "offloaded", self.held, counting + largest, room)

    def may_stream(self) -> bool:
        """Whether calibration may go block by block, where that is what fits."""
        trusted = self.config.model.trust_remote_code
        asked = self.config.model.hold in ("auto", "block_by_block")
        return asked and not blocks_share(self.model_config, trusted)

    def waves(self) -> list[list[tuple[LinearSpec, ...]]]:
        """The groups of linears, in parts whose Grams fit beside the model in a worker's memory; one part where all do."""
        hold = self.calibration_hold()
        beside = self.held["resident" if hold == "block_by_block" else hold] + self._counting(
            self._calibration_tokens()
        )
        return in_waves(self._groups(), gram_bytes, self.worker_bytes("calibration") - BASE_BYTES - beside)

    def gradients(self) -> Parts:
        """The model, the largest wave's sums of gradients, and a pass forward and back: the blocks' inputs, and inside one
        block what its backward pass reads, with one output's gradient in float32; or a chunk of logits."""
        plan = self.gradient_plan()
        largest = max((sum(map(gradient_bytes, wave)) for wave in plan.waves), default=0)
        passed = self._backward(plan.batch_size * self.lengths.longest)
        return {"weights": self.held[plan.hold], "gradients": largest, **passed}

    def gradient_plan(self) -> GradientPlan:
        """How the sums of gradients of the linears whose outputs they weigh are gathered within a worker's memory.

        Every wave is a pass: a budget that was left out gives way before it costs many.
        """

        def within(held: float) -> GradientPlan:
            batch_size, asked = self.config.calibration.batch_size, self.config.model.hold
            room = held - BASE_BYTES
            return plan_gradients(asked, self.held, self._weighed(), batch_size, self._rows_backward, room)

        plan = within(self.worker_bytes("calibration"))
        if len(plan.waves) <= _WAVES or not self.config.budget_is_default:
            return plan
        return within(self.there("calibration"))

    def least_for_gradients(self) -> float:
        """Bytes that a worker needs for gradients at least: a row at a time, with one linear's sum, in the leanest way."""
        largest = max(map(gradient_bytes, self._weighed()), default=0)
        leanest = min(self.held[hold] for hold in allowed(self.config.model.hold))
        return BASE_BYTES + leanest + self._rows_backward(1) + largest

    def _weighed(self) -> list[LinearSpec]:
        weighed = set(self.layout.weighed)
        return [spec for spec in self.layout.specs if spec.name in weighed]

    def _rows_backward(self, rows: int) -> int:
        return total(self._backward(rows * self.lengths.longest))

    def _backward(self, tokens: float) -> Parts:
        inputs = tokens * self.itemsize * sum(block.multiple * block.width for block in self.blocks)
        saved = max(block.multiple * self._saved_per_token(block, ()) for block in self.blocks)
        widest = max((spec.out_features for spec in self.layout.specs), default=0)
        inside = tokens * (saved + widest * (self.itemsize + FLOAT))
        # Beside the logits and their softmax a running sum in float64, from which labels are drawn.
        logits = self._logits(tokens) * (2 * FLOAT + _DOUBLE) / (2 * FLOAT)
        return {
            "activations": inputs + (inside if inside >= logits else 0),
            "logits": logits if logits > inside else 0,
        }

    def allocate(self) -> Parts:
        """At most what the group that needs most takes to be factorized."""
        return self.factorize()

    @property
    def budget(self) -> float | None:
        """:meth:`bound` of the fine-tuning's workers."""
        return self.bound("finetune")

    def bound(self, section: str) -> float | None:
        """``memory_budget`` for a worker of a section, in bytes, on a GPU that is here no more than can be filled of it; None:
        no bound."""
        asked, gpus = self.config.memory_budget, getattr(self.config, section).gpus
        if asked is None:
            return None
        wanted = self._yardstick if asked == "inference" else float(asked)
        return wanted if self.config.ray.joins or not gpus else min(wanted, _GPU_SHARE * gpu_bytes() * gpus)

    def worker_bytes(self, section: str) -> float:
        """What a worker may hold: its :meth:`bound`; where that was left out, no more than there is for it either."""
        bound, there = self.bound(section), functools.partial(self.there, section)
        if bound is None:
            return there()
        return min(bound, there()) if self.config.budget_is_default else bound

    def there(self, section: str) -> float:
        """What there is for a worker: a GPU like this machine's, a share of its memory, or elsewhere as much as it asks."""
        asked = getattr(self.config, section)
        if asked.gpus:
            return _GPU_SHARE * gpu_bytes() * asked.gpus
        return float("inf") if self.config.ray.joins else available_bytes() / asked.num_workers

    @functools.cached_property
    def _yardstick(self) -> int:
        return total(self.inference())

    def factorize(self) -> Parts:
        """The group that needs most, with one of its layers computed once more in float64, as rounding may ask."""
        return max((self._factorize_group(group) for group in self._groups()), key=total, default={})

    def _factorize_group(self, group: tuple[LinearSpec, ...]) -> Parts:
        """A Gram: as summed, damped in float32, damped in float64 (made over a copy), and where an output is wider than
        the input a Cholesky factor of each. A layer: ``W`` as stored, in float32 and in float64, its product with the
        Gram, ``M`` with eigenvectors and LAPACK's workspace of twice their size, and the factors of the whole group."""
        square = group[0].in_features ** 2
        tall = any(spec.out_features > spec.in_features for spec in group)
        damped = square * (2 * FLOAT + _DOUBLE)
        layer = max(self._layer(spec) for spec in group)
        stored = 0 if self.file_itemsize == FLOAT else self.file_itemsize
        weight = max(spec.num_parameters for spec in group) * (stored + FLOAT + _DOUBLE)
        factors = sum(self.layout.kept(spec) for spec in group) * self.file_itemsize
        weighed = set(self.layout.weighed)
        # A sum of gradients: as summed, damped, its root; and the weight that it weighs.
        sums = max(
            (3 * gradient_bytes(spec) + FLOAT * spec.num_parameters for spec in group if spec.name in weighed),
            default=0,
        )
        damped += sums
        grams = damped + square * (FLOAT + _DOUBLE if tall else 0)
        if grams + layer >= damped + square * _DOUBLE:
            return {"grams": grams, "weights": weight, "products": layer, "factors": factors}
        return {"grams": damped + square * _DOUBLE, "weights": weight, "factors": factors}

    def _layer(self, spec: LinearSpec) -> float:
        order = min(spec.out_features, spec.in_features)
        return spec.num_parameters * _DOUBLE + 4 * order**2 * _DOUBLE + self.layout.kept(spec) * (FLOAT + _DOUBLE)

    def heal(self) -> Parts:
        """The training, or the original's pass over its batches before it; the larger."""
        healing, training = self.config.emulator.heals, self.healing()
        if healing is None:
            return training
        rows = healing.per_device_train_batch_size or self.config.finetune.per_device_train_batch_size
        return max(training, self.teaching(rows).parts, key=total)

    def teaching(self, rows: int) -> Held:
        """The original's pass over a batch of so many rows for its top logits, and a shard of these, put together."""
        healing, mean = self.config.emulator.heals, self.lengths.mean
        logits = 0 if healing is None else healing.num_teacher_logits
        shard = rows_per_shard(mean, logits) * BYTES_PER_LOGIT * mean * logits
        return self._holding("finetune", {**self._scoring(rows), "teacher": 2 * shard})

    def healing(self) -> Parts:
        """The training of the healing alone; nothing where nothing is healed."""
        healing = self.config.emulator.heals
        if healing is None:
            return {}
        from emloc_ray.planning.training import healing_run  # which needs the config: the rest plans from shapes alone

        run = healing_run(self.prepared, healing)
        return MemoryModel(run, self.lengths).finetune(DIVERGENCE_COPIES)

    def finetune(self, logit_copies: int = LOSS_COPIES) -> Parts:
        """Emulator, adapter with its optimizer, and a step: what blocks keep for the backward pass, or only their inputs
        and one block's at a time under gradient checkpointing; beside it the logits, or one linear's update by LoRA."""
        hold = self.finetune_hold()
        again = self.config.finetune.gradient_checkpointing or hold != "resident"
        weights = self.emulator if hold == "resident" else self.held[hold]
        return {"weights": weights, "unpacked": self._unpacked(), **self._training(again, logit_copies)}

    def _training(self, again: bool, logit_copies: int = LOSS_COPIES) -> Parts:
        section = self.config.finetune
        virtual = self.config.adapter.settings.get("num_virtual_tokens", 0)
        tokens = section.per_device_train_batch_size * (self.trained_lengths.longest + virtual)
        saved = [block.multiple * self._saved_per_token(block, self.adapted) for block in self.blocks]
        inputs = sum(block.multiple * block.width for block in self.blocks) * self.itemsize
        kept, inner = (inputs, max(saved)) if again else (sum(saved), 0.0)
        inside = tokens * (inner + self._update_per_token())
        logits = self._logits(tokens, logit_copies)
        return {
            "optimizer": self._optimizer_bytes(),
            "row norms": self._row_norms([spec for spec in self.adapted if len(self.layout.stored_shapes(spec)) == 1]),
            "activations": tokens * kept + (inside if inside >= logits else 0),
            "logits": logits if logits > inside else 0,
        }

    def _optimizer_bytes(self) -> float:
        """What is trained, its gradients and the optimizer's states, and under autocast a copy in 16 bits. NEFTune's noise is
        gone before a block begins: no part of the peak."""
        section = self.config.finetune
        extra = section.model_extra or {}
        wide = optimizer_bytes(str(extra.get("optim", "adamw_torch")), section.gpus > 0)
        narrow = section.bf16 is True or extra.get("fp16") or (section.bf16 == "auto" and section.gpus > 0)
        return self.adapter_parameters * (wide + (_HALF if narrow else 0))

    def finetune_hold(self) -> str:
        """How what is trained on is held: offloaded only where that is the original, at ratio 1.0, and does not fit.

        Then the batch is planned with blocks run again. DeepSpeed, DoRA and prefixes want the whole model.
        """
        config = self.config
        own = config.finetune.deepspeed is None and config.adapter.method not in ("dora", "prefix_tuning")
        return self.finishing().hold if own and not self.layout.differs else "resident"

    def finishing(self) -> Held:
        """Steps on the original: its weights, the adapter with its optimizer, and a step with blocks run again.

        A prefix works through the cache that running a block again would fill twice: its original is held whole.
        """
        beside = self._training(again=True)
        if self.config.adapter.method == "prefix_tuning":
            return Held("resident", {"weights": self.weights, **self._training(again=False)})
        return self._holding("finetune", beside)

    def correct(self) -> Parts:
        """First the linears that share a Gram, a task each, then the original with the adapter and every module's thin
        matrices; the larger.

        Where there is nothing to choose between, the original is not opened.
        """
        if not self.config.adapter.is_additive:
            return {}
        reading: Parts = {"correction": max((self._difference(spec) for spec in self.adapted), default=0.0)}
        if self.config.correction.method != "auto" or not self.layout.differs:
            return reading
        return max(self.searching().parts, reading, key=total)

    def searching(self) -> Held:
        """The original with adapters on a batch of the selection rows, beside every module's thin matrices."""
        rows = self.config.evaluation.batch_size
        return self._together(
            lambda number: {**self._scoring(rows), **self._adapted(number, rows), "correction": self.thin_matrices()},
            _BEGUN,
        )

    def thin_matrices(self) -> float:
        """Bytes of all that the adapter's modules see of the difference: in memory to score them, and on disk."""
        wide = 4 if self.config.adapter.method == "dora" else 3  # what its magnitudes follow from
        return sum(
            self._rank(s)
            * (_DOUBLE * (s.in_features + wide * s.out_features) + FLOAT * (s.in_features + s.out_features))
            for s in self.adapted
        )

    def correction_work(self) -> float:
        """Floating-point operations of ``G Q``, ``W [Q, G Q]`` and ``W_E [Q, G Q]`` for all adapted linears, whose own Q has
        ``k`` directions: ``2 k in²``, ``4 k out · in`` and as much for what the emulator has of these parameters."""
        return sum(
            2.0 * self._rank(s) * (s.in_features**2 + 2 * s.num_parameters + 2 * self.layout.kept(s))
            for s in self.adapted
        )

    def _difference(self, spec: LinearSpec) -> float:
        """W and what the emulator stores of it, the Gram, some rows of one in float64, and thin matrices."""
        rows = min(_ROWS, max(spec.out_features, spec.in_features))
        stored = spec.num_parameters * self.file_itemsize + self.layout.kept(spec) * self.itemsize
        thin = 4 * self._rank(spec) * (spec.in_features + spec.out_features)
        return stored + gram_bytes((spec,)) * 1.5 + (2 * rows * spec.in_features + thin) * _DOUBLE

    def merge(self) -> Parts:
        """A row chunk that is copied, or one that is merged with its sum in float32; the adapter, and one module's."""
        if self.config.adapter.is_prompt:
            return {}
        largest = max([self.layout.head_parameters, *(spec.num_parameters for spec in self.layout.specs)])
        chunk = chunk_limit(self.config.merge.chunk_bytes, largest * self.file_itemsize)
        merged = max((min(chunk, FLOAT * spec.num_parameters) for spec in self.adapted), default=0)
        module = max((self._rank(s) * (s.in_features + s.out_features) for s in self.adapted), default=0)
        return {"chunks": max(chunk, 2 * merged), "adapter": FLOAT * (self.corrected_parameters + module)}

    def evaluate(self) -> Parts:
        """Every model that is scored, one after another; the larger."""
        parts = self.evaluating().parts
        scores_emulator = self.layout.differs and {"emulator", "emulator_adapter"} & {*self.config.evaluation.variants}
        return {**parts, "weights": max(parts["weights"], self.emulator if scores_emulator else 0)}

    def evaluating(self) -> Held:
        """The original with its adapters; scoring a batch, or completing one with a cache. Where its weights come and go,
        all variants at once, and of one linear what merging makes of it."""
        section = self.config.evaluation
        rows, completes = section.batch_size, section.num_generations or section.num_exact_match
        cached = rows * (self.lengths.longest + section.max_new_tokens) * self.itemsize * self._cached_per_token()
        merged = self.itemsize * max((s.num_parameters for s in self.adapted), default=0)

        def beside(number: int) -> Parts:
            adapters = self._adapted(max(1, number - 1), rows)  # the original has none
            scoring = {**self._scoring(rows), **adapters}
            forward = self._forward(rows * self.lengths.longest)
            completing = {"kv cache": min(2, number) * cached, "activations": forward, **adapters}
            most = max(scoring, completing if completes else {}, key=total)
            return {**most, "merged": merged} if number > 1 and "merged" in section.variants else most

        return self._together(beside, len({*section.variants} - {"emulator", "emulator_adapter"}))

    def prompts_at_once(self) -> int:
        """How many prompts are completed together: a batch, and where weights come anew for every token as many more as fit
        beside it."""
        section, held = self.config.evaluation, self.evaluating()
        asked = max(section.num_generations, section.num_exact_match, 1)
        if held.hold == "resident" or asked <= section.batch_size:
            return section.batch_size
        cached = (self.lengths.longest + section.max_new_tokens) * self.itemsize * self._cached_per_token()
        left = self.worker_bytes("evaluation") - BASE_BYTES - total(held.parts)
        more = max(0.0, left / (2 * cached + self._forward(self.lengths.longest)))
        return int(min(asked, section.batch_size + more))

    def _adapted(self, number: int, rows: int) -> Parts:
        """So many adapters, and the hidden states of those that wait for their turn at a block: its input and output."""
        waiting = 2 * (number - 1) * rows * self.lengths.longest * self.layout.hidden_size * self.itemsize
        return {
            "adapter": number * FLOAT * self.corrected_parameters,
            "row norms": number * self._row_norms(self.adapted),
            "hidden states": waiting,
        }

    def _together(self, beside: Callable[[int], Parts], number: int) -> Held:
        """One adapter after another beside the whole original, or so many at once where it does not fit."""
        alone = self._holding("evaluation", beside(1))
        return alone if alone.hold == "resident" else self._holding("evaluation", beside(number))

    def inference(self, rows: int = 1, length: int | None = None) -> Parts:
        """The original on a row of ``max_seq_length``, whatever the training's: prefill with its KV cache, logits of the last
        token."""
        tokens = rows * (length or self.config.data.max_seq_length)
        return {
            "base": BASE_BYTES,
            "weights": self.weights,
            "kv cache": tokens * self.itemsize * self._cached_per_token(),
            "activations": self._forward(tokens),
            "logits": rows * self._vocabulary() * self.itemsize,
        }

    def _scoring(self, rows: int) -> Parts:
        tokens = rows * self.lengths.longest
        inside, logits = self._forward(tokens), self._logits(tokens)
        return {"activations": inside} if inside >= logits else {"logits": logits}

    def _holding(self, section: str, beside: Parts) -> Held:
        """The original as a worker of a section holds it, with what is beside it."""
        room = self.worker_bytes(section)
        hold = choose(self.config.model.hold, self.held, BASE_BYTES + total(beside), room)
        return Held(hold, {"weights": self.held[hold], **beside})


def total(parts: Parts) -> int:
    """All parts together."""
    return int(sum(parts.values()))
