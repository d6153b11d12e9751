"""Show what an evaluation gets wrong: one page to read, one JSON file to compute with.

    python tools/analyze_errors.py RUN                       its best evaluation, or its last
    python tools/analyze_errors.py RUN/eval/step-00000500    any folder with predictions.jsonl
    python tools/analyze_errors.py EVALUATION --out DIR --samples 50 --val_shards DIR,DIR

Writes errors.html and errors.json into the evaluation's folder or --out: worst rows beside random ones, with their
sound; the most frequent edits; scores by length, speaking rate, speaker and so on; loops, wrong scripts and other
failures; texts that are nearly right but for a number or a negation. Nothing is decoded again and no GPU is used. The
sound comes from --val_shards, or from the dev sets that the run was evaluated on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from voxtral_dist import dev_sound, error_analysis, error_page, predictions
from voxtral_dist.atomic import write_json
from voxtral_dist.errors import UserError, run_main


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, write the two files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "evaluation", metavar="RUN|EVALUATION", help="a run, or a folder with predictions.jsonl"
    )
    parser.add_argument(
        "--out", default="", metavar="DIR", help="folder for the files (default: the evaluation's)"
    )
    parser.add_argument("--samples", type=int, default=30, help="rows in each list (default: 30)")
    parser.add_argument(
        "--val_shards",
        default="",
        metavar="DIR,DIR",
        help="data sets with the sound (default: those of the run)",
    )
    flags = parser.parse_args(argv)
    if flags.samples < 1:
        raise UserError(f"--samples {flags.samples}: at least 1 row is needed")
    if flags.out and Path(flags.out).exists() and not Path(flags.out).is_dir():
        raise UserError(f"--out {flags.out} is no folder; name the folder that errors.html goes to")
    result = predictions.load(Path(flags.evaluation))
    sound = dev_sound.find(result.folder, flags.val_shards)
    analysis = error_analysis.analyze(result, flags.samples)
    out = Path(flags.out or result.folder)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "errors.json", analysis, private=True)
    error_page.write(analysis, out / "errors.html", sound)
    print(
        *(f"warning: {line}" for line in analysis["warnings"]),
        f"written: {out}/errors.html, errors.json",
        sep="\n",
    )


if __name__ == "__main__":
    run_main(main)
