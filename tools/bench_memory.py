"""The estimate of memory against what a device takes: ``python tools/bench_memory.py [--tiny] [--full]``

Builds the shape of Voxtral-Mini-3B-2507 with random weights on the GPU (no download, no disk), trains steps on made-up
micro-batches through the model and the engine of the product, and decodes. Prints a JSON line per measurement: peak
bytes of the CUDA allocator, estimated bytes, their ratio. The estimate is made beside it by voxtral_dist/memory.py.
``--full`` adds packed rows and other trained weights. Needs one GPU of 80 GB.

``--tiny`` runs the same on a CPU with the demo's model, where tensor storages are counted instead.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import transformers
from transformers import VoxtralConfig, VoxtralForConditionalGeneration

from voxtral_dist import adapter, distributed, memory, prepare, step_memory
from voxtral_dist.adapter import LoraSettings
from voxtral_dist.batch import DecodeCaps
from voxtral_dist.config import TrainConfig
from voxtral_dist.decode import Prompts, decode_stream
from voxtral_dist.ds_config import EngineSettings
from voxtral_dist.engine import TrainEngine
from voxtral_dist.errors import UserError, run_main
from voxtral_dist.micro_batch_probe import MadeUp, held_by
from voxtral_dist.model import TrainingModel, checkpoint_layers
from voxtral_dist.packed_attention import SPLIT, best_kernel
from voxtral_dist.step_memory import LiveBytes, Shape

MAX_LEN = {"mini": 2048, "tiny": 128}
SIZES = {"mini": (2048, 10240), "tiny": (512, 2048)}
"""Positions of a micro-batch; the second fills a card of 80 GB."""

DECODED = {"mini": (64, 512), "tiny": (8, 64)}
"""Rows and positions of each in decoding."""

LANGUAGE_MODEL_NEEDS = 110e9
"""Bytes of a card on which Mini's language model trains alone, about."""


class Meter:
    """Peak bytes on a device: of CUDA's allocator, or of tensor storages on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def left(self) -> int:
        """Bytes that what was measured before could not give back."""
        gc.collect()
        if self.device.type != "cuda":
            return 0
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    @contextmanager
    def peak(self, held: Iterable[torch.Tensor]) -> Iterator[list[int]]:
        """Most bytes at once inside the block, ``held`` being there before it; filled in at its end."""
        found: list[int] = []
        self.left()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            yield found
            torch.cuda.synchronize()
            found.append(torch.cuda.max_memory_allocated())
        else:
            with LiveBytes(held) as live:
                yield found
            found.append(max(live.peaks.values()))


class PlainEngine:
    """In the place of ours where DeepSpeed is not installed: the same passes and Adam, no buckets or master weights."""

    def __init__(self, model: TrainingModel, settings: EngineSettings) -> None:
        self.model, self.settings = model.train(), settings
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, fused=True)

    def train_step(self, share: MadeUp, learning_rate: float) -> None:
        """One optimizer step."""
        for parameter in self.params:
            parameter.grad = torch.zeros_like(parameter)
        for batch in share:
            with torch.autocast(self.params[0].device.type, torch.bfloat16, enabled=self.settings.bf16):
                loss = self.model(batch).loss
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def show(what: str, measured: int, estimated: int, **more: Any) -> None:
    """One JSON line."""
    line = {"what": what, **more, "measured": measured, "estimated": estimated}
    print(json.dumps(line | {"ratio": round(estimated / measured, 4)}), flush=True)


def which(device: torch.device) -> str:
    """The model that a device is tried with."""
    return "mini" if device.type == "cuda" else "tiny"


def base(config: Any, device: torch.device) -> Any:
    """Random weights, made on the device in their own type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            voxtral = VoxtralForConditionalGeneration(config).requires_grad_(False).eval()
    finally:
        torch.set_default_dtype(before)
    voxtral.model.audio_tower.embed_positions.float()
    return voxtral


def engine_of(training: TrainingModel, settings: EngineSettings) -> tuple[Any, list[torch.Tensor]]:
    """The engine after an empty step, which makes Adam's moments, and all that stays from now on."""
    if importlib.util.find_spec("deepspeed") is None:
        plain = PlainEngine(training, settings)
        return plain, list(training.parameters())
    engine = TrainEngine(training, settings)
    engine.train_step(MadeUp(), 0.0)
    return engine, held_by(engine)


