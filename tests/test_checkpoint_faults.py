"""Saves that die or fail at any point: what was whole stays whole, what is damaged is refused by name."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from harness import run_ranks
from safetensors.torch import load_file
from test_checkpoint import ALL_FILES, FILES, build, damage, full_disk, tree

from voxtral_dist import activity, checkpoint, optimizer_state
from voxtral_dist.checkpoint import Snapshot
from voxtral_dist.errors import NoCheckpointError, VoxtralDistError
from voxtral_dist.saver import Saver

NAMES = {1: "step-00000001", 2: "step-00000002", 3: "step-00000003"}


def taken(step: int, megabytes: float = 0.1) -> Snapshot:
    """What a checkpoint of a step holds; no two steps share a byte of their tensors."""
    generator = torch.Generator().manual_seed(step)
    values = [torch.randn(int(megabytes * 125_000), generator=generator) for _ in range(2)]
    return Snapshot(
        {"step": step, "adam_step": step}, {"exp_avg/w": values[0]}, ({"w": values[1]}, peft.LoraConfig())
    )


def killed_child(work: Callable[..., None], *args: Any, when: Callable[[], bool] | None = None) -> None:
    """Run ``work`` in a forked child that SIGKILL ends: from outside once ``when()``, or by its own hand."""
    child = multiprocessing.get_context("fork").Process(target=work, args=args)
    child.start()
    while when and child.is_alive() and not when():
        pass
    if when:
        os.kill(child.pid or 0, signal.SIGKILL)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


def die(*_: Any, **__: Any) -> None:
    """Takes the place of a function at which the process is to die."""
    os.kill(os.getpid(), signal.SIGKILL)


def litter(run: Path) -> list[Path]:
    return list((run / "checkpoints").glob("*.tmp-*"))


def written(run: Path) -> int:
    """Bytes of unpublished checkpoints."""
    total = 0
    for folder, _, names in os.walk(run / "checkpoints"):
        for name in names if ".tmp-" in folder else ():
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:
                continue
    return total


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the checkpoint of step 1."""
    checkpoint.publish(tmp_path, taken(1))
    return tmp_path


def newest(run: Path) -> str:
    found = checkpoint.newest_whole(run)
    assert found is not None
    return found.name


@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_killed_while_writing(run: Path, share: float) -> None:
    big = taken(2, megabytes=24)
    killed_child(checkpoint.publish, run, big, when=lambda: written(run) >= share * 24e6)
    assert litter(run), "the kill came after the checkpoint was whole"
    assert newest(run) == NAMES[1] and [path.name for path in checkpoint.published(run)] == [NAMES[1]]
    assert checkpoint.pointer(run, "latest") == checkpoint.step_dir(run, 1)
    checkpoint.publish(run, taken(3))
    assert not litter(run) and newest(run) == NAMES[3]


def publish_and_die(run: Path, step: int, at: str) -> None:
    setattr(checkpoint, at, die)
    checkpoint.publish(run, taken(step))


def test_killed_between_the_rename_and_latest(run: Path) -> None:
    killed_child(publish_and_die, run, 2, "write_bytes")
    assert (run / "latest").read_text() == f"{NAMES[1]}\n" and not litter(run)
    assert newest(run) == NAMES[2], "the pointer is a hint, the scan decides"


def test_killed_before_the_rename(run: Path) -> None:
    killed_child(publish_and_die, run, 2, "write_json")
    assert litter(run) and newest(run) == NAMES[1]


def test_remains_of_the_same_step_are_replaced(run: Path) -> None:
    for name in (f"{NAMES[2]}.tmp-1", f"{NAMES[2]}.tmp-{os.getpid()}", NAMES[2]):
        shutil.copytree(run / "checkpoints" / NAMES[1], run / "checkpoints" / name)
    (run / "checkpoints" / NAMES[2] / checkpoint.MANIFEST).unlink()
    (run / "checkpoints" / NAMES[2] / "more").write_text("of another version")
    checkpoint.publish(run, taken(2))
    assert tree(checkpoint.step_dir(run, 2)) == sorted([*ALL_FILES, "adapter"])
    assert newest(run) == NAMES[2] and not litter(run)


def prune_and_die(run: Path) -> None:
    shutil.rmtree = die  # type: ignore[assignment]
    checkpoint.prune(run, 2)


def test_killed_while_older_ones_are_deleted(run: Path) -> None:
    checkpoint.publish(run, taken(2))
    checkpoint.publish(run, taken(3))
    killed_child(prune_and_die, run)
    first, *kept = checkpoint.published(run)
    assert "manifest" in str(checkpoint.verify(first)), "a half deleted checkpoint must not look whole"
    assert [checkpoint.verify(path) for path in kept] == [None, None] and newest(run) == NAMES[3]
    checkpoint.prune(run, 2)
    assert checkpoint.published(run) == kept


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found_and_named(run: Path, name: str) -> None:
    path = checkpoint.step_dir(run, 1) / name
    whole, places = path.read_bytes(), random.Random(name)
    for _ in range(20):
        data = bytearray(whole)
        data[places.randrange(len(data))] ^= 1 << places.randrange(8)
        path.write_bytes(data)
        assert name in str(checkpoint.verify(checkpoint.step_dir(run, 1)))
    path.write_bytes(whole)
    assert checkpoint.verify(checkpoint.step_dir(run, 1)) is None


