"""Chats as pieces of text that are tokenized apart, by the model's own chat template."""

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from emloc_ray.errors import DataError
from emloc_ray.text import one_line

THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""The keys in which a turn has its thoughts, of which a template knows one."""
_OTHER = "\ue000"  # an answer that shares no first character with another
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
_THOUGHT = re.compile(r"(</?think>)")


class _Refused(DataError):
    """A template refuses a chat, or leaves out part of it."""


class Segment(NamedTuple):
    """A piece of a row that is tokenized alone; ``eos``: whether its last token must be the end-of-sequence token, None: as it
    comes.

    ``ids`` are its tokens where a processor made them, for a text that shows ``images``; ``turns`` are those of the chat whose
    images it shows.
    """

    text: str
    is_completion: bool
    add_special_tokens: bool = False
    eos: bool | None = None
    ids: tuple[int, ...] | None = None
    images: tuple[bytes, ...] = ()
    turns: range = range(0)


def is_trained(turn: dict[str, Any]) -> bool:
    """Whether an assistant's turn is learnt: OpenAI's ``weight: 0`` leaves one out."""
    return turn.get("weight") != 0


def chat_sequences(messages: Sequence[dict[str, Any]], tools: Any, owner: Any, where: str) -> list[list[Segment]]:
    """Prompts and completions in turn: an assistant turn's completion is what the template adds after 'generate now', or
    what its generation markers enclose.

    One sequence, in which each turn sees those before it as they were trained. A template that rewrites earlier turns, as those
    of reasoning models drop what was thought, gives a turn another prefix than that: there a sequence begins anew with the
    prefix that generation would start from, and it is the later turn's alone. Raises DataError, naming file and row, where
    there is no template, or it refuses the messages.
    """
    if not getattr(owner, "chat_template", None):
        raise DataError(f"{where}: the tokenizer has no chat template: use data.format prompt_completion or text.")
    trained = [is_trained(turn) for turn in messages]
    refusals = []
    for form in _forms([{k: v for k, v in turn.items() if k != "weight"} for turn in messages]):
        try:
            return _in_turns(_Chat(form, tools, owner, where), trained)
        except _Refused as refusal:
            refusals.append(refusal)
    raise refusals[0]


def _forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """A chat as one template or another takes the arguments of calls: as objects, or as texts of JSON (DeepSeek-V3)."""
    yield messages
    if any(turn.get("tool_calls") for turn in messages):
        yield [_with_texts(turn) for turn in messages]


def _with_texts(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn whose calls have their arguments as texts of JSON."""
    if not turn.get("tool_calls"):
        return turn

    def text(call: dict[str, Any]) -> dict[str, Any]:
        arguments = call["function"].get("arguments")
        if not isinstance(arguments, str):
            with contextlib.suppress(RecursionError, ValueError):
                arguments = json.dumps(arguments, ensure_ascii=False, default=str)
        return {**call, "function": {**call["function"], "arguments": arguments}}

    return {**turn, "tool_calls": [text(call) for call in turn["tool_calls"]]}


def _in_turns(chat: "_Chat", trained: Sequence[bool]) -> list[list[Segment]]:
    sequences: list[list[Segment]] = []
    text, begin = "", 0  # of the sequence so far: its text, and the turns that it shows
    for turn, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        prompt, answer = chat.until(turn, trained[turn])
        through = prompt + "".join(segment.text for segment in answer)
        if not sequences or not prompt.startswith(text):
            if not trained[turn]:
                text, begin = through, turn + 1
                sequences.append([Segment(through, False, turns=range(turn + 1))])
                continue
            sequences.append([])
            text, begin = "", 0
        sequences[-1].append(Segment(prompt[len(text) :], False, turns=range(begin, turn)))
        if not trained[turn]:
            answer = [segment._replace(is_completion=False) for segment in answer]
        sequences[-1] += [*(segment._replace(turns=range(turn, turn + 1)) for segment in answer[:1]), *answer[1:]]
        text, begin = through, turn + 1
    return [segments for segments in sequences if any(segment.is_completion for segment in segments)]


