"""Voxtral for training and decoding: loading, and the forward pass that computes only what the loss needs.

A forward pass of ours differs from the stock one in four ways. The frozen audio encoder runs in eval mode without a
graph, always on full chunks. Audio embeddings go to precomputed positions. The last layer's MLP and the head run on
label positions alone. The loss is a sum, per task, so that the step can be normalised over all ranks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint

from voxtral_dist import last_layer
from voxtral_dist.batch import MicroBatch
from voxtral_dist.compiled_layers import CompiledLayers
from voxtral_dist.errors import UserError
from voxtral_dist.loss import head_nll
from voxtral_dist.packed_attention import MASK, SPLIT, attending, attention, packed_options


def config_values(model_id: str) -> dict[str, Any]:
    """The checked ``config.json`` of a folder or hub id.

    Raises:
        UserError: nothing there, another model type, or a config that asks to run code.
    """
    from transformers import PreTrainedConfig

    try:
        values: dict[str, Any] = dict(PreTrainedConfig.get_config_dict(model_id)[0])
    except (OSError, ValueError, TypeError):
        values = {}
    if not values:
        raise UserError(
            f"--model_id {model_id}: no readable config.json there; give a Voxtral folder or hub id"
        )
    _check_config(model_id, values)
    return values


def read_config(model_id: str) -> Any:
    """The ``VoxtralConfig`` of a folder or hub id; errors as :func:`config_values`."""
    from transformers import VoxtralConfig

    return VoxtralConfig.from_dict(config_values(model_id))


def _check_config(model_id: str, values: Mapping[str, Any]) -> None:
    kind = values.get("model_type")
    if kind == "voxtral_realtime":
        raise UserError(
            f"--model_id {model_id} is a voxtral_realtime model: it is trained on word-aligned streams, which this "
            "project does not make; use model type voxtral, for example mistralai/Voxtral-Mini-3B-2507"
        )
    if kind != "voxtral":
        raise UserError(
            f"--model_id {model_id} has model type {kind!r}, not 'voxtral'; "
            "use for example mistralai/Voxtral-Mini-3B-2507"
        )
    hostile = [key for key in ("auto_map", "_attn_implementation_internal") if key in values]
    if hostile:
        raise UserError(
            f"--model_id {model_id}: config.json has {hostile[0]!r}, which may run foreign code; remove the key"
        )


def load(
    model_id: str, dtype: torch.dtype, device: torch.device | None = None, four_bit: bool = False
) -> Any:
    """Load the weights as a frozen ``VoxtralForConditionalGeneration`` in eval mode.

    ``embed_positions`` of the encoder stays float32, as the released model wants.

    Args:
        model_id: a folder or hub id.
        dtype: of the weights; of the matrix products, where these are in 4 bits.
        device: where they go; None: the CPU.
        four_bit: keep the linears of the language model's layers in 4 bits (NF4, Dettmers et al. 2023).

    Raises:
        UserError: not a Voxtral model, its weights do not fit its config, or bitsandbytes is missing.
    """
    from transformers import VoxtralForConditionalGeneration

    read_config(model_id)
    options = _four_bit_options(dtype, device) if four_bit else {}
    try:
        model, info = VoxtralForConditionalGeneration.from_pretrained(
            model_id, dtype=dtype, output_loading_info=True, use_safetensors=True, **options
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--model_id {model_id}: the weights cannot be loaded: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"--model_id {model_id}: {len(missing)} weights are missing from its files, the first is {missing[0]}"
        )
    return model.to(device or "cpu").requires_grad_(False).eval()


def _four_bit_options(dtype: torch.dtype, device: torch.device | None) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that quantise while loading; encoder, projector and head are left out."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--load_in_4bit needs bitsandbytes; pip install 'voxtral-dist[4bit]'")
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[".*audio_tower", ".*multi_modal_projector", ".*lm_head"],
    )
    return {"quantization_config": how, "device_map": {"": device or torch.device("cpu")}}


class ForwardResult(NamedTuple):
    """Sums of one micro-batch.

    Attributes:
        loss: scalar, weighted sum of the label positions' losses; what is differentiated.
        task_nll: float32 [tasks], unweighted sum of the losses of each task's labels that count.
        task_tokens: float32 [tasks], number of those labels.
    """

    loss: torch.Tensor
    task_nll: torch.Tensor
    task_tokens: torch.Tensor


class TrainingModel(torch.nn.Module):
    """A Voxtral with its adapter, as the engine trains it.

    Args:
        model: ``VoxtralForConditionalGeneration``, or the ``PeftModel`` around it.
        num_tasks: number of tasks the losses are summed by.
        label_smoothing: in [0, 1).
        packed_kernel: how packed rows attend, of :mod:`voxtral_dist.packed_attention`.

    Attributes:
        on_encoded: told the encoder's states of a micro-batch that has ``audio_keys``, and these; None: nobody.
    """

    def __init__(
        self, model: Any, num_tasks: int, label_smoothing: float = 0.0, packed_kernel: str = SPLIT
    ) -> None:
        super().__init__()
        self.packed_kernel = packed_kernel
        self.model = model
        self.num_tasks = num_tasks
        self.label_smoothing = label_smoothing
        last_layer.install(self.voxtral)
        self.encoder_trains = any(p.requires_grad for p in self.voxtral.model.audio_tower.parameters())
        self.on_encoded: Callable[[Sequence[tuple[str, int]], torch.Tensor], None] | None = None
        self._compiled: CompiledLayers | None = None

    @property
    def voxtral(self) -> Any:
        """The ``VoxtralForConditionalGeneration`` inside."""
        return unwrap(self.model)

    def train(self, mode: bool = True) -> TrainingModel:
        """Switch dropout on or off, and compiled layers with it; the frozen encoder stays in eval mode."""
        super().train(mode)
        if self._compiled:
            self._compiled.switch(mode)
        if not self.encoder_trains:
            self.voxtral.model.audio_tower.eval()
        return self

    def compile_layers(self) -> None:
        """Let training passes go through compiled layers; errors as :class:`CompiledLayers`."""
        self._compiled = CompiledLayers(self.voxtral, self.voxtral.device)

    def recompute_layers(self) -> None:
        """In eval mode, too, recompute the layers that :func:`checkpoint_layers` marked; dropout stays off."""
        for layer in self.voxtral.model.language_model.layers:
            layer.training = layer.gradient_checkpointing

    def forward(self, batch: MicroBatch) -> ForwardResult:
        """Sums of losses of one micro-batch on the model's device."""
        voxtral = self.voxtral
        embeds = embed(voxtral, batch.input_ids, self._states(batch), batch.audio_index)
        if self._compiled and self.training and not embeds.requires_grad:
            embeds.requires_grad_()  # or the first layer is compiled once more, for an input without gradient
        language_model, positions = voxtral.model.language_model, batch.position_ids
        kind = MASK if positions is None else self.packed_kernel
        options = {} if positions is None else packed_options(positions, kind)
        with attending(language_model, kind):
            states = language_model(
                inputs_embeds=embeds,
                position_ids=positions,
                use_cache=False,
                read=batch.label_index,
                **options,
            ).last_hidden_state
        nll = head_nll(voxtral.lm_head, states, batch.labels, self.label_smoothing)
        counts = (batch.label_weight > 0).float()
        sums = torch.zeros(2, self.num_tasks, device=nll.device)
        sums[0].index_add_(0, batch.label_task, nll.detach() * counts)
        sums[1].index_add_(0, batch.label_task, counts)
        return ForwardResult((nll * batch.label_weight).sum(), sums[0], sums[1])

    def _states(self, batch: MicroBatch) -> torch.Tensor | None:
        """The encoder's states of a micro-batch's audio: computed, then those that were cached."""
        if batch.audio is None:
            return batch.encoded
        states = encode_audio(self.voxtral, batch.audio, encoder_trains=self.encoder_trains)
        if self.on_encoded and batch.audio_keys:
            self.on_encoded(batch.audio_keys, states)
        return states if batch.encoded is None else torch.cat([states, batch.encoded])


