"""Signals to launch/run_ranks.sh while it trains, loads or evaluates, and other numbers of ranks after each stop.

Real jobs under real launchers: exit codes, whole checkpoints, nobody left behind, the same command goes on.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from demo_runs import Demo, Process, read, started, steps
from harness import ROOT
from safetensors.torch import load_file
from test_plan_batches import plan_batches
from test_watchdog import environ, pids, until

from voxtral_dist import checkpoint

slow = pytest.mark.slow
STEPS = 90
TERM, USR2 = signal.SIGTERM, signal.SIGUSR2


class Job:
    """One start of run_ranks.sh; all its processes carry a mark in their environment."""

    def __init__(self, folder: Path, launcher: str, flags: list[str], **more: str) -> None:
        count = len(list(folder.glob("job.*.err")))
        self.mark = f"TEST_JOB={folder}/{count}"
        about = {
            "PYTHON": sys.executable,
            "NPROC": "2",
            "LAUNCHER": launcher,
            "TEST_JOB": f"{folder}/{count}",
        }
        command = ["bash", "launch/run_ranks.sh", "launch/train.py", *flags]
        self.process = Process(command, folder / f"job.{count}", **{**about, **more})

    @property
    def text(self) -> str:
        return self.process.text

    def ranks(self) -> list[int]:
        return [pid for pid in pids(self.mark) if "RANK" in environ(pid)]

    def send(self, number: signal.Signals, when: Callable[[], bool]) -> int:
        """Signal the script once ``when()``; its exit code, after which no process of the job may be left."""
        until(lambda: when() or self.process.process.poll() is not None, 120)
        self.process.process.send_signal(number)
        return self.code()

    def code(self) -> int:
        """The exit code of the script; none of the job's processes may be left."""
        code = self.process.end()
        assert pids(self.mark) == [], self.text
        return code


Start = Callable[..., Job]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts jobs, of which nothing outlives the test."""
    jobs: list[Job] = []

    def start_job(launcher: str, flags: list[str], **more: str) -> Job:
        jobs.append(Job(tmp_path, launcher, flags, **more))
        return jobs[-1]

    yield start_job
    for job in jobs:
        for pid in pids(job.mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.process.process.wait()


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        ("deepspeed", TERM),
        pytest.param("deepspeed", USR2, marks=slow),
        pytest.param("torchrun", TERM, marks=slow),
        pytest.param("torchrun", USR2, marks=slow),
    ],
)
def test_a_signal_in_training(
    start: Start, demo: Demo, tmp_path: Path, launcher: str, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    flags = demo.flags(run, "--max_steps", str(STEPS), "--eval_steps", "0")
    job = start(launcher, flags)
    assert job.send(number, lambda: len(steps(run)) >= 3) == 75, job.text
    newest = checkpoint.newest_whole(run)
    assert newest is not None and checkpoint.verify(newest) is None
    done = len(steps(run))
    assert checkpoint.step_of(newest) == done < STEPS, "not the step that was just done"
    message = f"stopped by a signal after step {done} of {STEPS}; the same command goes on from here"
    assert read(run / "exit_status.json") == {"exit_code": 75, "message": message}
    workers = "return code = 75" if launcher == "deepspeed" else "exitcode  : 75"
    assert workers in job.text and "-15" not in job.text, "exit code of a worker"
    assert job.text.count("Traceback (most recent") == (launcher == "torchrun"), "torchrun shows its own"

    job = start(launcher, flags)
    assert job.code() == 0, job.text
    assert f"going on from {newest}" in job.text
    assert [line["step"] for line in steps(run)] == list(range(1, STEPS + 1))


def test_a_signal_in_an_evaluation(start: Start, demo: Demo, tmp_path: Path) -> None:
    """It is finished first, and the step after it saved."""
    run = tmp_path / "run"
    flags = demo.flags(run, "--eval_max_new_tokens", "24", "--per_device_bsz", "2")
    job = start("python", flags)
    assert job.send(TERM, lambda: "decode:" in job.text) == 75, job.text
    assert read(run / "exit_status.json")["exit_code"] == 75
    assert [checkpoint.step_of(path) for path in checkpoint.published(run)] == [len(steps(run))] == [1]
    assert (run / "eval" / "step-00000000" / "metrics.json").is_file()


def starting(job: Job, what: str) -> Callable[[], bool]:
    """Moments of a start."""
    moments = {
        "launcher": lambda: any("VOXTRAL_DIST_JOB" in environ(pid) for pid in pids(job.mark)),
        "ranks": lambda: bool(job.ranks()),
        "plan": lambda: " draws" in job.text,
    }
    return moments[what]


@pytest.mark.parametrize(
    ("launcher", "what"),
    [
        ("python", "plan"),
        *(pytest.param(name, what, marks=slow) for name in ("deepspeed", "torchrun") for what in ("ranks", "plan")),
        pytest.param("deepspeed", "launcher", marks=slow),
    ],
)  # fmt: skip
def test_a_signal_while_it_starts(start: Start, demo: Demo, tmp_path: Path, launcher: str, what: str) -> None:
    run = tmp_path / "run"
    job = start(launcher, demo.flags(run))
    assert job.send(TERM, starting(job, what)) == 75, job.text
    assert steps(run) == [] and checkpoint.published(run) == []
    if what == "plan":
        message = "stopped by a signal before it was done; start the same command again"
        assert read(run / "exit_status.json") == {"exit_code": 75, "message": message}
        assert job.text.count(f"error: {message}") == 1
        assert job.text.count("Traceback (most recent") == (launcher == "torchrun"), "torchrun shows its own"


STOPPED_AT_THE_PLAN = """
import os, signal, sys
sys.path.insert(0, "launch")
import train
from voxtral_dist import dry_run

