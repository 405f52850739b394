"""Azurite, Microsoft's emulator of Azure's blobs (``npm install --global azurite``), in a process of its own."""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate

import pytest

CONTAINER = "runs"
ACCOUNT = "devstoreaccount1"
# The emulator's own, which everybody has: https://learn.microsoft.com/azure/storage/common/storage-use-azurite
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
_SECONDS = 60


@contextmanager
def azure_server() -> Iterator[int]:
    """The port of a server that holds the empty container :data:`CONTAINER`; skips the test where there is no Azurite."""
    command = shutil.which("azurite-blob")
    if command is None:
        pytest.skip("there is no azurite-blob here: npm install --global azurite")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--silent", "--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry"]
    process = subprocess.Popen(
        [command, *options, "--blobHost", "127.0.0.1", "--blobPort", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _make_container(port)
        yield port
    finally:
        process.terminate()
        process.wait(10)


def uri(port: int, name: str) -> str:
    """A place in the container of the server at ``port``."""
    return f"az://{CONTAINER}/{name}?account_name={ACCOUNT}&endpoint=http://127.0.0.1:{port}/{ACCOUNT}"


def _make_container(port: int) -> None:
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    lines = ["PUT", *[""] * 11, *(f"{name}:{value}" for name, value in headers.items())]
    signed = "\n".join([*lines, f"/{ACCOUNT}/{ACCOUNT}/{CONTAINER}", "restype:container"])
    signature = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(signature).decode()}"
    end = time.monotonic() + _SECONDS
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        try:
            connection.request("PUT", f"/{ACCOUNT}/{CONTAINER}?restype=container", headers=headers)
            answer = connection.getresponse()
            assert answer.status == 201, answer.read()
            return
        except ConnectionError:
            assert time.monotonic() < end
            time.sleep(0.1)
        finally:
            connection.close()
