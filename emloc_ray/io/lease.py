"""Who holds a run on an object store: an object put on condition that there is none, renewed while its holder lives."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from emloc_ray.errors import ConfigError, StageError
from emloc_ray.io.object_store import ObjectStore

KEY = "lock"
_RENEW_S = 10.0
_STALE_S = 60.0
_SETTLE_S = 3.0


@dataclass(frozen=True)
class Holder:
    """The lease as found: who wrote it, its version in the store, and how long ago, by the store's own clock."""

    name: str
    token: str
    version: str
    age_s: float

    @property
    def is_stale(self) -> bool:
        """Whether its holder has missed several renewals: it is dead, or cut off from the store."""
        return self.age_s > _STALE_S


class Lease:
    """One process's hold on a run; :meth:`take` it, :meth:`check` it before what must not be done twice, give it back."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        self.token = uuid.uuid4().hex
        self._content = json.dumps({"holder": name, "token": self.token}).encode()
        self._objects = _conditional_objects(store)
        self._over = threading.Event()
        self._lost: str | None = None
        self._version = ""
        self._thread: threading.Thread | None = None

    def take(self) -> Holder | None:
        """Takes the lease, also from a holder that is stale; else returns who holds it."""
        found: Holder | None = self._objects.find()
        if found is not None and not found.is_stale:
            return found
        version = self._objects.put(self._content, None if found is None else found.version)
        if version is None:  # another was faster
            winner: Holder | None = self._objects.find()
            return winner or Holder("another process", "", "", 0.0)
        self._version = version
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()
        return None

    def check(self) -> None:
        """Raises StageError where another process has taken the lease, because this one could not renew it in time."""
        if self._lost is not None:
            raise StageError(f"This run was taken over by {self._lost}: leave it to that, or stop that first.")

    def give_back(self) -> None:
        """Lets others take it at once."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        if self._lost is None and self._version:
            with contextlib.suppress(Exception):  # it goes stale by itself
                self._objects.remove(self._version)

    def _renew(self) -> None:
        while not self._over.wait(_RENEW_S):
            try:
                version = self._objects.put(self._content, self._version)
            except Exception:  # a store that cannot be reached now: the next renewal tells
                continue
            if version is None:
                found = self._objects.find()
                self._lost = "another process" if found is None else found.name
                return
            self._version = version


def find_holder(store: ObjectStore) -> str | None:
    """The process that holds the run at ``store`` and is alive, or None."""
    found = _conditional_objects(store).find()
    return None if found is None or found.is_stale else found.name


def _conditional_objects(store: ObjectStore) -> Any:
    return _S3Object(store) if store.scheme == "s3" else _SettledObject(store)


def _parsed(content: bytes, version: str, age_s: float) -> Holder:
    try:
        value = json.loads(content)
        return Holder(str(value["holder"]), str(value["token"]), version, age_s)
    except (ValueError, KeyError, TypeError):
        return Holder("another process", "", version, age_s)


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
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name=store.options.get("region"),
            config=Config(retries={"mode": "standard", "max_attempts": 8}, connect_timeout=10, read_timeout=60),
        )
        self._place = {"Bucket": store.bucket, "Key": f"{store.prefix}/{KEY}".strip("/")}

    def find(self) -> Holder | None:
        try:
            answer = self._client.get_object(**self._place)
        except self._client.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
                return None
            raise
        # Both times are the server's, so that the clocks of the nodes do not matter.
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return _parsed(answer["Body"].read(), answer["ETag"], (now - answer["LastModified"]).total_seconds())

    def put(self, content: bytes, replaces: str | None) -> str | None:
        """The new version, or None where the object is not the one to replace (None: where there is one)."""
        condition = {"IfNoneMatch": "*"} if replaces is None else {"IfMatch": replaces}
        try:
            version: str = self._client.put_object(**self._place, Body=content, **condition)["ETag"]
            return version
        except self._client.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] in (404, 409, 412):
                return None
            raise

    def remove(self, version: str) -> None:
        found = self.find()
        if found is not None and found.version == version:
            self._client.delete_object(**self._place)


class _SettledObject:
    """Where the store's client has no conditional writes: written, left to settle, read again; the last writer has it."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    def find(self) -> Holder | None:
        before = self._store.read(KEY)
        if before is None:
            return None
        found = _parsed(before, before.decode(errors="replace"), 0.0)
        begin = time.monotonic()
        while time.monotonic() - begin < _RENEW_S + _SETTLE_S:  # alive is who renews
            time.sleep(1.0)
            if self._store.read(KEY) != before:
                return found
        return _parsed(before, found.version, _STALE_S + 1.0)

    def put(self, content: bytes, replaces: str | None) -> str | None:
        held = self._store.read(KEY)
        if (None if held is None else held.decode(errors="replace")) != replaces:
            return None
        content = content[:-1] + f', "renewed": {time.monotonic_ns()}}}'.encode()
        self._store.write(KEY, content)
        if replaces is None or json.loads(replaces).get("token") not in content.decode():
            time.sleep(_SETTLE_S)
        return content.decode() if self._store.read(KEY) == content else None

    def remove(self, version: str) -> None:
        self._store.remove(KEY)
