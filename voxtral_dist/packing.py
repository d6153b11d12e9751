"""JSONL and audio files to finished data sets: ``OUT/<task>/<split>/`` with shards and a manifest.

Three phases, each of which any process can do again without harm:

    plan      what goes into which shard: a pure function of the input (:mod:`voxtral_dist.pack_plan`)
    build     write shards i, i + n, ... of the plan, several at a time; one with a valid commit marker is
              not built again
    finalize  with all markers there, account for every row, then publish the manifests

Processes that share the work need no word with each other, only the folder: they compute the same plan, and
come to the same verdict from the same markers. This module starts fast: no torch, no transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from voxtral_dist import atomic
from voxtral_dist.audio_file import SAMPLE_RATE, AudioError, to_flac
from voxtral_dist.errors import UserError
from voxtral_dist.jsonl import BadRow, ScannedRow, audio_file, audio_reason, file_stat, load_row, scan
from voxtral_dist.jsonl_check import FileReport, check
from voxtral_dist.pack_plan import SHARD_BYTES, DataSetPlan, PackPlan, ShardPlan, make_plan
from voxtral_dist.row_filter import RowFilter
from voxtral_dist.shard_format import Example, example_key, make_manifest, write_shard
from voxtral_dist.shards import MANIFEST, REJECTS
from voxtral_dist.workers import Tick, run_jobs

__all__ = ["BadRow", "FileReport", "ScannedRow", "check", "pack", "scan"]

Marker = dict[str, Any]


def pack(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    split: str = "train",
    tasks: Sequence[str | None] | None = None,
    shard_bytes: int = SHARD_BYTES,
    where: RowFilter | None = None,
    slice_: tuple[int, int] | None = (0, 1),
    finalize: bool = True,
    wait: bool = False,
    max_reject_rate: float = 0.0,
    workers: int = 1,
    progress: bool = False,
) -> list[Path]:
    """Pack JSONL files into one data set per task; what is finished and unchanged is left alone.

    Args:
        files: JSONL files; a file may mix tasks, the rows of a task form one data set over all files.
        out: data sets go to ``out/<task>/<split>/``.
        split: name of the split, letters, digits and ``_``.
        tasks: task of each file, None for one told by its rows' keys.
        shard_bytes: aimed size of a shard.
        where: which rows take part, None: all. A task that has none left has no data set.
        slice_: (i, n) builds shards i, i + n, ... of the plan; None builds nothing.
        finalize: publish the manifests; needs the shards of all slices.
        wait: wait for the shards of the other slices and let slice 0 publish; else a missing one is an error.
        max_reject_rate: share of bad rows, 0 to 1, up to which a data set is published without them.
        workers: processes that build shards on this machine; the bytes do not depend on it.
        progress: show a progress bar.

    Returns:
        The data sets' folders in the order of :data:`voxtral_dist.tasks.TASKS`.

    Raises:
        UserError: wrong input; too many bad rows (``rejects.jsonl`` lists them, no manifest is written); a
            row of an unclear task, or with an id that occurs twice; missing shards.
        VoxtralDistError: a file cannot be read or written, a worker died; names the row at hand.
    """
    plan = make_plan(
        files,
        Path(out),
        split=split,
        tasks=tasks or [None] * len(files),
        shard_bytes=shard_bytes,
        where=where,
        progress=progress,
    )
    _spare_foreign(plan)
    _judge(plan, {data_set.task: data_set.rejects for data_set in plan.data_sets}, max_reject_rate)
    if slice_ is not None:
        _build_slice(plan, slice_, workers, progress)
    if finalize:
        markers = _collect(plan, wait)
        rejects = {d.task: plan.in_order([*d.rejects, *_late_rejects(d, markers)]) for d in plan.data_sets}
        _judge(plan, rejects, max_reject_rate)
        publisher = not wait or slice_ is None or slice_[0] == 0
        for data_set in plan.data_sets:
            _publish(data_set, markers, rejects[data_set.task], publisher)
    return [data_set.folder for data_set in plan.data_sets]


def _spare_foreign(plan: PackPlan) -> None:
    """Refuse a folder whose tars are someone else's."""
    for data_set in plan.data_sets:
        path = data_set.folder / MANIFEST
        if (_published(path) or {}).get("foreign"):
            raise UserError(
                f"{path}: these tars were indexed, not built, here; give another --out or --split"
            )


def _build_slice(plan: PackPlan, slice_: tuple[int, int], workers: int, progress: bool) -> None:
    shards = [shard for data_set in plan.data_sets for shard in data_set.shards][slice_[0] :: slice_[1]]
    total = sum(len(shard.rows) for shard in shards)
    run_jobs(_build_shard, shards, workers=workers, desc="pack", unit="row", total=total, progress=progress)


def _build_shard(shard: ShardPlan, tick: Tick) -> None:
    """Build one shard. The old manifest goes before it changes: a manifest never describes a mixture."""
    if not _valid_marker(shard):
        shard.folder.mkdir(parents=True, exist_ok=True)
        atomic.sweep(shard.folder)
    if _valid_marker(shard):  # asked again: another builder of the same data may have come first
        tick(shard.stem, len(shard.rows))
        return
    (shard.folder / MANIFEST).unlink(missing_ok=True)
    rejects: list[dict[str, Any]] = []
    write_shard(shard.folder, shard.stem, _examples(shard, rejects, tick), build=shard.build, rejects=rejects)


