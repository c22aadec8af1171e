"""Loading published datasets with their pictures, and everything that must stop a run before it begins."""

import io

import datasets
import pytest
from PIL import Image

from vlmcap.data.errors import DataError
from vlmcap.data.images import (
    BadImageError,
    check_images,
    check_no_overlap,
    dataset_record,
    dataset_references,
    load_captions,
    load_rows,
    missing_files,
    open_image,
    references_of,
    without_empty_captions,
)
from vlmcap.data.keys import rows_of_key


@pytest.fixture
def folder(tmp_path):
    """Three rows without pictures in a dataset folder with a card, and the pictures of two of them beside it."""
    names = ["a.jpg", "b.png", "c.jpg"]
    rows = {"image_id": [1, 2, 3], "file_name": names, "captions": [["犬"], ["猫"], ["馬", "白い馬"]]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "dataset/data/test-00000-of-00001.parquet")
    (tmp_path / "dataset/README.md").write_text("---\nlicense: cc-by-4.0\ntags:\n- yj-captions\n---\n# Captions\n")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 30), "red").save(tmp_path / "images/a.jpg")
    Image.new("LA", (40, 30)).save(tmp_path / "images/b.png")
    return tmp_path


def test_pictures_from_a_folder(folder):
    rows = load_captions(str(folder / "dataset"), "test", image_dir=str(folder / "images"))
    assert missing_files(rows) == [2]
    assert open_image(rows[0]).size == (40, 30)
    assert open_image(rows[1]).mode == "RGB"
    with pytest.raises(BadImageError, match="c.jpg: no such file"):
        open_image(rows[2])


def test_embedded_pictures_need_no_folder(folder):
    rows = load_captions(str(folder / "dataset"), "test", image_dir=str(folder / "images")).select([0, 1])
    embedded = [{"bytes": (folder / "images" / name).read_bytes(), "path": name} for name in rows["file_name"]]
    rows = rows.remove_columns("image").add_column("image", embedded, feature=datasets.Image(decode=False))
    rows.to_parquet(folder / "embedded/data/test-00000-of-00001.parquet")
    # A configuration that names a folder for another dataset does no harm.
    loaded = load_captions(str(folder / "embedded"), "test", image_dir="not/there")
    assert missing_files(loaded) == [] and open_image(loaded[0]).size == (40, 30)


def test_unreadable_pictures_are_all_named(folder):
    (folder / "images/a.jpg").write_bytes((folder / "images/a.jpg").read_bytes()[:300])
    rows = load_captions(str(folder / "dataset"), "test", image_dir=str(folder / "images"))
    with pytest.raises(DataError, match=r"2 of 3 pictures of the test split(.|\n)*a.jpg: (.|\n)*c.jpg: no such file"):
        check_images(rows, "test")


def test_wrong_split_and_folder_are_named(folder):
    with pytest.raises(DataError, match="no split 'tset'; it has test"):
        load_captions(str(folder / "dataset"), "tset")
    with pytest.raises(DataError, match="--image_dir .*nowhere is not a folder"):
        load_captions(str(folder / "dataset"), "test", image_dir=str(folder / "nowhere"))


def test_rows_without_a_name_or_a_picture_are_refused(tmp_path):
    (tmp_path / "a.png").touch()
    picture = {"bytes": b"png", "path": "a.png"}
    full = {"image_id": [1, 2], "file_name": ["a", "b"], "captions": [["犬"], ["猫"]], "image": [picture, picture]}
    features = datasets.Dataset.from_dict(full).features | {"image": datasets.Image(decode=False)}
    for changed, message in (
        ({"image": [picture, None]}, r"x \(test\): the column image has empty places"),
        ({"file_name": None}, r"x \(test\) has no column file_name"),
    ):
        columns = {name: values for name, values in (full | changed).items() if values}
        rows = datasets.Dataset.from_dict(columns, datasets.Features({name: features[name] for name in columns}))
        rows.to_parquet(tmp_path / "x/data/test-00000-of-00001.parquet")
        with pytest.raises(DataError, match=message):
            load_captions(str(tmp_path / "x"), "test")


def png(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (28, 28), colour).save(file, "PNG")
    return file.getvalue()


