"""The formats that people's rows have, and how each becomes text, prompt and completion, or chat messages."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from emloc_ray.data.images import COLUMNS
from emloc_ray.data.text_rows import Row
from emloc_ray.errors import DataError


class RowFormat(NamedTuple):
    """The columns that a format's rows need, and those that they may have beside them."""

    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()


FORMATS = {
    "messages": RowFormat(("messages",), ("tools", *COLUMNS)),
    "sharegpt": RowFormat(("conversations",), ("system", "tools", *COLUMNS)),
    "conversational": RowFormat(("prompt", "completion"), ("tools", *COLUMNS)),
    "prompt_completion": RowFormat(("prompt", "completion")),
    "alpaca": RowFormat(("instruction", "output"), ("input", "system", "history")),
    "text": RowFormat(("text",)),
}
"""The formats by name, in the order in which a row is tried for them: messages come before the text that someone made of them."""
CHATS = frozenset({"messages", "sharegpt", "conversational"})
"""The formats that need a chat template."""

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
# Columns of other names in public data sets: what of ours they are.
_LIKELY: tuple[dict[str, str], ...] = (
    {"instruction": "instruction", "input": "context", "output": "response"},
    *(
        {"prompt": prompt, "completion": completion}
        for prompt, completion in (
            ("prompt", "completion"),
            ("question", "answer"),
            ("query", "response"),
            ("prompt", "response"),
            ("instruction", "response"),
            ("input", "output"),
            ("input", "target"),
            ("article", "highlights"),
            ("document", "summary"),
            ("source", "target"),
        )
    ),
)


