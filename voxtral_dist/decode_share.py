"""One rank's part of a decoding: its batches, read ahead, decoded, written down as they are done.

    share = Share(model, data, settings)
    share.run(skip, parts)             then rank 0 gathers each rank's share.result()

``data`` is what :mod:`voxtral_dist.evaluator` describes as ``DecodingData``; this layer does not know it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from voxtral_dist import activity, distributed
from voxtral_dist.batch import DecodeCaps
from voxtral_dist.decode import Decoded, Prompts, decode_stream
from voxtral_dist.errors import ExitCode, VoxtralDistError
from voxtral_dist.logger import get_logger
from voxtral_dist.prediction_parts import Parts
from voxtral_dist.tasks import TASKS

log = get_logger(__name__)

SAMPLE_RATE = 16_000

ANSWER_TOKENS = 256
"""Most tokens of an answer where neither a flag nor audio to transcribe says it."""

TRANSCRIPT_TOKENS, TRANSCRIPT_TOKENS_PER_SECOND = 32, 12.5
"""Most tokens of a transcript: as many as the audio itself takes, and some. Fast speech is under 8 a second."""

ENTRIES = 3
"""Groups that a full set of rows enters in: a few ended answers already make room for the next one."""

Item = tuple[int, int]
"""Where an example is: task and number, or row and piece."""

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class DecodeSettings:
    """How to decode.

    Attributes:
        rows: most examples decoded together.
        max_new_tokens: most tokens of an answer; 0: of a transcript by the length of its audio, else ANSWER_TOKENS.
        tokens: most positions of all examples decoded together, their answers included; 0: rows x max_len.
        num_workers: threads that read and decode audio.
        audio: what every example hears: its ``own``, ``swapped``: that of another one of its task and language, or
            ``silence`` (the audio probe).
    """

    rows: int
    max_new_tokens: int = 0
    tokens: int = 0
    num_workers: int = 2
    audio: str = "own"

    def limit(self, task: str, n_samples: Int64) -> Int64:
        """Most new tokens of examples of a task, int64 [n], by their samples of audio, int64 [n]."""
        if self.max_new_tokens or not TASKS[task].transcribe:
            return n_samples * 0 + (self.max_new_tokens or ANSWER_TOKENS)
        per_second = n_samples * TRANSCRIPT_TOKENS_PER_SECOND / SAMPLE_RATE
        return TRANSCRIPT_TOKENS + per_second.astype(n_samples.dtype)


class Share:
    """One rank's part: its items, decoded and written down; those that come next are read meanwhile.

    Args:
        model: Voxtral with or without adapter, in eval mode on its device.
        data: what is decoded.
        settings: how.
    """

    def __init__(self, model: Any, data: Any, settings: DecodeSettings) -> None:
        self.model, self.data, self.settings = model, data, settings
        self.device = next(model.parameters()).device
        self.records: dict[Item, dict[str, Any]] = {}
        self.positions = self.padding = 0
        self.seconds = 0.0
        self.failure: tuple[int, str] | None = None

    def run(self, skip: set[Item], parts: Parts | None) -> None:
        """Decode until all but ``skip`` is done or a rank has failed; a failure of this one is kept for the others."""
        tokens = self.settings.tokens or self.settings.rows * self.data.max_len
        caps, started = DecodeCaps(self.settings.rows, tokens), time.perf_counter()
        groups = self.data.batches(
            distributed.rank(), distributed.world_size(), _entry(caps), self.settings.limit
        )
        groups = [[item for item in group if item not in skip] for group in groups]
        try:
            with _progress(sum(map(len, groups))) as bar:
                for record in self._decode(groups, caps):
                    bar.update()
                    if parts:
                        parts.append([record])
                        if parts.is_failed():
                            break
        except Exception as error:
            code = getattr(error, "exit_code", ExitCode.FAILURE)
            self.failure = (int(code), f"rank {distributed.rank()}: {error}")
            log.warning(
                "%s", self.failure[1], exc_info=error.__cause__ or not isinstance(error, VoxtralDistError)
            )
            if parts:
                parts.fail(self.failure[1])
        finally:
            self.seconds = time.perf_counter() - started
            if parts:
                parts.close()

    def _decode(self, groups: Sequence[list[Item]], caps: DecodeCaps) -> Iterator[dict[str, Any]]:
        """Records as they are done.

        When the model fails, for lack of memory or otherwise, what was in it is decoded one by one, so that the culprit
        is named, and the rest goes on with half as much at once.
        """
        while groups := [left for group in groups if (left := [i for i in group if i not in self.records])]:
            entered: list[Item] = []
            try:
                yield from self._stream(groups, caps, entered)
                return
            except VoxtralDistError:
                raise
            except Exception as error:
                if not entered:
                    raise
                log.warning("%s; going on with half as much at once", _first_line(error))
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            yield from self._one_by_one([item for item in entered if item not in self.records])
            caps = DecodeCaps(max(1, caps.rows // 2), max(1, caps.tokens // 2))
            size = _entry(caps).rows
            groups = [group[i : i + size] for group in groups for i in range(0, len(group), size)]

    def _one_by_one(self, items: Sequence[Item]) -> Iterator[dict[str, Any]]:
        for item in items:
            try:
                yield from self._stream([[item]], DecodeCaps(1, 0), [])
            except VoxtralDistError:
                raise
            except Exception as error:
                raise self._named(item, "decoded", error) from error

    def _stream(
        self, groups: Sequence[list[Item]], caps: DecodeCaps, entered: list[Item]
    ) -> Iterator[dict[str, Any]]:
        """Decode groups, and add to ``entered`` what goes into the model."""
        known: list[tuple[Item, Any, int]] = []

        def prompts() -> Iterator[Prompts]:
            for items, examples in self._read_ahead(groups):
                entered.extend(items)
                group = self._collate(examples)
                known.extend(zip(items, examples, group.limits, strict=True))
                yield group

        eos = self.data.collator.vocabulary.special("</s>")
        for count, answer in enumerate(decode_stream(self.model, prompts(), caps, eos_id=eos), 1):
            activity.now(f"example {count}")
            item, example, limit = known[answer.number]
            self.positions += answer.positions
            self.padding += answer.padding
            self.records[item] = {**_record(self.data, example, answer, limit), "place": list(item)}
            yield self.records[item]

    def _collate(self, examples: Sequence[Any]) -> Prompts:
        collator = self.data.collator
        prompts = [collator.prompt(example.sample, example.n_samples) for example in examples]
        input_ids, audio = collator.pad(prompts, left=True), collator.stack_audio(examples)
        return Prompts(
            input_ids.to(self.device),
            [len(prompt) for prompt in prompts],
            None if audio is None else audio.to(self.device),
            collator.audio_slots(input_ids).to(self.device),
            [self._limit(e, len(p)) for e, p in zip(examples, prompts, strict=True)],
        )

    def _limit(self, example: Any, prompt: int) -> int:
        limit = self.settings.limit(example.sample.task, np.array([example.n_samples]))
        return min(int(limit[0]), self.data.max_len - prompt)

    def _read_ahead(self, groups: Sequence[list[Item]]) -> Iterator[tuple[list[Item], list[Any]]]:
        workers = self.settings.num_workers
        with ThreadPoolExecutor(workers) as pool:
            waiting = deque(pool.submit(self._read, group) for group in groups[:workers])
            for number, group in enumerate(groups):
                examples = waiting.popleft().result()
                if number + workers < len(groups):
                    waiting.append(pool.submit(self._read, groups[number + workers]))
                yield group, examples

    def _read(self, group: Sequence[Item]) -> list[Any]:
        examples = []
        for item in group:
            try:
                examples.append(self.data.read(item, self.settings.audio))
            except VoxtralDistError:
                raise
            except Exception as error:
                raise self._named(item, "read", error) from error
        return examples

    def _named(self, item: Item, what: str, error: Exception) -> VoxtralDistError:
        return VoxtralDistError(
            f"{self.data.describe(item)} cannot be {what}: {_first_line(error)}; see the log"
        )

    def result(self) -> dict[str, Any]:
        """What rank 0 needs of this rank."""
        return {
            "records": list(self.records.values()),
            "seconds": self.seconds,
            "positions": self.positions,
            "padding": self.padding,
            "failure": self.failure,
        }


def _entry(caps: DecodeCaps) -> DecodeCaps:
    """Limits of a group that enters while others are being answered."""
    return DecodeCaps(max(1, caps.rows // ENTRIES), max(1, caps.tokens // ENTRIES))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _progress(total: int) -> Any:
    return tqdm(
        total=total, desc="decode", unit="ex", disable=distributed.rank() != 0, leave=False, mininterval=1.0
    )


def _record(data: Any, example: Any, answer: Decoded, limit: int) -> dict[str, Any]:
    """One example's line: what is scored, and under ``timing`` what varies from run to run."""
    sample = example.sample
    return {
        "task": sample.task,
        "id": sample.id,
        "language": sample.language,
        "domain": sample.domain,
        "speaker": sample.speaker,
        "document": sample.document,
        "audio_path": sample.audio_path,
        "duration": round(example.n_samples / SAMPLE_RATE, 3),
        "prompt": sample.prompt,
        "references": list(sample.references),
        "prediction": None if example.error else data.collator.vocabulary.decode(answer.tokens),
        "n_new_tokens": len(answer.tokens),
        "hit_max": len(answer.tokens) >= limit,
        "error": example.error or None,
        "timing": {
            "rank": distributed.rank(),
            "first_token_s": round(answer.first_s, 4),
            "last_token_s": round(answer.last_s, 4),
        },
    }
