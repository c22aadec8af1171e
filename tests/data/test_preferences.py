"""Preferences in every form that TRL knows become rows of pictures; what cannot be used is named by its row."""

import json
from pathlib import Path

import datasets
import pytest

from vlmcap.data.errors import DataError
from vlmcap.data.preferences import check_unseen, hold_out, preferences_record, read_preferences
from vlmcap.miniature.scenes import scenes

PROMPT = "この画像を日本語で短く説明してください。"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    for number, scene in enumerate(scenes(3, seed=1, held_out=None)):
        scene.draw().save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:100])
    return folder


def turn(role: str, text: str, parts: bool = False) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}] if parts else text}


def said(text: str, **more) -> list[dict]:
    return [turn("assistant", text, **more)]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


FORMS = {
    "texts": {"prompt": PROMPT, "chosen": "丸", "rejected": "星"},
    "no prompt": {"chosen": "丸", "rejected": "星"},
    "messages": {"prompt": [turn("user", PROMPT)], "chosen": said("丸"), "rejected": said("星")},
    "parts": {
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}],
        "chosen": said("丸", parts=True),
        "rejected": said("星", parts=True),
    },
    "implicit prompt": {
        "chosen": [turn("user", PROMPT, True), *said("丸")],
        "rejected": [turn("user", PROMPT, True), *said("星")],
    },
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("picture", [{"image": "0.png"}, {"images": ["0.png"]}], ids=["image", "images"])
def test_forms_of_trl(folder, tmp_path, form, picture):
    """Names of pictures are seen from the folder of the file, or looked for in image_dir."""
    row = FORMS[form] | picture
    for file, image_dir in ((folder / "rows.jsonl", None), (tmp_path / "rows.jsonl", str(folder))):
        rows = read_preferences(write(file, [row]), PROMPT, image_dir)
        assert (rows["chosen"][0], rows["rejected"][0], rows["file_name"][0]) == (["丸"], ["星"], "0.png")
    document = tmp_path / "rows.json"
    document.write_text(json.dumps([row]), encoding="utf-8")
    assert read_preferences(str(document), PROMPT, str(folder))["sha256"] == rows["sha256"]


def test_pairs_of_one_picture_are_one_row(folder):
    """By its id, or by its bytes where rows have no id."""
    ids = [{"image_id": 7}, {"image_id": 8}, {"image_id": 7}]
    lines = [FORMS["texts"] | {"image": f"{number % 2}.png"} for number in range(3)]
    by_id = read_preferences(write(folder / "ids.jsonl", [a | b for a, b in zip(lines, ids, strict=True)]), PROMPT)
    assert by_id["image_id"][:] == ["7", "8"] and by_id["chosen"][:] == [["丸", "丸"], ["丸"]]
    by_bytes = read_preferences(write(folder / "bytes.jsonl", lines), PROMPT)
    assert by_bytes["image_id"][0] == by_bytes["sha256"][0][:16] and len(by_bytes) == 2
    assert by_bytes["sha256"][:] == by_id["sha256"][:]


@pytest.mark.parametrize("column", ["image", "images"])
def test_a_dataset_with_embedded_pictures(folder, tmp_path, column):
    cells = [{"bytes": (folder / f"{number}.png").read_bytes(), "path": None} for number in range(2)]
    feature = datasets.Image() if column == "image" else datasets.List(datasets.Image())
    rows = {name: [value] * 2 for name, value in FORMS["parts"].items()}
    rows[column] = cells if column == "image" else [[cell] for cell in cells]
    datasets.Dataset.from_dict(rows).cast_column(column, feature).to_parquet(
        tmp_path / "data/train-00000-of-00001.parquet"
    )
    found = read_preferences(str(tmp_path / "data"), PROMPT)
    assert [cell["bytes"] for cell in found["image"]] == [cell["bytes"] for cell in cells]
    assert found["chosen"][:] == [["丸"], ["丸"]]


