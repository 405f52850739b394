"""Images of rows: named in every way, read as they are encoded, and told by file and row where they cannot be."""

from __future__ import annotations

import base64
import contextlib
import io
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulting.s3 import uri
from PIL import Image
from small_runs import write_jsonl

from emloc_ray.data import downloads, image_places, reading
from emloc_ray.data import images as images_module
from emloc_ray.data.formats import check_row
from emloc_ray.data.image_places import ImagePlaces
from emloc_ray.data.images import decode, load_images, look, plain_messages
from emloc_ray.data.reading import Place, Row, read_rows, scan
from emloc_ray.data.row_formats import columns_of
from emloc_ray.errors import DataError
from emloc_ray.io.store.object_store import ObjectStore

HERE = ImagePlaces(hosts=("127.0.0.1",))  # where the tests' server is


def png(colour: tuple[int, int, int] = (200, 30, 30), form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 8), colour).save(stream, form)
    return stream.getvalue()


def torn() -> bytes:
    """The first half of an image that has no two pixels alike."""
    stream = io.BytesIO()
    Image.effect_noise((32, 32), 90).save(stream, "PNG")
    return stream.getvalue()[: len(stream.getvalue()) // 2]


def row(*parts: dict[str, Any], **columns: Any) -> Row:
    asked = [*parts, {"type": "text", "text": "What colour?"}]
    return {
        "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "red"}],
        **columns,
    }


def place(folder: Path | str, number: int = 6) -> Place:
    made = Place(f"{folder}/rows.jsonl, row {number + 1}")
    made.folder = str(folder)
    return made


class Server(BaseHTTPRequestHandler):
    """Gives what is asked of it: an image, a byte at a time too, where another is, a refusal, or trouble that is over at the
    second try."""

    targets: ClassVar[dict[str, str]] = {}
    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(f"{self.headers['Host'].partition(':')[0]}{self.path}")
        is_first = self.asked.count(self.asked[-1]) == 1
        codes = {"/gone.png": 404, "/broken.png": 500, "/busy.png": 503 if is_first else 200}
        code = 302 if self.path in self.targets else codes.get(self.path, 200)
        self.send_response(code)
        if code == 302:
            self.send_header("Location", self.targets[self.path])
        if self.path == "/short.png" and is_first:
            self.send_header("Content-Length", "9999")
        self.end_headers()
        for byte in png() if code == 200 else b"no":
            self.wfile.write(bytes([byte]))
            time.sleep(0.05 if self.path == "/slow.png" else 0)

    def log_message(self, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[int]:
    Server.asked.clear()
    Server.targets.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as started:
        threading.Thread(target=started.serve_forever, args=(0.01,), daemon=True).start()
        yield started.server_address[1]
        started.shutdown()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(downloads, "WAITS_S", (0.01, 0.01))
    with serving() as port:
        yield f"http://127.0.0.1:{port}"


def test_every_way_of_naming_an_image_gives_its_bytes(tmp_path: Path, server: str) -> None:
    content = png()
    (tmp_path / "a.png").write_bytes(content)
    text = base64.b64encode(content).decode()
    ways: list[dict[str, Any]] = [
        {"path": "a.png"},
        {"path": str(tmp_path / "a.png")},
        {"path": f"file://{tmp_path}/a.png"},
        {"image": "a.png"},
        {"image": content},
        {"image": {"bytes": content, "path": None}},
        {"image": {"bytes": None, "path": "a.png"}},
        {"image": text},
        {"base64": text},
        {"image": f"data:image/png;base64,{text}"},
        {"url": f"{server}/a.png"},
        {"image": f"{server}/busy.png"},
    ]
    shown = row(*({"type": "image", **way} for way in ways), {"type": "image_url", "image_url": {"url": f"{server}/b"}})
    check_row(shown, "messages", "here")
    assert load_images(shown, place(tmp_path), HERE) == [content] * 13


def test_a_path_is_from_the_folder_of_a_file_on_a_store(s3_port: int) -> None:
    root = uri(s3_port, "images")
    store = ObjectStore(root, "data")
    store.write("task/pictures/a b.png", png())
    folder = root.replace("?", "/task?", 1)
    for name in ("pictures/a b.png", "../task/pictures/a b.png"):
        assert load_images(row({"type": "image", "path": name}), place(folder)) == [png()]


def test_images_of_columns_go_to_the_parts_that_name_none(tmp_path: Path) -> None:
    one, two = png(), png((1, 2, 3))
    parts = [{"type": "image"}, {"type": "image"}]
    assert load_images(row(*parts, images=[one, {"bytes": two, "path": None}]), "here") == [one, two]
    assert load_images(row({"type": "image"}, image=two), "here") == [two]
    with pytest.raises(DataError, match="2 image parts name no image, and columns images and image hold 1"):
        check_row(row(*parts, images=[one]), "messages", "here")


def test_a_parquet_file_s_bytes_inside_content_and_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = [png(), png((9, 9, 9))]
    inside = [row({"type": "image", "image": each}) for each in content]
    kind = pa.struct([("type", pa.string()), ("text", pa.string()), ("image", pa.binary())])
    for each in inside:
        each["messages"][1]["content"] = [{"type": "text", "text": "red"}]
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(kind))]))
    table = pa.Table.from_pylist(inside, pa.schema([("messages", turns)]))
    pq.write_table(table, tmp_path / "inside.parquet")
    beside = [row({"type": "image"}, images=[each], other=1)["messages"] for each in content]
    pq.write_table(
        pa.table({"messages": pa.array([str(b) for b in beside]), "images": [[c] for c in content], "more": [1, 2]}),
        tmp_path / "beside.parquet",
    )
    found = [r for _, r in read_rows(scan(tmp_path / "inside.parquet"), range(2), ["messages"])]
    assert [load_images(r, "here") for r in found] == [[each] for each in content]
    assert plain_messages(found[0]["messages"]) == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    monkeypatch.setattr(reading, "BATCH_BYTES", 1)  # a row at a time, where rows are large
    again = [r for _, r in read_rows(scan(tmp_path / "inside.parquet"), range(2), ["messages"])]
    assert again == found
    source = scan(tmp_path / "beside.parquet")
    [(_, first)] = read_rows(source, [0], *columns_of("messages", {}))
    assert set(first) == {"messages", "images"}


