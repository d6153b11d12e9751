"""What a run takes of a GPU: weights, what ZeRO-2 shares out, activations, the decoder's cache. All sums are here.

    estimate(config, model_config, lora, ranks=8, shape=Shape.worst(...), bf16=True).lines()

Weights and states follow from counts of parameters, activations from :mod:`voxtral_dist.step_memory`. No weights are
loaded. ``python tools/estimate_memory.py`` prints it, ``python tools/bench_memory.py`` holds it against a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from voxtral_dist import adapter, step_memory
from voxtral_dist.adapter import LoraSettings
from voxtral_dist.config import TrainConfig
from voxtral_dist.ds_config import EngineSettings, build_ds_config, offloads
from voxtral_dist.errors import UserError
from voxtral_dist.model import TrainingModel
from voxtral_dist.step_memory import PassMemory, Shape

GIB = 1 << 30

FOUR_BIT_BYTES = 0.516
"""Per weight in NF4 with quantised scales: 4.127 bits (Dettmers et al. 2023, section 3)."""

FREE_SHARE = 0.08
"""Of a GPU, left to the CUDA context, communication and fragments of the allocator."""

PARTS = {
    "audio encoder": r"audio_tower\.",
    "projector": r"multi_modal_projector\.",
    "embeddings": r"embed_tokens\.",
    "head": r"lm_head\.",
    "language model": r"language_model\.",
}
"""Parts of the frozen model by the first pattern that a parameter's name has."""


@dataclass(frozen=True)
class States:
    """Bytes on one rank that do not depend on the batch.

    Attributes:
        frozen: weights by part, see :data:`PARTS`.
        trained: float32 weights that train.
        gradients: their float32 gradients, kept until the reduction.
        optimizer: this rank's part of the float32 master weights and Adam's two moments, 12 bytes a weight over the
            ranks; in host memory where the optimizer is offloaded.
        update: most that the reduction and the update take above weights and optimizer, gradients included.
        in_host_memory: whether the optimizer is offloaded.
    """

    frozen: dict[str, int]
    trained: int
    gradients: int
    optimizer: int
    update: int
    in_host_memory: bool

    @property
    def held(self) -> int:
        """On the GPU from the first to the last step."""
        return sum(self.frozen.values()) + self.trained + (0 if self.in_host_memory else self.optimizer)

    @property
    def alone(self) -> int:
        """Most bytes at once of a step without micro-batches."""
        return self.held + max(self.gradients, self.update)


