"""The miniature's world: seeded, held out by combination, in the format of STAIR."""

import csv
import json
import math
import unicodedata

import numpy as np
from PIL import Image

from vlmcap.evaluation.register import to_plain
from vlmcap.miniature.scenes import (
    COLOURS,
    SHAPES,
    Scene,
    scenes,
    write_language_scenes,
    write_scene_dataset,
    write_title_scenes,
    write_vietnamese_scenes,
)


def test_scenes_are_seeded():
    first, again = list(scenes(30, 1, held_out=False)), list(scenes(30, 1, held_out=False))
    assert first == again != list(scenes(30, 2, held_out=False))
    assert first[0].draw().tobytes() == again[0].draw().tobytes()


def test_held_out_combinations_never_train():
    def combination(scene):
        return scene[:3]

    trained = {combination(scene) for scene in scenes(3000, 0, held_out=False)}
    tested = {combination(scene) for scene in scenes(1000, 0, held_out=True)}
    assert not trained & tested
    # 24 things in ordered pairs, two arrangements: about a tenth of the 1,104 combinations is held out.
    assert 60 < len(tested) < 160


def test_captions_name_what_is_drawn():
    scene = next(scenes(1, 5, held_out=False))
    assert len(set(scene.japanese())) == len(set(scene.english())) == 5
    assert all(text.endswith("ます。") for text in scene.polite_japanese())
    assert [to_plain(text).removesuffix("。") for text in scene.polite_japanese()] == scene.japanese()
    # Pinned: the two that the committed miniature's tokenizer and the demo's dataset know.
    assert scene.japanese(polite=True) == [scene.polite_japanese()[place] for place in (0, 4)]
    assert all(scene.first.colour in text and scene.second.shape in text for text in scene.english())


def test_written_dataset_is_complete(tmp_path):
    write_scene_dataset(tmp_path, train=20, validation=3, test=4)
    train, val, yj = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("stair_train", "stair_val", "yj"))
    assert (len(train["images"]), len(val["images"]), len(yj["images"])) == (20, 7, 2)
    assert (
        len(train["annotations"]) == 100 and len({a["id"] for a in train["annotations"] + val["annotations"]}) == 135
    )
    assert {image["id"] for image in yj["images"]} <= {image["id"] for image in train["images"]}
    ids = [(tmp_path / name).read_text().split() for name in ("val_ids.txt", "test_ids.txt")]
    assert sorted(ids[0] + ids[1]) == sorted(str(image["id"]) for image in val["images"])
    assert all((tmp_path / "images" / image["file_name"]).is_file() for image in train["images"] + val["images"])


def test_scenes_in_all_languages_are_the_scenes_in_japanese(tmp_path):
    write_scene_dataset(tmp_path / "ja", train=10, validation=2, test=3, seed=1)
    write_language_scenes(tmp_path / "all", train=10, validation=2, test=3, seed=1)
    same = ["stair_train.json", "stair_val.json", "val_ids.txt", "test_ids.txt", "instances.json"]
    same += [f"images/{path.name}" for path in (tmp_path / "ja/images").iterdir()]
    assert len(same) == 20
    assert all((tmp_path / "ja" / name).read_bytes() == (tmp_path / "all" / name).read_bytes() for name in same)
    for names, count in (
        (["yj"], 15),
        (["captions_train2014", "captions_val2014"], 15),
        ([f"uitviic_captions_{part}2017" for part in ("train", "val", "test")], 15),
    ):
        documents = [json.loads((tmp_path / "all" / f"{name}.json").read_text()) for name in names]
        annotations = [annotation for document in documents for annotation in document["annotations"]]
        assert sum(len(document["images"]) for document in documents) == count
        assert len({annotation["id"] for annotation in annotations}) == len(annotations) == 5 * count


