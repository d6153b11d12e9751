"""What is to be packed, and into which shards: a pure function of the JSONL files and their audio files.

Every process that takes part computes the same plan, so they need no word with each other.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from voxtral_dist.errors import UserError
from voxtral_dist.jsonl import BadRow, DuplicateFinder, ScannedRow, scan
from voxtral_dist.row_filter import RowFilter
from voxtral_dist.shard_format import shard_stem
from voxtral_dist.tasks import TASKS

BUILDER = "voxtral-dist/packing/1"
"""Seeds the shuffle and is part of every build hash. Changing what tars hold of the same input must change it."""

MARKER = "marker/2"
"""Part of every build hash. Changing what index or marker say of the same tar must change it."""

SHARD_BYTES = 256 << 20


@dataclass(frozen=True)
class ShardPlan:
    """One shard to build: the unit of work.

    Attributes:
        folder, stem: where it goes.
        rows: ordinal in the data set and row, in stored order.
        build: hash over everything it is made from.
    """

    folder: Path
    stem: str
    rows: list[tuple[int, ScannedRow]]
    build: str


@dataclass(frozen=True)
class DataSetPlan:
    """One data set to build.

    Attributes:
        folder, task, split: what and where it is.
        rows_in: rows the files hold for it, good and bad.
        shards: its shards.
        rejects: the rows that the scan found bad.
    """

    folder: Path
    task: str
    split: str
    rows_in: int
    shards: list[ShardPlan]
    rejects: list[BadRow]


@dataclass(frozen=True)
class PackPlan:
    """Everything that is to be built.

    Attributes:
        files: the JSONL files.
        data_sets: one per task that has rows, in the order of :data:`voxtral_dist.tasks.TASKS`.
        fatal: rows that no reject rate excuses: of an unclear task, or with the id of another.
    """

    files: list[Path]
    data_sets: list[DataSetPlan]
    fatal: list[BadRow]

    def in_order(self, rows: Iterable[BadRow]) -> list[BadRow]:
        """Bad rows in the order of the files and lines."""
        return sorted(rows, key=lambda row: (self.files.index(row.place.file), row.place.line))


def make_plan(
    files: Sequence[str | Path],
    out: Path,
    *,
    split: str,
    tasks: Sequence[str | None],
    shard_bytes: int,
    where: RowFilter | None = None,
    progress: bool = False,
) -> PackPlan:
    """Scan the files and plan their data sets; arguments as of :func:`voxtral_dist.packing.pack`.

    Raises:
        UserError: no such file, a file or a filter without rows, a split that cannot be part of a file name.
    """
    if not re.fullmatch(r"[A-Za-z0-9_]+", split):
        raise UserError(f"split {split!r} becomes part of file names; use letters, digits and _")
    members: dict[str, list[ScannedRow | BadRow]] = {name: [] for name in TASKS}
    fatal: list[BadRow] = []
    duplicate, where = DuplicateFinder(), where or RowFilter()
    paths = [Path(path) for path in files]
    for path, task_name in zip(paths, tasks, strict=True):
        for row in _routed(path, task_name, where, progress):
            if isinstance(row, ScannedRow) and (reason := duplicate(row)):
                fatal.append(BadRow(row.place, row.id, row.keys, reason, None))
            elif row.task is None:
                fatal.append(row)
            else:
                members[row.task].append(row)
    _tell_left_out(where, progress)
    data_sets = [
        _plan_data_set(out, name, split, rows, shard_bytes) for name, rows in members.items() if rows
    ]
    return PackPlan(paths, data_sets, fatal)


def _tell_left_out(where: RowFilter, progress: bool) -> None:
    if where.seen and where.left_out == where.seen:
        raise UserError(
            f"{where.flag} {where.text!r} leaves none of the {where.seen:,} rows; check its values against the files"
        )
    if where.text and progress:
        print(f"left out by {where.flag}: {where.left_out:,} of {where.seen:,} rows", flush=True)


def _routed(path: Path, task_name: str | None, where: RowFilter, progress: bool) -> list[ScannedRow | BadRow]:
    """The rows of a file that take part; a line that is no object belongs to the file's task if it has only one."""
    seen = where.seen
    scanned = scan(path, task_name, where)
    rows = list(tqdm(scanned, desc=f"scan {path.name}", unit="row", disable=not progress))
    if not rows and where.seen == seen:
        raise UserError(f"{path}: has no rows; remove it from the list of files")
    found = {row.task for row in rows if isinstance(row, ScannedRow)}
    only = found.pop() if len(found) == 1 else None
    return [
        replace(row, task=only) if isinstance(row, BadRow) and row.task is None and not row.keys else row
        for row in rows
    ]


def _plan_data_set(
    out: Path, task: str, split: str, members: Sequence[ScannedRow | BadRow], shard_bytes: int
) -> DataSetPlan:
    """Shuffle the good rows and cut them into shards of equally many rows.

    Equally many rows, not bytes: mending one audio file then touches one shard and not all behind it.
    """
    folder = out / task / split
    good = [(ordinal, row) for ordinal, row in enumerate(members) if isinstance(row, ScannedRow)]
    order = _shuffled(task, [ordinal for ordinal, _ in good])
    total = sum(row.estimate for _, row in good)
    n_shards = min(len(good), max(1, round(total / shard_bytes)))
    edges = [len(good) * number // n_shards for number in range(n_shards + 1)] if n_shards else [0]
    shards = [
        _plan_shard(folder, shard_stem(task, split, number), [good[at] for at in order[start:end]])
        for number, (start, end) in enumerate(pairwise(edges))
    ]
    rejects = [row for row in members if isinstance(row, BadRow)]
    return DataSetPlan(folder, task, split, len(members), shards, rejects)


def _plan_shard(folder: Path, stem: str, rows: list[tuple[int, ScannedRow]]) -> ShardPlan:
    digest = hashlib.sha256(f"{BUILDER} {MARKER} {stem}".encode())
    for ordinal, row in rows:
        digest.update(ordinal.to_bytes(8, "little") + row.digest)
    return ShardPlan(folder, stem, rows, digest.hexdigest())


def _shuffled(task: str, ordinals: Sequence[int]) -> NDArray[np.int64]:
    """Positions of ``ordinals`` in an order that depends on nothing but them: argsort of splitmix64."""
    seed = int.from_bytes(hashlib.sha256(f"{BUILDER} {task}".encode()).digest()[:8], "little")
    z = np.array(ordinals, np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(z ^ (z >> np.uint64(31)), kind="stable")
