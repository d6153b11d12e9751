"""Reading a data set: a folder of WebDataset tars that a manifest makes whole (``shards/README.md``).

    asr-train-000000.tar  .idx  .json      asr-train-000001.tar  .idx  .json      manifest.json

Any example is read by its number, with one ``pread`` and a checksum. How the files are written is in
:mod:`voxtral_dist.shard_format`, from what in :mod:`voxtral_dist.packing`. The tars may also be *foreign*, written by
someone else and indexed where they lie (:mod:`voxtral_dist.foreign`), and all of it may be far away, behind a URL
or on slow storage (:mod:`voxtral_dist.shard_cache`).
"""

from __future__ import annotations

import json
import re
import threading
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.errors import UserError
from voxtral_dist.sample import Sample
from voxtral_dist.shard_cache import SetCopy, ShardCache
from voxtral_dist.shard_format import SCHEMA, fingerprint, write_shard
from voxtral_dist.shard_reader import INTERNAL_FIELDS, CorruptSampleError, Reader, Record, verified_index
from voxtral_dist.shard_source import NEVER, TRIES, is_url
from voxtral_dist.tasks import parse_row

__all__ = ["MANIFEST", "CorruptSampleError", "Record", "ShardSet", "sample_from_row", "write_shard"]

MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"

FOREIGN_TAR_NAME = re.compile(r"(?!\.)[^/\\:\x00-\x1f]+\.tar")
"""Plain file names; webdataset would take one with a colon for a URL, and run a ``pipe:`` one."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TAR_NAME = re.compile(r"[a-z0-9_]+-[A-Za-z0-9_]+-\d{6}\.tar")


class ShardSet:
    """A finished data set. Safe to share between threads and with forked workers.

    Attributes:
        folder: where it lies, or its copy in the cache.
        task, split: what it holds.
        foreign: whether the tars are someone else's, indexed where they lie.
        fingerprint: identity of the contents, hex.
        audio_seconds: audio of all examples together.
        bytes: size of all tars together.
        shard_names: file names of the tars, in order.
        shard_sha256: their hashes, hex.
        shard_bytes: their sizes.
        shard_sizes: examples in each, shape (shards,), int64.
        starts: number of the first example of each, and the end; shape (shards + 1,), int64.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], copy: SetCopy | None = None) -> None:
        shards = manifest["shards"]
        self.folder, self._copy = folder, copy
        self.task, self.split = str(manifest["task"]), str(manifest["split"])
        self.foreign = bool(manifest.get("foreign"))
        self.fingerprint = str(manifest["fingerprint"])
        self.audio_seconds = float(manifest["audio_seconds"])
        self.shard_bytes = [int(shard["bytes"]) for shard in shards]
        self.bytes = sum(self.shard_bytes)
        self.shard_names = [str(shard["name"]) for shard in shards]
        self._tars = [folder / name for name in self.shard_names]
        self.shard_sha256 = [str(shard["sha256"]) for shard in shards]
        self.shard_sizes = np.array([shard["examples"] for shard in shards], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self._starts: list[int] = self.starts.tolist()
        self._index_sha256 = [str(shard["index_sha256"]) for shard in shards]

    @classmethod
    def open(cls, location: str | Path, cache: ShardCache | None = None) -> ShardSet:
        """Open a data set; the sizes of its files are checked here, their contents when they are read.

        Args:
            location: its folder, or with a ``cache`` also its https or s3 URL.
            cache: where to keep copies of its shards; without one they are read where they lie.

        Raises:
            UserError: no manifest, a damaged or foreign one, a shard that is missing or of another size, a URL that is
                refused or has no cache, or a cache that is too small.
            VoxtralDistError: something cannot be fetched.
        """
        if is_url(str(location)):
            if cache is None:
                raise UserError(
                    f"{location} is a URL; give --shard_cache DIR, a local folder for copies of its shards"
                )
            url = str(location).rstrip("/")
            return cls._open_copy(url, cache.read(f"{url}/{MANIFEST}"), cache)
        folder = Path(location)
        manifest = read_manifest(folder / MANIFEST)
        for shard in manifest["shards"]:
            tar = folder / shard["name"]
            check_size(tar, shard["bytes"])
            check_size(tar.with_suffix(".idx"), shard["index_bytes"])
        if cache is None:
            return cls(folder, manifest)
        return cls._open_copy(str(folder.absolute()), (folder / MANIFEST).read_bytes(), cache)

    @classmethod
    def _open_copy(cls, location: str, data: bytes, cache: ShardCache) -> ShardSet:
        """Open a data set through the cache; every name of a shard must make a harmless URL too."""
        manifest = parse_manifest(data, f"{location}/{MANIFEST}")
        for shard in manifest["shards"]:
            is_url(f"{location}/{shard['name']}")
        copy = cache.mirror(location, manifest, data)
        return cls(copy.folder, manifest, copy)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def cache(self) -> ShardCache | None:
        """Where copies of its shards are kept, None when they are read where they lie."""
        return self._copy.cache if self._copy else None

    @cached_property
    def n_samples(self) -> NDArray[np.uint32]:
        """16 kHz samples of each example, shape (examples,); 0 for text."""
        return self.column("n_samples")

    def column(self, name: str) -> NDArray[np.uint32]:
        """A column of the index over all shards, shape (examples,). Raises :class:`UserError` if one is damaged."""
        parts = [np.array(self.shard_column(shard, name)) for shard in range(len(self.shard_names))]
        return np.concatenate([np.zeros(0, np.uint32), *parts])

    def shard_column(self, shard: int, name: str) -> NDArray[np.uint32]:
        """A column of one shard's index, memory-mapped. Raises :class:`UserError` if it is damaged."""
        return verified_index(self.folder / self.shard_names[shard], self._index_sha256[shard])[name]

    def read(self, index: int) -> Record:
        """Example number ``index`` with its audio.

        Raises:
            CorruptSampleError: the stored bytes are not those that were written.
            UserError: the shard's index is damaged.
            IndexError: there is no such example.
        """
        return self._example(index, with_audio=True)

    def sample(self, index: int) -> Sample:
        """The words of example number ``index``; its audio is not read. Raises as :meth:`read`."""
        return sample_from_row(self._example(index, with_audio=False).row)

    def _example(self, index: int, with_audio: bool) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.folder} has {len(self)} examples, there is no number {index}")
        shard = bisect_right(self._starts, index) - 1
        return self.reader(shard).example(index - self._starts[shard], with_audio)

    def reader(self, shard: int) -> Reader:
        """The open shard number ``shard``, fetched first where it has to be.

        Raises:
            UserError: its index is damaged.
            VoxtralDistError: it cannot be fetched.
        """
        sha256, index_sha256 = self.shard_sha256[shard], self._index_sha256[shard]
        task = self.task if self.foreign else ""
        if self._copy is None:
            return _reader(self._tars[shard], sha256, index_sha256, task)
        size = self.shard_bytes[shard]
        reader = _copy_reader(self._copy, self.shard_names[shard], size, sha256, index_sha256, task)
        self._copy.cache.used(sha256)
        return reader

    def fetch(self, shard: int, stop: threading.Event = NEVER) -> None:
        """Bring shard number ``shard`` into the cache; nothing to do for a data set that is read where it lies.

        Raises:
            VoxtralDistError: it cannot be fetched, or is not what the manifest says.
            Stopped: ``stop`` was set meanwhile.
        """
        if self._copy is not None:
            self._copy.fetch(self.shard_names[shard], self.shard_bytes[shard], self.shard_sha256[shard], stop)

    def fetch_counts(self, key: str) -> None:
        """Copy the token counts of this key from where the data set comes from, as far as it has them."""
        if self._copy is not None:
            sizes = zip(self.shard_names, self.shard_sizes.tolist(), strict=True)
            names = {f"{Path(name).stem}.tokens.{key}.safetensors": 8 * n + (1 << 16) for name, n in sizes}
            self._copy.fetch_optional(names)


