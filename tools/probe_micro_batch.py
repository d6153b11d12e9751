"""The largest micro-batch that fits on the GPU at hand, found by training on made-up ones.

python tools/probe_micro_batch.py --config one.yaml [the flags of launch/train.py] [--limit_gb 80]

Prints the flag to use. Weights and flags are those of the run, its data are not needed and nothing is written. Alone,
without a launcher, this rank also holds the optimizer of all the others. Some GPUs want a reserve for their neighbours:
``--limit_gb`` uses no more. On a CPU it is needed, and tensor storages are counted; so are the tests run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from voxtral_dist import command_line, distributed, memory
from voxtral_dist.config import TrainConfig
from voxtral_dist.distributed import World
from voxtral_dist.errors import UserError
from voxtral_dist.logger import setup_logging
from voxtral_dist.micro_batch_probe import probe


@dataclass
class ProbeConfig(TrainConfig):
    """The flags of launch/train.py, and one more.

    Attributes:
        limit_gb: use no more GB than this; 0: the whole GPU
    """

    limit_gb: float = 0.0

    def validate(self) -> None:
        self.output_dir = "unused"
        self.train_shards = self.train_shards or ("" if self.train_jsonl else "unused")
        super().validate()
        if not 0 <= self.limit_gb < 1e6:
            raise UserError(f"--limit_gb {self.limit_gb} is no size in GB")


def run(world: World) -> None:
    """Probe as one of ``world.world_size`` ranks; rank 0 speaks."""
    config = command_line.parse(ProbeConfig, sys.argv[1:], "probe_micro_batch.py")
    setup_logging(world.rank)
    device = distributed.local_device(world)
    distributed.start(device)
    try:
        found = probe(config, device, int(config.limit_gb * 1e9))
    finally:
        distributed.stop()
    what = f"{config.limit_gb:g} GB" if config.limit_gb else "this GPU"
    if world.is_main:
        print("\n".join(memory.advice(found, config, what)))


if __name__ == "__main__":
    distributed.run_as_rank(run)
