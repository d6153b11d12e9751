"""Measure planning at scale and the start of the data side: parts ``scale`` and ``start`` of ``bench_data.py``.

python tools/bench_scale.py FOLDER      measures the data sets of :func:`index` that lie there, in a fresh process
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from voxtral_dist import atomic
from voxtral_dist.audio import AudioSpec
from voxtral_dist.collator import Collator
from voxtral_dist.data import TrainData, TrainSettings
from voxtral_dist.lengths import table_path
from voxtral_dist.packing import pack
from voxtral_dist.shard_format import make_manifest, shard_stem
from voxtral_dist.shards import ShardSet
from voxtral_dist.step_loader import StepLoader
from voxtral_dist.task_data import open_tasks
from voxtral_dist.tokenizer import TekkenVocabulary

SHARDS = {"asr": 5_000, "sqa": 3_000, "tqa": 2_000}
EXAMPLES_PER_SHARD = 10_000
SPEC = AudioSpec(128, 3000, 375)
STEP, RANKS, STEPS = 1_024, 64, 100
WEIGHTS = "10,15,12"


def scale() -> None:
    """Open, seek, plan and share steps of 1,024 out of 100 million examples in 10,000 shards."""
    with tempfile.TemporaryDirectory() as name:
        index(Path(name))
        subprocess.run([sys.executable, __file__, name], check=True)


def index(folder: Path) -> None:
    """Data sets whose tars and indexes have their sizes and no content, with real tables of lengths."""
    from bench_read import tekken  # not above: the measured process shall hold the data side alone

    vocabulary = tekken(folder)
    rng = np.random.default_rng(0)
    for task, count in SHARDS.items():
        sets = folder / task
        sets.mkdir()
        markers = []
        for number in range(count):
            stem = shard_stem(task, "train", number)
            sizes = {"bytes": EXAMPLES_PER_SHARD * 110_000, "index_bytes": EXAMPLES_PER_SHARD * 40}
            for suffix, size in zip((".tar", ".idx"), sizes.values(), strict=True):
                with (sets / f"{stem}{suffix}").open("wb") as file:
                    file.truncate(size)
            hashes = {key: rng.bytes(32).hex() for key in ("sha256", "index_sha256")}
            fields = {"name": f"{stem}.tar", "examples": EXAMPLES_PER_SHARD, "audio_seconds": 0.0}
            markers.append({**fields, **sizes, **hashes})
        atomic.write_json(sets / "manifest.json", make_manifest(task, "train", markers, 0))
        write_lengths(table_path(ShardSet.open(sets), vocabulary, False), task, count, rng)


def write_lengths(path: Path, task: str, shards: int, rng: np.random.Generator) -> None:
    """A table of lengths: prompt, target, 16 kHz samples."""
    heard = task != "tqa"
    with path.open("wb") as file:
        shape = (3, shards * EXAMPLES_PER_SHARD)
        npy.write_array_header_1_0(file, {"descr": "<u4", "fortran_order": False, "shape": shape})
        for mean, spread, least in (
            (3.0, 0.3, 4),
            (3.5, 0.8, 2),
            (11.6 if heard else 0, 0.6, 8_000 if heard else 0),
        ):
            for _ in range(shards):
                values: NDArray[np.float64] = rng.lognormal(mean, spread, EXAMPLES_PER_SHARD) * (mean > 0)
                file.write(np.clip(values, least, 480_000).astype("<u4").tobytes())


def measure(folder: Path) -> None:
    """What a rank of 64 does at its start in the middle of the run, and at each step."""
    collator = Collator(TekkenVocabulary.load(str(folder / "model")), SPEC)
    before, started = memory(), time.process_time()
    tasks = open_tasks([folder / task for task in SHARDS], collator)
    settings = TrainSettings(STEP, 4, 2_048, task_weights=WEIGHTS)
    data = TrainData(tasks, collator, settings)
    opened, started = time.process_time() - started, time.process_time()
    middle = data.plan.num_steps // 2
    data.plan.step(middle)
    seek, started = time.process_time() - started, time.process_time()
    for number in range(middle, middle + STEPS):
        step = data.plan.step(number)
        data.label_weights(step)
        data.micro_batch_draws(step, 3, RANKS)
    each = (time.process_time() - started) / STEPS
    after = memory()
    examples = sum(len(task) for task in tasks)
    print(f"{examples:,} examples in {sum(SHARDS.values()):,} shards: opened in {opened:.1f} s CPU")
    print(
        f"cold seek to the middle {seek:.3f} s CPU; {1000 * each:.2f} ms CPU per step of {STEP:,} for {RANKS} ranks"
    )
    private, mapped = (after[key] / 1e6 for key in ("RssAnon", "RssFile"))
    print(
        f"private memory {private:.0f} MB, {private - before['RssAnon'] / 1e6:.0f} MB of it data side; mapped files "
        f"{mapped:.0f} MB, {mapped - before['RssFile'] / 1e6:.0f} MB of it tables of lengths"
    )


def memory() -> dict[str, int]:
    """Resident bytes of this process, anonymous and mapped from files."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[0].startswith("Rss")}


def start() -> None:
    """From nothing to the first batch in the middle of a run over the demo, as a resumed rank does it."""
    from bench_read import tekken
    from compose_demo import BANK, Settings, load_bank, publish

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        publish(folder / "demo", Settings(), load_bank(BANK))
        sets = pack(
            [folder / f"demo/{task}.train.jsonl" for task in SHARDS], folder / "shards", tasks=list(SHARDS)
        )
        collator = Collator(tekken(folder), AudioSpec(128, 200, 25))
        for turn in ("first start, which counts the tokens", "resumed"):
            began = time.perf_counter()
            data = TrainData(open_tasks(sets, collator), collator, TrainSettings(68, 34, 512))
            steps = StepLoader(data, 0, 2).steps(data.plan.num_steps // 2)
            next(iter(next(steps)[1]))
            print(f"{turn}: {time.perf_counter() - began:.2f} s to the first batch in the middle of the run")


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
