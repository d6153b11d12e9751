"""A fourth task, speech translation into numerals, is one entry of the table of tasks; nothing else is touched."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from demo_runs import TASKS as OLD
from demo_runs import Demo, environment, lines
from harness import ROOT, load_script

from voxtral_dist import early_stopping, record_scores, report
from voxtral_dist.comparison import compare
from voxtral_dist.errors import UserError
from voxtral_dist.mix import parse_weights
from voxtral_dist.predictions import EvalResult
from voxtral_dist.row_filter import RowFilter
from voxtral_dist.tasks import TASKS, Task, detect_task, parse_row, prompt_ids
from voxtral_dist.tokenizer import TekkenVocabulary

PROMPT = "Translate into numerals."

ENTRY = f"""
from voxtral_dist.tasks import TASKS, Task

TASKS["ast"] = Task(
    name="ast",
    has_audio=True,
    detect=lambda row: "audio_path" in row and "translation" in row,
    prompt=lambda row: {PROMPT!r},
    target_fields=("translation",),
    metric="METRIC",
)
"""
"""All of the new task."""

RUN = """
import runpy, sys
import ast_task
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def add_task(monkeypatch: pytest.MonkeyPatch, metric: str) -> Task:
    """The entry in this process, for one test."""
    monkeypatch.setattr("voxtral_dist.tasks.TASKS", TASKS)
    monkeypatch.setitem(TASKS, "ast", None)  # taken out again by the end of the test
    exec(ENTRY.replace("METRIC", metric), {})
    return TASKS["ast"]


def translated(rows: list[dict[str, Any]], words: dict[str, list[str]]) -> list[dict[str, Any]]:
    """ASR rows of the demo as rows of the new task."""
    out = []
    for row in rows:
        order = words[row["language"]].index
        numerals = " ".join(str(order(word)) for word in row["transcript"].split())
        kept = {name: value for name, value in row.items() if name != "transcript"}
        out.append({**kept, "id": row["id"].replace("asr", "ast"), "translation": numerals})
    return out


@pytest.fixture(scope="module")
def rows(demo: Demo) -> dict[str, list[dict[str, Any]]]:
    """Rows of the new task by split."""
    composer = load_script("tools/compose_demo.py")
    words = composer.load_bank(composer.BANK).words
    texts = {split: (demo.folder / f"asr.{split}.jsonl").read_text("utf-8") for split in ("train", "dev")}
    return {
        split: translated([json.loads(line) for line in text.splitlines()], words)
        for split, text in texts.items()
    }


