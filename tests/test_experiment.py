"""Experiments: what each arm becomes, what is skipped, what a job script says, how arms end, what is compared."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from demo_runs import TASKS, Demo, environment
from harness import ROOT, load_script

from voxtral_dist import record_scores
from voxtral_dist.atomic import write_json
from voxtral_dist.errors import Preempted, UserError, VoxtralDistError
from voxtral_dist.experiment import FINAL, GUARD, TRAIN, Experiment, Job

ARMS = {"multi": {}, "asr_only": {"task_weights": "asr=1"}}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_script("tools/run_experiment.py")


@pytest.fixture
def base(demo: Demo) -> dict[str, Any]:
    """Flags of a short run on packed data."""
    flags = dict(
        zip((f.removeprefix("--") for f in demo.data("shards")[::2]), demo.data("shards")[1::2], strict=True)
    )
    quick = {"max_steps": 2, "max_len": 128, "lora_dropout": 0, "eval_max_new_tokens": 4, "num_workers": 1}
    return {**flags, **quick, "global_batch_size": 12}


@pytest.fixture
def write(tmp_path: Path, base: dict[str, Any]) -> Callable[..., Path]:
    """Writes an experiment of the short run with some keys changed."""

    def write_one(**values: Any) -> Path:
        path = tmp_path / "experiment.yaml"
        known = {"output_dir": str(tmp_path / "out"), "base": base, "arms": ARMS, **values}
        path.write_text(
            yaml.safe_dump({k: v for k, v in known.items() if v is not None}, sort_keys=False), "utf-8"
        )
        return path

    return write_one


def jobs(experiment: Experiment) -> dict[str, Job]:
    return {job.name: job for job in experiment.jobs}


def finish(job: Job, step: str, wrong: int = 0, tasks: tuple[str, ...] = TASKS) -> None:
    """An evaluation of eight samples per task as it would lie there, ``wrong`` of which are answered wrong."""
    job.write_flags()
    records = []
    for task in tasks:
        for number in range(8):
            text = f"{number} and {task}"
            about = {
                "id": f"{number:02d}",
                "language": "ko" if number % 2 else "en",
                "domain": "",
                "speaker": "",
            }
            about |= {"document": "", "audio_path": "", "duration": 1.0, "prompt": "", "references": [text]}
            answer = {
                "prediction": "no" if number < wrong else text,
                "n_new_tokens": 3,
                "hit_max": False,
                "error": "",
            }
            records.append({"task": task, **about, **answer, "metrics": {}})
    metrics = record_scores.score_records(records)
    folder = job.evaluation(step)
    folder.mkdir(parents=True)
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "predictions.jsonl").write_text("".join(lines), "utf-8")
    write_json(folder / "metrics.json", metrics | {"provenance": {}})


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"arm": {}}, r"unknown key 'arm'; known keys are output_dir, base, arms, seeds"),
    "no folder": ({"output_dir": None}, "output_dir is missing"),
    "no base": ({"base": None}, "base is missing"),
    "base file": ({"base": "none.yaml"}, r"none\.yaml cannot be read"),
    "no arms": ({"arms": {}}, "arms is missing"),
    "arms as a list": ({"arms": ["a"]}, "arms is .* lines of 'name: value'"),
    "arm without flags": ({"arms": {"a": None}}, r"arm a: None holds no 'flag: value'; \{\} is the base"),
    "arm that is no folder": ({"arms": {"../a": {}}}, "arm '../a' becomes a folder"),
    "slip in an arm": (
        {"arms": {"a": {"learning_rat": 1}}},
        "arm a: unknown flag 'learning_rat'; did you mean learning_r",
    ),
    "seed of an arm": ({"arms": {"a": {"seed": 1}}}, "arm a: seed is set by the experiment"),
    "flag that training refuses": (
        {"arms": {"a": {"lora_r": 0}}},
        "arm a: --lora_r 0 is not a number of at least 1",
    ),
    "value of a wrong type": ({"arms": {"a": {"max_steps": "ten"}}}, "arm a: train.py: .*max_steps"),
    "filter of packed sets": (
        {"arms": {"a": {"train_where": "domain=x"}}},
        "arm a: --train_where 'domain=x': packed",
    ),
    "seeds": ({"seeds": 3}, r"seeds 3 is no list of whole numbers"),
    "task without data": (
        {"arms": {"a": {"task_weights": "ast=1"}}},
        "names 'ast', train_shards holds asr, sqa, tqa",
    ),
    "slip in evaluate": (
        {"evaluate": {"max_new_tokens": 4}},
        "evaluate: unknown flag 'max_new_tokens'; did you mean",
    ),
    "guard without data": (
        {"guard": {"per_device_bsz": 2}},
        "guard: --val_shards and --val_jsonl: neither is given",
    ),
    "field": ({"leave_one_out": "speaker"}, "leave_one_out 'speaker' is neither of domain, language"),
    "leave-one-out of packed sets": (
        {"leave_one_out": "domain"},
        "leave_one_out domain filters rows; give train",
    ),
    "slurm on two machines": ({"slurm": {"nodes": 2}}, "slurm: nodes: 2: an arm trains on one machine"),
    "slurm time": ({"slurm": {"time": 14400}}, "slurm: time is 14400: YAML takes 4:00:00 for a number"),
    "slurm option": ({"slurm": {"gpus": [1]}}, r"slurm: gpus: \[1\] is no option"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_one_line(
    write: Callable[..., Path], tool: ModuleType, tmp_path: Path, case: str
) -> None:
    values, message = MALFORMED[case]
    with pytest.raises(UserError, match=message) as caught:
        tool.main([str(write(**values)), "--dry_run"])
    assert str(caught.value).startswith(f"{tmp_path / 'experiment.yaml'}: ") and "\n" not in str(caught.value)


def test_what_the_arms_become(write: Callable[..., Path], base: dict[str, Any], tmp_path: Path) -> None:
    found = jobs(Experiment.read(write(seeds=[0, 3], evaluate={"per_device_bsz": 2})))
    assert list(found) == [
        "base model",
        "multi, seed 0",
        "asr_only, seed 0",
        "multi, seed 3",
        "asr_only, seed 3",
    ]
    multi, asr = found["multi, seed 3"], found["asr_only, seed 0"]
    assert multi.folder == tmp_path / "out/arms/multi/seed-3"
    train = multi.steps[TRAIN]
    assert {name: train[name] for name in base} == base
    assert (train["seed"], train["output_dir"], train["learning_rate"]) == (3, str(multi.folder), 1e-4)
    assert asr.steps[TRAIN]["train_shards"] == base["train_shards"].split(",")[0], "the others have no weight"
    assert asr.steps[TRAIN]["val_shards"] == base["val_shards"]
    final = multi.steps[FINAL]
    assert (final["lora_dir"], final["output_dir"]) == (
        str(multi.folder),
        f"{multi.folder}/evaluations/final",
    )
    assert (final["val_shards"], final["max_len"], final["gen_max_new_tokens"]) == (
        base["val_shards"],
        128,
        4,
    )
    assert (final["per_device_bsz"], train["per_device_bsz"]) == (2, 4)
    model = found["base model"]
    assert list(model.steps) == [FINAL] and model.steps[FINAL]["lora_dir"] == ""
    assert model.steps[FINAL]["output_dir"] == str(tmp_path / "out/base/evaluations/final")


def test_single_task_arms_are_told_by_their_weights(write: Callable[..., Path]) -> None:
    arms = {
        "all": {"task_weights": "1,2,3"},
        "pair": {"task_weights": "asr=1, tqa=2"},
        "text": {"task_weights": "tqa=5"},
    }
    experiment = Experiment.read(write(arms=arms))
    assert experiment.single_task == {"tqa": "text"}
    pair = jobs(experiment)["pair, seed 0"].steps[TRAIN]
    assert [Path(name).parent.name for name in pair["train_shards"].split(",")] == ["asr", "tqa"]


def test_the_base_may_be_the_settings_of_a_run(
    write: Callable[..., Path], base: dict[str, Any], tmp_path: Path
) -> None:
    """Its seed is used, its directory is not."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({**base, "output_dir": "runs/old", "seed": 5, "bf16": None}), "utf-8")
    (model, multi, _) = Experiment.read(write(base=str(file))).jobs
    assert (multi.name, multi.steps[TRAIN]["bf16"]) == ("multi, seed 5", None)
    assert str(multi.folder).startswith(str(tmp_path)) and str(model.folder).startswith(str(tmp_path))


