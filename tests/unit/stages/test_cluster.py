"""What stages need of Ray, as far as it can be told without one."""

from __future__ import annotations

import pytest

from emloc_ray.stages.cluster import Resources


@pytest.mark.parametrize(("cpus", "threads"), [(0.5, 1), (1, 1), (2, 2), (2.5, 2)])
def test_a_worker_has_no_more_threads_than_cpus(cpus: float, threads: int) -> None:
    resources = Resources(2, cpus, 1)
    assert resources.threads == threads
    assert resources.options() == {"num_cpus": cpus, "num_gpus": 1}
