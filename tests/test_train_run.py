"""Whole training runs in real processes: the same numbers under every launcher, a run directory that holds what it
should, and stops of any kind that change nothing in the end."""

from __future__ import annotations

import hashlib
import shutil
import signal
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from demo_runs import (
    BATCH,
    STEPS,
    TASKS,
    Demo,
    Process,
    alone,
    last,
    launch,
    lines,
    log_of,
    losses,
    read,
    started,
    steps,
    stop_after,
    tensors,
    two_ranks,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from voxtral_dist import checkpoint


@pytest.fixture(scope="module")
def by_deepspeed(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks under the deepspeed launcher."""
    out = tmp_path_factory.mktemp("deepspeed") / "run"
    return two_ranks("deepspeed", demo.flags(out), out)


@pytest.fixture(scope="module")
def by_one(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in one process without a launcher."""
    out = tmp_path_factory.mktemp("alone") / "run"
    alone(demo.flags(out), out)
    return out


def final_state(run: Path) -> dict[str, Any]:
    """The trainer state at the end, without the digits that the order of sums decides and without times."""
    state: dict[str, Any] = read(last(run) / "trainer_state.json")
    state.pop("totals")
    rounded = {name: [round(loss, 3) for loss in state[name]] for name in ("recent_losses",)}
    return state | rounded | {"audio_seconds_seen": round(state["audio_seconds_seen"], 3)}


@pytest.mark.parametrize("launcher", ["slurm", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_every_launcher_gives_the_same_losses(
    demo: Demo, by_deepspeed: Path, tmp_path: Path, launcher: str
) -> None:
    out = two_ranks(launcher, demo.flags(tmp_path / "run"), tmp_path / "run")
    assert len(losses(out)) == STEPS and losses(out) == pytest.approx(losses(by_deepspeed), abs=1e-6)
    assert read(out / "environment.json")["world_size"] == 2


def test_one_process_gives_the_same_losses(by_deepspeed: Path, by_one: Path) -> None:
    assert losses(by_one) == pytest.approx(losses(by_deepspeed), abs=1e-5)
    norms = [[line["train/grad_norm"] for line in steps(run)] for run in (by_one, by_deepspeed)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4), "Adam would hide a wrong scale from the losses"
    assert losses(by_one)[-1] < losses(by_one)[0] - 0.1, "nothing was learned, equal losses would say nothing"
    assert read(by_one / "environment.json")["world_size"] == 1
    assert read(by_one / "identity.json") == read(by_deepspeed / "identity.json")
    assert final_state(by_one) == final_state(by_deepspeed)


def test_run_directory(by_deepspeed: Path, demo: Demo) -> None:
    names = {path.name for path in by_deepspeed.iterdir()}
    files = {
        "config.yaml",
        "identity.json",
        "environment.json",
        "metrics.jsonl",
        "best",
        "latest",
        "exit_status.json",
        "report.html",
    }
    assert names == files | {"tensorboard", "checkpoints", "eval"}
    assert read(by_deepspeed / "exit_status.json") == {"exit_code": 0, "message": "done"}
    config = yaml.safe_load((by_deepspeed / "config.yaml").read_text())
    assert (config["model_id"], config["seed"], config["learning_rate"]) == (str(demo.model), 7, 3e-3)
    assert final_state(by_deepspeed)["plan"]["segments"][0]["global_batch_size"] == BATCH
    assert read(by_deepspeed / "environment.json")["packages"]["torch"] == torch.__version__
    for step in (4, STEPS):
        folder = checkpoint.step_dir(by_deepspeed, step)
        state = read(folder / "trainer_state.json")
        assert checkpoint.verify(folder) is None
        assert {path.name for path in folder.iterdir()} == {
            *("adapter", "optimizer.safetensors", "trainer_state.json", "manifest.json")
        }
        assert (state["step"], state["draws_consumed"], state["samples_seen"]) == (
            step,
            step * BATCH,
            step * BATCH,
        )
        assert state["bad_samples"] == 0 and set(state["task_tokens_seen"]) == set(TASKS)
    assert len(checkpoint.published(by_deepspeed)) == 2
    assert checkpoint.pointer(by_deepspeed, "latest") == last(by_deepspeed)


def test_evaluations_of_a_run(by_deepspeed: Path, by_one: Path) -> None:
    macros = {}
    for step in (0, 4, STEPS):
        folder = by_deepspeed / "eval" / f"step-{step:08d}"
        assert {path.name for path in folder.iterdir()} == {
            "predictions.jsonl",
            "timing.jsonl",
            "metrics.json",
        }
        predictions = (folder / "predictions.jsonl").read_bytes()
        assert len(predictions.splitlines()) == 24
        macros[step] = read(folder / "metrics.json")["macro"]
        assert read(folder / "metrics.json")["provenance"]["step"] == step
        if step == 0:  # later ones decode weights that differ in the last bit
            assert predictions == (by_one / "eval" / folder.name / "predictions.jsonl").read_bytes()
    best = checkpoint.pointer(by_deepspeed, "best")
    assert best and checkpoint.step_of(best) == (4 if macros[4] >= macros[STEPS] else STEPS)


def test_metrics_of_every_step(by_deepspeed: Path) -> None:
    found = steps(by_deepspeed)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for line in found:
        names = ("train/grad_norm", "train/learning_rate", *(f"loss/{task}" for task in TASKS))
        speeds = ("tokens_per_second", "samples_per_second", "audio_seconds_per_second")
        assert all(line[name] > 0 for name in (*names, *(f"speed/{name}" for name in speeds)))
        shares = [line[f"target_token_share/{task}"] for task in TASKS]
        assert sum(shares) == pytest.approx(1.0) and line["train/skipped"] == 0
        weighted = sum(share * line[f"loss/{task}"] for share, task in zip(shares, TASKS, strict=True))
        assert line["train/loss"] == pytest.approx(weighted, rel=1e-5)
    rates = [line["train/learning_rate"] for line in found]
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 2e-4 and 2.9e-3 < rates[0] <= 3e-3
    evaluations = [line for line in lines(by_deepspeed) if "eval/macro" in line]
    assert [line["step"] for line in evaluations] == [0, 4, STEPS] and "eval_asr/cer" in evaluations[0]


def tensorboard(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def test_tensorboard_is_a_copy_of_the_record(by_deepspeed: Path) -> None:
    events = tensorboard(by_deepspeed)
    for name in ("train/loss", "loss/asr", "train/learning_rate", "speed/tokens_per_second"):
        points = [(event.step, event.value) for event in events.Scalars(name)]
        assert points == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in steps(by_deepspeed)]
    assert [event.step for event in events.Scalars("eval/macro")] == [0, 4, STEPS]
    assert "data/draw_hash" in steps(by_deepspeed)[0] and "data/draw_hash" not in events.Tags()["scalars"]
    assert any("previews" in name for name in events.Tags()["tensors"])


def test_files_with_text_are_private(by_deepspeed: Path) -> None:
    private = [by_deepspeed / "metrics.jsonl", *by_deepspeed.glob("eval/*/*")]
    assert len(private) == 10
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in private)
    assert stat.S_IMODE((by_deepspeed / "tensorboard").stat().st_mode) == 0o700


def hashes(run: Path) -> dict[str, str]:
    """Every file but those that record a start."""
    files = (path for path in run.rglob("*") if path.is_file())
    apart = ("exit_status.json", "config.yaml", "environment.json")
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.name not in apart
    }


def test_a_finished_run_says_so_and_stays_as_it_is(demo: Demo, by_deepspeed: Path, tmp_path: Path) -> None:
    """Also on another number of ranks than it was made with."""
    run = Path(shutil.copytree(by_deepspeed, tmp_path / "run"))
    before = hashes(run)
    text = alone(demo.flags(run), run).text
    assert "is finished: all 8 steps" in text and "before" in text and "finished: adapter in" in text
    assert hashes(run) == before
    assert read(run / "exit_status.json")["exit_code"] == 0


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 75),
        pytest.param(signal.SIGUSR2, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    demo: Demo, by_one: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run = tmp_path / "run"
    killed = number == signal.SIGKILL
    flags = demo.flags(run, "--private_text", *(["--save_steps", "2"] if killed else []))
    with started([Process([sys.executable, "launch/train.py", *flags], log_of(run))]) as processes:
        assert stop_after(3 if killed else 2, number, processes, run) == [code], processes[0].text
        assert "hypothesis" not in processes[0].text, "text of a private run on the console"
    newest = checkpoint.newest_whole(run)
    assert newest is not None and checkpoint.verify(newest) is None
    state = read(newest / "trainer_state.json")
    assert 2 <= state["step"] < STEPS and state["draws_consumed"] == state["step"] * BATCH
    if not killed:
        assert read(run / "exit_status.json")["exit_code"] == 75
        assert "the same command goes on" in processes[0].text

    assert f"going on from {newest}" in alone(flags, run).text
    assert final_state(run) == final_state(by_one)
    expected, found = tensors(by_one), tensors(run)
    assert expected.keys() == found.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []
    assert [line["step"] for line in steps(run)] == list(range(1, STEPS + 1)) and losses(run) == losses(
        by_one
    )
    for step in (0, 4, STEPS):
        name = f"eval/step-{step:08d}/predictions.jsonl"
        assert (run / name).read_bytes() == (by_one / name).read_bytes()
    assert read(run / "exit_status.json")["exit_code"] == 0
    assert not any("previews" in name for name in tensorboard(run).Tags()["tensors"])


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_one(demo: Demo, by_one: Path, tmp_path: Path) -> None:
    """The examples per step stay those of the start: 6 per rank on two ranks, then 12 on one."""
    run = tmp_path / "run"
    flags = demo.flags(run, "--global_batch_size", "0", "--per_device_bsz", "6")
    with started(launch("slurm", flags, run)) as processes:
        assert stop_after(2, signal.SIGTERM, processes, run) == [75, 75]
    alone(flags, run)
    assert read(run / "environment.json")["world_size"] == 1
    assert final_state(run) == final_state(by_one)
    expected, found = tensors(by_one), tensors(run)
    adapter = [name for name in expected if "lora_" in name and not name.startswith("exp_avg")]
    assert adapter and max(float(expected[name].abs().max()) for name in adapter) > 1e-2
    for name in adapter:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_two_ranks_pack_jsonl_together(demo: Demo, by_deepspeed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    two_ranks("slurm", demo.flags(run, kind="jsonl"), run)
    assert losses(run) == pytest.approx(losses(by_deepspeed), abs=1e-6)
    for task in TASKS:
        for split in ("train", "dev"):
            packed, expected = (
                base / "shards" / task / split / "manifest.json" for base in (run, demo.folder)
            )
            assert packed.read_bytes() == expected.read_bytes()


@pytest.mark.slow
def test_evaluate_repeats_the_last_evaluation(demo: Demo, by_one: Path, tmp_path: Path) -> None:
    flags = [
        "--model_id",
        str(demo.model),
        "--lora_dir",
        str(last(by_one)),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    flags += [*demo.data("shards")[4:], "--max_len", "128", "--gen_max_new_tokens", "4"]
    alone(flags, tmp_path / "out", script="evaluate")
    expected = by_one / "eval" / f"step-{STEPS:08d}" / "predictions.jsonl"
    assert (tmp_path / "out" / "predictions.jsonl").read_bytes() == expected.read_bytes()


def test_dry_run_shows_prompts_and_writes_nothing(demo: Demo, tmp_path: Path) -> None:
    run = tmp_path / "run"
    text = alone(demo.flags(run, "--dry_run"), run).text
    assert "8 steps of 12 examples on 1 rank(s), 96 draws" in text
    assert "memory per rank, estimated" in text and "time, estimated" in text
    shown = text[text.index("time, estimated") :].splitlines()[1:]
    blocks = [shown[place : place + 4] for place in range(0, 40, 4)]
    for head, prompt, target, mask in blocks:
        task, labels = head.split()[0], int(head.split()[-2])
        assert task in TASKS and prompt.strip().startswith("prompt <s>[INST]") and target.endswith("</s>")
        assert ("[BEGIN_AUDIO][AUDIO]*25" in prompt) == (task != "tqa")
        assert mask.strip().removeprefix("mask").strip("· ") == "#" * labels and labels > 1
    assert {block[0].split()[0] for block in blocks} == set(TASKS)
    assert not run.exists()
