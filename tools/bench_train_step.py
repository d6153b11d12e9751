"""Speed and memory of a training step, from the usual recipe to ours, a lever at a time:

    python tools/bench_train_step.py                  the device at hand: on a GPU the shape of Voxtral-Mini-3B in
                                                      bfloat16, on a CPU a shape of 136 million weights in float32
    python tools/bench_train_step.py --rounds 5 --arms 'usual;fused AdamW' --results FILE.json

The weights are random and the model is made on the device, so nothing is downloaded. Every arm trains on the same
examples (see train_step_data.py for their lengths); rounds alternate between the arms after a warm-up and the median
of the rounds counts. Before that the gradients of neighbouring arms are compared, without dropout. Useful FLOPs are
those of voxtral_dist/flops.py: nothing for padding and nothing twice.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_model import device_facts, random_model, shape
from step_meter import held_and_peak, joules, keep_freed_memory
from train_step_arms import Arms, Levers
from train_step_data import Lengths, draw_lengths

from voxtral_dist import flops
from voxtral_dist.atomic import write_bytes
from voxtral_dist.errors import UserError, run_main
from voxtral_dist.micro_batches import OVERHEAD
from voxtral_dist.packed_attention import FLEX, MASK, SPLIT, VARLEN

ROWS = {"cuda": 8, "cpu": 8}
"""Examples in a micro-batch of the usual recipe."""

TOKENS = {"cuda": (8192, 8192), "cpu": (768, 320)}
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
        ("no mask", {"mask": False}),
        ("summed loss", {"summed": True}),
        ("by length", {"tokens": many}),
        ("nothing recomputed", {"recompute": 0, "tokens": few}),
        ("one reduction", {"reduce_once": True}),
    ]
    if device.type == "cuda":
        pulls += [
            ("few micro-batches", {"overhead": OVERHEAD["cuda"]}),
            ("no input casting", {"casting": False}),
            ("adapter in one pass", {"one_pass": True}),
            ("encoder outside autocast", {"encoder_autocast": False}),
            ("packed, an example at a time", {"packed": SPLIT}),
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


@dataclasses.dataclass
class Measured:
    """What the rounds of one arm took.

    Attributes:
        seconds: of each round's step.
        peak: most bytes in use during a step, the model's own included.
        held: bytes in use before a step.
        joules: of a step, None without a counter.
        padding: share of positions that are padding.
        loss: of the last step.
    """

    seconds: list[float] = dataclasses.field(default_factory=list)
    peak: int = 0
    held: int = 0
    joules: float | None = None
    padding: float = 0.0
    loss: float = 0.0


def run_round(arms: Arms, levers: Levers, measured: Measured, steps: int) -> None:
    """Time some steps of an arm and keep the figures; before its first round, warm up and measure the memory."""
    batches = arms.prepare(levers)
    if not measured.seconds:
        measured.padding = 1 - sum(b.tokens for b in batches) / sum(b.positions for b in batches)
        if arms.device.type == "cuda":
            arms.step(batches)
        measured.held, measured.peak = held_and_peak(arms, batches)
    before = joules(arms.device)
    for _ in range(steps):
        started = time.perf_counter()
        measured.loss = arms.step(batches)
        measured.seconds.append(time.perf_counter() - started)
    after = joules(arms.device)
    if before is not None and after is not None:
        measured.joules = (after - before) / steps


def compare_gradients(arms: Arms, ladder_: dict[str, Levers]) -> dict[str, float]:
    """Relative L2 difference of each arm's gradient to the arm before it, and of the last to the first."""
    errors: dict[str, float] = {}
    before = first = None
    for name, levers in ladder_.items():
        gradient = arms.gradient(arms.prepare(levers))
        first = gradient if first is None else first
        if before is not None:
            errors[name] = float((gradient - before).norm() / before.norm())
        before = gradient
    return errors


def useful_flops(examples: list[Lengths], config: Any, lora_parameters: int) -> int:
    """FLOPs that a step over these examples needs."""
    positions, chunks, labels = np.array([(e.positions, e.chunks, e.target) for e in examples]).T
    counted = flops.VoxtralFlops.from_config(config)
    return counted.training(positions, chunks, labels, lora_parameters=lora_parameters)