dry_run.plan_lines = lambda *args: [str(os.kill(os.getpid(), signal.SIGTERM))]
train.main()
"""


def test_whoever_sees_the_plan_finds_how_it_ended(demo: Demo, tmp_path: Path) -> None:
    """However soon the signal comes: the run directory is there before the plan is shown."""
    run = tmp_path / "run"
    with started(
        [Process([sys.executable, "-c", STOPPED_AT_THE_PLAN, *demo.flags(run)], tmp_path / "log")]
    ) as jobs:
        assert jobs[0].end() == 75, jobs[0].text
    assert read(run / "exit_status.json")["exit_code"] == 75


def command_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def victim_of(job: Job, name: str) -> int:
    """A process of the job's tree."""
    if name == "script":
        return job.process.process.pid
    if name.startswith("rank "):
        return next(pid for pid in job.ranks() if environ(pid)["RANK"] == name.split()[1])
    command = f"{sys.executable} {name.replace('launch/', f'{ROOT}/launch/')}"
    return next(pid for pid in pids(job.mark) if command_of(pid).startswith(command))


TREE = {
    "deepspeed": ("-m deepspeed.launcher.runner", "-u -m deepspeed.launcher.launch"),
    "torchrun": ("-m torch.distributed.run",),
}


@slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("launcher", "victim"),
    [
        (launcher, victim)
        for launcher, own in TREE.items()
        for victim in ("script", "launch/guard.py", *own, "rank 0", "rank 1")
    ],
)
def test_whoever_is_killed_nothing_is_left_and_the_run_goes_on(
    start: Start, demo: Demo, tmp_path: Path, launcher: str, victim: str
) -> None:
    run = tmp_path / "run"
    flags = demo.flags(run, "--max_steps", str(STEPS), "--eval_steps", "0", "--save_steps", "4")
    job = start(launcher, flags, SHUTDOWN_GRACE="20")
    until(lambda: len(steps(run)) >= 6 or job.process.process.poll() is not None, 120)
    os.kill(victim_of(job, victim), signal.SIGKILL)
    code = job.process.end()
    assert code == -signal.SIGKILL if victim == "script" else code not in {0, 2}, job.text
    until(lambda: pids(job.mark) == [], 60)
    newest = checkpoint.newest_whole(run)
    assert newest is not None and checkpoint.step_of(newest) >= 4

    job = start(launcher, flags)
    assert job.code() == 0, job.text
    assert f"going on from {newest}" in job.text
    assert [line["step"] for line in steps(run)] == list(range(1, STEPS + 1))


