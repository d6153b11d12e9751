"""Log-mel chunks equal those of the official feature extractor, at every length that could go wrong."""

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from voxtral_dist.audio import AudioSpec, log_mel


def official(audio: np.ndarray, spec: AudioSpec) -> np.ndarray:
    extractor = WhisperFeatureExtractor(feature_size=spec.num_mel_bins)
    padded = np.pad(audio, (0, int(spec.chunks(len(audio))) * spec.chunk_samples - len(audio)))
    features = extractor(padded, sampling_rate=16000, padding=False, truncation=False, return_tensors="np")
    mel = features["input_features"][0]
    return mel.reshape(spec.num_mel_bins, -1, spec.chunk_frames).transpose(1, 0, 2)


@pytest.mark.parametrize("spec", [AudioSpec(128, 200, 25), AudioSpec(128, 3000, 375)])
@pytest.mark.parametrize("offset", [1, 159, 400, 16000, -401, -400, -161, -1, 0, 1600])
@pytest.mark.parametrize("scale", [1e-6, 0.3])
def test_equals_the_official_extractor(spec: AudioSpec, offset: int, scale: float) -> None:
    n_samples = offset if 0 < offset < 16001 else spec.chunk_samples + offset
    audio = (np.random.default_rng(n_samples).standard_normal(n_samples) * scale).astype(np.float32)
    ours = log_mel(audio, spec).numpy()
    expected = official(audio, spec)
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_two_chunks_share_one_maximum() -> None:
    spec = AudioSpec(128, 200, 25)
    audio = np.concatenate([np.full(32000, 1e-4), np.random.default_rng(0).standard_normal(9000)]).astype(
        np.float32
    )
    np.testing.assert_allclose(log_mel(audio, spec).numpy(), official(audio, spec), atol=2e-5)


def test_silence_is_the_floor() -> None:
    mel = log_mel(np.zeros(8000, np.float32), AudioSpec(128, 200, 25))
    assert np.unique(mel.numpy()).tolist() == [-1.5]


def test_chunks_round_up() -> None:
    spec = AudioSpec(128, 3000, 375)
    assert spec.chunks([0, 1, 480_000, 480_001]).tolist() == [0, 1, 1, 2]
