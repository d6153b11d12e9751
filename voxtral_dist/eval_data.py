"""The dev data: every example exactly once, shared out over the ranks by cost, in decoding batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache

import numpy as np

from voxtral_dist.audio import SAMPLE_RATE, log_mel
from voxtral_dist.audio_file import AudioError, Samples, decode
from voxtral_dist.batch import DecodeCaps, MicroBatch
from voxtral_dist.collator import Collator, Example
from voxtral_dist.errors import BadSamplesError, UserError
from voxtral_dist.plan import Int64, Step, permute
from voxtral_dist.shards import CorruptSampleError
from voxtral_dist.shares import CostModel, equal_cost_shares
from voxtral_dist.task_data import TaskData
from voxtral_dist.tasks import TASKS

Item = tuple[int, int]
"""Task and number of an example."""

NEW_TOKEN = 8
"""What a new token costs in prompt positions. This and the two below are estimates: they decide speed alone."""

TOKENS_PER_SECOND, ANSWER_TOKENS = 5, 24
"""Expected length of a transcript by its audio, and of an answer."""

LimitOf = Callable[[str, Int64], Int64]
"""Task and int64 [n] numbers of 16 kHz samples -> int64 [n], at least 1: most new tokens of each answer."""


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

    def batches(
        self, rank: int, world_size: int, caps: DecodeCaps, limit_of: LimitOf
    ) -> list[list[tuple[int, int]]]:
        """A rank's (task, example) pairs in decoding batches, those of the most positions first.

        Args:
            rank, world_size: every example is in exactly one batch of one rank.
            caps: limits of a batch.
            limit_of: most new tokens of an answer.
        """
        per_task = [self._sizes(number, limit_of) for number in range(len(self.tasks))]
        numbers = np.repeat(np.arange(len(self.tasks)), [len(task) for task in self.tasks])
        examples = np.concatenate([np.arange(len(task), dtype=np.int64) for task in self.tasks])
        return share_batches(numbers, examples, np.concatenate(per_task, 1), (rank, world_size), caps)

    def _sizes(self, task: int, limit_of: LimitOf) -> Int64:
        """Audio chunks, prompt positions, answer limit and expected answer of each example, int64 [4, n]."""
        data, ids = self.tasks[task], np.arange(len(self.tasks[task]))
        prompts, samples = data.positions(ids) - data.target_tokens(ids), data.n_samples(ids)
        limits = np.minimum(limit_of(data.name, samples), self.max_len - prompts)
        return np.stack([data.chunks(ids), prompts, limits, expected_tokens(data.name, samples, limits)])

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

    @property
    def fingerprint(self) -> str:
        """Identity of the data sets, their prompts and their tokenizer: with the model it decides the predictions."""
        sets = {task.name: [shards.fingerprint for shards in task.sets] for task in self.tasks}
        return json.dumps([sets, self.collator.spoken_question], sort_keys=True)

    def describe(self, item: Item) -> str:
        """Task and id of an example, for messages."""
        shards, place = self.tasks[item[0]].locate(item[1])
        with suppress(CorruptSampleError):
            return f"{shards.task}/{shards.sample(place).id}"
        return f"{shards.task}/{shards.split} {place}"

    def read(self, item: Item, audio: str = "own") -> Example:
        """Read, check and decode one example; what cannot be read comes back with its error.

        Args:
            item: task and number.
            audio: what it hears: its ``own``, ``swapped``: that of :meth:`other_audio`, or ``silence`` of the same
                length.

        Raises:
            BadSamplesError: its words are damaged, so that it cannot be scored.
        """
        number, place = item
        task = self.tasks[number]
        swapped = audio == "swapped" and TASKS[task.name].has_audio
        example = task.read(place, number, audio_from=self.other_audio(number)[place] if swapped else None)
        if not example.sample.references:
            raise BadSamplesError(f"{example.error}; a dev row without its words cannot be scored")
        if audio == "silence" and example.mel is not None:
            return replace(example, mel=log_mel(np.zeros(example.n_samples, np.float32), task.spec))
        return example

    def sound(self, item: Item) -> Samples | None:
        """What an example sounds like, float32 [n] at 16 kHz; None without audio or where it cannot be read."""
        shards, place = self.tasks[item[0]].locate(item[1])
        with suppress(CorruptSampleError, AudioError, OSError):
            data = shards.read(place).audio
            return None if data is None else decode(data)
        return None

    @cache  # noqa: B019 - one data set of a process
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


def expected_tokens(task: str, n_samples: Int64, limits: Int64) -> Int64:
    """About how many tokens answers will have, int64 [n], by their audio's 16 kHz samples and their limits."""
    transcript = TOKENS_PER_SECOND * n_samples // SAMPLE_RATE
    return np.minimum(transcript if TASKS[task].transcribe else ANSWER_TOKENS, limits)


def share_batches(
    first: Int64, second: Int64, sizes: Int64, slice_: tuple[int, int], caps: DecodeCaps
) -> list[list[Item]]:
    """A rank's items in decoding batches, those of the most positions first.

    Args:
        first, second: int64 [n], the two numbers of each item.
        sizes: int64 [4, n], audio chunks, prompt positions, answer limit and expected answer of each.
        slice_: the rank and the number of ranks, which take shares of nearly equal cost.
        caps: limits of a batch.
    """
    chunks, prompts, limits, expected = sizes
    costs = CostModel().cost(prompts + NEW_TOKEN * expected, chunks, expected)
    share = equal_cost_shares(Step(0, first, second), costs, slice_[1], 0)[slice_[0]]
    groups = decode_groups(prompts[share], limits[share], expected[share], caps)
    return [[(int(first[i]), int(second[i])) for i in share[group]] for group in groups]


def decode_groups(prompts: Int64, limits: Int64, expected: Int64, caps: DecodeCaps) -> list[Int64]:
    """Group examples into decoding batches, those of the most positions first.

    Answers of a like length go together, because a batch takes as many steps as its longest answer.

    Args:
        prompts: int64 [n], positions of each prompt.
        limits: int64 [n], most new tokens of each answer.
        expected: int64 [n], about as many it will have.
        caps: limits of a batch.

    Returns:
        Indices into the arguments, one array per batch; every example is in exactly one of them.
    """
    groups: list[list[int]] = []
    prompt = limit = 0
    for index in np.lexsort((np.arange(len(limits)), -prompts, -limits, -expected)).tolist():
        prompt, limit = max(prompt, int(prompts[index])), max(limit, int(limits[index]))
        rows = len(groups[-1]) + 1 if groups else 1
        if not groups or rows > caps.rows or rows * (prompt + limit) > caps.tokens:
            groups.append([])
            prompt, limit = int(prompts[index]), int(limits[index])
        groups[-1].append(index)
    found = [np.array(group, np.int64) for group in groups]
    return sorted(found, key=lambda g: -int(prompts[g].max() + limits[g].max()))
