"""Every part of the benchmark runs and prints its ratios; the balance is a pure function, so it is asserted too.

No speed is asserted: it is the machine's.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from harness import ROOT, load_script

from voxtral_dist.audio import AudioSpec
from voxtral_dist.errors import UserError
from voxtral_dist.packing import pack


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of a script is on the path when it is run."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


@pytest.fixture
def bench_balance(tools: None) -> ModuleType:
    return importlib.import_module("bench_balance")


@pytest.fixture
def bench_read(tools: None) -> ModuleType:
    return importlib.import_module("bench_read")


def ratios(line: str) -> list[float]:
    """The numbers with a point in a printed line."""
    return [float(value) for value in re.findall(r"\d+\.\d+", line)]


def test_balance_prints_both_tables(bench_balance: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    bench_balance.balance({(2, 4): 2}, trials=1)
    lines = capsys.readouterr().out.splitlines()
    policies = {line.split(" |")[0].strip(): ratios(line) for line in lines if line.count("|") == 2}
    worst = min(min(v) for name, v in policies.items() if name.startswith("ours"))
    others = [max(v) for name, v in policies.items() if not name.startswith("ours") and v]
    assert worst > 0.99 and len(others) == 4 and max(others) < 0.95
    assert len(ratios(next(line for line in lines if line.startswith("2 x 4")))) == 4
    assert any(re.match(r"a micro-batch costs -?\d+ positions besides its own", line) for line in lines)


def test_overhead_and_padding_cost_what_they_must(bench_balance: ModuleType) -> None:
    corpus = bench_balance.lengths()
    alone, padded, dearer, packed = bench_balance.capped(corpus, 8, 8, 3, 100)
    assert 0.98 < alone <= 1 and dearer < padded < alone and packed < alone
    assert bench_balance.capped(corpus, 8, 8, 3, 0) == [alone, padded, padded, alone]
    [[share]] = bench_balance.step_shares(corpus, 1, 64, 1)
    useful = corpus.useful[share].sum()
    cost, number = bench_balance.micro_batches(corpus, share, True)
    expected = useful / (useful + 100 * number)
    assert cost == useful and bench_balance.capped(corpus, 1, 64, 1, 100)[3] == pytest.approx(expected)


def test_read_compares_with_both(bench_read: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lhotse")
    bench_read.read(16, 1)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ours /")]
    assert [line.split()[2].rstrip(",") for line in printed] == ["webdataset", "webdataset", "lhotse"]
    assert all(ratios(line)[0] > 0 for line in printed)


def test_read_works_without_lhotse(
    bench_read: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lhotse", None)
    bench_read.read(8, 1)
    printed = capsys.readouterr().out
    assert "ours / webdataset" in printed and "ours / lhotse" not in printed
    assert "pip install -e '.[bench]'" in printed


def test_the_foreign_arms_read_the_same_clips(bench_read: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("lhotse")
    bench_read.clips(tmp_path, 5)
    spec = AudioSpec(128, 3000, 375)
    folder = pack([tmp_path / "asr.jsonl"], tmp_path / "shards")[0]
    one = list(bench_read.webdataset_examples(next(Path(folder).glob("*.tar")), spec))
    other = list(bench_read.lhotse_examples(bench_read.write_shar(tmp_path, 5), spec))
    sums = [sorted(float(example.mel.sum()) for example in examples) for examples in (one, other)]
    assert len(set(sums[0])) == 5 and sums[0] == sums[1]
    assert {e.sample.target for e in one + other} == {"one two three"}
    assert {e.n_samples for e in one + other} == {80_000}


def test_the_door(tools: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("tools/bench_data.py")
    monkeypatch.setattr(sys, "argv", ["bench_data.py", "start"])
    script.main()
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()][1:] == ["resumed"]
    monkeypatch.setattr(sys, "argv", ["bench_data.py", "speed"])
    with pytest.raises(UserError, match="balance, read, scale, wait, start"):
        script.main()


def test_a_trainer_that_is_faster_waits_longer(
    tools: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rates a million times apart; the slower one sets its own pace."""
    bench = importlib.import_module("bench_wait")
    monkeypatch.setattr(bench, "STEP", 4)
    sets = bench.corpus(tmp_path, bench.draw_lengths(30, 3, 375, 30.0))
    data = bench.training_data(sets, bench.tekken(tmp_path), packed=True)
    fast_waits, _, fast = bench.feed(data, 1e20, 3)
    slow_waits, cores, slow = bench.feed(data, 1e14, 3)
    assert fast_waits > 0.8 and slow_waits < 0.5
    assert slow < fast and 0 < cores < 2.5
