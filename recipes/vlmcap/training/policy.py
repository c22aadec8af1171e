"""Captions under a model that is trained on rewards or preferences: the log-probability of each token of a
shared-prefix batch, and the same under the weights that training started from."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from vlmcap.training.loss import chunks
from vlmcap.training.shared_prefix import PREFIX, caption_logits


def token_log_probs(
    logits: torch.Tensor, sources: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """log p(`labels[i]`) under `logits[sources[i]] / temperature`.

    The gradient, (onehot(label) - softmax) / temperature, is written down rather than recorded: beside the logits
    there is one tensor of their size and dtype, and float32 for `loss.CHUNK_NUMBERS` of them at a time.

    Args:
        logits: (N, V), any float dtype; computed in float32 (float64 stays).
        sources: (M,) int64 in [0, N): the row that predicts each label. Several labels may share a row.
        labels: (M,) int64, -100 for what is not asked.
        temperature: of the samples; the log-probabilities are those of the distribution they were drawn from, as in
            TRL (top_k and top_p are left aside there too).

    Returns:
        (M,) float32 (float64 for float64 logits), 0 where the label is -100.
    """
    return _TokenLogProbs.apply(logits, sources, labels, temperature)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, sources, labels, temperature):
        dtype = torch.promote_types(logits.dtype, torch.float32)
        lse = logits.new_empty(len(logits), dtype=dtype)
        for rows in chunks(logits):
            lse[rows] = (logits[rows].to(dtype) / temperature).logsumexp(1)
        kept = (labels != -100).to(dtype)
        labels = labels.clamp(min=0)
        ctx.save_for_backward(logits, lse, sources, labels, kept)
        ctx.temperature = temperature
        return (logits[sources, labels].to(dtype) / temperature - lse[sources]) * kept

    @staticmethod
    def backward(ctx, grad_output):
        logits, lse, sources, labels, kept = ctx.saved_tensors
        weights = kept * grad_output / ctx.temperature
        row_weights = torch.zeros_like(lse).index_add_(0, sources, weights)
        grad = torch.empty_like(logits)
        for rows in chunks(logits):
            softmax = (logits[rows].to(lse.dtype) / ctx.temperature - lse[rows, None]).exp_()
            grad[rows] = (softmax * -row_weights[rows, None]).to(grad.dtype)
        grad.index_put_((sources, labels), weights.to(grad.dtype), accumulate=True)
        return grad, None, None, None


def caption_log_probs(model: nn.Module, batch: dict, attention: str, temperature: float = 1.0) -> torch.Tensor:
    """The log-probability of every caption token of a shared-prefix batch, in one forward.

    Args:
        model: of `MODEL_TYPES`, perhaps wrapped.
        batch: as `SharedPrefixCollator` returns it; it is left as it is.
        attention: implementation of the model's attention, `config.get_text_config()._attn_implementation`.

    Returns:
        float32, (B, L - caption_start), 0 outside of the captions.
    """
    outputs, sources, labels = caption_logits(model, batch, attention)
    values = token_log_probs(outputs.logits.flatten(0, 1), sources, labels, temperature)
    return values.view(len(batch["labels"]), -1)


def caption_sums(values: torch.Tensor, batch: dict, captions: int) -> torch.Tensor:
    """Sums over the tokens of each caption.

    Args:
        values: (B, L - caption_start), of the tokens of `batch`, a shared-prefix batch.
        captions: of an image at most, K.

    Returns:
        (B, K), in the order in which the captions were laid out; 0 for an image that has fewer.
    """
    segments = batch["segments"][:, batch["caption_start"] :]
    numbers = PREFIX + 1 + torch.arange(captions, device=segments.device)
    return (values[:, :, None] * (segments[:, :, None] == numbers)).sum(1)


class StartWeights:
    """The trained weights as they are when this is made, to which a model can be set back for a forward.

    The frozen weights are shared, so that a reference costs as much memory as the trained weights alone: LoRA and
    projector. To be made before a checkpoint is loaded: it is not part of one, the starting adapter is.
    """

    def __init__(self, model: nn.Module):
        self.weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    @contextmanager
    def used_by(self, model: nn.Module) -> Iterator[None]:
        """Within it, `model` (that of `__init__`, not a wrapper of it) has the weights of the start.

        Not between a forward and its backward: what autograd keeps of a weight is the parameter itself.
        """
        trained = {name: parameter for name, parameter in model.named_parameters() if name in self.weights}
        now = {name: parameter.data for name, parameter in trained.items()}
        try:
            for name, parameter in trained.items():
                parameter.data = self.weights[name]
            yield
        finally:
            for name, parameter in trained.items():
                parameter.data = now[name]
