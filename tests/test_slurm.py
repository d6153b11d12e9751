"""Whole runs under a real slurm: two nodes on this machine, which tests/slurm_setup.sh starts; about 5 minutes.

Skipped where slurm can neither be found nor installed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from demo_runs import TASKS, Demo, environment, read, steps
from harness import ROOT
from safetensors.torch import load_file

from voxtral_dist import checkpoint

pytestmark = pytest.mark.slow
SETUP = str(ROOT / "tests/slurm_setup.sh")
STEPS, TIMEOUT_S = 40, 240
SIZE = ("--nodes", "2", "--cpu_ranks_per_node", "1", "--cpus_per_task", "1", "--time", "00:20:00")


class Slurm:
    """The cluster: submissions, and what became of their jobs."""

    def __init__(self, folder: Path) -> None:
        self._environ = environment(SLURM_CONF=str(folder / "slurm.conf"), VOXTRAL_DIST_PYTHON=sys.executable)

    def call(self, *command: str, **environ: str) -> str:
        """Output of a command that must succeed."""
        done = subprocess.run(
            command, cwd=ROOT, env=self._environ | environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, config: Path, *flags: str) -> dict[str, str]:
        """``launch/submit.py``: the ids of the jobs by name."""
        shown = self.call(sys.executable, "launch/submit.py", "--config", str(config), *SIZE, *flags)
        return dict(re.findall(r"^(\w+): job (\d+)", shown, re.M))

    def ends(self, job: str) -> tuple[str, str]:
        """State and exit code of a job once it is over; of an array all states there are."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.call("squeue", "--noheader", "--states=all", "--format=%t", "--jobs", job).split():
            shown = self.call("scontrol", "show", "job", job)
            states = set(re.findall(r"JobState=(\w+)", shown))
            if not states & {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"} and not processes(job):
                return "/".join(sorted(states)), re.findall(r"ExitCode=(\S+)", shown)[0]
            assert time.monotonic() < deadline, shown
            time.sleep(0.2)
        raise AssertionError(f"job {job} is forgotten")


def processes(job: str, *more: str) -> list[int]:
    """Processes of a job whose environment holds ``more`` too."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            held = path.read_bytes().decode("utf-8", "replace").split("\0")
        except OSError:
            continue
        if {f"SLURM_JOB_ID={job}", *more} <= set(held):
            found.append(int(path.parent.name))
    return found


def is_rank(pid: int) -> bool:
    return b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """The cluster, in a folder of a short name: sockets have one."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    try:
        done = subprocess.run(
            ["bash", SETUP, "start", str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode == 77:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
        yield Slurm(folder)
    finally:
        subprocess.run(["bash", SETUP, "stop", str(folder)], check=True)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def write(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Writes the settings of a run of 40 steps; its file and its directory."""
    folder = tmp_path_factory.mktemp("some runs") / "with a blank"
    folder.mkdir()

    def write_one(name: str) -> tuple[Path, Path]:
        flags = demo.flags(folder / name, "--max_steps", str(STEPS), "--eval_steps", "0", kind="jsonl")
        values = {flag.removeprefix("--"): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump({k: yaml.safe_load(v) for k, v in values.items()}), "utf-8")
        return config, folder / name

    return write_one


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, write: Callable[[str], tuple[Path, Path]]) -> Path:
    """A run from JSONL to scores by one submission."""
    config, run = write("undisturbed")
    jobs = slurm.submit(config, "--slices", "2", "--", "--comment=it is 'quoted'")
    assert list(jobs) == ["build", "finalize", "train", "evaluate"]
    assert [slurm.ends(job) for job in jobs.values()] == [("COMPLETED", "0:0")] * 4, log(run)
    return run


def log(run: Path) -> str:
    """All logs of a run's jobs."""
    return "\n".join(path.read_text("utf-8", "replace") for path in sorted(run.glob("slurm/*/*.log")))


def begun(run: Path, step: int) -> None:
    """Wait for a step."""
    deadline = time.monotonic() + TIMEOUT_S
    while len(steps(run)) < step:
        assert time.monotonic() < deadline, log(run)
        time.sleep(0.02)


def same_adapter(one: Path, other: Path) -> bool:
    """Whether the runs ended with the same bits."""
    paths = [checkpoint.step_dir(run, STEPS) / "adapter/adapter_model.safetensors" for run in (one, other)]
    first, second = map(load_file, paths)
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_one_submission_builds_trains_and_evaluates(undisturbed: Path, demo: Demo) -> None:
    slices = sorted(undisturbed.glob("slurm/1/build-*.log"))
    assert len(slices) == 2 and all("job" in path.read_text() for path in slices)
    for task in TASKS:
        for split in ("train", "dev"):
            mine, theirs = (folder / "shards" / task / split for folder in (undisturbed, demo.folder))
            for path in theirs.glob(f"{task}-{split}-*"):
                assert (mine / path.name).read_bytes() == path.read_bytes()
            assert (mine / "manifest.json").read_bytes() == (theirs / "manifest.json").read_bytes()
    (text,) = [
        path.read_text() for path in undisturbed.glob("slurm/1/train-*.log") if "rank" not in path.name
    ]
    assert " on n[1-2]\n" in text and "warning: submitted with" not in text
    assert len(list(undisturbed.glob("slurm/1/train-*-rank[01].log"))) == 2
    assert read(undisturbed / "environment.json")["world_size"] == 2 and len(steps(undisturbed)) == STEPS
    scores = read(undisturbed / "evaluations/final/metrics.json")
    assert {task: scores["tasks"][task]["n"] for task in TASKS} == dict.fromkeys(TASKS, 8)
    best = checkpoint.pointer(undisturbed, "best")
    assert best and scores["provenance"]["adapter"] == str(best / "adapter")


def test_a_signal_requeues_the_training_which_ends_with_the_same_bits(
    slurm: Slurm, undisturbed: Path, write: Callable[[str], tuple[Path, Path]]
) -> None:
    config, run = write("signalled")
    job = slurm.submit(config, "--steps", "train")["train"]
    begun(run, 10)
    config.unlink()  # the requeued job has a copy
    slurm.call("scancel", "--signal=USR2", job)
    assert slurm.ends(job) == ("COMPLETED", "0:0"), log(run)
    assert "\nrequeued\n" in log(run) and "(start 2) on n[1-2]" in log(run) and "going on from" in log(run)
    assert same_adapter(run, undisturbed)


def test_a_more_urgent_job_preempts_the_training_which_goes_on(
    slurm: Slurm, undisturbed: Path, write: Callable[[str], tuple[Path, Path]]
) -> None:
    config, run = write("preempted")
    job = slurm.submit(config, "--steps", "train")["train"]
    begun(run, 10)
    urgent = [
        "--parsable",
        "--partition=urgent",
        "--nodes=2",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=true",
    ]
    other = slurm.call("sbatch", *urgent).strip()
    assert slurm.ends(other) == ("COMPLETED", "0:0")
    assert slurm.ends(job) == ("COMPLETED", "0:0"), log(run)
    assert "stopped by a signal after step" in log(run) and "(start 2)" in log(run)
    assert same_adapter(run, undisturbed)


def test_a_cancelled_job_leaves_no_process_and_is_not_requeued(
    slurm: Slurm, write: Callable[[str], tuple[Path, Path]]
) -> None:
    config, run = write("cancelled")
    jobs = slurm.submit(config, "--steps", "train,evaluate")
    begun(run, 5)
    assert len([pid for pid in processes(jobs["train"], "SLURM_PROCID=1") if is_rank(pid)]) == 1
    slurm.call("scancel", jobs["train"])
    assert slurm.ends(jobs["train"])[0] == "CANCELLED" and not processes(jobs["train"])
    assert slurm.ends(jobs["evaluate"])[0] == "CANCELLED", "it can never begin"
    assert "requeued" not in log(run).replace("not requeued", "")
    assert checkpoint.published(run), "the ranks had time for a checkpoint"


def test_a_killed_rank_ends_the_job_and_the_next_submission_goes_on(
    slurm: Slurm, undisturbed: Path, write: Callable[[str], tuple[Path, Path]]
) -> None:
    config, run = write("killed")
    config.write_text(f"{config.read_text()}save_steps: 5\n")
    jobs = slurm.submit(config, "--steps", "train,evaluate")
    begun(run, 10)
    (victim,) = [pid for pid in processes(jobs["train"], "SLURM_PROCID=1") if is_rank(pid)]
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    assert slurm.ends(jobs["train"]) == ("FAILED", "1:0") and not processes(jobs["train"])
    assert time.monotonic() - killed < 60
    assert f"rank 1 ({os.uname().nodename}, pid {victim}) died or lost its connection" in log(run)
    assert "task 1: Killed" in log(run) and slurm.ends(jobs["evaluate"])[0] == "CANCELLED"
    again = slurm.submit(config, "--steps", "train,evaluate")
    assert [slurm.ends(job)[0] for job in again.values()] == ["COMPLETED"] * 2, log(run)
    assert re.search(r"going on from .+/step-000000", log(run)) and same_adapter(run, undisturbed)


def test_a_rank_per_gpu(slurm: Slurm, write: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """Each sees all GPUs of its node. These have no device behind them, so the ranks only tell what they see."""
    config, run = write("gpus")
    python = tmp_path / "python"
    seen = (
        "$SLURM_PROCID/$SLURM_NTASKS $SLURM_LOCALID $CUDA_VISIBLE_DEVICES $MASTER_ADDR $SLURM_CPUS_PER_TASK"
    )
    python.write_text(f'#!/usr/bin/env bash\necho "{seen}"\n')
    python.chmod(0o755)
    command = [
        sys.executable,
        "launch/submit.py",
        "--config",
        str(config),
        "--steps",
        "train",
        "--gpus_per_node",
        "2",
    ]
    shown = slurm.call(*command, "--nodes", "2", "--cpus_per_task", "3", VOXTRAL_DIST_PYTHON=str(python))
    assert slurm.ends(shown.split()[-1]) == ("FAILED", "1:0"), "no exit_status.json is a failure"
    ranks = [path.read_text() for path in sorted(run.glob("slurm/1/train-*-rank*.log"))]
    assert ranks == [f"{rank}/4 {rank % 2} 0,1 n1 3\n" for rank in range(4)]


def test_an_experiment_runs_as_jobs(slurm: Slurm, demo: Demo, tmp_path: Path) -> None:
    flags = demo.flags(tmp_path / "none", "--max_steps", "2", "--eval_steps", "0")
    base = {
        name.removeprefix("--"): yaml.safe_load(value)
        for name, value in zip(flags[::2], flags[1::2], strict=True)
    }
    del base["output_dir"], base["seed"]
    arms = {"all": {}, "text": {"task_weights": "tqa=1", "best_metric": "tqa.rouge_l_f1"}}
    values = {
        "output_dir": str(tmp_path / "out"),
        "base": base,
        "arms": arms,
        "nproc": 1,
        "launcher": "python",
    }
    (tmp_path / "experiment.yaml").write_text(
        yaml.safe_dump(values | {"slurm": {"cpus_per_task": 1}}), "utf-8"
    )
    shown = slurm.call(
        sys.executable, "tools/run_experiment.py", str(tmp_path / "experiment.yaml"), "--slurm"
    )
    jobs = re.findall(r"job (\d+)", shown)
    assert len(jobs) == 4, shown
    logs = {path.name: path.read_text() for path in tmp_path.glob("out/**/*.log")}
    assert [slurm.ends(job) for job in jobs] == [("COMPLETED", "0:0")] * 4, logs
    assert (tmp_path / "out/comparison.html").is_file()
