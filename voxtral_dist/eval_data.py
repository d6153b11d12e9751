"""The dev data: every example exactly once, shared out over the ranks by cost, in decoding batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from voxtral_dist.batch import MicroBatch
from voxtral_dist.collator import Collator
from voxtral_dist.errors import UserError
from voxtral_dist.micro_batches import Caps, cut
from voxtral_dist.plan import Step, permute
from voxtral_dist.shares import CostModel, equal_cost_shares
from voxtral_dist.task_data import TaskData

FEW = 1 << 40
"""Overhead of a decoding batch: as few of them as can be, because each takes as many steps as its longest answer."""


class EvalData:
    """The dev data of a run: every example exactly once, shared out over the ranks by cost.

    Args:
        tasks: from :func:`open_tasks`.
        collator: of the model.
        max_len: most positions of prompt and answer together.

    Raises:
        UserError: a prompt leaves no room for an answer; an evaluation never leaves a row out.
    """

    def __init__(self, tasks: Sequence[TaskData], collator: Collator, max_len: int) -> None:
        self.tasks = list(tasks)
        self.collator = collator
        self.max_len = max_len
        for task in self.tasks:
            everything = np.arange(len(task))
            prompts = task.positions(everything) - task.target_tokens(everything)
            if int(prompts.max(initial=0)) >= max_len:
                shards, place = task.locate(int(prompts.argmax()))
                raise UserError(
                    f"--max_len {max_len}: the prompt of {shards.sample(place).source} has {prompts.max()} "
                    "positions and leaves no room for an answer; an evaluation never leaves a row out, raise --max_len"
                )

    def __len__(self) -> int:
        return sum(len(task) for task in self.tasks)

    def batches(self, rank: int, world_size: int, rows: int) -> list[list[tuple[int, int]]]:
        """A rank's (task, example) pairs in decoding batches of at most ``rows``, longest prompts first."""
        numbers = np.concatenate([np.full(len(task), n, np.int64) for n, task in enumerate(self.tasks)])
        examples = np.concatenate([np.arange(len(task), dtype=np.int64) for task in self.tasks])
        costs = np.concatenate([task.costs(np.arange(len(task)), CostModel()) for task in self.tasks])
        positions = np.concatenate([task.positions(np.arange(len(task))) for task in self.tasks])
        share = equal_cost_shares(Step(0, numbers, examples), costs, world_size, 0)[rank]
        groups = cut(
            numbers[share], positions[share], Caps(rows, rows * int(positions.max(initial=1)), overhead=FEW)
        )
        return [[(int(numbers[i]), int(examples[i])) for i in share[group]] for group in groups]

    def loss_batches(
        self, names: Sequence[str], rank: int, world_size: int, rows: int, per_task: int
    ) -> Iterator[MicroBatch]:
        """A rank's part of a small fixed choice of examples, with labels.

        Args:
            names: tasks of the model's loss sums, in their order; the dev data of others is left aside.
            rank, world_size: every rank takes each ``world_size``-th example.
            rows: most examples of a micro-batch.
            per_task: most examples of a task, those whose hashes are smallest.
        """
        chosen: list[tuple[TaskData, int, int]] = []
        for task in self.tasks:
            if task.name in names:
                ids = permute(np.arange(len(task)), 0)[:per_task].tolist()
                chosen += [(task, example, list(names).index(task.name)) for example in ids]
        mine = chosen[rank::world_size]
        for first in range(0, len(mine), rows):
            examples = [task.read(example, number) for task, example, number in mine[first : first + rows]]
            yield self.collator.train_batch(examples, 0)

    def other_audio(self, task: int) -> list[int]:
        """For each example of a task another one of the same language and, where there is one, another answer.

        The sources of the audio probe: a model that listens must fail on them.
        """
        samples = [shards.sample(place) for shards in self.tasks[task].sets for place in range(len(shards))]
        groups: dict[str, list[int]] = {}
        for number, sample in enumerate(samples):
            groups.setdefault(sample.language, []).append(number)
        out = list(range(len(samples)))
        for members in groups.values():
            for place, number in enumerate(members):
                turned = members[place + len(members) // 2 :] + members[: place + len(members) // 2]
                different = (
                    other for other in turned if samples[other].references != samples[number].references
                )
                out[number] = next(different, turned[0])
        return out