@pytest.mark.parametrize(
    ("part", "complaint"),
    [
        ({"path": "absent.png"}, r"image 1 .*absent\.png is not there"),
        ({"path": "text.png"}, r"image 1 text\.png cannot be decoded"),
        ({"path": "cut.png"}, r"image 1 cut\.png cannot be decoded"),
        ({"image": b"no image"}, "image 1 cannot be decoded"),
        ({"image": "?not base64?"}, r"image 1 \?not base64\? is no base64 .*give it as path"),
        ({"image": 7}, "image 1 is int"),
        ({"path": "."}, "image 1 . cannot be read"),
    ],
)
def test_a_bad_image_is_told_by_file_and_row(tmp_path: Path, part: dict[str, Any], complaint: str) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes(torn())
    with pytest.raises(DataError, match=complaint) as caught:
        load_images(row({"type": "image", **part}), place(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}/rows.jsonl, row 7: ")
    assert "\n" not in str(caught.value)


def test_what_signs_a_url_is_in_no_error(server: str) -> None:
    secret = server.replace("http://", "http://ann:hunter2@") + "/a.png?X-Amz-Signature=abc#f"
    with pytest.raises(DataError) as caught:
        load_images(row({"type": "image", "url": secret}), "here", HERE)
    assert f"{server}/a.png cannot be read" in str(caught.value)
    assert not any(word in str(caught.value) for word in ("hunter2", "Signature", "abc"))
    with pytest.raises(DataError, match=r"^here: image 1 x{200}… cannot be read .File name too long") as caught:
        load_images(row({"type": "image", "path": "x" * 10_000}), "here")


def test_a_url_as_people_write_it(server: str) -> None:
    load_images(row({"type": "image", "url": f"{server}/a b ä.png?q=%20"}), "here", HERE)
    assert Server.asked == ["127.0.0.1/a%20b%20%C3%A4.png?q=%20"]


def test_an_answer_that_ends_early_is_asked_for_again(server: str) -> None:
    assert load_images(row({"type": "image", "url": f"{server}/short.png"}), "here", HERE) == [png()]
    assert Server.asked == ["127.0.0.1/short.png"] * 2


def test_an_image_has_a_size_and_a_time(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "LONGEST_S", -1.0)
    with pytest.raises(DataError, match="took more than"):
        load_images(row({"type": "image", "url": f"{server}/a.png"}), "here", HERE)
    monkeypatch.setattr(downloads, "LONGEST_S", 9.0)
    monkeypatch.setattr(downloads, "MAX_BYTES", 20)
    monkeypatch.setattr(image_places, "MAX_BYTES", 20)
    (tmp_path / "a.png").write_bytes(png())
    for part in ({"url": f"{server}/a.png"}, {"path": "a.png"}):
        with pytest.raises(DataError, match="it has more than 0 MiB"):
            load_images(row({"type": "image", **part}), place(tmp_path), HERE)
    with pytest.raises(DataError, match=r"/dev/zero cannot be read .it is no file"):
        load_images(row({"type": "image", "path": "/dev/zero"}), "here", ImagePlaces(roots=("/dev",)))


@pytest.mark.parametrize(("name", "code", "tries"), [("gone.png", 404, 1), ("broken.png", 500, 3)])
def test_a_server_that_says_no_is_asked_once_and_one_in_trouble_again(
    server: str, name: str, code: int, tries: int
) -> None:
    with pytest.raises(DataError, match=f"{name} cannot be read .HTTP {code}"):
        load_images(row({"type": "image", "url": f"{server}/{name}"}), "here", HERE)
    assert Server.asked == [f"127.0.0.1/{name}"] * tries


def test_a_server_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "WAITS_S", ())
    with pytest.raises(DataError, match=r"127\.0\.0\.1:9/a\.png cannot be read"):
        load_images(row({"type": "image", "url": "http://127.0.0.1:9/a.png"}), "here", HERE)


