"""Pack JSONL and audio files into shards for training and evaluation.

    python tools/build_shards.py --jsonl asr.jsonl,sqa.jsonl --out shards --split train [--model_id MODEL]

The rows of each task become one data set, OUT/<task>/<split>/ (shards/README.md describes it). One call does
everything; run again, it goes on where it was stopped and leaves alone what is unchanged. As a slurm array:

    python tools/build_shards.py ... --slice $SLURM_ARRAY_TASK_ID/16        in each of the tasks 0 to 15
    python tools/build_shards.py ... --finalize                             once they have ended

--check only reads: tasks, keys, audio and the first errors of each file. WebDataset tars that exist already (members
KEY.json and KEY.flac, .wav, .mp3, .ogg or .opus) become a data set where they lie, and are not written to:

    python tools/build_shards.py --index_only DIR --task asr [--split train]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from voxtral_dist.data_stats import collect, table
from voxtral_dist.errors import UserError, run_main
from voxtral_dist.foreign import index_tars
from voxtral_dist.lengths import example_lengths
from voxtral_dist.packing import FileReport, check, pack
from voxtral_dist.row_filter import FILTER_FIELDS, RowFilter
from voxtral_dist.shards import ShardSet
from voxtral_dist.tasks import parse_task_list
from voxtral_dist.tokenizer import TekkenVocabulary
from voxtral_dist.workers import cores


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and run the phases they ask for."""
    flags = _parser().parse_args(argv)
    if flags.index_only:
        folders = _index(flags)
    elif flags.task:
        raise UserError("--task belongs to --index_only; name the tasks of JSONL files with --tasks")
    else:
        folders = _pack(flags)
    if flags.model_id and folders:
        vocabulary = TekkenVocabulary.load(flags.model_id)
        for folder in folders:
            example_lengths(ShardSet.open(folder), vocabulary, progress=True)
    if folders:
        print(table([collect(folder) for folder in folders]))


def _index(flags: argparse.Namespace) -> list[Path]:
    """Index foreign tars; the folder."""
    for name in ("jsonl", "out", "tasks", "where", "slice", "finalize", "check"):
        if getattr(flags, name):
            raise UserError(f"--index_only takes the tars as they are; leave out --{name}")
    if not flags.task:
        raise UserError("--task is missing; say which task the rows of the tars are: asr, sqa or tqa")
    return [
        index_tars(
            flags.index_only,
            flags.task,
            split=flags.split,
            max_reject_rate=flags.max_reject_rate,
            workers=flags.workers,
            progress=True,
        )
    ]


def _pack(flags: argparse.Namespace) -> list[Path]:
    """Check, build or finalize; the folders that are finished."""
    files = _split(flags.jsonl)
    tasks = parse_task_list(_split(flags.tasks), files, "--jsonl")
    if not files:
        raise UserError("--jsonl names no file; give one or more JSONL files separated by commas")
    where = RowFilter(flags.where)
    if flags.check:
        keep = where if flags.where else None
        _report(check([Path(file) for file in files], tasks, progress=True, keep=keep))
        return []
    if not flags.out:
        raise UserError("--out is missing; say where the data sets go, or give --check to only read")
    if flags.slice and flags.finalize:
        raise UserError("--slice and --finalize are both given; run the slices first, then --finalize alone")
    if flags.model_id and not flags.slice:
        TekkenVocabulary.load(flags.model_id)  # a wrong one is told now, not after hours of packing
    folders = pack(
        files,
        flags.out,
        split=flags.split,
        tasks=tasks,
        where=where,
        shard_bytes=int(flags.shard_mb * (1 << 20)),
        slice_=None if flags.finalize else flags.slice or (0, 1),
        finalize=not flags.slice,
        max_reject_rate=flags.max_reject_rate,
        workers=flags.workers,
        progress=True,
    )
    return [] if flags.slice else folders


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--jsonl", default="", help="JSONL files, comma separated")
    add("--out", default="", help="folder of the data sets")
    add("--split", default="train", help="name of the split, e.g. train or dev (default: train)")
    add(
        "--tasks",
        default="",
        help="task of each file (asr, sqa, tqa), comma separated; default: by the rows' keys",
    )
    add(
        "--where",
        default="",
        help="pack only matching rows, e.g. 'domain!=call' or 'language=ko; domain=call,clinic'; fields: "
        f"{', '.join(FILTER_FIELDS)}",
    )
    add(
        "--model_id",
        default="",
        help="model folder or hub id; also counts its tokens, else done on first use",
    )
    add(
        "--slice",
        type=_slice,
        metavar="I/N",
        help="build only shards I, I+N, ... (I from 0), publish nothing",
    )
    add("--finalize", action="store_true", help="build nothing, publish what all slices have built")
    add(
        "--check", action="store_true", help="write nothing; report tasks, keys and first errors of each file"
    )
    add(
        "--max_reject_rate",
        type=_rate,
        default=0.0,
        help="share of bad rows to leave out, 0 to 1 (default: 0)",
    )
    add("--workers", type=_count, default=cores(), help="processes that work at once (default: all cores)")
    add(
        "--index_only", default="", metavar="DIR", help="make the WebDataset tars in DIR a data set, in place"
    )
    add("--task", default="", help="task of the tars of --index_only: asr, sqa or tqa")
    add("--shard_mb", type=_positive, default=256.0, help="aimed size of a shard in MiB (default: 256)")
    return parser


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _slice(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 0 <= I < N")
    return int(index), int(count)


def _rate(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a positive size")
    return value


def _report(reports: Sequence[FileReport]) -> None:
    """Print what each file holds; exit code 2 when any has errors."""
    for report in reports:
        tasks = ", ".join(f"{count} {task}" for task, count in report.rows.items()) or "nothing usable"
        keys = ", ".join(f"{key} ({count})" for key, count in sorted(report.keys.items()))
        print(
            f"{report.path}: {tasks}; {report.seconds / 3600:.2f} h of audio; {report.bad} bad; keys: {keys}"
        )
        for error in report.errors:
            print(f"  {error}")
    first = next((report for report in reports if report.bad), None)
    if first:
        n_bad = sum(report.bad for report in reports)
        raise UserError(f"{first.errors[0]}; {n_bad} bad rows in {len(reports)} files, mend or remove them")


if __name__ == "__main__":
    run_main(main)
