"""The model's linears under a config: which are compressed, to what rank, and which are adapted."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from emloc_ray.core.forms import Form, FormSizes
from emloc_ray.core.integer_forms import GROUP_SIZE, IntegerForms
from emloc_ray.core.ranks import Storage, rank_for_ratio, rank_multiple
from emloc_ray.errors import ConfigError
from emloc_ray.modeling.adapter_methods import default_targets, feedforward_names, narrow_helpers
from emloc_ray.modeling.architecture import ImageShape, LinearSpec
from emloc_ray.modeling.block_activations import BlockActivations
from emloc_ray.modeling.expert_adapters import order_free_tables, taken_for_experts
from emloc_ray.modeling.experts import owner_of
from emloc_ray.modeling.inputs import has_encoder
from emloc_ray.modeling.matching import ALL_LINEAR, Patterns, check_table, lookup, matches, portable_targets, select
from emloc_ray.modeling.nf4 import nf4_bytes

if TYPE_CHECKING:
    from emloc_ray.config.adapter import AdapterConfig
    from emloc_ray.config.schema import RunConfig
    from emloc_ray.planning.skeleton import Skeleton

Result = TypeVar("Result")
_FLOAT16 = 2  # bytes: a linear that takes as many a weight, or more, is not in few bits


@dataclass(frozen=True)
class Layout:
    """The model's linears under a config."""

    specs: tuple[LinearSpec, ...]
    groups: tuple[tuple[LinearSpec, ...], ...]
    ranks: dict[str, int]
    compressed: tuple[str, ...]
    adapted: tuple[str, ...]
    portable_targets: str | tuple[str, ...]
    num_parameters: int
    head_parameters: int
    hidden_size: int
    adapter_parameters: int | None = None  # counted for methods other than LoRA, whose number follows from ranks
    feedforward: tuple[str, ...] = ()  # adapted linears whose input IA³ scales
    quantization: str = "none"
    bits: dict[str, int] = field(default_factory=dict)  # of the linears stored in integers, as factors or dense
    residual_ranks: dict[str, int] = field(default_factory=dict)  # of the factors beside integers that are no factors
    group_size: int = GROUP_SIZE
    replaceable: tuple[str, ...] = ()
    left_dense: dict[str, str] = field(default_factory=dict)  # named by patterns, but no linear of a block; its kind
    left_in_blocks: dict[str, int] = field(default_factory=dict)  # parameters of what is no linear, by its kind
    left_by_block: dict[str, int] = field(default_factory=dict)  # the same, by blocks
    image: ImageShape = field(default_factory=ImageShape)
    whole_logits: bool = False  # this and the next: see Skeleton
    eager: bool = False
    activations: dict[str, BlockActivations] = field(default_factory=dict)  # by blocks
    allocation: str = "uniform"
    objective: str = "activations"
    free: tuple[str, ...] = ()  # compressed linears without a ratio of their own
    storage: Storage = "factors"
    budget: int | None = None  # bytes of all compressed linears, whose forms follow from the data then

    @property
    def allocated(self) -> tuple[str, ...]:
        """The linears whose ranks, or with a budget whose forms, follow from the data; until then the plan goes by the
        layout's."""
        if self.budget is not None:
            return self.compressed
        return tuple(name for name in self.free if name in self.ranks) if self.allocation != "uniform" else ()

    @property
    def gradient_linears(self) -> tuple[str, ...]:
        """The linears whose outputs need gradients."""
        if self.objective == "predictions" and self.budget is None:
            return tuple(self.ranks)
        return self.allocated

    def may_be_dense(self, name: str) -> bool:
        """Whether an allocation may leave a linear as it is: in NF4 not all linears can be stored dense."""
        return self.quantization != "nf4" or name in self.replaceable

    def as_made(self, made: Mapping[str, Any]) -> Layout:
        """The layout with the ranks or forms of a factorized emulator, from its stage's result; ranks are those after healing."""
        if not self.allocated:
            return self
        if self.budget is not None:
            return self.with_forms({name: Form(**form) for name, form in made["forms"].items()})
        factorized = {n: layer["rank"] for n, layer in made["layers"].items() if layer["solver"] != "dense"}
        return replace(self, ranks=made.get("ranks") or factorized)

    def with_forms(self, forms: Mapping[str, Form]) -> Layout:
        """The layout with the form of every linear that is named; others are as they were."""
        others = {name: self.form(spec) for name, spec in self.by_name.items() if name not in forms}
        every = {**others, **forms}
        return replace(
            self,
            ranks={name: form.rank for name, form in every.items() if form.rank is not None},
            bits={name: form.bits for name, form in every.items() if form.bits is not None},
            residual_ranks={name: form.residual_rank for name, form in every.items() if form.residual_rank},
        )

    def form(self, spec: LinearSpec) -> Form:
        """How a linear is stored, but for NF4."""
        rank, bits = self.ranks.get(spec.name), self.bits.get(spec.name)
        return Form(rank, bits, self.residual_ranks.get(spec.name, 0) if rank is None and bits is not None else 0)

    @functools.cached_property
    def by_name(self) -> dict[str, LinearSpec]:
        """The linears by their names."""
        return {spec.name: spec for spec in self.specs}

    @property
    def quantized(self) -> bool:
        """Whether the emulator stores linears in few bits."""
        return self.quantization != "none" or bool(self.bits)

    @property
    def forms(self) -> IntegerForms:
        """What is stored in integers."""
        forms = {spec.name: self.form(spec) for spec in self.specs}
        beside = {name: form.residual_rank for name, form in forms.items() if form.residual_rank}
        return IntegerForms(self.bits, beside, self.group_size)

    @property
    def quantized_linears(self) -> tuple[str, ...]:
        """The linears that are stored in few bits, in the model's order."""
        return tuple(spec.name for spec in self.specs if spec.name in self.bits) or self.in_4bit

    @property
    def differs(self) -> bool:
        """Whether the emulator differs from the original: compressed, in few bits or both."""
        return bool(self.ranks) or self.quantized or self.budget is not None

    @property
    def in_4bit(self) -> tuple[str, ...]:
        """The linears that the emulator stores in NF4, as factors or dense: all inside the blocks, as in QLoRA."""
        packable = {*self.ranks, *self.replaceable} if self.quantization == "nf4" else set()
        return tuple(spec.name for spec in self.specs if spec.name in packable)

    @property
    def kept_wide(self) -> tuple[str, ...]:
        """The linears that stay wide in a 4-bit emulator: heads, routers, all outside the blocks."""
        inside = {spec.name for spec in self.specs}
        return tuple(name for name in self.replaceable if name not in inside)

    @property
    def parameters_targeted(self) -> int:
        """Parameters of the targeted linears."""
        targeted = set(self.compressed)
        return sum(spec.num_parameters for spec in self.specs if spec.name in targeted)

    @property
    def parameters_factorized(self) -> int:
        """Parameters of the targeted linears in the emulator."""
        targeted = set(self.compressed)
        return sum(self.kept(spec) for spec in self.specs if spec.name in targeted)

    def kept(self, spec: LinearSpec) -> int:
        """Parameters of one linear in the emulator."""
        return sum(rows * columns for rows, columns in self.stored_shapes(spec))

    def stored_shapes(self, spec: LinearSpec) -> tuple[tuple[int, int], ...]:
        """The matrices that the emulator has of one linear: its weight, its two factors, or its integers and two factors."""
        form, shape = self.form(spec), (spec.out_features, spec.in_features)
        if form.rank is None:
            beside = form.residual_rank
            return (shape, (shape[0], beside), (beside, shape[1])) if beside else (shape,)
        rows = spec.out_features - (form.rank if self.is_pivoted(spec) else 0)
        return ((rows, form.rank), (form.rank, spec.in_features))

    def is_pivoted(self, spec: LinearSpec) -> bool:
        """Whether a linear is stored as pivoted factors, as those in integers are not."""
        return self.storage == "pivoted" and spec.name in self.ranks and spec.name not in self.bits

    def quantized_bytes(self, spec: LinearSpec) -> int:
        """Bytes of a linear in few bits."""
        if spec.name not in self.bits:
            return sum(nf4_bytes(*shape) for shape in self.stored_shapes(spec))
        return self.form_sizes(4).num_bytes(spec.out_features, spec.in_features, self.form(spec))

    def form_sizes(self, itemsize: int) -> FormSizes:
        """How forms are stored, with floats of so many bytes."""
        return FormSizes(itemsize, self.storage, self.group_size)

    def stored_bytes(self, itemsize: int) -> int:
        """Bytes of all compressed linears in the emulator, floats of ``itemsize`` bytes each."""
        quantized, specs = set(self.quantized_linears), self.by_name
        return sum(
            self.quantized_bytes(specs[name])
            if name in quantized
            else self.form_sizes(itemsize).num_bytes(
                specs[name].out_features, specs[name].in_features, self.form(specs[name])
            )
            for name in self.compressed
        )

    @property
    def order_bytes(self) -> int:
        """Bytes of the places of pivoted rows, in 32 bits each."""
        return 4 * sum(spec.out_features for spec in self.specs if self.is_pivoted(spec))


