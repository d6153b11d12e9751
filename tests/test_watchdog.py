"""Ranks that stop, die or hang, in real processes: the right one is named, with what it was doing, and all end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from demo_runs import Demo, environment, launch, steps
from harness import free_port

from voxtral_dist import activity

TIMEOUT_S, BEAT_S = 3.0, 0.4
PATIENCE_S = TIMEOUT_S + 10.0

RANK = '''
"""A rank of one gloo group under a watchdog; {body} runs after both ranks are there."""
import os, signal, sys, time
from functools import partial
from pathlib import Path

import torch

from voxtral_dist import activity, distributed, run_dir, watchdog
from voxtral_dist.errors import run_main

watchdog.BEAT_S = {beat}
rank, out = int(os.environ["RANK"]), Path(sys.argv[1])


def stop() -> None:
    time.sleep(3 * watchdog.BEAT_S)  # until the last words were heard
    os.kill(os.getpid(), signal.SIGSTOP)


def main() -> None:
    distributed.start(torch.device("cpu"))
    with run_dir.exit_status(str(out), active=rank == 0):
        with watchdog.guarding({timeout}, partial(run_dir.end_stalled, out)):
            activity.within("step 12")
            print("pid", os.getpid(), flush=True)
{body}


run_main(main, speak=rank == 0)
os._exit(0)  # not to wait for a peer that is gone
'''

WAIT = 'activity.now("the reduction", waiting=True); distributed.barrier()'


class Ranks:
    """Ranks that run ``bodies``, the code of each, and what became of them."""

    def __init__(self, folder: Path, bodies: list[str], timeout_s: float) -> None:
        self.out = folder / "run"
        self.out.mkdir()
        (self.out / "identity.json").write_text("{}")
        common = {"WORLD_SIZE": str(len(bodies)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        lines = "\n".join(
            f"            if rank == {rank}:\n                {body}" for rank, body in enumerate(bodies)
        )
        self.script = folder / "rank.py"
        self.script.write_text(RANK.format(body=lines, beat=BEAT_S, timeout=timeout_s))
        self.logs = [folder / f"{rank}.log" for rank in range(len(bodies))]
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(self.script), str(self.out)],
                env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **common),
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(self.logs)
        ]

    def wait_until_all_run(self) -> float:
        """The time at which every rank is under its watchdog."""
        until(lambda: all("pid" in log.read_text() for log in self.logs), 60)
        return time.monotonic()

    def codes(self) -> list[int]:
        """Exit codes; nobody takes longer than the allowed time and 10 seconds."""
        started = self.wait_until_all_run()
        codes = [
            process.wait(max(0.1, started + PATIENCE_S - time.monotonic())) for process in self.processes
        ]
        return codes

    def log(self, rank: int) -> str:
        return self.logs[rank].read_text()

    def name(self, rank: int) -> str:
        """How a message calls a rank."""
        return f"rank {rank} ({os.uname().nodename}, pid {self.processes[rank].pid})"

    def status(self) -> dict[str, object]:
        status: dict[str, object] = json.loads((self.out / "exit_status.json").read_text())
        return status


def until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """Starts ranks, none of which outlives the test."""
    started: list[Ranks] = []

    def start_ranks(*bodies: str, timeout_s: float = TIMEOUT_S) -> Ranks:
        started.append(Ranks(tmp_path, list(bodies), timeout_s))
        return started[-1]

    yield start_ranks
    for ranks in started:
        for process in ranks.processes:
            process.kill()
            process.wait()


Start = Callable[..., Ranks]


def test_activities_have_words_and_count() -> None:
    before = activity.current()
    activity.within("step 12")
    activity.now("micro-batch 3")
    activity.now("micro-batch 3", waiting=True)
    after = activity.current()
    activity.within("")
    assert (after.text, after.waiting, after.changes) == (
        "micro-batch 3 of step 12",
        True,
        before.changes + 2,
    )
    assert before.since <= after.since <= time.monotonic()


@pytest.mark.parametrize("stopped", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_killed_and_the_code_is_80(start: Start, stopped: int) -> None:
    """Also rank 0, on which the store lives, and that hides how rank 2 works on."""
    work = 'for n in range(99): time.sleep(0.25); activity.now("reading")'
    bodies = [WAIT, WAIT, work]
    bodies[stopped] = f'activity.now("micro-batch 3", waiting={stopped == 0}); stop(); {WAIT}'
    ranks = start(*bodies)
    codes = ranks.codes()
    assert (codes[1 - stopped], codes[stopped], codes[2]) == (80, -signal.SIGKILL, 80), ranks.log(1 - stopped)
    text = ranks.log(1 - stopped)
    (line,) = [line for line in text.splitlines() if "stood still" in line]
    assert f"{ranks.name(stopped)} has stood still for" in line and "in 'micro-batch 3 of step 12'" in line
    assert ranks.name(2) not in line and "stood still" not in ranks.log(2)
    assert "the run ends, the same command goes on from the last checkpoint" in line
    assert text.count("(most recent call first)") >= 2 and "in barrier" in text, "the stacks of the survivor"
    assert ranks.status()["exit_code"] == 80 and ranks.name(stopped) in str(ranks.status()["message"])


def test_a_rank_that_hangs_while_its_thread_lives_is_named_and_shows_where(start: Start) -> None:
    ranks = start(WAIT, 'activity.now("micro-batch 3")\n                while True: pass')
    assert ranks.codes() == [80, 80]
    assert f"{ranks.name(1)} has stood still for 3 s in 'micro-batch 3 of step 12'" in ranks.log(0)
    assert "stood still" not in ranks.log(1), "one rank speaks"
    assert "rank.py" in ranks.log(1), "the stacks of the rank that hangs"
    assert ranks.name(0) not in str(ranks.status()["message"]), (
        "a rank that waits for another is not at fault"
    )


def test_ranks_that_all_wait_are_a_deadlock(start: Start) -> None:
    lonely = 'activity.now("gathering {}", waiting=True); time.sleep(99)'
    ranks = start(lonely.format("a"), lonely.format("b"))
    assert ranks.codes() == [80, 80]
    message = str(ranks.status()["message"])
    assert message.startswith("every rank waits for the others and nothing has moved for 3 s: ")
    assert f"{ranks.name(0)} in 'gathering a of step 12', {ranks.name(1)} in 'gathering b of" in message


@pytest.mark.slow
def test_one_rank_watches_itself(start: Start) -> None:
    ranks = start('activity.now("the reduction", waiting=True); time.sleep(99)')
    assert ranks.codes() == [80]
    assert f"{ranks.name(0)} has stood still for 3 s in 'the reduction of step 12'" in ranks.log(0)


def test_a_dead_rank_is_named(start: Start) -> None:
    """By a rank that is no watcher too; none of the survivors is named."""
    ranks = start(
        WAIT, f'activity.now("micro-batch 3"); time.sleep(1.5); os.kill(os.getpid(), 9); {WAIT}', WAIT
    )
    assert ranks.codes() == [1, -signal.SIGKILL, 1]
    message = f"{ranks.name(1)} died or lost its connection in 'micro-batch 3 of step 12'"
    (line,) = [line for line in ranks.log(0).splitlines() if line.startswith("error: ")]
    assert message in line and ranks.name(0) not in line and ranks.name(2) not in line
    assert ranks.status() == {"exit_code": 1, "message": line.removeprefix("error: ")}


@pytest.mark.slow
def test_a_dead_rank_0_is_named_by_rank_1(start: Start) -> None:
    ranks = start(f'activity.now("micro-batch 3"); time.sleep(1.5); os.kill(os.getpid(), 9); {WAIT}', WAIT)
    assert ranks.codes() == [-signal.SIGKILL, 1]
    message = f"{ranks.name(0)} died or lost its connection in 'micro-batch 3 of step 12'"
    assert ranks.log(1).count(f"{message}\n") == 1, "logged; the error itself is rank 0's to tell"


@pytest.mark.slow
def test_a_death_is_noticed_where_nothing_fails(start: Start) -> None:
    """A collective that hangs for ever, as nccl's do."""
    hang = 'activity.now("the reduction", waiting=True); time.sleep(99)'
    ranks = start(hang, 'activity.now("micro-batch 3"); time.sleep(1.5); os.kill(os.getpid(), 9)')
    assert ranks.codes() == [80, -signal.SIGKILL]
    assert f"{ranks.name(1)} has stood still for" in ranks.log(0)


