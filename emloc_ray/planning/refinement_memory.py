"""What refinement holds of a worker, part by part."""

import math

from emloc_ray.core.integer_forms import BITS
from emloc_ray.core.trained_integers import ELEMENTS
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.planning.calibration_memory import BASE_BYTES, CalibrationMemory, Parts, total
from emloc_ray.planning.sizes import FLOAT

_MADE = 6  # floats of an integer while a weight is made of it, or a gradient for it
_TRAINED = 4  # floats of what is trained: it, its gradient and Adam's two moments


class RefinementMemory(CalibrationMemory):
    """The part of :class:`~emloc_ray.planning.memory.MemoryModel` that is of refinement."""

    def refinement_parts(self) -> Parts:
        """The weights of original and emulator outside the blocks and in the largest block. What is fitted of the block is in
        float32 with gradients and Adam's moments, and as the products read it until the backward pass. With them a batch's
        hidden states, as both read and give them, what the fit reads of the next batch, and what the block keeps."""
        return self._refinement_parts_of(self.refinement_rows())

    def refinement_rows(self) -> int:
        """The rows that are read at once: those of a step, calibration's batch, or as many of them as fit a worker."""
        rows = self.config.calibration.batch_size
        while rows > 1 and BASE_BYTES + total(self._refinement_parts_of(rows)) > self.worker_bytes("emulator"):
            rows //= 2
        return rows

    def _refinement_parts_of(self, rows: int) -> Parts:
        blocks = [block for block in self.blocks if not block.is_between]
        inside = max(self.itemsize * b.num_parameters + sum(map(self._stored_bytes, b.specs)) for b in blocks)
        forms = [[(s, self.layout.form(s)) for s in block.specs if self._is_fitted(s)] for block in blocks]
        saved = max(
            block.multiple
            * (
                self._saved_per_token(block, [spec for spec, _ in fitted])
                + self.itemsize * sum(spec.token_share * (form.rank or form.residual_rank) for spec, form in fitted)
            )
            for block, fitted in zip(blocks, forms, strict=True)
        )
        tokens, specs = rows * self.lengths.longest, [[spec for spec, _ in fitted] for fitted in forms]
        return {
            "weights": 2 * self.outside * self.itemsize + inside,
            "optimizer": max(sum(map(self._fitted_bytes, block)) for block in specs),
            "integers": max((self._integer_bytes(spec) for block in specs for spec in block), default=0),
            "hidden states": 6 * tokens * self.layout.hidden_size * self.itemsize,
            "activations": tokens * saved,
        }

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
