"""Show what a run would do with its data, on any number of ranks, without a GPU or weights.

python tools/plan_batches.py --world_size 64 --model_id M --train_shards a,b,c [the flags of launch/train.py]
python tools/plan_batches.py --audit RUN        prove from its log that a run consumed every draw exactly once
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from voxtral_dist import checkpoint, command_line, dry_run, prepare
from voxtral_dist.audio import SAMPLE_RATE
from voxtral_dist.audit import audit
from voxtral_dist.config import TrainConfig
from voxtral_dist.data import TrainData
from voxtral_dist.distributed import World
from voxtral_dist.errors import UserError, run_main
from voxtral_dist.report import table
from voxtral_dist.shares import share_balance
from voxtral_dist.training_run import plan_data

SAMPLED_STEPS = 50
ALONE = World(0, 0, 1)


@dataclass
class PlanConfig(TrainConfig):
    """The flags of launch/train.py, and three more.

    Attributes:
        world_size: ranks to plan for
        steps_per_second: rate that the read bytes per second are stated for
        audit: a run directory; prove that it consumed every draw of its plan exactly once
    """

    world_size: int = 1
    steps_per_second: float = 1.0
    audit: str = ""

    def validate(self) -> None:
        self.output_dir = self.output_dir or "unused"
        if self.world_size < 1:
            raise UserError(f"--world_size {self.world_size} is not at least 1")
        if not self.audit:
            super().validate()


def main() -> None:
    """Plan or audit."""
    flags = command_line.parse(PlanConfig, sys.argv[1:], "plan_batches.py")
    if flags.audit:
        print(audit_run(Path(flags.audit)))
        return
    data = load(flags, World(0, 0, flags.world_size), None)
    lines = [*dry_run.plan_lines(data, flags.world_size), "", *mix_lines(data), "", *share_lines(data, flags)]
    print("\n".join(lines))


def load(flags: TrainConfig, world: World, checkpoint_dir: Path | None) -> TrainData:
    """The training data of a run, planned for some number of ranks."""
    collator = prepare.open_collator(flags)
    tasks = prepare.open_data(
        flags, flags.train_shards, flags.train_jsonl, "train", ALONE, collator, flags.train_where
    )
    return plan_data(flags, world, tasks, collator, checkpoint_dir)


def sampled(data: TrainData) -> list[int]:
    """Up to 50 steps, spread over the run."""
    return sorted(set(np.linspace(0, data.plan.num_steps - 1, SAMPLED_STEPS).astype(int).tolist()))


def mix_lines(data: TrainData) -> list[str]:
    """The realised mix in examples, audio hours and target tokens, scaled up from sampled steps to the whole run."""
    steps = [data.plan.step(index) for index in sampled(data)]
    values = np.zeros((len(data.tasks), 3))
    for number, task in enumerate(data.tasks):
        ids = np.concatenate([step.examples[step.tasks == number] for step in steps])
        hours = task.n_samples(ids).sum() / SAMPLE_RATE / 3600
        values[number] = len(ids), hours, task.target_tokens(ids).sum()
    values *= data.plan.total_draws / sum(map(len, steps))
    shares = values / np.maximum(values.sum(0), 1e-12)
    rows = [
        [name, f"{s[0]:.1%}", f"{v[1]:,.2f}", f"{s[1]:.1%}", f"{v[2]:,.0f}", f"{s[2]:.1%}"]
        for name, v, s in zip(data.names, values, shares, strict=True)
    ]
    header = ["task", "of examples", "audio hours", "of audio", "target tokens", "of target tokens"]
    return [f"mix of the run, from {len(steps)} of its {data.plan.num_steps:,} steps:", table(header, rows)]


def share_lines(data: TrainData, flags: PlanConfig) -> list[str]:
    """Balance, fill of the micro-batches, bytes per rank and second, planning time."""
    used = positions = micro_batches = 0
    balances = []
    started = time.process_time()
    for index in sampled(data):
        step = data.plan.step(index)
        balances.append(share_balance(data.shares(step, flags.world_size), data.step_costs(step)))
        for draws in data.micro_batch_draws(step, index % flags.world_size, flags.world_size):
            filled, padded = data.fill(step, draws)
            used, positions, micro_batches = used + filled, positions + padded, micro_batches + 1
    milliseconds = 1000 * (time.process_time() - started) / len(balances)
    per_example = sum(s.bytes for task in data.tasks for s in task.sets) / sum(map(len, data.tasks))
    per_rank = (
        per_example * data.plan.segments[-1].global_batch_size / flags.world_size * flags.steps_per_second
    )
    rate = flags.steps_per_second
    return [
        f"balance of the ranks: mean {np.mean(balances):.4f}, worst of {len(balances)} steps {min(balances):.4f}",
        f"micro-batches per rank and step {micro_batches / len(balances):.2f}, filled to {used / positions:.1%}",
        f"read per rank {per_rank / 1e6:.3f} MB/s at {rate:g} steps/s; planning {milliseconds:.2f} ms CPU per step",
    ]


def audit_run(run: Path) -> str:
    """Rebuild the plan of a run from its own settings and history, and audit its log."""
    settings = command_line.parse(
        TrainConfig, ["--config", str(run / "config.yaml"), "--output_dir", str(run)], "audit"
    )
    newest = checkpoint.newest_whole(run)
    if newest is None:
        raise UserError(f"{run} holds no checkpoint; there is nothing to audit")
    data = load(settings, ALONE, newest)
    return audit(data.plan, run / "metrics.jsonl", checkpoint.step_of(newest))


if __name__ == "__main__":
    run_main(main)