@slow
@pytest.mark.timeout(600)
def test_two_ranks_one_rank_two_ranks(start: Start, demo: Demo, tmp_path: Path) -> None:
    """Each stop by SIGTERM: every draw is computed exactly once, the adapter is that of the undisturbed run."""
    names = ("whole", "changed")
    flags = {name: demo.flags(tmp_path / name, "--max_steps", "60", "--eval_steps", "0") for name in names}
    whole = start("deepspeed", flags["whole"])
    assert whole.code() == 0, whole.text
    run = tmp_path / "changed"
    for ranks, until_step in ((2, 4), (1, 10), (2, 60)):
        job = start("deepspeed", flags["changed"], NPROC=str(ranks))
        if until_step < 60:
            assert job.send(TERM, lambda most=until_step: len(steps(run)) >= most) == 75, job.text
        else:
            assert job.code() == 0, job.text
        assert read(run / "environment.json")["world_size"] == ranks
        assert until_step == 4 or "going on with world_size" in job.text
    assert "audit: 720 draws in 60 steps, each computed exactly once" in plan_batches("--audit", str(run))
    ends = [
        load_file(checkpoint.step_dir(tmp_path / name, 60) / "adapter/adapter_model.safetensors")
        for name in names
    ]
    difference = torch.cat([(ends[1][name] - value).flatten() for name, value in ends[0].items()])
    norm = torch.cat([value.flatten() for value in ends[0].values()]).norm()
    assert float(difference.norm() / norm) < 1e-4


def test_a_port_that_is_taken_is_told_at_once(start: Start, demo: Demo, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        began = time.monotonic()
        job = start("deepspeed", demo.flags(tmp_path / "run"), MASTER_PORT=str(port))
        assert job.code() == 2 and time.monotonic() - began < 10
    message = f"error: MASTER_PORT={port} is in use or no port; leave it out and a free one is taken\n"
    assert job.text == message


@slow
@pytest.mark.parametrize("launcher", ["python", "deepspeed"])
def test_a_run_directory_that_vanishes_ends_the_run(
    start: Start, demo: Demo, tmp_path: Path, launcher: str
) -> None:
    """And no second one grows in its place."""
    run, away = tmp_path / "run", tmp_path / "away"
    flags = demo.flags(run, "--max_steps", str(STEPS), "--eval_steps", "0", "--save_steps", "4")
    job = start(launcher, flags)
    until(lambda: len(steps(run)) >= 5 or job.process.process.poll() is not None, 120)
    run.rename(away)
    assert job.code() == 1, job.text
    assert f"error: --output_dir {run} was moved or deleted while the run wrote into it" in job.text
    assert not run.exists() and checkpoint.newest_whole(away) is not None


@slow
def test_a_rank_out_of_memory_ends_the_job(start: Start, demo: Demo, tmp_path: Path) -> None:
    """Its address space is limited from outside; the log says memory, the last line which rank."""
    run = tmp_path / "run"
    flags = demo.flags(run, "--max_steps", "200", "--eval_steps", "0", "--save_steps", "2")
    job = start("deepspeed", flags, SHUTDOWN_GRACE="5")
    until(lambda: len(steps(run)) >= 3 or job.process.process.poll() is not None, 120)
    victim = next(pid for pid in job.ranks() if environ(pid)["RANK"] == "1")
    used = int(Path(f"/proc/{victim}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(victim, resource.RLIMIT_AS, (used - 2**30, used))
    assert job.code() == 1, job.text
    assert "memory" in job.text and f"pid {victim}) died or lost its connection in" in job.text
    assert checkpoint.newest_whole(run) is not None
