"""Who holds a run on an object store: an object put on condition that there is none, renewed while its holder lives."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Protocol, TypeVar

from emloc_ray.errors import ArtifactError, ConfigError, TakenOver
from emloc_ray.io.store.object_store import ObjectStore

KEY = "lock"
_RENEW_S = 10.0
_STALE_S = 60.0
_SETTLE_S = 3.0
_ATTEMPTS = 8
Result = TypeVar("Result")


@dataclass(frozen=True)
class Holder:
    """The lease as found: who wrote it, its version, another with each renewal, and its age by the store's own clock;
    None where the store does not tell."""

    name: str
    token: str
    version: str
    age_s: float | None

    @property
    def is_stale(self) -> bool:
        """Whether its holder has missed several renewals: it is dead, or cut off from the store."""
        return self.age_s is not None and self.age_s > _STALE_S


class Lease:
    """One process's hold on a run; :meth:`take` it, :meth:`check` it before what must not be done twice, give it back.

    Raises:
        ArtifactError: in all its methods, where the store does not answer.
    """

    def __init__(self, store: ObjectStore, name: str) -> None:
        self.token = uuid.uuid4().hex
        self._store, self._name = store, name
        self._objects = _conditional_object(store)
        self._over = threading.Event()
        self._renewing = threading.Lock()
        self._lost: str | None = None
        self._version, self._renewed, self._count = "", -math.inf, 0
        self._thread: threading.Thread | None = None

    def take(self, tell: Callable[[Holder], None] = lambda holder: None) -> Holder | None:
        """Takes the lease, also from a holder that is stale; else returns who holds it.

        Who is not stale yet is told, then watched until it renews its hold, gives it back, or is stale.
        """
        found = self._objects.find()
        if found is not None and not found.is_stale:
            tell(found)
            found = _watched(self._objects, found)
        if found is not None and not found.is_stale:
            return found
        begin = _now()
        version = self._objects.put(self._content(), None if found is None else found.version)
        if version is None:
            winner = self._objects.find()
            if winner is None or winner.token != self.token:
                return winner or Holder("another process", "", "", None)
            version = winner.version  # our own write, whose answer was lost
        self._version, self._renewed = version, begin
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()
        return None

    def check(self) -> None:
        """Raises TakenOver where another process has taken the lease, because this one could not renew it in time.

        Where the last renewal is old, it is renewed here and now: nobody else takes it within the next ``_STALE_S / 2``.
        """
        if self._is_due():
            with self._renewing:
                if self._is_due():  # still: a renewal that was under way may have ended well
                    self._renew()
        if self._lost is not None:
            raise TakenOver(f"This run was taken over by {self._lost}: leave it to that, or stop that first.")

    def give_back(self) -> None:
        """Lets others take it at once."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        if self._lost is None:
            with contextlib.suppress(Exception):  # it goes stale by itself
                found = self._objects.find()
                if found is not None and found.token == self.token:
                    self._objects.remove()

    def _keep(self) -> None:
        while self._lost is None and not self._over.wait(_RENEW_S):
            # A store that cannot be reached now: the next renewal tells, or the next check.
            with contextlib.suppress(Exception), self._renewing:
                self._renew()

    def _is_due(self) -> bool:
        return self._lost is None and _now() - self._renewed > _STALE_S / 2

    def _renew(self) -> None:
        for _ in range(2):
            begin = _now()
            version = self._objects.put(self._content(), self._version)
            if version is not None:
                self._version, self._renewed = version, begin
                return
            found = self._objects.find()
            if found is None or found.token != self.token:
                self._lost = "another process" if found is None else found.name
                return
            self._version = found.version  # our own write, whose answer was lost: renewed once more from that
        raise _failure(self._store, "renew", "it says that it changes meanwhile")

    def _content(self) -> bytes:
        self._count += 1
        return json.dumps({"holder": self._name, "token": self.token, "count": self._count}).encode()


def find_holder(store: ObjectStore) -> str | None:
    """The process that holds the run at ``store`` and is alive, or None; raises ArtifactError where it does not answer."""
    objects = _conditional_object(store)
    found = objects.find()
    if found is not None and found.age_s is None:
        found = _watched(objects, found)
    return None if found is None or found.is_stale else found.name


class _LeaseObject(Protocol):
    def find(self) -> Holder | None:
        """The lease as it is now."""

    def put(self, content: bytes, replaces: str | None) -> str | None:
        """The new version, or None where the object is not the one to replace (None: where there is one)."""

    def remove(self) -> None:
        """Removes it."""


def _conditional_object(store: ObjectStore) -> _LeaseObject:
    return _S3Object(store) if store.scheme == "s3" else _SettledObject(store)


