"""What one worker of every stage holds at its peak, part by part, from shapes alone.

Parts that are never there at the same time are not added up: a pass is at its head or inside a block, a stage reads
layers before it opens the model. Not counted, because it depends on the machine: the pages of code that a library maps at
its first call (some 15 MiB), and what its kernels pack weights into. Of the machine only its GPUs are asked: whether they
compute in bfloat16, and whether they are slow in float64.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

from emloc_ray.config.steps import ON_EMULATOR
from emloc_ray.core.products import ROWS
from emloc_ray.io.formats.shards import chunk_limit
from emloc_ray.io.formats.teacher_shards import BYTES_PER_LOGIT, rows_per_shard
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.planning.calibration_memory import BASE_BYTES, CalibrationMemory
from emloc_ray.planning.factorization_memory import FactorizationMemory
from emloc_ray.planning.holding import choose
from emloc_ray.planning.model_bytes import DIVERGENCE_COPIES, LOSS_COPIES
from emloc_ray.planning.optimizers import optimizer_bytes
from emloc_ray.planning.sizes import DOUBLE, FLOAT, HALF, Parts, gram_bytes, packed_bytes, total

CANDIDATES = 4  # corrections that auto scores, in one pass where weights come and go


class HoldPlan(NamedTuple):
    """How the original is held for a pass, and a worker's bytes by part."""

    hold: str
    parts: Parts


