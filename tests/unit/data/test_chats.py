"""Chats by templates of today: those that drop what earlier turns thought, and those that mark what is generated."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import bracketed, make_tokenizer

from emloc_ray.data.formats import encode, sequences
from emloc_ray.errors import DataError

# As Qwen3's, without its tools: thoughts before the last question are dropped, the last answer always has a block of them.
QWEN3 = """\
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "system" %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set content = message.content %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' + content }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
MARKED = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{{ eos_token }}"
    "{% endif %};{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def learnt(messages: list[dict[str, Any]], template: str, tools: list[dict[str, Any]] | None = None) -> list[str]:
    """Each sequence as text, what is learnt in brackets."""
    tokenizer = make_tokenizer(template)
    made = sequences({"messages": messages, "tools": tools}, "messages", tokenizer, "row 1")
    return [bracketed(tokens, tokenizer) for tokens in encode(made, tokenizer)]


CHAT = [
    turn("user", "1 + 1?"),
    turn("assistant", "<think>\neasy\n</think>\n\n2"),
    turn("user", "and 2?"),
    turn("assistant", "<think>\nadd\n</think>\n\n4"),
]
FIRST = "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
SECOND = "<|im_start|>user\nand 2?<|im_end|>\n<|im_start|>assistant\n"


def test_a_turn_is_trained_with_the_prefix_that_the_template_gives_it() -> None:
    assert learnt(CHAT, QWEN3) == [
        f"{FIRST}[<think>\neasy\n</think>\n\n2<|im_end|>\n]",
        f"{FIRST}2<|im_end|>\n{SECOND}[<think>\nadd\n</think>\n\n4<|im_end|>\n]",
    ]


@pytest.mark.parametrize("untrained", [1, 3])
def test_an_untrained_turn_of_such_a_template_is_a_prefix_alone(untrained: int) -> None:
    chat = [{**message, "weight": int(number != untrained)} for number, message in enumerate(CHAT)]
    [only] = learnt(chat, QWEN3)
    assert only == learnt(CHAT, QWEN3)[1 if untrained == 1 else 0]


def test_turns_that_the_template_leaves_as_they_were_share_a_sequence() -> None:
    chat = [
        turn("user", "a"),
        turn("assistant", "b", reasoning_content="x"),
        turn("assistant", "c", reasoning_content="y"),
    ]
    [only] = learnt(chat, QWEN3)
    assert only.count("[") == 2


def test_what_the_template_marks_is_learnt() -> None:
    chat = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    assert learnt(chat, MARKED) == ["<|user|>a<eos>;<|assistant|>[b<eos>];<|user|>c<eos>;<|assistant|>[d<eos>];"]
    chat[1]["weight"] = 0
    assert learnt(chat, MARKED) == ["<|user|>a<eos>;<|assistant|>b<eos>;<|user|>c<eos>;<|assistant|>[d<eos>];"]


def test_a_prompt_that_opens_a_thought_which_the_answer_lacks() -> None:
    opening = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>{% endif %}"
    )
    for answer in ("b", "<table>", "<think"):  # of which some begin as the thought does
        assert learnt([turn("user", "a"), turn("assistant", answer)], opening) == [f"<user>a;<assistant>[{answer};]"]


def test_an_answer_that_cannot_be_told_is_refused() -> None:
    scattered = "{% for m in messages[::-1] %}{{ m.content }};{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    with pytest.raises(DataError, match=r"^row 1: the chat template writes an answer in another place"):
        learnt([turn("user", "a"), turn("assistant", "b")], scattered)


@pytest.mark.parametrize("role", ["developer", "human"])
def test_a_turn_that_the_template_leaves_out_is_told(role: str) -> None:
    chat = [turn(role, "Answer in French."), turn("user", "a"), turn("assistant", "b")]
    with pytest.raises(
        DataError, match=f"^row 1: the model's chat template writes no turns of role {role}: leave them out"
    ):
        learnt(chat, QWEN3)


def test_a_turn_that_the_template_writes_in_a_way_of_its_own_is_no_turn_left_out() -> None:
    quoted = MARKED.replace("{% else %}{{ m['content'] }}", "{% else %}{{ m['content'] | upper }}")
    chat = [turn("user", "a"), turn("assistant", "b")]
    assert learnt(chat, quoted) == ["<|user|>A<eos>;<|assistant|>[b<eos>];"]


