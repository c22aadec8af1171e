"""The four checks of an audit: things that are not there, words about persons, broken form, copied captions.

Each returns its part of audit.json, with a `Rate` for every rate, and appends its reasons to `flagged`, image id ->
reasons.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from tqdm.auto import tqdm

from vlmcap.captioning.arguments import FORM
from vlmcap.captioning.constraints import japanese_characters
from vlmcap.data.picture_files import is_picture_file, open_picture
from vlmcap.evaluation.audit_document import OVERLAP, AuditError, read_object
from vlmcap.evaluation.lexicon import Lexicon, analyse
from vlmcap.evaluation.tokenise import LANGUAGE_TOKENIZERS, tokenise
from vlmcap.strict_parsing import shown

# Languages, by ISO 639-1, whose captions are written in Latin letters.
LATIN = ("en", "vi")
# A caption repeats when this many words occur twice, in this order.
REPEATED_WORDS = 5
# A caption copies the prompt when it holds this many of its characters in a row, or all of a shorter prompt.
COPIED_CHARACTERS = 15
# The same in languages that are written with letters, which are shorter than characters of Japanese.
COPIED_LETTERS = 30
# Kanji alone, without any kana, are Chinese when there are so many. Human captions have up to five.
KANJI_ALONE = 8
# One character five times in a row, or anything longer three times. Without the bound, which is longer than captions
# are, the search takes the square of the length of a text.
LOOP = re.compile(r"(.)\1{4}|(.{2,400})\2\2", re.S)
MARKUP = re.compile(
    r"<\|[^|>]{1,40}\|>|</?(?:s|unk|pad|bos|eos|image|img|start_of_turn|end_of_turn|end_of_utterance)>|\[/?INST\]"
    r"|^\s*(?:assistant|user|system|ユーザー|アシスタント)\s*[:：\n]|###|USER:|ASSISTANT:",
    re.I,
)


class Rate(NamedTuple):
    """Counts of each image, (images,): a rate is the sum of the one over the sum of the other."""

    count: Sequence[float]
    of: Sequence[float]


# Things ------------------------------------------------------------------------------------------------------------
def read_instances(paths: Iterable[str | Path], lexicon: Lexicon, image_ids: Iterable[str]) -> dict[str, set[str]]:
    """Image id -> categories annotated in it, of `image_ids`, from COCO's instances_*.json files.

    Raises AuditError on a file that is not one, on an annotation of an unknown category, and when the files lack a
    category of the lexicon or one of the images.
    """
    objects: dict[str, set[str]] = {}
    for path in map(Path, paths):
        names, listed = _annotated(path)
        unknown = [category for category in lexicon.categories if category not in names]
        if unknown:
            raise AuditError(
                f"{path}: {len(unknown)} categories of {lexicon.name} are not annotated in it "
                f"({', '.join(unknown[:5])}): every mention of them would count as hallucinated. Choose the lexicon "
                "of these annotations."
            )
        for image_id, found in listed.items():
            objects.setdefault(image_id, set()).update(found)
    missing = [image_id for image_id in image_ids if image_id not in objects]
    if missing:
        raise AuditError(
            f"{len(missing):,} images are in no instance annotations ({', '.join(missing[:5])}): images of COCO's "
            "train2014 are in instances_train2014.json, those of val2014 (Karpathy's val and test) in "
            "instances_val2014.json"
        )
    return {image_id: objects[image_id] for image_id in image_ids}


def _annotated(path: Path) -> tuple[set[str], dict[str, set[str]]]:
    """Names of the categories, and image id -> categories of its annotations, of one file."""
    document = read_object(path, "the annotations")
    try:
        names = {category["id"]: category["name"] for category in document["categories"]}
        for name in names.values():
            if not isinstance(name, str):
                raise TypeError(f"a category is named {shown(name)}")
        listed: dict[str, set[str]] = {str(image["id"]): set() for image in document["images"]}
        for annotation in document["annotations"]:
            listed[str(annotation["image_id"])].add(names[annotation["category_id"]])
    except (KeyError, TypeError, AttributeError) as error:
        raise AuditError(
            f"{path}: not COCO's instance annotations ({type(error).__name__}: {error}). Give instances_*.json, not "
            "captions_*.json."
        ) from error
    return set(names.values()), listed


def hallucination(
    predictions: dict[str, str],
    references: dict[str, list[str]] | None,
    instances: dict[str, set[str]],
    lexicon: Lexicon,
    flagged: dict[str, list[str]],
) -> dict:
    objects = {image_id: set(instances.get(image_id, ())) for image_id in predictions}
    for image_id, captions in (references or {}).items():
        for caption in captions:
            objects[image_id].update(*(mention.categories for mention in lexicon.find(caption)))
    details, categories, words = {}, {}, Counter()
    for image_id, caption in predictions.items():
        there = objects[image_id]
        mentions = lexicon.find(caption)
        wrong = [mention for mention in mentions if there.isdisjoint(mention.categories)]
        for mention in mentions:
            row = categories.setdefault("/".join(mention.categories), {"mentions": 0, "hallucinated": 0})
            row["mentions"] += 1
            row["hallucinated"] += mention in wrong
        words.update(mention.word for mention in wrong)
        if wrong:
            flagged[image_id].append("hallucination")
        said = {category for mention in mentions for category in mention.categories}
        details[image_id] = {
            "mentioned": [mention.word for mention in mentions],
            "hallucinated": [mention.word for mention in wrong],
            "objects": sorted(there),
            "covered": sorted(said & there),
        }

    def counts(key: str) -> np.ndarray:
        return np.array([len(detail[key]) for detail in details.values()])

    every = np.ones(len(details))
    return {
        "objects_from": ["instances"] * bool(instances) + ["references"] * bool(references),
        "chair_s": Rate(counts("hallucinated") > 0, every),
        "chair_i": Rate(counts("hallucinated"), counts("mentioned")),
        "coverage": Rate(counts("covered"), counts("objects")),
        "captions_with_objects": Rate(counts("mentioned") > 0, every),
        "mentions_per_caption": float(counts("mentioned").mean()),
        "categories": dict(
            sorted(categories.items(), key=lambda item: (-item[1]["hallucinated"], -item[1]["mentions"]))
        ),
        "hallucinated_words": dict(words.most_common(50)),
        "per_image": details,
    }


# Persons -----------------------------------------------------------------------------------------------------------
def _gender(named: set[str]) -> str:
    return {0: "none", 1: "female", 2: "male", 3: "both"}[("female" in named) + 2 * ("male" in named)]


def persons(
    predictions: dict[str, str],
    references: dict[str, list[str]] | None,
    lexicon: Lexicon,
    flagged: dict[str, list[str]],
) -> dict:
    said = {image_id: lexicon.named(caption) for image_id, caption in predictions.items()}
    every = np.ones(len(said))
    groups: dict = {
        group: {
            category: {"predictions": Rate([category in named for named in said.values()], every)}
            for category in categories
        }
        for group, categories in lexicon.groups.items()
    }
    if references is None:
        return {"groups": groups}

    borne = {image_id: [lexicon.named(caption) for caption in references[image_id]] for image_id in said}
    known = {image_id: set().union(*sets) for image_id, sets in borne.items()}
    of_references = [len(sets) for sets in borne.values()]
    for group, categories in groups.items():
        for category, rates in categories.items():
            rates["references"] = Rate(
                [sum(category in named for named in sets) for sets in borne.values()], of_references
            )
            named = np.array([category in named for named in said.values()])
            rates["unsupported"] = Rate(named & [category not in known[image_id] for image_id in said], named)
        for image_id, named in said.items():
            if group != "gender" and not known[image_id].issuperset(named.intersection(categories)):
                flagged[image_id].append(f"persons: {group}")

    return {"groups": groups, "gender": _genders(said, borne, flagged)}


def _genders(
    said: dict[str, set[str]], borne: dict[str, list[set[str]]], flagged: dict[str, list[str]]
) -> dict[str, Rate | dict]:
    """How the gender that a caption says agrees with that of its references.

    Args:
        said: image id -> categories that the caption names.
        borne: image id -> categories that each reference names.
    """
    genders = ("female", "male", "both", "none")
    table = {reference: dict.fromkeys(genders, 0) for reference in genders}
    one, other, silent, none, added = [], [], [], [], []
    for image_id, named in said.items():
        reference, prediction = _gender(set().union(*borne[image_id])), _gender(named)
        table[reference][prediction] += 1
        one.append(reference in ("female", "male"))
        other.append(one[-1] and prediction in {"female", "male"} - {reference})
        silent.append(one[-1] and prediction == "none")
        none.append(reference == "none")
        added.append(none[-1] and prediction != "none")
        if other[-1]:
            flagged[image_id].append("gender_mismatch")
        if added[-1]:
            flagged[image_id].append("gender_unsupported")
    return {
        "error": Rate(other, one),
        "unsupported": Rate(added, none),
        "left_out": Rate(silent, one),
        "female_to_male": {
            "predictions": _female_to_male(said.values()),
            "references": _female_to_male(named for sets in borne.values() for named in sets),
        },
        "references_by_predictions": table,
    }


def _female_to_male(captions: Iterable[set[str]]) -> float | None:
    counts = Counter(map(_gender, captions))
    return counts["female"] / counts["male"] if counts["male"] else None


# Form --------------------------------------------------------------------------------------------------------------
def form_of(language: str) -> tuple[str, ...]:
    """What `form_faults` can find in captions of a language: FORM, with another script to expect."""
    if language == "ja":
        return FORM
    script = ("non_latin",) if language in LATIN else ()
    return tuple(found for fault in FORM for found in (script if fault == "non_japanese" else (fault,)))


def form_faults(
    caption: str,
    prompt: str = "",
    tokens: int | None = None,
    max_new_tokens: int | None = None,
    language: str = "ja",
) -> set[str]:
    """Which of `form_of(language)` are wrong with a caption.

    Args:
        prompt: what was asked, for captions that repeat it.
        tokens, max_new_tokens: length of the caption in the model's tokens, and where it was cut. Without them only
            the end says whether a caption is cut off: a comma, an open bracket; in Japanese a particle, an unfinished
            verb.
        language: an ISO 639-1 code.
    """
    text = unicodedata.normalize("NFKC", caption).strip()
    faults = set()
    if MARKUP.search(text):
        faults.add("special_tokens")
        text = MARKUP.sub(" ", text).strip()
    if not any(character.isalnum() for character in text):
        return faults | {"empty"}
    words = _words(text, language)
    ngrams = [tuple(words[i : i + REPEATED_WORDS]) for i in range(len(words) - REPEATED_WORDS + 1)]
    if len(set(ngrams)) < len(ngrams) or LOOP.search(text):
        faults.add("repetition")
    japanese = language == "ja"
    if japanese and _is_foreign(text):
        faults.add("non_japanese")
    elif language in LATIN and _is_not_latin(text):
        faults.add("non_latin")
    elif _is_cut_off(text) or japanese and _lacks_an_end(text):
        faults.add("truncated")
    if tokens is not None and max_new_tokens is not None and tokens >= max_new_tokens:
        faults.add("truncated")
    asked = unicodedata.normalize("NFKC", prompt).strip()
    if asked and _shares(text, asked, min(len(asked), COPIED_CHARACTERS if japanese else COPIED_LETTERS)):
        faults.add("copied_prompt")
    return faults


def _words(text: str, language: str) -> list[str]:
    if language == "ja":
        return [token.surface for token in analyse(text)]
    return tokenise([text], LANGUAGE_TOKENIZERS.get(language, "none"))[0]


def _is_not_latin(text: str) -> bool:
    """Most letters are not Latin."""
    letters = [character for character in text if character.isalpha()]
    latin = sum(unicodedata.name(character, "").startswith("LATIN") for character in letters)
    return latin * 2 < len(letters)


def _is_foreign(text: str) -> bool:
    """Most letters are not Japanese, a kanji is not one of Japan's, or there are many kanji without any kana."""
    letters = [character for character in text if character.isalpha()]
    japanese = [character for character in letters if character in japanese_characters()]
    kana = [character for character in japanese if "ぁ" <= character <= "ヿ"]
    kanji = [character for character in letters if "\u4e00" <= character <= "\u9fff"]
    return (
        len(japanese) * 2 < len(letters)
        or any(character not in japanese_characters() for character in kanji)
        or (not kana and len(kanji) >= KANJI_ALONE)
    )


