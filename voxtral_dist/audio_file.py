"""Audio files and bytes to 16 kHz mono samples, and to the FLAC that shards hold.

The bytes come from strangers. What the header claims is checked before a decoder allocates or runs: container
and codec against an allow-list, channels, rate, duration, decoded size.
"""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from voxtral_dist.mpeg import count_frames

SAMPLE_RATE = 16_000
"""Rate of everything behind this module, in Hz."""

MAX_SECONDS = 40 * 60
MAX_CHANNELS = 8
MIN_RATE, MAX_RATE = 4_000, 192_000
MAX_FILE_BYTES = 1 << 30
MAX_DECODED_BYTES = 1 << 30
"""Cap on frames x channels x 4: 40 minutes of 48 kHz stereo fit."""

LONG_SECONDS = 12 * 60 * 60
LONG_FILE_BYTES = 1 << 32
"""Limits of a recording that is read part by part and never decoded as a whole."""

MP3_TOLERANCE = 8
"""MPEG frames by which an MP3's stated length may fall short: encoders trim the start and the end."""

MAX_PEAK = 32.0
"""Float samples belong in -1..1. A little over is clipped; far over means integers stored as floats."""

_PCM = frozenset(("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"))
CODECS: dict[str, frozenset[str]] = {
    "WAV": _PCM | {"ULAW", "ALAW"},
    "WAVEX": _PCM,
    "FLAC": frozenset(("PCM_S8", "PCM_16", "PCM_24")),
    "OGG": frozenset(("VORBIS", "OPUS")),
    "MP3": frozenset(("MPEG_LAYER_I", "MPEG_LAYER_II", "MPEG_LAYER_III")),
}
"""Accepted sub-types by container, in libsndfile's names."""

_HEAD_BYTES = 1 << 16
_WAV_TAGS = frozenset((1, 3, 6, 7))  # PCM, float, A-law, mu-law
_UNKNOWN_RIFF_SIZE = 0x7FFF_0000  # streaming writers leave a huge placeholder in the header

Samples = NDArray[np.float32]


class AudioError(ValueError):
    """The audio cannot or must not be decoded; the message is a short reason without the file's name."""


def decode(data: bytes | str | Path) -> Samples:
    """Decode a file, or the bytes of one, to float32 mono samples of shape (n_samples,) at 16 kHz.

    Channels are averaged, another rate goes through soxr's HQ recipe.

    Raises:
        AudioError: not an accepted format, over a limit, damaged, empty, or with non-finite samples.
        OSError: the file cannot be read.
    """
    return _decode(data if isinstance(data, bytes) else _read(Path(data)))


