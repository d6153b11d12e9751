"""How many tokens each example has, counted once per tokenizer and kept beside the shards.

The counts are a cache, ``<shard>.tokens.<key>.safetensors``: the key changes with the tokenizer and the
prompts, and a file made from another tar is counted again. Deleting them costs time, nothing else.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from voxtral_dist import atomic
from voxtral_dist.errors import UserError
from voxtral_dist.shard_format import columns_bytes, read_columns
from voxtral_dist.shards import ShardSet
from voxtral_dist.tasks import PROMPT_TEMPLATE, Vocabulary, prompt_ids, target_ids

Counts = NDArray[np.uint32]


class FingerprintedVocabulary(Vocabulary, Protocol):
    """A vocabulary that says which one it is."""

    fingerprint: str


def token_lengths(
    shards: ShardSet,
    vocabulary: FingerprintedVocabulary,
    *,
    spoken_question: bool = False,
    slice_: tuple[int, int] = (0, 1),
    progress: bool = False,
) -> tuple[Counts, Counts]:
    """Text positions of every example's prompt and target, each of shape (examples,), uint32.

    The prompt counts all its positions but the ``[AUDIO]`` ones, the target includes its ``</s>``.

    Args:
        shards: the data set.
        vocabulary: the model's tokenizer.
        spoken_question: whether the written question of an audio task is left out of the prompt.
        slice_: (i, n): count shards i, i + n, ... and wait for the files of the n - 1 other processes. In a
            folder that cannot be written to, each process counts everything.
        progress: show a progress bar.

    Raises:
        CorruptSampleError: a stored row is damaged.
    """
    key = hashlib.sha256(
        f"{PROMPT_TEMPLATE} {vocabulary.fingerprint} {spoken_question}".encode()
    ).hexdigest()[:12]
    paths = [shards.folder / f"{Path(name).stem}.tokens.{key}.safetensors" for name in shards.shard_names]
    writable = os.access(shards.folder, os.W_OK)
    mine = range(slice_[0], len(paths), slice_[1]) if writable else range(len(paths))
    found: dict[int, Counts] = {}
    for shard in tqdm(mine, desc=f"count tokens of {shards.task}", unit="shard", disable=not progress):
        sha256 = shards.shard_sha256[shard]
        counts = _cached(paths[shard], sha256)
        if counts is None:
            counts = _count(shards, shard, vocabulary, spoken_question)
            if writable:
                columns = {"prompt": counts[0], "target": counts[1]}
                atomic.write_bytes(paths[shard], columns_bytes(columns, {"tar_sha256": sha256}))
        found[shard] = counts

    def missing() -> list[str]:
        for shard in set(range(len(paths))) - set(found):
            if (counts := _cached(paths[shard], shards.shard_sha256[shard])) is not None:
                found[shard] = counts
        return [str(path) for shard, path in enumerate(paths) if shard not in found]

    atomic.wait_for(missing)
    prompt, target = np.concatenate(
        [np.zeros((2, 0), np.uint32), *(found[s] for s in range(len(paths)))], axis=1
    )
    return prompt, target


def _cached(path: Path, sha256: str) -> Counts | None:
    """The counts in a file, shape (2, examples), or None when it has to be written (again)."""
    try:
        columns, metadata = read_columns(path)
        return (
            np.stack([columns["prompt"], columns["target"]]) if metadata.get("tar_sha256") == sha256 else None
        )
    except (OSError, UserError, KeyError, ValueError):
        return None


def _count(shards: ShardSet, shard: int, vocabulary: Vocabulary, spoken_question: bool) -> Counts:
    start, end = int(shards.starts[shard]), int(shards.starts[shard + 1])
    counts = np.zeros((2, end - start), np.uint32)
    for at in range(start, end):
        sample = shards.sample(at)
        counts[0, at - start] = len(prompt_ids(sample, vocabulary, 0, spoken_question))
        counts[1, at - start] = len(target_ids(sample.target, vocabulary))
    return counts
