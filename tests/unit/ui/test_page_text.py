from __future__ import annotations

import pytest

from emloc_ray.ui import page_text


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (20 * 2**20, "20.0 MiB"), (2**30, "1.00 GiB")],
)
def test_sizes(size: int, text: str) -> None:
    assert page_text.size_text(size) == text


def test_signed_numbers() -> None:
    assert page_text.signed(0.25, 2) == "+0.25"
    assert page_text.signed(-0.25, 2) == "−0.25"
    assert page_text.signed(-0.001, 2) == "0.00"
