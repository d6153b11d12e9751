"""The model's Tekken vocabulary: text to ids and back, without transformers.

Importing this module is cheap; mistral-common is loaded by :meth:`TekkenVocabulary.load`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from voxtral_dist.errors import UserError

if TYPE_CHECKING:
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

FILE_NAME = "tekken.json"


class TekkenVocabulary:
    """A :class:`voxtral_dist.tasks.Vocabulary` over one ``tekken.json``.

    Attributes:
        fingerprint: first 16 hex digits of the SHA-256 of the file's bytes; caches are keyed by it.
    """

    def __init__(self, tekkenizer: Tekkenizer, fingerprint: str) -> None:
        self._tekkenizer = tekkenizer
        self.fingerprint = fingerprint

    @classmethod
    def load(cls, model_id: str) -> TekkenVocabulary:
        """Vocabulary of a local model folder, or of a model on the Hugging Face hub.

        Raises:
            UserError: there is no ``tekken.json`` in the folder or on the hub, or it is not a Tekken file.
        """
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        path = _find(model_id)
        try:
            tekkenizer = Tekkenizer.from_file(path)
        except (ValueError, KeyError, TypeError, AssertionError) as error:
            raise UserError(
                f"{path}: not a Tekken vocabulary ({error}); copy the model's own {FILE_NAME}"
            ) from None
        return cls(tekkenizer, hashlib.sha256(path.read_bytes()).hexdigest()[:16])

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` without any special token; ``[INST]`` and the like are plain text here."""
        return self._tekkenizer.encode(text, bos=False, eos=False)

    def special(self, token: str) -> int:
        """Id of a special token such as ``[INST]``; :class:`ValueError` for an unknown one."""
        return self._tekkenizer.get_special_token(token)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out, everything else kept (also a leading ``lang:xx``)."""
        return self._tekkenizer.decode([int(i) for i in ids])


def _find(model_id: str) -> Path:
    folder = Path(model_id)
    if folder.is_dir():
        if (folder / FILE_NAME).is_file():
            return folder / FILE_NAME
        raise UserError(
            f"--model_id {model_id}: the folder has no {FILE_NAME}; copy it from the original model"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model_id, FILE_NAME))
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"--model_id {model_id}: no local folder, and no {FILE_NAME} on the hub ({reason}); "
            "check the name, or download the model and give its folder"
        ) from None