def columns_of(format: str, columns: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The file's columns that rows of a format need, and those that they may have; none of either where it is unknown."""
    form = FORMATS.get(format, RowFormat(()))
    needed, optional = ([columns.get(name, name) for name in names] for names in form)
    return needed, optional


def recognized(row: Row, columns: Mapping[str, str]) -> str | None:
    """The format of a row by its columns; None where it has none that is known, or a label judges its answer. Where columns are
    mapped, only a format that takes a mapped one counts, and no label does."""
    given = renamed(row, columns)
    for name, form in FORMATS.items():
        is_meant = not columns or bool({*form.needed, *form.optional} & columns.keys())
        if not is_meant or not given.keys() >= {*form.needed}:
            continue
        if not columns and name in ("conversational", "prompt_completion") and _is_judged(row):
            return None
        if name == "conversational" and not any(_is_chat(given[key]) for key in form.needed):
            continue
        return name
    return None


def renamed(row: Row, columns: Mapping[str, str]) -> Row:
    """A row whose columns have our names."""
    others = {name: value for name, value in row.items() if name not in columns.values()}
    return {**others, **{ours: row[theirs] for ours, theirs in columns.items() if theirs in row}}


def unknown_format(row: Row, columns: Mapping[str, str], where: str) -> DataError:
    """Says that a row has no known format, and how its columns could be mapped."""
    names = [str(name) for name in row]
    missing = [theirs for theirs in columns.values() if theirs not in row]
    have = ", ".join(sorted(names)) or "none"
    if missing:
        return DataError(f"{where}: no column {missing[0]!r} (it has {have}): fix data.columns, which names it.")
    if {"chosen", "rejected"} <= row.keys():
        if "prompt" in row:
            named, columns = "prompt and chosen are", {"prompt": "prompt", "completion": "chosen"}
        else:
            named, columns = "chosen is", {"messages" if _is_chat(row["chosen"]) else "text": "chosen"}
        return DataError(
            f"{where}: preference data: {named} trained on with data.columns: {_written(columns)}; preference losses are not"
            " here yet."
        )
    if _is_judged(row):
        return DataError(
            f"{where}: preference data: keep the rows whose label is true, which are trained on with data.columns:"
            " {prompt: prompt, completion: completion}; preference losses are not here yet."
        )
    if not any(isinstance(value, str) for value in row.values()):
        for name, value in row.items():
            if _is_chat(value) and not {"role", "from", "content", "value"} & value[0].keys():
                return DataError(
                    f"{where}: its column {name!r} holds rows: write these alone, an object a line or one array."
                )
    return DataError(
        f"{where}: its columns ({have}) are of no known format: map them with data.columns, such as {_written(_likely(row))}."
    )


def _likely(row: Row) -> dict[str, str]:
    """Columns of a row that may be ours: by their names, or by what they hold."""
    names = {str(name).strip().lower(): str(name) for name in row}
    for likely in _LIKELY:
        if {*likely.values()} <= names.keys():
            return {ours: names[theirs] for ours, theirs in likely.items()}
    if chats := [str(name) for name, value in row.items() if _is_chat(value)]:
        return {"messages": chats[0]}
    texts = [str(name) for name, value in row.items() if isinstance(value, str)]
    if len(texts) == 1:
        return {"text": texts[0]}
    return dict(zip(("prompt", "completion"), texts[:2] or ("question", "answer"), strict=True))


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def _is_judged(row: Row) -> bool:
    """Whether a label says if its answer is good, as of TRL's unpaired preference data."""
    return {"prompt", "completion"} <= row.keys() and isinstance(row.get("label"), bool)


def _written(columns: Mapping[str, str]) -> str:
    """Columns as a config has them."""
    texts = {
        ours: theirs if re.fullmatch(r"[\w.]+", theirs) else json.dumps(theirs) for ours, theirs in columns.items()
    }
    return f"{{{', '.join(f'{ours}: {theirs}' for ours, theirs in texts.items())}}}"


def converted(row: Row, format: str, columns: Mapping[str, str], where: str, chats: bool = True) -> tuple[Row, str]:
    """A row as text, prompt and completion, or messages, and which of these it is.

    ``chats``: whether the model has a chat template; without one, Alpaca's rows get Alpaca's own prompt. Raises DataError,
    naming file, row and field, where it has not this format; its texts are left to ``check_row``.
    """
    if format == "auto":
        format = recognized(row, columns) or "auto"
        if format == "auto":
            raise unknown_format(row, columns, where)
    given = renamed(row, columns)
    for name in FORMATS[format].needed:
        theirs = columns.get(name, name)
        if name in given and given[name] is None:
            raise DataError(f"{where}: field {theirs!r} is null: fill it or remove the row.")
        if name not in given:
            have, of = ", ".join(sorted(map(str, row))) or "none", recognized(row, columns)
            other = f"set data.format: {of} where all rows are of that, " if of else ""
            raise DataError(
                f"{where}: no field {theirs!r} (it has {have}), which rows of format {format} need: give it, {other}or put rows"
                " of another format into a file of their own."
            )
    if format not in _CONVERSIONS:
        return given, format
    return _CONVERSIONS[format](given, where, chats)


def _messages(row: Row, where: str, chats: bool) -> tuple[Row, str]:
    turns = row["messages"]
    turns = _turns(turns, where) if isinstance(turns, list) else turns
    return {**row, "messages": turns, **_tools(row, where)}, "messages"


def _turns(turns: list[Any], where: str) -> list[Any]:
    return [_turn(_shared_turn(turn), where) if isinstance(turn, dict) else turn for turn in turns]


def _turn(turn: dict[str, Any], where: str) -> dict[str, Any]:
    """A turn without empty fields, which Parquet gives to turns that lack them, and to calls; the arguments of these as objects,
    which templates write themselves."""
    filled = {key: value for key, value in turn.items() if value is not None}
    if filled.get("function_call"):
        raise DataError(
            f"{where}: function_call is OpenAI's older form of a call: write it as tool_calls:"
            " [{function: {name, arguments}}], its result as role tool, and functions as tools."
        )
    calls = filled.get("tool_calls")
    if not calls:
        filled.pop("tool_calls", None)
        return filled
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise DataError(f"{where}: tool_calls is no list of calls: give [{{function: {{name, arguments}}}}, …].")
    try:
        return {"content": "", **filled, "tool_calls": [_call(call) for call in calls]}
    except RecursionError as error:
        raise DataError(f"{where}: tool_calls is nested too deeply: write the calls' arguments flatter.") from error


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict):
        return _call({"type": "function", "function": call})
    arguments = function.get("arguments")
    read = _read(arguments) if isinstance(arguments, str) else _without_nulls(arguments)
    return {**call, "function": {**function, "arguments": read}}


