"""How long each example is: tokens counted once per tokenizer, kept beside the shards, memory-mapped by every process.

Two caches, safe to delete: ``<shard>.tokens.<key>.safetensors`` per shard, so that ranks share the counting and a
kill loses one shard of it, and ``lengths.<key>.<data>.npy`` over the data set, which all processes of a machine map.
The keys change with the tokenizer, the prompts and the data.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from tqdm import tqdm

from voxtral_dist import atomic
from voxtral_dist.errors import UserError
from voxtral_dist.shard_format import columns_bytes, read_columns
from voxtral_dist.shards import ShardSet
from voxtral_dist.tasks import PROMPT_TEMPLATE, Vocabulary, prompt_ids, target_ids

PROMPT, TARGET, SAMPLES = range(3)
"""Rows of a table of lengths."""

Lengths = NDArray[np.uint32]


class FingerprintedVocabulary(Vocabulary, Protocol):
    """A vocabulary that says which one it is."""

    fingerprint: str


def example_lengths(
    shards: ShardSet,
    vocabulary: FingerprintedVocabulary,
    *,
    spoken_question: bool = False,
    slice_: tuple[int, int] | None = (0, 1),
    progress: bool = False,
) -> Lengths:
    """The lengths of every example, uint32 [3, examples], mapped from a file.

    Row :data:`PROMPT` counts all positions of the prompt but the ``[AUDIO]`` ones, :data:`TARGET` those of the target
    with its ``</s>``, :data:`SAMPLES` the 16 kHz samples of the audio.

    Args:
        shards: the data set.
        vocabulary: the model's tokenizer.
        spoken_question: whether the written question of an audio task is left out of the prompt.
        slice_: (i, n): count shards i, i + n, ... and wait for the files of the n - 1 other processes. In a
            folder that cannot be written to, each process counts everything, in memory. None: count nothing, wait.
        progress: show a progress bar.

    Raises:
        CorruptSampleError: a stored row is damaged.
        UserError: an index is damaged.
    """
    counter = _Counter(shards, vocabulary, spoken_question)
    whole = table_path(shards, vocabulary, spoken_question)
    table = _mapped(whole, len(shards))
    if table is not None:
        return table
    if not os.access(shards.folder, os.W_OK):
        rows = [list(counter.column(row, progress and row == PROMPT)) for row in (PROMPT, TARGET, SAMPLES)]
        return np.concatenate([np.zeros((3, 0), np.uint32), np.stack([np.concatenate(r) for r in rows])], 1)
    if slice_ is not None:
        shards.fetch_counts(counter.key)
    first, count = slice_ or (len(shards.shard_names), 1)
    mine = range(first, len(shards.shard_names), count)
    for shard in tqdm(mine, desc=f"count tokens of {shards.task}", unit="shard", disable=not progress):
        counter.counts(shard)
    if first == 0:
        atomic.wait_for(counter.missing)
        _publish(whole, counter, len(shards))
    else:
        atomic.wait_for(lambda: [] if _mapped(whole, len(shards)) is not None else [str(whole)])
    table = _mapped(whole, len(shards))
    assert table is not None
    return table


def table_path(shards: ShardSet, vocabulary: FingerprintedVocabulary, spoken_question: bool) -> Path:
    """The file of the whole table: an uncompressed array of numpy's ``.npy`` format."""
    return shards.folder / f"lengths.{_key(vocabulary, spoken_question)}.{shards.fingerprint[:12]}.npy"


def _key(vocabulary: FingerprintedVocabulary, spoken_question: bool) -> str:
    words = f"{PROMPT_TEMPLATE} {vocabulary.fingerprint} {spoken_question}"
    return hashlib.sha256(words.encode()).hexdigest()[:12]


def _mapped(path: Path, examples: int) -> Lengths | None:
    """The table in a file, or None when it has to be written (again)."""
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return None
    return table if table.shape == (3, examples) and table.dtype == np.uint32 else None


def _publish(path: Path, counter: _Counter, examples: int) -> None:
    """Write the whole table row by row, a shard at a time, and drop that of the data before a change."""
    with atomic.replacing(path) as file:
        npy.write_array_header_1_0(file, {"descr": "<u4", "fortran_order": False, "shape": (3, examples)})
        for row in (PROMPT, TARGET, SAMPLES):
            for part in counter.column(row):
                file.write(part.astype("<u4").tobytes())
    for old in set(path.parent.glob(f"{path.name.rsplit('.', 2)[0]}.*.npy")) - {path}:
        old.unlink(missing_ok=True)


class _Counter:
    """Counts the tokens of a data set shard by shard, through the cache of each shard where there can be one."""

    def __init__(self, shards: ShardSet, vocabulary: FingerprintedVocabulary, spoken_question: bool) -> None:
        self._shards, self._vocabulary, self._spoken_question = shards, vocabulary, spoken_question
        self.key = _key(vocabulary, spoken_question)
        names = (Path(name).stem for name in shards.shard_names)
        self._paths = [shards.folder / f"{name}.tokens.{self.key}.safetensors" for name in names]
        self._writable = os.access(shards.folder, os.W_OK)
        self._kept: dict[int, Lengths] = {}
        self._counted: set[int] = set()

    def column(self, row: int, progress: bool = False) -> Iterator[Lengths]:
        """One row of the table, shard by shard."""
        numbers = range(len(self._paths))
        for shard in tqdm(
            numbers, desc=f"count tokens of {self._shards.task}", unit="shard", disable=not progress
        ):
            yield self._shards.shard_column(shard, "n_samples") if row == SAMPLES else self.counts(shard)[row]

    def counts(self, shard: int) -> Lengths:
        """Prompt and target tokens of a shard's examples, uint32 [2, examples]."""
        found = self._kept[shard] if shard in self._kept else self._cached(shard)
        if found is not None:
            return found
        found = self._count(shard)
        if self._writable:
            columns = {"prompt": found[PROMPT], "target": found[TARGET]}
            metadata = {"tar_sha256": self._shards.shard_sha256[shard]}
            atomic.write_bytes(self._paths[shard], columns_bytes(columns, metadata))
        else:
            self._kept[shard] = found
        return found

    def missing(self) -> list[str]:
        """The files of shards that are not counted yet."""
        left = [shard for shard in range(len(self._paths)) if shard not in self._counted]
        self._counted.update(shard for shard in left if self._cached(shard) is not None)
        return [str(self._paths[shard]) for shard in left if shard not in self._counted]

    def _cached(self, shard: int) -> Lengths | None:
        try:
            columns, metadata = read_columns(self._paths[shard])
            same_tar = metadata.get("tar_sha256") == self._shards.shard_sha256[shard]
            return np.stack([columns["prompt"], columns["target"]]) if same_tar else None
        except (OSError, UserError, KeyError, ValueError):
            return None

    def _count(self, shard: int) -> Lengths:
        start, end = int(self._shards.starts[shard]), int(self._shards.starts[shard + 1])
        counts = np.zeros((2, end - start), np.uint32)
        for at in range(start, end):
            sample = self._shards.sample(at)
            prompt = prompt_ids(sample, self._vocabulary, 0, self._spoken_question)
            counts[:, at - start] = len(prompt), len(target_ids(sample.target, self._vocabulary))
        return counts
