"""From samples to the encoder's input: Whisper's log-mel spectrogram in full chunks, computed only where it counts.

The released model was trained on audio padded with silence to whole chunks (30 s for the released models), and the
encoder accepts nothing else. In the silence every mel bin is the same constant, so the transform runs over the voiced
samples alone and the rest is filled in; the result equals that of the whole padded signal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

SAMPLE_RATE = 16_000
N_FFT = 400
HOP = 160
LOG_FLOOR = 1e-10
DYNAMIC_RANGE = 8.0
"""Whisper's constants: 25 ms windows every 10 ms, log10 clamped 8 below the maximum, then (x + 4) / 4."""


@dataclass(frozen=True)
class AudioSpec:
    """Sizes of the model's audio input, read from its config.

    Attributes:
        num_mel_bins: mel bins, 128.
        chunk_frames: mel frames per chunk, 2 x max_source_positions = 3000 (30 s).
        tokens_per_chunk: language-model positions per chunk, 375.
    """

    num_mel_bins: int
    chunk_frames: int
    tokens_per_chunk: int

    @classmethod
    def from_config(cls, config: Any) -> AudioSpec:
        """Sizes from a ``VoxtralConfig``: four encoder positions become one token (``intermediate / hidden``)."""
        audio = config.audio_config
        tokens = audio.max_source_positions * audio.hidden_size // audio.intermediate_size
        return cls(audio.num_mel_bins, 2 * audio.max_source_positions, tokens)

    @property
    def chunk_samples(self) -> int:
        """Samples per chunk at 16 kHz."""
        return self.chunk_frames * HOP

    def chunks(self, n_samples: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Number of started chunks in ``n_samples`` samples (0 for no audio), elementwise."""
        return -(-np.asarray(n_samples, np.int64) // self.chunk_samples)


@lru_cache(maxsize=1)
def _window() -> torch.Tensor:
    return torch.hann_window(N_FFT)


@lru_cache(maxsize=4)
def _mel_filters(num_mel_bins: int) -> torch.Tensor:
    """Slaney mel filters float32 [mel bins, 201], the ones of ``WhisperFeatureExtractor``."""
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(
        num_frequency_bins=1 + N_FFT // 2,
        num_mel_filters=num_mel_bins,
        min_frequency=0.0,
        max_frequency=8000.0,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
    return torch.from_numpy(filters).float().T.contiguous()


def log_mel(audio: npt.NDArray[np.float32], spec: AudioSpec) -> torch.Tensor:
    """Log-mel chunks of one recording.

    Args:
        audio: float32 [n_samples], mono, 16 kHz, at least one sample.
        spec: sizes of the model's input.

    Returns:
        float32 [chunks, mel bins, chunk frames], equal to the official feature extractor's on the padded signal.
    """
    chunks = int(spec.chunks(len(audio)))
    total = chunks * spec.chunk_samples
    voiced = min(total, -(-(len(audio) + N_FFT) // HOP) * HOP)
    signal = torch.zeros(voiced)
    signal[: len(audio)] = torch.from_numpy(audio)
    spectrum = torch.stft(signal, N_FFT, HOP, window=_window(), return_complex=True)[:, :-1]
    power = torch.view_as_real(spectrum).square().sum(-1)
    log = torch.clamp(_mel_filters(spec.num_mel_bins) @ power, min=LOG_FLOOR).log10()
    floor = float(log.max()) - DYNAMIC_RANGE
    silence = (max(float(np.log10(LOG_FLOOR)), floor) + 4.0) / 4.0
    out = torch.full((spec.num_mel_bins, chunks * spec.chunk_frames), silence)
    out[:, : log.shape[1]] = (log.clamp(min=floor) + 4.0) / 4.0
    return out.view(spec.num_mel_bins, chunks, spec.chunk_frames).transpose(0, 1).contiguous()
