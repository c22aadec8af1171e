"""Corpora of COCO's photographs become one dataset with languages and styles, or the build stops and says why."""

import json
from pathlib import Path

import pytest
from datasets import get_dataset_split_names
from huggingface_hub import DatasetCard

from vlmcap.data.arguments import PublishArguments
from vlmcap.data.corpora import SEEN_CORPORA
from vlmcap.data.errors import DataError
from vlmcap.data.images import dataset_record, dataset_references, load_captions, load_rows, open_image, references_of
from vlmcap.data.keys import rows_of_key
from vlmcap.data.publish import build, publish
from vlmcap.miniature.scenes import Scene, scenes
from vlmcap.steps.finish import saw_records
from vlmcap.steps.splits import Splits

TRAIN, VALIDATION, TEST = range(1, 9), (11, 12), (13, 14)  # image ids, by the lists
CAPTIONS = {"stair": "白い犬１匹が走る", "yj": "犬です。", "coco": "a dog １ runs", "uit_viic": "con chó chạy hóa"}


@pytest.fixture
def world(tmp_path, miniature_dir):
    """Four corpora of twelve COCO images. UIT-ViIC tests image 8, which trains in STAIR, and trains on image 13, which
    is in the test list; YJ has images 1 and 2."""

    def write(name: str, source: str, ids, name_of) -> str:
        images = [{"id": i, "license": 4} | ({"file_name": name_of(i)} if name_of else {}) for i in ids]
        annotations = [{"id": 100 * i, "image_id": i, "caption": f"{CAPTIONS[source]} {i}"} for i in ids]
        path = tmp_path / f"{name}.json"
        licenses = [{"id": 4, "name": "BY", "url": "http://a"}] if source == "coco" else []
        path.write_text(json.dumps({"images": images, "annotations": annotations, "licenses": licenses}))
        return str(path)

    held_out = [*VALIDATION, *TEST]
    of_2017 = "{:012d}.jpg".format

    def of_2014(i: int) -> str:
        return f"COCO_{'train' if i in TRAIN else 'val'}2014_{of_2017(i)}"

    for name, ids in (("val", VALIDATION), ("test", TEST)):
        (tmp_path / f"{name}_ids.txt").write_text("\n".join(map(str, ids)))
    files = {
        "stair_annotations": [
            write("stair_train", "stair", TRAIN, of_2014),
            write("stair_val", "stair", held_out, of_2014),
        ],
        "yj_annotations": [write("yj", "yj", [1, 2], None)],
        "coco_annotations": [write("captions_train2017", "coco", [*TRAIN, *held_out], of_2017)],
        "uit_viic_annotations": [
            write("uit_train", "uit_viic", [3, 4, 13], of_2017),
            write("uit_val", "uit_viic", [11], of_2017),
            write("uit_test", "uit_viic", [8], of_2017),
        ],
    }

    def arguments(names: str, **changed) -> PublishArguments:
        of_corpora = {f"{name}_annotations": files.get(f"{name}_annotations") for name in names.split()}
        lists = {"val_ids": str(tmp_path / "val_ids.txt"), "test_ids": str(tmp_path / "test_ids.txt")}
        places = {"output_dir": str(tmp_path / "out"), "tokenizer": str(miniature_dir), "overwrite": True}
        return PublishArguments(
            **{"source": "multi", "corpora": names.split(), **of_corpora, **lists, **places, **changed}
        )

    arguments.folder = tmp_path
    return arguments


def published(args: PublishArguments) -> dict[str, dict[int, dict]]:
    """Split -> image id -> row."""
    return {
        split: {row["image_id"]: row for row in load_rows(args.output_dir, split)}
        for split in get_dataset_split_names(args.output_dir)
    }


