"""Made-up examples with the lengths of a mixed speech corpus, as micro-batches: for the benchmarks of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from voxtral_dist.batch import MicroBatch

AUDIO, PAD, FIRST_WORD = 24, 11, 1000

TASKS, WEIGHTS = ("asr", "sqa", "tqa"), (1.0, 1.5, 1.2)


@dataclass(frozen=True)
class Lengths:
    """One example: its task by index, prompt and target positions, audio chunks and seconds of audio."""

    task: int
    prompt: int
    target: int
    chunks: int
    seconds: float

    @property
    def positions(self) -> int:
        """Language-model positions."""
        return self.prompt + self.target


def draw_lengths(count: int, seed: int, tokens_per_chunk: int, chunk_seconds: float) -> list[Lengths]:
    """Lengths of a mixed speech corpus: log-normal clips and texts, tasks 1.0 : 1.5 : 1.2.

    Medians for chunks of 30 s: transcripts of 6 s at 4 tokens a second, questions about 20 s (up to three chunks) with
    answers of 30 tokens, instructions of 80 tokens with answers of 120. Other chunks scale all of it.
    """
    random, scale = np.random.default_rng(seed), chunk_seconds / 30
    drawn = []
    for task in random.choice(len(TASKS), count, p=np.array(WEIGHTS) / sum(WEIGHTS)).tolist():
        name = TASKS[task]

        def near(median: float, spread: float, most: float) -> float:
            return float(min(random.lognormal(np.log(median * scale), spread), most * scale))

        if name == "tqa":
            drawn.append(Lengths(task, 4 + int(near(80, 0.7, 600)), 1 + int(near(120, 0.7, 500)), 0, 0.0))
            continue
        seconds = near(6, 0.6, 29.9) if name == "asr" else near(20, 0.6, 89.9)
        chunks = int(np.ceil(seconds / chunk_seconds))
        text, target = (5, 4 * seconds) if name == "asr" else (near(20, 0.4, 60), near(30, 0.7, 200))
        prompt = 4 + int(text) + chunks * tokens_per_chunk
        drawn.append(Lengths(task, prompt, 1 + int(target), chunks, seconds))
    return drawn


def content(example: Lengths, config: Any, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random token ids [positions] and log-mel [chunks, mel bins, frames] of an example."""
    audio, random = config.audio_config, torch.Generator().manual_seed(seed)
    per_chunk = audio.max_source_positions * audio.hidden_size // audio.intermediate_size
    ids = torch.randint(FIRST_WORD, config.text_config.vocab_size, (example.positions,), generator=random)
    ids[3 : 3 + example.chunks * per_chunk] = AUDIO
    shape = (example.chunks, audio.num_mel_bins, 2 * audio.max_source_positions)
    return ids, torch.randn(shape, generator=random)


def collate(examples: Sequence[Lengths], numbers: Sequence[int], config: Any, packed: bool) -> MicroBatch:
    """The examples of these numbers as a micro-batch, one row each or ``packed`` into one."""
    drawn = [content(examples[number], config, number) for number in numbers]
    examples, rows = [examples[number] for number in numbers], [ids for ids, _ in drawn]
    width = max(example.positions for example in examples)
    if packed:
        ids, starts = torch.cat(rows)[None], np.cumsum([0, *(e.positions for e in examples)]).tolist()
    else:
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        starts = [row * width for row in range(len(rows))]
    index = torch.cat(
        [torch.arange(s + e.prompt - 1, s + e.positions - 1) for s, e in zip(starts, examples, strict=False)]
    )
    labels = torch.cat([row[e.prompt :] for row, e in zip(rows, examples, strict=True)])
    mel = torch.cat([mel for _, mel in drawn])
    tasks = torch.tensor([example.task for example in examples])
    return MicroBatch(
        input_ids=ids,
        position_ids=torch.cat([torch.arange(e.positions) for e in examples])[None] if packed else None,
        audio=mel if len(mel) else None,
        audio_index=(ids.flatten() == AUDIO).nonzero().flatten(),
        label_index=index,
        labels=labels,
        label_task=tasks.repeat_interleave(torch.tensor([example.target for example in examples])),
        label_weight=torch.ones(len(labels)),
        first_draw=0,
        keys=[],
        samples=len(examples),
        tokens=sum(example.positions for example in examples),
        audio_seconds=sum(example.seconds for example in examples),
    )
