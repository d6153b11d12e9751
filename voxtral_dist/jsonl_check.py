"""A look at JSONL files before they are packed: tasks, keys, audio, first errors. Writes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from voxtral_dist.audio_file import AudioError, probe
from voxtral_dist.jsonl import (
    BadRow,
    DuplicateFinder,
    Keep,
    ScannedRow,
    audio_file,
    audio_reason,
    load_row,
    scan,
)

SHOWN_ERRORS = 5


@dataclass
class FileReport:
    """What :func:`check` found in one file.

    Attributes:
        path: the file.
        rows: rows per task, the bad ones not counted.
        keys: how many rows have each field.
        seconds: audio the headers state.
        bad: number of bad rows.
        errors: the first of them, as ``file:line: reason``.
    """

    path: Path
    rows: Counter[str] = field(default_factory=Counter)
    keys: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    bad: int = 0
    errors: list[str] = field(default_factory=list)


def check(
    files: Sequence[Path], tasks: Sequence[str | None], progress: bool = False, keep: Keep | None = None
) -> list[FileReport]:
    """Read JSONL files and the headers of their audio, and write nothing; one report per file.

    Args:
        files: the files.
        tasks: task of each, None for one told by its rows' keys.
        progress: show a progress bar.
        keep: as of :func:`scan`.

    Raises:
        UserError: as :func:`scan`.
    """
    reports, duplicate = [], DuplicateFinder()
    for path, task_name in zip(files, tasks, strict=True):
        report = FileReport(path)
        reports.append(report)
        rows = scan(path, task_name, keep)
        for row in tqdm(rows, desc=f"check {path.name}", unit="row", disable=not progress):
            report.keys.update(row.keys)
            reason = row.reason if isinstance(row, BadRow) else duplicate(row) or _probe(row, report)
            if not reason:
                report.rows[row.task or ""] += 1
                continue
            report.bad += 1
            if len(report.errors) < SHOWN_ERRORS:
                report.errors.append(f"{row.place.where}: {reason}")
        if not report.rows and not report.bad and keep is None:
            report.bad, report.errors = 1, [f"{path}: has no rows"]
    return reports


def _probe(scanned: ScannedRow, report: FileReport) -> str:
    """Why the audio cannot be used as far as its header tells, or ""."""
    if scanned.audio is None:
        return ""
    row = load_row(scanned)
    try:
        report.seconds += probe(audio_file(scanned, row))
    except (AudioError, OSError) as error:
        return audio_reason(row, error)
    return ""
