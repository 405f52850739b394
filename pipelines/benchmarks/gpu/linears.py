"""Factorization and correction of single linears, on the GPU against the CPU, with the errors of both."""

from __future__ import annotations

import functools
import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.plan import R
from benchmarks.gpu.session import Session
from benchmarks.gpu.shapes import llama_config
from emloc_ray.core.correction import Candidate, canonical_form, difference, residual_energy
from emloc_ray.core.factorization import factorize, relative_error
from emloc_ray.core.integers import IntegerWeight
from emloc_ray.core.products import product_by_rows
from emloc_ray.core.quantization import quantize
from emloc_ray.core.ranks import rank_for_ratio
from emloc_ray.core.spectra import spectrum
from emloc_ray.core.stored_weight import StoredWeight
from emloc_ray.core.unpacking import scale_values, zero_values
from emloc_ray.core.whitening import Whitening
from emloc_ray.modeling.adapter_files import LoraModule
from emloc_ray.modeling.architecture import block_linears, empty_model, trace_inputs
from emloc_ray.stages.correct.modules import CorrectableModule

RATIOS = (0.5, 0.25)
_LARGE = 8192  # from this order on a CPU takes minutes
_FACTORIZED_S, _BY_SENSITIVITY_S, _CORRECTED_S = 60.0, 300.0, 60.0  # of a model's linears: what is to be reached
_DAMPENING = 1e-4  # of a correction


def on_device(session: Session) -> None:
    """Every shape's factorization at two ratios, its correction and its rounding, where the session computes."""
    device = session.device
    for shape in session.shapes.linears:
        needs, large = (15, True) if min(shape) >= _LARGE else (5, False)
        for ratio in RATIOS[:1] if large else RATIOS:
            case, run = _name(shape, ratio, device), functools.partial(_factorized, session, shape, ratio, device)
            session.measure("factorization", case, needs, run)
    for shape in session.shapes.linears:
        run = functools.partial(_corrected, session, shape, device)
        session.measure("correction", _name(shape, None, device), 5, run)
    for shape in session.shapes.linears[:2]:
        run = functools.partial(_rounded, session, shape, 4)
        session.measure("rounding", f"{_name(shape, None, device)}, 4 bits", 5, run)
    for order in sorted({min(shape) for shape in session.shapes.linears}):
        run = functools.partial(_eigh, session, order)
        session.measure("factorization", f"eigh of order {order}, {device.type}", 5 if order < _LARGE else 15, run)
    shape = session.shapes.linears[0]
    run = functools.partial(_spectrum, session, shape)
    spectrum_of = session.measure("factorization", f"spectrum of {_name(shape, None, device)}", 10, run)
    _of_the_model(session, spectrum_of.get("s"))


def _of_the_model(session: Session, spectrum_s: float | None) -> None:
    """What the shapes' figures add up to over the linears in the model's blocks, against what is to be reached."""
    bare = empty_model(llama_config(session.shapes.model))
    specs = block_linears(bare)
    counts = Counter((s.out_features, s.in_features) for s in specs)
    widths = {s.name: s.in_features for s in specs}
    corrected, what = _by_shape(session, counts, "correction", None, "s")
    total = sum(counts[s] * figures["s"] for s, figures in corrected.items())
    session.compare("correction", what, total, _CORRECTED_S, "s (baseline: the target)")
    factorized, what = _by_shape(session, counts, "factorization", RATIOS[0], "factorize_s")
    roots = {s[1]: figures["cholesky_s"] for s, figures in factorized.items()}
    grams = [widths[names[0]] for names in trace_inputs(bare, specs).groups if widths[names[0]] in roots]
    what += f", and the roots of {len(grams)} Grams"
    total = sum(counts[s] * figures["factorize_s"] for s, figures in factorized.items())
    total += sum(roots[width] for width in grams)
    session.compare("factorization", what, total, _FACTORIZED_S, "s (baseline: the target)")
    if spectrum_s is not None:
        shape, total = session.shapes.linears[0], counts.total() * spectrum_s
        what = f"spectra of {counts.total()} linears, each as long as of {shape[0]} × {shape[1]}"
        session.compare("factorization", what, total, _BY_SENSITIVITY_S, "s (baseline: the target)")


