"""Cut a rank's share of a step into micro-batches that fit its memory, padded or packed, longest examples first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from voxtral_dist.plan import Int64

OVERHEAD = {"cpu": 100, "cuda": 4000}
"""Fixed cost of a micro-batch in positions, by type of device; it decides no correctness.

On a CPU as ``tools/bench_data.py balance`` measured it. On a GPU a pass through all layers takes as long as starting
its kernels does, however few positions there are: on an H200 a step of Mini with 13 padded micro-batches took 3.8 s,
one of the same examples with 3 packed ones 1.4 s (``tools/bench_train_step.py``), which makes 7,500 positions, or fewer
where a faster processor starts the kernels.
"""


@dataclass(frozen=True)
class Caps:
    """Limits of one micro-batch. One example alone may exceed ``tokens``, else it could not be computed.

    Audio needs no limit of its own: a chunk takes its share of the positions.

    Attributes:
        rows: most examples in the padded form.
        tokens: most positions: rows x longest row in the padded form, the sum of the lengths in the packed form.
        task_rows: most examples of a task, by task index.
        packed: the form of the micro-batches.
        overhead: what a padded micro-batch costs whatever is in it, in positions.
    """

    rows: int
    tokens: int
    task_rows: Mapping[int, int] = field(default_factory=dict)
    packed: bool = False
    overhead: int = OVERHEAD["cpu"]

    def halved(self) -> Caps:
        """Caps of micro-batches of half the size."""
        return replace(self, rows=max(1, self.rows // 2), tokens=max(1, self.tokens // 2))


def cut(tasks: Int64, lengths: Int64, caps: Caps) -> list[Int64]:
    """Group examples into micro-batches, longest examples first.

    Packed: each example goes into the first micro-batch that takes it. Padded: neighbours in length go together, and
    the padded positions and the overhead of each micro-batch cost least in sum (exact, by dynamic programming).

    Args:
        tasks: int64 [n], task index of each example.
        lengths: int64 [n], positions of each example.
        caps: limits of a micro-batch.

    Returns:
        Indices into the arguments, one array per micro-batch; every example is in exactly one of them.
    """
    order = np.lexsort((np.arange(len(lengths)), -lengths))
    sizes, kinds = lengths[order].tolist(), tasks[order].tolist()
    groups = _first_fit(sizes, kinds, caps) if caps.packed else _cheapest_runs(sizes, kinds, caps)
    return [order[np.array(group, np.int64)] for group in groups]


def _first_fit(sizes: Sequence[int], kinds: Sequence[int], caps: Caps) -> list[list[int]]:
    """Places in ``sizes`` by packed micro-batch."""
    bins: list[tuple[list[int], Counter[int]]] = []
    room: list[int] = []
    for place, (size, kind) in enumerate(zip(sizes, kinds, strict=True)):
        most = caps.task_rows.get(kind, len(sizes))
        number = next((n for n, b in enumerate(bins) if size <= room[n] and b[1][kind] < most), len(bins))
        if number == len(bins):
            bins.append(([], Counter()))
            room.append(caps.tokens)
        bins[number][0].append(place)
        bins[number][1][kind] += 1
        room[number] -= size
    return [members for members, _ in bins]


def _cheapest_runs(sizes: Sequence[int], kinds: Sequence[int], caps: Caps) -> list[list[int]]:
    """Places in ``sizes``, which falls, by padded micro-batch: the cheapest way to cut it into runs."""
    best, start_of = [0.0], [0]
    for end in range(1, len(sizes) + 1):
        cheapest, per_task = (float("inf"), end - 1), Counter[int]()
        for start in range(end - 1, max(-1, end - 1 - caps.rows), -1):
            rows, kind = end - start, kinds[start]
            per_task[kind] += 1
            over = rows * sizes[start] > caps.tokens or per_task[kind] > caps.task_rows.get(kind, rows)
            if over and rows > 1:
                break
            cheapest = min(cheapest, (best[start] + rows * sizes[start] + caps.overhead, start))
        best.append(cheapest[0])
        start_of.append(cheapest[1])
    groups, end = [], len(sizes)
    while end:
        groups.append(list(range(start_of[end], end)))
        end = start_of[end]
    return groups[::-1]
