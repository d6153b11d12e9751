"""Wrong input ends in one line that names it and in exit code 2, and nothing half-written stays behind.

The programs run in this process, where their error is the exception that their wrapper turns into line and exit code;
one real call of each program shows that it does.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from demo_runs import Demo
from harness import ROOT, load_script

from voxtral_dist import command_line, prepare, run_dir, training_run
from voxtral_dist import config as settings
from voxtral_dist.config import TrainConfig, split_list
from voxtral_dist.distributed import World
from voxtral_dist.errors import UserError
from voxtral_dist.packing import pack
from voxtral_dist.task_data import open_tasks

WORLD = World(0, 0, 1)
RANK_NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_PROCID",
    "SLURM_NTASKS",
)
Rows = list[dict[str, Any]]
Call = Callable[..., str]


@pytest.fixture(scope="module")
def demo(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the demo, to put bad rows and sounds into: JSONL files, audio, ``shards/<task>/{train,dev}``."""
    return Path(shutil.copytree(demo.folder, tmp_path_factory.mktemp("bad_input"), dirs_exist_ok=True))


def shards(demo: Path, split: str, *tasks: str) -> str:
    return ",".join(str(demo / "shards" / task / split) for task in tasks or ("asr", "sqa", "tqa"))


def refused(program: str, *flags: str) -> str:
    """Run launch/PROGRAM.py with wrong flags; its one line."""
    script = load_script(f"launch/{program}.py")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(sys, "argv", [f"{program}.py", *flags])
        script.run(WORLD)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def train(tiny_model: Path, demo: Path, tmp_path: Path) -> Call:
    """``train(*flags)``: the error of launch/train.py on good flags and these; nothing of a run is left behind."""

    def call(*flags: str, data: tuple[str, ...] = ()) -> str:
        data = data or ("--train_shards", shards(demo, "train"))
        out = tmp_path / "out"
        message = refused(
            "train",
            "--model_id",
            str(tiny_model),
            "--output_dir",
            str(out),
            "--max_len",
            "128",
            *data,
            *flags,
        )
        assert not traces(out)
        return message

    return call


def traces(out: Path) -> list[str]:
    """What a program writes only when all its input is right."""
    names = ("manifest.json", "config.yaml", "identity.json", "checkpoints", "metrics.jsonl", "eval")
    return [str(path) for path in out.rglob("*") if path.name in names]