def _by_shape(
    session: Session, counts: Counter[tuple[int, int]], part: str, ratio: float | None, key: str
) -> tuple[dict[tuple[int, int], dict[str, Any]], str]:
    """The figures of each of the model's shapes, of the smallest measured one that holds it, and a line's name."""
    known = {s: session.measured[part].get(_name(s, ratio, session.device), {}) for s in session.shapes.linears}
    measured = sorted((s for s, figures in known.items() if key in figures), key=math.prod)
    holding = {s: next((m for m in measured if m[0] >= s[0] and m[1] >= s[1]), None) for s in counts}
    figures = {s: known[m] for s, m in holding.items() if m is not None}
    what = f"{sum(counts[s] for s in figures)} of the model's {counts.total()} linears"
    what += "" if ratio is None else f" at ratio {ratio}"
    larger = sum(counts[s] for s in figures if holding[s] != s)
    return figures, what + (f", {larger} as long as of a larger shape" if larger else "")


def on_cpu(session: Session) -> None:
    """The shapes of the smaller model on the CPU too, the quickest first, and both side by side; nothing where the session is
    on it."""
    if not session.is_cuda:
        return
    cpu, threads = torch.device("cpu"), f"s (baseline: {torch.get_num_threads()} CPU threads)"
    shapes = sorted((shape for shape in session.shapes.linears if min(shape) < _LARGE), key=max)
    for shape in shapes:
        run = functools.partial(_corrected, session, shape, cpu)
        here = session.measure("correction", _name(shape, None, cpu), 10, run)
        there = session.measured["correction"][_name(shape, None, session.device)]
        error = _apart(there, here, "update")
        session.compare("correction", _name(shape, None, None), there.get("s"), here.get("s"), threads, error)
    for shape in shapes:
        ratio = min(RATIOS)
        run = functools.partial(_factorized, session, shape, ratio, cpu)
        here = session.measure("factorization", _name(shape, ratio, cpu), 10, run)
        there = session.measured["factorization"][_name(shape, ratio, session.device)]
        sides = there.get("factorize_s"), here.get("factorize_s")
        error = _apart(there, here, "error")
        session.compare("factorization", _name(shape, ratio, None), *sides, threads, error)


def _name(shape: tuple[int, int], ratio: float | None, device: torch.device | None) -> str:
    at = "" if ratio is None else f" at ratio {ratio}"
    return f"{shape[0]} × {shape[1]}{at}{'' if device is None else f', {device.type}'}"


def _apart(there: dict[str, Any], here: dict[str, Any], key: str) -> float | None:
    return there[key] / here[key] - 1 if there.get(key) and here.get(key) else None


