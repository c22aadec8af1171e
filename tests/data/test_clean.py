import copy
import json
import re
import unicodedata
from collections import defaultdict

import emoji
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vlmcap.data.clean import _NEEDS_RULES, TEXT_RULES, CaptionCleaner, clean_text

SENTENCES = [
    "白い皿の上に、切ったリンゴが3つ並んでいます。",
    "Tシャツを着た女性が「OPEN」と書かれた看板の前で笑っている",
    "佐々木さんの家の庭で、2〜3匹の仔猫が遊んでいる。",
    "ソファー・テーブル・ランプのある部屋",
]
FAMILY, JAPAN, RUNNER = "👨\u200d👩\u200d👧", "🇯🇵", "🏃🏽\u200d♂\ufe0f"
ENGLAND = "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE that knows little: most kanji are three tokens, so that limits fall inside characters."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="!", name_or_path="someone/small-bpe")


def rows_of(*images):
    return [
        {"image_id": i, "captions": list(captions), "caption_ids": [100 * i + j for j in range(len(captions))]}
        for i, captions in enumerate(images)
    ]


def counts(cleaner):
    return {rule["name"]: rule["count"] for rule in cleaner.report()["rules"] if rule["count"]}


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [
        # emoji go with all that belongs to them; signs that are text stay
        ("emoji", f"{FAMILY}公園で遊ぶ家族{JAPAN}{ENGLAND}", "公園で遊ぶ家族"),
        ("emoji", f"走る人{RUNNER}と❤\ufe0fと☝🏽。", "走る人とと。"),
        ("emoji", "1\ufe0f\u20e3番のバス", "1番のバス"),
        ("emoji", "COOL😎CAFE", "COOL CAFE"),
        ("emoji", "ピザ🍕ハウス", "ピザハウス"),
        ("emoji", "♥\ufe0fの札と♥の札", "の札と♥の札"),
        ("control", "白\u200bい\ufeff犬\u00ad\u2060\x07\u202e", "白い犬"),
        ("control", "赤い車\ud83d\ufffd\ue63e", "赤い車"),
        ("control", "旗\ufe0f", "旗"),
        ("control", "\u202a白\u202b\u202d\u202e\u202c犬\u2066\u2067\u2068\u2069\u200e\u200f\u061c", "白犬"),
        ("markup", "犬<|im_end|>\n<|im_start|>user", "犬user"),
        ("markup", "<|vision_start|><|image_pad|><|vision_end|>犬", "犬"),
        ("markup", "<s>犬</s><image> [SEP]猫[/INST]", "犬猫"),
        ("markup", "＜｜ｅｎｄ▁ｏｆ▁ｓｅｎｔｅｎｃｅ｜＞犬", "犬"),
        ("markup", "犬<|im_<|im_end|>end|><|", "犬im_ end"),
        ("markup", "[[SEP]SEP] <<s>s> [ CLS ]犬", "< s>犬"),
        ("width", "ＡＢＣ－１２３！（犬）：；＆％", "ABC-123!(犬):;&%"),
        ("width", "ﾊﾞｽとﾍﾟｯﾄﾎﾞﾄﾙ､｢ﾃﾚﾋﾞ｣･ｿﾌｧｰ｡", "バスとペットボトル、「テレビ」・ソファー。"),
        ("width", "５～６人", "5〜6人"),
        ("width", "￥５００", "¥500"),
        ("unicode", "か\u3099らすのハ\u309aン", "がらすのパン"),
        ("unicode", "は゛ら", "ばら"),
        ("unicode", "cafe\u0301の看板", "café\u306e看板"),
        ("unicode", "⼤⼈", "大人"),
        ("url", "犬の写真https://example.com/a?b=1#cを見る", "犬の写真を見る"),
        ("url", "猫がいる(http://example.com/)。", "猫がいる。"),
        ("url", "猫がいる www.example.com", "猫がいる"),
        ("long_vowel", "ラ－メン屋とギタ―と、テ−ブル", "ラーメン屋とギターと、テーブル"),
        ("spacing", "　白い 犬が\n走る\t", "白い犬が走る"),
        ("spacing", "STOP  SIGN の 前", "STOP SIGNの前"),
        ("spacing", "レオナルド　ダ　ビンチの絵", "レオナルド ダ ビンチの絵"),
        ("spacing", "「 OPEN 」 、( 赤 )", "「OPEN」、(赤)"),
        ("punctuation", "犬がいます。。", "犬がいます。"),
        ("punctuation", "、男性が、、立っている、。", "男性が、立っている。"),
        ("punctuation", "犬がいて,猫もいます.", "犬がいて、猫もいます。"),
    ],
)
def test_each_rule_fixes_what_it_names(tokenizer, rule, before, after):
    assert clean_text(before) == after
    cleaner = CaptionCleaner(tokenizer)
    cleaner.clean(rows_of([before]))
    assert rule in counts(cleaner)


