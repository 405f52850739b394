"""What a row means as tokens, checked by decoding them again: the byte-level tokenizer loses nothing."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import CHAT_TEMPLATE, EOS, PAD, REWRITING, make_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from emloc_ray.data.formats import Tokens, check_row, encode, pack, sequences, truncate
from emloc_ray.data.row_formats import converted
from emloc_ray.errors import DataError

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)


def tokenize_row(row: dict[str, Any], format: str, tokenizer: Any) -> Tokens:
    return encode(sequences(row, format, tokenizer, "here"), tokenizer)[0]


def check(row: dict[str, Any], format: str, where: str) -> None:
    check_row(*converted(row, format, {}, where), where)


def spans(tokens: Tokens, tokenizer: Any) -> list[tuple[bool, str]]:
    """Runs of equal mask as text."""
    runs: list[tuple[bool, list[int]]] = []
    for token, completion in zip(tokens.input_ids, tokens.completion_mask, strict=True):
        if not runs or runs[-1][0] != completion:
            runs.append((completion, []))
        runs[-1][1].append(token)
    return [(completion, tokenizer.decode(ids)) for completion, ids in runs]


@given(words)
def test_text_is_all_completion_and_ends(tokenizer: Any, text: str) -> None:
    tokens = tokenize_row({"text": text}, "text", tokenizer)
    assert spans(tokens, tokenizer) == [(True, f"{text}<eos>")]
    assert tokens.input_ids[-1] == EOS


@given(words, words)
def test_prompt_and_completion(tokenizer: Any, prompt: str, completion: str) -> None:
    row = {"prompt": prompt, "completion": completion}
    tokens = tokenize_row(row, "prompt_completion", tokenizer)
    assert spans(tokens, tokenizer) == [(False, prompt), (True, f"{completion}<eos>")]
    assert tokens.input_ids.count(EOS) == 1
    # The prompt's tokens are those that generation starts from.
    assert tokens.input_ids[: tokens.completion_mask.index(True)] == tokenizer(prompt)["input_ids"]


def test_a_tokenizer_that_adds_special_tokens_itself() -> None:
    class Adding:
        """Puts 7 before and eos after, unless asked not to; as T5's and Llama's do."""

        eos_token_id = EOS

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            ids = [100 + ord(letter) for letter in text]
            return {"input_ids": [7, *ids, EOS] if add_special_tokens else ids}

    tokens = tokenize_row({"prompt": "a", "completion": "b"}, "prompt_completion", Adding())
    assert tokens == Tokens([7, 197, 198, EOS], [False, False, True, True])
    assert tokenize_row({"text": "a"}, "text", Adding()) == Tokens([7, 197, EOS], [True] * 3)


@pytest.mark.parametrize("has_encoder", [False, True])
def test_what_follows_gets_no_space_that_the_row_has_not(has_encoder: bool) -> None:
    """SentencePiece's tokenizers, as Llama 2's, put one before whatever they are given."""
    core = Tokenizer(models.BPE({"<pad>": 0, "<eos>": 1, "▁": 2, "a": 3, "b": 4, "\n": 5, ":": 6}, []))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    llama = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")

    def ids(prompt: str, completion: str) -> list[int]:
        row = {"prompt": prompt, "completion": completion}
        [tokens] = encode(sequences(row, "prompt_completion", llama, "row", has_encoder=has_encoder), llama)
        return tokens.input_ids

    if has_encoder:  # whose decoder begins a text of its own
        assert ids("a\n", "b") == [2, 3, 5, 1, 2, 4, 1]
        return
    assert ids("a\n", "b") == [2, 3, 5, 4, 1]
    assert ids("a", " b") == [2, 3, 2, 4, 1]
    assert ids("a", "\nb") == [2, 3, 5, 4, 1]
    llama.chat_template = (
        "{% for m in messages %}{{ ':' + m.content }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    [tokens] = encode(sequences(chat, "messages", llama, "row"), llama)
    assert tokens.input_ids == [2, 6, 3, 6, 4]


@pytest.mark.parametrize("takes_space", [False, True])
@pytest.mark.parametrize("scheme", ["always", "first", "prepend"])
def test_a_chat_s_pieces_are_what_the_whole_chat_is(scheme: str, takes_space: bool) -> None:
    """Mistral 7B's tokenizer puts a space behind special tokens too, others only before a text; of files that are older the
    normalizer does (``prepend``)."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", "▁", "▁a", "▁[", *"ab[]\n"])}
    core = Tokenizer(models.BPE(vocabulary, [("▁", "["), ("▁", "a")]))
    if scheme == "prepend":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    core.add_special_tokens([AddedToken("<pad>", rstrip=takes_space, normalized=False)])  # as Phi-3's <|assistant|>
    mistral = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    chat = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "a"}] * 2
    asks = "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]BEHIND{% else %}"
    answers = "{{ m.content + eos_token }}{% endif %}{% endfor %}"
    for behind in ("", "<pad>", "\n", "<pad>\n"):
        mistral.chat_template = asks.replace("BEHIND", behind) + answers
        tokens = tokenize_row({"messages": chat}, "messages", mistral)
        assert tokens.input_ids == mistral.apply_chat_template(chat, tokenize=True, return_dict=False), behind