def _marked(text: str, begin: int, spans: Sequence[tuple[int, int]]) -> list[Segment]:
    """The text from ``begin`` on, cut at the spans that the template marks as generated."""
    segments, at = [], begin
    for start, end in spans:
        start, end = max(start, at), max(end, at)
        segments += [Segment(text[at:start], False), Segment(text[start:end], True)]
        at = end
    segments.append(Segment(text[at:], False))
    return [segment for segment in segments if segment.text]


def _shared(one: str, other: str) -> str:
    """What both texts begin with."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return one[: len(list(same))]


def _names(tools: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the functions that tools, or calls, are of; a tool of another kind has none."""
    functions = [tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in tools]
    return [function["name"] for function in functions if isinstance(function.get("name"), str)]


def _pieces(content: Any) -> Iterator[tuple[str, Any]]:
    """The words of a turn, thought and said, each with the content that has others in their place."""
    if isinstance(content, str):
        parts = _THOUGHT.split(content)
        for number in range(0, len(parts), 2):
            if words := parts[number].strip():
                yield words, "".join([*parts[:number], _OTHER, *parts[number + 1 :]])
        return
    for number, part in enumerate(content):
        for words, other in _pieces(part.get("text", "")):
            yield words, [*content[:number], {**part, "text": other}, *content[number + 1 :]]