@pytest.mark.parametrize(
    "text",
    [
        *SENTENCES,
        "すごーーい、コーヒー・ラーメン・ヴァイオリン",
        "神社と\ufa19社、山崎と山\ufa11、福と\ufa1b、葛\U000e0100飾区と辻\U000e0101さん、祇\ufe00園",
        "三ヶ月、一ヵ所、〆切、二〇二〇年、あゝ、いすゞ、人々、〇×",
        "①番のⅢ型、3㎝、20℃、㈱、½、5㎡、m²、№1、©2020、™、†",
        "♂と♀、♨、☎、♪、★、→、☀、㊙、㊗、〽、〒、※、♥",
        "‘a’と“b”と’80年代、『本』、【赤】、〈青〉、…、――、犬!?",
        "「epsos.de」という文字、usb3.0、3,000円、10:30、80-320、wi-fi、1/2、A&B",
        "ボーイング-747、東京―大阪、パン―米、東京 - 大阪",
        "éとñとü",
        "あ\u3099とか\u309a",  # Unicode has no single character for these
        "한글 간판",
        "最後に点がない",
        "最後に点がある。",
        "",
    ],
)
def test_ordinary_japanese_stays(text):
    assert clean_text(text) == text


ordinary_word = st.lists(
    st.one_of(
        st.sampled_from("々〇〆ヶヵ・〜ー「」『』ゝゞヽヾヴっゃッャ"),
        st.characters(min_codepoint=0x3041, max_codepoint=0x3094),  # hiragana
        st.characters(min_codepoint=0x30A1, max_codepoint=0x30FA),  # katakana
        st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF),  # kanji
        st.characters(min_codepoint=0x20000, max_codepoint=0x2A6DF),  # rare kanji
        st.sampled_from(["\ufa19", "\ufa1b", "\ufa11", "\U0002f804", "葛\U000e0100", "祇\ufe00"]),  # their variants
        st.sampled_from("ABCxyz0123456789"),
    ),
    min_size=1,
    max_size=12,
).map("".join)


@given(st.lists(ordinary_word, min_size=1, max_size=5), st.sampled_from(["", "。"]))
def test_any_ordinary_text_stays(words, end):
    text = "、".join(words) + end
    assert clean_text(text) == text


# Pieces that meet badly: half of what a rule looks for, its neighbours, and what rules leave.
nasty = st.lists(
    st.one_of(
        st.sampled_from(
            "犬神はかウテンッーデハ゛゜ﾞﾟ\u3099\u309aｶｰｳ。、,.!?・～〜－―−-‐ 　\n\t()（）「」[]<>：，．ＡａA1２%&/"
        ),
        st.sampled_from(
            "🐕♥❤☀🏻🇯🇵\ufe0f\ufe0e\ufe00\u200d\u200b\u20e3\u0301\u0338…㊙Ⅳ⼀\U000e0100\U000e0067🏴\u2126\ud83d\ufffd\u00a0"
        ),
        st.sampled_from(sorted(emoji.EMOJI_DATA)),
        st.sampled_from(
            ["<|", "|>", "<|im_", "[SEP]", "[ CLS", "SEP ]", "[[", "]]", "<s>", "<", "s>", "<|a|>", "/INST"]
        ),
        st.sampled_from(["http://", "https://a.b/c", "www.", "www.x", "ｈｔｔｐ：／／", "(http://x)", "「http://x」"]),
        st.characters(),
    ),
    max_size=16,
).map("".join)


