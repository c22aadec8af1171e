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

The lexicons are Japanese: captions of another language are audited for form and overlap alone, and for the script of
their language instead of Japanese.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np

from vlmcap import provenance
from vlmcap.atomic_write import write_atomically
from vlmcap.evaluation import audit_checks
from vlmcap.evaluation.audit_checks import COPIED_CHARACTERS, COPIED_LETTERS, KANJI_ALONE, REPEATED_WORDS, Rate
from vlmcap.evaluation.audit_document import AuditError, read_object
from vlmcap.evaluation.bootstrap import LEVEL, interval, resampled_scores
from vlmcap.evaluation.caption_files import read_predictions
from vlmcap.evaluation.lexicon import Lexicon

RESAMPLES, SEED = 1000, 0


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
    language: str = "ja",
    languages: dict[str, dict] | None = None,
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
        language: of the captions, an ISO 639-1 code.
        languages: the audits of the model's captions of other keys, each with its base's, for the card; go in without
            their details.

    Raises:
        AuditError: images without references or annotations, or an annotation file that is not COCO's.
        LexiconError, ScoreError: a lexicon or the predictions cannot be read.
    """
    predictions = read_predictions(predictions_path)
    if not predictions:
        raise AuditError(f"{predictions_path}: holds no caption")
    record = _run_record(predictions_path)
    if references is not None:
        references = _references_of(predictions, references)
    flagged: dict[str, list[str]] = {image_id: [] for image_id in predictions}
    document: dict = {
        "counts": {"images": len(predictions), "references": sum(map(len, (references or {}).values()))},
    }
    lexicons = {"language": language}
    if language == "ja":
        things, about_persons = Lexicon(lexicon), Lexicon(persons)
        if references or instances:
            objects = audit_checks.read_instances(instances, things, predictions) if instances else {}
            document["hallucination"] = audit_checks.hallucination(predictions, references, objects, things, flagged)
        document["persons"] = audit_checks.persons(predictions, references, about_persons, flagged)
        lexicons = {"lexicon": _lexicon_record(things), "persons": _lexicon_record(about_persons)}
        lexicons["instances"] = [Path(path).name for path in instances]
    document["form"] = audit_checks.form(predictions, record, count_tokens, flagged, language)
    if train_rows is not None:
        document["overlap"] = audit_checks.overlap(predictions, references, train_rows, test_rows, flagged)
    _resolve(document)
    document["flagged"] = {image_id: reasons for image_id, reasons in flagged.items() if reasons}
    document["settings"] = lexicons | {
        "repeated_words": REPEATED_WORDS,
        "copied_characters": COPIED_CHARACTERS if language == "ja" else COPIED_LETTERS,
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
        document["base"] = _without_details(base)
    if languages:
        document["languages"] = {key: _without_details(one) | {"base": one["base"]} for key, one in languages.items()}
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, json.dumps(document, ensure_ascii=False, indent=2) + "\n")
    return document


def _lexicon_record(lexicon: Lexicon) -> dict:
    return {"name": lexicon.name, "sha256": lexicon.sha256, "words": lexicon.words()}


def _run_record(predictions_path: str | Path) -> dict:
    """The run record beside a predictions file; empty where there is none."""
    path = Path(predictions_path).with_suffix(".run.json")
    record = read_object(path, "the run record") if path.exists() else {}
    if not isinstance(record.get("prompt"), str | None) or not isinstance(record.get("decoding", {}), dict):
        raise AuditError(f"{path}: no run record, whose prompt is a text or null and whose decoding an object")
    return record


def _references_of(predictions: dict[str, str], references: dict[str, list[str]]) -> dict[str, list[str]]:
    """Those of the predicted images, in their order."""
    missing = [image_id for image_id in predictions if not references.get(image_id)]
    if missing:
        raise AuditError(
            f"{len(missing):,} predicted images have no references ({', '.join(missing[:5])}): give those of the "
            "split that the captions were made for"
        )
    return {image_id: references[image_id] for image_id in predictions}


def _without_details(audit: dict) -> dict:
    kept = {key: value for key, value in audit.items() if key not in ("flagged", "base")}
    if "hallucination" in kept:
        kept["hallucination"] = {key: value for key, value in kept["hallucination"].items() if key != "per_image"}
    return kept


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