def test_a_row_is_recognised_and_asked(
    rows: dict[str, list[dict[str, Any]]], demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = rows["dev"][0]
    with pytest.raises(UserError, match="unknown key 'translation'"):
        parse_row(row, "a:1", "x")
    add_task(monkeypatch, "wer")
    sample = parse_row(row, "a:1", "x")
    assert (sample.task, sample.prompt, sample.references) == ("ast", PROMPT, (row["translation"],))
    vocabulary = TekkenVocabulary.load(str(demo.model))
    special = [
        vocabulary.special(token) for token in ("<s>", "[INST]", "[BEGIN_AUDIO]", "[AUDIO]", "[AUDIO]")
    ]
    ids = [*special, *vocabulary.encode(PROMPT), vocabulary.special("[/INST]")]
    assert prompt_ids(sample, vocabulary, 2) == ids
    for old in OLD:
        line = (demo.folder / f"{old}.dev.jsonl").read_text("utf-8").splitlines()[0]
        assert detect_task(json.loads(line), "a:1").name == old
    assert RowFilter("task=ast")(row, "ast") and parse_weights("ast=2,asr=1", ["asr", "ast"], [1, 1]) == (
        1,
        2,
    )


def evaluated(rows: list[dict[str, Any]], wrong: int) -> EvalResult:
    """An evaluation of dev rows, the first of which are answered wrong."""
    records = []
    for number, row in enumerate(rows):
        sample = dataclasses.asdict(parse_row(row, "a:1", "x"))
        answer = "99" if number < wrong else row["translation"]
        records.append({**sample, "references": [row["translation"]], "prediction": answer, "metrics": {}})
    metrics = record_scores.score_records(records)
    metrics["intervals"] = record_scores.intervals(records, metrics)
    return EvalResult(f"{wrong} wrong", Path(), records, metrics)


@pytest.mark.parametrize("metric", ["wer", "cer", "rouge_l_f1", "em", "chrf"])
def test_scores_and_tables_go_by_the_entry(
    rows: dict[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, metric: str
) -> None:
    add_task(monkeypatch, metric)
    right, bad = evaluated(rows["dev"], 0), evaluated(rows["dev"], 8)
    values = right.metrics["tasks"]["ast"]
    best = {"wer": 0.0, "cer": 0.0, "chrf": 100.0}.get(metric, 1.0)
    assert values["n"] == 8 and values[metric] == best
    assert right.metrics["macro"] == 1.0 and bad.metrics["macro"] < 0.3
    for text in (report.score_table(right.metrics), report.comparison_table(bad.metrics, right.metrics)):
        assert f"ast  | {metric} " in text
    good, poor = (early_stopping.score_of(one.metrics, f"ast.{metric}") for one in (right, bad))
    assert good is not None and poor is not None and good > poor
    early_stopping.check_metric(f"ast.{metric}", {"ast": metric})
    first = compare([bad, right], trials=200)["against"][0]
    outcomes = first["outcomes"]["ast"]
    assert (outcomes["better"], outcomes["same"], outcomes["worse"]) == (8, 0, 0)
    if metric != "chrf":
        assert first["rows"][0]["metric"] == metric and first["rows"][0]["difference"] == pytest.approx(
            right.metrics["tasks"]["ast"][metric] - bad.metrics["tasks"]["ast"][metric]
        )


def run(folder: Path, script: str, *flags: str) -> str:
    """A script of ours, with the entry added first."""
    command = [sys.executable, "-c", RUN, script, *flags]
    environ = environment(PYTHONPATH=f"{ROOT}:{folder}", DS_ACCELERATOR="cpu")
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_packed_trained_and_evaluated(
    rows: dict[str, list[dict[str, Any]]], demo: Demo, tmp_path: Path
) -> None:
    (tmp_path / "ast_task.py").write_text(ENTRY.replace("METRIC", "wer"))
    (tmp_path / "audio").symlink_to(demo.folder / "audio")
    for split, members in rows.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in members)
        (tmp_path / f"ast.{split}.jsonl").write_text(text, "utf-8")
        flags = ("--jsonl", f"{tmp_path}/ast.{split}.jsonl", "--out", f"{tmp_path}/shards", "--split", split)
        assert "ast" in run(
            tmp_path, "tools/build_shards.py", *flags, "--workers", "1", "--model_id", str(demo.model)
        )
    out = tmp_path / "run"
    sets = {
        s: ",".join([str(demo.folder / "shards/asr" / s), f"{tmp_path}/shards/ast/{s}"])
        for s in ("train", "dev")
    }
    data = f"--model_id {demo.model} --max_len 128 --val_shards {sets['dev']}".split()
    how = "--max_steps 3 --global_batch_size 8 --eval_max_new_tokens 4 --lora_dropout 0 --val_loss_steps 1"
    more = "--task_weights asr=1,ast=3 --best_metric ast.wer --grad_conflict_steps 2"
    where = f"--output_dir {out} --train_shards {sets['train']}"
    text = run(tmp_path, "launch/train.py", *data, *f"{how} {more} {where}".split())
    assert "ast  | wer" in text and "before" in text
    steps = [line for line in lines(out) if "train/loss" in line]
    assert all({"loss/asr", "loss/ast", "mix/ast", "target_token_share/ast"} <= line.keys() for line in steps)
    assert steps[-1]["mix/ast"] == 0.75
    for tag in ("interference/cosine_asr_ast", "val_loss/ast", "eval_ast/wer"):
        assert any(tag in line for line in lines(out)), tag
    scores = out / "evaluations" / "scores"
    where = f"--lora_dir {out} --output_dir {scores} --gen_max_new_tokens 4 --audio_probe"
    text = run(tmp_path, "launch/evaluate.py", *data, *where.split())
    assert "ast  | wer" in text and "own audio" in text
    records = [json.loads(line) for line in (scores / "predictions.jsonl").read_text("utf-8").splitlines()]
    assert [record["task"] for record in records] == ["asr"] * 8 + ["ast"] * 8
    assert {record["prompt"] for record in records if record["task"] == "ast"} == {PROMPT}
    assert set(json.loads((scores / "metrics.json").read_text("utf-8"))["tasks"]) == {"asr", "ast"}