def _examples(shard: ShardPlan, rejects: list[dict[str, Any]], tick: Tick) -> Iterator[Example]:
    """The shard's examples; a row whose audio is unusable goes to ``rejects`` instead."""
    for ordinal, scanned in shard.rows:
        tick(scanned.place.where)
        row, key = load_row(scanned), example_key(scanned.task, ordinal)
        if scanned.audio is None:
            yield key, {**row, "duration": 0.0}, None, 0
            continue
        path = audio_file(scanned, row)
        before = file_stat(path)
        try:
            audio, n_samples = to_flac(path)
        except (AudioError, FileNotFoundError, PermissionError) as error:
            reason = audio_reason(row, error)
            rejects.append({"ordinal": ordinal, "reason": reason, "audio": before and list(before)})
            continue
        yield key, {**row, "duration": n_samples / SAMPLE_RATE}, audio, n_samples


def _valid_marker(shard: ShardPlan) -> Marker | None:
    """The shard's marker if it is of this plan, its files are there and its rejects' audio is as it was."""
    paths = [shard.folder / f"{shard.stem}.{suffix}" for suffix in ("json", "tar", "idx")]
    try:
        marker: Marker = json.loads(paths[0].read_bytes())
        sizes = [path.stat().st_size for path in paths[1:]]
        whole = marker["build"] == shard.build and sizes == [marker["bytes"], marker["index_bytes"]]
        return marker if whole and all(_still_bad(shard, reject) for reject in marker["rejects"]) else None
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None


def _still_bad(shard: ShardPlan, reject: dict[str, Any]) -> bool:
    scanned = next(row for ordinal, row in shard.rows if ordinal == reject["ordinal"])
    now = file_stat(audio_file(scanned, load_row(scanned)))
    return reject["audio"] == (now and list(now))


def _collect(plan: PackPlan, wait: bool) -> dict[str, Marker]:
    """The markers of all shards, by stem."""
    shards = [shard for data_set in plan.data_sets for shard in data_set.shards]
    markers: dict[str, Marker] = {}

    def missing() -> list[str]:
        for shard in shards:
            if shard.stem not in markers and (marker := _valid_marker(shard)):
                markers[shard.stem] = marker
        return [str(shard.folder / f"{shard.stem}.json") for shard in shards if shard.stem not in markers]

    if wait:
        atomic.wait_for(missing)
    elif names := missing():
        raise UserError(
            f"{', '.join(names[:3])}{' ...' if names[3:] else ''}: {len(names)} of {len(shards)} shards are "
            "not built; run all slices (--slice 0/N to N-1/N) with the same input before --finalize"
        )
    return markers


def _late_rejects(data_set: DataSetPlan, markers: dict[str, Marker]) -> Iterator[BadRow]:
    """The rows whose audio turned out to be unusable when they were packed."""
    for shard in data_set.shards:
        rows = dict(shard.rows) if markers[shard.stem]["rejects"] else {}
        for reject in markers[shard.stem]["rejects"]:
            row = rows[reject["ordinal"]]
            yield BadRow(row.place, row.id, row.keys, reject["reason"], row.task)


def _judge(plan: PackPlan, rejects: dict[str, list[BadRow]], max_reject_rate: float) -> None:
    """Raise for the first bad row in file order, unless the bad rows of every data set are few enough."""
    over = [
        data_set
        for data_set in plan.data_sets
        if len(rejects[data_set.task]) > max_reject_rate * data_set.rows_in
        or len(rejects[data_set.task]) == data_set.rows_in
    ]
    for data_set in over:
        _write_rejects(data_set, rejects[data_set.task])
    bad = plan.in_order([*plan.fatal, *(row for data_set in over for row in rejects[data_set.task])])
    if not bad:
        return
    message = f"{bad[0].place.where}: {bad[0].reason}"
    for data_set in over:
        n_bad = len(rejects[data_set.task])
        message += (
            f"; {n_bad} of {data_set.rows_in} {data_set.task} rows are bad and --max_reject_rate is "
            f"{max_reject_rate:g}: no manifest is written; mend all rows of {data_set.folder / REJECTS}"
        )
    raise UserError(message)


def _write_rejects(data_set: DataSetPlan, rejects: Sequence[BadRow]) -> None:
    path = data_set.folder / REJECTS
    if not rejects:
        path.unlink(missing_ok=True)
        return
    data_set.folder.mkdir(parents=True, exist_ok=True)
    rows = [{"source": row.place.source, "id": row.id, "reason": row.reason} for row in rejects]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic.write_bytes(path, text.encode("utf-8", "backslashreplace"), private=True)


def _publish(
    data_set: DataSetPlan, markers: dict[str, Marker], rejects: list[BadRow], publisher: bool
) -> None:
    """Write the manifest, last of all; who is not the publisher waits for it."""
    path = data_set.folder / MANIFEST
    own = [markers[shard.stem] for shard in data_set.shards]
    manifest = make_manifest(data_set.task, data_set.split, own, len(rejects))
    if manifest["examples"] + len(rejects) != data_set.rows_in:
        raise RuntimeError(
            f"{data_set.folder}: {data_set.rows_in} rows went in, {manifest['examples']} are stored"
        )
    if not publisher:
        atomic.wait_for(lambda: [] if _published(path) == manifest else [str(path)])
        return
    _write_rejects(data_set, rejects)
    if _published(path) != manifest:
        _remove_strangers(data_set)
        atomic.write_json(path, manifest)


def _published(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _remove_strangers(data_set: DataSetPlan) -> None:
    """Remove what an earlier, larger build and dead processes left, so that ``*.tar`` is the data set."""
    atomic.sweep(data_set.folder)
    stems = {shard.stem for shard in data_set.shards}
    pattern = re.compile(re.escape(f"{data_set.task}-{data_set.split}-") + r"\d{6}(?=\.)")
    for path in data_set.folder.iterdir():
        match = pattern.match(path.name)
        if match and match.group() not in stems:
            path.unlink(missing_ok=True)
