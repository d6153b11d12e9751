"""How a step scales: two ranks here, measured; 64 and 1,024 ranks, simulated:

    python tools/bench_scaling.py [--results FILE.json]

Measured: the product's engine (DeepSpeed ZeRO-2) on the CPU shape of bench_train_step.py, one thread a rank, over gloo.
One rank takes all examples of a step, then two ranks take equal-cost shares of the same. The efficiency is
t(1) / (2 t(2)). What two ranks lose is split into waiting for the slower one, and the reduction with the update.

Simulated, for Voxtral-Mini with LoRA r=16 on N GPUs, 16 examples a rank and step:

    efficiency(N) = 1 / (1 / balance(N) + t_comm(N) / t_rank)
    t_comm(N)     = 2 (N-1)/N x B / w + 2 (N-1) x a

balance(N) is mean over slowest rank of the plan's real shares with their micro-batches, each of which costs a measured
overhead and, padded, its padding (bench_data.py balance); t_rank the FLOPs of 16 mean examples over MFU x peak; B the
bytes of the fp32 gradient of the adapter, which a ring reduces and gathers once a step (ZeRO-2); w and a bandwidth and
latency of a link.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_balance import capped, lengths
from bench_model import random_model, shape
from bench_overhead import overheads
from bench_train_step import useful_flops
from train_step_data import TASKS, Lengths, collate, draw_lengths

from voxtral_dist import distributed
from voxtral_dist.atomic import write_bytes
from voxtral_dist.batch import MicroBatch
from voxtral_dist.ds_config import EngineSettings
from voxtral_dist.engine import TrainEngine
from voxtral_dist.errors import run_main
from voxtral_dist.micro_batches import Caps, cut
from voxtral_dist.model import TrainingModel
from voxtral_dist.plan import Step
from voxtral_dist.shares import CostModel, equal_cost_shares

EXAMPLES, TOKENS, ROUNDS = 16, 256, 5
"""Examples of a step, most positions of a micro-batch, measured steps."""

RANKS = (8, 64, 1024)
PER_RANK, STEPS = 16, {8: 40, 64: 20, 1024: 3}


@dataclass(frozen=True)
class Network:
    """Assumed: a GPU's share of its links in bytes per second, latency of a message in seconds, MFU and peak FLOP/s."""

    bandwidth: float = 50e9
    latency: float = 5e-6
    mfu: float = 0.4
    peak: float = 989e12


@dataclass(frozen=True)
class FixedShare:
    """A rank's micro-batches of a step, the same in every step."""

    batches: list[MicroBatch]

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.batches)

    def smaller(self) -> FixedShare:
        """Never asked for: everything fits."""
        return self


def share_of(examples: list[Lengths], config: Any, rank: int, world_size: int) -> FixedShare:
    """This rank's equal-cost share of the step, in micro-batches as the product cuts them."""
    tasks = np.array([e.task for e in examples])
    positions, chunks, labels = np.array([(e.positions, e.chunks, e.target) for e in examples]).T
    costs = CostModel.from_config(config).cost(positions, chunks, labels)
    step = Step(0, tasks, np.arange(len(examples)))
    mine = equal_cost_shares(step, costs, world_size, 0)[rank]
    groups = cut(tasks[mine], positions[mine], Caps(len(mine), TOKENS))
    return FixedShare([collate(examples, mine[group].tolist(), config, packed=False) for group in groups])


def measure_rank() -> None:
    """One rank of the measured part; rank 0 prints its figures as JSON."""
    world = distributed.read_world()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    distributed.start(device)
    config = shape(device)
    examples = draw_lengths(EXAMPLES, 1, 75, 6.0)
    engine = TrainEngine(TrainingModel(random_model(config, device), len(TASKS)), EngineSettings())
    share = share_of(examples, config, world.rank, world.world_size)
    whole, slowest, mean = [], [], []
    for number in range(ROUNDS + 1):
        distributed.barrier()
        started = time.perf_counter()
        result = engine.train_step(share, 1e-5)
        if number:
            whole.append(time.perf_counter() - started)
            slowest.append(max(result.seconds_by_rank))
            mean.append(statistics.mean(result.seconds_by_rank))
    trained = sum(p.numel() for _, p in engine.named_parameters)
    flat, reduce_seconds = torch.zeros(trained), []
    for _ in range(ROUNDS):
        distributed.barrier()
        started = time.perf_counter()
        distributed.all_reduce_sum(flat)
        reduce_seconds.append(time.perf_counter() - started)
    if world.is_main:
        found = {
            "step": whole,
            "slowest": slowest,
            "mean": mean,
            "all_reduce": reduce_seconds,
            "trained": trained,
        }
        print("RESULT " + json.dumps(found), flush=True)
    distributed.stop()


