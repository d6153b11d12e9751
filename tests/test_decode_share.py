"""One rank's decoding: resumed after a kill, halved when it does not fit, and failures that name their example."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from demo_runs import Demo
from harness import run_ranks
from test_evaluator import open_data, with_adapter

from voxtral_dist import decode_share, evaluator
from voxtral_dist.decode_share import ANSWER_TOKENS, DecodeSettings, Share
from voxtral_dist.errors import VoxtralDistError
from voxtral_dist.packing import pack
from voxtral_dist.prediction_parts import Parts, remove

ROWS = 4


@pytest.fixture(scope="module")
def folders(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Packed dev sets of the three tasks, six rows each."""
    root = tmp_path_factory.mktemp("decode_share")
    (root / "audio").symlink_to(demo.folder / "audio")
    files = []
    for task in ("asr", "sqa", "tqa"):
        lines = (demo.folder / f"{task}.dev.jsonl").read_text("utf-8").splitlines(keepends=True)
        files.append(root / f"{task}.jsonl")
        files[-1].write_text("".join(lines[:6]), encoding="utf-8")
    return [str(folder) for folder in pack(files, root / "shards", split="dev")]


def settings(**changes: Any) -> DecodeSettings:
    return DecodeSettings(**({"rows": ROWS, "max_new_tokens": 6} | changes))


def evaluate(model_dir: Path, folders: list[str], out: Path | None = None, **changes: Any) -> Any:
    data = open_data(str(model_dir), folders)
    return evaluator.evaluate(with_adapter(str(model_dir)), data, settings(**changes), folder=out)


@pytest.fixture(scope="module")
def whole(tiny_model: Path, folders: list[str]) -> list[dict[str, Any]]:
    """The predictions of an evaluation that nothing disturbed."""
    return evaluate(tiny_model, folders).predictions


def failing_at(after: int, act: Callable[[], None]) -> None:
    """Arrange for ``act`` to be called when so many examples are decoded."""
    decode = decode_share.decode_stream

    def counted(*args: Any, **options: Any) -> Iterator[Any]:
        for number, answer in enumerate(decode(*args, **options)):
            if number == after:
                act()
            yield answer

    decode_share.decode_stream = counted


def evaluate_and_die(model_dir: str, folders: list[str], out: str, after: int) -> None:
    torch.set_num_threads(1)
    failing_at(after, lambda: os.kill(os.getpid(), signal.SIGKILL))
    evaluate(Path(model_dir), folders, Path(out))


