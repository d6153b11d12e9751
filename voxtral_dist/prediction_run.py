"""Predicting without references: transcripts and answers of rows, audio files and folders, long recordings included.

OUT/predictions.jsonl has a line per row in input order, with the times of its pieces where it was cut at pauses.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from voxtral_dist import distributed, evaluator, model, prediction_parts, prepare, report
from voxtral_dist.config import EvalConfig, split_list
from voxtral_dist.distributed import World
from voxtral_dist.predict_data import PredictData

CONTEXT = 32_768
"""Positions that the released models can take (model card of Voxtral-Mini-3B-2507): --max_len where none is given."""

SHOWN = 10
"""Predictions that are printed."""


def predict(config: EvalConfig, world: World) -> None:
    """Decode what ``--predict`` names. Every rank calls it.

    Raises:
        UserError: the model, the adapter or the input are not what the flags say.
    """
    collator = prepare.open_collator(config)
    how = prepare.decode_settings(config, config.gen_max_new_tokens)
    device = distributed.local_device(world)
    distributed.start(device)
    try:
        data = PredictData.open(
            split_list(config.predict),
            collator,
            _max_len(config),
            limit_of=how.limit,
            task=config.task,
            language=config.language,
            question=config.question,
            slice_=(world.rank, world.world_size),
            exchange=lambda part: distributed.broadcast_json(distributed.gather_json(part)),
        )
        voxtral, adapter_path = prepare.decoding_model(config, device)
        out = Path(config.output_dir)
        about = prepare.provenance(config, voxtral) | {
            "adapter": adapter_path,
            "max_new_tokens": config.gen_max_new_tokens,
            "max_len": data.max_len,
        }
        decoded = evaluator.decode(voxtral, data, how, about, out)
        if decoded is not None:
            rows = _write(out, data, decoded)
            _show(config, out, rows)
    finally:
        distributed.stop()


def _max_len(config: EvalConfig) -> int:
    """``--max_len``, or by default all that the model can take: recordings should stay whole."""
    if config.max_len != EvalConfig.max_len:
        return config.max_len
    return min(CONTEXT, model.read_config(config.model_id).text_config.max_position_embeddings)


def _write(out: Path, data: PredictData, decoded: evaluator.Decodings) -> list[dict[str, Any]]:
    pieces: list[list[dict[str, Any]]] = [[] for _ in data.rows]
    for record in sorted(decoded.records, key=lambda r: tuple(r["place"])):
        pieces[record["place"][0]].append(record)
    out.mkdir(parents=True, exist_ok=True)
    timings = [{"id": r["id"], "piece": r["place"][1], **r["timing"]} for found in pieces for r in found]
    evaluator.write_lines(out / "timing.jsonl", timings)
    rows = [joined(data, row, found) for row, found in enumerate(pieces)]
    evaluator.write_lines(out / "predictions.jsonl", rows)
    prediction_parts.remove(out)
    return rows


def joined(data: PredictData, row: int, pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One line of ``predictions.jsonl`` from the records of a row's pieces, in order.

    A row of several pieces also lists them: ``start`` and ``end`` in seconds, and the ``prediction``.
    """
    texts = [piece["prediction"] for piece in pieces]
    line = {name: value for name, value in pieces[0].items() if name not in ("place", "timing")}
    line |= {
        "prediction": data.join(row, texts),
        "duration": round(sum(piece["duration"] for piece in pieces), 3),
        "n_new_tokens": sum(piece["n_new_tokens"] for piece in pieces),
        "hit_max": any(piece["hit_max"] for piece in pieces),
        "error": next((piece["error"] for piece in pieces if piece["error"]), None),
    }
    if len(pieces) > 1:
        times = data.seconds(row)
        line["pieces"] = [
            {"start": start, "end": end, "prediction": text}
            for (start, end), text in zip(times, texts, strict=True)
        ]
    return line


def _show(config: EvalConfig, out: Path, rows: Sequence[dict[str, Any]]) -> None:
    if not config.private_text:
        shown = [[row["id"], report.cell(row["prediction"] or "")] for row in rows[:SHOWN]]
        print(report.table(["id", "prediction"], shown))
    faulty = [row for row in rows if row["error"]]
    if faulty:
        print(
            f"{len(faulty)} of {len(rows)} rows have an error, the first {faulty[0]['id']}: {faulty[0]['error']}"
        )
    print(f"\nwritten: {out}/predictions.jsonl, timing.jsonl", flush=True)
