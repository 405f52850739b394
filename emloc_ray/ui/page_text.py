"""Numbers and texts as the reports' pages show them."""

from __future__ import annotations

import re


def size_text(size: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            number = size / 2**power
            return f"{number:.0f} {unit}" if number >= 100 else f"{number:.{2 if number < 10 else 1}f} {unit}"
    return f"{size:.0f} B"


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign, a true minus among them; what rounds to nothing has none."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if re.search("[1-9n]", text) else text[1:]


def visible(text: str) -> str:
    """A text as models write it, with control characters made visible (␀): HTML has no place for them."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), text)
    return re.sub(r"[\x7f-\x9f\ud800-\udfff]", "\ufffd", text)
