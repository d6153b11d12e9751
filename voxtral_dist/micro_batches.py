"""Cut a rank's share of a step into micro-batches that fit its memory, padded or packed, longest examples first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from voxtral_dist.plan import Int64


@dataclass(frozen=True)
class Caps:
    """Limits of one micro-batch. One example alone may exceed ``tokens``, else it could not be computed.

    Audio needs no limit of its own: a chunk takes its share of the positions.

    Attributes:
        rows: most examples in the padded form.
        tokens: most positions: rows x longest row in the padded form, the sum of the lengths in the packed form.
        task_rows: most examples of a task, by task index.
        packed: the form of the micro-batches.
    """

    rows: int
    tokens: int
    task_rows: Mapping[int, int] = field(default_factory=dict)
    packed: bool = False


class _Bin:
    """A micro-batch that is being filled."""

    def __init__(self) -> None:
        self.members: list[int] = []
        self.longest = self.tokens = 0
        self.per_task: Counter[int] = Counter()

    def takes(self, task: int, length: int, caps: Caps) -> bool:
        """Whether one more example keeps the caps."""
        if not self.members:
            return True
        rows = len(self.members) + 1
        tokens = self.tokens + length if caps.packed else rows * max(self.longest, length)
        return (
            tokens <= caps.tokens
            and (caps.packed or rows <= caps.rows)
            and self.per_task[task] < caps.task_rows.get(task, rows)
        )

    def add(self, index: int, task: int, length: int) -> None:
        """Take an example."""
        self.members.append(index)
        self.longest = max(self.longest, length)
        self.tokens += length
        self.per_task[task] += 1


def cut(tasks: Int64, lengths: Int64, caps: Caps) -> list[Int64]:
    """Group examples into micro-batches: longest first, each into the first one that takes it.

    Args:
        tasks: int64 [n], task index of each example.
        lengths: int64 [n], positions of each example.
        caps: limits of a micro-batch.

    Returns:
        Indices into the arguments, one array per micro-batch; every example is in exactly one of them.
    """
    bins: list[_Bin] = []
    for index in np.lexsort((np.arange(len(lengths)), -lengths)).tolist():
        example = int(tasks[index]), int(lengths[index])
        target = next((b for b in bins if b.takes(*example, caps)), None)
        if target is None:
            target = _Bin()
            bins.append(target)
        target.add(index, *example)
    return [np.array(b.members, np.int64) for b in bins]
