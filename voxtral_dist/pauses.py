"""Where a long recording can be cut: in its pauses, which are found by loudness alone.

A piece may be as long as the model takes. Its end lies in the last part of that, in the middle of the longest pause
there, or at the quietest moment where nobody pauses. Only the loudness of every 10 ms is kept, so that hours of audio
fit in memory.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]

EARLIEST = 0.6
"""A piece ends in the part of the longest allowed one behind this share of it."""

SHORTEST_SHARE = 0.1
"""Shortest piece over the longest allowed one."""

WINDOW_HOPS = 3
"""Loudness is that of 30 ms, every 10 ms."""

PAUSE_HOPS, LONG_PAUSE_HOPS = 20, 100
"""A pause lasts 0.2 s, more than the closure of a stop consonant; from 1 s on they are equally good."""

FLOOR_DB = -100.0

QUIET_SHARE = 0.3
"""A pause is quieter than this share of the way from the 10th to the 95th percentile of the loudness in decibels."""


def split_points(
    blocks: Iterable[Samples], hop: int, max_samples: int, min_samples: int | None = None
) -> list[int]:
    """Where to cut a recording into pieces of at most ``max_samples``.

    A piece has at least ``min_samples``, and EARLIEST x ``max_samples`` unless it is one of the last two.

    Args:
        blocks: the recording, float32 mono at any rate; all blocks but the last are multiples of ``hop`` long.
        hop: samples of 10 ms.
        max_samples: most samples of a piece.
        min_samples: fewest samples of a piece, at most 0.4 x ``max_samples``; None: a tenth.

    Returns:
        The first sample of every piece but the first, ascending.
    """
    if min_samples is None:
        min_samples = max(1, int(SHORTEST_SHARE * max_samples))
    if not 1 <= min_samples <= (1 - EARLIEST) * max_samples:
        raise ValueError(f"pieces of {min_samples} to {max_samples} samples cannot cover every length")
    levels, n_samples = _levels(blocks, hop)
    cuts, start = list[int](), 0
    while n_samples - start > max_samples:
        rest = n_samples - start
        low = start + min(int(EARLIEST * max_samples), max(rest - max_samples, min_samples))
        high = start + min(max_samples, rest - min_samples)
        context = levels[start // hop : -(-(start + max_samples) // hop)]
        start = _best_cut(levels, context, hop, low, high)
        cuts.append(start)
    return cuts


def _levels(blocks: Iterable[Samples], hop: int) -> tuple[NDArray[np.float32], int]:
    """Loudness around every hop in decibels below full scale, float32 [hops], and the number of samples."""
    powers, n_samples = [np.zeros(0, np.float32)], 0
    for block in blocks:
        n_samples += len(block)
        starts = np.arange(0, len(block), hop)
        if len(starts):
            sizes = np.diff(np.append(starts, len(block)))
            powers.append((np.add.reduceat(np.square(block), starts) / sizes).astype(np.float32))
    power = np.concatenate(powers)
    if len(power) >= WINDOW_HOPS:
        power = np.convolve(power, np.full(WINDOW_HOPS, 1 / WINDOW_HOPS, np.float32), "same")
    return 10 * np.log10(power + np.float32(10 ** (FLOOR_DB / 10))), n_samples


def _best_cut(
    levels: NDArray[np.float32], context: NDArray[np.float32], hop: int, low: int, high: int
) -> int:
    """The best sample in ``low``..``high`` to cut at; of equally good ones the last, for fewer pieces."""
    first, last = -(-low // hop), high // hop
    if first >= last:
        return high
    window = levels[first:last]
    quiet, loud = np.percentile(context, (10, 95))
    edges = np.flatnonzero(
        np.diff((window <= quiet + QUIET_SHARE * (loud - quiet)).astype(np.int8), prepend=0, append=0)
    )
    begins, ends = edges[::2], edges[1::2]
    lengths = np.minimum(ends - begins, LONG_PAUSE_HOPS)
    if lengths.max(initial=0) >= PAUSE_HOPS:
        pause = len(lengths) - 1 - int(lengths[::-1].argmax())
        return (2 * first + int(begins[pause]) + int(ends[pause])) * hop // 2
    quietest = last - 1 - int(window[::-1].argmin())
    return quietest * hop + hop // 2
