"""Checkpoints are published whole or not at all; the newest whole one is found and gives everything back."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from safetensors.torch import load_file

from voxtral_dist import adapter, checkpoint, optimizer_state
from voxtral_dist import model as modeling
from voxtral_dist.adapter import LoraSettings
from voxtral_dist.atomic import write_bytes
from voxtral_dist.audio import AudioSpec
from voxtral_dist.collator import Collator, Example
from voxtral_dist.ds_config import EngineSettings
from voxtral_dist.engine import TrainEngine
from voxtral_dist.errors import NoCheckpointError, UserError, VoxtralDistError
from voxtral_dist.sample import Sample
from voxtral_dist.saver import Saver
from voxtral_dist.tokenizer import TekkenVocabulary

FILES = [
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "optimizer.safetensors",
    "trainer_state.json",
]
ALL_FILES = [*FILES, checkpoint.MANIFEST]


def build(model_dir: str, seed: int) -> tuple[TrainEngine, Collator]:
    """An engine around the tiny model with a fresh adapter."""
    voxtral = modeling.load(model_dir, torch.float32)
    lora = LoraSettings(r=2, alpha=4.0, dropout=0.0, targets="both", freeze_whisper=True, seed=seed)
    collator = Collator(TekkenVocabulary.load(model_dir), AudioSpec.from_config(voxtral.config))
    return TrainEngine(modeling.TrainingModel(adapter.attach(voxtral, lora), 1), EngineSettings()), collator


def state_of(engine: TrainEngine) -> dict[str, torch.Tensor]:
    """Parameters, Adam's moments and its step: all that a step changes."""
    moments, step = optimizer_state.gather(engine)
    weights = {name: parameter.detach().clone() for name, parameter in engine.named_parameters}
    return weights | moments | {"step": torch.tensor(step)}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Writes beyond ``limit`` bytes per file fail in this process, as on a full disk."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def save_and_load(rank: int, model_dir: str, run: str) -> dict[str, Any]:
    """Two steps with a checkpoint each, one that fails for want of space, and a fresh engine that loads the second."""
    run_dir = Path(run)
    engine, collator = build(model_dir, seed=1)
    words = Sample("0", "tqa", "Which word?", ("one", "two")[rank : rank + 1])
    batch = collator.train_batch([Example(words, None, 0, 0, 1.0, "0")], first_draw=0)
    engine.train_step([batch], learning_rate=0.1)
    saver = Saver(run_dir, keep=9, max_failures=1)
    saver.save(1, engine, {"draws_consumed": 12})
    saver.wait()
    if rank == 0:
        litter = run_dir / "checkpoints" / "step-00000002.tmp-1"
        (litter / "adapter").mkdir(parents=True)
        (litter / "trainer_state.json").write_text("{}")
    engine.train_step([batch], learning_rate=0.1)
    saver.save(2, engine, {"draws_consumed": 24})
    saver.wait()
    kept, before = state_of(engine), tree(run_dir)

    engine.train_step([batch], learning_rate=0.1)
    message = ""
    with full_disk(100_000):
        try:
            saver.save(3, engine, {"draws_consumed": 36})
            saver.wait()
        except VoxtralDistError as error:
            message = str(error)
    other, _ = build(model_dir, seed=2)
    fresh = same(state_of(other), kept)
    newest = checkpoint.newest_whole(run_dir)
    assert newest is not None
    loaded = checkpoint.load(newest, other)
    restored = same(state_of(other), kept)
    other.train_step([batch], learning_rate=0.1)
    return {
        "before": before,
        "message": message,
        "after": tree(run_dir),
        "newest": newest.name,
        "loaded": loaded,
        "differs before load": not fresh,
        "equal after load": restored,
        "third step equal": same(state_of(other), state_of(engine)),
    }


