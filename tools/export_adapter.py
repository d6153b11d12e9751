"""Export a run for use elsewhere, with a model card: proved equal to the run's own model before it is put into place.

    python tools/export_adapter.py runs/quickstart --format merged --out exports/merged

RUN is a run directory, a checkpoint or an adapter folder. The formats:

    adapter    for peft under transformers 5.10 or later; the smallest, beside the base model
    merged     a Hugging Face folder with the trained weights in it, for any transformers with Voxtral
    mistral    consolidated.safetensors, params.json, tekken.json: what vLLM serves
    vllm-lora  an adapter that vLLM serves beside its base; only of the language model, no DoRA

The merge is computed in float32, one weight after the other. The proof loads the model in float32 on the CPU: 19 GB of
memory for Voxtral-Mini, 97 GB for Voxtral-Small. Called again on a finished export it says so and does nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from voxtral_dist.errors import run_main
from voxtral_dist.export import DTYPES, FORMATS, export
from voxtral_dist.export_source import find_source


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, export, say what was proved."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory, checkpoint or adapter folder")
    parser.add_argument("--format", required=True, choices=list(FORMATS), dest="kind")
    parser.add_argument("--out", required=True, type=Path, help="the new folder")
    parser.add_argument(
        "--checkpoint", default="", help="of a run: best, last or step-N (default: best, else last)"
    )
    parser.add_argument(
        "--dtype", default="", choices=list(DTYPES), help="of merged weights (default: the base's)"
    )
    parser.add_argument("--model_id", default="", help="base model (default: the one on record)")
    flags = parser.parse_args(argv)
    source = find_source(flags.run, flags.checkpoint, flags.model_id)
    proof = export(source, flags.kind, flags.out, flags.dtype)
    if proof is None:
        print(f"{flags.out} already holds this export; nothing was done")
        return
    print(
        f"written: {flags.out} ({flags.kind}); logits of {proof.prompts} prompts differ from the run's by at most "
        f"{proof.largest_difference:.2g}, training changed them by up to {proof.largest_change:.2g}; "
        f"{proof.equal_answers} of {proof.prompts} greedy answers are equal"
    )


if __name__ == "__main__":
    run_main(main)
