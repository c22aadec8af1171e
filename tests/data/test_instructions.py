"""Conversations about pictures in every form that TRL knows become rows with texts; what cannot be used is named."""

import json
from pathlib import Path

import datasets
import pytest

from vlmcap.data.errors import DataError
from vlmcap.data.images import missing_files, open_image
from vlmcap.data.instructions import load_instructions
from vlmcap.miniature.scenes import scenes


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("instructions")
    for number, scene in enumerate(scenes(2, seed=1, held_out=None)):
        scene.draw().save(folder / f"{number}.png")
    return folder


def turn(role: str, *content) -> dict:
    """One text is the content itself, several are parts; None is the picture."""
    if len(content) == 1:
        return {"role": role, "content": content[0]}
    parts = [{"type": "image"} if text is None else {"type": "text", "text": text} for text in content]
    return {"role": role, "content": parts}


TALK = [turn("user", "何色？"), turn("assistant", "赤です"), turn("user", "形は？"), turn("assistant", "丸です")]
FORMS = {
    "texts": (TALK, TALK),
    "one turn": (TALK[:2], TALK[:2]),
    "a system's message": ([turn("system", "短く"), *TALK], [turn("system", "短く"), *TALK]),
    "parts": ([turn("user", None, "何色？"), *TALK[1:]], TALK),
    "parts, the picture last": ([turn("user", "何色", "？", None), *TALK[1:]], TALK),
}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("picture", [{"image": "0.png"}, {"images": ["0.png"]}, {"file_name": "0.png"}], ids=" ".join)
def test_forms_of_trl(folder, tmp_path, capfd, form, picture):
    given, expected = FORMS[form]
    for file, image_dir in ((folder / "rows.jsonl", None), (tmp_path / "rows.jsonl", str(folder))):
        rows = load_instructions(write(file, [{"messages": given} | picture]), image_dir=image_dir)
        assert rows.column_names == ["image", "image_id", "file_name", "messages"]
        assert rows["messages"][0] == expected and rows[0]["image_id"] == rows[0]["file_name"] == "0.png"
        assert open_image(rows[0]).size == (84, 84) and rows.features["image"] == datasets.Image(decode=False)
        moved = "1 of 1 conversations the text was before the picture" in capfd.readouterr().err
        assert moved == ("last" in form)


@pytest.mark.parametrize("column", ["image", "images"])
def test_a_dataset_with_embedded_pictures(folder, tmp_path, column):
    """As llava-instruct-mix-vsft is: parts with an index, and null where a part has no text."""
    parts = [{"index": None, "text": "何色？", "type": "text"}, {"index": 0, "text": None, "type": "image"}]
    messages = [turn("user", parts), turn("assistant", [{"index": None, "text": "赤です", "type": "text"}])]
    cells = [
        {"bytes": (folder / f"{number}.png").read_bytes(), "path": path}
        for number, path in ((0, None), (1, "COCO_val2014_000000000042.jpg"))
    ]
    data = {"messages": [messages] * 2, column: cells if column == "image" else [[cell] for cell in cells]}
    feature = datasets.Image() if column == "image" else datasets.List(datasets.Image())
    rows = datasets.Dataset.from_dict(data).cast_column(column, feature)
    rows.to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    found = load_instructions(str(tmp_path / "data"), "train")
    assert [cell["bytes"] for cell in found["image"]] == [cell["bytes"] for cell in cells]
    assert found["messages"][:] == [TALK[:2]] * 2
    assert found["image_id"][1] == "42" and len(found["image_id"][0]) == 16
    assert found["file_name"][:] == [found["image_id"][0], "COCO_val2014_000000000042.jpg"]


