"""From caption rows to training examples, and to batches of one caption a sequence: the reference engine."""

import json
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from PIL import Image
from transformers import ProcessorMixin
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from vlmcap.atomic_write import write_atomically
from vlmcap.data.errors import DataError
from vlmcap.data.images import BadImageError, missing_files, open_image
from vlmcap.errors import UserError
from vlmcap.models.load import chat_prompt
from vlmcap.training.caption_tokens import EncodedProcessor, TurnsEncoder


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


def caption_examples(rows: datasets.Dataset, captions_per_image: int, one_prompt: bool = False) -> datasets.Dataset:
    """Training examples: {"row": index into `rows`, "captions": up to `captions_per_image` of its captions}, and
    "prompts" and "system" of these where the rows have them (`vlmcap.training.prompts`).

    An image with more captions yields several examples, the last one with the rest. Pictures stay where they are.

    Args:
        one_prompt: captions of an example have the same prompt. An image with several prompts yields several examples.
    """
    if captions_per_image < 1:
        raise UserError(f"captions_per_image={captions_per_image}: choose 1 or more")
    columns = [name for name in ("captions", "prompts") if name in rows.column_names]
    examples = {"row": [], **{name: [] for name in columns}}
    for row, of_image in enumerate(zip(*(rows[name][:] for name in columns), strict=True)):
        groups = [range(len(of_image[0]))]
        if one_prompt and len(columns) > 1:
            first = [said[0] for said in of_image[1]]
            groups = [[place for place in groups[0] if first[place] == prompt] for prompt in dict.fromkeys(first)]
        for places in groups:
            for start in range(0, len(places), captions_per_image):
                examples["row"].append(row)
                for name, values in zip(columns, of_image, strict=True):
                    examples[name].append([values[place] for place in places[start : start + captions_per_image]])
    if "system" in rows.column_names:
        systems = rows["system"][:]
        examples["system"] = [systems[row] for row in examples["row"]]
    return datasets.Dataset.from_dict(examples)


def conversations(example: dict, prompt: str) -> tuple[list[list[str]], str]:
    """What user and assistant say in turn of the picture of an example, and the system's turn ("": none).

    Args:
        prompt: of captions without `prompts`.
    """
    before = example.get("prompts") or [[prompt]] * len(example["captions"])
    turns = [[*said, caption] for said, caption in zip(before, example["captions"], strict=True)]
    return turns, example.get("system", "")


def read_example(rows: datasets.Dataset, example: dict, bad_images: BadImages) -> tuple[Image.Image, dict]:
    """Picture and example, one of `caption_examples`; in place of a picture that cannot be decoded, another
    (`read_picture`) with as many of its own captions as the example had."""
    row, image = read_picture(rows, example["row"], bad_images)
    if row == example["row"]:
        return image, example
    other, count = rows[row], len(example["captions"])
    other = {name: other[name] for name in ("captions", "prompts", "system") if name in other}
    return image, {name: value if name == "system" else value[:count] for name, value in other.items()}


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

    Every caption is a sequence of its own with its own copy of the image and its prompt. The loss covers the caption
    and its end-of-turn tokens.

    Args:
        rows: as `load_captions` returns them.
        processor: of the model.
        prompt: the user's text after the image, for examples without prompts of their own.
        bad_images: the list of unreadable pictures, see `read_example`.

    Returns what the processor returns for B captions of L tokens at most (for Qwen2-VL input_ids, attention_mask,
    mm_token_type_ids: int64, (B, L); pixel_values: float32, (patches, 3 * 2 * 14 * 14); image_grid_thw: int64,
    (B, 3)), labels (int64, (B, L)), and caption_start (the first column with a label), logit_columns and sources as
    `vlmcap.training.shared_prefix.lay_out` has them.
    """

    def __init__(self, rows: datasets.Dataset, processor: ProcessorMixin, prompt: str, bad_images: BadImages):
        chat_prompt(processor, prompt)  # refuses what would end the turn
        self.rows, self.bad_images, self.prompt = rows, bad_images, prompt
        self.encode = TurnsEncoder(processor)
        self.collate = DataCollatorForVisionLanguageModeling(
            EncodedProcessor(processor), max_length=None, completion_only_loss=True
        )

    def __call__(self, examples: list[dict]) -> dict:
        sequences = []
        for example in examples:
            image, example = read_example(self.rows, example, self.bad_images)
            turns, system = conversations(example, self.prompt)
            for one in turns:
                prompt, branch = self.encode.with_text(one, system)
                # Not turns of a conversation: TRL then leaves the chat template out.
                sequences.append({"images": [image], "prompt": prompt, "completion": branch})
        batch = dict(self.collate(sequences))
        labels = batch["labels"]
        trained = [part for sequence in sequences for part in sequence["completion"].trained]
        labels[labels != -100] = torch.where(torch.tensor(trained), labels[labels != -100], -100)
        start = int((labels != -100).any(0).nonzero()[0])
        columns = torch.arange(start, labels.shape[1])
        sources = (columns - start).expand(len(labels), -1)
        return batch | {"caption_start": start, "logit_columns": columns - 1, "sources": sources}