class MemoryModel(CalibrationMemory, FactorizationMemory):
    """Predicts from a layout, a config and row lengths; every method gives bytes by part, ``total`` adds them up."""

    def healing_stage_parts(self) -> Parts:
        """The training, the original's pass over its batches before it, or the rounding of grown factors under their Grams after
        it; the largest."""
        healing = self.config.emulator.heals
        if healing is None:
            return {}
        from emloc_ray.planning.training import rounded_late  # as below

        rounding = self.factorization_parts() if rounded_late(self.layout, healing) else {}
        taught = self.teacher_plan(self.teacher_rows()).parts
        return max(self.healing_training_parts(), taught, rounding, key=total)

    def healing_steps_parts(self) -> Parts:
        """What takes less with a smaller micro-batch: the training, or the original's pass; nothing where nothing is healed."""
        healing = self.config.emulator.heals
        if healing is None:
            return {}
        rows = healing.per_device_train_batch_size or self.config.finetune.per_device_train_batch_size
        return max(self.healing_training_parts(), self.teacher_plan(rows).parts, key=total)

    def teacher_rows(self) -> int:
        """The rows of a batch of the original's in healing: a micro-batch, and up to a shard of those that it reads where its
        weights come anew for each batch."""
        from emloc_ray.planning.training import healing_training  # needs the config: the rest plans from shapes alone

        healing = self.config.emulator.heals
        assert healing is not None
        training = healing_training(self.config, healing, self.layout)
        section, shard = training.section, rows_per_shard(self.lengths.mean, healing.num_teacher_logits)
        rows = section.per_device_train_batch_size
        read = healing.steps * rows * section.gradient_accumulation_steps * section.num_workers
        most = min(shard, read, self.prepared.num_rows(training.split))
        return self._rows_within("finetune", self.teacher_plan, rows, most)

    def teacher_plan(self, rows: int) -> HoldPlan:
        """The original's pass over a batch of so many rows for its top logits, and a shard of these, put together."""
        healing, mean = self.config.emulator.heals, self.lengths.mean
        logits = 0 if healing is None else healing.num_teacher_logits
        shard = rows_per_shard(mean, logits) * BYTES_PER_LOGIT * mean * logits
        return self._plan_beside("finetune", {**self._scoring_parts(rows, with_adapter=False), "teacher": 2 * shard})

    def healing_training_parts(self) -> Parts:
        """The training of the healing alone; nothing where nothing is healed."""
        healing = self.config.emulator.heals
        if healing is None:
            return {}
        from emloc_ray.planning.training import healing_training  # needs the config: the rest plans from shapes alone

        training = healing_training(self.config, healing, self.layout)
        return MemoryModel(self.prepared, self.lengths, training).finetuning_parts(DIVERGENCE_COPIES)

    def finetuning_parts(self, logit_copies: int = LOSS_COPIES) -> Parts:
        """The steps, or where more is held for them the scores between these."""
        steps = self.training_step_parts(logit_copies)
        return max(steps, self.validation_plan().parts, key=total) if self.trained.section.validates else steps

    def validation_plan(self) -> HoldPlan:
        """The emulator with its optimizer while a batch is scored on it, or on the original, which comes beside it then."""
        return self._validation_plan_of(self.validation_rows())

    def validation_rows(self) -> int:
        """The rows of a batch that is scored while training: as many as asked for, or as fit a worker."""
        section = self.trained.section
        rows = int((section.model_extra or {}).get("per_device_eval_batch_size", section.per_device_train_batch_size))
        budget = self.worker_bytes("finetune") - BASE_BYTES
        while rows > 1 and total(self._validation_plan_of(rows).parts) > budget:
            rows //= 2
        return rows

    def _validation_plan_of(self, rows: int) -> HoldPlan:
        trained = {"unpacked": self._unpacked(), "optimizer": self._optimizer_bytes(self.adapter_parameters)}
        beside = {**trained, **self._scoring_parts(rows)}
        if self.trained.section.eval_original_every is None or not self.layout.differs:
            hold = self.finetuning_hold()
            return HoldPlan(hold, {"weights": self.emulator if hold == "resident" else self.held[hold], **beside})
        return self._plan_beside("finetune", {"emulator": self.emulator, **beside, **self._adapter_parts(1, rows)})

    def training_step_parts(self, logit_copies: int = LOSS_COPIES) -> Parts:
        """Emulator, adapter with its optimizer, and a step: what blocks keep for the backward pass, or only their inputs
        and one block's at a time under gradient checkpointing; beside it the logits, or one linear's update by LoRA."""
        hold = self.finetuning_hold()
        again = self.trained.section.gradient_checkpointing or hold != "resident"
        weights = self.emulator if hold == "resident" else self.held[hold]
        rows = self.trained.section.per_device_train_batch_size
        step = self._step_parts(again, self.adapter_parameters, self._left_as_they_are(), logit_copies, rows)
        return {"weights": weights, "unpacked": self._unpacked(), **step}

    def _step_parts(
        self,
        again: bool,
        parameters: int,
        dense: Collection[LinearSpec],
        logit_copies: int,
        rows: int,
        on_original: bool = False,
    ) -> Parts:
        """A micro-batch. ``parameters`` are trained; ``dense`` are the adapted linears in neither factors nor few bits."""
        virtual = self.trained.adapter.settings.get("num_virtual_tokens", 0)
        tokens = rows * (self.trained_lengths.longest + virtual)
        saved = [block.multiple * self.saved_in_training(block) for block in self.blocks]
        inputs = sum(block.multiple * block.width for block in self.blocks) * self.itemsize
        kept, inner = (inputs, max(saved)) if again else (sum(saved), 0.0)
        inside = tokens * (inner + self._passing_per_token())
        logits = self._logits(tokens, logit_copies)
        cast = [self.cast_weights(block, on_original) for block in self.blocks]
        head = HALF * self.layout.head_parameters if any(cast) else 0
        return {
            "optimizer": self._optimizer_bytes(parameters),
            "weights in 16 bits": max([*cast, head]) if again else sum(cast) + head,
            "row norms": self._row_norms(dense),
            "updates": (max if again else sum)(map(self._update_weights, self.blocks)),
            "activations": tokens * kept + (inside if inside >= logits else 0),
            "logits": logits if logits > inside else 0,
        }

    def _optimizer_bytes(self, parameters: int) -> float:
        """What is trained, its gradients and the optimizer's states, and under autocast a copy in 16 bits. NEFTune's noise is
        gone before a block begins: no part of the peak."""
        section, extra = self.trained.section, self.trained.section.model_extra or {}
        wide = optimizer_bytes(str(extra.get("optim", "adamw_torch")), section.gpus > 0)
        if self.config.finetune.num_workers > 1 and self.config.finetune.deepspeed is None:
            wide += FLOAT  # DDP's buckets, beside the gradients
        return parameters * (wide + (HALF if self.autocast is not None else 0))

    def finetuning_hold(self) -> str:
        """How the fine-tuning holds its model. Offloaded only where that is the original, at ratio 1.0, and it does not fit;
        the batch is then planned with blocks run again. DeepSpeed, DoRA and prefixes want the whole model."""
        section, method = self.trained.section, self.trained.adapter.method
        own = section.deepspeed is None and method not in ("dora", "prefix_tuning")
        if not own or self.layout.differs:
            return "resident"
        return self._plan_on_original(self.adapter_parameters, section.per_device_train_batch_size).hold

    def finishing_plan(self) -> HoldPlan:
        """Steps on the original of the adapter as corrected."""
        return self._finishing_plan_of(self.finishing_rows())

    def finishing_rows(self) -> int:
        """The rows of a micro-batch of these. Where the original's weights come anew for each micro-batch: as many of a step's
        rows as fit, however few fit the emulator."""
        section = self.trained.section
        rows = section.per_device_train_batch_size
        step = rows * section.gradient_accumulation_steps
        fitting = self._rows_within("finetune", self._finishing_plan_of, rows, step)
        return next(size for size in range(fitting, 0, -1) if step % size == 0)

    def _finishing_plan_of(self, rows: int) -> HoldPlan:
        return self._plan_on_original(self.corrected_parameters, rows)

    def _plan_on_original(self, parameters: int, rows: int) -> HoldPlan:
        """The original's weights, an adapter of so many ``parameters`` with its optimizer, and a micro-batch with blocks run
        again. A prefix works through the cache that this would fill twice: its original is held whole."""
        again = self.config.adapter.method != "prefix_tuning"
        step = self._step_parts(again, parameters, self.adapted, LOSS_COPIES, rows, on_original=True)
        return self._plan_beside("finetune", step) if again else HoldPlan("resident", {"weights": self.weights, **step})

    def correction_parts(self) -> Parts:
        """The largest of: the emulator with the adapter on some rows; the linears that share a Gram, a task each; the original,
        unless there is nothing to choose between, with the adapter and every module's thin matrices; what writes the adapter,
        which is all where nothing differs."""
        if not self.config.adapter.is_additive:
            return {}
        if not self.layout.differs:
            return self.adapter_writing_parts()
        needed: list[Parts] = [self._difference_parts(), self.adapter_writing_parts()]
        if self.config.correction.reads_adapted:
            needed.append(self._adapted_inputs_parts())
        if self.config.correction.method == "auto":
            needed.append(self.selection_plan().parts)
        return max(needed, key=total)

    def adapter_writing_parts(self) -> Parts:
        """The adapter as corrected, with one module's thin matrices as read and while it is corrected."""
        module = max(map(self._thin_bytes, self.adapted), default=0.0)
        return {"adapter": FLOAT * self.corrected_parameters, "correction": 2 * module}

    def _adapted_inputs_parts(self) -> Parts:
        """The emulator with the adapter on a batch, without its head, and every module's directions with their sums; as they were
        made on the host."""
        rows = self.config.evaluation.batch_size
        directions = sum(self._rank(s) * s.in_features for s in self.adapted)
        return {
            "weights": self.emulator,
            "unpacked": self._unpacked(),
            "activations": self._adapted_forward(rows * self.lengths.longest),
            **self._adapter_parts(1, rows),
            "directions": 2 * FLOAT * directions,
            "correction": DOUBLE * directions,
        }

    def selection_plan(self) -> HoldPlan:
        """The original with adapters on a batch of the selection rows, beside every module's thin matrices."""
        return self._selection_plan_of(self.selection_rows())

    def selection_rows(self) -> int:
        """The rows of that batch, by what :meth:`evaluation_rows` goes by."""
        return self._rows_scored(self._selection_plan_of)

    def _selection_plan_of(self, rows: int) -> HoldPlan:
        scoring, correction = self._scoring_parts(rows), {"correction": self.thin_matrices()}
        return self._together(lambda n: {**scoring, **self._adapter_parts(n, rows), **correction}, CANDIDATES)

    def thin_matrices(self) -> float:
        """Bytes of all that the adapter's modules see of the difference: in memory to score them, and on disk."""
        return sum(map(self._thin_bytes, self.adapted))

    def _thin_bytes(self, spec: LinearSpec) -> float:
        # What DoRA's magnitudes follow from, and what the directions see of the inputs in the emulator.
        wide = 3 + (self.config.adapter.method == "dora") + self.config.correction.reads_adapted
        width, height = spec.in_features, spec.out_features
        return self._rank(spec) * (DOUBLE * (width + wide * height) + FLOAT * (width + height))

    def correction_work(self) -> float:
        """Floating-point operations of ``G Q``, ``W [Q, G Q]`` and ``W_E [Q, G Q]`` for all adapted linears, whose own Q has
        ``k`` directions: ``2 k in²``, ``4 k out · in`` and as much for what the emulator has of these parameters."""
        return sum(
            2.0 * self._rank(s) * (s.in_features**2 + 2 * s.num_parameters + 2 * self.layout.kept(s))
            for s in self.adapted
        )

    def _difference_parts(self) -> Parts:
        """A linear's difference. The node of a worker with a GPU also holds the tensors of the group that it computes, and of
        the next where it has several."""
        parts: Parts = {"difference": max((self._difference_bytes(spec) for spec in self.adapted), default=0.0)}
        section, adapted = self.config.evaluation, {*self.adapted}
        if not section.gpus:
            return parts
        groups = [adapted.intersection(group) for group in self.layout.groups]
        read = sorted(
            packed_bytes(max(spec.in_features for spec in group)) + sum(map(self._read_bytes, group))
            for group in groups
            if group
        )
        return {**parts, "read ahead": sum(read[-2:] if len(read) > section.num_workers else read[-1:])}

    def _read_bytes(self, spec: LinearSpec) -> float:
        """W and what the emulator stores of it, in their files."""
        in_integers = spec.name in self.layout.bits
        kept = self.layout.quantized_bytes(spec) if in_integers else self.layout.kept(spec) * self.file_itemsize
        return spec.num_parameters * self.file_itemsize + kept

    def _difference_bytes(self, spec: LinearSpec) -> float:
        """W and what the emulator stores of it, the Gram, some rows of one in float64, and thin matrices."""
        rows = min(ROWS, max(spec.out_features, spec.in_features))
        stored = spec.num_parameters * self.file_itemsize + self.layout.kept(spec) * self.itemsize
        thin = 4 * self._rank(spec) * (spec.in_features + spec.out_features)
        return stored + gram_bytes((spec,)) * 1.5 + (2 * rows * spec.in_features + thin) * DOUBLE

    def merge_parts(self) -> Parts:
        """A row chunk that is copied, or one that is merged with its sum in float32; the adapter, and one module's."""
        if self.config.adapter.is_prompt:
            return {}
        largest = max([self.layout.head_parameters, *(spec.num_parameters for spec in self.layout.specs)])
        chunk = chunk_limit(self.config.merge.chunk_bytes, largest * self.file_itemsize)
        merged = max((min(chunk, FLOAT * spec.num_parameters) for spec in self.adapted), default=0)
        module = max((self._rank(s) * (s.in_features + s.out_features) for s in self.adapted), default=0)
        return {"chunks": max(chunk, 2 * merged), "adapter": FLOAT * (self.corrected_parameters + module)}

    def evaluation_parts(self) -> Parts:
        """Every model that is scored, one after another; the larger, with the weight that an emulator unpacks."""
        original = self.evaluation_plan().parts
        if not self.layout.differs or not {*ON_EMULATOR} & {*self.config.evaluation.variants}:
            return original
        beside = self._evaluation_plan_of(self.config.evaluation.batch_size).parts
        return max(original, {**beside, "weights": self.emulator, "unpacked": self._unpacked()}, key=total)

    def evaluation_plan(self) -> HoldPlan:
        """The original with its adapters, scoring a batch or completing one with a cache. Where its weights come and go: all
        variants at once, and one linear's merged weight."""
        return self._evaluation_plan_of(self.evaluation_rows())

    def evaluation_rows(self) -> int:
        """The rows of a batch of the original's: where its weights come anew for each batch as many of those asked for as fit,
        however few fit the emulator."""
        return self._rows_scored(self._evaluation_plan_of)

    def _rows_scored(self, plan_of: Callable[[int], HoldPlan]) -> int:
        written = (self.prepared.written_config or self.config).evaluation.batch_size
        return self._rows_within("evaluation", plan_of, self.config.evaluation.batch_size, written)

    def _evaluation_plan_of(self, rows: int) -> HoldPlan:
        section, scored = self.config.evaluation, self.prepared.variants_scored
        completes = section.num_generations or section.num_exact_match
        cached = (self.lengths.longest_scored + section.max_new_tokens) * self.itemsize * self._cached_per_token()
        merged = self.itemsize * max((s.num_parameters for s in self.adapted), default=0)

        def beside(number: int) -> Parts:
            adapters = self._adapter_parts(max(1, number - 1), rows)  # the original has none
            scoring = {**self._scoring_parts(rows), **adapters}
            forward = self._adapted_forward(rows * self.lengths.longest_scored)
            completing = {"kv cache": min(2, number) * rows * cached, "activations": forward, **adapters}
            most = max(scoring, completing if completes else {}, key=total)
            return {**most, "merged": merged} if number > 1 and "merged" in scored else most

        return self._together(beside, len({*scored} - {*ON_EMULATOR}))

    def prompts_at_once(self) -> int:
        """How many prompts are completed together: a batch; where weights come anew for every token, as many more as fit."""
        section, held, rows = self.config.evaluation, self.evaluation_plan(), self.evaluation_rows()
        asked = max(section.num_generations, section.num_exact_match, 1)
        if held.hold == "resident" or asked <= rows:
            return rows
        cached = (self.lengths.longest_scored + section.max_new_tokens) * self.itemsize * self._cached_per_token()
        left = self.worker_bytes("evaluation") - BASE_BYTES - total(held.parts)
        more = max(0.0, left / (2 * cached + self._adapted_forward(self.lengths.longest_scored)))
        return int(min(asked, rows + more))

    def _adapter_parts(self, number: int, rows: int) -> Parts:
        """So many adapters, and the hidden states of those that wait for their turn at a block: its input and output."""
        waiting = 2 * (number - 1) * rows * self.lengths.longest_scored * self.layout.hidden_size * self.itemsize
        return {
            "adapter": number * FLOAT * self.corrected_parameters,
            "row norms": number * self._row_norms(self.adapted),
            "batch states": waiting,
        }

    def _together(self, beside: Callable[[int], Parts], number: int) -> HoldPlan:
        """One adapter after another beside the whole original, or ``number`` at once where the original does not fit."""
        alone = self._plan_beside("evaluation", beside(1))
        return alone if alone.hold == "resident" else self._plan_beside("evaluation", beside(number))

    def _scoring_parts(self, rows: int, with_adapter: bool = True) -> Parts:
        tokens = rows * self.lengths.longest_scored
        inside, logits = (
            self._adapted_forward(tokens) if with_adapter else self.forward_bytes(tokens),
            self._logits(tokens),
        )
        return {"activations": inside} if inside >= logits else {"logits": logits}

    def _adapted_forward(self, tokens: float) -> float:
        """A forward pass with an adapter, which adds to the widest output its update and that sum, in float32."""
        return self.forward_bytes(tokens) + tokens * 2 * FLOAT * max((s.out_features for s in self.adapted), default=0)

    def _rows_within(self, section: str, plan_of: Callable[[int], HoldPlan], rows: int, most: int) -> int:
        """The rows of a batch of the original's. Where its weights come anew for each batch they are doubled, up to ``most``,
        while they fit a worker of a section."""
        if plan_of(rows).hold == "resident":
            return rows
        budget = self.worker_bytes(section) - BASE_BYTES
        while rows < most and total(plan_of(min(2 * rows, most)).parts) <= budget:
            rows = min(2 * rows, most)
        return rows

    def _plan_beside(self, section: str, beside: Parts) -> HoldPlan:
        """The original as a worker of a section holds it, with what is beside it."""
        budget = self.worker_bytes(section)
        hold = choose(self.config.model.hold, self.held, BASE_BYTES + total(beside), budget)
        return HoldPlan(hold, {"weights": self.held[hold], **beside})
