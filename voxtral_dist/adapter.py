"""The LoRA adapter: where it sits, and saving and loading it with the proof that nothing was left out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from voxtral_dist.errors import UserError, VoxtralDistError

_LANGUAGE_MODEL = (
    r"language_model\.(?:.*\.)?layers\.\d+\.(?:self_attn\.(?:q|k|v|o)_proj|mlp\.(?:gate|up|down)_proj)"
)
_PROJECTOR = r"multi_modal_projector\.linear_[12]"
TARGET_MODULES = {
    "language_model": rf"(?:.*\.)?{_LANGUAGE_MODEL}",
    "projector": rf"(?:.*\.)?{_PROJECTOR}",
    "both": rf"(?:.*\.)?(?:{_LANGUAGE_MODEL}|{_PROJECTOR})",
}
"""Anchored patterns: a bare list such as q_proj would also hit the frozen audio encoder."""

WEIGHTS_FILE = "adapter_model.safetensors"


@dataclass(frozen=True)
class LoraSettings:
    """Shape of the adapter, as the flags of the same names."""

    r: int
    alpha: float
    dropout: float
    targets: str
    freeze_whisper: bool
    seed: int


def attach(model: Any, settings: LoraSettings) -> Any:
    """Put a fresh adapter on a Voxtral model and freeze the rest.

    The trained parameters are float32 whatever the model's type. With ``freeze_whisper`` false a trained copy of the
    whole audio encoder belongs to the adapter.

    Raises:
        VoxtralDistError: an adapter tensor sits in the frozen audio encoder, or none was made.
    """
    torch.manual_seed(settings.seed)
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=TARGET_MODULES[settings.targets],
        modules_to_save=None if settings.freeze_whisper else ["audio_tower"],
        task_type="CAUSAL_LM",
    )
    return _checked(peft.get_peft_model(model, config), settings.freeze_whisper)


def _checked(model: Any, freeze_whisper: bool) -> Any:
    for name, parameter in model.named_parameters():
        if name.endswith("embed_positions.weight"):
            parameter.requires_grad_(False)
        elif parameter.requires_grad:
            parameter.data = parameter.data.float()
    trained = trainable_names(model)
    in_tower = [name for name in trained if "audio_tower" in name]
    if freeze_whisper and in_tower:
        raise VoxtralDistError(
            f"{len(in_tower)} trained tensors sit in the frozen audio encoder, the first is {in_tower[0]}"
        )
    if not any("lora_" in name for name in trained):
        raise VoxtralDistError("no adapter was attached: the target pattern matches no module of this model")
    return model


def trainable_names(model: torch.nn.Module) -> list[str]:
    """Names of the parameters that train, in module order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def save(model: Any, folder: Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` in peft's format."""
    model.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def load(model: Any, folder: Path) -> Any:
    """Put the adapter saved in ``folder`` on a Voxtral model, frozen.

    Raises:
        UserError: no adapter there, or its tensors and the model's do not match one to one.
    """
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        if config.peft_type != "LORA" or config.megatron_config:
            raise ValueError("not a plain LoRA adapter")
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} holds no readable adapter_config.json; expected a folder that training wrote"
        ) from error
    config.inference_mode = False
    wrapped = _checked(peft.get_peft_model(model, config), not config.modules_to_save)
    load_weights(wrapped, folder)
    return wrapped.requires_grad_(False)


def load_weights(model: Any, folder: Path) -> None:
    """Copy the tensors saved in ``folder`` into the adapter of ``model``, every one of them.

    Raises:
        UserError: a key is missing on either side or a shape differs; nothing is loaded then.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist; an adapter must be in safetensors format")
    try:
        saved = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read: {error}; copy it again") from error
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    wrong = sorted(set(saved) ^ set(expected)) or sorted(
        k for k in saved if saved[k].shape != expected[k].shape
    )
    if wrong:
        raise UserError(
            f"{path} does not fit the model: {len(wrong)} of {len(saved)} tensors differ, the first is {wrong[0]}; "
            "was it trained on another model or written by another transformers version?"
        )
    set_peft_model_state_dict(model, saved)
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    lost = [key for key, value in saved.items() if not torch.equal(loaded[key].cpu().to(value.dtype), value)]
    if lost:
        raise VoxtralDistError(
            f"{len(lost)} adapter tensors of {path} did not reach the model, the first is {lost[0]}"
        )
