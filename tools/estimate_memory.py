"""What a run takes of each GPU, without weights or a GPU.

python tools/estimate_memory.py --model_id M --ranks 8 --gpu_gb 80 [the flags of launch/train.py]

``--model_id`` is a folder, a hub id or a ``config.json``. Prints each part in GiB, and with ``--gpu_gb`` the largest
micro-batch that fits. The data flags are not needed. As in a run on a GPU, ``--bf16`` is on unless switched off.
tools/bench_memory.py holds these numbers against a GPU, tools/probe_micro_batch.py finds the micro-batch by trying.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from voxtral_dist import command_line, memory, model, prepare
from voxtral_dist.config import TrainConfig
from voxtral_dist.errors import UserError, run_main
from voxtral_dist.memory import Estimate
from voxtral_dist.step_memory import Shape


@dataclass
class MemoryConfig(TrainConfig):
    """The flags of launch/train.py, and two more.

    Attributes:
        ranks: that share the optimizer
        gpu_gb: GB of a GPU; find the largest micro-batch that fits into it
    """

    ranks: int = 1
    gpu_gb: float = 0.0

    def validate(self) -> None:
        self.output_dir = self.output_dir or "unused"
        self.train_shards = self.train_shards or ("" if self.train_jsonl else "unused")
        super().validate()
        if self.ranks < 1 or not 0 <= self.gpu_gb < 1e6:
            raise UserError(
                f"--ranks {self.ranks} --gpu_gb {self.gpu_gb}: at least one rank, and a size in GB"
            )


def main() -> None:
    """Print the estimate, and what fits."""
    config = command_line.parse(MemoryConfig, sys.argv[1:], "estimate_memory.py")
    if config.bf16 is None:
        config = replace(config, bf16=True)
    model_config = model.read_config(config.model_id)
    lora = prepare.lora_settings(config)

    def needs(shape: Shape) -> Estimate:
        bf16, ranks = bool(config.bf16), config.ranks
        return memory.estimate(config, model_config, lora, ranks=ranks, shape=shape, bf16=bf16)

    whole = needs(memory.largest_shape(config, model_config))
    print("\n".join(whole.lines()), flush=True)
    if not config.gpu_gb:
        return
    room = (1 - memory.FREE_SHARE) * config.gpu_gb * 1e9
    if whole.states.alone > room:
        raise UserError(
            f"--gpu_gb {config.gpu_gb:g}: weights, gradients and optimizer take {whole.states.alone / 1e9:.1f} GB of "
            "each GPU; give --load_in_4bit, more --ranks or a ds_config that offloads"
        )

    def fits(positions: int) -> bool:
        peak = needs(Shape.worst(positions, config.max_len, model_config, config.packed)).peak
        print(f"{positions:,} positions: {peak / 1e9:.3f} GB", file=sys.stderr, flush=True)
        return peak <= room

    found = memory.largest(fits, config.max_len)
    print("\n".join(memory.advice(found, config, f"{config.gpu_gb:g} GB")))


if __name__ == "__main__":
    run_main(main)
