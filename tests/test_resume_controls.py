"""Going on from a checkpoint that lacks one part of the state gives another result: the tests of bit-identity can fail.

Also what a start says when the machine's threads are not those of the start before. All in one process of one rank.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import run_ranks
from safetensors.torch import load_file, save_file
from test_checkpoint_resume import STEPS, Runs, Seen, last_files, write_words

from voxtral_dist import checkpoint, distributed

HALF = 4
ADAPTER = "adapter/adapter_model.safetensors"


def in_state(**values: Any) -> Callable[[Path], None]:
    """Set values in the trainer state of a checkpoint."""

    def edit(folder: Path) -> None:
        path = folder / checkpoint.STATE
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def without_moments(folder: Path) -> None:
    """As an optimizer that was not restored."""
    moments = load_file(folder / checkpoint.OPTIMIZER)
    save_file(
        {name: torch.zeros_like(value) for name, value in moments.items()}, folder / checkpoint.OPTIMIZER
    )


def with_older_weights(folder: Path) -> None:
    shutil.copy(folder.with_name(f"step-{HALF - 2:08d}") / ADAPTER, folder / ADAPTER)


def with_another_epoch(folder: Path) -> None:
    """As a data set whose order of this epoch was forgotten."""
    plan = json.loads((folder / checkpoint.STATE).read_text())["plan"]
    plan["generations"]["tqa"][0]["first_epoch"] += 1
    in_state(plan=plan)(folder)


EDITS: dict[str, Callable[[Path], None]] = {
    "nothing": lambda folder: None,
    "moments": without_moments,
    "adam step": in_state(adam_step=0),
    "step": in_state(step=HALF - 1),
    "weights": with_older_weights,
    "order of the data": with_another_epoch,
}


def seal(folder: Path) -> None:
    """Write sizes and hashes of the files as they are now into the manifest."""
    path = folder / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        data = (folder / name).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(manifest))


def go(rank: int, model_dir: str, base: str) -> Seen:
    """A whole run; its second half from each edited checkpoint; and once with another number of threads."""
    distributed.stop = lambda: None  # DeepSpeed keeps its groups, so all starts share one
    folder, seen = Path(base), {}
    write_words(folder / "words.jsonl", 24)
    train = Runs(folder, model_dir)
    dropout = ("--lora_dropout", "0.1")
    seen["whole"] = train("whole", *dropout)
    for name, edit in EDITS.items():
        run = folder / name
        shutil.copytree(folder / "whole", run)
        shutil.rmtree(checkpoint.step_dir(run, STEPS))
        edit(checkpoint.step_dir(run, HALF))
        seal(checkpoint.step_dir(run, HALF))
        seen[name] = train(name, *dropout)
    shutil.copytree(folder / "whole", folder / "threads")
    shutil.rmtree(checkpoint.step_dir(folder / "threads", STEPS))
    torch.set_num_threads(2)
    seen["threads"] = train("threads", *dropout)
    return seen


@pytest.fixture(scope="module")
def runs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Seen]:
    folder = tmp_path_factory.mktemp("controls")
    return folder, run_ranks(go, 1, str(tiny_model), str(folder))[0]


@pytest.mark.parametrize("name", EDITS)
def test_each_part_of_the_state_decides(runs: tuple[Path, Seen], name: str) -> None:
    folder, seen = runs
    assert (seen["whole"]["code"], seen[name]["code"]) == (0, 0), seen[name]
    assert f"going on from {checkpoint.step_dir(folder / name, HALF)}" in seen[name]["out"]
    same = last_files(folder / name) == last_files(folder / "whole")
    assert same == (name == "nothing")


def test_another_number_of_threads_is_said(runs: tuple[Path, Seen]) -> None:
    seen = runs[1]
    warning = "going on with threads 1 -> 2: equal to rounding, not bit for bit"
    assert seen["threads"]["code"] == 0 and warning in seen["threads"]["out"]
    assert "going on with" not in seen["nothing"]["out"]