def from_jsonl(base: dict[str, Any], demo: Demo) -> dict[str, Any]:
    files = ",".join(str(demo.folder / f"{task}.train.jsonl") for task in TASKS)
    return {name: value for name, value in base.items() if name != "train_shards"} | {"train_jsonl": files}


def test_leave_one_out_makes_an_arm_per_value(
    write: Callable[..., Path], base: dict[str, Any], demo: Demo
) -> None:
    rows = from_jsonl(base, demo) | {"train_where": "domain!=fast"}
    experiment = Experiment.read(write(base=rows, leave_one_out="domain", arms=None))
    wheres = {job.arm: job.steps[TRAIN]["train_where"] for job in experiment.jobs if job.arm}
    assert wheres == {
        "full": "domain!=fast",
        "without_digits": "domain!=fast; domain!=digits",
        "without_slow": "domain!=fast; domain!=slow",
    }
    assert experiment.without == {"digits": "without_digits", "slow": "without_slow"}
    own = {"more": {"task_weights": "asr=1,sqa=1"}}
    experiment = Experiment.read(write(base=rows, leave_one_out="language", arms=own))
    assert list(experiment.arms) == ["full", "without_en", "without_ko", "more"]
    assert jobs(experiment)["more, seed 0"].steps[TRAIN]["train_where"] == "domain!=fast; task=asr,sqa"
    with pytest.raises(UserError, match="arm full is one of leave_one_out already"):
        Experiment.read(write(base=rows, leave_one_out="language", arms={"full": {}}))
    with pytest.raises(
        UserError, match=r"arm red: train_where 'colour=red': 'colour=red' is not FIELD=VALUE"
    ):
        Experiment.read(write(base=rows, arms={"red": {"train_where": "colour=red"}}))
    one = {**rows, "train_where": "domain=fast"}
    with pytest.raises(UserError, match="leave_one_out domain: the training rows have 1 values of it"):
        Experiment.read(write(base=one, leave_one_out="domain", arms=None))


