"""launch/presets: each is opened by its command, states the memory that the estimate gives, and trains a tiny model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from demo_runs import Demo, steps, two_ranks
from harness import ROOT
from test_memory import small_24b
from transformers import VoxtralConfig

from voxtral_dist import command_line, memory, prepare, training_run
from voxtral_dist import config as settings
from voxtral_dist.config import TrainConfig
from voxtral_dist.distributed import World
from voxtral_dist.memory import Estimate

PRESETS = sorted((ROOT / "launch/presets").glob("*.yaml"))
NAMES = [path.stem for path in PRESETS]
CARD = 80e9
"""Bytes of the cards that the presets are for."""


def preset(name: str, *flags: str) -> TrainConfig:
    return command_line.parse(TrainConfig, ["--config", f"launch/presets/{name}.yaml", *flags], "test")


def head(name: str) -> str:
    """The comment that opens a preset."""
    text = (ROOT / f"launch/presets/{name}.yaml").read_text("utf-8")
    return "".join(line.removeprefix("#") for line in re.match(r"(?:#.*\n)+", text)[0].splitlines(True))


def command(name: str) -> list[str]:
    return shlex.split(re.search(r"^ {5}(\S.*)$", head(name), re.M)[1])


def ranks(name: str) -> int:
    """Ranks that a preset's command starts."""
    words = command(name)
    if words[0].startswith("NPROC="):
        return int(words[0].removeprefix("NPROC="))
    return int(words[words.index("--nodes") + 1]) * int(words[words.index("--gpus_per_node") + 1])


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets name their DeepSpeed settings from there, as their commands do."""
    monkeypatch.chdir(ROOT)


def test_each_size_has_a_preset() -> None:
    assert NAMES == ["mini_1gpu", "mini_64gpu", "mini_8gpu", "small24b_80gb"]
    assert {name: ranks(name) for name in NAMES} == {
        "mini_1gpu": 1,
        "mini_8gpu": 8,
        "mini_64gpu": 64,
        "small24b_80gb": 8,
    }


@pytest.mark.parametrize("name", NAMES)
def test_preset_is_opened_by_its_command(name: str) -> None:
    """The script exists and takes the file; what could not be run is said."""
    words = command(name)
    assert f"launch/presets/{name}.yaml" in words
    script = next(word for word in words if word.startswith("launch/") and word.endswith((".sh", ".py")))
    assert (ROOT / script).is_file() and "Not run" in head(name)
    if script == "launch/train.sh":
        command_line.parse(TrainConfig, words[words.index(script) + 1 :], "train.py")
    assert f"--ranks {ranks(name)}\n" in head(name)


@pytest.mark.parametrize("name", [NAMES[0], *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[1:])])
def test_preset_plans_the_demo(demo: Demo, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its flags with the tiny model and the demo's data, as --dry_run reads them."""
    flags = ["--max_steps", "2", "--dry_run", *demo.data("shards"), "--max_tokens_per_micro_batch", "600"]
    config = preset(name, *flags, "--max_len", "128")
    training_run.train(config, World(0, 0, 1))
    text = capsys.readouterr().out
    assert f"2 steps of {config.global_batch_size} examples" in text
    assert "600 positions per micro-batch" in text


def estimated(name: str, config: TrainConfig | None = None) -> Estimate:
    config = config or preset(name)
    model_config = small_24b() if "Small" in config.model_id else VoxtralConfig()
    shape = memory.largest_shape(config, model_config)
    lora = prepare.lora_settings(config)
    return memory.estimate(config, model_config, lora, ranks=ranks(name), shape=shape, bf16=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_preset_states_its_memory_and_fits(name: str) -> None:
    needs = estimated(name)
    stated = float(re.search(r"Memory per GPU, estimated: ([\d.]+) GiB", head(name))[1])
    assert needs.peak / memory.GIB == pytest.approx(stated, rel=0.01)
    assert needs.peak < (1 - memory.FREE_SHARE) * CARD
    weights = re.search(r"The frozen weights alone are ([\d.]+) GiB", head(name))
    if weights:
        assert sum(needs.states.frozen.values()) / memory.GIB == pytest.approx(float(weights[1]), abs=0.06)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_preset_trains_the_tiny_model(demo: Demo, tmp_path: Path, name: str) -> None:
    """Two steps on two ranks, with all it says but the model, the data, the sizes of batches and where it goes."""
    out = tmp_path / "run"
    small = [
        "--global_batch_size",
        "12",
        "--max_steps",
        "2",
        "--max_len",
        "128",
        "--eval_max_new_tokens",
        "4",
    ]
    flags = [
        "--config",
        f"launch/presets/{name}.yaml",
        *demo.data("shards"),
        "--output_dir",
        str(out),
        *small,
    ]
    two_ranks("torchrun", flags, out)
    assert [line["step"] for line in steps(out)] == [1, 2]
    used = settings.load_yaml(out / "config.yaml")
    changed = {"model_id", "train_shards", "val_shards", "output_dir", "global_batch_size", "max_steps"}
    changed |= {"max_len", "eval_max_new_tokens"}
    wanted = settings.to_dict(preset(name))
    assert {k: v for k, v in used.items() if k not in changed} == {
        k: v for k, v in wanted.items() if k not in changed
    }


@pytest.mark.slow
def test_readme_says_what_a_position_keeps() -> None:
    """Mini's megabytes for the backward pass, without and with --grad_ckpt."""
    text = (ROOT / "README.md").read_text("utf-8")
    said = re.search(r"adapter keeps ([\d.]+) MB, with\s+`--grad_ckpt` ([\d.]+) MB", text)
    for grad_ckpt, megabytes in zip((False, True), map(float, said.groups()), strict=True):
        config = preset("mini_1gpu", "--grad_ckpt", str(grad_ckpt).lower())
        kept = estimated("mini_1gpu", config).activations.kept / config.max_tokens_per_micro_batch
        assert kept / 1e6 == pytest.approx(megabytes, rel=0.03)
