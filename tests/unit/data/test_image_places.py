"""What rows may not read: private addresses however they are reached, and files outside the data's folder and bucket."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulting.s3 import uri
from test_images import HERE, Server, place, png, row, serving

from emloc_ray.data import downloads
from emloc_ray.data.downloads import NotAllowed, download, is_public
from emloc_ray.data.image_places import ImagePlaces
from emloc_ray.data.images import load_images, look
from emloc_ray.errors import ArtifactError, ConfigError, DataError
from emloc_ray.io.store import objects
from emloc_ray.io.store.object_store import ObjectStore


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(downloads, "WAITS_S", ())
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serving() as number:
        yield number


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The addresses that sockets were connected to."""
    found: list[Any] = []
    connect = socket.socket.connect

    def note(self: socket.socket, address: Any) -> None:
        found.append(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", note)
    return found


PRIVATE = (
    *(
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "255.255.255.255",
    ),
    *("224.0.0.1", "240.0.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1"),
    *("64:ff9b::a9fe:a9fe", "2002:7f00:1::"),
    *("168.63.129.16", "192.0.0.192", "fec0::1", "feff::1", "::ffff:168.63.129.16"),
)


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.slow
@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "LOCALHOST", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]"]
)
def test_private_hosts_are_refused_without_connecting(port: int, connected: list[Any], host: str) -> None:
    with pytest.raises(
        DataError, match=r"^here: image 1 http.* is not read: .* no public address: add the host"
    ) as caught:
        load_images(row({"type": "image", "url": f"http://{host}:{port}/a.png"}), "here")
    assert "\n" not in str(caught.value)
    assert not connected
    assert not Server.asked


def test_a_host_that_is_allowed_by_name_is_read(port: int) -> None:
    shown = row({"type": "image", "url": f"http://LocalHost:{port}/a.png"})
    assert load_images(shown, "here", ImagePlaces.of(["LOCALHOST"], [])) == [png()]
    with pytest.raises(DataError, match="localhost is at"):
        load_images(shown, "here", HERE)


@pytest.mark.parametrize(
    ("target", "complaint"),
    [
        ("http://169.254.169.254/latest/meta-data/", "169.254.169.254, which is no public address"),
        ("http://localhost:1/a.png", "localhost is at .*, which is no public address"),
        ("//[::1]/a.png", "::1, which is no public address"),
        ("file:///etc/passwd", "none of http or https"),
        ("ftp://127.0.0.1/a.png", "none of http or https"),
    ],
)
def test_redirects_are_checked_too(port: int, connected: list[Any], target: str, complaint: str) -> None:
    Server.targets.update({"/a.png": "/b.png", "/b.png": target})
    with pytest.raises(DataError, match=f"is not read: .*{complaint}"):
        load_images(row({"type": "image", "url": f"http://127.0.0.1:{port}/a.png"}), "here", HERE)
    assert connected == [("127.0.0.1", port)] * 2
    assert Server.asked == ["127.0.0.1/a.png", "127.0.0.1/b.png"]


def test_redirects_are_followed_some_times(port: int) -> None:
    Server.targets.update({"/a.png": "b.png", "/loop": "/loop"})
    assert download(f"http://127.0.0.1:{port}/a.png", HERE.hosts) == png()
    with pytest.raises(ValueError, match="more than 5 redirects"):
        download(f"http://127.0.0.1:{port}/loop", HERE.hosts)


