"""Rows as people have them, told apart by their columns, and what each becomes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tiny import bracketed, make_tokenizer
from tokenizers.processors import TemplateProcessing

from emloc_ray.data.formats import check_row, encode, sequences
from emloc_ray.data.row_formats import converted, recognized, unknown_format
from emloc_ray.errors import DataError

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": None}}}
SHARED = {"from": "human", "value": "a"}
ALPACA = "Below is an instruction that describes a task"

CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"text": "a b"}, "text", "[a b<eos>]"),
    ({"prompt": "a", "completion": "b", "text": "ab"}, "prompt_completion", "a[b<eos>]"),
    ({"messages": [USER, ANSWER], "text": "ab"}, "messages", "<|user|>a<eos><|assistant|>[b<eos>]"),
    ({"prompt": [USER], "completion": [ANSWER]}, "conversational", "<|user|>a<eos><|assistant|>[b<eos>]"),
    (
        {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},  # what the prompt says is not trained on
        "conversational",
        "<|user|>a<eos><|assistant|>b<eos><|user|>a<eos><|assistant|>[b<eos>]",
    ),
    (
        {"prompt": [SHARED, {"from": "gpt", "value": "b"}, SHARED], "completion": [{"from": "gpt", "value": "b"}]},
        "conversational",
        "<|user|>a<eos><|assistant|>b<eos><|user|>a<eos><|assistant|>[b<eos>]",
    ),
    (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
        "sharegpt",
        "<|system|>s<eos><|user|>a<eos><|assistant|>[b<eos>]",
    ),
    ({"conversations": [USER, ANSWER]}, "sharegpt", "<|user|>a<eos><|assistant|>[b<eos>]"),
    (
        {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        "messages",
        "<|user|>a<eos><|assistant|>[b<eos>]",
    ),
    (
        {"instruction": "a", "input": "c", "output": "b"},
        "alpaca",
        "<|user|>a\nc<eos><|assistant|>[b<eos>]",
    ),
    (
        {"instruction": "a", "input": "", "output": "b", "history": [["x", "y"]]},
        "alpaca",
        "<|user|>x<eos><|assistant|>[y<eos>]<|user|>a<eos><|assistant|>[b<eos>]",
    ),
    (
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]},
        "messages",
        "<|user|>a<eos><|assistant|>b<eos><|user|>a<eos><|assistant|>[b<eos>]",
    ),
    (
        {"instruction": "a", "input": "", "output": "b", "system": "s"},
        "alpaca",
        "<|system|>s<eos><|user|>a<eos><|assistant|>[b<eos>]",
    ),
    (
        {"conversations": [SHARED, {"from": "gpt", "value": "b", "weight": 0}, {"from": "User", "value": "a"}, ANSWER]},
        "sharegpt",
        "<|user|>a<eos><|assistant|>b<eos><|user|>a<eos><|assistant|>[b<eos>]",
    ),
    (
        {"messages": [USER, {**ANSWER, "weight": 1}, USER, {**ANSWER, "weight": 0}, USER, ANSWER]},
        "messages",
        "<|user|>a<eos><|assistant|>[b<eos>]<|user|>a<eos><|assistant|>b<eos><|user|>a<eos><|assistant|>[b<eos>]",
    ),
]


def written(row: dict[str, Any], format: str = "auto", tokenizer: Any = None, **columns: str) -> str:
    """A row's sequences as text, what is learnt in brackets, a line each."""
    tokenizer = tokenizer or make_tokenizer()
    row, kind = converted(row, format, columns, "f.jsonl, row 4", bool(tokenizer.chat_template))
    check_row(row, kind, "f.jsonl, row 4")
    made = sequences(row, kind, tokenizer, "f.jsonl, row 4")
    return "\n".join(bracketed(tokens, tokenizer) for tokens in encode(made, tokenizer))


@pytest.mark.parametrize(("row", "format", "text"), CASES)
def test_a_row_is_told_by_its_columns(row: dict[str, Any], format: str, text: str) -> None:
    assert recognized(row, {}) == format
    assert written(row) == written(row, format) == text


@pytest.mark.parametrize("with_input", [False, True])
def test_alpaca_without_a_chat_template_is_alpaca_s_own_prompt(with_input: bool) -> None:
    row = {"instruction": "a", "input": "c" if with_input else None, "output": "b"}
    text = written(row, tokenizer=make_tokenizer(None))
    assert text.startswith(ALPACA)
    assert text.endswith("### Response:\n[b<eos>]")
    assert ("### Input:\nc\n" in text) == with_input