def arm(name: str, flags: TrainConfig, sizes: Iterable[int], config: Any, meter: Meter) -> None:
    """The peak of a step of each size under some flags, and from the second on the bytes of one more position."""
    device, left = meter.device, meter.left()
    bf16, lora = device.type == "cuda", prepare.lora_settings(flags)
    wrapped = adapter.attach(base(config, device), lora)
    kind = best_kernel(device, config.text_config, torch.bfloat16) if flags.packed else SPLIT
    training = TrainingModel(wrapped, 1, packed_kernel=kind)
    if flags.grad_ckpt:
        checkpoint_layers(training.voxtral)
    engine, held = engine_of(training, EngineSettings(bf16=bf16))
    before: tuple[int, int, int] | None = None
    for size in sizes:
        shape = Shape.worst(size, MAX_LEN[which(device)], config, flags.packed)
        with device:
            batch = step_memory.micro_batch(shape, config)
        share = MadeUp(batch, batch)
        with meter.peak(held) as peak:
            engine.train_step(share, 0.0)
        if share.failed:
            print(json.dumps({"what": name, "positions": shape.positions, "fits": False}), flush=True)
            break
        guess = memory.estimate(flags, config, lora, ranks=1, shape=shape, bf16=bf16).peak
        now = (shape.positions, peak[0] - left, guess)
        more = {"engine": type(engine).__name__, "positions": shape.positions, "kernel": kind, "left": left}
        show(name, now[1], guess, **more)
        if before:
            more_positions = now[0] - before[0]
            show(f"{name}, a position", *((now[n] - before[n]) // more_positions for n in (1, 2)))
        before = now
    for tensor in held:  # DeepSpeed keeps the engine in tables of its own
        tensor.data = tensor.new_empty(0)


def weights(config: Any, meter: Meter) -> None:
    """The frozen model alone."""
    left, voxtral = meter.left(), base(config, meter.device)
    cuda = meter.device.type == "cuda"
    measured = meter.left() - left if cuda else sum(t.nbytes for t in voxtral.parameters())
    training = step_memory.weightless(config, LoraSettings(1, 1.0, 0.0, "both", True, 0), bf16=cuda)
    show("frozen weights", measured, sum(memory.states(training, TrainConfig(), 1, cuda).frozen.values()))


def decoding(config: Any, meter: Meter) -> None:
    """The cache of rows that are answered to the end of a few tokens."""
    device, answer = meter.device, 4
    voxtral = base(config, device)
    rows, length = DECODED[which(device)]
    ids = torch.full((rows, length), 1000, device=device)
    prompts = Prompts(ids, [length] * rows, None, ids.new_zeros(0), [answer] * rows)
    caches: list[int] = []

    def watch(_module: Any, _args: Any, inputs: Any, _out: Any) -> None:
        layers = inputs["past_key_values"].layers
        caches.append(sum(t.untyped_storage().nbytes() for x in layers for t in (x.keys, x.values)))

    voxtral.model.language_model.register_forward_hook(watch, with_kwargs=True)
    with meter.peak(list(voxtral.parameters())) as peak:
        list(decode_stream(voxtral, [prompts], DecodeCaps(rows, rows * (length + answer)), eos_id=2))
    each = memory.cache_bytes(config, device.type == "cuda")
    show("decoder's cache", max(caches), each * rows * (length + answer), rows=rows, peak=peak[0])


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="the demo's model on the CPU")
    parser.add_argument("--full", action="store_true", help="packed rows, other trained weights")
    args = parser.parse_args()
    began, world = time.perf_counter(), distributed.read_world()
    device = torch.device("cpu") if args.tiny else distributed.local_device(world)
    if not args.tiny and device.type != "cuda":
        raise UserError("no CUDA device here; --tiny runs on a CPU")
    name = "cpu" if args.tiny else torch.cuda.get_device_name(device)
    about = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(about), flush=True)
    distributed.start(device)
    try:
        measure(tiny_config() if args.tiny else VoxtralConfig(), Meter(device), args.full)
    finally:
        distributed.stop()
    print(json.dumps({"seconds": round(time.perf_counter() - began, 1)}))


def tiny_config() -> Any:
    """The demo's model."""
    from build_tiny_voxtral import model_config

    return model_config(max_source_positions=100, hidden_size=192, layers=2, vocab_size=4096)


def measure(config: Any, meter: Meter, full: bool) -> None:
    """Weights, training, decoding; ``full`` adds what takes longer."""
    small, large = SIZES[which(meter.device)]
    dropout = (
        0.05 if meter.device.type == "cuda" else 0.0
    )  # a CPU keeps more for it than CUDA, which is estimated
    flags = TrainConfig(lora_dropout=dropout, packed=False)
    weights(config, meter)
    decoding(config, meter)
    arm("lora", flags, [small, large], config, meter)
    arm("lora, grad_ckpt", replace(flags, grad_ckpt=True), [small, 2 * large], config, meter)
    if not full:
        return
    arm("lora, packed", replace(flags, packed=True), [small], config, meter)
    arm("projector", replace(flags, tune="projector"), [small], config, meter)
    cuda = meter.device.type == "cuda"
    if not cuda or torch.cuda.get_device_properties(0).total_memory > LANGUAGE_MODEL_NEEDS:
        arm("language model", replace(flags, tune="language_model"), [small], config, meter)


if __name__ == "__main__":
    run_main(main)
