"""A task of whole sentences, made on the spot: say in one sentence what a Python function does.

A row's prompt is a function without its docstring, its completion the docstring's first sentence; functions are found as
:mod:`emloc_ray.demos.python_sources` says.
"""

import ast
import re

from emloc_ray.demos.python_sources import Function, SourceRow, SourceTask, code_of, words

LEAD = "\n# What it does:\n"
"""What stands between the code and the completion; it ends at a line's border, where every tokenizer splits."""

_MIN_WORDS, _MAX_WORDS = 3, 30

_DOC_LIST_LINE = re.compile(r"[-*+:@.>=~^|]|\w[\w ]*:\s*$|\w+ ?\(.*\) ?:")
_ROLE = re.compile(r":[\w:+.-]+:`(?:~(?:[^`.]*\.)*|\.)?([^`<]+?)(?: *<[^`]*>)?`")
_ABBREVIATION = re.compile(r"(\b(e\.g|i\.e|etc|vs|cf|resp|approx|al|fig|eq|no|incl|dr|[a-z])|\.\.)\.$", re.IGNORECASE)
# Plain prose: a capitalised word, then letters, digits and everyday punctuation, then a full stop.
_PROSE = re.compile(r"[A-Z][a-z]*(-[a-z]+)?,? [A-Za-z0-9 ,.;'\"()/_%&+-]*[A-Za-z0-9)'\"]\.")
_NOT_A_DESCRIPTION = re.compile(
    r"(see|refer|todo|fixme|deprecated|note|example|usage|overrid\w*|overload\w*|same as|alias|args|arguments|test"
    r"|tests|please|copied|adapted|constructor|initializ\w* self|not implemented|inherit\w*|equivalent to|author"
    r"|copyright|abstract|docstring|internal|helper|function|method|like|similar|warning|placeholder"
    # These begin remarks about a function, not what it does.
    r"|this|these|it|there|if|when|where|in|on|for|to|used|called|just|we|you|our|they|some|not|no)\b",
    re.IGNORECASE,
)
_CUT_SHORT = re.compile(r"\b(a|an|the|of|to|for|by|and|or|as|is|are|if|via|from|that|with|using|when|into|than)\.$")


def summary_row(node: Function, lines: list[str], module: str, max_prompt_chars: int) -> SourceRow | None:
    """A function's row; None where its docstring or its body says too little."""
    docstring = ast.get_docstring(node)
    if docstring is None or node.name.startswith("__") or not _has_real_body(node.body[1:]):
        return None
    completion = _first_sentence(docstring)
    code = code_of(node, lines, max_prompt_chars - len(LEAD)) if completion else None
    if completion is None or code is None or words(completion) in words(code):
        return None
    return SourceRow(code + LEAD, completion, module)


def _has_real_body(body: list[ast.stmt]) -> bool:
    """Whether anything happens besides ``pass``, ``...`` and raising an error."""
    return any(
        not isinstance(statement, ast.Pass | ast.Raise)
        and not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant))
        for statement in body
    )


def _first_sentence(docstring: str) -> str | None:
    """The docstring's first sentence as plain prose with a full stop; None where it does not begin so."""
    paragraph: list[str] = []
    for line in _ROLE.sub(r"\1", docstring).strip().split("\n"):
        if not line.strip() or _DOC_LIST_LINE.match(line.strip()):
            break
        paragraph.append(line)
    text = " ".join(" ".join(paragraph).replace("`", "").split())
    ends = (match.end() for match in re.finditer(r"[.!?](?=\s|$)", text))
    end = next((end for end in ends if end == len(text) or not _ABBREVIATION.search(text, 0, end)), None)
    if end is None and len(paragraph) == 1:
        text += "."
    elif end is not None and not text[end:].lstrip()[:1].islower():
        text = text[:end]
    else:
        return None
    is_prose = _PROSE.fullmatch(text) and not _NOT_A_DESCRIPTION.match(text) and not _CUT_SHORT.search(text)
    is_closed = text.count("(") == text.count(")") and text.count('"') % 2 == 0
    return text if is_prose and is_closed and _MIN_WORDS <= len(text.split()) <= _MAX_WORDS else None


TASK = SourceTask(summary_row)
