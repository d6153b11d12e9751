"""How long ranks wait for each other, simulated: ``python tools/bench_data.py balance``

Useful over occupied time: 1 when every rank computes examples all the time. The lengths are those of read
speech, spoken questions and text questions; an example costs its positions and 160 more per chunk of audio,
padding is waste. The first table compares ours with four usual policies. The second shows ours with
micro-batches that fit a memory cap and a fixed cost for each of them (bench_overhead.py), which the first table
leaves out for all policies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from bench_overhead import overheads

from voxtral_dist.micro_batches import Caps, cut
from voxtral_dist.plan import GlobalPlan, Int64, TaskStream
from voxtral_dist.report import table
from voxtral_dist.shares import equal_cost_shares

CHUNK_TOKENS, CHUNK_COST = 375, 160
TOKEN_CAP, CHUNK_CAP, ROW_CAP, BUCKETS = 8192, 24, 8, 30
EXAMPLES = (40_000, 20_000, 20_000)
WEIGHTS = (10, 15, 12)
SIZES = {(8, 8): 20, (8, 32): 20, (64, 8): 20, (64, 18): 20, (64, 32): 10, (1024, 16): 4}
"""Steps to simulate by (ranks, examples per rank)."""


@dataclass(frozen=True)
class Corpus:
    """Lengths of all examples, int64 [n]: positions and audio chunks; ``ids`` are those of each task."""

    positions: Int64
    chunks: Int64
    ids: list[Int64]

    @property
    def useful(self) -> Int64:
        """Cost of each example alone, in positions."""
        return self.positions + CHUNK_COST * self.chunks


Policy = Callable[[int, Corpus], float]


def balance(sizes: dict[tuple[int, int], int] = SIZES, trials: int = 5) -> None:
    """Print both tables, the second for ``sizes`` (steps by ranks and examples per rank)."""
    corpus = lengths()
    rows = [
        [name, *(f"{policy(world, corpus):.3f}" for world in (8, 64))] for name, policy in POLICIES.items()
    ]
    print(table(["policy", "8 ranks", "64 ranks"], rows) + "\n")
    measured = overheads(trials)
    overhead = float(np.median(measured))
    print(
        f"a micro-batch costs {overhead:.0f} positions besides its own (tiny model on this machine, "
        f"{trials} trials from {measured[0]:.0f} to {measured[-1]:.0f}); "
        f"caps {TOKEN_CAP} positions, padded {ROW_CAP} rows"
    )
    rows = [
        [
            f"{world} x {per_rank}",
            *(f"{value:.3f}" for value in capped(corpus, world, per_rank, steps, overhead)),
        ]
        for (world, per_rank), steps in sizes.items()
    ]
    columns = ["ours, ranks x examples", "cost alone", "padded", "padded, overhead", "packed, overhead"]
    print(table(columns, rows))


def lengths() -> Corpus:
    """Read speech, spoken questions, text questions."""
    rng = np.random.default_rng(0)
    asr = np.clip(rng.lognormal(1.9, 0.65, EXAMPLES[0]), 0.5, 30)
    sqa = np.clip(rng.lognormal(3.1, 0.8, EXAMPLES[1]), 2, 180)
    answers = np.clip(rng.lognormal(3.3, 0.7, EXAMPLES[1]), 4, 500)
    questions = np.clip(rng.lognormal(4.6, 0.9, EXAMPLES[2]), 5, 1500)
    text = questions + np.clip(rng.lognormal(4.3, 1, EXAMPLES[2]), 10, 2000)
    chunks = np.concatenate([np.ceil(asr / 30), np.ceil(sqa / 30), np.zeros(EXAMPLES[2])]).astype(np.int64)
    words = np.concatenate([asr * 3.5 + 11, answers + 30, text]).astype(np.int64)
    edges = np.cumsum((0, *EXAMPLES))
    return Corpus(words + CHUNK_TOKENS * chunks, chunks, [np.arange(a, b) for a, b in pairwise(edges)])


def draw(corpus: Corpus, count: int, rng: np.random.Generator) -> Int64:
    """``count`` examples at random, tasks in the proportion of the weights."""
    tasks = rng.choice(len(corpus.ids), count, p=np.array(WEIGHTS) / sum(WEIGHTS))
    return np.array([rng.choice(corpus.ids[task]) for task in tasks])


def fill(order: Int64, corpus: Corpus) -> Iterator[Int64]:
    """Cut an order into batches under the caps of padded positions and chunks."""
    batch: list[int] = []
    for example in order.tolist():
        grown = [*batch, example]
        padded = len(grown) * corpus.positions[grown].max()
        if batch and (padded > TOKEN_CAP or corpus.chunks[grown].sum() > CHUNK_CAP):
            yield np.array(batch)
            grown = [example]
        batch = grown
    yield np.array(batch)


def meeting(world: int, batches: list[Int64], corpus: Corpus) -> float:
    """Ranks take a batch each and wait for the dearest one, padding included."""
    batches = batches[: len(batches) // world * world]
    padded = [len(b) * corpus.positions[b].max() + CHUNK_COST * corpus.chunks[b].sum() for b in batches]
    slowest = np.array(padded).reshape(-1, world).max(1).sum()
    return float(sum(corpus.useful[b].sum() for b in batches) / (world * slowest))


def fixed(world: int, corpus: Corpus) -> float:
    """Three random examples a batch, the most that always fit."""
    return meeting(world, list(draw(corpus, 6000, np.random.default_rng(1)).reshape(-1, 3)), corpus)


def budget(world: int, corpus: Corpus) -> float:
    """Random order, as many as the caps allow."""
    return meeting(world, list(fill(draw(corpus, 12_000, np.random.default_rng(1)), corpus)), corpus)


def bucketed(synchronised: bool) -> Policy:
    """Batches of alike length; each rank its own bucket, or all ranks the same one at a time."""

    def policy(world: int, corpus: Corpus) -> float:
        rng = np.random.default_rng(1)
        order = draw(corpus, 24_000, rng)
        buckets = np.array_split(order[np.argsort(corpus.positions[order], kind="stable")], BUCKETS)
        filled = [list(fill(rng.permutation(bucket), corpus)) for bucket in buckets]
        if synchronised:
            groups = [b[i : i + world] for b in filled for i in range(0, len(b) // world * world, world)]
            batches = [batch for number in rng.permutation(len(groups)) for batch in groups[number]]
        else:
            flat = [batch for bucket in filled for batch in bucket]
            batches = [flat[number] for number in rng.permutation(len(flat))]
        return meeting(world, batches, corpus)

    return policy


def ours(per_rank: int) -> Policy:
    """Equal-cost shares of a step, packed rows, one meeting a step."""
    return lambda world, corpus: capped(corpus, world, per_rank, 20, 0)[0]


def step_shares(corpus: Corpus, world: int, per_rank: int, steps: int) -> Iterator[list[Int64]]:
    """The examples of each rank, for some steps of the plan."""
    streams = [TaskStream.of(number, [len(members)]) for number, members in enumerate(corpus.ids)]
    plan = GlobalPlan.single(streams, WEIGHTS, 0, world * per_rank, 10**9)
    first_ids = np.array([members[0] for members in corpus.ids])
    for index in range(steps):
        step = plan.step(index)
        ids = first_ids[step.tasks] + step.examples
        yield [ids[share] for share in equal_cost_shares(step, corpus.useful[ids], world, 0)]


def capped(corpus: Corpus, world: int, per_rank: int, steps: int, overhead: float) -> list[float]:
    """Useful over occupied time of ours, ranks meeting once a step.

    Args:
        corpus: the lengths.
        world: number of ranks.
        per_rank: examples per rank and step.
        steps: how many to simulate.
        overhead: fixed cost of a micro-batch, in positions.

    Returns:
        With the cost of the examples alone, which is that of packed rows; with padded micro-batches; with padded
        and with packed ones that cost the overhead each.
    """
    done, occupied = 0, np.zeros(4)
    for shares in step_shares(corpus, world, per_rank, steps):
        padded, packed = (
            np.array([micro_batches(corpus, s, form) for s in shares]) for form in (False, True)
        )
        times = [packed[:, 0], padded[:, 0], padded @ (1, overhead), packed @ (1, overhead)]
        done += int(packed[:, 0].sum())
        occupied += [world * time.max() for time in times]
    return [float(value) for value in done / occupied]


def micro_batches(corpus: Corpus, share: Int64, packed: bool) -> tuple[int, int]:
    """Cost of a share's micro-batches with their padding but no overhead, and their number."""
    sizes = corpus.positions[share]
    groups = cut(np.zeros_like(share), sizes, Caps(ROW_CAP, TOKEN_CAP, packed=packed))
    positions = sum(sizes[g].sum() if packed else len(g) * sizes[g].max() for g in groups)
    return int(positions + CHUNK_COST * corpus.chunks[share].sum()), len(groups)


POLICIES: dict[str, Policy] = {
    "fixed batch of 3, random": fixed,
    "token budget, random": budget,
    "buckets per rank": bucketed(False),
    "buckets, all ranks the same": bucketed(True),
    "ours packed, 8 examples per rank": ours(8),
    "ours packed, 32 examples per rank": ours(32),
}
