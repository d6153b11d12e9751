"""Training weights themselves instead of an adapter beside them: the projector, or the language model's layers with it.

What is saved is a folder like an adapter's. Its ``adapter_config.json`` says which weights it holds, and
``adapter_model.safetensors`` holds them whole, float32, under the model's own names.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

FORMAT = "voxtral-dist/weights/1"
CONFIG_FILE = "adapter_config.json"

_PROJECTOR = r"model\.multi_modal_projector\..*"
_LAYERS = r"model\.language_model\.layers\..*"
_ENCODER = r"model\.audio_tower\.(?!embed_positions\.).*"
PATTERNS = {"projector": _PROJECTOR, "language_model": rf"{_PROJECTOR}|{_LAYERS}"}
"""Names of the weights that each ``--tune`` trains; embeddings, final norm and head stay frozen."""


@dataclass
class WeightsConfig:
    """Which weights a folder holds; the counterpart of peft's config."""

    tune: str
    freeze_whisper: bool

    def save_pretrained(self, folder: str) -> None:
        """Write it into a folder, which is made where it is missing."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT} | asdict(self), indent=2)
        Path(folder, CONFIG_FILE).write_text(f"{text}\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> WeightsConfig | None:
        """The config in a folder, None when it is not of this format.

        Raises:
            ValueError: it says it is, and names weights nobody knows.
        """
        try:
            values = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
        except OSError:
            return None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            return None
        tune, frozen = values.get("tune"), values.get("freeze_whisper")
        if tune not in PATTERNS or not isinstance(frozen, bool):
            raise ValueError(f"unknown weights {tune!r}")
        return cls(tune, frozen)


class TunedWeights(torch.nn.Module):
    """A Voxtral of which some weights train, in the place of a ``PeftModel``.

    Args:
        model: ``VoxtralForConditionalGeneration``, frozen, on its device.
        config: which weights become float32 and train.

    In a bfloat16 model the float32 layers compute in bfloat16 wherever they are called from, training or decoding.
    """

    def __init__(self, model: Any, config: WeightsConfig) -> None:
        super().__init__()
        self.base = model
        self.peft_config = {"default": config}
        pattern = PATTERNS[config.tune] if config.freeze_whisper else f"{PATTERNS[config.tune]}|{_ENCODER}"
        self._names = [name for name, _ in model.named_parameters() if re.fullmatch(pattern, name)]
        for parameter in self.tensors().values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        head, layers = model.lm_head.weight, model.model.language_model
        if head.dtype == torch.bfloat16 and config.tune == "language_model":
            layers.forward = torch.autocast(head.device.type, torch.bfloat16)(layers.forward)

    def get_base_model(self) -> Any:
        """The ``VoxtralForConditionalGeneration`` inside."""
        return self.base

    def forward(self, *args: Any, **inputs: Any) -> Any:
        """The stock forward pass."""
        return self.base(*args, **inputs)

    def tensors(self) -> dict[str, torch.nn.Parameter]:
        """The weights that a folder holds, by the model's names, whether they train at present or not."""
        return {name: self.base.get_parameter(name) for name in self._names}
