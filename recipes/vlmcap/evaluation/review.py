"""Captions without references, divided by their form: those that pass, and those that a person looks at first."""

import json
from collections.abc import Iterable
from pathlib import Path

from vlmcap.captioning.predictions import run_record_path
from vlmcap.evaluation.audit_checks import form_faults
from vlmcap.evaluation.audit_document import write_review_queue
from vlmcap.evaluation.caption_files import read_entries


def review_form(
    predictions: Path, directory: str | Path, hold_back: Iterable[str], language: str = "ja"
) -> tuple[int, int]:
    """Writes `directory/released.jsonl` and `held_back.jsonl` as `write_review_queue` does, by `form_faults` alone.

    Args:
        predictions: captions with the run record that scripts/caption.py writes beside them.
        hold_back: reasons, of `form_of(language)`.

    Returns how many captions are in each.
    """
    prompt = json.loads(run_record_path(predictions).read_text(encoding="utf-8"))["prompt"] or ""
    flagged = {
        image_id: sorted(form_faults(entry["caption"], prompt, language=language))
        for _, image_id, entry in read_entries(predictions)
    }
    return write_review_queue(predictions, {"flagged": flagged, "persons": {"groups": {}}}, directory, hold_back)
