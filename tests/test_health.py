"""When too many examples cannot be read, the run ends; a few, or a small share, are only counted."""

from __future__ import annotations

import pytest

from voxtral_dist.errors import BadSamplesError
from voxtral_dist.health import BAD_SAMPLES_GRACE, check_samples


@pytest.mark.parametrize(("bad", "seen"), [(0, 0), (BAD_SAMPLES_GRACE, 10), (10, 10_000), (100, 10_000)])
def test_few_unreadable_examples_are_borne(bad: int, seen: int) -> None:
    check_samples(bad, seen)


@pytest.mark.parametrize(("bad", "seen"), [(11, 12), (101, 10_000)])
def test_too_many_end_the_run_with_77(bad: int, seen: int) -> None:
    with pytest.raises(BadSamplesError, match=f"{bad} of {seen} examples could not be read") as caught:
        check_samples(bad, seen)
    assert caught.value.exit_code == 77