def test_scenes_in_all_languages_are_one_dataset(tmp_path, run_script, miniature_dir):
    folder, out = tmp_path / "scenes", tmp_path / "out"
    sizes = ("--train", "12", "--validation", "3", "--test", "4")
    run_script("draw_scenes.py", "--kind", "languages", "--output_dir", folder, *sizes)
    files = {
        "stair": ["stair_train", "stair_val"],
        "yj": ["yj"],
        "coco": ["captions_train2014", "captions_val2014"],
        "uit_viic": [f"uitviic_captions_{part}2017" for part in ("train", "val", "test")],
    }
    command = ["multi", "--corpora", *files, "--yj_split", "lists", "--images", folder / "images"]
    for name, of in files.items():
        command += [f"--{name}_annotations", *(folder / f"{file}.json" for file in of)]
    command += ["--val_ids", folder / "val_ids.txt", "--test_ids", folder / "test_ids.txt", "--output_dir", out]
    command += ["--tokenizer", miniature_dir, "--max_tokens", "128", "--card", "scenes_multi", "--license", "cc0-1.0"]
    printed = run_script("publish_datasets.py", *command).stdout
    assert "ja/polite 12 / 60 3 / 15 4 / 20" in [" ".join(line.split()) for line in printed.splitlines()]

    rows = load_captions(str(out), "test")
    assert rows.column_names == (
        "image image_id file_name coco_url license captions caption_ids languages styles in_yj".split()
    )
    drawn = list(scenes(7, 1, held_out=True))[3:]
    wordings = {
        "ja/plain": Scene.japanese,
        "ja/polite": Scene.polite_japanese,
        "en": Scene.english,
        "vi": Scene.vietnamese,
    }
    for key, captions in wordings.items():
        found = rows_of_key(rows, key, list(wordings))
        assert found["captions"][:] == [captions(scene) for scene in drawn]
        assert dataset_references(str(out), "test", key=key, keys=list(wordings)) == references_of(found)
        assert open_image(found[0]).size == (84, 84)
    record = dataset_record(str(out), "train")
    assert record["corpus"] == "scenes_multi" and "training_corpora" not in record
    card = DatasetCard.load(out / "README.md")
    assert card.data.language == ["ja", "en", "vi"] and card.data.license == "cc0-1.0"
    assert "| `ja/polite` and `vi` | 12 | 3 | 4 |" in card.text and "bibtex" not in card.text


def test_an_image_that_one_corpus_holds_out_and_another_trains_on_stops_the_build(world):
    with pytest.raises(DataError, match=r"2 images are in different splits of different corpora") as caught:
        build(world("stair coco uit_viic"))
    assert str(caught.value).split("\n")[1:4] == [
        "  test of uit_viic, train of stair: 1 images (8)",
        "  test of uit_viic, train of coco: 1 images (8)",
        "  test of stair, train of uit_viic: 1 images (13)",
    ]
    assert "Add --drop_held_out" in str(caught.value)
    with pytest.raises(DataError, match=r"test of yj, train of stair: 2 images \(1, 2\)"):
        build(world("stair yj"))
    assert not (world.folder / "out").exists()