EXAMPLES = [path for path in sorted(ROOT.glob("launch/*.example.yaml")) if "base:" in path.read_text("utf-8")]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_run_as_they_stand(
    example: Path,
    demo: Demo,
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "runs" / "quickstart"
    run.mkdir(parents=True)
    for name, target in (
        ("base_model", demo.model),
        ("demo", demo.folder),
        ("shards", demo.folder / "shards"),
    ):
        (run / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    tool.main([str(example), "--dry_run"])
    shown = capsys.readouterr().out
    assert "base model: as the base; to do: final" in shown and "to do: train, final" in shown
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["quickstart"], (
        "a dry run wrote something"
    )


def test_what_is_finished_is_left_alone(write: Callable[..., Path], tmp_path: Path) -> None:
    multi = jobs(Experiment.read(write()))["multi, seed 0"]
    assert multi.left() == [TRAIN, FINAL]
    finish(multi, FINAL)
    assert multi.left() == []
    multi.check_unchanged()
    guarded = jobs(Experiment.read(write(guard={"val_jsonl": "g.jsonl"})))["multi, seed 0"]
    assert guarded.left() == [GUARD] and guarded.steps[GUARD]["val_shards"] == ""
    (tmp_path / "out").rename(tmp_path / "moved")
    moved = jobs(Experiment.read(write(output_dir=str(tmp_path / "moved"))))["multi, seed 0"]
    moved.check_unchanged()


def test_a_finished_arm_of_other_flags_is_an_error(
    write: Callable[..., Path], tool: ModuleType, base: dict[str, Any]
) -> None:
    finish(jobs(Experiment.read(write()))["multi, seed 0"], FINAL)
    with pytest.raises(
        UserError, match=r"multi, seed 0 is finished, but .* flags \(learning_rate: 0.0001 -> 0.1\)"
    ):
        tool.main([str(write(base={**base, "learning_rate": 0.1})), "--dry_run"])
    with pytest.raises(
        UserError, match=r"gen_max_new_tokens: 4 -> 9\); .* remove \S+/evaluations/final to do"
    ):
        tool.main([str(write(evaluate={"gen_max_new_tokens": 9})), "--dry_run"])
    Experiment.read(write(arms={"other": {"learning_rate": 0.1}})).jobs[1].check_unchanged()


def stand_in(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Steps run a piece of Python in place of a training; it knows ``arm`` and ``step``."""

    def command(job: Job, step: str) -> list[str]:
        return [sys.executable, "-c", f"arm, step = {job.arm!r}, {step!r}\n{code}"]

    monkeypatch.setattr(tool, "command", command)


def test_a_failed_arm_is_told_and_the_others_go_on(
    write: Callable[..., Path],
    tool: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = write()
    for name, job in jobs(Experiment.read(path)).items():
        if name != "multi, seed 0":
            finish(job, FINAL, tasks=("tqa",))
    stand_in(tool, monkeypatch, "import sys; print('error: no rows'); print('more'); sys.exit(2)")
    with pytest.raises(VoxtralDistError, match=r"1 of 3 failed: multi, seed 0 \(exit code 2\)") as caught:
        tool.main([str(path)])
    assert caught.value.exit_code == 1
    shown = capfd.readouterr().out
    assert "multi, seed 0: train failed with exit code 2: error: no rows; see" in shown
    log = tmp_path / "out/arms/multi/seed-0.log"
    assert (
        log.read_text().splitlines() == ["error: no rows", "more"]
        and stat.S_IMODE(log.stat().st_mode) == 0o600
    )
    assert (tmp_path / "out/comparison.html").is_file(), "the base model and the other arm are there"


def test_a_preempted_arm_stops_the_experiment(
    write: Callable[..., Path], tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tool, monkeypatch, "import sys; sys.exit(75 if arm else 0)")
    with pytest.raises(Preempted, match="stopped in multi, seed 0, train; the same command goes on"):
        tool.main([str(write())])
    assert not (tmp_path / "out/arms/asr_only").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_arm_and_ends_it(
    write: Callable[..., Path], tmp_path: Path, number: signal.Signals
) -> None:
    """The child says which signal it got, once, and takes its time; nothing is left running, nothing else is started.

    It has a session of its own, so that Ctrl-C does not reach it twice, which would end it at once.
    """
    code = f"""
import os, signal, sys, time
got = []
def stop(number, frame):
    got.append(number); print("got", number, flush=True)
signal.signal({int(number)}, stop)
print("ready", os.getsid(0) == os.getpid(), flush=True)
while not got: time.sleep(0.01)
time.sleep(0.3); sys.exit(75)
"""
    script = f"""
import sys; sys.path[:0] = [{str(ROOT / "tests")!r}, {str(ROOT)!r}]
from harness import load_script
from voxtral_dist.errors import run_main
tool = load_script("tools/run_experiment.py")
tool.command = lambda job, step: [sys.executable, "-c", {code!r}]
run_main(lambda: tool.main([{str(write())!r}]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    log = tmp_path / "out/base.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and "ready" in log.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, number)  # as Ctrl-C does; the arm still gets it once
    error = process.communicate(timeout=60)[1]
    assert (
        process.returncode == 75
        and error == "error: stopped in base model, final; the same command goes on\n"
    )
    assert log.read_text().split("\n") == ["ready True", f"got {int(number)}", ""]
    assert not (tmp_path / "out/arms").exists()


SBATCH = """#!/usr/bin/env bash
echo "$@" >>"$CALLS"
if [ -n "${REFUSE:-}" ]; then echo "no such partition" >&2; exit 1; fi
echo "$((100 + $(wc -l <"$CALLS")));cluster"
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sbatch on PATH that writes its arguments down and gives the jobs numbers from 101."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sbatch").write_text(SBATCH)
    (tmp_path / "bin/sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


def test_slurm_gets_a_job_per_arm_and_one_that_compares(
    write: Callable[..., Path], tool: ModuleType, calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "a folder"
    work.mkdir()
    monkeypatch.chdir(work)
    options = {"partition": "gpu", "gpus": 8, "cpus_per_task": 64, "exclusive": True, "requeue": False}
    path = write(slurm=options, nproc=8, launcher="torchrun")
    finish(jobs(Experiment.read(path))["base model"], FINAL)
    tool.main([str(path), "--slurm"])
    out = tmp_path / "out"
    arms = [out / f"arms/{arm}/seed-0.sbatch" for arm in ARMS]
    assert calls.read_text().splitlines() == [
        *(f"--parsable {script}" for script in arms),
        f"--parsable --dependency=afterany:101:102 {out / 'comparison.sbatch'}",
    ]
    for script in (*arms, out / "comparison.sbatch"):
        subprocess.run(["bash", "-n", str(script)], check=True)
    head, _, body = arms[0].read_text().partition("set -euo pipefail\n")
    assert head.splitlines() == [
        "#!/usr/bin/env bash",
        "#SBATCH --job-name=multi-multi-seed-0",
        f"#SBATCH --output={out}/arms/multi/seed-0.log",
        "#SBATCH --open-mode=append",
        "#SBATCH --partition=gpu",
        "#SBATCH --gpus=8",
        "#SBATCH --cpus-per-task=64",
        "#SBATCH --exclusive",
    ]
    assert body.splitlines() == [
        f"cd '{work}'",
        "export NPROC=8",
        "export LAUNCHER=torchrun",
        f"bash {ROOT}/launch/train.sh --config {out}/arms/multi/seed-0.train.yaml",
        f"bash {ROOT}/launch/evaluate.sh --config {out}/arms/multi/seed-0.final.yaml",
    ]
    last = (out / "comparison.sbatch").read_text()
    assert "--partition=gpu" in last and "--gpus" not in last
    assert f"run_experiment.py {path} --compare" in last
    read = yaml.safe_load((out / "arms/multi/seed-0.train.yaml").read_text())
    assert read["output_dir"] == str(out / "arms/multi/seed-0")


def test_what_slurm_refuses_is_told(
    write: Callable[..., Path], tool: ModuleType, calls: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSE", "yes")
    with pytest.raises(VoxtralDistError, match=r"sbatch refused \S+base.sbatch: no such partition"):
        tool.main([str(write()), "--slurm"])
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UserError, match="there is no sbatch on PATH"):
        tool.main([str(write()), "--slurm"])


def test_flags_in_a_file_are_found_by_the_launcher(write: Callable[..., Path], tmp_path: Path) -> None:
    """launch/run_ranks.sh looks for ``output_dir:`` at the start of a line, also in a folder with blanks."""
    out = tmp_path / ("long name " * 12)
    (_, job, _) = Experiment.read(write(output_dir=str(out))).jobs
    job.write_flags()
    lines = job.beside("train.yaml").read_text("utf-8").splitlines()
    assert f"output_dir: {job.folder}" in lines


def test_finished_arms_are_compared(
    write: Callable[..., Path], tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transfer against the single-task arm, forgetting on the guard set, the spread over seeds."""
    path = write(seeds=[0, 1], guard={"val_jsonl": "g.jsonl"})
    wrong = {
        "base model": 8,
        "multi, seed 0": 4,
        "asr_only, seed 0": 2,
        "multi, seed 1": 0,
        "asr_only, seed 1": 2,
    }
    for name, job in jobs(Experiment.read(path)).items():
        finish(job, FINAL, wrong[name])
        finish(job, GUARD, 2 if name == "multi, seed 0" else 0, tasks=("tqa",))
    tool.main([str(path)])
    found = json.loads((tmp_path / "out/comparison.json").read_text("utf-8"))
    assert found["results"] == ["multi", "asr_only"]
    assert [row["name"] for row in found["transfer"]["rows"]] == ["base model", "asr only", "multi"]
    assert found["transfer"]["rows"][2]["cells"]["asr"]["transfer"] < 0
    assert found["forgetting"]["multi"]["rows"][0]["forgetting"] == 0.25
    assert found["seeds"]["multi"]["sqa rouge_l_f1"] == {"0": 0.5, "1": 1.0}
    assert found["arms"]["multi"]["sqa rouge_l_f1"] == "0.7500 (0.5000 to 1.0000, 2 seeds)"
    shown = capsys.readouterr().out
    assert "asr cer" in shown and "written: " in shown and "comparison.json" in shown
    page = (tmp_path / "out/comparison.html").read_text("utf-8")
    tool.main([str(path), "--compare"])
    assert (tmp_path / "out/comparison.html").read_text("utf-8") == page, "twice the same"
    assert "0.7500 (0.5000 to 1.0000, 2 seeds)" in page and str(tmp_path) not in page


def test_left_out_values_are_compared_where_they_are_tried(
    write: Callable[..., Path], base: dict[str, Any], demo: Demo, tool: ModuleType, tmp_path: Path
) -> None:
    path = write(base=from_jsonl(base, demo), leave_one_out="language", arms=None)
    for name, job in jobs(Experiment.read(path)).items():
        finish(job, FINAL, 8 if "ko" in name else 0, tasks=("asr", "sqa"))
    tool.main([str(path), "--compare"])
    found = json.loads((tmp_path / "out/comparison.json").read_text("utf-8"))["leave_one_out"]
    assert (found["field"], found["full"]) == ("language", "full")
    assert {(row["value"], row["task"]) for row in found["rows"]} == {
        (v, t) for v in ("ko", "en") for t in TASKS[:2]
    }
    scores = {row["value"]: (row["a"], row["b"]) for row in found["rows"] if row["task"] == "sqa"}
    assert scores == {"ko": (0.0, 1.0), "en": (1.0, 1.0)}


def test_values_that_the_dev_data_lacks_are_left_out(
    write: Callable[..., Path], base: dict[str, Any], demo: Demo, tool: ModuleType, tmp_path: Path
) -> None:
    path = write(base=from_jsonl(base, demo), leave_one_out="domain", arms=None)
    for job in Experiment.read(path).jobs:
        finish(job, FINAL, tasks=("tqa",))
    tool.main([str(path), "--compare"])
    assert "leave_one_out" not in json.loads((tmp_path / "out/comparison.json").read_text("utf-8"))


def test_nothing_to_compare_is_an_error(write: Callable[..., Path], tool: ModuleType) -> None:
    with pytest.raises(UserError, match="0 arms have a result under seed 0; a comparison takes two"):
        tool.main([str(write()), "--compare"])


def test_progress_of_a_run(tool: ModuleType, tmp_path: Path) -> None:
    record = tmp_path / "metrics.jsonl"
    assert tool.progress(record) == (None, None)
    steps = [{"step": n, "speed/eta_hours": 1.0 - n / 100, "filler": "x" * 300} for n in range(1, 60)]
    record.write_text(
        "".join(json.dumps(line) + "\n" for line in steps) + json.dumps({"step": 59, "eval/macro": 1})
    )
    assert tool.progress(record) == (59, pytest.approx(3600 * 0.41))


@pytest.mark.slow
def test_two_arms_for_real(write: Callable[..., Path], tool: ModuleType, tmp_path: Path) -> None:
    """Trained, evaluated, compared; a second call finds all of it finished and writes the same."""
    path = write(nproc=1, launcher="python")
    command = [sys.executable, "tools/run_experiment.py", str(path)]
    environ = environment(VOXTRAL_DIST_PYTHON=sys.executable)
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    for arm in ARMS:
        run = out / "arms" / arm / "seed-0"
        assert json.loads((run / "exit_status.json").read_text())["exit_code"] == 0
        assert (run / "evaluations/final/predictions.jsonl").is_file()
        mix = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
        assert ("mix/sqa" in mix) == (arm == "multi") and "mix/asr" in mix
    assert json.loads((out / "comparison.json").read_text("utf-8"))["results"] == list(ARMS)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file() and "comparison" not in p.name}
    before.pop(out / "experiment.yaml")
    pages = [(out / name).read_bytes() for name in ("comparison.html", "comparison.json")]
    again = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and again.stdout.count("finished") == 3
    assert [(out / name).read_bytes() for name in ("comparison.html", "comparison.json")] == pages
    assert {p: p.stat().st_mtime_ns for p in before} == before
