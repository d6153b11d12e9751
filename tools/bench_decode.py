"""Decoding speed against the usual loop: ``python tools/bench_decode.py [RUN]``, a run of the quickstart

The usual loop pads the questions in file order to batches of eight and calls transformers' ``generate`` (greedy), which
goes on until the longest answer of the batch has ended. Ours decodes as ``launch/evaluate.py`` does, once in the cache
that eight rows of the longest length allowed would take, once in four times as much. All answer the same questions with
the same limits, and must give the same text. The log-mel is there before.

Two models: the demo's, with its adapter, on its dev sets; and random weights, 100 million of them, on questions with
log-normal clip lengths, whose answers end by chance (the weight of ``</s>`` is raised) or at their limits. A clip takes
one chunk whatever its length, as nearly all do in the released model. Rounds alternate between the arms after a
warm-up, and the median of the rounds' ratios counts: a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from build_tiny_voxtral import draw_weights, model_config

from voxtral_dist import adapter, checkpoint, model
from voxtral_dist.audio import AudioSpec
from voxtral_dist.batch import DecodeCaps
from voxtral_dist.collator import Collator
from voxtral_dist.config import load_yaml
from voxtral_dist.decode import Decoded, Prompts, decode_stream
from voxtral_dist.errors import UserError, run_main
from voxtral_dist.eval_data import decode_groups, expected_tokens
from voxtral_dist.task_data import open_tasks
from voxtral_dist.tokenizer import TekkenVocabulary

ROWS, TIMES = 8, (1, 4)
"""Questions in a batch of the usual loop, and ours: the cache of so many times as many."""

PARTS = 3
"""Ours lets the next questions in when one in so many of the rows is free."""

EOS, PAD, AUDIO = 2, 11, 24

EOS_SCALE, ANSWER_TOKENS, TOKENS_PER_SECOND, MAX_LEN = 2.4, 64, 6, 256
"""Of the random model: how much its ``</s>`` is raised, the longest answer, transcript by its audio, and row."""


@dataclass(frozen=True)
class Question:
    """A prompt's ids, its log-mel chunks or None, its answer limit and about how long its answer will be."""

    prompt: list[int]
    mel: torch.Tensor | None
    limit: int
    expected: int


Answers = list[list[int]]


def prompts_of(questions: Sequence[Question]) -> Prompts:
    """Questions padded on the left."""
    width = max(len(q.prompt) for q in questions)
    ids = torch.tensor([[PAD] * (width - len(q.prompt)) + q.prompt for q in questions])
    mels = [q.mel for q in questions if q.mel is not None]
    slots = (ids.flatten() == AUDIO).nonzero().flatten()
    lengths, limits = [len(q.prompt) for q in questions], [q.limit for q in questions]
    return Prompts(ids, lengths, torch.cat(mels) if mels else None, slots, limits)


def usual(voxtral: Any, questions: Sequence[Question]) -> Answers:
    """Padded in file order, ``generate`` until the longest answer of each batch."""
    answers: Answers = []
    for first in range(0, len(questions), ROWS):
        batch = prompts_of(questions[first : first + ROWS])
        width = batch.input_ids.shape[1]
        out = voxtral.generate(
            input_ids=batch.input_ids,
            attention_mask=(torch.arange(width) >= width - torch.tensor(batch.lengths)[:, None]).long(),
            input_features=batch.audio,
            do_sample=False,
            max_new_tokens=max(batch.limits),
            eos_token_id=EOS,
            pad_token_id=PAD,
        )[:, width:]
        rows = [row[:limit] for row, limit in zip(out.tolist(), batch.limits, strict=True)]
        answers += [row[: row.index(EOS)] if EOS in row else row for row in rows]
    return answers


