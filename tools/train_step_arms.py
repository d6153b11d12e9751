"""One training step of Voxtral, from the usual recipe to ours, a lever at a time: for ``tools/bench_train_step.py``

The usual recipe is that of the scripts in use: transformers' forward pass on batches padded in random order, gradient
checkpointing switched on for the whole model (which lets the frozen encoder build a graph, is computed again and
back-propagated), logits of every position, the mean loss of each micro-batch, a reduction after each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from peft.tuners.lora.layer import Linear
from train_step_data import PAD, Lengths, collate

from voxtral_dist import last_layer
from voxtral_dist import model as ours
from voxtral_dist.batch import MicroBatch
from voxtral_dist.encoder_cache import EncoderCache
from voxtral_dist.lora_linear import LoraLinear
from voxtral_dist.loss import head_nll
from voxtral_dist.micro_batches import OVERHEAD, Caps, cut
from voxtral_dist.packed_attention import attending, packed_options


@dataclass(frozen=True)
class Levers:
    """What a step does; the defaults are the usual recipe.

    Attributes:
        encoder_graph: the frozen encoder runs under autograd.
        label_head: the head runs on label positions alone, else on all.
        last_layer: so does the MLP of the last layer, see voxtral_dist.last_layer; with ``label_head`` alone.
        mask: rows padded on the right get an attention mask, which the causal kernel does not take.
        tokens: examples of like length go together, up to so many positions; 0: so many in random order.
        overhead: fixed cost of a micro-batch in positions, when they are cut.
        summed: the loss is a sum over the step's tokens, else the mean of the micro-batches' means.
        recompute: compute every so-manieth decoder layer again in the backward pass; 0: none.
        packed: rows without padding, and how they attend: "" (padded), or a name of voxtral_dist.packed_attention.
        reduce_once: one reduction of the gradients per step, else one per micro-batch.
        casting: peft casts the input of each adapter to float32.
        one_pass: a layer and its adapter are one operation, see voxtral_dist.lora_linear; else peft's own.
        compiled: decoder and encoder layers are compiled.
        cached: the encoder's states are read from files, as with --encoder_cache from the second epoch on.
        fused: AdamW in one kernel.
    """

    encoder_graph: bool = True
    label_head: bool = False
    last_layer: bool = False
    mask: bool = True
    tokens: int = 0
    overhead: int = OVERHEAD["cpu"]
    summed: bool = False
    recompute: int = 1
    packed: str = ""
    reduce_once: bool = False
    casting: bool = True
    one_pass: bool = False
    compiled: bool = False
    cached: bool = False
    fused: bool = False


def micro_batches(examples: Sequence[Lengths], levers: Levers, rows: int) -> list[list[int]]:
    """Places of the examples by micro-batch: ``rows`` in file order, or by length within the levers' ``tokens``."""
    places = list(range(len(examples)))
    if not levers.tokens:
        return [places[first : first + rows] for first in range(0, len(places), rows)]
    lengths = np.array([example.positions for example in examples])
    caps = Caps(len(examples), levers.tokens, packed=bool(levers.packed), overhead=levers.overhead)
    return [group.tolist() for group in cut(np.array([e.task for e in examples]), lengths, caps)]


