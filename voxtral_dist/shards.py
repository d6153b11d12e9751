"""Reading a data set: a folder of WebDataset tars that a manifest makes whole (``shards/README.md``).

    asr-train-000000.tar  .idx  .json      asr-train-000001.tar  .idx  .json      manifest.json

Any example is read by its number, with one ``pread`` and a checksum. How the files are written is in
:mod:`voxtral_dist.shard_format`, from what in :mod:`voxtral_dist.packing`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import weakref
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxtral_dist.errors import BadSamplesError, UserError
from voxtral_dist.sample import Sample
from voxtral_dist.shard_format import (
    BLOCK_BYTES,
    KEY_PATTERN,
    MAX_AUDIO_BYTES,
    MAX_JSON_BYTES,
    SCHEMA,
    fingerprint,
    read_columns,
    write_shard,
)
from voxtral_dist.tasks import parse_row

__all__ = ["MANIFEST", "CorruptSampleError", "Record", "ShardSet", "sample_from_row", "write_shard"]

MANIFEST = "manifest.json"

_TAR_NAME = re.compile(r"[a-z0-9_]+-[A-Za-z0-9_]+-\d{6}\.tar")
_INTERNAL_FIELDS = frozenset(("source", "duration"))


class CorruptSampleError(BadSamplesError):
    """The stored bytes of one example are not those that were written.

    Attributes:
        shard: file name of the tar.
        key: key of the example, or ``example <n>`` where the key itself is unreadable.
    """

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(
            f"{shard}: {key}: {reason}; the shard is damaged: delete it and run build_shards again"
        )
        self.shard, self.key = shard, key


@dataclass(frozen=True, slots=True)
class Record:
    """One stored example: its key, its row, its FLAC bytes (None for a text task)."""

    key: str
    row: dict[str, Any]
    audio: bytes | None


class ShardSet:
    """A finished data set. Safe to share between threads and with forked workers.

    Attributes:
        folder: where it lies.
        task, split: what it holds.
        fingerprint: identity of the contents, hex.
        audio_seconds: audio of all examples together.
        shard_names: file names of the tars, in order.
        shard_sha256: their hashes, hex.
        shard_sizes: examples in each, shape (shards,), int64.
        starts: number of the first example of each, and the end; shape (shards + 1,), int64.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        shards = manifest["shards"]
        self.folder = folder
        self.task, self.split = str(manifest["task"]), str(manifest["split"])
        self.fingerprint = str(manifest["fingerprint"])
        self.audio_seconds = float(manifest["audio_seconds"])
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
        manifest = _read_manifest(folder / MANIFEST)
        for shard in manifest["shards"]:
            tar = folder / shard["name"]
            _check_size(tar, shard["bytes"])
            _check_size(tar.with_suffix(".idx"), shard["index_bytes"])
        return cls(folder, manifest)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def n_samples(self) -> NDArray[np.uint32]:
        """16 kHz samples of each example, shape (examples,); 0 for text."""
        columns = [np.zeros(0, np.uint32)]
        for name, sha256 in zip(self.shard_names, self._index_sha256, strict=True):
            columns.append(np.array(_verified_index(self.folder / name, sha256)["n_samples"]))
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
        tar, hashes = (
            self.folder / self.shard_names[shard],
            (self.shard_sha256[shard], self._index_sha256[shard]),
        )
        return _reader(tar, *hashes).example(index - int(self.starts[shard]), with_audio)


def sample_from_row(row: Mapping[str, Any]) -> Sample:
    """The :class:`Sample` of a stored row."""
    public = {key: value for key, value in row.items() if key not in _INTERNAL_FIELDS}
    return parse_row(public, str(row.get("source", "")), str(row.get("id", "")))


