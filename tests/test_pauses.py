"""Cuts of long recordings: everything once, none too long or too short, inside pauses, whatever the block size."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import soundfile
from harness import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from voxtral_dist.pauses import Samples, split_points

RATE, HOP = 16_000, 160
SILENCE_SECONDS = 0.6


def clips(count: int) -> list[Samples]:
    """Spoken demo clips, four Korean ones and four English ones in turn."""
    names = sorted((ROOT / "shards/demo/bank").glob("*.flac"))
    return [soundfile.read(name, dtype="float32")[0] for name in (names * 3)[:count]]


def joined(count: int) -> tuple[Samples, list[tuple[int, int]]]:
    """Clips with silences between them, and where those are."""
    silence, parts, silences, at = np.zeros(int(SILENCE_SECONDS * RATE), np.float32), list[Samples](), [], 0
    for clip in clips(count):
        parts += [clip, silence]
        silences.append((at + len(clip), at + len(clip) + len(silence)))
        at = silences[-1][1]
    return np.concatenate(parts), silences


def in_silences(cuts: list[int], silences: list[tuple[int, int]], margin: int) -> bool:
    return all(any(start + margin <= cut <= end - margin for start, end in silences) for cut in cuts)


@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_cuts_fall_inside_the_silences(noise: float) -> None:
    audio, silences = joined(200)
    audio = audio + noise * np.random.default_rng(1).standard_normal(len(audio)).astype(np.float32)
    longest = 20 * RATE
    cuts = split_points([audio], HOP, longest)
    fixed = list(range(longest, len(audio), longest))
    assert len(fixed) <= len(cuts) <= len(fixed) + 4
    assert in_silences(cuts, silences, margin=RATE // 10)
    assert not in_silences(fixed, silences, margin=RATE // 10), (
        "the test must tell pauses from any other place"
    )


def test_the_longest_pause_wins_and_its_middle_is_cut() -> None:
    audio = np.random.default_rng(0).standard_normal(10 * RATE).astype(np.float32) * 0.1
    audio[int(5.0 * RATE) : int(5.3 * RATE)] = 0
    audio[int(6.4 * RATE) : int(7.2 * RATE)] *= 0.01
    audio[int(7.6 * RATE) : int(7.7 * RATE)] = 0  # shorter than a pause
    (cut,) = split_points([audio], HOP, 8 * RATE)
    assert cut == pytest.approx(6.8 * RATE, abs=3 * HOP)


def test_of_equally_good_pauses_the_last_is_taken() -> None:
    """A second is enough: what is longer is no better place, and the later one makes fewer pieces."""
    audio = np.full(14 * RATE, 0.1, np.float32)
    for second, length in ((5.2, 1.5), (7.0, 1.1)):
        audio[int(second * RATE) : int((second + length) * RATE)] = 0
    assert split_points([audio], HOP, 17 * RATE // 2)[0] == pytest.approx(7.55 * RATE, abs=3 * HOP)


def test_without_a_pause_the_quietest_moment_is_cut() -> None:
    audio = np.random.default_rng(0).standard_normal(10 * RATE).astype(np.float32) * 0.1
    audio[int(6.0 * RATE) : int(6.05 * RATE)] *= 0.3
    (cut,) = split_points([audio], HOP, 8 * RATE)
    assert 6.0 * RATE <= cut <= 6.05 * RATE


def test_nothing_to_cut() -> None:
    assert split_points([], HOP, 1000) == []
    assert split_points([np.zeros(1000, np.float32)], HOP, 1000) == []


def test_pieces_that_cannot_cover_every_length_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot cover"):
        split_points([np.zeros(10, np.float32)], HOP, 1000, 500)


@st.composite
def recordings(draw: st.DrawFn) -> tuple[Samples, int, int, int, list[int]]:
    """Loud and quiet stretches, and hop, longest and shortest piece, and edges of blocks."""
    stretches = draw(st.lists(st.tuples(st.integers(0, 900), st.sampled_from([0.0, 1e-3, 0.3])), max_size=12))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    parts = [volume * random.standard_normal(length) for length, volume in stretches]
    audio = np.concatenate([np.zeros(0), *parts]).astype(np.float32)
    longest = draw(st.integers(10, 1200))
    hop = draw(st.sampled_from([1, 7, 40]))
    return (
        audio,
        hop,
        longest,
        draw(st.integers(1, int(0.4 * longest))),
        draw(st.lists(st.integers(0, 200), max_size=4)),
    )


@settings(max_examples=60, deadline=None)
@given(recordings())
def test_pieces_cover_everything_once(case: tuple[Samples, int, int, int, list[int]]) -> None:
    audio, hop, longest, shortest, edges = case
    cuts = split_points([audio], hop, longest, shortest)
    sizes = np.diff([0, *cuts, len(audio)])
    assert sizes.sum() == len(audio) and sizes.max() <= longest
    assert len(cuts) == 0 or sizes.min() >= shortest
    assert (sizes[:-2] >= int(0.6 * longest)).all()
    if len(audio) <= 1.6 * longest:
        assert len(cuts) == (len(audio) > longest)
    blocks = np.split(audio, sorted(hop * edge for edge in edges))
    assert split_points(blocks, hop, longest, shortest) == cuts


def test_hours_take_little_memory() -> None:
    """3 h of audio are 690 MB, their loudness 4 MB."""
    block = np.random.default_rng(0).standard_normal(60 * RATE).astype(np.float32)
    tracemalloc.start()
    cuts = split_points((block.copy() for _ in range(3 * 60)), HOP, 30 * 60 * RATE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 5 <= len(cuts) <= 9
    assert peak < 60e6
