"""Reads a rank's micro-batches ahead of the training: steps are planned by one thread and read by others."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from voxtral_dist.batch import MicroBatch
from voxtral_dist.data import TrainData
from voxtral_dist.plan import SHARD_BLOCK
from voxtral_dist.shard_cache import ShardReadAhead
from voxtral_dist.shards import ShardSet

READ_AHEAD_STEPS = 2
"""Steps whose micro-batches are read while one is computed."""


class StepShare:
    """A rank's part of a step: its micro-batches in order, which are being read.

    Args:
        micro_batches: as they will be.
        smaller: makes the same examples anew in micro-batches of half the size, and of later steps too.
    """

    def __init__(self, micro_batches: Sequence[Future[MicroBatch]], smaller: Callable[[], StepShare]) -> None:
        self._micro_batches = micro_batches
        self.smaller = smaller

    def __iter__(self) -> Iterator[MicroBatch]:
        return (future.result() for future in self._micro_batches)


class StepLoader:
    """The micro-batches of a rank.

    Args:
        data: the training data with its plan.
        rank, world_size: which share of each step.

    Attributes:
        caps: of the micro-batches; smaller once one did not fit into memory.
    """

    def __init__(self, data: TrainData, rank: int, world_size: int) -> None:
        self.data, self.rank, self.world_size, self.caps = data, rank, world_size, data.caps

    def steps(self, first_step: int) -> Generator[tuple[int, StepShare], None, None]:
        """This rank's share of each step, from ``first_step`` to the end of the run.

        Steps are planned by a thread of its own and read by others, over step boundaries.
        """

        def planned(index: int) -> list[Future[MicroBatch]]:
            step = self.data.plan.step(index)
            weights = self.data.label_weights(step)
            groups = self.data.micro_batch_draws(step, self.rank, self.world_size, self.caps)
            return [readers.submit(self.data.load, step, draws, weights) for draws in groups]

        def smaller(index: int) -> StepShare:
            self.caps = self.caps.halved()
            return StepShare(planned(index), lambda: smaller(index))

        def share(index: int, micro_batches: Future[list[Future[MicroBatch]]]) -> tuple[int, StepShare]:
            return index, StepShare(micro_batches.result(), lambda: smaller(index))

        readers = ThreadPoolExecutor(self.data.settings.num_workers, thread_name_prefix="reader")
        planner = ThreadPoolExecutor(1, thread_name_prefix="planner")
        queue: deque[tuple[int, Future[list[Future[MicroBatch]]]]] = deque()
        ahead = self._read_ahead(first_step)
        try:
            for index in range(first_step, self.data.plan.num_steps):
                queue.append((index, planner.submit(planned, index)))
                if len(queue) > READ_AHEAD_STEPS:
                    yield share(*queue.popleft())
            while queue:
                yield share(*queue.popleft())
        finally:
            if ahead:
                ahead.close()
            planner.shutdown(cancel_futures=True)
            readers.shutdown(cancel_futures=True)

    def _read_ahead(self, first_step: int) -> ShardReadAhead | None:
        """Fetch shards in the order of the plan, where the data is read through a cache."""
        sets = [shards for task in self.data.tasks for shards in task.sets]
        cache = next((shards.cache for shards in sets if shards.cache), None)
        if cache is None:
            return None
        all_fit = sum(shards.bytes for shards in sets) <= cache.bound // 2
        block = sum(len(s.shard_names) for s in sets) if all_fit else 2 * SHARD_BLOCK * len(self.data.tasks)
        return ShardReadAhead(self._shards_from(first_step, block), cache)

    def _shards_from(self, first_step: int, block: int) -> Iterator[tuple[ShardSet, int]]:
        """Each shard when the plan comes to it, and again when it comes back after ``block`` others."""
        known: OrderedDict[tuple[str, int], None] = OrderedDict()
        total = sum(len(shards.shard_names) for task in self.data.tasks for shards in task.sets)
        for index in range(first_step, self.data.plan.num_steps):
            step = self.data.plan.step(index)
            for number, task in enumerate(self.data.tasks):
                for shards, shard in task.shards_of(step.examples[step.tasks == number]):
                    if (shards.fingerprint, shard) not in known:
                        yield shards, shard
                    known[shards.fingerprint, shard] = None
                    known.move_to_end((shards.fingerprint, shard))
            if len(known) == total:
                return
            while len(known) > block:
                known.popitem(last=False)
