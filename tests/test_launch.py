"""The shell launchers with real deepspeed and torchrun on two ranks: exit codes, signals, and nobody left behind.

A copy of launch/ gets a stub as its train.py: it imports no torch, so that a run costs little more than its launcher.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

STUB = '''
"""A rank: ends with --code, or with 75 after --signals signals; rank 0 records it. Starts one helper process."""
import argparse, json, os, pathlib, signal, subprocess, sys, time

parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", type=pathlib.Path, default=".")
parser.add_argument("--config")
parser.add_argument("--code", type=int)
parser.add_argument("--signals", type=int, default=1)
parser.add_argument("--dry_run", action="store_true")
parser.add_argument("--debug", action="store_true")
parser.add_argument("--silent", action="store_true")
flags = parser.parse_args()
rank, got = os.environ["RANK"], []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: got.append(signal.Signals(number).name))

helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
print(f"rank {rank} of {os.environ['WORLD_SIZE']} is {os.getpid()}\\n", end="", flush=True)  # in one write
while flags.code is None and len(got) < flags.signals:
    time.sleep(0.02)
time.sleep(0.2)
print(f"rank {rank} got {got}, helper lives: {helper.poll() is None}", flush=True)
helper.kill()
helper.wait()
code = 75 if flags.code is None else flags.code
if rank == "0" and not flags.silent:
    (flags.output_dir / "exit_status.json").write_text(json.dumps({"exit_code": code}, indent=2))
sys.exit(code)
'''


class Job:
    """A start of train.sh in ``folder``, where ``launch/train.py`` is the stub."""

    def __init__(self, folder: Path, launcher: str, *flags: str, out: Path | None = None, **env: str) -> None:
        self.ranks = 1 if launcher == "python" else 2
        self.log_file = out or folder / "log"
        self.mark = f"TEST_JOB={uuid.uuid4()}"
        settings = {"VOXTRAL_DIST_PYTHON": sys.executable, "NPROC": "2", "LAUNCHER": launcher, **env}
        command = ["env", self.mark, "bash", str(folder / "launch" / "train.sh"), *flags]
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=os.environ | settings,
                cwd=folder,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509  (background jobs ignore it)
            )

    @property
    def log(self) -> str:
        """What the job has printed so far."""
        return self.log_file.read_text()

    def pids(self) -> list[int]:
        """Every living process of the job, whoever its parent is."""
        pids = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                if self.mark.encode() in path.read_bytes().split(b"\0"):
                    pids.append(int(path.parent.name))
        return pids

    def wait_for_ranks(self) -> list[int]:
        """Process ids of the ranks, once all of them handle signals."""
        until(lambda: self.log.count(" is ") == self.ranks or self.process.poll() is not None)
        return [int(line.split()[-1]) for line in self.log.splitlines() if " is " in line]

    def code(self) -> int:
        """The exit code of train.sh, after checking that no process is left."""
        code = self.process.wait(60)
        assert self.pids() == [], self.log
        return code


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, at most a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def environ(pid: int) -> dict[str, str]:
    """The environment of a process."""
    words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def parent_of(pid: int) -> int:
    """The process that started ``pid``."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    """Starts jobs, and ends with the test whatever a failed one leaves."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    (tmp_path / "launch" / "train.py").write_text(STUB)
    jobs: list[Job] = []

    def start_job(launcher: str, *flags: str, out: Path | None = None, **env: str) -> Job:
        jobs.append(Job(tmp_path, launcher, *flags, out=out, **env))
        return jobs[-1]

    yield start_job
    for job in jobs:
        for pid in job.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.process.wait()


Start = Callable[..., Job]
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("launcher", "code"),
    [
        ("deepspeed", 0),
        ("torchrun", 2),
        ("python", 0),
        ("python", 77),
        pytest.param("deepspeed", 2, marks=slow),
        pytest.param("deepspeed", 75, marks=slow),
        pytest.param("torchrun", 0, marks=slow),
        pytest.param("torchrun", 75, marks=slow),
    ],
)
def test_the_exit_code_comes_back(start: Start, launcher: str, code: int) -> None:
    job = start(launcher, "--output_dir", ".", "--code", str(code))
    assert job.code() == code, job.log
    assert all(f"rank {rank} of {job.ranks} " in job.log for rank in range(job.ranks))


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_sigterm_reaches_every_rank_and_no_helper(start: Start, launcher: str) -> None:
    job = start(launcher, "--output_dir", ".")
    job.wait_for_ranks()
    job.process.send_signal(signal.SIGTERM)
    assert job.code() == 75, job.log
    for rank in range(2):
        assert f"rank {rank} got ['SIGTERM'], helper lives: True" in job.log


