"""Train one Voxtral on several tasks at once.

    bash launch/train.sh --model_id mistralai/Voxtral-Mini-3B-2507 --train_shards asr,sqa,tqa --output_dir runs/one
    deepspeed|torchrun|srun|python launch/train.py FLAGS          the same flags under any launcher; --help lists them

The same command after a stop goes on where the run was.
"""

from __future__ import annotations

import sys

from voxtral_dist import command_line, distributed, run_dir
from voxtral_dist.config import TrainConfig
from voxtral_dist.distributed import World
from voxtral_dist.logger import setup_logging


def main() -> None:
    """Train; rank 0 speaks, and leaves the outcome in exit_status.json."""
    distributed.run_as_rank(run)


def run(world: World) -> None:
    """Read the flags and train as one of ``world.world_size`` ranks."""
    config = command_line.parse(TrainConfig, sys.argv[1:], "train.py")
    setup_logging(world.rank)
    trains = not (config.dry_run or config.debug)
    with run_dir.exit_status(config.output_dir, active=world.is_main and trains):
        from voxtral_dist.training_run import train

        train(config, world)


if __name__ == "__main__":
    main()