def make_layout(config: RunConfig, skeleton: Skeleton) -> Layout:
    """Matches the config's patterns against a model. Raises ConfigError, naming every pattern that matches nothing, one
    sentence a line."""
    specs = skeleton.specs
    left_dense: dict[str, str] = {}
    compressed, adapted = _matched(config, skeleton, left_dense)
    _check_no_experts(config.adapter.method, adapted, skeleton)
    model_type, forward = _model_type(skeleton.config), config.adapter.settings.get("feedforward_modules")
    return Layout(
        specs,
        skeleton.groups,
        compressed=tuple(compressed),
        adapted=tuple(adapted),
        portable_targets=_portable(config, adapted, skeleton),
        num_parameters=skeleton.num_parameters,
        head_parameters=skeleton.head_parameters,
        hidden_size=skeleton.hidden_size,
        group_size=config.emulator.group_size,
        replaceable=skeleton.replaceable,
        feedforward=tuple(feedforward_names(forward, model_type, adapted)) if config.adapter.method == "ia3" else (),
        left_dense=left_dense,
        left_in_blocks=skeleton.left_in_blocks,
        left_by_block=skeleton.left_by_block,
        image=skeleton.image,
        whole_logits=skeleton.whole_logits,
        eager=skeleton.eager,
        activations=skeleton.activations,
        free=tuple(name for name in compressed if lookup(name, config.emulator.ratios, None) is None),
        **_emulated(config, specs, compressed),
    )


