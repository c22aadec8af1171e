"""The closed-form loss: transformers' definition, its gradient, shared rows, chunks, memory."""

import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother

from vlmcap.training import loss
from vlmcap.training.loss import smoothed_cross_entropy


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_is_the_label_smoother_of_transformers(epsilon):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 7, 50, requires_grad=True), torch.randint(0, 50, (2, 7))
    labels[0, :3] = -100
    expected = LabelSmoother(epsilon=epsilon)({"logits": logits}, labels)
    (gradient,) = torch.autograd.grad(expected, logits)
    count = (labels != -100).sum()
    ours = smoothed_cross_entropy(logits.flatten(0, 1), torch.arange(14), labels.flatten(), epsilon) / count
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, logits)[0], gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 33, 10**6])
def test_gradient_with_shared_rows(monkeypatch, epsilon, chunk):
    """Rows that predict several labels, or none; in chunks of any size."""
    monkeypatch.setattr(loss, "CHUNK_NUMBERS", chunk)
    torch.manual_seed(0)
    logits = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    sources, labels = torch.tensor([0, 0, 0, 2, 3, 4]), torch.tensor([1, 1, 7, -100, 0, 10])
    assert torch.autograd.gradcheck(lambda z: smoothed_cross_entropy(z, sources, labels, epsilon), logits)
    one_by_one = smoothed_cross_entropy(logits[sources], torch.arange(6), labels, epsilon)
    torch.testing.assert_close(smoothed_cross_entropy(logits, sources, labels, epsilon), one_by_one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    torch.manual_seed(0)
    logits = (torch.randn(6, 5000) * 4).to(dtype)
    sources, labels = torch.arange(6), torch.randint(0, 5000, (6,))
    half, full = logits.clone().requires_grad_(), logits.float().requires_grad_()
    ours, exact = (smoothed_cross_entropy(z, sources, labels, 0.1) for z in (half, full))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=0)
    ours.backward()
    exact.backward()
    assert half.grad.dtype == dtype
    torch.testing.assert_close(half.grad.float(), full.grad, rtol=1e-2, atol=1e-6)
