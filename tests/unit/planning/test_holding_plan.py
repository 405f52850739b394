"""How the original is held is chosen by what fits: the fastest way, the fewest waves, the largest batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from bare_runs import tiny_run
from shared_keys import HAS_MISTRAL, MISTRAL, TRANSFORMERS
from tiny import make_config, make_tokenizer, random_model

from emloc_ray.modeling.architecture import LinearSpec
from emloc_ray.planning.holding import blocks_share, choose, plan_gradients
from emloc_ray.planning.memory import MemoryModel
from emloc_ray.planning.sizes import FLOAT

HELD = {"resident": 100.0, "offloaded": 30.0, "all_offloaded": 10.0}
GEMMA: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 300,
    "hidden_size_per_layer_input": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


def linears(*widths: int) -> list[LinearSpec]:
    return [LinearSpec(f"b.{n}", width, 4, False, False, "b") for n, width in enumerate(widths)]


@pytest.mark.parametrize(
    ("asked", "room", "chosen"),
    [
        ("auto", 120, "resident"),
        ("auto", 119, "offloaded"),
        ("auto", 49, "all_offloaded"),
        ("auto", 1, "all_offloaded"),
        ("resident", 1, "resident"),
        ("offloaded", 1000, "offloaded"),
        ("block_by_block", 1000, "offloaded"),
        ("block_by_block", 49, "all_offloaded"),
    ],
)
def test_the_fastest_that_fits(asked: str, room: float, chosen: str) -> None:
    assert choose(asked, HELD, 20, room) == chosen


def test_a_batch_shrinks_before_a_wave_is_added() -> None:
    specs = linears(4, 4, 4)  # 64 bytes each
    plan = plan_gradients("auto", HELD, specs, 8, lambda rows: 10 * rows, 100 + 3 * 64 + 40)
    assert (plan.hold, plan.batch_size, len(plan.waves)) == ("resident", 4, 1)
    plan = plan_gradients("auto", HELD, specs, 8, lambda rows: 10 * rows, 30 + 3 * 64 + 20)
    assert (plan.hold, plan.batch_size, len(plan.waves)) == ("offloaded", 2, 1)
    plan = plan_gradients("resident", HELD, specs, 8, lambda rows: 10 * rows, 100 + 2 * 64 + 20)
    assert (plan.hold, plan.batch_size, [len(wave) for wave in plan.waves]) == ("resident", 2, [2, 1])
    plan = plan_gradients("auto", HELD, specs, 8, lambda rows: 10 * rows, 0)
    assert (plan.hold, plan.batch_size, len(plan.waves)) == ("all_offloaded", 1, 3)


@pytest.mark.parametrize(("hiding_rows", "rows", "waves"), [(0, 2, 1), (4, 2, 1), (8, 8, 2), (100, 8, 2)])
def test_a_batch_stays_large_where_moving_takes_longer_than_computing(
    hiding_rows: float, rows: int, waves: int
) -> None:
    """Of 2 rows each moves the model four times as often as of 8."""
    room = 10 + 3 * 64 + 20
    plan = plan_gradients("offloaded", HELD, linears(4, 4, 4), 8, lambda rows: 10 * rows, room, hiding_rows)
    assert (plan.hold, plan.batch_size, len(plan.waves)) == ("all_offloaded", rows, waves)


OF_4: dict[str, Any] = {"intermediate_size": 96, "global_head_dim": 16}


@pytest.mark.parametrize(
    "config",
    [
        transformers.Gemma4TextConfig(**GEMMA, **OF_4),
        transformers.Gemma3nTextConfig(
            **GEMMA,
            intermediate_size=[96] * 4,
            altup_num_inputs=2,
            laurel_rank=4,
            activation_sparsity_pattern=[0.0] * 4,
        ),
        *([TRANSFORMERS.MistralLarge4Config(**MISTRAL)] if HAS_MISTRAL else []),
    ],
    ids=lambda config: config.model_type,
)
def test_blocks_that_share_keys_and_values(config: Any) -> None:
    assert blocks_share(config, False)
    assert not blocks_share(make_config("llama"), False)


@pytest.mark.usefixtures("much_memory")
def test_experts_that_are_no_linears_are_held_and_moved_with_their_block(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 64, "head_dim": 16}
    heads: dict[str, Any] = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.Llama4TextConfig(vocab_size=300, num_local_experts=8, pad_token_id=0, **sizes, **heads)
    model = random_model(config)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    memory = MemoryModel(tiny_run(tmp_path, tmp_path / "model", emulator={"refinement": {"steps": 5}}))
    blocks = [sum(FLOAT * weight.numel() for weight in block.parameters()) for block in model.model.layers]
    outside = memory.weights - sum(blocks)
    head = FLOAT * model.lm_head.weight.numel()
    assert memory.held["offloaded"] == pytest.approx(outside + 2 * max(blocks), rel=0.02)
    assert memory.moved("offloaded", 1, 1) == pytest.approx(sum(blocks), rel=0.02)
    assert FLOAT * memory.outside == pytest.approx(outside - head, rel=0.1)
    assert memory.calibration_parts_by_block()["weights"] == pytest.approx(outside - head + max(blocks), rel=0.02)
    assert memory.refinement_parts()["weights"] == pytest.approx(2 * (outside - head) + max(blocks), rel=0.1)
