"""What to predict: rows of JSONL files without their targets, audio files, and folders of audio files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from voxtral_dist.errors import UserError
from voxtral_dist.jsonl import FLAC_RATIO, Row, decode_row, lines
from voxtral_dist.sample import Sample
from voxtral_dist.tasks import ROW_FIELDS, TASKS, Task, check_language, get_task, parse_row

AUDIO_SUFFIXES = tuple(FLAC_RATIO)


@dataclass(frozen=True, slots=True)
class PredictRow:
    """Something to predict.

    Attributes:
        sample: its words; references only where the user gave some.
        folder: where its audio path starts from.
    """

    sample: Sample
    folder: Path

    @property
    def audio(self) -> Path | None:
        """Its audio file, None for a text task."""
        return self.folder / self.sample.audio_path if self.sample.audio_path else None


@dataclass(frozen=True)
class RowDefaults:
    """What holds for rows that do not say it themselves.

    Attributes:
        task, language, question: "" for none.
        spoken_question: a question may be missing, the audio asks it.
    """

    task: str = ""
    language: str = ""
    question: str = ""
    spoken_question: bool = False

    def check(self) -> None:
        """Raise :class:`UserError` for an unknown task, a malformed language, or a question that nobody would read."""
        check_language(self.language, "--language")
        if self.task and not _asks(get_task(self.task, "--task")) and self.question:
            raise UserError(
                f"--question with --task {self.task}: that task asks nothing; leave out one of the two"
            )


def read_rows(inputs: Sequence[str], defaults: RowDefaults) -> list[PredictRow]:
    """Everything to predict, in the order of the inputs.

    Args:
        inputs: JSONL files, audio files, and folders, of which all audio files are taken.
        defaults: for rows that do not say it themselves, and audio files.

    Raises:
        UserError: a missing, empty or unknown file, a row that fits no task, two rows with the same id.
    """
    defaults.check()
    rows: list[PredictRow] = []
    first: dict[tuple[str, str], str] = {}
    for name in inputs:
        found = list(_read_input(Path(name), defaults))
        if not found:
            raise UserError(f"{name}: has no rows; there is nothing to predict, leave it out")
        for row in found:
            key = (row.sample.task, row.sample.id)
            other = first.setdefault(key, row.sample.source)
            if other is not row.sample.source:
                raise UserError(
                    f"{row.sample.source}: id {row.sample.id!r} is that of {other} too; their predictions could not "
                    "be told apart, give a JSONL file with different ids"
                )
        rows += found
    return rows


def _read_input(path: Path, defaults: RowDefaults) -> Iterator[PredictRow]:
    if path.is_dir():
        return _folder_rows(path, defaults)
    if not path.exists():
        raise UserError(f"--predict {path}: no such file or folder; check the path")
    if path.suffix.lower() == ".jsonl":
        return _jsonl_rows(path, defaults)
    if path.suffix.lower() in AUDIO_SUFFIXES:
        return iter([_audio_row(path.parent, path.name, path.stem, str(path), defaults)])
    raise UserError(
        f"--predict {path}: neither .jsonl nor audio ({' '.join(AUDIO_SUFFIXES)}); rename or convert the file"
    )


def _folder_rows(folder: Path, defaults: RowDefaults) -> Iterator[PredictRow]:
    """The audio files below a folder in the order of their paths, without hidden ones."""
    paths = (path.relative_to(folder) for path in folder.rglob("*"))
    names = sorted(
        path.as_posix()
        for path in paths
        if path.suffix.lower() in AUDIO_SUFFIXES
        and not any(part.startswith(".") for part in path.parts)
        and (folder / path).is_file()
    )
    if not names:
        raise UserError(f"--predict {folder}: the folder holds no audio ({' '.join(AUDIO_SUFFIXES)})")
    return (_audio_row(folder, name, name, str(folder / name), defaults) for name in names)


def _jsonl_rows(path: Path, defaults: RowDefaults) -> Iterator[PredictRow]:
    for place, raw in lines(path):
        try:
            row = decode_row(raw)
        except ValueError as error:
            raise UserError(f"{place.where}: {error}; repair or remove the line") from None
        found = PredictRow(_parse(row, place.where, place.default_id, defaults), path.parent)
        if found.audio and not found.audio.is_file():
            raise UserError(
                f"{place.where}: audio file {found.sample.audio_path!r} does not exist; a relative path starts "
                "from the folder of the JSONL file"
            )
        yield found


def _audio_row(folder: Path, name: str, id_: str, where: str, defaults: RowDefaults) -> PredictRow:
    return PredictRow(_parse({"audio_path": name}, where, id_, defaults), folder)


def _parse(row: Row, where: str, default_id: str, defaults: RowDefaults) -> Sample:
    """The sample of a row, completed by the defaults."""
    row = {
        name: value for name, value in row.items() if name not in ROW_FIELDS or value not in (None, "", [])
    }
    if defaults.language and not row.get("language"):
        row["language"] = defaults.language
    if defaults.question and row.get("audio_path") and not (row.get("question") or row.get("instruction")):
        row["question"] = defaults.question
    name = row.get("task") or defaults.task or _infer_task(row, where).name
    task = get_task(str(name), where)
    if row.get("audio_path") and not task.has_audio and not row.get("task"):
        raise UserError(
            f"{where}: task {task.name} takes no audio; give another --task or leave the file out"
        )
    sample = parse_row({**row, "task": task.name}, where, default_id, needs_target=False)
    if _asks(task) and not sample.prompt.strip() and not defaults.spoken_question:
        raise UserError(
            f"{where}: task {task.name} needs a question; give --question, a 'question' in the row, or "
            "--sqa_question spoken where the audio asks it"
        )
    return sample


def _asks(task: Task) -> bool:
    """Whether a task reads a question."""
    return bool(task.prompt({"question": "?"}))


def _infer_task(row: Row, where: str) -> Task:
    """The one task that a row would have with some target: one that asks where there is a question, and one whose
    target it has where that leaves more than one.
    """
    fits = [t for t in TASKS.values() if any(t.detect({**row, name: "?"}) for name in t.target_fields)]
    fits = [task for task in fits if task.prompt(row).strip()] or fits
    if len(fits) > 1:
        fits = [task for task in fits if task.detect(row)] or fits
    if len(fits) == 1:
        return fits[0]
    names = " and ".join(task.name for task in fits) or "no task"
    raise UserError(
        f"{where}: fields ({', '.join(sorted(row))}) fit {names}; give --task, or a 'task' field in the row"
    )
