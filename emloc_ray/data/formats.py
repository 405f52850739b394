"""Rows as token ids and a mask of completion tokens: of text, of prompt and completion, or of chat messages."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from emloc_ray.data.chats import THOUGHTS, Segment, chat_sequences, is_trained
from emloc_ray.data.images import (
    NO_PROCESSOR,
    check_parts,
    decode,
    has_images,
    image_parts,
    plain_messages,
    text_messages,
)
from emloc_ray.data.text_rows import Row
from emloc_ray.errors import DataError
from emloc_ray.text import one_line

_ROLES = ("system", "developer", "user", "assistant", "tool")
_BORDER = "\n"  # after which every tokenizer begins a token, and in the middle of a text
MOST_CHARACTERS = 32  # of a token, at most: texts are cut to as many as can count before they are tokenized
_TEXTS = {"text": ("text",), "prompt_completion": ("prompt", "completion")}


class RowImage(NamedTuple):
    """An encoded image, in memory or in a mapped file; its last token is before the row's position ``end``."""

    content: bytes | memoryview
    end: int


@dataclass(frozen=True)
class Tokens:
    """One row: token ids, which of them are completion (the task's loss counts these), and its images; or rows joined into
    one sequence, of ``row_lengths`` tokens each."""

    input_ids: list[int]
    completion_mask: list[bool]
    images: tuple[RowImage, ...] = ()
    row_lengths: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)


def check_row(row: Row, kind: str, where: str, packing: bool = False) -> None:
    """Raises DataError, naming file, row and field, where the texts of a converted row are none, or it shows an image and
    is packed."""
    if kind == "messages":
        _check_messages(row["messages"], where)
        check_parts(row, where)
        if packing and has_images(row):
            raise DataError(
                f"{where}: it shows an image, and data.packing would separate the two: set data.packing to false."
            )
        return
    for name in _TEXTS[kind]:
        if not isinstance(row[name], str):
            raise DataError(f"{where}: field {name!r} is {type(row[name]).__name__}: it must be text.")
        if not row[name].strip():
            raise DataError(f"{where}: field {name!r} is empty: fill it or remove the row.")
        _check_unicode(row[name], f"{where}: field {name!r}")


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: field 'messages' is not a list of turns: give [{{role, content}}, …].")
    for turn in messages:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or turn.get("content") is None:
            raise DataError(f"{where}: a message lacks role or content: give [{{role, content}}, …].")
        meant = turn["role"].strip().lower()
        if meant in _ROLES and turn["role"] != meant:
            raise DataError(f"{where}: a message's role is {turn['role']!r}: write {meant}, of {', '.join(_ROLES)}.")
        if not isinstance(turn["content"], str | list):
            kind = type(turn["content"]).__name__
            raise DataError(f"{where}: a message's content is {kind}: give a text, or a list of parts.")
        if turn.get("weight") not in (None, 0, 1):
            raise DataError(f"{where}: a message's weight is {turn['weight']!r}: give 1, or 0 to leave it untrained.")
        for part in turn["content"] if isinstance(turn["content"], list) else [turn["content"]]:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                _check_unicode(text, f"{where}: a message")
    answers = [turn for turn in messages if turn["role"] == "assistant"]
    if not answers:
        have = ", ".join(dict.fromkeys(turn["role"] for turn in messages))
        raise DataError(
            f"{where}: no message has role assistant, but {have}: there is nothing to learn from it; roles are"
            f" {', '.join(_ROLES)}."
        )
    if any(is_trained(turn) and not _has_content(turn) for turn in answers):
        raise DataError(f"{where}: an assistant's message is empty: fill it, give it weight: 0, or remove the row.")
    if not any(is_trained(turn) for turn in answers):
        raise DataError(f"{where}: every assistant message has weight 0: there is nothing to learn from it.")


def _has_content(turn: dict[str, Any]) -> bool:
    """Whether a turn says anything: a text, another part, a call, a thought."""
    parts = turn["content"] if isinstance(turn["content"], list) else [turn["content"]]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    thoughts = [turn.get(key) or "" for key in THOUGHTS]
    return bool(turn.get("tool_calls")) or not all(
        isinstance(text, str) and not text.strip() for text in (*texts, *thoughts)
    )


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a pair, as JSON can escape it
        raise DataError(f"{where} holds {text[error.start]!r}, which is no character: remove it.") from error