def _read(value: Any) -> Any:
    """The object that a text of JSON holds; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return read if isinstance(read, dict | list) else value


def _tools(row: Row, where: str) -> dict[str, Any]:
    if not row.get("tools"):
        return {"tools": None}
    tools = _read(row["tools"])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: field 'tools' is no list of tools: give their JSON schemas.")
    try:
        filled = _without_nulls(tools)
    except RecursionError as error:
        raise DataError(f"{where}: field 'tools' is nested too deeply: write the tools' schemas flatter.") from error
    return {"tools": tools if isinstance(row["tools"], str) else filled}  # the nulls of a text were written on purpose


def _without_nulls(value: Any) -> Any:
    """An object without the nulls that Parquet, and what is written of it, puts where those of other rows have a key."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _sharegpt(row: Row, where: str, chats: bool) -> tuple[Row, str]:
    turns = row["conversations"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f"{where}: field 'conversations' is not a list of turns: give [{{from, value}}, …].")
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    return _messages({**row, "messages": [*system, *turns]}, where, chats)


def _shared_turn(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn of ShareGPT's, whatever its column is called, as a message."""
    if turn.get("from") is None or "role" in turn:
        return turn
    role, value = turn["from"], turn.get("value")
    rest = {key: turn[key] for key in turn.keys() - {"from", "value"}}
    calls = _read(value) if role == "function_call" else None
    if isinstance(calls, dict | list):
        return {**rest, "role": "assistant", "tool_calls": calls if isinstance(calls, list) else [calls]}
    names = _ROLES | {"function_call": "assistant"}
    return {**rest, "role": names.get(role.lower(), role.lower()) if isinstance(role, str) else role, "content": value}


def _conversational(row: Row, where: str, chats: bool) -> tuple[Row, str]:
    """The prompt's own assistant turns are not trained on."""
    before, after = (
        [{"role": role, "content": row[name]}] if isinstance(row[name], str) else row[name]
        for name, role in (("prompt", "user"), ("completion", "assistant"))
    )
    if not isinstance(before, list) or not isinstance(after, list):
        raise DataError(f"{where}: prompt or completion is no list of turns: give [{{role, content}}, …].")
    before, after = _turns(before, where), _turns(after, where)
    repeated = _repeated(before, after)
    asked = [
        {**turn, "weight": 0} if isinstance(turn, dict) and turn.get("role") == "assistant" else turn
        for turn in max(after[:repeated], before, key=len)
    ]
    return _messages({**row, "messages": [*asked, *after[repeated:]]}, where, chats)


def _repeated(before: list[Any], after: list[Any]) -> int:
    """How many turns of a completion lead up to the answer, where it is the whole chat, as the chosen one of preference data
    is; the prompt may then be the last of these turns alone."""
    if after[: len(before)] == before:
        return len(before)
    if not after or not isinstance(after[0], dict) or after[0].get("role") in ("assistant", "tool"):
        return 0  # what follows a prompt may repeat its last turn
    return next((count for count in range(len(after) - 1, 0, -1) if after[count - 1] == before[-1]), 0)


def _alpaca(row: Row, where: str, chats: bool) -> tuple[Row, str]:
    for name in ("instruction", "output", "input", "system"):
        if not isinstance(row.get(name), str) and (name in FORMATS["alpaca"].needed or row.get(name) is not None):
            raise DataError(f"{where}: field {name!r} is {type(row[name]).__name__}: it must be text.")
    for name in ("instruction", "output"):
        if not row[name].strip():
            raise DataError(f"{where}: field {name!r} is empty: fill it or remove the row.")
    instruction, given, system = row["instruction"], row.get("input") or "", row.get("system") or ""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(_is_pair(pair) for pair in history):
        raise DataError(f"{where}: field 'history' is no list of pairs: give [[instruction, output], …].")
    if chats:
        turns: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        for asked, answered in (*history, (f"{instruction}\n{given}" if given else instruction, row["output"])):
            turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return {"messages": turns, "tools": None}, "messages"
    before = "".join(f"{alpaca_prompt(asked)}{answered}\n\n" for asked, answered in history)
    prompt = before + alpaca_prompt(instruction, given)
    return {"prompt": f"{system}\n\n{prompt}" if system else prompt, "completion": row["output"]}, "prompt_completion"


def alpaca_prompt(instruction: str, given: str = "") -> str:
    """What Alpaca's own models are asked (tatsu-lab/stanford_alpaca), for a tokenizer without a chat template; ``given`` is a
    row's ``input``."""
    paired = ", paired with an input that provides further context" if given else ""
    shown = f"### Input:\n{given}\n\n" if given else ""
    return (
        f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{shown}### Response:\n"
    )


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


_CONVERSIONS: dict[str, Callable[[Row, str, bool], tuple[Row, str]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "conversational": _conversational,
    "alpaca": _alpaca,
}
