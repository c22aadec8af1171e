"""From caption rows to training examples, and to batches of one caption a sequence: the reference engine."""

import json
from dataclasses import dataclass
from pathlib import Path

import datasets
from PIL import Image
from transformers import ProcessorMixin
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from vlmcap.atomic_write import write_atomically
from vlmcap.data.errors import DataError
from vlmcap.data.images import BadImageError, missing_files, open_image
from vlmcap.errors import UserError
from vlmcap.training.caption_tokens import CaptionEncoder, CaptionProcessor


@dataclass
class BadImages:
    """The list of training pictures that could not be read: JSON lines that every worker and process appends to.

    More than `limit` different pictures end the run with a DataError.
    """

    path: Path
    limit: int

    def begin(self, keep: bool) -> None:
        """An empty list; or, with `keep`, the earlier run's without a line that its end left half-written."""
        if lines := self._lines() if keep else []:
            write_atomically(self.path, "".join(line + "\n" for line in lines))
        else:
            self.path.unlink(missing_ok=True)

    def add(self, image_id: int, name: str, reason: str) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            entry = {"image_id": image_id, "file_name": name, "reason": reason}
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        count = self.count()
        if count > self.limit:
            raise DataError(
                f"{count} training pictures cannot be read, more than the {self.limit} that max_bad_images allows;"
                f" the last: {name}: {reason}. They are listed in {self.path}. Fetch them again"
                " (scripts/fetch_images.py) or raise max_bad_images, then continue with --resume_from_checkpoint"
                " latest."
            )

    def count(self) -> int:
        """Number of different pictures in the list."""
        return len({json.loads(line)["image_id"] for line in self._lines()})

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        return self.path.read_text(encoding="utf-8").split("\n")[:-1]  # after the last newline nothing is whole


def drop_missing(rows: datasets.Dataset, bad_images: BadImages, write: bool = True) -> datasets.Dataset:
    """The rows whose picture is there. The others are listed in `bad_images` (by the process that has `write`)."""
    missing = missing_files(rows)
    if write:
        for row in rows.select(missing):
            bad_images.add(row["image_id"], row["file_name"], f"no such file: {row['image']['path']}")
    gone = set(missing)
    return rows.select([i for i in range(len(rows)) if i not in gone]) if gone else rows


def caption_examples(rows: datasets.Dataset, captions_per_image: int) -> datasets.Dataset:
    """Training examples: {"row": index into `rows`, "captions": up to `captions_per_image` of its captions}.

    An image with more captions yields several examples, the last one with the rest. Pictures stay where they are.
    """
    if captions_per_image < 1:
        raise UserError(f"captions_per_image={captions_per_image}: choose 1 or more")
    index, groups = [], []
    for row, texts in enumerate(rows["captions"]):
        for start in range(0, len(texts), captions_per_image):
            index.append(row)
            groups.append(texts[start : start + captions_per_image])
    return datasets.Dataset.from_dict({"row": index, "captions": groups})


def read_example(rows: datasets.Dataset, example: dict, bad_images: BadImages) -> tuple[Image.Image, list[str]]:
    """Picture and captions of an example of `caption_examples`; in place of a picture that cannot be decoded, another
    (`read_picture`) with as many of its own captions as the example had."""
    row, image = read_picture(rows, example["row"], bad_images)
    if row == example["row"]:
        return image, example["captions"]
    return image, rows[row]["captions"][: len(example["captions"])]


def read_picture(rows: datasets.Dataset, row: int, bad_images: BadImages) -> tuple[int, Image.Image]:
    """The picture of a row, and the number of that row.

    A picture that cannot be decoded is never fed as a blank: it is listed in `bad_images`, and the next one that can
    be read takes its place.
    """
    for step in range(len(rows)):
        number = (row + step) % len(rows)
        record = rows[number]
        try:
            return number, open_image(record)
        except BadImageError as error:
            bad_images.add(record["image_id"], error.name, error.reason)
    raise DataError("none of the training pictures can be read")


class CaptionCollator:
    """Turns examples of `caption_examples` into TRL's prompt-completion batches: the reference engine.

    Every caption is a sequence of its own with its own copy of the image. The loss covers the caption and its
    end-of-turn tokens.

    Args:
        rows: as `load_captions` returns them.
        processor: of the model.
        prompt: the user's text after the image.
        bad_images: the list of unreadable pictures, see `read_example`.

    Returns what the processor returns for B captions of L tokens at most (for Qwen2-VL input_ids, attention_mask,
    mm_token_type_ids: int64, (B, L); pixel_values: float32, (patches, 3 * 2 * 14 * 14); image_grid_thw: int64,
    (B, 3)), labels (int64, (B, L)) and caption_start (int), the first column with a label.
    """

    def __init__(self, rows: datasets.Dataset, processor: ProcessorMixin, prompt: str, bad_images: BadImages):
        self.rows, self.bad_images, self.encode = rows, bad_images, CaptionEncoder(processor, prompt)
        self.collate = DataCollatorForVisionLanguageModeling(
            CaptionProcessor(processor, self.encode), max_length=None, completion_only_loss=True
        )

    def __call__(self, examples: list[dict]) -> dict:
        turns = []
        for example in examples:
            image, captions = read_example(self.rows, example, self.bad_images)
            # Texts, not turns of a conversation: TRL then leaves the chat template out.
            turns += [{"images": [image], "prompt": self.encode.prompt, "completion": caption} for caption in captions]
        batch = dict(self.collate(turns))
        return batch | {"caption_start": int((batch["labels"] != -100).any(0).nonzero()[0])}
