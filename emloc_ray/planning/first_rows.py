"""The first rows of a split as tokens, before a run: what ``validate`` counts and ``preview`` shows."""

import contextlib
import functools
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emloc_ray.config.schema import DataConfig
from emloc_ray.data.formats import Tokens, truncate
from emloc_ray.data.hub import download
from emloc_ray.data.image_places import ImagePlaces
from emloc_ray.data.images import has_images
from emloc_ray.data.reading import BadRow, Place, Row, SourceFile, read_rows, scan
from emloc_ray.data.row_formats import CHATS, columns_of, converted
from emloc_ray.data.tokenizing import TokenizeOptions
from emloc_ray.demos.tasks import write_generated
from emloc_ray.errors import ConfigError, DataError, EmlocError
from emloc_ray.io.store.shared import Shared
from emloc_ray.modeling.inputs import has_encoder
from emloc_ray.modeling.loading import ModelSource, open_tokenizer, tokenizer_dir
from emloc_ray.planning.data_checks import with_format
from emloc_ray.planning.prepared import Prepared

_PART = "\ufffd"  # what a decoder writes for bytes that are no character


@dataclass(frozen=True)
class FirstRows:
    """The first rows of a split, each with its place and its sequences as tokens, not yet cut; None for a bad row that is
    skipped. ``num_rows``: those of all its files; None before they are downloaded or made. ``ends``: the tokens at which
    generation stops."""

    split: str
    formats: tuple[str, ...]
    num_rows: int | None
    rows: tuple[tuple[str, list[Tokens] | None], ...]
    limit: int
    ends: frozenset[int] = frozenset()

    @property
    def sequences(self) -> list[Tokens]:
        """What the rows become."""
        return [tokens for _, row in self.rows for tokens in row or ()]

    @property
    def num_cut(self) -> int:
        """Sequences that are longer than the limit."""
        return sum(len(tokens) > self.limit for tokens in self.sequences)

    @property
    def num_emptied(self) -> int:
        """Sequences that have no completion, or not all of an image, within the limit."""
        return sum(truncate(tokens, self.limit) is None for tokens in self.sequences)

    @property
    def mean_tokens(self) -> float:
        """Tokens a sequence, as cut."""
        lengths = [min(len(tokens), self.limit) for tokens in self.sequences]
        return sum(lengths) / max(1, len(lengths))

    @property
    def no_end(self) -> str | None:
        """Says so where nothing that is learnt has an end."""
        learnt = [{*itertools.compress(tokens.input_ids, tokens.completion_mask)} for tokens in self.sequences]
        if not self.ends or not any(learnt) or any(self.ends & tokens for tokens in learnt):
            return None
        return (
            f"data.{self.split}: no answer of the first rows has a token at which generation stops, so the model will not"
            " learn to stop: have the chat template write one behind answers."
        )


def first_rows(prepared: Prepared, split: str = "train", count: int = 64) -> FirstRows | None:
    """The first ``count`` rows of a split as the run will tokenize them, from the hub, or a few made of a task's; None where
    the run takes them out of train. Raises ConfigError where a row is bad, or no row keeps a completion."""
    config, section = prepared.config, getattr(prepared.config.data, split)
    makes = config.data.generate if split == "train" else None
    if section is None and makes is None:
        return None
    names: dict[str, str] = {}  # of files that last no longer than this
    try:
        with tempfile.TemporaryDirectory() as folder:
            sources = [*prepared.files.get(split, ())]
            for number, place in enumerate(section.hub if section is not None else ()):
                path = Path(folder, f"{number}.parquet")
                names[str(path)] = place
                download(place, split, path, first=count)
                sources.append(with_format(scan(path), config.data))
            if makes is not None:
                path = Path(folder, f"{split}.parquet")
                names[str(path)] = f"data.generate {makes}"
                write_generated(makes, Path(folder), config.seed, max_rows=2 * count)  # of which train has most
                sources.append(with_format(scan(path), config.data))
            num_rows = None if names else sum(source.num_rows for source in sources)
            first = _tokenized(prepared, split, sources, count, num_rows, names)
    except DataError as error:
        raise ConfigError(_named(str(error), names)) from error
    if first.sequences and first.num_emptied == len(first.sequences):
        rows = f"none of the first {len(first.rows)} rows" if len(first.rows) > 1 else "not even the first row"
        whole = max(len(tokens) for tokens in first.sequences)
        raise ConfigError(
            f"data.max_seq_length {first.limit} leaves {rows} of data.{split} a token to learn: raise it; they take up to"
            f" {whole} tokens."
        )
    return first


def check_first_rows(prepared: Prepared) -> None:
    """Tokenizes the first rows of every split that is all here, once for all runs that read the same. Raises ConfigError where
    a row is bad, or none keeps a completion; opens no image file."""

    def look(split: str) -> bool:
        first_rows(prepared, split)
        return True

    for split, files in prepared.files.items():
        if not getattr(prepared.config.data, split).hub and not any(source.images for source in files):
            key = prepared.source, prepared.source.looks, split, files, prepared.config.data.model_dump_json()
            _GOOD.get(key, functools.partial(look, split))


