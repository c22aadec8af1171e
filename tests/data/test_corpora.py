"""UIT-ViIC and the dish titles from files to a dataset that load_dataset reads, and every way they must stop."""

import json
import shutil
from dataclasses import fields
from pathlib import Path
from pkgutil import resolve_name
from typing import get_args, get_type_hints

import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard
from PIL import Image

from vlmcap.data import publish as publish_module
from vlmcap.data.arguments import PublishArguments
from vlmcap.data.corpora import CORPORA, SEEN_CORPORA, Corpus, card_names
from vlmcap.data.errors import DataError
from vlmcap.data.images import dataset_record, load_captions, load_rows, open_image
from vlmcap.data.publish import build, publish
from vlmcap.miniature.scenes import write_title_scenes, write_vietnamese_scenes
from vlmcap.steps.finish import saw_records
from vlmcap.steps.splits import Splits


@pytest.fixture
def scenes_vi(tmp_path):
    """Drawn scenes in the format of UIT-ViIC: 12 + 3 + 4 images."""
    write_vietnamese_scenes(tmp_path / "vi", train=12, validation=3, test=4, seed=1)
    return tmp_path / "vi"


@pytest.fixture
def scene_titles(tmp_path):
    write_title_scenes(tmp_path / "titles", count=60, seed=1)
    return tmp_path / "titles"


def uit_viic(folder: Path, parts: str = "train val test", **changed) -> PublishArguments:
    files = [str(folder / f"uitviic_captions_{part}2017.json") for part in parts.split()]
    return PublishArguments(
        **{"source": "uit_viic", "annotations": files, "output_dir": str(folder.parent / "out"), **changed}
    )


def food_titles(folder: Path, **changed) -> PublishArguments:
    arguments = {"annotations": [str(folder / "titles.csv")], "output_dir": str(folder.parent / "out")}
    return PublishArguments(**{"source": "food_titles", **arguments, **changed})


def edit(path: Path, change) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def test_vietnamese_scenes_become_a_dataset(scenes_vi, tmp_path, miniature_dir):
    asked = {"images": str(scenes_vi / "images"), "card": "scenes_vi", "pretty_name": "Scenes", "license": "cc0-1.0"}
    summary = build(uit_viic(scenes_vi, tokenizer=str(miniature_dir), **asked))
    assert {split: counts["images"] for split, counts in summary["splits"].items()} == {
        "train": 12,
        "validation": 3,
        "test": 4,
    }
    assert summary["split_origin"] == "those of the three annotation files"
    assert summary["splits"]["test"] == {"images": 4, "captions": 20, "in_yj": None}
    row = load_dataset(str(tmp_path / "out"), split="test", cache_dir=str(tmp_path / "cache"))[0]
    assert list(row) == "image image_id file_name coco_url license captions caption_ids in_yj".split()
    assert (row["image_id"], row["in_yj"], len(row["captions"])) == (16, None, 5)
    assert row["image"].tobytes() == Image.open(scenes_vi / "images" / row["file_name"]).tobytes()
    assert open_image(load_captions(str(tmp_path / "out"), "train")[0]).size == (84, 84)
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert (card.data.language, card.data.license, card.data.pretty_name) == (["vi"], "cc0-1.0", "Scenes")
    assert dataset_record(str(tmp_path / "out"), "test")["corpus"] == "scenes_vi"
    assert "UIT-ViIC" in card.text and "Lam et al." not in card.text and "also in YJ" not in card.text


def test_lengths_of_the_training_captions_set_the_limit(scenes_vi, miniature_dir):
    def lengthen(document):
        document["annotations"][0]["caption"] = "Một " + "con chó và " * 30 + "một quả bóng ."

    edit(scenes_vi / "uitviic_captions_test2017.json", lengthen)
    summary = build(uit_viic(scenes_vi, tokenizer=str(miniature_dir)))
    limit, lengths = summary["cleaning"]["max_tokens"], summary["lengths"]
    assert limit % 8 == 0 and limit - 8 < lengths["train"]["tokens"]["p99.9"] <= limit
    assert lengths["test"]["tokens"]["max"] <= limit
    rules = {rule["name"]: rule["count"] for rule in summary["cleaning"]["rules"]}
    assert rules["max_tokens"] >= 1
    given = build(uit_viic(scenes_vi, tokenizer=str(miniature_dir), max_tokens=1000, overwrite=True))
    assert given["cleaning"]["max_tokens"] == 1000
    assert given["lengths"]["test"]["words"]["max"] == 94


def test_without_a_tokenizer_nothing_is_cut(scenes_vi):
    cleaning = build(uit_viic(scenes_vi))["cleaning"]
    assert (cleaning["tokenizer"], cleaning["max_tokens"]) == (None, None)
    assert "max_tokens" not in [rule["name"] for rule in cleaning["rules"]]
    assert "tokenizer" not in (scenes_vi.parent / "out" / "README.md").read_text()


