"""The rewards of a run: built from the training split, checked with every batch, summed by weights."""

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from numbers import Real
from pathlib import Path

import datasets
import numpy as np

from vlmcap.captioning.arguments import PromptArguments
from vlmcap.data.images import references_of
from vlmcap.data.keys import parse_key, rows_of_key
from vlmcap.evaluation.audit_checks import normalised, read_instances
from vlmcap.evaluation.lexicon import Lexicon
from vlmcap.evaluation.metrics import document_frequencies
from vlmcap.evaluation.scoring import save_idf
from vlmcap.evaluation.tasks import folder_name
from vlmcap.evaluation.tokenise import tokenise, tokenizer_of
from vlmcap.rewards import functions
from vlmcap.rewards.arguments import RewardError, weights_of
from vlmcap.strict_parsing import shown

Reward = Callable[[list[str], list[list[str]], list[dict]], list[float]]
# Of the training captions' lengths in words: shorter and longer ones are outside of the band.
BAND_PERCENTILES = (5, 95)


@dataclass(frozen=True)
class Rewarded:
    """per_function: (samples, functions) float64, as the functions returned them; total: (samples,), weighted sums."""

    per_function: np.ndarray
    total: np.ndarray


class Rewards:
    """The rewards of a run.

    Attributes:
        names, weights: of the functions, in the order of the columns of `Rewarded.per_function`.
        idf, band: document frequencies of the training captions; bounds of their lengths in words.
    """

    def __init__(
        self,
        reward_funcs: Sequence[str],
        reward_weights: Sequence[float] | None,
        train_rows: datasets.Dataset,
        *,
        lexicon: str = "coco_ja",
        instances: Sequence[str] | None = None,
        image_ids: Sequence[str] | None = None,
        tokenizer: str = "unidic-lite",
        idf_path: str | Path | None = None,
        language: str = "ja",
    ):
        """Reads all that the functions need; 566,000 captions take about a minute.

        Args:
            reward_funcs, reward_weights: as `weights_of` takes them.
            train_rows: rows of `load_captions`, of the training split.
            lexicon, instances: for `chair`, as in `write_audit`.
            image_ids: images that will be rewarded, which `instances` must list; those of train_rows by default.
            tokenizer: words of all functions.
            idf_path: where to write the document frequencies, for `eval_captioning.py --idf`.
            language: of the captions; `japanese` is 0 in another one.

        Raises:
            RewardError: no such reward, weights that do not fit, a function that cannot be imported.
            AuditError, LexiconError: instances or lexicon cannot be read.
        """
        self.weights = weights_of(reward_funcs, reward_weights)
        self.names = list(reward_funcs)
        references = references_of(train_rows)
        tokens = iter(tokenise(chain.from_iterable(references.values()), tokenizer))
        words = [[next(tokens) for _ in captions] for captions in references.values()]
        self.idf = document_frequencies(words)
        lengths = [len(text) for text in chain.from_iterable(words) if text]
        low, high = np.percentile(lengths, BAND_PERCENTILES, method="nearest") if lengths else (1, 1)
        self.band = (int(low), int(high))
        if idf_path:
            save_idf(self.idf, idf_path, tokenizer)
        captions = chain.from_iterable(references.values())

        things = Lexicon(lexicon)
        objects = read_instances(instances, things, image_ids or references) if instances else {}
        built_in = {
            "cider_d": partial(functions.cider_d, idf=self.idf, tokenizer=tokenizer),
            "bleu_4": partial(functions.bleu_4, tokenizer=tokenizer),
            "chrf": functions.chrf,
            "length": partial(functions.length, band=self.band, tokenizer=tokenizer),
            "chair": partial(functions.chair, lexicon=things, instances=objects),
            "japanese": functions.japanese if language == "ja" else lambda captions, *_: [0.0] * len(captions),
            "repetition": partial(functions.repetition, tokenizer=tokenizer),
            "copy": partial(functions.copy, trained=frozenset(map(normalised, captions)) - {""}),
        }
        self._functions = [built_in[name] if name in built_in else imported(name) for name in self.names]

    def __call__(self, captions: list[str], references: list[list[str]], rows: list[dict]) -> Rewarded:
        """Rewards of samples; `references` and `rows` are repeated for the samples of one image.

        Raises:
            RewardError: an image has no references; a function raised, or returned something else than one finite
                number for each caption.
        """
        for refs, row in zip(references, rows, strict=True):
            if not refs:
                raise RewardError(f"image {row['image_id']} has no references, so its captions cannot be rewarded")
        values = [
            _values(name, function, captions, references, rows)
            for name, function in zip(self.names, self._functions, strict=True)
        ]
        per_function = np.array(values, dtype=np.float64).reshape(len(self.names), len(captions)).T
        return Rewarded(per_function, per_function @ np.array(self.weights))


