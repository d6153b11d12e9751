"""A step cut into shares of nearly equal cost, one per rank, and what an example costs."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from voxtral_dist.plan import Int64, Step, hash64


@dataclass(frozen=True)
class CostModel:
    """Cost of an example in thousandths of one language-model token.

    The defaults are those of Voxtral-Mini, see :meth:`from_config`.
    """

    token: int = 1000
    chunk: int = 184_000
    squared_tokens_per_million: int = 69_000
    label: int = 153

    @classmethod
    def from_config(cls, config: Any) -> CostModel:
        """Costs as the FLOPs of a LoRA step, from those of the forward pass through a ``VoxtralConfig``'s parts.

        A token passes the language model's layers but the last MLP forward and backward without weight gradients, a
        chunk the frozen encoder forward and the projector both ways, a label position the last MLP and the head both
        ways. Causal attention costs 3.5 times its forward pass, since flash attention recomputes.
        """
        from voxtral_dist.flops import VoxtralFlops  # the plan itself needs numpy alone

        flops = VoxtralFlops.from_config(config)
        token = 2 * flops.token
        return cls(
            chunk=round(1000 * (flops.chunk + 2 * flops.projector) / token),
            squared_tokens_per_million=round(1e9 * 3.5 * flops.squared_token / token),
            label=round(1000 * 2 * (flops.label + flops.last_mlp) / token),
        )

    def cost(self, tokens: Int64, chunks: Int64, labels: Int64) -> Int64:
        """Integer cost of examples, all arrays int64 [n]: positions, audio chunks, label positions."""
        squared = self.squared_tokens_per_million * tokens * tokens // 1_000_000
        return self.token * tokens + self.chunk * chunks + squared + self.label * labels


def equal_cost_shares(step: Step, costs: Int64, world_size: int, seed: int) -> list[Int64]:
    """Cut a step into shares of nearly equal cost, one per rank.

    Longest processing time first: the dearest example left goes to the share that is cheapest so far; ties by (task,
    example). Which rank gets which share turns with the step, else rank 0 would always get the largest example.

    Args:
        step: the draws.
        costs: int64 [len(step)], integer cost of each draw.
        world_size: number of ranks.
        seed: of the plan.

    Returns:
        For each rank the indices into ``step`` of its draws; empty where there are fewer draws than ranks.
    """
    order = np.lexsort((step.examples, step.tasks, -costs))
    heap = [(0, slot) for slot in range(world_size)]
    slots: list[list[int]] = [[] for _ in range(world_size)]
    for index in order.tolist():
        load, slot = heap[0]
        slots[slot].append(index)
        heapq.heapreplace(heap, (load + int(costs[index]), slot))
    turn = hash64(seed, step.first_draw, 3) % world_size
    return [np.array(slots[(rank - turn) % world_size], np.int64) for rank in range(world_size)]


def share_balance(shares: Sequence[Int64], costs: Int64) -> float:
    """Mean over maximum of the shares' costs: 1 when all ranks finish together, 0 for an empty step."""
    loads = [int(costs[share].sum()) for share in shares]
    return sum(loads) / (len(loads) * max(loads)) if max(loads, default=0) else 0.0
