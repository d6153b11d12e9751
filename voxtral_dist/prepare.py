"""What training and evaluation set up alike: tokenizer and audio sizes, packed data, the model on its device."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from voxtral_dist import adapter, checkpoint, distributed, model, run_dir
from voxtral_dist.adapter import LoraSettings
from voxtral_dist.audio import AudioSpec
from voxtral_dist.collator import Collator
from voxtral_dist.config import CommaList, DataConfig, EvalConfig, TrainConfig, split_list
from voxtral_dist.decode_share import DecodeSettings
from voxtral_dist.distributed import World
from voxtral_dist.encoder_cache import GB, EncoderCache, fingerprint
from voxtral_dist.errors import UserError
from voxtral_dist.logger import get_logger
from voxtral_dist.packed_attention import SPLIT, best_kernel
from voxtral_dist.packing import pack
from voxtral_dist.row_filter import RowFilter
from voxtral_dist.shard_cache import ShardCache
from voxtral_dist.shard_format import file_sha256
from voxtral_dist.task_data import TaskData, open_tasks
from voxtral_dist.tasks import parse_task_list
from voxtral_dist.tokenizer import TekkenVocabulary

log = get_logger(__name__)


def open_collator(config: DataConfig) -> Collator:
    """Tokenizer and audio sizes of ``--model_id``, without its weights."""
    spec = AudioSpec.from_config(model.read_config(config.model_id))
    return Collator(TekkenVocabulary.load(config.model_id), spec, config.sqa_question == "spoken")


def open_data(
    config: DataConfig,
    shards: CommaList,
    jsonl: CommaList,
    split: str,
    world: World,
    collator: Collator,
    where: str = "",
) -> list[TaskData]:
    """The tasks of a split: of packed data sets, or of JSONL files that are packed into the output directory first.

    All ranks pack and count tokens together, each its slice, before the process group exists. Copies of shards in a
    cache belong to one machine, so its first rank counts alone there. ``where`` is ``--train_where``, of JSONL rows.
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
        where=RowFilter(where, "--train_where"),
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
    return model.load(config.model_id, dtype, device, config.load_in_4bit)


def decoding_model(config: EvalConfig, device: torch.device) -> tuple[Any, str | None]:
    """The model to decode with, with the adapter that ``--lora_dir`` means, and the folder of that.

    Raises:
        UserError: there is none, or it does not fit the model.
    """
    folder = checkpoint.find_adapter(Path(config.lora_dir)) if config.lora_dir else None
    base = load_base(config, device)
    return (adapter.load(base, folder).to(device), str(folder)) if folder else (base, None)


def decode_settings(config: DataConfig, max_new_tokens: int, audio: str = "own") -> DecodeSettings:
    """How the flags want it decoded."""
    return DecodeSettings(
        rows=config.per_device_bsz,
        max_new_tokens=max_new_tokens,
        tokens=config.max_tokens_per_micro_batch,
        num_workers=config.num_workers,
        audio=audio,
    )


def provenance(config: DataConfig, voxtral: Any) -> dict[str, Any]:
    """What of model and settings decides a prediction, for ``metrics.json``; ``weights`` is a hash of the adapter."""
    return {
        "model_id": config.model_id,
        "weights": adapter.digest(voxtral),
        "dtype": str(next(voxtral.parameters()).dtype).removeprefix("torch."),
        "sqa_question": config.sqa_question,
    }


def lora_settings(config: TrainConfig) -> LoraSettings:
    """The adapter that the flags describe."""
    return LoraSettings(
        r=config.lora_r,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        targets=config.lora_targets,
        freeze_whisper=config.freeze_whisper,
        seed=config.seed,
        rslora=config.lora_rslora,
        dora=config.lora_dora,
        tune=config.tune,
    )


def run_gone_on_from(config: TrainConfig) -> Path | None:
    """Directory of the run whose checkpoint a start goes on from, None when it begins at step 0."""
    out = Path(config.output_dir)
    if config.debug:
        return None
    if checkpoint.published(out):
        return out
    return None if config.resume in ("auto", "none") else Path(config.resume).resolve().parent.parent


