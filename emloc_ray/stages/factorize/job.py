"""What every task of the factorization needs to know."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from emloc_ray.core.integer_forms import IntegerForms
from emloc_ray.core.ranks import Storage
from emloc_ray.modeling.architecture import LinearSpec


@dataclass(frozen=True)
class FactorizationJob:
    """Artifact paths and flat settings of the stage.

    ``groups`` are the linears that share an input; those without a rank in ``ranks`` stay dense. ``renamed`` are the tensors
    whose names in the checkpoint are not the model's own, which the emulator's are; ``unused`` those that the model has no use
    for, ``tied`` those of parameters that it ties to others, with the tensors of these. ``in_4bit`` are the linears stored in 4
    bits, as factors or dense, ``without_gram`` those of them that have no Gram; ``kept_wide`` are linears elsewhere in the
    model that stay wide. ``gradients_dir`` holds the sums of gradients that weigh outputs, where factors are to keep the
    model's predictions instead of each layer's outputs. ``by_weights``: factors are the weights' own truncated SVD, whose
    errors alone are measured under the Grams. ``storage`` is how they are stored, ``integers`` which linears in integers;
    ``gradients_for_residuals``: the factors beside these take gradients into account too.
    """

    model_dir: Path
    out_dir: Path
    groups: tuple[tuple[LinearSpec, ...], ...]
    ranks: dict[str, int]
    dampening_frac: float = 1e-6
    seed: int = 0
    renamed: dict[str, str] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    tied: dict[str, str] = field(default_factory=dict)
    in_4bit: tuple[str, ...] = ()
    without_gram: tuple[str, ...] = ()
    kept_wide: tuple[str, ...] = ()
    gradients_dir: Path | None = None
    gradient_dampening_frac: float = 1e-2
    by_weights: bool = False
    storage: Storage = "factors"
    integers: IntegerForms = field(default_factory=IntegerForms)
    gradients_for_residuals: bool = False

    def uses_gradients(self, name: str) -> bool:
        """Whether a linear has factors that are made with its sum of gradients, where there is one."""
        return name in self.ranks or (self.gradients_for_residuals and name in self.integers.residual_ranks)

    @property
    def quantized_linears(self) -> frozenset[str]:
        """The linears that are stored in few bits."""
        return frozenset((*self.in_4bit, *self.integers.bits))


def group_cost(group: Sequence[LinearSpec]) -> float:
    """The floating-point operations of a group's factors, roughly and up to a constant factor."""
    return sum(min(s.out_features, s.in_features) ** 3 + s.num_parameters * s.in_features for s in group)
