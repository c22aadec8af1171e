"""What a reward does not say of captions, beside it: a score can rise while captions get worse."""

from collections import defaultdict

from vlmcap.evaluation.audit_checks import hallucination
from vlmcap.evaluation.lexicon import Lexicon
from vlmcap.evaluation.tokenise import tokenise

# By how much a share must be worse than at the start to be told from chance: 3 of 60 captions, 15 of 300.
MARGIN = 0.05
LABELS = {
    "chair_s": "captions with a thing that is not in the image (CHAIRs)",
    "chair_i": "mentions of such things (CHAIRi)",
    "distinct": "distinct captions",
}


def caption_figures(
    captions: dict[str, str],
    references: dict[str, list[str]],
    lexicon: Lexicon,
    instances: dict[str, set[str]],
    tokenizer: str = "unidic-lite",
) -> dict[str, float]:
    """Figures of one caption an image, as the audit has them.

    Args:
        captions, references: image id -> caption, captions, of the same images.
        instances: image id -> categories, {} without annotations.

    Returns:
        `chair_s`, the share of captions with a thing that is not in the image; `chair_i`, the share of such mentions,
        0 without any mention; `distinct`, the share of captions that are different; `words`, the mean length.
    """
    found = hallucination(captions, references, instances, lexicon, defaultdict(list))
    words = tokenise(captions.values(), tokenizer)
    return {
        **{key: float(sum(found[key].count) / max(1, sum(found[key].of))) for key in ("chair_s", "chair_i")},
        "distinct": len(set(captions.values())) / len(captions),
        "words": sum(map(len, words)) / len(words),
    }


def warning(before: dict[str, float], now: dict[str, float]) -> str | None:
    """What to print when the held-out reward rose while CHAIR or diversity became worse by more than MARGIN.

    Args:
        before, now: `caption_figures` and "reward", at the start of the run and now.
    """
    if now["reward"] <= before["reward"]:
        return None
    rise = {"chair_s": 1, "chair_i": 1, "distinct": -1}
    worse = [
        f"{LABELS[key]} {before[key]:.1%} -> {now[key]:.1%}"
        for key, sign in rise.items()
        if sign * (now[key] - before[key]) > MARGIN
    ]
    if not worse:
        return None
    return (
        f"The reward rose ({before['reward']:.3f} -> {now['reward']:.3f}) while captions became worse:"
        f" {'; '.join(worse)}. The model may be exploiting the reward: raise the weight of chair, raise beta, lower"
        " the learning rate, or stop earlier."
    )
