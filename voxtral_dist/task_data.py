"""The examples of one task: how long each is, and any of them read, checked and decoded by its number."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch

from voxtral_dist.audio import log_mel
from voxtral_dist.audio_file import AudioError, decode
from voxtral_dist.collator import Collator, Example
from voxtral_dist.encoder_cache import EncoderCache, audio_key
from voxtral_dist.lengths import PROMPT, SAMPLES, TARGET, example_lengths
from voxtral_dist.plan import Int64
from voxtral_dist.sample import Sample
from voxtral_dist.shard_cache import ShardCache
from voxtral_dist.shards import CorruptSampleError, ShardSet, sample_from_row
from voxtral_dist.shares import CostModel
from voxtral_dist.tasks import TASKS

SCAN_BLOCK = 1 << 20
"""Examples whose lengths are looked at together where all are looked at."""


class TaskData:
    """The examples of one task, from one or more packed data sets in the order they were named.

    Only tables that are mapped from files grow with the number of examples.

    Args:
        name: the task.
        sets: its data sets.
        collator: prompts, tokenizer and audio sizes of the model.
        slice_: this rank and the number of ranks, which share the counting of tokens; None: others do it.

    Attributes:
        encoder_cache: where states of audio may lie already, None: nowhere.
    """

    def __init__(
        self,
        name: str,
        sets: Sequence[ShardSet],
        collator: Collator,
        slice_: tuple[int, int] | None = (0, 1),
    ) -> None:
        self.name = name
        self.sets = list(sets)
        self.spec = collator.spec
        self.encoder_cache: EncoderCache | None = None
        self._starts = [0, *accumulate(len(s) for s in sets)]
        self._tables = [
            example_lengths(s, collator.vocabulary, spoken_question=collator.spoken_question, slice_=slice_)
            for s in sets
        ]

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def shard_sizes(self) -> list[int]:
        """Examples per shard over all sets."""
        return [int(size) for shards in self.sets for size in shards.shard_sizes]

    @property
    def shard_sha256(self) -> list[str]:
        """Hash of each shard over all sets."""
        return [sha256 for shards in self.sets for sha256 in shards.shard_sha256]

    def target_tokens(self, examples: Int64) -> Int64:
        """Label positions of each of ``examples``, its ``</s>`` included."""
        return self._row(TARGET, examples)

    def n_samples(self, examples: Int64) -> Int64:
        """16 kHz samples of each of ``examples``."""
        return self._row(SAMPLES, examples)

    def chunks(self, examples: Int64) -> Int64:
        """Audio chunks of each of ``examples``."""
        return self.spec.chunks(self.n_samples(examples))

    def positions(self, examples: Int64) -> Int64:
        """Language-model positions of each of ``examples``, audio included."""
        text = self._row(PROMPT, examples) + self._row(TARGET, examples)
        return text + self.chunks(examples) * self.spec.tokens_per_chunk

    def costs(self, examples: Int64, model: CostModel) -> Int64:
        """Integer cost of each of ``examples``."""
        return model.cost(self.positions(examples), self.chunks(examples), self.target_tokens(examples))

    def longer_than(self, max_len: int) -> Int64:
        """The examples with more than ``max_len`` positions, ascending."""
        blocks = (
            np.arange(first, min(first + SCAN_BLOCK, len(self))) for first in range(0, len(self), SCAN_BLOCK)
        )
        found = [ids[self.positions(ids) > max_len] for ids in blocks]
        return np.concatenate([np.zeros(0, np.int64), *found])

    def shards_of(self, examples: Int64) -> list[tuple[ShardSet, int]]:
        """The shards that hold ``examples``, each once."""
        out = []
        for start, end, shards in zip(self._starts, self._starts[1:], self.sets, strict=False):
            mine = examples[(examples >= start) & (examples < end)] - start
            numbers = np.unique(np.searchsorted(shards.starts, mine, side="right") - 1)
            out += [(shards, number) for number in numbers.tolist()]
        return out

    def _row(self, row: int, examples: Int64) -> Int64:
        """A row of the tables of lengths at ``examples``."""
        out = np.empty(len(examples), np.int64)
        for start, end, table in zip(self._starts, self._starts[1:], self._tables, strict=False):
            mine = (examples >= start) & (examples < end)
            out[mine] = table[row, examples[mine] - start]
        return out

    def locate(self, example: int) -> tuple[ShardSet, int]:
        """The set an example lies in and its place there."""
        number, place = self._locate(example)
        return self.sets[number], place

    def _locate(self, example: int) -> tuple[int, int]:
        number = bisect_right(self._starts, example) - 1
        return number, example - self._starts[number]

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
        number, heard = self._locate(example if audio_from is None else audio_from)
        n_samples = int(self._tables[number][SAMPLES, heard])
        key = f"{shards.task}/{shards.split} {place}"
        sample = Sample(id=key, task=self.name, prompt="", references=())
        try:
            record = shards.read(place)
            key, sample = record.key, sample_from_row(record.row)
            data = record.audio if audio_from is None else self.sets[number].read(heard).audio
            hash_ = audio_key(data) if data is not None and self.encoder_cache else ""
            encoded = self._encoded(hash_, n_samples)
            mel = None if data is None or encoded is not None else log_mel(decode(data), self.spec)
            return Example(sample, mel, n_samples, task, weight, key, encoded=encoded, audio_key=hash_)
        except (CorruptSampleError, AudioError) as error:
            with suppress(CorruptSampleError):  # the words may be whole where the audio is not
                sample = shards.sample(place)
            chunks = int(self.spec.chunks(n_samples))
            silence = torch.zeros(chunks, self.spec.num_mel_bins, self.spec.chunk_frames) if chunks else None
            return Example(sample, silence, n_samples, task, 0.0, key, str(error))

    def _encoded(self, hash_: str, n_samples: int) -> torch.Tensor | None:
        """States of audio with this hash that the cache holds, None without."""
        if self.encoder_cache is None or not hash_:
            return None
        return self.encoder_cache.get(hash_, int(self.spec.chunks(n_samples)))


def open_tasks(
    locations: Sequence[str | Path],
    collator: Collator,
    slice_: tuple[int, int] | None = (0, 1),
    cache: ShardCache | None = None,
) -> list[TaskData]:
    """Open packed data sets, one :class:`TaskData` per task, in the order of :data:`~voxtral_dist.tasks.TASKS`.

    Args:
        locations: folders, or with a cache also URLs.
        collator: of the model.
        slice_: as of :class:`TaskData`.
        cache: where copies of the shards are kept.
    """
    sets = [ShardSet.open(location, cache) for location in locations]
    by_task = {name: [s for s in sets if s.task == name] for name in TASKS}
    return [TaskData(name, members, collator, slice_) for name, members in by_task.items() if members]


def fingerprints(tasks: Sequence[TaskData]) -> dict[str, list[str]]:
    """Identity of every data set, by task."""
    return {task.name: [shards.fingerprint for shards in task.sets] for task in tasks}