def adapter_settings(adapter: AdapterConfig, layout: Layout, model_config: Any) -> dict[str, Any]:
    """The arguments of :func:`emloc_ray.modeling.adapter_methods.adapter_config`: the method's own, and the model's."""
    transposed = any(s.transposed and s.routed_share is None for s in layout.specs if s.name in layout.adapted)
    forward = {"feedforward_modules": list(layout.feedforward)} if adapter.method == "ia3" else {}
    names = {"target_modules": list(layout.adapted), "fan_in_fan_out": transposed, **forward}
    tables = order_free_tables(adapter.settings, layout.adapted)
    task_type = "SEQ_2_SEQ_LM" if has_encoder(model_config) else "CAUSAL_LM"
    return {"method": adapter.method, **adapter.settings, **tables, **names, "task_type": task_type}


def _model_type(model_config: Any) -> str:
    return str(getattr(model_config.get_text_config(), "model_type", None) or model_config.model_type)


def _matched(config: RunConfig, skeleton: Skeleton, left_dense: dict[str, str]) -> tuple[list[str], list[str]]:
    """The compressed and the adapted linears; adds other modules that patterns name to ``left_dense``."""
    specs = skeleton.specs
    names = [spec.name for spec in specs]
    emulator, adapter = config.emulator, config.adapter
    errors: list[str] = []

    def attempt(check: Callable[[], Result]) -> Result | None:
        try:
            return check()
        except ConfigError as error:
            errors.append(str(error))
            return None

    others = skeleton.left_as_is

    def chosen(targets: Patterns | None, exclude: Patterns | None, key: str) -> list[str]:
        linears = select(names, targets, exclude, key, list(others))
        beside = _named(others, targets, exclude)
        if not linears:
            kinds = ", ".join(f"{name} ({kind})" for name, kind in beside.items())
            raise ConfigError(
                f"{key} names no linear of the blocks, only {kinds}: name such, only these can be factored."
            )
        left_dense.update(beside)
        return linears

    def adapted_linears() -> list[str]:
        targets = adapter.target_modules
        if targets is None:
            targets = default_targets(adapter.method, _model_type(skeleton.config), names)
        return [] if adapter.is_prompt else chosen(targets, adapter.exclude_modules, "adapter.target_modules")

    compressed = attempt(lambda: chosen(emulator.target_modules, emulator.exclude_modules, "emulator.target_modules"))
    adapted = attempt(adapted_linears)
    for key, table in (
        ("emulator.ratios", emulator.ratios),
        ("adapter.rank_pattern", adapter.rank_pattern),
        ("adapter.alpha_pattern", adapter.alpha_pattern),
    ):
        attempt(lambda table=table, key=key: check_table(names, table, key, list(others)))  # type: ignore[misc]
        left_dense.update({name: kind for name, kind in others.items() if not errors and lookup(name, table, None)})
    if not errors and (adapter.is_lora or adapter.method == "loha"):
        if adapter.target_modules in (None, ALL_LINEAR):
            helpers = narrow_helpers(specs, skeleton.hidden_size, adapter.r, adapter.rank_pattern)
            adapted = [name for name in adapted or () if name not in helpers]
        attempt(lambda: _check_adapter_ranks(adapter, [spec for spec in specs if spec.name in set(adapted or ())]))
    if errors or compressed is None or adapted is None:
        raise ConfigError("\n".join(errors))
    return compressed, adapted


