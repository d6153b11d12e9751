"""tools/rescore.py: other normalisers on a laptop without torch, and the same numbers under the stored one."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, load_script
from test_predictions import write
from test_record_scores import corpus, record

from voxtral_dist.errors import UserError
from voxtral_dist.record_scores import intervals, score_records

LAPTOP = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "deepspeed", "peft", "soundfile", "tensorboard"}:
            raise ModuleNotFoundError(f"{name} is not on this laptop")

sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def on_a_laptop(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LAPTOP, "tools/rescore.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if "|" in line]


def test_without_torch_and_with_the_numbers_of_the_evaluation(tmp_path: Path) -> None:
    folder = write(tmp_path / "run" / "eval" / "step-00000100")
    result = on_a_laptop(tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("run: 48 predictions\n") and "differs" not in result.stdout
    assert rows_of(result.stdout)[0] == ["task", "metric", "ko-std/1", "raw/1", "ko-spoken/1"]
    written = json.loads((folder / "rescored.json").read_text())
    stored = json.loads((folder / "metrics.json").read_text())
    fresh = written["normalizers"]["ko-std/1"]
    assert {key: fresh[key] for key in stored} == stored and "intervals" not in fresh
    assert (
        written["predictions_sha256"]
        == hashlib.sha256((folder / "predictions.jsonl").read_bytes()).hexdigest()
    )
    assert (folder / "rescored.json").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in folder.iterdir()) == [
        *("metrics.json", "predictions.jsonl", "rescored.json")
    ]


def test_the_users_mistakes_are_one_line(tmp_path: Path) -> None:
    result = on_a_laptop(tmp_path, "--normalizer", "ko-std/7")
    assert result.returncode == 2 and result.stderr.startswith("error: unknown normalizer 'ko-std/7'")
    assert result.stderr.count("\n") == 1
    rescore = load_script("tools/rescore.py")
    with pytest.raises(UserError, match="holds no evaluation"):
        rescore.main([str(tmp_path)])
    with pytest.raises(UserError, match="--normalizer is empty"):
        rescore.main([str(tmp_path), "--normalizer", ","])


def rescored(folder: Path, *flags: str) -> dict[str, Any]:
    load_script("tools/rescore.py").main([str(folder), *flags])
    return dict(json.loads((folder / "rescored.json").read_text())["normalizers"])


def test_each_normaliser_has_its_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [record("asr", n, "값은 70%, 예", "값은 칠십 퍼센트 예") for n in range(3)]
    found = rescored(write(tmp_path / "e", rows), "--normalizer", "ko-spoken/1, raw/1,raw/1")
    cers = [metrics["tasks"]["asr"]["cer"] for metrics in found.values()]
    assert list(found) == ["ko-spoken/1", "raw/1"] and cers[0] == 0.0 < cers[1]
    assert [metrics["normalizer"] for metrics in found.values()] == list(found)
    shown = rows_of(capsys.readouterr().out)
    assert shown[0] == ["task", "metric", "ko-spoken/1", "raw/1"]
    assert ["asr", "cer", "0.0000", f"{cers[1]:.4f}"] in shown


def test_intervals_and_groups_are_those_of_the_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rescored(write(tmp_path / "e"), "--bootstrap", "--normalizer", "ko-std/1")["ko-std/1"]
    rows = corpus()
    assert found["intervals"] == intervals(rows, score_records(rows))
    assert set(found["groups"]) == {"language", "domain"}
    low, high = found["intervals"]["asr"]["cer"]
    out = capsys.readouterr().out
    assert f"[{low:.3f}, {high:.3f}]" in out and "fewer than 20 of them to draw from: asr (6)" in out


def test_numbers_that_changed_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "e")
    stored = json.loads((folder / "metrics.json").read_text())
    cer, macro = stored["tasks"]["asr"]["cer"], stored["macro"]
    stored["tasks"]["asr"]["cer"], stored["tasks"]["tqa"]["bleu"] = cer + 0.25, 5.0
    (folder / "metrics.json").write_text(json.dumps(stored))
    rescored(folder)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("differs")]
    assert lines == [
        f"differs from metrics.json: asr.cer {cer + 0.25:.4f} -> {cer:.4f}",
        "differs from metrics.json: tqa.bleu 5.0000 -> n/a",
    ]
    stored["normalizer"], stored["macro"] = "ko-std/0", macro + 1
    (folder / "metrics.json").write_text(json.dumps(stored))
    rescored(folder)
    assert "differs" not in capsys.readouterr().out
