"""The bytes of a shard: tar, columnar index and commit marker (``shards/README.md`` describes them).

Equal examples give equal bytes: every tar field that is not name, size or content is fixed, JSON keys are
sorted, nothing depends on time, host or path.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from voxtral_dist import atomic
from voxtral_dist.audio_file import SAMPLE_RATE
from voxtral_dist.errors import UserError
from voxtral_dist.tar_members import BLOCK_BYTES

SCHEMA = "voxtral-dist/shards/1"
KEY_PATTERN = re.compile(r"[a-z0-9_]+_\d{12}")
MAX_JSON_BYTES = 4 << 20
MAX_AUDIO_BYTES = 128 << 20
INDEX_COLUMNS = {
    "json_offset": np.uint64,
    "json_size": np.uint32,
    "json_crc32": np.uint32,
    "audio_offset": np.uint64,
    "audio_size": np.uint32,
    "crc32": np.uint32,
    "n_samples": np.uint32,
}
"""Offset and size, in bytes, of the members' contents; ``crc32`` runs over the JSON and then the audio."""

Example = tuple[str, Mapping[str, Any], bytes | None, int]
"""Key, row, FLAC bytes (None for a text task), number of 16 kHz samples."""

_RECORD_BYTES = 20 * BLOCK_BYTES
_DTYPES: dict[str, np.dtype[Any]] = {"U64": np.dtype("<u8"), "U32": np.dtype("<u4")}
_MANIFEST_FIELDS = ("name", "examples", "bytes", "sha256", "index_bytes", "index_sha256")


def shard_stem(task: str, split: str, number: int) -> str:
    """File name of a shard without its suffix."""
    return f"{task}-{split}-{number:06d}"


def example_key(task: str, ordinal: int) -> str:
    """Key of row number ``ordinal`` (from 0) of a data set. It has no dot: WebDataset would cut it there."""
    return f"{task}_{ordinal:012d}"


