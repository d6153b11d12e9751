"""A run of two ranks that is hurt: nothing is lost but time, and in the end the adapter is the same, bit by bit."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from demo_runs import Demo, launch, read, started, steps, tensors

from voxtral_dist import checkpoint

EVERY_TWO = ("--save_steps", "2", "--stall_timeout", "60")


def hurt(
    demo: Demo, run: Path, *more: str, faults: str = "", launcher: str = "slurm"
) -> tuple[list[int], str]:
    """Two ranks with faults, to their end: exit codes and what they printed."""
    flags = demo.flags(run, *EVERY_TWO, *more)
    with started(launch(launcher, flags, run, "tests/faulty_train.py", FAULTS=faults)) as processes:
        codes = [process.end() for process in processes]
        return codes, "\n".join(process.text for process in processes)


@pytest.fixture(scope="module")
def undisturbed(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    codes, text = hurt(demo, run)
    assert codes == [0, 0], text
    return run


def assert_same(run: Path, expected: Path) -> None:
    """Adapter and optimizer bit by bit, predictions byte by byte, each step recorded once."""
    theirs, ours = tensors(expected), tensors(run)
    assert theirs.keys() == ours.keys()
    assert [name for name, value in theirs.items() if not torch.equal(value, ours[name])] == []
    for path in expected.glob("eval/*/predictions.jsonl"):
        assert (run / path.relative_to(expected)).read_bytes() == path.read_bytes()
    hashes = [[line["data/draw_hash"] for line in steps(folder)] for folder in (run, expected)]
    assert hashes[0] == hashes[1]


def test_killed_in_a_step_a_save_and_an_evaluation(demo: Demo, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for fault, left in (("kill@1:3", 2), ("kill-save@0:4", 2), ("kill-eval@1:4", 4)):
        codes, text = hurt(demo, run, faults=fault)
        assert -signal.SIGKILL in codes and not {0, 2, 75} & set(codes), text
        newest = checkpoint.newest_whole(run)
        assert newest is not None and checkpoint.step_of(newest) == left
    codes, text = hurt(demo, run)
    assert codes == [0, 0], text
    assert_same(run, undisturbed)
    assert not list((run / "checkpoints").glob("*.tmp-*")), "the part of a checkpoint is still there"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_twenty_times_at_random_moments(demo: Demo, undisturbed: Path, tmp_path: Path) -> None:
    """Half of the kills take one rank, half the whole group; the run directory is started over when a run ends."""
    chance, kills, finished = random.Random(5), 0, 0
    run = tmp_path / "run"
    flags = demo.flags(run, *EVERY_TWO)
    while kills < 20:
        with started(launch("deepspeed", flags, run, "tests/faulty_train.py", SHUTDOWN_GRACE="5")) as (job,):
            time.sleep(chance.uniform(4, 14))
            alive = ranks_of(run)
            if job.process.poll() is None and alive:
                kills += 1
                for pid in alive if chance.random() < 0.5 else [chance.choice(alive)]:
                    subprocess.run(["kill", "-KILL", str(pid)], check=False)
            code = job.end()
        if code == 0:
            finished += 1
            assert_same(run, undisturbed)
            shutil.rmtree(run)
    codes, text = hurt(demo, run, launcher="deepspeed")
    assert codes == [0], text
    assert_same(run, undisturbed)
    print(f"20 kills, {finished + 1} runs came to their end")


def ranks_of(run: Path) -> list[int]:
    """Processes that train into a run directory."""
    found = subprocess.run(
        ["pgrep", "-f", f"faulty_train.py.*{run}( |$)"], check=False, capture_output=True, text=True
    )
    pids = []
    for pid in map(int, found.stdout.split()):
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        if b"\0RANK=" in environ:
            pids.append(pid)
    return pids


def test_a_rank_that_leaves_is_a_failure(demo: Demo, tmp_path: Path) -> None:
    codes, text = hurt(demo, tmp_path / "run", faults="leave@1:3")
    assert codes[1] == 0 and codes[0] not in (0, 2, 75), text
    assert "rank 1" in text


def test_non_finite_steps_are_skipped_named_and_end_the_run(demo: Demo, tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes, text = hurt(demo, run, "--max_skipped_steps", "3", "--eval_steps", "0", faults="inf@0:2 nan@1:5-8")
    assert codes == [79, 79], text
    named = [line for line in text.splitlines() if "skipped on all ranks" in line]
    assert len(named) == 4 and "step 2 " in named[0] and "rank 0, samples " in named[0]
    assert all(f"step {5 + n} " in line and "rank 1, samples " in line for n, line in enumerate(named[1:]))
    assert [line["train/skipped"] for line in steps(run)][:4] == [0, 1, 0, 0]
    assert read(run / "exit_status.json")["exit_code"] == 79
    newest = checkpoint.newest_whole(run)
    assert newest is not None and checkpoint.verify(newest) is None


@pytest.mark.slow
def test_a_straggler_is_seen(demo: Demo, tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes, text = hurt(demo, run, "--eval_steps", "0", "--max_steps", "14", faults="sleep@1:3-13")
    assert codes == [0, 0], text
    assert "step 12: rank 1 takes" in text
    spread = {line["step"]: line["speed/rank_spread"] for line in steps(run)}
    assert min(spread[step] for step in range(3, 14)) > max(1.2, spread[14])
