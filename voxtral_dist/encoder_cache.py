"""States of the frozen audio encoder on disk, ``--encoder_cache DIR``: encoded once, read in every later epoch.

    DIR/<fingerprint of the encoder>/<two digits>/<hash of the audio file's bytes>.safetensors

The fingerprint covers weights, sizes, type, and the versions and settings that compute, so that another encoder never
meets these files. What is read is bit for bit what was written. The ranks of a machine share the folder; all its files
together stay within the bound, and once it is full nothing more is added: every epoch reads everything, so that
replacing one file by another would only cost writes. A file that is damaged is removed, and its audio encoded again.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load, save

from voxtral_dist.atomic import write_bytes
from voxtral_dist.errors import UserError
from voxtral_dist.logger import get_logger

log = get_logger(__name__)

GB = 10**9

COUNTED_AGAIN = 64
"""Files that a rank adds before it counts what the others have added; near the bound it counts for every file."""

WAITING = 64
"""Files that may wait to be written; more are left to the next epoch."""


def fingerprint(tower: torch.nn.Module, config: Any, settings: Mapping[str, Any]) -> str:
    """SHA-256, hex, of what decides an encoder's states.

    Args:
        tower: the audio encoder.
        config: its ``VoxtralEncoderConfig``.
        settings: what else rounds them one way or another, such as the kind of device.
    """
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "log_mel": 1}
    sizes = {name: getattr(config, name) for name in ("hidden_size", "num_attention_heads", "num_mel_bins")}
    found = hashlib.sha256(json.dumps(versions | sizes | dict(settings), sort_keys=True).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def audio_key(data: bytes) -> str:
    """Name of an audio file's states: BLAKE2b of its bytes, hex."""
    return hashlib.blake2b(data, digest_size=20).hexdigest()


class EncoderCache:
    """The states of one encoder. Safe to share between threads.

    Args:
        folder: ``--encoder_cache``.
        bound: most bytes of all files in it, those of other encoders included.
        encoder: its :func:`fingerprint`.
        writers: processes of this machine that add to the folder, this one included.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: Path, bound: int, encoder: str, writers: int = 1) -> None:
        self.folder, self.bound, self._own = folder, bound, folder / encoder
        self._writers = writers
        try:
            self._own.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--encoder_cache {folder} cannot be used: {error.strerror}; name another folder"
            ) from error
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="encoder-cache")
        self._room, self._full = threading.Semaphore(WAITING), False
        self._bytes, self._added = self._count(), 0

    def get(self, key: str, chunks: int) -> torch.Tensor | None:
        """The states [chunks, encoder positions, encoder width] of an audio file, None where they are not there.

        Args:
            key: its :func:`audio_key`.
            chunks: how many it must have.
        """
        path = self._path(key)
        try:
            states = load(path.read_bytes())["states"]
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError) as error:
            log.warning("%s cannot be read (%s); its audio is encoded again", path, error)
            path.unlink(missing_ok=True)
            return None
        return states if len(states) == chunks else None

    def put(self, keys: Sequence[tuple[str, int]], states: torch.Tensor) -> None:
        """Write states in the background, as far as there is room.

        Args:
            keys: :func:`audio_key` and number of chunks of each file, in the order of ``states``; files without a key
                are left out.
            states: [all chunks, encoder positions, encoder width].
        """
        if self._full:
            return
        parts = states.detach().cpu().split([chunks for _, chunks in keys])
        for (key, _), part in zip(keys, parts, strict=True):
            if key and self._room.acquire(blocking=False):
                self._writer.submit(self._write, key, part.clone()).add_done_callback(
                    lambda _: self._room.release()
                )

    def close(self) -> None:
        """Wait until everything is written."""
        self._writer.shutdown()

    def _write(self, key: str, states: torch.Tensor) -> None:
        data, path = save({"states": states.contiguous()}), self._path(key)
        if self._full or path.exists():
            return
        all_at_once = self._writers * len(data)
        near = self._bytes + COUNTED_AGAIN * all_at_once > self.bound
        if near or self._added % COUNTED_AGAIN == COUNTED_AGAIN - 1:
            self._bytes = self._count()
        if self._bytes + all_at_once > self.bound:
            self._stop(f"holds {self._bytes / GB:.1f} GB, all that --encoder_cache_gb allows")
            return
        try:
            path.parent.mkdir(exist_ok=True)
            write_bytes(path, data)
        except OSError as error:
            self._stop(f"cannot be written ({error.strerror})")
            return
        self._bytes += len(data)
        self._added += 1

    def _stop(self, why: str) -> None:
        self._full = True
        log.warning("--encoder_cache %s %s; the rest is encoded in every epoch", self.folder, why)

    def _count(self) -> int:
        """Bytes of all files in the folder."""
        total = 0
        for path in self.folder.glob("*/*/*.safetensors"):
            try:
                total += path.stat().st_size
            except FileNotFoundError:  # removed by another rank
                continue
        return total

    def _path(self, key: str) -> Path:
        return self._own / key[:2] / f"{key}.safetensors"
