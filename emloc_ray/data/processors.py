"""A vision-language model's own processor, and the inputs that it makes from a batch's images."""

import functools
import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emloc_ray.data.formats import RowImage, Tokens
from emloc_ray.data.images import decode
from emloc_ray.errors import ConfigError
from emloc_ray.io.runs.fingerprint import Looks, looks_in
from emloc_ray.io.store.node_cache import ensure
from emloc_ray.text import one_line

# A processor's tokenizer refuses a second caller meanwhile, and batches are made ahead in a thread of their own.
_PROCESSING = threading.Lock()
_FILES = ("processor_config.json", "preprocessor_config.json")
# The names of the mask of image tokens, which follows from the row's tokens; the second is Gemma 3's.
_TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
_OF_TEXT = ("input_ids", "attention_mask", *_TOKEN_TYPES)


def open_processor(directory: str, trust_remote_code: bool = False) -> Any:
    """The processor in a model's directory; None where the model has none that makes an image's inputs without the text beside
    it. Raises ConfigError where it does not open, as without Pillow. Opened once a process while its files stay."""
    return _open(directory, trust_remote_code, looks_in(Path(directory)))


@functools.lru_cache(maxsize=2)
def _open(directory: str, trust_remote_code: bool, looks: Looks) -> Any:
    from transformers import AutoProcessor

    ensure(Path(directory), weights=False)
    if not any((Path(directory) / name).is_file() for name in _FILES):
        return None
    try:
        processor = AutoProcessor.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (ImportError, ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"model.source {directory}: its processor does not open ({one_line(error)}): pip install 'emloc-ray[vision]', or fix"
            " its files."
        ) from error
    is_whole = hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")
    return processor if is_whole and not _mixes(processor) else None


def _mixes(processor: Any) -> bool:
    """Whether what the processor makes of an image depends on the text beside it, as Mllama's mask of cross-attention does."""
    try:
        made, longer = (blank_image_tokens(processor, _SMALL_SIDE, words) for words in ("", " a"))
    except Exception:  # noqa: BLE001  whoever shows it an image says why it takes none
        return False
    tensors = {name: value for name, value in made.items() if isinstance(value, Tensor) and name not in _OF_TEXT}
    return not all(torch.equal(value, longer[name]) for name, value in tensors.items())


@functools.lru_cache(maxsize=2)
def counts_apart(processor: Any) -> bool:
    """Whether the processor makes as many tokens of an image beside others as of one alone. LLaVA-OneVision's makes fewer."""
    try:
        one, two, three = (len(blank_image_tokens(processor, _SMALL_SIDE, count=n)["input_ids"][0]) for n in (1, 2, 3))
    except Exception:  # noqa: BLE001  whoever shows it an image says why it takes none
        return True
    return three - two == two - one


@dataclass(frozen=True)
class ImageInputs:
    """Makes a model's inputs for the images of a batch with its own processor, which it opens at the first image."""

    directory: str | Path
    trust_remote_code: bool = False

    def __call__(self, images: Sequence[Sequence[bytes | memoryview]], input_ids: Tensor) -> dict[str, Tensor]:
        """Pixels, and all else that the processor makes of each row's encoded images and ``input_ids``; empty without images.
        They do not depend on the rows' text, so that placeholders do."""
        shown = [[decode(content) for content in row] for row in images if row]
        if not shown:
            return {}
        processor = self._processor()
        texts = [placeholders(processor, len(row)) for row in shown]
        with _PROCESSING:
            made = processor(text=texts, images=shown, padding=True, return_tensors="pt")
        inputs = {key: value for key, value in made.items() if key not in _OF_TEXT}
        for name in _TOKEN_TYPES:
            if name in made:
                inputs[name] = torch.tensor(processor.create_mm_token_type_ids(input_ids.tolist()))
        return inputs

    def blank_row(self) -> Tokens:
        """A row that shows a small blank image and has nothing to learn, for ranks without images: ranks that train together
        must run the same parts of a model, or others wait for their part of the vision tower's gradients or weights."""
        from PIL import Image

        stream = io.BytesIO()
        Image.new("RGB", (_SMALL_SIDE, _SMALL_SIDE)).save(stream, "PNG")
        ids = blank_image_tokens(self._processor(), _SMALL_SIDE)["input_ids"][0].tolist()
        return Tokens(ids, [False] * len(ids), (RowImage(stream.getvalue(), len(ids)),))

    def _processor(self) -> Any:
        processor = open_processor(str(self.directory), self.trust_remote_code)
        if processor is None:
            raise ConfigError(f"{self.directory} holds no processor, which the rows' images need: copy it there.")
        return processor


def placeholders(processor: Any, count: int) -> str:
    """A text of so many images and no words."""
    content: list[dict[str, Any]] = [{"type": "image"}] * count
    if processor.chat_template or processor.tokenizer.chat_template:
        template = processor if processor.chat_template else processor.tokenizer
        text: str = template.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        return text
    return str(processor.image_token) * count


def example(directory: str | Path, trust_remote_code: bool = False) -> dict[str, Tensor]:
    """A model's inputs for one blank image and no words, from its own processor; empty where it has none. Raises ConfigError
    where the processor refuses the image."""
    processor = open_processor(str(directory), trust_remote_code)
    if processor is None:
        return {}
    try:
        made = blank_image_tokens(processor, IMAGE_SIDE)
        masks = [made[name].tolist() for name in _TOKEN_TYPES if name in made]
        by_tokens = processor.create_mm_token_type_ids(made["input_ids"].tolist()) if masks else []
    except Exception as error:  # a chat template and a processor are programs of the model's own
        raise ConfigError(
            f"model.source {directory}: its processor takes no image ({one_line(error)}): fix its files."
        ) from error
    if any(mask != by_tokens for mask in masks):
        raise ConfigError(
            f"model.source {directory}: its processor's token types do not follow from the tokens alone (PaliGemma's tell"
            " prefix from suffix): choose another model."
        )
    return {key: value for key, value in made.items() if isinstance(value, Tensor)}


def blank_image_tokens(processor: Any, side: int, words: str = "", count: int = 1) -> Any:
    """What the processor makes of a text with ``count`` black square images of ``side`` pixels, and ``words``."""
    from PIL import Image

    text, image = placeholders(processor, count) + words, Image.new("RGB", (side, side))
    return processor(text=[text], images=[[image] * count], padding=True, return_tensors="pt")


IMAGE_SIDE = 448  # pixels of the blank image
_SMALL_SIDE = 56
