"""What a model's parts take, from shapes alone: its weights in each form, and what a token takes of a pass."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from emloc_ray.core.forms import Form
from emloc_ray.core.integer_forms import BITS
from emloc_ray.modeling.adapter_methods import update_rank
from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.modeling.attention import is_flash
from emloc_ray.modeling.block_activations import BlockActivations, PassNumbers
from emloc_ray.modeling.loss import chunk_tokens
from emloc_ray.planning.lengths import PACKED_SHARE, Lengths
from emloc_ray.planning.machine import WITH_MODELS, gpus_compute_bfloat16, gpus_group_products
from emloc_ray.planning.model_files import named_dtype
from emloc_ray.planning.sizes import FLOAT, HALF, Block, blocks_of, widest_step

if TYPE_CHECKING:
    from emloc_ray.planning.prepared import Prepared, Training

# Of a chunk's logits in float32 while their gradient is made: themselves, the softmax and its gradient; of a divergence also
# those that are not the teacher's top, and theirs.
LOSS_COPIES, DIVERGENCE_COPIES = 3, 5
_WHOLE_FORMS = (Form(), *(Form(bits=bits) for bits in BITS))


class ModelBytes:
    """The parts of a run's model, emulator and adapter, in bytes; what stages hold of them is in ``memory.py``."""

    def __init__(self, prepared: Prepared, lengths: Lengths | None = None, training: Training | None = None) -> None:
        """``lengths``: those of the run's own rows by default; ``training``: the fine-tuning by default."""
        self.prepared, self.lengths = prepared, lengths or prepared.lengths
        self.trained = training or prepared.finetuning
        self.config, self.layout = prepared.config, self.trained.layout
        self._adapter_settings = self.trained.adapter.settings  # of pydantic, too slow for every linear
        self.model_config = prepared.model_config
        self.calibration_tokens = prepared.calibration_tokens(self.lengths.mean)
        self.dtype = model_dtype(prepared)
        self.itemsize, self.file_itemsize = self.dtype.itemsize, file_dtype(prepared).itemsize
        self.weights, self.emulator = self._weights(self.itemsize), self._emulator(self.itemsize)
        # What their files take.
        self.weight_files, self.emulator_files = self._weights(self.file_itemsize), self._emulator(self.file_itemsize)
        adapted = set(self.layout.adapted)
        self.adapted = tuple(spec for spec in self.layout.specs if spec.name in adapted)
        self.adapter_parameters = self._adapter_parameters()
        per_image = self.layout.image.block_tokens
        multiples = {name: count * self.lengths.images / self.lengths.longest for name, count in per_image.items()}
        self.blocks = blocks_of(self.layout.groups, multiples)

    @property
    def trained_lengths(self) -> Lengths:
        """How long the sequences of the fine-tuning are: rows, or packs of them, which leave little space."""
        if not self.trained.section.packing:
            return self.lengths
        length = float(self.config.data.max_seq_length)
        return replace(self.lengths, mean=PACKED_SHARE * length, longest=length)

    def _left_as_they_are(self) -> list[LinearSpec]:
        """The adapted linears that the emulator has neither in factors nor in few bits."""
        in_few_bits = set(self.layout.quantized_linears)
        return [s for s in self.adapted if s.name not in in_few_bits and len(self.layout.stored_shapes(s)) == 1]

    def _row_norms(self, dense: Collection[LinearSpec]) -> int:
        """PEFT's DoRA on a dense linear: an identity, ``s B A``, its unscaled self and its sum with ``W``, in float32."""
        if self.trained.adapter.method != "dora":
            return 0
        return FLOAT * max((s.in_features * (s.in_features + 3 * s.out_features) for s in dense), default=0)

    def _weights(self, itemsize: int) -> int:
        return self.layout.num_parameters * itemsize

    def _emulator(self, itemsize: int) -> int:
        if self.layout.budget is not None:  # the bytes of its files
            rest = (self.layout.num_parameters - self.layout.parameters_targeted) * itemsize
            if itemsize == self.file_itemsize:
                return rest + self.layout.budget
            wider = self.layout.stored_bytes(itemsize) - self.layout.stored_bytes(self.file_itemsize)
            dense = self._dense_beside_integers * (itemsize - self.file_itemsize) // self.file_itemsize
            return rest + self.layout.budget + (wider or dense)  # even forms have no floats, which data may choose
        saved = self.layout.parameters_targeted - self.layout.parameters_factorized
        return (self.layout.num_parameters - saved) * itemsize - self._saved_bytes(itemsize) + self.layout.order_bytes

    @functools.cached_property
    def _dense_beside_integers(self) -> int:
        """Bytes of the linears that a budget may leave as they are, the others being in the most bits that hold all of them."""
        sizes, compressed = self.layout.form_sizes(self.file_itemsize), set(self.layout.compressed)
        shapes = Counter((s.out_features, s.in_features) for s in self.layout.specs if s.name in compressed)
        budget = self.layout.budget or 0
        dense, *in_bits = (
            sum(count * sizes.num_bytes(*shape, form) for shape, count in shapes.items()) for form in _WHOLE_FORMS
        )
        held = max((size for size in in_bits if size <= budget), default=budget)
        return dense * (budget - held) // max(1, dense - held)

    def _saved_bytes(self, itemsize: int) -> int:
        """Bytes that the emulator's linears in few bits save."""
        names = set(self.layout.quantized_linears)
        quantized = [spec for spec in self.layout.specs if spec.name in names]
        stored = sum(self.layout.quantized_bytes(spec) for spec in quantized)
        return sum(self.layout.kept(spec) for spec in quantized) * itemsize - stored

    def _unpacked(self) -> int:
        """Bytes of the largest weight in few bits as it is used: its codes in 8 bits or by 32-bit indices, two elements each,
        in float32, and turned to the model's dtype."""
        shapes = (shape for spec in self.layout.specs for shape in self.layout.stored_shapes(spec))
        if self.layout.budget is not None:  # of forms that data decides: any may be a whole weight
            shapes = ((spec.out_features, spec.in_features) for spec in self.layout.specs)
        is_quantized = self.layout.quantized_linears or self.layout.budget is not None
        largest = max((rows * columns for rows, columns in shapes), default=0) if is_quantized else 0
        return largest * (2 + FLOAT + (0 if self.itemsize == FLOAT else self.itemsize))

    def _groups(self) -> list[tuple[LinearSpec, ...]]:
        targeted = set(self.layout.compressed if self.layout.differs else ())
        return [group for group in self.layout.groups if any(spec.name in targeted for spec in group)]

    def _gradient_specs(self) -> list[LinearSpec]:
        names = set(self.layout.gradient_linears)
        return [spec for spec in self.layout.specs if spec.name in names]

    def _adapter_parameters(self) -> int:
        """Those that are trained: of another method than LoRA's as counted by attaching it, see ``model_checks.py``."""
        if self.layout.adapter_parameters is not None:
            return self.layout.adapter_parameters
        magnitudes = sum(s.out_features for s in self.adapted) if self.trained.adapter.method == "dora" else 0
        return magnitudes + sum(self._rank(s) * (s.in_features + s.out_features) for s in self.adapted)

    @property
    def corrected_parameters(self) -> int:
        """Those of the adapter as corrected: another method's may be in LoRA's form by then, where all modules
        have one rank."""
        corrected = self.config.correction.method != "none" and self.layout.differs
        if not (corrected or self.trained.adapter.is_lora):
            return self.adapter_parameters
        r = max(map(self._rank, self.adapted), default=0)
        return max(self.adapter_parameters, r * sum(s.in_features + s.out_features for s in self.adapted))

    def _rank(self, spec: LinearSpec) -> int:
        """The rank of the adapter's update of this linear, as it is corrected: at most the smaller side."""
        return update_rank(self.trained.adapter.method, self._adapter_settings, spec)

    def _calibration_tokens(self) -> float:
        return self.config.calibration.batch_size * self.lengths.longest

    def _logits(self, tokens: float, copies: int = LOSS_COPIES) -> float:
        """One chunk's logits in float32, or all where they cannot be made by chunks, and what is made of them."""
        at_once = tokens if self.layout.whole_logits else min(tokens, chunk_tokens(self.layout.hidden_size))
        return copies * FLOAT * at_once * self._vocabulary()

    def _vocabulary(self) -> float:
        return self.layout.head_parameters / self.layout.hidden_size

    @property
    def autocast(self) -> torch.dtype | None:
        """The 16-bit dtype that training computes in; None where it computes in the model's own."""
        section = self.trained.section
        if (section.model_extra or {}).get("fp16"):
            return torch.float16
        return torch.bfloat16 if section.bf16 is True or (section.bf16 == "auto" and section.gpus > 0) else None

    def cast_weights(self, block: Block, of_original: bool = False) -> int:
        """Bytes of a block's frozen weights, in no few bits, as autocast makes them of another dtype for their products, and
        keeps them for the gradients of what these read."""
        if self.autocast in (None, self.dtype):
            return 0
        in_few_bits = () if of_original else {*self.layout.quantized_linears}
        kept = (
            s.num_parameters if of_original else self.layout.kept(s) for s in block.specs if s.name not in in_few_bits
        )
        return 0 if self.layout.budget is not None and not of_original else HALF * sum(kept)

    def saved_in_training(self, block: Block) -> float:
        """Bytes that a block keeps of a token for its backward pass in training.

        - What an adapter reads, once for all that share it; by autocast in 16 bits and else in float32, a copy for each where
          the model is in another dtype; with dropout what is left of it in that dtype, and a mask.
        - Of packs whose rows a mask tells apart the mask, as it is added to scores, and keys and values again for each head of
          the queries.
        - What stands between LoRA's two factors, or VeRA's.
        - Outputs that are scaled by what is learned, in float32, and of DoRA the base's too.
        - Of LoHa and LoKr what stands between their factors, in float32: of LoKr about as much as the outputs.
        - What :meth:`_saved` counts.
        """
        adapted, method, section = set(self.adapted), self.trained.adapter.method, self.trained.section
        dropout, narrow = bool(self.trained.adapter.lora_dropout), self.autocast is not None
        computed = HALF if narrow else FLOAT
        mask = 0 if not dropout else 1 if section.gpus > 0 else FLOAT
        kept = outputs = 0.0
        for group in block.groups:
            own = [spec for spec in group if spec in adapted]
            copies = len(own) if dropout or narrow or self.itemsize < FLOAT else min(len(own), 1)
            share = group[0].token_share
            kept += share * copies * group[0].in_features * (computed + mask)
            outputs += share * sum(spec.out_features for spec in own)
            between = FLOAT if method in ("loha", "vera") else computed if method in ("lora", "dora") else 0
            kept += share * between * sum(map(self._rank, own))
        scaled = {"dora": FLOAT + self.itemsize, "vera": FLOAT, "ia3": FLOAT, "lokr": FLOAT}.get(method, 0)
        itemsize, length = (HALF if narrow else self.itemsize), self.trained_lengths.longest
        if section.packing and not is_flash(self.config.model.attn_implementation):
            kept += 0 if block.is_between or self.layout.eager else itemsize * (length + self._repeated_per_token())
        return kept + outputs * scaled + self._saved(block, itemsize, length, self._in_steps)

    def _saved(self, block: Block, itemsize: int, length: float, in_steps: int | None = None) -> float:
        """Bytes that a block keeps of a token for its backward pass, whatever is trained.

        - What norms read, in float32: the residual stream at two, where they were not watched.
        - What goes into attention and activations, and what comes out, in numbers of ``itemsize`` bytes.
        - Of eager attention in rows of that ``length`` the scores' softmax in float32, and as it is multiplied; and keys and
          values again for each head of the queries.
        - Of experts as measured; by the share of tokens that is sent to each where they were not.
        - Of functions that are computed step by step what the steps keep, in numbers of ``in_steps`` bytes, by default
          ``itemsize``.

        Frozen linears keep nothing.
        """
        watched = self._watched(block)
        experts = watched.experts if watched else None
        inner = experts.kept if experts else 0.0
        in_steps_kept = self._functions(block).kept
        for before, group in zip(((), *block.groups), block.groups, strict=False):
            if experts and group[0].routed_share is not None:
                continue
            writes = len(group) == 1 and group[0].out_features == block.width
            if writes and in_steps_kept and len(before) == 1 and before[0].out_features == group[0].in_features:
                continue  # a function of the one linear before it, which keeps its input and not what comes out
            width = group[0].in_features if writes else sum(spec.out_features for spec in group)
            inner += group[0].token_share * width
        scored = 0.0
        if self.layout.eager and not block.is_between:
            scored = self._scores_per_token(length) * (FLOAT + (itemsize if itemsize < FLOAT else 0))
            scored += self._repeated_per_token() * itemsize
        normed = watched.normed if watched else 2 * block.width
        return normed * FLOAT + inner * itemsize + scored + in_steps_kept * (in_steps or itemsize)

    def _read_by_trained(self, block: Block, trained: Collection[LinearSpec]) -> float:
        """Bytes of a token that linears in a block read whose own weights are trained: once for all that share it."""
        own = set(trained)
        read = (group[0] for group in block.groups if own.intersection(group))
        return self.itemsize * sum(spec.token_share * spec.in_features for spec in read)

    def _scores_per_token(self, length: float) -> float:
        """Numbers that eager attention scores of a token of so long a row in a layer: none where a kernel computes it."""
        return length * max(heads for heads, _, _ in self._heads) if self.layout.eager else 0.0

    def _repeated_per_token(self) -> float:
        """Numbers that a layer has more once each head of the queries has keys and values of its own."""
        return max(2.0 * width * (heads - cached) for heads, cached, width in self._heads)

    def _update_weights(self, block: Block) -> int:
        """What LoHa makes of its factors in a block and keeps for the backward pass, in float32: their paired columns, or
        ``ΔW`` where that is less."""
        if self.trained.adapter.method != "loha":
            return 0
        adapted = set(self.adapted).intersection(block.specs)
        return FLOAT * sum(min(self._rank(s) * (s.in_features + s.out_features), s.num_parameters) for s in adapted)

    def _update_per_token(self) -> float:
        """Bytes of the widest ``W x + s B (A x)`` on its way forward, or of its gradient on the way back: once in the
        model's dtype and three times in float32, or by autocast all in 16 bits."""
        widths = {block.name: block.multiple for block in self.blocks}
        outputs = (widths[spec.block] * spec.out_features for spec in self.adapted)
        return max(outputs, default=0.0) * (4 * HALF if self.autocast is not None else self.itemsize + 3 * FLOAT)

    def forward_bytes(self, tokens: float) -> float:
        """Bytes of what lives at once inside a block that keeps nothing.

        In its widest step these are the residual stream before and after attention, normed too, the step's input, its outputs
        and one more that is made of them, or what experts take as measured. Eager attention takes its scores in the model's
        dtype, in float32 and their softmax, beside the mask and what attention reads, where that is more.
        """
        widest = self.itemsize * max(block.multiple * self._widest_step(block) for block in self.blocks)
        if not self.layout.eager:
            return tokens * widest
        length = self.lengths.longest
        scores = self._scores_per_token(length)
        narrow = self.itemsize if self.itemsize < FLOAT else 0
        beside = self.itemsize * (5 * self.layout.hidden_size + self._repeated_per_token() + length)
        # Blocks' own code holds the scores until the block ends.
        return tokens * max(widest + self.itemsize * scores, (narrow + 2 * FLOAT) * scores + beside)

    def _widest_step(self, block: Block) -> float:
        together = self._experts_together(block)
        alone = widest_step(block) + self._functions(block).forward
        return max(alone, 0.0 if together is None else 3 * block.width + together.forward)

    def _functions(self, block: Block) -> PassNumbers:
        """What a block's activation functions take beyond those that kernels compute."""
        watched = self._watched(block)
        return PassNumbers(0.0, 0.0, 0.0) if watched is None else watched.functions

    def _experts_together(self, block: Block) -> PassNumbers | None:
        """What a block's experts take together, where a GPU may run them so. None elsewhere: there they run one after another,
        each on its own tokens alone."""
        watched = self._watched(block)
        return watched.experts if watched and watched.experts and self._gpus_may_group else None

    def _watched(self, block: Block) -> BlockActivations | None:
        return None if block.is_between else self.layout.activations.get(block.name)

    @functools.cached_property
    def _gpus_may_group(self) -> bool:
        return any(getattr(self.config, name).gpus for name in WITH_MODELS) and gpus_group_products()

    def _passing_per_token(self) -> float:
        """Bytes of a token at once in training, beside what blocks keep."""
        experts = (
            block.multiple * e.backward for block in self.blocks if (e := self._experts_together(block)) is not None
        )
        itemsize = self.itemsize if self.autocast is None else HALF
        steps = self._steps_backward()
        if steps:  # beside its output, and the gradients of this and of its input
            steps += 3 * max(block.multiple * max(spec.out_features for spec in block.specs) for block in self.blocks)
        return max(self._update_per_token(), itemsize * max(experts, default=0.0), self._in_steps * steps)

    @property
    def _in_steps(self) -> int:
        """Bytes of a number of functions computed step by step in training: on GPUs autocast takes powers in float32
        (https://docs.pytorch.org/docs/stable/amp.html)."""
        if self.autocast is None:
            return self.itemsize
        return FLOAT if self.trained.section.gpus > 0 else HALF

    def _steps_backward(self) -> float:
        """Numbers of a token that functions take at once on the way back, beyond those that kernels compute."""
        return max(block.multiple * self._functions(block).backward for block in self.blocks)

    def _counting(self, tokens: float) -> float:
        """A pass that adds to Grams: beside it the widest input without its padding, in float32."""
        widest = max((group[0].in_features for group in self._groups()), default=0)
        return self.forward_bytes(tokens) + tokens * widest * (FLOAT + (0 if self.itemsize == FLOAT else self.itemsize))

    def _cached_per_token(self) -> float:
        """Numbers that all layers keep of a token: its keys and values."""
        return sum(2.0 * width * cached for _, cached, width in self._heads)

    @functools.cached_property
    def _heads(self) -> list[tuple[int, int, int]]:
        """Of each layer the heads, those of keys and values, and how wide one is."""
        config = self.model_config.get_text_config()
        differ = getattr(config, "is_heterogeneous", False)  # then what differs is asked of a layer alone
        alike = [config] * getattr(config, "num_hidden_layers", len(self.blocks))  # BLT's counts for each of its parts
        return list(map(self._heads_in, config.per_layer_config if differ else alike))

    def _heads_in(self, layer: Any) -> tuple[int, int, int]:
        heads = getattr(layer, "num_attention_heads", None) or 1
        cached = getattr(layer, "num_key_value_heads", None) or heads
        return heads, cached, getattr(layer, "head_dim", None) or self.layout.hidden_size // heads


