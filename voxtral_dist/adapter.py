"""What is trained beside the frozen model: where it sits, and saving and loading it with the proof that nothing was
left out. A LoRA adapter, or weights of the model itself (:mod:`voxtral_dist.full_tuning`)."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from voxtral_dist import lora_linear
from voxtral_dist.errors import UserError, VoxtralDistError
from voxtral_dist.full_tuning import TunedWeights, WeightsConfig

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
    rslora: bool = False
    dora: bool = False
    tune: str = "lora"


def attach(model: Any, settings: LoraSettings) -> Any:
    """Put a fresh adapter on a Voxtral model and freeze the rest, or wrap it so that weights of its own train.

    The trained parameters are float32 whatever the model's type. With ``freeze_whisper`` false a trained copy of the
    whole audio encoder belongs to the adapter.

    Raises:
        VoxtralDistError: an adapter tensor sits in the frozen audio encoder, or none was made.
    """
    if settings.tune != "lora":
        weights = WeightsConfig(settings.tune, settings.freeze_whisper)
        return _checked(TunedWeights(model, weights), settings.freeze_whisper)
    torch.manual_seed(settings.seed)
    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        target_modules=TARGET_MODULES[settings.targets],
        modules_to_save=None if settings.freeze_whisper else ["audio_tower"],
        task_type="CAUSAL_LM",
    )
    adapted = _checked(peft.get_peft_model(model, config), settings.freeze_whisper)
    lora_linear.install(adapted)
    return adapted


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
    if all("audio_tower" in name for name in trained):
        raise VoxtralDistError("nothing would train: the target pattern matches no module of this model")
    return model


def trainable_names(model: torch.nn.Module) -> list[str]:
    """Names of the parameters that train, in module order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


Snapshot = tuple[dict[str, torch.Tensor], Any]
"""An adapter in host memory: tensors by the names in its file, and its config."""


def _tensors(model: Any) -> dict[str, torch.Tensor]:
    """What the file of an adapter holds, by the names it has there."""
    if isinstance(model, TunedWeights):
        return dict(model.tensors())
    return dict(get_peft_model_state_dict(model, save_embedding_layers=False))


def snapshot(model: Any) -> Snapshot:
    """Copy what :func:`write` saves, so that the model may train on."""
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in _tensors(model).items()}, config


def digest(model: Any) -> str:
    """SHA-256 over names and values of what :func:`write` saves, hex; "" for a model without an adapter."""
    if not isinstance(model, (TunedWeights, peft.PeftModel)):
        return ""
    found = hashlib.sha256()
    for name, tensor in sorted(_tensors(model).items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def write(taken: Snapshot, folder: Path) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``, the bytes of peft's ``save_pretrained``."""
    tensors, config = taken
    config.save_pretrained(str(folder))
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def save(model: Any, folder: Path) -> None:
    """Write an adapter in peft's format."""
    write(snapshot(model), folder)


def load(model: Any, folder: Path) -> Any:
    """Put the adapter saved in ``folder`` on a Voxtral model, frozen.

    Raises:
        UserError: no adapter there, or its tensors and the model's do not match one to one.
    """
    config = _read_config(folder)
    if isinstance(config, WeightsConfig):
        wrapped = _checked(TunedWeights(model, config), config.freeze_whisper)
    else:
        config.inference_mode = False
        wrapped = _checked(peft.get_peft_model(model, config), not config.modules_to_save)
    load_weights(wrapped, folder)
    return wrapped.requires_grad_(False)


def _read_config(folder: Path) -> Any:
    """The ``WeightsConfig`` or ``LoraConfig`` of a folder. Raises :class:`UserError` when it holds neither."""
    try:
        config = WeightsConfig.read(folder) or peft.PeftConfig.from_pretrained(str(folder))
        if isinstance(config, WeightsConfig):
            return config
        if config.peft_type != "LORA" or config.megatron_config:
            raise ValueError("not a plain LoRA adapter")
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} holds no readable adapter_config.json; expected a folder that training wrote"
        ) from error
    return config


def check_same_form(folder: Path, settings: LoraSettings) -> None:
    """Refuse to begin from an adapter of another form than the flags describe; dropout and seed may differ.

    Raises:
        UserError: no adapter there, or names each flag that differs, with both values.
    """
    config = _read_config(folder)
    saved = {"tune": "lora", "freeze_whisper": True}
    wanted = {"tune": settings.tune, "freeze_whisper": settings.freeze_whisper}
    if isinstance(config, WeightsConfig):
        saved = {"tune": config.tune, "freeze_whisper": config.freeze_whisper}
    else:
        known = {pattern: name for name, pattern in TARGET_MODULES.items()}
        saved |= {
            "freeze_whisper": not config.modules_to_save,
            "lora_r": config.r,
            "lora_alpha": config.lora_alpha,
            "lora_targets": known.get(str(config.target_modules), str(config.target_modules)),
            "lora_rslora": config.use_rslora,
            "lora_dora": config.use_dora,
        }
        wanted |= {
            f"lora_{name}": getattr(settings, name) for name in ("r", "alpha", "targets", "rslora", "dora")
        }
    wrong = [
        f"--{name} {wanted[name]} but {value} there" for name, value in saved.items() if wanted[name] != value
    ]
    if wrong:
        raise UserError(f"--init_adapter {folder} has another form: {'; '.join(wrong)}; give the same flags")


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
    expected = _tensors(model)
    wrong = sorted(set(saved) ^ set(expected)) or sorted(
        k for k in saved if saved[k].shape != expected[k].shape
    )
    if wrong:
        raise UserError(
            f"{path} does not fit the model: {len(wrong)} of {len(saved)} tensors differ, the first is {wrong[0]}; "
            "was it trained on another model or written by another transformers version?"
        )
    if isinstance(model, TunedWeights):
        for name, parameter in model.tensors().items():
            parameter.data.copy_(saved[name])
    else:
        set_peft_model_state_dict(model, saved)
    loaded = _tensors(model)
    lost = [key for key, value in saved.items() if not torch.equal(loaded[key].cpu().to(value.dtype), value)]
    if lost:
        raise VoxtralDistError(
            f"{len(lost)} adapter tensors of {path} did not reach the model, the first is {lost[0]}"
        )