def test_instances_are_where_the_things_are_drawn(tmp_path):
    """The colour in the middle of every box is the category's, and beyond all boxes there is paper alone."""
    write_scene_dataset(tmp_path, train=2, validation=5, test=10)
    document = json.loads((tmp_path / "instances.json").read_text())
    names = {category["id"]: category["name"] for category in document["categories"]}
    splits = [json.loads((tmp_path / f"stair_{split}.json").read_text()) for split in ("train", "val")]
    assert len(names) == 24
    assert {i["id"] for i in document["images"]} == {i["id"] for split in splits for i in split["images"]}
    assert len(document["annotations"]) == 34 and len({a["id"] for a in document["annotations"]}) == 34
    for image in document["images"]:
        with Image.open(tmp_path / "images" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
            pixels = np.asarray(picture, dtype=float)
        inside = np.zeros(pixels.shape[:2], dtype=bool)
        for annotation in (a for a in document["annotations"] if a["image_id"] == image["id"]):
            x, y, width, height = annotation["bbox"]
            colour = COLOURS[names[annotation["category_id"]].split()[0]][0]
            assert np.abs(pixels[round(y + height / 2), round(x + width / 2)] - colour).max() < 35
            inside[math.floor(y) : math.ceil(y + height) + 1, math.floor(x) : math.ceil(x + width) + 1] = True
        assert pixels[~inside].min() > 200


def test_vietnamese_captions_are_sentences_with_every_mark():
    for scene in scenes(200, 3, held_out=None):
        captions = scene.vietnamese()
        assert len(set(captions)) == 5
        for caption in captions:
            assert caption[0].isupper() and caption.endswith(".") and unicodedata.is_normalized("NFC", caption)
        assert f"màu {COLOURS[scene.first.colour][3]}" in captions[0].split(",")[0]


def test_a_title_names_the_combination_and_nothing_else():
    drawn = list(scenes(2000, 4, held_out=None))
    assert len({scene.title() for scene in drawn}) == len({scene[:3] for scene in drawn})
    scene = next(scene for scene in drawn if scene.arrangement == "vertical" and scene.first == ("red", "circle"))
    assert scene.title() == f"Red Circle over {scene.second.colour} {scene.second.shape}".title().replace(
        "Over", "over"
    )
    assert any(" with " in scene.title() for scene in drawn)
    assert any(scene.held_out() for scene in drawn) and not all(scene.held_out() for scene in drawn)


def test_written_vietnamese_scenes_are_complete(tmp_path):
    write_vietnamese_scenes(tmp_path, train=5, validation=2, test=3)
    ids = []
    for part, size in (("train", 5), ("val", 2), ("test", 3)):
        document = json.loads((tmp_path / f"uitviic_captions_{part}2017.json").read_text(encoding="utf-8"))
        assert (len(document["images"]), len(document["annotations"])) == (size, 5 * size)
        assert all((tmp_path / "images" / image["file_name"]).is_file() for image in document["images"])
        ids += [annotation["id"] for annotation in document["annotations"]]
    assert len(set(ids)) == 50


def test_written_titles_are_complete(tmp_path):
    write_title_scenes(tmp_path, count=7)
    with (tmp_path / "titles.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["Image_Name"] for row in rows}) == 7 and all(row["Title"] for row in rows)
    assert all((tmp_path / "images" / f"{row['Image_Name']}.png").is_file() for row in rows)


def test_preferences_are_of_a_true_caption_to_a_false_one(tmp_path):
    """The false one differs in a shape or in the order of the things, and is of another scene in the same words."""
    write_scene_dataset(tmp_path, train=40, validation=1, test=5)
    drawn = dict(enumerate([*scenes(40, 0, held_out=False), *scenes(6, 1, held_out=True)], 1))
    mistakes = set()
    for name, first, count in (("preferences.jsonl", 1, 40), ("preferences_test.jsonl", 42, 5)):
        lines = [json.loads(line) for line in (tmp_path / name).read_text(encoding="utf-8").splitlines()]
        assert [line["image_id"] for line in lines] == [first + number // 2 for number in range(2 * count)]
        for line in lines:
            scene = drawn[line["image_id"]]
            place = scene.japanese().index(line["chosen"])
            assert line["rejected"] not in scene.japanese() and (tmp_path / line["images"][0]).exists()
            a, b = scene.first, scene.second
            others = [Scene(b, a, scene.arrangement, 0)] if line["mistake"] == "order" else [
                Scene(*things, scene.arrangement, 0)
                for shape in SHAPES
                for things in ((a._replace(shape=shape), b), (a, b._replace(shape=shape)))
            ]  # fmt: skip
            assert line["rejected"] in [other.japanese()[place] for other in others]
            assert not (line["mistake"] == "order" and place == 4)  # as true as before
            mistakes.add(line["mistake"])
    assert mistakes == {"shape", "order"}