def layer(session: Session, shape: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """``W (out, in)`` and the Gram of inputs whose strengths fall by a hundred; made where the session computes, so that
    every device gets the same."""
    generator = torch.Generator(session.device).manual_seed(0)
    options: Any = {"generator": generator, "device": session.device}
    out_features, in_features = shape
    gram = torch.zeros(in_features, in_features, device=session.device)
    strengths = torch.logspace(0, -2, in_features, device=session.device)
    for _ in range(2):
        tokens = torch.randn(in_features, in_features, **options) * strengths
        gram.addmm_(tokens.T, tokens)
    return (torch.randn(out_features, in_features, **options) * 0.02).to(device), gram.to(device)


def _factorized(session: Session, shape: tuple[int, int], ratio: float, device: torch.device) -> dict[str, Any]:
    """The Cholesky factor that linears share, and the layer itself; each once, after a warm-up where the session computes."""
    rank = rank_for_ratio(*shape, ratio) or 1
    rank = max(rank // session.shapes.multiple, 1) * session.shapes.multiple
    weight, gram = layer(session, shape, device)
    if device == session.device:
        factorize(weight, Whitening(gram), rank)
    whitening = Whitening(gram)
    cholesky_s = session.timed(lambda: whitening.cholesky(torch.float32), 1, warm_up=0)
    made: list[Any] = []
    factorize_s = session.timed(lambda: made.append(factorize(weight, whitening, rank)), 1, warm_up=0)
    factorization = made[0]
    error, _ = relative_error(weight, factorization.factors.up @ factorization.factors.down, whitening)
    return {
        "rank": rank,
        "cholesky_s": cholesky_s,
        "factorize_s": factorize_s,
        "error": error,
        "told_error": factorization.relative_error,
        "solver": factorization.solver,
        "dtype": str(factorization.dtype).removeprefix("torch."),
        "device": factorization.factors.up.device.type,
        **(session.peaks() if device.type == "cuda" else {}),
    }


def _rounded(session: Session, shape: tuple[int, int], bits: int) -> dict[str, Any]:
    """A whole weight to integers under its Gram, and both relative errors: so, and by the nearest codes of the same grid."""
    weight, gram = layer(session, shape, session.device)
    made: list[IntegerWeight] = []
    seconds = session.timed(lambda: made.append(quantize(weight, Whitening(gram), bits)), 1, warm_up=1)
    kept, whitening = made[-1], Whitening(gram)
    groups = torch.arange(shape[1], device=session.device) // kept.group_size
    scale = scale_values(kept.scales, kept.exponent)[:, groups]
    codes = (weight / scale + zero_values(kept.zeros, bits)[:, groups]).round().clamp(0, 2**bits - 1)
    nearest, _ = relative_error(weight, kept.with_codes(codes.to(torch.uint8)).dense(), whitening)
    error, _ = relative_error(weight, kept.dense(), whitening)
    return {"s": seconds, "error": error, "error_nearest": nearest, **session.peaks()}


def _spectrum(session: Session, shape: tuple[int, int]) -> dict[str, Any]:
    """What allocation by sensitivity asks of a linear: what each rank gains, under sums of inputs and of gradients."""
    weight, gram = layer(session, shape, session.device)
    _, gradients = layer(session, (8, shape[0]), session.device)

    def run() -> None:
        spectrum(weight, Whitening(gram), Whitening(gradients, 1e-2))

    return {"s": session.timed(run, 1, warm_up=1), **session.peaks()}


def _eigh(session: Session, order: int) -> dict[str, Any]:
    """Of a symmetric matrix in float32: what the exact solver stands and falls with."""
    matrix = torch.randn(order, order, device=session.device)
    matrix = matrix @ matrix.T
    return {"s": session.timed(lambda: torch.linalg.eigh(matrix), 1, warm_up=0), **session.peaks()}


def _corrected(session: Session, shape: tuple[int, int], device: torch.device) -> dict[str, Any]:
    """By covariance, as the stage does it, what it leaves included; ``update`` is ``‖B A‖`` as corrected."""
    weight, gram = layer(session, shape, device)
    up = torch.linalg.qr(weight[:, : rank_for_ratio(*shape, RATIOS[0]) or 1]).Q
    stored = StoredWeight(up, up.T @ weight)
    energy = residual_energy(weight, stored, gram)
    generator = torch.Generator().manual_seed(1)
    lora_a = torch.randn(R, shape[1], generator=generator)
    lora = LoraModule("layer", lora_a, torch.randn(shape[0], R, generator=generator) * 0.01, 2.0)
    made: list[tuple[Any, Any]] = []

    def correct() -> None:
        form = canonical_form(lora.lora_a, lora.lora_b)
        q = form.q.to(device)
        seen = difference(weight, stored, q, product_by_rows(gram, q)).first(q.shape[1], energy)
        module, candidate = CorrectableModule(lora, form, seen), Candidate("covariance", None)
        made.append((module.corrected(candidate, _DAMPENING), module.shortfalls(candidate, _DAMPENING)))

    seconds = session.timed(correct, 1, warm_up=1)
    corrected, shortfalls = made[-1]
    a, b = corrected.lora_a.double(), corrected.lora_b.double()
    update = float(torch.trace((b.T @ b) @ (a @ a.T)).clamp_min(0).sqrt())
    return {"s": seconds, "update": update, "shortfalls": shortfalls, "device": weight.device.type}
