"""Polite endings to plain ones, by rule; measured on the real YJ captions."""

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmcap.evaluation.register import is_polite, to_plain
from vlmcap.miniature.scenes import scenes

POLITE_END = re.compile(
    r"(ます|ました|ません|ませんでした|ましょう|です|でした|でしょう)[かねよ]*[。．.!！・ 　｡、]*$"
)


@pytest.mark.parametrize(
    ("polite", "plain"),
    [
        ("猫が椅子に座っています。", "猫が椅子に座っている。"),
        ("机の上に本があります", "机の上に本がある"),
        ("女性が二人います。", "女性が二人いる。"),
        ("男性がピザを食べました。", "男性がピザを食べた。"),
        ("子供が本を読みました", "子供が本を読んだ"),
        ("犬が川を泳ぎました", "犬が川を泳いだ"),
        ("電車が駅に行きました", "電車が駅に行った"),
        ("バスが来ました", "バスが来た"),
        ("二人でゲームをしました", "二人でゲームをした"),
        ("鳥が飛んでいました。", "鳥が飛んでいた。"),
        ("誰も座っていません", "誰も座っていない"),
        ("椅子がありません。", "椅子がない。"),
        ("山は見えませんでした", "山は見えなかった"),
        ("車はありませんでした", "車はなかった"),
        ("この人は選手ではありません", "この人は選手ではない"),
        ("海へ行きましょう", "海へ行こう"),
        ("ピザを食べましょう", "ピザを食べよう"),
        ("馬に乗ってます。", "馬に乗ってる。"),
        ("写真が飾られています", "写真が飾られている"),
        ("白い部屋です。", "白い部屋だ。"),
        ("空が青いです。", "空が青い。"),
        ("とても静かです", "とても静かだ"),
        ("猫が寝ているのです", "猫が寝ているのだ"),
        ("昔の駅でした", "昔の駅だった"),
        ("何かの店でしょう。", "何かの店だろう。"),
        ("広い公園ですので人が多いです", "広い公園なので人が多い"),
        ("人がいますが、顔は見えません。", "人がいるが、顔は見えない。"),
        ("これは何ですか", "これは何か"),
        ("係員が立っております", "係員が立っている"),
        ("こちらは駅でございます", "こちらは駅である"),
        ("止まれません。標識です。", "止まれない。標識だ。"),
        (" 犬が　います 。\n", " 犬が　いる 。\n"),
        ("犬\0猫がいます", "犬\0猫がいる"),
    ],
)
def test_every_rule(polite, plain):
    assert to_plain(polite) == plain
    assert to_plain(plain) == plain


@pytest.mark.parametrize(
    "text",
    [
        "",
        "赤い車が走っている",
        "「止まれません」と書かれた看板",
        "雪道をスキーですべる人",
        "ますを釣る男性",
        "こちらをご覧ください",
        "A man is riding a bike.",
        "のび太たちの隣ですごい顔をした犬",
    ],
)
def test_plain_text_quotations_and_requests_are_kept(text):
    assert to_plain(text) == text


def test_the_scenes_of_the_demo_are_plain_already():
    for scene in scenes(40, seed=3, held_out=True):
        assert [to_plain(caption) for caption in scene.japanese()] == scene.japanese()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from("犬 が 走り 食べ 赤い い あり ます ました ません です でした でしょう 。 の 「 」 た".split()),
        max_size=10,
    )
)
def test_twice_is_once_and_only_polite_text_changes(parts):
    text = "".join(parts)
    plain = to_plain(text)
    assert to_plain(plain) == plain
    if not {"ます", "まし", "ませ", "です", "でし"} & {text[i : i + 2] for i in range(len(text))}:
        assert plain == text


def test_real_polite_captions_become_plain(data_dir):
    """More than 99% of the YJ captions that end politely; the rest is misspelt or cut apart wrongly by MeCab."""
    annotations = json.loads((data_dir / "yj_subset" / "yjcaptions_subset.json").read_bytes())["annotations"]
    polite = [text for text in (annotation["caption"] for annotation in annotations) if POLITE_END.search(text)]
    assert len(polite) > 24_000
    plain = [to_plain(text) for text in polite]
    left = [text for text in plain if POLITE_END.search(text)]
    assert len(left) <= 8, left
    assert all(to_plain(text) == text for text in plain)


def test_real_plain_captions_are_kept(data_dir):
    def strings(value):
        if isinstance(value, str):
            return [value]
        return itertools.chain.from_iterable(map(strings, value.values() if isinstance(value, dict) else value))

    sample = json.loads((data_dir / "stair_sample" / "eval-stair-50.json").read_bytes())
    captions = [text for text in strings(sample) if not text.isascii()]
    assert len(captions) >= 70
    assert [to_plain(text) for text in captions] == captions


def test_long_texts_are_made_plain():
    """In time that grows with their length: the square of it would be a minute here."""
    text = "犬が走っています。「静かです」と言いました。" * 3000
    assert to_plain(text) == "犬が走っている。「静かです」と言った。" * 3000


def test_what_is_polite():
    for scene in scenes(20, 5, held_out=None):
        assert all(map(is_polite, scene.polite_japanese())) and not any(map(is_polite, scene.japanese()))
    assert not is_polite("看板に「止まれです」とある") and not is_polite("")
