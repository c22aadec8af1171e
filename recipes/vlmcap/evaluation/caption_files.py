"""Files of captions and of references.

predictions.jsonl   {"image_id": 1, "caption": "..."}               one line an image
results.json        [{"image_id": 1, "caption": "..."}, ...]        COCO's list of results, instead
references.jsonl    {"image_id": 1, "captions": ["...", "..."]}     one line an image, or a published dataset
captions_*.json     {"images": [...], "annotations": [...]}         COCO's annotations, instead
"""

import re
from collections.abc import Iterator
from pathlib import Path

from vlmcap.errors import UserError
from vlmcap.strict_parsing import parse_json, shown

RESULTS_LIST = re.compile(rb"(\xef\xbb\xbf)?\s*\[")


COCO_ANNOTATIONS = re.compile(rb'(\xef\xbb\xbf)?\s*\{\s*"(info|licenses|images|annotations|type|categories)"\s*:')


class ScoreError(UserError):
    """Predictions or references that cannot be scored; the message names the file and line, or the images."""


def read_predictions(path: str | Path) -> dict[str, str]:
    """Image id -> caption of a predictions file or COCO results list; integer ids become strings.

    Raises ScoreError, naming file and place, on a malformed entry and on an id that occurs twice.
    """
    predictions = {}
    for where, image_id, entry in read_entries(path):
        predictions[image_id] = _caption(entry, where)
    return predictions


def read_references(path: str | Path) -> dict[str, list[str]]:
    """Image id -> captions of a references file or COCO's captions_*.json; integer ids become strings.

    An image that COCO's file lists without captions has an empty list.

    Raises ScoreError, naming file and place, on a malformed entry and on an id that occurs twice.
    """
    content = Path(path).read_bytes()
    if COCO_ANNOTATIONS.match(content):
        return _coco_references(parse_object(content, str(path)), str(path))
    references = {}
    for where, image_id, entry in read_entries(path):
        captions = entry.get("captions")
        if not (isinstance(captions, list) and all(isinstance(caption, str) for caption in captions)):
            raise ScoreError(f'{where}: "captions" must be a list of strings, but is {shown(captions)}')
        references[image_id] = captions
    return references


def _coco_references(document: dict, path: str) -> dict[str, list[str]]:
    for key in ("images", "annotations"):
        entries = document.get(key)
        if not (isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries)):
            raise ScoreError(f"{path}: {key!r} must be a list of objects, as in COCO's captions_*.json")
    references: dict[str, list[str]] = {}
    for number, image in enumerate(document["images"]):
        references[_image_id(image, f"{path}, images[{number}]", "id")] = []
    for number, annotation in enumerate(document["annotations"]):
        where = f"{path}, annotations[{number}]"
        image_id = _image_id(annotation, where)
        if image_id not in references:
            raise ScoreError(f"{where}: image_id {image_id} is not among the images of the file")
        references[image_id].append(_caption(annotation, where))
    return references


def _caption(entry: dict, where: str) -> str:
    if not isinstance(entry.get("caption"), str):
        raise ScoreError(f'{where}: "caption" must be a string, but is {shown(entry.get("caption"))}')
    return entry["caption"]


def _image_id(entry: dict, where: str, key: str = "image_id") -> str:
    if type(entry.get(key)) not in (int, str):
        raise ScoreError(f'{where}: "{key}" must be an integer or a string, but is {shown(entry.get(key))}')
    return str(entry[key])


def read_entries(path: str | Path) -> Iterator[tuple[str, str, dict]]:
    """`file, line n`, the image id and the object of every line that is not blank; or of a whole file that is a list,
    such as COCO's results, `file, entry n` and so on.

    Raises ScoreError, naming file and place, on an entry that is not an object with an image id, and on an id that was
    there before.
    """
    seen = {}
    for place, where, entry in _entries(path):
        image_id = _image_id(entry, where)
        if image_id in seen:
            raise ScoreError(f"{where}: image_id {image_id} is on {seen[image_id]} already")
        seen[image_id] = place
        yield where, image_id, entry


def _entries(path: str | Path) -> Iterator[tuple[str, str, dict]]:
    with open(path, "rb") as lines:
        if not RESULTS_LIST.match(lines.read(100)):
            lines.seek(0)
            for number, text in enumerate(lines, 1):
                if text.strip():
                    where = f"{path}, line {number}"
                    yield f"line {number}", where, parse_object(text, where)
            return
        lines.seek(0)
        content = lines.read()
    for number, entry in enumerate(_parse(content, str(path)), 1):
        where = f"{path}, entry {number}"
        yield f"entry {number}", where, _as_object(entry, where)


def parse_object(text: bytes, where: str) -> dict:
    return _as_object(_parse(text, where), where)


def _parse(text: bytes, where: str) -> object:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ScoreError(f"{where}: not JSON in UTF-8 ({error})") from error


def _as_object(value: object, where: str) -> dict:
    if not isinstance(value, dict):
        raise ScoreError(f"{where}: a JSON object is needed, but this is {shown(value)}")
    return value
