"""Runs that begin from a checkpoint the user names, or end while one is being saved. All in one process of one rank."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from demo_runs import Process, log_of, started
from harness import load_script, run_ranks
from test_checkpoint import damage, full_disk
from test_checkpoint_faults import written

from voxtral_dist import checkpoint, distributed, resume
from voxtral_dist.errors import UserError, VoxtralDistError

STEPS = 6
Seen = dict[str, Any]


def write_words(path: Path, count: int) -> None:
    rows = ({"id": f"w{n}", "question": f"Say {n}.", "answer": f"{n}"} for n in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Runs:
    """Starts of launch/train.py in this process, on the same data and settings."""

    def __init__(self, folder: Path, model_dir: str) -> None:
        self.folder = folder
        self.script = load_script("launch/train.py")
        self.flags = ["--model_id", model_dir, "--train_jsonl", str(folder / "words.jsonl"), "--tasks", "tqa"]
        self.flags += ["--max_steps", str(STEPS), "--save_steps", "2", "--save_total_limit", "9"]
        self.flags += ["--per_device_bsz", "2", "--max_len", "64", "--lora_dropout", "0"]

    def __call__(self, name: str, *more: str) -> dict[str, Any]:
        """Exit code, last words and new output of a start with ``--output_dir FOLDER/NAME``."""
        sys.argv = ["train.py", *self.flags, "--output_dir", str(self.folder / name), *more]
        out, code, message = io.StringIO(), 0, ""
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                self.script.run(self.script.distributed.read_world())
        except VoxtralDistError as error:
            code, message = int(error.exit_code), str(error)
        return {
            "code": code,
            "message": message,
            "out": out.getvalue(),
            "checkpoints": steps(self.folder / name),
        }


def steps(run: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.published(run)]


def twice_during_the_save(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """SIGTERM comes when step 2 is saved, and once more while the checkpoint it asked for is written."""
    publish, calls = checkpoint.publish, []

    def publish_under_fire(run: Path, taken: checkpoint.Snapshot) -> None:
        calls.append(taken.state["step"])
        if len(calls) <= 2:
            os.kill(os.getpid(), signal.SIGTERM)
        publish(run, taken)

    checkpoint.publish = publish_under_fire
    try:
        return action() | {"saves": calls}
    finally:
        checkpoint.publish = publish


def go(rank: int, model_dir: str, base: str) -> Seen:
    """Every start, in an order in which each finds what the ones before it left."""
    distributed.stop = lambda: None  # DeepSpeed keeps its groups, so all starts share one
    folder, seen = Path(base), {}
    write_words(folder / "words.jsonl", 24)
    write_words(folder / "other.jsonl", 20)
    train = Runs(folder, model_dir)
    seen["whole"] = train("whole")
    shutil.copytree(folder / "whole", folder / "back")
    for step, macro in ((2, 0.5), (6, 0.9)):
        (folder / f"back/eval/step-{step:08d}").mkdir(parents=True)
        (folder / f"back/eval/step-{step:08d}/metrics.json").write_text(json.dumps({"macro": macro}))
    (folder / "back" / "best").write_text("step-00000006\n")
    own = ("--resume", str(folder / "back/checkpoints/step-00000002"))
    seen["back"] = train("back", *own)
    seen["back again"] = train("back", *own)
    branch = ("--resume", str(folder / "whole/checkpoints/step-00000004"))
    seen["branch"] = train("branch", *branch)
    seen["branch again"] = train("branch", *branch)
    seen["not into a run"] = train("back", *branch)
    seen["over"] = train("over", "--resume", str(folder / "whole/checkpoints/step-00000006"))
    seen["other data"] = train("other", *branch, "--train_jsonl", str(folder / "other.jsonl"))
    seen["other rate"] = train("other", *branch, "--learning_rate", "0.5")
    seen["pruned"] = train("back", "--resume", str(folder / "back/checkpoints/step-00000003"))
    shutil.copytree(folder / "whole", folder / "damaged")
    damage(folder / "damaged/checkpoints/step-00000004/optimizer.safetensors", "flipped")
    seen["damaged"] = train("damaged", "--resume", str(folder / "damaged/checkpoints/step-00000004"))
    for path in checkpoint.published(folder / "damaged"):
        damage(path / "trainer_state.json", "truncated")
    seen["all damaged"] = train("damaged")
    seen["signals"] = twice_during_the_save(lambda: train("signals"))
    seen["after signals"] = train("signals")
    with full_disk(100_000):
        seen["full"] = train("full", "--save_steps", "1", "--max_failed_saves", "2")
        seen["full at the end"] = train("end", "--save_steps", "0")
        seen["full at a signal"] = twice_during_the_save(lambda: train("signal"))
    seen["space again"] = train("full", "--save_steps", "1", "--max_failed_saves", "2")
    return seen


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    folder = tmp_path_factory.mktemp("resume")
    return folder, run_ranks(go, 1, str(tiny_model), str(folder))[0]


def last_files(run: Path) -> list[bytes]:
    """Adapter and optimizer state at the end."""
    names = ("adapter/adapter_model.safetensors", "optimizer.safetensors")
    return [(checkpoint.step_dir(run, STEPS) / name).read_bytes() for name in names]


def recorded(path: Path) -> list[int]:
    """Steps of the lines of a metrics.jsonl."""
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [line["step"] for line in lines if "train/loss" in line]


def test_going_back_sets_aside_what_came_later(runs: tuple[Path, Seen]) -> None:
    folder, seen = runs
    back, aside = folder / "back", folder / "back" / "superseded-1"
    assert (seen["whole"]["code"], seen["back"]["code"]) == (0, 0), seen["back"]
    assert seen["back"]["checkpoints"] == [2, 4, 6] and last_files(back) == last_files(folder / "whole")
    moved = ["checkpoints/step-00000004", "checkpoints/step-00000006", "eval/step-00000006"]
    assert f"back to step 2: set aside in {aside}: {', '.join(moved)}" in seen["back"]["out"]
    assert all((aside / name).is_dir() for name in moved)
    assert checkpoint.verify(aside / moved[1]) is None, "nothing is lost"
    assert recorded(aside / "metrics.jsonl") == recorded(back / "metrics.jsonl") == list(range(1, STEPS + 1))
    assert stat.S_IMODE((aside / "metrics.jsonl").stat().st_mode) == 0o600
    assert (back / "best").read_text() == "step-00000002\n", "best named a checkpoint that is gone"


def test_the_same_command_goes_on(runs: tuple[Path, Seen]) -> None:
    folder, seen = runs
    for name in ("back", "branch"):
        assert (
            seen[f"{name} again"]["code"] == 0 and "is finished: all 6 steps" in seen[f"{name} again"]["out"]
        )
    assert [path.name for path in (folder / "back").glob("superseded-*")] == ["superseded-1"]


def test_a_run_begins_from_another_run(runs: tuple[Path, Seen]) -> None:
    folder, seen = runs
    assert seen["branch"]["code"] == 0 and seen["branch"]["checkpoints"] == [6]
    assert last_files(folder / "branch") == last_files(folder / "whole")
    assert recorded(folder / "branch" / "metrics.jsonl") == [5, 6]


@pytest.mark.parametrize(
    ("start", "code", "words"),
    [
        ("not into a run", 2, "checkpoint of another run"),
        ("over", 2, "nothing is left to train"),
        ("other data", 2, "not those this run was made with"),
        ("other rate", 2, "learning_rate: 0.0001 -> 0.5"),
        ("pruned", 2, "neither auto, none nor a checkpoint"),
        ("damaged", 76, "step-00000004: the checkpoint is damaged: optimizer.safetensors"),
        ("all damaged", 76, "all 3 checkpoints are damaged"),
    ],
)
def test_refused_starts(runs: tuple[Path, Seen], start: str, code: int, words: str) -> None:
    seen = runs[1][start]
    assert seen["code"] == code and words in seen["message"] and "\n" not in seen["message"]
    assert seen["checkpoints"] in ([], [2, 4, 6]), "a refused start changed something"


def test_a_second_signal_during_the_save(runs: tuple[Path, Seen]) -> None:
    folder, seen = runs
    assert seen["signals"]["code"] == 75 and seen["signals"]["saves"] == [2, 3], "step 3 was not saved once"
    assert seen["signals"]["checkpoints"] == [2, 3]
    assert seen["after signals"]["code"] == 0 and last_files(folder / "signals") == last_files(
        folder / "whole"
    )


@pytest.mark.parametrize(("start", "step"), [("full", 2), ("full at the end", 6), ("full at a signal", 3)])
def test_no_run_ends_well_without_its_checkpoint(runs: tuple[Path, Seen], start: str, step: int) -> None:
    """Neither code 0 nor 75, which would promise that the same command goes on from there."""
    seen = runs[1][start]
    assert seen["code"] == 1 and f"checkpoint of step {step} could not be written" in seen["message"]
    assert "none was written before" in seen["message"] and seen["checkpoints"] == []


def test_a_full_disk_is_told_at_once(runs: tuple[Path, Seen]) -> None:
    lines = [line for line in runs[1]["full"]["out"].splitlines() if "could not be written" in line]
    assert (
        len(lines) == 2 and "WARNING" in lines[0] and "checkpoint of step 1 could not be written" in lines[0]
    )
    assert "failed saves in a row: 1, 2 end the run" in lines[0]
    assert runs[1]["space again"]["code"] == 0 and runs[1]["space again"]["checkpoints"] == [1, 2, 3, 4, 5, 6]
    assert not list((runs[0] / "full" / "checkpoints").glob("*.tmp-*"))


def test_each_going_back_has_its_own_folder(tmp_path: Path) -> None:
    for expected in (1, 2):
        for step in (1, 2):
            checkpoint.step_dir(tmp_path, step).mkdir(parents=True, exist_ok=True)
        assert f"superseded-{expected}: checkpoints/step-00000002" in str(resume.set_aside(tmp_path, 1))
        assert resume.set_aside(tmp_path, 1) is None
    assert steps(tmp_path) == [1] and (tmp_path / "latest").read_text() == "step-00000001\n"


@pytest.mark.parametrize("name", ["step-00000002", "step-2", "best", "../nowhere"])
def test_what_is_no_checkpoint_of_a_run_is_refused(tmp_path: Path, name: str) -> None:
    """Also a copy without the identity of its run."""
    (tmp_path / "copies" / "step-00000002").mkdir(parents=True)
    with pytest.raises(UserError, match=r"--resume .*(neither auto|no identity\.json)"):
        resume.named(str(tmp_path / "copies" / name), tmp_path / "out", "")


@pytest.mark.slow
def test_killed_while_writing_goes_on_to_the_same_bits(runs: tuple[Path, Seen], tiny_model: Path) -> None:
    """Two kills at checkpoints of a run, each as soon as a byte of one is on the disk."""
    folder = runs[0]
    run = folder / "killed"
    command = [
        sys.executable,
        "launch/train.py",
        *Runs(folder, str(tiny_model)).flags,
        "--output_dir",
        str(run),
    ]
    for after in (0, 2):
        with started([Process([*command, "--save_steps", "1"], log_of(run))]) as (process,):
            while len(steps(run)) <= after or not written(run):
                assert process.process.poll() is None, process.text
            process.process.kill()
            process.end()
        assert steps(run)
    with started([Process([*command, "--save_steps", "1"], log_of(run))]) as (process,):
        assert process.end() == 0, process.text
    assert last_files(run) == last_files(folder / "whole")
    assert not list((run / "checkpoints").glob("*.tmp-*"))
