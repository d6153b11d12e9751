"""Speed and memory of a training step, from the usual recipe to ours, a lever at a time:

    python tools/bench_train_step.py                  the device at hand: on a GPU the shape of Voxtral-Mini-3B in
                                                      bfloat16, on a CPU a shape of 136 million weights in float32
    python tools/bench_train_step.py --rounds 5 --arms 'usual;fused AdamW' --results FILE.json
    python tools/bench_train_step.py --rounds 1 --steps 2 --minutes 7     on a GPU that is lent for ten minutes

The weights are random and the model is made on the device, so nothing is downloaded. Every arm trains on the same
examples (see train_step_data.py for their lengths); rounds alternate between the arms after a warm-up and the median
of the rounds counts, for the speed that of the ratios within a round. Before that the gradients of neighbouring arms
are compared, without dropout. Useful FLOPs are those of voxtral_dist/flops.py: nothing for padding and nothing twice.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_model import device_facts, random_model, shape
from step_meter import (
    TRIES,
    Measured,
    clips,
    floors,
    keep_freed_memory,
    memory_by_rows,
    profile,
    run_round,
)
from train_step_arms import Arms, Levers
from train_step_data import Lengths, draw_lengths

from voxtral_dist import flops
from voxtral_dist.atomic import write_bytes
from voxtral_dist.errors import UserError, run_main
from voxtral_dist.micro_batches import OVERHEAD
from voxtral_dist.packed_attention import FLEX, MASK, SPLIT, VARLEN

ROWS = {"cuda": 8, "cpu": 8}
"""Examples in a micro-batch of the usual recipe."""

MEMORY_ROWS = (8, 16, 32)
"""Others, whose memory is compared."""

TOKENS = {"cuda": (8192, 8192), "cpu": (768, 384)}
"""Most positions in a micro-batch of ours, where the decoder layers are computed twice, and where they are not."""

EXAMPLES, SEED = {"cuda": 64, "cpu": 32}, {"cuda": 1, "cpu": 2}
"""Examples of one optimizer step on one rank; of the first ten draws that of the CPU pads most nearly as much as 6,400
examples do in the usual recipe, 41 %."""


def ladder(device: torch.device) -> dict[str, Levers]:
    """The arms by name, each with one more lever than the one before."""
    many, few = TOKENS[device.type]
    pulls: list[tuple[str, dict[str, Any]]] = [
        ("usual", {}),
        ("encoder without graph", {"encoder_graph": False}),
        ("head on labels alone", {"label_head": True}),
        ("last MLP on labels alone", {"last_layer": True}),
        ("no mask", {"mask": False}),
        ("summed loss", {"summed": True}),
        ("by length", {"tokens": many}),
        ("every other layer recomputed", {"recompute": 2}),
        ("nothing recomputed", {"recompute": 0, "tokens": few}),
        ("one reduction", {"reduce_once": True}),
    ]
    if device.type == "cuda":
        pulls += [
            ("few micro-batches", {"overhead": OVERHEAD["cuda"]}),
            ("no input casting", {"casting": False}),
            ("adapter in one pass", {"one_pass": True}),
            ("packed, flex_attention", {"packed": FLEX}),
            ("packed, varlen_attn", {"packed": VARLEN}),
            ("compiled layers", {"compiled": True}),
        ]
    else:
        pulls += [
            ("adapter in one pass", {"one_pass": True}),
            ("fused AdamW", {"fused": True}),
            ("packed, mask", {"packed": MASK}),
            ("packed, an example at a time", {"packed": SPLIT}),
        ]
    pulls.append(("encoder's states from files", {"cached": True}))
    start = {"fused": True} if device.type == "cuda" else {}
    arms, levers = {}, Levers(**start)
    for name, pulled in pulls:
        levers = dataclasses.replace(levers, **pulled)
        arms[name] = levers
    return arms


def compare_gradients(arms: Arms, ladder_: dict[str, Levers]) -> dict[str, float]:
    """Relative L2 difference of each arm's gradient to the arm before it."""
    errors: dict[str, float] = {}
    before = None
    for name, levers in ladder_.items():
        gradient = arms.gradient(arms.prepare(levers))
        if before is not None:
            errors[name] = float((gradient - before).norm() / before.norm())
        before = gradient
    return errors


def useful_flops(examples: list[Lengths], config: Any, lora_parameters: int) -> int:
    """FLOPs that a step over these examples needs."""
    positions, chunks, labels = np.array([(e.positions, e.chunks, e.target) for e in examples]).T
    counted = flops.VoxtralFlops.from_config(config)
    return counted.training(positions, chunks, labels, lora_parameters=lora_parameters)


