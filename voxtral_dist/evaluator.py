"""Distributed evaluation: every rank decodes its share, rank 0 gathers, scores and writes.

``predictions.jsonl`` depends on the model and the data alone, never on ranks or batches; what varies from run to run
goes to ``timing.jsonl``.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from voxtral_dist import activity, distributed, scoring
from voxtral_dist.atomic import write_bytes, write_json
from voxtral_dist.audio import SAMPLE_RATE
from voxtral_dist.audio_file import AudioError, Samples, decode
from voxtral_dist.collator import Example
from voxtral_dist.decode import greedy_decode
from voxtral_dist.errors import BadSamplesError
from voxtral_dist.eval_data import EvalData
from voxtral_dist.shards import CorruptSampleError
from voxtral_dist.tasks import TASKS
from voxtral_dist.text_norm import NORMALIZER

PREVIEWS_PER_TASK = 3

CLIPS_PER_TASK, CLIP_SECONDS = 2, 30
"""Previews that can also be heard, and how much of each."""


@dataclass(frozen=True)
class EvalSettings:
    """How to decode.

    Attributes:
        rows: examples decoded together.
        max_new_tokens: most tokens of an answer.
        num_workers: threads that read and decode audio.
        swap_audio: give every example the audio of another one of its task and language (the audio probe).
    """

    rows: int
    max_new_tokens: int
    num_workers: int = 2
    swap_audio: bool = False


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
    places: list[tuple[int, int]]


def evaluate(
    model: Any, data: EvalData, settings: EvalSettings, provenance: Mapping[str, Any] | None = None
) -> Evaluation | None:
    """Decode and score the dev data. Collective; the result is on rank 0, None elsewhere.

    Args:
        model: Voxtral with or without adapter, on its device; left in the mode it was in.
        data: dev data, the same on every rank.
        settings: how to decode.
        provenance: kept in ``metrics.json`` beside the scores.

    Raises:
        BadSamplesError: the words of a row are damaged. Damaged audio is a missing prediction instead.
    """
    was_training = model.training
    model.eval()
    started = time.perf_counter()
    records = [record for batch in _decode_share(model, data, settings) for record in batch]
    seconds = time.perf_counter() - started
    model.train(was_training)
    activity.now("gathering the predictions", waiting=True)
    shares = distributed.gather_json({"records": records, "seconds": seconds})
    if shares is None:
        return None
    activity.now("scoring")
    return _assemble(data, shares, provenance or {})


def _decode_share(model: Any, data: EvalData, settings: EvalSettings) -> Iterator[list[dict[str, Any]]]:
    """This rank's records, batch by batch; the next batch is read while one is decoded."""
    rank, world_size = distributed.rank(), distributed.world_size()
    batches = data.batches(rank, world_size, settings.rows)
    sources = {n: data.other_audio(n) for n in range(len(data.tasks))} if settings.swap_audio else {}

    def read(pairs: Sequence[tuple[int, int]]) -> list[Example]:
        return [
            data.tasks[task].read(
                example, task, audio_from=sources[task][example] if task in sources else None
            )
            for task, example in pairs
        ]

    total = sum(map(len, batches))
    with ThreadPoolExecutor(settings.num_workers) as pool, _progress(total, rank) as bar:
        waiting = [pool.submit(read, pairs) for pairs in batches[: settings.num_workers]]
        for number in range(len(batches)):
            activity.now(f"batch {number + 1}")
            examples = waiting.pop(0).result()
            if number + settings.num_workers < len(batches):
                waiting.append(pool.submit(read, batches[number + settings.num_workers]))
            records = _decode_batch(model, data, examples, settings)
            yield [{**record, "place": pair} for record, pair in zip(records, batches[number], strict=True)]
            bar.update(len(examples))


def _progress(total: int, rank: int) -> Any:
    return tqdm(total=total, desc="evaluate", unit="ex", disable=rank != 0, leave=False, mininterval=1.0)


def _decode_batch(
    model: Any, data: EvalData, examples: list[Example], settings: EvalSettings
) -> list[dict[str, Any]]:
    collator, device = data.collator, next(model.parameters()).device
    prompts = [collator.prompt(example.sample, example.n_samples) for example in examples]
    input_ids = collator.pad(prompts, left=True)
    audio = collator.stack_audio(examples)
    limits = [min(settings.max_new_tokens, data.max_len - len(prompt)) for prompt in prompts]
    started = time.perf_counter()
    answers = greedy_decode(
        model,
        input_ids.to(device),
        [len(prompt) for prompt in prompts],
        None if audio is None else audio.to(device),
        collator.audio_slots(input_ids).to(device),
        eos_id=collator.vocabulary.special("</s>"),
        max_new_tokens=limits,
    )
    seconds = time.perf_counter() - started
    return [
        _record(data, example, answer, len(answer) >= limit, seconds / len(examples))
        for example, answer, limit in zip(examples, answers, limits, strict=True)
    ]


