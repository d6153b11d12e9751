"""``--dry_run``: what a run would do, from data and config alone. Nothing is trained and no weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from voxtral_dist.config import TrainConfig
from voxtral_dist.data import TrainData
from voxtral_dist.loss import IGNORE_INDEX
from voxtral_dist.plan import split_draws
from voxtral_dist.report import table

PROMPTS_SHOWN = 10
ASSUMED_FLOPS = 400e12
"""Matmul rate that the time estimate assumes per GPU: 40% of the dense bf16 peak of an H100."""


def plan_lines(data: TrainData, world_size: int) -> list[str]:
    """The plan in a few lines: steps, mix, what was left out, predicted balance."""
    plan = data.plan
    draws = split_draws(plan.total_draws, plan.weights)
    rows = [
        [
            name,
            f"{len(stream):,}",
            f"{data.overlong[name]:,}",
            f"{n:,}",
            f"{n / plan.total_draws:.1%}",
            f"{n / len(stream):.2f}",
        ]
        for name, stream, n in zip(data.names, plan.streams, draws, strict=True)
    ]
    header = ["task", "examples", "too long", "draws", "share of draws", "task epochs"]
    balance = data.balance(world_size)
    lines = [
        f"{plan.num_steps:,} steps of {plan.global_batch_size} examples on {world_size} rank(s), "
        f"{plan.total_draws:,} draws, predicted balance {balance:.3f}",
        *table(header, rows).splitlines(),
    ]
    if balance < 0.95:
        per_rank = plan.global_batch_size / world_size
        lines.append(
            f"balance {balance:.3f}: with {per_rank:.1f} examples per rank the ranks wait for the largest one; "
            "raise --grad_accum or --global_batch_size to about 8 or more per rank"
        )
    return lines


def prompt_lines(data: TrainData) -> Iterator[str]:
    """Ten prompts of the first step, decoded, each with its label mask: ``·`` without label, ``#`` with one."""
    step = data.plan.step(0)
    stride = max(1, len(step) // PROMPTS_SHOWN)
    vocabulary, audio_id = data.collator.vocabulary, data.collator.vocabulary.special("[AUDIO]")
    for draw in range(0, min(len(step), stride * PROMPTS_SHOWN), stride):
        task = data.tasks[int(step.tasks[draw])]
        example = task.read(int(step.examples[draw]))
        batch = data.collator.train_batch([example], 0)
        ids = batch.input_ids[0]
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[batch.label_index + 1] = batch.labels
        yield f"{task.name} {example.sample.source}: {len(ids)} positions, {len(batch.labels)} labels"
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
    config: TrainConfig, model_config: Any, data: TrainData, world_size: int, bytes_per_weight: int
) -> list[str]:
    """Estimates of memory per rank and of time, from the model's config and the plan."""
    base, adapter = _count_parameters(config, model_config)
    text = model_config.text_config
    # what a decoder layer with adapters keeps per token for its backward pass: inputs of seven linears and of attention
    per_token = (
        (8 * text.hidden_size + 4 * text.intermediate_size) * bytes_per_weight * text.num_hidden_layers
    )
    if config.grad_ckpt:
        per_token = text.hidden_size * bytes_per_weight * text.num_hidden_layers
    gib = 1 << 30
    weights, states = base * bytes_per_weight / gib, adapter * (8 + 12 / world_size) / gib
    activations = data.caps.tokens * per_token / gib
    cost = sum(int(data.step_costs(data.plan.step(i)).sum()) for i in range(min(20, data.plan.num_steps)))
    flops = cost / min(20, data.plan.num_steps) / 1000 * 4 * _body_parameters(text)
    hours = flops * data.plan.num_steps / (ASSUMED_FLOPS * world_size) / 3600
    return [
        f"memory per rank, estimated: {weights:.2f} GiB weights ({base:,} frozen), {states:.2f} GiB adapter and "
        f"optimizer ({adapter:,} trained), up to {activations:.2f} GiB activations at {data.caps.tokens:,} positions "
        "per micro-batch",
        f"time, estimated: {flops / 1e12:.3g} TFLOP per step; {hours:.3g} h if each rank ran at "
        f"{ASSUMED_FLOPS / 1e12:.0f} TFLOP/s (40% of an H100's bf16 peak)",
    ]


def _body_parameters(text: Any) -> int:
    """Parameters of the language model's layers, without embeddings and head."""
    head = text.head_dim or text.hidden_size // text.num_attention_heads
    attention = text.hidden_size * head * (2 * text.num_attention_heads + 2 * text.num_key_value_heads)
    return int(text.num_hidden_layers * (attention + 3 * text.hidden_size * text.intermediate_size))


def _count_parameters(config: TrainConfig, model_config: Any) -> tuple[int, int]:
    """Frozen and trained parameters, counted on the meta device."""
    from transformers import VoxtralForConditionalGeneration

    from voxtral_dist import adapter
    from voxtral_dist.prepare import lora_settings

    with torch.device("meta"):
        wrapped = adapter.attach(
            VoxtralForConditionalGeneration(model_config).requires_grad_(False), lora_settings(config)
        )
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    return sum(p.numel() for p in wrapped.parameters()) - trained, trained
