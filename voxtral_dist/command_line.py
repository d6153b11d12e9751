"""Reads the settings of :mod:`voxtral_dist.config` from the words of a command.

Order: the defaults, then ``--config FILE.yaml``, then flags. An unknown key or flag is an error.
Booleans take the bare form (``--bf16``), a value (``--bf16 true``) and ``--no_bf16``.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from typing import TypeVar

import jsonargparse

from voxtral_dist.config import DataConfig
from voxtral_dist.errors import UserError

ConfigT = TypeVar("ConfigT", bound=DataConfig)


def parse(config_class: type[ConfigT], argv: Sequence[str], prog: str) -> ConfigT:
    """Read flags and ``--config`` into a validated config.

    Raises:
        UserError: unknown flag or key, wrong type or value, missing file.
    """
    parser = jsonargparse.ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with the same names as the flags")
    parser.add_class_arguments(config_class, as_group=False)
    try:
        namespace = parser.parse_args(_plain_flags(config_class, argv))
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        raise UserError(f"{prog}: {_first_line(str(error))}; see --help for the flags") from error
    names = [field.name for field in dataclasses.fields(config_class)]
    config = config_class(**{name: namespace[name] for name in names})
    config.validate()
    return config


def _plain_flags(config_class: type[DataConfig], argv: Sequence[str]) -> list[str]:
    """Rewrite ``--flag``, ``--flag true`` and ``--no_flag``, drop the launcher's ``--local_rank``, and put ``--config``
    first, because the parser lets the later of two settings win."""
    hints = typing.get_type_hints(config_class)
    flags = {f"--{name}" for name, hint in hints.items() if hint is bool or bool in typing.get_args(hint)}
    words, first, rest = list(argv), [], []
    while words:
        word = words.pop(0)
        if word == "--local_rank" and words:
            words.pop(0)
        elif word == "--config" and words:
            first += [word, words.pop(0)]
        elif word.startswith("--config="):
            first.append(word)
        elif word.startswith("--local_rank="):
            continue
        elif word.startswith("--no_") and f"--{word[5:]}" in flags:
            rest.append(f"--{word[5:]}=false")
        elif word in flags:
            has_value = words and words[0].lower() in ("true", "false")
            rest.append(f"{word}={words.pop(0).lower() if has_value else 'true'}")
        else:
            rest.append(word)
    return first + rest


def _first_line(message: str) -> str:
    return " ".join(line.strip() for line in message.splitlines() if line.strip())[:400]