def test_an_end_that_somebody_wrote_behind_a_prompt_stays(tokenizer: Any) -> None:
    row = {"prompt": "How are you?<eos>", "completion": "Fine.<eos>"}
    tokens = tokenize_row(row, "prompt_completion", tokenizer)
    assert spans(tokens, tokenizer) == [(False, "How are you?<eos>"), (True, "Fine.<eos>")]
    ending = make_tokenizer()
    ending.backend_tokenizer.post_processor = TemplateProcessing("$A <eos>", special_tokens=[("<eos>", EOS)])
    assert tokenize_row(row, "prompt_completion", ending) == tokens


def test_an_encoder_s_prompt_ends_by_itself(tokenizer: Any) -> None:
    row = {"prompt": "hello", "completion": "world"}
    [tokens] = encode(sequences(row, "prompt_completion", tokenizer, "here", has_encoder=True), tokenizer)
    assert spans(tokens, tokenizer) == [(False, "hello<eos>"), (True, "world<eos>")]


@pytest.mark.parametrize("special", [False, True])
@given(st.lists(st.tuples(words, words), max_size=8))
def test_many_rows_at_once_are_what_each_is_alone(special: bool, pairs: list[tuple[str, str]]) -> None:
    tokenizer = make_tokenizer()
    if special:  # as Llama's and BERT's do, and one that ends prompts too
        core = tokenizer.backend_tokenizer
        core.post_processor = TemplateProcessing("<pad> $A <eos>", special_tokens=[("<pad>", PAD), ("<eos>", EOS)])
    for format in ("text", "prompt_completion", "messages"):
        rows = []
        for first, second in pairs:
            turns = [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
            rows.append({"text": first, "prompt": first, "completion": second, "messages": turns * 2})
        alone = [by_the_text(row, format, tokenizer) for row in rows]
        assert encode([s for row in rows for s in sequences(row, format, tokenizer, "here")], tokenizer) == alone
        assert [tokenize_row(row, format, tokenizer) for row in rows] == alone


def by_the_text(row: dict[str, Any], format: str, tokenizer: Any) -> Tokens:
    """One row, piece by piece, each in a call of its own."""

    def ids(text: str, **options: Any) -> list[int]:
        return tokenizer(text, **options)["input_ids"]

    def ended(tokens: list[int]) -> list[int]:
        return tokens if tokens[-1:] == [EOS] else [*tokens, EOS]

    if format == "text":
        whole = ended(ids(row["text"]))
        return Tokens(whole, [True] * len(whole))
    if format == "prompt_completion":
        prompt = ids(row["prompt"])
        prompt = prompt[:-1] if prompt[-1:] == [EOS] else prompt
        completion = ended(ids(row["completion"], add_special_tokens=False))
        return Tokens(prompt + completion, [False] * len(prompt) + [True] * len(completion))
    user, assistant = (turn["content"] for turn in row["messages"][:2])
    turn = [
        (ids(f"<|user|>{user}<eos><|assistant|>", add_special_tokens=False), False),
        (ids(f"{assistant}<eos>", add_special_tokens=False), True),
    ]
    pieces = turn * 2
    return Tokens([i for part, _ in pieces for i in part], [completion for part, completion in pieces for _ in part])


def test_messages_every_assistant_turn_is_completion(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "and 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "thanks"},
    ]
    tokens = tokenize_row({"messages": messages}, "messages", tokenizer)
    assert spans(tokens, tokenizer) == [
        (False, "<|system|>be brief<eos><|user|>1 + 1?<eos><|assistant|>"),
        (True, "2<eos>"),
        (False, "<|user|>and 2?<eos><|assistant|>"),
        (True, "4<eos>"),
    ]


def test_messages_are_the_template_s_own_text(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
    tokens = tokenize_row({"messages": messages}, "messages", tokenizer)
    assert tokenizer.decode(tokens.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_template_that_rewrites_earlier_turns() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    one = make_tokenizer(REWRITING)
    first, second = encode(sequences({"messages": turns * 2}, "messages", one, "here"), one)
    assert spans(first, one) == [(False, "user:a;assistant:"), (True, "b;")]
    assert spans(second, one) == [(False, "user:a;assistant:(cut);user:a;assistant:"), (True, "b;")]


def test_no_chat_template() -> None:
    row = {"messages": [{"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError, match="has no chat template"):
        tokenize_row(row, "messages", make_tokenizer(None))
    assert make_tokenizer(CHAT_TEMPLATE).chat_template


@pytest.mark.parametrize(
    ("row", "format", "complaint"),
    [
        ({}, "text", "no field 'text' (it has none)"),
        ({"body": "x"}, "text", "no field 'text' (it has body)"),
        ({"text": None}, "text", "field 'text' is null"),
        ({"text": 3}, "text", "field 'text' is int"),
        ({"text": " \n"}, "text", "field 'text' is empty"),
        ({"prompt": "a"}, "prompt_completion", "no field 'completion' (it has prompt)"),
        ({"prompt": "a", "completion": ""}, "prompt_completion", "field 'completion' is empty"),
        ({"prompt": ["a"], "completion": "b"}, "prompt_completion", "field 'prompt' is list"),
        ({"messages": "hi"}, "messages", "not a list of turns"),
        ({"messages": []}, "messages", "not a list of turns"),
        ({"messages": ["hi"]}, "messages", "lacks role or content"),
        ({"messages": [{"role": "user"}]}, "messages", "lacks role or content"),
        ({"messages": [{"content": "x"}]}, "messages", "lacks role or content"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages", "no message has role assistant"),
        ({"messages": [{"role": "assistant", "content": " ", "id": "m1", "timestamp": 3}]}, "messages", "is empty"),
        ({"messages": [{"role": "assistant", "content": "", "reasoning": "\n"}]}, "messages", "is empty"),
    ],
)
def test_bad_fields(row: dict[str, Any], format: str, complaint: str) -> None:
    with pytest.raises(DataError) as caught:
        check(row, format, "f.jsonl, row 4")
    assert str(caught.value).startswith("f.jsonl, row 4: ")
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"text": "x", "other": 3}, "text"),
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "", "thinking": "x"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "x"}]}]}, "messages"),
    ],
)
def test_good_fields(row: dict[str, Any], format: str) -> None:
    check(row, format, "here")


