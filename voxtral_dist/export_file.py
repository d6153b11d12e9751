"""Safetensors files written and read one tensor at a time, so that a model need not fit into memory.

The library's own ``save_file`` needs all tensors at once. The layout is the header's length in 8 bytes, the header as
JSON, then the tensors, those of the widest type first: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from voxtral_dist.errors import VoxtralDistError

_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
TYPES = {code: dtype for dtype, code in _CODES.items()}
"""torch's types by their names in a header."""

Spec = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of a tensor."""


def write_file(
    path: Path,
    specs: Mapping[str, Spec],
    tensor_of: Callable[[str], torch.Tensor],
    written: Callable[[], Any],
) -> None:
    """Write a file without ever holding more than one of its tensors.

    Args:
        path: of the file.
        specs: shape and type of each tensor.
        tensor_of: the tensor of a name.
        written: called after each tensor.
    """
    order = sorted(specs, key=lambda name: -specs[name][1].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        shape, dtype = specs[name]
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            tensor = tensor_of(name).contiguous()
            if (tuple(tensor.shape), tensor.dtype) != specs[name]:
                raise VoxtralDistError(
                    f"{name} became {tensor.dtype} {tuple(tensor.shape)}, not {specs[name]}"
                )
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            written()


def read_file(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a safetensors file one by one."""
    with safe_open(path, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            yield name, tensors.get_tensor(name)
