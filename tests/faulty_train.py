"""launch/train.py with faults, for the tests: FAULTS="kind@rank:place ..." in the environment.

nan@1:3-5       the loss of rank 1 is NaN in steps 3 to 5
spike@0:14      the loss of rank 0 is 25 times as large in step 14
inf@0:2         a gradient of rank 0 is infinite in step 2
sleep@1:3-5     rank 1 takes 0.5 s longer for each micro-batch
kill@1:3        rank 1 kills itself in step 3
leave@1:3       rank 1 ends with exit code 0 there
kill-save@0:4   rank 0 kills itself while the checkpoint of step 4 is written
kill-eval@1:4   rank 1 kills itself while the evaluation at step 4 decodes
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "launch"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train

from voxtral_dist import checkpoint, decode_share
from voxtral_dist.batch import MicroBatch
from voxtral_dist.engine import TrainEngine
from voxtral_dist.trainer import Trainer

STEP = {"now": 0}


def is_due(kind: str, place: int) -> bool:
    """Whether a fault of this kind is asked for here and now."""
    for fault in os.environ.get("FAULTS", "").split():
        name, _, where = fault.partition("@")
        rank, _, span = where.partition(":")
        first, _, last = span.partition("-")
        if (
            name == kind
            and int(rank) == int(os.environ["RANK"])
            and int(first) <= place <= int(last or first)
        ):
            return True
    return False


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def spoil(batch: MicroBatch) -> None:
    """What happens to a micro-batch before it is computed."""
    now = STEP["now"]
    if is_due("sleep", now):
        time.sleep(0.5)
    if is_due("nan", now):
        batch.label_weight = batch.label_weight * float("nan")
    if is_due("spike", now):
        batch.label_weight = batch.label_weight * 25


def hurt(engine: TrainEngine) -> None:
    """What happens when it was computed."""
    now = STEP["now"]
    if is_due("inf", now):
        gradient = engine.named_parameters[0][1].grad
        assert gradient is not None
        gradient.fill_(float("inf"))
    if is_due("kill", now):
        die()
    if is_due("leave", now):
        os._exit(0)


def arm() -> None:
    """Put the faults in."""
    step, publish, decode = Trainer._step, checkpoint.publish, decode_share.decode_stream
    compute = TrainEngine._forward_backward

    def faulty_step(self: Trainer, index: int, share: Any) -> Any:
        STEP["now"] = index + 1
        return step(self, index, share)

    def faulty_compute(self: TrainEngine, batch: MicroBatch) -> Any:
        spoil(batch)
        result = compute(self, batch)
        hurt(self)
        return result

    def faulty_publish(run_dir: Path, taken: Any) -> Any:
        if is_due("kill-save", int(taken.state["step"])):
            folder = checkpoint.step_dir(run_dir, taken.state["step"])
            folder.with_name(f"{folder.name}.tmp-{os.getpid()}").mkdir(parents=True)
            die()
        return publish(run_dir, taken)

    def faulty_decode(*args: Any, **options: Any) -> Any:
        if is_due("kill-eval", STEP["now"]):
            die()
        return decode(*args, **options)

    Trainer._step = faulty_step  # type: ignore[method-assign]
    TrainEngine._forward_backward = faulty_compute  # type: ignore[method-assign]
    checkpoint.publish = faulty_publish
    decode_share.decode_stream = faulty_decode


if __name__ == "__main__":
    arm()
    train.main()
