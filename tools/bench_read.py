"""Reading speed of the data side against webdataset and lhotse: ``python tools/bench_data.py read``

All arms read the same 5-s FLAC clips and end in the same collator, in batches of 8 on one core. All but one compute the
log-mel with our code; that one does as the usual script does, with transformers' extractor. Ours reads in the plan's
random order, the others in their own order from front to back. Rounds alternate between the arms after a warm-up, and
the median of the rounds' ratios counts: a busy machine slows all alike.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from transformers import WhisperFeatureExtractor

from voxtral_dist.audio import SAMPLE_RATE, AudioSpec, log_mel
from voxtral_dist.audio_file import Samples, decode
from voxtral_dist.collator import Collator, Example
from voxtral_dist.packing import pack
from voxtral_dist.plan import TaskStream
from voxtral_dist.sample import Sample
from voxtral_dist.shards import ShardSet
from voxtral_dist.task_data import TaskData
from voxtral_dist.tokenizer import TekkenVocabulary

BATCH, SECONDS, WORDS = 8, 5, "one two three"


def read(count: int = 64, rounds: int = 15) -> None:
    """Print samples per CPU second of ours over those of the others, for ``count`` clips."""
    with tempfile.TemporaryDirectory() as name:
        seconds = rounds_of(arms(Path(name), count), count, rounds)
    for other in seconds:
        if other != "ours":
            ratios = [theirs / ours for theirs, ours in zip(seconds[other], seconds["ours"], strict=True)]
            low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
            print(f"ours / {other}, samples per CPU second: {middle:.2f} (quartiles {low:.2f} to {high:.2f})")
    if "lhotse" not in seconds:
        print("lhotse is not installed, its arm is left out; pip install -e '.[bench]' adds it")


def arms(folder: Path, count: int) -> dict[str, Callable[[], int]]:
    """The loaders by name; each reads all clips once and returns how many."""
    clips(folder, count)
    shards = ShardSet.open(pack([folder / "asr.jsonl"], folder / "shards")[0])
    tar = shards.folder / shards.shard_names[0]
    collator = Collator(tekken(folder), AudioSpec(128, 3000, 375))
    out = {
        "ours": lambda: ours(shards, collator),
        "webdataset": lambda: collated(webdataset_examples(tar, collator.spec), collator),
        "webdataset and WhisperFeatureExtractor": lambda: collated(
            webdataset_examples(tar, collator.spec, official_mel), collator
        ),
    }
    if find_spec("lhotse"):
        shar = write_shar(folder, count)
        out["lhotse"] = lambda: collated(lhotse_examples(shar, collator.spec), collator)
    return out


def rounds_of(arms: dict[str, Callable[[], int]], count: int, rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each arm in each round, after a warm-up."""
    for arm, work in arms.items():
        assert work() == count, f"{arm} did not read all clips"
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, work in arms.items():
            started = time.process_time()
            work()
            seconds[arm].append(time.process_time() - started)
    return seconds


def clips(folder: Path, count: int) -> None:
    """Noise clips as FLAC files, and ``asr.jsonl`` that lists them."""
    rng = np.random.default_rng(0)
    with (folder / "asr.jsonl").open("w") as rows:
        for number in range(count):
            noise = rng.standard_normal(SECONDS * SAMPLE_RATE) * 0.05
            soundfile.write(folder / f"{number}.flac", noise, SAMPLE_RATE, subtype="PCM_16")
            row = {"audio_path": f"{number}.flac", "transcript": WORDS, "language": "en"}
            rows.write(json.dumps(row) + "\n")


def tekken(folder: Path) -> TekkenVocabulary:
    """A 4,096-token vocabulary in the format of the released model."""
    from build_tiny_voxtral import build

    build(folder / "model")
    return TekkenVocabulary.load(str(folder / "model"))


def ours(shards: ShardSet, collator: Collator) -> int:
    """The product's own reader, in the plan's random order."""
    task = TaskData("asr", [shards], collator)
    order = TaskStream.of(0, shards.shard_sizes.tolist()).draws(0, 0, len(shards)).tolist()
    return collated((task.read(example) for example in order), collator)


def collated(examples: Iterable[Example], collator: Collator) -> int:
    """Collate in batches; returns the number of examples."""
    count, iterator = 0, iter(examples)
    while batch := list(islice(iterator, BATCH)):
        collator.train_batch(batch, 0)
        count += len(batch)
    return count


Mel = Callable[[Samples, AudioSpec], torch.Tensor]


def official_mel(audio: Samples, spec: AudioSpec) -> torch.Tensor:
    """Log-mel of a clip of one chunk by transformers' own extractor, float32 [1, mel bins, frames]."""
    features = whisper_extractor(spec.num_mel_bins)(audio, sampling_rate=SAMPLE_RATE, return_tensors="pt")
    mel: torch.Tensor = features["input_features"]
    return mel


@lru_cache(maxsize=1)
def whisper_extractor(num_mel_bins: int) -> Any:
    """The extractor that Voxtral's processor holds."""
    return WhisperFeatureExtractor(feature_size=num_mel_bins)


def example_of(
    key: str, words: str, language: str, audio: Samples, spec: AudioSpec, mel: Mel = log_mel
) -> Example:
    """What the foreign loaders hand to the collator."""
    sample = Sample(key, "asr", "", (words,), language=language)
    return Example(sample, mel(audio, spec), len(audio), 0, 1.0, key)


def webdataset_examples(tar: Path, spec: AudioSpec, mel: Mel = log_mel) -> Iterator[Example]:
    """webdataset's pipeline over our tar in file order, with our decoding."""
    import webdataset

    for row in webdataset.WebDataset(str(tar), shardshuffle=False):
        words = json.loads(row["json"])
        yield example_of(words["id"], words["transcript"], words["language"], decode(row["flac"]), spec, mel)


def write_shar(folder: Path, count: int) -> Path:
    """The clips as one lhotse Shar of FLAC recordings, the words as supervisions."""
    from lhotse import Recording, SupervisionSegment
    from lhotse.shar import SharWriter

    out = folder / "shar"
    out.mkdir()
    with SharWriter(str(out), fields={"recording": "flac"}, shard_size=None) as writer:
        for number in range(count):
            cut = Recording.from_file(folder / f"{number}.flac").to_cut()
            words = SupervisionSegment(cut.id, cut.recording_id, 0, cut.duration, text=WORDS, language="en")
            cut.supervisions = [words]
            writer.write(cut)
    return out


def lhotse_examples(shar: Path, spec: AudioSpec) -> Iterator[Example]:
    """lhotse's own reading and decoding of its Shar, in its order."""
    from lhotse import CutSet

    for cut in CutSet.from_shar(in_dir=str(shar)):
        words = cut.supervisions[0]
        yield example_of(cut.id, words.text, words.language, cut.load_audio()[0], spec)
