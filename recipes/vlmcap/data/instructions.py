"""Instructions: conversations about one picture each, in TRL's form, to be trained on beside captions.

A row holds `messages`, a list of {"role", "content"}: perhaps a system's message, then user and assistant in turn, the
assistant's the last. A content is a text, or parts of {"type": "text", "text"}; the first user's may also have the
part {"type": "image"}. The picture is in `image`, or alone in `images`, embedded or a path, or `file_name` names it.
"""

from hashlib import sha256
from pathlib import Path

import datasets

from vlmcap.data.errors import DataError
from vlmcap.data.picture_files import COCO_NAME
from vlmcap.data.picture_rows import HEX, RowForm, check_faults, message_text, no_picture, read_picture_rows
from vlmcap.errors import notice
from vlmcap.strict_parsing import shown

INSTRUCTIONS = RowForm(
    "instructions",
    ("messages",),
    ("image", "images", "file_name"),
    'Each row needs "messages", a list of {"role", "content"}, and one picture in "image" or "images", or its name in'
    ' "file_name".',
)
MESSAGES = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})
PLACEHOLDER = "<image>"  # what LLaVA's files have where the picture is


def load_instructions(
    source: str, split: str = "train", image_dir: str | None = None, revision: str | None = None
) -> datasets.Dataset:
    """Conversations of a file or a dataset. No picture is opened.

    Args:
        source: a .jsonl or .json file of rows, or a dataset as `load_dataset` takes it (Hub id or folder).
        split, revision: of a dataset.
        image_dir: folder or zip file of the pictures, where rows name files. Without it a name in a file of rows is a
            path as seen from the working folder, or else from the folder of that file.

    Returns:
        One row a conversation, in their order: `image` as `load_captions` has it, `image_id` and `file_name` (texts),
        `messages` (a list of {"role", "content"}, contents are texts). The first user's turn begins with the picture,
        which no content shows. `image_id` is the row's, else COCO's number where the file is named as COCO's, else the
        name of the file, else the first digits of the picture's hash. A picture may have several rows.

    Raises:
        DataError: there is no such source, or no conversation in it; naming rows: messages that are not as above, no
            picture or several.
    """
    records, images, place = read_picture_rows(source, INSTRUCTIONS, image_dir, split, revision)
    faults, found, moved, count = [], [], 0, 0
    for number, record in enumerate(records):
        count += 1
        try:
            messages, last = _messages(record.get("messages"))
            cell = images[number]["image"]
            if cell["bytes"] is None and not cell["path"]:
                raise ValueError(no_picture(INSTRUCTIONS))
            found.append(_named(record, cell) | {"messages": messages})
            moved += last
        except ValueError as error:
            faults.append(f"{place(number)}: {error}")
    if not count:
        raise DataError(f"{source} holds no instructions. {INSTRUCTIONS.text}")
    check_faults(faults, count, source, INSTRUCTIONS)
    if moved:
        notice(
            f"{source}: in {moved:,} of {count:,} conversations the text was before the picture; now the picture is"
        )
    text = datasets.Value("string")
    features = datasets.Features({"image_id": text, "file_name": text, "messages": MESSAGES})
    return datasets.concatenate_datasets([images, datasets.Dataset.from_list(found, features=features)], axis=1)


def _named(record: dict, cell: dict) -> dict:
    """The `image_id` and `file_name` of a row with a picture."""
    image_id, name = record.get("image_id"), record.get("file_name") or Path(cell["path"] or "").name
    if image_id is not None and type(image_id) not in (int, str):
        raise ValueError(f"image_id must be a number or a text, but is {shown(image_id)}")
    if not isinstance(name, str):
        raise ValueError(f"file_name must be a text, but is {shown(name)}")
    if image_id is None:
        coco = COCO_NAME.fullmatch(Path(name).name)
        image_id = int(coco[1].removesuffix(".jpg")) if coco else name or sha256(cell["bytes"]).hexdigest()[:HEX]
    return {"image_id": str(image_id), "file_name": name or str(image_id)}


def _messages(value: object) -> tuple[list[dict[str, str]], bool]:
    """Messages with texts as contents, and whether the picture came after a text; ValueError saying what is wrong."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"messages must be a list of messages, but is {shown(value)}")
    messages, last = [], False
    system = isinstance(value[0], dict) and value[0].get("role") == "system"
    for number, message in enumerate(value):
        what = f"message {number + 1}"
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f'{what} must have "role" and "content", but is {shown(message)}')
        turn = number - system
        wanted = "system" if turn < 0 else "assistant" if turn % 2 else "user"
        if message["role"] != wanted:
            raise ValueError(
                f"{what} has the role {shown(message['role'])}, expected {wanted!r}: perhaps a system's message, then"
                " user and assistant in turn"
            )
        pictures = _pictures(message["content"], what)
        if pictures and turn:
            raise ValueError(f"{what} has a picture: only the first message of the user may")
        if len(pictures) > 1:
            raise ValueError(f"{what} has {len(pictures)} pictures: one is read")
        text = message_text(message["content"], what)
        if not text.strip():
            raise ValueError(f"{what} is an empty text")
        if PLACEHOLDER in text:
            raise ValueError(
                f'{what} has {PLACEHOLDER} in its text: leave it out, or write a part {{"type": "image"}}; the picture'
                " is before the text in any case"
            )
        last = last or any(pictures)
        messages.append({"role": wanted, "content": text})
    if len(messages) - system < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("messages must end with one of the assistant, after one of the user")
    return messages, last


def _pictures(content: object, what: str) -> list[bool]:
    """For each part of a content that is a picture whether a text is before it."""
    pictures, text = [], False
    for part in content if isinstance(content, list) else ():
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "image"):
            raise ValueError(
                f'{what}: a part must be {{"type": "text", "text"}} or {{"type": "image"}}: {shown(part)}'
            )
        if kind == "image":
            pictures.append(text)
            if part.get("image"):
                raise ValueError(f'{what}: the picture must be in the row\'s column "image", and not in the message')
        text = text or kind == "text"
    return pictures
