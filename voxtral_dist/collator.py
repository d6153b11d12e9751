"""From examples to a micro-batch: prompt and target ids in padded rows, the labels and audio slots as flat indices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch

from voxtral_dist.audio import SAMPLE_RATE, AudioSpec
from voxtral_dist.batch import MicroBatch
from voxtral_dist.sample import Sample
from voxtral_dist.tasks import prompt_ids, target_ids
from voxtral_dist.tokenizer import TekkenVocabulary


@dataclass(frozen=True)
class Example:
    """A sample that has been read.

    Attributes:
        sample: its words.
        mel: float32 [chunks, mel bins, frames], None for a text task.
        n_samples: samples of its audio at 16 kHz.
        task: index of its task among the run's tasks.
        weight: what each of its labels weighs in the loss sum.
        key: name in its shard, for messages.
        error: why its audio could not be read; ``mel`` is then silence of the planned size and ``weight`` 0.
        encoded: [chunks, encoder positions, encoder width], its states from an encoder cache, instead of ``mel``.
        audio_key: its name in the encoder cache, empty without one.
    """

    sample: Sample
    mel: torch.Tensor | None
    n_samples: int
    task: int
    weight: float
    key: str
    error: str = ""
    encoded: torch.Tensor | None = None
    audio_key: str = ""


@dataclass(frozen=True)
class Collator:
    """Makes micro-batches and decoding prompts of one model.

    Attributes:
        vocabulary: the model's tokenizer.
        spec: sizes of the model's audio input.
        spoken_question: leave the written question of audio tasks out.
    """

    vocabulary: TekkenVocabulary
    spec: AudioSpec
    spoken_question: bool = False

    def prompt(self, sample: Sample, n_samples: int) -> list[int]:
        """Ids of everything before the target, for ``n_samples`` of audio."""
        audio_tokens = int(self.spec.chunks(n_samples)) * self.spec.tokens_per_chunk
        return prompt_ids(sample, self.vocabulary, audio_tokens, self.spoken_question)

    def train_batch(self, examples: Sequence[Example], first_draw: int, packed: bool = False) -> MicroBatch:
        """Prompt, target and ``</s>`` of each example; labels on target and ``</s>`` alone.

        Args:
            examples: at least one.
            first_draw: see :class:`MicroBatch`.
            packed: put them into one row one behind the other, else one per row with padding on the right.
        """
        prompts = [self.prompt(example.sample, example.n_samples) for example in examples]
        targets = [target_ids(example.sample.target, self.vocabulary) for example in examples]
        rows = [prompt + target for prompt, target in zip(prompts, targets, strict=True)]
        lengths = [len(row) for row in rows]
        input_ids = torch.tensor([list(chain(*rows))]) if packed else self.pad(rows)
        starts = (
            [0, *accumulate(lengths)] if packed else [row * input_ids.shape[1] for row in range(len(rows))]
        )
        label_index: list[int] = []
        for start, prompt, target in zip(starts, prompts, targets, strict=False):
            first = start + len(prompt) - 1
            label_index += range(first, first + len(target))
        counts = torch.tensor([len(target) for target in targets])
        encoded = [example.encoded for example in examples if example.encoded is not None]
        return MicroBatch(
            input_ids=input_ids,
            position_ids=torch.cat([torch.arange(n) for n in lengths])[None] if packed else None,
            audio=self.stack_audio(examples),
            audio_index=self._slots(examples, input_ids) if encoded else self.audio_slots(input_ids),
            label_index=torch.tensor(label_index),
            labels=torch.tensor(list(chain(*targets))),
            label_task=torch.tensor([example.task for example in examples]).repeat_interleave(counts),
            label_weight=torch.tensor([example.weight for example in examples]).repeat_interleave(counts),
            first_draw=first_draw,
            keys=[example.key for example in examples],
            samples=len(examples),
            tokens=sum(lengths),
            audio_seconds=sum(example.n_samples for example in examples) / SAMPLE_RATE,
            bad_samples=[f"{example.key}: {example.error}" for example in examples if example.error],
            encoded=torch.cat(encoded) if encoded else None,
            audio_keys=self._audio_keys(examples),
        )

    @staticmethod
    def _audio_keys(examples: Sequence[Example]) -> list[tuple[str, int]]:
        """Name and chunks of each log-mel; empty without an encoder cache."""
        keys = [(example.audio_key, len(example.mel)) for example in examples if example.mel is not None]
        return keys if any(key for key, _ in keys) else []

    def _slots(self, examples: Sequence[Example], input_ids: torch.Tensor) -> torch.Tensor:
        """Flat positions of the slots, those of log-mel first, then those of cached states."""
        slots = self.audio_slots(input_ids)
        heard = [example for example in examples if example.mel is not None or example.encoded is not None]
        sizes = [int(self.spec.chunks(example.n_samples)) * self.spec.tokens_per_chunk for example in heard]
        pieces = list(zip(heard, slots.split(sizes), strict=True))
        fresh = [piece for example, piece in pieces if example.encoded is None]
        return torch.cat(fresh + [piece for example, piece in pieces if example.encoded is not None])

    def pad(self, rows: Sequence[list[int]], left: bool = False) -> torch.Tensor:
        """int64 [rows, longest], padded on the right, or on the left for decoding."""
        width, pad = max(map(len, rows)), self.vocabulary.special("<pad>")
        fill = [[pad] * (width - len(row)) for row in rows]
        return torch.tensor([f + r if left else r + f for r, f in zip(rows, fill, strict=True)])

    def audio_slots(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Flat positions of the ``[AUDIO]`` slots of ``input_ids``, in row order."""
        return (input_ids.flatten() == self.vocabulary.special("[AUDIO]")).nonzero().flatten()

    @staticmethod
    def stack_audio(examples: Sequence[Example]) -> torch.Tensor | None:
        """All chunks in row order, float32 [C, mel bins, frames]; None without audio."""
        mels = [example.mel for example in examples if example.mel is not None]
        return torch.cat(mels) if mels else None
