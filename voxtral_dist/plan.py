"""The global plan: which example is drawn when, and which rank computes it. A pure function, its state one integer.

The draws of all tasks form one endless stream. Draw number k belongs to a task by an exact integer split of k
(:func:`~voxtral_dist.mix.split_draws`); a task's own draw number d is position ``d mod n`` of its epoch ``d // n``,
and each epoch is a permutation made by hashing (:class:`TaskStream`). **A step is the next N draws**, so its content
depends on the data, the weights, the seed and N, and never on the number of ranks, threads or restarts. Each step is
cut into equal-cost shares, one per rank (:func:`~voxtral_dist.shares.equal_cost_shares`). Example, N = 4, weights
asr:tqa = 1:1, draws 8..11 = step 2:

    stream   ... | asr 4  tqa 4  asr 5  tqa 5 | ...      task draws 4 and 5 -> examples by the epoch's permutation
    shares         rank 0: asr 4, tqa 5   rank 1: tqa 4, asr 5
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from voxtral_dist.mix import split_draws

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


class Population:
    """The examples of a task that may be drawn, and their permutation in every epoch.

    Args:
        tag: stable number of the task, part of every hash.
        shard_sizes: examples per shard, before the length filter.
        left_out: numbers of the examples that are never drawn, ascending; none by default.
    """

    def __init__(self, tag: int, shard_sizes: Sequence[int], left_out: Int64 | None = None) -> None:
        self.tag = tag
        self._starts = np.concatenate([[0], np.cumsum(shard_sizes)]).astype(np.int64)
        self._left_out = np.empty(0, np.int64) if left_out is None else left_out
        self._sizes = np.diff(self._starts) - np.diff(np.searchsorted(self._left_out, self._starts))
        self._cached_epoch = lru_cache(maxsize=2)(self._epoch)
        self._cached_block = lru_cache(maxsize=4)(self._block)

    def __len__(self) -> int:
        return int(self._sizes.sum())

    def from_position(self, seed: int, epoch: int, position: int) -> Int64:
        """The epoch's examples from a position to the end of its block of shards, int64, at least one."""
        ends = self._cached_epoch(seed, epoch)[1]
        block = int(np.searchsorted(ends, position, side="right"))
        offset = position - (int(ends[block - 1]) if block else 0)
        return self._cached_block(seed, epoch, block)[offset:]

    def _epoch(self, seed: int, epoch: int) -> tuple[Int64, Int64]:
        """Order of the shards in an epoch, and the position at which each block of shards ends."""
        order = permute(np.arange(len(self._sizes), dtype=np.int64), hash64(seed, self.tag, epoch, 1))
        return order, np.cumsum(np.add.reduceat(self._sizes[order], np.arange(0, len(order), SHARD_BLOCK)))

    def _block(self, seed: int, epoch: int, block: int) -> Int64:
        """Shuffled example ids of a block of shards."""
        shards = self._cached_epoch(seed, epoch)[0][block * SHARD_BLOCK : (block + 1) * SHARD_BLOCK]
        ids = np.concatenate([self._shard(shard) for shard in shards.tolist()])
        return permute(ids, hash64(seed, self.tag, epoch, 2, block))

    def _shard(self, shard: int) -> Int64:
        """Example ids of a shard that may be drawn; only those left out are kept in memory."""
        first, last = self._starts[shard : shard + 2]
        left_out = self._left_out[slice(*np.searchsorted(self._left_out, (first, last)))]
        return np.delete(np.arange(first, last), left_out - first)


