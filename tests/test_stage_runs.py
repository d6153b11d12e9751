"""Runs of a curriculum: who sleeps, what rate and first updates do; early stopping; the spike guard."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
import torch
from demo_runs import (
    TASKS,
    Demo,
    Process,
    alone,
    lines,
    log_of,
    losses,
    read,
    started,
    steps,
    stop_after,
    two_ranks,
)
from harness import ROOT
from safetensors.torch import load_file

from voxtral_dist import checkpoint

CURRICULUM = "text:0.25:tqa=1; listen:0.25:asr=2,tqa=1; all:0.5:1.0,1.5,1.2"
STAGED = (
    *("--max_steps", "16", "--stages", CURRICULUM, "--rewarmup_steps", "2", "--save_steps", "1"),
    *("--save_total_limit", "99", "--eval_steps", "0", "--val_loss_steps", "4"),
    *("--task_batch_sizes", "asr=2"),
)


@pytest.fixture(scope="module")
def staged(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of three stages and what it printed."""
    run = tmp_path_factory.mktemp("staged") / "run"
    return run, alone(demo.flags(run, *STAGED), run).text


def test_stages_are_kept_shown_and_recorded(staged: tuple[Path, str]) -> None:
    run, text = staged
    assert "step 5: stage 2 of 3, listen (asr 2, sqa 0, tqa 1)" in text
    found = steps(run)
    assert [line["train/stage"] for line in found] == [0] * 4 + [1] * 4 + [2] * 8
    shares = [{task for task in TASKS if line[f"target_token_share/{task}"] > 0} for line in found]
    assert shares == [{"tqa"}] * 4 + [{"asr", "tqa"}] * 4 + [set(TASKS)] * 8
    stages = [read(path / "trainer_state.json")["stage"] for path in checkpoint.published(run)]
    assert stages == ["text"] * 4 + ["listen"] * 4 + ["all"] * 8


def test_first_updates_after_an_edge_stay_below_the_learning_rate(staged: tuple[Path, str]) -> None:
    """The projector slept through the first stage; its second moment is near zero when it wakes."""
    run, _ = staged
    rates = {line["step"]: line["train/learning_rate"] for line in steps(run)}
    assert rates[5] < rates[4] / 2 and rates[6] > rates[5], "no re-warm-up"
    moved = {}
    for step in range(2, 17):
        before, after = (
            load_file(checkpoint.step_dir(run, s) / "adapter/adapter_model.safetensors")
            for s in (step - 1, step)
        )
        moved[step] = max(float((after[name] - before[name]).abs().max()) / rates[step] for name in after)
    asleep = [name for name in before if "projector" in name]
    assert asleep and max(moved[step] for step in (5, 6, 7, 9, 10, 11)) < 1.2


def test_validation_loss_between_evaluations(staged: tuple[Path, str]) -> None:
    measured = {line["step"]: line for line in lines(staged[0]) if "val_loss/asr" in line}
    assert sorted(measured) == [4, 8, 12], "at the end there is a whole evaluation"
    assert measured[12]["val_loss/tqa"] < measured[4]["val_loss/tqa"]


@pytest.mark.slow
def test_two_ranks_do_the_same(demo: Demo, staged: tuple[Path, str], tmp_path: Path) -> None:
    """Stages, packed rows and caps per task on two ranks and on one: the same losses, norms and validation losses."""
    run = two_ranks("slurm", demo.flags(tmp_path / "run", *STAGED), tmp_path / "run")
    assert losses(run) == pytest.approx(losses(staged[0]), abs=1e-5)
    norms = [[line["train/grad_norm"] for line in steps(r)] for r in (run, staged[0])]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    values = [[line["val_loss/sqa"] for line in lines(r) if "val_loss/sqa" in line] for r in (run, staged[0])]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


