"""audit.json as a document: read, compared, printed, and captions held back by what it says."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from vlmcap.atomic_write import write_atomically
from vlmcap.captioning.arguments import HELD_BACK
from vlmcap.errors import UserError
from vlmcap.evaluation.caption_files import read_entries
from vlmcap.strict_parsing import parse_json, shown

OVERLAP = ("image_in_training", "picture_in_training", "training_caption")


class AuditError(UserError):
    """Captions cannot be audited as asked; the message names the file and the fix."""


def read_audit(path: str | Path) -> dict:
    """An audit.json. Raises AuditError when the file is not one."""
    document = read_object(path, "the audit")
    try:
        every = [document, *document.get("languages", {}).values()]
        whole = all(_is_audit(one) and _is_audit(one.get("base", one)) for one in every)
    except (KeyError, TypeError, AttributeError, ValueError):
        whole = False
    if not whole or not isinstance(document.get("flagged"), dict):
        raise AuditError(f"{path}: not an audit, as scripts/audit_captions.py writes it")
    return document


def audit_rates(document: dict) -> dict[str, dict]:
    """Every rate of an audit under its path, `hallucination.chair_s`."""

    def walk(node: dict, path: str) -> Iterator[tuple[str, dict]]:
        for key, value in node.items():
            if isinstance(value, dict):
                name = f"{path}.{key}" if path else key
                if "rate" in value:
                    yield name, value
                elif key not in ("per_image", "base", "languages"):
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
        "non_latin",
        *(f"persons: {group}" for group in audit.get("persons", {"groups": {}})["groups"] if group != "gender"),
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


def read_object(path: str | Path, what: str) -> dict:
    """The JSON object in a file; `what` names it in errors. Raises AuditError."""
    try:
        document = parse_json(Path(path).read_bytes())
    except OSError as error:
        raise AuditError(f"{path}: {what} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise AuditError(f"{path}: not JSON ({error}). The file may be cut off; fetch or make it again.") from error
    if not isinstance(document, dict):
        raise AuditError(f"{path}: {what} must be a JSON object, but is {shown(document)}")
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


def _compared(document: dict) -> dict:
    return {
        "number of images": document["counts"]["images"],
        "number of references": document["counts"]["references"],
        "language": document["settings"].get("language", "ja"),
        "lexicon": _lexicon(document, "lexicon"),
        "lexicon of persons": _lexicon(document, "persons"),
        "objects_from": document.get("hallucination", {}).get("objects_from"),
    }


def _lexicon(document: dict, name: str) -> str:
    """The hash of a lexicon; captions that are not Japanese are audited without one."""
    return document["settings"][name]["sha256"][:12] if "language" not in document["settings"] else "none"
