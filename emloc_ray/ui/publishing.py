"""Where results go: the Hugging Face hub, and files for llama.cpp."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from emloc_ray.errors import ConfigError, StageError
from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.io.runs.fetch import fetch
from emloc_ray.text import counted, size
from emloc_ray.ui.cards import WRITTEN_BY, write_cards
from emloc_ray.ui.terminal import progress_bar

Part = Literal["adapter", "merged"]
_CONVERTERS = {"merged": "convert_hf_to_gguf.py", "adapter": "convert_lora_to_gguf.py"}


def result_folder(run: RunDirectory, part: Part) -> Path:
    """The folder of a run's merged model, or of its last adapter for the original.

    Raises:
        ConfigError: where the run is on an object store, or has not come so far.
    """
    if run.store is not None:
        raise ConfigError(f"{run.place} is on an object store: copy it with emloc-ray fetch, and name the copy.")
    return run.path(_result_name(run, part))


def _result_name(run: RunDirectory, part: Part) -> str:
    stages, there = run.existing().stages(), run.names()
    names = ["merged"] if part == "merged" else ["adapter_finished", "adapter"]
    for name in names:
        if WRITTEN_BY[name] in stages and name in there:
            return name
    step = WRITTEN_BY[names[-1]]
    raise ConfigError(f"{run.place} has no {names[-1]}/: run it up to there, emloc-ray {step} CONFIG.")


@contextlib.contextmanager
def _with_card(console: Console, run: RunDirectory, part: Part) -> Iterator[Path]:
    """The folder of a result with its card; of a run on an object store a copy, as long as it is needed."""
    name = _result_name(run, part)
    if run.store is None:
        write_cards(run)
        yield run.path(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        with progress_bar(console, "Fetching", in_bytes=True) as progress:
            fetch(run, Path(folder), [name], progress)
        write_cards(run, Path(folder))
        yield Path(folder, name)


def push(console: Console, run: RunDirectory, name: str, part: Part, private: bool) -> None:
    """Uploads one result with its card to a model repository of the hub, which it makes where there is none.

    Raises:
        ConfigError: where the run has not come so far, or the name is none of the hub.
        StageError: where the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    with _with_card(console, run, part) as folder:
        files = [file for file in folder.rglob("*") if file.is_file()]
        held = size(sum(file.stat().st_size for file in files))
        console.print(
            f"Pushing {folder.name}/ ({counted(len(files), 'file')}, {held}) to {name}", soft_wrap=True, markup=False
        )
        api = HfApi()
        try:
            api.create_repo(name, private=private, exist_ok=True)
            done: Any = api.upload_folder(
                repo_id=name, folder_path=folder, commit_message=f"{folder.name} of the run {run.name}, by emloc-ray"
            )
        except HFValidationError as error:
            raise ConfigError(f"{name} is no name of the hub ({error}): write OWNER/NAME.") from error
        except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise StageError(
                f"{name} cannot be pushed to ({reason}): log in with hf auth login, or check the name."
            ) from error
    console.print(f"{folder.name}/ is at {done.commit_url}", soft_wrap=True, markup=False)


def export_gguf(console: Console, run: RunDirectory, part: Part, output: Path | None, outtype: str) -> None:
    """Has llama.cpp's own converter write one result as a GGUF file.

    Raises:
        ConfigError: as :func:`result_folder`, and where the converter is not installed or the file is there.
        StageError: where the converter fails, with its last line.
    """
    folder, converter = result_folder(run, part), _converter(_CONVERTERS[part])
    target = output or run.path(f"{run.name}-{part}-{outtype}.gguf")
    if target.exists():
        raise ConfigError(f"{target} is there already: remove it, or name another with --output.")
    command = [sys.executable, str(converter), str(folder), "--outfile", str(target), "--outtype", outtype]
    if part == "adapter":
        command += ["--base", _base(run)]
    with console.status(f"{converter.name} writes {target} …"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not target.is_file():
        last = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()[-1]
        raise StageError(
            f"{converter.name} wrote no GGUF of {folder} ({last.rstrip('.')}): see what it takes with --help."
        )
    console.print(f"{target} is written ({size(target.stat().st_size)})", soft_wrap=True, markup=False)


def _converter(name: str) -> Path:
    """llama.cpp's script, in the folder that LLAMA_CPP names or on the path."""
    named = os.environ.get("LLAMA_CPP")
    found = shutil.which(name) or (str(Path(named, name)) if named and Path(named, name).is_file() else None)
    if found is None:
        raise ConfigError(
            f"llama.cpp's {name} is not installed: clone https://github.com/ggml-org/llama.cpp, pip install -r its"
            " requirements.txt, and set LLAMA_CPP to its folder."
        )
    return Path(found)


def _base(run: RunDirectory) -> str:
    """The directory of the original, whose shapes an adapter's conversion reads."""
    from emloc_ray.modeling.loading import resolve_source

    if run.path("model").is_dir():
        return str(run.path("model"))
    model = run.manifest()["config"]["model"]
    return str(resolve_source(model["source"], model.get("revision"), False, False).directory)
