"""Make one page about a run: scores, curves, mixture, speed, energy, examples, troubles, settings.

    python tools/report_run.py runs/quickstart                        writes runs/quickstart/report.html
    python tools/report_run.py runs/quickstart --out /tmp/run.html    elsewhere, without links to the run's files

Open it in a browser: it is one file that loads nothing. Training writes the same page at its end; call this for a run
that goes on, was stopped, or was evaluated since. The page shows transcripts unless the run is private.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from voxtral_dist.errors import UserError, run_main
from voxtral_dist.run_report import write_report


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, write the page, say where it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--out", type=Path, help="the page (default: RUN/report.html)")
    flags = parser.parse_args(argv)
    if flags.out is not None and (flags.out.is_dir() or not flags.out.parent.is_dir()):
        raise UserError(f"--out {flags.out}: a file in a folder that exists is needed")
    print(f"written: {write_report(flags.run, flags.out)}")


if __name__ == "__main__":
    run_main(main)
