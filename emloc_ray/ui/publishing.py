"""Where results go: the Hugging Face hub, and files for llama.cpp."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from rich.console import Console

from emloc_ray.config.adapter import PROMPT_METHODS
from emloc_ray.errors import ConfigError, StageError
from emloc_ray.io.runs.directory import CARD, RunDirectory
from emloc_ray.io.runs.fetch import WEIGHT_NAMES, fetch
from emloc_ray.runs.status import current_stages
from emloc_ray.text import counted, listed, one_line, size
from emloc_ray.ui.cards import METHOD_NAMES, WRITTEN_BY, base_name, card
from emloc_ray.ui.terminal import progress_bar

Result = Literal["adapter", "merged"]
MODEL = "model"  # the folder of a run's original, where that had to be imported
_CONVERTERS = {"merged": "convert_hf_to_gguf.py", "adapter": "convert_lora_to_gguf.py"}


def result_name(run: RunDirectory, part: Result) -> str:
    """The folder of a run's merged model, or of its last adapter for the original. Raises ConfigError where it is a batch, and
    where the run has not come so far, or not again since its config has changed or a stage is redone."""
    manifest, folders = run.existing().manifest(), run.names()
    if manifest.get("kind") == "batch":
        raise ConfigError(f"{run.place} is a batch: name the directory of one of its tasks, below {run.place}/tasks.")
    current, names = current_stages(manifest), ["merged"] if part == "merged" else ["adapter_finished", "adapter"]
    for name in names:
        if WRITTEN_BY[name] in current and name in folders:
            return name
    method = (manifest["config"].get("adapter") or {}).get("method")
    if part == "merged" and method in PROMPT_METHODS:
        raise ConfigError(
            f"{run.place} has no merged/, as {METHOD_NAMES[method]} changes no weight: use adapter/, by PEFT on the original."
        )
    last, step = names[-1], WRITTEN_BY[names[-1]]
    lack = f"{last}/ in {run.place} is out of date" if step in manifest["stages"] else f"{run.place} has no {last}/"
    raise ConfigError(f"{lack}: run it up to there, emloc-ray {step} CONFIG.")


def part_folder(run: RunDirectory, part: str) -> str:
    """The folder of a part of a run: :func:`result_name` of its results, else the part itself."""
    results: dict[str, Result] = {"adapter": "adapter", "merged": "merged"}
    return result_name(run, results[part]) if part in results else part


@contextlib.contextmanager
def local_copy(console: Console, run: RunDirectory, *names: str, original_weights: bool = True) -> Iterator[Path]:
    """The run's directory. For a run on an object store: a temporary directory with those of its folders ``names`` that
    exist, with or without the ``original_weights``."""

    def leave_out(name: str) -> bool:
        return not original_weights and name.startswith(f"{MODEL}/") and name.endswith(".safetensors")

    if run.store is None:
        yield run.root
        return
    folders = set(run.names())
    with tempfile.TemporaryDirectory() as folder:
        with progress_bar(console, f"Fetching {run.name}", in_bytes=True) as progress:
            fetch(run, Path(folder), [name for name in names if name in folders], progress, leave_out=leave_out)
        yield Path(folder)


def push(console: Console, run: RunDirectory, name: str, part: Result, private: bool) -> None:
    """Uploads one result with its card to a model repository of the hub, which it makes where there is none; a merged model in
    place of the weights that are in it. Raises ConfigError where the run has not come so far, the name is none of the hub, or
    what is to be ``private`` would be public, StageError where the hub refuses or cannot be reached."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    result = result_name(run, part)
    with local_copy(console, run, result) as root:
        folder = root / result
        _check_files(folder, part)
        # Hidden ones are notes of the stage.
        files = [file for file in folder.rglob("[!.]*") if file.is_file() and file != folder / CARD]
        held = size(sum(file.stat().st_size for file in files))
        api = HfApi()
        try:
            made = api.create_repo(name, private=private, exist_ok=True).repo_id
            if private and not api.model_info(made).private:
                raise ConfigError(f"{made} is there already, and public: name another, or leave --private out.")
            text = card(run.name, result, run.manifest()["config"], run.metrics(), made)
            pushed = {file.relative_to(folder).as_posix(): _pushed(file) for file in files}
            present = api.list_repo_files(made) if part == "merged" else []
            old = [file for file in present if WEIGHT_NAMES.fullmatch(file) and file not in pushed]
            console.print(
                f"Pushing {result}/ ({counted(len(files), 'file')} and a card, {held}) to {made}"
                + (f", and deleting {listed(old)} there" if old else ""),
                soft_wrap=True,
                markup=False,
            )
            added = [CommitOperationAdd(file, content) for file, content in {CARD: text.encode(), **pushed}.items()]
            done = api.create_commit(
                made,
                [*added, *(CommitOperationDelete(file, is_folder=False) for file in old)],
                commit_message=f"{result} of the run {run.name}, by emloc-ray",
            )
        except HFValidationError as error:
            raise ConfigError(f"{name} is no name of the hub ({one_line(error)}): write OWNER/NAME.") from error
        except Exception as error:
            unreached = _is_of_transport(error)
            if not unreached and not isinstance(error, (HfHubHTTPError, LocalTokenNotFoundError, OSError)):
                raise
            reason = one_line(str(error).strip().split("\n")[0])
            advice = "see that the hub can be reached" if unreached else "log in with hf auth login, or check the name"
            raise StageError(f"{name} cannot be pushed to ({reason}): {advice}.") from error
    console.print(f"{result}/ is at {done.commit_url}", soft_wrap=True, markup=False)