class _Reader:
    """One open shard. Its descriptor closes with the last reference: evicted while in use, it stays valid."""

    def __init__(self, tar: Path, index_sha256: str) -> None:
        self.name = tar.name
        self.columns = _verified_index(tar, index_sha256)
        self.descriptor = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor)

    def example(self, at: int, with_audio: bool) -> Record:
        """Example number ``at`` of the shard, checked against the index."""
        entry = {name: int(values[at]) for name, values in self.columns.items()}
        with_audio = with_audio and entry["audio_size"] > 0
        span = self._span(entry, with_audio, f"example {at}")
        key, data = self._member(span, 0, entry["json_size"], ".json", f"example {at}")
        if zlib.crc32(data) != entry["json_crc32"]:
            raise CorruptSampleError(self.name, key, "the checksum of its JSON does not match")
        if not with_audio:
            return Record(key, json.loads(data), None)
        offset = entry["audio_offset"] - entry["json_offset"]
        audio_key, audio = self._member(span, offset, entry["audio_size"], ".flac", key)
        if audio_key != key or zlib.crc32(audio, entry["json_crc32"]) != entry["crc32"]:
            raise CorruptSampleError(self.name, key, "the checksum of its audio does not match")
        return Record(key, json.loads(data), audio)

    def _span(self, entry: Mapping[str, int], with_audio: bool, label: str) -> bytes:
        """The bytes from the header of the JSON member to the end of the last member wanted."""
        last = "audio" if with_audio else "json"
        start = entry["json_offset"] - BLOCK_BYTES
        size = entry[f"{last}_offset"] + entry[f"{last}_size"] - start
        if start < 0 or not BLOCK_BYTES <= size <= MAX_JSON_BYTES + MAX_AUDIO_BYTES:
            raise CorruptSampleError(self.name, label, f"{size} bytes at {start} are outside the limits")
        return os.pread(self.descriptor, size, start)

    def _member(self, span: bytes, offset: int, size: int, suffix: str, label: str) -> tuple[str, bytes]:
        """Key and content of the member whose header stands at ``offset`` of ``span``."""
        data = span[offset + BLOCK_BYTES : offset + BLOCK_BYTES + size]
        try:
            header = tarfile.TarInfo.frombuf(span[offset : offset + BLOCK_BYTES], "utf-8", "strict")
        except (tarfile.HeaderError, ValueError):
            raise CorruptSampleError(self.name, label, "no tar header where the index points") from None
        key = header.name.removesuffix(suffix)
        if key == header.name or not KEY_PATTERN.fullmatch(key) or not header.isreg():
            raise CorruptSampleError(
                self.name, label, f"member {header.name!r} stands where KEY{suffix} belongs"
            )
        if header.size != size or len(data) != size:
            raise CorruptSampleError(self.name, key, f"the size of its {suffix} member does not match")
        return key, data


@lru_cache(maxsize=256)
def _reader(tar: Path, sha256: str, index_sha256: str) -> _Reader:
    """The reader of a shard: two descriptors each, so at most 512. The hashes tell a rebuilt shard apart."""
    return _Reader(tar, index_sha256)


def _verified_index(tar: Path, sha256: str) -> dict[str, NDArray[Any]]:
    path = tar.with_suffix(".idx")
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise UserError(
            f"{path}: damaged, its hash is not the manifest's; delete it and run build_shards again"
        )
    return read_columns(path)[0]


def _check_size(path: Path, size: int) -> None:
    found = path.stat().st_size if path.is_file() else None
    if found != size:
        state = "is missing" if found is None else f"has {found} bytes where the manifest says {size}"
        raise UserError(f"{path} {state}; run build_shards again, it rebuilds what is damaged")


def _read_manifest(path: Path) -> dict[str, Any]:
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
        whole &= all(_TAR_NAME.fullmatch(shard["name"]) is not None for shard in shards)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: damaged manifest ({error!r}); delete it and run build_shards again"
        ) from None
    if not whole:
        raise UserError(
            f"{path}: damaged manifest, it is not that of its shards; delete it, run build_shards again"
        )
    return manifest
