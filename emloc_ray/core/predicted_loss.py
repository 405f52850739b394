"""What each form of a linear is expected to lose of ``tr(S Δ G Δᵀ)``, without making it.

**Integers.** With ``G = L Lᵀ``, :mod:`emloc_ray.core.quantization` rounds column ``k`` of a weight where ``‖Δ L‖²`` counts its
error ``L_kk²`` times, and rounding errors are as good as independent, so that

    tr(S Δ G Δᵀ) ≈ Σ_i S_ii Σ_k q_ik (L_kk² − δ)

with ``q = step² / 12`` of a group's range, or the error of the best uniform quantizer of a normal distribution of the group's
variance (Max 1960), whichever is smaller, as few bits clip what is rare.

**Factors.** The ranks that are left out are a sum of eigenvalues (:mod:`emloc_ray.core.spectra`). In integers ``down`` is
rounded as a weight; of ``up``, rounded under ``down G downᵀ``, which is diagonal, column ``j`` counts by the j-th eigenvalue.

**Integers and factors.** What integers leave is ``E diag(L_kk) L⁻¹`` with independent errors ``E``, so that the factors of it
save the leading singular values of a matrix ``S^½ E diag(L_kk)`` of drawn errors.
"""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emloc_ray.core.factorization import scaled_weight
from emloc_ray.core.forms import Form
from emloc_ray.core.integer_forms import GROUP_SIZE, factor_bits, group_size_of, num_groups
from emloc_ray.core.precision import exact_products
from emloc_ray.core.quantization import DAMPENING_FRAC
from emloc_ray.core.spectra import energy_vectors
from emloc_ray.core.two_sided import output_whitened
from emloc_ray.core.whitening import Whitening
from emloc_ray.errors import NumericsError

# Mean squared errors of the best uniform quantizers of a normal distribution of variance 1.
_NORMAL = {2: 0.1188, 3: 0.03744, 4: 0.01154, 8: 0.000087}
# What rounding gave beside that in the mean over five linears of SmolLM2-135M, in 8 bits over normal and heavy-tailed weights:
# descent lowers it, scales in steps of 9 % raise it.
_MEASURED = {2: 1.0, 3: 0.87, 4: 0.77, 8: 1.0}
_DRAWN_BITS = 3  # of the errors that are drawn, whose spectrum differs between widths by a factor alone


@exact_products
def form_losses(
    weight: Tensor,
    whitening: Whitening,
    outputs: Whitening,
    forms: Sequence[Form],
    group_size: int = GROUP_SIZE,
    *,
    plain: bool = False,
    name: str = "the layer",
) -> Tensor:
    """What each form of ``weight (out, in)`` is expected to lose of ``tr(S_d Δ G Δᵀ)``, with the damped ``G`` and ``S``:
    ``(len(forms),)``, float64, on the CPU, not negative.

    ``outputs`` is the whitening of ``S``, ``group_size`` that of integers; ``plain``: factors keep the layer's outputs, not
    predictions. On twelve linears of SmolLM2-135M it is, over what was measured, 0.4 to 1.6 for 2 to 4 bits and 0.17 to 1.4
    for 8; on five it was 0.6 to 1.6 with factors beside bits, 1.0 to 1.2 for factors in 8 and 4 bits, 1.1 to 1.6 in 3 bits;
    only factors of the first block's queries, whose ``S`` is most skewed, lost up to 4 times as much. Raises NumericsError
    where the weight or a loss holds a NaN or an Inf, ValueError where shapes do not fit.
    """
    whitening.check_reads(weight, name)
    scaled, scale = scaled_weight(weight.detach().to(torch.float32), name)
    layer = _Layer(scaled, whitening, outputs, group_size, plain)
    by_rank = layer.by_rank({form.bits for form in forms if form.rank is not None})
    whole = {form.bits: layer.whole(form.bits) for form in forms if form.rank is None and form.bits is not None}

    def loss(form: Form) -> float:
        if form.rank is not None:
            return float(by_rank[form.bits][form.rank - 1])
        if form.bits is None:
            return 0.0
        if not form.residual_rank:
            return whole[form.bits]
        kept = (1.0 - 2 * _NORMAL[factor_bits(form.bits)]) * float(layer.residual_shares[form.residual_rank - 1])
        return whole[form.bits] * (1.0 - kept)

    unit = scale * scale * whitening.scale * outputs.scale
    losses = torch.tensor([loss(form) * unit for form in forms], dtype=torch.float64, device="cpu").clamp_min(0.0)
    if not losses.isfinite().all():
        raise NumericsError(
            f"The predicted loss of {name} is NaN or Inf: give emulator.compression_ratio in place of emulator.budget."
        )
    return losses


