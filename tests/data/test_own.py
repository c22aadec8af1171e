"""One's own pictures and captions: every form is read to the same dataset, and bad input is read right or named."""

import csv
import hashlib
import io
import json
import os
import unicodedata
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard
from PIL import Image

from vlmcap.data import pictures as reading
from vlmcap.data.arguments import PublishArguments
from vlmcap.data.errors import DataError
from vlmcap.data.images import dataset_record, load_captions, open_image
from vlmcap.data.publish import build

CAPTIONS = {
    "a 1.png": ["赤い丸がある", "丸い形です。"],
    "子/犬😀.png": ["犬が走る"],
    "sub/100%.png": ["高さ1,5メートルの「棒」", "青い空"],
    "b.png": ["空に鳥がいる"],
}


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (12, 8), (number * 40 % 256, number % 256, 99))


def write_pictures(folder: Path, names=CAPTIONS) -> Path:
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """The pictures of CAPTIONS, without captions."""
    return write_pictures(tmp_path / "own")


def own(annotations: Path | str, **changed) -> PublishArguments:
    place = Path(changed.pop("place", None) or Path(annotations).parent)
    arguments = {"source": "own", "language": "ja", "val_size": 1, "test_size": 1, "overwrite": True}
    arguments |= {"annotations": [str(annotations)], "output_dir": str(place / "out")}
    return PublishArguments(**arguments | changed)


def read_back(args: PublishArguments, image_dir: Path | None = None) -> dict[str, list[str]]:
    """File name -> captions of all splits; every picture is decoded."""
    found = {}
    for split in datasets.get_dataset_split_names(args.output_dir):
        for row in load_captions(args.output_dir, split, image_dir and str(image_dir)):
            assert open_image(row).mode == "RGB"
            found[row["file_name"]] = row["captions"]
    return found


# Forms


