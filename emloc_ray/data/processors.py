"""A vision-language model's own processor: opened where the model has one, and what it makes of a batch's images."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emloc_ray.data.formats import RowImage, Tokens
from emloc_ray.data.images import decode
from emloc_ray.errors import ConfigError
from emloc_ray.io.store.node_cache import ensure

_FILES = ("processor_config.json", "preprocessor_config.json")
# Which tokens stand for images: made of the row's tokens, not of its images. Gemma 3's processor gives it the second name.
_TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
_OF_TEXT = ("input_ids", "attention_mask", *_TOKEN_TYPES)


@functools.lru_cache(maxsize=2)
def open_processor(directory: str, trust_remote_code: bool = False) -> Any:
    """The processor in a model's directory; None where the model has none for images.

    Raises:
        ConfigError: where it does not open, as without Pillow.
    """
    from transformers import AutoProcessor

    ensure(Path(directory), weights=False)
    if not any((Path(directory) / name).is_file() for name in _FILES):
        return None
    try:
        processor = AutoProcessor.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (ImportError, ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        detail = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model.source {directory}: its processor does not open ({detail}): pip install 'emloc-ray[vision]', or mend"
            " its files."
        ) from error
    is_whole = hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")
    return processor if is_whole else None


class ImageInputs:
    """What a model is called with for the images of a batch, made by its own processor; opened at the first image."""

    def __init__(self, directory: str | Path, model_options: Mapping[str, Any] | None = None) -> None:
        """``model_options``: what the model is loaded with; ``trust_remote_code`` counts for its processor too."""
        self.directory, self.model_options = str(directory), model_options or {}

    def __call__(self, images: Sequence[Sequence[bytes | memoryview]], input_ids: Tensor) -> dict[str, Tensor]:
        """Pixels and whatever else the processor makes of each row's encoded images, and of the rows' ``input_ids``.

        The same as the processor gives with the rows' text: pixels do not depend on it. Nothing where there are no images.
        """
        shown = [[decode(content) for content in row] for row in images if row]
        if not shown:
            return {}
        processor = self._processor()
        texts = [placeholders(processor, len(row)) for row in shown]
        made = processor(text=texts, images=shown, padding=True, return_tensors="pt")
        inputs = {key: value for key, value in made.items() if key not in _OF_TEXT}
        for name in _TOKEN_TYPES:
            if name in made:
                inputs[name] = torch.tensor(processor.create_mm_token_type_ids(input_ids.tolist()))
        return inputs

    def blank_row(self) -> Tokens:
        """A row that shows a small blank image and has nothing to learn.

        Ranks that train together have to run the same parts of a model: one whose batch shows no image would leave the
        others waiting for its part of the vision tower's gradients, or of its weights.
        """
        from PIL import Image

        stream = io.BytesIO()
        Image.new("RGB", (_SMALL_SIDE, _SMALL_SIDE)).save(stream, "PNG")
        ids = blank_image_tokens(self._processor(), _SMALL_SIDE)["input_ids"][0].tolist()
        return Tokens(ids, [False] * len(ids), (RowImage(stream.getvalue(), len(ids)),))

    def _processor(self) -> Any:
        processor = open_processor(self.directory, self.model_options.get("trust_remote_code", False))
        if processor is None:
            raise ConfigError(f"{self.directory} holds no processor, which the rows' images need: copy it there.")
        return processor


def placeholders(processor: Any, count: int) -> str:
    """A text that shows so many images and says nothing."""
    content: list[dict[str, Any]] = [{"type": "image"}] * count
    if processor.chat_template or processor.tokenizer.chat_template:
        template = processor if processor.chat_template else processor.tokenizer
        text: str = template.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        return text
    return str(processor.image_token) * count


def example(directory: str | Path, trust_remote_code: bool = False) -> dict[str, Tensor]:
    """What a model is called with for one blank image and no words, by its own processor; nothing where it has none.

    Raises:
        ConfigError: where the processor does not take it.
    """
    processor = open_processor(str(directory), trust_remote_code)
    if processor is None:
        return {}
    try:
        made = blank_image_tokens(processor, IMAGE_SIDE)
        told = [made[name].tolist() for name in _TOKEN_TYPES if name in made]
        by_tokens = processor.create_mm_token_type_ids(made["input_ids"].tolist()) if told else []
    except Exception as error:  # a chat template and a processor are programs of the model's own
        detail = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"model.source {directory}: its processor takes no image ({detail}): mend its files."
        ) from error
    if any(types != by_tokens for types in told):
        raise ConfigError(
            f"model.source {directory}: its processor's token types do not follow from the tokens alone (PaliGemma's tell"
            " prefix from suffix): choose another model."
        )
    return {key: value for key, value in made.items() if isinstance(value, Tensor)}


def blank_image_tokens(processor: Any, side: int) -> Any:
    """What the processor makes of a text with one black square image of ``side`` pixels."""
    from PIL import Image

    text, image = placeholders(processor, 1), Image.new("RGB", (side, side))
    return processor(text=[text], images=[[image]], padding=True, return_tensors="pt")


IMAGE_SIDE = 448  # pixels of the blank image
_SMALL_SIDE = 56