def _is_cut_off(text: str) -> bool:
    if "\ufffd" in text or any(text.count(a) > text.count(b) for a, b in ("「」", "『』", "()", "【】")):
        return True
    return text[-1] in ",、・"


def _lacks_an_end(text: str) -> bool:
    """The last word of a Japanese caption ends no sentence."""
    if not text[-1].isalnum():  # 。 ! ? and closing brackets end a sentence
        return False
    last = analyse(text)[-1]
    if last.pos == "助詞":
        return last.kind not in ("終助詞", "副助詞")
    if last.pos in ("動詞", "形容詞", "助動詞"):
        return last.form.startswith(("連用形", "未然形", "仮定形", "語幹"))
    return last.pos in ("接頭辞", "連体詞", "接続詞")


def _shares(text: str, prompt: str, length: int) -> bool:
    return any(prompt[i : i + length] in text for i in range(len(prompt) - length + 1))


def form(
    predictions: dict[str, str],
    record: dict,
    count_tokens: Callable[[str], int] | None,
    flagged: dict[str, list[str]],
    language: str = "ja",
) -> dict:
    limit, prompt = record.get("decoding", {}).get("max_new_tokens"), record.get("prompt") or ""
    found, possible = [], form_of(language)
    for image_id, caption in predictions.items():
        tokens = count_tokens(caption) if count_tokens else None
        faults = form_faults(caption, prompt, tokens, limit, language)
        flagged[image_id].extend(fault for fault in possible if fault in faults)
        found.append(faults)
    every = np.ones(len(found))
    rates: dict = {fault: Rate([fault in faults for faults in found], every) for fault in possible}
    words = [_words(caption, language) for caption in predictions.values()]
    for size in (2, 3, 4):
        ngrams = [[tuple(row[i : i + size]) for i in range(len(row) - size + 1)] for row in words]
        rates[f"repeated_{size}grams"] = Rate(
            [len(row) - len(set(row)) for row in ngrams], [len(row) for row in ngrams]
        )
    return rates | {
        "compared_with_max_new_tokens": bool(count_tokens and limit),
        "compared_with_prompt": bool(prompt),
    }


