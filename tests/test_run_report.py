"""The page about a run: what it must show, what it must never show, and runs that lack what others have."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import jinja2
import pytest
from demo_runs import Demo, alone, environment
from harness import ROOT, load_script
from test_page import SHORT, Seen, check_inert

from voxtral_dist import config, page, run_dir
from voxtral_dist.atomic import write_json
from voxtral_dist.config import TrainConfig
from voxtral_dist.errors import UserError
from voxtral_dist.monitor import Monitor
from voxtral_dist.record_scores import groups, intervals, score_records
from voxtral_dist.run_facts import setting, short_path
from voxtral_dist.run_record import MOST_BINS, Curve, read_log, read_run
from voxtral_dist.run_report import build, write_report

STEPS = 24
HIDDEN = "/home/alice/secret"
TASKS = ("asr", "sqa")
EVERYTHING = (
    "metrics.jsonl",
    "eval",
    "best",
    "checkpoints",
    "evaluations",
    "environment.json",
    "exit_status.json",
)


def records(good: bool) -> list[dict[str, Any]]:
    """Predictions of 30 rows of each task, of a model before or after training."""
    rows = []
    for task, number in itertools.product(TASKS, range(30)):
        reference = f"{task} 정답 {number}"
        rows.append(
            {"task": task, "id": f"{number:03}", "language": "ko" if number % 2 else "en", "domain": "d"}
            | {"speaker": f"s{number}", "prompt": "" if task == "asr" else f"질문 {number}"}
            | {"references": [reference], "prediction": reference if good and number % 5 else "틀린 답"}
            | {"hit_max": number < 3, "audio_path": f"{HIDDEN}/a.flac", "duration": 1.0, "error": None}
        )
    return rows


def evaluate(folder: Path, rows: list[dict[str, Any]]) -> None:
    """What an evaluation of these predictions leaves in its folder; the intervals, which take long, at step 12."""
    folder.mkdir(parents=True)
    metrics = score_records(rows)
    if folder.name == "step-00000012":
        metrics |= {"intervals": intervals(rows, metrics), "groups": groups(rows)}
    write_json(folder / "metrics.json", metrics | {"provenance": {"model_id": f"{HIDDEN}/model"}})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "predictions.jsonl").write_text(lines, "utf-8")


def scalars(step: int) -> dict[str, float | None]:
    """The numbers of a step of two stages; energy starts anew in the middle, as after a restart."""
    energy = float(step if step <= STEPS // 2 else step - STEPS // 2)
    return {
        **{
            "train/loss": 4.0 / step,
            "train/learning_rate": 1e-3,
            "train/grad_norm": float("nan") if step == 5 else 1.0,
        },
        **{
            "train/clip_share": 0.5,
            "train/skipped_steps": 1.0,
            "train/bad_samples": 2.0,
            "train/epoch": step / 8,
        },
        **{"train/stage": float(step > STEPS // 2), "loss/asr": 5.0 / step, "loss/sqa": 3.0 / step},
        **{"mix/asr": 0.25, "mix/sqa": 0.75, "target_token_share/asr": 0.4, "target_token_share/sqa": 0.6},
        **{
            "tokens_seen/asr": 30.0 * step,
            "tokens_seen/sqa": 70.0 * step,
            "audio_seconds_seen/asr": 150.0 * step,
        },
        **{
            "target_tokens_seen/asr": 1.0 * step,
            "target_tokens_seen/sqa": 9.0 * step,
            "audio_seconds_seen/sqa": 0.0,
        },
        **{
            "speed/step_seconds": 2.0,
            "speed/tokens_per_second": 1000.0,
            "speed/mfu": 0.25,
            "speed/rank_spread": 1.1,
        },
        **{
            "speed/padding_share": 0.1,
            "speed/data_wait_share": 0.0,
            "gpu0/energy_wh": energy,
            "gpu1/energy_wh": energy,
        },
        **{"interference/cosine_asr_sqa": -0.1, "interference/magnitude_asr_sqa": 0.8},
    }


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything in it; tests read it."""
    run = tmp_path_factory.mktemp("runs") / "voxtral-한글"
    flags = TrainConfig(
        model_id=f"{HIDDEN}/Voxtral", output_dir=str(run), learning_rate=3e-3, stages=f"{HIDDEN}/stages.yaml"
    )
    flags.train_shards = [f"{HIDDEN}/asr/train", "https://alice.example/sets/sqa/train"]
    identity = {"tasks": list(TASKS), "dev_data": {"asr": ["fedcba9876543210"]}}
    about = {
        "python": "3.11",
        "packages": {"torch": "2.13"},
        "world_size": 8,
        "device": "cuda:0",
        "threads": 1,
    }
    run_dir.begin(run, config.dump_yaml(flags), identity, about | {"data": {"asr": ["0123456789abcdef"]}})
    packed = run / "shards/asr/train"
    packed.mkdir(parents=True)
    write_json(
        packed / "manifest.json", {"fingerprint": "0123456789abcdef", "examples": 1234, "audio_seconds": 7200}
    )
    monitor = Monitor(run, private_text=False)
    for step in range(1, STEPS + 1):
        monitor.scalars(step, scalars(step))
    monitor.close()
    for step, good in ((0, False), (12, True), (24, True)):
        rows = records(good)
        if step == 24:
            rows[0]["prediction"] = None
        evaluate(run / f"eval/step-{step:08d}", rows)
    evaluate(run / "evaluations/new voice?", records(True)[:30])
    swapped = score_records(records(False)[:30])
    probe = {"swapped": swapped, "verdict": "audio used: the scores fall"}
    write_json(run / "evaluations/new voice?/audio_probe.json", probe)
    (run / "best").write_text("step-00000012\n")
    checkpoint = run / "checkpoints/step-00000024"
    checkpoint.mkdir(parents=True)
    stages = [{"name": "듣기", "weights": [1, 0]}, {"name": "all", "weights": [1, 3]}]
    write_json(checkpoint / "trainer_state.json", {"left_out": [[6, 9]], "plan": {"stages": stages}})
    (run / "superseded-1/checkpoints/step-00000020").mkdir(parents=True)
    write_json(run / "exit_status.json", {"exit_code": 79, "message": f"{HIDDEN}/run: 20 steps not finite"})
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy to change, with few curves: each chart takes its time."""
    copy = Path(shutil.copytree(whole, tmp_path / "run"))
    lines = [{"step": 1, "train/loss": 2.0, "train/learning_rate": 0.1}, {"step": 24, "train/loss": 1.0}]
    (copy / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return copy


@pytest.fixture(scope="session")
def html(whole: Path) -> str:
    return build(read_run(whole))


@pytest.fixture(scope="session")
def text(html: str) -> str:
    return Seen(html).words


def test_the_page_holds_nothing_that_loads_or_leads_away(html: str) -> None:
    seen = check_inert(html)
    assert not [word for word in (HIDDEN, "alice", "output_dir") if word in html]
    assert "http" not in html.replace("http-equiv", "")
    assert not re.search(r"[\"'> ](/home|/tmp|/root|/work)/", html)
    assert seen.tags.count("figure") == seen.tags.count("figcaption") > 12
    assert len(set(seen.values("id"))) == len(seen.values("id"))


@pytest.mark.parametrize(
    "words",
    [
        "Run voxtral-한글",
        "exit code 79 run: 20 steps not finite",
        "Steps 24 3.00 epochs",
        "Best step 12 macro 0.8",
        "Training time 48 s",
        "Ranks 8 cuda:0",
        "Tokens per second 1,000 mean",
        "Audio heard 1.00 h",
        "GPU energy 48.0 Wh 48.0 Wh per audio hour",
        "1 steps changed nothing",
        "2 samples could not be read",
        "passed over steps 7 to 9",
        "superseded-1 holds what was set aside: step-00000020",
        "Step 24, asr: 1 of 30 predictions are missing",
        "asr CER ↓",
        "sqa ROUGE-L F1 ↑",
        "best, step 12",
        "last, step 24",
        "asr 30 0 10.0 %",
        "language ko sqa 15",
        "new voice?: audio used: the scores fall",
        "asr 듣기 100.0 %, all 25.0 % 25.0 % 10.0 % 30.0 % 100.0 %",
        "do not predict how well the tasks generalise",
        "sqa 질문 1 sqa 정답 1 틀린 답 sqa 정답 1",
        "learning_rate 0.003 0.0001",
        "model_id Voxtral –",
        "stages stages.yaml –",
        "asr train asr/train 1,234 2.00 0123456789ab",
        "asr dev n/a n/a n/a fedcba987654",
        "torch 2.13",
    ],
)
def test_the_page_says(text: str, words: str) -> None:
    assert words in text


def test_scores_have_their_intervals(whole: Path, text: str) -> None:
    metrics = read_run(whole).evaluations[12]
    low, high = metrics["intervals"]["asr"]["cer"]
    assert f"{metrics['tasks']['asr']['cer']:.4f} {low:.4f} – {high:.4f}" in text
    assert "too narrow" not in text, "30 speakers"


def test_charts_have_the_stages_and_the_best_step_marked(html: str) -> None:
    assert html.count(">듣기</text>") == html.count(">all</text>") > 10
    assert html.count(">best</text>") == 3


@pytest.mark.parametrize(
    "title",
    [
        *(
            "Loss per target token",
            "Learning rate",
            "Gradient norm",
            "Share of the examples so far",
            "Tokens per second",
        ),
        *(
            "Share lost to padding and to waiting for data",
            "GPU energy since the last start",
            "Balance of the tasks",
        ),
        *("Error rates of transcripts, 0 is perfect", "Cosine of two tasks' gradients, below 0: conflict"),
    ],
)
def test_there_is_a_chart_of(html: str, title: str) -> None:
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", html)
    assert [Seen(caption).text for caption in captions].count(title) == 1


def test_what_was_not_recorded_is_no_chart(html: str) -> None:
    assert "GPU power" not in html and "Loss on dev rows" not in html


def test_links_lead_to_files_of_the_run(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html" and stat.S_IMODE(path.stat().st_mode) == 0o600
    links = [
        unquote(urlsplit(link).path)
        for link in Seen(path.read_text("utf-8")).values("href")
        if not link.startswith("#")
    ]
    assert "metrics.jsonl" in links and "evaluations/new voice?/metrics.json" in links
    assert "eval/step-00000012/predictions.jsonl" in links
    assert all((run / link).exists() and ".." not in link for link in links)


def test_a_page_elsewhere_links_to_nothing(run: Path, tmp_path: Path) -> None:
    html = write_report(run, tmp_path / "page.html").read_text("utf-8")
    assert all(link.startswith("#") for link in Seen(html).values("href")) and "metrics.jsonl" in html


def test_a_private_run_shows_no_text(run: Path) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text("utf-8").replace("private_text: false", "private_text: true"), "utf-8")
    html = build(read_run(run))
    assert not any(word in html for word in ("정답", "질문", "틀린 답")) and "--private_text" in html


def test_hostile_text_of_a_run_is_inert(run: Path, tmp_path: Path) -> None:
    rows = records(True)
    for row in rows:
        row["domain" if row["id"] < "015" else "prediction"] = SHORT
        row["prompt"], row["references"] = SHORT, [SHORT]
    shutil.rmtree(run / "eval/step-00000012")
    evaluate(run / "eval/step-00000012", rows)
    evaluate(run / "evaluations" / '"><script>x<', rows)
    state = {"plan": {"stages": [{"name": SHORT, "weights": [1, 1]}] * 2}}
    write_json(run / "checkpoints/step-00000024/trainer_state.json", state)
    write_json(run / "environment.json", {"packages": {SHORT: SHORT}, "device": SHORT})
    write_json(run / "exit_status.json", {"exit_code": 1, "message": SHORT})
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 24, "interference/cosine_<b>": 1, f"loss/{SHORT}": 1.0}) + "\n")
    (run / "config.yaml").write_text(f"task_weights: '{SHORT}'\n{json.dumps(SHORT)}: 1\n", "utf-8")
    renamed = run.rename(tmp_path / '<b onclick="x">')
    seen = check_inert(build(read_run(renamed)))
    assert seen.text.count(SHORT) > 15 and "b" not in seen.tags


def test_a_forgotten_value_is_an_error(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {}
    with monkeypatch.context() as patch:
        patch.setattr(page, "render", lambda template, **given: values.update(given))
        build(read_run(run))
    assert page.render("run.html", **values)
    del values["name"]
    with pytest.raises(jinja2.UndefinedError, match="name"):
        page.render("run.html", **values)


def without(*names: str) -> Callable[[Path], None]:
    """A change: these files and folders are not there."""

    def remove(run: Path) -> None:
        for name in names:
            path = run / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            without("eval", "best", "exit_status.json"),
            ["Nothing was evaluated", "the run goes on, or it was killed"],
        ),
        (without("metrics.jsonl", "best", "eval/step-00000000"), ["No step was recorded.", "last, step 24"]),
        (
            without("environment.json", "checkpoints", "evaluations", "superseded-1", "shards"),
            ["best, step 12"],
        ),
        (without(*EVERYTHING), ["Nothing was evaluated", "No step was recorded."]),
        (lambda run: (run / "best").write_text("step-00000099"), ["last, step 24"]),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"step": 1\n[]\n{"step": 2, "a": "b"}\n'),
            ["not in the curves: 3"],
        ),
    ],
)
def test_a_run_that_lacks_something_still_has_a_page(
    run: Path, change: Callable[[Path], Any], words: list[str]
) -> None:
    change(run)
    text = Seen(build(read_run(run))).words
    assert all(sentence in text for sentence in words)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (without("identity.json"), "no run directory"),
        (without("config.yaml"), "no run directory"),
        (lambda run: (run / "identity.json").write_text("{"), "identity.json"),
        (lambda run: (run / "eval/step-00000012/metrics.json").write_text("[]"), "metrics.json"),
        (lambda run: (run / "eval/step-00000012/metrics.json").write_text('{"tasks": {}}'), "metrics.json"),
    ],
)
def test_a_damaged_run_is_an_error_of_one_line(run: Path, change: Callable[[Path], Any], word: str) -> None:
    change(run)
    with pytest.raises(UserError, match=word):
        read_run(run)


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = load_script("tools/report_run.py").main
    main([str(run)])
    assert capsys.readouterr().out.strip() == f"written: {run / 'report.html'}"
    with pytest.raises(UserError, match=r"--out .*page\.html"):
        main([str(run), "--out", str(tmp_path / "no/page.html")])
    command = [sys.executable, "tools/report_run.py", str(tmp_path)]
    refused = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False
    )
    assert (
        refused.returncode == 2 and refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
    )


def test_a_long_curve_keeps_its_shape_in_few_points() -> None:
    curve = Curve()
    for step in range(1, 10_001):
        curve.add(step, 50.0 if step == 7_777 else float(step % 2))
    steps, means, low, high = curve.points()
    assert MOST_BINS / 2 <= len(steps) <= MOST_BINS and steps == sorted(steps)
    assert (curve.count, curve.last, curve.total) == (10_000, 0.0, 5_049.0)
    assert max(high) == 50.0 and min(low) == 0.0 and abs(means[0] - 0.5) < 0.01 and abs(steps[0] - 32) < 1
    short = Curve()
    short.add(5, 1.0)
    assert short.points() == ([5.0], [1.0], [1.0], [1.0])


def test_a_counter_survives_restarts() -> None:
    curve = Curve()
    for step, value in enumerate((1.0, 2.0, 5.0, 1.0, 4.0, 2.0)):
        curve.add(step, value)
    assert curve.grown == 5 + 4 + 2


def test_metrics_are_read_with_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    filler = json.dumps({"x" * 500: None})[1:]
    lines = (f'{{"step": {step}, "loss/asr": 0.123456789, {filler}' for step in range(1, 3_001))
    path.write_text("\n".join(lines))
    tracemalloc.start()
    log = read_log(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert log.curves["loss/asr"].count == 3_000 and peak < path.stat().st_size / 4


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (f"{HIDDEN}/asr/train", "asr/train"),
        (f"{HIDDEN}/train", "train"),
        ("mistralai/Voxtral-Mini-3B-2507", "mistralai/Voxtral-Mini-3B-2507"),
        ("s3://alice/sets/tqa/dev", "tqa/dev"),
        ("/alice", "alice"),
        ("../alice/x", "x"),
        ("~/x", "x"),
        ("asr=1,tqa=2", "asr=1,tqa=2"),
    ],
)
def test_paths_are_shown_by_their_last_parts(value: str, shown: str) -> None:
    assert short_path(value) == shown


def test_settings_are_shown_as_they_are_written() -> None:
    shown = [setting(value) for value in (True, None, "", ["/a/b", "c"], 0.0001, 3)]
    assert shown == ["true", "auto", "–", "b, c", "0.0001", "3"]


@pytest.mark.slow
def test_training_ends_with_the_page_and_never_fails_by_it(demo: Demo, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = demo.flags(out, "--max_steps", "2", "--eval_steps", "0")
    process = alone(flags, out)
    html = (out / "report.html").read_text("utf-8")
    check_inert(html)
    assert f"report: {out}/report.html" in process.text and ">finished<" in html and str(tmp_path) not in html
    assert "Nothing was evaluated" not in html and "2 samples" not in html
    blocked = tmp_path / "blocked"
    (blocked / "report.html").mkdir(parents=True)
    again = alone(demo.flags(blocked, "--max_steps", "2", "--eval_steps", "0"), blocked)
    assert "no report.html" in again.text and "finished: adapter in" in again.text
