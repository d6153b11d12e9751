"""The weights of a base model with what was trained merged in, one tensor after the other, into files.

    trained = Trained.read(adapter_folder)
    job = Job(BaseWeights.open(base_folder), base_name, adapter_folder, trained, dtype=None)
    write_file(path, job.specs, job.weight, bar.update)
    trained.check_all_used()

Every sum is computed in float32. Only the tensor in hand is in memory beside the trained ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from voxtral_dist import adapter, model
from voxtral_dist.errors import UserError
from voxtral_dist.export_file import TYPES, Spec
from voxtral_dist.full_tuning import WeightsConfig
from voxtral_dist.mistral_names import EMBED_POSITIONS, in_folder

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class BaseWeights:
    """The weights of a Hugging Face folder.

    Attributes:
        folder: of the model.
        files: the file of each tensor, by the tensor's name on disk.
        specs: shape and type of each.
    """

    folder: Path
    files: dict[str, str]
    specs: dict[str, Spec]

    @classmethod
    def open(cls, folder: Path) -> BaseWeights:
        """Read the names and shapes.

        Raises:
            UserError: no safetensors there, or one of them is damaged.
        """
        files: dict[str, str] = {}
        specs: dict[str, Spec] = {}
        try:
            index = folder / INDEX
            known = json.loads(index.read_text("utf-8"))["weight_map"] if index.is_file() else {"": SINGLE}
            for file in dict.fromkeys(known.values()):
                with safe_open(folder / file, "pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 - not a mapping
                        piece = tensors.get_slice(name)
                        files[name] = file
                        specs[name] = tuple(piece.get_shape()), TYPES[piece.get_dtype()]
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(
                f"{folder}: its weights cannot be read ({error}); expected {SINGLE} or {INDEX} with its files"
            ) from error
        return cls(folder, files, specs)

    def read(self, name: str) -> torch.Tensor:
        """One tensor."""
        with safe_open(self.folder / self.files[name], "pt") as tensors:
            return tensors.get_tensor(name)


@dataclass
class Trained:
    """What a run trained, by the names on disk of the weights that it changes.

    Attributes:
        config: peft's ``LoraConfig``, or a ``WeightsConfig``.
        tensors: as in the file, by the names there.
        parts: of each changed weight: ``lora_A`` [r, in], ``lora_B`` [out, r] and ``lora_magnitude_vector`` [out] of a
            LoRA, or the ``whole`` weight.
        used: the weights that :meth:`merged` has changed.
    """

    config: Any
    tensors: dict[str, torch.Tensor]
    parts: dict[str, dict[str, torch.Tensor]]
    used: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, folder: Path) -> Trained:
        """Read an adapter folder.

        Raises:
            UserError: none there, a kind of adapter that is not made here, or one that did not train.
        """
        try:
            config = WeightsConfig.read(folder) or LoraConfig.from_pretrained(str(folder))
            tensors = load_file(folder / adapter.WEIGHTS_FILE)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(
                f"{folder} holds no readable adapter ({str(error).splitlines()[0]}); expected one that training wrote"
            ) from error
        foreign = [name for name in ("rank_pattern", "alpha_pattern") if getattr(config, name, None)]
        if foreign or getattr(config, "bias", "none") != "none":
            raise UserError(f"{folder} is a LoRA with {(*foreign, 'bias')[0]}, which is not made here")
        broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if broken:
            raise UserError(f"{folder}: {broken[0]} holds NaN or infinity; export another checkpoint")
        halves = [tensor for name, tensor in tensors.items() if "lora_B" in name]
        if halves and not any(tensor.any() for tensor in halves):
            raise UserError(
                f"{folder}: all {len(halves)} lora_B tensors are zero, so the adapter changes nothing; "
                "train it, or export another checkpoint"
            )
        return cls(config, tensors, _parts(tensors))

    @property
    def scale(self) -> float:
        """What the product of ``lora_B`` and ``lora_A`` is multiplied by; rsLoRA: Kalajdzievski 2023."""
        return self.config.lora_alpha / (self.config.r**0.5 if self.config.use_rslora else self.config.r)

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight called ``name`` after training: float32 where it was changed, else as it was.

        DoRA (Liu et al. 2024, eq. 5) gives the rows of the sum the lengths that were trained.

        Raises:
            UserError: the shapes do not fit.
        """
        parts = self.parts.get(name)
        if parts is None:
            return weight
        self.used.add(name)
        whole = parts.get("whole")
        try:
            if whole is not None:
                return whole.float().view(weight.shape)
            total = weight.float() + self.scale * (parts["lora_B"].float() @ parts["lora_A"].float())
        except (RuntimeError, KeyError) as error:
            raise UserError(
                f"{name} of the base model does not fit the trained tensors ({str(error).splitlines()[0]}); "
                "was it trained on another model?"
            ) from error
        magnitude = parts.get("lora_magnitude_vector")
        if magnitude is None:
            return total
        return total * (magnitude.float() / total.norm(dim=1)).unsqueeze(1)

    def check_all_used(self) -> None:
        """Raise :class:`UserError` unless every trained tensor found its weight."""
        left = sorted(set(self.parts) - self.used - {EMBED_POSITIONS})  # frozen with the encoder that trained
        if left:
            raise UserError(
                f"{len(left)} of {len(self.parts)} trained weights are not in the base model, the first is {left[0]}; "
                "was it trained on another model or written by another transformers version?"
            )


def _parts(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Trained tensors by the weight they change and the part they have in it."""
    out: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, mark, part = name.removeprefix("base_model.model.").partition(".lora_")
        if mark:
            out.setdefault(in_folder(f"{module}.weight"), {})[f"lora_{part.removesuffix('.weight')}"] = tensor
        else:
            out[in_folder(module)] = {"whole": tensor}
    return out


@dataclass(frozen=True)
class Job:
    """What is exported.

    Attributes:
        base: the base model.
        base_name: what peft's config shall call it.
        adapter: folder of what was trained.
        trained: the same, read.
        dtype: of the weights; None: the base's own.
    """

    base: BaseWeights
    base_name: str
    adapter: Path
    trained: Trained
    dtype: torch.dtype | None

    @cached_property
    def config(self) -> Any:
        """The base's ``VoxtralConfig``."""
        return model.read_config(str(self.base.folder))

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """Shape and type of every weight of the export, by its name in a Hugging Face folder."""
        return {
            name: (shape, dtype if self.dtype is None or name == EMBED_POSITIONS else self.dtype)
            for name, (shape, dtype) in self.base.specs.items()
        }

    @property
    def is_rounded(self) -> bool:
        """Whether a changed weight has less than float32's digits in the export."""
        return any(self.specs[name][1] != torch.float32 for name in self.trained.parts if name in self.specs)

    def weight(self, name: str) -> torch.Tensor:
        """A weight of the export."""
        return self.trained.merged(name, self.base.read(name)).to(self.specs[name][1])