@pytest.mark.parametrize(
    ("sent", "received"),
    [("SIGHUP", "SIGHUP"), ("SIGUSR1", "SIGUSR2"), ("SIGUSR2", "SIGUSR2")],
)
def test_signals_go_on(start: Start, sent: str, received: str) -> None:
    job = start("python", "--output_dir", ".")
    job.wait_for_ranks()
    job.process.send_signal(signal.Signals[sent])
    assert job.code() == 75, job.log
    assert f"got ['{received}'], helper lives: True" in job.log


def test_control_c_reaches_a_rank_once(start: Start) -> None:
    """The terminal signals the whole foreground group; launcher and ranks must not be in it."""
    job = start("python", "--output_dir", ".")
    job.wait_for_ranks()
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.code() == 75, job.log
    assert "got ['SIGINT'], helper lives: True" in job.log


def test_a_second_signal_does_not_end_the_waiting(start: Start) -> None:
    job = start("python", "--silent", "--signals", "3")
    job.wait_for_ranks()
    for number in (signal.SIGHUP, signal.SIGUSR2, signal.SIGTERM):
        job.process.send_signal(number)
        time.sleep(0.4)
    assert job.code() == 75, job.log
    assert "got ['SIGHUP', 'SIGUSR2', 'SIGTERM']" in job.log


def test_sigterm_before_there_are_ranks(start: Start) -> None:
    job = start("torchrun", "--output_dir", ".")
    until(
        lambda: any(
            b"torch.distributed.run" in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in job.pids()
        )
    )
    job.process.send_signal(signal.SIGTERM)
    assert job.code() != 0
    assert "rank" not in job.log


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_ranks_that_outlive_their_launcher_may_save(start: Start, launcher: str) -> None:
    job = start(launcher, "--output_dir", ".")
    os.kill(parent_of(job.wait_for_ranks()[0]), signal.SIGKILL)
    assert job.code() == 75, job.log


@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("torchrun", marks=slow)])
def test_stuck_ranks_are_killed_and_that_is_a_failure(start: Start, launcher: str) -> None:
    """Without --output_dir too, where deepspeed reports success. torchrun must not take --signals for its own."""
    job = start(launcher, "--signals", "99", SHUTDOWN_GRACE="1")
    os.kill(parent_of(job.wait_for_ranks()[0]), signal.SIGKILL)
    assert job.code() == {"deepspeed": 1, "torchrun": 137}[launcher], job.log


@slow
def test_a_killed_deepspeed_runner_leaves_nothing(start: Start) -> None:
    job = start("deepspeed", "--signals", "99", SHUTDOWN_GRACE="1")
    os.kill(parent_of(parent_of(job.wait_for_ranks()[0])), signal.SIGKILL)
    assert job.code() == 137, job.log


@pytest.mark.parametrize("victim", ["script", "guard"])
def test_whoever_looks_after_the_ranks_is_killed(start: Start, victim: str) -> None:
    """The script and the guard, which watch each other; the ranks may save. The launcher is killed further below."""
    job = start("python", "--output_dir", ".")
    (rank,) = job.wait_for_ranks()
    guard = parent_of(rank)
    assert parent_of(guard) == job.process.pid
    os.kill(job.process.pid if victim == "script" else guard, signal.SIGKILL)
    code = job.process.wait(60)
    until(lambda: job.pids() == [])
    assert code == {"script": -signal.SIGKILL, "guard": 75}[victim], job.log
    assert "got ['SIGTERM'], helper lives: True" in job.log


