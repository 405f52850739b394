"""trace.json: what workers did, as Perfetto reads it, over all tries of a run."""

from __future__ import annotations

import json
from typing import Any

import pytest

from emloc_ray.io.runs.directory import RunDirectory
from emloc_ray.runs.trace import TRACE, WorkerTrace, read_trace
from emloc_ray.stages.ray.spans import Span, tell_span


def piece(number: int, stage: str = "factorize", worker: str = "process 7 on here") -> Span:
    peaks = {"peak_bytes": number * 2**20, "gpu_peak_bytes": number * 2**30}
    return Span(stage, worker, f"layer {number}", float(number), number + 0.5, **peaks)


def written(run: RunDirectory) -> list[dict[str, Any]]:
    return json.loads(run.path(TRACE).read_text())["traceEvents"]


def test_events_are_in_order_and_name_node_worker_and_bytes(run: RunDirectory) -> None:
    with WorkerTrace(run):
        tell_span(piece(3))
        tell_span(piece(1, "calibrate", "slot 0 on there"))
        tell_span(Span("finetune", "rank 0", '"<s>\ud800', 4.0, 4.0))
    tell_span(piece(9))  # nobody listens any more
    names = {(e["name"], e["pid"], e["tid"]): e["args"]["name"] for e in written(run) if e["ph"] == "M"}
    work = [event for event in written(run) if event["ph"] == "X"]
    assert [(event["name"], event["cat"], event["ts"], event["dur"]) for event in work] == [
        ("layer 1", "calibrate", 1_000_000, 500_000),
        ("layer 3", "factorize", 3_000_000, 500_000),
        ('"<s>?', "finetune", 4_000_000, 0),
    ]
    assert [event["args"]["peak_bytes"] for event in work] == [2**20, 3 * 2**20, 0]
    assert [event["args"].get("gpu_peak_bytes") for event in work] == [2**30, 3 * 2**30, None]
    of_each = [(names["process_name", e["pid"], 0], names["thread_name", e["pid"], e["tid"]]) for e in work]
    assert of_each == [("there", "slot 0"), ("here", "process 7"), ("training group", "rank 0")]


def test_a_later_try_adds_to_what_earlier_ones_wrote(run: RunDirectory) -> None:
    spans = [piece(1), Span("finetune", "rank 0", "the training", 2.0, 3.0)]
    for span in spans:
        with WorkerTrace(run):
            tell_span(span)
    first, second = read_trace(run)[0]
    assert first == spans[0]
    assert (second.stage, second.unit, second.begun_at, second.finished_at) == ("finetune", "the training", 2.0, 3.0)
    with WorkerTrace(run):
        tell_span(Span("finetune", "rank 0", "the training", 5.0, 6.0))
    assert len([event for event in written(run) if event["name"] == "thread_name"]) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"traceEvents": [{"ph": "X"}]}'])
def test_a_file_that_is_no_trace_is_written_anew(run: RunDirectory, content: str) -> None:
    run.path(TRACE).write_text(content)
    with WorkerTrace(run):
        tell_span(piece(1))
    assert read_trace(run)[0] == [piece(1)]


def test_of_very_many_pieces_the_longest_are_kept_over_all_tries(run: RunDirectory) -> None:
    lengths = [3.0, 1.0, 4.0, 2.0]
    for number, length in enumerate(lengths):
        with WorkerTrace(run, most=2):
            tell_span(Span("calibrate", "slot 0 on here", "shard", number, number + length))
    assert [span.finished_at - span.begun_at for span in read_trace(run)[0]] == [3.0, 4.0]
    assert json.loads(run.path(TRACE).read_text())["otherData"] == {"shortest pieces left out": 2}


def test_it_is_written_at_a_stages_end_and_while_one_goes_on(run: RunDirectory) -> None:
    with WorkerTrace(run, interval_s=0) as now_and_then:
        tell_span(piece(1))
        assert len(read_trace(run)[0]) == 1
        now_and_then.interval_s = 1000
        tell_span(piece(2))
        assert len(read_trace(run)[0]) == 1
        now_and_then.finish("factorize", {}, {})
        assert len(read_trace(run)[0]) == 2