def command(program: str, *flags: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """A real call of a program."""
    clean = {name: value for name, value in os.environ.items() if name not in RANK_NAMES}
    return subprocess.run(
        [sys.executable, program, *flags],
        cwd=ROOT,
        env=clean | {"PYTHONPATH": str(ROOT)} | environ,
        capture_output=True,
        text=True,
        check=False,
    )


def assert_one_line(result: subprocess.CompletedProcess[str], *words: str) -> None:
    lines = [line for line in result.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    assert all(word in lines[0] for word in words), lines[0]


def write_rows(demo: Path, name: str, second: str) -> Path:
    """An ASR file whose second line is ``second``, beside the demo's audio."""
    good = (demo / "asr.train.jsonl").read_text("utf-8").splitlines()
    path = demo / f"{name}.jsonl"
    path.write_text("\n".join([good[0], second, *good[2:]]) + "\n", encoding="utf-8")
    return path


def row(**changes: Any) -> str:
    """A good ASR row with changes; None takes a field out."""
    values = {
        "id": "x",
        "audio_path": "audio/train-00001.flac",
        "transcript": "one",
        "language": "en",
    } | changes
    return json.dumps({name: value for name, value in values.items() if value is not None})


BAD_ROWS = {
    "missing audio": (row(audio_path="audio/nowhere.flac"), "does not exist"),
    "unreadable audio": (row(audio_path="audio/garbage.flac"), "garbage.flac"),
    "empty audio": (row(audio_path="audio/empty.wav"), "empty.wav"),
    "empty transcript": (row(transcript="  "), "transcript"),
    "transcript of another type": (row(transcript=7), "transcript"),
    "invalid JSON": ('{"id": "x", ', "invalid JSON"),
    "no object": ("[1, 2]", "list"),
    "unknown key": (row(trancript="one"), "'trancript'"),
    "two tasks": (row(answer="one", question="which?"), "asr and sqa"),
    "no task": (row(audio_path=None), "fit no task"),
    "unknown task": (row(task="stt"), "'stt'"),
    "language": (row(language="english"), "'english'"),
    "id twice": (row(id="asr-train-00000"), "asr-train-00000"),
}


@pytest.fixture(params=BAD_ROWS)
def bad_rows(request: pytest.FixtureRequest, demo: Path) -> tuple[Path, str]:
    """A file whose second line is wrong, and a word that tells how."""
    (demo / "audio" / "garbage.flac").write_bytes(b"fLaC" + bytes(100))
    (demo / "audio" / "empty.wav").write_bytes(b"")
    line, word = BAD_ROWS[request.param]
    return write_rows(demo, request.param.replace(" ", "_"), line), word


def test_bad_row_in_the_builder(bad_rows: tuple[Path, str], tmp_path: Path) -> None:
    path, word = bad_rows
    builder = load_script("tools/build_shards.py")
    for flags in (["--out", str(tmp_path / "out")], ["--check"]):
        with pytest.raises(UserError) as caught:
            builder.main(["--jsonl", str(path), *flags])
        assert f"{path}:2" in str(caught.value) and word in str(caught.value)
    assert not traces(tmp_path)


def test_bad_row_in_training(bad_rows: tuple[Path, str], train: Call) -> None:
    path, word = bad_rows
    message = train(data=("--train_jsonl", str(path)))
    assert f"{path}:2" in message and word in message


def test_real_call_of_the_builder(demo: Path, tmp_path: Path) -> None:
    path = write_rows(demo, "real_builder", "{nothing")
    result = command("tools/build_shards.py", "--jsonl", str(path), "--out", str(tmp_path / "out"))
    assert_one_line(result, f"{path}:2", "invalid JSON")
    assert not traces(tmp_path)
    result = command("tools/build_shards.py", "--jsonl", str(path), "--outt", str(tmp_path))
    assert result.returncode == 2 and "--outt" in result.stderr and "Traceback" not in result.stderr


def test_real_call_of_training(demo: Path, tiny_model: Path, tmp_path: Path) -> None:
    path = write_rows(demo, "real_training", row(audio_path="audio/nowhere.flac"))
    flags = ("--model_id", str(tiny_model), "--train_jsonl", str(path), "--output_dir", str(tmp_path / "out"))
    result = command("launch/train.py", *flags)
    assert_one_line(result, f"{path}:2", "audio/nowhere.flac")
    assert json.loads((tmp_path / "out" / "exit_status.json").read_text())["exit_code"] == 2
    assert not traces(tmp_path / "out")


def test_real_call_of_evaluation(demo: Path, tiny_model: Path, tmp_path: Path) -> None:
    flags = (
        "--model_id",
        str(tiny_model),
        "--val_shards",
        shards(demo, "dev"),
        "--output_dir",
        str(tmp_path),
    )
    assert_one_line(
        command("launch/evaluate.py", *flags, "--max_len", "20"), "--max_len 20", "never leaves a row out"
    )
    assert not traces(tmp_path)


@pytest.mark.parametrize(
    ("environ", "word"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "rank 2 of world size 2"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "'two'"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "MASTER_ADDR"),
    ],
)
def test_ranks_that_make_no_sense(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environ: dict[str, str], word: str
) -> None:
    for name in RANK_NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    for program in ("train", "evaluate"):
        with pytest.raises(SystemExit) as caught:
            load_script(f"launch/{program}.py").main()
        line = capsys.readouterr().err
        assert (
            caught.value.code == 2 and line.startswith("error: ") and word in line and line.count("\n") == 1
        )


def test_only_rank_0_tells_the_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environ = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for rank, told in (("0", 1), ("1", 0)):
        for name, value in (environ | {"RANK": rank}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["train.py", "--nonsense"])
        with pytest.raises(SystemExit) as caught:
            load_script("launch/train.py").main()
        assert caught.value.code == 2 and capsys.readouterr().err.count("error: ") == told


@pytest.mark.parametrize(
    ("weights", "word"),
    [
        ("nan,1,1", "nan is not between"),
        ("1,-1,1", "-1 is not between"),
        ("1,0,1", "0 is not between"),
        ("inf,1,1", "inf is not between"),
        ("1,2", "2 weights for 3 tasks"),
        ("one,1,1", "'one'"),
        ("asr=1,sqa=1", "tqa"),
        ("asr=1,sqa=1,tqa=1,st=1", "'st'"),
    ],
)
def test_task_weights(train: Call, weights: str, word: str) -> None:
    message = train("--task_weights", weights)
    assert "--task_weights" in message and word in message


def test_three_weights_for_two_tasks(train: Call, demo: Path) -> None:
    message = train("--task_weights", "1,2,3", data=("--train_shards", shards(demo, "train", "asr", "tqa")))
    assert "3 weights for 2 tasks (asr, tqa)" in message


@pytest.mark.parametrize("caps", ["asr=0", "asr", "st=1", "asr=x"])
def test_task_batch_sizes(train: Call, caps: str) -> None:
    assert "--task_batch_sizes" in train("--task_batch_sizes", caps)


def test_too_long_examples_are_counted_and_left_out_on_request(
    train: Call, tiny_model: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(model_id=str(tiny_model))
    (task,) = open_tasks([demo / "shards" / "tqa" / "train"], prepare.open_collator(config))
    positions = task.positions(np.arange(len(task)))
    max_len = int(sorted(positions)[8])
    too_long = int((positions > max_len).sum())
    longest = task.sets[0].sample(int(positions.argmax())).source
    assert 0 < too_long < len(task)
    data = ("--train_shards", shards(demo, "train", "tqa"), "--max_len", str(max_len))
    message = train(data=data)
    assert (
        f"{too_long} of {len(task)} tqa examples" in message
        and longest in message
        and "--max_overlong_rate" in message
    )

    flags = ("--model_id", str(tiny_model), "--output_dir", str(tmp_path / "out"), "--max_overlong_rate", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *flags, *data, "--dry_run"])
        load_script("launch/train.py").run(WORLD)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tqa "))
    assert [cell.strip() for cell in line.split("|")][1:3] == [str(len(task) - too_long), str(too_long)]
    assert not traces(tmp_path)
    assert f"{len(task)} of {len(task)} tqa examples" in train(
        "--max_overlong_rate", "1", data=(*data, "--max_len", "3")
    )


@pytest.fixture
def other_run(tiny_model: Path, demo: Path, tmp_path: Path) -> Path:
    """A run directory as it is when a training has just begun in it."""
    out = tmp_path / "out"
    flags = ["--model_id", str(tiny_model), "--output_dir", str(out), "--max_len", "128"]
    config = command_line.parse(TrainConfig, [*flags, "--train_shards", shards(demo, "train")], "train.py")
    collator = prepare.open_collator(config)
    tasks = open_tasks(split_list(config.train_shards), collator)
    identity = training_run.plan_data(config, WORLD, tasks, collator, None).identity()
    identity |= prepare.model_identity(config) | {"dev_data": {}}
    run_dir.begin(out, settings.dump_yaml(config), identity, {})
    return out


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "exit_status.json")
    return {str(path): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--seed", "1"], "seed: 0 -> 1"),
        (["--learning_rate", "0.003"], "learning_rate: 0.0001 -> 0.003"),
        (["--lora_r", "4", "--loss_norm", "tasks"], 'lora_r: 16 -> 4; loss_norm: "tokens" -> "tasks"'),
        (["--max_steps", "7"], "max_steps: 0 -> 7"),
        (["--resume", "none"], "--resume none"),
    ],
)
def test_directory_of_another_run(
    other_run: Path, tiny_model: Path, demo: Path, flags: list[str], word: str
) -> None:
    before = contents(other_run)
    good = ["--model_id", str(tiny_model), "--output_dir", str(other_run), "--max_len", "128"]
    message = refused("train", *good, "--train_shards", shards(demo, "train"), *flags)
    assert all(part in message for part in word.split("; "))
    assert contents(other_run) == before


