"""What is decoded without references: every row once, long recordings in pieces that are cut at pauses.

    data = PredictData.open(["calls.jsonl", "interviews/"], collator, max_len, limit_of=settings.limit, task="asr")
    data.join(row, [text of each piece])

Pieces are decoded on their own, each in one batch of one rank.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from voxtral_dist.audio import SAMPLE_RATE, log_mel
from voxtral_dist.audio_file import AudioError
from voxtral_dist.batch import DecodeCaps
from voxtral_dist.collator import Collator, Example
from voxtral_dist.errors import UserError
from voxtral_dist.eval_data import Item, LimitOf, expected_tokens, share_batches
from voxtral_dist.plan import Int64
from voxtral_dist.predict_rows import PredictRow, RowDefaults, read_rows
from voxtral_dist.recordings import Recording, measure, read_piece
from voxtral_dist.sample import Sample
from voxtral_dist.tasks import TASKS

TRANSCRIPT_SECONDS = 30 * 60
"""The longest audio that the released models transcribe (model card of Voxtral-Mini-3B-2507)."""

NO_BLANKS = frozenset("bo dz ja km lo my th zh".split())
"""Languages that write words without blanks between them."""

MEASURE_THREADS = 4

Exchange = Callable[[list[Any]], list[list[Any]]]
"""A JSON-able list of this rank -> those of all ranks, in rank order."""


class PredictData:
    """Rows to predict, in pieces.

    Args:
        rows: from :func:`~voxtral_dist.predict_rows.read_rows`.
        recordings: of each row its audio, None for a text task.
        collator: of the model.
        max_len: most positions of prompt and answer together.

    Attributes:
        rows: the samples in input order.
        items: (row, piece) of everything that is decoded on its own, ascending.

    Raises:
        UserError: a prompt leaves no room for an answer.
    """

    def __init__(
        self,
        rows: Sequence[PredictRow],
        recordings: Sequence[Recording | None],
        collator: Collator,
        max_len: int,
    ) -> None:
        self.collator = collator
        self.max_len = max_len
        self.rows: list[Sample] = [row.sample for row in rows]
        self._audio = [row.audio for row in rows]
        self._recordings = list(recordings)
        pieces = [recording.piece_samples if recording else [0] for recording in recordings]
        self.items: list[Item] = [(row, n) for row, found in enumerate(pieces) for n in range(len(found))]
        self._samples = np.array([n for found in pieces for n in found], np.int64)
        self._row = np.repeat(np.arange(len(pieces)), [len(found) for found in pieces])
        text = np.array([len(collator.prompt(sample, 0)) for sample in self.rows], np.int64)
        self._chunks = collator.spec.chunks(self._samples)
        self._prompts = text[self._row] + self._chunks * collator.spec.tokens_per_chunk
        self._check_room()

    @classmethod
    def open(
        cls,
        inputs: Sequence[str],
        collator: Collator,
        max_len: int,
        *,
        limit_of: LimitOf,
        task: str = "",
        language: str = "",
        question: str = "",
        slice_: tuple[int, int] = (0, 1),
        exchange: Exchange = lambda part: [part],
    ) -> PredictData:
        """Read the rows and measure their audio. Collective when there is an ``exchange``.

        Args:
            inputs: JSONL files, audio files and folders of them.
            collator: of the model.
            max_len: most positions of prompt and answer together.
            limit_of: most new tokens of an answer.
            task, language, question: of rows that do not say it, and of audio files.
            slice_: this rank and the number of ranks, which share the measuring.
            exchange: what each has measured, for all.

        Raises:
            UserError: an input is missing, empty or of no known kind, or a row does not fit its task or the model.
        """
        defaults = RowDefaults(task, language, question, collator.spoken_question)
        rows = read_rows(inputs, defaults)
        longest = [_longest_piece(row.sample, collator, max_len, limit_of) for row in rows]
        rank, world_size = slice_
        with ThreadPoolExecutor(MEASURE_THREADS) as pool:
            mine = list(pool.map(_measured, rows[rank::world_size], longest[rank::world_size]))
        recordings: list[Recording | None] = [None] * len(rows)
        for other, part in enumerate(exchange(mine)):
            recordings[other::world_size] = [_recording(values) for values in part]
        return cls(rows, recordings, collator, max_len)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def fingerprint(self) -> str:
        """A hash of rows, audio files and where they are cut, and the prompts: what decides the predictions here."""
        digest = hashlib.sha256(
            json.dumps([self.collator.spoken_question, astuple(self.collator.spec)]).encode()
        )
        for sample, recording in zip(self.rows, self._recordings, strict=True):
            known = recording and astuple(recording)
            digest.update(
                json.dumps([sample.task, sample.id, sample.prompt, sample.language, known]).encode()
            )
        return digest.hexdigest()

    def batches(self, rank: int, world_size: int, caps: DecodeCaps, limit_of: LimitOf) -> list[list[Item]]:
        """A rank's items in decoding batches; see :meth:`voxtral_dist.eval_data.EvalData.batches`."""
        limits, expected = np.zeros_like(self._samples), np.zeros_like(self._samples)
        tasks = np.array([sample.task for sample in self.rows])[self._row]
        for name in dict.fromkeys(tasks.tolist()):
            ids, samples = tasks == name, self._samples[tasks == name]
            limits[ids] = np.minimum(limit_of(name, samples), self.max_len - self._prompts[ids])
            expected[ids] = expected_tokens(name, samples, limits[ids])
        sizes = np.stack([self._chunks, self._prompts, limits, expected])
        rows, pieces = np.array(self.items, np.int64).T
        return share_batches(rows, pieces, sizes, (rank, world_size), caps)

    def read(self, item: Item, audio: str = "own") -> Example:
        """Read and decode one piece; what cannot be read comes back masked, with its error.

        Args:
            item: row and piece.
            audio: what it hears, here always its ``own``.
        """
        row, piece = item
        sample, path, recording = self.rows[row], self._audio[row], self._recordings[row]
        if path is None or recording is None:
            return Example(sample, None, 0, 0, 1.0, sample.id)
        spec, n_samples = self.collator.spec, recording.piece_samples[piece]
        try:
            mel = log_mel(read_piece(path, recording, piece), spec)
            return Example(sample, mel, n_samples, 0, 1.0, sample.id)
        except (AudioError, OSError) as error:
            chunks = int(spec.chunks(n_samples))
            silence = torch.zeros(chunks, spec.num_mel_bins, spec.chunk_frames) if chunks else None
            reason = getattr(error, "strerror", None) or str(error)
            return Example(
                sample, silence, n_samples, 0, 0.0, sample.id, f"audio file {path.name!r}: {reason}"
            )

    def describe(self, item: Item) -> str:
        """Task and id of a row and which piece of it, for messages."""
        row, piece = item
        name = f"{self.rows[row].task}/{self.rows[row].id}"
        return name if len(self.seconds(row)) < 2 else f"{name} piece {piece + 1}"

    def seconds(self, row: int) -> list[tuple[float, float]]:
        """Begin and end of every piece of a row in its recording; one empty piece for text."""
        recording = self._recordings[row]
        if recording is None:
            return [(0.0, 0.0)]
        times = [round(cut / recording.rate, 3) for cut in recording.cuts]
        return list(pairwise(times))

    def join(self, row: int, pieces: Sequence[str | None]) -> str | None:
        """The text of a row from those of its pieces in order; missing ones are left out, None when all are missing."""
        found = [text.strip() for text in pieces if text is not None]
        blank = "" if self.rows[row].language in NO_BLANKS else " "
        if len(pieces) == 1 or not found:
            return pieces[0]
        return blank.join(text for text in found if text)

    def _check_room(self) -> None:
        worst = int(self._prompts.argmax())
        if self._prompts[worst] >= self.max_len:
            raise UserError(
                f"{self.rows[self._row[worst]].source}: its prompt has {self._prompts[worst]} positions and --max_len "
                f"{self.max_len} leaves no room for an answer; raise --max_len (only transcripts are made in pieces)"
            )


def _longest_piece(sample: Sample, collator: Collator, max_len: int, limit_of: LimitOf) -> int | None:
    """Most samples of a piece of a transcript: whole chunks that leave room for its answer. None: is never cut."""
    if not TASKS[sample.task].transcribe:
        return None
    spec = collator.spec
    chunks: Int64 = np.arange(1, max(1, TRANSCRIPT_SECONDS * SAMPLE_RATE // spec.chunk_samples) + 1)
    positions = len(collator.prompt(sample, 0)) + chunks * spec.tokens_per_chunk
    fits = positions + limit_of(sample.task, chunks * spec.chunk_samples) <= max_len
    return max(1, int(fits.sum())) * spec.chunk_samples


def _measured(row: PredictRow, max_samples: int | None) -> tuple[Any, ...] | None:
    return astuple(measure(row.audio, max_samples)) if row.audio else None


def _recording(values: Sequence[Any] | None) -> Recording | None:
    """A recording that may have been through JSON."""
    if values is None:
        return None
    rate, cuts, stat, error = values
    return Recording(rate, tuple(cuts), (stat[0], stat[1]), error)
