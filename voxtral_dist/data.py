"""Puts shards, plan, audio and collator together: this rank's micro-batches of each step, read ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from voxtral_dist.audio import log_mel
from voxtral_dist.audio_file import AudioError, decode
from voxtral_dist.batch import MicroBatch
from voxtral_dist.collator import Collator, Example
from voxtral_dist.errors import UserError
from voxtral_dist.lengths import token_lengths
from voxtral_dist.micro_batches import Caps, cut
from voxtral_dist.mix import parse_task_caps, parse_weights
from voxtral_dist.plan import ALGORITHM, GlobalPlan, Int64, Step, draw_hashes
from voxtral_dist.plan_history import TaskSource, continue_history, describe, first_history
from voxtral_dist.sample import Sample
from voxtral_dist.shards import CorruptSampleError, ShardSet, sample_from_row
from voxtral_dist.shares import CostModel, equal_cost_shares, share_balance
from voxtral_dist.tasks import TASKS

READ_AHEAD_STEPS = 2
"""Steps whose micro-batches are read while one is computed."""


class TaskData:
    """The examples of one task, from one or more packed data sets in the order they were named.

    Args:
        name: the task.
        sets: its data sets.
        collator: prompts, tokenizer and audio sizes of the model.
        slice_: this rank and the number of ranks, which share the counting of tokens.

    Attributes:
        text_tokens, target_tokens, n_samples, chunks, positions: int64 [examples]; positions counts every
            language-model position, audio included.
    """

    def __init__(
        self, name: str, sets: Sequence[ShardSet], collator: Collator, slice_: tuple[int, int] = (0, 1)
    ) -> None:
        self.name = name
        self.sets = list(sets)
        self.spec = collator.spec
        self._starts = np.concatenate([[0], np.cumsum([len(s) for s in sets])])
        counts = [
            token_lengths(s, collator.vocabulary, spoken_question=collator.spoken_question, slice_=slice_)
            for s in sets
        ]
        self.text_tokens: Int64 = np.concatenate([prompt for prompt, _ in counts]).astype(np.int64)
        self.target_tokens: Int64 = np.concatenate([target for _, target in counts]).astype(np.int64)
        self.n_samples: Int64 = np.concatenate([s.n_samples for s in sets]).astype(np.int64)
        self.chunks: Int64 = self.spec.chunks(self.n_samples)
        self.positions: Int64 = (
            self.text_tokens + self.target_tokens + self.chunks * self.spec.tokens_per_chunk
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shard_sizes(self) -> list[int]:
        """Examples per shard over all sets."""
        return [int(size) for shards in self.sets for size in shards.shard_sizes]

    @property
    def shard_sha256(self) -> list[str]:
        """Hash of each shard over all sets."""
        return [sha256 for shards in self.sets for sha256 in shards.shard_sha256]

    def costs(self, examples: Int64, model: CostModel) -> Int64:
        """Integer cost of each of ``examples``."""
        return model.cost(self.positions[examples], self.chunks[examples], self.target_tokens[examples])

    def locate(self, example: int) -> tuple[ShardSet, int]:
        """The set an example lies in and its place there."""
        number = int(np.searchsorted(self._starts, example, side="right")) - 1
        return self.sets[number], example - int(self._starts[number])

    def read(
        self, example: int, task: int = 0, weight: float = 1.0, audio_from: int | None = None
    ) -> Example:
        """Read, check and decode one example; what cannot be read comes back masked, with its error.

        Args:
            example: its id in this task.
            task: index of the task in the run.
            weight: of each of its labels.
            audio_from: take the audio of this other example, for the audio probe.
        """
        shards, place = self.locate(example)
        n_samples = int(self.n_samples[example if audio_from is None else audio_from])
        key = f"{shards.task}/{shards.split} {place}"
        sample = Sample(id=key, task=self.name, prompt="", references=())
        try:
            record = shards.read(place)
            key, sample = record.key, sample_from_row(record.row)
            other, other_place = (shards, place) if audio_from is None else self.locate(audio_from)
            data = record.audio if audio_from is None else other.read(other_place).audio
            mel = None if data is None else log_mel(decode(data), self.spec)
            return Example(sample, mel, n_samples, task, weight, key)
        except (CorruptSampleError, AudioError) as error:
            with suppress(CorruptSampleError):  # the words may be whole where the audio is not
                sample = shards.sample(place)
            chunks = int(self.spec.chunks(n_samples))
            silence = torch.zeros(chunks, self.spec.num_mel_bins, self.spec.chunk_frames) if chunks else None
            return Example(sample, silence, n_samples, task, 0.0, key, str(error))


def open_tasks(
    folders: Sequence[str | Path], collator: Collator, slice_: tuple[int, int] = (0, 1)
) -> list[TaskData]:
    """Open packed data sets, one :class:`TaskData` per task, in the order of :data:`~voxtral_dist.tasks.TASKS`."""
    sets = [ShardSet.open(Path(folder)) for folder in folders]
    by_task = {name: [s for s in sets if s.task == name] for name in TASKS}
    return [TaskData(name, members, collator, slice_) for name, members in by_task.items() if members]


def fingerprints(tasks: Sequence[TaskData]) -> dict[str, list[str]]:
    """Identity of every data set, by task."""
    return {task.name: [shards.fingerprint for shards in task.sets] for task in tasks}


@dataclass(frozen=True)
class TrainSettings:
    """What the flags of the same names decide of the training data."""

    global_batch_size: int
    per_device_bsz: int
    max_len: int
    epochs: float = 1.0
    max_steps: int = 0
    max_overlong_rate: float = 0.01
    max_tokens_per_micro_batch: int = 0
    packed: bool = False
    task_weights: str = ""
    task_batch_sizes: str = ""
    loss_norm: str = "tokens"
    num_workers: int = 2
    seed: int = 0
    cost_model: CostModel = field(default_factory=CostModel)


class TrainData:
    """The training data of a run: its plan, and the micro-batches of any rank at any step.

    Args:
        tasks: from :func:`open_tasks`.
        collator: of the model.
        settings: see :class:`TrainSettings`.
        saved: :attr:`history` of the checkpoint that the run goes on from, None at its beginning.
        step: optimizer steps done.
        allow: changes of the plan that may be made, of :data:`~voxtral_dist.plan_history.CHANGES`.

    Attributes:
        history: how the plan came about, for the checkpoint.

    Raises:
        UserError: no example left, too many examples above ``max_len``, bad weights, a change that is not allowed.
    """

    def __init__(
        self,
        tasks: Sequence[TaskData],
        collator: Collator,
        settings: TrainSettings,
        *,
        saved: Mapping[str, Any] | None = None,
        step: int = 0,
        allow: Collection[str] = (),
    ) -> None:
        self.tasks = list(tasks)
        self.collator = collator
        self.settings = settings
        self.cost_model = settings.cost_model
        self.names = [task.name for task in self.tasks]
        self.overlong = {task.name: int((task.positions > settings.max_len).sum()) for task in self.tasks}
        self._check_lengths()
        self.plan, self.history = self._make_plan(saved, step, allow)
        caps = parse_task_caps(settings.task_batch_sizes, self.names)
        self.caps = Caps(
            rows=settings.per_device_bsz,
            tokens=settings.max_tokens_per_micro_batch or settings.per_device_bsz * settings.max_len,
            task_rows={self.names.index(name): cap for name, cap in caps.items()},
            packed=settings.packed,
        )

    def _check_lengths(self) -> None:
        for task in self.tasks:
            share = self.overlong[task.name] / max(1, len(task))
            if share > self.settings.max_overlong_rate or share == 1.0:
                shards, place = task.locate(int(task.positions.argmax()))
                raise UserError(
                    f"--max_len {self.settings.max_len}: {self.overlong[task.name]} of {len(task)} {task.name} "
                    f"examples are longer (the longest, {shards.sample(place).source}, has "
                    f"{task.positions.max()} positions) and would be left out, more than --max_overlong_rate "
                    f"{self.settings.max_overlong_rate} allows; raise one of the two"
                )

    def _make_plan(
        self, saved: Mapping[str, Any] | None, step: int, allow: Collection[str]
    ) -> tuple[GlobalPlan, dict[str, Any]]:
        settings, n = self.settings, self.settings.global_batch_size
        sources = [
            TaskSource(
                task.name,
                list(TASKS).index(task.name),
                task.shard_sizes,
                task.shard_sha256,
                task.positions <= settings.max_len,
            )
            for task in self.tasks
        ]
        counts = [int(source.accepted.sum()) for source in sources]
        weights = parse_weights(settings.task_weights, self.names, counts)
        if saved is None:
            segments, generations = first_history(sources, weights, n)
        else:
            default_weights = () if settings.task_weights or "data" not in allow else ("weights",)
            segments, generations = continue_history(
                saved, step, sources, weights, n, {*allow, *default_weights}
            )
        last = segments[-1]
        if settings.max_steps:
            draws = last.start_draw + (settings.max_steps - last.start_step) * n
        else:
            draws = max(1, round(settings.epochs * sum(counts)))
        streams = tuple(source.stream(generations[source.name]) for source in sources)
        plan = GlobalPlan(streams, tuple(segments), settings.seed, draws)
        return plan, describe(plan, generations)

    def identity(self) -> dict[str, Any]:
        """What fixes the content of every step beside the history; a run goes on only with the same."""
        settings = self.settings
        return {
            "algorithm": ALGORITHM,
            "tasks": self.names,
            "seed": settings.seed,
            "epochs": settings.epochs,
            "max_steps": settings.max_steps,
            "max_len": settings.max_len,
        }

    def step_costs(self, step: Step) -> Int64:
        """Integer cost of each draw of a step."""
        return self._per_draw(step, lambda task, ids: task.costs(ids, self.cost_model))

    def _per_draw(self, step: Step, value: Any) -> Int64:
        out = np.empty(len(step), np.int64)
        for number, task in enumerate(self.tasks):
            mine = step.tasks == number
            out[mine] = value(task, step.examples[mine])
        return out

    def shares(self, step: Step, world_size: int) -> list[Int64]:
        """Each rank's draws of a step, as indices into it."""
        return equal_cost_shares(step, self.step_costs(step), world_size, self.plan.seed)

    def balance(self, world_size: int, steps: int = 20, factor: int = 1) -> float:
        """Mean over maximum of the ranks' costs over some steps from the first: the share of time that no rank waits.

        Args:
            world_size: number of ranks.
            steps: how many steps to look at.
            factor: how many steps to take as one, for a step of so many times the size.
        """
        values = []
        for number in range(min(steps, self.plan.num_steps // factor)):
            step = self.plan.window(number * factor, factor)
            values.append(share_balance(self.shares(step, world_size), self.step_costs(step)))
        return float(np.mean(values)) if values else 0.0

    def label_weights(self, step: Step) -> dict[tuple[int, int], float]:
        """Weight of each label of an example in the loss sum, by (task, example), as ``loss_norm`` says."""
        targets = self._per_draw(step, lambda task, ids: task.target_tokens[ids])
        if self.settings.loss_norm == "tasks":
            totals = np.bincount(step.tasks, weights=targets, minlength=len(self.tasks))
            values = 1.0 / totals[step.tasks]
        elif self.settings.loss_norm == "examples":
            values = 1.0 / targets
        else:
            values = np.ones(len(step))
        pairs = zip(step.tasks.tolist(), step.examples.tolist(), strict=True)
        return dict(zip(pairs, values.tolist(), strict=True))

    def micro_batch_draws(self, step: Step, rank: int, world_size: int) -> list[Int64]:
        """A rank's draws of a step by micro-batch, as indices into the step."""
        share = self.shares(step, world_size)[rank]
        positions = self._per_draw(step, lambda task, ids: task.positions[ids])
        return [share[part] for part in cut(step.tasks[share], positions[share], self.caps)]

    def fill(self, step: Step, draws: Int64) -> tuple[int, int]:
        """Positions of a micro-batch without and with its padding."""
        lengths = self._per_draw(step, lambda task, ids: task.positions[ids])[draws]
        used = int(lengths.sum())
        return used, used if self.settings.packed else int(lengths.max()) * len(draws)

    def load(self, step: Step, draws: Int64, weights: Mapping[tuple[int, int], float]) -> MicroBatch:
        """Read and collate the draws of one micro-batch."""
        pairs = [(int(step.tasks[draw]), int(step.examples[draw])) for draw in draws]
        examples = [self.tasks[task].read(example, task, weights[task, example]) for task, example in pairs]
        batch = self.collator.train_batch(examples, step.first_draw + int(draws.min()), self.settings.packed)
        hashes = draw_hashes(step.tasks[draws], step.examples[draws])
        return replace(batch, draw_hash=int(hashes.sum()))

    def steps(
        self, first_step: int, rank: int, world_size: int
    ) -> Iterator[tuple[int, Iterator[MicroBatch]]]:
        """This rank's micro-batches from ``first_step`` to the end of the run, read ahead over step boundaries."""
        with ThreadPoolExecutor(self.settings.num_workers, thread_name_prefix="reader") as pool:
            queue: deque[tuple[int, list[Future[MicroBatch]]]] = deque()
            for index in range(first_step, self.plan.num_steps):
                step = self.plan.step(index)
                weights = self.label_weights(step)
                groups = self.micro_batch_draws(step, rank, world_size)
                queue.append((index, [pool.submit(self.load, step, draws, weights) for draws in groups]))
                if len(queue) > READ_AHEAD_STEPS:
                    yield _results(*queue.popleft())
            while queue:
                yield _results(*queue.popleft())


def _results(index: int, futures: Sequence[Future[MicroBatch]]) -> tuple[int, Iterator[MicroBatch]]:
    return index, (future.result() for future in futures)


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
            prompts = task.positions - task.target_tokens
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
        positions = np.concatenate([task.positions for task in self.tasks])
        share = equal_cost_shares(Step(0, numbers, examples), costs, world_size, 0)[rank]
        groups = cut(numbers[share], positions[share], Caps(rows, rows * int(positions.max(initial=1))))
        return [[(int(numbers[i]), int(examples[i])) for i in share[group]] for group in groups]

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
