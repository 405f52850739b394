"""What a stage may know when it runs: the prepared run, where the original lies, and what the stages before it made."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emloc_ray.config.base import StageConfig
from emloc_ray.errors import ArtifactError
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.io.runs.directory import CARD
from emloc_ray.io.runs.fingerprint import fingerprint, fingerprint_large_files
from emloc_ray.io.store.node_cache import hashes
from emloc_ray.modeling.architecture import LinearSpec, empty_model, load_config
from emloc_ray.modeling.hub_weights import commit_of
from emloc_ray.modeling.inputs import has_encoder
from emloc_ray.modeling.loading import model_files
from emloc_ray.modeling.stored_names import (
    StoredParameter,
    stored_parameters,
    stored_specs,
    tied_tensors,
    unused_tensors,
)
from emloc_ray.planning.layout import Layout
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.prepared import Prepared, Training

if TYPE_CHECKING:
    from emloc_ray.data.processors import ImageInputs
    from emloc_ray.stages.ray.final_actor import FinalActorHandle

Inputs = dict[str, Any]
Result = dict[str, Any]


def _unheard(text: str) -> None:
    """Drops a note."""


@dataclasses.dataclass(eq=False)
class Context:
    """One pass over the stages of a run; ``model_dir`` holds, or will hold, the original as safetensors.

    ``made`` has the fingerprint of the inputs of each stage that has run, ``results`` what it returned; both leave out
    stages that the config leaves out. ``note`` takes what a reader should know. ``final_actor`` corrects and merges, where
    stages run. ``detail`` takes a few words on how the running stage is doing.
    """

    prepared: Prepared
    model_dir: Path
    note: Callable[[str], None] = _unheard
    final_actor: FinalActorHandle | None = None
    detail: Callable[[str], None] = _unheard
    made: dict[str, str] = dataclasses.field(default_factory=dict)
    results: dict[str, Result] = dataclasses.field(default_factory=dict)
    _split_keys: dict[str, str] = dataclasses.field(default_factory=dict)

    def path(self, *parts: str) -> Path:
        """A file or folder of the run directory."""
        return self.prepared.run.path(*parts)

    def tokens(self, split: str) -> Path:
        """The token shards of a split."""
        return self.path("data", "tokens", split)

    @functools.cached_property
    def model_inputs(self) -> Inputs:
        """What tells the original's files from others."""
        return self._model_files()

    def check_original(self) -> None:
        """Raises ArtifactError where the original's files are others than when this pass began."""
        if self._model_files() != self.model_inputs:
            place = self.prepared.source.directory
            raise ArtifactError(f"The model in {place} was changed while the run read it: run the same command again.")

    def _model_files(self) -> Inputs:
        source = self.prepared.source
        if source.hub_id is not None:  # its weights need not be here, and its commit names them
            return {"hub": [source.hub_id, commit_of(source)]}
        if source.gguf_file is None:
            return {"files": fingerprint_large_files(model_files(source.directory))}
        file = fingerprint_large_files([source.directory / source.gguf_file])
        return {"file": file, "dtype": self.prepared.config.model.dtype}

    @functools.cached_property
    def model_key(self) -> str:
        """The fingerprint of the original."""
        return fingerprint(self.model_inputs)

    def split_key(self, split: str) -> str:
        """The fingerprint of a split's token shards, by their content."""
        if split not in self._split_keys:
            self._split_keys[split] = fingerprint(self.contents("data", "tokens", split))
        return self._split_keys[split]

    def contents(self, *parts: str) -> dict[str, str]:
        """SHA-256 of an artifact's files: another training from the same inputs may give another adapter."""
        return {file.name: sha for file, sha in hashes(self.path(*parts)).items() if file.name != CARD}

    @functools.cached_property
    def memory(self) -> MemoryModel:
        """What workers are predicted to hold."""
        return MemoryModel(self.prepared)

    def begun(self, inputs: Inputs) -> Inputs:
        """The inputs that identify a training that was broken off: those of its stage, and how a step's rows are read."""
        finetune, healing = self.prepared.config.finetune, self.prepared.config.emulator.healing
        parts: list[int | None] = [finetune.per_device_train_batch_size, finetune.gradient_accumulation_steps]
        parts += [] if healing is None else [healing.per_device_train_batch_size, healing.gradient_accumulation_steps]
        return {**inputs, "read in": parts}

    @property
    def layout(self) -> Layout:
        """The emulator's layout as planned."""
        return self.prepared.layout

    @property
    def layout_made(self) -> Layout:
        """The emulator's layout with the ranks that it was factorized to; as planned before that."""
        made = self.results.get("factorize")
        return self.layout if made is None else self.layout.as_made(made)

    @property
    def emulator_key(self) -> str:
        """What the adapter is trained on: the fingerprint of the healed emulator, the refined or the factorized one."""
        return self.made.get("heal") or self.made.get("refine") or self.made["factorize"]

    @property
    def emulator_dir(self) -> Path:
        """The emulator that the adapter is trained on."""
        return self.unhealed_dir if self.prepared.config.emulator.heals is None else self.path("emulator_healed")

    @property
    def unhealed_dir(self) -> Path:
        """The emulator that healing begins with."""
        return self.path("emulator" if self.prepared.config.emulator.refines is None else "emulator_refined")

    @property
    def final_adapter(self) -> Path:
        """The adapter that is merged."""
        return self.path("adapter_finished" if self.prepared.finishes else "adapter")

    @property
    def model_options(self) -> dict[str, Any]:
        """How every stage opens the original."""
        model = self.prepared.config.model
        return {
            "dtype": model.dtype,
            "attn_implementation": model.attn_implementation,
            "trust_remote_code": model.trust_remote_code,
        }

    @property
    def images(self) -> ImageInputs:
        """What turns the rows' images into the model's inputs."""
        from emloc_ray.data.processors import ImageInputs

        return ImageInputs(self.model_dir, self.prepared.config.model.trust_remote_code)

    def base_config(self) -> Any:
        """The original's transformers config."""
        return load_config(self.model_dir, trust_remote_code=self.prepared.config.model.trust_remote_code)

    @functools.cached_property
    def checkpoint(self) -> Checkpoint:
        """The original, opened once a pass: it lies there before a stage asks for it."""
        return Checkpoint(self.model_dir)

    def stored(self) -> dict[str, StoredParameter]:
        """The names under which the original's checkpoint holds the model's parameters."""
        return self._names[0]

    def tied(self) -> dict[str, str]:
        """The tensors of the original's checkpoint whose parameters are tied to others, and the tensors of these."""
        return self._names[1]

    def unused(self) -> frozenset[str]:
        """The tensors of the original's checkpoint that the model has no use for."""
        return unused_tensors(self.stored(), (entry.name for entry in self.checkpoint))

    @property
    def _names(self) -> tuple[dict[str, StoredParameter], dict[str, str]]:
        shapes = tuple((entry.name, entry.shape) for entry in self.checkpoint)
        return _stored_names(self.model_dir, self.prepared.config.model.trust_remote_code, shapes)

    def specs(self) -> tuple[LinearSpec, ...]:
        """The model's linears, with where the checkpoint holds them."""
        return stored_specs(self.layout.specs, self.stored(), self.checkpoint)

    def gram_groups(self, groups: Sequence[Sequence[Any]] | None = None) -> tuple[tuple[str, ...], ...]:
        """The names of the linears that compression targets, those that read the same tensor together."""
        targeted = set(self.layout.compressed)
        whole = self.layout.groups if groups is None else groups
        named = (tuple(spec.name for spec in group if spec.name in targeted) for group in whole)
        return tuple(group for group in named if group)

    def loss_on(self, training: Training | None = None) -> str:
        """The tokens whose predictions a training learns: by default the fine-tuning."""
        # A decoder beside an encoder writes the completion alone.
        section = (training or self.prepared.finetuning).section
        return "completion" if has_encoder(self.base_config()) else section.loss_on

    def pad_token_id(self) -> int:
        """The token that rows are padded with; padding is masked everywhere, so that any token serves."""
        pad = getattr(self.base_config(), "pad_token_id", None)
        return pad if isinstance(pad, int) and pad >= 0 else 0


@functools.lru_cache(maxsize=8)
def _stored_names(
    model_dir: Path, trust_remote_code: bool, shapes: tuple[tuple[str, tuple[int, ...]], ...]
) -> tuple[dict[str, StoredParameter], dict[str, str]]:
    model = empty_model(load_config(model_dir, trust_remote_code=trust_remote_code), trust_remote_code)
    stored = stored_parameters(model, dict(shapes))
    return stored, tied_tensors(model, stored)


def without(section: StageConfig, keys: Collection[str]) -> Inputs:
    """A section's settings as inputs of a stage, but for some."""
    return section.model_dump(mode="json", exclude=set(keys))