@pytest.mark.parametrize("share", [0.5, 0.99])
@pytest.mark.parametrize("name", ALL_FILES)
def test_a_truncated_file_sends_the_run_one_back(run: Path, name: str, share: float) -> None:
    checkpoint.publish(run, taken(2))
    path = checkpoint.step_dir(run, 2) / name
    os.truncate(path, int(path.stat().st_size * share))
    assert Path(name).name.split(".")[0] in str(checkpoint.verify(checkpoint.step_dir(run, 2)))
    assert newest(run) == NAMES[1]


@pytest.mark.parametrize("name", FILES[1:])
def test_a_file_of_another_step_is_refused(run: Path, name: str) -> None:
    checkpoint.publish(run, taken(2))
    shutil.copyfile(checkpoint.step_dir(run, 1) / name, checkpoint.step_dir(run, 2) / name)
    assert name in str(checkpoint.verify(checkpoint.step_dir(run, 2))) and newest(run) == NAMES[1]


def test_a_checkpoint_under_the_name_of_another_step_is_refused(run: Path) -> None:
    shutil.copytree(checkpoint.step_dir(run, 1), checkpoint.step_dir(run, 2))
    assert checkpoint.verify(checkpoint.step_dir(run, 2)) == "the manifest is of step 1"
    assert newest(run) == NAMES[1]
    damage(checkpoint.step_dir(run, 1) / FILES[0], "flipped")
    with pytest.raises(NoCheckpointError, match="all 2 checkpoints are damaged"):
        checkpoint.newest_whole(run)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own with so much space; skips the test where it cannot be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if os.geteuid() == 0 else None
    if done is None or done.returncode:
        pytest.skip(f"a tmpfs needs root: {done.stderr.strip() if done else 'this is another user'}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", megabytes=4) as run:
        checkpoint.publish(run, taken(1, megabytes=1))
        before = tree(run)
        for place in (2, 3):  # nothing piles up
            with pytest.raises(Exception, match="No space left on device"):
                checkpoint.publish(run, taken(place, megabytes=8))
            assert tree(run) == before and newest(run) == NAMES[1]
        checkpoint.publish(run, taken(2, megabytes=1))
        assert newest(run) == NAMES[2]


def beside(run: Path, then: Callable[[], None]) -> None:
    """Begin to save step 2 in a thread of this process, and go on with something else."""
    checkpoint.snapshot = lambda *_: taken(2, megabytes=24)
    Saver(run, keep=3, max_failures=3).save(2, None, {})  # type: ignore[arg-type]
    then()


def test_killed_while_the_thread_writes(run: Path) -> None:
    killed_child(beside, run, lambda: time.sleep(60), when=lambda: written(run) > 0)
    assert newest(run) == NAMES[1] and checkpoint.pointer(run, "latest") == checkpoint.step_dir(run, 1)


