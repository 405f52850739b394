"""Talking to the original and the fine-tuned model side by side, in a terminal."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from emloc_ray.data.chats import Segment
from emloc_ray.data.formats import encode
from emloc_ray.data.images import plain_messages
from emloc_ray.data.processors import open_processor
from emloc_ray.data.row_formats import alpaca_prompt
from emloc_ray.errors import ArtifactError, ConfigError, DataError
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.modeling.architecture import auto_class
from emloc_ray.modeling.architecture import load_config as read_model
from emloc_ray.modeling.inputs import has_encoder
from emloc_ray.modeling.scoring import continuations
from emloc_ray.text import one_line
from emloc_ray.ui.publishing import original, result_name

_PLAIN = {"text", "prompt_completion"}  # formats whose prompts no chat template wraps
NAMES = ("original", "fine-tuned")


@dataclass
class Pair:
    """The original with the run's adapter: one model in memory, asked without the adapter and with it. Unless ``plain`` the chat
    template wraps prompts, that of the ``processor`` where it has one, as in training, and ``turns`` are what each of the two
    has heard and said; ``is_alpaca``: plain ones are Alpaca's own."""

    model: Any
    tokenizer: Any
    processor: Any
    plain: bool
    max_new_tokens: int
    is_alpaca: bool = False
    turns: dict[str, list[dict[str, str]]] = field(default_factory=lambda: {name: [] for name in NAMES})

    @classmethod
    def of(
        cls,
        run: RunDirectory,
        root: Path,
        plain: bool = False,
        max_new_tokens: int = 256,
        trust_remote_code: bool = False,
    ) -> Pair:
        """Opens a run's original, on the GPU where there is one, and its last adapter; ``root`` is where its folders are.
        Raises ConfigError where the run has no adapter, or, unless ``trust_remote_code``, its model has code of its own: a run
        may be anybody's. Raises ArtifactError where these do not open."""
        from peft import PeftModel
        from transformers import AutoTokenizer

        adapter, manifest = root / result_name(run, "adapter"), run.manifest()
        config, rows = manifest["config"], manifest["stages"].get("data", {}).get("result", {})
        trusted = bool(config["model"].get("trust_remote_code"))
        if trusted and not trust_remote_code:
            raise ConfigError(
                f"{run.place} was made with code that came with its model, which would run with your rights here: where you trust"
                " it, add --trust-remote-code."
            )
        directory = original(run, root, trusted, needs_weights=True)
        try:
            opens = auto_class(read_model(directory, trust_remote_code=trusted))
            options: dict[str, Any] = {"use_safetensors": True, "use_kernels": False}  # as a run opens it
            model = opens.from_pretrained(directory, dtype="auto", trust_remote_code=trusted, **options)
            adapted = PeftModel.from_pretrained(model.to("cuda" if torch.cuda.is_available() else "cpu"), str(adapter))
            tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=trusted)
            processor = open_processor(str(directory), trusted)
        except (OSError, ValueError, RuntimeError) as error:
            raise ArtifactError(f"{directory} with {adapter} does not open ({one_line(error)}).") from error
        formats = rows.get("formats", [config["data"].get("format")])  # those that auto took
        processor = processor if processor is not None and processor.chat_template else None
        has_template = bool(processor or tokenizer.chat_template)
        is_alpaca = not plain and not has_template and "alpaca" in formats
        plain = plain or not has_template or set(formats) <= _PLAIN
        return cls(adapted.eval(), tokenizer, processor, plain, max_new_tokens, is_alpaca)

    def answers(self, prompt: str) -> dict[str, str]:
        """What each of the two answers, greedily. Raises DataError where a prompt, with the turns before it, leaves a model no
        position to answer in; it is no turn then."""
        answers = {}
        for name in NAMES:
            is_original = name == "original"
            with self.model.disable_adapter() if is_original else contextlib.nullcontext():
                model = self.model.get_base_model() if is_original else self.model
                answers[name] = self._answer(model, [*self.turns[name], {"role": "user", "content": prompt}])
        if not self.plain:
            for name, text in answers.items():
                self.turns[name] += [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        return answers

    def _answer(self, model: Any, turns: Sequence[dict[str, str]]) -> str:
        asked = encode([[self._segment(turns)]], self.tokenizer)[0].input_ids
        (new,) = continuations(model, self.tokenizer, [asked], self.max_new_tokens)
        return str(self.tokenizer.decode(new, skip_special_tokens=True))

    def _segment(self, turns: Sequence[dict[str, str]]) -> Segment:
        """What is asked, as training tokenizes the prompt of a row."""
        if self.plain:
            prompt = turns[-1]["content"]
            text = alpaca_prompt(prompt) if self.is_alpaca else prompt
            return Segment(text, False, add_special_tokens=True, eos=has_encoder(self.model.config))
        wrapped = plain_messages(turns) if self.processor else turns
        template = self.processor or self.tokenizer
        return Segment(template.apply_chat_template(wrapped, add_generation_prompt=True, tokenize=False), False)


def talk(console: Console, pair: Pair, ask: Callable[[str], str] = input) -> None:
    """Asks for prompts and shows both answers, until an empty one or the end of the input; ``/new`` forgets what was said."""
    console.print("An empty line ends the chat; /new starts another.", style="dim")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no text end no chat
    while True:
        try:
            prompt = ask("> ")
        except EOFError:
            return
        if not prompt.strip():
            return
        if prompt.strip() == "/new":
            pair.turns = {name: [] for name in NAMES}
            continue
        try:
            with console.status("…"):
                answers = pair.answers(prompt)
        except DataError as error:  # of this prompt alone: a shorter one, or /new, goes on
            console.print(Text(str(error), style="red"))
            continue
        table = Table(expand=True, show_lines=False)
        for name in NAMES:
            table.add_column(name, ratio=1, overflow="fold")
        table.add_row(*(Text(answers[name]) for name in NAMES))
        console.print(table)
