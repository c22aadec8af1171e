"""What a model is asked for and scored with: one prompt, or one for each key of captions (`vlmcap.data.keys`)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import datasets

from vlmcap.captioning.arguments import BeamArguments, GenerationArguments, PromptArguments
from vlmcap.data.columns import OF_CAPTION
from vlmcap.data.errors import DataError
from vlmcap.data.images import references_of
from vlmcap.data.keys import parse_key, rows_of_key
from vlmcap.evaluation.tokenise import tokenizer_of


@dataclass(frozen=True)
class CaptionTask:
    """Captions of one kind, and the references that they are scored with.

    Attributes:
        args: how they are searched for, with the prompt where the model takes one.
        tokenizer: word segmentation of the metrics.
        image_ids: the images that have such references, in the order of the split.
        references: image id as text -> captions.
        key: None where a model is asked for one kind of captions alone.
        trained: whether it is trained on, or only scored.
        main: whether its files are those of the run; those of other keys are in `languages`.
    """

    args: BeamArguments
    tokenizer: str
    image_ids: Sequence[int | str]
    references: dict[str, list[str]]
    key: str | None = None
    trained: bool = True
    main: bool = True

    def folder(self, place: Path) -> Path:
        """Where its predictions.jsonl, metrics.json and audit.json are; `place` is that of the main task."""
        return place if self.main else place / "languages" / folder_name(self.key)

    def named(self, text: str) -> str:
        """`text` with the key, for people."""
        return f"{text}, {self.key}" if self.key else text


def folder_name(key: str) -> str:
    """ja/polite -> ja-polite, which no other key has."""
    return key.replace("/", "-")


def one_task(args: BeamArguments, tokenizer: str, rows: datasets.Dataset) -> CaptionTask:
    """That of a model which is asked for one kind of captions: all that there are."""
    return CaptionTask(args, tokenizer, rows["image_id"][:], references_of(rows))


def caption_tasks(
    prompts: PromptArguments,
    args: GenerationArguments,
    tokenizer: str,
    rows: datasets.Dataset,
    place: str,
    only_trained: bool = False,
) -> list[CaptionTask]:
    """One for each key of `prompts` and `also_score`, the main one first; without keys the one of `args`.

    Args:
        tokenizer: of Japanese captions, and of a run without keys.
        rows: as `load_captions` returns them.
        place: what the rows are called in errors.
        only_trained: leaves out the keys of `also_score`.

    Raises:
        DataError: `rows_of_key`; or there is no caption of a key.
        TokenizerError: there is no tokenizer for a language.
    """
    if not prompts.prompts:
        return [one_task(args, tokenizer, rows)]
    texts = rows.select_columns([name for name in ("image_id", *OF_CAPTION) if name in rows.column_names])
    keys, tasks = list(prompts.first_wordings), []
    for key in prompts.wordings if only_trained else keys:
        found = rows_of_key(texts, key, keys)
        if not len(found):
            raise DataError(
                f"{place} has no caption of {key}, which prompts or also_score name: leave the key out, or publish a"
                " dataset that has such captions in this split"
            )
        asked = replace(args, prompt=prompts.first_wordings[key])
        task = one_task(asked, tokenizer_of(parse_key(key)[0], tokenizer), found)
        tasks.append(replace(task, key=key, trained=key in prompts.wordings, main=not tasks))
    return tasks
