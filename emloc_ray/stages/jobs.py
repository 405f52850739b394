"""What the config says of each stage, as that stage's flat job over artifact paths. Importing this imports ray."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from emloc_ray.config.base import StageConfig
from emloc_ray.config.schema import HealingConfig
from emloc_ray.data.ingest import SampleOrder
from emloc_ray.data.token_shards import TokenShards
from emloc_ray.io.formats.checkpoint import Checkpoint
from emloc_ray.modeling.architecture import LinearSpec, empty_model, load_config
from emloc_ray.modeling.inputs import has_encoder
from emloc_ray.modeling.stored_names import StoredParameter, renamed_tensors, stored_parameters, stored_specs
from emloc_ray.planning.layout import adapter_settings
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.plan import num_steps, row_lengths
from emloc_ray.planning.prepared import Prepared
from emloc_ray.planning.training import factor_ranks, healing_run, healing_split, packs_late
from emloc_ray.stages.calibrate.job import CalibrationJob, Groups, Labels
from emloc_ray.stages.correct.correct import CorrectionJob, candidates
from emloc_ray.stages.evaluate import EvaluationJob
from emloc_ray.stages.factorize.allocate import AllocationJob
from emloc_ray.stages.factorize.factorize import FactorizationJob
from emloc_ray.stages.finetune.training import FinetuneJob
from emloc_ray.stages.heal.fold import FoldJob
from emloc_ray.stages.heal.heal import HealingJob
from emloc_ray.stages.heal.teacher import TeacherJob
from emloc_ray.stages.merge import MergeJob
from emloc_ray.stages.ray.tasks import Resources


@dataclass(frozen=True)
class Jobs:
    """The jobs of one run; ``model_dir`` holds the original as safetensors."""

    prepared: Prepared
    model_dir: Path

    @property
    def model_options(self) -> dict[str, Any]:
        """How every stage opens the original."""
        model = self.prepared.config.model
        return {
            "dtype": model.dtype,
            "attn_implementation": model.attn_implementation,
            "trust_remote_code": model.trust_remote_code,
        }

    def stored(self) -> dict[str, StoredParameter]:
        """Under which names the original's checkpoint holds what is in the model."""
        names = tuple(entry.name for entry in Checkpoint(self.model_dir))
        return _stored_parameters(self.model_dir, self.prepared.config.model.trust_remote_code, names)

    def specs(self) -> tuple[LinearSpec, ...]:
        """The model's linears, with where the checkpoint holds them."""
        return stored_specs(self.prepared.layout.specs, self.stored(), Checkpoint(self.model_dir))

    def base_config(self) -> Any:
        """The original's transformers config."""
        return load_config(self.model_dir, trust_remote_code=self.prepared.config.model.trust_remote_code)

    def gram_groups(self, groups: Sequence[Sequence[Any]] | None = None) -> Groups:
        """The names of the linears that compression targets, those that read the same tensor together."""
        targeted = set(self.prepared.layout.compressed)
        whole = self.prepared.layout.groups if groups is None else groups
        named = (tuple(spec.name for spec in group if spec.name in targeted) for group in whole)
        return tuple(group for group in named if group)

    def calibration(self) -> CalibrationJob:
        """With the mode and the waves that fit a worker's memory."""
        memory = MemoryModel(self.prepared, row_lengths(self.prepared))
        mode = memory.calibration_mode()
        section = self.prepared.config.calibration
        return CalibrationJob(
            self.model_dir,
            self.tokens("calibration"),
            self.gram_groups(),
            (0, TokenShards(self.tokens("calibration")).num_shards),
            section.tokens,
            section.batch_size,
            self._pad_token_id(),
            tuple(self.model_options.items()),
            mode,
            tuple(self.gram_groups(wave) for wave in memory.waves()) if mode == "resident" else None,
            experts=self.experts(),
            min_expert_tokens=section.min_expert_tokens,
            streams=tuple((s.name, s.stream) for s in self.prepared.layout.specs if s.stream != "row"),
            between=tuple((s.name, s.block) for s in self.prepared.layout.specs if s.between),
        )

    def gradients(self) -> CalibrationJob:
        """The same pass over the same rows, forward and back, for the sums of gradients of what linears give."""
        memory = MemoryModel(self.prepared, row_lengths(self.prepared))
        waves = tuple(tuple((spec.name,) for spec in wave) for wave in memory.gradient_waves())
        return dataclasses.replace(
            self.calibration(),
            groups=tuple(group for wave in waves for group in wave),
            mode="resident",
            waves=waves,
            experts=(),
            gradients=Labels(self.loss_on(), self.prepared.config.seed),
        )

    def allocation(self) -> AllocationJob:
        """Of the ranks that the linears whose ratio no pattern names have together."""
        config, layout = self.prepared.config, self.prepared.layout
        allocated, placed = set(layout.allocated), {spec.name: spec for spec in self.specs()}
        groups = (tuple(placed[s.name] for s in group if s.name in allocated) for group in layout.groups)
        return AllocationJob(
            model_dir=self.model_dir,
            calibration_dir=self._path("calibration"),
            gradients_dir=self._path("gradients"),
            groups=tuple(group for group in groups if group),
            ranks={name: layout.ranks[name] for name in layout.allocated},
            plain_factors=layout.objective == "activations",
            dampening_frac=config.emulator.dampening_frac,
            gradient_dampening_frac=config.emulator.gradient_dampening_frac,
            never_dense=tuple(name for name in layout.allocated if not layout.may_be_dense(name)),
            storage=layout.storage,
        )

    def experts(self) -> tuple[tuple[str, int], ...]:
        """The Grams of experts' linears, with how many inputs these have."""
        specs = {spec.name: spec for spec in self.prepared.layout.specs}
        firsts = [specs[group[0]] for group in self.gram_groups()]
        return tuple((spec.name, spec.in_features) for spec in firsts if spec.routed_share is not None)

    def factorization(self) -> FactorizationJob:
        """Every group of linears that share an input."""
        config, layout = self.prepared.config, self.prepared.layout
        placed = {spec.name: spec for spec in self.specs()}
        in_4bit, targeted = () if packs_late(self.prepared) else layout.in_4bit, set(layout.compressed)
        return FactorizationJob(
            model_dir=self.model_dir,
            out_dir=self._path("emulator"),
            groups=tuple(tuple(placed[spec.name] for spec in group) for group in layout.groups),
            ranks=factor_ranks(self.prepared),
            dampening_frac=config.emulator.dampening_frac,
            seed=config.seed,
            renamed=renamed_tensors(self.stored()),
            in_4bit=in_4bit,
            without_gram=tuple(name for name in in_4bit if name not in targeted),
            kept_wide=layout.kept_wide,
            gradients_dir=self._path("gradients") if layout.objective == "predictions" and layout.ranks else None,
            gradient_dampening_frac=config.emulator.gradient_dampening_frac,
            by_weights=layout.objective == "weights",
            storage=layout.storage,
        )

    @property
    def emulator_dir(self) -> Path:
        """The emulator that the adapter is tuned on, the healed one where it is healed."""
        return self._path("emulator" if self.prepared.config.emulator.heals is None else "emulator_healed")

    def healing(self, healing: HealingConfig, name: str) -> HealingJob:
        """``name`` is what a later try of the same healing goes on from; all but the outcome is in ``healing/``."""
        own, layout, place = Jobs(healing_run(self.prepared, healing), self.model_dir), self.prepared.layout, "healing"
        training = replace(
            own.finetuning(name),
            emulator_dir=self._path("emulator"),
            tokens_dir=self.tokens(healing_split(self.prepared.config)),
            out_dir=self._path(place, "adapter"),
            storage_dir=self._path(place),
            teacher_dir=self._path(place, "teacher"),
            stage="heal",
        )
        num_workers = self.prepared.config.finetune.num_workers
        order = SampleOrder(len(TokenShards(training.tokens_dir)), training.batch_size, 0, num_workers, training.seed)
        teacher = TeacherJob(
            self.model_dir,
            training.tokens_dir,
            self._path(place, "teacher"),
            order,
            training.max_steps * self.prepared.config.finetune.gradient_accumulation_steps,
            healing.num_teacher_logits,
            training.loss_on,
            training.batch_size,
            training.pad_token_id,
            self.model_options,
        )
        fold = FoldJob(
            training.emulator_dir,
            training.out_dir,
            self._path("emulator_healed"),
            layout.ranks,
            own.prepared.layout.adapted,
            layout.in_4bit,
            tuple(s.name for s in layout.specs if s.transposed and s.routed_share is None),
            layout.kept_wide,
            layout.storage,
        )
        return HealingJob(teacher, training, fold)

    def num_steps(self) -> int:
        """Optimizer steps of the fine-tuning, from the rows that it has."""
        return num_steps(self.prepared.config, len(TokenShards(self.tokens("train"))))

    def trained_tokens(self) -> float:
        """Those that all steps of the fine-tuning read, of rows of mean length."""
        section, shards = self.prepared.config.finetune, TokenShards(self.tokens("train"))
        rows = section.per_device_train_batch_size * section.gradient_accumulation_steps * section.num_workers
        return self.num_steps() * rows * float(shards.index["tokens"]) / max(1, len(shards))

    def finetuning(self, name: str) -> FinetuneJob:
        """``name`` is what a later try of the same training goes on from."""
        config = self.prepared.config
        section = config.finetune
        return FinetuneJob(
            emulator_dir=self.emulator_dir,
            tokens_dir=self.tokens("train"),
            out_dir=self._path("adapter_emulator"),
            storage_dir=self._path("training"),
            name=name,
            adapter=self._adapter_settings(),
            portable_targets=self._portable_targets(),
            base_model=self._base_model(),
            max_steps=self.num_steps(),
            batch_size=section.per_device_train_batch_size,
            seed=config.seed,
            loss_on=self.loss_on(),
            pad_token_id=self._pad_token_id(),
            max_failures=section.max_failures,
            training_arguments={"run_name": self.prepared.run.name, **_training_arguments(section)},
            zero_config=self.prepared.zero_config,
            model_options=self.model_options,
        )

    def correction(self) -> CorrectionJob:
        """With the candidates that the config leaves to choose among."""
        config, layout = self.prepared.config, self.prepared.layout
        section = config.correction
        method = section.method if layout.differs and config.adapter.is_additive else "none"
        return CorrectionJob(
            model_dir=self.model_dir,
            emulator_dir=self.emulator_dir,
            calibration_dir=self._path("calibration") if layout.differs else None,
            adapter_dir=self._path("adapter_emulator"),
            out_dir=self._path("adapter"),
            selection_dir=self.tokens("selection"),
            specs=self.specs(),
            candidates=tuple(candidates(method, section.clamp, section.strength)),
            max_tokens=None if section.max_share is None else int(section.max_share * self.trained_tokens()),
            dampening_frac=section.dampening_frac,
            update_tolerance=section.update_tolerance,
            batch_size=config.evaluation.batch_size,
            loss_on=self.loss_on(),
            pad_token_id=self._pad_token_id(),
            model_options=self.model_options,
        )

    def merging(self) -> MergeJob:
        """Of the corrected adapter into the original."""
        section = self.prepared.config.merge
        return MergeJob(
            self.model_dir,
            self._path("adapter"),
            self._path("merged"),
            self.specs(),
            section.chunk_bytes,
            section.max_shard_size,
        )

    def evaluation(self) -> EvaluationJob:
        """Of every variant on the held-out rows."""
        config = self.prepared.config
        section = config.evaluation
        return EvaluationJob(
            model_dir=self.model_dir,
            emulator_dir=self.emulator_dir,
            trained_adapter_dir=self._path("adapter_emulator"),
            corrected_adapter_dir=self._path("adapter"),
            merged_dir=None if config.adapter.is_prompt else self._path("merged"),
            tokens_dir=self.tokens("eval"),
            loss_on=self.loss_on(),
            batch_size=section.batch_size,
            pad_token_id=self._pad_token_id(),
            num_generations=section.num_generations,
            num_exact_match=section.num_exact_match,
            max_new_tokens=section.max_new_tokens,
            variants=tuple(section.variants),
            model_options=self.model_options,
        )

    def tokens(self, split: str) -> Path:
        """The token shards of a split."""
        return self._path("data", "tokens", split)

    def _path(self, *parts: str) -> Path:
        return self.prepared.run.path(*parts)

    def loss_on(self) -> str:
        """The tokens whose predictions are the task's."""
        # A decoder beside an encoder writes the completion alone.
        return "completion" if has_encoder(self.base_config()) else self.prepared.config.finetune.loss_on

    def _pad_token_id(self) -> int:
        # Padding is masked everywhere: any token of the vocabulary serves.
        pad = getattr(self.base_config(), "pad_token_id", None)
        return pad if isinstance(pad, int) and pad >= 0 else 0

    def _base_model(self) -> str:
        if self.prepared.source.gguf_file is None:
            return self.prepared.config.model.source
        run = self.prepared.run
        return str(self.model_dir) if run.store is None else f"{run.place.partition('?')[0]}/model"

    def _portable_targets(self) -> str | list[str]:
        targets = self.prepared.layout.portable_targets
        return targets if isinstance(targets, str) else list(targets)

    def _adapter_settings(self) -> dict[str, Any]:
        settings = adapter_settings(self.prepared.config.adapter, self.prepared.layout, self.base_config())
        if settings.get("prompt_tuning_init") == "TEXT":
            settings["tokenizer_name_or_path"] = str(self.model_dir)
        return settings


@functools.lru_cache(maxsize=8)
def _stored_parameters(model_dir: Path, trust_remote_code: bool, names: tuple[str, ...]) -> dict[str, StoredParameter]:
    config = load_config(model_dir, trust_remote_code=trust_remote_code)
    return stored_parameters(empty_model(config, trust_remote_code), names)


def resources(section: StageConfig) -> Resources:
    """What a section asks of Ray."""
    return Resources(section.num_workers, section.cpus_per_worker, section.gpus_per_worker)


def _training_arguments(section: Any) -> dict[str, Any]:
    """What the finetune section says to Hugging Face's TrainingArguments, but for what the stage sets itself."""
    own = {*StageConfig.model_fields, "loss_on", "max_steps", "num_train_epochs", "per_device_train_batch_size"}
    dumped: dict[str, Any] = section.model_dump(mode="json", exclude={*own, "max_failures", "deepspeed"})
    return dumped
