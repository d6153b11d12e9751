"""Decode and score dev sets with an adapter, or with the base model; or predict without references.

bash launch/evaluate.sh --lora_dir runs/one --val_shards asr/dev,sqa/dev            a run: its best checkpoint
bash launch/evaluate.sh --model_id mistralai/Voxtral-Mini-3B-2507 --val_jsonl dev.jsonl --output_dir runs/base
bash launch/evaluate.sh --lora_dir runs/one --predict call.wav,interviews/ --task asr --language ko --output_dir out
deepspeed|torchrun|srun|python launch/evaluate.py FLAGS          the same flags under any launcher; --help lists them
"""

from __future__ import annotations

import sys

from voxtral_dist import command_line, distributed, run_dir
from voxtral_dist.config import EvalConfig
from voxtral_dist.distributed import World
from voxtral_dist.logger import setup_logging


def main() -> None:
    """Evaluate; rank 0 speaks, and leaves the outcome in exit_status.json."""
    distributed.run_as_rank(run)


def run(world: World) -> None:
    """Read the flags and evaluate as one of ``world.world_size`` ranks."""
    config = command_line.parse(EvalConfig, sys.argv[1:], "evaluate.py")
    setup_logging(world.rank)
    from voxtral_dist.evaluation_run import evaluate, with_run_settings
    from voxtral_dist.prediction_run import predict

    config = with_run_settings(config)
    with run_dir.exit_status(config.output_dir, active=world.is_main):
        (predict if config.predict else evaluate)(config, world)


if __name__ == "__main__":
    main()
