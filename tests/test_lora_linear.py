"""A layer and its adapter as one operation: the same formula as peft's, gradients included, and what it keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear
from test_gradient import LORA
from test_model import base

from voxtral_dist import adapter
from voxtral_dist.lora_linear import LoraLinear


def layers(model: torch.nn.Module, kind: type) -> list[Any]:
    return [module for module in model.modules() if type(module) is kind]


@pytest.fixture
def layer(tiny_model: Path) -> Any:
    """The first layer of 256 to 100 or the like, in training, with B not zero."""
    model = adapter.attach(base(tiny_model), replace(LORA, dropout=0.2)).train()
    found = layers(model, LoraLinear)[-1]
    torch.nn.init.normal_(found.lora_B["default"].weight.data)
    return found


def run(layer: Any, x: torch.Tensor, bf16: bool = False) -> dict[str, torch.Tensor]:
    """Output and gradients; dropout of the same seed."""
    x = x.clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = layer(x)
    (out.float() * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    a, b = layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad
    return {"out": out.detach(), "x": x.grad, "a": a.clone(), "b": b.clone()}


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("bf16", "bound"), [(False, 1e-6), (True, 1e-2)])
def test_without_dropout_it_is_pefts_layer(layer: Any, bf16: bool, bound: float) -> None:
    layer.lora_dropout.eval()
    if bf16:
        layer.base_layer.bfloat16()
    x = torch.randn(3, 7, layer.in_features).to(torch.bfloat16 if bf16 else torch.float32)
    found = run(layer, x, bf16)
    layer.__class__ = Linear
    expected = run(layer, x, bf16)
    assert all(value.dtype == expected[name].dtype for name, value in found.items())
    assert max(apart(value, expected[name]) for name, value in found.items()) < bound


def test_with_dropout_gradients_are_those_of_its_own_output(layer: Any) -> None:
    """Numbers of double precision, moved a little either way, through the same mask."""
    layer.double()
    x = torch.randn(4, layer.in_features, dtype=torch.float64)
    found = run(layer, x)
    weights = torch.linspace(-1, 1, found["out"].numel(), dtype=torch.float64).view_as(found["out"])

    def loss(moved: torch.Tensor) -> float:
        torch.manual_seed(5)
        return float((layer(moved).detach() * weights).sum())

    values = {"a": layer.lora_A["default"].weight.data, "b": layer.lora_B["default"].weight.data, "x": x}
    for name, value in values.items():
        step = torch.randn_like(value) * 1e-6
        value.add_(step)
        up = loss(x)
        value.sub_(2 * step)
        down = loss(x)
        value.add_(step)
        assert up - down == pytest.approx(2 * float((found[name] * step).sum()), rel=1e-5), name


def test_dropout_takes_its_share_from_the_adapter_alone(layer: Any) -> None:
    layer.base_layer.weight.data.zero_()
    torch.nn.init.ones_(layer.lora_A["default"].weight.data)
    torch.nn.init.ones_(layer.lora_B["default"].weight.data)
    out = layer(torch.ones(4000, layer.in_features)).detach() / (LORA.r * layer.scaling["default"])
    values = out[:, 0] / layer.in_features
    assert values.mean() == pytest.approx(1.0, abs=0.01)
    assert values.std() == pytest.approx((0.25 / layer.in_features) ** 0.5, rel=0.1), "p / (1 - p) a value"


def test_it_keeps_its_input_once_and_a_byte_per_mask(layer: Any) -> None:
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(512, layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(x) + layer(x)
    low = 512 * LORA.r * 4
    assert sum(kept.values()) == x.nbytes + 2 * (x.numel() + low)


@pytest.mark.parametrize("change", ["eval", "no grad", "disabled", "merged"])
def test_in_every_other_state_it_is_pefts_own(
    layer: Any, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any) -> Any:
        raise AssertionError("computed as one operation")

    monkeypatch.setattr("voxtral_dist.lora_linear._adapted", never)
    x = torch.randn(2, layer.in_features)
    with pytest.raises(AssertionError):
        layer(x)
    if change == "eval":
        layer.eval()
    elif change == "disabled":
        layer.enable_adapters(False)
    elif change == "merged":
        layer.merge()
    with torch.set_grad_enabled(change != "no grad"):
        assert layer(x).shape == (2, layer.out_features)


def test_only_plain_layers_are_changed(tiny_model: Path) -> None:
    plain = adapter.attach(base(tiny_model), LORA)
    assert not layers(plain, Linear) and len(layers(plain, LoraLinear)) >= 14
    dora = adapter.attach(base(tiny_model), replace(LORA, dora=True))
    assert not layers(dora, LoraLinear) and layers(dora, Linear)
    model = base(tiny_model)
    model.model.language_model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.zeros(1))
    assert len(layers(adapter.attach(model, LORA), Linear)) == 1
