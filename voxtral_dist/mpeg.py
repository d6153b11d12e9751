"""How long an MP3 file really is: its frames counted, since the number in its header is what some writer believed.

libsndfile decodes as many frames as the Xing header states, or as it guesses from the first frame's bit rate where
there is none, and drops the rest in silence.
"""

from __future__ import annotations

import mmap
from functools import lru_cache

Buffer = bytes | mmap.mmap

Kind = tuple[int, int, int]
"""Version, layer and sampling rate as the header codes them; the same in all frames of a file."""

_BITRATES = {
    (3, 3): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (3, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (3, 1): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 3): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 1): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
"""kbit/s by the codes of version (3: MPEG-1, 2: MPEG-2 and 2.5) and layer (3, 2, 1: I, II, III)."""

_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}


def count_frames(data: Buffer) -> tuple[int, int] | None:
    """Number of MPEG audio frames in a file, that of the Xing header included, and samples of each.

    Returns:
        None where no frame of known length begins.
    """
    at, found, samples, kind = _after_id3(data), 0, 0, None
    while (at := _find_frame(data, at, kind)) >= 0:
        header = _header(data[at : at + 3])
        assert header is not None
        size, samples, kind = header
        found += 1
        at += size
    return (found, samples) if found else None


def _after_id3(data: Buffer) -> int:
    if data[:3] != b"ID3" or len(data) < 10:
        return 0
    size = 0
    for byte in data[6:10]:
        size = size << 7 | byte & 0x7F
    return 10 + size + (10 if data[5] & 0x10 else 0)


def _find_frame(data: Buffer, at: int, kind: Kind | None) -> int:
    """Where the next frame of a kind begins, -1 without one; behind other bytes it must be followed by another."""
    header = _header(data[at : at + 3])
    if header and header[2] == kind:
        return at
    while at >= 0:
        header = _header(data[at : at + 3])
        if header and kind in (None, header[2]):
            follower = _header(data[at + header[0] : at + header[0] + 3])
            if (follower and follower[2] == header[2]) or at + header[0] == len(data):
                return at
        at = data.find(b"\xff", at + 1)
    return -1


@lru_cache(maxsize=1 << 16)
def _header(three: bytes) -> tuple[int, int, Kind] | None:
    """Bytes and samples of a frame, and its kind, by the first bytes of its header (ISO 11172-3, 2.4.1.3)."""
    if len(three) < 3 or three[0] != 0xFF or three[1] < 0xE0:
        return None
    version, layer = three[1] >> 3 & 3, three[1] >> 1 & 3
    bitrate, rate, padding = three[2] >> 4, three[2] >> 2 & 3, three[2] >> 1 & 1
    if version == 1 or layer == 0 or bitrate in (0, 15) or rate == 3:
        return None
    bits = 1000 * _BITRATES[max(version, 2), layer][bitrate - 1]
    hertz = _RATES[version][rate]
    kind = (version, layer, rate)
    if layer == 3:
        return (12 * bits // hertz + padding) * 4, 384, kind
    samples = 576 if layer == 1 and version != 3 else 1152
    return samples // 8 * bits // hertz + padding, samples, kind
