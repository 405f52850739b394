"""Tiny vision-language models with their own processors, made without a hub: LLaVA, InternVL, Gemma 3, Qwen-VL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny import EOS, PAD, VOCABULARY, make_tokenizer, random_model

HIDDEN = 32
_NAMED = {
    "image_token": "<image>",
    "start_image_token": "<img>",
    "image_boundary_token": "<img>",
    "boi_token": "<img>",
    "eoi_token": "</img>",
    "end_image_token": "</img>",
    "context_image_token": "<image>",
    "video_token": "<video>",
    "audio_token": "<video>",
    "boa_token": "<img>",
    "eoa_token": "</img>",
}
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0}

# Every turn is a list of parts, as these models' own templates read it; a text may be a string.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def image_tokenizer(chat_template: str | None = None) -> Any:
    """The tiny tokenizer with the tokens that stand for images, which its models know by name."""
    plain = make_tokenizer(chat_template)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens=_NAMED,
        chat_template=chat_template,
    )


def _llava(tokenizer: Any) -> tuple[Any, Any]:
    """A CLIP tower with a class token that the projector leaves out, its features taken before the last layer."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        projection_dim=HIDDEN,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    sizes = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(**sizes),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )
    return config, processor


def _internvl(tokenizer: Any) -> tuple[Any, Any]:
    """Images in tiles, four patches joined to one token."""
    vision = transformers.InternVLVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=[28, 28],
        patch_size=[7, 7],
        use_qk_norm=True,
    )
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    images = transformers.GotOcr2ImageProcessor(size={"height": 28, "width": 28}, min_patches=1, max_patches=2)
    video = transformers.InternVLVideoProcessor(size={"height": 28, "width": 28})
    processor = transformers.InternVLProcessor(
        images, tokenizer, video, image_seq_length=4, chat_template=CHAT_TEMPLATE
    )
    return config, processor


def _qwen_processor(kind: Any, tokenizer: Any) -> Any:
    pixels = {"min_pixels": 14**2, "max_pixels": 42**2}
    options = {"patch_size": 7, "merge_size": 2, "temporal_patch_size": 2}
    images = transformers.Qwen2VLImageProcessor(**options, **pixels)
    video = (
        transformers.Qwen2VLVideoProcessor(**options)
        if kind is not transformers.Qwen3VLProcessor
        else (transformers.Qwen3VLVideoProcessor(**options))
    )
    return kind(images, tokenizer, video, chat_template=CHAT_TEMPLATE)


def _qwen_ids(tokenizer: Any) -> dict[str, Any]:
    return {
        "image_token_id": tokenizer.image_token_id,
        "video_token_id": tokenizer.video_token_id,
        "vision_start_token_id": tokenizer.start_image_token_id,
        "vision_end_token_id": tokenizer.end_image_token_id,
        "tie_word_embeddings": False,
    }


def _qwen2_vl(tokenizer: Any) -> tuple[Any, Any]:
    """Images of any shape, q, k and v one linear in the tower, positions in three directions."""
    vision = {"depth": 2, "embed_dim": HIDDEN, "hidden_size": HIDDEN, "num_heads": 4, "mlp_ratio": 2, "patch_size": 7}
    rope = {**_MROPE, "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **_qwen_ids(tokenizer)
    )
    return config, _qwen_processor(transformers.Qwen2VLProcessor, tokenizer)


def _qwen25_vl(tokenizer: Any) -> tuple[Any, Any]:
    """A gated tower with attention in windows."""
    vision = {
        "depth": 2,
        "hidden_size": HIDDEN,
        "out_hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_heads": 4,
        "patch_size": 7,
        "window_size": 28,
        "fullatt_block_indexes": [1],
    }
    rope = {**_MROPE, "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **_qwen_ids(tokenizer)
    )
    return config, _qwen_processor(transformers.Qwen2_5_VLProcessor, tokenizer)


_QWEN3_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": HIDDEN,
    "out_hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_heads": 4,
    "patch_size": 7,
    "num_position_embeddings": 36,
}