def test_a_dataset_that_names_files_needs_their_folder(folder, tmp_path):
    names = {"messages": [TALK, TALK], "file_name": ["1.png", "none.png"], "image_id": [7, 7]}
    datasets.Dataset.from_dict(names).to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    with pytest.raises(
        DataError, match='(?s)2 of 2 .*row 0: there must be exactly one picture in "image" .*; image_dir says'
    ):
        load_instructions(str(tmp_path / "data"))
    rows = load_instructions(str(tmp_path / "data"), image_dir=str(folder))
    assert rows["image_id"][:] == ["7", "7"] and missing_files(rows) == [1]  # left out, and counted, in a run
    with pytest.raises(DataError, match=r"data \(tset\) cannot be loaded as instructions"):
        load_instructions(str(tmp_path / "data"), "tset")
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "other/train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r'other \(train\) has the columns text. Each row needs "messages"'):
        load_instructions(str(tmp_path / "other"))


ASK, SAY = TALK[:2]
FAULTS = [
    ({"messages": None}, "messages must be a list of messages, but is None"),
    ({"messages": []}, "messages must be a list"),
    ({"messages": ["何色？", "赤です"]}, 'message 1 must have "role" and "content", but is .何色？'),
    ({"messages": [{"from": "human", "value": "何色？"}, SAY]}, 'message 1 must have "role" and "content"'),
    ({"messages": [SAY, ASK]}, "message 1 has the role 'assistant', expected 'user'"),
    ({"messages": [ASK, ASK, SAY]}, "message 2 has the role 'user', expected 'assistant'"),
    ({"messages": [ASK, turn("tool", "x"), SAY]}, "message 2 has the role 'tool'"),
    ({"messages": [ASK, SAY, turn("system", "x")]}, "message 3 has the role 'system', expected 'user'"),
    ({"messages": [ASK]}, "must end with one of the assistant"),
    ({"messages": [ASK, SAY, ASK]}, "must end with one of the assistant"),
    ({"messages": [turn("system", "x")]}, "must end with one of the assistant"),
    ({"messages": [turn("user", " "), SAY]}, "message 1 is an empty text"),
    ({"messages": [ASK, turn("assistant", "")]}, "message 2 is an empty text"),
    ({"messages": [turn("user", [{"type": "image"}]), SAY]}, "message 1: the content of a message must be a text or"),
    ({"messages": [turn("user", 3), SAY]}, "message 1: the content of a message must be a text or parts"),
    ({"messages": [turn("user", [{"type": "video"}]), SAY]}, "message 1: a part must be .*'video'"),
    ({"messages": [turn("user", None, None, "x"), SAY]}, "message 1 has 2 pictures: one is read"),
    ({"messages": [ASK, turn("assistant", None, "x")]}, "message 2 has a picture: only the first message of the user"),
    ({"messages": [ASK, SAY, turn("user", None, "x"), SAY]}, "message 3 has a picture: only the first"),
    ({"messages": [turn("system", None, "x"), ASK, SAY]}, "message 1 has a picture: only the first"),
    ({"messages": [turn("user", "<image>\n何色？"), SAY]}, "message 1 has <image> in its text: leave it out"),
    (
        {"messages": [turn("user", [{"type": "image", "image": "0.png"}, {"type": "text", "text": "x"}]), SAY]},
        'message 1: the picture must be in the row\'s column "image"',
    ),
    ({"image": None}, 'there must be exactly one picture in "image" or "images" or "file_name"'),
    ({"image": None, "images": ["0.png", "1.png"]}, "exactly one picture"),
    ({"image_id": 1.5}, "image_id must be a number or a text, but is 1.5"),
    ({"file_name": 3}, "file_name must be a text, but is 3"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=range(len(FAULTS)))
def test_what_cannot_be_used_is_named(folder, change, message):
    row = {"messages": TALK, "image": "0.png"}
    file = write(folder / "faults.jsonl", [row, row | change])
    with pytest.raises(DataError, match=rf"(?s)1 of 2 instructions in .*faults.jsonl .*line 2: .*{message}"):
        load_instructions(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "none.jsonl holds no instructions"),
        ('{"messages": [', "line 1: no instructions in JSON"),
        ("[]", "line 1: a row must be an object"),
    ],
)
def test_files_that_hold_none(folder, content, message):
    (folder / "none.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        load_instructions(str(folder / "none.jsonl"))
    with pytest.raises(DataError, match=r"missing.jsonl cannot be read \(No such file .*a file of instructions"):
        load_instructions(str(folder / "missing.jsonl"))
