"""A run's settings as one strict, frozen config."""

from __future__ import annotations

import os
import re
import typing
from typing import Any, ClassVar, Literal

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from emloc_ray.config.adapter import AdapterConfig
from emloc_ray.config.base import Budget, Patterns, Section, Size, StageConfig
from emloc_ray.config.emulator import EmulatorConfig
from emloc_ray.config.finetune import FinetuneConfig
from emloc_ray.config.steps import VARIANTS, Variant
from emloc_ray.modeling.checkpoint_config import is_at_commit


class ModelConfig(Section):
    """The original model."""

    bare: ClassVar[str] = "source"

    source: str = Field(description="hub id, local directory, .gguf file, or package:NAME/FILE")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: the checkpoint's; on GPUs that compute it bfloat16 for float32"
    )
    attn_implementation: str | None = Field(
        None,
        description="such as sdpa, flash_attention_2 or a hub kernel, OWNER/REPO@COMMIT; transformers' choice where left out",
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model; of a hub id: at a commit")
    hold: Literal["auto", "resident", "offloaded", "block_by_block"] = Field(
        "auto",
        description="whole in a worker, a block's weights at a time, or so with Grams block by block; auto: what fits",
    )

    @field_validator("attn_implementation")
    @classmethod
    def _kernel_at_a_commit(cls, name: str | None) -> str | None:
        if name is not None and "/" in name and not is_at_commit(name):
            raise ValueError(
                f"{name} is compiled code of the hub, which a branch or a tag can change at any time: write OWNER/REPO@COMMIT,"
                " the commit that you trust (40 hex digits)"
            )
        return name


Weight = typing.Annotated[float, Field(gt=0)]


class SplitConfig(Section):
    """One split of the data: files of JSON, Parquet, CSV or text, a directory or glob, local or by URI; or ``hf:DATASET``."""

    bare: ClassVar[str] = "path"

    path: Patterns | typing.Annotated[dict[str, Weight], Field(min_length=1)] = Field(
        description="file, directory, glob, URI or hf:DATASET[@SUBSET][:SPLIT]; a list of these, or a map to their shares"
    )
    num_samples: int | None = Field(None, ge=1, description="rows to sample; all by default")

    @model_validator(mode="before")
    @classmethod
    def _shares_below_path(cls, values: Any) -> Any:
        places = values if isinstance(values, dict) and values.keys().isdisjoint(cls.model_fields) else {}
        if any(re.search("[./:*]", str(place)) for place in places):
            shares = ", ".join(f"{place}: {share}" for place, share in places.items())
            raise ValueError(f"sources and their shares go below path: write {{path: {{{shares}}}}}")
        return values

    @property
    def places(self) -> list[str]:
        """All that it names, in order."""
        return [self.path] if isinstance(self.path, str) else list(self.path)

    @property
    def hub(self) -> list[str]:
        """Its data sets on the hub."""
        return [place for place in self.places if place.startswith("hf:")]

    @property
    def weights(self) -> list[float] | None:
        """The shares of its places in the split; None where all rows of each are taken."""
        return list(self.path.values()) if isinstance(self.path, dict) else None


class DataConfig(Section):
    """The task's rows and how they become tokens."""

    generate: Literal["docstrings", "return_types", "vqa"] | None = Field(
        None, description="make the task's data on the spot"
    )
    format: Literal["auto", "text", "prompt_completion", "conversational", "messages", "alpaca", "sharegpt"] = Field(
        "auto", description="what a row holds; auto: told by its columns"
    )
    columns: dict[str, str] = Field(
        {}, description="a format's columns by the names they have here: {prompt: question}"
    )
    train: SplitConfig | None = Field(None, description="rows to train on")
    calibration: SplitConfig | None = Field(None, description="left out: rows of train")
    selection: SplitConfig | None = Field(None, description="rows that auto chooses on; left out: rows kept from train")
    eval: SplitConfig | None = Field(None, description="rows that are reported on; left out: rows kept from train")
    validation: SplitConfig | None = Field(
        None, description="rows scored while training (finetune.eval_strategy); left out: rows kept from train"
    )
    healing: SplitConfig | None = Field(None, description="rows to heal the emulator on; left out: train's rows")
    max_seq_length: int = Field(512, ge=2, description="tokens that longer rows are cut to")
    packing: bool = Field(False, description="join rows into sequences of max_seq_length")
    on_error: Literal["fail", "skip"] = Field("fail", description="a bad row or image ends the run, or is left out")
    image_hosts: list[str] = Field(
        [], description="hosts that rows may name images at: of private addresses, or that a proxy alone knows"
    )
    image_roots: list[str] = Field([], description="folders and URIs of images beside the data's own")

    @property
    def row_format(self) -> str:
        """The format of all rows; ``auto`` where each file's decides."""
        return {"docstrings": "prompt_completion", "return_types": "prompt_completion", "vqa": "messages"}.get(
            self.generate or "", self.format
        )

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        from emloc_ray.data.row_formats import FORMATS  # which takes its time to import

        known = list(dict.fromkeys(name for form in FORMATS.values() for names in form for name in names))
        if unknown := [name for name in columns if name not in known]:
            raise ValueError(
                f"maps {unknown[0]!r}, which no format has: write OURS: YOURS, such as {{prompt: question, completion: answer}};"
                f" ours are {', '.join(known)}"
            )
        return columns

    @model_validator(mode="after")
    def _has_a_source(self) -> DataConfig:
        named = [
            name
            for name in ("train", "calibration", "selection", "eval", "validation")
            if getattr(self, name) is not None
        ]
        if self.generate is None and self.train is None:
            raise ValueError(
                "names no training data: set data.train.path, or data.generate: docstrings, return_types or vqa"
            )
        if self.generate is not None and any(getattr(self, name).path for name in named):
            raise ValueError(f"data.generate makes every split itself: remove data.{named[0]}.path")
        if self.generate is not None and self.format not in ("auto", self.row_format):
            raise ValueError(f"data.generate: {self.generate} makes {self.row_format} rows: leave data.format out")
        return self


class CalibrationConfig(StageConfig):
    """The small data pass that gathers Grams.

    It takes rows in the order of their hash, until there are ``num_calibration_samples`` rows or ``num_calibration_tokens``
    tokens, prompt and completion, as cut to ``data.max_seq_length``. Where both are set, the first that is reached counts;
    where neither is, 128 rows.
    """

    num_calibration_samples: int | None = Field(128, ge=1, description="rows; null: no bound, as where tokens are set")
    num_calibration_tokens: int | None = Field(None, ge=1, description="tokens, reached by whole rows")
    tokens: Literal["all", "completion"] = Field("all", description="the tokens of a row that count")
    batch_size: int = Field(8, ge=1, description="rows of a forward pass")
    rows_per_shard: int = Field(32, ge=1, description="rows of a unit of work, which is counted once")
    keep: Literal["grams", "none"] = Field("grams", description="none: deleted once the adapter is corrected")
    # Below some hundred tokens, all of the block's tokens describe an expert's inputs better than its own few: a factor of
    # higher rank than there are tokens is partly arbitrary.
    min_expert_tokens: int = Field(
        256, ge=0, description="experts with fewer tokens get all of their block's; 0: never"
    )

    @model_validator(mode="before")
    @classmethod
    def _tokens_alone_decide(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("num_calibration_tokens") is not None:
            return {"num_calibration_samples": None, **values}
        return values


class CorrectionConfig(Section):
    """The correction of the adapter for the difference between emulator and original."""

    method: Literal["auto", "none", "projection", "covariance", "adapted"] = Field(
        "auto",
        description="auto: measures none, covariance and two strengths of adapted, keeps what helps on the selection split",
    )
    clamp: float | None = Field(
        3.0, gt=0, description="the paper's lambda; null: unclamped; auto, adapted and none ignore it"
    )
    strength: float = Field(1.0, ge=0, le=4, description="factor of the correction; auto and none ignore it")
    dampening_frac: float = Field(
        1e-4, gt=0, lt=1, description="share of the mean diagonal of QᵀGQ that covariance adds to it"
    )
    num_selection_samples: int = Field(64, ge=1, description="rows that auto chooses on, at most")
    max_share: float | None = Field(
        0.1, gt=0, description="tokens that auto may score, as a share of those that are trained on; null: all it has"
    )
    update_tolerance: float = Field(
        1e-3, ge=0, lt=1, description="share of its norm that a full-rank update may lose in its dominant subspace"
    )

    @property
    def reads_adapted(self) -> bool:
        """Whether the emulator with the adapter reads rows for it."""
        return self.method in ("auto", "adapted")

    @property
    def unread(self) -> tuple[str, ...]:
        """The settings that its method does not read."""
        both = ("clamp", "strength")
        return {"auto": both, "none": both, "adapted": ("clamp",)}.get(self.method, ())


class MergeConfig(StageConfig):
    """The merge of the corrected adapter into the original's weights."""

    gpus_per_worker: Literal[0] = Field(0, description="none: merging is work for CPUs")
    chunk_bytes: int = Field(32 * 2**20, ge=4096, description="float32 bytes of a row chunk")
    max_shard_size: Size | None = Field(None, description="such as 5GB; left out: the original's shards")

    @field_validator("gpus_per_worker", mode="before")
    @classmethod
    def _on_cpus(cls, gpus: Any) -> Any:
        if gpus != 0:
            raise ValueError(
                "merging adds thin products to shards, which is work for CPUs: remove merge.gpus_per_worker"
            )
        return 0


class EvaluationConfig(StageConfig):
    """Measurements on the held-out split."""

    variants: list[Variant] = Field(
        list(VARIANTS), description="models to score; finished too where exact_steps are and merged is left out"
    )
    num_samples: int | None = Field(256, ge=1, description="held-out rows; null: all")
    batch_size: int = Field(8, ge=1, description="rows of a forward pass")
    num_generations: int = Field(4, ge=0, description="sample generations shown in the report")
    num_exact_match: int = Field(32, ge=0, description="held-out prompts completed greedily for exact match")
    max_new_tokens: int = Field(32, ge=1, description="tokens of a completion, for samples and exact match")
    upper_bound: str | None = Field(
        None, description="run directory of LoRA on the original: compression_ratio: 1.0, quantization: none"
    )

    @field_validator("variants")
    @classmethod
    def _has_what_is_compared(cls, variants: list[Variant]) -> list[Variant]:
        if missing := {"original", "corrected"} - set(variants):
            raise ValueError(f"{' and '.join(sorted(missing))} must be among them: gains are theirs")
        return [variant for variant in VARIANTS if variant in variants]


_OF_A_NEW_RAY = ("num_cpus", "num_gpus", "resources", "labels", "object_store_memory")


class RayConfig(Section):
    """Where Ray is; every other key goes to ``ray.init``."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    address: str | None = Field(
        None, description="address of a running cluster, or auto; left out: Ray is started here"
    )
    num_cpus: int | None = Field(None, ge=1, description="CPUs of a Ray that is started here; left out: all")
    num_gpus: int | None = Field(None, ge=0, description="GPUs of a Ray that is started here; left out: all")

    @property
    def joins(self) -> bool:
        """Whether a running Ray is joined: named here, or by RAY_ADDRESS, as Ray itself sets it for a submitted job."""
        return (self.address or os.environ.get("RAY_ADDRESS") or "local") != "local"

    @property
    def init_options(self) -> dict[str, Any]:
        """The arguments of ``ray.init`` beside the address; without sizes where a running Ray is joined."""
        return self.model_dump(exclude={"address", *(_OF_A_NEW_RAY if self.joins else ())}, exclude_none=True)


class RunConfig(Section):
    """One run: one model, one task, one emulator, one adapter."""

    run_dir: str = Field(description="where everything goes: a directory, or a URI such as s3://BUCKET/RUN")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of every random draw")
    memory_budget: Budget | None = Field(
        "inference",
        description="what one worker may hold, such as 24GiB; inference: what the original takes for a row; null: no bound",
    )
    model: ModelConfig = Field(description="the original")
    data: DataConfig = Field(description="the task's rows")
    calibration: CalibrationConfig = Field(CalibrationConfig(), description="Grams and gradients, and their workers")
    emulator: EmulatorConfig = Field(EmulatorConfig(), description="its size and factors; workers of the factorization")
    adapter: AdapterConfig = Field(AdapterConfig(), description="the method and its settings")
    finetune: FinetuneConfig = Field(
        FinetuneConfig(), description="settings and workers of the training, and of the healing"
    )
    correction: CorrectionConfig = Field(CorrectionConfig(), description="by evaluation's workers")
    merge: MergeConfig = Field(MergeConfig(), description="shards of the merged model, and their workers")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="models to score, and the workers")
    ray: RayConfig = Field(RayConfig(), description="the cluster")

    @property
    def budget_is_default(self) -> bool:
        """Whether ``memory_budget`` was left out: then a stage that cannot keep to it gets a remark instead of being refused."""
        return "memory_budget" not in self.model_fields_set

    @model_serializer(mode="wrap")
    def _as_written(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the budget where it was left out, which says more than its default."""
        values: dict[str, Any] = dump(self)
        if self.budget_is_default:
            values.pop("memory_budget", None)
        return values

    @property
    def undecided_gpus(self) -> list[str]:
        """The keys whose GPUs are ``auto``."""
        names = [name for name in WORKER_SECTIONS if getattr(self, name).gpus_per_worker == "auto"]
        return [f"{name}.gpus_per_worker" for name in names]

    def with_gpus(self, available: float) -> RunConfig:
        """Each ``gpus_per_worker: auto`` decided by the GPUs that Ray has or can add; workers of a training start together,
        so that each of them has to get one."""
        decided = {}
        for name in WORKER_SECTIONS:
            section = getattr(self, name)
            if section.gpus_per_worker == "auto":
                gpus = 1.0 if available >= section.workers_at_once else 0.0
                decided[name] = section.model_copy(update={"gpus_per_worker": gpus})
        return self.model_copy(update=decided)

    @model_validator(mode="before")
    @classmethod
    def _prefixes_need_their_cache(cls, values: Any) -> Any:
        """Turns gradient checkpointing off by default, as it drops the cache that a prefix consists of."""
        adapter = values.get("adapter") if isinstance(values, dict) else None
        if isinstance(adapter, dict) and adapter.get("method") == "prefix_tuning":
            section = values.get("finetune") or {}
            if isinstance(section, dict) and "gradient_checkpointing" not in section:
                return {**values, "finetune": {**section, "gradient_checkpointing": False}}
        return values

    @model_validator(mode="after")
    def _adapter_agrees(self) -> RunConfig:
        method, problems = self.adapter.method, []
        if method == "prefix_tuning" and self.finetune.gradient_checkpointing:
            problems.append(
                "finetune.gradient_checkpointing drops the cache that holds prefix_tuning's prefix: set it to false"
            )
        if self.finetune.deepspeed is not None and method not in ("lora", "rslora"):
            problems.append(f"finetune.deepspeed goes with adapter.method lora or rslora, not with {method}: remove it")
        if self.finetune.loraplus_lr_ratio is not None and method not in ("lora", "rslora", "dora"):
            problems.append(f"finetune.loraplus_lr_ratio is of LoRA's two factors, and {method} has others: remove it")
        if self.finetune.packing and self.adapter.is_prompt:
            problems.append(
                f"finetune.packing does not go with adapter.method {method}, whose tokens come before a row's"
            )
        if self.finetune.packing and self.data.packing:
            problems.append("finetune.packing keeps apart rows that data.packing has joined: remove one of them")
        if not self.adapter.is_additive and self.correction.method not in ("auto", "none"):
            problems.append(
                f"correction.method: {self.correction.method} corrects updates of weights, and {method} makes none: leave it"
                " at auto"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        if self.data.healing is not None and self.emulator.healing is None:
            raise ValueError(
                "data.healing names rows to heal on, but there is no healing: set emulator.healing.steps, or remove it"
            )
        if self.data.validation is not None and not self.finetune.validates:
            raise ValueError(
                "data.validation names rows to score while training, and finetune.eval_strategy is no: set it to steps, or"
                " remove it"
            )
        if self.emulator.objective == "weights" and self.emulator.allocation != "uniform":
            raise ValueError(
                "emulator.objective: weights reads no data, but the ranks of"
                f" emulator.allocation: {self.emulator.allocation} follow from data: set it to uniform"
            )
        return self


# The sections that say what workers a stage has.
WORKER_SECTIONS = tuple(
    name for name, field in RunConfig.model_fields.items() if isinstance(field.default, StageConfig)
)
