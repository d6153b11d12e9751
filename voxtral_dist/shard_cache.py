"""Data sets by URL or on slow storage: copies of their shards in a local folder, ``--shard_cache DIR``.

    DIR/sets/<fingerprint>/    manifest, indexes and token counts; each tar is a link to DIR/tars/<sha256>.tar
    DIR/tars/                  whole tars, all together at most --shard_cache_gb; the longest unopened goes first
    DIR/locks/                 one process of a machine fetches a shard, the others wait for it

A copy is checked against the manifest while it arrives and appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from voxtral_dist import atomic
from voxtral_dist.errors import UserError, VoxtralDistError
from voxtral_dist.logger import get_logger
from voxtral_dist.shard_source import NEVER, Stopped, copy, for_each, is_url, locked, read, retrying

log = get_logger(__name__)

GB = 10**9
SHARDS_NEEDED = 32
"""Shards of each task that must fit: the block that is read and the one that is fetched ahead, 16 shards each."""

_MAX_MANIFEST_BYTES = 256 << 20


class ShardCache:
    """Copies of shards in a local folder, shared by the processes of a machine. Safe to share between threads.

    The tars in the folder stay within the bound, those being fetched included. What is not counted: a deleted tar
    keeps its disk space while a process has it open, which each does for some that it read last.

    Args:
        folder: where the copies lie.
        bound: most bytes of all tars together.

    Attributes:
        on_use: told the SHA-256 of every tar that is read, None: nobody.
    """

    def __init__(self, folder: Path, bound: int) -> None:
        self.folder, self.bound = folder, bound
        self.on_use: Callable[[str], None] | None = None
        self._sets, self._tars, self._locks = (folder / name for name in ("sets", "tars", "locks"))
        self._sizes: dict[tuple[str, str], list[int]] = {}
        try:
            for part in (self._sets, self._tars, self._locks):
                part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--shard_cache {folder} cannot be used: {error.strerror}; name another folder"
            ) from None

    @classmethod
    def from_flags(cls, folder: str, gb: float) -> ShardCache | None:
        """The cache that ``--shard_cache`` and ``--shard_cache_gb`` describe, None for an empty folder.

        Raises:
            UserError: the folder is a URL or cannot be made.
        """
        if not folder:
            return None
        if is_url(folder):
            raise UserError(f"--shard_cache {folder} is a URL; name a local folder")
        return cls(Path(folder).absolute(), int(gb * GB))

    def read(self, source: str) -> bytes:
        """The bytes of a small file, fetched anew. Raises :class:`VoxtralDistError` that names source and reason."""

        def work() -> bytes:
            parts: list[bytes] = []
            read(source, _MAX_MANIFEST_BYTES, NEVER, parts.append)
            return b"".join(parts)

        return retrying(source, work, NEVER)

    def mirror(self, location: str, manifest: Mapping[str, Any], data: bytes) -> SetCopy:
        """Copy what a data set has beside its tars.

        Args:
            location: folder or URL of the data set, absolute and without a slash at its end.
            manifest: its manifest, checked.
            data: the manifest's bytes.

        Raises:
            UserError: the bound is too small for the data.
            VoxtralDistError: an index cannot be fetched, or is not the manifest's.
        """
        self._check_bound(manifest)
        mirror = SetCopy(self, location, self._sets / manifest["fingerprint"])
        mirror.folder.mkdir(exist_ok=True)
        path = mirror.folder / "manifest.json"
        with self.set_lock(manifest["fingerprint"]):
            atomic.sweep(mirror.folder)
            known = path.is_file() and path.read_bytes() == data
            for_each(lambda shard: mirror.add(shard, known), manifest["shards"])
            if not known:
                atomic.write_bytes(path, data)
        return mirror

    def fetch(self, source: str, size: int, sha256: str, stop: threading.Event = NEVER) -> None:
        """See that the tar of this hash is in the cache, and mark it as used now.

        Raises:
            VoxtralDistError: it cannot be fetched, or is not of this size and hash.
            Stopped: ``stop`` was set meanwhile.
        """
        tar = self._tars / f"{sha256}.tar"
        if _touch(tar, size):
            return
        with locked(self._locks / f"{sha256[:2]}.lock", stop):
            if not _touch(tar, size):
                retrying(source, lambda: copy(source, tar, size, sha256, stop, self._make_room), stop)

    def used(self, sha256: str) -> None:
        """Tell whoever listens that a tar is read."""
        if self.on_use is not None:
            self.on_use(sha256)

    def set_lock(self, fingerprint: str) -> AbstractContextManager[None]:
        """Hold what lies beside the tars of a data set."""
        return locked(self._locks / f"{fingerprint[:2]}.set.lock")

    def _make_room(self, size: int, reserve: Callable[[int], object]) -> None:
        """Delete the longest unopened tars until ``size`` bytes more fit, and reserve these."""
        from webdataset.cache import LRUCleanup  # takes seconds, and not every run has a cache

        with locked(self._locks / "room.lock"):
            atomic.sweep(self._tars)
            cleanup = LRUCleanup(str(self._tars), self.bound - size, keyfn=os.path.getmtime, interval=None)
            for _ in range(3):  # it gives up when a file vanishes meanwhile
                cleanup.cleanup()
            reserve(size)

    def _check_bound(self, manifest: Mapping[str, Any]) -> None:
        task = str(manifest["task"])
        self._sizes[task, manifest["fingerprint"]] = [shard["bytes"] for shard in manifest["shards"]]
        by_task: dict[str, list[int]] = {}
        for (name, _), sizes in self._sizes.items():
            by_task.setdefault(name, []).extend(sizes)
        need = sum(sum(sorted(sizes)[-SHARDS_NEEDED:]) for sizes in by_task.values())
        if need > self.bound:
            raise UserError(
                f"--shard_cache_gb {self.bound / GB:g} is too small: {SHARDS_NEEDED} shards of each of "
                f"{', '.join(by_task)} are read together; give at least {math.ceil(need / GB * 1000) / 1000:g}"
            )


@dataclass(frozen=True)
class SetCopy:
    """A data set in the cache: ``location`` is where it comes from, ``folder`` holds all of it but the tars."""

    cache: ShardCache
    location: str
    folder: Path

    def fetch(self, name: str, size: int, sha256: str, stop: threading.Event = NEVER) -> None:
        """As :meth:`ShardCache.fetch`, for the tar called ``name``; it can then be opened in the folder."""
        self.cache.fetch(f"{self.location}/{name}", size, sha256, stop)

    def add(self, shard: Mapping[str, Any], known: bool) -> None:
        """Copy the index of a shard and link its tar; where the manifest is ``known`` the size proves a copy."""
        path = self.folder / Path(shard["name"]).with_suffix(".idx")
        size, sha256 = shard["index_bytes"], shard["index_sha256"]
        there = path.is_file() and path.stat().st_size == size
        if not (there and (known or hashlib.sha256(path.read_bytes()).hexdigest() == sha256)):
            source = f"{self.location}/{path.name}"
            retrying(source, lambda: copy(source, path, size, sha256, NEVER), NEVER)
        link, target = self.folder / shard["name"], f"../../tars/{shard['sha256']}.tar"
        if not link.is_symlink() or os.readlink(link) != target:
            link.unlink(missing_ok=True)
            link.symlink_to(target)

    def fetch_optional(self, sizes: Mapping[str, int]) -> None:
        """Copy files that the data set may have, up to the first that it has not.

        Args:
            sizes: most bytes that each file, by its name, may have.
        """

        def fetch(name: str) -> None:
            if not (self.folder / name).is_file():
                copy(f"{self.location}/{name}", self.folder / name, sizes[name], "", NEVER)

        with suppress(OSError), self.cache.set_lock(self.folder.name):
            for_each(fetch, list(sizes))


class Fetchable(Protocol):
    """What the read-ahead has to know of a data set; see :class:`~voxtral_dist.shards.ShardSet`."""

    shard_sha256: list[str]
    shard_bytes: list[int]

    def fetch(self, shard: int, stop: threading.Event = ...) -> None:
        """Bring a shard into the cache."""


class ShardReadAhead:
    """Fetches shards before they are read, in a thread of its own; at most half of the cache's bound ahead.

    A shard is ahead until it, or one that stands behind it, is read in this process. What fails is left to the reader,
    who then meets the error itself. Use it as a context manager or call :meth:`close`.

    Args:
        shards: data sets and shard numbers in the order in which they will be read; drawn lazily, in the thread.
        cache: what the data sets were opened with. One read-ahead at a time.
    """

    def __init__(self, shards: Iterable[tuple[Fetchable, int]], cache: ShardCache) -> None:
        self._cache, self._shards, self._limit = cache, shards, cache.bound // 2
        self._ahead: dict[str, int] = {}
        self._changed, self._stop = threading.Condition(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="shard-read-ahead", daemon=True)
        cache.on_use = self._used
        self._thread.start()

    def __enter__(self) -> ShardReadAhead:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End at once, also in the middle of a transfer."""
        self._cache.on_use = None
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        try:
            for shards, shard in self._shards:
                if self._stop.is_set():
                    return
                self._fetch(shards, shard)
        except Exception as error:
            log.warning("no more shards are fetched ahead (%s: %s)", type(error).__name__, error)

    def _fetch(self, shards: Fetchable, shard: int) -> None:
        sha256, size = shards.shard_sha256[shard], shards.shard_bytes[shard]
        if sha256 in self._ahead or size > self._limit:
            return
        with self._changed:
            self._changed.wait_for(
                lambda: self._stop.is_set() or sum(self._ahead.values()) + size <= self._limit
            )
            self._ahead[sha256] = size
        try:
            if not self._stop.is_set():
                shards.fetch(shard, self._stop)
        except Stopped:
            return
        except (VoxtralDistError, OSError) as error:
            log.warning("not fetched ahead: %s", error)

    def _used(self, sha256: str) -> None:
        if sha256 in self._ahead:
            with self._changed:
                while sha256 in self._ahead:
                    del self._ahead[next(iter(self._ahead))]
                self._changed.notify_all()


def _touch(tar: Path, size: int) -> bool:
    """Mark a tar as used now; False if it is not there."""
    try:
        os.utime(tar)
        return tar.stat().st_size == size
    except FileNotFoundError:
        return False
