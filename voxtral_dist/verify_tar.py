"""One shard read to its last byte: what of it is not what was written, by example."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from voxtral_dist.audio_file import SAMPLE_RATE, decode
from voxtral_dist.errors import UserError
from voxtral_dist.shard_format import Contents, archive_bytes, file_sha256, member_header
from voxtral_dist.shard_reader import CorruptSampleError, Reader
from voxtral_dist.shards import sample_from_row
from voxtral_dist.tar_members import BLOCK_BYTES, Member, TarDamageError, parse_header, walk
from voxtral_dist.workers import Tick


class TarCheck:
    """Reads one shard whole.

    Args:
        tar: the tar.
        reader: its reader; the index is the manifest's.
        shard: its entry in the manifest.
        task: the data set's.
        foreign: whether the tar is someone else's; then only what a reader looks at is checked.
        tick: called with each example and its bytes.
    """

    def __init__(
        self, tar: Path, reader: Reader, shard: Mapping[str, Any], *, task: str, foreign: bool, tick: Tick
    ) -> None:
        self.tar, self.reader, self.shard, self.tick = tar, reader, shard, tick
        self.task, self.foreign = task, foreign
        self.size = tar.stat().st_size
        columns = {name: values.astype(np.int64) for name, values in reader.columns.items()}
        self.n = min(len(values) for values in columns.values())
        headers = {part: columns.get(f"{part}_header", BLOCK_BYTES) for part in ("json", "audio")}
        starts = columns["json_offset"] - headers["json"]
        audio = np.where(columns["audio_size"] > 0, columns["audio_offset"] - headers["audio"], starts)
        self.starts = np.minimum(starts, audio)
        self.content = {
            (int(columns[f"{part}_offset"][at]), int(columns[f"{part}_size"][at]))
            for part in ("json", "audio")
            for at in range(self.n)
            if part == "json" or columns["audio_size"][at]
        }

    def faults(self, marker: Mapping[str, Any]) -> Iterator[str]:
        """One line for each damaged example or end of the archive.

        The hash of the whole speaks up only where no example was found that explains it.

        Args:
            marker: the shard's, whose counts are compared; {} for none.
        """
        with self.tar.open("rb") as file:
            same = file_sha256(file) == self.shard["sha256"]
            found = self._examples(marker)
            for offset, reason in self._structure(file, strict=not self.foreign or not same):
                found.setdefault(self._at(offset), reason)
        for at, reason in sorted(found.items()):
            yield f"{self.tar}: {self._label(at)}: {reason}"
        if not same and not found:
            yield f"{self.tar}: its SHA-256 is not the manifest's, though every example is readable"

    def _examples(self, marker: Mapping[str, Any]) -> dict[int, str]:
        """Reason by number of every example that cannot be read; one that was cut off stands for those behind it."""
        found: dict[int, str] = {}
        contents = Contents()
        for at in range(self.n):
            end = int(self.starts[at + 1]) if at + 1 < self.n else int(self.shard["bytes"])
            self.tick(f"{self.tar}: example {at}", end - (int(self.starts[at]) if at else 0))
            if int(self.starts[at]) >= self.size:
                found[at] = (
                    f"cut off with {self.n - at - 1} examples behind it: the tar ends at byte {self.size}"
                )
                break
            reason = self._example(at, contents)
            if reason:
                found[at] = reason
        if marker and not found:
            wrong = [name for name, value in contents.fields().items() if marker[name] != value]
            if wrong:
                found[self.n] = f"the marker's {', '.join(wrong)} are not those of the examples"
        return found

    def _example(self, at: int, contents: Contents) -> str:
        n_samples = int(self.reader.columns["n_samples"][at])
        try:
            record = self.reader.example(at, with_audio=True)
            sample = sample_from_row(record.row)
            decoded = 0 if record.audio is None else len(decode(record.audio))
        except CorruptSampleError as error:
            return error.reason
        except (UserError, ValueError, OSError) as error:
            return str(error)
        if sample.task != self.task:
            return f"a row of task {sample.task}"
        if decoded != n_samples or record.row.get("duration") != n_samples / SAMPLE_RATE:
            return f"{decoded} samples of audio, {n_samples} in the index, {record.row.get('duration')} s in its row"
        contents.add(record.key, record.row, n_samples)
        return ""

    def _structure(self, file: BinaryIO, strict: bool) -> Iterator[tuple[int, str]]:
        """Offset and reason of what is wrong between and around the contents; ``strict``: to the byte as we write."""
        end = 0
        try:
            for member in walk(file, self.size):
                end = member.end
                yield from self._odd(file, member) if strict else ()
        except TarDamageError as error:
            yield error.offset, str(error)
            return
        if not self.foreign and self.size != archive_bytes(end):
            yield (
                end,
                f"{self.size - end} bytes behind the last member, {archive_bytes(end) - end} belong there",
            )

    def _odd(self, file: BinaryIO, member: Member) -> Iterator[tuple[int, str]]:
        """What is not as we would have written it; of a foreign member only the padding."""
        file.seek(member.content + member.size)
        if any(file.read(member.end - member.content - member.size)):
            yield member.start, f"the padding of member {member.name!r} is not empty"
        if self.foreign:
            return
        file.seek(member.start)
        if file.read(BLOCK_BYTES) != member_header(member.name, member.size):
            yield member.start, f"the header of member {member.name!r} is not as it was written"
        if (member.content, member.size) not in self.content:
            yield member.start, f"member {member.name!r} is not in the index"

    def _at(self, offset: int) -> int:
        """Number of the example to which a byte belongs; their count for the end of the archive."""
        if not self.n:
            return 0
        at = int(np.searchsorted(self.starts, offset, side="right")) - 1
        last = max(content + size for content, size in self.content)
        return self.n if offset >= last else max(0, at)

    def _label(self, at: int) -> str:
        """The key of an example where one of its headers can be read, else its number and its row's id."""
        if at >= self.n:
            return f"end of the archive, after {self._label(self.n - 1)}" if self.n else "end of the archive"
        entry = {name: int(values[at]) for name, values in self.reader.columns.items()}
        for part in ("json", "audio"):
            size = entry.get(f"{part}_header", BLOCK_BYTES)
            try:
                header = parse_header(os.pread(self.reader.descriptor, size, entry[f"{part}_offset"] - size))
                if key := self.reader.key_of(header.name, part):
                    return key
            except (ValueError, OSError):
                continue
        try:
            data = os.pread(self.reader.descriptor, entry["json_size"], entry["json_offset"])
            return f"example {at} (id {json.loads(data)['id']!r})"
        except (ValueError, KeyError, TypeError, OSError):
            return f"example {at}" + (f" (after {self._label(at - 1)})" if at else "")