def _named(others: Mapping[str, str], targets: Patterns | None, exclude: Patterns | None) -> dict[str, str]:
    """The modules among ``others`` that a section's patterns name."""
    if targets is None or targets == ALL_LINEAR:
        return {}
    excluded = {name for name in others if exclude is not None and matches(name, exclude)}
    return {name: kind for name, kind in others.items() if name not in excluded and matches(name, targets)}


def _check_adapter_ranks(adapter: AdapterConfig, specs: Sequence[LinearSpec]) -> None:
    for spec in sorted(specs, key=lambda spec: min(spec.out_features, spec.in_features)):
        r = lookup(spec.name, adapter.rank_pattern, adapter.r)
        key = "adapter.r" if r == adapter.r else "adapter.rank_pattern"
        smaller = min(spec.out_features, spec.in_features)
        if r > smaller:
            raise ConfigError(f"{key} is {r}, above the smaller side {smaller} of {spec.name}: lower it.")
    _check_experts_alike(adapter, specs)


def _check_experts_alike(adapter: AdapterConfig, specs: Sequence[LinearSpec]) -> None:
    """PEFT stores one rank for all experts of a layer."""
    for key, table in (("rank_pattern", adapter.rank_pattern), ("alpha_pattern", adapter.alpha_pattern)):
        values: dict[str, float] = {}
        for spec in specs if table else ():
            owner = owner_of(spec.name) if spec.routed_share is not None else None
            value = lookup(spec.name, table, -1)
            if owner is not None and values.setdefault(f"{owner[0]}.{owner[2]}", value) != value:
                raise ConfigError(f"adapter.{key} treats experts of {owner[0]} differently: name all of them alike.")


