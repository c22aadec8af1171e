"""From caption rows to training batches, one caption an example: the reference engine."""

import json
from dataclasses import dataclass
from pathlib import Path

import datasets
from transformers import BatchFeature, ProcessorMixin
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from vlmcap.data.images import BadImageError, DatasetError, missing_files, open_image


@dataclass
class BadImages:
    """The list of training pictures that could not be read: JSON lines that every worker and process appends to.

    More than `limit` different pictures end the run with a DatasetError.
    """

    path: Path
    limit: int

    def add(self, image_id: int, name: str, reason: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            entry = {"image_id": image_id, "file_name": name, "reason": reason}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        count = self.count()
        if count > self.limit:
            raise DatasetError(
                f"{count} training pictures cannot be read, more than the {self.limit} that max_bad_images allows;"
                f" the last: {name}: {reason}. They are listed in {self.path}. Fetch them again"
                " (scripts/fetch_images.py) or raise max_bad_images, then continue with --resume_from_checkpoint"
                " latest."
            )

    def count(self) -> int:
        """Number of different pictures in the list."""
        if not self.path.exists():
            return 0
        return len({json.loads(line)["image_id"] for line in self.path.read_text(encoding="utf-8").splitlines()})


def drop_missing(rows: datasets.Dataset, bad_images: BadImages, write: bool = True) -> datasets.Dataset:
    """The rows whose picture is there. The others are listed in `bad_images` (by the process that has `write`)."""
    missing = missing_files(rows)
    if write:
        for row in rows.select(missing):
            bad_images.add(row["image_id"], row["file_name"], f"no such file: {row['image']['path']}")
    gone = set(missing)
    return rows.select([i for i in range(len(rows)) if i not in gone]) if gone else rows


def caption_examples(rows: datasets.Dataset) -> datasets.Dataset:
    """One example a caption: {"row": index into `rows`, "caption": text}. Pictures stay where they are."""
    index, captions = [], []
    for row, texts in enumerate(rows["captions"]):
        index += [row] * len(texts)
        captions += texts
    return datasets.Dataset.from_dict({"row": index, "caption": captions})


class CaptionCollator:
    """Turns examples of `caption_examples` into TRL's prompt-completion batches.

    The loss covers the caption and its end-of-turn tokens. A picture that cannot be decoded is never fed as a blank:
    it is listed in `bad_images`, and the next picture that can be read takes its place with its first caption.

    Args:
        rows: as `load_captions` returns them.
        processor: of the model.
        prompt: the user's text behind the image.
        bad_images: the list of unreadable pictures.

    Returns a BatchFeature with input_ids, attention_mask, mm_token_type_ids, labels (int64, (B, L)), pixel_values
    (float32, (patches, 3 * 2 * 14 * 14)) and image_grid_thw (int64, (B, 3)).
    """

    def __init__(self, rows: datasets.Dataset, processor: ProcessorMixin, prompt: str, bad_images: BadImages):
        self.rows, self.prompt, self.bad_images = rows, prompt, bad_images
        self.collate = DataCollatorForVisionLanguageModeling(processor, max_length=None, completion_only_loss=True)

    def __call__(self, examples: list[dict]) -> BatchFeature:
        return self.collate([self._prompt_completion(e["row"], e["caption"]) for e in examples])

    def _prompt_completion(self, row: int, caption: str) -> dict:
        for step in range(len(self.rows)):
            record = self.rows[(row + step) % len(self.rows)]
            try:
                image = open_image(record)
            except BadImageError as error:
                self.bad_images.add(record["image_id"], error.name, error.reason)
                continue
            return {
                "images": [image],
                "prompt": [{"role": "user", "content": self.prompt}],
                "completion": [{"role": "assistant", "content": record["captions"][0] if step else caption}],
            }
        raise DatasetError("none of the training pictures can be read")
