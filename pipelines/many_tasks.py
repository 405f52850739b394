"""Many tasks from Python: the same batch as ``emloc-ray batch BATCH``, for notebooks and your own scripts.

python pipelines/many_tasks.py configs/many_tasks.yaml finetune.max_steps=10
"""

from __future__ import annotations

import sys

from emloc_ray.runs.batch.driver import prepare_batch, run_batch
from emloc_ray.runs.batch.summary import write_summary
from emloc_ray.runs.batch.tasks import read_batch
from emloc_ray.ui.batch_page import write_batch_report
from emloc_ray.ui.batch_table import held_out
from emloc_ray.ui.page import PageReporter


def main() -> None:
    """Runs a batch and prints each task's held-out loss, before and after."""
    batch = read_batch(sys.argv[1], sys.argv[2:])
    prepared = prepare_batch(batch, reporter=PageReporter())
    state = run_batch(prepared, tell=print)
    write_summary(prepared.run, state)
    write_batch_report(prepared.run, state)
    for task in state.tasks:
        print(f"{task.name:<50} {task.status:<10} {held_out(task)}")


if __name__ == "__main__":
    main()
