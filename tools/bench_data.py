"""Measure the data side: balance of batching policies, reading speed, planning at scale. Ratios of one run, one core.

python tools/bench_data.py balance      useful over occupied time of the ranks, ours and four usual policies
python tools/bench_data.py read         samples per CPU second, ours over webdataset's and lhotse's
python tools/bench_data.py scale        planning 100 million examples in 10,000 shards, and its memory
python tools/bench_data.py wait         whether two cores keep up with a GPU
python tools/bench_data.py start        from nothing to the first batch in the middle of a run over the demo
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from bench_balance import balance
from bench_read import read
from bench_scale import scale, start
from bench_wait import wait

from voxtral_dist.errors import UserError, run_main


def main() -> None:
    """Run the named part."""
    parts: dict[str, Callable[[], None]] = {
        "balance": balance,
        "read": read,
        "scale": scale,
        "wait": wait,
        "start": start,
    }
    if len(sys.argv) != 2 or sys.argv[1] not in parts:
        raise UserError(f"name one part of {', '.join(parts)}")
    torch.set_num_threads(1)
    parts[sys.argv[1]]()


if __name__ == "__main__":
    run_main(main)
