"""``tools/compare_runs.py`` on evaluations on disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from evaluations import record, result, write
from harness import ROOT, load_script

from voxtral_dist.errors import UserError
from voxtral_dist.packing import pack


def evaluation(folder: Path, right: int, n: int = 24) -> Path:
    """n transcripts of which the first are right."""
    rows = [record("asr", k, "가나다", "가나다" if k < right else "가나", speaker=f"s{k}") for k in range(n)]
    return write(folder, result("unused", rows, max_new_tokens=16))


def test_two_evaluations_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "secret" / "run"
    for step, right in ((0, 2), (100, 24)):
        evaluation(run / "eval" / f"step-{step:08d}", right)
    main = load_script("tools/compare_runs.py").main
    main([str(run / "eval/step-00000000"), str(run), "--out", str(tmp_path / "out")])
    shown = capsys.readouterr()
    assert (
        "A: run/step-00000000   B: run" in shown.out and "asr  | cer" in shown.out and "better" in shown.out
    )
    assert shown.err == ""
    html = (tmp_path / "out/comparison.html").read_text("utf-8")
    stored = json.loads((tmp_path / "out/comparison.json").read_text("utf-8"))
    assert stored["results"] == ["run/step-00000000", "run"] and stored["settings"] == {"max_new_tokens": 16}
    assert "secret" not in html and "<audio" not in html


def test_three_evaluations_are_corrected_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(evaluation(tmp_path / name, right)) for name, right in (("a", 2), ("b", 2), ("c", 20))]
    load_script("tools/compare_runs.py").main([*folders, "--out", str(tmp_path / "out"), "--trials", "999"])
    shown = capsys.readouterr().out
    assert "A: a   B: b" in shown and "A: a   B: c" in shown and shown.count("no difference shown") == 3
    assert json.loads((tmp_path / "out/comparison.json").read_text("utf-8"))["tests"] == 6


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    a, fewer = evaluation(tmp_path / "a", 2), evaluation(tmp_path / "fewer", 2, n=20)
    command = [sys.executable, "tools/compare_runs.py", str(a), str(fewer), "--out", str(tmp_path / "out")]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
    assert refused.stderr.startswith("error: fewer lacks 4 samples (asr/asr-0020 first) of a;")


@pytest.mark.parametrize("flags", [("--trials", "0"), ("--seed", "-1")])
def test_bad_flags(tmp_path: Path, flags: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="at least 1 trial"):
        load_script("tools/compare_runs.py").main(["a", "b", *flags])


def packed_set(tmp_path: Path) -> Path:
    """A packed dev set of two transcripts with sound."""
    rows = []
    for k in range(2):
        soundfile.write(tmp_path / f"{k}.wav", np.sin(np.arange(8000) * (k + 1) / 20), 16_000)
        rows.append(
            {"id": f"asr-{k:04d}", "audio_path": f"{k}.wav", "transcript": "가나다", "language": "ko"}
        )
    rows[1]["transcript"] = "다른 말"
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    pack([tmp_path / "dev.jsonl"], tmp_path / "shards", split="dev")
    return tmp_path / "shards/asr/dev"


def test_shown_samples_can_be_heard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From --val_shards or the run's own; never the sound of another example that has the same id."""
    shards, run = packed_set(tmp_path), tmp_path / "run"
    for step, right in ((0, 0), (100, 2)):
        evaluation(run / "eval" / f"step-{step:08d}", right, n=2)
    folders, out = [str(run / "eval/step-00000000"), str(run)], tmp_path / "out"
    main = load_script("tools/compare_runs.py").main
    main([*folders, "--out", str(out), "--val_shards", str(shards)])
    assert (out / "comparison.html").read_text("utf-8").count("<audio") == 1
    (run / "config.yaml").write_text(f"val_shards: {shards}\n")
    main([*folders, "--out", str(out)])
    assert (out / "comparison.html").read_text("utf-8").count("<audio") == 1
    (run / "config.yaml").write_text(f"val_shards: {tmp_path}/gone\n")
    main([*folders, "--out", str(out)])
    assert "<audio" not in (out / "comparison.html").read_text("utf-8")
    with pytest.raises(UserError, match="no manifest"):
        main([*folders, "--out", str(out), "--val_shards", f"{tmp_path}/gone"])
    assert "better" not in capsys.readouterr().err
