"""Layers of the language model and the encoder as torch.compile makes them, for training passes alone.

Shapes are dynamic, so that micro-batches of every size share the code. Decoding and validation, whose passes are of
other kinds, go through the layers as they are.
"""

from __future__ import annotations

from typing import Any

import torch

from voxtral_dist.errors import UserError


class CompiledLayers:
    """The layers of a ``VoxtralForConditionalGeneration``, switched between compiled and plain.

    Args:
        voxtral: the model, with its adapter.
        device: where it runs.

    Raises:
        UserError: nothing can be compiled here.
    """

    def __init__(self, voxtral: Any, device: torch.device) -> None:
        _try(device)
        core, self._compiled = voxtral.model, []
        for layer in [*core.language_model.layers, *core.audio_tower.layers]:
            layer.compile(dynamic=True)
            self._compiled.append((layer, layer._compiled_call_impl))
        self.switch(False)

    def switch(self, on: bool) -> None:
        """Compiled from the next pass on, or plain."""
        for layer, call in self._compiled:
            layer._compiled_call_impl = call if on else None


def _try(device: torch.device) -> None:
    """Compile something small, so that a missing compiler is found before the first step."""
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=True)(torch.ones(8, device=device))
    except Exception as failure:
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
        raise UserError(
            f"--torch_compile does not work here: {reason}; leave it out, or install what is missing: a C++ compiler "
            "on a CPU, triton on a GPU"
        ) from failure
