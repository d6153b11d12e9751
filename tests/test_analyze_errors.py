"""``tools/analyze_errors.py`` as a user calls it: the files it writes, where the sound comes from, what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from evaluations import record, result, write
from harness import ROOT, load_script
from test_packing import asr_rows, child_env, write_jsonl

from voxtral_dist.errors import UserError
from voxtral_dist.packing import pack

WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "deepspeed", "peft"):
    sys.modules[name] = None
from tools.analyze_errors import main
from voxtral_dist.errors import run_main
run_main(main)
"""


def alone(*flags: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The tool in a process in which torch cannot be imported."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, flags)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=child_env(), check=False)
    assert done.returncode == code, done.stderr
    return done


def analyze(*flags: object) -> None:
    """The tool in this process."""
    load_script("tools/analyze_errors.py").main([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an evaluation of 6 transcripts whose audio lies in its packed dev set, and of 2 answers."""
    folder = tmp_path_factory.mktemp("made")
    rows = asr_rows(folder, 6)
    write_jsonl(folder / "dev.jsonl", rows)
    pack([folder / "dev.jsonl"], folder / "shards", split="dev")
    spoken: list[dict[str, Any]] = [
        record(
            "asr",
            0,
            row["transcript"],
            "문장",
            id=row["id"],
            duration=0.1,
            audio_path=str(folder / "clip.wav"),
        )
        for row in rows
    ]
    evaluation = result(
        "night", [*spoken, record("tqa", 0, "서울", "서울입니다"), record("tqa", 1, "부산", "부산")]
    )
    write(folder / "run" / "eval" / "step-00000100", evaluation)
    (folder / "run" / "config.yaml").write_text(f"val_shards: {folder}/shards/asr/dev\n")
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "run", tmp_path / "night"))


def test_a_run_gets_a_private_page_with_sound(run: Path, made: Path) -> None:
    done = alone(run)
    folder = run / "eval" / "step-00000100"
    assert done.stdout.splitlines()[-1] == f"written: {folder}/errors.html, errors.json" and done.stderr == ""
    assert "warning: asr: only 6 independent speakers, documents or rows" in done.stdout
    html, analysis = (folder / "errors.html").read_text(), json.loads((folder / "errors.json").read_text())
    assert html.count('<audio controls preload="none" src="data:audio/flac;base64,') == 6
    assert str(made) not in html and str(run) not in html and str(made) not in json.dumps(analysis)
    assert analysis["name"] == "night" and analysis["tasks"]["asr"]["n"] == 6
    for name in ("errors.html", "errors.json"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600


def test_an_evaluation_elsewhere_and_another_folder(made: Path, tmp_path: Path) -> None:
    copy, out = tmp_path / "copy", tmp_path / "pages" / "night"
    shutil.copytree(made / "run" / "eval" / "step-00000100", copy)
    before = sorted(copy.iterdir())
    analyze(copy, "--out", out, "--samples", 3)
    assert sorted(copy.iterdir()) == before
    html = (out / "errors.html").read_text()
    assert "<audio" not in html and "The sound of" in html
    assert len(json.loads((out / "errors.json").read_text())["tasks"]["asr"]["random"]) == 3
    analyze(copy, "--out", out, "--val_shards", made / "shards/asr/dev")
    assert (out / "errors.html").read_text().count("<audio") == 6


def test_data_sets_that_are_gone_cost_the_sound_alone(run: Path) -> None:
    (run / "config.yaml").write_text("val_shards: /gone/asr/dev\n")
    done = alone(run)
    assert len(done.stderr.splitlines()) == 1 and "/gone/asr/dev" in done.stderr
    assert "<audio" not in (run / "eval/step-00000100/errors.html").read_text()


def test_bad_input_is_one_line(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for flags, words in (
        ([tmp_path / "nowhere"], "nowhere does not exist"),
        ([run, "--samples", 0], "--samples 0: at least 1 row is needed"),
        ([run, "--out", tmp_path / "file"], "file is no folder"),
        ([run, "--val_shards", tmp_path / "gone"], "gone: no manifest"),
    ):
        with pytest.raises(UserError, match=words):
            analyze(*flags)
    predictions = run / "eval/step-00000100/predictions.jsonl"
    predictions.write_text("{torn\n")
    error = alone(run, code=2).stderr
    assert error.startswith(f"error: {predictions}:1: ") and error.count("\n") == 1
