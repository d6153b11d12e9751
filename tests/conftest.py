"""Fixtures shared by the tests: a tiny base model, packed demo data."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # saves DeepSpeed's import of a compiler, seconds per rank
sys.path.insert(0, str(Path(__file__).parent))

from demo_runs import Demo, compose
from harness import load_script

LONGEST = (
    "test_faults test_train_run test_stage_runs test_plan_batches test_launch_training test_watchdog".split()
)
"""Files that take the longest; begun first, so that no process of the tests is left with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's base model: 2-s chunks of 25 audio tokens."""
    out = tmp_path_factory.mktemp("models") / "tiny"
    load_script("tools/build_tiny_voxtral.py").build(out)
    return out


@pytest.fixture(scope="session")
def demo(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """The demo's rows, packed data and model; a test that changes a file of it works on a copy."""
    return compose(tmp_path_factory.mktemp("demo"), tiny_model)
