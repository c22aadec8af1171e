"""The rewards: what a caption is worth, by its references and by its form.

A reward is a function `(captions, references, rows) -> list[float]`:

    captions    list[str], one for each sample
    references  list[list[str]], those of the sample's image; none is empty
    rows        list[dict], the sample's row of the dataset without the picture: "image_id", "captions", ...

It returns one number for each caption, in their order, the higher the better. What else these functions need is bound
by keyword in `vlmcap.rewards.combined.Rewards`: it is computed once, from the training split, never from a batch.
"""

from functools import lru_cache

import numpy as np

from vlmcap.captioning.constraints import japanese_characters
from vlmcap.evaluation.audit_checks import LOOP, form_faults, normalised
from vlmcap.evaluation.external import chrf as chrf_of
from vlmcap.evaluation.external import chrf_statistics
from vlmcap.evaluation.lexicon import Lexicon, Mention
from vlmcap.evaluation.metrics import MAX_ORDER, CaptionStatistics, DocumentFrequencies, caption_statistics
from vlmcap.evaluation.tokenise import tokenise

# Length of the n-grams whose repetition is counted, as seq-rep-4 of Welleck et al. 2020, "Neural Text Generation with
# Unlikelihood Training".
REPEATED_WORDS = 4


# Against references ------------------------------------------------------------------------------------------------
def cider_d(
    captions: list[str],
    references: list[list[str]],
    rows: list[dict],
    *,
    idf: DocumentFrequencies,
    tokenizer: str = "unidic-lite",
) -> list[float]:
    """CIDEr-D of each caption, 0 to 10, with the document frequencies `idf` (`vlmcap.evaluation.metrics`)."""
    return _statistics(captions, references, tokenizer, idf).cider_d.tolist()


def bleu_4(
    captions: list[str], references: list[list[str]], rows: list[dict], *, tokenizer: str = "unidic-lite"
) -> list[float]:
    """Sentence-level BLEU-4, 0 to 1, with the brevity penalty of the closest reference.

    BLEU (Papineni et al. 2002) is 0 for most single sentences. Smoothed by Lin and Och 2004, "ORANGE": one is added to
    both counts of bigrams and longer n-grams, as sacreBLEU does with `smooth_method="add-k"`, `smooth_value=1`.
    """
    counts = _statistics(captions, references, tokenizer)
    added = np.arange(MAX_ORDER) > 0
    ngrams = counts.guess + added
    precision = np.divide(counts.correct + added, ngrams, out=np.zeros_like(ngrams), where=ngrams > 0)
    length = counts.guess[:, 0]
    brevity = np.exp(np.minimum(0, 1 - counts.reference_length / np.maximum(1, length)))
    return (brevity * precision.prod(1) ** (1 / MAX_ORDER)).tolist()


def chrf(captions: list[str], references: list[list[str]], rows: list[dict]) -> list[float]:
    """chrF2 of each caption, 0 to 1, as in metrics.json (`vlmcap.evaluation.external`): characters, not words."""
    return chrf_of(chrf_statistics(captions, references)).tolist()


def chair(
    captions: list[str],
    references: list[list[str]],
    rows: list[dict],
    *,
    lexicon: Lexicon,
    instances: dict[str, set[str]],
) -> list[float]:
    """Minus the share of things named in a caption that are not in the image, -1 to 0; 0 where it names nothing.

    As chair_i of the audit (Rohrbach et al. 2018): in the image is what a reference names or `instances` lists, image
    id -> categories.
    """
    values = []
    for caption, refs, row in zip(captions, references, rows, strict=True):
        there = instances.get(str(row["image_id"]), set()).union(
            *(mention.categories for reference in refs for mention in _mentions(lexicon, reference))
        )
        named = _mentions(lexicon, caption)
        wrong = sum(there.isdisjoint(mention.categories) for mention in named)
        values.append(-wrong / max(1, len(named)))
    return values


# Form --------------------------------------------------------------------------------------------------------------
def length(
    captions: list[str],
    references: list[list[str]],
    rows: list[dict],
    *,
    band: tuple[int, int],
    tokenizer: str = "unidic-lite",
) -> list[float]:
    """0 where a caption has between `band[0]` and `band[1]` words; else minus the words that are missing or too many
    as a share of that bound, at least -1."""
    low, high = band
    values = []
    for caption in captions:
        words = len(_words(caption, tokenizer))
        bound = min(max(words, low), high)
        values.append(max(-1.0, -abs(words - bound) / bound))
    return values


def japanese(captions: list[str], references: list[list[str]], rows: list[dict]) -> list[float]:
    """Minus the share of characters that `japanese_only` would bar, -1 to 0; -1 for what the audit calls empty, not
    Japanese or marked up with special tokens."""
    allowed = japanese_characters()
    values = []
    for caption in captions:
        if {"empty", "non_japanese", "special_tokens"} & form_faults(caption):
            values.append(-1.0)
        else:
            values.append(-sum(character not in allowed for character in caption.strip()) / len(caption.strip()))
    return values


def repetition(
    captions: list[str], references: list[list[str]], rows: list[dict], *, tokenizer: str = "unidic-lite"
) -> list[float]:
    """Minus the share of 4-grams of words that occurred before in the caption (seq-rep-4), -1 to 0; -1 where the audit
    finds a loop: a character five times in a row, or anything longer three times."""
    values = []
    for caption in captions:
        words = _words(caption, tokenizer)
        ngrams = [tuple(words[i : i + REPEATED_WORDS]) for i in range(len(words) - REPEATED_WORDS + 1)]
        repeated = 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
        values.append(-1.0 if LOOP.search(caption) else -repeated)
    return values


def copy(
    captions: list[str], references: list[list[str]], rows: list[dict], *, trained: frozenset[str]
) -> list[float]:
    """-1 where a caption is verbatim a training caption, else 0; the image's own references do not count.

    `trained` are training captions, `vlmcap.evaluation.audit_checks.normalised`: without spaces, punctuation, width
    and case, as in the audit.
    """
    values = []
    for caption, refs in zip(captions, references, strict=True):
        said = normalised(caption)
        values.append(-1.0 if said in trained and said not in set(map(normalised, refs)) else 0.0)
    return values


# References come again with every sample and in every epoch: each text is analysed once.
@lru_cache(maxsize=1 << 16)
def _words(text: str, tokenizer: str) -> tuple[str, ...]:
    return tuple(tokenise([text], tokenizer)[0])


@lru_cache(maxsize=1 << 16)
def _mentions(lexicon: Lexicon, text: str) -> tuple[Mention, ...]:
    return tuple(lexicon.find(text))


def _statistics(
    captions: list[str], references: list[list[str]], tokenizer: str, idf: DocumentFrequencies | None = None
) -> CaptionStatistics:
    words = [_words(caption, tokenizer) for caption in captions]
    return caption_statistics(words, [[_words(text, tokenizer) for text in refs] for refs in references], idf)