@pytest.mark.slow
def test_an_own_error_stays_as_it_is(start: Start) -> None:
    """And the peer names the rank that ended."""
    fail = 'activity.now("micro-batch 3"); time.sleep(0.9); raise RuntimeError("out of memory")'
    ranks = start(WAIT, fail, timeout_s=30.0)
    assert ranks.codes() == [1, 1]
    assert "RuntimeError: out of memory" in ranks.log(1) and "VoxtralDistError" not in ranks.log(1)
    assert f"{ranks.name(1)} died or lost its connection in 'micro-batch 3 of step 12'" in ranks.log(0)


def test_progress_slow_loading_and_a_suspended_job_are_no_stall(start: Start) -> None:
    """Half as long again as allowed in one phase that moves, before the first phase, and stopped together."""
    work = 'for n in range(18): time.sleep(0.25); activity.now("micro-batch 3")'
    loading = f'time.sleep(9); activity.now("micro-batch 3"); {WAIT}'
    ranks = start(f"{work}\n                {WAIT}", loading)
    ranks.wait_until_all_run()
    time.sleep(1)
    for number, pause in ((signal.SIGSTOP, 1.5 * TIMEOUT_S), (signal.SIGCONT, 0.0)):
        for process in ranks.processes:
            process.send_signal(number)
        time.sleep(pause)
    assert [process.wait(PATIENCE_S) for process in ranks.processes] == [0, 0], ranks.log(0) + ranks.log(1)
    assert ranks.status()["exit_code"] == 0
    assert "stood still" not in ranks.log(0) + ranks.log(1)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_run_with_a_stopped_rank_ends_with_80_and_leaves_nobody(
    demo: Demo, tmp_path: Path, launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, grace = tmp_path / "run", 5
    mark = f"TEST_JOB={tmp_path}"
    monkeypatch.setenv(*mark.split("="))
    monkeypatch.setenv("SHUTDOWN_GRACE", str(grace))
    flags = demo.flags(run, "--stall_timeout", "6", "--eval_steps", "0", "--max_steps", "2000")
    (job,) = launch(launcher, flags, run)
    try:
        until(lambda: len(steps(run)) >= 60 or job.process.poll() is not None, 120)
        victim = next(pid for pid in pids(mark) if environ(pid).get("RANK") == "1")
        os.kill(victim, signal.SIGSTOP)
        started = time.monotonic()
        assert job.process.wait(6 + 10 + grace) == 80, job.text
        assert pids(mark) == [], f"left after {time.monotonic() - started:.0f} s"
    finally:
        for pid in pids(mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.process.wait()
    status = json.loads((run / "exit_status.json").read_text())
    assert status["exit_code"] == 80 and status["message"].startswith("rank 1 (")
    assert " of step " in status["message"] and job.text.count("has stood still for") == 1


def environ(pid: int) -> dict[str, str]:
    with suppress(OSError):
        words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
        return dict(word.split("=", 1) for word in words if "=" in word)
    return {}


def pids(mark: str) -> list[int]:
    """Every living process of the job but this one."""
    name, value = mark.split("=")
    found = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in found if pid != os.getpid() and environ(pid).get(name) == value]
