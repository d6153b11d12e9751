"""Whether a data set is what was written: every fault becomes one line that names the shard and the example.

Without ``deep`` only small files are read: manifest, markers, indexes, and the sizes of the tars. ``deep`` reads all
bytes: hashes, every tar header by header, the checksum of every member, every example decoded and parsed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from voxtral_dist.audio_file import SAMPLE_RATE
from voxtral_dist.errors import UserError
from voxtral_dist.shard_format import SCHEMA, file_sha256
from voxtral_dist.shard_reader import Reader
from voxtral_dist.shards import MANIFEST, REJECTS, check_size, read_manifest
from voxtral_dist.verify_tar import TarCheck
from voxtral_dist.workers import Tick, run_jobs

_MANIFEST_AND_MARKER = ("name", "examples", "bytes", "sha256", "index_bytes", "index_sha256")
_COUNTED = ("examples", "audio_seconds", "key_range", "languages", "domains")


@dataclass(frozen=True)
class _Job:
    folder: Path
    shard: Mapping[str, Any]
    task: str
    foreign: bool
    deep: bool


def find_data_sets(root: str | Path) -> list[Path]:
    """Every folder at or below ``root`` that is a data set or holds tars, sorted.

    Raises:
        UserError: there is none.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{str(root)!r} is no folder; name a data set or a folder of data sets")
    found = {path.parent for pattern in (MANIFEST, "*.tar") for path in root.rglob(pattern)}
    if not found:
        raise UserError(
            f"{root}: no data set in it: neither {MANIFEST} nor *.tar; build one with build_shards"
        )
    return sorted(found)


def verify(folder: str | Path, *, deep: bool = False, workers: int = 1, progress: bool = False) -> list[str]:
    """The faults of one data set, one line each, in the order of its shards; none when it is whole.

    Args:
        folder: the data set.
        deep: read every byte and decode every example.
        workers: processes that read shards.
        progress: show a progress bar over the bytes of the tars.
    """
    folder = Path(folder)
    try:
        manifest = read_manifest(folder / MANIFEST)
    except UserError as error:
        return [str(error)]
    shards, foreign = manifest["shards"], bool(manifest.get("foreign"))
    jobs = [_Job(folder, shard, str(manifest["task"]), foreign, deep) for shard in shards]
    total = sum(int(shard["bytes"]) for shard in shards)
    found = run_jobs(
        _shard, jobs, workers=workers, desc=f"verify {folder}", unit="B", total=total, progress=progress
    )
    return [*_whole(folder, manifest), *(fault for faults in found for fault in faults)]


def _whole(folder: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """Faults of the folder as a whole: totals and files that do not belong."""
    shards = manifest["shards"]
    if manifest.get("examples") != sum(shard["examples"] for shard in shards):
        yield f"{folder / MANIFEST}: {manifest.get('examples')} examples, its shards have another sum"
    names = {shard["name"] for shard in shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in names:
            yield f"{path}: is not in the manifest, but reading *.tar would read it"
    path = folder / REJECTS
    lines = len(path.read_bytes().splitlines()) if path.exists() else 0
    if lines != manifest.get("rejected"):
        yield f"{path}: {lines} lines, the manifest says {manifest.get('rejected')} rows were left out"


def _shard(job: _Job, tick: Tick) -> list[str]:
    """The faults of one shard."""
    tar = job.folder / job.shard["name"]
    if not job.deep:
        tick(str(tar), int(job.shard["bytes"]))
    faults = list(_sizes(tar, job.shard))
    marker = _marker(tar, job.shard, faults)
    if not tar.is_file() or not tar.with_suffix(".idx").is_file():
        return faults
    try:
        reader = Reader(tar, job.shard["index_sha256"], job.task if job.foreign else "")
    except UserError as error:
        return [*faults, str(error), *(_hash(tar, job.shard) if job.deep else ())]
    if wrong := list(_index(tar, reader, job.shard, marker)):
        return [*faults, *wrong]
    if job.deep:
        check = TarCheck(tar, reader, job.shard, task=job.task, foreign=job.foreign, tick=tick)
        faults += check.faults(marker)
    return faults


def _hash(tar: Path, shard: Mapping[str, Any]) -> Iterator[str]:
    with tar.open("rb") as file:
        if file_sha256(file) != shard["sha256"]:
            yield f"{tar}: its SHA-256 is not the manifest's, and no index tells which example is damaged"


def _sizes(tar: Path, shard: Mapping[str, Any]) -> Iterator[str]:
    for path, size in ((tar, shard["bytes"]), (tar.with_suffix(".idx"), shard["index_bytes"])):
        try:
            check_size(path, size)
        except UserError as error:
            yield str(error)


def _marker(tar: Path, shard: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """The marker, {} for one that is missing or damaged."""
    path = tar.with_suffix(".json")
    try:
        marker: dict[str, Any] = json.loads(path.read_bytes())
        wrong = [name for name in _MANIFEST_AND_MARKER if marker[name] != shard[name]]
        wrong += ["schema"] if marker["schema"] != SCHEMA else []
        wrong += [name for name in _COUNTED if name not in marker]
    except (OSError, ValueError, KeyError, TypeError) as error:
        faults.append(f"{path}: marker missing or damaged ({error!r}); run build_shards again")
        return {}
    if wrong:
        faults.append(f"{path}: marker and manifest differ in {', '.join(wrong)}; run build_shards again")
        return {}
    return marker


def _index(tar: Path, reader: Reader, shard: Mapping[str, Any], marker: Mapping[str, Any]) -> Iterator[str]:
    """Faults of an index whose hash is right: it is then the writer's that is wrong."""
    path, columns = tar.with_suffix(".idx"), reader.columns
    if {len(values) for values in columns.values()} != {shard["examples"]}:
        yield f"{path}: its columns do not have one entry for each of {shard['examples']} examples"
        return
    if marker and int(columns["n_samples"].sum(dtype=np.int64)) / SAMPLE_RATE != marker["audio_seconds"]:
        yield f"{path}: its samples are not the {marker['audio_seconds']} s of audio of the marker"
