"""Images decoded in a process of their own, with bounds of memory and time: none that attacks its decoder takes the caller down.

The process is given encoded images, each behind its length, and answers each with a line of JSON: its size, or why it has none.
"""

from __future__ import annotations

import contextlib
import json
import resource
import select
import signal
import subprocess
import sys
import threading
from typing import Any

from emloc_ray.data.images import MAX_PIXELS, decode
from emloc_ray.text import one_line

MEMORY_BYTES = 2**32  # ten times an image of MAX_PIXELS as RGB
SECONDS = 60.0


class DecoderApart:
    """Decodes images apart, by a process that begins with the first of them and ends with this context; a new one takes the
    place of one that ended."""

    def __init__(self, seconds: float = SECONDS) -> None:
        """``seconds``: how long an image may take."""
        self.seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> DecoderApart:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def __call__(self, content: bytes | memoryview) -> Any:
        """A black image of the size that an encoded one has once it is decoded. Raises ValueError where it cannot be, takes too
        long, or ends its process."""
        from PIL import Image

        with self._lock:
            answer = self._asked(content)
        if isinstance(answer, str):
            raise ValueError(answer)
        return Image.new("RGB", answer)

    def _asked(self, content: bytes | memoryview) -> str | tuple[int, int]:
        if self._process is None:
            command = [sys.executable, "-m", __name__]
            self._process = subprocess.Popen(
                command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        asks, answers = self._process.stdin, self._process.stdout
        assert asks is not None
        assert answers is not None
        try:
            rest = memoryview(len(content).to_bytes(8, "big") + bytes(content))
            while rest:
                rest = rest[asks.write(rest) :]
            if not select.select([answers], [], [], self.seconds)[0]:
                self._end()
                return f"its decoder took more than {self.seconds:g} s"
            answer = json.loads(answers.readline())
            if isinstance(answer, str):
                return answer
            width, height = map(int, answer)
            if 0 < width * height <= MAX_PIXELS:
                return width, height
        except (OSError, ValueError, TypeError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1.0)
        return f"it ended its decoder ({self._end()})"

    def _end(self) -> str:
        """Ends the process; says how it ended, where it had."""
        if self._process is None:
            return ""
        process, self._process = self._process, None
        process.kill()
        with process:
            code = process.wait()
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _serve() -> None:
    """Answers what the module says."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    asks, answers = sys.stdin.buffer, sys.stdout
    while length := asks.read(8):
        content = asks.read(int.from_bytes(length, "big"))
        try:
            answer: Any = decode(content).size
        except MemoryError:
            answer = f"it takes more than {MEMORY_BYTES} bytes of memory"
        except Exception as error:  # noqa: BLE001  whatever a broken file brings Pillow to raise
            answer = one_line(error, 120)
        answers.write(f"{json.dumps(answer)}\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
