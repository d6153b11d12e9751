"""Recordings of any length: measured and cut at pauses beforehand, read piece by piece.

No file is decoded as a whole. Where the header states the true length it is read alone, unless the recording has to be
cut; a piece is read from its own place in the file.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile

from voxtral_dist.audio_file import (
    SAMPLE_RATE,
    AudioError,
    Samples,
    mp3_samples,
    open_long,
    read_mono,
    resampled_length,
    to_16k,
)
from voxtral_dist.jsonl import FileStat, file_stat
from voxtral_dist.pauses import split_points

BLOCK_HOPS = 6000
"""Hops of 10 ms that are decoded at a time."""

PREROLL_SECONDS = {"MP3": 20, "OGG": 20}
"""Decoded before a piece: frames of MP3 take bits from earlier ones, and libsndfile misses places in the last page of
an Ogg file by some milliseconds.
"""


@dataclass(frozen=True, slots=True)
class Recording:
    """What is known of an audio file before it is decoded.

    Attributes:
        rate: samples a second in the file.
        cuts: the frame that every piece begins at, and the end of the last one.
        stat: size and modification time of the file.
        error: why it cannot be read, else "".
    """

    rate: int
    cuts: tuple[int, ...]
    stat: FileStat
    error: str = ""

    @property
    def piece_samples(self) -> list[int]:
        """Samples of every piece at 16 kHz."""
        return [resampled_length(end - start, self.rate) for start, end in pairwise(self.cuts)]


def measure(path: Path, max_samples: int | None) -> Recording:
    """Find the length of a recording and where to cut it.

    Args:
        path: a regular file.
        max_samples: most samples of a piece at 16 kHz; None: one piece.

    Returns:
        The recording; of one that cannot be read one empty piece and the reason.
    """
    stat = file_stat(path) or (0, 0)
    try:
        with open_long(path) as audio:
            frames = _count_frames(path, audio)
            if not resampled_length(frames, audio.samplerate):
                raise AudioError("has no samples")
            cuts = list[int]()
            if max_samples is not None and resampled_length(frames, audio.samplerate) > max_samples:
                most = max_samples * audio.samplerate // SAMPLE_RATE
                cuts = split_points(_blocks(audio), audio.samplerate // 100, most)
            return Recording(audio.samplerate, (0, *cuts, frames), stat)
    except (AudioError, OSError) as error:
        return Recording(SAMPLE_RATE, (0, 0), stat, getattr(error, "strerror", None) or str(error))


def read_piece(path: Path, recording: Recording, piece: int) -> Samples:
    """One piece of a recording, float32 [n] at 16 kHz.

    Raises:
        AudioError: as :func:`~voxtral_dist.audio_file.decode`, or the file is not what it was when it was measured.
        OSError: the file cannot be read.
    """
    if recording.error:
        raise AudioError(recording.error)
    if file_stat(path) != recording.stat:
        raise AudioError("changed while it was waiting; start again when the file is final")
    start, end = recording.cuts[piece : piece + 2]
    with open_long(path) as audio:
        preroll = min(start, PREROLL_SECONDS.get(audio.format, 0) * audio.samplerate)
        try:
            audio.seek(start - preroll)
        except soundfile.SoundFileError as error:
            raise AudioError(f"cannot be decoded ({error})") from None
        parts = list(_blocks(audio, end - start + preroll))
    sound = np.concatenate([np.zeros(0, np.float32), *parts])[preroll:]
    if len(sound) != end - start:
        raise AudioError(f"truncated: {len(sound)} of {end - start} frames could be decoded")
    return to_16k(sound, recording.rate)


def _blocks(audio: soundfile.SoundFile, frames: int | None = None) -> Iterator[Samples]:
    """The next frames of an open file, or all that are left, a minute at a time."""
    left = audio.frames if frames is None else frames
    size = audio.samplerate // 100 * BLOCK_HOPS
    while left > 0 and len(block := read_mono(audio, min(left, size))):
        left -= len(block)
        yield block


def _count_frames(path: Path, audio: soundfile.SoundFile) -> int:
    """Frames that can be decoded; the file stays at its start. An MP3's header states what its writer believed."""
    if audio.format != "MP3":
        return int(audio.frames)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        held = mp3_samples(audio, data)
    if held is None or held >= audio.frames:
        return int(audio.frames)
    found = sum(len(block) for block in _blocks(audio))
    audio.seek(0)
    return found
