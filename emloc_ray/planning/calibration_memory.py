"""What a worker may hold, and what the import, the data, calibration, sums of gradients, refinement and inference hold of it,
part by part."""

import functools
import math

from emloc_ray.core.integer_forms import BITS
from emloc_ray.core.trained_integers import ELEMENTS
from emloc_ray.io.available_memory import available_bytes
from emloc_ray.io.store.atomic import COPY_BYTES
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.planning.holding import (
    GradientPlan,
    allowed,
    block_parameters,
    blocks_share,
    choose,
    held_bytes,
    moved_bytes,
    plan_gradients,
)
from emloc_ray.planning.machine import gpu_bytes
from emloc_ray.planning.model_bytes import ModelBytes
from emloc_ray.planning.sizes import DOUBLE, FLOAT, Parts, gradient_bytes, gram_bytes, in_waves, total

BASE_BYTES = 450 * 2**20  # a worker with torch, transformers and peft imported
_GPU_SHARE = 0.92  # of a GPU's memory: the rest goes to CUDA's context and to what its allocator leaves between tensors
_HIDING_TOKENS = 1024  # of a batch: its pass takes as long as weights take to come from the host's memory
_WAVES = 6  # of gradients, a pass each, that a budget left out may ask for: inference of a model in bfloat16 takes five
_STREAMS = 3  # gradients of the residual stream at once, around what branches off it
_HEADER_BYTES = 4000  # of Python's objects for a token of the vocabulary and its merges: 3,560 for SmolLM2's
# Of the data: rows that are tokenized at once, rows with images, and bytes of images that are written at once.
TOKENIZED_ROWS, IMAGE_ROWS, WRITTEN_IMAGE_BYTES = 256, 32, 2**25
# As measured: of a byte-level tokenizer a token of its vocabulary, and a token of a row as text, as it is encoded and in lists.
_TOKENIZER_BYTES, _TOKEN_BYTES = 1200, 256
_DECODED = 32  # pixels' bytes for a byte of a photograph
# Of refinement.
_MADE = 6  # floats of an integer while a weight is made of it, or a gradient for it
_TRAINED = 4  # floats of what is trained: it, its gradient and Adam's two moments


