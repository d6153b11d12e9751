"""Reading a data set: a folder of WebDataset tars that a manifest makes whole (``shards/README.md``).

    asr-train-000000.tar  .idx  .json      asr-train-000001.tar  .idx  .json      manifest.json

Any example is read by its number, with one ``pread`` and a checksum. How the files are written is in
:mod:`voxtral_dist.shard_format`, from what in :mod:`voxtral_dist.packing`. The tars may also be *foreign*, written by
someone else and indexed where they lie (:mod:`voxtral_dist.foreign`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.errors import UserError
from voxtral_dist.sample import Sample
from voxtral_dist.shard_format import SCHEMA, fingerprint, write_shard
from voxtral_dist.shard_reader import INTERNAL_FIELDS, CorruptSampleError, Reader, Record, verified_index
from voxtral_dist.tasks import parse_row

__all__ = ["MANIFEST", "CorruptSampleError", "Record", "ShardSet", "sample_from_row", "write_shard"]

MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"

FOREIGN_TAR_NAME = re.compile(r"(?!\.)[^/\\:\x00-\x1f]+\.tar")
"""Plain file names; webdataset would take one with a colon for a URL, and run a ``pipe:`` one."""

_TAR_NAME = re.compile(r"[a-z0-9_]+-[A-Za-z0-9_]+-\d{6}\.tar")


class ShardSet:
    """A finished data set. Safe to share between threads and with forked workers.

    Attributes:
        folder: where it lies.
        task, split: what it holds.
        foreign: whether the tars are someone else's, indexed where they lie.
        fingerprint: identity of the contents, hex.
        audio_seconds: audio of all examples together.
        bytes: size of all tars together.
        shard_names: file names of the tars, in order.
        shard_sha256: their hashes, hex.
        shard_sizes: examples in each, shape (shards,), int64.
        starts: number of the first example of each, and the end; shape (shards + 1,), int64.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        shards = manifest["shards"]
        self.folder = folder
        self.task, self.split = str(manifest["task"]), str(manifest["split"])
        self.foreign = bool(manifest.get("foreign"))
        self.fingerprint = str(manifest["fingerprint"])
        self.audio_seconds = float(manifest["audio_seconds"])
        self.bytes = sum(int(shard["bytes"]) for shard in shards)
        self.shard_names = [str(shard["name"]) for shard in shards]
        self.shard_sha256 = [str(shard["sha256"]) for shard in shards]
        self.shard_sizes = np.array([shard["examples"] for shard in shards], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self._index_sha256 = [str(shard["index_sha256"]) for shard in shards]

    @classmethod
    def open(cls, folder: str | Path) -> ShardSet:
        """Open a data set folder; the sizes of its files are checked here, their contents when they are read.

        Raises:
            UserError: no manifest, a damaged or foreign one, or a shard that is missing or of another size.
        """
        folder = Path(folder)
        manifest = read_manifest(folder / MANIFEST)
        for shard in manifest["shards"]:
            tar = folder / shard["name"]
            check_size(tar, shard["bytes"])
            check_size(tar.with_suffix(".idx"), shard["index_bytes"])
        return cls(folder, manifest)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def n_samples(self) -> NDArray[np.uint32]:
        """16 kHz samples of each example, shape (examples,); 0 for text."""
        return self.column("n_samples")

    def column(self, name: str) -> NDArray[np.uint32]:
        """A column of the index over all shards, shape (examples,). Raises :class:`UserError` if one is damaged."""
        columns = [np.zeros(0, np.uint32)]
        for shard, sha256 in zip(self.shard_names, self._index_sha256, strict=True):
            columns.append(np.array(verified_index(self.folder / shard, sha256)[name]))
        return np.concatenate(columns)

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
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.reader(shard).example(index - int(self.starts[shard]), with_audio)

    def reader(self, shard: int) -> Reader:
        """The open shard number ``shard``; :class:`UserError` if its index is damaged."""
        hashes = (self.shard_sha256[shard], self._index_sha256[shard])
        return _reader(self.folder / self.shard_names[shard], *hashes, self.task if self.foreign else "")


def sample_from_row(row: Mapping[str, Any]) -> Sample:
    """The :class:`Sample` of a stored row."""
    public = {key: value for key, value in row.items() if key not in INTERNAL_FIELDS}
    return parse_row(public, str(row.get("source", "")), str(row.get("id", "")))


@lru_cache(maxsize=256)
def _reader(tar: Path, sha256: str, index_sha256: str, foreign_task: str) -> Reader:
    """The reader of a shard: two descriptors each, so at most 512. The hashes tell a rebuilt shard apart."""
    return Reader(tar, index_sha256, foreign_task)


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
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        if manifest["schema"] != SCHEMA:
            raise UserError(
                f"{path}: schema {manifest['schema']!r}, this version reads {SCHEMA!r}; build it again"
            )
        shards = manifest["shards"]
        whole = manifest["fingerprint"] == fingerprint(manifest["task"], shards)
        pattern = FOREIGN_TAR_NAME if manifest.get("foreign") else _TAR_NAME
        whole &= all(pattern.fullmatch(shard["name"]) is not None for shard in shards)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged manifest ({error!r}); delete it and run build_shards again"
        ) from None
    if not whole:
        raise UserError(
            f"{path}: damaged manifest, it is not that of its shards; delete it, run build_shards again"
        )
    return manifest
