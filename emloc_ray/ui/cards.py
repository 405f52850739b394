"""Model cards: the ``README.md`` of a run's adapter and merged model, as the Hugging Face hub shows it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emloc_ray.config.adapter import LORA_METHODS
from emloc_ray.data.hub_splits import HubSplit
from emloc_ray.io.runs.directory import CARD, RunDirectory
from emloc_ray.io.runs.fingerprint import fingerprint
from emloc_ray.io.store.atomic import write_text
from emloc_ray.io.store.stored_files import shown
from emloc_ray.runs.status import current_stages
from emloc_ray.stages.order import STEPS
from emloc_ray.text import counted, describe_choice, described_bits, listed
from emloc_ray.ui.terminal import describe_matches, evaluation_rows

METHOD_NAMES = {
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "vera": "VeRA",
    "ia3": "IA³",
    "prefix_tuning": "prefix tuning",
    "prompt_tuning": "prompt tuning",
}
_WHY = "`generate` of PEFT 0.21 with transformers 5 puts the virtual tokens in wrongly"
GENERATING = {
    "prefix_tuning": f"Take each token from `model(input_ids=row, use_cache=False)`: {_WHY}.",
    "prompt_tuning": f"Generate for one prompt at a time, with `use_cache=False`: otherwise {_WHY}.",
}
"""How a method's adapter makes text, where PEFT's own ``generate`` with its defaults makes another."""
WRITTEN_BY = {
    folder: stage.name
    for stage in STEPS
    for folder in stage.outputs
    if folder in ("adapter", "adapter_finished", "merged")
}
"""The folders that get a card, and the step that writes each."""


def write_cards(run: RunDirectory, copy: Path | None = None) -> None:
    """Writes the card of each folder that is there and up to date, in the run or in a ``copy`` of it; one that somebody else
    wrote or edited stays. On an object store itself there are none: its folders are read through the manifest, which names no
    cards."""
    if run.store is not None and copy is None:
        return
    root, manifest, metrics = copy or run.root, run.manifest(), run.metrics()
    current = current_stages(manifest)
    for folder, step in WRITTEN_BY.items():
        path = root / folder / CARD
        if step in current and path.parent.is_dir() and _is_ours(path):
            write_text(path, _signed(card(run.name, folder, manifest["config"], metrics)))


def _signed(text: str) -> str:
    """A card that :func:`_is_ours` knows again, by an invisible last line."""
    return f"{text}\n<!-- emloc-ray keeps this card up to date until it is edited: {fingerprint(text)} -->\n"


def _is_ours(path: Path) -> bool:
    """Whether no card is there, or one as it was written here."""
    if not path.exists():
        return True
    whole = path.read_bytes().decode(errors="replace")
    return whole == _signed(whole[: len(whole) - len(_signed(""))])


def card(name: str, folder: str, config: Mapping[str, Any], metrics: Mapping[str, Any], repository: str = "") -> str:
    """The card of one folder of a run: base, data, method, figures, how to load it, from a ``repository`` of the hub or from
    the folder itself. Of local models and files it names the last part of their paths alone."""
    from huggingface_hub import ModelCardData

    model, is_merged = config.get("model") or {}, folder == "merged"
    base, is_hub = base_name(str(model.get("source", "")), metrics.get("base_model"))
    datasets = list(filter(None, map(_hub_rows, _places(config.get("data") or {}))))
    kind = str((config.get("adapter") or {}).get("method", "lora"))
    method = METHOD_NAMES.get(kind, "LoRA")
    correction = metrics.get("correction") or {}
    if "lora_form" in correction and correction.get("method") != "none":  # then LoHa and the like became LoRA
        method, kind = f"LoRA adapter (trained as {method})", "lora"
    else:
        method = f"{method} adapter"
    data = ModelCardData(
        base_model=base if is_hub else None,
        base_model_relation=("finetune" if is_merged else "adapter") if is_hub else None,
        library_name="transformers" if is_merged else "peft",
        datasets=datasets or None,
        tags=["emloc", "emloc-ray", *([] if is_merged else ["lora" if kind in LORA_METHODS else kind])],
    )
    what = f"{base} with a {method} merged into it" if is_merged else f"A {method} for {base}"
    task, revision = describe_task(config.get("data") or {}), model.get("revision")
    pinned = f', revision="{revision}"' if is_hub and revision else ""
    made = [f"Base: {base}{f', revision {revision}' if revision else ''}", *([f"Data: {task}"] if task else [])]
    made += _made(config, metrics)
    return f"""---
{data.to_yaml().rstrip()}
---

