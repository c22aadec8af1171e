"""Label-smoothed cross-entropy over caption positions alone, in closed form, forward and backward."""

import torch

CHUNK_NUMBERS = 2**24  # logits worked on at once in float32: 64 MiB


def smoothed_cross_entropy(
    logits: torch.Tensor, sources: torch.Tensor, labels: torch.Tensor, epsilon: float = 0.0
) -> torch.Tensor:
    """Sum of the label-smoothed cross-entropy of `labels[i]` under `logits[sources[i]]`.

    (1 - eps) * -log p(label) + eps * mean over the vocabulary of -log p, the definition of transformers' LabelSmoother
    (Szegedy et al. 2016, section 7), written with one log-sum-exp: lse - (1 - eps) * z[label] - eps * mean(z). The
    gradient, softmax - (1 - eps) * onehot(label) - eps / V, is written down rather than recorded: beside the logits
    there is one tensor of their size and dtype, and float32 for `CHUNK_NUMBERS` of them at a time.

    Args:
        logits: (N, V), any float dtype; computed in float32 (float64 stays).
        sources: (M,) int64 in [0, N): the row that predicts each label. Several labels may share a row.
        labels: (M,) int64, -100 where no loss is taken.
        epsilon: smoothing, 0 for plain cross-entropy.

    Returns:
        Scalar, float32 (float64 for float64 logits).
    """
    return _SmoothedCrossEntropy.apply(logits, sources, labels, epsilon)


class _SmoothedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, sources, labels, epsilon):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        lse = logits.new_empty(len(logits), dtype=dtype)
        mean = torch.zeros_like(lse)
        for rows in chunks(logits):
            numbers = logits[rows].to(dtype)
            lse[rows] = numbers.logsumexp(1)
            if epsilon:
                mean[rows] = numbers.mean(1)
        kept = (labels != -100).to(dtype)
        labels = labels.clamp(min=0)
        losses = lse[sources] - (1 - epsilon) * logits[sources, labels].to(dtype) - epsilon * mean[sources]
        ctx.save_for_backward(logits, lse, sources, labels, kept)
        ctx.epsilon = epsilon
        return (losses * kept).sum()

    @staticmethod
    def backward(ctx, grad_output):
        logits, lse, sources, labels, kept = ctx.saved_tensors
        kept = kept * grad_output
        weight = torch.zeros_like(lse).index_add_(0, sources, kept)
        grad = torch.empty_like(logits)
        for rows in chunks(logits):
            softmax = (logits[rows].to(lse.dtype) - lse[rows, None]).exp_()
            grad[rows] = ((softmax - ctx.epsilon / logits.shape[1]) * weight[rows, None]).to(grad.dtype)
        grad.index_put_((sources, labels), (-(1 - ctx.epsilon) * kept).to(grad.dtype), accumulate=True)
        return grad, None, None, None


def chunks(logits: torch.Tensor) -> list[slice]:
    """Rows of (N, V) logits, `CHUNK_NUMBERS` numbers or one row at a time."""
    size = max(1, CHUNK_NUMBERS // logits.shape[1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]
