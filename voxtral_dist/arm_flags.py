"""The flags of each arm of an experiment: a base, what the arm changes, and what follows from both.

flags = named_tasks_only({**base, **arm})         an arm with task_weights "asr=1" trains on that task's data alone
flags = parsed(TrainConfig, flags, "arm asr_only")          all flags, checked as launch/train.py checks them
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from voxtral_dist import command_line
from voxtral_dist import config as settings
from voxtral_dist.config import DataConfig, EvalConfig, TrainConfig, split_list
from voxtral_dist.errors import UserError
from voxtral_dist.row_filter import RowFilter, values_of
from voxtral_dist.shard_cache import ShardCache
from voxtral_dist.shards import ShardSet
from voxtral_dist.tasks import parse_task_list

Flags = dict[str, Any]

SCRIPTS: dict[type[DataConfig], str] = {TrainConfig: "train", EvalConfig: "evaluate"}

FULL = "full"
"""The arm of a leave-one-out experiment that leaves nothing out."""

OUT_FIELDS = ("domain", "language")


def read_base(value: Any) -> Flags:
    """The flags that all arms share: a mapping, or the name of a YAML file such as the config.yaml of a run.

    Raises:
        UserError: neither, or an unknown flag.
    """
    if isinstance(value, str):
        value = settings.load_yaml(Path(value))
    if not isinstance(value, dict):
        raise UserError(
            "base is missing; give the train flags that all arms share, or name a YAML file of them"
        )
    check_names(value, TrainConfig, "base")
    return value


def read_arms(own: Mapping[str, Any], base: Flags, field: str) -> tuple[dict[str, Flags], dict[str, str]]:
    """What each arm changes of the base.

    Args:
        own: ``arms`` of the file.
        base: the flags that all share.
        field: ``leave_one_out``, "" for none: adds an arm :data:`FULL`, and one without each value of the field.

    Returns:
        Changes by arm, and by value the arm that is without it.

    Raises:
        UserError: no arm, two of one name, one whose name is no folder, an unknown flag or one that is set for it.
    """
    arms, without = _leave_one_out(field, base) if field else ({}, {})
    for name, changes in own.items():
        if not re.fullmatch(r"\w[\w.-]*", str(name)):
            raise UserError(f"arm {name!r} becomes a folder; use letters, digits, '_', '-' and '.'")
        if name in arms:
            raise UserError(f"arm {name} is one of leave_one_out already; give yours another name")
        if not isinstance(changes, dict):
            raise UserError(f"arm {name}: {changes!r} holds no 'flag: value'; {{}} is the base as it is")
        check_names(changes, TrainConfig, f"arm {name}")
        for flag in ("output_dir", "seed"):
            if flag in changes:
                raise UserError(
                    f"arm {name}: {flag} is set by the experiment, seeds are a key of it; leave it out"
                )
        arms[str(name)] = changes
    if not arms:
        raise UserError(
            "arms is missing; name at least one with the flags that it changes, or give leave_one_out"
        )
    return arms, without


def check_names(flags: Mapping[str, Any], config_class: type[DataConfig], where: str) -> None:
    """Raise :class:`UserError` for a flag that the script does not have, with those it may be a slip of."""
    known = [field.name for field in dataclasses.fields(config_class)]
    for name in flags:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 3, 0.5)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            script = f"launch/{SCRIPTS[config_class]}.sh"
            raise UserError(
                f"{where}: unknown flag {name!r}; {hint}bash {script} --help lists the known ones"
            )


def _leave_one_out(field: str, base: Flags) -> tuple[dict[str, Flags], dict[str, str]]:
    if field not in OUT_FIELDS:
        raise UserError(f"leave_one_out {field!r} is neither of {', '.join(OUT_FIELDS)}")
    files = split_list(base.get("train_jsonl") or "")
    if not files:
        raise UserError(
            f"leave_one_out {field} filters rows; give train_jsonl in base instead of train_shards"
        )
    tasks = parse_task_list(split_list(base.get("tasks") or ""), files, "train_jsonl")
    values = values_of(files, tasks, field, RowFilter(str(base.get("train_where") or ""), "train_where"))
    if len(values) < 2:
        raise UserError(
            f"leave_one_out {field}: the training rows have {len(values)} values of it, it takes two"
        )
    without = {value: "without_" + re.sub(r"[^\w.-]", "_", value) for value in values}
    if len(set(without.values())) < len(without):
        raise UserError(f"leave_one_out {field}: two of {', '.join(values)} make one folder; rename one")
    arms = {name: {"train_where": _both(base, f"{field}!={value}")} for value, name in without.items()}
    return {FULL: {}, **arms}, without


def _both(flags: Flags, condition: str) -> str:
    """The row filter of ``flags`` and one more condition."""
    return "; ".join(filter(None, [flags.get("train_where"), condition]))


def named_tasks(flags: Mapping[str, Any]) -> list[str]:
    """The tasks that ``task_weights`` names, as ``asr=1,tqa=2`` does; none in the form ``1.0,1.5,1.2``."""
    items = str(flags.get("task_weights") or "").split(",")
    return [item.partition("=")[0].strip() for item in items if "=" in item]


def named_tasks_only(flags: Flags) -> Flags:
    """The flags without the training data of tasks that ``task_weights`` does not name.

    Raises:
        UserError: a packed set cannot be opened, or none is of a named task.
    """
    names = named_tasks(flags)
    if not names:
        return flags
    packed = split_list(flags.get("train_shards") or "")
    if not packed:
        return {**flags, "train_where": _both(flags, f"task={','.join(names)}")}
    cache = (str(flags.get("shard_cache") or ""), float(flags.get("shard_cache_gb") or 200.0))
    tasks = [_task_of(name, *cache) for name in packed]
    if missing := [name for name in names if name not in tasks]:
        raise UserError(f"task_weights names {missing[0]!r}, train_shards holds {', '.join(tasks)}")
    kept = [name for name, task in zip(packed, tasks, strict=True) if task in names]
    return {**flags, "train_shards": ",".join(kept)}


@lru_cache
def _task_of(location: str, shard_cache: str, shard_cache_gb: float) -> str:
    return ShardSet.open(location, ShardCache.from_flags(shard_cache, shard_cache_gb)).task


def parsed(config_class: type[DataConfig], flags: Flags, where: str) -> Flags:
    """All flags of a script, defaults included, as it would take them.

    Raises:
        UserError: it would refuse them.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "flags.yaml")
        file.write_text(to_yaml(flags), "utf-8")
        try:
            config = command_line.parse(config_class, ["--config", str(file)], f"{SCRIPTS[config_class]}.py")
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
    if isinstance(config, TrainConfig):
        RowFilter(config.train_where, f"{where}: train_where")
    return settings.to_dict(config)


def to_yaml(values: Mapping[str, Any]) -> str:
    """One line per flag, so that launch/run_ranks.sh finds ``output_dir``."""
    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=1 << 20)
    return text