def test_with_drop_held_out_each_corpus_has_its_own_test_images_and_they_train_nowhere(world):
    args = world("stair coco uit_viic yj", drop_held_out=True)
    summary = build(args)
    rows = published(args)
    assert {split: list(of) for split, of in rows.items()} == {
        "train": [3, 4, 5, 6, 7],
        "validation": [11, 12],
        "test": [1, 2, 8, 13, 14],
    }
    test, keys = load_rows(args.output_dir, "test"), ["ja/plain", "ja/polite", "en", "vi"]
    images = {key: rows_of_key(test, key, keys)["image_id"][:] for key in keys}
    assert images == {"ja/plain": [13, 14], "ja/polite": [1, 2], "en": [13, 14], "vi": [8]}
    assert rows["train"][3] == {
        "image_id": 3,
        "file_name": "COCO_train2014_000000000003.jpg",
        "coco_url": "http://images.cocodataset.org/train2014/COCO_train2014_000000000003.jpg",
        "license": "BY (http://a)",  # STAIR's file does not say
        "captions": ["白い犬1匹が走る3", "a dog １ runs 3", "con chó chạy hoá 3"],  # each by the rules of its corpus
        "caption_ids": [300, 300, 300],
        "languages": ["ja", "en", "vi"],
        "styles": ["plain", "", ""],
        "in_yj": False,
    }
    assert [rows["test"][number]["in_yj"] for number in (1, 8)] == [True, False]
    assert summary["keys"]["vi"] == {
        "train": {"images": 2, "captions": 2},
        "validation": {"images": 1, "captions": 1},
        "test": {"images": 1, "captions": 1},
    }
    shared = {" ".join(pair["keys"]): pair["splits"] for pair in summary["shared"]}
    assert shared["ja/plain en"] == {"train": 5, "validation": 2, "test": 2} and shared["ja/plain vi"]["test"] == 0
    left_out = {part["name"]: part["left_out"] for part in summary["corpora"]}
    assert left_out["stair"] == {"images": 3, "captions": 3} and left_out["uit_viic"] == {"images": 1, "captions": 1}
    rules = {rule["name"]: rule["count"] for rule in summary["cleaning"]["rules"]}
    assert (rules["stair: width"], rules["uit_viic: tone_marks"]) == (9, 4) and "coco: width" not in rules
    assert (summary["cleaning"]["captions_out"], summary["cleaning"]["images_out"]) == (24, 12)


def test_licences_and_counts_are_on_the_card_and_printed(world, capsys):
    args = world("stair coco uit_viic", drop_held_out=True)
    publish(args)
    printed = capsys.readouterr().out
    assert "stair               ja/plain            cc-by-4.0           1 captions of 1 images" in printed
    assert "ja/plain + vi                          2                   1                   0" in printed
    card = DatasetCard.load(Path(args.output_dir) / "README.md")
    assert (card.data.language, card.data.license) == (["ja", "en", "vi"], "other")
    assert "| stair | cc-by-4.0 |" in card.text and "| uit_viic | unknown |" in card.text
    assert "| `ja/plain` | 7 | 7 | 2 | 2 | 2 | 2 |" in card.text and "| `en` and `vi` | 2 | 1 | 0 |" in card.text
    assert "| uit_viic | 1 | 1 |" in card.text and card.text.count("```bibtex") == 3
    assert str(world.folder) not in card.content
    build(world("stair coco", license="cc0-1.0"))
    card = DatasetCard.load(Path(args.output_dir) / "README.md")
    assert card.data.license == "cc0-1.0" and "left out" not in card.text


def test_a_run_record_knows_what_the_training_split_has_of_each_corpus(world):
    args = world("uit_viic stair coco yj", drop_held_out=True)
    build(args)
    record = dataset_record(args.output_dir, "train")
    assert record["corpus"] == "multi" and record["training_corpora"] == ["stair", "coco", "uit_viic"]
    rows = load_rows(args.output_dir, "train")
    trained = saw_records(dict.fromkeys(SEEN_CORPORA, "no"), Splits(rows, None, rows, record, record, None, None))[1]
    assert {name: trained[name] for name in SEEN_CORPORA} == {"STAIR": "train", "YJ": "no", "COCO": "train"}


@pytest.mark.parametrize("order", ["stair coco", "coco stair"])
def test_names_of_2014_and_2017_are_one_photograph_and_the_first_corpus_names_it(world, order):
    args = world(order)
    build(args)
    row = published(args)["train"][3]
    first = "COCO_train2014_000000000003.jpg" if order.startswith("stair") else "000000000003.jpg"
    assert row["file_name"] == first and row["in_yj"] is None
    assert row["languages"] == (["ja", "en"] if order.startswith("stair") else ["en", "ja"])