def _record(
    data: EvalData, example: Example, answer: list[int], hit_max: bool, seconds: float
) -> dict[str, Any]:
    """One example's line: what is scored, and under ``timing`` what varies from run to run."""
    sample = example.sample
    if not sample.references:
        raise BadSamplesError(f"{example.error}; a dev row without its words cannot be scored")
    text = None if example.error else data.collator.vocabulary.decode(answer)
    return {
        "task": sample.task,
        "id": sample.id,
        "language": sample.language,
        "domain": sample.domain,
        "speaker": sample.speaker,
        "audio_path": sample.audio_path,
        "duration": round(example.n_samples / 16_000, 3),
        "prompt": sample.prompt,
        "references": list(sample.references),
        "prediction": text,
        "n_new_tokens": len(answer),
        "hit_max": hit_max,
        "error": example.error or None,
        "timing": {"rank": distributed.rank(), "decode_s": round(seconds, 4)},
    }


def _assemble(data: EvalData, shares: list[dict[str, Any]], provenance: Mapping[str, Any]) -> Evaluation:
    order = {name: number for number, name in enumerate(TASKS)}
    records = sorted(
        (r for share in shares for r in share["records"]), key=lambda r: (order[r["task"]], r["id"])
    )
    if len(records) != len(data):
        raise RuntimeError(f"{len(records)} predictions for {len(data)} dev examples")
    places = [(int(task), int(example)) for task, example in (r.pop("place") for r in records)]
    timings = [{"task": r["task"], "id": r["id"], **r.pop("timing")} for r in records]
    slowest = max(share["seconds"] for share in shares)
    metrics = score(records) | {
        "samples_per_second": len(records) / slowest,
        "rtfx": sum(r["duration"] for r in records) / slowest,
        "normalizer": NORMALIZER,
        "provenance": dict(provenance),
    }
    return Evaluation(records, timings, metrics, places)


def score(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metrics per task and their averages; each record also gets its own ``metrics``."""
    tasks: dict[str, Any] = {}
    for name in dict.fromkeys(record["task"] for record in records):
        members = [record for record in records if record["task"] == name]
        predictions = [record["prediction"] for record in members]
        if TASKS[name].metric == "cer":
            for record in members:
                record["metrics"] = scoring.sample_asr(record["references"][0], record["prediction"])
            tasks[name] = scoring.pool_asr(record["metrics"] for record in members)
        else:
            for record in members:
                record["metrics"] = scoring.sample_qa(record["references"], record["prediction"])
            tasks[name] = scoring.score_qa([record["references"] for record in members], predictions)
    return {"tasks": tasks, **scoring.aggregate(tasks)}


def clips(data: EvalData, evaluation: Evaluation) -> Iterator[tuple[str, Samples]]:
    """The sound of the first previews of each task that has any; what cannot be read is left out.

    Yields:
        ``task/number`` and float32 [n] at 16 kHz, at most CLIP_SECONDS of it.
    """
    shown: Counter[str] = Counter()
    for record, (task, example) in zip(evaluation.predictions, evaluation.places, strict=True):
        name = record["task"]
        if not TASKS[name].has_audio or shown[name] >= CLIPS_PER_TASK:
            continue
        shown[name] += 1
        shards, place = data.tasks[task].locate(example)
        with suppress(CorruptSampleError, AudioError, OSError):
            sound = shards.read(place).audio
            if sound is not None:
                yield f"{name}/{shown[name]}", decode(sound)[: CLIP_SECONDS * SAMPLE_RATE]


def write(folder: Path, evaluation: Evaluation) -> None:
    """Write ``predictions.jsonl``, ``timing.jsonl`` and, last, ``metrics.json``; readable by the owner alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("predictions.jsonl", evaluation.predictions), ("timing.jsonl", evaluation.timings)):
        lines = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
        write_bytes(folder / name, lines.encode(), private=True)
    write_json(folder / "metrics.json", evaluation.metrics, private=True)
