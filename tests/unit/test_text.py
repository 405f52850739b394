from __future__ import annotations

import pytest

from emloc_ray import text


@pytest.mark.parametrize(
    ("num_bytes", "shown", "rounded_up"),
    [
        (0, "0 B", "0 B"),
        (1023, "1023 B", "1023 B"),
        (1536, "1.50 KiB", "1.50 KiB"),
        (20 * 2**20, "20.0 MiB", "20.0 MiB"),
        (2**30 + 1, "1.00 GiB", "1.01 GiB"),
        (103.2 * 2**20, "103 MiB", "104 MiB"),
        (1.5 * 2**40, "1.50 TiB", "1.50 TiB"),
    ],
)
def test_sizes(num_bytes: float, shown: str, rounded_up: str) -> None:
    assert text.size(num_bytes) == shown
    assert text.size_up(num_bytes) == rounded_up


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.04, "0 s"),
        (0.05, "0.1 s"),
        (9.4, "9.4 s"),
        (9.96, "10 s"),
        (89, "89 s"),
        (90, "2 min"),
        (5400, "1.5 h"),
        (216000, "2.5 days"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    assert text.duration(seconds) == shown


def test_counts_and_lists() -> None:
    assert [text.counted(number, "entry", "entries") for number in (0, 1, 1000)] == [
        "0 entries",
        "1 entry",
        "1,000 entries",
    ]
    assert text.counted(2, "task") == "2 tasks"
    assert [text.listed("abcd", most) for most in (3, 4)] == ["a, b, c and 1 more", "a, b, c, d"]


def test_signed_numbers() -> None:
    assert text.signed(0.25, 2) == "+0.25"
    assert text.signed(-0.25, 2) == "−0.25"
    assert text.signed(-0.001, 2) == "0.00"


def test_control_characters_are_shown() -> None:
    assert text.visible("a\0b\x7f") == "a␀b\ufffd"


def test_the_pace_of_a_stage_leaves_out_its_start_and_what_was_done_before() -> None:
    pace = text.Rate()
    assert [pace.left(0, 500, now) for now in range(60)] == [""] * 60  # its worker loads the model
    left = [pace.left(step, 500, now) for step, now in ((301, 70), (302, 80), (303, 90), (304, 100), (305, 110))]
    assert left == ["", "", "about 33 min left", "about 33 min left", "about 32 min left"]
    assert pace.left(500, 500, 2060) == ""
    assert pace.rate(0, 2070) is None  # begun anew


def test_the_pace_is_that_of_the_newer_half() -> None:
    pace = text.Rate()
    assert [pace.rate(done, now) for done, now in ((0, 0.0), (1, 100.0), (2, 101.0))] == [None, None, None]
    assert pace.rate(3, 102.0) == 1.0  # the first, which took 100 times as long, no longer counts
    assert pace.left(3, 13, 102.0) == "about 10 s left"
    assert pace.rate(3, 106.0) == pytest.approx(1 / 3)  # nothing has been done since


def test_an_errors_text_in_a_sentence_has_no_stop_of_its_own() -> None:
    assert text.one_line(ValueError("The hub is\n overloaded.")) == "The hub is overloaded"
    assert text.one_line("it waits ...") == "it waits ..."
    assert text.one_line("Fix it. Then go", 9) == "Fix it…"