@dataclass(frozen=True)
class _Layer:
    """A weight in the units of its whitenings; ``plain``: factors keep the layer's outputs."""

    weight: Tensor
    whitening: Whitening
    outputs: Whitening
    group_size: int
    plain: bool

    @functools.cached_property
    def columns(self) -> Tensor:
        """``L_kk² − δ (in,)`` of every input, in the order in which columns are rounded.

        ``δ`` is what rounding adds to the diagonal of ``G`` and no loss: of one massive channel and many small ones it is most
        of what the small ones would count.
        """
        order, root = self.whitening.root_by_energy(DAMPENING_FRAC)
        energies = torch.empty_like(self.inputs)
        energies[order] = (root.diagonal().square() - DAMPENING_FRAC).clamp_min(0.0)
        return energies

    @property
    def inputs(self) -> Tensor:
        return self.whitening.diagonal()

    @property
    def rows(self) -> Tensor:
        """``S_ii (out,)``."""
        return self.outputs.diagonal()

    @functools.cached_property
    def inside(self) -> Tensor:
        """The weight where the best factors are plain ones."""
        return self.weight if self.plain else output_whitened(self.weight, self.outputs)

    @functools.cached_property
    def spectrum(self) -> tuple[Tensor, Tensor, Tensor]:
        """The energy of each direction, the directions in columns, and by how much the outputs weigh each."""
        return self._directions(self.inside, self.whitening)

    @functools.cached_property
    def residual_shares(self) -> Tensor:
        """What factors of each rank save of all that integers lose, as a share."""
        noise = rounding_noise(self.weight, self.inputs, _DRAWN_BITS, self.group_size)
        device = noise.device if noise.is_cuda else torch.device("cpu")  # on a CPU 8 B numbers take half a minute
        generator = torch.Generator(device).manual_seed(0)
        drawn = torch.randn(noise.shape, generator=generator, device=device, dtype=torch.float32)
        errors = drawn.to(noise.device) * (noise * self.columns).sqrt()
        inside = errors if self.plain else output_whitened(errors, self.outputs)
        energies, _, weights = self._directions(inside, Whitening.identity(inside.shape[1], inside.device))
        saved = (energies * weights).cumsum(0)
        return saved / saved[-1].clamp_min(torch.finfo(torch.float64).tiny)

    def _directions(self, matrix: Tensor, whitening: Whitening) -> tuple[Tensor, Tensor, Tensor]:
        energies, parts = energy_vectors(matrix, whitening)
        # By their own norms: an eigenvalue that float32 rounds to zero would leave directions of any length.
        lengths = torch.linalg.vector_norm(parts, dim=0).clamp_min(torch.finfo(parts.dtype).tiny)
        directions = (parts / lengths).to(torch.float32)
        if not self.plain:
            return energies, directions, torch.ones_like(energies)
        return energies, directions, output_whitened(directions, self.outputs).to(torch.float64).square().sum(dim=0)

    def whole(self, bits: int) -> float:
        """What the weight loses in integers."""
        return float(self.rows.double() @ self._rounded_rows(self.weight, bits))

    def by_rank(self, widths: Collection[int | None]) -> dict[int | None, Tensor]:
        """By bits the loss of factors of every rank from 1 on, float64."""
        energies, directions, weights = self.spectrum
        saved = energies * weights
        left = saved.sum() - saved.cumsum(0)
        losses: dict[int | None, Tensor] = dict.fromkeys(widths, left)
        in_bits = [bits for bits in widths if bits is not None]
        if in_bits:  # else their factors are not made
            up, down = directions, directions.T @ self.inside
            if not self.plain and not self.outputs.is_identity:
                up = torch.linalg.solve_triangular(self.outputs.root(up.dtype).T, up, upper=True)
            for bits in in_bits:
                in_down = self._rounded_rows(down, bits) * weights
                in_up = (rounding_noise(up, energies, bits, self.group_size).T @ self.rows).double() * energies
                losses[bits] = left + (in_down + in_up).cumsum(0)
        return losses

    def _rounded_rows(self, matrix: Tensor, bits: int) -> Tensor:
        """``Σ_k q_ik L_kk²`` of every row, float64."""
        return (rounding_noise(matrix, self.inputs, bits, self.group_size) @ self.columns).double()


def rounding_noise(matrix: Tensor, energies: Tensor, bits: int, group_size: int) -> Tensor:
    """The expected squared error ``q`` of every element of a matrix ``(out, in)`` in integers, whose columns count by
    ``energies (in,)`` where scales are chosen."""
    out_features, in_features = matrix.shape
    groups = num_groups(in_features, group_size)
    size = group_size_of(in_features, groups)
    lacking = groups * size - in_features
    rows = torch.nn.functional.pad(matrix, (0, lacking)).view(out_features, groups, size)
    shares = torch.nn.functional.pad(energies.to(matrix.dtype), (0, lacking)).view(groups, size)
    shares = shares / shares.sum(dim=1, keepdim=True).clamp_min(torch.finfo(matrix.dtype).tiny)
    span = rows.amax(-1).clamp_min(0) - rows.amin(-1).clamp_max(0)
    mean = (rows * shares).sum(-1)
    variance = ((rows - mean[..., None]).square() * shares).sum(-1)
    noise = _MEASURED[bits] * torch.minimum(span.square() / (12 * (2**bits - 1) ** 2), _NORMAL[bits] * variance)
    # Where one column has nearly all energy, its weight alone is kept to 8 bits' share of the span: scales are codes too.
    noise = torch.maximum(noise, span.square() / (12 * 255**2))
    return noise.repeat_interleave(size, dim=1)[:, :in_features]