@pytest.mark.parametrize(
    ("part", "complaint"),
    [
        ({"type": "video", "path": "a.mp4"}, "part of type 'video': only text and image"),
        ({"type": "text"}, "part of type text has no text"),
        ("words", "part of type 'str'"),
    ],
)
def test_parts_of_other_kinds_are_told(part: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        check_row(row(part), "messages", "here")


def test_an_image_is_turned_upright_and_of_three_colours() -> None:
    stream = io.BytesIO()
    image = Image.new("L", (12, 8), 100)
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(stream, "JPEG", exif=exif)
    found = decode(stream.getvalue())
    assert (found.size, found.mode) == ((8, 12), "RGB")


def test_sixteen_bits_are_scaled_not_cut_off() -> None:
    stream = io.BytesIO()
    Image.fromarray((np.arange(256, dtype=np.uint16) * 256).reshape(16, 16)).save(stream, "PNG")
    found = np.asarray(decode(stream.getvalue()))
    assert found[..., 0].flatten().tolist() == list(range(256))


@pytest.mark.parametrize("form", ["TIFF", "BMP", "PPM", "ICO", "TGA", "PCX"])
def test_kinds_of_images_that_rows_do_not_need_are_not_opened(tmp_path: Path, form: str) -> None:
    (tmp_path / "a.png").write_bytes(png(form=form))
    with pytest.raises(DataError, match=r"row 7: image 1 a\.png cannot be decoded .it is no JPEG, PNG, WebP or GIF"):
        load_images(row({"type": "image", "path": "a.png"}), place(tmp_path))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_kinds_of_images_that_are_opened(form: str) -> None:
    assert decode(png(form=form)).size == (12, 8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_images_of_every_kind_are_of_three_colours(mode: str) -> None:
    stream = io.BytesIO()
    first = Image.new("RGB", (6, 4), (250, 250, 250)).convert(mode)
    first.save(stream, "JPEG" if mode == "CMYK" else "PNG")
    assert decode(stream.getvalue()).mode == "RGB"


def test_the_first_picture_of_those_that_move() -> None:
    stream = io.BytesIO()
    frames = [Image.new("RGB", (6, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    assert decode(stream.getvalue()).getpixel((0, 0)) == (255, 0, 0)


def test_an_image_of_too_many_pixels_is_told() -> None:
    header = b"IHDR" + struct.pack(">II", 20_000, 9_500) + png()[24:29]
    large = png()[:12] + header + struct.pack(">I", zlib.crc32(header)) + png()[33:]
    with pytest.raises(DataError, match=r"cannot be decoded .*decompression bomb"):
        load_images(row({"type": "image", "image": large}), "here")


def test_pixels_are_counted_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "MAX_PIXELS", 95)
    (tmp_path / "a.png").write_bytes(png()[:60])  # no pixel of it is there
    with pytest.raises(DataError, match=r"row 7: image 1 a\.png .*it has 12 x 8 pixels, more than 95"):
        load_images(row({"type": "image", "path": "a.png"}), place(tmp_path))


def test_what_is_seen_of_images_unopened(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    parts = [{"type": "image", "path": "a.png"}, {"type": "image"}, {"type": "image", "url": "http://h/b.png"}]
    shown = row(*parts, images=[{"bytes": png(), "path": "elsewhere.png"}])
    seen = look(shown, place(tmp_path))
    assert [name if isinstance(name, str) else name[0] for name in seen] == ["a.png", "http://h/b.png"]
    (tmp_path / "a.png").write_bytes(png() + b"0")
    assert look(shown, place(tmp_path)) != seen
    with pytest.raises(DataError, match=r"row 7: image 1 b\.png is not there"):
        look(row({"type": "image", "path": "b.png"}), place(tmp_path))
    assert look(row({"type": "image", "path": "b.png"}), place("s3://bucket/rows")) == ["b.png"]


@pytest.mark.parametrize("content", [5, {"type": "text", "text": "a"}])
def test_content_is_a_text_or_parts(content: Any) -> None:
    asked = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]}
    with pytest.raises(DataError, match=r"content is (int|dict): give a text, or a list of parts"):
        check_row(asked, "messages", "here")


def test_what_is_no_character_is_told_inside_parts_too() -> None:
    with pytest.raises(DataError, match=r"holds .* which is no character"):
        check_row(row({"type": "text", "text": "\ud800"}), "messages", "here")


def test_rows_know_their_folder(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [row()])
    found = Place.of(scan(path), 0)
    assert (str(found), found.folder) == (f"{path}, row 1", str(tmp_path))
