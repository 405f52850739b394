"""What a row means: text, prompt and completion, or chat messages, as token ids and a mask of completion tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from emloc_ray.data.reading import Row
from emloc_ray.errors import DataError

FIELDS = {"text": ("text",), "prompt_completion": ("prompt", "completion"), "messages": ("messages",)}


@dataclass(frozen=True)
class Tokens:
    """One row: token ids, and which of them are completion (what the task's loss counts)."""

    input_ids: list[int]
    completion_mask: list[bool]

    def __len__(self) -> int:
        return len(self.input_ids)


def check_row(row: Row, format: str, where: str) -> None:
    """Raises DataError, naming file, row and field, where a row is not of its format."""
    for field in FIELDS[format]:
        if field in row and row[field] is None:
            raise DataError(f"{where}: field {field!r} is null: fill it or remove the row.")
        if field not in row:
            have = ", ".join(sorted(row)) or "none"
            raise DataError(f"{where}: no field {field!r} (it has {have}): data.format {format} needs it.")
    if format == "messages":
        _check_messages(row["messages"], where)
        return
    for field in FIELDS[format]:
        if not isinstance(row[field], str):
            raise DataError(f"{where}: field {field!r} is {type(row[field]).__name__}: it must be text.")
        if not row[field].strip():
            raise DataError(f"{where}: field {field!r} is empty: fill it or remove the row.")
        _check_unicode(row[field], f"{where}: field {field!r}")


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: field 'messages' is not a list of turns: give [{{role, content}}, …].")
    for turn in messages:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or turn.get("content") is None:
            raise DataError(f"{where}: a message lacks role or content: give [{{role, content}}, …].")
        if isinstance(turn["content"], str):
            _check_unicode(turn["content"], f"{where}: a message")
    if not any(turn["role"] == "assistant" for turn in messages):
        raise DataError(f"{where}: no message has role assistant: there is nothing to learn from it.")


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a pair, as JSON can escape it
        raise DataError(f"{where} holds {text[error.start]!r}, which is no character: remove it.") from error


class _Segment(NamedTuple):
    """A piece of a row that is tokenized by itself; ``eos`` says what its last token must be, None: as it comes."""

    text: str
    is_completion: bool
    add_special_tokens: bool = False
    eos: bool | None = None


def tokenize_row(row: Row, format: str, tokenizer: Any, where: str) -> Tokens:
    """A checked row as tokens, ending in the end-of-sequence token, whole (see :func:`truncate`)."""
    return tokenize_rows([(where, row)], format, tokenizer)[0]


def tokenize_rows(
    rows: Iterable[tuple[str, Row]], format: str, tokenizer: Any, has_encoder: bool = False
) -> list[Tokens]:
    """Checked rows, each with the place that errors name, as tokens: what each would be alone, in two calls for all.

    For a model that ``has_encoder``, which reads the prompt apart, that ends in an end-of-sequence token of its own.
    Of rows of fifty tokens a fast tokenizer takes 1.4 times as many a second so, measured on one CPU.
    """
    cut = [_segments(row, format, tokenizer, where, has_encoder) for where, row in rows]
    encoded: dict[bool, Iterator[list[int]]] = {}
    for special in (True, False):
        texts = [part.text for parts in cut for part in parts if part.add_special_tokens == special]
        encoded[special] = iter(_encode(tokenizer, texts, special))
    return [_joined(parts, encoded, tokenizer.eos_token_id) for parts in cut]


def _segments(row: Row, format: str, tokenizer: Any, where: str, has_encoder: bool) -> list[_Segment]:
    if format == "text":
        return [_Segment(row["text"], True, add_special_tokens=True, eos=True)]
    if format == "prompt_completion":
        prompt = _Segment(row["prompt"], False, add_special_tokens=True, eos=has_encoder)
        return [prompt, _Segment(row["completion"], True, eos=True)]
    return _message_segments(row["messages"], tokenizer, where)


def _message_segments(messages: list[dict[str, Any]], tokenizer: Any, where: str) -> list[_Segment]:
    """Every assistant turn is completion: what the template adds between 'generate now' and the end of the turn.

    Prompt and completion are tokenized apart, as they are when the model is asked to generate.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{where}: the tokenizer has no chat template: use data.format prompt_completion or text.")
    segments = []
    text = ""
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        through = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        if not prompt.startswith(text) or not through.startswith(prompt):
            raise DataError(
                f"{where}: the chat template rewrites earlier turns, so completion tokens cannot be told apart:"
                " give one assistant message a row, as the last."
            )
        segments += [_Segment(prompt[len(text) :], False), _Segment(through[len(prompt) :], True)]
        text = through
    return segments


def _encode(tokenizer: Any, texts: list[str], special: bool) -> list[list[int]]:
    if texts and getattr(tokenizer, "is_fast", False):
        encoded: list[list[int]] = tokenizer(
            texts, add_special_tokens=special, return_attention_mask=False, return_token_type_ids=False
        )["input_ids"]
        return encoded
    return [tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts]


def _joined(parts: list[_Segment], encoded: dict[bool, Iterator[list[int]]], eos: int | None) -> Tokens:
    input_ids: list[int] = []
    completion_mask: list[bool] = []
    for part in parts:
        ids = next(encoded[part.add_special_tokens])
        ends = bool(ids) and ids[-1] == eos
        if part.eos is True and eos is not None and not ends:
            ids = [*ids, eos]
        elif part.eos is False and ends:
            ids = ids[:-1]
        input_ids += ids
        completion_mask += [part.is_completion] * len(ids)
    return Tokens(input_ids, completion_mask)


def truncate(tokens: Tokens, max_seq_length: int) -> Tokens | None:
    """The first ``max_seq_length`` tokens, or None where no completion token is left."""
    cut = Tokens(tokens.input_ids[:max_seq_length], tokens.completion_mask[:max_seq_length])
    return cut if any(cut.completion_mask[1:]) else None


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