def _is_of_transport(error: Exception) -> bool:
    """Whether the hub's library could not reach it; it raises what its HTTP client does, httpx or httpx2 by its version."""
    return type(error).__module__.partition(".")[0] in ("httpx", "httpx2")


def _pushed(file: Path) -> Path | bytes:
    """A file as it is pushed: an adapter's config names a local original by the last part of its path alone, as its card."""
    from emloc_ray.modeling.adapter_files import CONFIG_NAME

    if file.name != CONFIG_NAME:
        return file
    config = json.loads(file.read_bytes())
    for key in ("base_model_name_or_path", "tokenizer_name_or_path"):
        if config.get(key):
            config[key], _ = base_name(config[key])
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def export_gguf(
    console: Console,
    run: RunDirectory,
    part: Result,
    output: Path | None,
    outtype: str,
    trust_remote_code: bool = False,
) -> None:
    """Has llama.cpp's own converter write one result as a GGUF file. Raises ConfigError where the run has not come so far, the
    converter is not installed or the file is there, or where, unless ``trust_remote_code``, a folder names code, which the
    converter runs for some kinds of models; StageError, with its last line, where the converter fails."""
    result, converter = result_name(run, part), _converter(_CONVERTERS[part])
    target = output or (run.root if run.store is None else Path.cwd()) / f"{run.name}-{part}-{outtype}.gguf"
    if target.exists():
        raise ConfigError(f"{target} is there already: remove it, or name another with --output.")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is no folder: make it, or name another place with --output.")
    part_file = target.with_name(f".{target.stem}.part.gguf")
    # Of an adapter's base the converter reads config and tokenizer.
    with local_copy(console, run, result, *([MODEL] if part == "adapter" else []), original_weights=False) as root:
        folder = root / result
        command = [sys.executable, str(converter), str(folder), "--outfile", str(part_file), "--outtype", outtype]
        _check_files(folder, part)
        base = [str(original(run, root))] if part == "adapter" else []
        command += ["--base", *base] if base else []
        for read in (folder, *map(Path, base)) if not trust_remote_code else ():
            _check_no_code(read)
        with console.status(f"{converter.name} writes {target} …"):
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode == 0 and part_file.is_file():
                    part_file.replace(target)
            finally:
                part_file.unlink(missing_ok=True)
    if not target.is_file():
        last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise StageError(
            f"{converter.name} wrote no GGUF of {folder} ({last.rstrip('.')}): see what it takes with --help."
        )
    console.print(f"{target} is written ({size(target.stat().st_size)})", soft_wrap=True, markup=False)


def _check_no_code(folder: Path) -> None:
    from emloc_ray.modeling.loading import own_code

    for file, code in own_code(folder, str(folder)):
        raise ConfigError(
            f"{file} names code that came with the model ({code}), which llama.cpp's converter may run with your rights: where"
            " you trust it, add --trust-remote-code; else take auto_map out there."
        )


def _converter(name: str) -> Path:
    """llama.cpp's script, in the folder that LLAMA_CPP names or on the path."""
    named = os.environ.get("LLAMA_CPP")
    tool = shutil.which(name) or (str(Path(named, name)) if named and Path(named, name).is_file() else None)
    if tool is None:
        raise ConfigError(
            f"llama.cpp's {name} is not installed: clone https://github.com/ggml-org/llama.cpp, pip install -r its"
            " requirements.txt, and set LLAMA_CPP to its folder."
        )
    return Path(tool)


def original(run: RunDirectory, root: Path, trust_remote_code: bool = False, needs_weights: bool = False) -> Path:
    """The directory of a run's original: in the run's folders, which are in ``root``, where the run found it, or else where its
    config says, a relative path in the present directory. Raises ConfigError where it is not to be had, or names what is not its
    own, as in all sources of models."""
    from emloc_ray.modeling.loading import fetch_weights, resolve_source

    model = run.manifest()["config"]["model"]
    written, noted = model["source"], run.metrics().get("base_model")
    if noted is None or written.startswith("package:"):
        noted = written
    places = (str(root / MODEL), noted, written)
    # A relative path whose directory is gone is not asked of the hub.
    named = next((place for place in places if Path(place).expanduser().is_dir()), noted)
    source = resolve_source(named, model.get("revision"), trust_remote_code, needs_weights)
    return fetch_weights(source) if needs_weights else source.directory


def _check_files(folder: Path, part: Result) -> None:
    """Raises ConfigError where a result names what is not its own: a run may be anybody's."""
    from emloc_ray.modeling.loading import resolve_source

    if part == "merged":
        resolve_source(str(folder))
    link = next((file for file in (folder, *sorted(folder.rglob("*"))) if file.is_symlink()), None)
    if link is not None:
        raise ConfigError(
            f"{link} is a link, which may lead to any file of this machine: put a copy of that file in its place."
        )
