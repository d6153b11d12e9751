"""Measure the data side: balance of batching policies, reading speed, planning at scale. Ratios of one run, one core.

python tools/bench_data.py balance      useful over occupied time of the ranks, ours and four usual policies
python tools/bench_data.py read         samples per CPU second, ours and webdataset's with the same decoding
python tools/bench_data.py scale        planning 100 million examples in 10,000 shards
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import soundfile
import torch

from voxtral_dist.audio import AudioSpec, log_mel
from voxtral_dist.audio_file import decode
from voxtral_dist.collator import Collator, Example
from voxtral_dist.data import TaskData
from voxtral_dist.errors import UserError, run_main
from voxtral_dist.packing import pack
from voxtral_dist.plan import GlobalPlan, Int64, TaskStream
from voxtral_dist.report import table
from voxtral_dist.sample import Sample
from voxtral_dist.shards import ShardSet
from voxtral_dist.shares import equal_cost_shares
from voxtral_dist.tokenizer import TekkenVocabulary

CHUNK_TOKENS, CHUNK_COST = 375, 160
TOKEN_CAP, CHUNK_CAP, BUCKETS = 8192, 24, 30
EXAMPLES = (40_000, 20_000, 20_000)
WEIGHTS = (10, 15, 12)
"""Length model and caps of the simulation; cost of an example: its positions, padding included, and 160 per chunk."""

Batches = Iterator[Int64]


def main() -> None:
    """Run the named part."""
    parts: dict[str, Callable[[], None]] = {"balance": balance, "read": read, "scale": scale}
    if len(sys.argv) != 2 or sys.argv[1] not in parts:
        raise UserError(f"name one part of {', '.join(parts)}")
    torch.set_num_threads(1)
    parts[sys.argv[1]]()


def lengths() -> tuple[Int64, Int64, list[Int64]]:
    """Positions and chunks of all examples, and each task's ids: read speech, spoken questions, text questions."""
    rng = np.random.default_rng(0)
    asr = np.clip(rng.lognormal(1.9, 0.65, EXAMPLES[0]), 0.5, 30)
    sqa = np.clip(rng.lognormal(3.1, 0.8, EXAMPLES[1]), 2, 180)
    answers = np.clip(rng.lognormal(3.3, 0.7, EXAMPLES[1]), 4, 500)
    text = np.clip(rng.lognormal(4.6, 0.9, EXAMPLES[2]), 5, 1500) + np.clip(
        rng.lognormal(4.3, 1, EXAMPLES[2]), 10, 2000
    )
    chunks = np.concatenate([np.ceil(asr / 30), np.ceil(sqa / 30), np.zeros(EXAMPLES[2])]).astype(np.int64)
    words = np.concatenate([asr * 3.5 + 11, answers + 30, text]).astype(np.int64)
    edges = np.cumsum((0, *EXAMPLES))
    return (
        words + CHUNK_TOKENS * chunks,
        chunks,
        [np.arange(a, b) for a, b in pairwise(edges)],
    )


def draw(ids: list[Int64], count: int, rng: np.random.Generator) -> Int64:
    """``count`` examples at random, tasks in the proportion of the weights."""
    tasks = rng.choice(len(ids), count, p=np.array(WEIGHTS) / sum(WEIGHTS))
    return np.array([rng.choice(ids[task]) for task in tasks])


def fill(order: Int64, positions: Int64, chunks: Int64) -> Batches:
    """Cut an order into batches under the caps of padded positions and chunks."""
    batch: list[int] = []
    for example in order.tolist():
        grown = [*batch, example]
        if batch and (len(grown) * positions[grown].max() > TOKEN_CAP or chunks[grown].sum() > CHUNK_CAP):
            yield np.array(batch)
            grown = [example]
        batch = grown
    yield np.array(batch)


def balance() -> None:
    """Useful over occupied time: ranks meet at every batch, except with ours, where they meet once a step."""
    positions, chunks, ids = lengths()
    useful = positions + CHUNK_COST * chunks
    rows = []
    for name, policy in POLICIES.items():
        rows.append([name, *(f"{policy(world, positions, chunks, ids, useful):.3f}" for world in (8, 64))])
    print(table(["policy", "8 ranks", "64 ranks"], rows))