def measure(world_size: int) -> dict[str, Any]:
    """Start the ranks; the figures of rank 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(world_size):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
        env = {
            key: str(value) for key, value in (names | {"MASTER_PORT": port, "OMP_NUM_THREADS": 1}).items()
        }
        command = [sys.executable, __file__, "--rank_of_two"]
        ranks.append(subprocess.Popen(command, env=os.environ | env, stdout=subprocess.PIPE, text=True))
    out = [rank.communicate()[0] for rank in ranks]
    line = next(line for line in out[0].splitlines() if line.startswith("RESULT "))
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


def report_measured(rounds: int = 2) -> dict[str, float]:
    """One and two ranks in turn; prints and returns the shares of the time."""
    alone, both = [], []
    for _ in range(rounds):
        alone.append(measure(1))
        both.append(measure(2))

    def median(found: list[dict[str, Any]], name: str) -> float:
        return statistics.median(value for one in found for value in one[name])

    one, two = median(alone, "step"), median(both, "step")
    shares = {
        "efficiency": one / (2 * two),
        "waiting": (median(both, "slowest") - median(both, "mean")) / two,
        "reduction_and_update": (two - median(both, "slowest")) / two,
        "all_reduce_alone": median(both, "all_reduce") / two,
        "update_of_one_rank": (one - median(alone, "slowest")) / one,
    }
    print(f"2 ranks x half the examples: {one / two:.2f} times 1 rank, efficiency {shares['efficiency']:.1%}")
    print(f"  of the step of 2 ranks: waiting for the slower one {shares['waiting']:.1%}, reduction and update "
          f"{shares['reduction_and_update']:.1%} (of one rank alone {shares['update_of_one_rank']:.1%}); an all-reduce "
          f"of the {both[0]['trained'] / 1e6:.1f} M gradients by itself {shares['all_reduce_alone']:.1%}")  # fmt: skip
    return shares


def simulate(network: Network) -> list[dict[str, Any]]:
    """Efficiency of many ranks; printed and returned, a row per number of ranks and form of the micro-batches."""
    config = shape(torch.device("cuda"))
    text = config.text_config
    per_layer = 16 * (
        2 * (text.hidden_size + 4096) + 2 * (text.hidden_size + 1024) + 3 * (text.hidden_size + 8192)
    )
    gradient = 4 * text.num_hidden_layers * per_layer
    examples = draw_lengths(4000, 2, 375, 30.0)
    rank_flops = useful_flops(examples, config, gradient // 4) / len(examples) * PER_RANK
    seconds = rank_flops / (network.mfu * network.peak)
    overhead = float(np.median(overheads()))
    rows = []
    print(f"a rank computes {rank_flops / 1e12:.0f} TFLOP a step in {seconds * 1e3:.0f} ms; a micro-batch costs "
          f"{overhead:.0f} positions besides; the gradient has {gradient / 1e6:.0f} MB; {network}")  # fmt: skip
    for ranks in RANKS:
        moved = 2 * (ranks - 1) / ranks * gradient
        comm = moved / network.bandwidth + 2 * (ranks - 1) * network.latency
        _, _, padded, packed = capped(lengths(), ranks, PER_RANK, STEPS[ranks], overhead)
        print(f"{ranks:5} ranks: {moved / 1e6:.0f} MB a rank and step in {comm * 1e3:.1f} ms")
        for form, balance in (("padded", padded), ("packed", packed)):
            efficiency = 1 / (1 / balance + comm / seconds)
            rows.append(
                {
                    "ranks": ranks,
                    "form": form,
                    "balance": balance,
                    "comm_ms": comm * 1e3,
                    "efficiency": efficiency,
                }
            )
            print(f"        {form}: balance {balance:.3f}, efficiency {efficiency:.1%}")
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rank_of_two", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, help="write the figures there as JSON")
    args = parser.parse_args()
    if args.rank_of_two:
        measure_rank()
        return
    found = {"measured": report_measured(), "network": asdict(Network()), "simulated": simulate(Network())}
    if args.results:
        write_bytes(args.results, (json.dumps(found, indent=1) + "\n").encode())


if __name__ == "__main__":
    run_main(main)
