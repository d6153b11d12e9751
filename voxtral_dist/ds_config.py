"""The DeepSpeed settings of a run: the built-in ones or a user's file, with what the flags decide filled in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxtral_dist.errors import UserError

DS_CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 0.0,
    "steps_per_print": 1_000_000_000,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 0,
        "allgather_bucket_size": 0,
    },
}
"""The built-in settings, those of ds_configs/zero2.json. Zero bucket sizes and clipping are filled in at the start."""

BUCKET_LIMIT = 250_000_000
"""Most elements of a bucket that is filled in: 1 GB of float32."""


@dataclass(frozen=True)
class EngineSettings:
    """What the flags decide of the engine; names as the flags."""

    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    bf16: bool = False
    loss_norm: str = "tokens"
    ds_config: str = ""
    seed: int = 0


def build_ds_config(settings: EngineSettings, trained_elements: int) -> dict[str, Any]:
    """The DeepSpeed config of a run: a preset, with what the flags decide filled in.

    ``gradient_clipping`` is always written, DeepSpeed clips at 1.0 without it. The buckets hold all trained elements up
    to :data:`BUCKET_LIMIT`, so that one step of an adapter is one reduction.

    Raises:
        UserError: unreadable file, or a key that contradicts how this engine works.
    """
    config = json.loads(json.dumps(DS_CONFIG))
    if settings.ds_config:
        config |= _read_ds_config(Path(settings.ds_config))
    config["gradient_clipping"] = settings.max_grad_norm
    zero = config["zero_optimization"]
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        zero[key] = zero.get(key) or min(trained_elements + trained_elements % 2, BUCKET_LIMIT)
    if offloads(config):
        config["zero_force_ds_cpu_optimizer"] = False
    if settings.bf16:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config


def offloads(config: dict[str, Any]) -> bool:
    """Whether the optimizer's state lies in host memory."""
    where = config["zero_optimization"].get("offload_optimizer") or {}
    return bool(where.get("device", "none") != "none")


_STAGES = {
    0: "keeps no gradient back until the end of the step, which the exact reduction needs",
    3: "gathers weights in the forward pass, and ranks with and without audio would do so in different orders",
}
_FIXED = {
    "gradient_accumulation_steps": (
        1,
        "would divide the gradient a second time; --grad_accum (at the first start) or --global_batch_size decides",
    ),
    "train_micro_batch_size_per_gpu": (
        1,
        "is nominal, micro-batches differ in size; --per_device_bsz and --max_tokens_per_micro_batch decide",
    ),
    "gradient_clipping": (0.0, "contradicts the flag; --max_grad_norm decides"),
    "zero_force_ds_cpu_optimizer": (False, "wants DeepSpeed's Adam, but torch's AdamW is used"),
}
_DECIDED = {
    "train_batch_size": "--global_batch_size, else --per_device_bsz x --grad_accum x ranks",
    "optimizer": "--weight_decay; AdamW is built in",
    "scheduler": "--learning_rate, --warmup_ratio and --lr_schedule",
    "bf16": "--bf16",
    "fp16": "--bf16",
    "torch_autocast": "--bf16",
    "gradient_allreduce_op": "--loss_norm",
    "compute_grad_norm": "the program, which sees by the norm whether a gradient is finite",
}


def _read_ds_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text("utf-8"))
        zero = config.get("zero_optimization", {})
        in_host_memory = offloads({"zero_optimization": zero})
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"--ds_config {path} cannot be read as JSON settings: {error}") from error
    stage = zero.get("stage")
    if stage not in (1, 2):
        reason = f" {_STAGES[stage]};" if type(stage) is int and stage in _STAGES else ""
        raise UserError(
            f"--ds_config {path}: ZeRO stage {stage!r}{reason or ';'} the exact one-reduction step needs stage 1 or 2"
        )
    for key, (value, reason) in _FIXED.items():
        if config.get(key, value) != value:
            raise UserError(f"--ds_config {path}: {key} {config[key]} {reason}; remove it from the file")
    for key, flag in _DECIDED.items():
        if key in config:
            raise UserError(f"--ds_config {path}: {key!r} is decided by {flag}; remove it from the file")
    if in_host_memory and zero["offload_optimizer"]["device"] != "cpu":
        raise UserError(
            f"--ds_config {path}: offload_optimizer to {zero['offload_optimizer']['device']!r}; only 'cpu'"
        )
    return config
