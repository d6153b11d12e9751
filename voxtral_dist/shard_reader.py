"""One open shard: any example by its place in the tar, read with one ``pread`` and checked against the index."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from voxtral_dist.audio_file import SAMPLE_RATE
from voxtral_dist.errors import BadSamplesError, UserError
from voxtral_dist.shard_format import KEY_PATTERN, MAX_AUDIO_BYTES, MAX_JSON_BYTES, read_columns
from voxtral_dist.tar_members import BLOCK_BYTES, parse_name, split_name
from voxtral_dist.tasks import TASKS

_MAX_BYTES = {"json": MAX_JSON_BYTES, "audio": MAX_AUDIO_BYTES}
AUDIO_SUFFIXES = frozenset(("flac", "wav", "mp3", "ogg", "opus"))
"""Extensions of the audio members of foreign tars."""

INTERNAL_FIELDS = frozenset(("source", "duration"))
"""Fields of a stored row that a JSONL row does not have."""

_OWN_SUFFIX = {"json": "json", "audio": "flac"}


class CorruptSampleError(BadSamplesError):
    """The stored bytes of one example are not those that were written.

    Attributes:
        shard: file name of the tar.
        key: key of the example, or ``example <n>`` where the key itself is unreadable.
        reason: what does not match.
    """

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(
            f"{shard}: {key}: {reason}; the shard is damaged: build it again (foreign: restore it)"
        )
        self.shard, self.key, self.reason = shard, key, reason


@dataclass(frozen=True, slots=True)
class Record:
    """One stored example: its key, its row, the bytes of its FLAC or foreign audio file (None for a text task)."""

    key: str
    row: dict[str, Any]
    audio: bytes | None


def foreign_row(row: Mapping[str, Any], task: str, key: str, tar: str, n_samples: int) -> dict[str, Any]:
    """The row of a foreign tar with what a stored row of ours has more: task, id, source, duration, audio_path."""
    own = {name: value for name, value in row.items() if name not in INTERNAL_FIELDS}
    if TASKS[task].has_audio:
        own.setdefault("audio_path", f"{tar}/{key}")
    own["id"] = key if own.get("id") in (None, "") else str(own["id"])
    return {**own, "task": task, "source": f"{tar}:{key}", "duration": n_samples / SAMPLE_RATE}


class Reader:
    """One open shard. Its descriptor closes with the last reference: evicted while in use, it stays valid.

    Args:
        tar: the tar, its index beside it.
        index_sha256: hash of the index.
        foreign_task: task of a foreign tar, "" for one of ours.

    Attributes:
        name: file name of the tar.
        columns: the index, each of shape (examples,).
        descriptor: of the open tar.
    """

    def __init__(self, tar: Path, index_sha256: str, foreign_task: str = "") -> None:
        self.name, self._foreign_task = tar.name, foreign_task
        self.columns = verified_index(tar, index_sha256)
        self.descriptor = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.descriptor)

    def example(self, at: int, with_audio: bool) -> Record:
        """Example number ``at`` of the shard, checked against the index."""
        entry = {name: int(values[at]) for name, values in self.columns.items()}
        key, data = self._member(entry, "json", f"example {at}")
        if zlib.crc32(data) != entry["json_crc32"]:
            raise CorruptSampleError(self.name, key, "the checksum of its JSON does not match")
        row = json.loads(data)
        if self._foreign_task:
            row = foreign_row(row, self._foreign_task, key, self.name, entry["n_samples"])
        if not with_audio or entry["audio_size"] == 0:
            return Record(key, row, None)
        audio_key, audio = self._member(entry, "audio", key)
        if audio_key != key or zlib.crc32(audio, entry["json_crc32"]) != entry["crc32"]:
            raise CorruptSampleError(self.name, key, "the checksum of its audio does not match")
        return Record(key, row, audio)

    def _member(self, entry: Mapping[str, int], part: str, label: str) -> tuple[str, bytes]:
        """Key and content of the ``json`` or ``audio`` member of an example."""
        at, size = entry[f"{part}_offset"], entry[f"{part}_size"]
        header_bytes = entry.get(f"{part}_header", BLOCK_BYTES)  # foreign ones may have more than one block
        if at < header_bytes or not size <= _MAX_BYTES[part]:
            raise CorruptSampleError(self.name, label, f"{size} bytes at {at} are outside the limits")
        try:
            name, announced = parse_name(os.pread(self.descriptor, header_bytes, at - header_bytes))
        except ValueError:
            raise CorruptSampleError(self.name, label, "no tar header where the index points") from None
        key = self.key_of(name, part) if name else None
        if key is None:
            raise CorruptSampleError(
                self.name, label, f"member {name!r} stands where the {part} of an example belongs"
            )
        data = os.pread(self.descriptor, size, at)
        if announced != size or len(data) != size:
            raise CorruptSampleError(self.name, key, f"the size of its {part} member does not match")
        return key, data

    def key_of(self, name: str, part: str) -> str | None:
        """Key of the ``json`` or ``audio`` member called ``name``; None when such a member has another name."""
        key, suffix = split_name(name) or ("", "")
        if self._foreign_task:
            return key if suffix in (("json",) if part == "json" else AUDIO_SUFFIXES) else None
        return key if KEY_PATTERN.fullmatch(key) and name == f"{key}.{_OWN_SUFFIX[part]}" else None


def verified_index(tar: Path, sha256: str) -> dict[str, NDArray[Any]]:
    """The columns of a tar's index; :class:`UserError` unless its hash is ``sha256``."""
    path = tar.with_suffix(".idx")
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise UserError(
            f"{path}: damaged, its hash is not the manifest's; delete it and run build_shards again"
        )
    return read_columns(path)[0]