def sequences_a_row(prepared: Prepared, split: str = "train") -> float:
    """Sequences that a row of a split becomes: above one where the chat template rewrites earlier turns of the first rows. One
    where rows show images, none of which is opened, are packed, or are known only to the run."""
    data, files = prepared.config.data, prepared.files.get(split, ())
    section = getattr(data, split)
    chats = bool({source.format for source in files} & CHATS)
    if not chats or data.packing or section is None or section.hub or any(source.images for source in files):
        return 1.0

    def count() -> float:
        try:
            first = None if _show_images(files, data) else first_rows(prepared, split)
        except EmlocError:  # of a bad row, which is told where rows are read
            first = None
        good = 0 if first is None else sum(row is not None for _, row in first.rows)
        return len(first.sequences) / good if first is not None and good else 1.0

    return _SEQUENCES.get((prepared.source, prepared.source.looks, files, data.model_dump_json()), count)


# Both are asked for several times while a run is planned, in a batch of many.
_SEQUENCES, _END, _GOOD = Shared[float](4096), Shared[Any](8), Shared[bool](4096)


def tokenize_options(prepared: Prepared, tokenizer: Path, files: Sequence[SourceFile]) -> TokenizeOptions:
    """How a config's rows become tokens, from files of one format, or of several whose rows tell theirs."""
    data, formats = prepared.config.data, {source.format for source in files}
    return TokenizeOptions(
        str(tokenizer),
        formats.pop() if len(formats) == 1 else "auto",
        data.max_seq_length,
        data.packing,
        prepared.config.model.trust_remote_code,
        has_encoder(prepared.model_config),
        data.on_error == "skip",
        ImagePlaces.of(data.image_hosts, data.image_roots),
        tuple(data.columns.items()),
        _embedded(prepared.model_config),
    )


def _embedded(model_config: Any) -> int:
    text = model_config.get_text_config()
    return (getattr(text, "vocab_size", None) or 0) + (getattr(text, "additional_vocab_size", None) or 0)


def _tokenized(
    prepared: Prepared,
    split: str,
    sources: Sequence[SourceFile],
    count: int,
    num_rows: int | None,
    names: Mapping[str, str],
) -> FirstRows:
    config = prepared.config
    formats = tuple(dict.fromkeys(source.format for source in sources))
    options = tokenize_options(prepared, tokenizer_dir(prepared.source), sources)
    rows = list(itertools.islice(_rows(sources, config.data, count), count))
    pairs = zip(rows, options.tokens(iter(rows), whole=True), strict=True)
    tokenized = tuple((_named(place, names), sequences) for (place, _), sequences in pairs)
    return FirstRows(split, formats, num_rows, tokenized, options.max_seq_length, _ends(prepared))


def _ends(prepared: Prepared) -> frozenset[int]:
    """The tokens at which the model's generation stops: by its tokenizer, config or generation_config.json."""
    source, trusted = prepared.source, prepared.config.model.trust_remote_code
    end = _END.get((source, trusted, source.looks), lambda: _end(source, trusted))
    ends = [end, getattr(prepared.model_config.get_text_config(), "eos_token_id", None)]
    with contextlib.suppress(OSError, ValueError):
        ends.append(json.loads((source.directory / "generation_config.json").read_text("utf-8")).get("eos_token_id"))
    return frozenset(end for one in ends for end in (one if isinstance(one, list) else [one]) if end is not None)


def _end(source: ModelSource, trust_remote_code: bool) -> Any:
    opened = ModelSource(tokenizer_dir(source))
    return open_tokenizer(opened, "name another", trust_remote_code=trust_remote_code).eos_token_id


def _named(text: str, names: Mapping[str, str]) -> str:
    """A text with the names in place of the paths that it has."""
    return functools.reduce(lambda said, path: said.replace(path, names[path]), names, text)


def _rows(sources: Sequence[SourceFile], data: DataConfig, count: int) -> Iterator[tuple[Place, Row]]:
    """Equally many rows of each file."""
    for source in sources:
        numbers = range(min(max(1, -(-count // len(sources))), source.num_rows))
        needed, optional = columns_of(source.format, data.columns)
        for number, row in read_rows(source, numbers, needed, optional, keep_bad=data.on_error == "skip"):
            yield Place.of(source, number), row


def _show_images(sources: Sequence[SourceFile], data: DataConfig, count: int = 64) -> bool:
    """Whether any of the first rows does; opens none."""
    for place, row in itertools.islice(_rows(sources, data, count), count):
        with contextlib.suppress(DataError):  # a bad row
            if not isinstance(row, BadRow) and has_images(converted(row, place.row_format, data.columns, place)[0]):
                return True
    return False


def marked(tokens: Tokens, tokenizer: Any) -> Iterator[tuple[bool, list[str]]]:
    """Runs of tokens as text, each with whether the loss counts them. Tokens that are parts of one character are one text."""
    pairs = zip(tokens.completion_mask, tokens.input_ids, strict=True)
    for is_learnt, run in itertools.groupby(pairs, key=lambda pair: pair[0]):
        yield is_learnt, list(_texts([token for _, token in run], tokenizer))


def _texts(ids: Sequence[int], tokenizer: Any) -> Iterator[str]:
    """A character has at most four bytes, so at most four tokens."""
    at = 0
    while at < len(ids):
        texts = (tokenizer.decode(ids[at : at + count]) for count in range(1, 5))
        count, text = next(
            ((count, text) for count, text in enumerate(texts, 1) if _PART not in text),
            (1, tokenizer.decode([ids[at]])),
        )
        yield text
        at += count
