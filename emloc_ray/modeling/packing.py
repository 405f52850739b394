"""Rows packed into one sequence, in which positions begin again at each row: whether a model keeps them apart, and what flash
attention takes of them. Given no mask, transformers makes a block-diagonal one, or the bounds of the rows (``cu_seqlens``)."""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from emloc_ray.errors import ConfigError
from emloc_ray.modeling.inputs import has_encoder

_PROBE = (5, 3)  # tokens of two rows
_TOLERANCE = {torch.float32: 1e-3}
_HALF_TOLERANCE = 0.1
_FIND_PACKS = masking_utils.find_packed_sequence_indices
_STATELESS = {"full_attention", "sliding_attention"}


@contextlib.contextmanager
def packs_known(inputs: Mapping[str, Any]) -> Iterator[None]:
    """While it lasts, a model called with ``inputs`` is not asked whether positions begin again in a row, for which
    transformers makes the host wait for a GPU in every pass: they may where they are given, else they do not."""
    given = inputs.get("position_ids") is not None
    masking_utils.find_packed_sequence_indices = _number_rows if given else _no_packs
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = _FIND_PACKS


def _no_packs(position_ids: Tensor) -> None:
    """Every row is one sequence."""


def _number_rows(position_ids: Tensor) -> Tensor:
    """Which row of its pack each token is of ``(packs, length)``, counted from 0. transformers' own answer but where no pack
    has a second row: then that is None, which the mask made of zeros equals."""
    begins = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1
    return begins.cumsum(-1)


def as_one_row(batch: dict[str, Tensor]) -> dict[str, Any]:
    """The packs of a batch one after another, ``(1, packs · length)``: their padding is rows of its own. With transformers'
    ``FlashAttentionKwargs``, the bounds of all rows ``(rows + 1,)`` and the longest one's length: a layer that is not given
    them finds them in the positions, for which the host waits. Made on the CPU, before the batch is on a GPU."""
    row: dict[str, Any] = {key: value.reshape(1, -1) for key, value in batch.items()}
    positions = row["position_ids"].flatten()
    begins = (positions == 0).nonzero().flatten()
    bounds = torch.cat([begins, begins.new_tensor([len(positions)])]).to(torch.int32)
    longest = int(bounds.diff().max())
    return {**row, **{f"cu_seq_lens_{of}": bounds for of in "qk"}, **{f"max_length_{of}": longest for of in "qk"}}


def why_rows_mix(model: Any) -> str | None:
    """Why a model, of whose weights nothing is read, could not keep packed rows apart; None where nothing says so."""
    text = model.config.get_text_config()
    if has_encoder(model.config):
        return "reads a row's prompt with an encoder"
    kinds = {*(getattr(text, "layer_types", None) or ())} - _STATELESS
    if kinds or getattr(model, "_is_stateful", False):
        return f"carries a state from token to token ({', '.join(sorted(kinds)) or type(model).__name__})"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "takes no positions"
    return None


@torch.no_grad()
def check_rows_apart(model: Any, dtype: torch.dtype) -> None:
    """Compares the logits of a row behind another one in a pack with those of the row alone, in passes of that ``dtype``.
    Raises ConfigError where they differ."""
    first, second = _PROBE
    tokens = torch.arange(1, first + second + 1, device=model.device).unsqueeze(0)
    places = torch.cat([torch.arange(first), torch.arange(second)]).to(model.device).unsqueeze(0)
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            packed = model(input_ids=tokens, position_ids=places, use_cache=False).logits[0, first:].float()
            alone = model(input_ids=tokens[:, first:], use_cache=False).logits[0].float()
    finally:
        model.train(was_training)
    apart = float(torch.linalg.norm(packed - alone) / torch.linalg.norm(alone))
    if not apart <= _TOLERANCE.get(dtype, _HALF_TOLERANCE):
        raise ConfigError(
            f"finetune.packing does not go with a {model.config.model_type} model, in which a packed row sees the one before"
            f" it (its logits differ by {apart:.1%}): set it to false."
        )