@pytest.mark.slow
def test_a_staged_run_goes_on_to_the_same_bits(demo: Demo, staged: tuple[Path, str], tmp_path: Path) -> None:
    run, expected = tmp_path / "run", staged[0]
    flags = demo.flags(run, *STAGED)
    with started([Process([sys.executable, "launch/train.py", *flags], log_of(run))]) as processes:
        assert stop_after(6, signal.SIGTERM, processes, run) == [75], processes[0].text
    assert "stage 2 of 3" in alone(flags, run).text
    assert losses(run) == losses(expected)
    ends = [
        load_file(checkpoint.step_dir(r, 16) / "adapter/adapter_model.safetensors") for r in (run, expected)
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])


@pytest.mark.slow
def test_early_stopping_counts_in_the_last_stage_only(demo: Demo, tmp_path: Path) -> None:
    """A gain of 9 is impossible, so the second evaluation of the last stage, steps 4 to 8, is the end."""
    run = tmp_path / "run"
    more = ("--stages", "text:0.5:tqa=1; all:0.5:1,1,1", "--eval_steps", "1")
    patience = ("--early_stopping_patience", "1", "--early_stopping_min_delta", "9")
    flags = demo.flags(run, *more, *patience, "--rewarmup_steps", "1")
    text = alone(flags, run).text
    assert "stopping early: no gain of macro in the last 1 evaluations" in text
    assert [line["step"] for line in steps(run)] == [1, 2, 3, 4, 5]
    assert checkpoint.pointer(run, "best") is not None and read(run / "exit_status.json")["exit_code"] == 0
    before = (run / "metrics.jsonl").read_bytes()
    assert "stopping early" in alone(flags, run).text and (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_best_follows_the_named_score(demo: Demo, tmp_path: Path) -> None:
    run = tmp_path / "run"
    alone(demo.flags(run, "--best_metric", "asr.cer", "--eval_steps", "2"), run)
    cer = {s: read(run / f"eval/step-{s:08d}/metrics.json")["tasks"]["asr"]["cer"] for s in (2, 4, 6, 8)}
    best = checkpoint.pointer(run, "best")
    kept = {checkpoint.step_of(path) for path in checkpoint.published(run)}
    assert best and cer[checkpoint.step_of(best)] == min(cer[step] for step in kept)
    error = alone(demo.flags(run, "--best_metric", "asr.bleu"), run, code=2).text
    assert "--best_metric asr.bleu: no such score" in error and "asr.cer" in error


def test_the_spike_guard_goes_back_and_past(demo: Demo, tmp_path: Path) -> None:
    """Step 14 of 18 spikes: back to the checkpoint of step 12, past steps 13 and 14, and never again in the end."""
    run = tmp_path / "run"
    often = ("--save_steps", "3", "--save_total_limit", "99", "--eval_steps", "0")
    flags = demo.flags(run, "--spike_factor", "3", "--max_steps", "18", *often)
    process = Process([sys.executable, "tests/faulty_train.py", *flags], log_of(run), FAULTS="spike@0:14")
    with started([process]):
        assert process.end() == 0, process.text
    assert "is a spike; going back to step-00000012 and past the steps since then" in process.text
    state = read(checkpoint.step_dir(run, 18) / "trainer_state.json")
    assert (state["left_out"], state["step"], state["adam_step"]) == ([[12, 14]], 18, 16)
    spike = next(line["train/loss"] for line in steps(run) if line["step"] == 14)
    assert spike > 2 * max(state["recent_losses"][3:]), "later losses were compared with the spike"
    assert state["samples_seen"] == 16 * 12 and state["draws_consumed"] == 18 * 12
    at_12, at_14 = (checkpoint.step_dir(run, step) for step in (12, 14))
    weights = [load_file(path / "adapter/adapter_model.safetensors") for path in (at_12, at_14)]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    assert "each computed exactly once" in audit(run)


def audit(run: Path) -> str:
    """What the audit of a run prints."""
    process = Process([sys.executable, str(ROOT / "tools/plan_batches.py"), "--audit", str(run)], log_of(run))
    with started([process]):
        assert process.end() == 0, process.text
    return process.text