CALLING = (
    "{{ tools or '' }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for call in m.tool_calls or [] %}"
    "({{ call.function.name }}){% endfor %};{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}


def test_arguments_are_texts_where_the_template_joins_them() -> None:
    """As DeepSeek-V3's."""
    template = CALLING.replace("call.function.name", "call.function.name + call.function.arguments")
    chat = [turn("user", "a"), turn("assistant", "", tool_calls=[CALL]), turn("tool", "r"), turn("assistant", "b")]
    assert learnt(chat, template) == ['<user>a;<assistant>[(add{"x": 1});]<tool>r;<assistant>[b;]']


@pytest.mark.parametrize("written", ["[]", "(m.tool_calls or [])[:1]"])
def test_a_call_that_the_template_leaves_out_is_told_where_tools_have_its_name(written: str) -> None:
    chat, tools = [turn("user", "a"), turn("assistant", "", tool_calls=[CALL, CALL])], [CALL]
    assert learnt(chat, CALLING, tools)[0].endswith("<assistant>[(add)(add);]")
    with pytest.raises(DataError, match=r"^row 1: the model's chat template writes no tool calls: leave them out"):
        learnt(chat, CALLING.replace("m.tool_calls or []", written), tools)


@pytest.mark.parametrize(
    ("answer", "written", "what"),
    [
        (CHAT[1], "m.content.split('</think>')[-1]", "thoughts"),
        (
            turn("assistant", "I add.", tool_calls=[CALL]),
            "'' if m.tool_calls else m.content",
            "words beside tool calls",
        ),
        (turn("assistant", "b"), "m.text if m.role == 'assistant' else m.content", "turns of role assistant"),
    ],
)
def test_words_of_an_answer_that_the_template_leaves_out_are_told(
    answer: dict[str, Any], written: str, what: str
) -> None:
    template, question = CALLING.replace("m.content", written), turn("user", "a")
    with pytest.raises(DataError, match=f"^row 1: the model's chat template writes no {what}: leave them out"):
        learnt([question, answer], template)
    assert learnt([question, answer], CALLING.replace("m.content", "m.content | upper"))
    if what == "thoughts":  # as the template wants it of turns that are not learnt
        [only] = learnt([question, {**answer, "weight": 0}, question, turn("assistant", "b")], template)
        assert only == "<user>a;<assistant>\n\n2;<user>a;<assistant>[b;]"


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_beside_an_answer_that_the_template_leaves_out_are_told(key: str) -> None:
    chat = [turn("user", "a"), turn("assistant", "b", **{key: "t"}), turn("user", "c"), turn("assistant", "d")]
    writing = CALLING.replace("{{ m.content }}", "{{ m.KEY or '' }}{{ m.content }}".replace("KEY", key))
    assert learnt(chat, writing) == ["<user>a;<assistant>[tb;]<user>c;<assistant>[d;]"]
    with pytest.raises(DataError, match=f"^row 1: the model's chat template writes no thoughts given as {key}: leave"):
        learnt(chat, CALLING)
    chat[1]["weight"] = 0
    assert learnt(chat, CALLING) == ["<user>a;<assistant>b;<user>c;<assistant>[d;]"]


def test_thoughts_beside_earlier_answers_may_be_left_out() -> None:
    beside = [turn("user", "1 + 1?"), turn("assistant", "2", reasoning_content="easy")]
    beside += [turn("user", "and 2?"), turn("assistant", "4", reasoning_content="add")]
    assert learnt(beside, QWEN3) == learnt(CHAT, QWEN3)
    beside[3]["thinking"] = "add"  # another name of the same
    assert learnt(beside, QWEN3) == learnt(CHAT, QWEN3)


def test_a_question_whose_words_the_template_leaves_out_is_told() -> None:
    with pytest.raises(DataError, match=r"^row 1: the model's chat template writes no turns of role user"):
        learnt([turn("user", "a?"), turn("assistant", "b")], CALLING.replace("m.content", "m.text"))


# As gpt-oss', which drops what was thought before a call once a later turn answers.
RECALLING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.thinking and 'assistant' not in messages[loop.index:] | map(attribute='role') %}({{ m.thinking }}){% endif %}"
    "{{ m.content }};{% endgeneration %}{% else %}{{ m.content }};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
UNMARKED = RECALLING.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CALLED = [turn("user", "a"), turn("assistant", "call", thinking="t"), turn("tool", "r"), turn("assistant", "b")]


@pytest.mark.parametrize("template", [RECALLING, UNMARKED])
def test_an_answer_that_has_the_template_drop_an_earlier_thought_follows_it(template: str) -> None:
    first, second = learnt([*CALLED, turn("user", "c"), turn("assistant", "d")], template)
    assert first == "<user>a;<assistant>[(t)call;]<tool>r;<assistant>[b;]"
    assert second == "<user>a;<assistant>call;<tool>r;<assistant>b;<user>c;<assistant>[d;]"
    untrained = [{**message, "weight": int(message["content"] != "call")} for message in CALLED]
    assert learnt(untrained, template) == ["<user>a;<assistant>(t)call;<tool>r;<assistant>[b;]"]


def test_of_marked_turns_whose_begin_is_not_known_the_last_alone_is_learnt() -> None:
    unasked = RECALLING.replace("{% if add_generation_prompt %}<assistant>{% endif %}", "")
    assert learnt(CALLED, unasked) == [
        "<user>a;<assistant>[(t)call;]",
        "<user>a;<assistant>call;<tool>r;<assistant>[b;]",
    ]


def test_an_earlier_turn_s_begin_is_not_taken_for_that_of_an_answer() -> None:
    unopened = UNMARKED.replace("<{{ m.role }}>", "{{ '<' + m.role + '>' if loop.index != 4 }}")
    with pytest.raises(DataError, match=r"^row 1: the chat template writes an answer in another place"):
        learnt(CALLED, unopened)


def test_of_an_answer_what_the_template_does_not_mark_is_not_learnt() -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}It says {% generation %}{{ m.content }}"
        "{% endgeneration %} and {% generation %}ends.{% endgeneration %}{% else %}{{ m.content }}{% endif %};{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert learnt([turn("user", "a"), turn("assistant", "b")], template) == [
        "<user>a;<assistant>It says [b] and [ends.];"
    ]
