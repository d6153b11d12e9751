"""Flags, YAML and config.yaml say the same thing; what is unknown or senseless is refused in one line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from voxtral_dist import command_line
from voxtral_dist import config as settings
from voxtral_dist.config import EvalConfig, TrainConfig
from voxtral_dist.errors import UserError

NEEDED = ["--model_id", "base", "--output_dir", "out", "--train_shards", "asr/train,tqa/train"]


def parse(*flags: str) -> TrainConfig:
    return command_line.parse(TrainConfig, [*NEEDED, *flags], "train.py")


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], None),
        (["--bf16"], True),
        (["--bf16", "true"], True),
        (["--bf16", "False"], False),
        (["--bf16=true"], True),
        (["--bf16=false"], False),
        (["--no_bf16"], False),
        (["--bf16", "--no_bf16"], False),
    ],
)
def test_every_form_of_a_boolean(flags: list[str], expected: bool | None) -> None:
    assert parse(*flags, "--seed", "3").bf16 is expected
    assert parse("--seed", "3", *flags).seed == 3, "a bare boolean took the next word for its value"


def test_booleans_that_default_to_true_can_be_switched_off() -> None:
    assert parse().freeze_whisper and not parse("--no_freeze_whisper").freeze_whisper
    assert not parse("--freeze_whisper", "false").freeze_whisper


@pytest.mark.parametrize("flags", [["--local_rank=1"], ["--local_rank", "1"]])
def test_the_launchers_local_rank_is_ignored(flags: list[str]) -> None:
    assert parse(*flags, "--seed", "3") == parse("--seed", "3")


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--sed", "3"], "--sed"),
        (["--see", "3"], "--see"),
        (["--no_seed"], "--no_seed"),
        (["--bf16", "perhaps"], "perhaps"),
        (["stray"], "stray"),
        (["--per_device_bsz", "2.5"], "per_device_bsz"),
        (["--learning_rate", "fast"], "learning_rate"),
        (["--learning_rate", "nan"], "learning_rate"),
        (["--learning_rate", "-1"], "learning_rate"),
        (["--loss_norm", "words"], "loss_norm"),
        (["--lora_dropout", "1"], "lora_dropout"),
        (["--max_overlong_rate", "1.5"], "max_overlong_rate"),
        (["--epochs", "0"], "epochs"),
        (["--epochs", ".inf", "--max_steps", "10"], "--epochs inf"),
        (["--max_len", "0"], "max_len"),
        (["--save_steps", "-1"], "save_steps"),
        (["--model_id", ""], "model_id"),
        (["--train_jsonl", "a.jsonl"], "both are given"),
        (["--train_shards", ""], "neither is given"),
        (["--val_shards", "a", "--val_jsonl", "b"], "val_jsonl"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_flags_are_named(flags: list[str], word: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(*flags)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_limits_that_belong_to_the_range() -> None:
    assert parse("--max_overlong_rate", "1").max_overlong_rate == 1.0
    assert parse("--max_grad_norm", "0").max_grad_norm == 0.0


def test_evaluation_needs_exactly_one_kind_of_data() -> None:
    for flags, state in (([], "neither"), (["--val_shards", "a", "--val_jsonl", "b"], "both")):
        with pytest.raises(UserError, match=state):
            command_line.parse(EvalConfig, ["--lora_dir", "run", *flags], "evaluate.py")
    config = command_line.parse(
        EvalConfig, ["--lora_dir", "run", "--val_shards", "a", "--audio_probe"], "evaluate.py"
    )
    assert config.audio_probe and config.model_id == ""


@pytest.mark.parametrize("where", ["before", "after"])
def test_flags_win_over_yaml_wherever_they_stand(tmp_path: Path, where: str) -> None:
    path = yaml_file(tmp_path, "seed: 5\nbf16: true\nlora_r: 8\n")
    flags = ["--seed", "6", "--no_bf16"]
    for config in (["--config", path], [f"--config={path}"]):
        got = parse(*flags, *config) if where == "before" else parse(*config, *flags)
        assert (got.seed, got.bf16, got.lora_r) == (6, False, 8)


def test_yaml_alone_is_enough(tmp_path: Path) -> None:
    text = (
        "model_id: 모델\noutput_dir: out\ntrain_jsonl: [asr.jsonl, 'two words.jsonl']\n"
        "learning_rate: 1e-4\nepochs: 2\nfreeze_whisper: false\n"
    )
    config = command_line.parse(TrainConfig, ["--config", yaml_file(tmp_path, text)], "train.py")
    assert config.model_id == "모델" and settings.split_list(config.train_jsonl) == [
        "asr.jsonl",
        "two words.jsonl",
    ]
    assert (config.learning_rate, config.epochs, config.freeze_whisper) == (1e-4, 2.0, False)


@pytest.mark.parametrize(
    ("text", "word"),
    [("sed: 1\n", "sed"), ("seed: many\n", "seed"), ("seed: [1\n", "config"), ("- 1\n", "config")],
)
def test_wrong_yaml_is_named(tmp_path: Path, text: str, word: str) -> None:
    with pytest.raises(UserError) as caught:
        parse("--config", yaml_file(tmp_path, text))
    assert word in str(caught.value) and "\n" not in str(caught.value)


def another(value: Any) -> Any:
    """A value of the same type."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value / 2 + 1e-12 if isinstance(value, float) else "text"


def test_config_yaml_gives_the_same_settings_back(tmp_path: Path) -> None:
    """Every field away from its default, so that none can be lost on the way."""
    changed: dict[str, Any] = {
        "model_id": "모델 #1: '따옴표'",
        "train_shards": ["a", "b"],
        "sqa_question": "spoken",
        "bf16": False,
        "loss_norm": "tasks",
        "lr_schedule": "stage",
        "task_weights": "",  # not beside stages
        "learning_rate": 3e-05,
        "spike_factor": 2.5,
        "lora_targets": "projector",
        "tune": "projector",
        "lora_rslora": False,  # not beside tune
        "lora_dora": False,
        "debug": False,  # not beside dry_run
        "torch_compile": False,  # not beside grad_ckpt
        "resume": "none",
        "epochs": 0.1,
        "freeze_whisper": False,
        "encoder_cache": "",  # not beside an encoder that trains
        "output_dir": "007",
    }
    config = TrainConfig(**changed)
    for name in (
        settings.to_dict(config).keys() - changed.keys() - {"train_jsonl", "val_jsonl", "train_where"}
    ):
        setattr(config, name, another(getattr(config, name)))
    path = yaml_file(tmp_path, settings.dump_yaml(config))
    assert command_line.parse(TrainConfig, ["--config", path], "train.py") == config
    assert settings.load_yaml(Path(path)) == yaml.safe_load(settings.dump_yaml(config))


def test_load_yaml_refuses_what_is_no_mapping(tmp_path: Path) -> None:
    for text in ("- 1\n", "", "a: [\n"):
        with pytest.raises(UserError):
            settings.load_yaml(Path(yaml_file(tmp_path, text)))
    with pytest.raises(UserError, match=r"missing\.yaml"):
        settings.load_yaml(tmp_path / "missing.yaml")


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.parse(TrainConfig, ["--help"], "train.py")
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for field in dataclasses.fields(TrainConfig):
        assert f"--{field.name}" in text
    assert "peak learning rate" in text
