"""What a step takes and what a device gives, in FLOPs: the formula of the cost model, the time estimate and the MFU.

One multiply-add is two FLOPs. MFU, the model FLOPs utilisation of Chowdhery et al. 2022 (PaLM, appendix B), is the
FLOPs that the step needs, without padding and without anything computed twice, over what the devices could do in the
same time:

    flops = VoxtralFlops.from_config(config)
    mfu = flops.training(positions, chunks, labels) / seconds / world_size / peak(device).flops
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Int64 = npt.NDArray[np.int64]

MEASURE_SIDE = {"cuda": 8192, "cpu": 512}
"""Rows and columns of the matrices whose product measures an unknown device."""

MEASURE_SECONDS = {"cuda": 1.0, "cpu": 0.1}


@dataclass(frozen=True)
class VoxtralFlops:
    """FLOPs of the forward pass through each part of a Voxtral.

    Attributes:
        token: one position through the language model's layers, without the last MLP and attention between positions.
        squared_token: causal attention over an example, per squared number of its positions.
        chunk: one audio chunk through the encoder.
        projector: one audio chunk through the projector.
        label: one label position through the head.
        last_mlp: one label position through the MLP of the last layer, which no other needs.
    """

    token: int
    squared_token: int
    chunk: int
    projector: int
    label: int
    last_mlp: int

    @classmethod
    def from_config(cls, config: Any) -> VoxtralFlops:
        """Counted from a ``VoxtralConfig``.

        Linears take 2 FLOPs a parameter and position. Full attention takes 4 x width FLOPs per layer and pair of
        positions (scores, then values); causal attention needs half of the pairs.
        """
        text, audio = config.text_config, config.audio_config
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        width = text.num_attention_heads * head
        projections = 2 * text.hidden_size * head * (text.num_attention_heads + text.num_key_value_heads)
        mlp = 3 * text.hidden_size * text.intermediate_size
        body = text.num_hidden_layers * (projections + mlp) - mlp
        frames, d, f = audio.max_source_positions, audio.hidden_size, audio.intermediate_size
        convolutions = 2 * 3 * frames * (2 * audio.num_mel_bins * d + d * d)
        layers = audio.num_hidden_layers * (frames * (8 * d * d + 4 * d * f) + 4 * frames * frames * d)
        return cls(
            token=2 * body,
            squared_token=2 * width * text.num_hidden_layers,
            chunk=convolutions + layers,
            projector=2 * (frames * d // f) * text.hidden_size * (f + text.hidden_size),
            label=2 * text.hidden_size * text.vocab_size,
            last_mlp=2 * mlp,
        )

    def training(
        self,
        positions: Int64,
        chunks: Int64,
        labels: Int64,
        *,
        lora_parameters: int = 0,
        language_model_trains: bool = False,
        encoder_trains: bool = False,
    ) -> int:
        """FLOPs that training on some examples needs, nothing counted twice.

        The frozen weights need no gradient of their own, so their backward pass takes as much as the forward pass and
        a trained weight twice as much; attention has no weights and takes twice as much as well.

        Args:
            positions: int64 [n], language-model positions of each example.
            chunks: int64 [n], its audio chunks.
            labels: int64 [n], its label positions.
            lora_parameters: parameters of the adapter; each takes 6 FLOPs a position (those of the last MLP less).
            language_model_trains: the weights of its layers are trained themselves.
            encoder_trains: the encoder is trained too, else it has no backward pass.
        """
        total = sum(map(int, positions))
        squared = sum(int(n) * int(n) for n in positions)
        passes = 3 if language_model_trains else 2
        token = self.token * passes + 6 * lora_parameters
        encoder = self.chunk * (3 if encoder_trains else 1)
        return (
            total * token
            + squared * 3 * self.squared_token
            + int(chunks.sum()) * (encoder + 2 * self.projector)
            + int(labels.sum()) * (2 * self.label + passes * self.last_mlp)
        )


PEAKS = {
    "a100": 312e12,
    "a800": 312e12,
    "a10": 125e12,
    "a30": 165e12,
    "a40": 149.7e12,
    "b200": 2250e12,
    "gb200": 2500e12,
    "h100": 989e12,
    "h100 nvl": 835e12,
    "h100 pcie": 756e12,
    "h200": 989e12,
    "h200 nvl": 835e12,
    "l4": 121e12,
    "l40s": 362e12,
    "rtx 3090": 71e12,
    "rtx 4090": 165e12,
    "rtx 5090": 209.5e12,
    "rtx a6000": 154.8e12,
}
"""Dense bf16 tensor rate with fp32 sums, by words of the CUDA device name, from NVIDIA's data sheet or, for the RTX
cards, architecture white paper of each; half of the printed number where that is "with sparsity". The plain names are
the SXM cards. A card of another make has other words, or those in OTHER_CARDS, and is measured.
"""

OTHER_CARDS = {"mig", "laptop", "max", "d"}
"""Words of the names of cut-down cards: a slice of a GPU, a mobile one, RTX 4090 D."""


@dataclass(frozen=True)
class Peak:
    """Highest matmul rate of one device.

    Attributes:
        flops: per second.
        source: where the number comes from, in words.
    """

    flops: float
    source: str


def peak(device: torch.device) -> Peak:
    """The peak of a device: looked up by its name, or measured in about a second (0.1 s on a CPU)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
    known = known_peak(name)
    return Peak(known, f"dense bf16, data sheet of {name}") if known else measured_peak(device, name)


def known_peak(name: str) -> float | None:
    """The data sheet's number for a CUDA device name, that of the most exact entry; None for a card not listed."""
    words = set(name.lower().replace("-", " ").split())
    found = [key for key in PEAKS if words.issuperset(key.split())]
    return PEAKS[max(found, key=len)] if found and not words & OTHER_CARDS else None


def measured_peak(device: torch.device, name: str) -> Peak:
    """Rate of one large matrix product, repeated: bf16 on CUDA, fp32 on a CPU."""
    side, seconds = MEASURE_SIDE[device.type], MEASURE_SECONDS[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left = torch.randn(side, side, device=device, dtype=dtype)
    out = left @ left
    best, end = 0.0, time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        _synchronize(device)
        started = time.perf_counter()
        torch.mm(left, left, out=out)
        _synchronize(device)
        best = max(best, 2 * side**3 / max(time.perf_counter() - started, 1e-9))
    return Peak(best, f"measured on {name} by a {str(dtype)[6:]} product of {side} x {side} matrices")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
