"""Foreign WebDataset tars made a data set where they lie: index, marker and manifest beside them, tars untouched.

An example is the adjacent members ``KEY.json`` and, for an audio task, ``KEY.flac|wav|mp3|ogg|opus``, in either order;
other members of the key are left aside. What would be dangerous or ambiguous for a reader is refused: pickled members,
compressed tars, a key that comes twice. Nothing of a tar is executed, unpickled or extracted.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voxtral_dist import atomic
from voxtral_dist.errors import UserError
from voxtral_dist.foreign_tar import keys, read_example
from voxtral_dist.shard_format import (
    INDEX_COLUMNS,
    SCHEMA,
    Contents,
    file_sha256,
    make_manifest,
    write_sidecars,
)
from voxtral_dist.shards import FOREIGN_TAR_NAME, MANIFEST, REJECTS, ShardSet
from voxtral_dist.tasks import get_task
from voxtral_dist.workers import Tick, run_jobs

INDEXER = "voxtral-dist/foreign/1"
"""Part of the build hash of a foreign tar. Changing what index or marker say of the same tar must change it."""

FOREIGN_COLUMNS = {**INDEX_COLUMNS, "json_header": np.uint32, "audio_header": np.uint32, "id_hash": np.uint64}
"""More than one header block may stand before a content here; the hash of the id finds one that comes twice."""


@dataclass(frozen=True)
class _Job:
    tar: Path
    task: str
    build: str


def index_tars(
    folder: str | Path,
    task: str,
    *,
    split: str = "train",
    max_reject_rate: float = 0.0,
    workers: int = 1,
    progress: bool = False,
) -> Path:
    """Make the tars of a folder a data set; tars that are indexed and unchanged are not read again.

    Args:
        folder: holds ``*.tar``; index, marker and manifest are written into it.
        task: name of the task of all rows.
        split: name of the split, letters, digits and ``_``.
        max_reject_rate: share of bad rows, 0 to 1, up to which the data set is published without them.
        workers: processes that read tars.
        progress: show a progress bar over the bytes.

    Returns:
        The folder.

    Raises:
        UserError: no tars; files of the same names that are not ours; a tar that is refused (pickled members,
            compression, damage, an ambiguous key); too many bad rows (``rejects.jsonl`` lists them).
    """
    folder, task = Path(folder), get_task(task, "--task").name
    if not re.fullmatch(r"[A-Za-z0-9_]+", split):
        raise UserError(f"split {split!r}: use letters, digits and _")
    tars = _tars(folder)
    (folder / MANIFEST).unlink(missing_ok=True)
    atomic.sweep(folder)
    jobs = [_Job(tar, task, _build_hash(tar, task)) for tar in tars]
    total = sum(tar.stat().st_size for tar in tars)
    markers = run_jobs(_index, jobs, workers=workers, desc="index", unit="B", total=total, progress=progress)
    rejects = [reject for marker in markers for reject in marker["rejects"]]
    _judge(folder, rejects, sum(marker["examples"] for marker in markers), max_reject_rate)
    manifest = {**make_manifest(task, split, markers, len(rejects)), "foreign": True}
    _refuse_equal_ids(ShardSet(folder, manifest))
    atomic.write_json(folder / MANIFEST, manifest)
    return folder


def _tars(folder: Path) -> list[Path]:
    """The tars of the folder, once nothing of another's would be overwritten."""
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is no folder; name one that holds WebDataset tars")
    tars = sorted(path for path in folder.iterdir() if path.name.endswith(".tar") and path.is_file())
    if not tars:
        packed = [path.name for path in folder.iterdir() if re.search(r"\.(tar\.\w+|tgz)$", path.name)]
        raise UserError(f"{folder}: no *.tar in it" + (f"; decompress {packed[0]} first" if packed else ""))
    for tar in tars:
        if not FOREIGN_TAR_NAME.fullmatch(tar.name):
            raise UserError(f"{str(tar)!r}: a name that readers take for a URL or overlook; rename it")
    for path in (folder / MANIFEST, *(tar.with_suffix(".json") for tar in tars)):
        found = _json(path) if path.exists() else {"schema": SCHEMA}
        if found.get("schema") != SCHEMA:
            raise UserError(f"{path}: exists and is not of this program; move it away, its name is needed")
        if path.name == MANIFEST and path.exists() and not found.get("foreign"):
            raise UserError(
                f"{folder}: build_shards built this data set; check it with tools/verify_shards.py"
            )
    return tars


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _build_hash(tar: Path, task: str) -> str:
    found = tar.stat()
    return hashlib.sha256(f"{INDEXER} {task} {found.st_size} {found.st_mtime_ns}".encode()).hexdigest()


def _index(job: _Job, tick: Tick) -> dict[str, Any]:
    """Index and marker of one tar; returns the marker."""
    size = job.tar.stat().st_size
    marker = _json(job.tar.with_suffix(".json"))
    index = job.tar.with_suffix(".idx")
    if marker.get("build") == job.build and index.is_file() and index.stat().st_size == marker["index_bytes"]:
        tick(job.tar.name, size)
        return marker
    job.tar.with_suffix(".json").unlink(missing_ok=True)
    entries: list[dict[str, int]] = []
    rejects: list[dict[str, str]] = []
    contents = Contents()
    with job.tar.open("rb") as file:
        for key, parts, span in keys(job.tar, file, size, job.task):
            tick(f"{job.tar}: {key}", span)
            try:
                entry, row = read_example(file, job.tar, job.task, key, parts)
            except ValueError as error:
                rejects.append({"source": f"{job.tar.name}:{key}", "id": key, "reason": str(error)})
                continue
            entries.append(entry)
            contents.add(key, row, entry["n_samples"])
        file.seek(0)
        sha256 = file_sha256(file)
    if _build_hash(job.tar, job.task) != job.build:
        raise UserError(f"{job.tar}: changed while it was indexed; start again when it is final")
    about = {"name": job.tar.name, "bytes": size, "sha256": sha256, "rejects": rejects, "build": job.build}
    return write_sidecars(job.tar.parent, entries, FOREIGN_COLUMNS, {**about, **contents.fields()})


def _judge(folder: Path, rejects: list[dict[str, str]], stored: int, max_reject_rate: float) -> None:
    """List the bad rows; raise for the first of them unless they are few enough."""
    path, n_rows = folder / REJECTS, stored + len(rejects)
    path.unlink(missing_ok=True)
    if rejects:
        text = "".join(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects)
        atomic.write_bytes(path, text.encode("utf-8", "backslashreplace"), private=True)
    if not stored and not rejects:
        raise UserError(f"{folder}: its tars have no KEY.json members, so there are no examples")
    if len(rejects) > max_reject_rate * n_rows or not stored:
        raise UserError(
            f"{folder}/{rejects[0]['source']}: {rejects[0]['reason']}; {len(rejects)} of {n_rows} rows are bad and "
            f"--max_reject_rate is {max_reject_rate:g}: no manifest is written; all are in {path}"
        )


def _refuse_equal_ids(shards: ShardSet) -> None:
    hashes = shards.column("id_hash")
    order = np.argsort(hashes, kind="stable")
    twice = np.flatnonzero(np.diff(hashes[order]) == 0)
    if len(twice):
        first, second = (shards.sample(int(order[twice[0] + step])) for step in (0, 1))
        raise UserError(
            f"{shards.folder}/{second.source}: id {second.id!r} is that of {first.source} too; "
            "give the rows of a data set different ids"
        )