class RewardsByKey:
    """The rewards of captions of several keys: each caption by those of its row's key, with the words and document
    frequencies of its language.

    Args:
        by_key: key -> Rewards, of the same functions.

    Attributes:
        names, weights: as those of `Rewards`.
    """

    def __init__(self, by_key: dict[str, Rewards]):
        self.by_key = by_key
        first = next(iter(by_key.values()))
        self.names, self.weights = first.names, first.weights

    def __call__(self, captions: list[str], references: list[list[str]], rows: list[dict]) -> Rewarded:
        """As that of `Rewards`; rows have a `key`."""
        per_function = np.zeros((len(captions), len(self.names)))
        for key, rewards in self.by_key.items():
            places = [place for place, row in enumerate(rows) if row["key"] == key]
            if places:
                of_key = ([values[place] for place in places] for values in (captions, references, rows))
                per_function[places] = rewards(*of_key).per_function
        return Rewarded(per_function, per_function @ np.array(self.weights))


def rewards_of_run(
    reward_funcs: Sequence[str],
    reward_weights: Sequence[float] | None,
    train_rows: datasets.Dataset,
    prompts: PromptArguments,
    *,
    tokenizer: str,
    idf_dir: Path | None,
    **more,
) -> Rewards | RewardsByKey:
    """The rewards of a run with one prompt, or with a prompt for each key.

    Args:
        tokenizer: of Japanese captions, and of a run with one prompt.
        idf_dir: where to write idf.json, with keys idf-KEY.json.
        more: of `Rewards`.
    """

    def built(rows: datasets.Dataset, words: str, name: str, language: str = "ja") -> Rewards:
        path = idf_dir and idf_dir / f"{name}.json"
        return Rewards(reward_funcs, reward_weights, rows, tokenizer=words, idf_path=path, language=language, **more)

    if not prompts.prompts:
        return built(train_rows, tokenizer, "idf")
    by_key = {}
    for key in prompts.wordings:
        rows, (language, _) = rows_of_key(train_rows, key, list(prompts.wordings)), parse_key(key)
        by_key[key] = built(rows, tokenizer_of(language, tokenizer), f"idf-{folder_name(key)}", language)
    return RewardsByKey(by_key)


def imported(name: str) -> Reward:
    """The function `my_module:my_reward`, or `folder/file.py:my_reward`.

    Raises:
        RewardError: there is no such file, module or function, or its import fails.
    """
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    # The user's module may raise anything.
    except Exception as error:
        raise RewardError(
            f"reward_funcs: {name} cannot be imported ({type(error).__name__}: {error}). Name a file"
            " (folder/file.py:my_reward), or a module that Python finds (PYTHONPATH)."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise RewardError(f"reward_funcs: {place} has no function {attribute!r}")
    return function


def _values(
    name: str, function: Reward, captions: list[str], references: list[list[str]], rows: list[dict]
) -> list[float]:
    try:
        returned = function(captions, references, rows)
    # A function of the user may raise anything.
    except Exception as error:
        raise RewardError(
            f"the reward {name} raised {type(error).__name__}: {error}, for "
            f"{_where_it_fails(function, captions, references, rows)}"
        ) from error
    try:
        values = list(returned)
    except TypeError as error:
        raise RewardError(
            f"the reward {name} returned {shown(returned)} for {_samples(captions, rows)}: it must return a list with"
            " one number for each caption"
        ) from error
    if len(values) != len(captions):
        raise RewardError(
            f"the reward {name} returned {len(values)} values, {shown(values)}, for {len(captions)} captions:"
            f" {_samples(captions, rows)}"
        )
    for value, caption, row in zip(values, captions, rows, strict=True):
        if not isinstance(value, Real) or not math.isfinite(value):
            raise RewardError(
                f"the reward {name} returned {shown(value)} for {_samples([caption], [row])}: it must be a finite"
                " number, as float(x) makes it"
            )
    return values


def _where_it_fails(function: Reward, captions: list[str], references: list[list[str]], rows: list[dict]) -> str:
    """The first sample for which the function raises when it gets no other; all of them if it then does not."""
    for sample in zip(captions, references, rows, strict=True):
        try:
            function(*([part] for part in sample))
        except Exception:
            return _samples([sample[0]], [sample[2]])
    return _samples(captions, rows)


def _samples(captions: list[str], rows: list[dict]) -> str:
    named = [f"image {row['image_id']}, {shown(caption)}" for caption, row in zip(captions, rows, strict=True)]
    return "; ".join(named[:3]) + ("; ..." if len(named) > 3 else "")
