"""The mix of the tasks: weights and caps from their flags, and the exact integer split of the draws."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from math import gcd

from voxtral_dist.errors import UserError


def split_draws(count: int, weights: Sequence[int]) -> list[int]:
    """How many of the first ``count`` draws belong to each task.

    The largest weight first, each task takes what rounding to the nearest integer leaves of the draws not yet given:
    integers that sum to ``count`` exactly and never fall as it grows. For ever they stay within 1 of
    ``count * w / sum(w)`` for up to three tasks, 1.25 for four, ``1 + ln(tasks) / 2`` for more: a rounding error of
    1/2 per level shrinks by the share that is left. (Telescoping floors in the given order drift past 2.)
    """
    left, total, out = count, sum(weights), [0] * len(weights)
    for task in sorted(range(len(weights)), key=lambda task: -weights[task]):
        rest = (2 * left * (total - weights[task]) + total) // (2 * total) if total > weights[task] else 0
        out[task] = left - rest
        left, total = rest, total - weights[task]
    return out


def parse_weights(
    text: str, tasks: Sequence[str], counts: Sequence[int], flag: str = "--task_weights", some: bool = False
) -> tuple[int, ...]:
    """Integer weights of ``tasks`` from ``--task_weights``.

    Args:
        text: ``1.0,1.5,1.2`` in the order of ``tasks``, or ``asr=1,tqa=2``; empty: the examples' ``counts``.
        tasks: the tasks that have training data, in their fixed order.
        counts: training examples per task.
        flag: what to call it in errors.
        some: a task that is not named has weight 0, as in a stage in which it sleeps.

    Raises:
        UserError: not a positive finite number, another number of weights than of tasks, unknown or missing task.
    """
    if not text.strip():
        return _reduced(list(counts))
    items, what = [item.strip() for item in text.split(",")], f"{flag} {text!r}"
    if any("=" in item for item in items):
        values = dict(_named_weight(item, what, tasks) for item in items)
        missing = [task for task in tasks if task not in values]
        if missing and not some:
            raise UserError(f"{what} gives no weight for {', '.join(missing)}; add it or drop the data")
        numbers = [values.get(task, Decimal(0)) for task in tasks]
    else:
        if len(items) != len(tasks):
            raise UserError(
                f"{what} has {len(items)} weights for {len(tasks)} tasks ({', '.join(tasks)}); "
                "give one per task, in this order"
            )
        numbers = [_weight(item, what) for item in items]
    scale = 10 ** max(0, *(-int(number.as_tuple().exponent) for number in numbers))
    return _reduced([int(number * scale) for number in numbers])


def _named_weight(item: str, what: str, tasks: Sequence[str]) -> tuple[str, Decimal]:
    name, _, value = (part.strip() for part in item.partition("="))
    if name not in tasks:
        raise UserError(f"{what}: no training data for {name!r}; tasks here are {', '.join(tasks)}")
    return name, _weight(value, what)


def _weight(value: str, what: str) -> Decimal:
    try:
        number = Decimal(value)
    except InvalidOperation as error:
        raise UserError(f"{what}: {value!r} is not a number") from error
    if not (number.is_finite() and Decimal("1e-6") <= number <= Decimal("1e6")):
        raise UserError(f"{what}: {value} is not between 1e-6 and 1e6; leave a task out to skip it")
    return number


def _reduced(numbers: Sequence[int]) -> tuple[int, ...]:
    divisor = gcd(*numbers) or 1
    return tuple(number // divisor for number in numbers)


def parse_task_caps(text: str, tasks: Sequence[str]) -> dict[str, int]:
    """Caps per task from ``--task_batch_sizes asr=4,sqa=2``. Raises :class:`UserError` on anything else."""
    caps = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = item.partition("=")
        if name not in tasks or not value.isdigit() or int(value) < 1:
            raise UserError(
                f"--task_batch_sizes: {item!r} is not TASK=NUMBER with a task of {', '.join(tasks)}"
            )
        caps[name] = int(value)
    return caps
