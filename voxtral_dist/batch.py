"""The micro-batch: what the collator hands to the model, as tensors with every index worked out beforehand.

B rows, L positions, C audio chunks, P label positions. Two forms that give the same loss and gradient:

- padded: an example per row, padded on the right, so that the causal mask alone keeps padding out;
- packed: one row of several examples without padding, whose positions start again at 0 with each example. Attention
  must then stay within an example.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch


@dataclass
class MicroBatch:
    """Tensors of one forward pass, and what it holds.

    Attributes:
        input_ids: int64 [B, L].
        position_ids: int64 [1, L] in the packed form, None in the padded form.
        audio: float32 [C, mel bins, frames] log-mel chunks in row order, or None without audio.
        audio_index: int64 [chunks x tokens per chunk], flat positions (row * L + column) of the ``[AUDIO]`` slots:
            those of ``audio``, then those of ``encoded``.
        label_index: int64 [P], flat positions whose hidden state predicts a label: one left of the label.
        labels: int64 [P], the token to predict there.
        label_task: int64 [P], index of the label's task.
        label_weight: float32 [P], the label's weight in the loss sum.
        first_draw: index of its first draw in the whole run, the seed of its dropout.
        keys: names of its samples, for messages.
        samples: number of examples.
        tokens: number of positions that are not padding.
        audio_seconds: seconds of audio, without padding.
        draw_hash: sum of :func:`voxtral_dist.plan.draw_hashes` over its examples, for the audit.
        bad_samples: names of samples that could not be read; their labels weigh nothing.
        encoded: [chunks, encoder positions, encoder width], states of audio that an encoder cache holds, in row order.
        audio_keys: for each example in ``audio`` its name in the encoder cache and its chunks; empty without a cache.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor | None
    audio: torch.Tensor | None
    audio_index: torch.Tensor
    label_index: torch.Tensor
    labels: torch.Tensor
    label_task: torch.Tensor
    label_weight: torch.Tensor
    first_draw: int
    keys: list[str]
    samples: int
    tokens: int
    audio_seconds: float
    draw_hash: int = 0
    bad_samples: list[str] = dataclasses.field(default_factory=list)
    encoded: torch.Tensor | None = None
    audio_keys: list[tuple[str, int]] = dataclasses.field(default_factory=list)

    @property
    def positions(self) -> int:
        """Number of positions with padding, B x L."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> MicroBatch:
        """The same micro-batch with its tensors on ``device``."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True)
class DecodeCaps:
    """Limits of one decoding batch. One example alone may exceed ``tokens``, else it could not be answered.

    Attributes:
        rows: most examples.
        tokens: most cached positions: rows x (longest prompt + longest answer limit).
    """

    rows: int
    tokens: int
