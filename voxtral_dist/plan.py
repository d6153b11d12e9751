"""The global plan: which example is drawn when, and which rank computes it. A pure function, its state one integer.

The draws of all tasks form one endless stream. Draw number k belongs to a task by an exact integer split of k
(:func:`split_draws`); a task's own draw number d is position ``d mod n`` of its epoch ``d // n``, and each epoch is a
permutation made by hashing (:class:`TaskStream`). **A step is the next N draws**, so its content depends on the data,
the weights, the seed and N, and never on the number of ranks, threads or restarts. Each step is cut into equal-cost
shares, one per rank (:func:`equal_cost_shares`). Example, N = 4, weights asr:tqa = 1:1, draws 8..11 = step 2:

    stream   ... | asr 4  tqa 4  asr 5  tqa 5 | ...      task draws 4 and 5 -> examples by the epoch's permutation
    shares         rank 0: asr 4, tqa 5   rank 1: tqa 4, asr 5
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from math import gcd

import numpy as np
import numpy.typing as npt

from voxtral_dist.errors import UserError

ALGORITHM = "global-plan/1"
"""Version of the order below; a change of any rule must change it, since runs resume by it."""

SHARD_BLOCK = 16
"""Shards whose examples are shuffled together: random reads stay within this many files per task."""

Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
_MASK = (1 << 64) - 1


def mix64(values: UInt64) -> UInt64:
    """The splitmix64 finaliser (Steele et al., OOPSLA 2014): the same values on every numpy and Python version."""
    with np.errstate(over="ignore"):
        x = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*parts: int) -> int:
    """One 64-bit hash of integers, order matters."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = mix64(state ^ mix64(np.array([part & _MASK], np.uint64)))
    return int(state[0])


def permute(ids: Int64, key: int) -> Int64:
    """``ids`` in the order of their keyed hashes."""
    return ids[np.argsort(mix64(ids.astype(np.uint64) ^ np.uint64(key)), kind="stable")]


def split_draws(count: int, weights: Sequence[int]) -> list[int]:
    """How many of the first ``count`` draws belong to each task.

    The largest weight first, each task takes what rounding to the nearest integer leaves of the draws not yet given:
    integers that sum to ``count`` exactly and never fall as it grows. For ever they stay within 1 of
    ``count * w / sum(w)`` for up to three tasks, 1.25 for four, ``1 + ln(tasks) / 2`` for more: a rounding error of
    1/2 per level shrinks by the share that is left. (Telescoping floors in the given order drift past 2.)
    """
    left, total, out = count, sum(weights), [0] * len(weights)
    for task in sorted(range(len(weights)), key=lambda task: -weights[task]):
        rest = (2 * left * (total - weights[task]) + total) // (2 * total) if total > weights[task] else 0
        out[task] = left - rest
        left, total = rest, total - weights[task]
    return out


