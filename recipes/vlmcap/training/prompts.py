"""Which captions are trained on with which prompts: rows whose captions have a prompt each, in several languages and
styles, and rows with conversations."""

import random
from collections.abc import Iterator

import datasets

from vlmcap.captioning.arguments import PromptArguments
from vlmcap.data.columns import with_columns
from vlmcap.data.errors import DataError
from vlmcap.data.images import check_no_overlap
from vlmcap.data.instructions import load_instructions
from vlmcap.data.keys import caption_keys, rows_of_key
from vlmcap.training.arguments import InstructionArguments

TURNS = datasets.List(datasets.List(datasets.Value("string")))


def training_rows(
    rows: datasets.Dataset,
    prompts: PromptArguments,
    data: InstructionArguments,
    prompt: str,
    seed: int,
    held_out: dict[str, datasets.Dataset],
) -> datasets.Dataset:
    """What is trained on: the rows as they are, or with the prompts of their captions, and with instructions.

    Args:
        rows: as `load_captions` returns them.
        prompt: of the captions, where `prompts` has none.
        seed: of the wordings.
        held_out: name of a split -> its rows, of which no picture may be among the instructions.

    Raises:
        DataError: as `prompted_rows`, `load_instructions` and `check_no_overlap`.
    """
    if prompts.prompts:
        rows = prompted_rows(rows, prompts.wordings, prompts.prompt_weights, seed)
    if data.instructions:
        source = data.instructions, data.instructions_split, data.instructions_image_dir, data.instructions_revision
        instructions = load_instructions(*source)
        for split, others in held_out.items():
            check_no_overlap(instructions, others, split)
        rows = with_instructions(rows, instructions, prompt)
    return rows


def prompted_rows(
    rows: datasets.Dataset, wordings: dict[str, list[str]], weights: dict[str, float] | None, seed: int
) -> datasets.Dataset:
    """The captions of some keys with their prompts.

    Args:
        rows: as `load_captions` returns them, with the columns languages and styles.
        wordings: key -> wordings of its prompt, of which one is drawn for each caption.
        weights: key -> how often its captions are trained on beside those of the other keys. An image then has as many
            captions as before, some of them several times, others perhaps not at all. None: each caption once.
        seed: of the wordings.

    Returns:
        Rows as `_with_turns` makes them, without images that have no caption of these keys. Captions of an image take
        turns by key.

    Raises:
        DataError: as `caption_keys`; a key has no caption.
    """
    captions, prompts, used = [], [], set()
    columns = rows["image_id"], rows["captions"], caption_keys(rows, list(wordings))
    for image_id, texts, keys in zip(*columns, strict=True):
        by_key = {key: [text for text, own in zip(texts, keys, strict=True) if own == key] for key in wordings}
        by_key = {key: own for key, own in by_key.items() if own}
        used |= set(by_key)
        count = sum(map(len, by_key.values()))
        order = list(_turns(by_key, weights or {key: len(own) for key, own in by_key.items()}, count))
        draw = random.Random(f"{seed} {image_id}")
        captions.append([text for _, text in order])
        prompts.append([[draw.choice(wordings[key])] for key, _ in order])
    if missing := [key for key in wordings if key not in used]:
        raise DataError(
            f"no training caption belongs to the key {missing[0]} of prompts: leave the key out, or publish the"
            " dataset with such captions"
        )
    return _with_turns(rows, captions, prompts, [""] * len(rows))


def rows_by_key(
    rows: datasets.Dataset, wordings: dict[str, list[str]], weights: dict[str, float] | None, seed: int
) -> datasets.Dataset:
    """A row for each image and each key of its captions, for samples of it that are compared with these captions.

    Args:
        rows, wordings: as of `prompted_rows`.
        weights: key -> how often its rows are trained on; that of the largest weight has all its images, the others
            a share of theirs, drawn by seed. None: all of all keys.

    Returns:
        Rows as `_with_turns` makes them, all captions of a row with the same prompt, and `key`.

    Raises:
        DataError: as `caption_keys`; a key has no caption.
    """
    parts = []
    for key, texts in wordings.items():
        found = rows_of_key(rows, key, list(wordings))
        draws = [random.Random(f"{seed} {key} {image_id}") for image_id in found["image_id"]]
        share = weights[key] / max(weights.values()) if weights else 1.0
        kept = [number for number, draw in enumerate(draws) if draw.random() < share]
        if not kept:
            raise DataError(
                f"no training caption belongs to the key {key} of prompts: leave the key out, or publish the dataset"
                " with such captions"
            )
        found, asked = found.select(kept), [draws[number].choice(texts) for number in kept]
        captions = found["captions"][:]
        prompts = [[[prompt]] * len(said) for prompt, said in zip(asked, captions, strict=True)]
        part = _with_turns(found, captions, prompts, [""] * len(found))
        parts.append(with_columns(part, {"key": [key] * len(part)}, {"key": datasets.Value("string")}))
    return datasets.concatenate_datasets(parts)


def with_instructions(rows: datasets.Dataset, instructions: datasets.Dataset, prompt: str) -> datasets.Dataset:
    """Rows of captions and, after them, conversations, to be trained on together.

    Args:
        rows: of `prompted_rows`, or as `load_captions` returns them; `prompt` is then that of their captions.
        instructions: as `load_instructions` returns them.
    """
    if "prompts" not in rows.column_names:
        captions = rows["captions"][:]
        rows = _with_turns(rows, captions, [[[prompt]] * len(texts) for texts in captions], [""] * len(rows))
    captions, prompts, systems = [], [], []
    for messages in instructions["messages"][:]:
        system, *turns = [""] * (messages[0]["role"] != "system") + [message["content"] for message in messages]
        captions.append([turns[-1]])
        prompts.append([turns[:-1]])
        systems.append(system)
    talks = _with_turns(instructions, captions, prompts, systems)
    if rows.features["image_id"] != talks.features["image_id"]:
        rows, talks = (some.cast_column("image_id", datasets.Value("string")) for some in (rows, talks))
    return datasets.concatenate_datasets([rows, talks])


def _with_turns(
    rows: datasets.Dataset, captions: list[list[str]], prompts: list[list[list[str]]], systems: list[str]
) -> datasets.Dataset:
    """Pictures with what is said of them: `captions`, the assistant's last turns; for each of them `prompts`, what
    user and assistant say before it, in turn; `system`, "" where the template decides. Rows without captions are left
    out."""
    rows = rows.select_columns(["image", "image_id", "file_name"])
    columns = {"captions": captions, "prompts": prompts, "system": systems}
    features = {"captions": TURNS.feature, "prompts": TURNS, "system": datasets.Value("string")}
    rows = with_columns(rows, columns, features)
    return rows.select([number for number, texts in enumerate(captions) if texts])


def _turns(by_key: dict[str, list[str]], weights: dict[str, float], count: int) -> Iterator[tuple[str, str]]:
    """`count` pairs of key and caption: in every beginning of them each key comes up by its weight, as nearly as whole
    numbers allow, and its captions in their order, again from the first when all were."""
    total = sum(weights[key] for key in by_key)
    given = dict.fromkeys(by_key, 0)
    for place in range(1, count + 1):
        key = max(by_key, key=lambda key: place * weights[key] / total - given[key])
        yield key, by_key[key][given[key] % len(by_key[key])]
        given[key] += 1