@settings(max_examples=600, deadline=None)
@given(nasty)
@example("、🏻http://x\u0338")  # what a removal brings together must not be a new case for an earlier rule
@example("http:// ]a")
@example("は🏄\u3099－、ハ\u0301\u3099－")
@example("テ ―ブ、か ゛、犬 ,猫、犬,、猫")
@example("テ―http://x")
@example("[SEP][ CLSwww.x")
@example("[http://x SEP [SEP]]")
def test_cleaning_is_idempotent_and_thorough(text):
    cleaned = clean_text(text)
    assert clean_text(cleaned) == cleaned
    cleaned.encode()  # half a surrogate pair would raise
    for char in cleaned:
        assert unicodedata.category(char) not in ("Cc", "Cf", "Co", "Cs"), hex(ord(char))
        assert char not in "\ufe0e\ufe0f\u20e3\u3000"
        assert not "\uff01" <= char <= "\uff9f" or char in "｟｠", char  # full-width ASCII, half-width kana
    assert "  " not in cleaned and cleaned == cleaned.strip()
    assert not re.search(r"<\||\|>|\[(SEP|CLS|PAD|MASK|UNK|INST|/INST)\]|<s>", cleaned)
    assert not any(
        found["emoji"] in emoji.EMOJI_DATA and len(found["emoji"]) > 1 for found in emoji.emoji_list(cleaned)
    )


# Every character that the short cut lets pass; the kanji, which are many, by two of them.
passing = [char for char in map(chr, range(0x10000)) if not _NEEDS_RULES.search(f"犬{char}")]
passing = [char for char in passing if not "\u4e00" <= char <= "\u9fff"] + ["犬", "猫"]


@settings(max_examples=400)
@given(st.text(st.sampled_from(passing)).filter(lambda text: not _NEEDS_RULES.search(text)))
def test_the_short_cut_skips_no_rule(text):
    for rule in TEXT_RULES:
        assert rule.apply(text) == text, rule.name


@pytest.mark.parametrize("rule", TEXT_RULES, ids=lambda rule: rule.name)
def test_the_short_cut_skips_no_rule_for_any_character(rule):
    for char in passing:
        assert rule.apply(f"ア{char}か{char}犬{char}A") == f"ア{char}か{char}犬{char}A"


kana_and_kanji = st.characters(min_codepoint=0x3041, max_codepoint=0x3096) | st.sampled_from("ァアヴン々ー犬猫走東京")


@given(st.lists(kana_and_kanji | st.sampled_from(list(" 　,.。、！？🐕\u200b()２")), max_size=30).map("".join))
def test_no_kana_or_kanji_is_lost_or_moved(text):
    def letters(s):
        return [c for c in s if unicodedata.category(c).startswith("L")]

    assert letters(clean_text(text)) == letters(text)


