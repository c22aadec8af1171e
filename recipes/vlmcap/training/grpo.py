"""GRPO's advantages and losses, as TRL 1.16 has them (tests/invariants/test_grpo.py compares every gradient).

Shao et al. 2024 (arXiv 2402.03300): a caption is better or worse than the others sampled for the same image, and its
tokens become more or less likely by that, as far as a clipped ratio allows. `dr_grpo` is Liu et al. 2025
(arXiv 2503.20783), `dapo` Yu et al. 2025 (arXiv 2503.14476): they differ in what the sum over tokens is divided by.
"""

import torch

from vlmcap.training.policy import caption_sums
from vlmcap.training.shared_prefix import PREFIX

STD_EPSILON = 1e-4  # added to the standard deviation of the rewards, as in TRL


def advantages_of(rewards: torch.Tensor, scale_rewards: str, all_rewards: torch.Tensor) -> torch.Tensor:
    """How much better each sample is than the others of its image.

    Args:
        rewards: float32, (images, samples).
        scale_rewards: group, batch or none: divided by the standard deviation within an image, of `all_rewards`, or
            by nothing.
        all_rewards: of the whole step, all processes.

    Returns:
        float32, (images, samples); 0 where all samples of an image score alike.
    """
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale_rewards == "group":
        advantages = advantages / (rewards.std(1, keepdim=True) + STD_EPSILON)
    elif scale_rewards == "batch":
        advantages = advantages / (all_rewards.std() + STD_EPSILON)
    return advantages


def score_alike(rewards: torch.Tensor) -> torch.Tensor:
    """Whether all samples of an image have one reward, and so no gradient: bool, (images,); rewards as above."""
    spread = rewards.std(1)
    return torch.isclose(spread, torch.zeros_like(spread))


def grpo_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    reference_log_probs: torch.Tensor | None,
    batch: dict,
    args,
    *,
    accumulated: int,
    tokens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a shared-prefix batch of samples.

    Args:
        log_probs, old_log_probs, reference_log_probs: float32, (B, W), as `caption_log_probs` returns them: of the
            model that learns, of the model that drew the samples, of the start (None without beta).
        batch: the shared-prefix batch, with advantages (float32, (B, samples)) and trained (bool, (B, W)): the tokens
            that count.
        args: CaptionGRPOConfig.
        accumulated: batches of an optimizer step.
        tokens: those that count in the whole step, a process.

    Returns:
        The loss, a share of the step's; and sums over the tokens that count: their number, KL divergence, clipped
        below, clipped above, float32, (4,).
    """
    samples, trained = batch["advantages"].shape[1], batch["trained"]
    branches = batch["segments"][:, batch["caption_start"] :] - (PREFIX + 1)
    advantages = batch["advantages"].gather(1, branches.clamp(min=0))
    low, high = args.epsilon, args.epsilon if args.epsilon_high is None else args.epsilon_high
    ratio = (log_probs - old_log_probs).exp()
    losses = -torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    divergence = torch.zeros_like(losses)
    if reference_log_probs is not None:
        above = reference_log_probs - log_probs
        divergence = above.exp() - above - 1  # Schulman's unbiased estimate of low variance
        if args.use_bias_correction_kl:
            divergence = divergence * ratio
        losses = losses + args.beta * divergence
    losses = losses * trained
    if args.loss_type == "grpo":
        lengths = caption_sums(trained, batch, samples).clamp(min=1)
        loss = (caption_sums(losses, batch, samples) / lengths).mean() / accumulated
    elif args.loss_type == "dr_grpo":
        loss = losses.sum() / (len(losses) * samples * args.max_completion_length * accumulated)
    else:
        loss = losses.sum() / tokens.clamp(min=1)
    clipped_low = (ratio < 1 - low) & (advantages < 0)
    clipped_high = (ratio > 1 + high) & (advantages > 0)
    counted = [torch.ones_like(losses), divergence, clipped_low, clipped_high]
    return loss, torch.stack([(values * trained).sum() for values in counted]).detach()
