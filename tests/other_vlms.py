"""Tiny vision-language models whose processors pad patches, and a processor that tiles an image where it is the only one: no
table names them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import transformers
from PIL import Image
from vlms import CHAT_TEMPLATE, HIDDEN, TEXT, image_tokenizer

from emloc_ray.data.formats import Tokens, encode, sequences

_VISION: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def _idefics2(tokenizer: Any) -> tuple[Any, Any]:
    """Images of any shape, padded to the largest of the batch; four latents of each."""
    latents = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16}
    config = transformers.Idefics2Config(
        text_config=transformers.MistralConfig(**TEXT),
        vision_config={**_VISION, "image_size": 70, "patch_size": 7},
        perceiver_config={**latents, "hidden_size": HIDDEN, "num_key_value_heads": 1},
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    sizes = {"longest_edge": 70, "shortest_edge": 28}
    images = transformers.Idefics2ImageProcessor(size=sizes, do_image_splitting=False)
    return config, transformers.Idefics2Processor(images, tokenizer, image_seq_len=4, chat_template=CHAT_TEMPLATE)


def _lfm2_vl(tokenizer: Any) -> tuple[Any, Any]:
    """A SigLIP 2 tower: every image in 64 patches, padding among them."""
    config = transformers.Lfm2VlConfig(
        text_config=transformers.Lfm2Config(**TEXT, layer_types=["conv", "full_attention"]),
        vision_config=transformers.Siglip2VisionConfig(**_VISION, patch_size=4, num_patches=64, vision_use_head=False),
        image_token_id=tokenizer.image_token_id,
        downsample_factor=2,
        projector_hidden_size=HIDDEN,
        tie_word_embeddings=False,
    )
    images = transformers.Lfm2VlImageProcessor(
        tile_size=32,
        min_image_tokens=2,
        max_image_tokens=16,
        encoder_patch_size=4,
        max_num_patches=64,
        downsample_factor=2,
        do_image_splitting=False,
    )
    return config, transformers.Lfm2VlProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE)


def _gemma4(tokenizer: Any) -> tuple[Any, Any]:
    """Every image in 280 patches with their places, which padding has none of."""
    text = {key: value for key, value in TEXT.items() if key != "tie_word_embeddings"} | {"global_head_dim": 8}
    config = transformers.Gemma4Config(
        text_config=transformers.Gemma4TextConfig(
            **text,
            head_dim=8,
            sliding_window=64,
            hidden_size_per_layer_input=0,
            num_kv_shared_layers=0,
            layer_types=["sliding_attention", "full_attention"],
        ),
        vision_config=transformers.Gemma4VisionConfig(
            **_VISION,
            num_key_value_heads=4,
            head_dim=8,
            patch_size=4,
            pooling_kernel_size=2,
            position_embedding_size=64,
        ),
        audio_config=None,
        image_token_id=tokenizer.image_token_id,
        boi_token_id=tokenizer.start_image_token_id,
        eoi_token_id=tokenizer.end_image_token_id,
        video_token_id=tokenizer.video_token_id,
    )
    patches = {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 2}
    processor = transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(),
        transformers.Gemma4ImageProcessor(**patches),
        tokenizer,
        transformers.Gemma4VideoProcessor(**patches),
        image_seq_length=70,
        chat_template=CHAT_TEMPLATE,
    )
    return config, processor


PADDING: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "Idefics2": _idefics2,
    "LFM2-VL": _lfm2_vl,
    "Gemma 4": _gemma4,
}


def llava_onevision() -> Any:
    """A processor that makes 16 tokens of an image and one of a line's end, and more where a text shows no other."""
    tokenizer, side = image_tokenizer(), {"height": 28, "width": 28}
    images = transformers.LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=[[28, 28], [28, 56], [56, 28]])
    return transformers.LlavaOnevisionProcessor(
        images,
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=side),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )


def row_with_images(processor: Any, sizes: Sequence[tuple[int, int]]) -> Tokens:
    """A question about images of these sizes, in pixels, and its answer."""
    streams = [io.BytesIO() for _ in sizes]
    for size, stream in zip(sizes, streams, strict=True):
        Image.effect_noise(size, 90).save(stream, "PNG")
    asked = [*[{"type": "image"}] * len(sizes), {"type": "text", "text": "What is it?"}]
    chat = [{"role": "user", "content": asked}, {"role": "assistant", "content": "a cat"}]
    tokenizer, shown = processor.tokenizer, [stream.getvalue() for stream in streams]
    parts = sequences({"messages": chat}, "messages", tokenizer, "row 1", processor=processor, images=shown)
    return encode(parts, tokenizer)[0]
