"""Compare evaluations of the same samples: is the second better than the first, and could that be chance?

    python tools/compare_runs.py A B                         runs: of each its best evaluation, or its last
    python tools/compare_runs.py A/eval/step-00000000 A      any folder with predictions.jsonl
    python tools/compare_runs.py A B C --out DIR             A is the baseline; all p-values are corrected together

Prints the verdicts and writes comparison.html and comparison.json into --out. Nothing is decoded again and no GPU is
used. The sound of the shown samples comes from --val_shards, or from the dev sets that A was evaluated on.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from voxtral_dist import dev_sound, predictions, report
from voxtral_dist.comparison import compare, write_page
from voxtral_dist.errors import UserError, run_main


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, print the verdicts, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("baseline", metavar="A", help="run or evaluation folder")
    parser.add_argument("others", metavar="B", nargs="+", help="what is compared with it")
    parser.add_argument(
        "--out", default="comparison", metavar="DIR", help="folder for the page (default: comparison)"
    )
    parser.add_argument(
        "--trials", type=int, default=10_000, help="resamples of each interval and test (10000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the resamples (0)")
    parser.add_argument("--val_shards", default="", metavar="DIR,DIR", help="data sets with the sound")
    flags = parser.parse_args(argv)
    if flags.trials < 1 or flags.seed < 0:
        raise UserError(
            f"--trials {flags.trials} --seed {flags.seed}: at least 1 trial and a seed from 0 are needed"
        )
    results = [predictions.load(Path(name)) for name in (flags.baseline, *flags.others)]
    comparison = compare(results, trials=flags.trials, seed=flags.seed)
    print(_table(comparison))
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    sound = dev_sound.find(results[0].folder, flags.val_shards)
    write_page(comparison, out / "comparison.html", audio=sound)
    print(f"\nwritten: {out}/comparison.html, comparison.json", flush=True)


HEADER = ("task", "metric", "A", "B", "B - A", "95 % interval", "p, Holm", "verdict")


def _table(comparison: Mapping[str, Any]) -> str:
    """One line per task and metric, for each result that is compared with the baseline."""
    parts = []
    for other in comparison["against"]:
        rows = [_cells(row) for row in other["rows"]]
        rows.append(
            _cells({"task": "all", "metric": "macro", "p_holm": None, "verdict": "", **other["macro"]})
        )
        parts.append(f"A: {comparison['results'][0]}   B: {other['name']}\n{report.table(HEADER, rows)}")
    notes = {
        row["warning"]: None for other in comparison["against"] for row in other["rows"] if row["warning"]
    }
    return "\n\n".join([*parts, *(f"note: {note}" for note in notes)])


def _cells(row: Mapping[str, Any]) -> list[str]:
    ends = [row["difference"], row["low"], row["high"]]
    difference, low, high = ("n/a" if end is None else f"{end:+.4f}" for end in ends)
    p = "" if row["p_holm"] is None else report.number(row["p_holm"])
    values = [report.number(row["a"]), report.number(row["b"])]
    return [row["task"], row["metric"], *values, difference, f"{low} to {high}", p, row["verdict"]]


if __name__ == "__main__":
    run_main(main)