def ours(voxtral: Any, questions: Sequence[Question], tokens: int, parts: int = PARTS) -> list[Decoded]:
    """In a cache of ``tokens`` positions; with one part, no question enters while others are being answered."""
    prompts, limits, expected = np.array([(len(q.prompt), q.limit, q.expected) for q in questions]).T
    groups = decode_groups(prompts, limits, expected, DecodeCaps(len(questions), tokens // parts))
    order = np.concatenate(groups)
    waiting = (prompts_of([questions[i] for i in group]) for group in groups)
    answers: list[Any] = [None] * len(questions)
    for answer in decode_stream(voxtral, waiting, DecodeCaps(len(questions), tokens), eos_id=EOS):
        answers[order[answer.number]] = answer
    return answers


def measure(voxtral: Any, questions: Sequence[Question], max_len: int, rounds: int) -> dict[str, list[float]]:
    """Print the ratios of ours over the usual loop and what explains them; returns the ratios by arm and time."""
    passes, expected = counted(voxtral, partial(usual, voxtral, questions))
    lengths = [len(answer) for answer in expected]
    limited = sum(n >= q.limit for n, q in zip(lengths, questions, strict=True))
    print(
        f"  {len(questions)} questions, answers of {np.median(lengths):.0f} tokens in the median and "
        f"{max(lengths)} at most, {limited} at their limit; usual: {passes} passes of the language model"
    )
    arms: dict[str, Callable[[], Any]] = {"usual": partial(usual, voxtral, questions)}
    for times in TIMES:
        tokens, name = times * ROWS * max_len, f"ours, {times} x the cache"
        for parts in (1, PARTS):
            passes, found = counted(voxtral, partial(ours, voxtral, questions, tokens, parts))
            assert [answer.tokens for answer in found] == expected, f"{name} gives another text"
            padding = sum(a.padding for a in found) / sum(a.positions for a in found)
            entry = "as soon as rows are free" if parts > 1 else "when all have ended"
            print(f"  {name}, the next enter {entry}: the same text, {passes} passes, padding {padding:.0%}")
        arms[name] = partial(ours, voxtral, questions, tokens)
    ratios = paired(arms, rounds)
    for kind, values in ratios.items():
        low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
        print(f"  {kind}: {middle:.2f} (quartiles {low:.2f} to {high:.2f}, {rounds} rounds)")
    return ratios


def counted(voxtral: Any, arm: Callable[[], Any]) -> tuple[int, Any]:
    """How often an arm calls the language model, and what it returns."""
    calls: list[None] = []
    hook = voxtral.model.language_model.register_forward_hook(lambda *_: calls.append(None))
    result = arm()
    hook.remove()
    return len(calls), result


def paired(arms: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Questions per second of the later arms over those of the first, one ratio a round, by CPU and wall time."""
    ratios: dict[str, list[float]] = {}
    for _ in range(rounds):
        seconds = {name: timed(arm) for name, arm in arms.items()}
        first, *others = seconds
        for name in others:
            for kind, a, b in zip(("CPU", "wall"), seconds[first], seconds[name], strict=True):
                ratios.setdefault(f"{name} / {first}, per {kind} second", []).append(a / b)
    return ratios


def timed(arm: Callable[[], Any]) -> tuple[float, float]:
    """CPU and wall seconds of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    arm()
    return time.process_time() - cpu, time.perf_counter() - wall


def demo(run: Path, rounds: int = 5) -> dict[str, list[float]]:
    """The best adapter of a run on its dev sets."""
    settings = load_yaml(run / "config.yaml") if (run / "config.yaml").is_file() else {}
    if not settings.get("val_shards"):
        raise UserError(f"{run} is no run with packed dev sets; make one with: bash launch/quickstart.sh")
    base = str(settings["model_id"])
    tuned = adapter.load(model.load(base, torch.float32), checkpoint.find_adapter(run)).eval()
    collator = Collator(TekkenVocabulary.load(base), AudioSpec.from_config(model.read_config(base)))
    limit = int(settings["eval_max_new_tokens"])
    questions = []
    for task in open_tasks(str(settings["val_shards"]).split(","), collator):
        for example in map(task.read, range(len(task))):
            prompt = collator.prompt(example.sample, example.n_samples)
            expected = expected_tokens(task.name, np.array([example.n_samples]), np.array([limit]))
            questions.append(Question(prompt, example.mel, limit, int(expected[0])))
    print(f"the demo's model, {len(questions)} dev rows of {run.name}")
    return measure(model.unwrap(tuned), questions, int(settings["max_len"]), rounds)


def large(
    counts: tuple[int, int, int] = (32, 16, 16), hidden: int = 896, layers: int = 12, rounds: int = 3
) -> dict[str, list[float]]:
    """Random weights on as many questions of ASR, SQA and TQA."""
    config = model_config(100, hidden, layers, vocab_size=8192)
    config.text_config.update({"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64})
    voxtral = transformers.VoxtralForConditionalGeneration(config).eval()
    draw_weights(voxtral, 0)
    voxtral.lm_head.weight.data[EOS] *= EOS_SCALE
    size = sum(parameter.numel() for parameter in voxtral.parameters()) / 1e6
    print(f"random weights, {size:.0f} million")
    return measure(voxtral, list(draw_questions(counts, config)), MAX_LEN, rounds)


def draw_questions(counts: tuple[int, int, int], config: Any) -> Iterator[Question]:
    """Questions in the order of three files: transcripts, spoken and written questions."""
    rng, spec = np.random.default_rng(0), AudioSpec.from_config(config)
    random = torch.Generator().manual_seed(0)
    for task, count in zip(("asr", "sqa", "tqa"), counts, strict=True):
        for _ in range(count):
            seconds = float(np.clip(rng.lognormal(np.log(7), 0.7), 1, 30))
            words = 4 if task == "asr" else int(np.clip(rng.lognormal(np.log(15), 0.5), 5, 60))
            limit = int(TOKENS_PER_SECOND * seconds) if task == "asr" else ANSWER_TOKENS
            ids = [1, 3, *rng.integers(1000, config.text_config.vocab_size, words).tolist(), 4]
            mel = torch.rand(1, spec.num_mel_bins, spec.chunk_frames, generator=random)
            if task != "tqa":
                ids[2:2] = [AUDIO] * spec.tokens_per_chunk
            samples, limits = np.array([int(16_000 * seconds)]), np.array([limit])
            expected = int(expected_tokens(task, samples, limits)[0])
            yield Question(ids, None if task == "tqa" else mel, limit, expected)


def main() -> None:
    """Both models."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/quickstart"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, one of {os.cpu_count()} cores, float32; questions per second, ratios")
    demo(args.run)
    large()


if __name__ == "__main__":
    run_main(main)