def test_a_name_is_resolved_once(port: int, connected: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that says a public address first and a private one later gains nothing."""
    answers = iter(["127.0.0.2", "127.0.0.1"])  # the first stands for a public one, where nothing listens
    resolved: list[str] = []

    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        resolved.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(downloads, "is_public", lambda address: address == "127.0.0.2")
    with pytest.raises(ConnectionRefusedError):
        download(f"http://rebinding.example:{port}/a.png")
    assert resolved == ["rebinding.example"]
    assert connected == [("127.0.0.2", port)]
    assert not Server.asked


def test_one_private_address_among_public_ones_is_enough(connected: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 80)) for ip in ("1.1.1.1", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    with pytest.raises(NotAllowed, match=r"two\.example is at 10\.0\.0\.1"):
        download("http://two.example/a.png")
    assert not connected


def test_the_environment_s_proxy_is_used_and_hosts_are_checked_all_the_same(
    port: int, connected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(NotAllowed, match="no public address"):
        download("http://169.254.169.254/a.png")
    assert not connected
    assert download("http://1.1.1.1/a.png") == png()
    assert Server.asked == ["1.1.1.1http://1.1.1.1/a.png"]


def test_a_name_that_only_the_proxy_knows_is_asked_for_where_the_config_names_it(
    port: int, connected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(host: str, *rest: Any, **options: Any) -> Any:
        if host.endswith(".internal"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return known(host, *rest, **options)

    known = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "")
    url = "http://images.internal/a.png"
    with pytest.raises(NotAllowed, match=r"^images\.internal is known to the proxy alone.* data\.image_hosts if rows"):
        download(url)
    assert not connected
    assert download(url, ["images.internal"]) == png()
    assert Server.asked == [f"images.internal{url}"]


def test_an_answer_that_drips_has_an_end(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "LONGEST_S", 0.3)
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"took more than 0\.3 s"):
        download(f"http://127.0.0.1:{port}/slow.png", HERE.hosts)
    assert time.monotonic() - begun < 2


def _absolute(folder: Path) -> str:
    return str(folder.parent / "secret.png")


def _linked(folder: Path) -> str:
    (folder / "link.png").symlink_to("../secret.png")
    return "link.png"


def _linked_folder(folder: Path) -> str:
    (folder / "deep").symlink_to(folder.parent)
    return "deep/secret.png"


WAYS_OUT: list[Callable[[Path], str]] = [
    lambda folder: "../secret.png",
    lambda folder: "a/../../secret.png",
    _absolute,
    lambda folder: f"file://{_absolute(folder)}",
    _linked,
    _linked_folder,
    lambda folder: "../data-secret/secret.png",
]


@pytest.mark.parametrize("way", WAYS_OUT)
@pytest.mark.parametrize("read", [load_images, look])
def test_paths_out_of_the_data_s_folder(tmp_path: Path, way: Callable[[Path], str], read: Callable[..., Any]) -> None:
    folder = tmp_path / "data"
    for place_of in (folder / "a", tmp_path / "data-secret"):
        place_of.mkdir(parents=True)
    for secret in (tmp_path / "secret.png", tmp_path / "data-secret" / "secret.png"):
        secret.write_bytes(png())
    shown = row({"type": "image", "path": way(folder)})
    with pytest.raises(
        DataError, match=r"row 7: image 1 .* is not read: .* is not below the data file's folder"
    ) as caught:
        read(shown, place(folder))
    assert "data.image_roots" in str(caught.value)
    assert read(shown, place(folder), ImagePlaces.of([], [str(tmp_path)]))


def test_links_inside_the_folder_and_to_the_folder_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(png())
    (tmp_path / "real" / "b.png").symlink_to("a.png")
    (tmp_path / "named").symlink_to("real")
    for name in ("a.png", "b.png", str(tmp_path / "real" / "a.png"), str(tmp_path / "named" / "b.png")):
        assert load_images(row({"type": "image", "path": name}), place(tmp_path / "named")) == [png()]


def test_a_root_is_from_the_working_directory_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ImagePlaces.of(["H"], ["pictures", "s3://b/c"]) == ImagePlaces(
        ("h",), (str(tmp_path / "pictures"), "s3://b/c")
    )


def test_a_bucket_s_own_files_are_read_by_name_and_no_others(s3_port: int, tmp_path: Path) -> None:
    root = uri(s3_port, "places")
    ObjectStore(root, "data").write("pictures/a.png", png())
    folder = root.replace("?", "/task?", 1)
    plain, options = root.split("?")
    for name in (f"{plain}/pictures/a.png", f"{plain}/pictures/a.png?{options}", "../pictures/a.png"):
        assert load_images(row({"type": "image", "path": name}), place(folder)) == [png()]
    (tmp_path / "a.png").write_bytes(png())
    elsewhere = [
        "s3://other/places/pictures/a.png",
        f"{plain}/pictures/a.png?{options.replace('127.0.0.1', '169.254.169.254')}",
        "../../../other/a.png",
        f"{plain}/x/../../a.png",
        "gs://runs/a.png",
        "hdfs://namenode/a.png",
    ]
    for name in elsewhere:
        for read in (load_images, look):
            with pytest.raises(DataError, match=r"is not read: .* is not the data file's bucket: .*data\.image_roots"):
                read(row({"type": "image", "path": name}), place(folder))
    with pytest.raises(DataError, match="is not below the data file's folder"):
        load_images(row({"type": "image", "path": f"file://{tmp_path}/a.png"}), place(folder))
    with pytest.raises(DataError, match="is not the data file's bucket"):
        load_images(row({"type": "image", "path": f"{plain}/pictures/a.png"}), place(tmp_path))


def test_a_stored_root_allows_what_is_below_it(s3_port: int, tmp_path: Path) -> None:
    root = uri(s3_port, "rooted")
    ObjectStore(root, "data").write("pictures/a.png", png())
    ObjectStore(root, "data").write("other/a.png", png())
    plain = root.split("?")[0]
    places = ImagePlaces.of([], [root.replace("?", "/pictures?", 1)])
    assert load_images(row({"type": "image", "path": f"{plain}/pictures/a.png"}), place(tmp_path), places) == [png()]
    for name in ("other/a.png", "pictures/../other/a.png", "pictures/%2e%2e/other/a.png", "pictures-b/a.png"):
        with pytest.raises(DataError, match="is not the data file's bucket"):
            load_images(row({"type": "image", "path": f"{plain}/{name}"}), place(tmp_path), places)


def test_a_store_that_does_not_answer_is_no_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "ATTEMPTS", 1)
    root = uri(1, "")
    plain = root.partition("?")[0]
    places = ImagePlaces.of([], [root])
    with pytest.raises(ArtifactError, match="see that the store can be reached"):
        load_images(row({"type": "image", "path": f"{plain}/a.png"}), place(tmp_path), places)
    wrong = ImagePlaces.of([], [root.replace("region", "regoin")])
    with pytest.raises(ConfigError, match="is no place that obstore can open"):
        load_images(row({"type": "image", "path": f"{plain}/a.png"}), place(tmp_path), wrong)
    with pytest.raises(DataError, match=r"cannot be read .its name has more than 1024 bytes"):
        load_images(row({"type": "image", "path": f"{plain}/{'x' * 1025}.png"}), place(tmp_path), places)
