"""One example of one task, as every layer above the JSONL files sees it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sample:
    """A row of a manifest after validation.

    Attributes:
        id: the user's own id, or ``<file stem>:<line>`` when the row has none.
        task: name of an entry of :data:`voxtral_dist.tasks.TASKS`.
        prompt: the written question or instruction; empty where the task has none.
        references: accepted targets, the first one is trained on; empty when only predicting.
        language: ISO 639-1 code in lower case, or "" when unknown.
        domain: kept for analysis, "" when absent.
        speaker: kept for analysis, "" when absent; rows of one speaker are resampled together in significance tests.
        document: the call, article or recording the row belongs to, "" when absent; where there is no speaker its
            rows are resampled together.
        audio_path: where the audio came from, "" for text tasks.
        source: ``file:line`` the row was read from, for messages.
    """

    id: str
    task: str
    prompt: str
    references: tuple[str, ...]
    language: str = ""
    domain: str = ""
    speaker: str = ""
    document: str = ""
    audio_path: str = ""
    source: str = ""

    @property
    def target(self) -> str:
        """The text that training teaches: the first reference, "" without one."""
        return self.references[0] if self.references else ""