def test_a_reader_of_the_output_that_dies_is_no_harm(start: Start, tmp_path: Path) -> None:
    """As the tee of "train.sh | tee log" does at Ctrl-C."""
    (tmp_path / "reader").mkdir()
    os.mkfifo(tmp_path / "reader" / "pipe")
    with subprocess.Popen(["cat", tmp_path / "reader" / "pipe"], stdout=subprocess.DEVNULL) as reader:
        job = start("python", "--output_dir", ".", out=tmp_path / "reader" / "pipe")
        until(lambda: any("RANK" in environ(pid) for pid in job.pids()))
        time.sleep(0.5)
        reader.kill()
    job.process.send_signal(signal.SIGTERM)
    assert job.code() == 75
    assert (tmp_path / "exit_status.json").is_file(), "rank 0 broke off"


def test_a_task_of_a_slurm_step_is_a_rank(start: Start, tmp_path: Path) -> None:
    """Without launcher or guard: slurm signals the ranks themselves. MASTER_ADDR is the first node's."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\nprintf '%s\\n' n3 n4\n")
    (tmp_path / "scontrol").chmod(0o755)
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n[3-4]"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    job = start("", "--output_dir", ".", RANK="1", WORLD_SIZE="2", SLURM_JOB_ID="20007", PATH=path, **step)
    until(lambda: "is" in job.log)
    assert f"rank 1 of 2 is {job.process.pid}" in job.log
    assert environ(job.process.pid)["MASTER_ADDR"] == "n3"
    assert environ(job.process.pid)["MASTER_PORT"] == "10007"
    job.process.send_signal(signal.SIGTERM)
    assert job.code() == 75, job.log


@slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_killed_rank_ends_the_job(start: Start, launcher: str) -> None:
    job = start(launcher, "--output_dir", ".")
    os.kill(job.wait_for_ranks()[1], signal.SIGKILL)
    assert job.code() != 0


@pytest.mark.parametrize(("rank_code", "code"), [(0, 1), (2, 2)])
def test_success_needs_a_record_and_an_old_one_does_not_count(
    start: Start, tmp_path: Path, rank_code: int, code: int
) -> None:
    (tmp_path / "exit_status.json").write_text('{"exit_code": 0}')
    assert start("python", "--output_dir=.", "--silent", "--code", str(rank_code)).code() == code


@slow
@pytest.mark.parametrize(("written", "code"), [("", 3), ('{"exit_code": 75}', 75), ("torn", 1)])
def test_the_record_is_seen_late_on_other_machines(tmp_path: Path, written: str, code: int) -> None:
    """What an earlier start left may still be there; rank 0 writes after the ranks of this machine have failed."""
    record = tmp_path / "exit_status.json"
    record.write_text('{"exit_code": 0}')
    command = [sys.executable, str(ROOT / "launch/supervise.py"), "--status", str(record), "--node_rank", "1"]
    with subprocess.Popen([*command, "--", sys.executable, "-c", "raise SystemExit(3)"]) as process:
        time.sleep(2)
        assert process.poll() is None, "did not wait"
        if written:
            record.with_suffix(".tmp").write_text(written)
            record.with_suffix(".tmp").rename(record)
        assert process.wait(30) == code


def test_the_output_dir_of_a_config_file_is_found(start: Start, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text('model_id: x\noutput_dir: "."\n')
    (tmp_path / "exit_status.json").write_text('{"exit_code": 0}')
    assert start("python", "--config", "run.yaml", "--silent", "--code", "0").code() == 1


@pytest.mark.parametrize("flag", ["--dry_run", "--debug"])
def test_a_look_at_a_run_leaves_its_record_alone(start: Start, tmp_path: Path, flag: str) -> None:
    (tmp_path / "exit_status.json").write_text('{"exit_code": 75}')
    assert start("python", "--output_dir", ".", flag, "--silent", "--code", "0").code() == 0
    assert (tmp_path / "exit_status.json").exists()


def test_help_needs_no_ranks(start: Start) -> None:
    job = start("deepspeed", "--help")
    assert job.code() == 0 and job.log.count("usage: train.py") == 1


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"LAUNCHER": "mpirun"}, "LAUNCHER=mpirun is not deepspeed, torchrun or python"),
        ({"VOXTRAL_DIST_PYTHON": "/no/python"}, "VOXTRAL_DIST_PYTHON=/no/python cannot be run"),
        (
            {"NNODES": "2", "NODE_RANK": "0"},
            "NNODES=2 but no MASTER_ADDR; set it to the address of the machine with NODE_RANK=0",
        ),
        (
            {"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"},
            "NODE_RANK=2; each of NNODES=2 machines takes its own, from 0 to 1",
        ),
        (
            {"HOSTFILE": "no/hosts"},
            "HOSTFILE=no/hosts cannot be read ([Errno 2] No such file or directory: 'no/hosts'); "
            "see launch/hostfile.example",
        ),
    ],
)
def test_wrong_settings_are_one_line(start: Start, env: dict[str, str], message: str) -> None:
    job = start("python", **env)
    assert job.code() == 2 and job.log == f"error: {message}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a slots=8\nb\n", "hosts:2: 'b' names no ranks; write NAME slots=N, one machine a line"),
        ("a slots=0\n", "hosts:1: 'a slots=0' names no ranks; write NAME slots=N, one machine a line"),
        ("a slots=1\n# again\na slots=2\n", "hosts:3: a is there twice; give it one line with all its slots"),
        ("# none\n", "HOSTFILE=hosts names no machine; write NAME slots=N, one a line"),
    ],
)
def test_a_wrong_hostfile_is_one_line(start: Start, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hosts").write_text(text)
    job = start("deepspeed", HOSTFILE="hosts")
    assert job.code() == 2 and job.log == f"error: {message}\n"


def fake_python(folder: Path, body: str) -> dict[str, str]:
    """An environment in which every python3 on PATH is a shell script with this body."""
    folder.mkdir()
    for name in ("python3", "python3.13", "python3.12", "python3.11", "python3.10"):
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return {"VOXTRAL_DIST_PYTHON": "", "PATH": f"{folder}:{os.environ['PATH']}"}


def test_an_old_python_is_refused(start: Start, tmp_path: Path) -> None:
    patch = "import sys; sys.version_info = (3, 9, 1); exec(sys.argv[1])"
    body = f'if [ "$1" = -V ]; then echo Python 3.9.1; else exec {sys.executable} -c "{patch}" "$2"; fi'
    job = start("python", **fake_python(tmp_path / "bin", body))
    assert job.code() == 2
    assert job.log.startswith("error: no Python from 3.10 to 3.13 on PATH (python3: Python 3.9.1)")
    assert job.log.count("\n") == 1


def test_a_python_without_ensurepip_says_what_to_do(start: Start, tmp_path: Path) -> None:
    body = f'case "$*" in *ensurepip*) exit 1;; esac; exec {sys.executable} "$@"'
    job = start("python", **fake_python(tmp_path / "bin", body))
    assert job.code() == 2
    assert "no ensurepip): install python3-venv" in job.log and job.log.count("\n") == 1


@slow
def test_setup_keeps_the_torch_outside_and_two_at_once_do_no_harm(tmp_path: Path) -> None:
    """Offline: this interpreter has every package, so that pip only links the project itself."""
    for name in ("launch", "voxtral_dist"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("setup.cfg", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").touch()
    subprocess.run([sys.executable, "-m", "venv", tmp_path / ".venv"], check=True)
    inside = str(tmp_path / ".venv" / "bin" / "python")  # its old setuptools would hide the one torch needs
    subprocess.run([inside, "-m", "pip", "uninstall", "-q", "-y", "setuptools"], check=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_FIND_LINKS": "", "PYTHONPATH": ""}
    env = os.environ | offline | {"PATH": path, "VOXTRAL_DIST_PYTHON": ""}
    code = "import torch, voxtral_dist; print(torch.__file__, voxtral_dist.__file__)"
    command = ["bash", "-c", '. launch/setup.sh run; exec "$PYTHON" -c "$0"', code]

    def run() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    both = [run(), run()]
    results = [job.communicate(timeout=240) for job in both]
    assert [job.returncode for job in both] == [0, 0], results
    assert sum("keeping the torch" in err for _, err in results) == 1
    torch_file, own_file = results[0][0].split()
    assert not torch_file.startswith(str(tmp_path)) and own_file.startswith(str(tmp_path))
    assert run().communicate(timeout=60) == (results[0][0], "")