class TaskStream:
    """The endless draws of one task: epochs, each a permutation of the examples that were there when it began.

    Args:
        generations: ``(first own draw, its epoch, population)`` in order, the first from (0, 0). A later generation
            holds the data of the earlier one and more, and begins where an epoch of that ends.
    """

    def __init__(self, generations: Sequence[tuple[int, int, Population]]) -> None:
        self.generations = list(generations)

    @classmethod
    def of(cls, tag: int, shard_sizes: Sequence[int], left_out: Int64 | None = None) -> TaskStream:
        """A stream whose data never changed."""
        return cls([(0, 0, Population(tag, shard_sizes, left_out))])

    def __len__(self) -> int:
        """Examples of the newest epoch."""
        return len(self.generations[-1][2])

    def next_epoch(self, own_draws: int) -> tuple[int, int]:
        """First own draw and number of the first epoch that has not begun after ``own_draws`` draws."""
        first, epoch, population = self.generations[-1]
        begun = max(0, -(-(own_draws - first) // len(population)))
        return first + begun * len(population), epoch + begun

    def draws(self, seed: int, start: int, stop: int) -> Int64:
        """Example ids of this task's own draws ``start`` to ``stop`` (exclusive), int64 [stop - start]."""
        parts = []
        starts = [first for first, _, _ in self.generations]
        while start < stop:
            number = bisect_right(starts, start) - 1
            first, first_epoch, population = self.generations[number]
            epoch, position = divmod(start - first, len(population))
            limit = min(stop, *starts[number + 1 : number + 2], stop)
            part = population.from_position(seed, first_epoch + epoch, position)[: limit - start]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


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


def draw_hashes(tasks: Int64, examples: Int64) -> Int64:
    """A 32-bit hash of each draw, int64 [n]. Their sum over a step tells, summed over the ranks in any order and exact
    in float64 up to two million examples, whether the ranks together computed just what the plan says.
    """
    words = (tasks.astype(np.uint64) << np.uint64(56)) ^ examples.astype(np.uint64)
    return (mix64(words) & np.uint64(0xFFFFFFFF)).astype(np.int64)


@dataclass(frozen=True)
class Segment:
    """A stretch of the stream in which weights and N do not change. A run appends segments, it never edits one.

    Attributes:
        start_draw: first draw of the run that belongs to it.
        start_step: the step that begins there.
        weights: integer share of each task; 0 leaves a task out.
        global_batch_size: N, draws per step.
        offsets: own draws that each task had before.
        stage: number of the stage it is of, or part of.
    """

    start_draw: int
    start_step: int
    weights: tuple[int, ...]
    global_batch_size: int
    offsets: tuple[int, ...]
    stage: int = 0

    def own_draws(self, draws: int) -> tuple[int, ...]:
        """Own draws of each task once ``draws`` draws of the run are consumed."""
        parts = split_draws(draws - self.start_draw, self.weights)
        return tuple(offset + part for offset, part in zip(self.offsets, parts, strict=True))


@dataclass(frozen=True)
class GlobalPlan:
    """All steps of a run.

    Attributes:
        streams: one per task, in the order of the weights.
        segments: in order, the first from draw 0; each begins at a step's edge.
        seed: of the order.
        total_draws: where the run ends; the last step may be short.
    """

    streams: tuple[TaskStream, ...]
    segments: tuple[Segment, ...]
    seed: int
    total_draws: int

    @classmethod
    def single(
        cls,
        streams: Sequence[TaskStream],
        weights: Sequence[int],
        seed: int,
        global_batch_size: int,
        total_draws: int,
    ) -> GlobalPlan:
        """A plan whose weights and N never change."""
        segment = Segment(0, 0, tuple(weights), global_batch_size, (0,) * len(streams))
        return cls(tuple(streams), (segment,), seed, total_draws)

    @property
    def num_steps(self) -> int:
        """Optimizer steps in the run."""
        last = self.segments[-1]
        return last.start_step + -(-(self.total_draws - last.start_draw) // last.global_batch_size)

    def segment_of(self, step: int) -> Segment:
        """The segment a step belongs to."""
        return self.segments[bisect_right([s.start_step for s in self.segments], step) - 1]

    def stage_draws(self, step: int) -> tuple[int, int]:
        """First draw of the stage a step belongs to, and its end."""
        stage = self.segment_of(step).stage
        starts = [s.start_draw for s in self.segments if s.stage == stage]
        later = [s.start_draw for s in self.segments if s.stage > stage]
        return starts[0], later[0] if later else self.total_draws

    def draws_after(self, step: int) -> int:
        """Draws consumed once ``step`` steps are done."""
        segment = self.segment_of(max(0, step - 1))
        later = [s.start_draw for s in self.segments if s.start_draw > segment.start_draw]
        end = min([self.total_draws, *later])  # the last step before a change may be short
        return min(segment.start_draw + (step - segment.start_step) * segment.global_batch_size, end)

    def own_draws_after(self, step: int) -> tuple[int, ...]:
        """Own draws of each task once ``step`` steps are done."""
        return self.segment_of(max(0, step - 1)).own_draws(self.draws_after(step))

    def step(self, index: int) -> Step:
        """The draws of step ``index`` (from 0), grouped by task."""
        return self.window(index, 1)

    def window(self, first_step: int, steps: int) -> Step:
        """The draws of several consecutive steps as if they were one."""
        tasks, examples = [], []
        last_step = min(first_step + steps, self.num_steps)
        edges = zip(self.own_draws_after(first_step), self.own_draws_after(last_step), strict=True)
        for number, (stream, (first, last)) in enumerate(zip(self.streams, edges, strict=True)):
            ids = stream.draws(self.seed, first, last)
            examples.append(ids)
            tasks.append(np.full(len(ids), number, np.int64))
        return Step(self.draws_after(first_step), np.concatenate(tasks), np.concatenate(examples))

    def digest(self, first_step: int, steps: int) -> int:
        """One 64-bit hash of the contents of some steps, equal on all ranks that plan the same."""
        value = 0
        for index in range(first_step, min(first_step + steps, self.num_steps)):
            step = self.step(index)
            words = mix64((step.tasks.astype(np.uint64) << np.uint64(56)) ^ step.examples.astype(np.uint64))
            value = hash64(
                value, step.first_draw, *np.bitwise_xor.reduce(words, keepdims=True).tolist(), len(step)
            )
        return value
