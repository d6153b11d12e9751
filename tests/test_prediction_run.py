"""launch/evaluate.py --predict: the predictions of an evaluation without its references, and long recordings."""

from __future__ import annotations

import json
import stat
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from demo_runs import Demo
from harness import free_port, load_script
from test_decode_share import folders, whole  # noqa: F401 - fixtures
from test_evaluator import MAX_LEN, with_adapter

from voxtral_dist import adapter, command_line
from voxtral_dist.config import EvalConfig
from voxtral_dist.distributed import World
from voxtral_dist.errors import UserError


@pytest.fixture(scope="module")
def adapter_dir(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes what the tiny model says."""
    out = tmp_path_factory.mktemp("adapter")
    adapter.save(with_adapter(str(tiny_model)), out)
    return out


def predict(
    monkeypatch: pytest.MonkeyPatch, model: Path, adapter_dir: Path, out: Path, *flags: str
) -> list[Any]:
    """Run launch/evaluate.py in this process; the lines of predictions.jsonl."""
    environ = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (environ | {"MASTER_PORT": str(free_port())}).items():
        monkeypatch.setenv(name, value)
    common = ["--model_id", model, "--lora_dir", adapter_dir, "--output_dir", out, "--gen_max_new_tokens", 6]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, common), "--max_len", str(MAX_LEN), *flags])
    load_script("launch/evaluate.py").run(World(0, 0, 1))
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text("utf-8").splitlines()]


def test_rows_without_targets_get_the_predictions_of_an_evaluation(
    demo: Demo,
    tiny_model: Path,
    adapter_dir: Path,
    whole: list[dict[str, Any]],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "audio").symlink_to(demo.folder / "audio")
    rows = []
    for task in ("tqa", "asr", "sqa"):
        for line in (demo.folder / f"{task}.dev.jsonl").read_text("utf-8").splitlines()[:6]:
            row = json.loads(line)
            rows.append(
                {"task": task} | {k: v for k, v in row.items() if k not in ("transcript", "answer", "output")}
            )
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    found = predict(
        monkeypatch, tiny_model, adapter_dir, tmp_path / "out", "--predict", str(tmp_path / "rows.jsonl")
    )
    assert [line["id"] for line in found] == [row["id"] for row in rows]
    expected = {record["id"]: record["prediction"] for record in whole}
    assert {line["id"]: line["prediction"] for line in found} == expected
    assert all(line["references"] == [] and "pieces" not in line and "metrics" not in line for line in found)
    assert stat.S_IMODE((tmp_path / "out" / "predictions.jsonl").stat().st_mode) == 0o600
    assert not (tmp_path / "out" / "metrics.json").exists() and not (tmp_path / "out" / "parts").exists()
    assert found[0]["id"] in capsys.readouterr().out


def test_a_long_recording_is_cut_and_joined(
    demo: Demo,
    tiny_model: Path,
    adapter_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clips = [
        soundfile.read(path, dtype="float32")[0] for path in sorted((demo.folder / "audio").glob("dev-*"))[:6]
    ]
    pause = np.zeros(8000, np.float32)
    soundfile.write(
        tmp_path / "call.wav", np.concatenate([part for clip in clips for part in (clip, pause)]), 16_000
    )
    flags = ("--predict", str(tmp_path / "call.wav"), "--task", "asr", "--language", "ko", "--private_text")
    (line,) = predict(monkeypatch, tiny_model, adapter_dir, tmp_path / "out", *flags)
    pieces = line["pieces"]
    assert (line["id"], line["audio_path"], line["language"]) == ("call", "call.wav", "ko") and len(
        pieces
    ) > 1
    assert line["prediction"] == " ".join(text for piece in pieces if (text := piece["prediction"].strip()))
    assert pieces[0]["start"] == 0 and pieces[-1]["end"] == pytest.approx(line["duration"], abs=0.01)
    assert all(a["end"] == b["start"] for a, b in pairwise(pieces))
    timings = [json.loads(text) for text in (tmp_path / "out" / "timing.jsonl").read_text().splitlines()]
    assert [timing["piece"] for timing in timings] == list(range(len(pieces)))
    printed = capsys.readouterr().out
    assert (
        "written:" in printed and "| prediction" not in printed and pieces[0]["prediction"][:8] not in printed
    )


def test_an_unreadable_file_is_a_line_with_its_error(
    tiny_model: Path,
    adapter_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(8000, np.float32), 16_000)
    (tmp_path / "b.wav").write_bytes(b"RIFF no sound at all")
    flags = ("--predict", str(tmp_path), "--task", "asr")
    good, bad = predict(monkeypatch, tiny_model, adapter_dir, tmp_path / "out", *flags)
    assert good["error"] is None and good["prediction"] is not None
    assert bad["prediction"] is None and "b.wav" in bad["error"]
    assert "1 of 2 rows have an error, the first b" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--predict", "a.wav", "--val_shards", "dev"], "--predict scores nothing"),
        (["--predict", "a.wav", "--audio_probe"], "--predict scores nothing"),
        (["--val_shards", "dev", "--task", "asr"], "--task is of files in --predict"),
        ([], "neither is given"),
    ],
)
def test_flags_that_contradict_each_other(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command_line.parse(EvalConfig, ["--model_id", "m", *flags], "evaluate.py")
