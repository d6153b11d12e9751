"""Distributed evaluation: every rank decodes its share and writes it down at once; rank 0 gathers, scores and writes.

``predictions.jsonl`` depends on the model and the data alone, never on ranks, batches or kills; what varies from run to
run goes to ``timing.jsonl``.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from voxtral_dist import activity, distributed
from voxtral_dist.atomic import write_bytes, write_json
from voxtral_dist.batch import DecodeCaps
from voxtral_dist.collator import Collator, Example
from voxtral_dist.decode_share import DecodeSettings, Int64, Item, Share
from voxtral_dist.errors import BadSamplesError, ExitCode, VoxtralDistError
from voxtral_dist.eval_data import EvalData
from voxtral_dist.logger import get_logger
from voxtral_dist.prediction_parts import Parts
from voxtral_dist.record_scores import groups, intervals, score_records
from voxtral_dist.tasks import TASKS

log = get_logger(__name__)

PREVIEWS_PER_TASK = 3


class DecodingData(Protocol):
    """What is decoded: :class:`EvalData`, or :class:`~voxtral_dist.predict_data.PredictData`."""

    collator: Collator
    max_len: int

    @property
    def fingerprint(self) -> str:
        """A hash of everything on the side of the data that decides a prediction."""

    def __len__(self) -> int:
        """Number of items."""

    def batches(
        self, rank: int, world_size: int, caps: DecodeCaps, limit_of: Callable[[str, Int64], Int64]
    ) -> list[list[Item]]:
        """A rank's items in batches; see :meth:`EvalData.batches`."""

    def read(self, item: Item, audio: str = "own") -> Example:
        """An item, ready to be decoded."""

    def describe(self, item: Item) -> str:
        """What to call an item in messages."""


@dataclass(frozen=True)
class Decodings:
    """What all ranks decoded, on rank 0.

    Attributes:
        records: one for each item, with its ``place`` and ``timing``, in no order.
        speed: of this start, what an earlier one left aside.
    """

    records: list[dict[str, Any]]
    speed: dict[str, float | None]


@dataclass(frozen=True)
class Evaluation:
    """The result on rank 0.

    Attributes:
        predictions: one record per example, sorted by task and id.
        timings: the same examples with what varies from run to run.
        metrics: all scores.
        places: task and number of the same examples in the dev data.
    """

    predictions: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    metrics: dict[str, Any]
    places: list[Item]


def evaluate(
    model: Any,
    data: EvalData,
    settings: DecodeSettings,
    provenance: Mapping[str, Any] | None = None,
    folder: Path | None = None,
) -> Evaluation | None:
    """Decode and score the dev data. Collective; the result is on rank 0, None elsewhere.

    Args:
        model: Voxtral with or without adapter, on its device; left in the mode it was in.
        data: dev data, the same on every rank.
        settings: how to decode.
        provenance: what decides the predictions besides; kept in ``metrics.json`` beside the scores.
        folder: where predictions are kept in ``parts`` as they come, for a start after a kill; None: nowhere.

    Raises:
        BadSamplesError: the words of a row are damaged. Damaged audio is a missing prediction instead.
        VoxtralDistError: an example cannot be decoded; names its rank and the example.
    """
    about = {**(provenance or {}), "max_new_tokens": settings.max_new_tokens, "max_len": data.max_len}
    decoded = decode(model, data, settings, about, folder)
    if decoded is None:
        return None
    activity.now("scoring")
    order = {name: number for number, name in enumerate(TASKS)}
    records = sorted(decoded.records, key=lambda r: (order[r["task"]], r["id"]))
    places = [(int(task), int(example)) for task, example in (r.pop("place") for r in records)]
    timings = [{"task": r["task"], "id": r["id"], **r.pop("timing")} for r in records]
    metrics = score_records(records)
    if settings.audio == "own":
        metrics |= {"intervals": intervals(records, metrics), "groups": groups(records)}
    metrics |= {"provenance": about, "speed": decoded.speed}
    metrics |= {name: decoded.speed[name] for name in ("samples_per_second", "rtfx")}
    return Evaluation(records, timings, metrics, places)


def decode(
    model: Any,
    data: DecodingData,
    settings: DecodeSettings,
    about: Mapping[str, Any],
    folder: Path | None = None,
) -> Decodings | None:
    """Decode all items that no earlier start has decoded. Collective; arguments and errors as of :func:`evaluate`."""
    key = json.dumps([data.fingerprint, settings.audio, about], sort_keys=True, default=str)
    parts = Parts(folder, key, distributed.rank()) if folder else None
    known = parts.begin() if parts and distributed.rank() == 0 else []
    places = distributed.broadcast_json([record["place"] for record in known])
    done = {(first, second) for first, second in places}
    if done:
        log.info("%d of %d examples were decoded before; going on with the others", len(done), len(data))
    was_training = model.training
    model.eval()
    share = Share(model, data, settings)
    share.run(done, parts)
    model.train(was_training)
    activity.now("gathering the predictions", waiting=True)
    shares = distributed.gather_json(share.result())
    failure = distributed.broadcast_json(next((s["failure"] for s in shares or () if s["failure"]), None))
    if failure:
        code, message = failure
        raise (BadSamplesError if code == ExitCode.BAD_SAMPLES else VoxtralDistError)(message)
    if shares is None:
        return None
    fresh = [record for one in shares for record in one["records"]]
    if len(known) + len(fresh) != len(data):
        raise RuntimeError(f"{len(known)} + {len(fresh)} predictions for {len(data)} examples")
    return Decodings(known + fresh, _speed(fresh, shares))


def _speed(
    records: Sequence[Mapping[str, Any]], shares: Sequence[Mapping[str, Any]]
) -> dict[str, float | None]:
    """How fast ``records`` were decoded: audio seconds, examples and new tokens per second of the slowest rank."""
    slowest = max(share["seconds"] for share in shares)
    positions = sum(share["positions"] for share in shares)
    first, last = ([r["timing"][f"{name}_token_s"] for r in records] for name in ("first", "last"))
    if not records or not slowest:
        return dict.fromkeys(("samples_per_second", "rtfx"))
    return {
        "seconds": slowest,
        "samples_per_second": len(records) / slowest,
        "new_tokens_per_second": sum(r["n_new_tokens"] for r in records) / slowest,
        "rtfx": sum(r["duration"] for r in records) / slowest,
        "first_token_s": statistics.median(first),
        "last_token_s": statistics.median(last),
        "padding_share": sum(share["padding"] for share in shares) / positions if positions else 0.0,
    }


def write(folder: Path, evaluation: Evaluation) -> None:
    """Write ``predictions.jsonl``, ``timing.jsonl`` and, last, ``metrics.json``; readable by the owner alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("predictions.jsonl", evaluation.predictions), ("timing.jsonl", evaluation.timings)):
        write_lines(folder / name, rows)
    write_json(folder / "metrics.json", evaluation.metrics, private=True)


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Publish rows as JSON lines that the owner alone can read."""
    lines = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    write_bytes(path, lines.encode(), private=True)
