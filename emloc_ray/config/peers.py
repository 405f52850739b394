"""What other tools call our keys: their names in an unknown key, and their whole configs."""

from collections.abc import Callable, Mapping
from typing import Any

# Each of our keys with what other tools call it; a name with its section means this only there.
_OTHER_NAMES = {
    "finetune.per_device_train_batch_size": "micro_batch_size batch_size train_batch_size per_device_batch_size"
    " per_device_train_batch_size per_gpu_train_batch_size",
    "finetune.gradient_accumulation_steps": "gradient_accumulation gradient_accumulation_steps grad_accum accumulation_steps",
    "finetune.learning_rate": "lr learning_rate",
    "finetune.num_train_epochs": "epochs num_epochs num_train_epochs",
    "finetune.max_steps": "steps num_steps max_iters iters max_steps",
    "finetune.optim": "optimizer optim",
    "finetune.lr_scheduler_type": "scheduler lr_scheduler lr_scheduler_type",
    "finetune.warmup_steps": "warmup warmup_steps warmup_ratio",
    "finetune.weight_decay": "weight_decay",
    "finetune.max_grad_norm": "max_grad_norm gradient_clipping",
    "finetune.gradient_checkpointing": "gradient_checkpointing",
    "finetune.bf16": "bf16",
    "finetune.save_steps": "save_steps",
    "finetune.logging_steps": "logging_steps",
    "finetune.deepspeed": "deepspeed",
    "finetune.loss_on": "train_on_inputs train_on_prompt",
    "adapter.r": "lora_r lora_rank rank",
    "adapter.lora_alpha": "lora_alpha alpha",
    "adapter.lora_dropout": "lora_dropout",
    "adapter.target_modules": "lora_target lora_target_modules",
    "adapter.method": "adapter_type peft_type finetuning_type",
    "adapter": "lora peft lora_config peft_config",
    "emulator.quantization": "load_in_4bit load_in_8bit quantization_bit bits",
    "emulator.compression_ratio": "ratio emulator.rank emulator.r",
    "finetune": "training trainer training_args training_arguments",
    "data.max_seq_length": "cutoff_len sequence_len seq_len max_length max_seq_len max_seq_length model_max_length",
    "finetune.packing": "sample_packing packing",
    "data.train": "dataset datasets dataset_name train_data train_file",
    "data.eval": "validation validation_file val valid dev test test_datasets eval_dataset eval_file",
    "data.train.num_samples": "max_samples data.num_samples",
    "correction.clamp": "correction.lambda",
    "model.source": "base_model model_name_or_path model_name model_id name_or_path",
    "model.attn_implementation": "attn_implementation flash_attn flash_attention",
    "model.trust_remote_code": "trust_remote_code",
    "run_dir": "output_dir",
    "seed": "seed",
}
PEERS = {other: ours for ours, names in _OTHER_NAMES.items() for other in names.split()}
"""Names that other tools give what one of our keys means; no key here is refused."""

# What a file of another tool's has, and ours has not: one of the first, and one of the second.
_TOOLS = {
    "LLaMA-Factory": (("model_name_or_path",), ("finetuning_type", "stage", "template", "cutoff_len", "dataset_dir")),
    "axolotl": (("base_model",), ("datasets", "micro_batch_size", "sequence_len", "lora_r", "num_epochs", "adapter")),
}


def peer_key(key: str) -> str | None:
    """Our key for a dotted key that another tool's name is, or its last part; None where that is the key itself."""
    ours = PEERS.get(key) or PEERS.get(key.rpartition(".")[2].lower())
    return None if ours == key else ours


def config_of_peer(values: Mapping[str, Any], passed_on: Callable[[str], str | None]) -> list[str]:
    """Says which tool a config is of, and what each key is called here, a sentence a key; nothing where it is none of those.
    ``passed_on``: our key for one that ``finetune`` passes on."""
    tool = next(
        (name for name, needs in _TOOLS.items() if all(any(key in values for key in one) for one in needs)), None
    )
    if tool is None:
        return []
    names = {"adapter": "adapter.method"} if tool == "axolotl" else {}
    ours = {key: names.get(str(key)) or PEERS.get(str(key)) or passed_on(str(key)) for key in values}
    mapped = [f"write {key} as {name}." for key, name in ours.items() if name]
    rest = ", ".join(str(key) for key, name in ours.items() if not name)
    others = [f"these have no counterpart here: {rest}."] if rest else []
    return [f"this is a config of {tool}: its keys have other names here.", *mapped, *others]
