"""Evaluation: the same predictions for any ranks and rows, every example once; launch/evaluate.py on all it accepts."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_runs import Demo
from harness import ROOT, free_port, load_script, run_ranks

from voxtral_dist import adapter, command_line, evaluator
from voxtral_dist import model as modeling
from voxtral_dist.adapter import LoraSettings
from voxtral_dist.audio import AudioSpec
from voxtral_dist.collator import Collator
from voxtral_dist.config import EvalConfig
from voxtral_dist.decode_share import DecodeSettings
from voxtral_dist.distributed import World
from voxtral_dist.errors import BadSamplesError, UserError
from voxtral_dist.eval_data import EvalData
from voxtral_dist.evaluation_run import with_run_settings
from voxtral_dist.packing import pack
from voxtral_dist.shard_format import read_columns
from voxtral_dist.shards import ShardSet
from voxtral_dist.task_data import open_tasks
from voxtral_dist.tokenizer import TekkenVocabulary

SIZES = (1, 2, 5, 7)
ROWS = (1, 8)
MAX_LEN = 128


@pytest.fixture(scope="module")
def dev_sets(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """Packed dev sets of the three tasks, by rows per task."""
    root = tmp_path_factory.mktemp("evaluator")
    (root / "audio").symlink_to(demo.folder / "audio")
    out = {}
    for size in SIZES:
        files = []
        for task in ("asr", "sqa", "tqa"):
            lines = (demo.folder / f"{task}.dev.jsonl").read_text("utf-8").splitlines(keepends=True)
            files.append(root / f"{task}.{size}.jsonl")
            files[-1].write_text("".join(lines[:size]), encoding="utf-8")
        out[size] = [str(folder) for folder in pack(files, root / "shards", split=f"dev{size}")]
    return out


def open_data(model_dir: str, folders: list[str]) -> EvalData:
    collator = Collator(
        TekkenVocabulary.load(model_dir), AudioSpec.from_config(modeling.read_config(model_dir))
    )
    return EvalData(open_tasks(folders, collator), collator, MAX_LEN)


def with_adapter(model_dir: str) -> Any:
    """The tiny model with an adapter that changes what it says."""
    lora = LoraSettings(r=4, alpha=8.0, dropout=0.0, targets="both", freeze_whisper=True, seed=1)
    model = adapter.attach(modeling.load(model_dir, torch.float32), lora)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def predict(rank: int, model_dir: str, dev_sets: dict[str, list[str]], out: str) -> list[str]:
    """Evaluate every dev set in every number of rows; the names of what rank 0 wrote to ``out``."""
    model = with_adapter(model_dir)
    written = []
    for size, folders in dev_sets.items():
        data = open_data(model_dir, folders)
        for rows in ROWS:
            result = evaluator.evaluate(model, data, DecodeSettings(rows, max_new_tokens=6))
            if result is not None:
                written.append(f"{size} rows of {rows}")
                evaluator.write(Path(out, written[-1]), result)
    return written


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def alone(tiny_model: Path, dev_sets: dict[int, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every evaluation by one process."""
    out = tmp_path_factory.mktemp("alone")
    predict(0, str(tiny_model), {str(size): folders for size, folders in dev_sets.items()}, str(out))
    return out


def test_rows_decoded_together_do_not_matter(alone: Path) -> None:
    for size in SIZES:
        one, many = ((alone / f"{size} rows of {rows}" / "predictions.jsonl").read_bytes() for rows in ROWS)
        assert one == many


def test_every_example_once_with_an_answer(alone: Path) -> None:
    texts = set()
    for size in SIZES:
        found = records(alone / f"{size} rows of 8")
        expected = [f"{task}-dev-{n:05d}" for task in ("asr", "sqa", "tqa") for n in range(size)]
        assert [record["id"] for record in found] == expected
        assert all(record["error"] is None and record["references"] for record in found)
        texts |= {record["prediction"] for record in found}
    assert len(texts) > 6, "the answers must differ, or a mix-up would go unseen"


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_do_not_matter(
    tiny_model: Path, dev_sets: dict[int, list[str]], alone: Path, tmp_path: Path, world_size: int
) -> None:
    """Fewer examples than ranks included."""
    sets = {str(size): folders for size, folders in dev_sets.items()}
    written = run_ranks(predict, world_size, str(tiny_model), sets, str(tmp_path))
    assert len(written[0]) == len(SIZES) * len(ROWS) and not any(written[1:])
    for name in written[0]:
        assert (tmp_path / name / "predictions.jsonl").read_bytes() == (
            alone / name / "predictions.jsonl"
        ).read_bytes()
    ranks = [
        json.loads(line)["rank"]
        for line in (tmp_path / "7 rows of 1" / "timing.jsonl").read_text().splitlines()
    ]
    assert len(ranks) == 21 and set(ranks) == set(range(world_size))


