"""Reading the user's JSONL files: every line becomes a row to pack, or a reason why not.

Rows are remembered by their place in the file and a hash, not by their contents, so that many millions fit in
memory; :func:`load_row` reads one again when it is packed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxtral_dist.errors import UserError
from voxtral_dist.tasks import TASKS, parse_row

MAX_LINE_BYTES = 1 << 20
FLAC_RATIO = {".wav": 0.6, ".flac": 1.0, ".mp3": 5.0, ".ogg": 5.0, ".opus": 6.0}
"""Rough size of the 16 kHz mono FLAC over the size of the file it is made from."""

Row = dict[str, Any]
FileStat = tuple[int, int]
"""Size in bytes and modification time in ns."""

Keep = Callable[[Row, str | None], bool]
"""Whether a row with this task, None for an unclear one, takes part; see
:class:`voxtral_dist.row_filter.RowFilter`."""

_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands: its file, its line from 1, its offset in bytes."""

    file: Path
    line: int
    offset: int

    @property
    def where(self) -> str:
        """``file:line`` with the path the user gave, for messages."""
        return f"{self.file}:{self.line}"

    @property
    def source(self) -> str:
        """``file:line`` without folders, for what is stored and may be passed on."""
        return f"{self.file.name}:{self.line}"

    @property
    def default_id(self) -> str:
        """Id of a row that has none."""
        return f"{self.file.stem}:{self.line}"


@dataclass(frozen=True, slots=True)
class ScannedRow:
    """A valid row.

    Attributes:
        place: where it stands.
        task: name of its task.
        id: the user's, or ``<file stem>:<line>``.
        keys: its field names, sorted.
        audio: state of its audio file, None for a text task.
        estimate: bytes it will take in a shard, roughly.
        digest: hash over its contents and ``audio``.
    """

    place: Place
    task: str
    id: str
    keys: tuple[str, ...]
    audio: FileStat | None
    estimate: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be packed.

    Attributes:
        place, id, keys: as of :class:`ScannedRow`; no keys when it is not a JSON object.
        reason: what is wrong, without ``file:line``.
        task: the data set it is missing from, None when that cannot be told.
    """

    place: Place
    id: str
    keys: tuple[str, ...]
    reason: str
    task: str | None


def scan(path: Path, task_name: str | None = None, keep: Keep | None = None) -> Iterator[ScannedRow | BadRow]:
    """Every row of one JSONL file in order; blank lines are skipped but counted.

    Args:
        path: the file. A relative ``audio_path`` starts from its folder.
        task_name: task of the rows without a ``task`` field; None to tell it from each row's keys.
        keep: leave out the rows it is false of, before anything else of them is looked at; None: all take part.

    Raises:
        UserError: there is no such file, or a line of over a megabyte (then it is not JSONL).
    """
    known: dict[tuple[str, ...], tuple[str, ...]] = {}
    for place, raw in lines(path):
        row: Row = {}
        try:
            row = decode_row(raw)
            if keep is not None and not keep(row, _route(row, task_name)):
                continue
            keys = tuple(sorted(row))
            yield _scan_row(row, place, known.setdefault(keys, keys), task_name)
        except (ValueError, UserError) as error:
            reason = str(error).removeprefix(f"{place.where}: ")
            id_ = str(row.get("id", place.default_id))
            yield BadRow(place, id_, tuple(sorted(row)), reason, _route(row, task_name))


def load_row(scanned: ScannedRow) -> Row:
    """The row as it is stored: the user's fields, with ``task``, ``id`` and ``source`` (file name and line).

    Raises:
        UserError: the line is not what it was when it was scanned.
    """
    place = scanned.place
    try:
        with place.file.open("rb") as file:
            file.seek(place.offset)
            row = decode_row(file.readline(MAX_LINE_BYTES))
        if _digest(row, place, scanned.audio) == scanned.digest:
            return {**row, "task": scanned.task, "id": scanned.id, "source": place.source}
    except (ValueError, FileNotFoundError):
        pass
    raise UserError(
        f"{place.where}: the line changed while it was packed; start again when the file is final"
    )


def audio_file(scanned: ScannedRow, row: Row) -> Path:
    """The audio file of a row of an audio task."""
    return scanned.place.file.parent / str(row["audio_path"])


def file_stat(path: Path) -> FileStat | None:
    """Size and modification time of a regular file, None when there is none."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def audio_reason(row: Row, error: Exception) -> str:
    """One wording for every way in which the audio of a row is unusable."""
    if isinstance(error, FileNotFoundError):
        return f"audio file {row['audio_path']!r} does not exist"
    return f"audio file {row['audio_path']!r}: {getattr(error, 'strerror', None) or error}"


class DuplicateFinder:
    """Tells of each row whether an earlier one of its task has the same id: returns the reason, or ""."""

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], Place] = {}

    def __call__(self, row: ScannedRow) -> str:
        first = self._first.setdefault((row.task, row.id), row.place)
        if first is row.place:
            return ""
        return f"id {row.id!r} is that of {first.where} too; give the rows of a data set different ids"


def lines(path: Path) -> Iterator[tuple[Place, bytes]]:
    """Place and bytes of every line that is not blank; errors as of :func:`scan`."""
    if not path.is_file():
        raise UserError(f"{path}: no such JSONL file; check the path")
    line, offset = 0, 0
    with path.open("rb") as file:
        while raw := file.readline(MAX_LINE_BYTES):
            line += 1
            if len(raw) == MAX_LINE_BYTES and not raw.endswith(b"\n"):
                raise UserError(
                    f"{path}:{line}: a line of over {MAX_LINE_BYTES} bytes; JSONL has one object a line"
                )
            if raw.strip():
                yield Place(path, line, offset), raw
            offset += len(raw)


def decode_row(raw: bytes) -> Row:
    """The JSON object that is one line of JSONL, or one ``.json`` member of a tar.

    Raises:
        ValueError: not UTF-8, not JSON, or not an object; the message is a short reason.
    """
    try:
        row = json.loads(raw.removeprefix(_BOM).decode("utf-8"), parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON ({error.msg}, column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1} of the line)") from None
    except RecursionError:
        raise ValueError("invalid JSON (nested too deep)") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__} where an object belongs")
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"invalid JSON ({name} is no JSON number)")


def _scan_row(row: Row, place: Place, keys: tuple[str, ...], task_name: str | None) -> ScannedRow:
    sample = parse_row(row, place.where, place.default_id, task_name)
    audio, size = None, 0.0
    if sample.audio_path:
        audio = file_stat(place.file.parent / sample.audio_path)
        if audio is None:
            raise ValueError(f"audio file {sample.audio_path!r} does not exist")
        size = audio[0] * FLAC_RATIO.get(Path(sample.audio_path).suffix.lower(), 1.0)
    estimate = int(size) + 2048 + sum(len(str(value)) for value in row.values())
    return ScannedRow(place, sample.task, sample.id, keys, audio, estimate, _digest(row, place, audio))


def _digest(row: Row, place: Place, audio: FileStat | None) -> bytes:
    text = json.dumps([row, place.source, audio], ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(text.encode()).digest()[:16]


def _route(row: Row, task_name: str | None) -> str | None:
    """Task of a bad row: what it or the file says, else what its keys say, else None."""
    name = row.get("task", task_name)
    if name is not None:
        return str(name) if str(name) in TASKS else None
    fits = [task.name for task in TASKS.values() if task.detect(row)]
    return fits[0] if len(fits) == 1 else None