class _Chat:
    """The texts that a template makes of the beginnings of a chat."""

    def __init__(self, messages: Sequence[dict[str, Any]], tools: Any, owner: Any, where: str) -> None:
        self.messages, self.owner, self.where = messages, owner, where
        self.options = {"tools": tools} if tools else {}
        self.is_marked = isinstance(owner.chat_template, str) and bool(_MARKER.search(owner.chat_template))

    def until(self, turn: int, is_trained: bool) -> tuple[str, list[Segment]]:
        """What generation of an assistant's turn starts from, and the answer, of which completion is what the template marks."""
        if turn == 0:
            raise DataError(
                f"{self.where}: its first message is the assistant's, which answers nothing: put a user's before it, or remove"
                " it."
            )
        prompt = self._text(self.messages[:turn], add_generation_prompt=True)
        self._check_asked(turn, prompt)
        through = self._text(self.messages[: turn + 1])
        spans = self._spans(turn) if self.is_marked else None
        prompt, begin = self._border(turn, prompt, through, spans)
        self._check_calls(turn, through)
        if is_trained:
            self._check_words(turn, through, through[begin:])
        return prompt, [Segment(through[begin:], True)] if spans is None else _marked(through, begin, spans)

    def _border(self, turn: int, prompt: str, through: str, spans: Sequence[tuple[int, int]] | None) -> tuple[str, int]:
        """The prompt of an assistant's turn, and where its answer begins in the text through it.

        Where a template opens the thinking of the turn to be generated, which the turn itself does not have, the prompt is what
        both begin with. Where the answer has it rewrite earlier turns, as gpt-oss' drops what was thought before a call, the
        prompt stays, and the answer is what follows that which opens its turn, or its first mark.
        """
        if through.startswith(prompt):
            return prompt, len(prompt)
        before = self._text(self.messages[:turn])
        # An answer may begin with the same characters as the thought: where another one begins shows the border.
        own = self._shared_with_other(turn, through, turn)
        shared = _shared(prompt, through[:own])
        if len(shared) > len(before):
            return shared, len(shared)
        opening = prompt.removeprefix(before)
        at = through.rfind(opening, self._shared_with_other(turn, through, turn - 1), own)
        if opening and at >= 0:
            return prompt, at + len(opening)
        if spans is not None:
            begin = min([own, *(start for start, end in spans if end > own)])
            return through[:begin], begin
        raise DataError(
            f"{self.where}: the chat template writes an answer in another place than it asks for one, so that"
            " completion tokens cannot be found: mark them with {% generation %} in the template."
        )

    def _shared_with_other(self, turn: int, through: str, number: int) -> int:
        """Where the text through a turn shows another content of one message first."""
        message = self.messages[number]
        content = [{"type": "text", "text": _OTHER}] if isinstance(message["content"], list) else _OTHER
        # An answer of words alone, which any template takes.
        other = {"role": "assistant", "content": content} if number == turn else {**message, "content": content}
        return len(
            _shared(through, self._text([*self.messages[:number], other, *self.messages[number + 1 : turn + 1]]))
        )

    def _check_asked(self, turn: int, prompt: str) -> None:
        """Raises DataError where the template leaves out what an answer is to."""
        if any(name not in prompt for name in _names(self.options.get("tools", ()))):
            raise self._unwritten("tools")
        before = max((n for n in range(turn) if self.messages[n]["role"] == "assistant"), default=-1)
        for number in range(before + 1, turn):
            content = self.messages[number]["content"]
            is_missing = isinstance(content, str) and content.strip() not in prompt
            if is_missing and self._is_same(prompt, number, turn, {"content": _OTHER}, add_generation_prompt=True):
                raise self._unwritten(f"turns of role {self.messages[number]['role']}")

    def _check_calls(self, turn: int, through: str) -> None:
        """Raises DataError where the template leaves out a call of an answer."""
        calls = self.messages[turn].get("tool_calls", ())
        for number, call in enumerate(calls):
            other = {**call, "function": {**call["function"], "name": _OTHER}}
            others = [*calls[:number], other, *calls[number + 1 :]]
            if self._is_same(through, turn, turn + 1, {"tool_calls": others}):
                raise self._unwritten("tool calls")

    def _check_words(self, turn: int, through: str, answer: str) -> None:
        """Raises DataError where the template leaves out words of an answer that is learnt, thought or said."""
        message = self.messages[turn]
        for words, other in _pieces(message["content"]):
            if words not in answer and self._is_same(through, turn, turn + 1, {"content": other}):
                said = "words beside tool calls" if message.get("tool_calls") else "turns of role assistant"
                raise self._unwritten("thoughts" if "</think>" in str(message["content"]) else said)
        for key in THOUGHTS:
            thought = message.get(key) or ""
            if str(thought).strip() not in answer and self._is_same(through, turn, turn + 1, {key: _OTHER}):
                raise self._unwritten(f"thoughts given as {key}")

    def _is_same(self, text: str, turn: int, end: int, change: dict[str, Any], **options: Any) -> bool:
        """Whether the text of the first ``end`` messages does not show a change of one: what it changes is not written."""
        changed = {**self.messages[turn], **change}
        try:
            return bool(self._text([*self.messages[:turn], changed, *self.messages[turn + 1 : end]], **options) == text)
        except _Refused:  # it wants what was there
            return False

    def _unwritten(self, what: str) -> _Refused:
        return _Refused(
            f"{self.where}: the model's chat template writes no {what}: leave them out, or choose a model whose template"
            " writes them."
        )

    def _spans(self, turn: int) -> list[tuple[int, int]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        # A processor has none of its own.
        named = self.owner if hasattr(self.owner, "special_tokens_map") else self.owner.tokenizer
        (_,), (spans,) = self._guarded(
            lambda: render_jinja_template(
                conversations=[list(self.messages[: turn + 1])],
                chat_template=self.owner.chat_template,
                return_assistant_tokens_mask=True,
                **self.options,
                **named.special_tokens_map,
            )
        )
        return [(int(start), int(end)) for start, end in spans]

    def _text(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        return self._guarded(
            lambda: self.owner.apply_chat_template(list(messages), tokenize=False, **self.options, **options)
        )

    def _guarded(self, write: Callable[[], Any]) -> Any:
        try:
            return write()
        except Exception as error:  # a template is a program and may raise anything
            raise _Refused(
                f"{self.where}: the chat template refuses its messages ({one_line(error)}): fix the row."
            ) from error
