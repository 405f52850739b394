"""What other tools call our keys: their names in an unknown key, and their whole configs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PER_DEVICE = "finetune.per_device_train_batch_size"
_ACCUMULATION = "finetune.gradient_accumulation_steps"
PEERS = {
    "micro_batch_size": _PER_DEVICE,
    "batch_size": _PER_DEVICE,
    "train_batch_size": _PER_DEVICE,
    "per_device_batch_size": _PER_DEVICE,
    "per_device_train_batch_size": _PER_DEVICE,
    "per_gpu_train_batch_size": _PER_DEVICE,
    "gradient_accumulation": _ACCUMULATION,
    "gradient_accumulation_steps": _ACCUMULATION,
    "grad_accum": _ACCUMULATION,
    "accumulation_steps": _ACCUMULATION,
    "lr": "finetune.learning_rate",
    "learning_rate": "finetune.learning_rate",
    "epochs": "finetune.num_train_epochs",
    "num_epochs": "finetune.num_train_epochs",
    "num_train_epochs": "finetune.num_train_epochs",
    "steps": "finetune.max_steps",
    "num_steps": "finetune.max_steps",
    "max_iters": "finetune.max_steps",
    "iters": "finetune.max_steps",
    "max_steps": "finetune.max_steps",
    "optimizer": "finetune.optim",
    "optim": "finetune.optim",
    "scheduler": "finetune.lr_scheduler_type",
    "lr_scheduler": "finetune.lr_scheduler_type",
    "lr_scheduler_type": "finetune.lr_scheduler_type",
    "warmup": "finetune.warmup_steps",
    "warmup_steps": "finetune.warmup_steps",
    "warmup_ratio": "finetune.warmup_steps",
    "weight_decay": "finetune.weight_decay",
    "max_grad_norm": "finetune.max_grad_norm",
    "gradient_clipping": "finetune.max_grad_norm",
    "gradient_checkpointing": "finetune.gradient_checkpointing",
    "bf16": "finetune.bf16",
    "save_steps": "finetune.save_steps",
    "logging_steps": "finetune.logging_steps",
    "deepspeed": "finetune.deepspeed",
    "train_on_inputs": "finetune.loss_on",
    "train_on_prompt": "finetune.loss_on",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "rank": "adapter.r",
    "lora_alpha": "adapter.lora_alpha",
    "alpha": "adapter.lora_alpha",
    "lora_dropout": "adapter.lora_dropout",
    "lora_target": "adapter.target_modules",
    "lora_target_modules": "adapter.target_modules",
    "adapter_type": "adapter.method",
    "peft_type": "adapter.method",
    "finetuning_type": "adapter.method",
    "load_in_4bit": "emulator.quantization",
    "load_in_8bit": "emulator.quantization",
    "quantization_bit": "emulator.quantization",
    "cutoff_len": "data.max_seq_length",
    "sequence_len": "data.max_seq_length",
    "seq_len": "data.max_seq_length",
    "max_length": "data.max_seq_length",
    "max_seq_len": "data.max_seq_length",
    "max_seq_length": "data.max_seq_length",
    "model_max_length": "data.max_seq_length",
    "sample_packing": "finetune.packing",
    "packing": "finetune.packing",
    "dataset": "data.train",
    "datasets": "data.train",
    "dataset_name": "data.train",
    "train_data": "data.train",
    "train_file": "data.train",
    "validation": "data.eval",
    "validation_file": "data.eval",
    "val": "data.eval",
    "valid": "data.eval",
    "dev": "data.eval",
    "test": "data.eval",
    "test_datasets": "data.eval",
    "eval_dataset": "data.eval",
    "eval_file": "data.eval",
    "max_samples": "data.train.num_samples",
    "base_model": "model.source",
    "model_name_or_path": "model.source",
    "model_name": "model.source",
    "model_id": "model.source",
    "attn_implementation": "model.attn_implementation",
    "flash_attn": "model.attn_implementation",
    "trust_remote_code": "model.trust_remote_code",
    "output_dir": "run_dir",
    "seed": "seed",
}
"""Names that other tools give what one of our keys means; no key here is refused."""

# What a file of another tool's has, and ours has not: one of the first, and one of the second.
_TOOLS = {
    "LLaMA-Factory": (("model_name_or_path",), ("finetuning_type", "stage", "template", "cutoff_len", "dataset_dir")),
    "axolotl": (("base_model",), ("datasets", "micro_batch_size", "sequence_len", "lora_r", "num_epochs", "adapter")),
}


def peer_key(key: str) -> str | None:
    """Our key for a dotted key whose last part is another tool's name; None where that is the key itself."""
    ours = PEERS.get(key.rpartition(".")[2].lower())
    return None if ours == key else ours


def config_of_peer(values: Mapping[str, Any]) -> str | None:
    """Says which tool a config is of, and what its keys are called here; None where it is not recognized as one of those."""
    tool = next(
        (name for name, needs in _TOOLS.items() if all(any(key in values for key in one) for one in needs)), None
    )
    if tool is None:
        return None
    names = {"adapter": "adapter.method"} if tool == "axolotl" else {}
    ours = {key: PEERS.get(str(key)) or names.get(str(key)) for key in values}
    mapped = ", ".join(f"{key} as {name}" for key, name in ours.items() if name)
    rest = ", ".join(str(key) for key, name in ours.items() if not name)
    return f"this is a config of {tool}: write {mapped}{f'; without a counterpart here: {rest}' if rest else ''}."