def row_per_caption(folder, **changed) -> str:
    """A dataset of two images in five rows, the images' rows mixed, with embedded pictures and an empty row."""
    red, blue = ({"bytes": png(colour), "path": None} for colour in ("red", "blue"))
    columns = {
        "image": [red, blue, red, blue, red],
        "image_id": [7, 3, 7, 3, 7],
        "file_name": ["a.png", "b.png", "a.png", "b.png", "a.png"],
        "captions": [["赤"], ["青", "青い紙"], None, ["青色"], ["赤い紙", None]],
        "caption_ids": [[1], [2, 3], [], [4], [5, 6]],
    } | changed
    features = datasets.Dataset.from_dict(columns).features | {"image": datasets.Image(decode=False)}
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features({name: features[name] for name in columns}))
    rows.to_parquet(folder / "rows/data/test-00000-of-00001.parquet")
    return str(folder / "rows")


def test_rows_of_one_image_become_one(tmp_path, capfd):
    dataset = row_per_caption(tmp_path)
    rows = load_captions(dataset, "test")
    assert capfd.readouterr().err.endswith(f"{dataset} (test): 5 rows of 2 images, grouped by image_id\n")
    assert rows["image_id"][:] == [7, 3] and rows["file_name"][:] == ["a.png", "b.png"]
    assert references_of(rows) == {"7": ["赤", "赤い紙", ""], "3": ["青", "青い紙", "青色"]}
    assert rows["caption_ids"][:] == [[1, 5, 6], [2, 3, 4]]
    assert [open_image(row).getpixel((0, 0)) for row in rows] == [(255, 0, 0), (0, 0, 255)]
    assert dataset_references(dataset, "test") == references_of(rows) == references_of(load_rows(dataset, "test"))
    without, left_out = without_empty_captions(rows)
    assert references_of(without) == {"7": ["赤", "赤い紙"], "3": ["青", "青い紙", "青色"]}
    assert left_out == {"captions": 1, "images": 0}


def test_rows_of_one_image_that_disagree_are_refused(tmp_path):
    names = ["a.png", "b.png", "c.png", "b.png", "a.png"]
    both = "rows 0 and 2 both have the image_id 7 and differ in file_name"
    dataset = row_per_caption(tmp_path, file_name=names)
    for read in (load_captions, dataset_references):
        with pytest.raises(DataError, match=rf"rows \(test\): {both}\. Give every image an id"):
            read(dataset, "test")
    pictures = [{"bytes": png(colour), "path": None} for colour in ("red", "blue", "red", "white", "red")]
    with pytest.raises(DataError, match="rows 1 and 3 both have the image_id 3 and differ in image"):
        load_captions(row_per_caption(tmp_path, image=pictures), "test")


def test_empty_captions_are_left_out_and_counted(tmp_path):
    captions = [["犬", "", "白い 犬"], [], [" \n", "\u3000", "\u200b"], ["猫"], ["👍"]]
    columns = {"image_id": [1, 2, 3, 4, 5], "file_name": list("abcde"), "captions": captions}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "x/data/train-00000-of-00001.parquet")
    rows, left_out = without_empty_captions(load_rows(str(tmp_path / "x"), "train"))
    assert references_of(rows) == {"1": ["犬", "白い 犬"], "4": ["猫"], "5": ["👍"]}
    assert left_out == {"captions": 4, "images": 2}
    again, left_out = without_empty_captions(rows)
    assert again is rows and left_out == {"captions": 0, "images": 0}


def spoken(folder, **changed) -> str:
    """A dataset of captions in two languages and styles; image 7 has two rows."""
    columns = {
        "image_id": [7, 8, 7, 9],
        "file_name": ["a.png", "b.png", "a.png", "c.png"],
        "captions": [["赤", "", "red"], ["青いです"], ["赤いです"], None],
        "languages": [["ja", "en", "en"], ["ja"], ["ja"], None],
        "styles": [["plain", "", "alt"], ["polite"], ["polite"], []],
    } | changed
    columns = {name: values for name, values in columns.items() if values}
    datasets.Dataset.from_dict(columns).to_parquet(folder / "spoken/data/test-00000-of-00001.parquet")
    return str(folder / "spoken")


