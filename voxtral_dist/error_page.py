"""The page of an error analysis: ``errors.html``, from the value that :func:`error_analysis.analyze` returns."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from voxtral_dist import page
from voxtral_dist.row_charts import bar_chart

Audio = Callable[[Mapping[str, Any]], bytes | None]
"""The FLAC bytes of a sample, None where there are none."""

MOST_CLIPS = 60
MOST_CLIP_BYTES = 20 * 2**20
"""Of all sounds of a page together, as they are written into it (base64)."""

MOST_CHARACTERS = 500
"""Of a text that is shown; the rest is in ``predictions.jsonl``."""

FIRST = 10
"""Of the worst and the random samples are open to see, the others folded away."""

METRICS = {"cer": "CER", "wer": "WER", "rouge_l_f1": "ROUGE-L F1", "em": "exact match", "bleu": "BLEU"}

MEANINGS = {
    "missing": ("missing", "no prediction; scored as an empty one"),
    "empty": ("empty", "nothing predicted although the reference has text"),
    "hallucination": ("hallucination", "text predicted although the reference is empty"),
    "loop": ("loop", "the prediction repeats itself, the reference does not"),
    "hit_max": ("token limit", "decoding ended at the limit of new tokens"),
    "too_long": ("too long", "more than twice as long as the reference"),
    "too_short": ("too short", "less than half as long as the reference"),
    "wrong_script": (
        "wrong script",
        "most letters are in a script that neither the reference nor the language uses",
    ),
    "echo": ("echo", "repeats a line or the marks of its prompt"),
    "negation": ("negation", "similar texts, one of them negated"),
    "numbers": ("numbers", "numbers or units differ: reference → prediction"),
    "near_miss": ("near miss", "no exact match, but ROUGE-L of 0.8 or more"),
    "buried": ("buried", "the whole reference stands in an answer at least twice as long"),
}

DIMENSIONS = {
    "reference_characters": "reference length (characters)",
    "audio_seconds": "audio duration (seconds)",
    "characters_per_second": "speaking rate (reference characters a second)",
    "language": "language",
    "domain": "domain",
    "speaker": "speaker (worst, 5 rows or more)",
}


def write(analysis: Mapping[str, Any], path: Path, audio: Audio | None = None) -> None:
    """Publish the page, readable by its owner alone; arguments as of :func:`build`."""
    page.write(path, build(analysis, audio))


def build(analysis: Mapping[str, Any], audio: Audio | None = None) -> str:
    """The page as HTML.

    Args:
        analysis: see :mod:`voxtral_dist.error_analysis`.
        audio: finds the sound of a sample; asked until a page is full.
    """
    clips = _Clips(analysis, audio)
    tasks = {name: _task(name, task, clips) for name, task in analysis["tasks"].items()}
    about = {key: analysis[key] for key in ("name", "normalizer", "samples", "seed", "warnings", "headline")}
    return page.render(
        "errors.html",
        **about,
        tasks=tasks,
        sound=clips.note,
        metrics=METRICS,
        shown=shown,
        visible=visible,
        diff=diff,
        meanings=MEANINGS,
    )


class _Clips:
    """The sounds of a page, each in it once: the first of every list come first."""

    def __init__(self, analysis: Mapping[str, Any], audio: Audio | None) -> None:
        self._left_out = self._not_found = 0
        self._players: dict[tuple[str, str], Markup] = {}
        self._places: dict[tuple[str, str], str] = {}
        size = 0
        for key, sample in _with_audio(analysis):
            room = len(self._players) < MOST_CLIPS and size < MOST_CLIP_BYTES
            flac = audio(sample) if audio and room else None
            if flac is not None and size + len(flac) * 4 // 3 <= MOST_CLIP_BYTES:
                self._players[key], size = page.player(flac), size + len(flac) * 4 // 3
            elif flac is not None or not room:
                self._left_out += 1
            else:
                self._not_found += 1

    @property
    def note(self) -> str:
        """What is not there to be heard, "" where all is."""
        lines = []
        if self._left_out:
            limits = f"at most {MOST_CLIPS} clips and {MOST_CLIP_BYTES >> 20} MiB"
            lines.append(f"The page is full ({limits}): {self._left_out} rows are without sound.")
        if self._not_found:
            lines.append(
                f"The sound of {self._not_found} rows was not found; --val_shards names the data sets that hold it."
            )
        return " ".join(lines)

    def take(self, task: str, sample: Mapping[str, Any]) -> tuple[str, Markup]:
        """An anchor for this place and a player, or a link to the place where the player already is."""
        key = task, str(sample["id"])
        if key in self._places:
            link = Markup('<a href="#{}">listen above</a>').format(self._places[key])
            return "", link if key in self._players else Markup()
        self._places[key] = f"sample-{len(self._places)}"
        return self._places[key], self._players.get(key, Markup())


def _with_audio(analysis: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Mapping[str, Any]]]:
    """The samples with audio, each once: the first of every list, then the second, and so on."""
    lists = [task[name] for task in analysis["tasks"].values() for name in ("worst", "random")]
    lists += [task.get("worst_by_rate", []) for task in analysis["tasks"].values()]
    samples = (sample for rank in zip_longest(*lists) for sample in rank if sample and sample.get("duration"))
    yield from {(sample["task"], str(sample["id"])): sample for sample in samples}.items()


def _task(name: str, task: Mapping[str, Any], clips: _Clips) -> dict[str, Any]:
    """What the template needs of one task."""
    parts = [slice(FIRST), slice(FIRST, None)]
    beside = [
        {key: [_card(name, sample, clips) for sample in task[key][part]] for key in ("worst", "random")}
        for part in parts
    ]
    return {
        **task,
        "transcripts": "edits" in task,
        "lists": {
            "beside": [part for part in beside if any(part.values())],
            "worst_by_rate": [_card(name, sample, clips) for sample in task.get("worst_by_rate", [])],
        },
        "found": {kind: _split(task[kind]) for kind in ("checks", "failures")},
        "groups": {DIMENSIONS[key]: groups for key, groups in task["groups"].items()},
        "charts": [
            _chart(DIMENSIONS[key], groups, METRICS[task["metric"]])
            for key, groups in task["groups"].items()
            if len(groups) > 1
        ],
    }


def _split(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "some": {name: value for name, value in found.items() if value["n"]},
        "none": [MEANINGS[name][0] for name, value in found.items() if not value["n"]],
    }


def _card(task: str, sample: Mapping[str, Any], clips: _Clips) -> dict[str, Any]:
    anchor, player = clips.take(task, sample)
    return {
        **sample,
        "anchor": anchor,
        "player": player,
        "with_diff": sample["errors"] and _similar(sample["alignment"]),
    }


def _similar(alignment: Sequence[Sequence[str]]) -> bool:
    """Whether a diff can be read: at least a third of the longer text is in the other one too."""
    equal = sum(len(reference) for tag, reference, _ in alignment if tag == "equal")
    return 3 * equal >= max(sum(len(piece[side]) for piece in alignment) for side in (1, 2))


def _chart(title: str, groups: Sequence[Mapping[str, Any]], metric: str) -> Markup:
    labels = [f"{group['group']} (n = {group['n']})" for group in groups]
    intervals = [group["interval"] and tuple(group["interval"]) for group in groups]
    return bar_chart(title, labels, [group["value"] for group in groups], x_label=metric, intervals=intervals)


_INVISIBLE = re.compile(
    "[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
"""Control characters, direction marks, lone surrogates: what hides in a text or turns the page around it."""


def shown(text: str | None) -> Markup:
    """A text as it is, escaped and kept to its own direction; what is invisible in it by its code, the end cut off."""
    if text is None:
        return Markup("<i>(missing)</i>")
    if not text.strip():
        return Markup("<i>(empty)</i>")
    more = len(text) - MOST_CHARACTERS
    kept = Markup("<bdi>{}</bdi>").format(visible(text[:MOST_CHARACTERS]))
    return kept + Markup(" <i>… {} more</i>").format(more) if more > 0 else kept


def visible(text: str) -> str:
    """A text with the code of what is invisible in it."""
    return _INVISIBLE.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


def diff(alignment: Sequence[Sequence[str]]) -> Markup:
    """An alignment on one line: ``−`` before what is missing, ``+`` before what is too much, ``→`` between what was
    exchanged; colours only repeat that."""
    pieces: list[Markup] = []
    left = MOST_CHARACTERS
    for tag, reference, prediction in alignment:
        if left <= 0:
            return Markup("").join([*pieces, Markup(" <i>…</i>")])
        pieces.append(_piece(tag, visible(reference[:left]), visible(prediction[:left])))
        left -= max(len(reference), len(prediction))
    return Markup("<bdi>{}</bdi>").format(Markup("").join(pieces))


def _piece(tag: str, reference: str, prediction: str) -> Markup:
    ref, hyp = reference.rstrip(), prediction.rstrip()
    blank = " " if (reference or prediction) != (ref or hyp) else ""
    if tag == "equal":
        return escape(reference)
    if tag == "delete":
        return Markup("<del>−{}</del>{}").format(ref, blank)
    if tag == "insert":
        return Markup("<ins>+{}</ins>{}").format(hyp, blank)
    return Markup('<span class="swap"><del>{}</del>→<ins>{}</ins></span>{}').format(ref, hyp, blank)
