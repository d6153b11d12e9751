"""Memory of a forward and backward pass, counted storage by storage: on the real device, or without any device.

    memory = trace(training, Shape.worst(8192, max_len, model_config), bf16=True)

:func:`trace` runs the model's own code on tensors that have shapes and types but no data (PyTorch's FakeTensorMode), so
that what it counts is what the code does, with every flag, at any size, in seconds and on no GPU. Attention is counted
as a kernel that keeps no scores, which is what PyTorch takes on CUDA in bfloat16, and that of a packed row as if it
were one example.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from voxtral_dist import adapter
from voxtral_dist.adapter import LoraSettings
from voxtral_dist.batch import MicroBatch
from voxtral_dist.loss import HEAD_CHUNK
from voxtral_dist.model import TrainingModel, checkpoint_layers

PROMPT = 16
"""Positions of a row that hold neither audio nor an answer, about."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensor storages that are made inside the block and are still alive.

    Args:
        held: tensors that are there before.
        limit: bytes above which an operation fails as on a full device; 0: none.

    Attributes:
        live: bytes at this moment, those of ``held`` included.
        peaks: most bytes by phase; :meth:`phase` begins one.
    """

    def __init__(self, held: Iterable[torch.Tensor] = (), limit: int = 0) -> None:
        super().__init__()
        self.live, self.limit = 0, limit
        self.peaks: dict[str, int] = {}
        self._phase = ""
        self._sizes: dict[int, int] = {}
        self._add(held)

    def phase(self, name: str) -> None:
        """What comes is counted under this name."""
        self._phase = name
        self.peaks[name] = max(self.live, self.peaks.get(name, 0))

    def _add(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._add(tree_leaves(out))
        self.peaks[self._phase] = max(self.live, self.peaks.get(self._phase, 0))
        if self.limit and self.live > self.limit:
            raise torch.OutOfMemoryError(f"{self.live:,} bytes are alive, of {self.limit:,} allowed")
        return out


@dataclass(frozen=True)
class Shape:
    """Sizes of a micro-batch.

    Attributes:
        rows: B.
        length: L, positions of a row.
        chunks: C, audio chunks of all rows.
        labels: P, label positions of all rows.
        packed: examples one behind the other in a single row, which then has B x L positions.
    """

    rows: int
    length: int
    chunks: int
    labels: int
    packed: bool = False

    @classmethod
    def worst(cls, positions: int, max_len: int, model_config: Any, packed: bool = False) -> Shape:
        """The dearest micro-batch of so many positions: as much audio as its rows hold, and labels on the rest, but on
        no fewer positions than the head takes at once.
        """
        rows = -(-positions // max_len)
        length = positions // rows
        slots = tokens_per_chunk(model_config)
        chunks = max(0, length - PROMPT) // slots
        rest = rows * (length - chunks * slots)
        return cls(rows, length, rows * chunks, max(rest, min(rows * length, HEAD_CHUNK)), packed)

    @property
    def positions(self) -> int:
        """B x L."""
        return self.rows * self.length


def tokens_per_chunk(model_config: Any) -> int:
    """Positions of the language model that an audio chunk takes."""
    audio = model_config.audio_config
    return int(audio.max_source_positions * audio.hidden_size // audio.intermediate_size)


def micro_batch(shape: Shape, model_config: Any) -> MicroBatch:
    """A micro-batch of this shape whose words and sounds mean nothing; where torch's default device is."""
    audio = model_config.audio_config
    rows, length = (1, shape.positions) if shape.packed else (shape.rows, shape.length)
    frames = 2 * audio.max_source_positions
    return MicroBatch(
        input_ids=torch.zeros(rows, length, dtype=torch.long),
        position_ids=torch.arange(shape.length).repeat(shape.rows)[None] if shape.packed else None,
        audio=torch.zeros(shape.chunks, audio.num_mel_bins, frames) if shape.chunks else None,
        audio_index=torch.arange(shape.chunks * tokens_per_chunk(model_config)),
        label_index=torch.arange(shape.positions - shape.labels, shape.positions),
        labels=torch.zeros(shape.labels, dtype=torch.long),
        label_task=torch.zeros(shape.labels, dtype=torch.long),
        label_weight=torch.ones(shape.labels),
        first_draw=0,
        keys=["made up"],
        samples=shape.rows,
        tokens=shape.positions,
        audio_seconds=0.0,
    )


