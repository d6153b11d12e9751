"""Check packed data sets, or say what they hold.

    python tools/verify_shards.py DIR             sizes, markers, manifests, indexes: small files only, fast
    python tools/verify_shards.py DIR --deep      every byte: hashes, tar structure, checksums, every example decoded
    python tools/verify_shards.py DIR --stats     rows, hours, bytes, languages, domains, lengths

DIR is a data set or a folder with data sets anywhere below it. Every fault is one line; any fault is exit code 2.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from voxtral_dist.data_stats import collect, details, table
from voxtral_dist.errors import UserError, run_main
from voxtral_dist.verify import find_data_sets, verify
from voxtral_dist.workers import cores


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, print the faults or the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", metavar="DIR", help="data set, or a folder of data sets")
    parser.add_argument("--deep", action="store_true", help="read every byte, decode every example")
    parser.add_argument("--stats", action="store_true", help="print what the data sets hold; checks nothing")
    parser.add_argument("--workers", type=int, default=cores(), help="processes (default: number of cores)")
    flags = parser.parse_args(argv)
    if flags.deep and flags.stats:
        raise UserError("--deep and --stats are both given; run one after the other")
    if flags.workers < 1:
        raise UserError(f"--workers {flags.workers}: at least 1 is needed")
    folders = find_data_sets(flags.folder)
    if flags.stats:
        stats = [collect(folder) for folder in folders]
        print(table(stats), *map(details, stats), sep="\n")
        return
    _verify(folders, flags.deep, flags.workers)


def _verify(folders: Sequence[Path], deep: bool, workers: int) -> None:
    faults: list[str] = []
    for folder in folders:
        found = verify(folder, deep=deep, workers=workers, progress=deep)
        print(*(" ".join(fault.split()) for fault in found), sep="\n", end="\n" if found else "", flush=True)
        faults += found
    if faults:
        raise UserError(f"{len(faults)} faults in {len(folders)} data sets, the first: {faults[0]}")
    stats = [collect(folder) for folder in folders]
    rows, shards = sum(entry.rows for entry in stats), sum(entry.shards for entry in stats)
    hours = sum(entry.seconds for entry in stats) / 3600
    how = "every byte read" if deep else "small files and sizes; --deep reads every byte"
    print(f"{len(folders)} data sets, {shards} shards, {rows} rows, {hours:.2f} h: no fault ({how})")


if __name__ == "__main__":
    run_main(main)
