"""The weights of a model on the hub, brought into a run file by file, by workers: the driver holds none of them."""

import hashlib
import tempfile
from pathlib import Path

from emloc_ray.errors import ArtifactError
from emloc_ray.io.formats.checkpoint import SINGLE_NAME, read_index
from emloc_ray.io.runs.fingerprint import hub_digest
from emloc_ray.io.store.atomic import COPY_BYTES, atomic_file
from emloc_ray.io.store.digests import digest, note_digest
from emloc_ray.io.store.lock_file import check_lock
from emloc_ray.io.store.node_cache import origin
from emloc_ray.io.store.transfer import transfer
from emloc_ray.modeling.loading import ModelSource
from emloc_ray.text import one_line


def weight_files(source: ModelSource) -> list[str]:
    """The names of the files that hold a model's weights, by its index."""
    return sorted(set(read_index(source.directory).values())) or [SINGLE_NAME]


def commit_of(source: ModelSource) -> str:
    """The commit of a model on the hub: the cache's folder of it is named so."""
    return source.directory.name


def import_weights(shared: tuple[ModelSource, Path], name: str) -> None:
    """Writes one file of a model on the hub below ``target``: from this node's cache, where ``target`` is on the same file
    system without a copy, or downloaded, and then not kept elsewhere. Raises ArtifactError where the hub does not give it, or
    the cache holds something else under its digest."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError

    source, target = shared
    assert source.hub_id is not None
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp") as folder:
        file = try_to_load_from_cache(source.hub_id, name, revision=commit_of(source))
        try:
            if not isinstance(file, str):
                file = hf_hub_download(source.hub_id, name, revision=commit_of(source), local_dir=folder)
        except RemoteEntryNotFoundError as error:
            raise ArtifactError(
                f"model.source {source.hub_id} has no {name} on the hub: name a checkpoint with all of its safetensors files."
            ) from error
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            detail = one_line(str(error).strip().split("\n")[0], 150)
            raise ArtifactError(
                f"{name} of {source.hub_id} cannot be had from the hub ({detail}): check the node's network, and HF_TOKEN in"
                " its environment."
            ) from error
        if origin(target) is None:
            check_lock(target)
            sha256 = digest(Path(file))
            _check_cached(Path(file), sha256, source.hub_id)
            note_digest(Path(file), sha256)  # before a link makes it read-only, for its owner's notes too
            transfer(Path(file), target / name, Path(file).stat().st_size, sha256)
            return
        total = hashlib.sha256()
        with Path(file).open("rb") as stream, atomic_file(target / name) as copy:
            while chunk := stream.read(COPY_BYTES):
                total.update(chunk)
                copy.write(chunk)
            _check_cached(Path(file), total.hexdigest(), source.hub_id)  # before it takes its place


def _check_cached(file: Path, sha256: str, hub_id: str) -> None:
    """Raises ArtifactError where a file of the hub's cache has another digest than the cache names it by."""
    if hub_digest(file) not in (None, sha256):
        raise ArtifactError(
            f"{file.name} of {hub_id} was altered or cut short in the hub's cache, by its SHA-256: delete {file.resolve()} and"
            " run the same command again."
        )
