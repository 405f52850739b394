"""Downloads files by URL, from public addresses only: a row of data must not reach a cluster's own services.

A host's name is resolved once, every address is checked, and the connection goes to a checked one, so that a second answer of
the name server changes nothing. The same holds after each redirect.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Collection
from typing import Any, TypeVar

MAX_BYTES = 2**27
_TIMEOUT_S = 20.0  # for a server's next bytes
LONGEST_S = 60.0  # for one try, with its redirects
WAITS_S = (1.0, 4.0)  # before another try
_MAX_REDIRECTS = 5
_CHUNK_BYTES = 2**16
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_OF_URLS = ":/?#[]@!$&'()*+,;=%~"  # what a URL may hold beside letters and digits
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Of clouds and sites, though Python takes them for global: Azure's WireServer, Oracle's metadata, site-local addresses.
_INNER = tuple(map(ipaddress.ip_network, ("168.63.129.16/32", "192.0.0.0/24", "fec0::/10")))
Address = tuple[Any, ...]
Content = TypeVar("Content", bytes, bytearray)


class NotAllowed(ValueError):
    """A name leads to a place that data may not read from; says which, and what to do."""


def download(url: str, hosts: Collection[str] = ()) -> bytes:
    """A URL's content; tries again where the server is silent or in trouble, not where it refuses. ``hosts``: names that may
    have private addresses.

    Raises NotAllowed where it, or one that it redirects to, is not http(s) or has a private address; ValueError where the
    server refuses or the file is too long; OSError or HTTPException where the server is silent or in trouble.
    """
    for wait in (*WAITS_S, None):
        try:
            status, content = _follow(urllib.parse.quote(url, safe=_OF_URLS), hosts)
            if status == 200:
                return content
            if wait is None or status not in _AGAIN:
                raise ValueError(f"HTTP {status}")
        except (OSError, http.client.HTTPException):
            if wait is None:
                raise
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def public_addresses(host: str, port: int, hosts: Collection[str]) -> list[Address]:
    """The socket addresses of a host. Raises OSError where the name is unknown, NotAllowed where an address is private, of this
    machine or network, multicast or reserved, unless ``hosts`` names the host."""
    addresses = [address for *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    for address in addresses:
        if host.lower() not in hosts and not is_public(str(address[0])):
            raise NotAllowed(
                f"{host} is at {address[0]}, which is no public address: add the host to data.image_hosts if rows may read"
                " from it"
            )
    return addresses


def is_public(address: str) -> bool:
    """Whether an IP address is public, and also the address that it embeds, where it stands for another."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = (
            ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None)
        )
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not any(ip in inner for inner in _INNER)


def _follow(url: str, hosts: Collection[str]) -> tuple[int, bytes]:
    """The status and content at the end of a URL's redirects."""
    ends = time.monotonic() + LONGEST_S
    for _ in range(_MAX_REDIRECTS + 1):
        status, content, target = _ask(url, hosts, ends)
        if target is None:
            return status, content
        url = urllib.parse.urljoin(url, urllib.parse.quote(target, safe=_OF_URLS))
    raise ValueError(f"more than {_MAX_REDIRECTS} redirects")


def _ask(url: str, hosts: Collection[str], ends: float) -> tuple[int, bytes, str | None]:
    """One request: the status, the content, and where it redirects to."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise NotAllowed("it leads to a URL that is none of http or https: name the file itself")
    if parts.username is not None:
        raise ValueError("its URL holds a user's name")
    with _Deadline(ends) as deadline:
        connection, target, headers = _connect(parts, hosts, deadline.watch)
        try:
            connection.request("GET", target, headers={"User-Agent": "emloc-ray", **headers})
            answer = connection.getresponse()
            where = answer.getheader("Location") if answer.status in (301, 302, 303, 307, 308) else None
            content = _whole(answer) if answer.status == 200 else b""
        finally:
            connection.close()
    return answer.status, content, where


def _connect(
    parts: urllib.parse.SplitResult, hosts: Collection[str], watch: Callable[[socket.socket], None]
) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
    """A connection to a URL's host, the request's target, and its headers. An environment's proxy resolves names itself: they
    are checked here all the same. Raises NotAllowed where this machine does not know one, unless ``hosts`` names it."""
    host, secure = str(parts.hostname), parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(host):
        connection = kind(host, port, timeout=_TIMEOUT_S)
        stream = _open_first(public_addresses(host, port, hosts))
        watch(stream)
        if secure:
            stream = ssl.create_default_context().wrap_socket(stream, server_hostname=host)
            watch(stream)
        connection.sock = stream
        return connection, target, {}
    try:
        public_addresses(host, port, hosts)
    except socket.gaierror as error:  # a name that only the proxy knows
        if host.lower() not in hosts:
            raise NotAllowed(
                f"{host} is known to the proxy alone, if at all, so that its address cannot be checked: add the host to"
                " data.image_hosts if rows may read from it"
            ) from error
    via = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    user = urllib.parse.unquote(f"{via.username or ''}:{via.password or ''}")
    login = {"Proxy-Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"} if via.username else {}
    connection = kind(str(via.hostname), via.port or 80, timeout=_TIMEOUT_S)
    if secure:
        connection.set_tunnel(host, port, login)
    connection.connect()
    watch(connection.sock)
    if secure:
        return connection, target, {}
    return connection, urllib.parse.urlunsplit((*parts[:4], "")), login


def _open_first(addresses: list[Address]) -> socket.socket:
    """A connection to the first of the addresses that answers."""
    for place, address in enumerate(addresses):
        stream = socket.socket(socket.AF_INET6 if len(address) == 4 else socket.AF_INET, socket.SOCK_STREAM)
        stream.settimeout(_TIMEOUT_S)
        try:
            stream.connect(address)
            return stream
        except OSError:
            stream.close()
            if place == len(addresses) - 1:
                raise
    raise OSError("its name has no address")


class _Deadline:
    """Ends a connection's reads at a time: a timeout alone restarts with each read, however slowly bytes come."""

    def __init__(self, ends: float) -> None:
        self._ends = ends
        self._stream: socket.socket | None = None
        self._timer = threading.Timer(max(0.0, ends - time.monotonic()), self._end)

    def watch(self, stream: socket.socket) -> None:
        """Sets the connection to end."""
        self._stream = stream

    def _end(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._stream, socket.SHUT_RDWR)  # below TLS, which may be in a read

    def __enter__(self) -> _Deadline:
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: object) -> None:
        self._timer.cancel()
        if time.monotonic() > self._ends and not isinstance(error, NotAllowed):
            raise TimeoutError(f"it took more than {LONGEST_S:g} s") from error


def _whole(answer: http.client.HTTPResponse) -> bytes:
    """An answer's whole body, within :data:`MAX_BYTES`."""
    content = bytearray()
    while chunk := answer.read1(_CHUNK_BYTES):
        content += chunk
        bounded(content)
    if answer.length:
        raise ConnectionError(f"it ended {answer.length} bytes early")
    return bytes(content)


def bounded(content: Content) -> Content:
    """The content; raises ValueError where it is longer than :data:`MAX_BYTES`."""
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES >> 20} MiB")
    return content
