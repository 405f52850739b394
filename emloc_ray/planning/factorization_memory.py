"""What a worker holds while it factorizes and rounds a group of linears, part by part."""

from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.planning.machine import gpus_of_slow_float64
from emloc_ray.planning.model_bytes import ModelBytes
from emloc_ray.planning.sizes import DOUBLE, FLOAT, Parts, gradient_bytes, packed_bytes, total


class FactorizationMemory(ModelBytes):
    """The part of :class:`~emloc_ray.planning.memory.MemoryModel` for making the emulator; every method gives bytes by part."""

    def factorization_parts(self) -> Parts:
        """The group that needs most, with one of its linears computed once more in float64, as rounding may ask: on the host
        where the GPU's float64 is slow, which computes in float32 before. A worker with a GPU takes one group after another, so
        its node also holds the tensors of the one that is computed and of the next."""
        section, groups = self.config.emulator, self._groups()
        left = {*self.layout.quantized_linears}.difference(spec.name for group in groups for spec in group)
        alone = [group for group in self.layout.groups if any(spec.name in left for spec in group)]

        def most(wide: int, on_gpu: bool) -> Parts:
            with_grams = [self._group_parts(group, wide, on_gpu) for group in groups]
            return max([*with_grams, *map(self._quantized_group_parts, alone)], key=total, default={})

        parts = most(DOUBLE, section.gpus > 0)
        if section.gpus and not self.config.ray.joins and gpus_of_slow_float64():
            parts = {**most(FLOAT, True), "in float64": total(most(DOUBLE, False))}
        if not section.gpus or len(groups) + len(alone) <= section.num_workers:
            return parts
        read = [*map(self._group_bytes_as_read, groups), *map(self._weight_bytes_as_read, alone)]
        return {**parts, "read ahead": sum(sorted(read)[-2:])}

    def _group_bytes_as_read(self, group: tuple[LinearSpec, ...]) -> int:
        """A group's weights, its Gram and its linears' sums of gradients, these packed."""
        return self._weight_bytes_as_read(group) + self._sum_bytes_as_read(group)

    def _sum_bytes_as_read(self, group: tuple[LinearSpec, ...]) -> int:
        summed = {*group}.intersection(self._gradient_specs())
        return packed_bytes(group[0].in_features) + sum(packed_bytes(spec.out_features) for spec in summed)

    def sums_read(self, gradients: bool = True) -> int:
        """Bytes of Grams, and of sums of ``gradients``, packed, that an allocation or a factorization reads."""
        if gradients:
            return sum(map(self._sum_bytes_as_read, self._groups()))
        return sum(packed_bytes(group[0].in_features) for group in self._groups())

    def _weight_bytes_as_read(self, group: tuple[LinearSpec, ...]) -> int:
        return sum(spec.num_parameters for spec in group) * self.file_itemsize

    def _quantized_group_parts(self, group: tuple[LinearSpec, ...]) -> Parts:
        """Linears that are put into few bits without a Gram: ``W`` as stored, in float32, and in as much again while it is
        rounded; and what the whole group becomes."""
        stored = 0 if self.file_itemsize == FLOAT else self.file_itemsize
        weight = max(spec.num_parameters for spec in group) * (stored + FLOAT + DOUBLE)
        return {"weights": weight, "factors": sum(self.layout.kept(spec) for spec in group) * self.file_itemsize}

    def _group_parts(self, group: tuple[LinearSpec, ...], wide: int, on_gpu: bool) -> Parts:
        """A Gram: as summed, damped in float32, damped in float64 (made over a copy), and on a GPU, or where an output is wider
        than the input, a Cholesky factor of each; where factors and integers are made in one group, one more in float32, of
        the inputs by energy, in which integers are rounded. A layer: ``W`` as stored, in float32 and in float64, its product
        with the Gram, ``M`` with eigenvectors and LAPACK's workspace of twice their size, and the factors of the whole group.
        With a ``wide`` number of four bytes, what float32 alone takes of these."""
        square, again = group[0].in_features ** 2, wide if wide > FLOAT else 0
        has_root = on_gpu or any(spec.out_features > spec.in_features for spec in group)
        damped = square * (2 * FLOAT + again)
        layer = max(self._linear_bytes(spec, wide) for spec in group)
        weights = self._quantized_group_parts(group)
        with_gradients = set(self.layout.gradient_linears)
        # A sum of gradients: as summed, damped, its root; and the weight that it weighs.
        sums = max(
            (3 * gradient_bytes(spec) + FLOAT * spec.num_parameters for spec in group if spec.name in with_gradients),
            default=0,
        )
        damped += sums + (square * FLOAT if self._rounds_beside_factors(group) else 0)
        grams = damped + square * (FLOAT + again if has_root else 0)
        if grams + layer >= damped + square * again:
            return {"grams": grams, **weights, "products": layer}
        return {"grams": damped + square * again, **weights}

    def _linear_bytes(self, spec: LinearSpec, wide: int) -> float:
        order = min(spec.out_features, spec.in_features)
        return spec.num_parameters * wide + 4 * order**2 * wide + self.layout.kept(spec) * (FLOAT + wide)

    def _rounds_beside_factors(self, group: tuple[LinearSpec, ...]) -> bool:
        """Whether linears of a group are put into integers and factors are made too; with a budget any may be."""
        layout, names = self.layout, {spec.name for spec in group}
        if layout.budget is not None:
            return bool(names.intersection(layout.compressed))
        factors = names.intersection((*layout.ranks, *layout.residual_ranks))
        return bool(factors) and bool(names.intersection(layout.bits))
