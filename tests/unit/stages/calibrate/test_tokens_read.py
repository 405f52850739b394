"""The tokens that a calibration says it read."""

from __future__ import annotations

from dataclasses import replace

import pytest
from stage_artifacts import Artifacts

from emloc_ray.data.token_shards import TokenShards
from emloc_ray.stages.calibrate.tokens_read import tokens_read


def test_patches_of_images_are_no_tokens_that_were_read(artifacts: Artifacts) -> None:
    job = replace(artifacts.calibration_job, streams=(("tower", "other"), ("decoder", "decoder")))
    assert tokens_read(job, {"tower": 400, "decoder": 20, "layer": 120}) == 120


@pytest.mark.parametrize("tokens", ["all", "completion"])
def test_where_linears_read_a_share_the_rows_are_counted(artifacts: Artifacts, tokens: str) -> None:
    job = replace(artifacts.calibration_job, streams=(("tower", "other"),), shards=(1, 3), tokens=tokens)
    shards = TokenShards(job.tokens_dir)
    rows = [row for number in (1, 2) for row in shards.shard(number)]
    counted = sum(map(len, rows)) if tokens == "all" else sum(sum(row.completion_mask[1:]) for row in rows)
    assert 0 < counted < sum(map(len, shards.rows(range(len(shards))).values()))
    assert tokens_read(job, {"tower": 400, "layers.0.experts.3.down": 5}) == counted