def _check_no_experts(method: str, adapted: Sequence[str], skeleton: Skeleton) -> None:
    """PEFT has fused parameters for experts' linears, which only LoRA adapts; only IA³ is never stored as LoRA."""
    if method in ("lora", "rslora"):
        return
    named = set(adapted)
    experts = [spec.name for spec in skeleton.specs if spec.routed_share is not None and spec.name in named]
    experts += [] if method == "ia3" else taken_for_experts(skeleton.config.model_type, adapted)
    if experts:
        raise ConfigError(
            f"adapter.target_modules: {method} adapts no experts, and PEFT takes {len(experts)} of these linears for experts'"
            f" ({experts[0]}): leave them out, or set adapter.method to lora."
        )


def layout_under(layout: Layout, config: RunConfig) -> Layout:
    """The same linears with the ratio, the bits, the objective and the storage of another config."""
    if config.emulator.budget is not None:  # what it gives was found with the layout
        return layout
    return replace(layout, budget=None, **_emulated(config, layout.specs, layout.compressed))


def _emulated(config: RunConfig, specs: Sequence[LinearSpec], compressed: Sequence[str]) -> dict[str, Any]:
    """What a layout has of its config's ratio, bits, objective and storage."""
    emulator, chosen = config.emulator, set(compressed)
    of_bits = FormSizes(_FLOAT16, group_size=emulator.group_size)
    # Beside integers, of linears that have a Gram.
    beside = {
        s.name: of_bits.residual_rank(s.out_features, s.in_features, emulator.bits, emulator.residual_rank)
        for s in specs
        if emulator.bits is not None and s.name in chosen
    }
    return {
        "ranks": ranks_at(config, specs, compressed),
        "quantization": emulator.quantization,
        "bits": {} if emulator.bits is None else {spec.name: emulator.bits for spec in specs},
        "residual_ranks": {name: rank for name, rank in beside.items() if rank},
        "allocation": emulator.allocation,
        "objective": emulator.objective,
        "storage": emulator.storage,
    }


def ranks_at(config: RunConfig, specs: Sequence[LinearSpec], compressed: Sequence[str]) -> dict[str, int]:
    """The rank of every linear that the config compresses; those that stay dense are left out."""
    emulator = config.emulator
    # Ratio 1 is plain LoRA, whatever the patterns say; a budget decides forms, not ranks.
    if emulator.compression_ratio == 1 or emulator.budget is not None:
        return {}
    by_name = {spec.name: spec for spec in specs}
    ratios = {name: lookup(name, emulator.ratios, emulator.compression_ratio) for name in compressed}

    def rank_of(spec: LinearSpec, ratio: float) -> int | None:
        shape = spec.out_features, spec.in_features
        return rank_for_ratio(*shape, ratio, emulator.storage, rank_multiple(*shape, emulator.rank_multiple))

    ranks = {name: rank_of(by_name[name], ratio) for name, ratio in ratios.items()}
    return {name: rank for name, rank in ranks.items() if rank is not None}


def _portable(config: RunConfig, adapted: list[str], skeleton: Skeleton) -> str | tuple[str, ...]:
    """Patterns that match the adapted linears and no other module of the original, as PEFT looks among all of them."""
    asked = config.adapter.target_modules
    # The original has no such linears.
    experts = {spec.name for spec in skeleton.specs if spec.routed_share is not None}
    plain = [name for name in adapted if name not in experts]
    modules = [name for name in skeleton.modules if name not in experts]
    if asked is None or asked == ALL_LINEAR or experts or {n for n in modules if matches(n, asked)} != set(plain):
        return tuple(portable_targets(plain, modules))
    return asked if isinstance(asked, str) else tuple(asked)