def unwrap(model: Any) -> Any:
    """The ``VoxtralForConditionalGeneration`` below a ``PeftModel``, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def embed(
    voxtral: Any, input_ids: torch.Tensor, states: torch.Tensor | None, audio_index: torch.Tensor
) -> torch.Tensor:
    """Input embeddings with the audio put in its slots.

    Args:
        voxtral: ``VoxtralForConditionalGeneration``.
        input_ids: int64 [B, L].
        states: [C, encoder positions, encoder width] of :func:`encode_audio`, or None without audio.
        audio_index: int64 [C x tokens per chunk], flat positions of the slots.

    Returns:
        [B, L, hidden size].

    Raises:
        ValueError: the number of slots is not that of the audio embeddings; the audio would be misplaced.
    """
    embeds: torch.Tensor = voxtral.get_input_embeddings()(input_ids)
    if states is None:
        return embeds
    projector = voxtral.model.multi_modal_projector
    flat = states.reshape(-1, voxtral.config.audio_config.intermediate_size)
    projected = projector(flat).to(embeds.dtype)
    if len(projected) != len(audio_index):
        raise ValueError(f"{len(audio_index)} [AUDIO] slots for {len(projected)} audio embeddings")
    return embeds.reshape(-1, embeds.shape[-1]).index_copy(0, audio_index, projected).view_as(embeds)


def encode_audio(voxtral: Any, audio: torch.Tensor, *, encoder_trains: bool = False) -> torch.Tensor:
    """The encoder's states [C, encoder positions, encoder width] of log-mel chunks [C, mel bins, frames].

    In the projector's type: under autocast the encoder's last norm gives float32 on CUDA.
    """
    with nullcontext() if encoder_trains else torch.no_grad():
        states: torch.Tensor = voxtral.model.audio_tower(audio).last_hidden_state
    return states.to(voxtral.model.multi_modal_projector.linear_1.weight.dtype)


def checkpoint_layers(voxtral: Any) -> None:
    """Recompute the language model's decoder layers in the backward pass.

    They attend as they did in the forward pass. Set on the layers themselves: the stock switch also hooks the frozen
    encoder's input, which would then be recomputed and back-propagated.
    """
    language_model = voxtral.model.language_model

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), attention(language_model, language_model.config._attn_implementation)

    for layer in language_model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, context_fn=contexts)
