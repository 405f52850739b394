"""Images decoded apart: those that attack their decoder, here by what stands in for one, end no process but that."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_runs import write_jsonl

from emloc_ray.config.reading import parse_config
from emloc_ray.data.decoder import DecoderApart
from emloc_ray.errors import ConfigError
from emloc_ray.planning.first_rows import FirstRows, first_rows
from emloc_ray.planning.prepared import prepare

# What every Python runs first that is started then: what an image has behind its end is done where it is opened.
_HOSTILE = """
import os, time
from PIL import Image
opened = Image.open
def open(file, *rest, **options):
    attack = file.getvalue()[-5:]
    if attack == b"crash": os.kill(os.getpid(), 11)
    if attack == b"sleep": time.sleep(600)
    if attack == b"swell": bytearray(2**33)
    if attack == b"lying": os.write(1, b"[1000000000, 9]\\n")
    return opened(file, *rest, **options)
Image.open = open
"""


def png(attack: str = "") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 8), (200, 30, 30)).save(stream, "PNG")
    return stream.getvalue() + attack.encode()


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile").mkdir()
    (tmp_path / "hostile" / "sitecustomize.py").write_text(_HOSTILE)
    found = filter(None, [str(tmp_path / "hostile"), os.environ.get("PYTHONPATH")])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(found))


@pytest.mark.slow
def test_an_image_ends_no_process_but_its_decoder_s(hostile: None) -> None:
    complaints = {
        "crash": r"it ended its decoder \(SIGSEGV\)",
        "swell": "it takes more than 4294967296 bytes of memory",
        "lying": r"it ended its decoder \(SIGKILL\)",
        "sleep": "its decoder took more than 1 s",
    }
    with DecoderApart() as decoder:
        for attack, complaint in complaints.items():
            shown = decoder(png())
            assert (shown.size, shown.mode) == ((12, 8), "RGB")
            decoder.seconds = 1.0 if attack == "sleep" else 60.0
            with pytest.raises(ValueError, match=complaint):
                decoder(png(attack))
    with pytest.raises(ValueError, match="it is no JPEG, PNG, WebP or GIF"), DecoderApart() as decoder:
        decoder(b"x")


@pytest.mark.slow
def test_first_rows_are_tokenized_whatever_their_images_do(
    hostile: None, tmp_path: Path, vlm_dir: Callable[[str], Path]
) -> None:
    asked = [{"type": "image", "path": "a.png"}, {"type": "text", "text": "What is it?"}]
    rows: list[Any] = [{"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "a cat"}]}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows * 20)

    def read(attack: str, on_error: str) -> FirstRows | None:
        (tmp_path / "a.png").write_bytes(png(attack))
        data = {"train": {"path": str(path)}, "format": "messages", "on_error": on_error}
        values = {"run_dir": str(tmp_path / "run"), "model": {"source": str(vlm_dir("LLaVA"))}, "data": data}
        return first_rows(prepare(parse_config(values)), count=2)

    good, bad = read("", "fail"), read("crash", "skip")
    assert good is not None
    assert bad is not None
    assert [len(tokens.images) for tokens in good.sequences] == [1, 1]
    assert [row for _, row in bad.rows] == [None, None]
    with pytest.raises(
        ConfigError, match=r"row 1: image 1 a\.png cannot be decoded \(it ended its decoder \(SIGSEGV\)\)"
    ):
        read("crash", "fail")