long_text = st.text(
    st.sampled_from("犬猫走東京のがは、。 「」ABC1ー")
    | st.sampled_from("か\u3099は\u309aあ\u3099e\u0301葛\U000e0100ก\u0e33"),
    min_size=5,
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(text=long_text, max_tokens=st.integers(1, 24))
def test_truncation_ends_between_characters_within_the_limit(tokenizer, text, max_tokens):
    before = clean_text(text)
    rows = CaptionCleaner(tokenizer, max_tokens=max_tokens).clean(rows_of([text]))
    after = rows[0]["captions"][0] if rows else ""
    fits = len(tokenizer(before, add_special_tokens=False)["input_ids"]) <= max_tokens
    if fits and any(c.isalnum() for c in before):
        assert after == before
        return
    assert len(tokenizer(after, add_special_tokens=False)["input_ids"]) <= max_tokens
    assert clean_text(after) == after
    assert before.startswith(after)
    rest = before[len(after) :]
    assert not (after and rest) or not unicodedata.category(rest[0]).startswith("M")


def test_truncation_keeps_as_much_as_fits(tokenizer):
    text = "紅葉狩" * 10  # unseen kanji: three tokens each
    cleaner = CaptionCleaner(tokenizer, max_tokens=8)
    (row,) = cleaner.clean(rows_of([text]))
    assert row["captions"] == ["紅葉"]
    assert counts(cleaner) == {"max_tokens": 1}


def test_padding_left_on_by_an_earlier_call_does_not_lengthen_captions(tokenizer):
    padded = copy.deepcopy(tokenizer)
    padded([SENTENCES[0]], padding="max_length", max_length=500)
    rows = rows_of(["ABCDE" * 6])
    assert CaptionCleaner(padded, max_tokens=30).clean(rows) == rows


def test_beginning_that_needs_more_tokens_alone_is_cut_further():
    """Here 鬱か is one token but 鬱 alone three: a count taken inside the text says nothing about its parts."""
    utsu, ka = (pre_tokenizers.ByteLevel(False).pre_tokenize_str(char)[0][0] for char in "鬱か")
    merges = [(ka[0], ka[1]), (ka[:2], ka[2]), (utsu[2], ka), (utsu[1], utsu[2] + ka), (utsu[0], utsu[1:] + ka)]
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    bpe = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    small = PreTrainedTokenizerFast(tokenizer_object=bpe)
    assert [len(small(text)["input_ids"]) for text in ("鬱か", "鬱")] == [1, 3]
    (row,) = CaptionCleaner(small, max_tokens=2).clean(rows_of(["A鬱か\u309a"]))
    assert row["captions"] == ["A"]


def test_duplicates_and_empty_captions_fall_with_their_ids(tokenizer):
    rows = rows_of(
        ["犬が走る", "犬が走る。", "犬が走る", "Ｔシャツの猫", "tシャツの、猫", "別の犬が走る"],
        ["", "😀", "。。"],
        ["犬が走る"],
    )
    original = copy.deepcopy(rows)
    rows[0]["in_yj"] = original[0]["in_yj"] = True
    cleaner = CaptionCleaner(tokenizer)
    cleaned = cleaner.clean(rows)
    assert cleaned == [
        {
            "image_id": 0,
            "captions": ["犬が走る", "Tシャツの猫", "別の犬が走る"],
            "caption_ids": [0, 3, 5],
            "in_yj": True,
        },
        {"image_id": 2, "captions": ["犬が走る"], "caption_ids": [200]},  # duplicates count within an image only
    ]
    assert rows == original
    found = counts(cleaner)
    assert (found["exact_duplicate"], found["normalised_duplicate"], found["empty"]) == (1, 2, 3)


def test_texts_alike_only_after_truncation_are_duplicates(tokenizer):
    cleaner = CaptionCleaner(tokenizer, max_tokens=6)
    (row,) = cleaner.clean(rows_of(["紅葉狩", "紅葉山"]))
    assert row["captions"] == ["紅葉"]
    assert counts(cleaner) == {"max_tokens": 2, "exact_duplicate": 1}


def test_report_adds_up_over_calls_and_shows_examples(tokenizer):
    cleaner = CaptionCleaner(tokenizer, max_tokens=64, examples_per_rule=2)
    for _ in range(2):
        cleaner.clean(rows_of(["２匹の犬", "二匹の犬"], ["３匹　の犬", "３匹の犬"]))
    report = cleaner.report()
    assert json.loads(json.dumps(report)) == report
    assert {key: value for key, value in report.items() if key != "rules"} == {
        "tokenizer": "someone/small-bpe",
        "max_tokens": 64,
        "images_in": 4,
        "images_out": 4,
        "captions_in": 8,
        "captions_out": 6,
    }
    rules = {rule["name"]: rule for rule in report["rules"]}
    assert len(rules) == len(report["rules"]) == 13
    assert rules["width"]["count"] == 6 and rules["width"]["action"] == "changed"
    assert rules["width"]["examples"] == [
        {"image_id": 0, "caption_id": 0, "before": "２匹の犬", "after": "2匹の犬"},
        {"image_id": 1, "caption_id": 100, "before": "３匹　の犬", "after": "3匹　の犬"},
    ]
    assert rules["spacing"]["examples"][0]["after"] == "3匹の犬"
    duplicate = {"image_id": 1, "caption_id": 101, "before": "3匹の犬", "after": "3匹の犬"}
    assert rules["exact_duplicate"]["action"] == "removed" and rules["exact_duplicate"]["examples"][0] == duplicate


def test_report_names_a_local_tokenizer_without_its_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "my-tokenizer")
    local = AutoTokenizer.from_pretrained(tmp_path / "my-tokenizer")
    assert CaptionCleaner(local).report()["tokenizer"] == "my-tokenizer"


