"""How many rows a data set of the hub has is read off its card; a local server stands for the hub."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from datasets import ReadInstruction
from hypothesis import given
from hypothesis import strategies as st

from emloc_ray.data import hub_rows
from emloc_ray.data.hub_splits import HubSplit

SIZES = {"train": 1003, "test": 17}
_BOUNDS = st.none() | st.integers(0, 100)
_PIECES = st.tuples(st.sampled_from([*SIZES]), _BOUNDS, _BOUNDS, st.sampled_from(["", "%"]))


class Hub(BaseHTTPRequestHandler):
    """The cards of some data sets."""

    cards: dict[str, Any]
    asked: list[str]

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].removeprefix("/api/datasets/")
        self.asked.append(name)
        card = self.cards.get(name)
        self.send_response(404 if card is None else 200)
        self.end_headers()
        says = {"id": name, "sha": "c" * 40, "siblings": [], "tags": [], "downloads": 0, "likes": 0, "private": False}
        self.wfile.write(json.dumps({**says, "cardData": card}).encode())

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    Hub.cards, Hub.asked = {}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    yield Hub
    server.shutdown()
    server.server_close()
    thread.join()


def splits(**sizes: int) -> list[dict[str, Any]]:
    return [{"name": name, "num_examples": rows} for name, rows in sizes.items()]


def rows(place: str, split: str = "train") -> int | None:
    return hub_rows.num_rows(HubSplit.of(place, split))


def test_a_card_of_one_subset_or_of_several(hub: type[Hub]) -> None:
    hub.cards["org/one"] = {"dataset_info": {"config_name": "own", "splits": splits(**SIZES)}}
    assert rows("hf:org/one") == 1003
    assert rows("hf:org/one@own:train[:10%]+test[5:]") == 100 + 12
    assert rows("hf:org/one", "eval") == 17
    assert rows("hf:org/one@other") is None
    two = [{"config_name": "en", "splits": splits(train=5)}, {"config_name": "default", "splits": splits(train=7)}]
    hub.cards["org/two"] = {"dataset_info": two}
    assert [rows("hf:org/two"), rows("hf:org/two@en"), rows("hf:org/two:all")] == [7, 5, 7]


def test_no_card_no_sizes_and_no_hub(hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    hub.cards |= {"org/bare": None, "org/untold": {"license": "mit"}, "org/odd": {"dataset_info": "?"}}
    assert [rows(f"hf:org/{name}") for name in ("bare", "untold", "odd")] == [None] * 3
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    assert rows("hf:org/away") is None


def test_the_hub_is_asked_once(hub: type[Hub]) -> None:
    hub.cards["org/asked"] = {"dataset_info": {"splits": splits(train=3)}}
    assert [rows("hf:org/asked"), rows("hf:org/not-there")] == [3, None]
    once = [*hub.asked]
    assert {*once} == {"org/asked", "org/not-there"}
    assert [rows("hf:org/asked"), rows("hf:org/not-there")] == [3, None]
    assert hub.asked == once


@given(st.lists(_PIECES, min_size=1, max_size=3))
def test_a_slice_has_as_many_rows_as_datasets_reads(pieces: list[tuple[str, int | None, int | None, str]]) -> None:
    def text(name: str, begin: int | None, end: int | None, unit: str) -> str:
        bounds = ["" if bound is None else f"{bound}{unit}" for bound in (begin, end)]
        return f"{name}[{':'.join(bounds)}]"

    part = "+".join(text(*piece) for piece in pieces)
    try:
        expected = sum(piece.to - piece.from_ for piece in ReadInstruction.from_spec(part).to_absolute(SIZES))
    except (ValueError, AssertionError):  # beyond the end, which datasets refuses
        return
    if all(begin is None or end is None or begin <= end for _, begin, end, _ in pieces):
        assert HubSplit("org/rows", "", part).num_rows(SIZES) == expected
