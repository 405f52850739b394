"""Emulators in integers of every kind, rounded by their weights alone."""

from pathlib import Path

from safetensors.torch import save_file
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM

from emloc_ray.core.factorization import factorize
from emloc_ray.core.integer_forms import IntegerForms
from emloc_ray.core.quantization import quantize, quantize_factors, quantize_with_factors
from emloc_ray.core.whitening import Whitening
from emloc_ray.io.formats.checkpoint import write_index
from emloc_ray.modeling.architecture import block_linears
from emloc_ray.modeling.emulator import write_emulator_config
from emloc_ray.modeling.experts import unfuse

SIZE = 16
FILE = "model-00001-of-00001.safetensors"


def save_integer_emulator(model_dir: Path, directory: Path) -> tuple[Path, dict[str, str]]:
    """Of the linears in turn: factors in 4 bits, 2 bits, 2 bits with a rank of 3 beside them, 3 bits, 8 bits, and as it was."""
    model = unfuse(AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto"))
    state, kinds = model.state_dict(), {}
    bits, ranks, beside = {}, {}, {}
    for number, spec in enumerate(block_linears(model)):
        kind = ("factors", "int2", "beside", "int3", "int8", "dense")[number % 6]
        kinds[spec.name] = kind
        if kind == "dense":
            continue
        weight = state.pop(spec.weight_name)
        weight = (weight.T if spec.transposed else weight).float()
        whitening = Whitening.identity(spec.in_features)
        if kind == "factors":
            bits[spec.name], ranks[spec.name] = 4, 9
            up, down = quantize_factors(factorize(weight, whitening, 9).factors, weight, whitening, 4, SIZE)
            made = {".up": up, ".down": down}
            if spec.has_bias:
                state[f"{spec.name}.up.bias"] = state.pop(f"{spec.name}.bias")
        elif kind == "beside":
            bits[spec.name], beside[spec.name] = 2, 3
            whole, up, down = quantize_with_factors(weight, whitening, 2, 3, 4, SIZE)
            made = {".base": whole, ".up": up, ".down": down}
        else:
            bits[spec.name] = int(kind[3:])
            made = {"": quantize(weight, whitening, bits[spec.name], SIZE)}
        state |= {
            f"{spec.name}{part}.{k}": v for part, some in made.items() for k, v in some.tensors(model.dtype).items()
        }
    directory.mkdir(parents=True)
    tensors = {name: tensor.clone() for name, tensor in state.items()}
    save_file(tensors, directory / FILE, {"format": "pt"})
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_index(directory, dict.fromkeys(tensors, FILE), size, model.num_parameters())
    write_emulator_config(directory, model.config, ranks, integers=IntegerForms(bits, beside, SIZE))
    make_tokenizer().save_pretrained(directory)
    return directory, kinds