@pytest.fixture(scope="module")
def saved(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run directory with checkpoints of steps 1 and 2 that two ranks wrote, and what each rank saw."""
    run_dir = tmp_path_factory.mktemp("checkpoints") / "run"
    return run_dir, run_ranks(save_and_load, 2, str(tiny_model), str(run_dir))


@pytest.fixture
def run_dir(saved: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(saved[0], tmp_path / "run"))


def test_a_checkpoint_holds_its_four_files_and_nothing_else(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    for step in (1, 2):
        folder = checkpoint.step_dir(saved[0], step)
        assert tree(folder) == sorted([*ALL_FILES, "adapter"])
        assert checkpoint.verify(folder) is None
        manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
        assert manifest["step"] == step and sorted(manifest["files"]) == FILES
    assert [path.name for path in checkpoint.published(saved[0])] == ["step-00000001", "step-00000002"]
    assert checkpoint.pointer(saved[0], "latest") == checkpoint.step_dir(saved[0], 2)


def test_leftovers_of_a_killed_save_go_with_the_next(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    assert not [name for name in saved[1][0]["before"] if "tmp-" in name]


def test_load_gives_everything_back(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    for seen in saved[1]:
        assert seen["differs before load"] and seen["equal after load"] and seen["third step equal"]
        assert seen["newest"] == "step-00000002"
        assert seen["loaded"] == {"adam_step": 2, "draws_consumed": 24, "step": 2}
    moments = load_file(checkpoint.step_dir(saved[0], 2) / checkpoint.OPTIMIZER)
    assert moments and all(name.startswith(("exp_avg/", "exp_avg_sq/")) for name in moments)
    assert any(value.abs().max() > 0 for value in moments.values())


def test_a_failing_save_leaves_the_previous_one_and_tells_every_rank(
    saved: tuple[Path, list[dict[str, Any]]],
) -> None:
    for seen in saved[1]:
        assert "checkpoint of step 3 could not be written" in seen["message"]
        assert "free space" in seen["message"] and "\n" not in seen["message"]
        assert seen["after"] == seen["before"]
    assert (saved[0] / "latest").read_text() == "step-00000002\n"


def damage(path: Path, how: str) -> None:
    """Flip one bit in the middle, cut off the last byte, empty or remove a file."""
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return
    data[len(data) // 2] ^= how == "flipped"
    kept = {"flipped": len(data), "truncated": len(data) - 1, "empty": 0}[how]
    path.write_bytes(bytes(data[:kept]))


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_verify_names_the_damaged_file(run_dir: Path, name: str, how: str) -> None:
    folder = checkpoint.step_dir(run_dir, 2)
    damage(folder / name, how)
    fault = checkpoint.verify(folder)
    assert fault and name in fault


@pytest.mark.parametrize(
    "how", ["truncated in the middle", "empty", "missing", "a list", "of another version"]
)
def test_verify_without_a_readable_manifest(run_dir: Path, how: str) -> None:
    folder = checkpoint.step_dir(run_dir, 2)
    path = folder / checkpoint.MANIFEST
    contents = {
        "truncated in the middle": path.read_bytes()[:200],
        "a list": b"[]",
        "of another version": b"{}",
    }
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(contents.get(how, b""))
    assert "manifest" in str(checkpoint.verify(folder))


def test_any_flipped_byte_of_the_manifest_is_harmless_or_found(run_dir: Path) -> None:
    """The manifest has no hash of its own: what its damage changes must not match the files."""
    folder = checkpoint.step_dir(run_dir, 2)
    path, whole = folder / checkpoint.MANIFEST, (folder / checkpoint.MANIFEST).read_bytes()
    entries = json.loads(whole)["files"]
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        if checkpoint.verify(folder) is None:
            assert json.loads(path.read_bytes())["files"] == entries


def test_a_damaged_checkpoint_is_passed_over(run_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint.log.addHandler(caplog.handler)
    newest, older = checkpoint.step_dir(run_dir, 2), checkpoint.step_dir(run_dir, 1)
    assert checkpoint.newest_whole(run_dir) == newest
    damage(newest / "optimizer.safetensors", "flipped")
    assert checkpoint.newest_whole(run_dir) == older
    assert "step-00000002 is damaged" in caplog.text and "optimizer.safetensors" in caplog.text
    damage(older / "adapter/adapter_model.safetensors", "truncated")
    with pytest.raises(NoCheckpointError, match="all 2 checkpoints are damaged") as caught:
        checkpoint.newest_whole(run_dir)
    assert caught.value.exit_code == 76


def test_no_checkpoint_is_no_damage(tmp_path: Path) -> None:
    assert checkpoint.newest_whole(tmp_path) is None
    (tmp_path / "checkpoints" / "step-00000004.tmp-77").mkdir(parents=True)
    assert checkpoint.newest_whole(tmp_path) is None and checkpoint.published(tmp_path) == []


def copies(run_dir: Path, count: int) -> list[str]:
    """Checkpoints of steps 1 to ``count``, copies of the first."""
    shutil.rmtree(checkpoint.step_dir(run_dir, 2))
    for step in range(2, count + 1):
        shutil.copytree(checkpoint.step_dir(run_dir, 1), checkpoint.step_dir(run_dir, step))
    return [path.name for path in checkpoint.published(run_dir)]


def test_prune_keeps_the_newest_and_the_best(run_dir: Path) -> None:
    names = copies(run_dir, 12)
    checkpoint.prune(run_dir, 9)
    assert [path.name for path in checkpoint.published(run_dir)] == names[3:]
    write_bytes(run_dir / "best", b"step-00000005\n")
    checkpoint.prune(run_dir, 2)
    assert [path.name for path in checkpoint.published(run_dir)] == [names[4], *names[10:]]
    checkpoint.prune(run_dir, 5)
    assert len(checkpoint.published(run_dir)) == 3


def test_find_adapter(run_dir: Path) -> None:
    first, second = checkpoint.step_dir(run_dir, 1), checkpoint.step_dir(run_dir, 2)
    assert checkpoint.find_adapter(run_dir) == second / "adapter", "a run without best: the latest"
    write_bytes(run_dir / "best", b"step-00000001\n")
    assert checkpoint.find_adapter(run_dir) == first / "adapter", "a run: the best"
    assert checkpoint.find_adapter(second) == second / "adapter"
    assert checkpoint.find_adapter(second / "adapter") == second / "adapter"


def test_find_adapter_refuses_what_is_damaged_or_none(run_dir: Path, tmp_path: Path) -> None:
    damage(checkpoint.step_dir(run_dir, 2) / "adapter/adapter_model.safetensors", "flipped")
    for lora_dir in (run_dir, checkpoint.step_dir(run_dir, 2)):
        with pytest.raises(UserError, match=r"damaged.*adapter_model\.safetensors"):
            checkpoint.find_adapter(lora_dir)
    (tmp_path / "empty").mkdir()
    for lora_dir in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(UserError, match="neither a run directory"):
            checkpoint.find_adapter(lora_dir)


def test_a_pointer_to_nothing_is_none(run_dir: Path) -> None:
    assert checkpoint.pointer(run_dir, "best") is None
    write_bytes(run_dir / "best", b"step-00000099\n")
    assert checkpoint.pointer(run_dir, "best") is None
    assert checkpoint.find_adapter(run_dir) == checkpoint.step_dir(run_dir, 2) / "adapter"
    os.truncate(run_dir / "latest", 0)
    assert checkpoint.pointer(run_dir, "latest") is None, (
        "an empty pointer names the folder of all checkpoints"
    )