def encode(rows: Sequence[Sequence[Segment]], tokenizer: Any) -> list[Tokens]:
    """Rows in pieces (see :func:`sequences`) as tokens, before :func:`truncate`: in two calls, faster than one by one."""
    begun = [s.text for parts in rows for s in parts if s.ids is None and s.add_special_tokens]
    others = [
        # What it follows in the same row; an encoder's text, which its end-of-sequence token ends, is one of its own.
        (s.text, parts[number - 1].text if number > 0 and parts[0].eos is not True else None)
        for parts in rows
        for number, s in enumerate(parts)
        if s.ids is None and not s.add_special_tokens
    ]
    encoded = {True: iter(_encode(tokenizer, begun, True)), False: iter(_encode_pieces(tokenizer, others))}
    return [_joined(parts, encoded, tokenizer) for parts in rows]


def sequences(
    row: Row,
    kind: str,
    tokenizer: Any,
    where: str,
    has_encoder: bool = False,
    processor: Any = None,
    images: Sequence[bytes] = (),
) -> list[list[Segment]]:
    """A checked row as one sequence or, where its chat template rewrites earlier turns, as several; each in pieces that are
    tokenized apart. ``images``: the encoded images of its messages.

    The chat template and the tokens of an image come from the model's ``processor``, where it has one for images. Raises
    DataError where there is no chat template, or it or the processor refuses the row.
    """
    if kind == "text":
        return [[Segment(row["text"], True, add_special_tokens=True, eos=True)]]
    if kind == "prompt_completion":
        prompt = Segment(row["prompt"], False, add_special_tokens=True, eos=has_encoder)
        return [[prompt, Segment(row["completion"], True, eos=True)]]
    if processor is None and has_images(row):
        raise DataError(f"{where}: it shows an image, and {NO_PROCESSOR}.")
    own = processor is not None and bool(processor.chat_template)
    as_parts = own or has_images(row)
    messages = plain_messages(row["messages"]) if as_parts else text_messages(row["messages"])
    chats = chat_sequences(messages, row.get("tools"), processor if own else tokenizer, where)
    for segment in itertools.chain.from_iterable(chats):  # templates write roles, tools and calls too
        _check_unicode(segment.text, f"{where}: its chat")
    if processor is None:
        return chats
    shown = iter(images)
    by_turn = [list(itertools.islice(shown, len(list(image_parts({"messages": [turn]}))))) for turn in messages]
    return [[_with_images(segment, by_turn, processor, where) for segment in segments] for segments in chats]


def _with_images(segment: Segment, by_turn: Sequence[Sequence[bytes]], processor: Any, where: str) -> Segment:
    """A segment that shows images gets the tokens that the processor makes of text and images."""
    own = [content for turn in segment.turns for content in by_turn[turn]]
    _check_placeholders(segment.text, len(own), processor, where)
    if not own:
        return segment
    try:
        shown = [decode(content) for content in own]
        made = processor(text=[segment.text], images=[shown], add_special_tokens=False)
    except (ValueError, TypeError, IndexError, StopIteration, RuntimeError) as error:
        raise DataError(
            f"{where}: the model's processor refuses its images ({one_line(error)}): fix the row, or the chat template."
        ) from error
    return segment._replace(ids=tuple(int(token) for token in made["input_ids"][0]), images=tuple(own))


def _check_placeholders(text: str, count: int, processor: Any, where: str) -> None:
    """Raises DataError where a text has more image tokens than images, or video tokens; the processor checks for fewer."""
    image, video = (getattr(processor, name, None) for name in ("image_token", "video_token"))
    in_text = text.count(image) if image else count
    # Gemma 3 replaces its image token by another, which no row's text may hold either.
    soft = getattr(processor.tokenizer, "image_token", None)
    others = [token for token in (video, soft if soft != image else None) if token and token in text]
    stray = image if in_text > count else next(iter(others), None)
    if stray is not None:
        raise DataError(
            f"{where}: a text holds {stray}, which stands for an image or a video: write it in another form."
        )


