"""What a data set holds, from its manifest, markers and indexes alone: no tar is opened."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from voxtral_dist.audio_file import SAMPLE_RATE
from voxtral_dist.errors import UserError
from voxtral_dist.shards import MANIFEST, ShardSet, read_manifest

AUDIO_EDGES_S = (0, 1, 2, 5, 10, 15, 20, 30, 60, 120, 600)
TEXT_EDGES_B = (0, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_SHOWN = 8
_BAR_CHARS = 40


@dataclass(frozen=True)
class DataStats:
    """One data set.

    Attributes:
        folder, task, split: which.
        rows, rejected: examples stored and rows left out.
        shards: number of tars.
        bytes: size of the tars.
        seconds: audio of all examples.
        languages, domains: examples of each, "" where the row has none.
        unit: what ``lengths`` counts: ``s`` of audio, or ``B`` of JSON for text tasks.
        lengths: lower edge, upper edge (None: open) and number of examples of each class that is not empty.
    """

    folder: Path
    task: str
    split: str
    rows: int
    rejected: int
    shards: int
    bytes: int
    seconds: float
    languages: Counter[str]
    domains: Counter[str]
    unit: str
    lengths: list[tuple[int, int | None, int]]


def collect(folder: str | Path) -> DataStats:
    """Read the numbers of a finished data set.

    Raises:
        UserError: it is none, or one of its small files is damaged.
    """
    shards = ShardSet.open(folder)
    languages: Counter[str] = Counter()
    domains: Counter[str] = Counter()
    for name in shards.shard_names:
        path = shards.folder / Path(name).with_suffix(".json")
        try:
            marker = json.loads(path.read_bytes())
            languages.update(marker["languages"])
            domains.update(marker["domains"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: marker missing or damaged ({error!r}); run build_shards again"
            ) from None
    heard = shards.audio_seconds > 0
    sizes = shards.n_samples / SAMPLE_RATE if heard else shards.column("json_size")
    return DataStats(
        folder=shards.folder,
        task=shards.task,
        split=shards.split,
        rows=len(shards),
        rejected=int(read_manifest(shards.folder / MANIFEST).get("rejected", 0)),
        shards=len(shards.shard_names),
        bytes=shards.bytes,
        seconds=shards.audio_seconds,
        languages=languages,
        domains=domains,
        unit="s" if heard else "B",
        lengths=_histogram(sizes, AUDIO_EDGES_S if heard else TEXT_EDGES_B),
    )


def _histogram(sizes: np.ndarray, edges: Sequence[int]) -> list[tuple[int, int | None, int]]:
    """Examples in each class [edge, next edge), the last one open; empty ones left out."""
    counts = np.bincount(np.searchsorted(edges, sizes, side="right") - 1, minlength=len(edges))
    return [
        (low, high, int(n))
        for (low, high), n in zip(pairwise((*edges, None)), counts, strict=True)
        if n and low is not None
    ]


def table(stats: Sequence[DataStats]) -> str:
    """One line for each data set."""
    width = max(8, *(len(str(entry.folder)) for entry in stats))
    lines = [
        f"{'data set':<{width}} {'rows':>10} {'rejected':>9} {'shards':>7} {'hours':>9} {'MiB':>10}  languages"
    ]
    for entry in stats:
        hours, mib = entry.seconds / 3600, entry.bytes / (1 << 20)
        lines.append(
            f"{entry.folder!s:<{width}} {entry.rows:>10} {entry.rejected:>9} {entry.shards:>7} {hours:>9.2f} "
            f"{mib:>10.1f}  {_shares(entry.languages)}"
        )
    return "\n".join(lines)


def details(entry: DataStats) -> str:
    """Languages, domains and a histogram of the lengths of one data set."""
    what = "seconds of audio" if entry.unit == "s" else "bytes of JSON"
    lines = [
        f"{entry.folder}",
        f"  languages: {_shares(entry.languages)}",
        f"  domains:   {_shares(entry.domains)}",
        f"  {what}:",
    ]
    most = max((n for _, _, n in entry.lengths), default=1)
    for low, high, n in entry.lengths:
        label = f"{low}-{high} {entry.unit}" if high else f"from {low} {entry.unit}"
        lines.append(f"  {label:>16} {n:>10} {'#' * max(1, round(_BAR_CHARS * n / most))}")
    return "\n".join(lines)


def _shares(counts: Counter[str]) -> str:
    """The most frequent values with their counts."""
    shown = [
        f"{value or '-'} {n}" for value, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]
    more = [f"and {len(shown) - _SHOWN} more"] if len(shown) > _SHOWN else []
    return ", ".join(shown[:_SHOWN] + more) or "-"
