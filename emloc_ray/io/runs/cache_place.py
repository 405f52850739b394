"""Where an artifact cache lies: a directory or an object store that holds folders STAGE/KEY, their locks and our marker.

A folder is an entry where it holds ``entry.json``, which is written last and removed first. Who may write in a directory may
add entries to each stage's folder. On an object store a file at PATH is the object ``PATH/SHA256``
(:mod:`emloc_ray.io.store.object_store`), and a use is noted in the object ``used``.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO
from weakref import WeakValueDictionary

from emloc_ray.errors import ArtifactError, ConfigError, EmlocError
from emloc_ray.io.runs.run_places import check_folder
from emloc_ray.io.store.atomic import atomic_directory, write_bytes
from emloc_ray.io.store.node_cache import discard, mirror, origin
from emloc_ray.io.store.object_store import ObjectStore
from emloc_ray.io.store.places import is_store_uri
from emloc_ray.io.store.turns import holder_of, try_lock

MARKER = "emloc-ray-cache.json"
FORMAT = 1
_ENTRY, _USED, _LOCKS = "entry.json", "used", ".locks"
# What a writer left counts as left for good when nothing in it has changed for so long.
LEFT_S = 3600.0


_turns: WeakValueDictionary[tuple[str, str], threading.Lock] = WeakValueDictionary()
_guard = threading.Lock()  # of the above


def turn_of(place: str, key: str) -> threading.Lock:
    """The turn of a key at a place among the threads of this process."""
    with _guard:
        return _turns.setdefault((place, key), threading.Lock())


class CachePlace:
    """The folders at a directory, or at the URI of an object store. Raises ConfigError where it holds files of something else,
    or cannot be opened."""

    def __init__(self, place: str) -> None:
        self.store: ObjectStore | None = None
        if is_store_uri(place):
            try:
                self.root = mirror(place)
            except ConfigError as error:
                raise ConfigError(str(error).replace("run_dir", "The artifact cache", 1)) from error
            here = origin(self.root)
            assert here is not None
            self.store = here.store
            self.name = self.store.uri
        else:
            self.root = Path(os.path.expanduser(place.removeprefix("file://"))).absolute()
            self.name = str(self.root)
        self.is_made()

    def folder(self, stage: str, key: str) -> Path:
        """A folder's path, which in an object store says what it mirrors (:mod:`emloc_ray.io.store.node_cache`)."""
        return self.root / stage / key

    def make(self) -> None:
        """Writes the marker, before all else, where there is none; raises what the constructor raises."""
        if self.is_made():
            return
        content = json.dumps({"format": FORMAT}).encode()
        if self.store is not None:
            self.store.write(MARKER, content)
        else:
            write_bytes(self.root / MARKER, content)
            descriptor = os.open(self.root / MARKER, os.O_RDONLY | os.O_NOFOLLOW)
            self._share(descriptor)  # whatever the umask: nobody else could use the place
            os.close(descriptor)

    def check(self) -> None:
        """Raises ConfigError where it cannot be written, which leaves no trace."""
        if self.store is None:
            return check_folder(self.root, "The artifact cache")
        probe = f".{MARKER}.{uuid.uuid4().hex}"
        try:
            self.store.write(probe, b"")
            self.store.remove(probe)
        except ArtifactError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: Exception) -> ConfigError:
        why = error.strerror if isinstance(error, OSError) else error
        return ConfigError(f"The artifact cache {self.name} cannot be written ({why}): name another place.")

    def is_made(self) -> bool:
        """Whether the marker is there; raises what the constructor raises."""
        try:
            names = self.store.names() if self.store is not None else _names(self.root)
            if MARKER not in names:
                others = sorted(name for name in names if name != _LOCKS and not name.startswith(f".{MARKER}."))
                if others:
                    raise ConfigError(
                        f"The artifact cache {self.name} holds files of something else ({', '.join(others[:3])}) and no"
                        f" {MARKER}: name a cache's place, or a new or empty directory."
                    )
                return False
            content = self.store.read(MARKER) if self.store is not None else (self.root / MARKER).read_bytes()
            if json.loads(content or b"null") != {"format": FORMAT}:
                raise ValueError
        except (OSError, ArtifactError) as error:
            raise ConfigError(
                f"The artifact cache {self.name} cannot be read ({error}): name another place."
            ) from error
        except ValueError:
            raise ConfigError(
                f"The artifact cache {self.name} is none of this version: name a new or empty directory."
            ) from None
        return True

    def lock(
        self, key: str, stack: contextlib.ExitStack, tell: Callable[[str], None]
    ) -> tuple[Callable[[], str], Callable[[], bool]] | None:
        """Two functions for a key's lock file: one names its holder, one tries to take it, for ``stack`` to release.

        None on an object store, and where this user is given no lock, which ``tell`` reports. Raises ConfigError where the
        place cannot be written.
        """
        if self.store is not None:
            return None
        try:
            self.make()
            file = self._lock_file(key, tell)
        except OSError as error:
            raise self._unwritable(error) from error
        if file is None:
            return None
        stack.enter_context(file)

        def acquire() -> bool:
            try:
                if not try_lock(file):
                    return False
            except OSError as error:
                raise ConfigError(
                    f"The artifact cache {self.name} cannot be locked ({error.strerror}): name a place whose file system"
                    " has locks."
                ) from error
            # Not left to the closing of the file: a process forked meanwhile would hold the lock on.
            stack.callback(fcntl.flock, file, fcntl.LOCK_UN)
            return True

        return lambda: holder_of(file), acquire

    def _lock_file(self, key: str, tell: Callable[[str], None]) -> IO[str] | None:
        flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW
        try:
            with self._shared_folder(self.root / _LOCKS) as locks:
                try:  # Linux refuses to create what is another user's in a folder with the sticky bit, though it be there
                    descriptor = os.open(key, flags, dir_fd=locks)
                except FileNotFoundError:
                    descriptor = os.open(key, flags | os.O_CREAT, 0o666, dir_fd=locks)
                file = os.fdopen(descriptor, "a+")
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                file.close()
                raise OSError(errno.EMLINK, "it is no file of its own")
            self._share(descriptor)
        except OSError as error:
            tell(
                f"The artifact cache {self.name} gives this user no lock ({error.strerror}): another user's run may make the"
                " same artifact at the same time, which does no harm."
            )
            return None
        return file

    @contextlib.contextmanager
    def _shared_folder(self, folder: Path) -> Iterator[int]:
        """Gives the descriptor of a folder that all users may write who may write in the place; makes it where there is none.
        Raises OSError where it is a link, which another user may have put there."""
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            self._share(descriptor)
            yield descriptor
        finally:
            os.close(descriptor)

    def _share(self, descriptor: int) -> None:
        """Lets all users write there who may write in the place, but for what is another user's."""
        mode, is_folder = stat.S_IMODE(self.root.stat().st_mode), stat.S_ISDIR(os.fstat(descriptor).st_mode)
        with contextlib.suppress(PermissionError):
            os.fchmod(descriptor, mode if is_folder else mode & 0o666)

    def used_at(self, stage: str, key: str) -> float | None:
        """When an entry was last used, in s since 1970; None where there is none."""
        return self.scan(f"{stage}/{key}").get((stage, key))

    def scan(self, under: str = "") -> dict[tuple[str, str], float | None]:
        """When each entry was last used, by stage and key; None for a folder that is none, or not yet."""
        used: dict[tuple[str, str], float | None] = {}
        if self.store is None:
            for folder in self.root.glob(under or "*/*"):
                stage, name = folder.parent.name, folder.name
                if stage != _LOCKS and _is_folder(folder.parent) and _is_folder(folder):
                    try:
                        at = (folder / _ENTRY).stat().st_mtime
                    except FileNotFoundError:
                        at = None
                    except PermissionError:
                        continue  # another user's, who lets nobody read it
                    used[stage, name] = None if name.startswith(".") else at  # hidden: being written or removed
            return used
        times: dict[tuple[str, ...], float] = {}
        for info in self.store.below(under):
            parts = info.path.split("/", 2)
            if len(parts) == 3:
                used[parts[0], parts[1]] = None
                times[tuple(parts)] = info.modified
        for stage, name in used:
            if (stage, name, _ENTRY) in times:
                used[stage, name] = max(times[stage, name, _ENTRY], times.get((stage, name, _USED), 0.0))
        return used

    def read(self, stage: str, key: str) -> bytes | None:
        """What ``entry.json`` holds; None where there is none."""
        if self.store is not None:
            return self.store.read(f"{stage}/{key}/{_ENTRY}")
        path = self.folder(stage, key) / _ENTRY
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None

    def owner(self, stage: str, key: str) -> int:
        """The user who wrote an entry, in a file system."""
        return (self.folder(stage, key) / _ENTRY).lstat().st_uid

    @contextlib.contextmanager
    def filling(self, stage: str, key: str, content: bytes) -> Iterator[Path]:
        """Gives a folder to put files in; it is an entry of this ``content`` when the block ends without an error, else gone."""
        folder = self.folder(stage, key)
        if self.store is None:
            with self._shared_folder(folder.parent), atomic_directory(folder) as temporary:
                yield temporary
                write_bytes(temporary / _ENTRY, content)
            return
        try:
            yield folder
            self.store.write(f"{stage}/{key}/{_ENTRY}", content)
        except (OSError, EmlocError):
            if self.read(stage, key) is None:  # nobody else made it meanwhile
                discard(folder)
            raise

    def touch(self, stage: str, key: str) -> None:
        """Notes a use; raises FileNotFoundError where there is no entry, but on an object store."""
        if self.store is not None:
            self.store.write(f"{stage}/{key}/{_USED}", b"")
            return
        with contextlib.suppress(PermissionError):  # a cache that other users write
            os.utime(self.folder(stage, key) / _ENTRY, follow_symlinks=False)

    def can_free(self, stage: str, key: str) -> bool:
        """Whether this user can free what an entry holds: of another user's only the name could go, and its bytes would stay."""
        return self.store is not None or os.access(self.folder(stage, key), os.W_OK)

    def remove(self, stage: str, key: str) -> None:
        """Removes an entry, for those who look for it all at once. One of another user stays in a folder with the sticky bit; in
        any other its bytes stay until that user's next process sweeps."""
        folder = self.folder(stage, key)
        if self.store is not None:
            self.store.remove(f"{stage}/{key}/{_ENTRY}")
            discard(folder)
            return
        away = folder.with_name(f".{uuid.uuid4().hex}.tmp")
        # Another process was faster; or another user has put a link there, in whose folder nothing has the new name.
        with (
            contextlib.suppress(FileNotFoundError, PermissionError, NotADirectoryError),
            self._shared_folder(folder.parent) as at,
        ):
            os.rename(key, away.name, src_dir_fd=at, dst_dir_fd=at)
            shutil.rmtree(away, ignore_errors=True)

    def sweep(self) -> None:
        """Removes what writers and removers left that were killed: folders without an entry, unchanged for an hour."""
        for (stage, name), used in self.scan().items():
            if used is None and time.time() - self._changed_at(stage, name) > LEFT_S:
                self.remove(stage, name)

    def _changed_at(self, stage: str, name: str) -> float:
        if self.store is not None:
            return max((info.modified for info in self.store.below(f"{stage}/{name}")), default=0.0)
        folder = self.folder(stage, name)
        try:
            return max(path.lstat().st_mtime for path in [folder, *folder.rglob("*")])
        except FileNotFoundError:  # somebody is at work there
            return time.time()


def _is_folder(path: Path) -> bool:
    """Whether it is one itself, and no link: whoever writes in a place may put links there that lead out of it."""
    return path.is_dir() and not path.is_symlink()


def _names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()] if directory.exists() else []
