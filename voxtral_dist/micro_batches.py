"""Cut a rank's share of a step into micro-batches that fit its memory: rows sorted by length, padded to the longest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from voxtral_dist.plan import Int64


@dataclass(frozen=True)
class Caps:
    """Limits of one micro-batch.

    Attributes:
        rows: most examples.
        tokens: most positions with padding, rows x longest row; one example alone may exceed it.
        task_rows: most examples of a task, by task index.
    """

    rows: int
    tokens: int
    task_rows: Mapping[int, int] = field(default_factory=dict)


def cut(tasks: Int64, lengths: Int64, caps: Caps) -> list[Int64]:
    """Group examples into micro-batches, longest first.

    Args:
        tasks: int64 [n], task index of each example.
        lengths: int64 [n], positions of each example.
        caps: limits of a micro-batch.

    Returns:
        Indices into the arguments, one array per micro-batch; every example is in exactly one of them.
    """
    batches: list[list[int]] = []
    counts: Counter[int] = Counter()
    longest = 0
    for index in np.lexsort((np.arange(len(lengths)), -lengths)).tolist():
        task = int(tasks[index])
        full = batches and (
            len(batches[-1]) == caps.rows
            or (len(batches[-1]) + 1) * longest > caps.tokens
            or counts[task] == caps.task_rows.get(task, caps.rows)
        )
        if full or not batches:
            batches.append([])
            counts.clear()
            longest = int(lengths[index])
        batches[-1].append(index)
        counts[task] += 1
    return [np.array(batch, np.int64) for batch in batches]
