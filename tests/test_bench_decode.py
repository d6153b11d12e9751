"""Both parts of the decoding benchmark run, print their ratios and compare the text. No speed is asserted."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from demo_runs import Demo
from harness import ROOT
from test_model import tuned

from voxtral_dist import adapter
from voxtral_dist.errors import UserError

ARMS = [
    f"ours, {times} x the cache / usual, per {kind} second" for times in (1, 4) for kind in ("CPU", "wall")
]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The folder of a script is on the path when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("bench_decode")


def small(bench: ModuleType) -> dict[str, list[float]]:
    return bench.large(counts=(9, 1, 1), hidden=64, layers=1, rounds=1)


def test_random_weights(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    ratios = small(bench)
    assert list(ratios) == ARMS and all(len(v) == 1 and min(v) > 0 for v in ratios.values())
    printed = capsys.readouterr().out
    assert all(f"  {arm}: " in printed for arm in ARMS) and "11 questions" in printed
    passes = [int(number) for number in re.findall(r"(\d+) passes", printed)]
    assert len(passes) == 5 and max(passes[1:]) < passes[0]


def test_another_text_fails(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = bench.decode_stream

    def wrong(*args: Any, **options: Any) -> Any:
        for answer in stream(*args, **options):
            yield replace(answer, tokens=[*answer.tokens, 5] if answer.number == 3 else answer.tokens)

    monkeypatch.setattr(bench, "decode_stream", wrong)
    with pytest.raises(AssertionError, match="ours, 1 x the cache gives another text"):
        small(bench)


def test_the_demo(
    bench: ModuleType, tiny_model: Path, demo: Demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000004").mkdir(parents=True)
    adapter.save(tuned(tiny_model), run / "checkpoints" / "step-00000004")
    (run / "best").write_text("step-00000004")
    sets = ",".join(str(demo.folder / "shards" / task / "dev") for task in ("asr", "sqa"))
    values = {"model_id": str(tiny_model), "val_shards": sets, "eval_max_new_tokens": 6, "max_len": 128}
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    assert list(bench.demo(run, rounds=1)) == ARMS
    assert "16 questions, answers of 6 tokens in the median" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"is no run with packed dev sets; make one with: bash launch/quickstart"
    ):
        bench.demo(tmp_path)