def test_a_training_file_alone_is_held_out_by_seed(scenes_vi, tmp_path):
    def test_ids(**changed):
        build(uit_viic(scenes_vi, "train", overwrite=True, **changed))
        dataset = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
        assert set(dataset) == {"train", "test"} and len(dataset["train"]) + len(dataset["test"]) == 12
        return dataset["test"]["image_id"][:]

    first = test_ids(holdout=0.25)
    assert len(first) == 3 and first == test_ids(holdout=0.25) != test_ids(holdout=0.25, seed=1)
    assert "25% of the images of the training file" in (tmp_path / "out" / "README.md").read_text()


def test_images_of_yj_are_flagged(scenes_vi):
    images = [{"id": 2, "file_name": "a.jpg"}, {"id": 19, "file_name": "b.jpg"}, {"id": 99, "file_name": "c.jpg"}]
    yj = scenes_vi / "yj.json"
    yj.write_text(json.dumps({"images": images, "annotations": [{"id": 1, "image_id": 2, "caption": "犬です。"}]}))
    summary = build(uit_viic(scenes_vi, yj_annotations=[str(yj)]))
    assert [counts["in_yj"] for counts in summary["splits"].values()] == [1, 0, 1]
    assert "1 of train, 0 of validation, 1 of test" in summary["overlap"]
    assert "| train | 12 | 60 | 1 |" in (scenes_vi.parent / "out" / "README.md").read_text()


def test_broken_vietnamese_files(scenes_vi):
    with pytest.raises(DataError, match="files of train, test. Give the three official files, or the training"):
        build(uit_viic(scenes_vi, "train test"))
    with pytest.raises(DataError, match="train2017.json: the name of the file must say which split"):
        build(uit_viic(scenes_vi, "train train"))
    edit(scenes_vi / "uitviic_captions_val2017.json", lambda document: document["annotations"][0].update(id=10))
    with pytest.raises(DataError, match="val2017.json: annotation id 10 is also in uitviic_captions_train2017.json"):
        build(uit_viic(scenes_vi))
    edit(scenes_vi / "uitviic_captions_val2017.json", lambda document: document["annotations"][0].update(id=1000))
    train = json.loads((scenes_vi / "uitviic_captions_train2017.json").read_text(encoding="utf-8"))
    edit(scenes_vi / "uitviic_captions_val2017.json", lambda document: document["images"].append(train["images"][0]))
    with pytest.raises(DataError, match="Image id 1 is in train and again in validation"):
        build(uit_viic(scenes_vi))


def test_missing_photographs_stop_the_build(scenes_vi):
    (scenes_vi / "images" / "000000000013.png").unlink()
    with pytest.raises(DataError, match="1 of 19 photographs .*\n  000000000013.png: missing"):
        build(uit_viic(scenes_vi, images=str(scenes_vi / "images")))
    (scenes_vi / "empty").mkdir()
    message = (
        "none of the 19 photographs: no 000000000001.png, also not in train2014, val2014, train2017, val2017 or a zip"
    )
    with pytest.raises(DataError, match=message):
        build(uit_viic(scenes_vi, images=str(scenes_vi / "empty")))


def test_titled_scenes_become_a_dataset(scene_titles, tmp_path):
    asked = {"images": str(scene_titles / "images"), "card": "scene_titles", "license": "cc0-1.0"}
    summary = build(food_titles(scene_titles, **asked))
    sizes = {split: counts["images"] for split, counts in summary["splits"].items()}
    assert sum(sizes.values()) == 60 and 6 <= sizes["validation"] <= 8 and 6 <= sizes["test"] <= 8
    dataset = load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    titles = {split: {caption for (caption,) in dataset[split]["captions"]} for split in dataset}
    assert not titles["train"] & titles["test"] and not titles["train"] & titles["validation"]
    assert dataset["train"][0]["image"].size == (84, 84)
    assert dataset_record(str(tmp_path / "out"), "test")["corpus"] == "scene_titles"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "](word_cloud.png)" in card and (tmp_path / "out" / "word_cloud.png").stat().st_size > 1000
    assert "Kaggle" not in card and "Not the whole" not in card


def test_equal_titles_stay_together_and_bad_rows_are_listed(scene_titles, tmp_path):
    csv = scene_titles / "titles.csv"
    rows = [f'dish-{n},"Pie, Number {n // 4}"' for n in range(40)]
    csv.write_text("Image_Name,Title\n" + "\n".join([*rows, "dish-3,Something Else", ",Tea", "dish-90,A Soap"]) + "\n")
    summary = build(food_titles(scene_titles))
    assert {split: counts["images"] for split, counts in summary["splits"].items()} == {
        "train": 32,
        "validation": 4,
        "test": 4,
    }
    report = json.loads((tmp_path / "out" / "cleaning_report.json").read_text())
    assert [(row["row"], row["rule"]) for row in report["left_out"]["rows"]] == [
        (41, "duplicate_image"),
        (42, "no_image_name"),
        (43, "not_food"),
    ]
    assert report["words"]["most_common"] == [{"word": "pie", "count": 40}, {"word": "number", "count": 40}]
    assert "row 43: `A Soap`" in (tmp_path / "out" / "README.md").read_text()
    assert "Not the whole dataset" in (tmp_path / "out" / "README.md").read_text()


