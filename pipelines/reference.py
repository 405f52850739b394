"""EMLoC from end to end on one model and one data set, in plain torch, transformers and PEFT: read this first.

    python pipelines/reference.py MODEL rows.jsonl --steps 60

MODEL is a directory as transformers saves it, or a .gguf file; a row is ``{"prompt": ..., "completion": ...}``. It prints
the loss of the original and of each model made from it, on the first tenth of the rows, which is not trained on.

EMLoC (https://arxiv.org/abs/2506.12015; sections below are the paper's) fine-tunes a model in the memory that running it
takes. It trains a LoRA adapter on a low-rank *emulator* of the model, corrects the adapter for the difference between the
two, and merges it into the model. This file is the method alone: the original and its emulator both in memory, one row at
a time, float64 where rounding could decide. `emloc_ray` does the same at scale; its tests hold it to this file.
"""

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler


@dataclass(frozen=True)
class Settings:
    """What there is to choose, on the command line too: ``--compression-ratio 0.25``."""

    max_seq_length: int = 192
    num_calibration_samples: int = 64
    compression_ratio: float = 0.5
    r: int = 8
    lora_alpha: int = 16
    steps: int = 60
    batch_size: int = 8
    learning_rate: float = 1e-3
    correction: str = "projection"  # or covariance
    clamp: float = 3.0
    strength: float = 1.0
    seed: int = 0


class Row(NamedTuple):
    """Token ids ``(length,)``; the loss counts those from ``begin`` on, the completion's."""

    ids: Tensor
    begin: int


# 1. Tokenize
def tokenize(row: Mapping[str, str], tokenizer: Any, max_seq_length: int) -> Row | None:
    """Prompt and completion, tokenized apart, and end of sequence; None where the cut leaves no completion to predict."""
    prompt: list[int] = tokenizer(row["prompt"])["input_ids"]
    completion: list[int] = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    ids = torch.tensor([*prompt, *completion, tokenizer.eos_token_id])[:max_seq_length]
    begin = max(1, len(prompt))  # nothing predicts the first token
    return Row(ids, begin) if begin < len(ids) else None


