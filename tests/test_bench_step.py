"""The benchmarks of the training step, of transcription and of scaling run on a tiny shape; no speed is asserted.

What is asserted: every lever of the step leaves the gradient as it was, but the one that is there to change it.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harness import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A benchmark whose shape is that of the demo's model; the folder of a script is on the path when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tiny = importlib.import_module("build_tiny_voxtral").model_config(100, 96, 2, 2048)

    def import_tiny(name: str) -> ModuleType:
        module = importlib.import_module(name)
        if hasattr(module, "shape"):
            monkeypatch.setattr(module, "shape", lambda device: tiny)
        return module

    return import_tiny


@pytest.fixture
def found(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> dict[str, Any]:
    """What the benchmark of the step writes."""
    bench = load("bench_train_step")
    monkeypatch.setitem(bench.EXAMPLES, "cpu", 10)
    monkeypatch.setitem(bench.ROWS, "cpu", 4)
    monkeypatch.setitem(bench.TOKENS, "cpu", (160, 100))
    monkeypatch.setattr("sys.argv", ["bench", "--rounds", "1", "--results", str(tmp_path / "found.json")])
    bench.main()
    value: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    return value


def test_every_lever_keeps_the_gradient(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    arms = {row["arm"]: row for row in found["arms"]}
    errors = {name: row["gradient_error"] for name, row in arms.items()}
    assert errors.pop("usual") is None and errors.pop("summed loss") > 1e-3
    assert len(errors) == 13 and max(errors.values()) < 1e-5, errors
    assert arms["usual"]["speed"] == 1.0 and all(row["mfu"] > 0 for row in arms.values())
    fastest = max(row["tokens_per_s"] for row in found["arms"])
    assert all(seconds < found["tokens"] / fastest for seconds in found["floor_seconds"].values())
    memory = found["memory"]
    assert [row["rows"] for row in memory] == [8, 16, 32]
    shares = [row["weights_share"] for row in memory]
    assert 1 > shares[0] > shares[1] >= shares[2] > 0, "ten examples fill no batch of 16"
    last = memory[-1]
    step = arms["packed, an example at a time"]["step_gib"]
    usual_step = last["usual_gib"] * (1 - last["weights_share"])
    assert last["ours_over_usual_step"] == pytest.approx(step / usual_step, rel=0.02)
    assert arms["packed, mask"]["padding"] == 0 < arms["by length"]["padding"] < arms["usual"]["padding"]


def test_nothing_begins_after_the_time_is_up(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = load("bench_train_step")
    monkeypatch.setitem(bench.EXAMPLES, "cpu", 3)
    chosen = {name: levers for name, levers in bench.ladder(CPU).items() if name in {"usual", "fused AdamW"}}
    clock = iter([0.0, 1.0, 200.0, 200.0, 200.0])
    monkeypatch.setattr(bench, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    found = bench.bench(CPU, chosen, 1, 1, minutes=3)
    assert [row["arm"] for row in found["arms"]] == ["usual"] and "memory" not in found
    assert "out of time before fused AdamW" in capsys.readouterr().out


def test_the_usual_recipe_sends_gradients_through_the_encoder(load: Callable[[str], ModuleType]) -> None:
    bench = load("bench_train_step")
    model = bench.random_model(bench.shape(CPU), CPU)
    arms = bench.Arms(model, bench.draw_lengths(4, 1, 25, 2.0), 4)
    states = []
    arms.voxtral.model.audio_tower.register_forward_hook(
        lambda _, __, out: states.append(out[0].requires_grad)
    )
    for levers in (bench.Levers(), bench.Levers(encoder_graph=False), bench.Levers()):
        arms.accumulate(arms.prepare(levers))
    assert states == [True, False, True]


def test_lengths_are_those_of_the_text(load: Callable[[str], ModuleType]) -> None:
    data = load("train_step_data")
    drawn = data.draw_lengths(4000, 0, 375, 30.0)
    share = np.bincount([e.task for e in drawn]) / len(drawn)
    assert np.allclose(share, np.array(data.WEIGHTS) / sum(data.WEIGHTS), atol=0.03)
    assert 5.5 < np.median([e.seconds for e in drawn if e.task == 0]) < 6.5
    assert {e.chunks for e in drawn} == {0, 1, 2, 3}
    batch = data.collate(drawn, [0, 3, 5], load("bench_train_step").shape(CPU), packed=True)
    assert batch.samples == 3 and batch.positions == batch.tokens == sum(
        drawn[i].positions for i in (0, 3, 5)
    )
    assert len(batch.labels) == sum(drawn[i].target for i in (0, 3, 5))


def test_transcription(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load("bench_rtfx")
    monkeypatch.setattr(bench, "ROWS", 4)
    monkeypatch.setattr(bench, "TIMES", (1, 2))
    found = bench.bench(CPU, 6, 1)
    for filled in ("7 of 30 s", "30 of 30 s"):
        assert list(found[filled]) == ["generate, 4 rows", "ours, 4 rows", "ours, 8 rows"]
    monkeypatch.setattr(bench, "ours", lambda voxtral, clips, device, rows: [[1]] * len(clips))
    with pytest.raises(AssertionError, match="ours, 4 rows gives another text"):
        bench.bench(CPU, 6, 1)


def test_simulated_scaling(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load("bench_scaling")
    monkeypatch.setattr(bench, "shape", importlib.import_module("bench_model").shape)
    monkeypatch.setattr(bench, "overheads", lambda: [100.0])
    monkeypatch.setattr(bench, "STEPS", {8: 2, 64: 1})
    monkeypatch.setattr(bench, "RANKS", (8, 64))
    padded, packed, *many = bench.simulate(bench.Network())
    assert padded["efficiency"] < packed["efficiency"] < 1 and packed["efficiency"] > 0.9
    assert many[1]["ranks"] == 64 and 0.85 < many[1]["efficiency"] < packed["efficiency"]
    slow = bench.simulate(bench.Network(bandwidth=1e9))[1]
    assert slow["comm_ms"] > 10 * packed["comm_ms"] and slow["efficiency"] < packed["efficiency"]


def test_two_ranks_share_a_step(load: Callable[[str], ModuleType]) -> None:
    bench = load("bench_scaling")
    config = bench.shape(CPU)
    examples = bench.draw_lengths(12, 1, 25, 2.0)
    shares = [bench.share_of(examples, config, rank, 2).batches for rank in range(2)]
    assert sum(batch.samples for share in shares for batch in share) == 12
    assert sum(batch.tokens for share in shares for batch in share) == sum(e.positions for e in examples)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_measured_scaling(load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    shares = load("bench_scaling").report_measured(rounds=1)
    assert 0.2 < shares["efficiency"] < 1.5 and 0 < shares["reduction_and_update"] < 1
    assert "2 ranks x half the examples" in capsys.readouterr().out
