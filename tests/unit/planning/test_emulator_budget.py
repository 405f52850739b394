"""A budget before a weight moves: what it gives each linear to plan with, and what is refused with the nearest that works."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emloc_ray.config.reading import check_config, parse_config
from emloc_ray.core.forms import Form, FormSizes
from emloc_ray.data.formats import Tokens
from emloc_ray.data.token_shards import shard_name, write_index, write_shard
from emloc_ray.errors import ConfigError
from emloc_ray.io.store.atomic import write_json
from emloc_ray.planning.alternatives import choose_training
from emloc_ray.planning.budget import solve_for_budget, training_bytes
from emloc_ray.planning.emulator_budget import spend_evenly
from emloc_ray.planning.lengths import Lengths
from emloc_ray.planning.machine import Speeds
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.prepared import Prepared, prepare
from emloc_ray.planning.training import healing_training, rounded_late
from emloc_ray.stages.context import Context
from emloc_ray.stages.factorize.spend import FORMS
from emloc_ray.stages.factorize.stage import FACTORIZE
from emloc_ray.stages.heal.stage import HEAL
from emloc_ray.stages.ray.tasks import Resources, silent


@pytest.fixture
def values(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> dict[str, Any]:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(5)))
    model_dir = tiny_model_dir("llama", dtype="bfloat16")
    return {
        "run_dir": str(tmp_path / "run"),
        "model": {"source": str(model_dir)},
        "data": {"train": {"path": str(rows)}},
    }


def of(values: dict[str, Any], budget: str, **emulator: Any) -> Prepared:
    return prepare(parse_config({**values, "emulator": {"budget": budget, **emulator}}))


@pytest.mark.parametrize(("budget", "kind"), [("9 bits", "8 bits"), ("2.9 bits", "2 bits"), ("1.2 bits", "factors")])
def test_bits_are_those_of_the_linears_and_fit(values: dict[str, Any], budget: str, kind: str) -> None:
    layout = of(values, budget).layout
    bits = float(budget.split()[0])
    assert layout.budget == int(bits * layout.parameters_targeted / 8)
    assert layout.stored_bytes(2) <= layout.budget
    assert all(layout.form(spec).kind.startswith(kind) for spec in layout.specs)
    assert layout.differs
    assert layout.allocated == layout.gradient_linears == layout.compressed


@pytest.mark.parametrize(("budget", "bits"), [("12 bits", 8), ("6 bits", 4)])
def test_what_floats_take_in_a_wider_dtype_than_the_files_is_planned(
    values: dict[str, Any], budget: str, bits: int
) -> None:
    values["model"]["dtype"] = "float32"
    prepared = of(values, budget)
    layout = prepared.layout
    assert layout.budget is not None
    sizes, forms = layout.form_sizes(2), {spec.name: Form(bits=bits) for spec in layout.specs}
    left = layout.budget - layout.with_forms(forms).stored_bytes(2)
    for spec in layout.specs:  # as many left as they are as the data might choose
        shape = spec.out_features, spec.in_features
        more = sizes.num_bytes(*shape, Form()) - sizes.num_bytes(*shape, forms[spec.name])
        if more <= left:
            forms[spec.name], left = Form(), left - more
    assert Form() in forms.values()
    made = layout.with_forms(forms)
    assert made.stored_bytes(2) <= layout.budget
    rest = (layout.num_parameters - layout.parameters_targeted) * 4
    assert MemoryModel(prepared).emulator >= rest + 0.97 * made.stored_bytes(4)


def test_the_forms_of_a_shape_are_made_once_however_many_linears_have_it(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, shapes = of(values, "4.3 bits"), []

    def counted(self: FormSizes, *shape: int) -> list[Form]:
        shapes.append(shape)
        return forms(self, *shape)

    forms = FormSizes.forms
    monkeypatch.setattr(FormSizes, "forms", counted)
    specs = [spec for spec in prepared.layout.specs if spec.out_features == spec.in_features or "up_proj" in spec.name]
    many = [dataclasses.replace(spec, name=f"{spec.name}.{number}") for spec in specs for number in range(500)]
    names = tuple(spec.name for spec in many)
    layout = dataclasses.replace(prepared.layout, specs=tuple(many), compressed=names, ranks={}, bits={})
    assert {spec.name for spec in many} == set(spend_evenly(layout, prepared.config.emulator, 2).bits)
    assert len(shapes) == len({(spec.out_features, spec.in_features) for spec in many}) == 2
    assert layout.by_name is layout.by_name  # asked for each linear of a model, it would be made as often


def test_bytes_are_those_of_the_whole_emulator(values: dict[str, Any]) -> None:
    prepared = of(values, "200KiB")
    memory = MemoryModel(prepared)
    assert memory.emulator_files == 200 * 2**10
    assert prepared.layout.budget is not None
    rest = (prepared.layout.num_parameters - prepared.layout.parameters_targeted) * 2
    assert prepared.layout.budget + rest == 200 * 2**10


def test_floats_of_a_budget_take_what_the_model_computes_in(values: dict[str, Any]) -> None:
    prepared = of({**values, "model": {**values["model"], "dtype": "float32"}}, "9 bits")
    layout = prepared.layout
    first, second = (layout.by_name[name] for name in layout.compressed[:2])
    layout = layout.with_forms({first.name: Form(), second.name: Form(rank=4)})
    memory = MemoryModel(dataclasses.replace(prepared, layout=layout))
    floats = first.num_parameters + 4 * (second.in_features + second.out_features)
    others = layout.num_parameters - layout.parameters_targeted
    assert memory.emulator - memory.emulator_files == 2 * (others + floats)


def test_what_a_budget_gives_is_healed_in_floats_where_it_grows(values: dict[str, Any]) -> None:
    prepared = of(values, "1.2 bits", healing={"steps": 3, "r": 1})
    healing, layout = prepared.config.emulator.heals, prepared.layout
    assert healing is not None
    assert set(rounded_late(layout, healing)) == {name for name, rank in layout.ranks.items() if rank > 1}
    trained = healing_training(prepared.config, healing, layout).layout
    assert {name for name in trained.ranks if name in trained.bits} == {n for n, r in layout.ranks.items() if r == 1}
    assert trained.stored_bytes(2) > layout.stored_bytes(2)
    with pytest.raises(
        ConfigError, match=r"emulator.budget: 2.9 bits leaves room for whole weights instead: remove healing"
    ):
        of(values, "2.9 bits", healing={"steps": 3, "r": 1})
    with pytest.raises(
        ConfigError, match=r"healing.r is 50, and .* \(the highest is \d+\): lower it, or remove healing"
    ):
        of(values, "1.2 bits", healing={"steps": 3, "r": 50})


@pytest.fixture
def healed(values: dict[str, Any]) -> Prepared:
    return of(values, "1.2 bits", healing={"steps": 3, "r": 1})


def with_forms(prepared: Prepared, **changed: Form) -> Context:
    """Of a run whose linears were allocated these forms, by the ends of their names, or what was planned."""
    forms = {name: prepared.layout.form(spec) for name, spec in prepared.layout.by_name.items()}
    forms |= {name: form for name in forms for end, form in changed.items() if name.endswith(end)}
    context = Context(prepared, prepared.source.directory)
    context.made["factorize"] = "the same"
    context.results["factorize"] = {"forms": {name: dataclasses.asdict(form) for name, form in forms.items()}}
    layers = {name: {**dataclasses.asdict(form), "bytes": 0, "loss": 0.0} for name, form in forms.items()}
    write_json(context.path("allocation", FORMS), {"layers": layers})
    write_shard(context.tokens("train") / shard_name(0), [Tokens([2, 3], [True, True])])
    write_index(context.tokens("train"), [1], {"tokens": 2})
    return context


def test_where_data_leaves_nothing_to_grow_it_is_said_before_anything_is_factorized(healed: Prepared) -> None:
    context = with_forms(healed, proj=Form(bits=2))
    with pytest.raises(ConfigError, match=r"emulator.budget: 1.2 bits leaves room for whole weights instead"):
        FACTORIZE.run(context, {}, Resources(), silent)
    with pytest.raises(ConfigError, match=r"emulator.budget: 1.2 bits leaves room for whole weights instead"):
        HEAL.inputs(context)


def test_a_healing_goes_by_the_bits_that_data_chose(healed: Prepared) -> None:
    two, three = (HEAL.inputs(with_forms(healed, down_proj=Form(bits=bits))) for bits in (2, 3))
    beside = HEAL.inputs(with_forms(healed, down_proj=Form(bits=2, residual_rank=4)))
    assert two["ranks"] == three["ranks"] == beside["ranks"]
    assert two == HEAL.inputs(with_forms(healed, down_proj=Form(bits=2)))
    assert two != three
    assert two != beside


def test_linears_that_are_left_out_are_not_counted(values: dict[str, Any]) -> None:
    whole, layout = of(values, "4 bits").layout, of(values, "4 bits", exclude_modules=["down_proj"]).layout
    left_out = [spec for spec in layout.specs if spec.name not in layout.compressed]
    assert [spec.name.rsplit(".", 2)[-2:] for spec in left_out] == [["mlp", "down_proj"]] * 2
    assert not {spec.name for spec in left_out} & (layout.bits.keys() | layout.ranks.keys())
    assert layout.parameters_targeted == whole.parameters_targeted - sum(spec.num_parameters for spec in left_out)


@pytest.mark.parametrize("budget", ["0.01 bits", "79KiB"])
def test_what_no_forms_meet_is_refused_with_the_nearest_that_works(values: dict[str, Any], budget: str) -> None:
    with pytest.raises(ConfigError, match=r"is met by no ranks and bits: give at least ") as refused:
        of(values, budget)
    nearest = re.search(r"at least ([\d.]+ (?:bits|KiB))", str(refused.value))
    assert nearest is not None
    of(values, nearest[1])


@pytest.mark.parametrize("budget", ["16 bits", "3GiB"])
def test_what_holds_every_linear_as_it_is_is_refused(values: dict[str, Any], budget: str) -> None:
    with pytest.raises(ConfigError, match=r"holds every linear as it is, in .*: give less"):
        of(values, budget)


@pytest.mark.parametrize(
    ("emulator", "expected"),
    [
        ({"budget": 2.3}, "emulator.budget: 2.3 is no budget: give bits a weight or bytes in all"),
        ({"budget": "2.3"}, "'2.3' is no budget"),
        ({"budget": "0 bits"}, "'0 bits' is no budget"),
        (
            {"budget": "2 bits", "compression_ratio": 0.5},
            "compression_ratio is given too: remove one of them, or set the other to null: budget: null, or"
            " compression_ratio: null",
        ),
        ({"budget": "2 bits", "quantization": "int4"}, "quantization is given too"),
        ({"budget": "2 bits", "allocation": "uniform"}, "allocation is given too"),
        ({"budget": "2 bits", "objective": "weights"}, "objective: weights reads no data"),
    ],
)
def test_what_does_not_go_with_a_budget_is_said(
    values: dict[str, Any], emulator: dict[str, Any], expected: str
) -> None:
    config, lines = check_config({**values, "emulator": emulator})
    assert config is None
    assert any(expected in line for line in lines), lines


def test_a_config_with_a_budget_is_read_as_it_was_written(values: dict[str, Any]) -> None:
    config = parse_config({**values, "emulator": {"budget": "2.3 bits", "compression_ratio": None}})
    written = config.model_dump(mode="json")
    assert "compression_ratio" not in written["emulator"]
    assert parse_config(written) == config


def test_forms_that_data_decided_take_the_place_of_those_that_were_planned(values: dict[str, Any]) -> None:
    layout = of(values, "4.3 bits").layout
    names = layout.compressed
    forms = {
        names[0]: Form(),
        names[1]: Form(rank=4),
        names[2]: Form(rank=4, bits=8),
        names[3]: Form(bits=2, residual_rank=4),
    }
    made = layout.as_made({"forms": {name: dataclasses.asdict(form) for name, form in forms.items()}})
    assert [made.form(made.by_name[name]) for name in names[:4]] == list(forms.values())
    assert all(made.form(made.by_name[name]) == layout.form(layout.by_name[name]) for name in names[4:])
    assert made.forms.residual_ranks == {names[3]: 4}


def test_a_memory_budget_leaves_the_emulator_s_as_it_is(values: dict[str, Any]) -> None:
    prepared, lengths = of(values, "4.3 bits"), Lengths(20.0, 40)
    solution = solve_for_budget(prepared, 2**31, lengths)
    assert solution.layout == prepared.layout
    assert training_bytes(solution) <= 2**31
    assert training_bytes(solve_for_budget(prepared, 2**20, lengths)) > 2**20


def test_the_alternatives_to_a_budget_are_without_it(values: dict[str, Any]) -> None:
    prepared, lengths = of({**values, "memory_budget": "2GiB"}, "4.3 bits"), Lengths(20.0, 40)
    choice = choose_training(prepared, lengths, Speeds(1e11))
    by_name = {one.name: one.config.emulator for one in choice.alternatives}
    assert by_name["an emulator of 4.3 bits"].budget == "4.3 bits"
    assert [emulator.budget for name, emulator in by_name.items() if "4.3 bits" not in name] == [None] * (
        len(by_name) - 1
    )
    layouts = {one.name: one.memory.layout for one in choice.alternatives}
    assert layouts["an emulator of 4.3 bits"] == prepared.layout
    assert layouts["the original"].budget is None
    assert not layouts["the original"].differs
    assert "emulator.budget=null" in choice.overrides
