"""Whole runs of the demo in real processes: flags, starts, stops, and what a run directory holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, free_port, load_script
from safetensors.torch import load_file

from voxtral_dist import checkpoint
from voxtral_dist.packing import pack

STEPS, BATCH = 8, 12
TASKS = ("asr", "sqa", "tqa")
TIMEOUT_S = 240
FLAGS = (
    *("--max_steps", str(STEPS), "--per_device_bsz", "4", "--max_len", "128", "--num_workers", "1"),
    *("--seed", "7", "--lora_dropout", "0", "--learning_rate", "3e-3", "--eval_steps", "4"),
    *("--eval_max_new_tokens", "4"),
)


@dataclass(frozen=True)
class Demo:
    """A small composition of the demo: JSONL files, packed data, base model."""

    folder: Path
    model: Path

    def data(self, kind: str) -> list[str]:
        """The data flags, ``kind`` "shards" or "jsonl"."""
        flags = ["--model_id", str(self.model)]
        for flag, split in (("train", "train"), ("val", "dev")):
            packed = [str(self.folder / "shards" / task / split) for task in TASKS]
            rows = [str(self.folder / f"{task}.{split}.jsonl") for task in TASKS]
            flags += [f"--{flag}_{kind}", ",".join(packed if kind == "shards" else rows)]
        return flags

    def flags(self, out: Path, *more: str, kind: str = "shards") -> list[str]:
        """Flags of a whole run; of a flag given twice the later one counts."""
        return [*self.data(kind), "--output_dir", str(out), *FLAGS, "--global_batch_size", str(BATCH), *more]


def compose(folder: Path, model: Path) -> Demo:
    """60 training rows and 8 dev rows of each task in an empty folder."""
    script = load_script("tools/compose_demo.py")
    script.compose(folder, script.Settings(train_rows=60, dev_rows=8), script.load_bank(script.BANK))
    for split in ("train", "dev"):
        pack([folder / f"{task}.{split}.jsonl" for task in TASKS], folder / "shards", split=split)
    return Demo(folder, model)


def environment(**more: str) -> dict[str, str]:
    """This process's environment without a rank of its own."""
    ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_NTASKS")
    clean = {name: value for name, value in os.environ.items() if name not in ranks}
    quick = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": str(ROOT)}
    return clean | quick | more


class Process:
    """A started program; its output goes to files."""

    def __init__(self, command: list[str], log: Path, **environ: str) -> None:
        self.log = log
        with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as err:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment(**environ), stdout=out, stderr=err
            )

    @property
    def text(self) -> str:
        return self.log.with_suffix(".out").read_text() + self.log.with_suffix(".err").read_text()

    def end(self) -> int:
        """Exit code, once it is there."""
        return self.process.wait(TIMEOUT_S)


@contextmanager
def started(processes: list[Process]) -> Iterator[list[Process]]:
    """None of them outlives the test."""
    try:
        yield processes
    finally:
        for one in processes:
            one.process.kill()
            one.process.wait()


def log_of(out: Path) -> Path:
    """A new name for logs beside a run directory."""
    return out.parent / f"{out.name}-{len(list(out.parent.glob('*.err')))}"


def alone(flags: list[str], out: Path, script: str = "train", code: int = 0) -> Process:
    """``python launch/SCRIPT.py FLAGS`` to its end."""
    with started([Process([sys.executable, f"launch/{script}.py", *flags], log_of(out))]) as (process,):
        assert process.end() == code, process.text
        return process


def launch(
    launcher: str, flags: list[str], out: Path, script: str = "launch/train.py", **environ: str
) -> list[Process]:
    """Start two ranks under deepspeed or torchrun, or as slurm would."""
    if launcher == "slurm":
        common = {"SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = [sys.executable, script, *flags]
        ids = [{"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
        return [Process(command, log_of(out), **common, **rank, **environ) for rank in ids]
    command = ["bash", "launch/run_ranks.sh", script, *flags]
    about = {"PYTHON": sys.executable, "NPROC": "2", "LAUNCHER": launcher}
    return [Process(command, log_of(out), **about, **environ)]


def two_ranks(launcher: str, flags: list[str], out: Path) -> Path:
    """A finished run of two ranks."""
    with started(launch(launcher, flags, out)) as processes:
        for process in processes:
            assert process.end() == 0, process.text
    return out


def lines(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    with suppress(FileNotFoundError):
        text = (run / "metrics.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return []


def steps(run: Path) -> list[dict[str, Any]]:
    """The lines of optimizer steps."""
    return [line for line in lines(run) if "train/loss" in line]


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in steps(run)]


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def stop_after(step: int, number: signal.Signals, processes: list[Process], run: Path) -> list[int]:
    """Send a signal to the last process once ``step`` is recorded; the exit codes of all."""
    deadline = time.monotonic() + TIMEOUT_S
    while len(steps(run)) < step:
        assert time.monotonic() < deadline and processes[0].process.poll() is None, processes[0].text
        time.sleep(0.005)
    processes[-1].process.send_signal(number)
    return [process.end() for process in processes]


def last(run: Path) -> Path:
    """The checkpoint of the end."""
    return checkpoint.step_dir(run, STEPS)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Adapter and optimizer state at the end."""
    return load_file(last(run) / "adapter/adapter_model.safetensors") | load_file(
        last(run) / checkpoint.OPTIMIZER
    )
