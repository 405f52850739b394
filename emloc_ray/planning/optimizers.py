"""What optimizers hold of a trained parameter, by the names of the Trainer's ``optim``."""

from emloc_ray.planning.sizes import FLOAT

_STATES = {
    "sgd": 0,
    "adafactor": 0,
    "lion": 1,
    "rmsprop": 1,
    "adagrad": 1,
    "muon": 1,
    "ademamix": 3,
}  # others: Adam's 2
_BLOCK = 256  # of states in few bits: how many share a float32 scale


def optimizer_bytes(name: str, on_gpu: bool) -> float:
    """Bytes a parameter of itself and its gradient, in float32, and of the optimizer's states: in 4, 8 or 32 bits as the
    name says. Paged states are on a GPU only while they are used, a page at a time."""
    kind = next((kind for kind in _STATES if kind in name), None)
    states = 2 if kind is None else _STATES[kind]
    if "paged" in name and on_gpu:
        states = 0
    bits = 8 if "8bit" in name else 4 if "4bit" in name else 0
    return 2 * FLOAT + states * (bits / 8 + FLOAT / _BLOCK if bits else FLOAT)