def weightless(
    model_config: Any, settings: LoraSettings, *, bf16: bool, grad_ckpt: bool = False, smoothing: float = 0.0
) -> TrainingModel:
    """The model as it is trained, of one task, on the meta device: shapes and types without data."""
    from transformers import VoxtralForConditionalGeneration

    # TunedWeights asks for autocast on a bfloat16 model's device, and meta has none; trace() sets the types itself.
    dtype = torch.bfloat16 if bf16 and settings.tune == "lora" else torch.float32
    with torch.device("meta"):
        base = VoxtralForConditionalGeneration(model_config).to(dtype).requires_grad_(False).eval()
        training = TrainingModel(adapter.attach(base, settings), 1, smoothing)
    if grad_ckpt:
        checkpoint_layers(training.voxtral)
    return training


@dataclass(frozen=True)
class PassMemory:
    """Bytes of a forward and backward pass above those of weights and gradients.

    Attributes:
        kept: what the forward pass leaves for the backward pass.
        peaks: most at once in the phases ``encoder``, ``forward`` (the language model and its head) and ``backward``.
    """

    kept: int
    peaks: dict[str, int]

    @property
    def peak(self) -> int:
        """Most at once."""
        return max(self.peaks.values())


def trace(training: TrainingModel, shape: Shape, *, bf16: bool) -> PassMemory:
    """Count a pass of a :func:`weightless` model, which is used up by it.

    Args:
        training: the model.
        shape: of the micro-batch.
        bf16: frozen weights and matrix products in bfloat16, as ``--bf16``.
    """
    if shape.packed:
        shape = Shape(1, shape.positions, shape.chunks, shape.labels)
    # The masks' code may look at no value; that a padded batch needs no mask has to be said.
    one_example_a_row = patch("transformers.masking_utils.find_packed_sequence_indices", lambda ids: None)
    with FakeTensorMode(), one_example_a_row, fused_dropout():
        held = _fill(training.train(), torch.bfloat16 if bf16 else torch.float32)
        with LiveBytes(held) as live:
            return _run(training, micro_batch(shape, training.voxtral.config), bf16, live)


def fused_dropout() -> AbstractContextManager[object]:
    """Let dropout keep a byte per value, as CUDA's kernel does; a CPU keeps a factor of the input's type."""

    def dropout(
        input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> torch.Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p else input

    return patch("torch.nn.functional.dropout", dropout)


def _fill(training: TrainingModel, frozen: torch.dtype) -> list[torch.Tensor]:
    """Put tensors without data in the place of the meta device's, and gradients beside them; all of them."""
    held: list[torch.Tensor] = []
    for name, module in training.named_modules():
        for key, tensor in module._parameters.items():
            if tensor is not None:
                float32 = tensor.requires_grad or name.endswith("embed_positions")
                new = torch.empty(tensor.shape, dtype=torch.float32 if float32 else frozen)
                module._parameters[key] = torch.nn.Parameter(new, tensor.requires_grad)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)
    for parameter in training.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
            held.append(parameter.grad)
    return [*held, *training.parameters(), *training.buffers()]


def _run(training: TrainingModel, batch: MicroBatch, bf16: bool, live: LiveBytes) -> PassMemory:
    """Forward and backward, the phases noted by hooks."""
    tower, start = training.voxtral.model.audio_tower, live.live
    tower.register_forward_pre_hook(lambda *_: live.phase("encoder"))
    tower.register_forward_hook(lambda *_: live.phase("forward"))
    live.phase("forward")
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = training(batch).loss
    kept = live.live - start
    live.phase("backward")
    loss.backward()
    phases = ("encoder", "forward", "backward")
    return PassMemory(kept, {name: live.peaks[name] - start for name in phases if name in live.peaks})
