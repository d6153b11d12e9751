"""One tar of someone else's: its examples, or why it is refused. Nothing is executed, unpickled or extracted."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from voxtral_dist.audio_file import decode
from voxtral_dist.errors import UserError
from voxtral_dist.jsonl import decode_row
from voxtral_dist.shard_format import MAX_AUDIO_BYTES, MAX_JSON_BYTES
from voxtral_dist.shard_reader import AUDIO_SUFFIXES, foreign_row
from voxtral_dist.shards import sample_from_row
from voxtral_dist.tar_members import Member, TarDamageError, split_name, walk
from voxtral_dist.tasks import TASKS

PICKLED = (".pyd", ".pkl", ".pickle", ".pth", ".pt", ".npy", ".npz")
"""Members that ``WebDataset(tar).decode()`` unpickles or may unpickle."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def keys(tar: Path, file: BinaryIO, size: int, task: str) -> Iterator[tuple[str, dict[str, Member], int]]:
    """Key, members by part (``json``, ``audio``) and bytes of every example of an open tar of ``size`` bytes.

    Raises:
        UserError: the tar is refused: compressed, damaged, with a pickle, or with a key that comes twice.
    """
    head = file.read(8)
    for magic, name in _COMPRESSED.items():
        if head.startswith(magic):
            raise UserError(f"{tar}: compressed with {name}; decompress it, examples are read from any place")
    seen: set[str] = set()
    last: str | None = None
    parts: dict[str, Member] = {}
    start = 0
    for member in _members(tar, file, size):
        key, suffix = split_name(member.name) or (None, "")
        if member.name.lower().endswith(PICKLED):
            raise UserError(
                f"{tar}: {member.name!r} is a pickle, which can run any program when it is read; "
                "write the tar again without it"
            )
        if key is None or not member.regular or member.name.startswith("__"):  # webdataset skips them too
            continue
        if key != last:
            if last is not None:
                yield last, parts, member.start - start
            if key in seen:
                raise UserError(f"{tar}: key {key!r} comes again after others; its members must be adjacent")
            seen.add(key)
            last, parts, start = key, {}, member.start
        part = "audio" if suffix in AUDIO_SUFFIXES and TASKS[task].has_audio else suffix
        if part in parts:
            raise UserError(f"{tar}: key {key!r} has two {part} members; keys must differ")
        parts[part] = member
    if last is not None:
        yield last, parts, size - start


def _members(tar: Path, file: BinaryIO, size: int) -> Iterator[Member]:
    try:
        yield from walk(file, size)
    except TarDamageError as error:
        raise UserError(f"{tar}: {error}; get the tar once more") from None


def read_example(
    file: BinaryIO, tar: Path, task: str, key: str, parts: dict[str, Member]
) -> tuple[dict[str, int], dict[str, Any]]:
    """Columns of the index and row, as a reader will see it, of one example of :func:`keys`.

    Raises:
        ValueError: the example is bad; the message is a short reason.
    """
    wanted = ["json", "audio"] if TASKS[task].has_audio else ["json"]
    for part in wanted:
        if part not in parts:
            raise ValueError(f"has no {part} member, only {', '.join(sorted(parts))}")
        limit = MAX_JSON_BYTES if part == "json" else MAX_AUDIO_BYTES
        if parts[part].size > limit:
            raise ValueError(f"{part} member of {parts[part].size} bytes, at most {limit} are accepted")
    data = _content(file, parts["json"])
    audio = _content(file, parts["audio"]) if "audio" in wanted else b""
    n_samples = len(decode(audio)) if audio or "audio" in wanted else 0
    row = decode_row(data)
    if row.get("task", task) != task:
        raise ValueError(f"its task is {row['task']!r}, the data set's {task!r}")
    full = foreign_row(row, task, key, tar.name, n_samples)
    try:
        sample = sample_from_row(full)
    except UserError as error:
        raise ValueError(str(error).removeprefix(f"{full['source']}: ")) from None
    crc = zlib.crc32(data)
    return {
        **_place("json", parts["json"]),
        **_place("audio", parts.get("audio") if audio else None),
        "json_crc32": crc,
        "crc32": zlib.crc32(audio, crc),
        "n_samples": n_samples,
        "id_hash": int.from_bytes(hashlib.sha256(sample.id.encode()).digest()[:8], "little"),
    }, full


def _place(part: str, member: Member | None) -> dict[str, int]:
    content, size = (member.content, member.size) if member else (0, 0)
    header = member.content - member.start if member else 0
    return {f"{part}_offset": content, f"{part}_size": size, f"{part}_header": header}


def _content(file: BinaryIO, member: Member) -> bytes:
    return os.pread(file.fileno(), member.size, member.content)