def test_a_pushed_card_has_its_word_cloud(scene_titles, hub, tmp_path):
    publish(food_titles(scene_titles, push_to_hub=True, repo_id="user/titles"))
    assert hub.file("datasets", "user/titles", "word_cloud.png") == (tmp_path / "out" / "word_cloud.png").read_bytes()
    remote = load_dataset("user/titles", cache_dir=str(tmp_path / "fresh"))
    assert sum(len(remote[split]) for split in ("train", "validation", "test")) == 60


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"source": "yj"}, "--source yj needs --tokenizer"),
        ({"annotations": None}, "needs --annotations: the CSV"),
        ({"source": "uit_viic", "annotations": None}, "needs --annotations: the three files"),
        (
            {"karpathy": "dataset_coco.json"},
            "--karpathy has no meaning with --source food_titles: .* stair and yj and coco and multi",
        ),
        (
            {"yj_annotations": ["yj.json"]},
            "--yj_annotations has no meaning .* stair and coco and uit_viic and multi",
        ),
        ({"holdout": 0.5}, "--holdout 0.5: expected a share"),
        ({"annotations": ["a.csv", "b.csv"]}, "2 files; the titles are one CSV"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, changed, message):
    arguments = {"source": "food_titles", "annotations": ["a.csv"], "output_dir": str(tmp_path / "out")}
    with pytest.raises(DataError, match=message):
        build(PublishArguments(**(arguments | changed)))


TOY_READER = """
import hashlib
from pathlib import Path

from vlmcap.data.readers import CorpusRows
from vlmcap.data.sources import SourceFile, read_source


def read_toy(args):
    data = read_source(args.annotations[0])
    lines = enumerate(data.decode().splitlines(), start=1)
    rows = [
        {"image_id": number, "file_name": f"{number}.png", "coco_url": "", "license": ""}
        | {"captions": [text], "caption_ids": [number], "in_yj": None}
        for number, text in lines
    ]
    file = SourceFile("toy.txt", hashlib.sha256(data).hexdigest(), len(rows), len(rows), "", "")
    by_split = {"train": rows[1:], "test": rows[:1]}
    return CorpusRows(by_split, "the first line is the test split", lambda by_split: "None", [file])
"""


def test_a_new_corpus(tmp_path, monkeypatch):
    """The steps of "Add a corpus" in recipes/README.md, and nothing else: entry, reader, card."""
    (tmp_path / "toy_reader.py").write_text(TOY_READER)
    monkeypatch.syspath_prepend(tmp_path)
    toy = Corpus(
        title="Toy",
        language="ja",
        images=3,
        captions=3,
        license="cc0-1.0",
        reader="toy_reader:read_toy",
        rules="vlmcap.data.clean:TEXT_RULES",
        annotations="the text file",
        seen={"COCO": "train images"},
    )
    monkeypatch.setitem(CORPORA, "toy", toy)
    cards = Path(shutil.copytree(publish_module.CARDS, tmp_path / "cards"))
    (cards / "toy_captions.md.j2").write_text(
        '{% extends "captions.md.j2" %}{% block introduction %}Toys.{% endblock %}'
    )
    monkeypatch.setattr(publish_module, "CARDS", cards)

    asked = {"source": "toy", "output_dir": str(tmp_path / "out")}
    with pytest.raises(DataError, match="--source toy needs --annotations: the text file"):
        build(PublishArguments(**asked))
    (tmp_path / "toy.txt").write_text("犬　が走る\n猫が寝る\n鳥が飛ぶ\n", encoding="utf-8")
    asked["annotations"] = [str(tmp_path / "toy.txt")]
    with pytest.raises(DataError, match="--karpathy has no meaning with --source toy"):
        build(PublishArguments(**asked, karpathy="dataset_coco.json"))
    summary = build(PublishArguments(**asked))
    assert (summary["license"], summary["splits"]["train"]["captions"]) == ("cc0-1.0", 2)
    card = DatasetCard.load(tmp_path / "out" / "README.md")
    assert card.data.pretty_name == "Toy, cleaned" and "Toys." in card.text and "toy-captions" in card.data.tags

    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "1.png")
    (row,) = load_captions(str(tmp_path / "out"), "test", image_dir=str(tmp_path / "pictures"))
    assert row["captions"] == ["犬が走る"] and open_image(row).size == (8, 8)
    record = dataset_record(str(tmp_path / "out"), "train")
    assert record["corpus"] == "toy"
    rows = load_rows(str(tmp_path / "out"), "train")
    splits = Splits(rows, None, rows, record, record, None, bad_images=None)
    base, trained = saw_records(dict.fromkeys(SEEN_CORPORA, "no"), splits)
    assert (base["COCO"], trained["COCO"], trained["STAIR"]) == ("no", "train images", "no")


