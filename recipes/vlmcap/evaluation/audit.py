"""What scores do not say of captions: things not there, words about persons, broken form, copied captions.

One document, audit.json, beside metrics.json. Every rate in it is {"rate", "interval", "count", "of"}: count / of,
with a 95% bootstrap interval over images; null where there is nothing to count. `flagged` says which captions are
meant.

    hallucination   as CHAIR (Rohrbach et al. 2018, "Object Hallucination in Image Captioning"), in Japanese: chair_s
                    is the share of captions with a thing that is not in the image, chair_i the share of such mentions
                    among all mentions. In the image is what COCO's instance annotations or a reference say. The words
                    are lexicons/coco_ja.yaml: figures do not compare with those of English CHAIR, only with audits of
                    the same lexicon and the same `objects_from`.
    persons         how often captions name gender, age, origin, looks ..., and whether references agree.
                    Gender as in "Women also Snowboard" (Hendricks et al. 2018): error is the other gender than the
                    references', female_to_male the ratio to compare with that of the references.
    form            empty, repeating, cut off, not Japanese, copied from the prompt, special tokens
    overlap         images, pictures and captions that training and test share; captions that are training captions
"""

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from tqdm.auto import tqdm

from vlmcap import provenance
from vlmcap.atomic_write import write_atomically
from vlmcap.captioning.arguments import FORM, HELD_BACK
from vlmcap.captioning.constraints import japanese_characters
from vlmcap.data.picture_files import is_picture_file, open_picture
from vlmcap.errors import UserError
from vlmcap.evaluation.bootstrap import LEVEL, interval, resampled_scores
from vlmcap.evaluation.caption_files import read_entries, read_predictions
from vlmcap.evaluation.lexicon import Lexicon, analyse
from vlmcap.strict_parsing import parse_json, shown

RESAMPLES, SEED = 1000, 0
# A caption repeats when this many words occur twice, in this order.
REPEATED_WORDS = 5
# A caption copies the prompt when it holds this many of its characters in a row, or all of a shorter prompt.
COPIED_CHARACTERS = 15
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
OVERLAP = ("image_in_training", "picture_in_training", "training_caption")


class AuditError(UserError):
    """Captions cannot be audited as asked; the message names the file and the fix."""


class Rate(NamedTuple):
    """Counts of each image, (images,): a rate is the sum of the one over the sum of the other."""

    count: Sequence[float]
    of: Sequence[float]


def write_audit(
    predictions_path: str | Path,
    references: dict[str, list[str]] | None,
    output: str | Path,
    lexicon: str = "coco_ja",
    persons: str = "persons_ja",
    instances: Sequence[str | Path] = (),
    train_rows: datasets.Dataset | None = None,
    test_rows: datasets.Dataset | None = None,
    count_tokens: Callable[[str], int] | None = None,
    base: dict | None = None,
) -> dict:
    """Audits a predictions file and writes audit.json; returns what was written.

    Args:
        predictions_path: as `read_predictions` takes it; the run record beside it gives prompt and max_new_tokens.
        references: image id -> captions of every predicted image; without them persons and objects are not compared.
        lexicon: things; persons: words about persons. Names of shipped lexicons or YAML files.
        instances: COCO instance annotations whose images hold all predicted ones, and whose categories hold all of
            the lexicon's. Without them the references alone say what is in an image.
        train_rows, test_rows: what the model was trained on and is tested on, with image_id and captions; pictures are
            compared when both have the column `image`. Without train_rows there is no `overlap`.
        count_tokens: length of a caption in the model's tokens, to find those cut at max_new_tokens.
        base: the audit of the base model on the same images, for the card; goes in without its details.

    Raises:
        AuditError: images without references or annotations, or an annotation file that is not COCO's.
        LexiconError, ScoreError: a lexicon or the predictions cannot be read.
    """
    predictions = read_predictions(predictions_path)
    if not predictions:
        raise AuditError(f"{predictions_path}: holds no caption")
    record_path = Path(predictions_path).with_suffix(".run.json")
    record = _read_object(record_path, "the run record") if record_path.exists() else {}
    if not isinstance(record.get("prompt"), str | None) or not isinstance(record.get("decoding", {}), dict):
        raise AuditError(f"{record_path}: no run record, whose prompt is a text or null and whose decoding an object")
    if references is not None:
        missing = [image_id for image_id in predictions if not references.get(image_id)]
        if missing:
            raise AuditError(
                f"{len(missing):,} predicted images have no references ({', '.join(missing[:5])}): give those of the "
                "split that the captions were made for"
            )
        references = {image_id: references[image_id] for image_id in predictions}
    things, about_persons = Lexicon(lexicon), Lexicon(persons)
    flagged: dict[str, list[str]] = {image_id: [] for image_id in predictions}

    document: dict = {
        "counts": {"images": len(predictions), "references": sum(map(len, (references or {}).values()))},
    }
    if references or instances:
        objects = read_instances(instances, things, predictions) if instances else {}
        document["hallucination"] = _hallucination(predictions, references, objects, things, flagged)
    document["persons"] = _persons(predictions, references, about_persons, flagged)
    document["form"] = _form(predictions, record, count_tokens, flagged)
    if train_rows is not None:
        document["overlap"] = _overlap(predictions, references, train_rows, test_rows, flagged)
    _resolve(document)
    document["flagged"] = {image_id: reasons for image_id, reasons in flagged.items() if reasons}
    document["settings"] = {
        "lexicon": {"name": things.name, "sha256": things.sha256, "words": things.words()},
        "persons": {"name": about_persons.name, "sha256": about_persons.sha256, "words": about_persons.words()},
        "instances": [Path(path).name for path in instances],
        "repeated_words": REPEATED_WORDS,
        "copied_characters": COPIED_CHARACTERS,
        "kanji_alone": KANJI_ALONE,
        "bootstrap": {"resamples": RESAMPLES, "seed": SEED, "level": LEVEL},
    }
    document |= {key: record[key] for key in ("model", "dataset", "prompt", "decoding") if key in record}
    document |= {
        "versions": provenance.versions(),
        "commit": provenance.git_commit(),
        "created": provenance.now(),
    }
    if base:
        document["base"] = {key: value for key, value in base.items() if key not in ("flagged", "base")}
        if "hallucination" in base:
            things_said = {key: value for key, value in base["hallucination"].items() if key != "per_image"}
            document["base"]["hallucination"] = things_said
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, json.dumps(document, ensure_ascii=False, indent=2) + "\n")
    return document