def _watched(objects: _LeaseObject, found: Holder) -> Holder | None:
    """What becomes of a holder: renewed, stale, or None where it gave its hold back; after ``_STALE_S`` at most."""
    begin = _now()
    last: Holder | None = found
    while last is not None and last.version == found.version and not last.is_stale:
        if _now() - begin > _STALE_S:
            return dataclasses.replace(last, age_s=math.inf)
        time.sleep(min(1.0, _RENEW_S))
        last = objects.find()
    return last


def _now() -> float:
    """Seconds of a clock that goes on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _parsed(content: bytes, version: str, age_s: float | None) -> Holder:
    try:
        value = json.loads(content)
        return Holder(str(value["holder"]), str(value["token"]), version, age_s)
    except (ValueError, KeyError, TypeError):
        return Holder("another process", "", version, age_s)


def _failure(store: ObjectStore, what: str, why: object) -> ArtifactError:
    detail = " ".join(str(why).split())[:200]
    return ArtifactError(
        f"{store.uri} does not {what} {KEY} ({detail}): see that the store can be reached and its credentials are valid,"
        " then run the same command again."
    )


class _S3Object:
    """S3's conditional writes, which pyarrow has not
    (https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html)."""

    def __init__(self, store: ObjectStore) -> None:
        try:
            import boto3
            from botocore.config import Config
        except ImportError as error:
            raise ConfigError("run_dir on S3 needs boto3: pip install 'emloc-ray[s3]'.") from error
        endpoint = store.options.get("endpoint_override")
        if endpoint is not None and "://" not in endpoint:
            endpoint = f"{store.options.get('scheme', 'https')}://{endpoint}"
        self._store = store
        retries = {"mode": "standard", "max_attempts": _ATTEMPTS}
        # A request that hangs must not outlast the lease.
        config = Config(retries=retries, connect_timeout=5, read_timeout=10)
        region = store.options.get("region")
        self._client: Any = self._ask(
            "open", (), lambda: boto3.client("s3", endpoint_url=endpoint, region_name=region, config=config)
        )
        self._place = {"Bucket": store.bucket, "Key": f"{store.prefix}/{KEY}".strip("/")}

    def find(self) -> Holder | None:
        return self._ask("read", (404,), self._get)

    def _get(self) -> Holder:
        answer = self._client.get_object(**self._place)
        # Both times are the server's, so that the clocks of the nodes do not matter.
        date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
        age_s = None if date is None else (parsedate_to_datetime(date) - answer["LastModified"]).total_seconds()
        return _parsed(answer["Body"].read(), answer["ETag"], age_s)

    def put(self, content: bytes, replaces: str | None) -> str | None:
        condition = {"IfNoneMatch": "*"} if replaces is None else {"IfMatch": replaces}
        put = self._client.put_object
        return self._ask("write", (404, 409, 412), lambda: str(put(**self._place, Body=content, **condition)["ETag"]))

    def remove(self) -> None:
        self._ask("remove", (404,), lambda: self._client.delete_object(**self._place))

    def _ask(self, what: str, refusals: tuple[int, ...], call: Callable[[], Result]) -> Result | None:
        """The store's answer, None where its status is one of ``refusals``."""
        from botocore.exceptions import BotoCoreError, ClientError, IncompleteReadError, ResponseStreamingError

        try:
            for _ in range(_ATTEMPTS - 1):
                with contextlib.suppress(
                    IncompleteReadError, ResponseStreamingError
                ):  # boto3 itself tries no body again
                    return call()
            return call()
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if status in refusals:
                return None
            if status == 501:
                raise ConfigError(
                    f"run_dir {self._store.uri} is on a store without conditional writes, which keep two processes from one"
                    " run: name a place on another."
                ) from error
            raise _failure(self._store, what, error) from error
        except (BotoCoreError, ValueError) as error:
            raise _failure(self._store, what, error) from error


class _SettledObject:
    """Where the store's client has no conditional writes: written, left to settle, read again; the last writer has it."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def find(self) -> Holder | None:
        content = self._store.read(KEY)
        return None if content is None else _parsed(content, content.decode(errors="replace"), None)

    def put(self, content: bytes, replaces: str | None) -> str | None:
        held, new = self.find(), _parsed(content, content.decode(), None)
        if (None if held is None else held.version) != replaces:
            return None
        self._store.write(KEY, content)
        if held is None or held.token != new.token:
            time.sleep(_SETTLE_S)
        return new.version if self._store.read(KEY) == content else None

    def remove(self) -> None:
        self._store.remove(KEY)