def test_entries_name_what_there_is():
    """Readers and rules can be resolved, options are settings, cards are there, and --source takes them all."""
    settings = {setting.name for setting in fields(PublishArguments)}
    assert get_args(get_type_hints(PublishArguments)["source"]) == tuple(CORPORA)
    for corpus in CORPORA.values():
        assert callable(resolve_name(corpus.reader))
        assert all(map(resolve_name, corpus.languages.values() or ([] if corpus.joins else [corpus.rules])))
        assert {*corpus.options, *corpus.needs} <= settings and corpus.seen.keys() <= set(SEEN_CORPORA)
        assert set(corpus.joins) <= set(CORPORA) and all(f"{name}_annotations" in settings for name in corpus.joins)
    assert all((publish_module.CARDS / f"{name}_captions.md.j2").is_file() for name in card_names())


def test_scripts_draw_and_publish(run_script, tmp_path):
    run_script("draw_scenes.py", "--kind", "titles", "--output_dir", tmp_path / "titles", "--train", "30")
    annotations = ("--annotations", tmp_path / "titles" / "titles.csv")
    done = run_script("publish_datasets.py", "food_titles", *annotations, "--output_dir", tmp_path / "out")
    assert "no_image_name                       0" in done.stdout and "430" in done.stdout
    done = run_script("publish_datasets.py", "--source", "food_titles", "--output_dir", tmp_path / "no", expect=1)
    assert done.stderr.strip().splitlines()[-1].startswith("error: --source food_titles needs --annotations")


def test_real_uit_viic(data_dir, qwen2vl_dir, tmp_path):
    files = [str(data_dir / "uit_viic" / f"uitviic_captions_{part}2017.json") for part in ("train", "val", "test")]
    yj = [str(data_dir / "yj_subset" / "yjcaptions_subset.json")]
    summary = build(
        PublishArguments(
            source="uit_viic",
            annotations=files,
            yj_annotations=yj,
            tokenizer=str(qwen2vl_dir),
            output_dir=str(tmp_path / "out"),
        )
    )
    assert [file["images"] for file in summary["files"][:3]] == [2_695, 924, 231]
    assert [file["captions"] for file in summary["files"][:3]] == [13_481, 4_620, 1_155]
    # Three training images have a caption only that is a slip of the keyboard.
    assert summary["splits"] == {
        "train": {"images": 2_692, "captions": 13_448, "in_yj": 261},
        "validation": {"images": 924, "captions": 4_614, "in_yj": 133},
        "test": {"images": 231, "captions": 1_155, "in_yj": 38},
    }
    assert (summary["license"], summary["cleaning"]["max_tokens"]) == ("unknown", 32)
    assert summary["lengths"]["train"]["words"] == {"mean": 12.15, "median": 12, "p99": 18, "p99.9": 24, "max": 31}
    row = load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))[0]
    assert row["coco_url"] == f"http://images.cocodataset.org/train2017/{row['file_name']}"
    assert row["license"].endswith("/2.0/)")


def test_uit_viic_shares_images_with_karpathys_splits(data_dir):
    """What the card says."""
    counts = {}
    for part in ("train", "val", "test"):
        path = data_dir / "uit_viic" / f"uitviic_captions_{part}2017.json"
        ids = {image["id"] for image in json.loads(path.read_text(encoding="utf-8"))["images"]}
        karpathy = [
            set(map(int, (data_dir / "karpathy" / f"{k}_ids.txt").read_text().split())) for k in ("val", "test")
        ]
        counts[part] = [len(ids & held_out) for held_out in karpathy]
    assert counts == {"train": [132, 133], "val": [0, 0], "test": [0, 0]}


def test_real_titles(data_dir, tmp_path):
    summary = build(food_titles(data_dir / "food_titles", output_dir=str(tmp_path / "out")))
    assert summary["files"][0]["images"] == 2_000
    assert {split: counts["images"] for split, counts in summary["splits"].items()} == {
        "train": 1_596,
        "validation": 200,
        "test": 200,
    }
    assert {rule["name"]: rule["count"] for rule in summary["left_out"]["rules"]} == {
        "no_title": 1,
        "no_image_name": 2,
        "duplicate_image": 0,
        "not_food": 1,
    }
    assert summary["words"]["most_common"][0] == {"word": "chicken", "count": 121}