def test_an_error_elsewhere_does_not_cost_the_checkpoint(run: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=beside, args=(run, sys.exit))
    child.start()
    child.join(60)
    assert newest(run) == NAMES[2] and not litter(run)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Writers wait for it; the engine is left out."""
    opened, publish = threading.Event(), checkpoint.publish

    def publish_later(run: Path, snapshot: Snapshot) -> None:
        assert opened.wait(20)
        publish(run, snapshot)

    monkeypatch.setattr(checkpoint, "publish", publish_later)
    monkeypatch.setattr(checkpoint, "snapshot", lambda _, state: taken(state["step"]))
    return opened


def test_training_goes_on_while_a_thread_writes(run: Path, gate: threading.Event) -> None:
    saver = Saver(run, keep=3, max_failures=1)
    saver.save(2, None, {})  # type: ignore[arg-type]
    activity.now("micro-batch 3")
    said = activity.current()
    assert newest(run) == NAMES[1], "save() returned before the checkpoint was there"
    threading.Timer(0.3, gate.set).start()
    while checkpoint.verify(checkpoint.step_dir(run, 2)) is not None:
        time.sleep(0.01)
    assert activity.current() is said, "the writer spoke for the main thread"
    saver.wait(final=True)


def test_a_save_waits_for_the_one_before(run: Path, gate: threading.Event) -> None:
    saver = Saver(run, keep=3, max_failures=1)
    saver.save(2, None, {})  # type: ignore[arg-type]
    threading.Timer(0.3, gate.set).start()
    saver.save(3, None, {})  # type: ignore[arg-type]
    assert checkpoint.verify(checkpoint.step_dir(run, 2)) is None
    saver.wait()
    assert newest(run) == NAMES[3]


def test_a_bug_in_the_writer_is_not_waited_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        checkpoint, "snapshot", lambda *_: Snapshot({"step": 2, "plan": {1, 2}}, {}, ({}, None))
    )
    saver = Saver(run, keep=3, max_failures=3)
    saver.save(2, None, {})  # type: ignore[arg-type]
    with pytest.raises(VoxtralDistError, match="checkpoint of step 2 could not be written"):
        saver.wait()
    assert newest(run) == NAMES[1] and not litter(run)


def set_state(engine: Any, value: float) -> None:
    """Parameters and moments that follow from one number, in place, as an optimizer step does it."""
    with torch.no_grad():
        for name, parameter in engine.named_parameters:
            parameter.copy_(torch.full_like(parameter, value) + len(name) / 100)
    for state in engine.zero_optimizer.optimizer.state.values():
        state["exp_avg"].fill_(value)
        state["exp_avg_sq"].fill_(value * value)


def ended(action: Callable[[], None]) -> str:
    """The message of the error an action ends with, "" without one."""
    try:
        action()
    except VoxtralDistError as error:
        return str(error)
    return ""


def save_in_all_weathers(rank: int, model_dir: str, folder: str) -> dict[str, Any]:
    """Saves beside a training that goes on, and saves on a disk that is full for a while."""
    engine, _ = build(model_dir, seed=1)
    moments, _ = optimizer_state.gather(engine)
    optimizer_state.restore(engine, moments, 5)
    set_state(engine, 0.5)
    if rank == 0:
        held = checkpoint.snapshot(engine, {"step": 1, "draws_consumed": 12})
        assert held is not None
        checkpoint.publish(Path(folder, "synchronous"), held)
        engine.model.model.save_pretrained(Path(folder, "peft"), save_embedding_layers=False)
    else:
        checkpoint.snapshot(engine, {"step": 1, "draws_consumed": 12})
    run = Path(folder, "run")
    saver = Saver(run, keep=2, max_failures=3)
    seen: dict[str, Any] = {"idle": ended(saver.wait)}
    changed, publish = threading.Event(), checkpoint.publish
    checkpoint.publish = lambda *args: (changed.wait(), publish(*args))  # type: ignore[assignment, func-returns-value]
    saver.save(1, engine, {"draws_consumed": 12})
    set_state(engine, 1.5)
    changed.set()
    saver.wait(final=True)
    if rank == 0:
        shutil.copytree(checkpoint.step_dir(run, 1), Path(folder, "first"))
    saver.save(2, engine, {})
    saver.wait()
    before = tree(run)
    with full_disk(50_000):
        seen["two failures"] = [ended(lambda step=step: saver.save(step, engine, {})) for step in (3, 4)]
        seen["two failures"].append(ended(saver.wait))
        seen["left"] = tree(run) == before
    saver.save(5, engine, {})
    seen["space again"] = ended(lambda: saver.wait(final=True))
    with full_disk(50_000):
        seen["final"] = ended(lambda: (saver.save(6, engine, {}), saver.wait(final=True)))  # type: ignore[func-returns-value]
        seen["in a row"] = [ended(lambda step=step: saver.save(step, engine, {})) for step in (7, 8)]
        seen["in a row"].append(ended(saver.wait))
    seen["newest"] = newest(run)
    return seen | {"published": [path.name for path in checkpoint.published(run)], "litter": len(litter(run))}


@pytest.fixture(scope="module")
def weathered(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """What two ranks saw, and the folder they wrote to."""
    folder = tmp_path_factory.mktemp("saver")
    return folder, run_ranks(save_in_all_weathers, 2, str(tiny_model), str(folder))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_thread_writes_the_bytes_of_a_synchronous_save(
    weathered: tuple[Path, list[dict[str, Any]]],
) -> None:
    """Also when the parameters change before it is done; and the adapter is what peft itself writes."""
    expected = files(weathered[0] / "synchronous" / "checkpoints" / NAMES[1])
    assert files(weathered[0] / "first") == expected and sorted(expected) == sorted(ALL_FILES)
    by_peft = files(weathered[0] / "peft")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert by_peft[name] == expected[f"adapter/{name}"]
    moments = load_file(weathered[0] / "first" / checkpoint.OPTIMIZER)
    assert all((value == (0.25 if "exp_avg_sq" in name else 0.5)).all() for name, value in moments.items())


def test_failed_saves_are_survived_until_there_are_too_many(
    weathered: tuple[Path, list[dict[str, Any]]],
) -> None:
    for seen in weathered[1]:
        assert seen["idle"] == "" and seen["two failures"] == ["", "", ""] and seen["left"]
        assert seen["space again"] == "", "a whole checkpoint did not reset the count"
        assert "checkpoint of step 6 could not be written" in seen["final"]
        assert "step-00000005 stays the newest" in seen["final"] and "\n" not in seen["final"]
        assert seen["final"].endswith("(failed saves in a row: 1)") and seen["in a row"][:2] == ["", ""]
        assert "checkpoint of step 8 could not be written" in seen["in a row"][2]
        assert seen["in a row"][2].endswith("(failed saves in a row: 3)")
        assert seen["published"] == [NAMES[2], "step-00000005"] and seen["newest"] == "step-00000005"
        assert seen["litter"] == 0
