"""Which captions belong to a key, and the rows of one."""

import datasets
import pytest

from vlmcap.data.columns import with_columns
from vlmcap.data.errors import DataError
from vlmcap.data.keys import caption_keys, parse_key, rows_of_key

COLUMNS = {
    "image": [{"bytes": bytes([number]), "path": None} for number in range(4)],
    "image_id": [1, 2, 3, 4],
    "captions": [["犬", "犬です", "a dog", "dog"], ["猫", "con mèo"], [], ["a horse", "馬です"]],
    "caption_ids": [[10, 11, 12, 13], [20, 21], [], [40, 41]],
    "languages": [["ja", "ja", "en", "en"], ["ja", "vi"], [], ["en", "ja"]],
    "styles": [["plain", "polite", "", "alt"], ["plain", ""], [], ["", "polite"]],
}


@pytest.fixture
def rows() -> datasets.Dataset:
    features = datasets.Dataset.from_dict(COLUMNS).features | {"image": datasets.Image(decode=False)}
    return datasets.Dataset.from_dict(COLUMNS, features=datasets.Features(features))


@pytest.mark.parametrize(
    ("key", "expected"),
    [("ja", ("ja", "")), ("ja/polite", ("ja", "polite")), ("fil/alt-text_2", ("fil", "alt-text_2"))],
)
def test_a_key_is_a_language_and_perhaps_a_style(key, expected):
    assert parse_key(key) == expected


@pytest.mark.parametrize("key", ["", "j", "JA", "japanese", "ja/", "/plain", "ja/Polite", "ja/a b", "ja/a/b", "ja\n"])
def test_what_is_not_a_key_is_refused(key):
    with pytest.raises(DataError, match="is not a key of captions. Write LANGUAGE or LANGUAGE/STYLE"):
        parse_key(key)


def test_a_caption_belongs_to_its_style_else_to_its_language(rows):
    assert caption_keys(rows, ["ja/plain", "ja", "en"]) == [
        ["ja/plain", "ja", "en", "en"],
        ["ja/plain", None],
        [],
        ["en", "ja"],
    ]
    assert caption_keys(rows, ["en/alt", "vi"]) == [[None, None, None, "en/alt"], [None, "vi"], [], [None, None]]
    assert caption_keys(rows.remove_columns("styles"), ["vi"]) == [[None] * 4, [None, "vi"], [], [None] * 2]


def test_rows_of_a_key_have_its_captions_alone(rows):
    polite = rows_of_key(rows, "ja/polite", ["ja/plain", "ja/polite", "en"])
    assert polite.column_names == rows.column_names and polite.features == rows.features
    assert polite.to_dict() == {
        "image": [COLUMNS["image"][0], COLUMNS["image"][3]],
        "image_id": [1, 4],
        "captions": [["犬です"], ["馬です"]],
        "caption_ids": [[11], [41]],
        "languages": [["ja"], ["ja"]],
        "styles": [["polite"], ["polite"]],
    }
    assert rows_of_key(rows, "ja", ["ja", "ja/polite"])["captions"][:] == [["犬"], ["猫"]]
    assert rows_of_key(rows, "ja", ["ja"])["captions"][:] == [["犬", "犬です"], ["猫"], ["馬です"]]
    assert rows_of_key(rows.select([3, 0]), "en", ["en"])["captions"][:] == [["a horse"], ["a dog", "dog"]]
    assert len(rows_of_key(rows, "de", ["de"])) == 0


@pytest.mark.parametrize("places", [[3, 0], [0, 0, 3], [1, 2], range(4)], ids=str)
def test_columns_change_without_a_copy_of_pictures(rows, tmp_path, monkeypatch, places):
    """Of rows that were selected too; only rows that are there twice are copied."""
    rows.to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    chosen = datasets.load_dataset(str(tmp_path / "data"), split="train").select(places)
    copied, flatten = [], datasets.Dataset.flatten_indices
    monkeypatch.setattr(datasets.Dataset, "flatten_indices", lambda of, *_, **__: copied.append(1) or flatten(of))
    numbers = list(range(len(places)))
    text = datasets.Value("string")
    found = with_columns(
        chosen, {"captions": [[str(n)] for n in numbers], "new": list("abcd")[: len(numbers)]}, {"new": text}
    )
    assert found.column_names == [*rows.column_names, "new"] and found["new"][:] == list("abcd")[: len(numbers)]
    assert found["captions"][:] == [[str(number)] for number in numbers]
    assert found["image"][:] == [COLUMNS["image"][place] for place in places] == chosen["image"][:]
    assert bool(copied) == (len(set(places)) < len(places))


def test_caption_ids_that_are_not_one_a_caption_stay(rows):
    rows = with_columns(rows, {"caption_ids": [[1], None, [], [40, 41]]})
    assert rows_of_key(rows, "ja", ["ja"])["caption_ids"][:] == [[1], None, [41]]


def test_rows_that_do_not_say_the_language_or_style(rows):
    with pytest.raises(DataError, match=r"no column languages, .* by ja/plain, en\. .*publish_datasets.py multi"):
        caption_keys(rows.remove_columns("languages"), ["ja/plain", "en"])
    with pytest.raises(DataError, match=r"no column styles, so its captions cannot be told apart by ja/plain\."):
        rows_of_key(rows.remove_columns("styles"), "ja/plain", ["ja/plain", "en"])
    with pytest.raises(DataError, match="'Ja' is not a key"):
        caption_keys(rows, ["Ja"])
