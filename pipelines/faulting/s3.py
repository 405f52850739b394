"""A real S3 server for the tests, and a proxy before it that makes it slow, busy or cut off in mid-answer.

Both are processes of their own: clients hold Python's lock in some of their calls, and a server in the same process would wait
for it for ever.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUCKET = "runs"
_COUNTS = "/-/counts"
_KINDS = ("slow", "busy", "cut")


def uri(port: int, name: str) -> str:
    """A place in the bucket of the server at ``port``."""
    return f"s3://{BUCKET}/{name}?scheme=http&endpoint_override=127.0.0.1:{port}&region=us-east-1"


@contextmanager
def s3_server() -> Iterator[int]:
    """The port of a server that holds the empty bucket :data:`BUCKET`."""
    with _process("server") as port:
        headers = {"Authorization": "AWS4-HMAC-SHA256 Credential=tests/0/us-east-1/s3/x"}
        assert _ask(port, "PUT", f"/{BUCKET}", headers)[0] == 200
        yield port


class FaultyStore:
    """A proxy to the server, and what it has done to requests so far."""

    def __init__(self, port: int) -> None:
        self.port = port

    def counts(self) -> dict[str, int]:
        """How many requests met each kind of fault."""
        return json.loads(_ask(self.port, "GET", _COUNTS, {})[1])


@contextmanager
def faulty_store(port: int, share: float, pause_s: float = 0.2, seed: int = 0) -> Iterator[FaultyStore]:
    """Before the server at ``port``: a ``share`` of its requests is slow, answered 503, or cut off in mid-answer."""
    with _process("proxy", str(port), str(share), str(pause_s), str(seed)) as own:
        yield FaultyStore(own)


@contextmanager
def deaf_store(port: int, header: str) -> Iterator[int]:
    """The port of a proxy to the server at ``port`` that keeps a header of requests to itself."""
    with _process("proxy", str(port), "0", "0", "0", "--without", header) as own:
        yield own


@contextmanager
def _process(*arguments: str) -> Iterator[int]:
    with subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def _ask(port: int, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()


def _serve() -> None:
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    print(server.get_host_and_port()[1], flush=True)
    threading.Event().wait()


def _proxy(port: int, share: float, pause_s: float, seed: int, without: str) -> None:
    counts, drawing, lock = dict.fromkeys(_KINDS, 0), random.Random(seed), threading.Lock()

    def draw() -> str | None:
        with lock:
            fault = drawing.choice(_KINDS) if drawing.random() < share else None
            if fault is not None:
                counts[fault] += 1
            return fault

    hop = {"transfer-encoding", "connection", "content-length", "expect", without}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.body()
            if self.path == _COUNTS:
                self.answer(200, [], json.dumps(counts).encode())
                return
            fault = draw()
            if fault == "busy":
                self.answer(503, [], b"")
                return
            time.sleep(pause_s if fault == "slow" else 0)
            headers = {name: value for name, value in self.headers.items() if name.lower() not in hop}
            with closing(http.client.HTTPConnection("127.0.0.1", port)) as upstream:
                upstream.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
                answer = upstream.getresponse()
                self.answer(answer.status, answer.getheaders(), answer.read(), cut=fault == "cut")

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass  # trailers
            return b"".join(chunks)

        def answer(self, status: int, headers: list[tuple[str, str]], content: bytes, cut: bool = False) -> None:
            own = hop | {"server", "date"}
            size = next((value for name, value in headers if name.lower() == "content-length"), None)
            self.send_response(status)
            for name, value in headers:
                if name.lower() not in own:
                    self.send_header(name, value)
            self.send_header("Content-Length", (size if self.command == "HEAD" else None) or str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if cut else content)
            if cut:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("server", "proxy"))
    parser.add_argument("numbers", type=float, nargs="*")
    parser.add_argument("--without", default="")
    given = parser.parse_args()
    if given.what == "server":
        _serve()
    else:
        _proxy(int(given.numbers[0]), given.numbers[1], given.numbers[2], int(given.numbers[3]), given.without)
