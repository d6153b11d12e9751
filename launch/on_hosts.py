"""Starts launch/run_ranks.sh on every machine of a hostfile, over ssh; launch/run_ranks.sh starts it for HOSTFILE:

    HOSTFILE=launch/hostfile bash launch/train.sh FLAGS

What goes to a machine goes through the standard input of its ssh: first what to run, then names of signals. When this
process or the connection is gone that input ends, and the machine ends its ranks by itself: see launch/supervise.py.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from supervise import Parts, Status

from voxtral_dist.errors import UserError, run_main

RUN_RANKS = Path(__file__).resolve().with_name("run_ranks.sh")
LINE = re.compile(r"(\S+)\s+slots=(\d+)\s*(?:#.*)?")
TRAVELS = re.compile(
    "(NCCL_|GLOO_|UCX_|FI_|TORCH|PYTORCH_|PYTHON|CUDA_|HF_|DS_|DEEPSPEED_|OMP_|TOKENIZERS_|AWS_|VOXTRAL_DIST_|LC_)"
    "|(LANG|LAUNCHER|TMPDIR)$"
)
"""Names of variables that the machines get from here."""

STAYS = {"CUDA_VISIBLE_DEVICES", "PYTHON"}
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=20", "-o", "ServerAliveInterval=15")
RECEIVE = """exec bash -c 'IFS= read -r -d "" words && eval "$words"'"""
"""Every shell on the other side understands it: bash there takes its words, up to a zero byte, from standard input."""

PROBE = """import socket, subprocess
s = socket.socket()
s.bind(("", 0))
print(s.getsockname()[1], subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout)"""


@dataclass(frozen=True)
class Host:
    """A machine of the hostfile: what ssh calls it, its number of ranks, the line that says so."""

    name: str
    slots: int
    where: str


def read_hostfile(path: Path) -> list[Host]:
    """The machines, in the order of the file.

    Raises:
        UserError: it cannot be read, a line is not "NAME slots=N", a name occurs twice, or it names no machine.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"HOSTFILE={path} cannot be read ({error}); see launch/hostfile.example") from error
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, 1):
        text, where = line.strip(), f"{path}:{number}"
        if not text or text.startswith("#"):
            continue
        match = LINE.fullmatch(text)
        if match is None or int(match[2]) == 0:
            raise UserError(f"{where}: {text!r} names no ranks; write NAME slots=N, one machine a line")
        if match[1] in hosts:
            raise UserError(f"{where}: {match[1]} is there twice; give it one line with all its slots")
        hosts[match[1]] = Host(match[1], int(match[2]), where)
    if not hosts:
        raise UserError(f"HOSTFILE={path} names no machine; write NAME slots=N, one a line")
    return list(hosts.values())


def probe(hosts: Sequence[Host], python: str) -> tuple[str, str]:
    """Address and a free port of the first machine, once all can be used.

    Raises:
        UserError: one cannot be reached, or lacks the folder or the interpreter.
    """
    words = f"cd {shlex.quote(os.getcwd())} && exec {shlex.quote(python)} -c {shlex.quote(PROBE)}\0"
    started = [
        subprocess.Popen([*SSH, host.name, RECEIVE], stdin=-1, stdout=-1, stderr=-1, text=True)
        for host in hosts
    ]
    answers = [process.communicate(words) for process in started]
    for host, process, (_, err) in zip(hosts, started, answers, strict=True):
        if process.returncode:
            why = (err.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(
                f"{host.where}: {host.name} cannot be used: {why}; it takes ssh without a password, "
                f"and there as here the folder {os.getcwd()} and {python}"
            )
    port, *addresses = answers[0][0].split()
    return addresses[0] if addresses else hosts[0].name, port


def words(hosts: Sequence[Host], rank: int, about: dict[str, str], command: Sequence[str]) -> str:
    """What machine ``rank`` is told to run, as bash reads it, with the zero byte that ends it."""
    travelling = {
        name: value for name, value in os.environ.items() if TRAVELS.match(name) and name not in STAYS
    }
    slots = ",".join(str(host.slots) for host in hosts)
    own = {"NODE_RANK": str(rank), "NPROC": str(hosts[rank].slots), "NNODES": str(len(hosts)), "SLOTS": slots}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in (travelling | about | own).items()]
    path = f'export PATH={shlex.quote(str(Path(about["PYTHON"]).parent))}:"$PATH"'
    start = f"cd {shlex.quote(os.getcwd())} && exec bash {shlex.quote(str(RUN_RANKS))} {shlex.join(command)}"
    return "; ".join([*exports, path, start]) + "\0"


def main(argv: Sequence[str]) -> int:
    """Run ``SCRIPT FLAGS`` on all machines; the exit code of the job."""
    hostfile, status_file, grace, *command = argv
    python = os.environ["PYTHON"]
    hosts = read_hostfile(Path(hostfile))
    address, port = probe(hosts, python)
    about = {
        "PYTHON": python,
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", address),
        "MASTER_PORT": os.environ.get("MASTER_PORT", port),
        "CONTROL": "stdin",
        "SHUTDOWN_GRACE": grace,
    }
    status = Status(Path(status_file) if status_file else None)
    parts = Parts(
        {host.name: [*SSH, host.name, RECEIVE] for host in hosts},
        {host.name: words(hosts, rank, about, command) for rank, host in enumerate(hosts)},
        float(grace),
    )
    return status.exit_code(parts.wait(), parts.stopped)


if __name__ == "__main__":
    run_main(lambda: sys.exit(main(sys.argv[1:])))
