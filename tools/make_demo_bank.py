"""Speak the demo's word bank with espeak-ng: ``python tools/make_demo_bank.py [OUT]``

Only needed to remake ``shards/demo/bank``, which is part of the repository and is used as it is: nothing else
here needs espeak-ng. Each of the 20 words (0 to 9 in Korean and in English) is spoken by 5 voices at 2 speeds
and becomes one mono 16 kHz 16-bit FLAC clip ``<language>_<digit>_<voice>_<speed>.flac``, silence trimmed.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from voxtral_dist.errors import UserError, run_main

BANK = Path(__file__).resolve().parent.parent / "shards" / "demo" / "bank"
SAMPLE_RATE = 16_000
SILENCE = 0.01  # of full scale; espeak-ng peaks near 0.5
FRAME = SAMPLE_RATE // 200  # 5 ms: the grid of the trimming, and the margin it leaves at both ends
MAX_SECONDS = 0.58  # three words and two gaps of 100 ms stay under the 2-s chunk of the demo's model

WORDS: dict[str, Any] = {
    "languages": {
        "ko": {"espeak_voice": "ko", "words": "영 일 이 삼 사 오 육 칠 팔 구".split()},
        "en": {
            "espeak_voice": "en-us",
            "words": "zero one two three four five six seven eight nine".split(),
        },
    },
    "voices": {"v1": "", "v2": "+f2", "v3": "+m3", "v4": "+f5", "v5": "+m7"},
    "unseen_voice": "v5",
    "speeds": {"s1": 175, "s2": 215},
    "sample_rate": SAMPLE_RATE,
    "command": "espeak-ng -v {espeak_voice}{voice} -s {speed} --stdout {word}",
    "processing": f"soxr HQ to {SAMPLE_RATE} Hz, trimmed to the first and last sample above {SILENCE} of full "
    "scale with a margin of 5 to 10 ms, 16-bit FLAC",
    "licence": "Synthetic speech made for this repository, distributed under its licence (Apache-2.0). "
    "espeak-ng itself is GPL-3.0-or-later; the sound a program makes is not a derived work of the program, "
    "and no part of espeak-ng is contained here.",
}


def espeak_version() -> str:
    """The first line of ``espeak-ng --version`` up to the data path; :class:`UserError` without espeak-ng."""
    if shutil.which("espeak-ng") is None:
        raise UserError(
            "espeak-ng is not installed, so the bank cannot be remade; the clips in shards/demo/bank are ready "
            "to use without it (to remake them: apt-get install espeak-ng)"
        )
    text = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True, check=True).stdout
    return text.split("  ")[0].strip()


def speak(word: str, voice: str, speed: int) -> np.ndarray:
    """``word`` as espeak-ng says it: (samples,) float32 at 16 kHz, untrimmed. ``speed`` in words per minute."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "--stdout", word]
    wav = subprocess.run(command, capture_output=True, check=True).stdout
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    return np.asarray(soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ"), dtype=np.float32)


def trim(samples: np.ndarray) -> np.ndarray:
    """``samples`` without the silence before and after the word; (samples,) to (fewer samples,)."""
    loud = np.flatnonzero(np.abs(samples) > SILENCE) // FRAME
    return samples[max(0, loud[0] - 1) * FRAME : (loud[-1] + 2) * FRAME]


def make_bank(out: Path) -> int:
    """Write all clips and ``words.json`` into ``out``; returns the number of clips.

    Raises:
        UserError: espeak-ng is missing, or a clip is longer than the demo allows.
    """
    version = espeak_version()
    out.mkdir(parents=True, exist_ok=True)
    spoken = [
        (f"{language}_{digit}_{voice}_{speed}", word, entry["espeak_voice"] + variant, rate)
        for language, entry in WORDS["languages"].items()
        for digit, word in enumerate(entry["words"])
        for (voice, variant), (speed, rate) in product(WORDS["voices"].items(), WORDS["speeds"].items())
    ]
    for name, word, voice, rate in spoken:
        clip = trim(speak(word, voice, rate))
        if len(clip) > MAX_SECONDS * SAMPLE_RATE:
            raise UserError(
                f"{name} lasts {len(clip) / SAMPLE_RATE:.2f} s, over {MAX_SECONDS} s; raise the speed"
            )
        soundfile.write(out / f"{name}.flac", clip, SAMPLE_RATE, subtype="PCM_16")
    words = {**WORDS, "made_with": version}
    (out / "words.json").write_text(json.dumps(words, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return len(spoken)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "out", nargs="?", type=Path, default=BANK, help="folder of the bank (default: %(default)s)"
    )
    out = parser.parse_args().out
    print(f"{make_bank(out)} clips in {out}")


if __name__ == "__main__":
    run_main(main)
