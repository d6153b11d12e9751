"""Real runs whose plan changes, packed rows in a real run, the audit of a run's log, and the planning tool."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from demo_runs import Demo, alone, environment, losses
from harness import ROOT

from voxtral_dist import checkpoint, command_line, distributed, prepare, training_run
from voxtral_dist import config as settings
from voxtral_dist.config import TrainConfig
from voxtral_dist.distributed import World
from voxtral_dist.shards import ShardSet
from voxtral_dist.task_data import open_tasks


def plan_batches(*flags: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "tools/plan_batches.py", *flags],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps on one rank, with checkpoints after four and eight."""
    out = tmp_path_factory.mktemp("run") / "padded"
    alone(demo.flags(out), out)
    return out


def halfway(run: Path, out: Path) -> Path:
    """A copy of the run as if it had been killed after its fifth step."""
    shutil.copytree(run, out)
    for path in ("checkpoints/step-00000008", "eval/step-00000008"):
        shutil.rmtree(out / path)
    return out


def test_audit_of_a_whole_run(run: Path) -> None:
    assert "audit: 96 draws in 8 steps, each computed exactly once" in plan_batches("--audit", str(run))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lines: [line for line in lines if line.get("step") != 3], "missing or repeated from step"),
        (lambda lines: lines[:5] + lines[4:], "missing or repeated from step"),
        (lambda lines: [line | {"data/draw_hash": line["data/draw_hash"] + 1} if line["step"] == 6 else line
                        for line in lines], "step 6 computed other examples"),
    ],
)  # fmt: skip
def test_audit_notices(run: Path, tmp_path: Path, change: object, words: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [line for line in lines if "data/draw_hash" in line]
    assert callable(change)
    path.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))
    assert words in plan_batches("--audit", str(tmp_path / "run"), code=2)


@pytest.mark.slow
def test_padded_rows_train_the_same(run: Path, demo: Demo, tmp_path: Path) -> None:
    alone(demo.flags(tmp_path / "padded", "--no_packed"), tmp_path / "padded")
    assert losses(tmp_path / "padded") == pytest.approx(losses(run), rel=1e-4)
    assert losses(tmp_path / "padded")[0] == pytest.approx(losses(run)[0], rel=1e-6)


def test_changed_weights_need_permission_and_lose_nothing(run: Path, demo: Demo, tmp_path: Path) -> None:
    out = halfway(run, tmp_path / "weights")
    flags = demo.flags(out, "--task_weights", "1,2,5")
    process = alone(flags, out, code=2)
    assert (
        "weights (1, 1, 1), now it is (1, 2, 5)" in process.text and "--allow_change weights" in process.text
    )
    alone([*flags, "--allow_change", "weights"], out)
    assert "audit: 96 draws in 8 steps" in plan_batches("--audit", str(out))
    segments = checkpoint.read_state(out / "checkpoints" / "step-00000008")["plan"]["segments"]
    assert [(s["start_step"], s["weights"]) for s in segments] == [(0, [1, 1, 1]), (4, [1, 2, 5])]
    assert losses(out)[:4] == losses(run)[:4] and losses(out)[4:] != losses(run)[4:]


def test_plan_of_many_ranks(demo: Demo) -> None:
    text = plan_batches(
        *demo.data("shards"), "--world_size", "8", "--per_device_bsz", "2", "--max_len", "128"
    )
    assert "12 steps of 16 examples on 8 rank(s), 180 draws" in text
    assert "balance of the ranks" in text and "read per rank" in text and "of target tokens" in text


def test_damaged_samples_are_masked_named_and_counted(run: Path, demo: Demo, tmp_path: Path) -> None:
    """Three damaged recordings: the run goes on, their labels weigh nothing, and the words beside them still count."""
    shutil.copytree(demo.folder / "shards", tmp_path / "shards")
    folder = tmp_path / "shards" / "asr" / "train"
    tar = next(folder.glob("*.tar"))
    data = bytearray(tar.read_bytes())
    for at in ShardSet.open(folder).column("audio_offset")[:3].tolist():
        data[at + 100] ^= 1
    tar.write_bytes(data)
    shards = ",".join(str(tmp_path / "shards" / task / "train") for task in ("asr", "sqa", "tqa"))
    flags = [
        flag for flag in demo.flags(tmp_path / "out") if flag not in ("--val_shards", demo.data("shards")[-1])
    ]
    process = alone([*flags, "--train_shards", shards], tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    masked = [line["train/bad_samples"] for line in lines if "train/loss" in line]
    assert masked[-1] == process.text.count("masked example asr/train ") > 0
    assert losses(tmp_path / "out") != losses(run) and all(0 < loss < 20 for loss in losses(tmp_path / "out"))
    assert "audit: 96 draws in 8 steps" in plan_batches("--audit", str(tmp_path / "out"))


@pytest.mark.parametrize(("device", "overhead"), [("cpu", 100), ("cuda", 4000)])
def test_a_micro_batch_costs_what_its_device_takes_to_start_one(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, overhead: int
) -> None:
    monkeypatch.setattr(distributed, "local_device", lambda world: torch.device(device))
    config = command_line.parse(TrainConfig, demo.flags(tmp_path / "run"), "train.py")
    collator = prepare.open_collator(config)
    tasks = open_tasks(settings.split_list(config.train_shards), collator)
    data = training_run.plan_data(config, World(0, 0, 1), tasks, collator, None)
    assert data.caps.overhead == overhead
