"""The forms that a linear's weight may be stored in, one a linear, and the bytes that each takes."""

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

from emloc_ray.core.integer_forms import BITS, GROUP_SIZE, factor_bits, integer_bytes
from emloc_ray.core.ranks import Storage, factor_parameters

# Ranks of one kind of form lie this far apart: a choice between lies within 1 % of the better one of its neighbours.
_RANK_STEP = 1.15
_RESIDUAL_RANKS = (4, 8, 16, 32, 64, 128)
_FACTOR_BITS = (None, 8, 4, 3)
_ORDER_BYTES = 4


@dataclass(frozen=True)
class Form:
    """A weight as it is; in ``bits`` bits, alone or with factors of a ``residual_rank`` beside them; or factors of a ``rank``, in
    floats or in ``bits`` bits."""

    rank: int | None = None
    bits: int | None = None
    residual_rank: int = 0

    @property
    def kind(self) -> str:
        """The form in words, but for its ranks."""
        if self.bits is None:
            return "dense" if self.rank is None else "factors"
        if self.rank is not None:
            return f"factors in {self.bits} bits"
        return f"{self.bits} bits{' and factors' if self.residual_rank else ''}"


@dataclass(frozen=True)
class FormSizes:
    """What decides a form's bytes: floats of ``itemsize`` bytes, factors plain or pivoted (``storage``), integers in groups of
    ``group_size`` columns that share a scale."""

    itemsize: int
    storage: Storage = "factors"
    group_size: int = GROUP_SIZE

    def num_bytes(self, out_features: int, in_features: int, form: Form) -> int:
        """Bytes of a weight ``(out, in)`` in a form, scales and the places of pivoted rows included."""
        if form.bits is None:
            parameters = factor_parameters(out_features, in_features, form.rank, self.storage)
            pivoted = form.rank is not None and self.storage == "pivoted"
            return parameters * self.itemsize + (_ORDER_BYTES * out_features if pivoted else 0)
        if form.rank is not None:
            return self._factors(out_features, in_features, form.rank, form.bits)
        whole = integer_bytes(out_features, in_features, form.bits, self.group_size)
        rank = form.residual_rank
        return whole + (self._factors(out_features, in_features, rank, factor_bits(form.bits)) if rank else 0)

    def _factors(self, out_features: int, in_features: int, rank: int, bits: int) -> int:
        shapes = (out_features, rank), (rank, in_features)
        return sum(integer_bytes(*shape, bits, self.group_size) for shape in shapes)

    def residual_rank(self, out_features: int, in_features: int, bits: int, asked: int) -> int:
        """The highest rank up to ``asked`` of factors beside ``bits`` bits with which a weight ``(out, in)`` is smaller than it
        is in floats; 0 where none is low enough."""
        dense = out_features * in_features * self.itemsize

        def num_bytes(rank: int) -> int:
            return self.num_bytes(out_features, in_features, Form(bits=bits, residual_rank=rank))

        return bisect.bisect_left(range(1, min(asked, out_features, in_features) + 1), dense, key=num_bytes)

    def forms(self, out_features: int, in_features: int, multiple: int = 1) -> list[Form]:
        """What a weight ``(out, in)`` may be stored as; ranks of factors alone are multiples of ``multiple``."""
        smaller = min(out_features, in_features)
        dense = out_features * in_features * self.itemsize
        ranks = list(_spaced(multiple, smaller))
        choices = [Form(), *(Form(bits=bits) for bits in BITS)]
        choices += [Form(rank=rank, bits=bits) for bits in _FACTOR_BITS for rank in ranks]
        beside = [rank for rank in _RESIDUAL_RANKS if 4 * rank <= smaller]
        choices += [Form(bits=bits, residual_rank=rank) for bits in BITS for rank in beside]
        return [f for f in choices if f == Form() or self.num_bytes(out_features, in_features, f) < dense]


def _spaced(multiple: int, limit: int) -> Iterator[int]:
    """Multiples from the first below ``limit`` on, or 1, each some 15 % above the one before it."""
    rank = multiple if multiple < limit else 1
    while rank < limit:
        yield rank
        rank = max(rank + multiple, int(rank * _RANK_STEP / multiple) * multiple)
