"""Exports of an adapter without the base's weights: for peft, and for vLLM.

adapter    a folder that plain peft loads under transformers 5.10 or later
vllm-lora  an adapter of the language model by vLLM's names, to be served beside a base in Mistral's format
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from voxtral_dist import adapter, model
from voxtral_dist.errors import UserError, VoxtralDistError
from voxtral_dist.export_weights import Job
from voxtral_dist.full_tuning import WeightsConfig

IN_MEMORY = re.compile(r"base_model\.model\.model\.language_model\.layers\.(.+)")
IN_VLLM = re.compile(r"base_model\.model\.language_model\.model\.layers\.(.+)")
"""A tensor of an adapter for the language model: as transformers 5.10 and later name it, and as vLLM does."""


def write_adapter(job: Job, folder: Path) -> None:
    """The adapter as it is, under a config that names no folder of this machine."""
    _check_is_lora(job, "adapter")
    _write_config(job, folder)
    shutil.copyfile(job.adapter / adapter.WEIGHTS_FILE, folder / adapter.WEIGHTS_FILE)


def load_adapter(job: Job, folder: Path) -> Any:
    """As a user does."""
    voxtral = model.load(str(job.base.folder), torch.float32)
    wrapped = peft.PeftModel.from_pretrained(voxtral, str(folder))
    _check_consumed(wrapped, load_file(folder / adapter.WEIGHTS_FILE))
    return wrapped


def _check_is_lora(job: Job, kind: str) -> None:
    if isinstance(job.trained.config, WeightsConfig):
        raise UserError(
            f"--format {kind}: {job.adapter} holds whole weights (--tune {job.trained.config.tune}), no adapter; give "
            "--format merged or mistral"
        )


def _write_config(job: Job, folder: Path, **changes: Any) -> None:
    config = copy.deepcopy(job.trained.config)
    for name, value in (changes | {"base_model_name_or_path": job.base_name, "inference_mode": True}).items():
        setattr(config, name, value)
    config.save_pretrained(str(folder))


def _check_consumed(wrapped: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    loaded = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    lost = set(loaded) ^ set(tensors) or {
        n for n, tensor in tensors.items() if not torch.equal(loaded[n], tensor)
    }
    if lost:
        raise VoxtralDistError(
            f"peft did not take {len(lost)} of {len(tensors)} tensors, such as {min(lost)}"
        )


def write_vllm_lora(job: Job, folder: Path) -> None:
    """The adapter by vLLM's names; what vLLM would leave out without a word is refused."""
    _check_is_lora(job, "vllm-lora")
    others = sorted(name for name in job.trained.tensors if not IN_MEMORY.fullmatch(name))
    instead = "give --format merged or mistral"
    if job.trained.config.use_dora:
        raise UserError(f"--format vllm-lora: the adapter is a DoRA, which vLLM does not serve; {instead}")
    if others:
        raise UserError(
            f"--format vllm-lora: vLLM serves adapters of the language model alone and would ignore {len(others)} of "
            f"{len(job.trained.tensors)} trained tensors, such as {others[0]}; {instead}"
        )
    renamed = {to_vllm(name): tensor for name, tensor in job.trained.tensors.items()}
    modules = {name.split(".lora_")[0].rpartition(".")[2] for name in renamed}
    _write_config(job, folder, target_modules=sorted(modules))
    save_file(renamed, folder / adapter.WEIGHTS_FILE, metadata={"format": "pt"})


def to_vllm(name: str) -> str:
    """vLLM's name of an adapter tensor of the language model."""
    return IN_MEMORY.sub(r"base_model.model.language_model.model.layers.\1", name)


def load_vllm_lora(job: Job, folder: Path) -> Any:
    """Names turned back, onto the base."""
    tensors = load_file(folder / adapter.WEIGHTS_FILE)
    strange = [name for name in tensors if not IN_VLLM.fullmatch(name)]
    if strange:
        raise VoxtralDistError(f"vLLM would ignore {strange[0]}")
    back = {IN_VLLM.sub(r"base_model.model.model.language_model.layers.\1", n): t for n, t in tensors.items()}
    config = peft.LoraConfig.from_pretrained(str(folder))
    config.target_modules = sorted({n.removeprefix("base_model.model.").split(".lora_")[0] for n in back})
    wrapped = peft.get_peft_model(model.load(str(job.base.folder), torch.float32), config)
    set_peft_model_state_dict(wrapped, back)
    _check_consumed(wrapped, back)
    return wrapped