def model_dtype(prepared: Prepared) -> torch.dtype:
    """The dtype of the model's weights in use. ``auto`` means, as in transformers, that of its config, else that of its files;
    but bfloat16 in place of float32 where all passes run on GPUs of this machine that compute in it."""
    return torch.bfloat16 if _is_narrowed(prepared) else _named_dtype(prepared)


def file_dtype(prepared: Prepared) -> torch.dtype:
    """The dtype of the files of the model, the emulator and the merged model."""
    return prepared.file_dtype or _named_dtype(prepared)


def _named_dtype(prepared: Prepared) -> torch.dtype:
    return named_dtype(prepared.config, prepared.source, prepared.model_config, prepared.file_dtype)


def _is_narrowed(prepared: Prepared) -> bool:
    """Whether every pass loads the model in bfloat16, as :func:`emloc_ray.modeling.loading.dtype_on` decides it; a training
    without autocast to it does not. Of the GPUs of a Ray that is joined it is not known."""
    config, finetune = prepared.config, prepared.config.finetune
    if config.model.dtype != "auto" or config.ray.joins or prepared.source.gguf_file is not None:
        return False
    if getattr(prepared.model_config, "dtype", None) != torch.float32:
        return False
    in_bfloat16 = finetune.bf16 is True or (
        finetune.bf16 == "auto" and prepared.zero_config is None and not (finetune.model_extra or {}).get("fp16")
    )
    with_gpus = all(getattr(config, name).gpus for name in WITH_MODELS)
    return in_bfloat16 and with_gpus and gpus_compute_bfloat16()