def _resolve(document: dict) -> None:
    """Replaces every Rate by {"rate", "interval", "count", "of"}, all from the same resamples."""
    places: list[tuple[dict, str]] = []

    def collect(node: dict) -> None:
        for key, value in node.items():
            if isinstance(value, Rate):
                places.append((node, key))
            elif isinstance(value, dict):
                collect(value)

    collect(document)
    columns = {}
    for number, (node, key) in enumerate(places):
        columns[f"{number}/count"], columns[f"{number}/of"] = (np.asarray(c, dtype=np.float64) for c in node[key])
    resampled = resampled_scores(columns, RESAMPLES, SEED)
    for number, (node, key) in enumerate(places):
        count, of = columns[f"{number}/count"].sum(), columns[f"{number}/of"].sum()
        drawn = resampled[f"{number}/of"] > 0  # a resample may hold none of what is counted
        ratios = resampled[f"{number}/count"][drawn] / resampled[f"{number}/of"][drawn]
        node[key] = {
            "rate": float(count / of) if of else None,
            "interval": interval(ratios) if of else None,
            "count": int(count),
            "of": int(of),
        }


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
    document = _read_object(path, "the annotations")
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


def _hallucination(
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


def _persons(
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

    genders = ("female", "male", "both", "none")
    table = {reference: dict.fromkeys(genders, 0) for reference in genders}
    one, other, silent, none, added = [], [], [], [], []
    for image_id, named in said.items():
        reference, prediction = _gender(known[image_id]), _gender(named)
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

    def ratio(captions: Iterable[set[str]]) -> float | None:
        counts = Counter(_gender(named) for named in captions)
        return counts["female"] / counts["male"] if counts["male"] else None

    return {
        "groups": groups,
        "gender": {
            "error": Rate(other, one),
            "unsupported": Rate(added, none),
            "left_out": Rate(silent, one),
            "female_to_male": {
                "predictions": ratio(said.values()),
                "references": ratio(named for sets in borne.values() for named in sets),
            },
            "references_by_predictions": table,
        },
    }


# Form --------------------------------------------------------------------------------------------------------------
def form_faults(
    caption: str, prompt: str = "", tokens: int | None = None, max_new_tokens: int | None = None
) -> set[str]:
    """Which of FORM are wrong with a caption.

    Args:
        prompt: what was asked, for captions that repeat it.
        tokens, max_new_tokens: length of the caption in the model's tokens, and where it was cut. Without them only
            the last word says whether a caption is cut off: a particle, an unfinished verb, a comma, an open bracket.
    """
    text = unicodedata.normalize("NFKC", caption).strip()
    faults = set()
    if MARKUP.search(text):
        faults.add("special_tokens")
        text = MARKUP.sub(" ", text).strip()
    if not any(character.isalnum() for character in text):
        return faults | {"empty"}
    words = [token.surface for token in analyse(text)]
    ngrams = [tuple(words[i : i + REPEATED_WORDS]) for i in range(len(words) - REPEATED_WORDS + 1)]
    if len(set(ngrams)) < len(ngrams) or LOOP.search(text):
        faults.add("repetition")
    if _is_foreign(text):
        faults.add("non_japanese")
    elif _is_cut_off(text):
        faults.add("truncated")
    if tokens is not None and max_new_tokens is not None and tokens >= max_new_tokens:
        faults.add("truncated")
    asked = unicodedata.normalize("NFKC", prompt).strip()
    if asked and _shares(text, asked, min(len(asked), COPIED_CHARACTERS)):
        faults.add("copied_prompt")
    return faults


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
    if text[-1] in ",、・":
        return True
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


def _form(
    predictions: dict[str, str], record: dict, count_tokens: Callable[[str], int] | None, flagged: dict[str, list[str]]
) -> dict:
    limit, prompt = record.get("decoding", {}).get("max_new_tokens"), record.get("prompt") or ""
    found = []
    for image_id, caption in predictions.items():
        tokens = count_tokens(caption) if count_tokens else None
        faults = form_faults(caption, prompt, tokens, limit)
        flagged[image_id].extend(fault for fault in FORM if fault in faults)
        found.append(faults)
    every = np.ones(len(found))
    rates: dict = {fault: Rate([fault in faults for faults in found], every) for fault in FORM}
    words = [[token.surface for token in analyse(caption)] for caption in predictions.values()]
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
def _normalised(caption: str) -> str:
    """Without spaces, punctuation, width and case: what is left is the words of a caption."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", caption).lower()))


def _picture_hashes(rows: datasets.Dataset, desc: str) -> Iterator[tuple[str, str]]:
    """(image id, SHA-256 of the file) of every picture that is there."""
    for row in tqdm(rows.select_columns(["image_id", "image"]), desc=desc, unit="picture"):
        cell = row["image"]
        if cell["bytes"] is not None:
            yield str(row["image_id"]), hashlib.sha256(cell["bytes"]).hexdigest()
        elif is_picture_file(cell["path"]):
            with open_picture(cell["path"]) as file:
                yield str(row["image_id"]), hashlib.file_digest(file, "sha256").hexdigest()


def _overlap(
    predictions: dict[str, str],
    references: dict[str, list[str]] | None,
    train_rows: datasets.Dataset,
    test_rows: datasets.Dataset | None,
    flagged: dict[str, list[str]],
) -> dict:
    every = np.ones(len(predictions))
    train_ids = set(map(str, train_rows["image_id"]))
    trained = {_normalised(caption) for captions in train_rows["captions"] for caption in captions} - {""}
    shared = [image_id in train_ids for image_id in predictions]
    copied = [_normalised(caption) in trained for caption in predictions.values()]
    overlap: dict = {
        "training_images": len(train_rows),
        "training_captions": sum(map(len, train_rows["captions"])),
        "image_in_training": Rate(shared, every),
        "training_caption": Rate(copied, every),
    }
    if references:
        overlap["references_in_training"] = Rate(
            [sum(_normalised(caption) in trained for caption in captions) for captions in references.values()],
            [len(captions) for captions in references.values()],
        )
    same = [False] * len(predictions)
    if test_rows is not None and "image" in train_rows.column_names and "image" in test_rows.column_names:
        seen = {digest for _, digest in _picture_hashes(train_rows, "hashing training pictures")}
        tested = dict(_picture_hashes(test_rows, "hashing test pictures"))
        same = [tested.get(image_id) in seen for image_id in predictions]
        overlap["picture_in_training"] = Rate(same, [image_id in tested for image_id in predictions])
    for image_id, *reasons in zip(predictions, shared, same, copied, strict=True):
        flagged[image_id].extend(reason for reason, holds in zip(OVERLAP, reasons, strict=True) if holds)
    return overlap


# What is done with it ----------------------------------------------------------------------------------------------
def write_review_queue(
    predictions_path: str | Path, audit: dict, directory: str | Path, hold_back: Iterable[str] = HELD_BACK
) -> tuple[int, int]:
    """Writes `directory/released.jsonl`, the captions that pass, and `held_back.jsonl`, the others with their reasons.

    Every line of the predictions is in exactly one of them, as it was. Returns how many are in each.

    Raises AuditError on a reason that no audit gives, ScoreError on predictions that cannot be read.
    """
    hold_back = list(hold_back)
    reasons = {
        *HELD_BACK,
        *OVERLAP,
        *(f"persons: {group}" for group in audit["persons"]["groups"] if group != "gender"),
    }
    unknown = [reason for reason in hold_back if reason not in reasons]
    if unknown:
        raise AuditError(f"no audit gives the reason {unknown[0]!r}; there are {', '.join(sorted(reasons))}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    released, held = [], []
    for _, image_id, line in read_entries(predictions_path):
        why = [reason for reason in audit["flagged"].get(image_id, []) if reason in hold_back]
        (held if why else released).append(line | ({"reasons": why} if why else {}))
    for name, lines in (("released", released), ("held_back", held)):
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(directory / f"{name}.jsonl", text)
    return len(released), len(held)


def read_audit(path: str | Path) -> dict:
    """An audit.json. Raises AuditError when the file is not one."""
    document = _read_object(path, "the audit")
    try:
        whole = all(map(_is_audit, [document, document.get("base", document)]))
    except (KeyError, TypeError, AttributeError, ValueError):
        whole = False
    if not whole or not isinstance(document.get("flagged"), dict):
        raise AuditError(f"{path}: not an audit, as scripts/audit_captions.py writes it")
    return document


def _is_audit(document: dict) -> bool:
    """Whether counts, settings and rates are there and of their kinds; what is not an audit may raise instead."""
    images, references, *texts, _ = _compared(document).values()
    numbers = [images, references]
    for rate in audit_rates({"form": document["form"]} | document).values():
        numbers += [rate["count"], rate["of"]]
        if rate["rate"] is not None:
            low, high = rate["interval"]
            numbers += [rate["rate"], low, high]
    return all(type(number) in (int, float) for number in numbers) and all(isinstance(text, str) for text in texts)


def _read_object(path: str | Path, what: str) -> dict:
    try:
        document = parse_json(Path(path).read_bytes())
    except OSError as error:
        raise AuditError(f"{path}: {what} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise AuditError(f"{path}: not JSON ({error}). The file may be cut off; fetch or make it again.") from error
    if not isinstance(document, dict):
        raise AuditError(f"{path}: {what} must be a JSON object, but is {shown(document)}")
    return document


def audit_rates(document: dict) -> dict[str, dict]:
    """Every rate of an audit under its path, `hallucination.chair_s`."""

    def walk(node: dict, path: str) -> Iterator[tuple[str, dict]]:
        for key, value in node.items():
            if isinstance(value, dict):
                name = f"{path}.{key}" if path else key
                if "rate" in value:
                    yield name, value
                elif key not in ("per_image", "base"):
                    yield from walk(value, name)

    return dict(walk(document, ""))


def audit_table(audits: dict[str, dict]) -> str:
    """The rates of one or several audits as lines of text, an audit a column, without those that are zero in all.

    Raises AuditError when the audits are not of the same images with the same lexicons and objects.
    """
    names = list(audits)
    first = audits[names[0]]
    for name in names[1:]:
        for what, value in _compared(audits[name]).items():
            if value != _compared(first)[what]:
                raise AuditError(
                    f"{names[0]} and {name} differ in {what} ({_compared(first)[what]} and {value}): audit both in "
                    "the same way, on the same images"
                )
    rates = {name: audit_rates(document) for name, document in audits.items()}
    every = dict.fromkeys(path for found in rates.values() for path in found)
    shown = [path for path in every if any(found.get(path, {}).get("count") for found in rates.values())]
    width = max(map(len, [*shown, "images"]))
    lines = [f"{'':<{width}}" + "".join(f"  {name[-28:]:>28}" for name in names)] if len(names) > 1 else []
    lines.append(f"{'images':<{width}}" + "".join(f"  {audits[name]['counts']['images']:>28,}" for name in names))
    for path in shown:
        lines.append(f"{path:<{width}}" + "".join(f"  {rate_text(rates[name].get(path)):>28}" for name in names))
    flagged = [f"{len(audits[name]['flagged']):,} flagged" for name in names]
    return "\n".join([*lines, f"{'':<{width}}" + "".join(f"  {text:>28}" for text in flagged)])


def rate_text(rate: dict | None) -> str:
    """`12.3% [11.0, 13.5]`; a dash for what is not there or has nothing to be counted in."""
    if rate is None or rate["rate"] is None:
        return "-"
    low, high = rate["interval"]
    return f"{100 * rate['rate']:.1f}% [{100 * low:.1f}, {100 * high:.1f}]"


def _compared(document: dict) -> dict:
    return {
        "number of images": document["counts"]["images"],
        "number of references": document["counts"]["references"],
        "lexicon": document["settings"]["lexicon"]["sha256"][:12],
        "lexicon of persons": document["settings"]["persons"]["sha256"][:12],
        "objects_from": document.get("hallucination", {}).get("objects_from"),
    }
