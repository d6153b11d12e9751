"""The sound of evaluated samples, found again in packed dev sets, for pages that play it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from voxtral_dist.errors import VoxtralDistError
from voxtral_dist.logger import get_logger
from voxtral_dist.shards import CorruptSampleError, ShardSet

log = get_logger(__name__)

Sound = Callable[[Mapping[str, Any]], bytes | None]
"""From a record with ``task``, ``id`` and ``references`` to its FLAC bytes; None where there are none."""


def find(folder: Path, val_shards: str = "") -> Sound:
    """The sound of an evaluation's samples.

    Args:
        folder: of the evaluation; without ``val_shards`` the dev sets are those of the run around it. Where there is no
            run, or its sets cannot be opened, no sample has sound.
        val_shards: comma separated folders of data sets.

    Raises:
        UserError: one of ``val_shards`` is no finished data set.
    """
    if val_shards:
        return _sound(_open(val_shards))
    try:
        return _sound(_open(_val_shards_of_run(folder)))
    except (VoxtralDistError, yaml.YAMLError, OSError, AttributeError) as error:
        log.warning("no sound on the page: %s", " ".join(str(error).split()))
        return _sound([])


def _open(val_shards: str) -> list[ShardSet]:
    return [ShardSet.open(name.strip()) for name in val_shards.split(",") if name.strip()]


def _val_shards_of_run(folder: Path) -> str:
    """``val_shards`` of the config.yaml in one of the two folders above, as RUN/eval/step-00000100 has them."""
    for above in folder.resolve().parents[:2]:
        config = above / "config.yaml"
        if config.is_file():
            return str((yaml.safe_load(config.read_text("utf-8")) or {}).get("val_shards") or "")
    return ""


def _sound(sets: Sequence[ShardSet]) -> Sound:
    """Finds an example by its id; one whose references are others is another example."""
    places = {}
    for data in sets:
        for index in range(len(data)):
            sample = data.sample(index)
            places[sample.task, sample.id] = data, index, list(sample.references)

    def sound(record: Mapping[str, Any]) -> bytes | None:
        data, index, references = places.get((record["task"], record["id"]), (None, 0, []))
        if data is None or references != record["references"]:
            return None
        with suppress(CorruptSampleError):
            audio = data.read(index).audio
            return audio if audio and audio.startswith(b"fLaC") else None
        return None

    return sound
