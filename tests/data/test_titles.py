"""The CSV of dish titles: rows and rules, broken files, words, the cloud."""

from collections import Counter

import pytest
from PIL import Image

from vlmcap.data.clean import clean_text
from vlmcap.data.errors import DataError
from vlmcap.data.titles import TEXT_RULES, read_titles, word_counts, write_word_cloud

CSV = """Unnamed,Title,Image_Name
0,"Plums, Pears and a Pie",plums
1,,no-title
2,A Soup Without a Picture,#NAME?
3,Another,
4,Plums Again,plums
5,A Paper Vase with Napkins,vase
6,Soup,soup
"""


@pytest.fixture
def titles(tmp_path):
    path = tmp_path / "titles.csv"
    path.write_text(CSV, encoding="utf-8-sig")
    return path


def test_rows_and_what_is_left_out(titles):
    rows, left_out, file = read_titles(titles, None)
    assert rows[0] == {
        "image_id": 1,
        "file_name": "plums.jpg",
        "coco_url": "",
        "license": "",
        "captions": ["Plums, Pears and a Pie"],
        "caption_ids": [1],
        "in_yj": None,
    }
    assert [row["image_id"] for row in rows] == [1, 7]
    assert [(row["row"], row["rule"]) for row in left_out] == [
        (2, "no_title"),
        (3, "no_image_name"),
        (4, "no_image_name"),
        (5, "duplicate_image"),
        (6, "not_food"),
    ]
    assert left_out[4] == {"row": 6, "image_name": "vase", "title": "A Paper Vase with Napkins", "rule": "not_food"}
    assert (file.name, file.images) == ("titles.csv", 7)


def test_rows_without_an_image_file_are_left_out(titles, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "soup.PNG").touch()
    (tmp_path / "images" / "plums.txt").touch()
    rows, left_out, _ = read_titles(titles, tmp_path / "images")
    assert [row["file_name"] for row in rows] == ["soup.PNG"]
    assert (1, "no_image_file") in [(row["row"], row["rule"]) for row in left_out]
    (tmp_path / "images" / "soup.PNG").unlink()
    with pytest.raises(DataError, match="no row is left .*no_image_file 3.*--images"):
        read_titles(titles, tmp_path / "images")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Name,Title\na,b\n", r"columns \['Name', 'Title'\], expected Image_Name and Title"),
        ("Image_Name,Title\na,Soup\nb,Soup, Salad\n", r"row 2 \(line 3\) has 3 values for 2 columns.*double quotes"),
        ("Image_Name,Title\na\n", r"row 1 \(line 2\) has 1 values"),
        ('Image_Name,Title\na,"A "good" soup"\n', "line 2: .*written twice"),
        ("", "has the columns None"),
        ("Image_Name,Title\n", "no row is left"),
    ],
)
def test_broken_files_are_named_with_the_fix(tmp_path, text, message):
    path = tmp_path / "titles.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=rf"titles\.csv: .*{message}"):
        read_titles(path, None)


def test_other_encodings_are_refused(tmp_path):
    (tmp_path / "titles.csv").write_bytes("Image_Name,Title\na,Crème\n".encode("latin-1"))
    with pytest.raises(DataError, match="byte 21 of .*Save the CSV as UTF-8"):
        read_titles(tmp_path / "titles.csv", None)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Sesame\x96Sugar Bread", "Sesame–Sugar Bread"),
        ("Sable\u0301s", "Sablés"),
        ("Ham &amp; Eggs", "Ham & Eggs"),
        ("PB&J; Toast", "PB&J Toast"),
        ("Grandma’s “Best” Pie", 'Grandma\'s "Best" Pie'),
        ("Lima -Style  Fish (Big )", "Lima-Style Fish (Big)"),
        ("Mac & Cheese; 3-Ingredient Crème (No. 5)", "Mac & Cheese; 3-Ingredient Crème (No. 5)"),
    ],
)
def test_titles_are_cleaned(before, after):
    assert clean_text(before, TEXT_RULES) == after == clean_text(after, TEXT_RULES)


def test_words_are_counted_without_stop_words():
    counts = word_counts(["Pear-Pie with Pears", "Pie à la Mode", "A Pie"])
    assert counts == Counter({"pie": 3, "pear": 1, "pears": 1, "mode": 1})


def test_the_same_counts_make_the_same_cloud(tmp_path):
    for name in ("a.png", "b.png"):
        write_word_cloud(Counter({"soup": 5, "pie": 2, "crème": 1}), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as cloud:
        assert cloud.size == (1600, 800) and len(cloud.convert("RGB").getcolors(1 << 20)) > 3


def test_real_titles(data_dir):
    rows, left_out, file = read_titles(data_dir / "food_titles" / "titles.csv", None)
    assert (file.images, len(rows)) == (2_000, 1_996)
    assert [(row["row"], row["rule"]) for row in left_out] == [
        (733, "not_food"),
        (1042, "no_image_name"),
        (1943, "no_image_name"),
        (1973, "no_title"),
    ]
    changed = Counter()
    for row in rows:
        text = row["captions"][0]
        for rule in TEXT_RULES:
            before, text = text, rule.apply(text)
            changed[rule.name] += text != before
        assert clean_text(text, TEXT_RULES) == text
    assert changed == {"cp1252": 2, "control": 0, "unicode": 1, "entity": 1, "markup": 0, "quotes": 5, "spacing": 2}