class CalibrationMemory(ModelBytes):
    """The part of :class:`~emloc_ray.planning.memory.MemoryModel` up to the emulator; every method gives bytes by part."""

    @functools.cached_property
    def held(self) -> dict[str, int]:
        """Bytes of the original's weights, by how it is held."""
        return held_bytes(self.layout, self.itemsize, self._tied)

    def moved(self, hold: str, rows: float, batch_size: int) -> float:
        """Bytes of the original's weights that come to the device while ``rows`` go through it forward."""
        return math.ceil(rows / batch_size) * moved_bytes(self.layout, self.itemsize, self._tied)[hold]

    def import_parts(self) -> Parts:
        """A chunk that is copied. Of a GGUF file one tensor in float32, a linear's twice, as it may be laid out otherwise; with
        the whole model and the file's header where tensors are made of several."""
        if self.prepared.source.gguf_file is None:
            return {"chunks": COPY_BYTES}
        largest = max([self.layout.head_parameters, *(2 * spec.num_parameters for spec in self.layout.specs)])
        from emloc_ray.modeling.gguf_import import needs_whole  # which reads YAML: the rest plans from shapes alone

        tensor: Parts = {"tensor": FLOAT * largest}
        if not needs_whole(self.model_config):
            return tensor
        return {"header": _HEADER_BYTES * self._vocabulary(), "weights": self.weight_files, **tensor}

    def tokenization_parts(self) -> Parts:
        """The tokenizer; a batch of rows, from text to token lists. For rows with images: a batch as read and as rows, one
        decoded image, and the rows being written, which are held three times (group, table, writer)."""
        image = self.lengths.image_bytes
        return {
            "tokenizer": _TOKENIZER_BYTES * self._vocabulary(),
            "rows": TOKENIZED_ROWS * self.lengths.longest * _TOKEN_BYTES,
            "images": (2 * IMAGE_ROWS + _DECODED) * image
            + 3 * min(WRITTEN_IMAGE_BYTES + image, TOKENIZED_ROWS * image),
        }

    @property
    def outside(self) -> int:
        """Parameters outside the blocks that a pass block by block holds: never the head, unless it is the embedding too."""
        inside = sum(block_parameters(self.layout).values())
        return self.layout.num_parameters - inside - (0 if self._tied else self.layout.head_parameters)

    @property
    def _tied(self) -> bool:
        return bool(getattr(self.model_config, "tie_word_embeddings", False))

    def calibration_parts(self) -> Parts:
        """What a worker holds, however the calibration holds the model."""
        if self.calibration_hold() == "block_by_block":
            return self.calibration_parts_by_block()
        return self.calibration_parts_whole()

    def calibration_parts_whole(self) -> Parts:
        """The model, the Grams of the largest wave, and a pass without the head."""
        largest = max((sum(map(gram_bytes, wave)) for wave in self.waves()), default=0)
        held = self.held[self.calibration_hold()]
        return {"weights": held, "grams": largest, "activations": self._counting(self._calibration_tokens())}

    def calibration_parts_by_block(self) -> Parts:
        """The weights outside the blocks and of the largest block, its Grams, and one token shard's hidden states: what the
        block reads and what it gives, for all the shard's rows."""
        inside = max(block_parameters(self.layout).values())
        names = [block.name for block in self.blocks]
        grams = max(sum(gram_bytes(group) for group in self._groups() if group[0].block == name) for name in names)
        section = self.config.calibration
        rows = min(section.rows_per_shard, section.num_calibration_samples or section.rows_per_shard)
        shard = rows * self.lengths.longest * self.layout.hidden_size * self.itemsize
        return {
            "weights": (inside + self.outside) * self.itemsize,
            "grams": grams,
            "hidden states": 2 * shard,
            "activations": self._counting(self._calibration_tokens()),
        }

    def hidden_state_disk_bytes(self) -> int:
        """What calibration block by block keeps on disk at any time: two blocks' outputs for every calibration token."""
        return int(2 * self.calibration_tokens * self.layout.hidden_size * self.itemsize)

    def calibration_hold(self) -> str:
        """As the config says; ``auto``: resident where all Grams fit beside the model, else block by block. Where blocks read
        what is inside others, as shared keys and values, offloaded takes the place of block by block."""
        hold, budget = self.config.model.hold, self.worker_bytes("calibration") - BASE_BYTES
        counting = self._counting(self._calibration_tokens())
        if hold == "auto" and self.weights + sum(map(gram_bytes, self._groups())) + counting <= budget:
            return "resident"
        if self.may_stream():
            return "block_by_block"
        largest = max(map(gram_bytes, self._groups()), default=0)
        return choose(hold if hold == "resident" else "offloaded", self.held, counting + largest, budget)

    def may_stream(self) -> bool:
        """Whether calibration may go block by block, where that is what fits."""
        model = self.config.model
        return model.hold in ("auto", "block_by_block") and not blocks_share(self.model_config, model.trust_remote_code)

    def waves(self) -> list[list[tuple[LinearSpec, ...]]]:
        """The groups of linears, in parts whose Grams fit beside the model in a worker's memory; one part where all do."""
        hold = self.calibration_hold()
        beside = self.held["resident" if hold == "block_by_block" else hold] + self._counting(
            self._calibration_tokens()
        )
        return in_waves(self._groups(), gram_bytes, self.worker_bytes("calibration") - BASE_BYTES - beside)

    def gradient_parts(self) -> Parts:
        """The model, the largest wave's sums of gradients, and a pass forward and back: the blocks' inputs, and inside one
        block what its backward pass reads, with gradients: of the residual stream, and of the outputs of one group and their
        product, or of one output in float32 too; or a chunk of logits."""
        plan = self.gradient_plan()
        largest = max((sum(map(gradient_bytes, wave)) for wave in plan.waves), default=0)
        passed = self._backward_parts(plan.batch_size * self.lengths.longest)
        return {"weights": self.held[plan.hold], "gradients": largest, **passed}

    def gradient_plan(self) -> GradientPlan:
        """How the sums of gradients are gathered within a worker's memory. Every wave costs a pass: the default budget is
        exceeded rather than take many."""

        def within(worker_bytes: float) -> GradientPlan:
            hold, batch_size = self.config.model.hold, self.config.calibration.batch_size
            budget = worker_bytes - BASE_BYTES
            specs, rows = self._gradient_specs(), self._tokens_that_hide_moving() / self.lengths.mean
            return plan_gradients(hold, self.held, specs, batch_size, self._backward_bytes, budget, rows)

        plan = within(self.worker_bytes("calibration"))
        if len(plan.waves) <= _WAVES or not self.config.budget_is_default:
            return plan
        return within(self.usable_bytes("calibration"))

    def _tokens_that_hide_moving(self) -> float:
        """Tokens of a batch whose pass forward and back takes as long as its weights take to come. A weight has 6 operations a
        token, of 4e13 a second, and comes twice, 4 bytes in all: 25e9 a second from the host's memory, a twelfth of that from
        disk. CPUs compute where the weights lie."""
        if not self.config.calibration.gpus:
            return 0.0
        host = available_bytes() if self.prepared.host_bytes is None else self.prepared.host_bytes
        return _HIDING_TOKENS * (12.0 if self.weights > host else 1.0)

    def least_for_gradients(self) -> float:
        """Bytes that a worker needs for gradients at least: a row at a time, with one linear's sum, in the leanest way."""
        largest = max(map(gradient_bytes, self._gradient_specs()), default=0)
        leanest = min(self.held[hold] for hold in allowed(self.config.model.hold))
        return BASE_BYTES + leanest + self._backward_bytes(1) + largest

    def _backward_bytes(self, rows: int) -> int:
        return total(self._backward_parts(rows * self.lengths.longest))

    def _backward_parts(self, tokens: float) -> Parts:
        inputs = tokens * self.itemsize * sum(block.multiple * block.width for block in self.blocks)
        length = self.lengths.longest
        saved = max(block.multiple * self._saved(block, self.itemsize, length) for block in self.blocks)
        widest = max((spec.out_features for spec in self.layout.specs), default=0)
        gated = max((sum(spec.out_features for spec in group) for group in self.layout.groups), default=0) + widest
        passing: float = max(self.itemsize * gated, (self.itemsize + FLOAT) * widest)
        passing += self.itemsize * (self._steps_backward() + _STREAMS * max(block.width for block in self.blocks))
        inside = tokens * (saved + passing)
        # Beside the logits and their softmax a running sum in float64, from which labels are drawn.
        logits = self._logits(tokens) * (2 * FLOAT + DOUBLE) / (2 * FLOAT)
        return {
            "activations": inputs + (inside if inside >= logits else 0),
            "logits": logits if logits > inside else 0,
        }

    def refinement_parts(self) -> Parts:
        """The weights of original and emulator outside the blocks, and of the original in the largest block while rows pass it;
        or, where that is more, of the emulator while its block is fitted. What is fitted of that is in float32 with gradients and
        Adam's moments, and as the products read it until the backward pass. With either a batch's hidden states, as both read
        and give them, what the fit reads of the next batch, and what the block keeps."""
        return self._refinement_parts_of(self.refinement_rows())

    def refinement_rows(self) -> int:
        """The rows that are read at once: those of a step, calibration's batch, or as many of them as fit a worker."""
        rows = self.config.calibration.batch_size
        within = self.worker_bytes("emulator", num_workers=1)
        while rows > 1 and BASE_BYTES + total(self._refinement_parts_of(rows)) > within:
            rows //= 2
        return rows

    def _refinement_parts_of(self, rows: int) -> Parts:
        blocks = [block for block in self.blocks if not block.is_between]
        original, left = self.itemsize * max(block_parameters(self.layout).values()), self.layout.left_by_block
        stored = max(
            sum(map(self._stored_bytes, block.specs)) + self.itemsize * left.get(block.name, 0) for block in blocks
        )
        forms = [[(s, self.layout.form(s)) for s in block.specs if self._is_fitted(s)] for block in blocks]
        saved = max(
            block.multiple
            * (
                self._saved(block, self.itemsize, self.lengths.longest)
                + self._read_by_trained(block, [spec for spec, _ in fitted])
                + self.itemsize * sum(spec.token_share * (form.rank or form.residual_rank) for spec, form in fitted)
            )
            for block, fitted in zip(blocks, forms, strict=True)
        )
        tokens, specs = rows * self.lengths.longest, [[spec for spec, _ in fitted] for fitted in forms]
        outside, state = 2 * self.outside * self.itemsize, tokens * self.layout.hidden_size * self.itemsize
        states: Parts = {"batch states": 4 * state, "read ahead": 2 * state}
        passing: Parts = {
            "weights": outside + original,
            **states,
            "activations": self.forward_bytes(tokens),
        }
        fitting: Parts = {
            "weights": outside + stored,
            "optimizer": max(sum(map(self._fitted_bytes, block)) for block in specs),
            "integers": max((self._integer_bytes(spec) for block in specs for spec in block), default=0),
            **states,
            "activations": tokens * (saved + self.itemsize * self._steps_backward()),
        }
        return max(fitting, passing, key=total)

    def _is_fitted(self, spec: LinearSpec) -> bool:
        return spec.name in self.layout.ranks or spec.name in self.layout.bits

    def _stored_bytes(self, spec: LinearSpec) -> int:
        in_integers = spec.name in self.layout.bits
        return self.layout.quantized_bytes(spec) if in_integers else self.itemsize * self.layout.kept(spec)

    def _fitted_bytes(self, spec: LinearSpec) -> int:
        """Of one linear: products read floats as they are where the model is in float32, and a weight made of integers."""
        in_integers = spec.name in self.layout.bits
        read = self.itemsize if in_integers or self.itemsize < FLOAT else 0
        return (_TRAINED * FLOAT + read) * (self._integers(spec) if in_integers else self.layout.kept(spec))

    def _integers(self, spec: LinearSpec) -> int:
        """How many a linear has; under a budget, which spends its bytes otherwise than evenly, as many as its own may hold."""
        if self.layout.budget is None:
            return self.layout.kept(spec)
        return min(spec.num_parameters, 8 * self.layout.quantized_bytes(spec) // min(BITS))

    def _integer_bytes(self, spec: LinearSpec) -> int:
        """Of one linear in integers: the gradients of its largest matrix, of its weight as the products read it and of what is
        trained, beside those of the batches before; and some floats of the rows that are made at a time."""
        if spec.name not in self.layout.bits:
            return 0
        shapes = [(spec.num_parameters,)] if self.layout.budget is not None else self.layout.stored_shapes(spec)
        largest = max(map(math.prod, shapes))
        return (self.itemsize + FLOAT) * largest + _MADE * FLOAT * min(ELEMENTS, largest)

    @property
    def budget(self) -> float | None:
        """:meth:`budget_bytes` of the fine-tuning's workers."""
        return self.budget_bytes("finetune")

    def budget_bytes(self, section: str) -> float | None:
        """``memory_budget`` in bytes for one worker, at most what fits its share of the GPU. None without a budget."""
        memory_budget, gpus = self.config.memory_budget, getattr(self.config, section).gpus
        if memory_budget is None:
            return None
        budget = self._inference_bytes if memory_budget == "inference" else float(memory_budget)
        return min(budget, self.fillable(gpus)) if gpus else budget

    def fillable(self, gpus: float) -> float:
        """Bytes of so many GPUs that a worker can fill, by the smallest of the Ray that was joined, or here; infinite where that
        is not known."""
        known = self.prepared.gpu_bytes
        if known is None:
            known = float("inf") if self.config.ray.joins else gpu_bytes()
        return _GPU_SHARE * known * gpus

    def worker_bytes(self, section: str, num_workers: int | None = None) -> float:
        """Bytes that one worker may hold, of as many as the section has or of ``num_workers``: the budget; under the default
        budget no more than what is free."""
        budget, usable = self.budget_bytes(section), self.usable_bytes(section, num_workers)
        if budget is None:
            return usable
        return min(budget, usable) if self.config.budget_is_default else budget

    def usable_bytes(self, section: str, num_workers: int | None = None) -> float:
        """Bytes that one worker can fill: a share of its GPU's whole memory, or of this machine's free memory; infinite for
        workers of another machine."""
        workers = getattr(self.config, section)
        if workers.gpus:
            return self.fillable(workers.gpus)
        return float("inf") if self.config.ray.joins else self._free_on_machine / (num_workers or workers.num_workers)

    @functools.cached_property
    def _free_on_machine(self) -> float:
        return available_bytes()

    @functools.cached_property
    def _inference_bytes(self) -> int:
        return total(self.inference())

    def inference(self, rows: int = 1, length: int | None = None) -> Parts:
        """The original on a row of ``max_seq_length``, whatever the training's: prefill with its KV cache, logits of the last
        token."""
        tokens = rows * (length or self.config.data.max_seq_length)
        return {
            "base": BASE_BYTES,
            "weights": self.weights,
            "kv cache": tokens * self.itemsize * self._cached_per_token(),
            "activations": self.forward_bytes(tokens),
            "logits": rows * self._vocabulary() * self.itemsize,
        }
