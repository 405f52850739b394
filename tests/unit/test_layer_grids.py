from __future__ import annotations

from emloc_ray import layer_grids

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj")
NAMES = [f"model.layers.{block}.{kind}" for block in (0, 1, 10, 2) for kind in LINEARS]


def test_grids_order_blocks_by_number_and_shorten_kinds() -> None:
    (grid,) = layer_grids.grids(NAMES)
    assert (grid.prefix, grid.kinds) == ("model.layers", ["q_proj", "k_proj", "up_proj"])
    assert [block for block, _ in grid.rows] == [0, 1, 2, 10]
    assert grid.rows[3][1][2] == "model.layers.10.mlp.up_proj"


def test_grids_of_other_models() -> None:
    names = [
        "encoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.q",
        "decoder.block.1.layer.0.SelfAttention.q",
        "shared_projection",
    ]
    encoder, decoder, rest = layer_grids.grids(names)
    assert (encoder.prefix, encoder.kinds) == ("encoder.block", ["q"])
    assert decoder.kinds == ["SelfAttention.q", "EncDecAttention.q"]
    assert decoder.rows[1] == (1, [names[3], None])
    assert rest == layer_grids.Grid("", ["shared_projection"], [(None, ["shared_projection"])])
