"""What a run says on a console while it goes on."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from run_samples import usage

from emloc_ray.ui.console_reporter import ConsoleReporter


def test_found_ranks_are_told_beside_uniform_ones() -> None:
    console = Console(file=io.StringIO(), width=200)
    with ConsoleReporter(console) as reporter:
        for even in (0.002, 0.0):
            reporter.start("allocate")
            forms = {"factors": 3, "dense": 1}
            reporter.finish("allocate", {"forms": forms, "loss": even / 2, "even_loss": even, "gap": 0.0}, usage(1))
    told = str(console.file.getvalue())  # type: ignore[attr-defined]
    assert (
        told.count("3 × factors, 1 × dense: what they lose is 50% of what even ones would, within 0 of the least") == 1
    )


def test_without_a_terminal_a_stage_says_now_and_then_how_it_is_going() -> None:
    console = Console(file=io.StringIO(), width=200)
    with ConsoleReporter(console, interval_s=0) as reporter:
        progress = reporter.start("finetune")
        reporter.detail("loss 1.234, learning rate 0.0001, 99 tokens/s")
        progress(3, 8)
    with ConsoleReporter(console) as reporter:
        reporter.start("finetune")(4, 8)
    told = str(console.file.getvalue())  # type: ignore[attr-defined]
    assert "Fine-tuning: 3 of 8, loss 1.234, learning rate 0.0001, 99 tokens/s\n" in told
    assert "4 of 8" not in told


def test_a_terminal_shows_it_beside_the_bar() -> None:
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    with ConsoleReporter(console) as reporter:
        progress = reporter.start("finetune")
        reporter.detail("loss 1.234 [x]")
        progress(3, 8)
        reporter.bars.refresh()
    told = str(console.file.getvalue())  # type: ignore[attr-defined]
    assert "3/8" in told
    assert "loss 1.234 [x]" in told


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_narrow_terminal_cuts_neither_the_count_nor_the_time(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True)
    with ConsoleReporter(console) as reporter:
        progress = reporter.start("finetune")
        reporter.detail("loss 1.234, learning rate 0.00012, 1,234 tokens/s")
        progress(1234, 5000)
        reporter.bars.refresh()
    told = str(console.file.getvalue())  # type: ignore[attr-defined]
    assert "1234/5000" in told
    assert "0:00:0" in told


def test_a_terminal_shows_that_ray_is_waited_for_until_a_stage_begins_or_was_done_before() -> None:
    for begin in (lambda reporter: reporter.start("data"), lambda reporter: reporter.skip("data")):
        console = Console(file=io.StringIO(), width=160, force_terminal=True)
        with ConsoleReporter(console) as reporter:
            reporter.bars.refresh()
            assert "0/?" not in str(console.file.getvalue())  # type: ignore[attr-defined]
            assert "Waiting for Ray" in str(console.file.getvalue())  # type: ignore[attr-defined]
            begin(reporter)
            assert "Waiting for Ray" not in [task.description for task in reporter.bars.tasks]


def test_a_terminal_that_draws_no_bars_gets_lines() -> None:
    """A dumb one, and a pipe that FORCE_COLOR makes one."""
    dumb = Console(file=io.StringIO(), width=200, force_terminal=True, _environ={"TERM": "dumb"})
    for console in (dumb, Console(file=io.StringIO(), width=200, force_terminal=True, force_interactive=False)):
        with ConsoleReporter(console, interval_s=0) as reporter:
            reporter.start("finetune")(3, 8)
        told = str(console.file.getvalue())  # type: ignore[attr-defined]
        assert "Fine-tuning …" in told
        assert "Fine-tuning: 3 of 8" in told
        assert "\x1b[2K" not in told


def test_brackets_in_what_is_told_are_no_markup() -> None:
    console = Console(file=io.StringIO(), width=200)
    text = "training begins again: RuntimeError: [/src/gloo/pair.cc:534] closed [1]"
    with ConsoleReporter(console) as reporter:
        reporter.note(text)
    assert text in str(console.file.getvalue())  # type: ignore[attr-defined]