# {name}

{what}, fine-tuned through a small emulator of the model by emloc-ray (EMLoC, [arXiv 2506.12015](https://arxiv.org/abs/2506.12015)).

## How to load it

```python
{_loading(repository, f'"{base}"{pinned}', is_hub, str(metrics.get("auto_class", "AutoModelForCausalLM")), is_merged)}
```
{f"{chr(10)}{GENERATING[kind]}{chr(10)}" if kind in GENERATING else ""}
## How it was made

{"".join(f"- {line}{chr(10)}" for line in made)}{_figures(metrics)}"""


def describe_task(data: Mapping[str, Any]) -> str | None:
    """What the run trains on, in a word or two: the generator's or the training file's name."""
    if data.get("generate"):
        return f"generated {data['generate']}"
    paths = _places(data)
    return listed([path if _hub_rows(path) else Path(shown(path.removeprefix("hf:"))).name for path in paths]) or None


def base_name(source: str, noted: str | None = None) -> tuple[str, bool]:
    """What a base is called, and whether that is its name on the hub; ``noted``: by what name or whole path its run had it, as
    a relative path looks like a name on the hub where it leads nowhere."""
    has_no_owner = "/" not in source and noted is None  # as gpt2 has none: of a path, the run noted the whole
    if noted not in (None, source) or _is_path(source) or source.startswith("package:") or has_no_owner:
        return source.rstrip("/").rpartition("/")[2], False
    return source, True


def _hub_rows(place: str) -> str | None:
    """The name of the data set on the hub that ``place`` names; None where it names none."""
    name = HubSplit.of(place, "train").dataset
    return name if place.startswith("hf:") and not _is_path(name) else None


def _is_path(name: str) -> bool:
    """Whether a name is a path of this machine, and none on the hub."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).expanduser().exists()


def _places(data: Mapping[str, Any]) -> list[str]:
    path = (data.get("train") or {}).get("path") or []
    return [path] if isinstance(path, str) else list(path)


def _loading(repository: str, base: str, is_hub: bool, opens: str, is_merged: bool) -> str:
    place = f'"{repository}")' if repository else '".")  # in this folder'
    if is_merged:
        return f"from transformers import {opens}\n\nmodel = {opens}.from_pretrained({place}"
    return f"""from peft import PeftModel
from transformers import {opens}

original = {opens}.from_pretrained({base}){"" if is_hub else "  # where you have it"}
model = PeftModel.from_pretrained(original, {place}"""


def _made(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    adapter, lines = config.get("adapter") or {}, []
    if emulator := metrics.get("emulator"):
        bits = described_bits(emulator.get("quantization", "none"))
        kept = f"{emulator['parameters_kept']:.3f} of the parameters of the compressed linears"
        lines.append(f"Emulator: {kept}{f', in {bits}' if bits else ''}")
    settings = [f"{key} {adapter[key]}" for key in ("r", "lora_alpha") if adapter.get(key) is not None]
    lines.append(f"Adapter: {', '.join([METHOD_NAMES.get(str(adapter.get('method', 'lora')), 'LoRA'), *settings])}")
    if steps := (metrics.get("finetune") or {}).get("steps"):
        rate = (config.get("finetune") or {}).get("learning_rate")
        lines.append(f"Training: {steps} steps{f', learning rate {rate:g}' if rate else ''}")
    if correction := metrics.get("correction"):
        lines.append(f"Correction: {'none' if correction.get('as_trained') else describe_choice(correction)}")
    versions = metrics.get("versions") or {}
    named = [f"{name} {versions[name]}" for name in ("emloc-ray", "transformers", "peft", "torch") if name in versions]
    return [*lines, *([f"Versions: {', '.join(named)}"] if named else [])]


def _figures(metrics: Mapping[str, Any]) -> str:
    evaluation = metrics.get("evaluation")
    if not evaluation or STEPS[-1].name not in (metrics.get("stages") or {}):
        return ""
    table = ["| model | loss (nats a token) | token accuracy |", "| --- | --- | --- |"]
    for row in evaluation_rows(evaluation):
        table.append(f"| {row['label']} | {row['loss']:.4f} | {row['token_accuracy']:.3f} |")
    if exact := metrics.get("exact_match"):
        table += ["", f"Exact match: {describe_matches(exact)} ({counted(exact['num_prompts'], 'prompt')})."]
    return "\n".join(["", "## On held-out rows", "", *table, ""])
