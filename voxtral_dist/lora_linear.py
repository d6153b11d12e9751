"""A linear layer with a LoRA adapter as one operation that keeps little for the backward pass.

peft adds the adapter beside the layer, so that every layer keeps a copy of its input after dropout, in float32, and
its output goes through memory three times. Here the layers that read the same input share it, dropout keeps its mask
alone, and the adapter is added inside the matrix product. Same formula, other rounding: y = x W^T + s drop(x) A^T B^T.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch.autograd.function import once_differentiable


class LoraLinear(Linear):
    """peft's layer, computed as one operation while it trains; in every other state it is peft's own."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., in features] to [..., out features]."""
        if not self.training or not torch.is_grad_enabled() or self.merged or self.disable_adapters:
            out: torch.Tensor = super().forward(x, *args, **kwargs)
            return out
        name, base = self.active_adapters[0], self.get_base_layer()
        dtype, dropout = _product_type(x), self.lora_dropout[name]
        return _adapted(
            x.to(dtype),
            base.weight.to(dtype),
            self.lora_A[name].weight.to(dtype),
            self.lora_B[name].weight.to(dtype),
            self.scaling[name],
            getattr(dropout, "p", 0.0) if dropout.training else 0.0,
        )


def install(model: torch.nn.Module) -> None:
    """Make :class:`LoraLinear` of the adapted layers that are plain: no DoRA, no bias, base weights not quantised."""
    for module in model.modules():
        if type(module) is Linear and _is_plain(module):
            module.__class__ = LoraLinear


def _is_plain(layer: Linear) -> bool:
    base, names = layer.get_base_layer(), layer.active_adapters
    is_linear = type(base) is torch.nn.Linear and base.bias is None and not base.weight.requires_grad
    return is_linear and len(names) == 1 and not layer.lora_variant and not layer.lora_bias[names[0]]


def _product_type(x: torch.Tensor) -> torch.dtype:
    """Type of the matrix products, as autocast has it."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _adapted(
    x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float, dropout: float
) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1])
    out: torch.Tensor = _Adapted.apply(flat, weight, a, b, scaling, dropout)
    return out.view(*x.shape[:-1], -1)


def _drop(x: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Dropout of ``x``, the mask of what is kept, and the share that is kept on average.

    A CPU takes four values' chances from one random number, 16 bits each, which is several times as fast as one number
    a value; p is rounded to that grid.
    """
    if x.device.type != "cpu":
        return *torch.native_dropout(x, p, True), 1 - p
    size, dropped = x.numel(), round(p * 2**16)
    numbers = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), None)
    mask = numbers.view(torch.int16)[:size].view(x.shape) >= dropped - 2**15
    kept = 1 - dropped / 2**16
    return (x * mask).div_(kept), mask, kept


class _Adapted(torch.autograd.Function):
    """``x`` [T, in], ``weight`` [out, in] frozen, ``a`` [r, in], ``b`` [out, r], all of one type, to [T, out]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        dropped, mask, kept = _drop(x, dropout) if dropout else (x, None, 1.0)
        low = dropped @ a.t()
        ctx.save_for_backward(x, mask, low, weight, a, b)
        ctx.scaling, ctx.kept = scaling, kept
        return (x @ weight.t()).addmm_(low, b.t(), alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, mask, low, weight, a, b = ctx.saved_tensors
        grad_b = (grad.t() @ low).mul_(ctx.scaling)
        grad_low = (grad @ b).mul_(ctx.scaling / ctx.kept)
        grad_a = grad_low.t() @ (x if mask is None else x * mask)
        if not ctx.needs_input_grad[0]:
            return None, None, grad_a, grad_b, None, None
        grad_x = grad @ weight
        if mask is None:
            grad_x.addmm_(grad_low, a)
        else:
            grad_x.add_((grad_low @ a).mul_(mask))
        return grad_x, None, grad_a, grad_b, None, None
