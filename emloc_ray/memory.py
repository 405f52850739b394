"""What one worker of every stage holds at its peak, part by part, from shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.modeling.loss import chunk_tokens
from emloc_ray.preparation import Prepared

Parts = dict[str, float]  # bytes by what holds them

BASE_BYTES = 450 * 2**20  # a worker with torch, transformers and peft imported
_ADAM_BYTES = 16  # a trained parameter in float32: itself, its gradient, Adam's two moments
_FACTORIZE_COPIES = 6  # of the largest linear in float32: weight, whitened weight, M, eigenvectors, factors


@dataclass(frozen=True)
class Lengths:
    """Tokens a row: the mean, and the longest that is to be expected after truncation."""

    mean: float
    longest: float


class MemoryModel:
    """Predicts from a layout, a config and row lengths; every method gives bytes by part, ``total`` adds them up."""

    def __init__(self, prepared: Prepared, lengths: Lengths) -> None:
        self.config, self.layout, self.lengths = prepared.config, prepared.layout, lengths
        self.model_config = prepared.model_config
        self.itemsize = model_dtype(prepared).itemsize
        self.weights = self.layout.num_parameters * self.itemsize
        saved = self.layout.parameters_targeted - self.layout.parameters_factorized
        self.emulator = (self.layout.num_parameters - saved) * self.itemsize
        self.adapter_parameters = sum(
            self.config.adapter.r * (s.in_features + s.out_features)
            for s in self.layout.specs
            if s.name in set(self.layout.adapted)
        )
        self.blocks = _by_block(self.layout.specs)

    def stage(self, name: str) -> Parts:
        """Parts of one stage's worker."""
        found: Parts = getattr(self, name)()
        return {"base": BASE_BYTES, **{part: int(size) for part, size in found.items() if size}}

    def calibrate(self) -> Parts:
        return self.calibrate_resident() if self.calibration_mode() == "resident" else self.calibrate_streamed()

    def calibrate_resident(self) -> Parts:
        largest = max((sum(map(gram_bytes, wave)) for wave in self.waves()), default=0)
        return {"weights": self.weights, "grams": largest, "activations": self._forward(self._calibration_tokens())}

    def calibrate_streamed(self) -> Parts:
        """The weights outside the blocks, those of the largest block, its Grams, and one token shard's hidden states."""
        inside = max(sum(s.num_parameters for s in specs) for specs in self.blocks.values())
        outside = self.layout.num_parameters - sum(s.num_parameters for s in self.layout.specs)
        # The head is never reached; where it is the embedding too, that stays.
        head = 0 if getattr(self.model_config, "tie_word_embeddings", False) else self.layout.head_parameters
        grams = max(
            sum(gram_bytes(group) for group in self._groups() if group[0].block == block) for block in self.blocks
        )
        shard = self.config.calibration.rows_per_shard * self.lengths.mean * self.layout.hidden_size * self.itemsize
        return {
            "weights": (inside + outside - head) * self.itemsize,
            "grams": grams,
            "hidden states": 2 * shard,
            "activations": self._forward(self._calibration_tokens()),
        }

    def hidden_state_disk_bytes(self) -> int:
        """What streamed calibration keeps on disk at any time: two blocks' outputs for every calibration token."""
        tokens = self.config.calibration.num_calibration_samples * self.lengths.mean
        return int(2 * tokens * self.layout.hidden_size * self.itemsize)

    def calibration_mode(self) -> str:
        """As the config says; ``auto`` is ``resident`` where that fits a worker."""
        if self.config.calibration.mode != "auto":
            return self.config.calibration.mode
        needed = self.weights + sum(map(gram_bytes, self._groups())) + self._forward(self._calibration_tokens())
        return "resident" if BASE_BYTES + needed <= self.worker_bytes("calibration") else "streamed"

    def waves(self) -> list[list[tuple[LinearSpec, ...]]]:
        """The groups of linears, in parts whose Grams fit beside the model in a worker's memory; one part where all do."""
        room = self.worker_bytes("calibration") - BASE_BYTES - self.weights - self._forward(self._calibration_tokens())
        waves: list[list[tuple[LinearSpec, ...]]] = []
        used = 0.0
        for group in self._groups():
            if not waves or used + gram_bytes(group) > room:
                waves.append([])
                used = 0.0
            waves[-1].append(group)
            used += gram_bytes(group)
        return waves

    def worker_bytes(self, section: str) -> float:
        """``memory_budget``; else a worker's share of this machine's memory, or no bound on a cluster elsewhere."""
        if self.config.memory_budget is not None:
            return float(self.config.memory_budget)
        if self.config.ray.address is not None:
            return float("inf")
        return psutil.virtual_memory().available / getattr(self.config, section).num_workers

    def factorize(self) -> Parts:
        largest = max(spec.num_parameters for spec in self.layout.specs)
        widest = max((gram_bytes(group) for group in self._groups()), default=0)
        return {"weights": _FACTORIZE_COPIES * 4 * largest, "grams": 2 * widest}

    def finetune(self) -> Parts:
        section = self.config.finetune
        tokens = section.per_device_train_batch_size * self.lengths.longest
        blocks = 1 if section.gradient_checkpointing else len(self.blocks)
        kept = len(self.blocks) * self.layout.hidden_size if section.gradient_checkpointing else 0
        return {
            "weights": self.emulator,
            "optimizer": _ADAM_BYTES * self.adapter_parameters,
            "activations": tokens * self.itemsize * (kept + blocks * self._saved_per_token()) + self._forward(tokens),
            "logits": self._logits(tokens),
        }

    def correct(self) -> Parts:
        largest = max(spec.num_parameters for spec in self.layout.specs)
        return {**self._scoring(self.weights), "correction": 6 * 4 * largest}

    def merge(self) -> Parts:
        return {"chunks": 3 * self.config.merge.chunk_bytes, "adapter": 4 * self.adapter_parameters}

    def evaluate(self) -> Parts:
        return {**self._scoring(self.weights), "adapter": 4 * self.adapter_parameters}

    def inference(self) -> Parts:
        """The original at the fine-tuning's micro-batch and length: prefill with its KV cache, logits of the last token."""
        rows = self.config.finetune.per_device_train_batch_size
        tokens = rows * self.lengths.longest
        return {
            "base": BASE_BYTES,
            "weights": self.weights,
            "kv cache": tokens * self.itemsize * self._cached_per_token(),
            "activations": self._forward(tokens),
            "logits": rows * self._vocabulary() * self.itemsize,
        }

    def _scoring(self, weights: float) -> Parts:
        tokens = self.config.evaluation.batch_size * self.lengths.longest
        return {"weights": weights, "activations": self._forward(tokens), "logits": self._logits(tokens)}

    def _groups(self) -> list[tuple[LinearSpec, ...]]:
        targeted = set(self.layout.compressed if self.layout.ranks else ())
        return [group for group in self.layout.groups if any(spec.name in targeted for spec in group)]

    def _calibration_tokens(self) -> float:
        return self.config.calibration.batch_size * self.lengths.longest

    def _logits(self, tokens: float) -> float:
        """One chunk's logits in float32, their softmax and its gradient."""
        return 3 * 4 * min(tokens, chunk_tokens(self.layout.hidden_size)) * self._vocabulary()

    def _vocabulary(self) -> float:
        return self.layout.head_parameters / self.layout.hidden_size

    def _saved_per_token(self) -> float:
        """Elements that one block keeps for its backward pass: shared inputs, outputs, ranks, norms and rotary copies."""
        specs = next(iter(self.blocks.values()))
        block = specs[0].block
        inputs = sum(group[0].in_features for group in self.layout.groups if group[0].block == block)
        ranks = sum(self.layout.ranks.get(spec.name, 0) for spec in specs)
        return inputs + sum(spec.out_features for spec in specs) + ranks + 4 * self.layout.hidden_size

    def _forward(self, tokens: float) -> float:
        """Bytes of what lives at once inside a block that keeps nothing: the residual, and its widest step."""
        widest = max(
            (group[0].in_features + 2 * sum(spec.out_features for spec in group) for group in self.layout.groups),
            default=0,
        )
        return tokens * self.itemsize * (3 * self.layout.hidden_size + widest)

    def _cached_per_token(self) -> float:
        config = self.model_config
        heads = getattr(config, "num_attention_heads", None) or 1
        width = getattr(config, "head_dim", None) or self.layout.hidden_size // heads
        cached = getattr(config, "num_key_value_heads", None) or heads
        return 2.0 * cached * width * len(self.blocks)


def total(parts: Parts) -> int:
    """All parts together."""
    return int(sum(parts.values()))


def gram_bytes(group: tuple[LinearSpec, ...]) -> int:
    """Bytes of a group's Gram in float32."""
    return 4 * group[0].in_features ** 2


def _by_block(specs: tuple[LinearSpec, ...]) -> dict[str, list[LinearSpec]]:
    blocks: dict[str, list[LinearSpec]] = {}
    for spec in specs:
        blocks.setdefault(spec.block, []).append(spec)
    return blocks


def model_dtype(prepared: Prepared) -> torch.dtype:
    """What the model's weights are kept in."""
    wanted = prepared.config.model.dtype
    if wanted != "auto":
        found: torch.dtype = getattr(torch, wanted)
        return found
    if prepared.source.gguf_file:
        return torch.float32
    return getattr(prepared.model_config, "dtype", None) or torch.float32
