"""``--debug``: real runs of the tiny demo print what an engineer looks for first, and leave nothing behind."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from demo_runs import Demo, Process, alone, log_of, started
from harness import free_port

from voxtral_dist import debug_run

GROUPS = ["projector", *(f"language model {x}" for x in ("q", "k", "v", "o", "gate", "up", "down"))]


def test_groups_of_parameters() -> None:
    layer = "model.base_model.model.model.language_model.layers.0."
    assert debug_run.group_of(f"{layer}self_attn.q_proj.lora_A.default.weight") == "language model q"
    assert debug_run.group_of(f"{layer}mlp.down_proj.weight") == "language model down"
    assert debug_run.group_of(f"{layer}input_layernorm.weight") == "language model norms"
    assert debug_run.group_of("model.base.model.multi_modal_projector.linear_1.weight") == "projector"
    assert debug_run.group_of("x.audio_tower.layers.0.self_attn.q_proj.weight") == "audio encoder"


def norms(text: str) -> tuple[list[float], list[dict[str, float]]]:
    """Gradient norm of each step, and its parts by group."""
    whole = [float(value) for value in re.findall(r"gradient norm ([\d.e+-]+) before clipping", text)]
    parts = [
        {name: float(value) for name, value in re.findall(r"gradient ([a-z ]+): ([\d.e+-]+)", step)}
        for step in re.split(r"\nstep \d", text)[1:]
    ]
    return whole, parts


def test_debug_shows_batches_gradients_and_memory(demo: Demo, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "exit_status.json").write_text("of the run that is there")
    text = alone(demo.flags(run, "--debug"), run).text
    assert [path.read_text() for path in run.iterdir()] == ["of the run that is there"], "nothing is written"
    assert re.findall(r"^step (\d): 6 examples on 1 rank", text, re.M) == ["1", "2", "3"]
    for name, kind, axes in (
        ("input_ids", "int64", 2),
        ("audio", "float32", 3),
        ("label_weight", "float32", 1),
    ):
        assert re.search(rf"^  {name} +{kind} +\[\d+(, \d+){{{axes - 1}}}\]$", text, re.M), name
    prompt = r"prompt <s>\[INST\]\[BEGIN_AUDIO\]\[AUDIO\]\*\d+\[/INST\]lang:(en|ko)\[TRANSCRIBE\]"
    assert re.search(rf"{prompt}\n +target .+</s>\n +mask   ·+#+\n", text)
    for task in ("asr", "sqa", "tqa"):
        assert len(re.findall(rf"^  loss {task}: \d+\.\d+ over \d+ labels$", text, re.M)) >= 3
    for phase in ("forward", "backward", "step"):
        assert len(re.findall(rf"^  memory, {phase}: [\d,]+ MiB resident$", text, re.M)) >= 3
    whole, parts = norms(text)
    assert len(whole) == 3
    for norm, groups in zip(whole, parts, strict=True):
        assert sorted(groups) == sorted(GROUPS)
        assert sum(value**2 for value in groups.values()) ** 0.5 == pytest.approx(norm, rel=1e-2)
    assert parts[0]["language model q"] > 0


@pytest.mark.slow
def test_debug_on_two_ranks_keeps_text_private(demo: Demo, tmp_path: Path) -> None:
    """Twice as many examples, the same output from one rank alone; no transcript with --private_text."""
    run, port = tmp_path / "run", str(free_port())
    flags = [sys.executable, "launch/train.py", *demo.flags(run, "--debug", "--private_text")]
    ranks = [
        Process(
            flags,
            log_of(tmp_path / f"rank{rank}"),
            RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        for rank in range(2)
    ]
    with started(ranks):
        assert [rank.end() for rank in ranks] == [0, 0], ranks[0].text + ranks[1].text
    first, second = (rank.text for rank in ranks)
    assert "step 3: 12 examples on 2 rank(s)" in first and "step 1" not in second
    assert "prompt" not in first and "target" not in first
    assert re.search(r"\d+ positions, \d+ labels", first)