def write_shard(
    folder: Path,
    stem: str,
    examples: Iterable[Example],
    *,
    build: str = "",
    rejects: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Write one shard: tar, then index, then the commit marker, each whole or not at all.

    Args:
        folder: the data set's folder, which exists.
        stem: file name without suffix.
        examples: in the order in which they are stored.
        build: hash of what the shard is made from, for the marker.
        rejects: rows left out, for the marker; read when ``examples`` has ended, which may fill it.

    Returns:
        The marker.
    """
    _drop_marker(folder / f"{stem}.json", build)  # first: a marker never describes another tar
    with atomic.replacing(folder / f"{stem}.tar") as file:
        tar = _TarWriter(file)
        contents, entries = Contents(), []
        for key, row, audio, n_samples in examples:
            contents.add(key, row, n_samples)
            entries.append({**_add_example(tar, key, row, audio), "n_samples": n_samples})
        tar.close()
    tar_fields = {"name": f"{stem}.tar", "bytes": tar.offset, "sha256": tar.sha256.hexdigest()}
    about = {**tar_fields, "rejects": list(rejects), "build": build}
    return write_sidecars(folder, entries, INDEX_COLUMNS, {**about, **contents.fields()})


def _drop_marker(path: Path, build: str) -> None:
    """Remove a marker unless it is of the same bytes: then another builder has just finished this very shard."""
    try:
        marker = json.loads(path.read_bytes())
        same = bool(build) and marker["build"] == build and not marker["rejects"]
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        path.unlink(missing_ok=True)


def write_sidecars(
    folder: Path,
    entries: Sequence[Mapping[str, int]],
    schema: Mapping[str, Any],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """Write index and commit marker of a tar that is there.

    Args:
        folder: where the tar lies.
        entries: the columns of each example, in the order of the tar.
        schema: type of each column.
        about: the fields of the marker but those of the index.

    Returns:
        The marker.
    """
    columns = {name: np.array([e[name] for e in entries], dtype) for name, dtype in schema.items()}
    index = columns_bytes(columns, {"schema": SCHEMA})
    path = folder / about["name"]
    atomic.write_bytes(path.with_suffix(".idx"), index)
    hashes = {"index_bytes": len(index), "index_sha256": hashlib.sha256(index).hexdigest()}
    marker = {"schema": SCHEMA, **about, **hashes}
    atomic.write_json(path.with_suffix(".json"), marker)
    return marker


class Contents:
    """What a marker says about the examples of a shard; :meth:`fields` after :meth:`add` for each of them."""

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._samples = 0
        self._languages: Counter[str] = Counter()
        self._domains: Counter[str] = Counter()

    def add(self, key: str, row: Mapping[str, Any], n_samples: int) -> None:
        """Count one example of ``n_samples`` 16 kHz samples."""
        self._keys.append(key)
        self._samples += n_samples
        self._languages[str(row.get("language") or "").lower()] += 1
        self._domains[str(row.get("domain") or "")] += 1

    def fields(self) -> dict[str, Any]:
        """``examples``, ``audio_seconds``, ``key_range``, ``languages`` and ``domains`` of a marker."""
        return {
            "examples": len(self._keys),
            "audio_seconds": self._samples / SAMPLE_RATE,
            "key_range": [min(self._keys), max(self._keys)] if self._keys else [],
            "languages": dict(self._languages),
            "domains": dict(self._domains),
        }


def make_manifest(
    task: str, split: str, markers: Sequence[Mapping[str, Any]], rejected: int
) -> dict[str, Any]:
    """The manifest of a data set from the markers of its shards, in their order."""
    shards = [{field: marker[field] for field in _MANIFEST_FIELDS} for marker in markers]
    return {
        "schema": SCHEMA,
        "task": task,
        "split": split,
        "examples": sum(shard["examples"] for shard in shards),
        "audio_seconds": sum(round(marker["audio_seconds"] * SAMPLE_RATE) for marker in markers)
        / SAMPLE_RATE,
        "rejected": rejected,
        "shards": shards,
        "fingerprint": fingerprint(task, shards),
    }


def fingerprint(task: str, shards: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256, hex, over schema, task and the hashes of the tars in order: the identity of a data set."""
    return hashlib.sha256(json.dumps([SCHEMA, task, [s["sha256"] for s in shards]]).encode()).hexdigest()


def file_sha256(file: BinaryIO) -> str:
    """SHA-256, hex, of an open file from where it stands."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def columns_bytes(columns: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file of one-dimensional columns, little-endian uint32 or uint64.

    Give ``metadata`` one entry: the order in which safetensors writes several differs from run to run.
    """
    return bytes(save(dict(columns), dict(metadata)))


def read_columns(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Memory-mapped columns and the metadata of a file of :func:`columns_bytes`.

    Raises:
        UserError: not such a file.
    """
    try:
        raw = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
        start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8:start].tobytes())
        metadata = header.pop("__metadata__", {})
        columns = {}
        for name, entry in header.items():
            begin, end = (start + offset for offset in entry["data_offsets"])
            columns[name] = raw[begin:end].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged index ({error!r}); delete it and build it again") from None
    return columns, metadata


def member_header(name: str, size: int) -> bytes:
    """The header block of a member of ours: nothing in it but name and size differs."""
    header = tarfile.TarInfo(name)
    header.size = size
    return header.tobuf(tarfile.USTAR_FORMAT)


def archive_bytes(end: int) -> int:
    """Size of a tar of ours whose last member ends at byte ``end``: two empty blocks more, up to a record."""
    return -(-(end + 2 * BLOCK_BYTES) // _RECORD_BYTES) * _RECORD_BYTES


class _TarWriter:
    """Plain USTAR: integer times, no owner, mode 0644, so that a member costs one header block."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.offset, self.sha256 = file, 0, hashlib.sha256()

    def add(self, name: str, data: bytes) -> int:
        """Append one member; returns the offset of its content."""
        content = self.offset + BLOCK_BYTES
        self._write(member_header(name, len(data)) + data + bytes(-len(data) % BLOCK_BYTES))
        return content

    def close(self) -> None:
        """Two empty blocks end the archive, rounded up to a record."""
        self._write(bytes(archive_bytes(self.offset) - self.offset))

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.offset += len(data)


def _add_example(tar: _TarWriter, key: str, row: Mapping[str, Any], audio: bytes | None) -> dict[str, int]:
    """Append the members of one example; its columns of the index."""
    if not KEY_PATTERN.fullmatch(key):
        raise ValueError(f"key {key!r} is not <task>_<12 digits>")
    data = json.dumps(row, ensure_ascii=False, sort_keys=True, allow_nan=False).encode()
    flac = audio or b""
    if len(data) > MAX_JSON_BYTES or len(flac) > MAX_AUDIO_BYTES:
        raise ValueError(f"{key}: {len(data)} bytes of JSON, {len(flac)} bytes of audio: over the limits")
    crc = zlib.crc32(data)
    return {
        "json_offset": tar.add(f"{key}.json", data),
        "json_size": len(data),
        "json_crc32": crc,
        "audio_offset": tar.add(f"{key}.flac", flac) if flac else 0,
        "audio_size": len(flac),
        "crc32": zlib.crc32(flac, crc),
    }
