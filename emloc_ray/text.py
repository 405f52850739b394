"""Sizes, times, counts, lists and numbers as people read them: on screens, on pages, in sentences."""

import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

NO_BREAK = "\u00a0"
_SIZES = (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10))


def size(num_bytes: float) -> str:
    """Bytes to three digits in the largest unit that they fill: ``1.50 KiB``, ``24.0 GiB``."""
    number, digits, unit = _in_unit(num_bytes)
    return f"{number:.{digits}f} {unit}"


def size_up(num_bytes: float) -> str:
    """:func:`size` rounded up: whoever gives as much as it says has given enough."""
    number, digits, unit = _in_unit(num_bytes)
    return f"{math.ceil(number * 10**digits) / 10**digits:.{digits}f} {unit}"


def _in_unit(num_bytes: float) -> tuple[float, int, str]:
    """A number, how many of its decimals are shown, and its unit."""
    for unit, power in _SIZES:
        if num_bytes >= 2**power:
            number = num_bytes / 2**power
            return number, 0 if number >= 100 else 1 if number >= 10 else 2, unit
    return num_bytes, 0, "B"


def described_bits(quantization: str) -> str:
    """``4 bits (NF4)``, ``2 bits``; nothing where weights are stored as floats."""
    if quantization == "none":
        return ""
    return "4 bits (NF4)" if quantization == "nf4" else f"{quantization.removeprefix('int')} bits"


def duration(seconds: float) -> str:
    """Seconds in the unit that people would use: ``0.4 s``, ``45 s``, ``30 min``, ``2.5 h``, ``3.1 days``."""
    if seconds < 90:
        return f"{seconds:.{1 if 0.05 <= seconds < 9.95 else 0}f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 129600 else f"{seconds / 86400:.1f} days"


class Rate:
    """How fast units get done, by the newer half of those done so far, as a stage's first ones may be of another kind. It
    counts from the first that it sees done: with it end the start, and the jump to what a stage that continues had done."""

    def __init__(self) -> None:
        self._begun = math.inf  # units done at the first look, then at the first mark
        self._marks: deque[tuple[int, float]] = deque()  # units done, and when, from before the newer half on

    def rate(self, done: int, now: float) -> float | None:
        """Units a second, where ``done`` are done at the time ``now`` in seconds; None before two more are done than the
        first."""
        if done < self._begun:  # the first look, or a stage that begins anew
            self._begun = done
            self._marks.clear()
        elif done > (self._marks[-1][0] if self._marks else self._begun):
            self._begun = self._begun if self._marks else done
            self._marks.append((done, now))
        if not self._marks:
            return None
        while len(self._marks) > 1 and 2 * self._marks[1][0] < self._begun + done:
            self._marks.popleft()
        units, seconds = done - self._marks[0][0], now - self._marks[0][1]
        return units / seconds if units > 1 and seconds > 0 else None

    def left(self, done: int, total: int, now: float) -> str:
        """``about 3 min left``; nothing where that is not known yet."""
        rate = self.rate(done, now)
        return f"about {duration((total - done) / rate)} left" if rate and total > done else ""


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """``1 task``, ``2 tasks``, ``1,000 entries``."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def listed(items: Sequence[str], most: int = 3) -> str:
    """``a, b, c and 4 more``."""
    rest = f" and {len(items) - most:,} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest


def one_line(text: object, most: int = 200) -> str:
    """A text, such as an error's, in one line of ``most`` characters at most, without its last stop: a sentence goes on. An
    ellipsis stands where it is cut."""
    line = " ".join(str(text).split())
    return re.sub(r"(?<!\.)\.$", "", line) if len(line) <= most else f"{line[: most - 1].rstrip(' .,')}…"


def shown(value: object) -> str:
    """A value as Python writes it; of an object that no file would hold, such as a loaded model, its type alone."""
    if value is None or isinstance(value, str | bytes | int | float | list | tuple | dict):
        return repr(value)
    return f"an object of the type {type(value).__name__}"


def version_changes(then: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """``torch 2.6 (now 2.7), peft 0.17 (now 0.18)``; None: of an emloc_ray that recorded none."""
    if not then:
        return "versions that are not recorded"
    return ", ".join(
        f"{name} {then.get(name, 'none')} (now {now[name]})" for name in now if then.get(name) != now[name]
    )


def signed(value: float, digits: int = 4) -> str:
    """A number with its sign, a true minus where it is negative; what rounds to zero has none."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if re.search("[1-9n]", text) else text[1:]


def whole_percent(share: float) -> str:
    """A certainty in per cent, rounded down and never whole: ``93 %``, and ``99 %`` of 0.9951 and of 1."""
    return f"{min(99, math.floor(100 * share))} %"


def visible_controls(text: str) -> str:
    """Text that others wrote, its control characters made visible (␀), which a terminal would obey."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda control: chr(0x2400 + ord(control[0])), text)
    return re.sub(r"[\x7f-\x9f]", "\ufffd", text)


def visible(text: str) -> str:
    """Text that others wrote, all made visible that HTML has no place for: control characters, halves of surrogate pairs."""
    return re.sub(r"[\ud800-\udfff]", "\ufffd", visible_controls(text))


def describe_choice(choice: dict[str, Any]) -> str:
    """A correction in words: ``covariance, λ = 3, strength 0.5``."""
    if choice["method"] == "none":
        return "none"
    clamp = "unclamped" if choice["clamp"] is None else f"λ = {choice['clamp']:g}"
    return f"{choice['method']}, {clamp}, strength {choice['strength']:g}"
