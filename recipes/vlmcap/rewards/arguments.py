"""Which rewards a run trains on. Imports nothing heavy: command lines are read with it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from vlmcap.errors import UserError

# Weights of the functions of vlmcap.rewards.functions where `reward_weights` is left out. One that weighs nothing can
# be chosen by name. The study in recipes/vlmcap/rewards/README.md chose them.
DEFAULT_WEIGHTS = {
    "cider_d": 1.0,
    "bleu_4": 0.0,
    "chrf": 0.0,
    "length": 1.0,
    "chair": 1.0,
    "japanese": 1.0,
    "repetition": 1.0,
    "copy": 0.0,
}
REWARDS = tuple(DEFAULT_WEIGHTS)


class RewardError(UserError):
    """A reward cannot be used or failed. The message names the function and, where one is meant, image and value."""


@dataclass
class RewardArguments:
    """What captions are rewarded for; `reward_weights` is a field of TRL's GRPOConfig."""

    reward_funcs: list[str] = field(
        default_factory=lambda: [name for name, weight in DEFAULT_WEIGHTS.items() if weight],
        metadata={
            "help": f"Rewards, summed by reward_weights: {', '.join(REWARDS)}, or a function of yours as"
            " my_module:my_reward or folder/file.py:my_reward (recipes/vlmcap/rewards/README.md)."
        },
    )
    reward_instances: list[str] | None = field(
        default=None,
        metadata={
            "help": "COCO's instances_*.json of the training and validation images, for the reward chair; without"
            " them the references alone say what is in an image."
        },
    )


def weights_of(names: Sequence[str], weights: Sequence[float] | None) -> list[float]:
    """The weight of each reward: those given, else the default, and 1 for a function of the user.

    Raises:
        RewardError: there is no such reward, one occurs twice, or the weights are too few, too many, not finite or
            all 0.
    """
    if not names:
        raise RewardError(f"reward_funcs is empty: name at least one of {', '.join(REWARDS)}")
    for name in names:
        if name not in REWARDS and ":" not in name:
            raise RewardError(
                f"reward_funcs: there is no reward {name!r}. Choose from {', '.join(REWARDS)}, or name a function of"
                " yours as my_module:my_reward or folder/file.py:my_reward"
            )
        if list(names).count(name) > 1:
            raise RewardError(f"reward_funcs: {name} occurs twice. Name it once and raise its weight.")
    if weights is None:
        weights = [DEFAULT_WEIGHTS.get(name) or 1.0 for name in names]
    if len(weights) != len(names):
        raise RewardError(
            f"reward_weights has {len(weights)} numbers for the {len(names)} rewards {', '.join(names)}: give one for"
            " each, in this order"
        )
    for name, weight in zip(names, weights, strict=True):
        if not math.isfinite(weight):
            raise RewardError(f"reward_weights: the weight of {name} is {weight}: it must be a finite number")
    if not any(weights):
        raise RewardError(f"reward_weights: all are 0, so that no caption is better than another: {list(weights)}")
    return list(map(float, weights))
