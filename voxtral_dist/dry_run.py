"""``--dry_run``: what a run would do, from data and config alone. Nothing is trained and no weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from voxtral_dist import memory, prepare
from voxtral_dist.config import TrainConfig
from voxtral_dist.data import TrainData
from voxtral_dist.flops import VoxtralFlops
from voxtral_dist.loss import IGNORE_INDEX
from voxtral_dist.report import table

PROMPTS_SHOWN = 10
LOW_BALANCE, GOOD_BALANCE = 0.95, 0.98
MANY_EPOCHS = 20
ASSUMED_FLOPS = 400e12
"""Matmul rate that the time estimate assumes per GPU: 40% of the dense bf16 peak of an H100."""


def plan_lines(data: TrainData, world_size: int) -> list[str]:
    """The plan in a few lines: steps, mix, what was left out, predicted balance."""
    plan = data.plan
    draws = plan.own_draws_after(plan.num_steps)
    rows = [
        [
            name,
            f"{len(stream):,}",
            f"{len(data.left_out[name]):,}",
            f"{n:,}",
            f"{n / plan.total_draws:.1%}",
            f"{n / len(stream):.2f}",
        ]
        for name, stream, n in zip(data.names, plan.streams, draws, strict=True)
    ]
    header = ["task", "examples", "too long", "draws", "share of draws", "task epochs"]
    balance = data.balance(world_size)
    lines = [
        f"{plan.num_steps:,} steps of {plan.segments[-1].global_batch_size} examples on {world_size} rank(s), "
        f"{plan.total_draws:,} draws, predicted balance {balance:.3f}",
        *table(header, rows).splitlines(),
    ]
    if balance < LOW_BALANCE:
        lines.append(_balance_advice(data, world_size, balance))
    return [*lines, *_repeat_warnings(data, draws)]


def _balance_advice(data: TrainData, world_size: int, balance: float) -> str:
    """What would make the ranks finish together: the smallest multiple of the step that balances, if there is one."""
    per_rank = data.plan.segments[-1].global_batch_size / world_size
    for factor in (2, 3, 4, 6, 8, 12, 16):
        if data.balance(world_size, steps=8, factor=factor) >= GOOD_BALANCE:
            return (
                f"balance {balance:.3f}: with {per_rank:g} examples per rank the ranks wait for the dearest one; "
                f"--grad_accum {factor} times as large would reach {GOOD_BALANCE}"
            )
    return f"balance {balance:.3f}: the examples' costs differ too much for {world_size} ranks, whatever --grad_accum"


def _repeat_warnings(data: TrainData, draws: Sequence[int]) -> list[str]:
    """Tasks of which a step needs more examples than there are, or that are repeated very often."""
    segment, out = data.plan.segments[-1], []
    per_step = [w * segment.global_batch_size / sum(segment.weights) for w in segment.weights]
    for name, stream, each, n in zip(data.names, data.plan.streams, per_step, draws, strict=True):
        if each > len(stream):
            out.append(
                f"warning: a step draws {each:.0f} of {len(stream)} {name} examples: some repeat within it"
            )
        elif n / len(stream) > MANY_EPOCHS:
            out.append(
                f"warning: {name} is repeated {n / len(stream):.0f} times; a smaller weight would overfit less"
            )
    return out


def prompt_lines(data: TrainData) -> Iterator[str]:
    """Ten prompts of the first step, decoded, each with its label mask: ``·`` without label, ``#`` with one."""
    step = data.plan.step(0)
    stride = max(1, len(step) // PROMPTS_SHOWN)
    vocabulary = data.collator.vocabulary
    for draw in range(0, min(len(step), stride * PROMPTS_SHOWN), stride):
        task = data.tasks[int(step.tasks[draw])]
        example = task.read(int(step.examples[draw]))
        batch = data.collator.train_batch([example], 0)
        ids = batch.input_ids[0]
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[batch.label_index + 1] = batch.labels
        yield f"{task.name} {example.sample.source}: {len(ids)} positions, {len(batch.labels)} labels"
        yield from masked_lines(ids, labels, vocabulary)


def masked_lines(ids: torch.Tensor, labels: torch.Tensor, vocabulary: Any) -> Iterator[str]:
    """Prompt, target and label mask of an example: ``·`` without label, ``#`` with one, audio slots left out.

    Args:
        ids: int64 [L].
        labels: int64 [L], IGNORE_INDEX where there is none.
        vocabulary: of the model.
    """
    audio_id = vocabulary.special("[AUDIO]")
    yield f"  prompt {_show(ids[labels == IGNORE_INDEX].tolist(), vocabulary, audio_id)}"
    yield f"  target {_show(ids[labels != IGNORE_INDEX].tolist(), vocabulary, audio_id)}"
    text = ids != audio_id
    yield "  mask   " + "".join("·" if label == IGNORE_INDEX else "#" for label in labels[text].tolist())


def _show(ids: list[int], vocabulary: Any, audio_id: int) -> str:
    """Ids as text: special tokens by name, the run of audio slots as a count, the rest decoded."""
    names = {
        vocabulary.special(n): n
        for n in ("<s>", "</s>", "[INST]", "[/INST]", "[BEGIN_AUDIO]", "[TRANSCRIBE]")
    }
    out = ""
    words: list[int] = []

    def flush() -> str:
        text = vocabulary.decode(words) if words else ""
        words.clear()
        return text

    slots = ids.count(audio_id)
    for token in ids:
        if token in names:
            out += flush() + names[token]
        elif token == audio_id:
            out += flush() + ("[AUDIO]" if not out.endswith("[AUDIO]") else "")
        else:
            words.append(token)
    return (out + flush()).replace("[AUDIO]", f"[AUDIO]*{slots}" if slots else "").replace("\n", "⏎")


def size_lines(
    config: TrainConfig, model_config: Any, data: TrainData, world_size: int, bf16: bool
) -> list[str]:
    """Estimates of memory per rank and of time, from the model's config and the plan."""
    shape = memory.largest_shape(config, model_config)
    lora = prepare.lora_settings(config)
    needs = memory.estimate(config, model_config, lora, ranks=world_size, shape=shape, bf16=bf16)
    steps = min(20, data.plan.num_steps)
    cost = sum(int(data.step_costs(data.plan.step(i)).sum()) for i in range(steps))
    flops = cost / steps / 1000 * 2 * VoxtralFlops.from_config(model_config).token
    hours = flops * data.plan.num_steps / (ASSUMED_FLOPS * world_size) / 3600
    return [
        f"memory per rank, estimated, at {shape.positions:,} positions per micro-batch:",
        *needs.lines(),
        f"time, estimated: {flops / 1e12:.3g} TFLOP per step; {hours:.3g} h if each rank ran at "
        f"{ASSUMED_FLOPS / 1e12:.0f} TFLOP/s (40% of an H100's bf16 peak)",
    ]