def states(training: TrainingModel, config: TrainConfig, ranks: int, bf16: bool) -> States:
    """Count the parameters of a :func:`~voxtral_dist.step_memory.weightless` model.

    The reduction copies the gradients through buckets. Then the reduced part of this rank lies twice, as it was
    reduced and flat for Adam.
    """
    elements = sum(p.numel() for p in training.parameters() if p.requires_grad)
    engine = build_ds_config(EngineSettings(bf16=bf16, ds_config=config.ds_config), elements)
    zero = engine["zero_optimization"]
    bucket = 4 * min(elements, zero["reduce_bucket_size"]) * (2 if zero.get("overlap_comm") else 1)
    return States(
        frozen=_frozen_bytes(training, 2 if bf16 else 4, config.load_in_4bit),
        trained=4 * elements,
        gradients=4 * elements,
        optimizer=12 * elements // ranks,
        update=max(4 * elements + bucket, 8 * elements // ranks),
        in_host_memory=offloads(engine),
    )


def _frozen_bytes(training: TrainingModel, each: int, four_bit: bool) -> dict[str, int]:
    """Bytes of the frozen weights by part."""
    linears = re.compile(adapter.TARGET_MODULES["language_model"])
    found = dict.fromkeys(PARTS, 0.0)
    for name, parameter in training.named_parameters():
        if parameter.requires_grad:
            continue
        part = next(part for part, pattern in PARTS.items() if re.search(pattern, name))
        own = name.removesuffix(".weight").removesuffix(".base_layer").removeprefix("model.")
        small = four_bit and linears.fullmatch(own)
        size = FOUR_BIT_BYTES if small else 4 if name.endswith("embed_positions.weight") else each
        found[part] += parameter.numel() * size
    return {part: round(size) for part, size in found.items()}


def cache_bytes(model_config: Any, bf16: bool) -> int:
    """Bytes of one cached position in decoding: a key and a value in every layer."""
    text = model_config.text_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head * (2 if bf16 else 4)


@dataclass(frozen=True)
class Estimate:
    """Memory of one rank.

    Attributes:
        states: what does not depend on the batch.
        activations: of one pass over the dearest micro-batch.
        shape: of that.
        cache: bytes of a cached position in decoding.
    """

    states: States
    activations: PassMemory
    shape: Shape
    cache: int

    @property
    def peak(self) -> int:
        """Most bytes at once: in a pass, all gradients being there already, or in the update."""
        return max(self.states.held + self.states.gradients + self.activations.peak, self.states.alone)

    def lines(self) -> list[str]:
        """As a person reads it, in GiB."""
        s, a, n = self.states, self.activations, self.shape.positions
        where = " in host memory" if s.in_host_memory else ""
        rows = [(f"frozen {part}", size) for part, size in s.frozen.items() if size]
        rows += [
            ("trained weights, float32", s.trained),
            ("their gradients", s.gradients),
            (f"this rank's master weights and Adam's moments{where}", s.optimizer),
            ("reduction and update, gradients included", s.update),
            (f"kept for the backward pass of {n:,} positions", a.kept),
            *(
                (f"peak of the {name} pass above weights and gradients", size)
                for name, size in a.peaks.items()
            ),
            (f"decoder's cache of as many positions, {self.cache:,} bytes each", self.cache * n),
            ("peak of a training step", self.peak),
        ]
        return [f"{size / GIB:9.3f} GiB  {name}" for name, size in rows]


def largest_shape(config: TrainConfig, model_config: Any) -> Shape:
    """The dearest micro-batch that the flags allow; one example of ``--max_len`` may exceed the cap on positions."""
    rows = config.per_device_bsz * config.max_len
    tokens = config.max_tokens_per_micro_batch or rows
    tokens = max(config.max_len, tokens if config.packed else min(tokens, rows))
    return Shape.worst(tokens, config.max_len, model_config, config.packed)


def estimate(
    config: TrainConfig,
    model_config: Any,
    lora: LoraSettings,
    *,
    ranks: int,
    shape: Shape,
    bf16: bool,
) -> Estimate:
    """What a rank takes.

    Args:
        config: the flags of the run.
        model_config: the ``VoxtralConfig``.
        lora: what is trained, as the flags say.
        ranks: that share the optimizer.
        shape: of the largest micro-batch.
        bf16: as ``--bf16``.
    """
    training = step_memory.weightless(
        model_config, lora, bf16=bf16, grad_ckpt=config.grad_ckpt, smoothing=config.label_smoothing
    )
    held = states(training, config, ranks, bf16)
    passes = step_memory.trace(training, shape, bf16=bf16)
    return Estimate(held, passes, shape, cache_bytes(model_config, bf16))


def largest(fits: Callable[[int], bool], start: int, most: int = 1 << 20) -> int:
    """The largest number that fits, to a sixteenth: doubling, then bisection.

    Args:
        fits: whether a number fits; if one does, all smaller ones do. Asked at most once for each.
        start: the first to try, at least 1; where it does not fit, halves of it are tried.
        most: no more is tried.

    Returns:
        A number that fits, or 0 where 1 does not; one more sixteenth of it does not fit or is above ``most``.
    """
    good, bad = 0, most + 1
    size = min(start, most)
    while 0 < size < bad:
        if fits(size):
            good, size = size, min(2 * size, most)
            if good == most:
                break
        else:
            bad, size = size, size // 2 if not good else 0
    while bad - good > max(1, good // 16):
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def advice(found: int, config: TrainConfig, device: str) -> list[str]:
    """What a found number of positions means, in flags.

    Args:
        found: from :func:`largest`, 0 where nothing fits.
        config: of the run.
        device: what it fits into, in words.

    Raises:
        UserError: less than one example of ``--max_len`` fits.
    """
    if found < config.max_len:
        raise UserError(
            f"--max_len {config.max_len}: an example of so many positions does not fit into {device} with "
            f"{FREE_SHARE:.0%} left free, {found} would; lower it, or give --grad_ckpt or --load_in_4bit"
        )
    lines = [
        f"--max_tokens_per_micro_batch {found} is the largest that fits into {device} with {FREE_SHARE:.0%} left free"
    ]
    rows = found // config.max_len
    if not config.packed and rows > config.per_device_bsz:
        lines.append(
            f"--per_device_bsz {config.per_device_bsz} allows fewer rows: give {rows} or more, and --global_batch_size "
            "to keep the examples per step"
        )
    return lines