def test_one_id_for_two_photographs_is_refused(world):
    args = world("stair coco")
    document = json.loads(Path(args.coco_annotations[0]).read_text())
    document["images"][2]["file_name"] = "000000000099.jpg"
    Path(args.coco_annotations[0]).write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"Image id 3 is COCO_train2014_0+3.jpg in stair and 0+99.jpg in coco"):
        build(args)


@pytest.mark.parametrize(
    ("yj_split", "expected"),
    [("lists", {"train": [1, 2], "test": []}), ("test", {"train": [], "test": [1, 2]})],
)
def test_what_the_images_of_yj_are_is_asked_for(world, yj_split, expected):
    args = world("stair yj", yj_split=yj_split, drop_held_out=True)
    summary = build(args)
    polite = {
        split: [image_id for image_id, row in rows.items() if "polite" in row["styles"]]
        for split, rows in published(args).items()
    }
    assert {split: polite[split] for split in expected} == expected
    assert ("unless include_yj_images is true" in summary["overlap"]) == (yj_split == "lists")


def test_images_of_yj_are_drawn_by_seed(world):
    images = [{"id": i} for i in range(1, 9)]
    annotations = [{"id": i, "image_id": i, "caption": f"犬です。{i}"} for i in range(1, 9)]
    (world.folder / "yj.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    args = world("stair yj", yj_split="drawn", holdout=0.25, drop_held_out=True)
    build(args)
    counts = {split: [row["styles"] for row in rows.values()] for split, rows in published(args).items()}
    # What YJ's draw holds out has its captions alone; what trains has those of both.
    assert counts["train"] == [["plain", "polite"]] * 4
    assert sorted(counts["validation"]) == sorted(counts["test"]) == [["plain"]] * 2 + [["polite"]] * 2


def test_splits_without_lists_are_drawn_and_leave_yj_in_training(world):
    args = world("stair", val_ids=None, test_ids=None, val_size=1, test_size=1)
    summary = build(args)
    assert "not Karpathy's own" in summary["split_origin"]
    assert {split: len(rows) for split, rows in published(args).items()} == {"train": 10, "validation": 1, "test": 1}
    with pytest.raises(DataError, match="only 0 val2014 images outside YJ"):
        build(world("coco", val_ids=None, test_ids=None, val_size=1, test_size=1))


def own(world, lines: list[dict], key: str = "en/alt", **changed) -> PublishArguments:
    path = world.folder / "own.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return world("stair own", own_annotations=[str(path)], own_key=[key], **changed)


def test_captions_of_ones_own_join_by_id_or_by_name(world):
    lines = [
        {"file_name": "train2014/COCO_train2014_000000000003.jpg", "caption": ["a white  dog", "dog"]},
        {"file_name": "000000000013.jpg", "image_id": "13", "caption": "a cat"},
        {"file_name": "x.jpg", "image_id": 77, "caption": "not COCO's"},
    ]
    args = own(world, lines)
    summary = build(args)
    rows = published(args)
    assert rows["train"][3]["captions"][1:] == ["a white dog", "dog"]
    assert rows["train"][3]["styles"] == ["plain", "alt", "alt"] and rows["test"][13]["languages"] == ["ja", "en"]
    assert rows["train"][77]["file_name"] == "x.jpg"
    assert {part["name"]: part["license"] for part in summary["corpora"]} == {
        "stair": "cc-by-4.0",
        "own en/alt": "unknown",
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"file_name": "a.jpg"}, r"own.jsonl: line 2: image_id None and picture 'a.jpg' name no image of COCO"),
        ({"file_name": "a.jpg", "image_id": "x1"}, "line 2: image_id 'x1' and picture 'a.jpg' name no image"),
        ({"file_name": "a.jpg", "image_id": 3}, "line 2: image 3 is a.jpg, and 000000000003.jpg before"),
        ({"file_name": "../a.jpg", "image_id": 4}, "line 2: the picture '../a.jpg' is not a path below"),
        ({"file_name": "a.jpg", "image_id": 5}, "Image id 5 is COCO_train2014_000000000005.jpg in stair and a.jpg in"),
    ],
)
def test_captions_of_ones_own_that_join_nothing(world, line, message):
    args = own(world, [{"file_name": "000000000003.jpg", "caption": "a dog"}, line | {"caption": "a cat"}])
    with pytest.raises(DataError, match=message):
        build(args)