def test_languages_and_styles_go_with_their_captions(tmp_path):
    dataset = spoken(tmp_path)
    rows = load_rows(dataset, "test")
    assert rows["languages"][:] == [["ja", "en", "en", "ja"], ["ja"], []]
    assert rows["styles"][:] == [["plain", "", "alt", "polite"], ["polite"], []]
    without, left_out = without_empty_captions(rows)
    assert left_out == {"captions": 1, "images": 1}
    assert without.to_dict() == {
        "image_id": [7, 8],
        "file_name": ["a.png", "b.png"],
        "captions": [["赤", "red", "赤いです"], ["青いです"]],
        "languages": [["ja", "en", "ja"], ["ja"]],
        "styles": [["plain", "alt", "polite"], ["polite"]],
    }
    keys = ["ja/polite", "ja", "en"]
    for key, expected in (
        ("ja/polite", {"7": ["赤いです"], "8": ["青いです"]}),
        ("ja", {"7": ["赤"]}),
        ("en", {"7": ["", "red"]}),
    ):
        assert dataset_references(dataset, "test", key=key, keys=keys) == expected
        assert references_of(rows_of_key(rows, key, keys)) == expected
    assert dataset_references(dataset, "test", key="ja") == {"7": ["赤", "赤いです"], "8": ["青いです"]}
    assert dataset_references(dataset, "test")["7"] == ["赤", "", "red", "赤いです"]
    assert load_rows(spoken(tmp_path, styles=None), "test").column_names == [*rows.column_names[:-1]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"languages": [["ja", "en"], ["ja"], ["ja"], []]}, r"row 0 \(image_id 7\) has 3 captions and 2 languages"),
        ({"styles": [["a", "b", "c"], None, ["d"], []]}, r"row 1 \(image_id 8\) has 1 captions and 0 styles"),
        ({"languages": [["ja", "en", "en"], ["ja"], [None], []]}, "row 2 .*languages holds None, expected a language"),
        ({"styles": [["", "", ""], ["Polite"], [""], []]}, "row 1 .*styles holds 'Polite', expected a style"),
        ({"languages": ["ja", "ja", "ja", "ja"]}, "the column languages is string, expected lists of texts"),
    ],
)
def test_languages_and_styles_that_are_not_one_for_each_caption(tmp_path, changed, message):
    dataset = spoken(tmp_path, **changed)
    for read in (load_rows, lambda *of: dataset_references(*of, key="ja")):
        with pytest.raises(DataError, match=rf"spoken \(test\).*{message}"):
            read(dataset, "test")


def test_references_of_a_key_need_languages(tmp_path):
    with pytest.raises(DataError, match="no column languages"):
        dataset_references(spoken(tmp_path, languages=None), "test", key="ja")


def test_overlap_is_refused(folder):
    rows = load_captions(str(folder / "dataset"), "test", image_dir=str(folder / "images"))
    check_no_overlap(rows.select([0]), rows.select([1, 2]))
    with pytest.raises(DataError, match=r"1 images are in the training and in the test split \(image_id 2"):
        check_no_overlap(rows.select([0, 1]), rows.select([1, 2]))
    texts = rows.select([0, 1]).cast_column("image_id", datasets.Value("string"))  # as those of instructions
    with pytest.raises(DataError, match=r"1 images are in the training and in the test split \(image_id 2"):
        check_no_overlap(texts, rows.select([1, 2]))


def test_record_of_a_folder_and_of_nothing(folder, hub):
    path = str(folder / "dataset")
    said = {"split": "test", "license": "cc-by-4.0", "corpus": "yj"}
    assert dataset_record(path, "test") == {"id": "dataset", "revision": None} | said
    (folder / "dataset/cleaning_report.json").write_text('{"fingerprint": "0123abcd"}')
    assert dataset_record(path, "test")["revision"] == "build 0123abcd"
    assert len(load_captions(path, "test", str(folder / "images"), revision="build 0123abcd")) == 3
    with pytest.raises(DataError, match="data/stair is not a folder, and the Hub .*publish_datasets.py.*stair"):
        dataset_record("data/stair", "train")


@pytest.mark.parametrize("corpus", ["uit_viic", "food_titles", "scenes_vi", "scene_titles", "scenes"])
def test_the_card_says_which_corpus_a_dataset_is(folder, corpus):
    (folder / "dataset/README.md").write_text(f"---\ntags:\n- coco\n- {corpus}-captions\n---\n")
    assert dataset_record(str(folder / "dataset"), "test")["corpus"] == corpus
