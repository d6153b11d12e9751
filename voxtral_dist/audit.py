"""Proof, from its log, that a run consumed every draw of its plan exactly once."""

from __future__ import annotations

import json
from pathlib import Path

from voxtral_dist.errors import UserError
from voxtral_dist.plan import GlobalPlan, draw_hashes


def audit(plan: GlobalPlan, log: Path, last_step: int) -> str:
    """Compare what the ranks together computed in each step with the plan.

    Args:
        plan: of the run, with its history.
        log: metrics.jsonl of the run, where every step left the sum of its draws' hashes.
        last_step: steps that the run has done.

    Returns:
        A sentence that says what was proved.

    Raises:
        UserError: a step is missing, there twice, or computed other draws than the plan has.
    """
    logged = [(step, value) for step, value in _logged_hashes(log) if step <= last_step]
    steps = [step for step, _ in logged]
    if steps != list(range(1, last_step + 1)):
        expected = range(1, last_step + 1)
        odd = next((s for s, t in zip(steps, expected, strict=False) if s != t), len(steps) + 1)
        raise UserError(
            f"{log}: {len(steps)} logged steps where {last_step} were done, missing or repeated from step {odd} on; "
            "without them nothing can be proved"
        )
    for step, value in logged:
        planned = plan.step(step - 1)
        if int(draw_hashes(planned.tasks, planned.examples).sum()) != value:
            raise UserError(
                f"{log}: step {step} computed other examples than its plan has; do not trust this run"
            )
    draws = plan.draws_after(last_step)
    return f"audit: {draws:,} draws in {last_step:,} steps, each computed exactly once in the step it was planned for"


def _logged_hashes(path: Path) -> list[tuple[int, int]]:
    """Step and draw hash of each logged step."""
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {error}; the audit needs the log of the whole run"
        ) from error
    return [(int(line["step"]), int(line["data/draw_hash"])) for line in lines if "data/draw_hash" in line]
