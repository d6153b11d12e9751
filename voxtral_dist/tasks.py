"""The tasks: how a row is recognised, what is asked, what is the answer, which metric decides.

A task is one entry of :data:`TASKS`; everything else in the package goes through it. Prompts are built from
token ids by hand, by the one function :func:`prompt_ids` that training and decoding share:

    ASR   <s>[INST][BEGIN_AUDIO][AUDIO]*N[/INST]lang:ko[TRANSCRIBE]      (no language: without ``lang:ko``)
    SQA   <s>[INST][BEGIN_AUDIO][AUDIO]*N question[/INST]               (spoken question: without the text)
    TQA   <s>[INST]instruction[/INST]

These are the ids that ``VoxtralProcessor`` and mistral-common produce; a test asserts the equality.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from voxtral_dist.errors import UserError
from voxtral_dist.sample import Sample

PROMPT_TEMPLATE = "voxtral-prompt/1"
"""Version of the prompts below. Changing a prompt must change it: cached token lengths are keyed by it."""

ROW_FIELDS = frozenset(
    "id task audio_path transcript language question answer instruction input output domain speaker document "
    "meta".split()
)
"""Every field a JSONL row may have besides the targets of its task. ``meta`` is kept untouched and never read;
``document`` names the call, article or recording that a row belongs to, see :class:`~voxtral_dist.sample.Sample`."""

Row = Mapping[str, Any]


class Vocabulary(Protocol):
    """What prompt building needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` without any special token."""

    def special(self, token: str) -> int:
        """Id of a special token such as ``[INST]``."""


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: short lower-case name, used in flags, paths and metric names.
        has_audio: whether its rows carry audio.
        detect: whether the keys of a row are those of this task.
        prompt: the written part of the prompt.
        target_field: the first of these fields that a row has holds the reference.
        metric: the key of ``metrics.json`` that decides, one of ``ERROR_RATES`` or ``SCALES`` of
            :mod:`voxtral_dist.scoring`: an error rate makes it a task of transcripts, any other metric one of answers.
        transcribe: whether the prompt ends in the transcription mode token.
    """

    name: str
    has_audio: bool
    detect: Callable[[Row], bool]
    prompt: Callable[[Row], str]
    target_fields: tuple[str, ...]
    metric: str
    transcribe: bool = False


def _question(row: Row) -> str:
    """The written question: ``question``, or ``instruction`` with ``input`` below it."""
    if "question" in row:
        return str(row["question"])
    return "\n".join(str(row[key]) for key in ("instruction", "input") if row.get(key))


def _answered(row: Row) -> bool:
    return "answer" in row or "output" in row


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="asr",
            has_audio=True,
            detect=lambda row: "audio_path" in row and "transcript" in row,
            prompt=lambda row: "",
            target_fields=("transcript",),
            metric="cer",
            transcribe=True,
        ),
        Task(
            name="sqa",
            has_audio=True,
            detect=lambda row: "audio_path" in row and _answered(row),
            prompt=_question,
            target_fields=("answer", "output"),
            metric="rouge_l_f1",
        ),
        Task(
            name="tqa",
            has_audio=False,
            detect=lambda row: (
                "audio_path" not in row and _answered(row) and ("question" in row or "instruction" in row)
            ),
            prompt=_question,
            target_fields=("answer", "output"),
            metric="rouge_l_f1",
        ),
    )
}


def get_task(name: str, where: str = "") -> Task:
    """The task called ``name``; :class:`UserError` that lists the known ones otherwise."""
    if name not in TASKS:
        prefix = f"{where}: " if where else ""
        raise UserError(f"{prefix}unknown task {name!r}; known tasks are {', '.join(TASKS)}")
    return TASKS[name]


def detect_task(row: Row, where: str) -> Task:
    """The one task whose keys ``row`` has.

    Raises:
        UserError: the keys fit no task or more than one; names ``where`` (file:line) and the keys.
    """
    fits = [task for task in TASKS.values() if task.detect(row)]
    if len(fits) == 1:
        return fits[0]
    keys = ", ".join(sorted(row))
    if not fits:
        raise UserError(f"{where}: keys ({keys}) fit no task; see the data formats in README.md")
    names = " and ".join(task.name for task in fits)
    raise UserError(
        f"{where}: keys ({keys}) fit {names}; add a 'task' field or name the file's task with --tasks"
    )


def parse_row(
    row: Row, where: str, default_id: str, task_name: str | None = None, needs_target: bool = True
) -> Sample:
    """Validate one JSONL row and make a :class:`Sample` of it.

    Args:
        row: the decoded JSON object.
        where: ``file:line``, for messages.
        default_id: id of a row that has none.
        task_name: task of the whole file (``--tasks``); the row's own ``task`` field wins over it.
        needs_target: whether a row without a target is an error.

    Raises:
        UserError: unknown key, unknown or ambiguous task, missing or empty field, wrong type.
    """
    unknown = sorted(set(row) - ROW_FIELDS.union(*(task.target_fields for task in TASKS.values())))
    if unknown:
        raise UserError(
            f"{where}: unknown key{'s' if len(unknown) > 1 else ''} {', '.join(map(repr, unknown))}; "
            "rename to a known field or move under 'meta'"
        )
    name = row.get("task", task_name)
    task = detect_task(row, where) if name is None else get_task(str(name), where)
    return Sample(
        id=default_id if row.get("id") in (None, "") else str(row["id"]),
        task=task.name,
        prompt=_checked_prompt(task, row, where),
        references=_references(task, row, where, needs_target),
        language=check_language(row.get("language"), where),
        domain=str(row.get("domain") or ""),
        speaker=str(row.get("speaker") or ""),
        document=str(row.get("document") or ""),
        audio_path=_text(row, "audio_path", task, where) if task.has_audio else "",
        source=where,
    )


def _text(row: Row, field: str, task: Task, where: str) -> str:
    if field not in row:
        raise UserError(
            f"{where}: task {task.name} needs the field {field!r}; the row has {', '.join(sorted(row))}"
        )
    value = row[field]
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} is {type(value).__name__}, it must be a string")
    if not value.strip():
        raise UserError(
            f"{where}: field {field!r} is empty; there is nothing to learn or score, remove the row"
        )
    return value


def _checked_prompt(task: Task, row: Row, where: str) -> str:
    for field in ("question", "instruction", "input"):
        if field in row and not isinstance(row[field], str):
            raise UserError(f"{where}: field {field!r} is {type(row[field]).__name__}, it must be a string")
    prompt = task.prompt(row)
    if not task.has_audio and not prompt.strip():
        raise UserError(f"{where}: task {task.name} needs a non-empty 'question' or 'instruction'")
    return prompt


def _references(task: Task, row: Row, where: str, needed: bool) -> tuple[str, ...]:
    field = next((name for name in task.target_fields if name in row), task.target_fields[0])
    if field not in row and not needed:
        return ()
    value = row.get(field)
    if not isinstance(value, list):
        return (_text(row, field, task, where),)
    if not value:
        raise UserError(f"{where}: field {field!r} is an empty list; give at least one answer")
    return tuple(_text({field: item}, field, task, where) for item in value)


def check_language(language: Any, where: str) -> str:
    """A language code in lower case, "" for none; :class:`UserError` when it is not one."""
    language = language or ""
    if language and not (isinstance(language, str) and re.fullmatch(r"[A-Za-z]{2}", language)):
        raise UserError(
            f"{where}: language {language!r} is not a two-letter ISO 639-1 code such as 'ko' or 'en'"
        )
    return str(language).lower()


def prompt_ids(
    sample: Sample, vocabulary: Vocabulary, audio_tokens: int, spoken_question: bool = False
) -> list[int]:
    """Token ids of everything before the target.

    Args:
        sample: the example.
        vocabulary: the model's tokenizer.
        audio_tokens: number of ``[AUDIO]`` positions, chunks x tokens per chunk; 0 for text tasks.
        spoken_question: leave the written question of an audio task out, the audio asks it.
    """
    task, special = TASKS[sample.task], vocabulary.special
    ids = [special("<s>"), special("[INST]")]
    if task.has_audio:
        ids += [special("[BEGIN_AUDIO]")] + [special("[AUDIO]")] * audio_tokens
    if sample.prompt and not (task.has_audio and spoken_question):
        ids += vocabulary.encode(sample.prompt)
    ids.append(special("[/INST]"))
    if task.transcribe:
        ids += (vocabulary.encode(f"lang:{sample.language}") if sample.language else []) + [
            special("[TRANSCRIBE]")
        ]
    return ids


def target_ids(text: str, vocabulary: Vocabulary) -> list[int]:
    """Token ids of a target and the ``</s>`` that ends it; trailing blanks go, as mistral-common does."""
    return [*vocabulary.encode(text.rstrip(" ")), vocabulary.special("</s>")]


def parse_task_list(names: Sequence[str], files: Sequence[str], flag: str) -> list[str | None]:
    """One task name per file from ``--tasks``; ``[None, ...]`` (detect by keys) when the flag is empty.

    Raises:
        UserError: unknown task, or another number of names than of files.
    """
    if not names:
        return [None] * len(files)
    if len(names) != len(files):
        raise UserError(
            f"--tasks names {len(names)} tasks for {len(files)} files in {flag}; give one per file"
        )
    return [get_task(name, "--tasks").name for name in names]
