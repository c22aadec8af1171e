import json
import subprocess
import sys
import unicodedata

import fugashi
import pytest
import unidic_lite
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from vlmcap.evaluation.tokenise import TOKENIZERS, TokenizerError, tokenise, tokenizer_signature


def words(text: str) -> list[str]:
    return tokenise([text])[0]


def test_words_are_the_surfaces_of_unidic_without_punctuation():
    assert words("白い犬が、公園で「ボール」を追いかけています。") == (
        "白い 犬 が 公園 で ボール を 追いかけ て い ます".split()
    )


def test_every_kind_of_punctuation_and_sign_is_dropped():
    assert words("犬・猫！？（鳥）…〜★♪🎂&%-,.:'\"") == ["犬", "猫", "鳥"]
    assert words("。、！") == words("🎂") == words("") == words(" 　\n") == []


def test_single_letters_digits_and_word_fragments_are_words():
    assert words("Tシャツを着たA君") == ["t", "シャツ", "を", "着", "た", "a", "君"]
    assert words("α と β") == ["α", "と", "β"]
    assert words("犬 々 ー") == ["犬", "々", "ー"]  # UniDic calls 々 and ー alone symbols
    assert words("〇") == ["〇"]


def test_width_and_case_make_no_difference():
    assert words("ＴＶとｹｰｷ、３個") == words("tvとケーキ､3個") == ["tv", "と", "ケーキ", "3", "個"]


def test_text_after_a_nul_character_counts():
    assert words("犬\0猫") == ["犬", "猫"]


def test_characters_and_none():
    assert tokenise(["犬と Ｔシャツ。"], "characters") == [["犬", "と", "t", "シ", "ャ", "ツ"]]
    assert tokenise(["A  dog , ケーキ。\t"], "none") == [["A", "dog", ",", "ケーキ。"]]


def test_ipadic_splits_by_its_own_dictionary_with_the_same_normalisation():
    text = "ＴＶを見ています、白い犬が。"
    assert tokenise([text], "ipadic") == ["tv を 見 て い ます 白い 犬 が".split()]
    surfboard = "サーフボードに乗った男性"
    assert tokenise([surfboard], "ipadic")[0][:2] == ["サーフ", "ボード"] and words(surfboard)[0] == "サーフボード"


def test_vietnamese_words_keep_their_tone_marks_and_join_syllables():
    (tokens,) = tokenise(["Một người đàn ông đang chơi bóng đá, ở sân vận động!"], "vietnamese")
    assert "đàn_ông" in tokens and "bóng_đá" in tokens and "vận_động" in tokens
    assert tokens[0] == "một" and not {",", "!"} & set(tokens)
    decomposed = unicodedata.normalize("NFD", "Một người đàn ông đang chơi bóng đá, ở sân vận động!")
    assert tokenise([decomposed], "vietnamese") == [tokens]
    assert tokenise(["ma má mà mả mã mạ"], "vietnamese")[0] != tokenise(["ma ma ma ma ma ma"], "vietnamese")[0]
    assert tokenise(["", " \n", "..."], "vietnamese") == [[], [], []]


def test_pyvi_is_loaded_only_when_asked_for():
    code = "import sys, vlmcap.evaluation.scoring; sys.exit('pyvi' in sys.modules or 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_real_vietnamese_captions(data_dir):
    """Of UIT-ViIC: football, whose words have two syllables and more."""
    annotations = json.loads((data_dir / "uit_viic" / "uitviic_captions_test2017.json").read_bytes())["annotations"]
    captions = [annotation["caption"] for annotation in annotations[:200]]
    tokens = tokenise(captions, "vietnamese")
    assert "bóng_đá" in {word for words in tokens for word in words}
    kept = ["".join(c for c in unicodedata.normalize("NFC", text).lower() if c.isalnum()) for text in captions]
    assert ["".join(c for c in "".join(words) if c.isalnum()) for words in tokens] == kept