class TaskStream:
    """The endless draws of one task: epochs, each a permutation of its accepted examples.

    Args:
        tag: stable number of the task, part of every hash.
        shard_sizes: examples per shard, before the length filter.
        accepted: bool [examples], which of them may be drawn; all by default.
    """

    def __init__(
        self, tag: int, shard_sizes: Sequence[int], accepted: npt.NDArray[np.bool_] | None = None
    ) -> None:
        total = int(np.sum(shard_sizes))
        accepted = np.ones(total, bool) if accepted is None else accepted
        starts = np.concatenate([[0], np.cumsum(shard_sizes)]).astype(np.int64)
        self.tag = tag
        self._ids = np.flatnonzero(accepted).astype(np.int64)
        self._edges = np.searchsorted(self._ids, starts)
        self._sizes = np.diff(self._edges)
        self._cached_epoch = lru_cache(maxsize=2)(self._epoch)
        self._cached_block = lru_cache(maxsize=4)(self._block)

    def __len__(self) -> int:
        return len(self._ids)

    def draws(self, seed: int, start: int, stop: int) -> Int64:
        """Example ids of this task's own draws ``start`` to ``stop`` (exclusive), int64 [stop - start]."""
        parts = []
        while start < stop:
            epoch, position = divmod(start, len(self))
            ends = self._cached_epoch(seed, epoch)[1]
            block = int(np.searchsorted(ends, position, side="right"))
            ids = self._cached_block(seed, epoch, block)
            offset = position - (int(ends[block - 1]) if block else 0)
            part = ids[offset : offset + stop - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _epoch(self, seed: int, epoch: int) -> tuple[Int64, Int64]:
        """Order of the shards in an epoch, and the position at which each block of shards ends."""
        order = permute(np.arange(len(self._sizes), dtype=np.int64), hash64(seed, self.tag, epoch, 1))
        return order, np.cumsum(np.add.reduceat(self._sizes[order], np.arange(0, len(order), SHARD_BLOCK)))

    def _block(self, seed: int, epoch: int, block: int) -> Int64:
        """Shuffled example ids of a block of shards."""
        shards = self._cached_epoch(seed, epoch)[0][block * SHARD_BLOCK : (block + 1) * SHARD_BLOCK]
        ids = np.concatenate([self._ids[self._edges[s] : self._edges[s + 1]] for s in shards])
        return permute(ids, hash64(seed, self.tag, epoch, 2, block))


@dataclass(frozen=True)
class Step:
    """Consecutive draws of the stream.

    Attributes:
        first_draw: index of the first one in the whole run.
        tasks: int64 [n], index of each draw's task among the plan's tasks.
        examples: int64 [n], the example's id within its task's data set.
    """

    first_draw: int
    tasks: Int64
    examples: Int64

    def __len__(self) -> int:
        return len(self.tasks)


@dataclass(frozen=True)
class GlobalPlan:
    """All steps of a run.

    Attributes:
        streams: one per task, in the order of the weights.
        weights: integer share of each task.
        seed: of the order.
        global_batch_size: N, draws per step.
        total_draws: where the run ends; the last step may be short.
    """

    streams: tuple[TaskStream, ...]
    weights: tuple[int, ...]
    seed: int
    global_batch_size: int
    total_draws: int

    @property
    def num_steps(self) -> int:
        """Optimizer steps in the run."""
        return -(-self.total_draws // self.global_batch_size)

    def draws_after(self, step: int) -> int:
        """Draws consumed once ``step`` steps are done."""
        return min(step * self.global_batch_size, self.total_draws)

    def step(self, index: int) -> Step:
        """The draws of step ``index`` (from 0), grouped by task."""
        start, stop = self.draws_after(index), self.draws_after(index + 1)
        tasks, examples = [], []
        edges = zip(split_draws(start, self.weights), split_draws(stop, self.weights), strict=True)
        for number, (stream, (first, last)) in enumerate(zip(self.streams, edges, strict=True)):
            ids = stream.draws(self.seed, first, last)
            examples.append(ids)
            tasks.append(np.full(len(ids), number, np.int64))
        return Step(start, np.concatenate(tasks), np.concatenate(examples))


@dataclass(frozen=True)
class CostModel:
    """Cost of an example in thousandths of one language-model token.

    The defaults are the FLOPs of Voxtral-Mini's LoRA step over the 12.84 GFLOP of a token (forward and backward of the
    frozen body, 4 x 3.21e9 parameters): 2.31 TFLOP of encoder per 30-s chunk, 0.86 MFLOP x T^2 of attention, and 1.61
    GFLOP of head per label position.
    """

    token: int = 1000
    chunk: int = 180_000
    squared_tokens_per_million: int = 67_000
    label: int = 125

    def cost(self, tokens: Int64, chunks: Int64, labels: Int64) -> Int64:
        """Integer cost of examples, all arrays int64 [n]: positions, audio chunks, label positions."""
        squared = self.squared_tokens_per_million * tokens * tokens // 1_000_000
        return self.token * tokens + self.chunk * chunks + squared + self.label * labels


def equal_cost_shares(step: Step, costs: Int64, world_size: int, seed: int) -> list[Int64]:
    """Cut a step into shares of nearly equal cost, one per rank.

    Longest processing time first: the dearest example left goes to the share that is cheapest so far; ties by (task,
    example). Which rank gets which share turns with the step, else rank 0 would always get the largest example.

    Args:
        step: the draws.
        costs: int64 [len(step)], integer cost of each draw.
        world_size: number of ranks.
        seed: of the plan.

    Returns:
        For each rank the indices into ``step`` of its draws; empty where there are fewer draws than ranks.
    """
    order = np.lexsort((step.examples, step.tasks, -costs))
    heap = [(0, slot) for slot in range(world_size)]
    slots: list[list[int]] = [[] for _ in range(world_size)]
    for index in order.tolist():
        load, slot = heap[0]
        slots[slot].append(index)
        heapq.heapreplace(heap, (load + int(costs[index]), slot))
    turn = hash64(seed, step.first_draw, 3) % world_size
    return [np.array(slots[(rank - turn) % world_size], np.int64) for rank in range(world_size)]


def share_balance(shares: Sequence[Int64], costs: Int64) -> float:
    """Mean over maximum of the shares' costs: 1 when all ranks finish together, 0 for an empty step."""
    loads = [int(costs[share].sum()) for share in shares]
    return sum(loads) / (len(loads) * max(loads)) if max(loads, default=0) else 0.0


def parse_weights(text: str, tasks: Sequence[str], counts: Sequence[int]) -> tuple[int, ...]:
    """Integer weights of ``tasks`` from ``--task_weights``.

    Args:
        text: ``1.0,1.5,1.2`` in the order of ``tasks``, or ``asr=1,tqa=2``; empty: the examples' ``counts``.
        tasks: the tasks that have training data, in their fixed order.
        counts: training examples per task.

    Raises:
        UserError: not a positive finite number, another number of weights than of tasks, unknown or missing task.
    """
    if not text.strip():
        return _reduced(list(counts))
    items = [item.strip() for item in text.split(",")]
    named = ["=" in item for item in items]
    if any(named):
        values = dict(_named_weight(item, text, tasks) for item in items)
        missing = [task for task in tasks if task not in values]
        if missing:
            raise UserError(
                f"--task_weights {text!r} gives no weight for {', '.join(missing)}; add it or drop the data"
            )
        numbers = [values[task] for task in tasks]
    else:
        if len(items) != len(tasks):
            raise UserError(
                f"--task_weights {text!r} has {len(items)} weights for {len(tasks)} tasks ({', '.join(tasks)}); "
                "give one per task, in this order"
            )
        numbers = [_weight(item, text) for item in items]
    scale = 10 ** max(0, *(-int(number.as_tuple().exponent) for number in numbers))
    return _reduced([int(number * scale) for number in numbers])


def _named_weight(item: str, text: str, tasks: Sequence[str]) -> tuple[str, Decimal]:
    name, _, value = (part.strip() for part in item.partition("="))
    if name not in tasks:
        raise UserError(
            f"--task_weights {text!r}: no training data for {name!r}; tasks here are {', '.join(tasks)}"
        )
    return name, _weight(value, text)


def _weight(value: str, text: str) -> Decimal:
    try:
        number = Decimal(value)
    except InvalidOperation as error:
        raise UserError(f"--task_weights {text!r}: {value!r} is not a number") from error
    if not (number.is_finite() and Decimal("1e-6") <= number <= Decimal("1e6")):
        raise UserError(
            f"--task_weights {text!r}: {value} is not between 1e-6 and 1e6; leave a task's data out to skip it"
        )
    return number


def _reduced(numbers: Sequence[int]) -> tuple[int, ...]:
    divisor = gcd(*numbers) or 1
    return tuple(number // divisor for number in numbers)


def parse_task_caps(text: str, tasks: Sequence[str]) -> dict[str, int]:
    """Caps per task from ``--task_batch_sizes asr=4,sqa=2``. Raises :class:`UserError` on anything else."""
    caps = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.partition("=")
        if name not in tasks or not value.isdigit() or int(value) < 1:
            raise UserError(
                f"--task_batch_sizes: {item!r} is not TASK=NUMBER with a task of {', '.join(tasks)}"
            )
        caps[name] = int(value)
    return caps


def describe_mix(plan: GlobalPlan, names: Sequence[str]) -> Mapping[str, float]:
    """Share of each task's examples among the run's draws."""
    counts = split_draws(plan.total_draws, plan.weights)
    return {name: count / max(1, plan.total_draws) for name, count in zip(names, counts, strict=True)}
