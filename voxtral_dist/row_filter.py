"""Which rows of JSONL files take part in packing: ``--where "domain!=call; language=ko,en"``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from voxtral_dist.errors import UserError
from voxtral_dist.jsonl import Row, scan
from voxtral_dist.tasks import get_task

FILTER_FIELDS = ("language", "domain", "speaker", "document", "task")
"""What rows can be filtered by."""


class RowFilter:
    """Which rows take part, by their fields; counts what it is asked.

    Args:
        text: ``domain!=call; language=ko,en``: conditions FIELD=VALUES and FIELD!=VALUES separated by ``;``, VALUES
            separated by commas. A row takes part when it meets all of them; a field that it lacks is unequal to
            every value. Empty: all rows take part.
        flag: what to call it in messages.

    Attributes:
        text, flag: as given.
        seen, left_out: rows so far, and those of them that take no part.

    Raises:
        UserError: no condition, an unknown field or task, no value.
    """

    def __init__(self, text: str = "", flag: str = "--where") -> None:
        self.text, self.flag = text, flag
        self.seen = self.left_out = 0
        self._conditions = [self._condition(part) for part in text.split(";")] if text.strip() else []

    def __call__(self, row: Row, task: str | None) -> bool:
        """Whether a row, with its task or None for an unclear one, takes part."""
        kept = all(
            (field_value(row, name, task) in values) == equal
            for name, equal, values in self._conditions
            if name != "task" or task is not None
        )
        self.seen += 1
        self.left_out += not kept
        return kept

    def _condition(self, text: str) -> tuple[str, bool, frozenset[str]]:
        match = re.fullmatch(r"\s*(\w+)\s*(!?=)(?!=)(.*)", text, re.S)
        values = [value.strip() for value in match[3].split(",")] if match else []
        if match is None or match[1] not in FILTER_FIELDS or not all(values):
            raise UserError(
                f"{self.flag} {self.text!r}: {text.strip()!r} is not FIELD=VALUE or FIELD!=VALUE with a field of "
                f"{', '.join(FILTER_FIELDS)}, and alternatives separated by commas; conditions are separated by ';'"
            )
        if match[1] == "task":
            values = [get_task(value, self.flag).name for value in values]
        lower = match[1] == "language"
        return match[1], match[2] == "=", frozenset(v.lower() if lower else v for v in values)


def field_value(row: Row, name: str, task: str | None) -> str:
    """A row's value of one of :data:`FILTER_FIELDS`, "" where it has none."""
    value = (task or "") if name == "task" else str(row.get(name) or "").strip()
    return value.lower() if name == "language" else value


def values_of(
    files: Sequence[str | Path], tasks: Sequence[str | None], name: str, where: RowFilter
) -> list[str]:
    """The values that a field of :data:`FILTER_FIELDS` has in the rows that take part, sorted, without ""."""
    found: set[str] = set()

    def collect(row: Row, task: str | None) -> bool:
        if where(row, task):
            found.add(field_value(row, name, task))
        return False

    for path, task_name in zip(files, tasks, strict=True):
        for _ in scan(Path(path), task_name, collect):
            pass
    return sorted(found - {""})
