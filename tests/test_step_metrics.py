"""The numbers of a step, each worked out a second time from the plan and the result."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harness import load_script
from transformers import VoxtralConfig

from voxtral_dist import model as modeling
from voxtral_dist import step_metrics
from voxtral_dist.audio import AudioSpec
from voxtral_dist.collator import Collator
from voxtral_dist.data import TrainData, TrainSettings
from voxtral_dist.flops import Peak, VoxtralFlops
from voxtral_dist.packing import pack
from voxtral_dist.step_metrics import StepMetrics
from voxtral_dist.step_sums import StepResult
from voxtral_dist.task_data import open_tasks
from voxtral_dist.tokenizer import TekkenVocabulary

TASKS = ("asr", "sqa", "tqa")
Log = pytest.LogCaptureFixture
Values = dict[str, float | None]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> TrainData:
    """Ten steps of six examples: three epochs of twenty, the spoken questions twice as often."""
    root, demo = tmp_path_factory.mktemp("step_metrics"), load_script("tools/compose_demo.py")
    demo.compose(root, demo.Settings(train_rows=7, dev_rows=1), demo.load_bank(demo.BANK))
    folders = pack([root / f"{task}.train.jsonl" for task in TASKS], root / "shards", split="train")
    collator = Collator(
        TekkenVocabulary.load(str(tiny_model)), AudioSpec.from_config(modeling.read_config(str(tiny_model)))
    )
    settings = TrainSettings(6, 2, 256, max_steps=10, task_weights="1,2,1", seed=3)
    return TrainData(open_tasks([str(folder) for folder in folders], collator), collator, settings)


@pytest.fixture(autouse=True)
def messages(caplog: Log, monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    """A device of 1 GFLOP/s; what the package logs, whatever logging set-up another test left behind."""
    monkeypatch.setattr(step_metrics, "peak", lambda device: Peak(1e9, "a test's device"))
    root = logging.getLogger("voxtral_dist")
    before = (root.handlers, root.propagate, root.level)
    root.handlers, root.propagate = [], True
    caplog.set_level(logging.INFO, "voxtral_dist")
    yield caplog
    root.handlers, root.propagate = before[:2]
    root.setLevel(before[2])


RESULT = StepResult(
    loss=2.0,
    task_nll=[10.0, 12.0, 0.0],
    task_tokens=[5.0, 3.0, 0.0],
    grad_norm=0.5,
    applied=True,
    samples=6,
    tokens=300,
    positions=400,
    audio_seconds=9.0,
    bad_samples=0,
    draw_hash=77,
    stop=False,
    seconds_by_rank=[1.0, 3.0],
    suspects=[],
)


class Run:
    """Steps of one process, on a clock of its own."""

    def __init__(self, data: TrainData, gpus: Any = None, **options: Any) -> None:
        self.now, self.data, self.step = 100.0, data, 0
        self.metrics = StepMetrics(
            data,
            VoxtralConfig(),
            2,
            device=torch.device("cpu"),
            gpus=gpus or SimpleNamespace(read=dict),
            clock=lambda: self.now,
            **options,
        )

    def take(self, seconds: float = 2.0, **changes: Any) -> Values:
        """One step that takes ``seconds``."""
        self.now += seconds
        self.step += 1
        state = SimpleNamespace(
            step=self.step, draws_consumed=self.data.plan.draws_after(self.step), bad_samples=4
        )
        return self.metrics.scalars(replace(RESULT, **changes), state, 1e-4, 0.5)


def test_what_the_result_says(data: TrainData) -> None:
    values = Run(data).take()
    expected = {
        "train/loss": 2.0,
        "train/learning_rate": 1e-4,
        "train/grad_norm": 0.5,
        "train/skipped": 0.0,
        "train/skipped_steps": 0.0,
        "train/bad_samples": 4.0,
        "train/stage": 0.0,
        "train/epoch": 6 / 21,
        "data/draws_consumed": 6.0,
        "data/draw_hash": 77.0,
        "loss/asr": 2.0,
        "loss/sqa": 4.0,
        "loss/tqa": None,
        "target_token_share/asr": 0.625,
        "target_token_share/tqa": 0.0,
        "speed/step_seconds": 2.0,
        "speed/tokens_per_second": 150.0,
        "speed/samples_per_second": 3.0,
        "speed/audio_seconds_per_second": 4.5,
        "speed/padding_share": 0.25,
        "speed/data_wait_share": 0.25,
        "speed/rank_spread": 1.5,
    }
    assert {name: values[name] for name in expected} == pytest.approx(expected)


def test_what_the_plan_says(data: TrainData) -> None:
    """After all steps, compared with the whole plan at once."""
    run = Run(data, lora_parameters=1000)
    steps = [run.take() for _ in range(data.plan.num_steps)]
    whole, last = data.plan.window(0, data.plan.num_steps), steps[-1]
    parts = VoxtralFlops.from_config(VoxtralConfig())
    flops = 0
    for number, task in enumerate(data.tasks):
        ids = whole.examples[whole.tasks == number]
        assert len(ids) == (15, 30, 15)[number]
        assert last[f"mix/{task.name}"] == (0.25, 0.5, 0.25)[number]
        assert last[f"tokens_seen/{task.name}"] == task.positions(ids).sum()
        assert last[f"audio_seconds_seen/{task.name}"] == pytest.approx(task.n_samples(ids).sum() / 16_000)
        assert last[f"target_tokens_seen/{task.name}"] == 10 * RESULT.task_tokens[number]
        lengths = (task.positions(ids), task.chunks(ids), task.target_tokens(ids))
        flops += parts.training(*lengths, lora_parameters=1000)
    assert last["audio_seconds_seen/tqa"] == 0 < last["audio_seconds_seen/asr"]
    assert sum(step["speed/mfu"] or 0 for step in steps) == pytest.approx(flops / (2.0 * 2 * 1e9))


def test_the_mix_follows_the_draws(data: TrainData) -> None:
    run = Run(data)
    first = run.take()
    tasks = data.plan.step(0).tasks
    assert [first[f"mix/{name}"] for name in TASKS] == (np.bincount(tasks, minlength=3) / 6).tolist()


def test_clipped_and_skipped_steps(data: TrainData) -> None:
    run = Run(data, max_grad_norm=1.0)
    norms = [(2.0, True), (0.5, True), (float("nan"), False), (1.5, True)]
    values = [run.take(grad_norm=norm, applied=applied) for norm, applied in norms]
    assert [v["train/clip_share"] for v in values] == [1.0, 0.5, pytest.approx(1 / 3), 0.5]
    assert [v["train/skipped_steps"] for v in values] == [0, 0, 1, 1]
    assert [v["train/skipped"] for v in values] == [0, 0, 1, 0]
    assert Run(data).take(grad_norm=5.0)["train/clip_share"] is None, (
        "nothing is clipped at --max_grad_norm 0"
    )


def test_sums_go_on_after_a_restart(data: TrainData) -> None:
    """The totals of the checkpoint are all that is needed."""
    whole, totals = Run(data, max_grad_norm=1.0), dict[str, float]()
    expected = [whole.take(grad_norm=2.0 * (n % 2)) for n in range(6)][-1]
    first = Run(data, max_grad_norm=1.0, totals=totals)
    for n in range(3):
        first.take(grad_norm=2.0 * (n % 2))
    second = Run(data, max_grad_norm=1.0, totals=json.loads(json.dumps(totals)))
    second.step = 3
    values = [second.take(grad_norm=2.0 * (n % 2)) for n in range(3, 6)][-1]
    sums = [name for name in expected if "_seen/" in name or name in ("train/clip_share", "mix/asr")]
    assert len(sums) == 11 and {n: values[n] for n in sums} == {n: expected[n] for n in sums}


def test_expected_times(data: TrainData) -> None:
    """Six examples in two seconds: 21 in an epoch, 48 left after the second step."""
    run = Run(data)
    run.take()
    values = run.take()
    assert values["speed/epoch_hours"] == pytest.approx(7 / 3600)
    assert values["speed/eta_hours"] == pytest.approx(16 / 3600)
    slower = run.take(seconds=6.0)
    assert slower["speed/eta_hours"] == pytest.approx(42 / 18 * 10 / 3600), "the mean over the last steps"
    values = [run.take() for _ in range(7)][-1]
    assert values["speed/eta_hours"] == 0


def test_the_time_of_an_evaluation_is_no_training_time(data: TrainData) -> None:
    run = Run(data)
    run.take()
    run.now += 1000
    run.metrics.restart_clock()
    assert run.take()["speed/step_seconds"] == 2.0


def test_a_clock_that_goes_back_measures_nothing(data: TrainData) -> None:
    run = Run(data)
    values = run.take(seconds=-50.0)
    speeds = {name: value for name, value in values.items() if "per_second" in name or "mfu" in name}
    assert len(speeds) == 4 and set(speeds.values()) == {None} and "speed/eta_hours" not in values
    assert values["speed/step_seconds"] == 0 and run.take()["speed/step_seconds"] == 2.0


def test_ranks_that_were_not_measured(data: TrainData) -> None:
    assert Run(data).take(seconds_by_rank=[])["speed/rank_spread"] is None


def test_energy_per_hour_of_audio(data: TrainData) -> None:
    """Two ranks share the work, so the energy of one GPU bought half of the audio."""
    readings = iter([{}, {"gpu0/energy_wh": 3.0, "gpu0/power_w": 5.0}, {"gpu0/energy_wh": 6.0}])
    run = Run(data, gpus=SimpleNamespace(read=lambda: next(readings)))
    first, second = run.take(audio_seconds=1800.0), run.take(audio_seconds=0.0)
    assert (first["gpu0/wh_per_audio_hour"], second["gpu0/wh_per_audio_hour"]) == (12.0, 24.0)
    assert first["gpu0/power_w"] == 5.0 and "gpu0/power_w" not in second


def test_no_audio_no_energy_per_hour_of_it(data: TrainData) -> None:
    run = Run(data, gpus=SimpleNamespace(read=lambda: {"gpu0/energy_wh": 3.0}))
    assert run.take(audio_seconds=0.0)["gpu0/wh_per_audio_hour"] is None


def test_other_ranks_measure_nothing(data: TrainData, messages: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_metrics, "peak", None)
    run = Run(data, gpus=SimpleNamespace(), rank=1, totals={})
    assert run.take() == {} and not messages.text


def test_the_peak_is_said_once(data: TrainData, messages: Log) -> None:
    run = Run(data)
    run.take()
    assert messages.text.count("MFU is a share of 0.001 TFLOP/s per rank: a test's device") == 1