def rows_of(
    results: dict[str, Measured], errors: dict[str, float], facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """The figures of each arm."""
    first = next(iter(results.values()))
    rows = []
    for name, measured in results.items():
        seconds = statistics.median(measured.seconds)
        ratios = [a / b for a, b in zip(first.seconds, measured.seconds, strict=False)]
        rows.append(
            {
                "arm": name,
                "speed": statistics.median(ratios),
                "speed_quartiles": np.quantile(ratios, (0.25, 0.75)).tolist(),
                "samples_per_s": facts["samples"] / seconds,
                "tokens_per_s": facts["tokens"] / seconds,
                "audio_hours_per_hour": facts["audio_seconds"] / seconds,
                "mfu": facts["flops"] / seconds / facts["peak_flops"],
                "peak_gib": measured.peak / 2**30,
                "step_gib": (measured.peak - measured.held) / 2**30,
                "joules_per_sample": measured.joules and measured.joules / facts["samples"],
                "padding": measured.padding,
                "gradient_error": errors.get(name),
                "loss": measured.loss,
            }
        )
    return rows


COLUMNS = {
    "speed": ("speed", ".2f"),
    "MFU": ("mfu", ".1%"),
    "samples/s": ("samples_per_s", ".2f"),
    "tokens/s": ("tokens_per_s", ".0f"),
    "audio h/h": ("audio_hours_per_hour", ".0f"),
    "peak GiB": ("peak_gib", ".2f"),
    "step GiB": ("step_gib", ".2f"),
    "padding": ("padding", ".1%"),
    "J/sample": ("joules_per_sample", ".1f"),
    "gradient": ("gradient_error", ".1e"),
}


def show(rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Print a row per arm, and the speed of a step that took no longer than the floors."""
    print(f"{'arm':30}", *(f"{title:>9}" for title in COLUMNS))
    for row in rows:
        cells = ["" if row[key] is None else f"{row[key]:{form}}" for key, form in COLUMNS.values()]
        print(f"{row['arm']:30}", *(f"{cell:>9}" for cell in cells))
    for name, seconds in facts["floor_seconds"].items():
        print(f"{'floor, ' + name:30} {facts['samples'] / seconds / rows[0]['samples_per_s']:9.2f}")


def bench(
    device: torch.device, chosen: dict[str, Levers], rounds: int, steps: int, minutes: float
) -> dict[str, Any]:
    """Measure the arms and print the table; returns everything. Nothing new begins after so many minutes."""
    deadline = time.monotonic() + 60 * minutes
    if device.type == "cpu":
        keep_freed_memory()
    config = shape(device)
    peak = max((flops.peak(device) for _ in range(TRIES[device.type])), key=lambda each: each.flops)
    tokens_per_chunk = config.audio_config.max_source_positions // 4
    examples = draw_lengths(
        EXAMPLES[device.type], SEED[device.type], tokens_per_chunk, tokens_per_chunk / 12.5
    )
    arms = Arms(random_model(config, device), examples, ROWS[device.type])
    adapter_elements = sum(parameter.numel() for parameter in arms.params)
    facts = device_facts(device) | {
        "parameters": sum(parameter.numel() for parameter in arms.model.parameters()),
        "trained": adapter_elements,
        "samples": len(examples),
        "tokens": sum(example.positions for example in examples),
        "audio_seconds": sum(example.seconds for example in examples),
        "flops": useful_flops(examples, config, adapter_elements),
        "peak_flops": peak.flops,
        "peak_source": peak.source,
    }
    facts["floor_seconds"] = floors(arms, facts["flops"])
    print(json.dumps(facts, indent=1), flush=True)
    errors = compare_gradients(arms, {name: levers for name, levers in chosen.items() if not levers.compiled})
    print("gradient against the arm before:", {name: f"{e:.1e}" for name, e in errors.items()}, flush=True)
    results = {name: Measured() for name in chosen}
    for name in [*chosen] * rounds:
        if time.monotonic() > deadline:
            print(f"out of time before {name}; what is missing is not in the table", flush=True)
            break
        run_round(arms, chosen[name], results[name], steps)
        seconds = results[name].seconds[-1]
        mfu = facts["flops"] / seconds / peak.flops
        print(f"{name}: {seconds:.2f} s, MFU {mfu:.1%}", file=sys.stderr, flush=True)
    results = {name: measured for name, measured in results.items() if measured.seconds}
    found = facts | {"arms": rows_of(results, errors, facts)}
    show(found["arms"], facts)
    ran = [levers for name, levers in chosen.items() if name in results and not levers.cached]
    if len(ran) > 1 and time.monotonic() < deadline:
        found["memory"] = memory_by_rows(arms, ran[0], ran[-1], MEMORY_ROWS)
    if device.type == "cuda" and ran and time.monotonic() < deadline:
        profile(arms, ran[-1])
        found["clips"] = clips(arms, ran[-1])
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="of an arm in a round (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing new after so many")
    parser.add_argument("--arms", default="", help="names, semicolon separated (default: all)")
    parser.add_argument("--results", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = ladder(device)
    wanted = [name.strip() for name in args.arms.split(";") if name.strip()] or list(chosen)
    unknown = sorted(set(wanted) - set(chosen))
    if unknown:
        raise UserError(f"--arms: {unknown[0]!r} is none of {'; '.join(chosen)}")
    found = bench(device, {name: chosen[name] for name in wanted}, args.rounds, args.steps, args.minutes)
    if args.results:
        write_bytes(args.results, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    run_main(main)
