"""A tokenizer for tiny models."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ALPHABET = pre_tokenizers.ByteLevel.alphabet()


def byte_level(texts: Iterable[str] = (), size: int = 2 + len(ALPHABET)) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most ``size`` tokens, learned from texts: ``<pad>`` is 0, ``<eos>`` is 1, any text is lossless."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<pad>", "<eos>"], initial_alphabet=ALPHABET, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
