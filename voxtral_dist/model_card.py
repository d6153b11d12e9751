"""The model card of an export: what it is, what it was trained on, how it scored, how it was checked and is loaded.

Nothing in it is made up: a score is shown when its evaluation is of these very weights, and what no file records is
said to be not on record.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from voxtral_dist import report, run_facts
from voxtral_dist.config import split_list
from voxtral_dist.run_record import RunRecord

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's ``--max-lora-rank`` may be."""


@dataclass(frozen=True)
class Facts:
    """What an export is and how it was proved.

    Attributes:
        name: of its folder.
        format, dtype: see :mod:`voxtral_dist.export`.
        base: hub id of the base model, or the name of its folder.
        on_hub: whether it is a hub id.
        step: of the checkpoint, None for an adapter on its own.
        form: name and value of what was trained: method, rank and so on.
        proof: see :class:`voxtral_dist.export_proof.Proof`.
    """

    name: str
    format: str
    dtype: str
    base: str
    on_hub: bool
    step: int | None
    form: Sequence[tuple[str, Any]]
    proof: Mapping[str, Any]


def render(facts: Facts, record: RunRecord | None, weights: str) -> str:
    """The card, Markdown.

    Args:
        facts: of the export.
        record: of its run, None for an adapter on its own.
        weights: hash of the trained weights, as ``provenance`` in ``metrics.json`` has it.
    """
    data = _data(record) if record else []
    config = record.config if record else {}
    scores, normalizer = _scores(record, facts.step, weights) if record else ("", "")
    rank = dict(facts.form).get("rank", 0)
    languages = {name for row in data if row["split"] == "train" for name in row["languages"].split(", ")}
    return _template().render(
        facts=facts,
        proof=facts.proof,
        base=json.dumps(facts.base),
        name=json.dumps(facts.name),
        vllm_rank=next((known for known in RANKS if known >= rank), rank),
        languages=sorted(name for name in languages if re.fullmatch("[a-z]{2}", name)),
        settings=_settings(record) if record else [],
        data=data,
        scores=scores,
        normalizer=normalizer,
        others=_others(record, weights) if record else [],
        prompts=config.get("sqa_question"),
        four_bit=bool(config.get("load_in_4bit")),
    )


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=False,  # Markdown; what others wrote goes through the filter
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        lstrip_blocks=True,
    )
    environment.filters["text"] = _text
    return environment.get_template("model_card.md")


def _text(value: Any) -> str:
    """A value that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(value).split()))


def _settings(record: RunRecord) -> list[tuple[str, str, str]]:
    """The settings that differ from their default, but those of the machine and those that are said elsewhere."""
    said = ("model_id", "shard_cache", "shard_cache_gb", "num_workers", "resume", "tune")
    rows = run_facts.settings(record, changed=True)
    return [row for row in rows if row[0] not in said and not row[0].startswith("lora_")]


def _data(record: RunRecord) -> list[dict[str, str]]:
    """The rows of the report of a run, with the languages and domains that the shards count."""
    counts = _counts(record)
    empty: Mapping[str, Counter[str]] = {"languages": Counter(), "domains": Counter()}
    return [
        row | {kind: _shown(names) for kind, names in counts.get(row["fingerprint"], empty).items()}
        for row in run_facts.data(record)
    ]


def _shown(names: Counter[str]) -> str:
    return ", ".join(name for name, _ in names.most_common() if name) or "n/a"


def _counts(record: RunRecord) -> dict[str, dict[str, Counter[str]]]:
    """Rows by language and by domain of the packed sets on this machine, by the start of their fingerprint."""
    named = [
        Path(item) for key in run_facts.DATA_SETTINGS for item in split_list(record.config.get(key) or "")
    ]
    found: dict[str, dict[str, Counter[str]]] = {}
    for folder in [*named, *record.folder.glob("shards/*/*")]:
        sums: dict[str, Counter[str]] = {"languages": Counter(), "domains": Counter()}
        try:
            manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
            for shard in manifest["shards"]:
                marker = json.loads((folder / shard["name"]).with_suffix(".json").read_text("utf-8"))
                for kind, total in sums.items():
                    total.update(marker[kind])
            found[str(manifest["fingerprint"])[:12]] = sums
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def _is_of(metrics: Mapping[str, Any], weights: str) -> bool:
    return metrics.get("provenance", {}).get("weights") == weights


def _scores(record: RunRecord, step: int | None, weights: str) -> tuple[str, str]:
    """Table of the evaluations before training and at a step, and their normaliser; empty without the latter."""
    at_step = record.evaluations.get(step) if step is not None else None
    if at_step is None or not ("weights" not in at_step.get("provenance", {}) or _is_of(at_step, weights)):
        return "", ""
    before = record.evaluations.get(0)
    table = report.comparison_table(before, at_step) if before and step else report.score_table(at_step)
    return table, str(at_step.get("normalizer", "n/a"))


def _others(record: RunRecord, weights: str) -> list[tuple[str, str]]:
    """Name and table of the evaluations after training that decoded these weights."""
    return [
        (name, report.score_table(metrics))
        for name, (metrics, _) in record.others.items()
        if _is_of(metrics, weights)
    ]
