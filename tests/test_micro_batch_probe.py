"""The largest micro-batch: the search, the tool that estimates, the tool that tries with the real engine, the bench."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from demo_runs import Process, started
from harness import load_script
from hypothesis import given
from hypothesis import strategies as st

from voxtral_dist import memory, prepare
from voxtral_dist import model as modeling
from voxtral_dist.config import TrainConfig
from voxtral_dist.errors import UserError
from voxtral_dist.step_memory import Shape


@given(st.integers(0, 5000), st.integers(1, 3000), st.integers(1, 4000))
def test_largest_that_fits(true: int, start: int, most: int) -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= true

    found = memory.largest(fits, start, most)
    assert found <= min(true, most) and (found == 0) == (true == 0)
    assert found == most or found + max(1, found // 16) >= min(true, most)
    assert len(asked) == len(set(asked)) and max(asked) <= most
    assert len(asked) <= 2 * most.bit_length() + 6


def test_advice_names_what_is_in_the_way() -> None:
    config = TrainConfig(max_len=1000, per_device_bsz=4, packed=False)
    assert memory.advice(8000, config, "80 GB") == [
        "--max_tokens_per_micro_batch 8000 is the largest that fits into 80 GB with 8% left free",
        "--per_device_bsz 4 allows fewer rows: give 8 or more, and --global_batch_size to keep the examples per step",
    ]
    assert len(memory.advice(8000, replace(config, packed=True), "80 GB")) == 1
    with pytest.raises(UserError, match=r"--max_len 1000: .* does not fit into 80 GB .* 999 would"):
        memory.advice(999, config, "80 GB")


# the tools


def estimate_flags(model: Path, gpu_gb: str) -> list[str]:
    flags = ["--model_id", str(model / "config.json"), "--max_len", "128", "--ranks", "2"]
    return ["estimate_memory.py", *flags, "--gpu_gb", gpu_gb]


@pytest.mark.slow
def test_estimate_tool_finds_what_fits(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a config.json alone; the number it gives fits, and a sixteenth more does not."""
    monkeypatch.setattr(sys, "argv", estimate_flags(tiny_model, "0.02"))
    load_script("tools/estimate_memory.py").main()
    out, progress = capsys.readouterr()
    found = int(out.split("--max_tokens_per_micro_batch ")[1].split()[0])
    lines = re.findall(r"^([\d,]+) positions: ([\d.]+) GB$", progress, re.M)
    peaks = {int(positions.replace(",", "")): float(peak) for positions, peak in lines}
    assert peaks[128] < peaks[256]
    larger = min(positions for positions in peaks if positions > found)
    assert peaks[found] <= 0.92 * 0.02 <= peaks[larger] and larger <= found + found // 8


def test_estimate_tool_on_a_card_that_is_too_small(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", estimate_flags(tiny_model, "0.001"))
    with pytest.raises(UserError, match=r"--gpu_gb 0\.001: weights, gradients and optimizer take 0\.0 GB"):
        load_script("tools/estimate_memory.py").main()
    assert "peak of a training step" in capsys.readouterr().out


def probed(flags: list[str], log: Path, ranks: int = 1, code: int = 0) -> str:
    script = [sys.executable, "tools/probe_micro_batch.py", *flags]
    if ranks > 1:
        script = ["bash", "launch/run_ranks.sh", "tools/probe_micro_batch.py", *flags]
    about = {"PYTHON": sys.executable, "NPROC": str(ranks), "LAUNCHER": "torchrun"} if ranks > 1 else {}
    with started([Process(script, log, **about)]) as (process,):
        assert process.end() == code, process.text
        return process.text


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--no_packed"], ["--grad_ckpt"]], ids=["padded", "recomputed and packed"])
def test_probe_finds_what_the_estimate_says(tiny_model: Path, tmp_path: Path, more: list[str]) -> None:
    """The same limit, once tried with the real engine on one rank and on two, once counted."""
    flags = [
        "--model_id",
        str(tiny_model),
        "--max_len",
        "128",
        "--limit_gb",
        "0.06",
        "--lora_dropout",
        "0",
        *more,
    ]
    found = []
    for ranks in (1, 2):
        text = probed(flags, tmp_path / f"{ranks}", ranks)
        found.append(int(text.split("--max_tokens_per_micro_batch ")[1].split()[0]))
        assert "do not fit" in text and "leave" not in text
    config, options = modeling.read_config(str(tiny_model)), TrainConfig(lora_dropout=0.0)
    options = replace(options, grad_ckpt="--grad_ckpt" in more, packed="--no_packed" not in more)
    lora = prepare.lora_settings(options)

    def fits(positions: int) -> bool:
        shape = Shape.worst(positions, 128, config, options.packed)
        return memory.estimate(options, config, lora, ranks=1, shape=shape, bf16=False).peak <= 0.92 * 0.06e9

    assert memory.largest(fits, 128) == pytest.approx(found[0], rel=0.1)
    assert found[1] == pytest.approx(found[0], rel=0.1)


@pytest.mark.slow
def test_probe_says_what_is_wrong(tiny_model: Path, tmp_path: Path) -> None:
    flags = ["--model_id", str(tiny_model), "--max_len", "128"]
    assert "--limit_gb is missing" in probed(flags, tmp_path / "cpu", code=2)
    text = probed([*flags, "--limit_gb", "0.001"], tmp_path / "small", code=2)
    assert "error: the weights and the optimizer alone do not fit" in text


@pytest.mark.slow
def test_bench_on_the_tiny_model(tmp_path: Path) -> None:
    """Every ratio of estimate and count within 10 %, through the engine."""
    log = tmp_path / "bench"
    with started([Process([sys.executable, "tools/bench_memory.py", "--tiny", "--full"], log)]) as (process,):
        assert process.end() == 0, process.text
    lines = [json.loads(line) for line in log.with_suffix(".out").read_text().splitlines() if "{" in line]
    ratios = {(line["what"], line.get("positions")): line["ratio"] for line in lines if "ratio" in line}
    assert len(ratios) == 11
    assert all(0.9 <= ratio <= 1.1 for ratio in ratios.values()), ratios