# Invented titles of dishes, with what occurs in titles: hyphens, quotes, apostrophes, ampersands, accents, numbers.
TITLES = """Grandma's Mac & Cheese
7-Layer Dip, Quick-Pickled Beets; Rye
"Killer" Chili (Almost)
‘Smashed’ Potatoes—and “Loose” Gravy – Hot
Baker’s Half-Dozen Rolls
Don't-Miss, Can't-Fail Pie
Fish 'n' Chips and '90s Trifle
5-Minute Soup with 1/2 Cup of 3.5% Cream
Crème Brûlée à l'Orange
M&M's Bark: You'll Love It!
Mother-in-Law's B&B Breakfast ... Again?
Potato- and Leek-Stuffed Crêpes
Cooks' Corner Salad - Warm
O'Brien Hash + Eggs = Brunch, We've Heard
Jalapeño/Lime Shrimp -- No. 1""".splitlines()


@pytest.mark.usefixtures("java")
def test_english_is_the_ptb_tokenizer_of_pycocoevalcap_on_titles():
    theirs = PTBTokenizer().tokenize({i: [{"caption": title}] for i, title in enumerate(TITLES)})
    for i, (title, words) in enumerate(zip(TITLES, tokenise(TITLES, "english"), strict=True)):
        # It keeps the full stop of abbreviations and, lower cased, the brackets that its wrapper means to drop.
        expected = [word for word in theirs[i][0].split() if word not in ("-lrb-", "-rrb-")]
        assert words == [{"no.": "no"}.get(word, word) for word in expected], title


def test_english_words():
    assert tokenise(['Grandma\'s Mac & Cheese (50% "Off")'], "english") == [
        ["grandma", "'s", "mac", "&", "cheese", "50", "%", "off"]
    ]
    assert tokenise(["Don't-Miss 7-Layer Dip"], "english") == [["do", "n't", "miss", "7-layer", "dip"]]
    composed, decomposed = (unicodedata.normalize(form, "Crème Brûlée") for form in ("NFC", "NFD"))
    assert tokenise([decomposed], "english") == tokenise([composed], "english") == [["crème", "brûlée"]]
    assert tokenise(["", "...", " - ' \"", "(!?)"], "english") == [[], [], [], []]


def test_order_and_repeats_are_kept():
    assert tokenise(iter(["猫", "犬", "猫"])) == [["猫"], ["犬"], ["猫"]]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_tokens_survive_joining_with_spaces(tokenizer, text):
    (tokens,) = tokenise([text], tokenizer)
    assert " ".join(tokens).split() == tokens


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="犬猫公園でボールを追い走っているＡBcｹｰｷ12。、！・ 　-「」", max_size=30))
def test_no_letter_or_digit_is_lost(text):
    kept = [c for c in unicodedata.normalize("NFKC", text).lower() if c.isalnum()]
    assert [c for c in "".join(words(text)) if c.isalnum()] == kept
    assert tokenise([text], "characters") == [kept]


def test_segmentation_is_that_of_fugashi_nodes():
    text = "赤い傘をさした女性が雨の横断歩道を渡っている"
    tagger = fugashi.GenericTagger(f'-r "{unidic_lite.DICDIR}/mecabrc" -d "{unidic_lite.DICDIR}"')
    assert words(text) == [node.surface for node in tagger(text)]


def test_signatures_name_what_was_done():
    assert tokenizer_signature() == "tok:unidic-lite-1.0.8|norm:nfkc|punct:drop|case:lc"
    assert tokenizer_signature("characters") == "tok:characters|norm:nfkc|punct:drop|case:lc"
    assert tokenizer_signature("ipadic") == "tok:ipadic-1.0.0|norm:nfkc|punct:drop|case:lc"
    assert tokenizer_signature("vietnamese") == "tok:vietnamese-pyvi-0.1.1|norm:nfc|punct:drop|case:lc"
    assert tokenizer_signature("english") == "tok:english-13a-ptb-sacrebleu-2.6.0|norm:nfc|punct:drop|case:lc"
    assert tokenizer_signature("none") == "tok:none|norm:none|punct:keep|case:mixed"


@pytest.mark.parametrize("call", [lambda: tokenise(["犬"], "mecab"), lambda: tokenizer_signature("mecab")])
def test_an_unknown_tokenizer_names_the_choices(call):
    with pytest.raises(TokenizerError, match="'mecab'.*unidic-lite, ipadic, characters, vietnamese, english, none"):
        call()
