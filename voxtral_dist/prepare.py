"""What training and evaluation set up alike: tokenizer and audio sizes, packed data, the model on its device."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from voxtral_dist import adapter, model
from voxtral_dist.adapter import LoraSettings
from voxtral_dist.audio import AudioSpec
from voxtral_dist.collator import Collator
from voxtral_dist.config import CommaList, DataConfig, TrainConfig, split_list
from voxtral_dist.distributed import World
from voxtral_dist.packing import pack
from voxtral_dist.shard_cache import ShardCache
from voxtral_dist.task_data import TaskData, open_tasks
from voxtral_dist.tasks import parse_task_list
from voxtral_dist.tokenizer import TekkenVocabulary


def open_collator(config: DataConfig) -> Collator:
    """Tokenizer and audio sizes of ``--model_id``, without its weights."""
    spec = AudioSpec.from_config(model.read_config(config.model_id))
    return Collator(TekkenVocabulary.load(config.model_id), spec, config.sqa_question == "spoken")


def open_data(
    config: DataConfig, shards: CommaList, jsonl: CommaList, split: str, world: World, collator: Collator
) -> list[TaskData]:
    """The tasks of a split: of packed data sets, or of JSONL files that are packed into the output directory first.

    All ranks pack and count tokens together, each its slice, before the process group exists. Copies of shards in a
    cache belong to one machine, so its first rank counts alone there.
    """
    slice_ = (world.rank, world.world_size)
    if split_list(shards):
        cache = ShardCache.from_flags(config.shard_cache, config.shard_cache_gb)
        if cache is not None:
            return open_tasks(split_list(shards), collator, (0, 1) if world.local_rank == 0 else None, cache)
        return open_tasks(split_list(shards), collator, slice_)
    files = [Path(name) for name in split_list(jsonl)]
    if not files:
        return []
    folders = pack(
        files,
        Path(config.output_dir) / "shards",
        split=split,
        tasks=parse_task_list(split_list(config.tasks), split_list(jsonl), f"the {split} data"),
        slice_=slice_,
        wait=True,
        progress=world.is_main,
    )
    return open_tasks(folders, collator, slice_)


def use_bf16(config: DataConfig, device: torch.device) -> bool:
    """``--bf16``, by default yes on CUDA and no on the CPU."""
    return device.type == "cuda" if config.bf16 is None else config.bf16


def load_base(config: DataConfig, device: torch.device) -> Any:
    """The frozen base model on its device."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    dtype = torch.bfloat16 if use_bf16(config, device) else torch.float32
    return model.load(config.model_id, dtype).to(device)


def lora_settings(config: TrainConfig) -> LoraSettings:
    """The adapter that the flags describe."""
    return LoraSettings(
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=config.lora_targets,
        freeze_whisper=config.freeze_whisper,
        seed=config.seed,
    )


def training_model(config: TrainConfig, device: torch.device, num_tasks: int) -> model.TrainingModel:
    """Base model with a fresh adapter, ready for the engine."""
    wrapped = adapter.attach(load_base(config, device), lora_settings(config))
    training = model.TrainingModel(wrapped, num_tasks, config.label_smoothing)
    if config.grad_ckpt:
        model.checkpoint_layers(training.voxtral)
    return training


DECISIVE = (
    *"label_smoothing loss_norm learning_rate warmup_ratio lr_schedule rewarmup_steps".split(),
    *"weight_decay max_grad_norm".split(),
    *"lora_r lora_alpha lora_dropout lora_targets freeze_whisper sqa_question".split(),
)
"""Settings that decide the parameters after a step."""


def model_identity(config: TrainConfig) -> dict[str, Any]:
    """What of model and settings decides the parameters after a step; a run goes on only with the same."""
    values = model.config_values(config.model_id)
    volatile = {"transformers_version", "_name_or_path", "_commit_hash", "dtype", "torch_dtype"}
    text = json.dumps({k: v for k, v in values.items() if k not in volatile}, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"model_config": digest} | {name: getattr(config, name) for name in DECISIVE}