def parts_of(out: Path) -> list[dict[str, Any]]:
    """Every whole line of every part."""
    lines = [
        line for path in out.glob("parts/part-*") for line in path.read_bytes().splitlines(keepends=True)
    ]
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def decoded_ids(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that every decoded example's id is added to."""
    seen: list[str] = []
    record = decode_share._record

    def noted(data: Any, example: Any, *args: Any) -> dict[str, Any]:
        seen.append(example.sample.id)
        return record(data, example, *args)

    monkeypatch.setattr(decode_share, "_record", noted)
    return seen


def test_a_killed_evaluation_decodes_only_what_is_missing(
    tiny_model: Path,
    folders: list[str],
    whole: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=evaluate_and_die, args=(str(tiny_model), folders, str(tmp_path), 7)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    found = parts_of(tmp_path)
    before = [row["id"] for row in found if "id" in row]
    assert len(before) == 7 and "key" in found[0]
    (path,) = tmp_path.glob("parts/part-*")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with path.open("ab") as file:  # what a kill in the middle of a write leaves
        file.write(b'{"task": "asr", "pla')
    seen = decoded_ids(monkeypatch)
    assert evaluate(tiny_model, folders, tmp_path).predictions == whole
    assert len(seen) == len(whole) - len(before) and not set(seen) & set(before)
    remove(tmp_path)
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("changes", [{"max_new_tokens": 5}, {"audio": "silence"}])
def test_parts_of_other_settings_are_not_taken(
    tiny_model: Path,
    folders: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    first = evaluate(tiny_model, folders, tmp_path)
    seen = decoded_ids(monkeypatch)
    other = evaluate(tiny_model, folders, tmp_path, **changes)
    assert len(seen) == len(first.predictions)
    assert [r["prediction"] for r in other.predictions] != [r["prediction"] for r in first.predictions]


def test_parts_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    record = {"task": "asr", "id": "7", "place": [0, 3], "prediction": "one"}
    for prediction in ("one", "one"):
        parts = Parts(tmp_path, "key", 0)
        parts.append([record | {"prediction": prediction}])
        parts.close()
    assert Parts(tmp_path, "key", 0).begin() == [record]
    assert Parts(tmp_path, "other", 0).begin() == []
    parts = Parts(tmp_path, "key", 1)
    parts.append([record | {"prediction": "two"}])
    parts.close()
    with pytest.raises(VoxtralDistError, match=r"another prediction of asr/7.*remove .*parts"):
        Parts(tmp_path, "key", 0).begin()


def test_what_does_not_fit_is_decoded_with_half_as_much_at_once(
    tiny_model: Path, folders: list[str], whole: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, rows = decode_share.decode_stream, []

    def cramped(model: Any, groups: Iterator[Any], caps: Any, **options: Any) -> Iterator[Any]:
        def checked() -> Iterator[Any]:
            for number, group in enumerate(groups):
                if caps.rows > 1 and number == 2:
                    raise torch.OutOfMemoryError("out of memory: tried to allocate 2 GiB")
                yield group

        rows.append(caps.rows)
        yield from decode(model, checked(), caps, **options)

    monkeypatch.setattr(decode_share, "decode_stream", cramped)
    assert evaluate(tiny_model, folders).predictions == whole
    assert rows[0] == ROWS and {4, 2, 1} == set(rows)


def evaluate_with_a_fault(rank: int, model_dir: str, folders: list[str], out: str) -> dict[str, Any]:
    """On rank 1 the second example cannot be decoded, rank 0 takes its time: the error, the culprit, what was done."""
    collate, seen = Share._collate, []

    def faulty(self: Share, examples: list[Any]) -> Any:
        seen.extend(f"{e.sample.task}/{e.sample.id}" for e in examples if e.sample.id not in "".join(seen))
        if rank == 1 and seen[1:2] == [f"{examples[0].sample.task}/{examples[0].sample.id}"]:
            raise ValueError("a bad tensor")
        time.sleep(0.4 * (rank == 0))
        return collate(self, examples)

    Share._collate = faulty  # type: ignore[method-assign]
    try:
        evaluate(Path(model_dir), folders, Path(out), rows=1)
    except VoxtralDistError as error:
        return {"error": str(error), "seen": seen}
    return {}


def test_a_failure_names_rank_and_example_and_stops_all_ranks(
    tiny_model: Path, folders: list[str], whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    first, second = run_ranks(evaluate_with_a_fault, 2, str(tiny_model), folders, str(tmp_path))
    culprit = second["seen"][1]
    for found in (first, second):
        assert found["error"].startswith(f"rank 1: {culprit} cannot be decoded: ValueError: a bad tensor")
    assert len(first["seen"]) < len(whole) / 2 - 2, "rank 0 must not decode its whole share first"
    assert evaluate(tiny_model, folders, tmp_path).predictions == whole, "a later start goes on"


def test_a_row_that_cannot_be_read_is_named(
    tiny_model: Path, folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from voxtral_dist.task_data import TaskData

    read = TaskData.read

    def broken(self: TaskData, example: int, *args: Any, **options: Any) -> Any:
        if (self.name, example) == ("sqa", 3):
            raise OSError(5, "Input/output error")
        return read(self, example, *args, **options)

    monkeypatch.setattr(TaskData, "read", broken)
    with pytest.raises(
        VoxtralDistError, match=r"rank 0: sqa/sqa-dev-0000\d cannot be read: .*Input/output error"
    ):
        evaluate(tiny_model, folders)


def test_limits_follow_the_audio_unless_given() -> None:
    samples = np.array([0, 16_000, 480_000])
    auto = DecodeSettings(1)
    assert auto.limit("asr", samples).tolist() == [32, 44, 407]
    assert auto.limit("sqa", samples).tolist() == auto.limit("tqa", samples).tolist() == [ANSWER_TOKENS] * 3
    assert DecodeSettings(1, max_new_tokens=7).limit("asr", samples).tolist() == [7] * 3


def test_silence_is_heard_as_silence(tiny_model: Path, folders: list[str]) -> None:
    data = open_data(str(tiny_model), folders)
    own, silent = data.read((0, 1)), data.read((0, 1), "silence")
    assert silent.sample == own.sample and silent.n_samples == own.n_samples
    assert silent.mel is not None and own.mel is not None and silent.mel.shape == own.mel.shape
    assert torch.all(silent.mel == silent.mel.flatten()[0]) and not torch.equal(silent.mel, own.mel)
    assert data.read((2, 1), "silence").mel is None