def _encode_pieces(tokenizer: Any, texts: list[tuple[str, str | None]]) -> list[list[int]]:
    """Encodes texts without special tokens; beside each is the text that it follows in its row. SentencePiece's tokenizers put
    a space before each text that they are given: what follows has it where the whole row's text has, which is behind a special
    token alone, and with some tokenizers (Mistral 7B's)."""
    if not _adds_a_space(tokenizer):
        return _encode(tokenizer, [text for text, _ in texts], False)
    special = getattr(tokenizer, "added_tokens_decoder", {}).values()
    added = sorted(special, key=lambda token: len(str(token)), reverse=True)

    def border_behind(before: str) -> str:
        # A token with rstrip takes the whitespace behind it.
        ends = ((str(token), before.rstrip() if token.rstrip else before) for token in added)
        return next((token for token, end in ends if end.endswith(token)), _BORDER)

    borders = ["" if before is None else border_behind(before) for _, before in texts]
    ids = {border: tokenizer(border, add_special_tokens=False)["input_ids"] if border else [] for border in {*borders}}
    encoded = _encode(tokenizer, [border + text for border, (text, _) in zip(borders, texts, strict=True)], False)

    def own(whole: list[int], text: str, border: list[int]) -> list[int]:
        if whole[: len(border)] == border:
            return whole[len(border) :]
        return _encode(tokenizer, [text], False)[0]  # it begins as the border does, and both are one token

    return [own(whole, text, ids[border]) for whole, (text, _), border in zip(encoded, texts, borders, strict=True)]


def _adds_a_space(tokenizer: Any) -> bool:
    """Whether it puts a space before a text, but not behind a border."""
    alone, border, behind = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("b", _BORDER, f"{_BORDER}b")
    )
    return behind[: len(border)] == border and behind[len(border) :] != alone


def _encode(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    if texts and getattr(tokenizer, "is_fast", False):
        encoded: list[list[int]] = tokenizer(
            texts, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False
        )["input_ids"]
        return encoded
    return [tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]


def _joined(parts: Sequence[Segment], encoded: dict[bool, Iterator[list[int]]], tokenizer: Any) -> Tokens:
    eos, bos = tokenizer.eos_token_id, getattr(tokenizer, "bos_token_id", None)
    input_ids: list[int] = []
    completion_mask: list[bool] = []
    images: list[RowImage] = []
    for part in parts:
        ids = next(encoded[part.add_special_tokens]) if part.ids is None else list(part.ids)
        ends = bool(ids) and ids[-1] == eos
        if part.add_special_tokens and bos is not None and ids[:2] == [bos, bos]:  # the text begins with its own
            ids = ids[1:]
        if part.eos is True and eos is not None and not ends:
            ids = [*ids, eos]
        elif part.eos is False and ends and (ids[-2:] == [eos, eos] or not _ends_itself(part.text, tokenizer)):
            ids = ids[:-1]
        input_ids += ids
        completion_mask += [part.is_completion] * len(ids)
        images += [RowImage(content, len(input_ids)) for content in part.images]
    return Tokens(input_ids, completion_mask, tuple(images))


def _ends_itself(text: str, tokenizer: Any) -> bool:
    """Whether a text ends with the end-of-sequence token, as somebody wrote it."""
    eos: str | None = getattr(tokenizer, "eos_token", None)
    return eos is not None and text.endswith(eos)


def truncate(tokens: Tokens, max_seq_length: int) -> Tokens | None:
    """The first ``max_seq_length`` tokens; None where no completion token is left, or an image would be cut."""
    if any(image.end > max_seq_length for image in tokens.images):
        return None
    ids, mask = tokens.input_ids[:max_seq_length], tokens.completion_mask[:max_seq_length]
    return replace(tokens, input_ids=ids, completion_mask=mask) if any(mask[1:]) else None


def pack(rows: Iterable[Tokens], max_seq_length: int) -> Iterator[Tokens]:
    """Joins whole rows, in order, into sequences of at most ``max_seq_length``; each sees the rows before it."""
    last: Tokens | None = None
    for row in rows:
        if last is not None and len(last) + len(row) <= max_seq_length:
            last = Tokens(last.input_ids + row.input_ids, last.completion_mask + row.completion_mask)
            continue
        if last is not None:
            yield last
        last = row
    if last is not None:
        yield last
