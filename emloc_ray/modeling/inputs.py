"""What a model is called with for a batch of rows, and where its predictions are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

OURS = ("input_ids", "attention_mask", "completion_mask", "labels")

_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id")

# Decoders in which a token may see later ones, and whose configs do not say so.
_SEE_LATER = {"cpmant", "diffusion_gemma", "git", "prophetnet", "xlnet"}

# Which tokens a linear reads: those of the row (of its prompt, where an encoder reads that), those that a decoder reads
# beside an encoder, or others (an image's patches).
Stream = Literal["row", "decoder", "other"]


@dataclass(frozen=True)
class ModelCall:
    """A batch as a model takes it: made on the CPU, where to ask which tokens are padding or labels makes no GPU wait.

    Attributes:
        inputs: what the model is called with.
        counted: which tokens of the row and of a decoder's input count, ``(rows, length)`` each, and which patches of images,
            ``(images, patches)``, where a processor pads them; where they were made.
        predicting: where in what the head reads ``(rows, length, hidden)`` a label is predicted: rows, and places from the
            end (prompt tuning puts virtual tokens before a row's), ``(labels,)`` each.
        targets: the labels, in that order ``(labels,)``.
        counts: how many labels each row has.
    """

    inputs: dict[str, Any]
    counted: dict[Stream, Tensor]
    predicting: tuple[Tensor, Tensor]
    targets: Tensor
    counts: tuple[int, ...]

    def to(self, device: torch.device) -> ModelCall:
        """The same, to be called there; ``counted`` stays. Nothing waits for the copies."""

        def to(value: Any) -> Any:
            return on_device(value, device) if isinstance(value, Tensor) else value

        rows, places = self.predicting
        return replace(
            self,
            inputs={key: to(value) for key, value in self.inputs.items()},
            predicting=(to(rows), to(places)),
            targets=to(self.targets),
        )


def on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device, without a wait for the copy: a GPU takes it from pinned memory."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def has_encoder(config: Any) -> bool:
    """Whether a model of that transformers ``config`` reads the prompt with an encoder, apart from what it writes."""
    return bool(getattr(config, "is_encoder_decoder", False))


def sees_later_tokens(config: Any) -> bool:
    """Whether a token of a model of that ``config`` may see later ones of its row: then padding behind it must be masked."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    flags = ("use_bidirectional_attention", "prefix_lm")
    return (
        getattr(text, "model_type", None) in _SEE_LATER
        or any(getattr(text, flag, None) for flag in flags)
        or any(getattr(text, flag, True) is False for flag in ("is_decoder", "causal"))  # BERT's kin, XLM
    )


def model_call(config: Any, batch: dict[str, Tensor], loss_on: str = "completion", tokens: str = "all") -> ModelCall:
    """The call of a model of that transformers ``config`` for a batch of :func:`emloc_ray.data.token_shards.collate`.

    A model that is a decoder alone reads a row as it is, and predicts each token from those before it. Padding comes after,
    where none of these see it: no mask is passed, so that attention takes its fastest kernel. One with an
    encoder reads the tokens before the completion there; its decoder is given those from there on, one place later.
    ``loss_on`` are the labels, ``tokens`` what counts for Grams: ``all`` but padding, or of the ``completion`` alone.
    Whatever else is in the batch is handed on.
    """
    call = _encoder_decoder(config, batch) if has_encoder(config) else _decoder(config, batch, loss_on, tokens)
    others = {key: value for key, value in batch.items() if key not in OURS}
    patches = real_patches(config, batch)
    counted: dict[Stream, Tensor] = {} if patches is None else {"other": patches}
    return replace(call, inputs={**call.inputs, **others}, counted={**call.counted, **counted})


def _decoder(config: Any, batch: dict[str, Tensor], loss_on: str, tokens: str) -> ModelCall:
    labels = label_mask(batch, loss_on, config)
    # Where positions begin again, transformers keeps apart what is before and after, unless it is given a mask.
    masked = sees_later_tokens(config) and "position_ids" not in batch
    mask = unpadded_is_none(batch["attention_mask"]) if masked else None
    inputs = {"input_ids": batch["input_ids"], "attention_mask": mask}
    counted = batch["attention_mask"].bool() if tokens == "all" else label_mask(batch, "completion")
    return _call(inputs, {"row": counted}, labels, batch["input_ids"], shift=1)


def _call(
    inputs: dict[str, Any], counted: dict[Stream, Tensor], labels: Tensor, ids: Tensor, shift: int = 0
) -> ModelCall:
    """A call whose labels are the ``ids`` where the mask is true, each predicted ``shift`` places earlier."""
    rows, places = labels.nonzero(as_tuple=True)
    counts = tuple(labels.sum(dim=1).tolist())
    return ModelCall(inputs, counted, (rows, places - shift - labels.shape[1]), ids[rows, places], counts)


def label_mask(batch: dict[str, Tensor], loss_on: str, config: Any = None) -> Tensor:
    """Which tokens are labels ``(rows, length)``: completion tokens, or all non-padding ones; never a row's first, nor those
    that stand for an image in a model of that ``config``."""
    key = "completion_mask" if loss_on == "completion" else "attention_mask"
    mask = batch[key].bool().clone()
    mask[:, 0] = False
    if "position_ids" in batch:
        mask &= batch["position_ids"] > 0
    for name in _PLACEHOLDERS:
        token = getattr(config, name, None)
        if isinstance(token, int):
            mask &= batch["input_ids"] != token
    return mask


def real_patches(config: Any, batch: dict[str, Tensor]) -> Tensor | None:
    """Which patches that a vision tower reads are no padding ``(images, patches)``; None where its processor pads none."""
    if "image_position_ids" in batch:  # Gemma 4: (images, patches, 2), -1 of padding
        return (batch["image_position_ids"] >= 0).all(-1)
    mask = batch.get("pixel_attention_mask")
    if mask is None or mask.dim() != 4:  # SigLIP 2: (images, patches)
        return None if mask is None else mask.bool()
    # Idefics: (rows, images, height, width). It leaves out images that are padding, and patches that are in part.
    size, images = config.vision_config.patch_size, mask.flatten(0, 1).bool()
    pixels = images[images.flatten(1).any(1)].unfold(1, size, size).unfold(2, size, size)
    return pixels.flatten(-2).all(-1).flatten(1)


def unpadded_is_none(attention_mask: Tensor) -> Tensor | None:
    """No mask where nothing is padding."""
    return None if bool(attention_mask.all()) else attention_mask


def _decoder_start(config: Any) -> int:
    """The token that a decoder begins with: of a model for images its text's part says so, else a row's first token is it."""
    parts = (config, config.get_text_config(decoder=True))
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    starts = (getattr(part, name, None) for name in names for part in parts)
    return int(next(start for start in starts if start is not None))


def _encoder_decoder(config: Any, batch: dict[str, Tensor]) -> ModelCall:
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    begins = batch["completion_mask"].int().argmax(dim=1, keepdim=True)  # of the completion, in each row
    place = torch.arange(ids.shape[1], device=ids.device)
    prompt = place < begins
    length = int(begins.max())
    answer = (mask & ~prompt).sum(dim=1, keepdim=True)
    width = int(answer.max())
    step = torch.arange(width, device=ids.device)
    real = step < answer
    at = (begins + step).clamp_max(ids.shape[1] - 1)
    labels = ids.gather(1, at)
    # A conversation goes on with turns that are read and not learned.
    wanted = real & batch["completion_mask"].bool().gather(1, at)
    start = _decoder_start(config)
    own_pad = getattr(config, "pad_token_id", None)
    pad = ids.new_full((), own_pad if own_pad is not None else start)
    shifted = torch.cat([ids.new_full((len(ids), 1), start), labels[:, :-1]], dim=1)
    inputs = {
        "input_ids": torch.where(prompt, ids, pad)[:, :length],
        "attention_mask": unpadded_is_none(prompt[:, :length].long()),
        "decoder_input_ids": torch.where(real, shifted, pad),
        "decoder_attention_mask": None,
    }
    return _call(inputs, {"row": prompt[:, :length], "decoder": real}, wanted, labels)
