"""Two machines: a real sshd on two loopback addresses, one rank on each, under the launchers that people use.

The losses are those of two ranks on one machine, bit for bit, and whatever is killed, no process is left on either.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from demo_runs import Demo, Process, losses, read, steps, two_ranks
from harness import ROOT, free_port
from test_launch import STUB, parent_of
from test_watchdog import environ, pids, until

from voxtral_dist import checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
HOSTS = {"node-a": "127.0.0.2", "node-b": "127.0.0.3"}


@dataclass(frozen=True)
class Cluster:
    """The two machines.

    Attributes:
        folder: holds keys, configuration, hostfile, and ``bin/ssh``, which knows them.
        sshd: process id of the daemon.
    """

    folder: Path
    sshd: int

    @property
    def hostfile(self) -> Path:
        return self.folder / "hostfile"

    def environ(self, job: str) -> dict[str, str]:
        """The variables of a job: its mark reaches its processes on both machines."""
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return {"PATH": path, "PYTHON": sys.executable, "VOXTRAL_DIST_TEST": f"{self.folder}/{job}"}


def configure(folder: Path) -> None:
    """Keys for both sides, the daemon's settings, and an ssh that finds it under the two names."""
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    port = free_port()
    listen = "".join(f"ListenAddress {address}\n" for address in HOSTS.values())
    (folder / "sshd_config").write_text(
        f"Port {port}\n{listen}HostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPidFile none\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        "MaxStartups 50\n"
    )
    hosts = "".join(f"Host {name}\n  HostName {address}\n" for name, address in HOSTS.items())
    (folder / "ssh_config").write_text(
        f"{hosts}Host *\n  Port {port}\n  IdentityFile {folder}/user\n  IdentitiesOnly yes\n  LogLevel ERROR\n"
        f"  StrictHostKeyChecking no\n  UserKnownHostsFile {folder}/known_hosts\n"
    )
    (folder / "bin").mkdir()
    (folder / "bin" / "ssh").write_text(
        f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n'
    )
    (folder / "bin" / "ssh").chmod(0o755)
    (folder / "hostfile").write_text("# two machines\nnode-a slots=1\n\nnode-b slots=1\n")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    path = f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
    sshd = shutil.which("sshd", path=path)
    if sshd is None or shutil.which("ssh") is None:
        pytest.skip("no sshd or no ssh on this machine")
    folder = tmp_path_factory.mktemp("cluster")
    configure(folder)
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd demands it of root
    with subprocess.Popen([sshd, "-D", "-e", "-f", folder / "sshd_config"], stderr=subprocess.PIPE) as daemon:
        try:
            for name in HOSTS:
                reach = [folder / "bin" / "ssh", name, "true"]
                until(lambda reach=reach: subprocess.run(reach, check=False).returncode == 0, 20)
            yield Cluster(folder, daemon.pid)
        finally:
            daemon.terminate()


class Job:
    """A command of one of the two machines; its processes on both carry a mark in their environment."""

    def __init__(self, cluster: Cluster, folder: Path, command: list[str], **more: str) -> None:
        count = len(list(folder.glob("job.*.err")))
        variables = cluster.environ(f"{folder.name}-{count}") | more
        self.mark = f"VOXTRAL_DIST_TEST={variables['VOXTRAL_DIST_TEST']}"
        self.process = Process(command, folder / f"job.{count}", **variables)

    @property
    def text(self) -> str:
        return self.process.text

    def alive(self) -> list[int]:
        """Every process of the job, on both machines."""
        return pids(self.mark)

    def find(self, what: str, **about: str) -> int:
        """The one process whose command line holds ``what`` and whose environment holds ``about``."""
        found = [
            pid for pid in self.alive() if what in command_of(pid) and about.items() <= environ(pid).items()
        ]
        assert len(found) == 1, [(pid, command_of(pid)) for pid in found]
        return found[0]

    def end(self) -> int:
        """Its exit code; within a minute of its end no process of it may be left on either machine."""
        code = self.process.end()
        until(lambda: not self.alive(), 60)
        return code


Start = Callable[..., Job]


@pytest.fixture
def start(cluster: Cluster, tmp_path: Path) -> Iterator[Start]:
    """Starts jobs, of which nothing outlives the test."""
    jobs: list[Job] = []

    def start_job(command: list[str], **more: str) -> Job:
        jobs.append(Job(cluster, tmp_path, command, **more))
        return jobs[-1]

    yield start_job
    for job in jobs:
        for pid in job.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.process.process.wait()


def command_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


def train(flags: list[str], script: Path = ROOT / "launch" / "train.py") -> list[str]:
    return ["bash", str(script.with_name("run_ranks.sh")), str(script), *flags]


def short(demo: Demo, run: Path) -> list[str]:
    return demo.flags(run, "--max_steps", "6", "--eval_steps", "0")