def test_other_data_leaves_the_data_of_the_run_alone(
    other_run: Path, tiny_model: Path, demo: Path, tmp_path: Path
) -> None:
    """A run packs its JSONL into its own directory; another run's data must not take its place."""
    pack([demo / "asr.train.jsonl"], other_run / "shards", split="train")
    before = contents(other_run)
    other = write_rows(demo, "other_data", row())
    flags = ("--model_id", str(tiny_model), "--output_dir", str(other_run), "--max_len", "128", "--seed", "1")
    assert "seed: 0 -> 1" in refused("train", *flags, "--train_jsonl", str(other))
    assert contents(other_run) == before


def test_damaged_identity(other_run: Path, tiny_model: Path, demo: Path) -> None:
    (other_run / "identity.json").write_text("{")
    flags = ("--model_id", str(tiny_model), "--output_dir", str(other_run))
    assert "identity.json is damaged" in refused("train", *flags, "--train_shards", shards(demo, "train"))


@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_directory_that_is_no_run(tiny_model: Path, demo: Path, tmp_path: Path, program: str) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "file").write_bytes(b"")
    data = {"train": "--train_shards", "evaluate": "--val_shards"}[program]
    flags = ("--model_id", str(tiny_model), data, shards(demo, "dev"), "--max_len", "128")
    for name, word in (("photos", "'cat.jpg'"), ("file", "is a file")):
        assert word in refused(program, *flags, "--output_dir", str(tmp_path / name))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cat.jpg", "file", "photos"]


