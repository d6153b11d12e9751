"""Whether the data side keeps up with a GPU: ``python tools/bench_data.py wait``

A corpus with the lengths of train_step_data.py is packed as real FLAC; the product's plan, readers and collator feed a
trainer that stands still for as long as a GPU would compute each micro-batch. For Voxtral-Mini with LoRA r=16 that is
its FLOPs over MFU x 989 TFLOP/s (data sheet of an H100 or H200, bfloat16), for the best MFU measured and for the goal.
Printed: the share of the time that the trainer waits for data, and the cores that the data side takes. Two readers, and
torch on one thread each, so that a GPU takes two cores at most beside the trainer's own.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from bench_model import shape
from bench_read import tekken
from train_step_data import TASKS, WEIGHTS, Lengths, draw_lengths

from voxtral_dist.audio import SAMPLE_RATE, AudioSpec
from voxtral_dist.batch import MicroBatch
from voxtral_dist.collator import Collator
from voxtral_dist.data import TrainData, TrainSettings
from voxtral_dist.flops import PEAKS, VoxtralFlops
from voxtral_dist.micro_batches import OVERHEAD
from voxtral_dist.packing import pack
from voxtral_dist.step_loader import StepLoader
from voxtral_dist.task_data import open_tasks
from voxtral_dist.tokenizer import TekkenVocabulary

MFU = (0.418, 0.55)
"""Measured on an H200 (benchmarks.md), and the goal."""

STEP, TOKENS, READERS = 64, 8192, 2
"""Examples of a step, most positions of a micro-batch, threads that read."""

LORA_PARAMETERS = 27_033_600
"""Of r = 16 on the language model's linears of Voxtral-Mini."""


def wait(examples: int = 600, steps: int = 20) -> None:
    """Print the share of waiting and the cores, for each rate, padded and packed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sets = corpus(folder, draw_lengths(examples, 3, 375, 30.0))
        vocabulary = tekken(folder)
        for packed in (False, True):
            data = training_data(sets, vocabulary, packed)
            for mfu in MFU:
                waited, cores, rate = feed(data, mfu * PEAKS["h200"], steps)
                print(
                    f"{'packed' if packed else 'padded'}, MFU {mfu:.1%}, {rate:.0f} examples a second: waits "
                    f"{waited:.2%} of the time, {cores:.2f} cores",
                    flush=True,
                )


def training_data(sets: Sequence[Path], vocabulary: TekkenVocabulary, packed: bool) -> TrainData:
    """The product's plan over the corpus, micro-batches as on a GPU."""
    collator = Collator(vocabulary, AudioSpec(128, 3000, 375))
    settings = TrainSettings(
        STEP, STEP, 2048, epochs=1e3, max_overlong_rate=0.5, max_tokens_per_micro_batch=TOKENS, packed=packed,
        num_workers=READERS, overhead=OVERHEAD["cuda"], task_weights=",".join(map(str, WEIGHTS)),
    )  # fmt: skip
    return TrainData(open_tasks(sets, collator), collator, settings)


def corpus(folder: Path, lengths: Sequence[Lengths]) -> list[Path]:
    """Data sets with the lengths' sound, noise as loud as speech in FLAC, and words enough for their positions."""
    random, rows = np.random.default_rng(0), {task: list[str]() for task in TASKS}
    for number, each in enumerate(lengths):
        task = TASKS[each.task]
        words = " ".join(["word"] * each.target)
        row = {"instruction": " ".join(["say"] * each.prompt), "output": words}
        if each.seconds:
            noise = random.standard_normal(int(each.seconds * SAMPLE_RATE)) * 0.05
            soundfile.write(folder / f"{number}.flac", noise, SAMPLE_RATE, subtype="PCM_16")
            row = {"audio_path": f"{number}.flac", "transcript": words, "language": "en"}
        if task == "sqa":
            row = {"audio_path": f"{number}.flac", "question": "What is said?", "answer": words}
        rows[task].append(json.dumps(row))
    for task, lines in rows.items():
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    return pack([folder / f"{task}.jsonl" for task in TASKS], folder / "shards", tasks=list(TASKS))


def feed(data: TrainData, flops_per_s: float, steps: int) -> tuple[float, float, float]:
    """Share of the time waited after the first steps, cores taken, examples per second."""
    counted, loader = VoxtralFlops.from_config(shape(torch.device("cuda"))), StepLoader(data, 0, 1).steps(0)
    waited, samples, began, used = 0.0, 0, 0.0, 0.0
    while True:
        asked = time.perf_counter()
        number, share = next(loader)
        waited += time.perf_counter() - asked
        if number == 3:
            waited, samples, began, used = 0.0, 0, time.perf_counter(), cpu_seconds()
        micro_batches = iter(share)
        while True:
            asked = time.perf_counter()
            batch = next(micro_batches, None)
            waited += time.perf_counter() - asked
            if batch is None:
                break
            samples += batch.samples
            time.sleep(compute_seconds(batch, counted, flops_per_s))
        if number == steps + 2:
            break
    seconds = time.perf_counter() - began
    loader.close()
    return waited / seconds, (cpu_seconds() - used) / seconds, samples / seconds


def compute_seconds(batch: MicroBatch, counted: VoxtralFlops, flops_per_s: float) -> float:
    """What a GPU takes for a micro-batch at this rate; attention within examples is left out, less than 3 %."""
    chunks = 0 if batch.audio is None else len(batch.audio)
    parts = np.array([batch.tokens]), np.array([chunks]), np.array([len(batch.labels)])
    total = counted.training(*parts, lora_parameters=LORA_PARAMETERS)
    return (total - batch.tokens**2 * 3 * counted.squared_token) / flops_per_s


def cpu_seconds() -> float:
    """CPU seconds of this process, all threads together."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
