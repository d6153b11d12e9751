"""Seconds of audio transcribed per second, ours against transformers' generate at batch 32:

    python tools/bench_rtfx.py [--clips N] [--rounds N] [--results FILE.json]

On a GPU the shape of Voxtral-Mini-3B in bfloat16, on a CPU that of bench_train_step.py in float32 and clips of the same
shares of a chunk; random weights. Clips fill 7 or 30 of a chunk's 30 seconds. Random weights never end an answer, so
every clip has its own limit, log-normal about four tokens a second. Both take the clips in file order: generate goes on
until the longest answer of its batch has ended, ours lets an answered clip go and the next one in. Ours decodes 32 rows
at once like the usual loop, and several times as many. All arms must give the same tokens (float32) or as many
(bfloat16, where ties fall either way). RTFx is seconds of audio over wall seconds, log-mel not counted; rounds
alternate between the arms.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_model import device_facts, random_model, shape
from train_step_data import AUDIO, FIRST_WORD, PAD

from voxtral_dist.atomic import write_bytes
from voxtral_dist.batch import DecodeCaps
from voxtral_dist.decode import Prompts, decode_stream
from voxtral_dist.errors import run_main

CLIPS, ROUNDS = {"cuda": 512, "cpu": 64}, {"cuda": 1, "cpu": 3}
"""So many that ours can fill its largest cache twice on a GPU."""

ROWS, TIMES = 32, (1, 4, 8)
"""Clips in a batch of the usual loop; ours: so many times as many at once."""

PARTS, EOS, FILLED = 3, 2, (7, 30)
"""Ours lets the next clips in when one in so many of the rows is free; ``</s>``; of a chunk's 30 seconds."""


@dataclass(frozen=True)
class Clip:
    """A transcription prompt, its log-mel [1, mel bins, frames] and how many tokens its answer has."""

    prompt: list[int]
    mel: torch.Tensor
    limit: int


def draw_clips(config: Any, count: int, filled: int) -> list[Clip]:
    """Clips that fill so many of a chunk's 30 seconds."""
    random, generator = np.random.default_rng(filled), torch.Generator().manual_seed(filled)
    audio = config.audio_config
    chunk_tokens, frames = audio.max_source_positions // 4, 2 * audio.max_source_positions
    seconds = frames / 100 * filled / 30
    limits = np.clip(random.lognormal(np.log(4 * seconds), 0.3, count), 2, 8 * seconds + 2).astype(int)
    prompts = [
        [
            1,
            3,
            25,
            *[AUDIO] * chunk_tokens,
            4,
            *random.integers(FIRST_WORD, config.text_config.vocab_size, 3),
            34,
        ]
        for _ in limits
    ]
    mels = torch.randn(count, 1, audio.num_mel_bins, frames, generator=generator)
    return [Clip(*each) for each in zip(prompts, mels, limits.tolist(), strict=True)]


def prompts_of(clips: Sequence[Clip], device: torch.device) -> Prompts:
    """Prompts of equal length, on the device."""
    ids = torch.tensor([clip.prompt for clip in clips])
    slots = (ids.flatten() == AUDIO).nonzero().flatten().to(device)
    mel = torch.cat([clip.mel for clip in clips]).to(device)
    return Prompts(ids.to(device), [ids.shape[1]] * len(clips), mel, slots, [clip.limit for clip in clips])


def usual(voxtral: Any, clips: Sequence[Clip], device: torch.device) -> list[list[int]]:
    """``generate`` on batches of 32 in file order."""
    answers: list[list[int]] = []
    for first in range(0, len(clips), ROWS):
        batch = prompts_of(clips[first : first + ROWS], device)
        out = voxtral.generate(
            input_ids=batch.input_ids,
            attention_mask=torch.ones_like(batch.input_ids),
            input_features=None if batch.audio is None else batch.audio.to(voxtral.dtype),
            do_sample=False,
            max_new_tokens=max(batch.limits),
            eos_token_id=EOS,
            pad_token_id=PAD,
        )[:, batch.input_ids.shape[1] :]
        answers += [row[:limit] for row, limit in zip(out.tolist(), batch.limits, strict=True)]
    return answers


def ours(voxtral: Any, clips: Sequence[Clip], device: torch.device, rows: int) -> list[list[int]]:
    """As evaluation decodes clips of one length: ``rows`` at once, since it does not know how long answers will be."""
    size = max(1, rows // PARTS)
    groups = (clips[first : first + size] for first in range(0, len(clips), size))
    waiting = (prompts_of(group, device) for group in groups)
    answers: list[list[int]] = [[] for _ in clips]
    for answer in decode_stream(voxtral, waiting, DecodeCaps(rows, 1 << 60), eos_id=EOS):
        answers[answer.number] = answer.tokens
    return answers


def compare(voxtral: Any, clips: Sequence[Clip], seconds: float, rounds: int) -> dict[str, dict[str, float]]:
    """RTFx of each arm and its ratio to the usual one, by arm; printed."""
    device = next(voxtral.parameters()).device
    arms: dict[str, Callable[[], list[list[int]]]] = {
        f"generate, {ROWS} rows": partial(usual, voxtral, clips, device)
    }
    for times in TIMES:
        arms[f"ours, {times * ROWS} rows"] = partial(ours, voxtral, clips, device, times * ROWS)
    for arm in (usual, partial(ours, rows=ROWS)):
        arm(voxtral, clips[:ROWS], device)
    expected: list[list[int]] = []
    took: dict[str, list[float]] = {name: [] for name in arms}
    for name in [*arms] * rounds:
        started = time.perf_counter()
        found = arms[name]()
        took[name].append(time.perf_counter() - started)
        print(f"    {name}: RTFx {len(clips) * seconds / took[name][-1]:.1f}", file=sys.stderr, flush=True)
        expected = expected or found
        same = (
            found == expected
            if voxtral.dtype is torch.float32
            else list(map(len, found)) == list(map(len, expected))
        )
        assert same, f"{name} gives another text"
    first = next(iter(arms))
    rows = {}
    for name, each in took.items():
        ratio = float(np.median([a / b for a, b in zip(took[first], each, strict=True)]))
        rows[name] = {"rtfx": len(clips) * seconds / float(np.median(each)), "ratio": ratio}
        print(f"  {name}: {ratio:.2f} times the usual loop", flush=True)
    return rows


def bench(device: torch.device, count: int, rounds: int) -> dict[str, Any]:
    """Both clip lengths; returns the facts and the figures."""
    config = shape(device)
    voxtral = random_model(config, device).unload().eval()
    voxtral.lm_head.weight.data[EOS] = 0
    facts = device_facts(device)
    print(json.dumps(facts))
    found: dict[str, Any] = dict(facts)
    for filled in FILLED:
        seconds = config.audio_config.max_source_positions / 50 * filled / 30
        print(f"{count} clips that fill {filled} of 30 s of a chunk")
        found[f"{filled} of 30 s"] = compare(voxtral, draw_clips(config, count, filled), seconds, rounds)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clips", type=int, default=CLIPS[device.type], help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS[device.type], help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    found = bench(device, args.clips, args.rounds)
    if args.results:
        write_bytes(args.results, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    run_main(main)