def sample_from_row(row: Mapping[str, Any]) -> Sample:
    """The :class:`Sample` of a stored row."""
    public = {key: value for key, value in row.items() if key not in INTERNAL_FIELDS}
    return parse_row(public, str(row.get("source", "")), str(row.get("id", "")))


@lru_cache(maxsize=256)
def _reader(tar: Path, sha256: str, index_sha256: str, foreign_task: str) -> Reader:
    """The reader of a shard: two descriptors each, so at most 512. The hashes tell a rebuilt shard apart."""
    return Reader(tar, index_sha256, foreign_task)


@lru_cache(maxsize=64)
def _copy_reader(
    copy: SetCopy, name: str, size: int, sha256: str, index_sha256: str, foreign_task: str
) -> Reader:
    """The reader of a shard in the cache. Open tars keep their space on the disk when they are deleted: few of them."""
    for _ in range(TRIES):
        copy.fetch(name, size, sha256)
        with suppress(FileNotFoundError):  # deleted for room before it was opened
            return Reader(copy.folder / name, index_sha256, foreign_task)
    raise UserError(f"{copy.folder / name} vanishes before it can be opened; raise --shard_cache_gb")


def check_size(path: Path, size: int) -> None:
    """Raise :class:`UserError` unless the file is there and has ``size`` bytes."""
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        state = "is missing" if found is None else f"has {found} bytes where the manifest says {size}"
        raise UserError(f"{path} {state}; run build_shards again, it rebuilds what is damaged")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a data set; :class:`UserError` if there is none, or a damaged or foreign one."""
    if not path.is_file():
        raise UserError(f"{path.parent}: no manifest: not a finished data set, run build_shards")
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(data: bytes, path: str) -> dict[str, Any]:
    """The manifest in these bytes, which ``path`` holds; :class:`UserError` if it is damaged or foreign."""
    try:
        manifest: dict[str, Any] = json.loads(data)
        if manifest["schema"] != SCHEMA:
            raise UserError(
                f"{path}: schema {manifest['schema']!r}, this version reads {SCHEMA!r}; build it again"
            )
        shards = manifest["shards"]
        whole = manifest["fingerprint"] == fingerprint(manifest["task"], shards)
        pattern = FOREIGN_TAR_NAME if manifest.get("foreign") else _TAR_NAME
        whole &= all(_is_whole(shard, pattern) for shard in shards)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged manifest ({error!r}); delete it and run build_shards again"
        ) from None
    if not whole:
        raise UserError(
            f"{path}: damaged manifest, it is not that of its shards; delete it, run build_shards again"
        )
    return manifest


def _is_whole(shard: Mapping[str, Any], name: re.Pattern[str]) -> bool:
    """Whether an entry of a manifest has a harmless name, hashes and sizes: they become names of files."""
    hashes = all(_SHA256.fullmatch(shard[field]) for field in ("sha256", "index_sha256"))
    sizes = all(isinstance(shard[field], int) and shard[field] >= 0 for field in ("bytes", "index_bytes"))
    return hashes and sizes and name.fullmatch(shard["name"]) is not None
