"""Predictions written down as they come, so that an evaluation that was killed goes on where it was.

    OUT/parts/part-00003-1f2e3d4c.jsonl    of one rank and one start: a line with the key, then a line per prediction
    OUT/parts/failed-00003.json            the rank that failed and why, for the others to stop at

A part counts only under the key of the evaluation: all that decides a prediction. The folder goes when the whole result
is written.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from voxtral_dist.atomic import write_json
from voxtral_dist.errors import VoxtralDistError

Record = dict[str, Any]
"""A prediction with its ``place`` [task or row, number], which tells it apart."""

PARTS = "parts"
"""Name of the folder beside ``predictions.jsonl``."""


class Parts:
    """The predictions so far of one evaluation.

    Args:
        folder: of the evaluation.
        key: model, data and settings, in any words.
        rank: of this process; its number goes into the names of its files.
    """

    def __init__(self, folder: Path, key: str, rank: int) -> None:
        self._folder, self._key, self._rank = folder / PARTS, key, rank
        self._file: int | None = None

    def begin(self) -> list[Record]:
        """What earlier starts left under the same key, each prediction once; old failures go. For rank 0.

        Raises:
            VoxtralDistError: two parts hold different predictions of one example.
        """
        found: dict[tuple[int, ...], Record] = {}
        for path in sorted(self._folder.glob("failed-*.json")):
            path.unlink()
        for path in sorted(self._folder.glob("part-*.jsonl")):
            for record in _read(path, self._key):
                other = found.setdefault(tuple(record["place"]), record)
                if other["prediction"] != record["prediction"]:
                    raise VoxtralDistError(
                        f"{path}: another prediction of {record['task']}/{record['id']} than an earlier part holds; "
                        f"remove {self._folder} and start again"
                    )
        return list(found.values())

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add predictions as whole lines; what a kill tears is dropped by the next start."""
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"part-{self._rank:05d}-{secrets.token_hex(4)}.jsonl"
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
            self._write([{"key": self._key}])
        self._write(records)

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        assert self._file is not None
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        while data:
            data = data[os.write(self._file, data) :]

    def fail(self, message: str) -> None:
        """Tell the other ranks that there will be no result. A disk that takes no word makes them finish first."""
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(self._folder / f"failed-{self._rank:05d}.json", {"message": message}, private=True)

    def is_failed(self) -> bool:
        """Whether a rank has failed."""
        return next(self._folder.glob("failed-*.json"), None) is not None

    def close(self) -> None:
        """Close this rank's file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def remove(folder: Path) -> None:
    """Delete the parts of all evaluations into a folder, once their results are written; for rank 0."""
    shutil.rmtree(folder / PARTS, ignore_errors=True)


def _read(path: Path, key: str) -> list[Record]:
    """The predictions of a part, up to the first line that is not whole; none of a part under another key."""
    with path.open("rb") as file:
        lines = _whole_lines(file)
        return list(lines) if next(lines, {}).get("key") == key else []


def _whole_lines(file: Iterable[bytes]) -> Iterator[Record]:
    for line in file:
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if not isinstance(row, dict):
            return
        yield row