class Arms:
    """A Voxtral with random weights and an adapter, and a training step with any levers.

    Args:
        peft_model: the model with its adapter, on its device.
        examples: of one step, in file order.
        rows: examples of a micro-batch of the usual recipe.
    """

    def __init__(self, peft_model: Any, examples: Sequence[Lengths], rows: int) -> None:
        self.model, self.voxtral = peft_model, ours.unwrap(peft_model)
        last_layer.install(self.voxtral)
        self.config, self.device = self.voxtral.config, next(peft_model.parameters()).device
        self.params = [p for p in peft_model.parameters() if p.requires_grad]
        self.bf16 = self.voxtral.lm_head.weight.dtype is torch.bfloat16
        self.examples, self.rows = examples, rows
        self.levers = Levers()
        self._folder = tempfile.TemporaryDirectory()

    def prepare(self, levers: Levers) -> list[MicroBatch]:
        """Pull the levers, with a fresh optimizer; the micro-batches of the step, on the device."""
        self.levers = levers
        self.optimizer = torch.optim.AdamW(self.params, lr=1e-5, betas=(0.9, 0.95), fused=levers.fused)
        self.model.train()
        self._recompute(levers)
        for module in self.model.modules():
            if hasattr(module, "lora_A"):
                module.cast_input_dtype_enabled = levers.casting
                module.__class__ = LoraLinear if levers.one_pass else Linear
        self._compile(levers.compiled)
        groups = micro_batches(self.examples, levers, self.rows)
        packed = bool(levers.packed)
        batches = [collate(self.examples, group, self.config, packed).to(self.device) for group in groups]
        if levers.cached:
            self._write_states(batches)
        return batches

    def _write_states(self, batches: Sequence[MicroBatch]) -> None:
        """Encode once what the steps read."""
        self._cache = EncoderCache(Path(self._folder.name), 1 << 40, "encoder")
        for number, batch in enumerate(batches):
            if batch.audio is not None:
                states = self._encode(batch.audio)
                self._cache.put([(f"{number:02}", len(batch.audio))], states.view(len(batch.audio), -1))
        self._cache.close()

    def _with_states(self, number: int, batch: MicroBatch) -> MicroBatch:
        if batch.audio is None or not self.levers.cached:
            return batch
        states = self._cache.get(f"{number:02}", len(batch.audio))
        assert states is not None
        return dataclasses.replace(batch, audio=None, encoded=states.to(self.device))

    def _recompute(self, levers: Levers) -> None:
        layers = self.voxtral.model.language_model.layers
        if levers.encoder_graph:
            self.voxtral.gradient_checkpointing_enable({"use_reentrant": False})
            return
        self.voxtral.disable_input_require_grads()
        self.voxtral.gradient_checkpointing_disable()
        self.voxtral.model.audio_tower.eval()
        if levers.recompute:
            ours.checkpoint_layers(self.voxtral)
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = bool(levers.recompute) and number % levers.recompute == 0

    def _compile(self, on: bool) -> None:
        core = self.voxtral.model
        for layer in [*core.language_model.layers, *core.audio_tower.layers]:
            layer._compiled_call_impl = None
            if on:
                layer.compile(dynamic=True)

    def accumulate(self, batches: Sequence[MicroBatch]) -> torch.Tensor:
        """Gradients of the step in ``.grad``; returns its loss on the device."""
        total = float(sum(len(batch.labels) for batch in batches))
        loss = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches):
            read = self._with_states(number, batch)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                part = self.loss(read) / (total if self.levers.summed else len(batches) * len(batch.labels))
            part.backward()
            loss += part.detach()
            if not self.levers.reduce_once:
                self.reduce()
        if self.levers.reduce_once:
            self.reduce()
        return loss

    def reduce(self) -> None:
        """Sum the gradients over the ranks, through one flat buffer as engines do."""
        grads = [p.grad for p in self.params if p.grad is not None]
        flat = torch._utils._flatten_dense_tensors(grads)
        if dist.is_initialized():
            dist.all_reduce(flat)
        for grad, new in zip(grads, torch._utils._unflatten_dense_tensors(flat, grads), strict=True):
            grad.copy_(new)

    def step(self, batches: Sequence[MicroBatch]) -> float:
        """Gradients, clipping at norm 1, update; the loss, so that the device has finished."""
        loss = self.accumulate(batches)
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss)

    def gradient(self, batches: Sequence[MicroBatch]) -> torch.Tensor:
        """The step's gradient without dropout, flat float32 [trained elements]."""
        dropouts = [m for m in self.model.modules() if isinstance(m, torch.nn.Dropout)]
        for dropout in dropouts:
            dropout.eval()
        self.accumulate(batches)
        flat = torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in self.params]
        )
        self.optimizer.zero_grad(set_to_none=True)
        for dropout in dropouts:
            dropout.train()
        return flat

    def loss(self, batch: MicroBatch) -> torch.Tensor:
        """Summed loss of a micro-batch's labels."""
        levers, attend = self.levers, self._mask(batch)
        if levers.encoder_graph:
            labels = torch.full_like(batch.input_ids, -100).flatten()
            labels[batch.label_index + 1] = batch.labels
            out = self.model(
                input_ids=batch.input_ids,
                attention_mask=attend,
                input_features=batch.audio,
                labels=labels.view_as(batch.input_ids),
                use_cache=False,
            )
            return out.loss * len(batch.labels)
        hidden = self._hidden(batch, attend)
        states = hidden.reshape(-1, hidden.shape[-1])
        if levers.label_head:
            states = states if levers.last_layer else states[batch.label_index]
            return head_nll(self.voxtral.lm_head, states, batch.labels, 0.0).sum()
        labels = torch.full((len(states),), -100, device=self.device)
        labels[batch.label_index] = batch.labels
        logits = self.voxtral.lm_head(states).float()
        return torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")

    def _mask(self, batch: MicroBatch) -> torch.Tensor | None:
        if not self.levers.mask or self.levers.packed:
            return None
        return (batch.input_ids != PAD).long()

    def _hidden(self, batch: MicroBatch, mask: Any) -> torch.Tensor:
        levers, language_model = self.levers, self.voxtral.model.language_model
        states = batch.encoded if batch.audio is None else self._encode(batch.audio)
        embeds = self.voxtral.get_input_embeddings()(batch.input_ids)
        if states is not None:
            flat = states.view(-1, self.config.audio_config.intermediate_size)
            projected = self.voxtral.model.multi_modal_projector(flat).to(embeds.dtype)
            flat = embeds.reshape(-1, embeds.shape[-1]).index_copy(0, batch.audio_index, projected)
            embeds = flat.view_as(embeds)
        if levers.compiled:  # or the first layer, whose input needs no gradient, is compiled a second time
            embeds.requires_grad_()
        options: dict[str, Any] = {"attention_mask": mask, "position_ids": batch.position_ids}
        if levers.last_layer:
            options["read"] = batch.label_index
        with self._attention(batch, options):
            return language_model(inputs_embeds=embeds, use_cache=False, **options).last_hidden_state

    @torch.no_grad()
    def _encode(self, audio: torch.Tensor) -> torch.Tensor:
        tower = self.voxtral.model.audio_tower
        states = tower(audio.to(tower.conv1.weight.dtype)).last_hidden_state
        flat = states.reshape(-1, self.config.audio_config.intermediate_size)
        return flat.to(self.voxtral.model.multi_modal_projector.linear_1.weight.dtype)

    def _attention(
        self, batch: MicroBatch, options: dict[str, Any]
    ) -> contextlib.AbstractContextManager[None]:
        language_model, kind = self.voxtral.model.language_model, self.levers.packed
        if kind:
            options |= packed_options(batch.position_ids, kind)
            return attending(language_model, kind)
        return contextlib.nullcontext()
