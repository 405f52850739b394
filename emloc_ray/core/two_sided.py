"""The emulator's layer in the metric of the model's predictions: ``tr(S Δ G Δᵀ)`` instead of ``tr(Δ G Δᵀ)``.

With ``g`` the gradient of the loss with respect to a linear's output at a token, ``S = Σ g gᵀ (out, out)``. Where the labels
are drawn from the model's own predictions, ``S`` is the output factor of the Fisher matrix in K-FAC (Martens and Grosse
2015, https://arxiv.org/abs/1503.05671), the true Fisher and not the empirical one: over N tokens, changing the weight by
``Δ`` moves the predictions by a KL divergence, summed over the sample, of about

    ½ tr(S Δ G Δᵀ) / N

``G = Σ x xᵀ`` alone (EMLoC, ASVD, SVD-LLM) minimises the change of a layer's output; ``S`` weighs each direction of the output
by its effect on the predictions. With ``S_d = S + ε mean(diag S) I = L Lᵀ`` the best ``W_E`` of rank r is the plain
one of ``Lᵀ W`` under ``G``, taken back: with ``U`` its top r left singular vectors there,

    W_E = L⁻ᵀ U Uᵀ Lᵀ W          up = L⁻ᵀ U (out, r)      down = Uᵀ Lᵀ W (r, in)

which does not depend on which root ``L`` is. With ``S ∝ I`` it is the plain one.

Published kin: IO-SVD (https://arxiv.org/abs/2605.15626) and GFWSVD (https://arxiv.org/abs/2505.17974) weigh inputs and
outputs as well.
"""

import dataclasses

import torch
from torch import Tensor

from emloc_ray.core.factorization import Factorization, LowRankFactors, factorize
from emloc_ray.core.precision import exact_products
from emloc_ray.core.whitening import Whitening


def output_whitened(weight: Tensor, outputs: Whitening) -> Tensor:
    """``Lᵀ W (out, in)``, ``L Lᵀ = S_d / s`` with ``s = outputs.scale``: in float32, or float64 for a float64 weight.

    ``outputs`` is the whitening of ``S``, as :class:`Whitening` damps it. Raises ValueError where ``S`` is not of the weight's
    outputs.
    """
    if weight.shape[0] != outputs.in_features:
        raise ValueError(
            f"The weight gives {weight.shape[0]} features, but its gradients are of {outputs.in_features}."
        )
    stored = torch.float64 if weight.dtype == torch.float64 else torch.float32
    wide = weight.detach().to(stored)
    return wide if outputs.is_identity else outputs.root(stored).T @ wide


@exact_products
def factorize_two_sided(
    weight: Tensor, whitening: Whitening, outputs: Whitening, rank: int, *, seed: int = 0, name: str = "the layer"
) -> Factorization:
    """The best ``W_E = up @ down`` of ``rank`` for ``weight (out, in)`` under ``tr(S_d Δ G Δᵀ)``, ``outputs`` being the
    whitening of ``S``.

    As :func:`emloc_ray.core.factorization.factorize` of ``Lᵀ W``, its numerics and errors included; the eigenvalues, the energy
    and the relative error are those of ``S_d^½ W G Wᵀ S_d^½``. ``up`` is not orthonormal; its columns are in descending order
    of what they give, so that the first ones are the best of a smaller rank. A sum ``S`` of zeros leaves the plain factors.
    """
    whitening.check_reads(weight, name)
    inside = factorize(output_whitened(weight, outputs), whitening, rank, seed=seed, name=name)
    up, down = inside.factors
    if not outputs.is_identity:
        up = torch.linalg.solve_triangular(outputs.root(up.dtype).T, up, upper=True)
    return dataclasses.replace(
        inside,
        factors=LowRankFactors(up.contiguous(), down),
        eigenvalues=inside.eigenvalues * outputs.scale,
        total_energy=inside.total_energy * outputs.scale,
    )