rows = st.lists(st.booleans(), min_size=1, max_size=12).map(lambda mask: Tokens(list(range(len(mask))), mask))


@given(rows, st.integers(2, 12))
def test_truncation_keeps_the_beginning_or_drops_the_row(row: Tokens, limit: int) -> None:
    cut = truncate(row, limit)
    # A completion token in first place is never predicted.
    if any(row.completion_mask[1:limit]):
        assert cut == Tokens(row.input_ids[:limit], row.completion_mask[:limit])
    else:
        assert cut is None


@given(st.lists(rows, max_size=12), st.integers(12, 30))
def test_packing_joins_whole_rows_in_order(many: list[Tokens], limit: int) -> None:
    packed = list(pack(many, limit))

    def joined(parts: list[Tokens]) -> list[tuple[int, bool]]:
        return [pair for part in parts for pair in zip(part.input_ids, part.completion_mask, strict=True)]

    assert joined(packed) == joined(many)
    assert all(len(part) <= limit for part in packed)
    starts = dict(zip(itertools.accumulate(map(len, many), initial=0), many, strict=False))
    for before, start in zip(packed, itertools.accumulate(map(len, packed)), strict=True):
        if start in starts:  # the row that begins the next sequence would not have fitted
            assert len(before) + len(starts[start]) > limit
        else:
            assert start == sum(map(len, many))


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"text": "half \ud800"}, "text"),
        ({"messages": [{"role": "assistant", "content": "half \ud800"}]}, "messages"),
    ],
)
def test_half_a_character_is_told_by_its_row(row: dict[str, Any], format: str) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl, row 3: .* which is no character: remove it"):
        check(row, format, "a.jsonl, row 3")