def to_flac(path: str | Path) -> tuple[bytes, int]:
    """Bytes of a mono 16 kHz 16-bit FLAC of the file, and its number of samples.

    A file that already is one passes through untouched, after it was decoded to its end. Samples of a mono
    16 kHz 16-bit WAV stay what they are, bit by bit.

    Raises:
        AudioError: as :func:`decode`.
        OSError: the file cannot be read.
    """
    data = _read(Path(path))
    samples = _decode(data)
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        header = (file.format, file.subtype, file.samplerate, file.channels)
    raw_bytes = 2 * len(samples) + _HEAD_BYTES
    if header == ("FLAC", "PCM_16", SAMPLE_RATE, 1) and len(data) <= raw_bytes:  # else it carries pictures
        return data, len(samples)
    integers = np.clip(np.rint(samples * 32768.0), -32768, 32767).astype(np.int16)
    buffer = io.BytesIO()
    soundfile.write(buffer, integers, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return buffer.getvalue(), len(samples)


def probe(path: str | Path) -> float:
    """Seconds of audio that the header of ``path`` states, after the checks that need no decoding.

    Raises:
        AudioError, OSError: as :func:`decode`.
    """
    with open(path, "rb") as file:
        _check_container(file.read(_HEAD_BYTES), os.fstat(file.fileno()).st_size)
        file.seek(0)
        with _opened(file) as audio:
            return float(audio.frames / audio.samplerate)


@contextmanager
def open_long(path: str | Path) -> Iterator[soundfile.SoundFile]:
    """A recording of up to twelve hours, to read part by part; its header is checked, its samples are not yet.

    Raises:
        AudioError, OSError: as :func:`decode`.
    """
    with open(path, "rb") as file:
        _check_container(file.read(_HEAD_BYTES), os.fstat(file.fileno()).st_size, LONG_FILE_BYTES)
        file.seek(0)
        with _opened(file, LONG_SECONDS) as audio:
            yield audio


def read_mono(audio: soundfile.SoundFile, frames: int = -1) -> Samples:
    """The next frames of an open file, or all, as float32 (n,) at its own rate; fewer at its end.

    Raises:
        AudioError: damaged, or with non-finite samples.
    """
    try:
        samples: Samples = audio.read(frames, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise AudioError(f"cannot be decoded ({_text(error)})") from None
    if not np.isfinite(samples).all():
        raise AudioError("has NaN or infinite samples")
    if np.abs(samples).max(initial=0.0) > MAX_PEAK:
        raise AudioError(f"has samples up to {np.abs(samples).max():.0f}; floating-point audio lies in -1..1")
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)


def to_16k(mono: Samples, rate: int) -> Samples:
    """Mono samples at 16 kHz: :func:`resampled_length` of them."""
    if rate != SAMPLE_RATE and len(mono):
        mono = soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")
    return np.ascontiguousarray(mono, dtype=np.float32)


def resampled_length(frames: int, rate: int) -> int:
    """How many samples :func:`to_16k` makes of ``frames``: soxr rounds halves up."""
    return (2 * frames * SAMPLE_RATE + rate) // (2 * rate)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        _check_size(os.fstat(file.fileno()).st_size)
        return file.read()


def _decode(data: bytes) -> Samples:
    _check_container(data[:_HEAD_BYTES], len(data))
    with _opened(io.BytesIO(data)) as file:
        if file.format == "MP3":
            mp3_samples(file, data)
        mono = read_mono(file)
        if file.format == "FLAC" and len(mono) != file.frames:
            raise AudioError(f"truncated: {len(mono)} of {file.frames} frames could be decoded")
        samples = to_16k(mono, file.samplerate)
    if not len(samples):
        raise AudioError("has no samples")
    return samples


def mp3_samples(audio: soundfile.SoundFile, data: bytes | mmap.mmap) -> int | None:
    """Samples that the frames of an MP3 hold, None where none is found.

    Raises:
        AudioError: more than its header states, which is what the decoder would stop at.
    """
    counted = count_frames(data)
    if counted is None:
        return None
    frames, samples = counted
    if frames * samples - audio.frames > MP3_TOLERANCE * samples:
        raise AudioError(
            f"its header states {audio.frames / audio.samplerate:.1f} of {frames * samples / audio.samplerate:.1f} "
            "seconds and the rest would be lost; convert the file once more"
        )
    return frames * samples


def _opened(file: io.BufferedIOBase, max_seconds: int = MAX_SECONDS) -> soundfile.SoundFile:
    """The decoder of an open file, its header checked."""
    try:
        audio = soundfile.SoundFile(file)
    except soundfile.SoundFileError as error:
        raise AudioError(f"cannot be decoded ({_text(error)})") from None
    try:
        _check_header(audio, max_seconds)
    except AudioError:
        audio.close()
        raise
    return audio


def _check_size(size: int, most: int = MAX_FILE_BYTES) -> None:
    if size > most:
        raise AudioError(f"file of {size} bytes, at most {most} are accepted")


def _check_container(head: bytes, size: int, max_bytes: int = MAX_FILE_BYTES) -> None:
    """Refuse by the first bytes what must not even reach the decoder library."""
    _check_size(size, max_bytes)
    if not head:
        raise AudioError("file is empty")
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        _check_wav(head, size)
    elif head[:4] not in (b"fLaC", b"OggS") and head[:3] != b"ID3" and not _is_mpeg_frame(head):
        raise AudioError("is not WAV, FLAC, Ogg or MP3")


def _is_mpeg_frame(head: bytes) -> bool:
    return len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0


def _check_wav(head: bytes, size: int) -> None:
    """Truncation, which libsndfile hides, and codecs, whose set-up code has known overflows (ADPCM)."""
    promised = 8 + int.from_bytes(head[4:8], "little")
    if size + 9 < promised < _UNKNOWN_RIFF_SIZE:  # 9: writers that count the header or a missing pad byte
        raise AudioError(f"truncated: {size} of {promised} bytes")
    at = 12
    while at + 10 <= len(head):
        length = int.from_bytes(head[at + 4 : at + 8], "little")
        if head[at : at + 4] == b"fmt ":
            tag = int.from_bytes(head[at + 8 : at + 10], "little")
            if tag == 0xFFFE:  # extensible: the codec is the head of the sub-format
                tag = int.from_bytes(head[at + 32 : at + 34], "little")
            if tag not in _WAV_TAGS:
                raise AudioError(f"WAV codec 0x{tag:04x} is not accepted, only PCM, float and G.711")
            return
        at += 8 + length + length % 2
    raise AudioError("WAV file without a format chunk")


def _check_header(audio: soundfile.SoundFile, max_seconds: int) -> None:
    if audio.subtype not in CODECS.get(audio.format, frozenset()):
        raise AudioError(f"{audio.format} {audio.subtype} is not accepted")
    if audio.channels > MAX_CHANNELS:
        raise AudioError(f"{audio.channels} channels, at most {MAX_CHANNELS} are accepted")
    if not MIN_RATE <= audio.samplerate <= MAX_RATE:
        raise AudioError(f"sampling rate {audio.samplerate} Hz is outside {MIN_RATE}..{MAX_RATE}")
    if audio.frames <= 0:
        raise AudioError("has no samples")
    if audio.frames >= 1 << 62:
        raise AudioError("the header does not state the length; convert the file once more")
    if audio.frames > max_seconds * audio.samplerate:
        minutes = audio.frames / audio.samplerate / 60
        raise AudioError(f"{minutes:.1f} minutes of audio, at most {max_seconds // 60} are accepted")
    if max_seconds == MAX_SECONDS and audio.frames * audio.channels * 4 > MAX_DECODED_BYTES:
        raise AudioError(f"{audio.frames} frames of {audio.channels} channels decode to too many bytes")


def _text(error: Exception) -> str:
    return str(getattr(error, "error_string", error)).strip().rstrip(".")