def test_a_dataset_names_no_file_outside(folder, tmp_path):
    rows = {name: [value] for name, value in FORMS["texts"].items()} | {"image": [str(folder / "0.png")]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    with pytest.raises(DataError, match="row 0: there must be exactly one picture"):
        read_preferences(str(tmp_path / "data"), PROMPT)
    rows["image"] = ["0.png"]
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "more/train-00000-of-00001.parquet")
    assert len(read_preferences(str(tmp_path / "more"), PROMPT, str(folder))) == 1


FAULTS = [
    ({"chosen": "星"}, "chosen and rejected are the same text, '星'"),
    ({"rejected": " 丸 "}, "chosen and rejected are the same text, '丸'"),
    ({"chosen": "　"}, "chosen is an empty text"),
    ({"prompt": "何？"}, "its prompt is '何？', and the adapter is asked 'この画像"),
    ({"prompt": [turn("system", "x"), turn("user", PROMPT)]}, "one turn of the user"),
    ({"chosen": 3}, "chosen must be a text, or messages that end with the assistant's, but is 3"),
    ({"image": "none.png"}, "there is no picture .*none.png; image_dir says where pictures are"),
    ({"image": None}, "there must be exactly one picture"),
    ({"images": ["0.png", "1.png"], "image": None}, "there must be exactly one picture"),
    ({"image": "broken.png"}, "broken.png"),
    ({"image_id": 1.5}, "image_id must be a number or a text, but is 1.5"),
    ({"image_id": 1, "image": "1.png"}, "image_id 1 is that of another picture in .*line 1"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=[message[:30] for _, message in FAULTS])
def test_what_cannot_be_used_is_named(folder, change, message):
    row = FORMS["texts"] | {"image": "0.png", "image_id": 1}
    file = write(folder / "faults.jsonl", [row, row | change])
    with pytest.raises(DataError, match=rf"(?s)1 of 2 preferences .*line 2: .*{message}"):
        read_preferences(file, PROMPT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no preferences"),
        ("{", "line 1: no preferences in JSON"),
        ("[]", "line 1: a row must be an object"),
    ],
)
def test_files_that_hold_none(folder, content, message):
    (folder / "none.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_preferences(str(folder / "none.jsonl"), PROMPT)
    with pytest.raises(DataError, match=r"missing.jsonl cannot be read \(No such file"):
        read_preferences(str(folder / "missing.jsonl"), PROMPT)


def test_held_out_pictures_are_unseen(folder):
    rows = read_preferences(
        write(folder / "three.jsonl", [FORMS["texts"] | {"image": f"{number}.png"} for number in range(3)]), PROMPT
    )
    train, heldout = hold_out(rows, 0.3, seed=1)
    assert len(train) == 2 and len(heldout) == 1 and not set(train["sha256"]) & set(heldout["sha256"])
    check_unseen(train, heldout)
    with pytest.raises(DataError, match="1 pictures are in the preferences and in the held-out ones"):
        check_unseen(rows, heldout)
    with pytest.raises(DataError, match="heldout_share 1 of the preferences' 3 images leaves no pair"):
        hold_out(rows, 1, seed=1)
    record = preferences_record(str(folder / "three.jsonl"))
    assert record["revision"].startswith("sha256:") and record["split"] == "train"


def test_several_prompts(folder):
    """Each row says which; rows of one picture may differ, the two answers of a row may not."""
    asked = [PROMPT, "Describe it.", PROMPT]
    rows = [FORMS["texts"] | {"image": "0.png", "prompt": prompt} for prompt in asked]
    found = read_preferences(write(folder / "several.jsonl", rows), PROMPT, others=["Describe it."])
    assert found["asked"] == [asked]
    with pytest.raises(DataError, match="its prompt is 'Describe it.', and the adapter is asked 'この画像"):
        read_preferences(str(folder / "several.jsonl"), PROMPT)
    faults = [
        ({}, "it has no prompt, and there are several"),
        ({"prompt": "Describe it.", "chosen": [turn("user", PROMPT), turn("assistant", "猫")]}, "different prompts"),
    ]
    for change, message in faults:
        row = {key: value for key, value in FORMS["texts"].items() if key != "prompt"} | {"image": "0.png"} | change
        with pytest.raises(DataError, match=message):
            read_preferences(write(folder / "fault.jsonl", [row]), PROMPT, others=["Describe it."])