def test_real_tokenizer_cuts_at_64_tokens(qwen2vl_dir):
    qwen = AutoTokenizer.from_pretrained(qwen2vl_dir)
    texts = ["紅葉の鬱蒼とした驛の廣場で" * 12, "か\u309a" * 90, "葛\U000e0100飾" * 40, "a fox " * 80, "短い"]
    rows = CaptionCleaner(qwen).clean(rows_of(*[[text] for text in texts]))
    for row, text in zip(rows, texts, strict=True):
        (caption,) = row["captions"]
        assert text.startswith(caption)
        assert len(qwen(caption)["input_ids"]) <= 64
        rest = text[len(caption) :]
        assert not rest or unicodedata.category(rest[0]) not in ("Mn", "Me", "Mc")
        assert text == "短い" or len(qwen(caption)["input_ids"]) >= 60  # a grapheme of these texts has five at most
    assert rows[-1]["captions"] == ["短い"]


def test_real_captions_keep_every_letter(qwen2vl_dir, data_dir):
    """The 25,759 human captions of the YJ subset: little is changed, and no kana or kanji but a fixed long vowel."""
    images = defaultdict(lambda: {"captions": [], "caption_ids": []})
    for annotation in json.loads((data_dir / "yj_subset" / "yjcaptions_subset.json").read_text())["annotations"]:
        image = images[annotation["image_id"]]
        image["captions"].append(annotation["caption"])
        image["caption_ids"].append(annotation["id"])
    rows = [{"image_id": image_id, **image} for image_id, image in images.items()]
    raw = {id_: text for row in rows for id_, text in zip(row["caption_ids"], row["captions"], strict=True)}
    cleaner = CaptionCleaner(AutoTokenizer.from_pretrained(qwen2vl_dir), examples_per_rule=len(raw))
    cleaned = cleaner.clean(rows)

    found = counts(cleaner)
    fallen = found["exact_duplicate"] + found["normalised_duplicate"]
    assert found.keys() == {
        "width", "long_vowel", "spacing", "punctuation", "max_tokens", "exact_duplicate", "normalised_duplicate"
    }  # fmt: skip
    assert sum(len(row["captions"]) for row in cleaned) == len(raw) - fallen
    assert len(cleaned) == len(rows)
    assert (
        fallen < 200 and found["width"] < 1500 and found["long_vowel"] + found["spacing"] + found["punctuation"] < 60
    )

    def letters(text):
        return [c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c)[0] == "L" and c != "ー"]

    rules = {rule["name"]: rule["examples"] for rule in cleaner.report()["rules"]}
    cut = {example["caption_id"] for example in rules["max_tokens"]}
    for row in cleaned:
        for id_, text in zip(row["caption_ids"], row["captions"], strict=True):
            assert clean_text(text) == text
            if id_ not in cut:
                assert letters(text) == letters(raw[id_]), raw[id_]