def table(
    results: dict[str, Measured], errors: dict[str, float], facts: dict[str, Any]
) -> list[dict[str, Any]]:
    """Print a row per arm and return them."""
    first = next(iter(results.values()))
    base = statistics.median(first.seconds)
    rows = []
    for name, measured in results.items():
        seconds = statistics.median(measured.seconds)
        ratios = [a / b for a, b in zip(first.seconds, measured.seconds, strict=False)]
        rows.append(
            {
                "arm": name,
                "speed": base / seconds,
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
    print(f"{'arm':28}{'speed':>7}{'MFU':>7}{'samples/s':>11}{'audio h/h':>11}{'peak GiB':>10}{'step GiB':>10}"
          f"{'padding':>9}{'J/sample':>10}{'gradient':>10}")  # fmt: skip
    for row in rows:
        error, energy = row["gradient_error"], row["joules_per_sample"]
        print(
            f"{row['arm']:28}{row['speed']:7.2f}{row['mfu']:7.1%}{row['samples_per_s']:11.2f}"
            f"{row['audio_hours_per_hour']:11.0f}{row['peak_gib']:10.2f}{row['step_gib']:10.2f}{row['padding']:9.1%}"
            f"{'' if energy is None else f'{energy:.1f}':>10}{'' if error is None else f'{error:.1e}':>10}"
        )
    return rows


def bench(device: torch.device, chosen: dict[str, Levers], rounds: int, steps: int) -> dict[str, Any]:
    """Measure the arms and print the table; returns everything."""
    if device.type == "cpu":
        keep_freed_memory()
    config, peak = shape(device), flops.peak(device)
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
    print(json.dumps(facts, indent=1), flush=True)
    errors = compare_gradients(arms, {name: levers for name, levers in chosen.items() if not levers.compiled})
    print("gradient against the arm before:", {name: f"{e:.1e}" for name, e in errors.items()}, flush=True)
    results = {name: Measured() for name in chosen}
    for name in [*chosen] * rounds:
        run_round(arms, chosen[name], results[name], steps)
        seconds = results[name].seconds[-1]
        mfu = facts["flops"] / seconds / peak.flops
        print(f"{name}: {seconds:.2f} s, MFU {mfu:.1%}", file=sys.stderr, flush=True)
    found = facts | {"arms": table(results, errors, facts)}
    if device.type == "cuda":
        profile(arms, list(chosen.values())[-1])
        found["clips"] = clips(arms, list(chosen.values())[-1])
    return found


def profile(arms: Arms, levers: Levers) -> None:
    """Print where the device's time of a step goes."""
    batches = arms.prepare(levers)
    arms.step(batches)
    with torch.profiler.profile() as profiler:
        arms.step(batches)
    print(
        profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=24, max_name_column_width=70)
    )


def clips(arms: Arms, levers: Levers) -> list[dict[str, Any]]:
    """Peak memory of micro-batches of so many clips of 3 s, decoder layers computed once and twice."""
    rows = []
    for recompute in (0, 1):
        for count in (8, 16, 32):
            arms.examples = [Lengths(0, 375 + 8, 46, 1, 3.0)] * count
            pulled = dataclasses.replace(levers, recompute=recompute, tokens=429 * count)
            measured = Measured()
            try:
                run_round(arms, pulled, measured, 1)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                continue
            peak = measured.peak / 2**30
            rows.append(
                {
                    "clips": count,
                    "recompute": recompute,
                    "peak_gib": peak,
                    "clips_per_s": count / measured.seconds[0],
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="of an arm in a round (default: %(default)s)")
    parser.add_argument("--arms", default="", help="names, semicolon separated (default: all)")
    parser.add_argument("--results", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = ladder(device)
    wanted = [name.strip() for name in args.arms.split(";") if name.strip()] or list(chosen)
    unknown = sorted(set(wanted) - set(chosen))
    if unknown:
        raise UserError(f"--arms: {unknown[0]!r} is none of {'; '.join(chosen)}")
    found = bench(device, {name: chosen[name] for name in wanted}, args.rounds, args.steps)
    if args.results:
        write_bytes(args.results, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    run_main(main)