@pytest.mark.parametrize("system", ["s", ""])
def test_alpaca_without_a_chat_template_keeps_what_came_before(system: str) -> None:
    row = {"instruction": "a", "input": "", "output": "b", "system": system, "history": [["x", "y"]]}
    text = written(row, tokenizer=make_tokenizer(None))
    assert text.startswith(f"s\n\n{ALPACA}" if system else ALPACA)
    first, last = (
        text.index(f"### Instruction:\n{part}")
        for part in ("x\n\n### Response:\ny\n\n", "a\n\n### Response:\n[b<eos>]")
    )
    assert first < last


def test_columns_of_other_names_are_mapped() -> None:
    row = {"question": "a", "answer": "b", "text": "a longer text", "messages": [USER, ANSWER]}
    columns = {"prompt": "question", "completion": "answer"}
    assert recognized(row, columns) == "prompt_completion"
    assert written(row, **columns) == "a[b<eos>]"
    with pytest.raises(DataError, match=r"no column 'answer' \(it has question\): fix data\.columns"):
        raise unknown_format({"question": "a"}, columns, "here")


def test_preference_data_is_trained_on_as_chosen() -> None:
    row = {"prompt": "a", "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "c"}]}
    assert recognized(row, {}) is None
    with pytest.raises(DataError, match="preference losses are not here yet"):
        written(row)
    assert written(row, prompt="prompt", completion="chosen") == "<|user|>a<eos><|assistant|>[b<eos>]"


@pytest.mark.parametrize("label", [True, False])
def test_answers_that_a_label_judges_are_trained_on_once_columns_are_named(label: bool) -> None:
    row = {"prompt": "a", "completion": "b", "label": label}
    for answer in ("b", [ANSWER]):
        assert recognized({**row, "completion": answer}, {}) is None
        with pytest.raises(DataError, match="preference data: keep the rows whose label is true, which are trained on"):
            written({**row, "completion": answer})
    assert written(row, prompt="prompt", completion="completion") == "a[b<eos>]"
    assert written({**row, "label": 1}) == "a[b<eos>]"  # a class


SYSTEM, OTHER = {"role": "system", "content": "s"}, {"role": "user", "content": "c"}
ASKED = "<|user|>a<eos><|assistant|>"


@pytest.mark.parametrize(
    ("prompt", "chosen", "text"),
    [
        ("a", [SYSTEM, USER, ANSWER], f"<|system|>s<eos>{ASKED}[b<eos>]"),
        ([SYSTEM, USER], [USER, ANSWER], f"<|system|>s<eos>{ASKED}[b<eos>]"),
        ([OTHER], [USER, ANSWER, OTHER, ANSWER], f"{ASKED}b<eos><|user|>c<eos><|assistant|>[b<eos>]"),
        ([USER, ANSWER, USER], [SYSTEM, USER, ANSWER, USER, ANSWER], f"<|system|>s<eos>{ASKED}b<eos>{ASKED}[b<eos>]"),
        # What follows the prompt, of which the same is asked again.
        ("a", [ANSWER, USER, ANSWER], f"{ASKED}[b<eos>]{ASKED}[b<eos>]"),
    ],
)
def test_a_chosen_chat_has_its_prompt_once(prompt: Any, chosen: list[dict[str, Any]], text: str) -> None:
    row = {"prompt": prompt, "chosen": chosen, "rejected": []}
    assert written(row, prompt="prompt", completion="chosen") == text


def test_tools_reach_the_template_with_their_arguments_as_objects() -> None:
    template = (
        "{% if tools %}{{ tools | tojson }};{% endif %}{% for m in messages %}{{ m.role }}:"
        "{% for call in m.tool_calls or [] %}{{ call.function.name }} {{ call.function.arguments.x }}{% endfor %}"
        "{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "content": "2", "tool_calls": None, "name": None}
    schema = '[{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}];'
    row = {"messages": [USER, called, result, ANSWER], "tools": schema.rstrip(";")}
    expected = f"{schema}user:a;assistant:[add 1;]tool:2;assistant:[b;]"
    assert written(row, tokenizer=make_tokenizer(template)) == expected
    shared = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": json.dumps({"name": "add", "arguments": {"x": 1}})},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "b"},
    ]
    assert written({"conversations": shared, "tools": [TOOL]}, tokenizer=make_tokenizer(template)) == expected


def test_what_parquet_adds_to_a_call_of_other_rows_is_not_learnt() -> None:
    def arguments(given: Any) -> Any:
        call = {"type": "function", "function": {"name": "add", "arguments": given}}
        row, _ = converted({"messages": [USER, {**ANSWER, "tool_calls": [call]}]}, "messages", {}, "r")
        return row["messages"][1]["tool_calls"][0]["function"]["arguments"]

    assert arguments({"x": 1, "city": None}) == {"x": 1}
    assert arguments('{"x": 1, "city": null}') == {"x": 1, "city": None}  # as somebody wrote it
    schema = {"name": "add", "parameters": {"x": {"default": None}}}
    for tools, kept in ((json.dumps([schema]), [schema]), ([schema], [{"name": "add", "parameters": {"x": {}}}])):
        assert converted({"messages": [], "tools": tools}, "messages", {}, "here")[0]["tools"] == kept
    deep: dict[str, Any] = {}
    for _ in range(10_000):
        deep = {"x": deep}
    with pytest.raises(DataError, match="r: tool_calls is nested too deeply"):
        arguments(deep)


def test_tools_and_calls_that_the_template_does_not_write_are_refused() -> None:
    called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    with pytest.raises(DataError, match="the model's chat template writes no tool calls: leave them out"):
        written({"messages": [USER, called, {"role": "tool", "content": "2"}, ANSWER]})
    with pytest.raises(DataError, match="the model's chat template writes no tools: leave them out"):
        written({"messages": [USER, ANSWER], "tools": [TOOL]})
    assert written(
        {"messages": [USER, ANSWER], "tools": [{"type": "web_search"}, {"function": "x"}]}
    )  # no names to look for


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({}, "its columns (none) are of no known format: map them with data.columns"),
        ({"query": "a", "response": "b"}, "such as {prompt: query, completion: response}"),
        ({" Completion": "b", "Prompt": "a"}, 'such as {prompt: Prompt, completion: " Completion"}'),
        ({"instruction": "a", "context": "", "response": "b"}, "input: context, output: response}"),
        ({"chat": [USER, ANSWER]}, "such as {messages: chat}"),
        ({"id": 3, "body": "a"}, "such as {text: body}"),
        ({"id": 3, "foo": "a", "bar": "b"}, "such as {prompt: foo, completion: bar}"),
        ({"chosen": [USER, ANSWER], "rejected": [USER]}, "chosen is trained on with data.columns: {messages: chosen};"),
        ({"chosen": "a", "rejected": "b"}, "chosen is trained on with data.columns: {text: chosen};"),
        ({"conversations": ["a"]}, "'conversations' is not a list of turns"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "no message has role assistant"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "every assistant message has weight 0"),
        ({"messages": [USER, {**ANSWER, "weight": 2}]}, "weight is 2"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "lacks role or content"),
        ({"messages": [USER, ANSWER], "tools": "no"}, "'tools' is no list of tools"),
        ({"messages": [USER, {**ANSWER, "tool_calls": "no"}]}, "tool_calls is no list of calls"),
        ({"messages": [USER, {**ANSWER, "function_call": CALL["function"]}]}, "function_call is OpenAI's older form"),
        ({"instruction": "a", "output": " "}, "'output' is empty"),
        ({"instruction": "a", "output": "b", "input": 3}, "'input' is int"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "'history' is no list of pairs"),
        ({"prompt": [USER], "completion": 3}, "prompt or completion is no list of turns"),
        ({"prompt": "a", "completion": None}, "field 'completion' is null"),
        ({"prompt": ["a", "c"], "completion": ["b", "d"]}, "field 'prompt' is list: it must be text"),
    ],
)
def test_bad_rows(row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError) as caught:
        written(row)
    assert str(caught.value).startswith("f.jsonl, row 4: ")
    assert complaint in str(caught.value)


def test_a_row_of_another_format_than_the_first_is_told_where_it_belongs() -> None:
    with pytest.raises(
        DataError, match=r"no field 'messages' \(it has id\), which rows of format messages need: give it, or"
    ):
        written({"id": 1}, "messages")
    for row, columns in (({"prompt": "a", "completion": "b"}, {}), ({"question": "a"}, {"text": "question"})):
        with pytest.raises(DataError, match=r"set data\.format: (prompt_completion|text) where all rows are of that"):
            converted(row, "messages", columns, "a.csv, row 1")


def test_a_text_that_begins_with_the_begin_token_has_it_once() -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert written({"prompt": "<s>a", "completion": "b"}, tokenizer=tokenizer) == "<s>a[b<eos>]"
    assert written({"prompt": "a", "completion": "b"}, tokenizer=tokenizer) == "<s>a[b<eos>]"
