"""One output directory belongs to one running job, for as long as a process of it lives."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from demo_runs import environment
from harness import ROOT

from voxtral_dist import run_dir

JOB = """
import sys, time
from pathlib import Path
from voxtral_dist import run_dir
with run_dir.exit_status(sys.argv[1], active=True):
    print("ready", flush=True)
    time.sleep(float(sys.argv[2]))
    Path(sys.argv[1], "metrics.jsonl").write_text("")
"""


def job(out: Path, seconds: float) -> subprocess.Popen[str]:
    """A real process that keeps a run directory."""
    command = [sys.executable, "-c", JOB, str(out), str(seconds)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, stdout=pipe, stderr=pipe)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A job that keeps tmp_path for a minute; ended with the test."""
    process = job(tmp_path, 60)
    assert process.stdout and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def train(out: Path) -> subprocess.CompletedProcess[str]:
    """A start of launch/train.py, which gets no further than to its data."""
    flags = ["--model_id", str(out / "none"), "--train_shards", str(out / "none"), "--output_dir", str(out)]
    command = [sys.executable, "launch/train.py", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment(), text=True, capture_output=True, check=False)


def test_the_second_job_is_refused_and_the_first_unharmed(
    running: subprocess.Popen[str], tmp_path: Path
) -> None:
    second = train(tmp_path)
    assert second.returncode == 2
    assert second.stderr == (
        f"error: --output_dir {tmp_path}: another process is writing into it; wait for its end or give another "
        "directory\n"
    )
    assert running.poll() is None and list(tmp_path.iterdir()) == [], "the second job wrote something"


def test_the_kernel_frees_the_directory_of_a_killed_job(
    running: subprocess.Popen[str], tmp_path: Path
) -> None:
    running.send_signal(signal.SIGKILL)
    running.wait()
    freed = train(tmp_path)
    assert (
        freed.returncode == 2
        and "another process" not in freed.stderr
        and str(tmp_path / "none") in freed.stderr
    )


@pytest.mark.parametrize("number", run_dir.STOP_SIGNALS)
def test_a_signal_ends_any_block_with_75_once(
    running: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
) -> None:
    """Launchers send SIGTERM again while the first one is still being answered."""
    running.send_signal(number)
    for _ in range(20):
        time.sleep(0.005)
        running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=30)
    assert '"exit_code": 75' in (tmp_path / "exit_status.json").read_text()
    assert running.returncode == 1 and err.count("Traceback") == 1 and "Preempted: stopped by a signal" in err


def test_a_directory_that_is_gone_is_told(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    assert run_dir.moved_away(out) == "", "nobody keeps it"
    run_dir.claim(out)
    try:
        assert run_dir.moved_away(out) == ""
        out.rename(tmp_path / "away")
        assert f"--output_dir {out} was moved or deleted" in run_dir.moved_away(out)
        out.mkdir()
        assert "was moved or deleted" in run_dir.moved_away(out), "another directory of the same name"
        out.rmdir()
        (tmp_path / "away").rename(out)
        assert run_dir.moved_away(out) == ""
    finally:
        run_dir._claims.pop(out.resolve())