def find_linears(model: Any) -> dict[str, nn.Linear]:
    """Every linear but the output head: these are compressed, and get an adapter."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: linear for name, linear in linears.items() if linear is not model.get_output_embeddings()}


# 2. Calibrate (section 3.1)
@torch.no_grad()
def gather_grams(model: Any, rows: Iterable[Row]) -> dict[str, Tensor]:
    """Of each linear ``G = Σ x xᵀ (in, in)`` over all tokens ``x (in,)`` that it reads."""
    grams, handles = {}, []

    def add(gram: Tensor, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0][0].double()  # (length, in)
        gram += x.T @ x

    for name, linear in find_linears(model).items():
        grams[name] = linear.weight.new_zeros(linear.in_features, linear.in_features, dtype=torch.float64)
        handles.append(linear.register_forward_pre_hook(partial(add, grams[name])))
    for row in rows:
        model(row.ids[None])
    for handle in handles:
        handle.remove()
    return grams


# 3. Compress (section 3.1)
def factorize(weight: Tensor, gram: Tensor, rank: int, dampening_frac: float = 1e-6) -> tuple[Tensor, Tensor]:
    """``U_r (out, r)`` and ``U_rᵀ W (r, in)``: their product ``W_E`` minimises ``‖(W − W_E) G^½‖_F`` among those of rank r.

    ``U_r`` are the top left singular vectors of ``W G^½``, hence the top eigenvectors of ``W G Wᵀ``: no root of ``G``, no
    inverse, no SVD. ``G`` is damped by ``ε tr(G)/in``: directions that the few calibration tokens lack count a little.
    """
    w = weight.double()
    damped = gram + dampening_frac * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    up = torch.linalg.eigh(w @ damped @ w.T).eigenvectors[:, -rank:]  # eigenvalues ascend
    return up, up.T @ w


class FactorizedLinear(nn.Module):
    """``y = up (down x) + bias``: the emulator's linear, of weight ``W_E = up (out, r) @ down (r, in)``; nothing to train."""

    def __init__(self, up: Tensor, down: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.up, self.down, self.bias = up, down, bias

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        return F.linear(F.linear(x, self.down), self.up, self.bias)


@torch.no_grad()
def make_emulator(model: Any, grams: Mapping[str, Tensor], ratio: float) -> dict[str, FactorizedLinear]:
    """The emulator's linears, ``r = max(1, ⌊ratio · out · in / (out + in)⌋)``; all else it shares with the original."""
    emulator = {}
    for name, linear in find_linears(model).items():
        rank = max(1, int(ratio * linear.weight.numel() / sum(linear.weight.shape)))
        up, down = (factor.to(linear.weight.dtype) for factor in factorize(linear.weight, grams[name], rank))
        emulator[name] = FactorizedLinear(up, down, linear.bias)
    return emulator


# 4. Train LoRA on the emulator (section 3.2)
def adapted(lora: PeftModel) -> dict[str, Any]:
    """PEFT's layers by name: ``y = W x + s B A x`` with ``A (r, in)`` random, ``B (out, r)`` zero, ``s = lora_alpha / r``."""
    return {name: m for name, m in lora.get_base_model().named_modules() if isinstance(m, LoraLayer)}


def plug_into(lora: PeftModel, linears: Mapping[str, nn.Module]) -> None:
    """Puts the same adapter on other weights: the emulator's linears, or the original's."""
    for name, layer in adapted(lora).items():
        layer.base_layer = linears[name]


def mean_loss(model: Any, rows: Iterable[Row]) -> Tensor:
    """The mean of ``−log p(token | those before it)`` over the rows' completion tokens, in nats."""
    losses = []
    for row in rows:
        logits = model(row.ids[None]).logits[0, row.begin - 1 : -1].float()
        losses.append(F.cross_entropy(logits, row.ids[row.begin :], reduction="none"))
    return torch.cat(losses).mean()


def make_batches(rows: Sequence[Row], size: int, steps: int) -> list[list[Row]]:
    """Batches for ``steps`` steps from one random order of the rows after another."""
    orders = [torch.randperm(len(rows)) for _ in range(-(-size * steps // len(rows)))]
    return [[rows[at] for at in batch.tolist()] for batch in torch.cat(orders)[: size * steps].split(size)]


def train(lora: PeftModel, batches: Sequence[Sequence[Row]], learning_rate: float) -> list[float]:
    """An optimizer step a batch, by the defaults of Hugging Face's Trainer; returns the steps' losses, nats a token."""
    parameters = [parameter for name, parameter in lora.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=len(batches))
    losses = []
    for batch in batches:
        loss = mean_loss(lora, batch)
        loss.backward()
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return losses


# 5. Correct (section 3.3)
@torch.no_grad()
def correct(layer: Any, delta: Tensor, gram: Tensor, settings: Settings) -> None:
    """Takes ``Δ = W − W_E (out, in)`` out of one layer's adapter: ``B A = B' Qᵀ`` becomes ``(B' − C) Qᵀ``.

    ``Aᵀ = Q S Vᵀ``, ``B' = B V S``. By ``projection``, the paper's, ``C = Δ Q / s``: on the directions ``Q`` that the adapter
    reads ``W + s (B' − C) Qᵀ`` does what ``W_E + s B' Qᵀ`` did. By ``covariance`` ``C = Δ G Q (Qᵀ G Q)⁻¹ / s``: best for inputs
    like the data's, and the same where ``G = I``. Column j is then scaled down to ``mean|C_j| ≤ λ mean|B'_j|`` (``clamp``).
    """
    a, b, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    q, sizes, vh = torch.linalg.svd(a.double().T, full_matrices=False)
    b_prime = b.double() @ vh.T * sizes
    g = gram if settings.correction == "covariance" else torch.eye(len(gram)).to(gram)
    g = g + 1e-4 * (q.T @ g @ q).diagonal().mean() * torch.eye(len(g)).to(g)
    c = torch.linalg.solve(q.T @ g @ q, delta @ (g @ q), left=False) / s
    ratio = c.abs().mean(dim=0) / b_prime.abs().mean(dim=0).clamp_min(1e-300)
    a.copy_(q.T)
    b.copy_(b_prime - settings.strength * c * (settings.clamp / ratio).clamp_max(1.0))


# 6. Merge and evaluate
@torch.no_grad()
def merge(lora: PeftModel) -> Any:
    """The original with ``W + s B A`` for each linear's weight: summed in float32, rounded to its own dtype."""
    for layer in adapted(lora).values():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        layer.base_layer.weight.copy_(layer.base_layer.weight.float() + layer.scaling["default"] * b @ a)
    return lora.unload()


@torch.no_grad()
def evaluate(model: Any, rows: Iterable[Row]) -> float:
    """The mean loss, without gradients."""
    return mean_loss(model, rows).item()


def run(model: Any, rows: Sequence[Row], held_out: Sequence[Row], settings: Settings) -> Iterator[tuple[str, float]]:
    """The whole method; yields the name and the held-out loss of each variant. ``model`` itself becomes the merged one."""
    yield "original", evaluate(model, held_out)
    original = find_linears(model)
    grams = gather_grams(model, rows[: settings.num_calibration_samples])
    emulator = make_emulator(model, grams, settings.compression_ratio)
    torch.manual_seed(settings.seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=settings.r, lora_alpha=settings.lora_alpha, target_modules=[*original])
    lora = get_peft_model(model, config)
    plug_into(lora, emulator)
    yield "emulator", evaluate(lora, held_out)  # B is zero: the adapter adds nothing yet
    train(lora, make_batches(rows, settings.batch_size, settings.steps), settings.learning_rate)
    yield "emulator_adapter", evaluate(lora, held_out)
    plug_into(lora, original)
    yield "uncorrected", evaluate(lora, held_out)
    for name, layer in adapted(lora).items():
        delta = original[name].weight.double() - emulator[name].up.double() @ emulator[name].down.double()
        correct(layer, delta, grams[name], settings)
    yield "corrected", evaluate(lora, held_out)
    yield "merged", evaluate(merge(lora), held_out)


def main() -> None:
    """Reads the command line and runs the method; prints each loss as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    for field in fields(Settings):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    args = parser.parse_args()
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    settings = Settings(*(getattr(args, field.name) for field in fields(Settings)))
    folder, gguf = (args.model.parent, {"gguf_file": args.model.name}) if args.model.is_file() else (args.model, {})
    tokenizer = AutoTokenizer.from_pretrained(folder, **gguf)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **gguf)
    lines = (json.loads(line) for line in args.rows.read_text().split("\n") if line.strip())
    rows = [row for line in lines if (row := tokenize(line, tokenizer, settings.max_seq_length))]
    tenth = max(1, len(rows) // 10)
    for variant, loss in run(model, rows[tenth:], rows[:tenth], settings):
        print(f"{variant:<18} {loss:.4f}", flush=True)


if __name__ == "__main__":
    main()