def as_imagefolder(folder: Path) -> Path:
    lines = [json.dumps({"file_name": name, "text": texts}) for name, texts in CAPTIONS.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder


def write_csv(path: Path, delimiter: str = ",", encoding: str = "utf-8", columns=("file_name", "text")) -> Path:
    """A row a caption; a row without a caption for no picture of CAPTIONS."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(columns)
    writer.writerows((name, caption) for name, texts in CAPTIONS.items() for caption in texts)
    path.write_bytes(text.getvalue().encode(encoding))
    return path


def as_imagefolder_csv(folder: Path) -> Path:
    write_csv(folder / "metadata.csv")
    return folder


def as_jsonl(folder: Path) -> Path:
    lines = [
        {"pic": name, "image_id": f"id {n}", "c1": t[0], "c2": t[1:]} for n, (name, t) in enumerate(CAPTIONS.items())
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return folder / "rows.jsonl"


def as_coco(folder: Path) -> Path:
    pictures = [{"id": f"x{number}", "file_name": name} for number, name in enumerate(CAPTIONS)]
    texts = [{"image_id": f"x{n}", "caption": t} for n, ts in enumerate(CAPTIONS.values()) for t in ts]
    (folder / "coco.json").write_text(json.dumps({"images": pictures, "annotations": texts}))
    return folder / "coco.json"


def as_pairs(folder: Path) -> Path:
    for name, texts in CAPTIONS.items():
        (folder / name).with_suffix(".txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return folder


FORMS = {
    "imagefolder, jsonl": (as_imagefolder, {}),
    "imagefolder, csv": (as_imagefolder_csv, {}),
    "csv": (lambda folder: write_csv(folder / "rows.csv", columns=("img", "c")), {"caption_column": ["c"]}),
    "tsv": (lambda folder: write_csv(folder / "rows.tsv", "\t"), {}),
    "csv with semicolons and BOM": (lambda folder: write_csv(folder / "rows.csv", ";", "utf-8-sig"), {}),
    "csv in UTF-16": (lambda folder: write_csv(folder / "rows.csv", encoding="utf-16"), {}),
    "jsonl with text ids": (as_jsonl, {"image_column": "pic", "caption_column": ["c1", "c2"]}),
    "COCO with text ids": (as_coco, {}),
    "pairs": (as_pairs, {}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("embedded", [False, True])
def test_every_form_becomes_the_same_dataset(folder, form, embedded):
    write, changed = FORMS[form]
    args = own(write(folder), place=folder.parent, images=str(folder) if embedded else None, **changed)
    summary = build(args)
    assert read_back(args, None if embedded else folder) == CAPTIONS
    assert {split: counts["images"] for split, counts in summary["splits"].items()} == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }
    assert isinstance(load_captions(args.output_dir, "test", str(folder))["image_id"][0], str)
    assert dataset_record(args.output_dir, "test")["corpus"] == "own"


def test_a_dataset_in_several_languages_says_that_they_are_not_kept(tmp_path, capfd):
    names = ["a.png", "b.png", "c.png"]
    write_pictures(tmp_path / "pictures", names)
    columns = {
        "file_name": names,
        "captions": [["犬", "a dog"], ["猫"], ["馬"]],
        "languages": [["ja", "en"], ["ja"], ["ja"]],
    }
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "many/data/train-00000-of-00001.parquet")
    args = own(tmp_path / "many", images=str(tmp_path / "pictures"))
    build(args)
    assert "many (train): languages of its captions are not kept" in capfd.readouterr().err
    assert "languages" not in load_captions(args.output_dir, "test").column_names


def test_a_dataset_of_load_dataset(tmp_path):
    """Pictures inside, captions as records, an id that is a number; two splits become one, drawn again. A row without
    a picture is listed; a picture that is any file of this machine is refused."""
    rows = [
        {"pic": picture(n), "image_id": n, "answers": [{"raw": text, "id": 1} for text in texts]}
        for n, texts in enumerate(CAPTIONS.values())
    ]
    empty = {"pic": None, "image_id": 9, "answers": [{"raw": "無", "id": 1}]}
    for split, part in (("train", [*rows[:3], empty]), ("test", rows[3:])):
        features = datasets.Features(
            {
                "pic": datasets.Image(),
                "image_id": datasets.Value("int64"),
                "answers": datasets.List({"raw": datasets.Value("string"), "id": datasets.Value("int64")}),
            }
        )
        datasets.Dataset.from_list(part, features=features).to_parquet(tmp_path / f"hub/data/{split}-0.parquet")
    args = own(tmp_path / "hub", image_column="pic", caption_column=["answers"])
    assert build(args)["left_out"]["rules"][1] | {"description": ""} == {
        "name": "no_image_name",
        "description": "",
        "count": 1,
    }
    splits = datasets.load_dataset(args.output_dir)
    found = {row["image_id"]: row for split in splits.values() for row in split}
    assert {n: row["captions"] for n, row in found.items()} == dict(enumerate(CAPTIONS.values()))
    assert all(row["image"].tobytes() == picture(n).tobytes() for n, row in found.items())
    picture(1).save(tmp_path / "secret.png")
    outside = rows[0] | {"pic": {"bytes": None, "path": str(tmp_path / "secret.png")}}
    pq.write_table(pa.Table.from_pylist([outside]), tmp_path / "hub/data/test-0.parquet")
    with pytest.raises(DataError, match="secret.png' is not in the dataset but a path out of it"):
        build(args)


# Rows of one picture, splits


def test_rows_of_one_picture_are_grouped_by_id_or_bytes(folder, capsys):
    (folder / "copy.png").write_bytes((folder / "b.png").read_bytes())
    lines = [("b.png", "一"), ("copy.png", "二"), ("a 1.png", "三"), ("a 1.png", "四"), ("sub/100%.png", "五")]
    (folder / "rows.csv").write_text("image,caption\n" + "".join(f"{name},{text}\n" for name, text in lines))
    args = own(folder / "rows.csv")
    build(args)
    assert read_back(args, folder) == {"b.png": ["一", "二"], "a 1.png": ["三", "四"], "sub/100%.png": ["五"]}
    assert "5 rows of 3 pictures, grouped by id; 1 of them by equal bytes" in capsys.readouterr().err


def test_an_id_of_two_pictures_is_refused(folder):
    (folder / "rows.csv").write_text("image,caption,image_id\na 1.png,一,7\nb.png,二,7\n")
    with pytest.raises(DataError, match="rows.csv: line 3: the id '7' has another picture, a 1.png, already"):
        build(own(folder / "rows.csv"))


def test_splits_are_drawn_by_picture_seeded_and_may_be_left_out(tmp_path):
    folder = write_pictures(tmp_path / "own", [f"{n}.png" for n in range(30)])
    (folder / "m.csv").write_text("image,caption\n" + "".join(f"{n}.png,絵{n}\n{n}.png,別{n}\n" for n in range(30)))

    def drawn(**changed) -> dict:
        args = own(folder / "m.csv", **changed)
        build(args)
        loaded = datasets.load_dataset(args.output_dir)
        assert sorted(sum((loaded[split]["image_id"][:] for split in loaded), [])) == sorted(
            f"{n}.png" for n in range(30)
        )
        return {split: loaded[split]["image_id"][:] for split in loaded}

    first = drawn(val_size=4, test_size=5)
    assert [len(ids) for ids in first.values()] == [21, 4, 5]
    assert first == drawn(val_size=4, test_size=5) != drawn(val_size=4, test_size=5, seed=1)
    assert [len(ids) for ids in drawn(val_size=None, test_size=None).values()] == [24, 3, 3]
    assert list(drawn(val_size=0, test_size=2)) == ["train", "test"]
    assert list(drawn(val_size=0, test_size=0)) == ["train"]
    with pytest.raises(DataError, match="--val_size 10 and --test_size 20 leave no picture to train on: there are 30"):
        drawn(val_size=10, test_size=20)
    args = own(folder / "m.csv", val_size=0, test_size=0)
    build(args)
    with pytest.raises(DataError, match="no split 'test'; it has train. Name one of them with --split, or draw"):
        load_captions(args.output_dir, "test", str(folder))
    assert [len(ids) for ids in drawn(val_size=0.1, test_size=0.01).values()] == [26, 3, 1]
    for size, source in ((1.5, "own"), (-0.1, "own"), (0.1, "stair"), (float("nan"), "own")):
        with pytest.raises(DataError, match=f"--test_size {size:g}: expected a number of images"):
            language = "ja" if source == "own" else None
            build(own(folder / "m.csv", test_size=size, source=source, language=language, tokenizer="x"))


# Names and places


def test_names_as_people_and_systems_write_them(tmp_path):
    """NFD on disk (macOS) and NFC in the table, and the other way; backslashes; absolute paths."""
    nfd = unicodedata.normalize("NFD", "が/ポスト.png")
    folder = write_pictures(tmp_path / "own", [nfd, "ぶどう.png", "d/e.png", "f.png"])
    names = [
        unicodedata.normalize("NFC", nfd),
        unicodedata.normalize("NFD", "ぶどう.png"),
        "d\\e.png",
        folder / "f.png",
    ]
    (folder / "m.csv").write_text("image,caption\n" + "".join(f"{name},絵{n}\n" for n, name in enumerate(names)))
    args = own(folder / "m.csv")
    build(args)
    assert read_back(args, folder) == {nfd: ["絵0"], "ぶどう.png": ["絵1"], "d/e.png": ["絵2"], "f.png": ["絵3"]}


def test_equal_names_in_different_folders_are_different_pictures(tmp_path):
    folder = write_pictures(tmp_path / "own", ["x/1.png", "y/1.png", "z/1.png"])
    for number, name in enumerate("xyz"):
        (folder / name / "1.txt").write_text(f"絵{number}", encoding="utf-8")
    args = own(folder)
    build(args)
    assert read_back(args, folder) == {"x/1.png": ["絵0"], "y/1.png": ["絵1"], "z/1.png": ["絵2"]}


def test_symbolic_links(tmp_path):
    """To a picture, to a folder, in a circle, and to nothing."""
    store = write_pictures(tmp_path / "store", ["p.png", "deep/q.png"])
    folder = write_pictures(tmp_path / "own", ["x.png", "y.png", "r.png"])  # r.png equals none of the store
    (folder / "x.png").unlink()
    (folder / "y.png").unlink()
    os.symlink(store / "p.png", folder / "p.png")
    os.symlink(store / "deep", folder / "deep")
    os.symlink(folder, folder / "circle")
    names = ["p", "deep/q", "r"]
    for number, name in enumerate(names):
        (folder / f"{name}.txt").write_text(f"絵{number}", encoding="utf-8")
    args = own(folder)
    build(args)
    assert read_back(args, folder) == {f"{name}.png": [f"絵{number}"] for number, name in enumerate(names)}
    os.symlink(tmp_path / "gone.png", folder / "gone.png")
    (folder / "gone.txt").write_text("絵", encoding="utf-8")
    with pytest.raises(DataError, match="1 of 4 photographs .*\n  gone.png: "):
        build(own(folder))


# Captions


def test_captions_in_another_language_are_counted_and_kept(folder):
    (folder / "m.csv").write_text("image,caption\na 1.png,A red circle\nb.png,犬が走る\nsub/100%.png,Xin chào bạn\n")
    for language, count in (("ja", 2), ("en", 1), ("vi", 2), ("none", None)):
        args = own(folder / "m.csv", language=language)
        summary = build(args)
        found = summary["other_language"]
        assert (found and found["count"]) == count and summary["cleaning"]["captions_out"] == 3
        card = (Path(args.output_dir) / "README.md").read_text()
        assert ("look like another language" in card) == (language != "none")


def test_ten_thousand_captions_of_one_picture(folder):
    (folder / "m.csv").write_text(
        "image,caption\nb.png,空\nsub/100%.png,海\n" + "".join(f"a 1.png,絵の説明その{n}\n" for n in range(10_000))
    )
    args = own(folder / "m.csv")
    assert build(args)["cleaning"]["captions_out"] == 10_002
    assert len(read_back(args, folder)["a 1.png"]) == 10_000


def test_shift_jis(folder, capsys):
    names = ["a 1.png", "b.png", "sub/100%.png"]
    text = "image,caption\n" + "".join(f"{name},①空に雲が{n}つある\n" for n, name in enumerate(names))
    (folder / "m.csv").write_bytes(text.encode("cp932"))
    args = own(folder / "m.csv")
    build(args)
    assert read_back(args, folder)["b.png"] == ["①空に雲が1つある"]
    assert "m.csv: read as Shift-JIS (cp932)" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"m.csv: byte .* Save it as UTF-8 \(Shift-JIS is read with --language ja\)"):
        build(own(folder / "m.csv", language="en"))


def test_rules_of_other_languages_keep_what_carries_meaning(folder):
    persian = "می\u200cخواهم"  # with a zero-width non-joiner
    (folder / "m.jsonl").write_text(
        "".join(
            json.dumps({"image": name, "caption": f"{persian}  {n}\t\x07"}) + "\n" for n, name in enumerate(CAPTIONS)
        )
    )
    args = own(folder / "m.jsonl", language="none")
    assert build(args)["cleaning"]["captions_out"] == 4
    assert read_back(args, folder)["b.png"] == [f"{persian} 3"]
    assert DatasetCard.load(Path(args.output_dir) / "README.md").data.language is None


def test_what_is_left_out_is_counted_and_listed(folder):
    as_pairs(folder)
    (folder / "b.txt").write_text(" \n")
    (folder / "notes.txt").write_text("someone's notes")
    args = own(folder)
    summary = build(args)
    rules = {rule["name"]: rule["count"] for rule in summary["left_out"]["rules"]}
    assert rules == {"no_caption": 1, "no_image_name": 0, "no_picture_beside": 1}
    assert [row["image_name"] for row in summary["left_out"]["rows"]] == ["b.png", "notes.txt"]
    assert "`notes.txt`" in (Path(args.output_dir) / "README.md").read_text()


def test_the_card_has_no_credits_of_others(folder):
    args = own(as_imagefolder(folder), pretty_name="Our zoo", license="cc0-1.0", author="Zoo | <b>team</b>")
    build(args)
    card = DatasetCard.load(Path(args.output_dir) / "README.md")
    assert (card.data.pretty_name, card.data.license, card.data.language) == ("Our zoo", "cc0-1.0", ["ja"])
    assert not [word for word in ("COCO", "STAIR", "YJ", "Flickr", "@in", "cited") if word in card.text]
    assert "Zoo" in card.text and "<b>" not in card.text


# Pictures


def save(name: str, image: Image.Image, **options):
    return name, lambda path: image.save(path, **options)


GREY_16 = Image.fromarray(np.full((8, 8), 0x80FF, np.uint16))
PICTURES = dict(
    [
        save("pixel.png", Image.new("RGB", (1, 1), "red")),
        save("cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0))),
        save("grey16.png", GREY_16),
        save("clear.png", Image.new("RGBA", (8, 8), (0, 0, 0, 0))),
        save("new.avif", Image.new("RGB", (8, 8), "red"), quality=95),
    ]
)


@pytest.mark.parametrize("name", PICTURES)
def test_unusual_pictures_are_read(folder, name):
    PICTURES[name](folder / name)
    (folder / "m.csv").write_text(f"image,caption\n{name},絵\na 1.png,丸\nb.png,空\n")
    args = own(folder / "m.csv", images=str(folder), test_size=0, val_size=0)
    build(args)
    rows = load_captions(args.output_dir, "train")
    shown = {row["file_name"]: open_image(row).getpixel((0, 0)) for row in rows}[name]
    expected = {"grey16.png": (128, 128, 128), "clear.png": (255, 255, 255)}.get(name, (255, 0, 0))
    assert max(abs(a - b) for a, b in zip(shown, expected, strict=True)) <= 12


def test_heic(folder, monkeypatch):
    """With pillow-heif it is read; without, one sentence names the package."""
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (64, 64), "red")).save(folder / "phone.heic")
    (folder / "m.csv").write_text("image,caption\nphone.heic,絵\na 1.png,丸\nb.png,空\n")
    args = own(folder / "m.csv", images=str(folder), test_size=0, val_size=0)
    build(args)
    assert open_image(load_captions(args.output_dir, "train")[0]).size == (64, 64)
    monkeypatch.setattr(reading, "pillow_heif", None)
    monkeypatch.setattr(reading, "FORMATS", tuple(name for name in reading.FORMATS if name != "HEIF"))
    with pytest.raises(DataError, match=r'phone.heic: a HEIC picture: install pillow-heif \(pip install "vlmcap'):
        build(args)


def test_pictures_that_cannot_be_read_are_all_named(folder):
    Image.new("1", (20_000, 20_000)).save(folder / "huge.png")
    (folder / "text.jpg").write_text("not a picture")
    (folder / "m.csv").write_text("image,caption\nhuge.png,絵\ntext.jpg,文\nnone.png,無\na 1.png,丸\nb.png,空\n")
    with pytest.raises(DataError, match="3 of 5 photographs") as error:
        build(own(folder / "m.csv"))
    assert "At most 89,478,485 pixels are read here: scale it down" in str(error.value)
    assert "none.png: missing" in str(error.value) and "text.jpg: not an image" in str(error.value)
    summary = build(own(folder / "m.csv", skip_bad_images=True, val_size=0, test_size=0))
    assert summary["splits"]["train"]["images"] == 2 and len(summary["bad_images"]) == 3


# What must stop the build


def table(text: str, name: str = "m.csv", **changed):
    def write(folder: Path) -> PublishArguments:
        (folder / name).write_text(text, encoding="utf-8")
        return own(folder / name, **changed)

    return write


def empty_folder(folder: Path) -> PublishArguments:
    (folder / "nothing").mkdir()
    return own(folder / "nothing")


def table_beside(folder: Path) -> PublishArguments:
    (folder / "labels.csv").write_text("image,caption\n")
    return own(folder)


def pair_of_two(folder: Path) -> PublishArguments:
    as_pairs(folder)
    (folder / "b.jpg").write_bytes((folder / "b.png").read_bytes())
    return own(folder)


REFUSED = {
    "an empty folder": (empty_folder, "nothing: 0 pictures and no captions that are recognised"),
    "pictures alone": (lambda folder: own(folder), "own: 4 pictures and no captions that are recognised"),
    "a table of another name": (table_beside, r"Give the file itself: --annotations \S*labels.csv --images \S*own"),
    "no such thing": (
        lambda folder: own("no/such/thing", place=folder),
        "no/such/thing: neither a folder, a file, nor",
    ),
    "another kind of file": (table("x", "m.xlsx"), "m.xlsx: not a .csv, .tsv, .json or .jsonl file"),
    "a table without rows": (table("image,caption\n"), "m.csv: no picture with a caption"),
    "a table without captions": (
        table("image,caption\nb.png,\na 1.png, \n"),
        "m.csv: no picture with a caption .*without a caption: 2",
    ),
    "no caption column": (
        table("image,notes\nb.png,絵\n"),
        "m.csv: has no column with a usual name; it has image, notes",
    ),
    "no image column": (table("bild,caption\nb.png,絵\n"), "Say which: --image_column NAME"),
    "a column that is not there": (
        table("image,caption\nb.png,絵\n", caption_column=["caption", "c2"]),
        "m.csv: has no column 'c2'; it has image, caption. Say which: --caption_column NAME",
    ),
    "a comma in a caption": (
        table("image,caption\nb.png,赤い, 丸\n"),
        "m.csv: line 2: not 2 values, as the first line",
    ),
    "a column twice": (table("image,image\nb.png,絵\n"), "m.csv: the first line has the column 'image' twice"),
    "a quote that is not closed": (table('image,caption\nb.png,"絵\n'), "m.csv: line .*Write a double quote"),
    "a caption that is a number": (
        table('{"image": "b.png", "caption": 5}\n', "m.jsonl"),
        "m.jsonl: line 1: the column caption holds 5, expected a text",
    ),
    "a line that is not JSON": (table('{"image": "b.png"\n', "m.jsonl"), "m.jsonl: line 1: line 1, column"),
    "a document that is no list": (table("5", "m.json"), "m.json: 5, expected a list of rows, or COCO's form"),
    "a line that is a list": (table("[1]\n", "m.jsonl"), "m.jsonl: line 1: \\[1\\], expected an object"),
    "an id that is a list": (
        table('{"image": "b.png", "image_id": [1], "caption": "x"}', "m.jsonl"),
        "image_id is \\[1\\]",
    ),
    "a picture out of the folder": (
        table("image,caption\n../x.png,絵\n"),
        "line 2: the picture '../x.png' is not below",
    ),
    "a picture elsewhere": (table("image,caption\n/etc/x.png,絵\n"), "line 2: the picture '/etc/x.png' is not below"),
    "other pictures than in the folder": (
        table("image,caption\nx.png,絵\ny.png,丸\nz.png,空\n"),
        "holds none of the 3 photographs: no [xyz].png,.* Name their folder with --images",
    ),
    "COCO without file names": (
        table('{"images": [{"id": 1}], "annotations": []}', "c.json"),
        "images.0. has no `id` or no",
    ),
    "COCO with unknown images": (
        table('{"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}', "c.json"),
        "annotations.0.: no `caption`, or an `image_id` that",
    ),
    "COCO without annotations": (table('{"images": []}', "c.json"), "'annotations' is not a list of objects"),
    "a text beside two pictures": (
        pair_of_two,
        "b.txt is beside b.(png|jpg) and b.(png|jpg): give each picture a name",
    ),
    "no language": (table("image,caption\nb.png,絵\n", language=None), "own needs --language, e.g. --language ja"),
    "two sources": (lambda folder: replace(own(folder), annotations=["a", "b"]), "2 were given; own takes one"),
    "options of others": (
        lambda folder: own(folder, karpathy="x.json"),
        "--karpathy has no meaning with --source own",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_named(folder, name):
    write, message = REFUSED[name]
    with pytest.raises(DataError, match=message):
        build(write(folder))
    assert not (folder / "out").exists() and not (folder.parent / "out").exists()


# The whole chain with ids that are texts


def test_text_ids_through_scoring_audit_comparison_and_people(folder, run_script, tmp_path):
    args = own(as_imagefolder(folder), images=str(folder), val_size=1, test_size=2)
    build(args)
    rows = load_captions(args.output_dir, "test")
    for system in ("one", "two"):
        run = tmp_path / system
        run.mkdir()
        lines = [{"image_id": row["image_id"], "caption": f"{row['captions'][0]}{system[0]}"} for row in rows]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (run / "predictions.jsonl").write_text(text, encoding="utf-8")
        data = ["--predictions", run / "predictions.jsonl", "--dataset", args.output_dir, "--split", "test"]
        run_script("eval_captioning.py", *data, "--output", run / "metrics.json", "--resamples", "20")
        metrics = json.loads((run / "metrics.json").read_text())
        assert metrics["per_image"]["image_id"] == rows["image_id"][:]
        run_script("audit_captions.py", *data, "--output", run / "audit.json")
    out = tmp_path / "comparison"
    systems = [f"one={tmp_path / 'one'}", f"two={tmp_path / 'two'}"]
    run_script("compare_runs.py", *systems, "--dataset", args.output_dir, "--output_dir", out)
    people = tmp_path / "people"
    run_script(
        "human_eval.py",
        "export",
        "--systems",
        *(f"{system}/predictions.jsonl" for system in systems),
        "--dataset",
        args.output_dir,
        "--images",
        "2",
        "--output_dir",
        people,
    )
    key = json.loads(next(people.glob("*key*.json")).read_text())
    assert sorted(key["images"]) == sorted(rows["image_id"][:])


def test_real_photographs(data_dir, tmp_path):
    photographs = data_dir / "coco_yj_images"
    args = own(photographs / "captions.json", place=tmp_path, images=str(photographs), val_size=3, test_size=4)
    summary = build(args)
    assert sum(counts["images"] for counts in summary["splits"].values()) == 21
    assert summary["cleaning"]["captions_in"] == 44 and summary["other_language"]["count"] == 0
    row = load_captions(args.output_dir, "test")[0]
    original = (photographs / row["file_name"]).read_bytes()
    assert hashlib.sha256(row["image"]["bytes"]).digest() == hashlib.sha256(original).digest()