@pytest.fixture(scope="module")
def one_machine(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of two ranks on one machine."""
    run = tmp_path_factory.mktemp("one") / "run"
    found = losses(two_ranks("deepspeed", short(demo, run), run))
    assert len(found) == 6
    return found


def test_deepspeeds_own_hostfile(
    start: Start, cluster: Cluster, demo: Demo, tmp_path: Path, one_machine: list[float]
) -> None:
    """The command of its manual, over pdsh. It finds address and names by itself."""
    if shutil.which("pdsh") is None:
        pytest.skip("no pdsh on this machine")
    settings = cluster.environ("plain") | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    (tmp_path / ".deepspeed_env").write_text(
        "".join(f"{name}={settings[name]}\n" for name in sorted(settings))
    )
    run = tmp_path / "run"
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(cluster.hostfile)]
    flags = ["--master_port", str(free_port()), "--no_local_rank", str(ROOT / "launch" / "train.py")]
    job = start(["env", "-C", str(tmp_path), *deepspeed, *flags, *short(demo, run)])
    assert job.end() == 0, job.text
    assert read(run / "environment.json")["world_size"] == 2
    assert losses(run) == one_machine
    assert "node-a: " in job.text and "node-b: " in job.text, "pdsh says which machine a line is from"


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_a_hostfile(
    start: Start, cluster: Cluster, demo: Demo, tmp_path: Path, one_machine: list[float], launcher: str
) -> None:
    run = tmp_path / "run"
    job = start(train(short(demo, run)), HOSTFILE=str(cluster.hostfile), LAUNCHER=launcher)
    assert job.end() == 0, job.text
    assert losses(run) == one_machine


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_started_by_hand_on_each_machine(
    start: Start, demo: Demo, tmp_path: Path, one_machine: list[float], launcher: str
) -> None:
    run, port = tmp_path / "run", str(free_port())
    about = {
        "NNODES": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "NPROC": "1",
        "LAUNCHER": launcher,
    }
    jobs = [start(train(short(demo, run)), NODE_RANK=rank, **about) for rank in "01"]
    assert [job.end() for job in jobs] == [0, 0], jobs[0].text + jobs[1].text
    assert losses(run) == one_machine


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_sigterm_saves_on_both_machines(
    start: Start, cluster: Cluster, demo: Demo, tmp_path: Path, launcher: str
) -> None:
    run = tmp_path / "run"
    command = train(demo.flags(run, "--max_steps", "90", "--eval_steps", "0"))
    about = {"HOSTFILE": str(cluster.hostfile), "LAUNCHER": launcher}
    job = start(command, **about)
    until(lambda: len(steps(run)) >= 3 or job.process.process.poll() is not None, 120)
    job.process.process.send_signal(signal.SIGTERM)
    assert job.end() == 75, job.text
    newest = checkpoint.newest_whole(run)
    assert newest is not None and checkpoint.step_of(newest) == len(steps(run)) < 90
    assert read(run / "exit_status.json")["exit_code"] == 75
    job = start(command, **about)
    assert job.end() == 0, job.text
    assert [line["step"] for line in steps(run)] == list(range(1, 91))


VICTIMS: dict[str, Callable[[Job], int]] = {
    "script": lambda job: job.process.process.pid,
    "ssh": lambda job: job.find("node-b exec bash"),
    "sshd": lambda job: parent_of(job.find("supervise.py", NODE_RANK="1")),
    "supervise": lambda job: job.find("supervise.py", NODE_RANK="1"),
    "guard": lambda job: job.find("guard.py", NODE_RANK="1"),
    "launcher": lambda job: parent_of(job.find("train.py", RANK="1")),
    "rank": lambda job: job.find("train.py", RANK="1"),
}
"""Processes of node-b, and those of the first machine that lead there."""


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
@pytest.mark.parametrize("victim", VICTIMS)
def test_whatever_is_killed_nothing_is_left(
    start: Start, cluster: Cluster, tmp_path: Path, victim: str, launcher: str
) -> None:
    """With ranks that do nothing, and that nobody but their launchers and guards would end."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    script = tmp_path / "launch" / "train.py"
    script.write_text(STUB)
    about = {"HOSTFILE": str(cluster.hostfile), "LAUNCHER": launcher, "SHUTDOWN_GRACE": "2"}
    job = start(train(["--output_dir", str(tmp_path)], script), **about)
    until(lambda: job.text.count(" is ") == 2 or job.process.process.poll() is not None, 60)
    pid = VICTIMS[victim](job)
    assert victim != "sshd" or "sshd" in command_of(pid)
    os.kill(pid, signal.SIGKILL)
    assert job.end() not in {0, 2}, job.text
    silent = victim in {"rank", "ssh", "sshd", "guard"}  # dead, or its words do not get here
    assert job.text.count("helper lives: True") == 2 - silent, job.text


@pytest.mark.parametrize("victim", ["script", "sshd", "launcher"])
def test_a_killed_training_goes_on(
    start: Start, cluster: Cluster, demo: Demo, tmp_path: Path, victim: str
) -> None:
    run = tmp_path / "run"
    command = train(demo.flags(run, "--max_steps", "90", "--eval_steps", "0", "--save_steps", "4"))
    about = {"HOSTFILE": str(cluster.hostfile), "SHUTDOWN_GRACE": "10"}
    job = start(command, **about)
    until(lambda: len(steps(run)) >= 6 or job.process.process.poll() is not None, 120)
    os.kill(VICTIMS[victim](job), signal.SIGKILL)
    assert job.end() not in {0, 2}, job.text
    newest = checkpoint.newest_whole(run)
    assert newest is not None and checkpoint.step_of(newest) >= 4
    job = start(command, **about)
    assert job.end() == 0, job.text
    assert f"going on from {newest}" in job.text
    assert [line["step"] for line in steps(run)] == list(range(1, 91))


def test_a_machine_that_cannot_be_used_is_named(start: Start, cluster: Cluster, tmp_path: Path) -> None:
    """Before anything starts on the others."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node-a slots=1\n127.0.0.4 slots=1\n")
    job = start(train(["--output_dir", str(tmp_path / "run")]), HOSTFILE=str(hostfile))
    assert job.end() == 2
    assert job.text.startswith(
        f"error: {hostfile}:2: 127.0.0.4 cannot be used: ssh: connect to host 127.0.0.4"
    )
    assert job.text.count("\n") == 1 and not (tmp_path / "run").exists()