def meeting(world: int, batches: list[Int64], positions: Int64, chunks: Int64, useful: Int64) -> float:
    """Ranks take a batch each and wait for the dearest one, padding included."""
    batches = batches[: len(batches) // world * world]
    cost = np.array([len(b) * positions[b].max() + CHUNK_COST * chunks[b].sum() for b in batches]).reshape(
        -1, world
    )
    return float(sum(useful[b].sum() for b in batches) / (world * cost.max(1).sum()))


def fixed(world: int, positions: Int64, chunks: Int64, ids: list[Int64], useful: Int64) -> float:
    """Three random examples a batch, the most that always fit."""
    batches = list(draw(ids, 6000, np.random.default_rng(1)).reshape(-1, 3))
    return meeting(world, batches, positions, chunks, useful)


def budget(world: int, positions: Int64, chunks: Int64, ids: list[Int64], useful: Int64) -> float:
    """Random order, as many as the caps allow."""
    order = draw(ids, 12_000, np.random.default_rng(1))
    return meeting(world, list(fill(order, positions, chunks)), positions, chunks, useful)


def bucketed(synchronised: bool) -> Callable[..., float]:
    """Batches of alike length; each rank its own bucket, or all ranks the same one at a time."""

    def policy(world: int, positions: Int64, chunks: Int64, ids: list[Int64], useful: Int64) -> float:
        rng = np.random.default_rng(1)
        order = draw(ids, 24_000, rng)
        buckets = np.array_split(order[np.argsort(positions[order], kind="stable")], BUCKETS)
        filled = [list(fill(rng.permutation(bucket), positions, chunks)) for bucket in buckets]
        if synchronised:
            groups = [b[i : i + world] for b in filled for i in range(0, len(b) // world * world, world)]
            batches = [batch for number in rng.permutation(len(groups)) for batch in groups[number]]
        else:
            flat = [batch for bucket in filled for batch in bucket]
            batches = [flat[number] for number in rng.permutation(len(flat))]
        return meeting(world, batches, positions, chunks, useful)

    return policy


def ours(per_rank: int) -> Callable[..., float]:
    """Equal-cost shares of a step, packed rows, one meeting a step."""

    def policy(world: int, positions: Int64, chunks: Int64, ids: list[Int64], useful: Int64) -> float:
        streams = [TaskStream.of(number, [len(members)]) for number, members in enumerate(ids)]
        plan = GlobalPlan.single(streams, WEIGHTS, 0, world * per_rank, 10**9)
        done = occupied = 0
        for index in range(20):
            step = plan.step(index)
            cost = np.array([useful[ids[t][e]] for t, e in zip(step.tasks, step.examples, strict=True)])
            loads = [int(cost[share].sum()) for share in equal_cost_shares(step, cost, world, 0)]
            done, occupied = done + sum(loads), occupied + world * max(loads)
        return done / occupied

    return policy


POLICIES: dict[str, Callable[..., float]] = {
    "fixed batch of 3, random": fixed,
    "token budget, random": budget,
    "buckets per rank": bucketed(False),
    "buckets, all ranks the same": bucketed(True),
    "ours, 8 examples per rank": ours(8),
    "ours, 32 examples per rank": ours(32),
}


def read() -> None:
    """Read, decode, log-mel, tokens, collate: 5-s FLAC clips in batches of 8, each arm over the same tar."""
    spec = AudioSpec(128, 3000, 375)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = clips(folder, 400)
        collator = Collator(tekken(folder), spec)
        tar = shards.folder / shards.shard_names[0]
        arms = {
            "webdataset": lambda: webdataset_arm(tar, collator),
            "ours": lambda: our_arm(shards, collator),
        }
        rates = {}
        for arm, work in arms.items():
            work()
            started = time.process_time()
            rates[arm] = work() / (time.process_time() - started)
    print(f"ours / webdataset, samples per CPU second: {rates['ours'] / rates['webdataset']:.2f}")


def clips(folder: Path, count: int) -> ShardSet:
    """Noise clips of 5 s, packed as one shard."""
    rng = np.random.default_rng(0)
    with (folder / "asr.jsonl").open("w") as rows:
        for number in range(count):
            soundfile.write(
                folder / f"{number}.flac", rng.standard_normal(80_000) * 0.05, 16_000, subtype="PCM_16"
            )
            rows.write(
                json.dumps({"audio_path": f"{number}.flac", "transcript": "one two three", "language": "en"})
                + "\n"
            )
    return ShardSet.open(pack([folder / "asr.jsonl"], folder / "shards")[0])


def tekken(folder: Path) -> TekkenVocabulary:
    """A 4,096-token vocabulary in the format of the released model."""
    sys.path.insert(0, str(Path(__file__).parent))
    from build_tiny_voxtral import build

    build(folder / "model")
    return TekkenVocabulary.load(str(folder / "model"))


def our_arm(shards: ShardSet, collator: Collator) -> int:
    """The product's own reader, in the plan's random order."""
    task = TaskData("asr", [shards], collator)
    order = TaskStream.of(0, shards.shard_sizes.tolist()).draws(0, 0, len(shards)).tolist()
    for first in range(0, len(order), 8):
        collator.train_batch([task.read(example) for example in order[first : first + 8]], 0)
    return len(order)


def webdataset_arm(tar: Path, collator: Collator) -> int:
    """webdataset's pipeline in file order, with the same decoding, log-mel and collator."""
    import webdataset

    def example(row: dict[str, bytes]) -> Example:
        audio, words = decode(row["flac"]), json.loads(row["json"])
        sample = Sample(words["id"], "asr", "", (words["transcript"],), language=words["language"])
        return Example(sample, log_mel(audio, collator.spec), len(audio), 0, 1.0, words["id"])

    done, batch = 0, []
    for row in webdataset.WebDataset(str(tar), shardshuffle=False).map(example):
        batch.append(row)
        if len(batch) == 8:
            collator.train_batch(batch, 0)
            done, batch = done + 8, []
    return done


def scale() -> None:
    """CPU time and memory of planning 100 million examples."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    streams = [
        TaskStream.of(i, [n // 3333] * 3333) for i, n in enumerate((50_000_000, 30_000_000, 20_000_000))
    ]
    plan = GlobalPlan.single(streams, WEIGHTS, 0, 1024, 10**8)
    costs = np.random.default_rng(0).integers(100, 5000, 1024)
    middle, started = plan.num_steps // 2, time.process_time()
    plan.step(middle)
    seek, started = time.process_time() - started, time.process_time()
    for index in range(middle, middle + 100):
        step = plan.step(index)
        equal_cost_shares(step, costs[: len(step)], 64, 0)
    each = (time.process_time() - started) / 100
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"cold seek to the middle {seek:.3f} s CPU, planner's memory {grown:.0f} MB")
    print(f"{1000 * each:.2f} ms CPU per step of 1,024 examples with its shares for 64 ranks")


if __name__ == "__main__":
    run_main(main)