@pytest.mark.parametrize(
    ("corpora", "changed", "message"),
    [
        ("stair", {"corpora": None}, "--source multi needs --corpora"),
        ("stair", {"tokenizer": None}, "--source multi needs --tokenizer"),
        ("stair", {"corpora": ["stair", "coko"]}, "coko is not one of stair, yj, coco, uit_viic, own"),
        ("stair stair", {}, "stair is not one of .*, or is there twice"),
        (
            "stair coco",
            {"coco_annotations": None},
            "--corpora coco needs --coco_annotations: the files captions_train",
        ),
        ("stair", {"coco_annotations": ["a.json"]}, "--coco_annotations has no meaning without coco in --corpora"),
        ("stair", {"annotations": ["a.json"]}, "--annotations has no meaning .* e.g. --stair_annotations a.json"),
        ("stair", {"yj_split": "lists"}, "--yj_split lists has no meaning without yj"),
        ("stair own", {"own_annotations": ["a.csv"]}, "--own_key needs a language, or language/style, for each of"),
        ("own", {"own_annotations": ["a.csv"] * 2, "own_key": ["en", "en"]}, "--own_key en en: one is there twice"),
        ("own", {"own_annotations": ["a.csv"], "own_key": ["English"]}, "'English' is not a key of captions"),
        ("stair", {"source": "stair", "stair_annotations": None}, "--corpora has no meaning .* it goes with multi"),
        ("stair", {"language": "ja"}, "--language has no meaning with --source multi"),
    ],
)
def test_arguments_that_do_not_fit(world, corpora, changed, message):
    with pytest.raises(DataError, match=message):
        build(world(corpora, **changed))


def test_coco_alone_is_a_corpus_too(world):
    joined = world("coco")
    files = {"annotations": joined.coco_annotations, "val_ids": joined.val_ids, "test_ids": joined.test_ids}
    summary = build(PublishArguments(source="coco", output_dir=joined.output_dir, **files))
    assert {split: counts["images"] for split, counts in summary["splits"].items()} == {
        "train": 8,
        "validation": 2,
        "test": 2,
    }
    assert summary["license"] == "cc-by-4.0" and summary["lengths"]["train"]["words"]["max"] == 5
    assert "languages" not in load_rows(joined.output_dir, "test").column_names
    card = DatasetCard.load(Path(joined.output_dir) / "README.md")
    assert card.data.language == ["en"] and "Not the whole of COCO Captions" in card.text and "1504.00325" in card.text


def test_real_uit_viic_and_yj_keep_their_test_images(data_dir, miniature_dir, tmp_path):
    """Neither follows lists, so none are given."""
    folder = data_dir / "uit_viic"
    uit = [str(folder / f"uitviic_captions_{part}2017.json") for part in ("train", "val", "test")]
    args = PublishArguments(
        source="multi",
        corpora=["yj", "uit_viic"],
        yj_annotations=[str(data_dir / "yj_subset" / "yjcaptions_subset.json")],
        uit_viic_annotations=uit,
        tokenizer=str(miniature_dir),
        max_tokens=1000,
        output_dir=str(tmp_path / "out"),
    )
    with pytest.raises(DataError, match="test of yj, train of uit_viic: 261 images"):
        build(args)
    args.drop_held_out = True
    summary = build(args)
    assert summary["keys"]["vi"]["test"] == {"images": 231, "captions": 1155}
    assert summary["keys"]["ja/polite"]["test"]["images"] == 13_555
    assert [pair["splits"]["test"] for pair in summary["shared"]] == [38]
