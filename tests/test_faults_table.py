"""FAULTS.md names tests that exist, and exit codes that do."""

from __future__ import annotations

import re

from harness import ROOT

from voxtral_dist.errors import ExitCode

TEXT = (ROOT / "tests" / "FAULTS.md").read_text("utf-8")
NAMED = re.findall(r"`(test_\w+\.py)::(\w+)`", TEXT)
ROWS = [line.strip("|").split("|") for line in TEXT.splitlines() if line.startswith("| ")]


def test_every_named_test_exists() -> None:
    assert len(NAMED) > 60
    missing = []
    for file, name in NAMED:
        path = ROOT / "tests" / file
        if not path.is_file() or not re.search(rf"^def {name}\(", path.read_text("utf-8"), re.M):
            missing.append(f"{file}::{name}")
    assert missing == []


def test_every_fault_has_a_test() -> None:
    for row in ROWS:
        assert len(row) == 4, row
        assert row[0].strip() == "fault" or "::" in row[3], f"no test: {row[0]}"


def test_exit_codes_are_ours() -> None:
    codes = {code for row in ROWS for code in re.findall(r"\d+", row[2])}
    assert codes == {str(int(code)) for code in ExitCode}