# Training and test -------------------------------------------------------------------------------------------------
def normalised(caption: str) -> str:
    """Without spaces, punctuation, width and case: what is left is the words of a caption."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", caption).lower()))


def picture_hashes(rows: datasets.Dataset, desc: str) -> Iterator[tuple[str, str]]:
    """(image id, SHA-256 of the file) of every picture that is there."""
    for row in tqdm(rows.select_columns(["image_id", "image"]), desc=desc, unit="picture"):
        cell = row["image"]
        if cell["bytes"] is not None:
            yield str(row["image_id"]), hashlib.sha256(cell["bytes"]).hexdigest()
        elif is_picture_file(cell["path"]):
            with open_picture(cell["path"]) as file:
                yield str(row["image_id"]), hashlib.file_digest(file, "sha256").hexdigest()


def overlap(
    predictions: dict[str, str],
    references: dict[str, list[str]] | None,
    train_rows: datasets.Dataset,
    test_rows: datasets.Dataset | None,
    flagged: dict[str, list[str]],
) -> dict:
    every = np.ones(len(predictions))
    train_ids = set(map(str, train_rows["image_id"]))
    trained = {normalised(caption) for captions in train_rows["captions"] for caption in captions} - {""}
    shared = [image_id in train_ids for image_id in predictions]
    copied = [normalised(caption) in trained for caption in predictions.values()]
    overlap: dict = {
        "training_images": len(train_rows),
        "training_captions": sum(map(len, train_rows["captions"])),
        "image_in_training": Rate(shared, every),
        "training_caption": Rate(copied, every),
    }
    if references:
        overlap["references_in_training"] = Rate(
            [sum(normalised(caption) in trained for caption in captions) for captions in references.values()],
            [len(captions) for captions in references.values()],
        )
    same = [False] * len(predictions)
    if test_rows is not None and "image" in train_rows.column_names and "image" in test_rows.column_names:
        seen = {digest for _, digest in picture_hashes(train_rows, "hashing training pictures")}
        tested = dict(picture_hashes(test_rows, "hashing test pictures"))
        same = [tested.get(image_id) in seen for image_id in predictions]
        overlap["picture_in_training"] = Rate(same, [image_id in tested for image_id in predictions])
    for image_id, *reasons in zip(predictions, shared, same, copied, strict=True):
        flagged[image_id].extend(reason for reason, holds in zip(OVERLAP, reasons, strict=True) if holds)
    return overlap
