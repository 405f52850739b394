"""Whether plain transformers and PEFT train, save and load a tiny model of a type."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from emloc_ray.modeling.architecture import auto_class

_TOLERANCE = 1e-4


def build(config: Any, directory: Path) -> Any:
    """A random model with random biases too, saved as transformers does."""
    torch.manual_seed(0)
    model = auto_class(config).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(directory)
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **more: Any) -> torch.Tensor:
    """What a model predicts for rows without padding."""
    return _call(model, ids, **more).logits


def _call(model: Any, ids: torch.Tensor, **more: Any) -> Any:
    names = inspect.signature(getattr(model, "base_model", model).forward).parameters
    config = model.config
    if getattr(config, "is_encoder_decoder", False) and "labels" not in more:
        more["decoder_input_ids"] = ids
    if "use_cache" in names or "kwargs" in names:
        more["use_cache"] = False
    return model(input_ids=ids, **more)


def plain_training(directory: Path, ids: torch.Tensor, adapter_dir: Path) -> None:
    """Loads the model, trains LoRA on all linears for two steps, saves the adapter, and loads both again.

    Raises:
        AssertionError: where the losses are not finite, or what was loaded is not what was saved.
    """
    model = _opened(directory)
    before = logits(model, ids)
    assert bool(before.isfinite().all()), "logits hold NaN or Inf"
    assert torch.allclose(before, logits(_opened(directory), ids)), "loaded twice, it predicts two things"
    model = _adapted(model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        loss = _call(model, ids, labels=ids).loss
        assert bool(loss.isfinite()), "the loss is not finite"
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(model.eval(), ids)
    model.save_pretrained(adapter_dir)
    again = logits(PeftModel.from_pretrained(_opened(directory), adapter_dir).eval(), ids)
    scale = float(trained.abs().max())
    assert float((again - trained).abs().max()) <= _TOLERANCE * scale, "the adapter loads as another"
    assert float((trained - before).abs().max()) > _TOLERANCE * scale, "training changes nothing"


def _adapted(model: Any) -> Any:
    """LoRA on what PEFT calls all linears; where it cannot adapt one of these, on those that are plain ``nn.Linear``s inside
    the layers, without the output projections of Mamba mixers, which it refuses."""
    try:
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules="all-linear"))
        logits(adapted, torch.zeros(1, 4, dtype=torch.long))
    except Exception:  # noqa: BLE001  whatever it is, fewer linears may do
        head = model.get_output_embeddings()
        linears = [name for name, part in model.named_modules() if type(part) is torch.nn.Linear and part is not head]
        names = [name for name in linears if not name.endswith(("out_proj", "gate", "router"))]
        return get_peft_model(model, LoraConfig(r=4, target_modules=names))
    return adapted


def _opened(directory: Path) -> Any:
    from transformers import AutoConfig

    auto = auto_class(AutoConfig.from_pretrained(directory))
    model, report = auto.from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"], f"{sorted(report['missing_keys'])[0]} is not saved"
    return model.eval()
