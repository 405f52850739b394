"""Questions about images as rows of data, their images named in every way that a row may."""

from __future__ import annotations

import base64
import http.server
import threading
from functools import partial
from pathlib import Path
from typing import Any

from small_runs import write_jsonl

from emloc_ray.demos.vqa import VqaTask, examples

NUM_ROWS = 48


def serve(folder: Path) -> tuple[http.server.ThreadingHTTPServer, str]:
    """A server of a folder's files, and its URL."""
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}"


def write_image_rows(folder: Path, url: str) -> Path:
    """Questions about charts, their images named in every way in turn; every sixth row shows none."""
    rows = []
    for number, example in enumerate(examples(VqaTask(num_rows=NUM_ROWS, image_size=40, kinds=("chart",)))):
        (folder / f"{number}.png").write_bytes(example.image)
        ways: list[dict[str, Any]] = [
            {"path": f"{number}.png"},
            {"url": f"{url}/{number}.png"},
            {"image": f"{folder}/{number}.png"},
            {"image": base64.b64encode(example.image).decode()},
            {"image": f"{url}/{number}.png"},
        ]
        shown = [] if number % 6 == 5 else [{"type": "image", **ways[number % 6]}]
        asked = [*shown, {"type": "text", "text": example.question}]
        rows.append(
            {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": example.answer}]}
        )
    return write_jsonl(folder / "rows.jsonl", rows)