def test_the_order_of_the_rows_does_not_matter(
    demo: Demo, tiny_model: Path, alone: Path, tmp_path: Path
) -> None:
    (tmp_path / "audio").symlink_to(demo.folder / "audio")
    files = []
    for task in ("tqa", "asr", "sqa"):
        lines = (demo.folder / f"{task}.dev.jsonl").read_text("utf-8").splitlines(keepends=True)
        files.append(tmp_path / f"{task}.7.jsonl")
        files[-1].write_text("".join(lines[i] for i in (4, 0, 6, 2, 1, 5, 3)), encoding="utf-8")
    folders = [str(folder) for folder in pack(files, tmp_path / "shards", split="dev7")]
    assert predict(0, str(tiny_model), {"7": folders}, str(tmp_path)) == [
        f"7 rows of {rows}" for rows in ROWS
    ]
    for name in (f"7 rows of {rows}" for rows in ROWS):
        got, expected = ((folder / name / "predictions.jsonl").read_bytes() for folder in (tmp_path, alone))
        assert got == expected


def test_a_dev_set_without_rows_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    command = [sys.executable, "launch/evaluate.py", "--model_id", str(tiny_model)]
    command += ["--val_jsonl", str(tmp_path / "empty.jsonl"), "--output_dir", str(tmp_path / "out")]
    environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    environ["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "empty.jsonl: has no rows" in result.stderr
    assert "Traceback" not in result.stderr and not (tmp_path / "out" / "metrics.json").exists()


def test_metrics_are_those_documented(alone: Path) -> None:
    folder = alone / "5 rows of 8"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert list(metrics["tasks"]) == ["asr", "sqa", "tqa"]
    assert {"n", "cer", "cer_spaced", "wer", "swer", "edits", "ref_len"} <= metrics["tasks"]["asr"].keys()
    for task in ("sqa", "tqa"):
        assert {"n", "rouge_l_f1", "em", "korquad_em", "korquad_f1", "bleu"} <= metrics["tasks"][task].keys()
    averages = {"macro", "weighted", "balance", "samples_per_second", "rtfx", "normalizer", "provenance"}
    assert averages <= metrics.keys()
    assert all(values["n"] == 5 for values in metrics["tasks"].values())
    assert metrics["samples_per_second"] > 0 and metrics["rtfx"] > 0
    asr = [record["metrics"] for record in records(folder) if record["task"] == "asr"]
    assert metrics["tasks"]["asr"]["edits"] == sum(sample["edits"] for sample in asr)
    for name in ("predictions.jsonl", "timing.jsonl", "metrics.json"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600


def damaged_copy(folders: list[str], out: Path, column: str) -> tuple[list[str], list[str]]:
    """Copies of data sets, a bit of an example flipped in its ``column`` ("audio" or "json"), and the examples' ids."""
    copies, ids = [], []
    for folder in map(Path, folders):
        ids.append(ShardSet.open(folder).sample(2).id)
        target = out / folder.parent.name / folder.name
        target.mkdir(parents=True)
        for path in folder.iterdir():
            data = bytearray(path.read_bytes())
            index = path.with_suffix(".idx")
            if path.suffix == ".tar" and f"{column}_offset" in read_columns(index)[0]:
                columns = read_columns(index)[0]
                if columns[f"{column}_size"][2]:
                    data[int(columns[f"{column}_offset"][2]) + int(columns[f"{column}_size"][2]) // 2] ^= 1
            (target / path.name).write_bytes(data)
        copies.append(str(target))
    return copies, ids


def test_unreadable_audio_is_a_missing_prediction(
    tiny_model: Path, dev_sets: dict[int, list[str]], alone: Path, tmp_path: Path
) -> None:
    folders, ids = damaged_copy(dev_sets[5], tmp_path, "audio")
    data = open_data(str(tiny_model), folders)
    result = evaluator.evaluate(with_adapter(str(tiny_model)), data, DecodeSettings(8, max_new_tokens=6))
    assert result is not None
    for got, whole in zip(result.predictions, records(alone / "5 rows of 8"), strict=True):
        assert (got["id"], got["references"]) == (whole["id"], whole["references"])
        if got["id"] in ids[:2]:
            assert (
                got["prediction"] is None
                and "checksum" in got["error"]
                and "missing" in got["metrics"]["flags"]
            )
        else:
            assert got["prediction"] == whole["prediction"]
    tasks = result.metrics["tasks"]
    assert [tasks[name]["missing"] for name in ("asr", "sqa", "tqa")] == [1, 1, 0]
    assert [values["n"] for values in tasks.values()] == [5, 5, 5]
    lost = next(record["metrics"] for record in result.predictions if record["id"] == ids[0])
    assert lost["edits"] == lost["D"] == lost["ref_len"] > 0, "a missing transcript costs all its characters"


def test_a_row_without_its_words_cannot_be_scored(
    tiny_model: Path, dev_sets: dict[int, list[str]], tmp_path: Path
) -> None:
    """An empty reference in its place would count as answered: nothing was said, nothing was to be said."""
    data = open_data(str(tiny_model), damaged_copy(dev_sets[5], tmp_path, "json")[0])
    with pytest.raises(BadSamplesError, match=r"-dev5-000000\.tar"):
        evaluator.evaluate(modeling.load(str(tiny_model), torch.float32), data, DecodeSettings(8, 6))


def test_the_other_audio_is_of_the_same_language_and_another_answer(
    tiny_model: Path, dev_sets: dict[int, list[str]]
) -> None:
    data = open_data(str(tiny_model), dev_sets[7])
    for number in (0, 1):
        task, sources = data.tasks[number], data.other_audio(number)
        samples = [task.sets[0].sample(place) for place in range(len(task))]
        languages = [sample.language for sample in samples]
        for place, source in enumerate(sources):
            assert source != place and samples[source].language == samples[place].language
            assert samples[source].references != samples[place].references
            assert samples[source].audio_path != samples[place].audio_path
        assert min(map(languages.count, set(languages))) > 1
        swapped, other = task.read(0, audio_from=sources[0]), task.read(sources[0])
        assert swapped.sample == samples[0] and swapped.n_samples == other.n_samples
        assert swapped.mel is not None and other.mel is not None and torch.equal(swapped.mel, other.mel)


def test_swapped_audio_changes_what_is_heard_alone(tiny_model: Path, dev_sets: dict[int, list[str]]) -> None:
    data = open_data(str(tiny_model), dev_sets[7])
    model = with_adapter(str(tiny_model))
    plain, swapped = (
        evaluator.evaluate(model, data, DecodeSettings(8, max_new_tokens=6, audio=audio))
        for audio in ("own", "swapped")
    )
    assert plain is not None and swapped is not None
    changed: dict[str, int] = {}
    for own, other in zip(plain.predictions, swapped.predictions, strict=True):
        assert (own["id"], own["references"], own["prompt"]) == (
            other["id"],
            other["references"],
            other["prompt"],
        )
        changed[own["task"]] = changed.get(own["task"], 0) + (own["prediction"] != other["prediction"])
    assert changed["asr"] > 0 and changed["sqa"] > 0 and changed["tqa"] == 0


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as training leaves it, with one checkpoint."""
    out = tmp_path_factory.mktemp("runs") / "run"
    folder = out / "checkpoints" / "step-00000004"
    (folder / "adapter").mkdir(parents=True)
    adapter.save(with_adapter(str(tiny_model)), folder / "adapter")
    entries = {
        f"adapter/{path.name}": {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in (folder / "adapter").iterdir()
    }
    (folder / "manifest.json").write_text(json.dumps({"step": 4, "files": entries}))
    for name, text in (
        ("best", folder.name),
        ("identity.json", "{}"),
        ("config.yaml", f"model_id: {tiny_model}\n"),
    ):
        (out / name).write_text(text)
    return out


Evaluate = Callable[..., Path]


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch, dev_sets: dict[int, list[str]]) -> Evaluate:
    """``evaluate(*flags)`` runs launch/evaluate.py in this process; returns its output directory."""
    script = load_script("launch/evaluate.py")

    def call(output_dir: Path, *flags: str) -> Path:
        environ = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (environ | {"MASTER_PORT": str(free_port())}).items():
            monkeypatch.setenv(name, value)
        common = [
            "--val_shards",
            ",".join(dev_sets[5]),
            "--max_len",
            str(MAX_LEN),
            "--gen_max_new_tokens",
            "6",
        ]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *common, *flags])
        script.run(World(0, 0, 1))
        return output_dir

    return call


def test_a_run_a_checkpoint_and_an_adapter_folder_are_the_same(
    run: Path, tiny_model: Path, alone: Path, tmp_path: Path, evaluate: Evaluate
) -> None:
    expected = (alone / "5 rows of 8" / "predictions.jsonl").read_bytes()
    checkpoint = run / "checkpoints" / "step-00000004"
    out = evaluate(run / "evaluations" / "latest", "--lora_dir", str(run))
    assert (out / "predictions.jsonl").read_bytes() == expected
    assert json.loads((out / "exit_status.json").read_text())["exit_code"] == 0
    provenance = json.loads((out / "metrics.json").read_text())["provenance"]
    assert len(provenance.pop("weights")) == 64
    assert provenance == {
        "adapter": str(checkpoint / "adapter"),
        "dtype": "float32",
        "max_len": MAX_LEN,
        "max_new_tokens": 6,
        "model_id": str(tiny_model),
        "sqa_question": "written",
    }
    for lora_dir in (checkpoint, checkpoint / "adapter"):
        out = tmp_path / lora_dir.name
        flags = ("--lora_dir", str(lora_dir), "--model_id", str(tiny_model), "--output_dir", str(out))
        assert (evaluate(out, *flags) / "predictions.jsonl").read_bytes() == expected


def test_the_base_model_without_an_adapter(
    tiny_model: Path, alone: Path, tmp_path: Path, evaluate: Evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    out = evaluate(tmp_path / "base", "--model_id", str(tiny_model), "--output_dir", str(tmp_path / "base"))
    with_lora = [record["prediction"] for record in records(alone / "5 rows of 8")]
    assert [record["prediction"] for record in records(out)] != with_lora
    assert json.loads((out / "metrics.json").read_text())["provenance"]["adapter"] is None
    assert "asr" in capsys.readouterr().out


def test_the_audio_probe_twice_into_one_directory(
    run: Path, tmp_path: Path, evaluate: Evaluate, capsys: pytest.CaptureFixture[str]
) -> None:
    """An evaluation may be repeated where it was written; of a private one no text is printed."""
    flags = ("--lora_dir", str(run), "--output_dir", str(tmp_path / "probe"), "--audio_probe")
    out = evaluate(tmp_path / "probe", *flags)
    printed, first = capsys.readouterr().out, (out / "predictions.jsonl").read_bytes()
    assert "audio NOT used" in printed and "swapped audio" in printed and "silence" in printed
    assert "hypothesis" in printed and not (out / "parts").exists()
    probe = json.loads((out / "audio_probe.json").read_text())
    assert set(probe) == {"swapped", "silence", "verdict"} and "NOT used" in probe["verdict"]
    assert all(set(probe[audio]["tasks"]) == {"asr", "sqa", "tqa"} for audio in ("swapped", "silence"))
    evaluate(out, *flags, "--private_text")
    assert (out / "predictions.jsonl").read_bytes() == first
    assert "hypothesis" not in capsys.readouterr().out


def test_lora_dir_that_is_no_run_needs_the_other_flags(run: Path, tmp_path: Path, evaluate: Evaluate) -> None:
    checkpoint = str(run / "checkpoints" / "step-00000004")
    with pytest.raises(UserError, match="--model_id is missing"):
        evaluate(tmp_path, "--lora_dir", checkpoint)
    with pytest.raises(UserError, match="--output_dir is missing"):
        evaluate(tmp_path, "--lora_dir", checkpoint, "--model_id", "base")
    with pytest.raises(UserError, match="neither a run directory"):
        flags = ("--lora_dir", str(tmp_path), "--model_id", "base", "--output_dir", str(tmp_path / "out"))
        evaluate(tmp_path, *flags)
    assert not (tmp_path / "out").exists()


def test_command_line(run: Path, alone: Path, dev_sets: dict[int, list[str]]) -> None:
    command = [
        sys.executable,
        "launch/evaluate.py",
        "--lora_dir",
        str(run),
        "--val_shards",
        ",".join(dev_sets[5]),
    ]
    command += ["--max_len", str(MAX_LEN), "--gen_max_new_tokens", "6", "--per_device_bsz", "1"]
    environ = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")
    }
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "asr  | cer" in result.stdout and "written:" in result.stdout
    got = (run / "evaluations" / "latest" / "predictions.jsonl").read_bytes()
    assert got == (alone / "5 rows of 8" / "predictions.jsonl").read_bytes()


def test_an_evaluation_on_other_prompts_than_the_training_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model_id: m\nsqa_question: spoken\n")
    flags = ["--lora_dir", str(tmp_path), "--val_shards", "a"]
    with pytest.raises(UserError, match="give --sqa_question spoken"):
        with_run_settings(command_line.parse(EvalConfig, flags, "evaluate.py"))
    same = command_line.parse(EvalConfig, [*flags, "--sqa_question", "spoken"], "evaluate.py")
    assert with_run_settings(same).model_id == "m"


def test_an_evaluation_takes_length_and_4_bits_from_the_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model_id: m\nmax_len: 96\nload_in_4bit: true\nseed: 5\n")
    flags = ["--lora_dir", str(tmp_path), "--val_shards", "a"]
    found = with_run_settings(command_line.parse(EvalConfig, flags, "evaluate.py"))
    assert (found.model_id, found.max_len, found.load_in_4bit, found.seed) == ("m", 96, True, 0)
    found = with_run_settings(command_line.parse(EvalConfig, [*flags, "--max_len", "64"], "evaluate.py"))
    assert (found.model_id, found.max_len) == ("m", 64)