@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_unknown_flag(tmp_path: Path, program: str) -> None:
    assert "--learning-rate" in refused(
        program, "--output_dir", str(tmp_path / "out"), "--learning-rate", "1"
    )
    assert not (tmp_path / "out").exists()


def test_both_and_neither_kind_of_training_data(train: Call, demo: Path) -> None:
    assert "both are given" in train("--train_jsonl", str(demo / "asr.train.jsonl"))
    assert "neither is given" in train(data=("--train_shards", ""))


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"model_type": "whisper"}, "'whisper', not 'voxtral'"),
        ({"model_type": "voxtral_realtime"}, "voxtral_realtime"),
        ({"model_type": "voxtral", "auto_map": {"AutoModel": "evil.Model"}}, "'auto_map'"),
        ({}, "no readable config.json"),
        (None, "--model_id"),
    ],
)
def test_model_that_is_no_voxtral(
    train: Call, demo: Path, tmp_path: Path, config: dict[str, Any] | None, word: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    assert word in train("--model_id", str(folder))
    flags = ("--model_id", str(folder), "--output_dir", str(tmp_path / "out"))
    assert word in refused("evaluate", *flags, "--val_shards", shards(demo, "dev"))
    assert not (tmp_path / "out").exists()


def test_data_that_is_not_there(train: Call, demo: Path, tmp_path: Path) -> None:
    assert "no manifest" in train(data=("--train_shards", str(tmp_path / "nowhere")))
    assert "no manifest" in train("--val_shards", str(tmp_path / "nowhere"))
    assert "nowhere.jsonl" in train(data=("--train_jsonl", str(tmp_path / "nowhere.jsonl")))
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "empty.jsonl" in train(data=("--train_jsonl", str(tmp_path / "empty.jsonl")))
    message = train(data=("--train_jsonl", str(demo / "asr.train.jsonl"), "--tasks", "asr,sqa"))
    assert "2 tasks for 1 files" in message


def test_prompt_that_leaves_no_room_for_an_answer(train: Call, demo: Path) -> None:
    flags = ("--val_shards", shards(demo, "dev"), "--max_len", "28")
    message = train(*flags, data=("--train_shards", shards(demo, "train", "tqa")))
    assert "--max_len 28" in message and "no room for an answer" in message


def test_deepspeed_config(train: Call, tmp_path: Path) -> None:
    assert "nowhere.json" in train("--ds_config", "nowhere.json")
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert "stage 3" in train("--ds_config", str(path))