def _qwen3_vl(tokenizer: Any) -> tuple[Any, Any]:
    """Features of an earlier vision block join the first text block's output through a merger of their own."""
    vision = {**_QWEN3_VISION, "depth": 3, "deepstack_visual_indexes": [1]}
    rope = {**_MROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "head_dim": 8, "rope_parameters": rope}, vision_config=vision, **_qwen_ids(tokenizer)
    )
    return config, _qwen_processor(transformers.Qwen3VLProcessor, tokenizer)


def _qwen35(tokenizer: Any) -> tuple[Any, Any]:
    """Linear attention in one block, full in the other; transformers opens its text model alone by the same type."""
    linear = {
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
    }
    kinds = ["linear_attention", "full_attention"]
    rope = {**_MROPE, "mrope_section": [1, 1, 2], "mrope_interleaved": True}
    config = transformers.Qwen3_5Config(
        text_config={**TEXT, **linear, "head_dim": 16, "layer_types": kinds, "rope_parameters": rope},
        vision_config=_QWEN3_VISION,
        architectures=["Qwen3_5ForConditionalGeneration"],
        **_qwen_ids(tokenizer),
    )
    return config, _qwen_processor(transformers.Qwen3VLProcessor, tokenizer)


def _gemma3(tokenizer: Any) -> tuple[Any, Any]:
    """Tokens of one image see each other both ways: its processor tells which they are, by a name of its own."""
    vision = transformers.SiglipVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
    )
    text = {key: value for key, value in TEXT.items() if key != "tie_word_embeddings"}
    config = transformers.Gemma3Config(
        vision_config=vision,
        text_config=transformers.Gemma3TextConfig(**text, head_dim=8, sliding_window=64),
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.start_image_token_id,
        eoi_token_index=tokenizer.end_image_token_id,
        tie_word_embeddings=False,
    )
    images = transformers.Gemma3ImageProcessor(size={"height": 28, "width": 28}, image_seq_length=4)
    template = CHAT_TEMPLATE.replace("<image>", tokenizer.boi_token)
    return config, transformers.Gemma3Processor(images, tokenizer, image_seq_length=4, chat_template=template)


def save_mllama(directory: Path) -> Path:
    """Saves a random Mllama, whose processor makes a mask of each token of the text beside an image; it is in no table."""
    tokenizer, text = image_tokenizer(CHAT_TEMPLATE), {**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    tokenizer.bos_token = "<eos>"
    vision: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 4,
        "vision_output_dim": 2 * HIDDEN,
        "image_size": 28,
        "patch_size": 7,
        "max_num_tiles": 2,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    tied: dict[str, Any] = {"tie_word_embeddings": False}
    config = transformers.MllamaConfig(
        text_config=text, vision_config=vision, image_token_index=tokenizer.image_token_id, **tied
    )
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(directory)
    images = transformers.MllamaImageProcessor(size={"height": 28, "width": 28}, max_image_tiles=2)
    transformers.MllamaProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE).save_pretrained(directory)
    return directory


# By the names that the table of emloc_ray/README.md has.
VLMS: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "LLaVA": _llava,
    "InternVL": _internvl,
    "Gemma 3 (vision)": _gemma3,
    "Qwen2-VL": _qwen2_vl,
    "Qwen2.5-VL": _qwen25_vl,
    "Qwen3-VL": _qwen3_vl,
    "Qwen3.5": _qwen35,
}


def build_vlm(family: str, families: Mapping[str, Callable[[Any], tuple[Any, Any]]] = VLMS) -> tuple[Any, Any]:
    """A random model of the family and its processor."""
    config, processor = families[family](image_tokenizer())
    return random_model(config), processor


def save_vlm(family: str, directory: Path) -> Path:
    """Saves :func:`build_vlm` as transformers would, in shards, processor and all; returns the directory."""
    model, processor = build_vlm(family)
    model.save_pretrained(directory, max_shard_size="200KB")
    processor.save_pretrained(directory)
    return directory


def small_llava(directory: Path, side: int) -> Path:
    """Saves a LLaVA of twice the width for square images of ``side`` pixels, 16 patches each, that a minute can teach."""
    width = 2 * HIDDEN
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    tokenizer = image_tokenizer()
    vision = transformers.CLIPVisionConfig(**sizes, image_size=side, patch_size=side // 4, projection_dim=width)
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**{**TEXT, **sizes}),
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer,
        patch_size=side // 4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
