"""Packed rows and padded rows give the same losses and gradients, whatever stands together in a row."""

from pathlib import Path

import pytest
import torch
from test_gradient import build, make_examples

from voxtral_dist.batch import MicroBatch


def gradients(
    training: torch.nn.Module, batches: list[MicroBatch]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    training.zero_grad(set_to_none=True)
    sums = torch.zeros(3)
    for batch in batches:
        result = training(batch)
        result.loss.backward()
        sums += result.task_nll
    return sums, {n: p.grad.clone() for n, p in training.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6], [4, 0, 6, 2], [5], [1, 2], [6, 5, 4, 3]])
def test_packed_equals_padded(tiny_model: Path, order: list[int]) -> None:
    training, collator = build(str(tiny_model))
    examples = [make_examples(collator.spec)[i] for i in order]
    packed = collator.train_batch(examples, 0, packed=True)
    assert packed.input_ids.shape == (1, packed.tokens)
    expected = gradients(training, [collator.train_batch(examples, 0)])
    alone = gradients(training, [collator.train_batch([example], 0) for example in examples])
    got = gradients(training, [packed])
    for reference in (expected, alone):
        torch.testing.assert_close(got[0], reference[0], rtol=1e-5, atol=1e-6)
        assert set(got[1]) == set(reference[1])
        for name, gradient in reference[1].items():
            assert float((got[1][name] - gradient).norm()) <= 1e-5 * float(gradient.norm()), name
