"""The page of a comparison: verdicts, forest plots, groups, the samples that changed most, what an experiment adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rapidfuzz.distance import Levenshtein

from voxtral_dist.atomic import write_json
from voxtral_dist.differences import Row, gain, lead_metric
from voxtral_dist.page import heatmap, interval_chart, player, render, without_folders, write
from voxtral_dist.text_norm import nfc

Audio = Callable[[dict[str, Any]], bytes | None]
"""From a sample with ``task`` and ``id`` to its sound as FLAC, None where there is none."""

SECTIONS = ("arms", "seeds", "transfer", "forgetting", "leave_one_out")
"""What an experiment may add."""

LEGIBLE = 0.4
"""Share of characters that a prediction must have in common with its reference to be shown as an edit of it."""

BETTER_IS_RIGHT = "gain: right of 0 is better"


def write_page(
    comparison: Mapping[str, Any],
    path: Path,
    *,
    extra: Mapping[str, Any] | None = None,
    audio: Audio | None = None,
) -> None:
    """Write the page, and beside it the same numbers as JSON; both readable by the owner alone.

    Args:
        comparison: from :func:`voxtral_dist.comparison.compare`.
        path: the page, ``....html``; the JSON has its name with ``.json``.
        extra: sections of an experiment, for JSON too: ``arms`` (by arm its settings by name), ``seeds`` (by arm and
            metric the score under each seed), ``transfer``, ``forgetting`` (by arm) and ``leave_one_out`` as
            :mod:`voxtral_dist.transfer` returns them. An empty one is left out.
        audio: makes the shown samples audible.
    """
    sections = {name: section for name, section in (extra or {}).items() if section}
    if "arms" in sections:
        sections["arms"] = {arm: _without_folders(chosen) for arm, chosen in sections["arms"].items()}
    html = render(
        "comparison.html",
        comparison=comparison,
        against=[_against(other, audio) for other in comparison["against"]],
        overview=_overview(comparison),
        transfer_charts=_transfer_charts(sections.get("transfer")),
        settings=_columns(sections.get("arms", {}).values()),
        seed_names=_columns(scores for by in sections.get("seeds", {}).values() for scores in by.values()),
        difference=aligned_parts,
        metric_of=lead_metric,
        **dict.fromkeys(SECTIONS) | sections,
    )
    write_json(path.with_suffix(".json"), {**comparison, **sections}, private=True)
    write(path, html)


def _columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """All names of the rows, each once."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _without_folders(settings: Mapping[str, Any]) -> dict[str, str]:
    return {name: without_folders(str(value)) for name, value in settings.items()}


def _overview(comparison: Mapping[str, Any]) -> list[list[Row]]:
    """For each task and metric the rows of all results that are compared with the baseline."""
    return [list(rows) for rows in zip(*(other["rows"] for other in comparison["against"]), strict=True)]


def _against(other: Mapping[str, Any], audio: Audio | None) -> dict[str, Any]:
    """One comparison with its charts and players."""
    shown = [sample for sides in other["changed"].values() for side in sides.values() for sample in side]
    sounds = {(one["task"], one["id"]): audio(one) for one in shown} if audio else {}
    return {
        **other,
        "charts": list(_charts(other)),
        "players": {key: player(sound) for key, sound in sounds.items() if sound},
    }


def _charts(other: Mapping[str, Any]) -> Iterator[Markup]:
    """Forest plots: all metrics of each task, then its lead metric by language and domain."""
    tasks = list(dict.fromkeys(row["task"] for row in other["rows"]))
    for task in tasks:
        rows = [row for row in other["rows"] if row["task"] == task]
        yield _forest(f"{task}: gain over the baseline", rows, [row["metric"] for row in rows])
    for field, groups in other["groups"].items():
        for task in tasks:
            rows = [row for row in groups if row["task"] == task and row["metric"] == lead_metric(task)]
            labels = [f"{row['value']} (n={row['n']})" for row in rows]
            if rows:
                yield _forest(f"{task}: gain in {lead_metric(task)} by {field}", rows, labels)


def _forest(title: str, rows: Sequence[Row], labels: Sequence[str]) -> Markup:
    gains = [gain(row) for row in rows]
    centers, lows, highs = ([one[place] for one in gains] for place in range(3))
    return interval_chart(title, labels, centers, lows, highs, x_label=BETTER_IS_RIGHT)


def _transfer_charts(transfer: Mapping[str, Any] | None) -> list[Markup]:
    """The matrices as heat maps: the scores, and their change relative to the single-task arms and the base model."""
    if not transfer:
        return []
    names, tasks = [row["name"] for row in transfer["rows"]], transfer["tasks"]
    columns = [f"{task} {lead_metric(task)}" for task in tasks]
    charts = []
    titles = {
        "value": "Scores",
        "transfer": "T, relative to the single-task arm",
        "over_base": "Change relative to the base model",
    }
    for key, title in titles.items():
        values = [[row["cells"][task][key] for task in tasks] for row in transfer["rows"]]
        if any(value is not None for row in values for value in row):
            charts.append(heatmap(title, names, columns, values))
    return charts


def aligned_parts(references: Sequence[str], prediction: str | None) -> list[tuple[str, str]]:
    """A prediction against the closest reference, character by character.

    Returns:
        Pieces of text in order, each ``same``, ``del`` (of the reference alone) or ``ins`` (of the prediction alone). A
        prediction that shares too little to be read that way is one ``ins``.
    """
    hypothesis = nfc(prediction or "")
    reference = min(map(nfc, references), key=lambda text: Levenshtein.distance(text, hypothesis))
    if hypothesis and Levenshtein.normalized_similarity(reference, hypothesis) < LEGIBLE:
        return [("ins", hypothesis)]
    pieces: list[tuple[str, str]] = []
    for step in Levenshtein.opcodes(reference, hypothesis):
        left = reference[step.src_start : step.src_end]
        right = hypothesis[step.dest_start : step.dest_end]
        pieces += [("same", left)] if step.tag == "equal" else [("del", left), ("ins", right)]
    return [piece for piece in pieces if piece[1]]
