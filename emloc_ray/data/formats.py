"""What a row means: text, prompt and completion, or chat messages, as token ids and a mask of completion tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from emloc_ray.errors import DataError

FIELDS = {"text": ("text",), "prompt_completion": ("prompt", "completion"), "messages": ("messages",)}


@dataclass(frozen=True)
class Tokens:
    """One row: token ids, and which of them are completion (what the task's loss counts)."""

    input_ids: list[int]
    completion_mask: list[bool]

    def __len__(self) -> int:
        return len(self.input_ids)


def check_row(row: dict[str, Any], format: str, where: str) -> None:
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


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: field 'messages' is not a list of turns: give [{{role, content}}, …].")
    for turn in messages:
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str) or turn.get("content") is None:
            raise DataError(f"{where}: a message lacks role or content: give [{{role, content}}, …].")
    if not any(turn["role"] == "assistant" for turn in messages):
        raise DataError(f"{where}: no message has role assistant: there is nothing to learn from it.")


def tokenize_row(row: dict[str, Any], format: str, tokenizer: Any, where: str) -> Tokens:
    """A checked row as tokens, ending in the end-of-sequence token, whole (see :func:`truncate`)."""
    if format == "text":
        ids = _with_eos(tokenizer(row["text"])["input_ids"], tokenizer)
        return Tokens(ids, [True] * len(ids))
    if format == "prompt_completion":
        prompt = _without_eos(tokenizer(row["prompt"])["input_ids"], tokenizer)
        completion = _with_eos(tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer)
        return Tokens(prompt + completion, [False] * len(prompt) + [True] * len(completion))
    return _tokenize_messages(row["messages"], tokenizer, where)


def _tokenize_messages(messages: list[dict[str, Any]], tokenizer: Any, where: str) -> Tokens:
    """Every assistant turn is completion: what the template adds between 'generate now' and the end of the turn.

    Prompt and completion are tokenized apart, as they are when the model is asked to generate.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{where}: the tokenizer has no chat template: use data.format prompt_completion or text.")
    ids: list[int] = []
    mask: list[bool] = []
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
        for segment, is_completion in ((prompt[len(text) :], False), (through[len(prompt) :], True)):
            part = tokenizer(segment, add_special_tokens=False)["input_ids"]
            ids += part
            mask += [is_completion] * len(part)
        text = through
    return Tokens(ids, mask)


def _with_eos(ids: list[int], tokenizer: Any) -> list[int]:
    eos = tokenizer.eos_token_id
    return ids if eos is None or (ids and ids[-1] == eos) else [*ids, eos]


def _without_eos(ids: list[int], tokenizer: Any) -> list[int]:
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def truncate(tokens: Tokens, max_seq_length: int) -> Tokens | None:
    """The first ``max_seq_length`` tokens, or None where no completion token is left."""
    cut = Tokens(tokens.input_ids[:max_seq_length], tokens.completion_mask[:max_seq_length])
    return cut if any(cut.completion_mask[1:]) else None


def pack(rows: list[Tokens], max_seq_length: int) -> list[Tokens]:
    """Joins whole rows, in order, into sequences of at most ``max_seq_length``; each sees the rows before it."""
    packed: list[Tokens] = []
    for row in rows:
        if packed and len(packed[-1]) + len(row) <= max_seq_length:
            last = packed.pop()
            row = Tokens(last.input_ids + row.input_ids, last.completion_mask + row.completion_mask)
        packed.append(row)
    return packed