def initial_adapter(config: TrainConfig) -> Path | None:
    """The adapter folder that ``--init_adapter`` means; None without it, and where a checkpoint is gone on from.

    Raises:
        UserError: nothing there, or an adapter of another form than the flags describe.
    """
    if not config.init_adapter or run_gone_on_from(config):
        return None
    try:
        folder = checkpoint.find_adapter(Path(config.init_adapter))
    except UserError as error:
        raise UserError(str(error).replace("--lora_dir", "--init_adapter", 1)) from error
    adapter.check_same_form(folder, lora_settings(config))
    return folder


def initial_weights(config: TrainConfig) -> str:
    """SHA-256 of the weights a run began from, empty for fresh ones: on record in a run that is gone on from."""
    run = run_gone_on_from(config)
    if run:
        return str((run_dir.stored_identity(run) or {}).get("init_adapter", ""))
    folder = initial_adapter(config)
    if folder is None:
        return ""
    path = folder / adapter.WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"--init_adapter: {path} does not exist; an adapter must be in safetensors format")
    with path.open("rb") as file:
        return file_sha256(file)


def training_model(config: TrainConfig, device: torch.device, num_tasks: int) -> model.TrainingModel:
    """Base model with a fresh adapter, or that of ``--init_adapter``, ready for the engine."""
    wrapped = adapter.attach(load_base(config, device), lora_settings(config))
    folder = initial_adapter(config)
    if folder:
        adapter.load_weights(wrapped, folder)
        log.info("beginning from the weights in %s", folder)
    elif config.init_adapter:
        log.info("--init_adapter %s is ignored: the run goes on from a checkpoint", config.init_adapter)
    text, kernel = model.read_config(config.model_id).text_config, SPLIT
    if config.packed:
        kernel = best_kernel(device, text, torch.bfloat16 if use_bf16(config, device) else torch.float32)
        log.info("packed rows attend by %s", kernel)
    training = model.TrainingModel(wrapped, num_tasks, config.label_smoothing, kernel)
    if config.grad_ckpt:
        model.checkpoint_layers(training.voxtral)
    if config.torch_compile:
        training.compile_layers()
    return training


def open_encoder_cache(
    config: TrainConfig, training: model.TrainingModel, tasks: Sequence[TaskData]
) -> EncoderCache | None:
    """Let training data read the encoder's states from ``--encoder_cache``, and the model add to it; None without.

    Collective.
    """
    if not config.encoder_cache:
        return None
    tower = training.voxtral.model.audio_tower
    how = {"tf32": config.tf32, "torch_compile": config.torch_compile, "device": training.voxtral.device.type}
    cache = EncoderCache(
        Path(config.encoder_cache),
        int(config.encoder_cache_gb * GB),
        fingerprint(tower, tower.config, how),
        distributed.ranks_here(),
    )
    training.on_encoded = cache.put
    for task in tasks:
        task.encoder_cache = cache
    return cache


DECISIVE = (
    *"label_smoothing loss_norm learning_rate warmup_ratio lr_schedule rewarmup_steps".split(),
    *"weight_decay max_grad_norm".split(),
    *"lora_r lora_alpha lora_dropout lora_targets lora_rslora lora_dora tune".split(),
    *"load_in_4bit freeze_whisper sqa_question".split(),
)
"""Settings that decide the parameters after a step."""


def model_identity(config: TrainConfig) -> dict[str, Any]:
    """What of model and settings decides the parameters after a step; a run goes on only with the same."""
    values = model.config_values(config.model_id)
    volatile = {"transformers_version", "_name_or_path", "_commit_hash", "dtype", "torch_dtype"}
    text = json.dumps({k: v for k, v in values.items() if k not in volatile}, sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    decisive = {name: getattr(config, name) for name in DECISIVE}
    return {"model_config": digest, "init_adapter": initial_weights(config)} | decisive
