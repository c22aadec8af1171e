"""Each reward against values worked out by hand, and against the metric or the audit that measures the same."""

import math
from collections import defaultdict

import pytest
import sacrebleu

from vlmcap.evaluation.audit_checks import form_faults, hallucination, normalised
from vlmcap.evaluation.lexicon import Lexicon
from vlmcap.evaluation.metrics import DocumentFrequencies
from vlmcap.evaluation.scoring import ScoreOptions, score, write_idf
from vlmcap.evaluation.tokenise import tokenise
from vlmcap.rewards.functions import bleu_4, chair, chrf, cider_d, copy, japanese, length, repetition

TRAINED = {
    "1": ["赤い丸が描かれている", "赤い円がある"],
    "2": ["青い星の上に緑の三角がある", "緑の三角が上、青い星が下にある"],
    "3": ["黒い四角が描かれている"],
}
REFERENCES = {
    "7": ["左に赤い丸、右に青い星がある", "赤い丸の右に青い星が描かれている"],
    "8": ["上に黒い四角がある"],
    "9": ["緑の三角が描かれている", "三角", "緑の三角形がある"],
}
CAPTIONS = {"7": "左に赤い丸、右に青い星が描かれている", "8": "黒い星", "9": "緑の三角が描かれている"}


def scored(function, captions: dict[str, str], references: dict[str, list[str]], **bound) -> list[float]:
    return function(
        list(captions.values()),
        [references[image_id] for image_id in captions],
        [{"image_id": image_id} for image_id in captions],
        **bound,
    )


def alone(function, *captions: str, references=("犬",), **bound) -> list[float]:
    return function(list(captions), [list(references)] * len(captions), [{"image_id": 1}] * len(captions), **bound)


# Against references ------------------------------------------------------------------------------------------------
def test_cider_d_is_the_metric_with_frequencies_of_the_training_split(tmp_path):
    idf = write_idf(TRAINED, tmp_path / "idf.json")
    options = ScoreOptions(idf=str(tmp_path / "idf.json"), resamples=0, register_normalised=False, meteor=False)
    expected = score(CAPTIONS, REFERENCES, options=options)["per_image"]["cider_d"]
    assert scored(cider_d, CAPTIONS, REFERENCES, idf=idf) == pytest.approx(expected, abs=1e-12)
    assert len(set(expected)) == 3


def test_cider_d_of_a_sample_does_not_depend_on_the_batch():
    idf = DocumentFrequencies(10, {})
    together = scored(cider_d, CAPTIONS, REFERENCES, idf=idf)
    apart = [scored(cider_d, {image_id: CAPTIONS[image_id]}, REFERENCES, idf=idf)[0] for image_id in CAPTIONS]
    assert together == pytest.approx(apart, abs=1e-12)


def test_cider_d_by_hand():
    # 犬 is in 5 of 10 images, が, 走る and 寝る in all: idf log 2 and 0; every longer n-gram log 10. The reference is
    # as long as the caption: no length penalty. Unigrams: 犬 alone weighs, 1. Bigrams: one of two agrees, 1/2.
    idf = DocumentFrequencies(10, {"犬": 5, "が": 10, "走る": 10, "寝る": 10})
    value = alone(cider_d, "犬が走る", references=["犬が寝る"], idf=idf)
    assert value == pytest.approx([10 * (1 + 1 / 2 + 0 + 0) / 4])


def test_bleu_4_by_hand():
    # Words 赤い 丸 が ある against 赤い 丸 が 見える: unigrams 3/4, bigrams (2 + 1) / (3 + 1), trigrams
    # (1 + 1) / (2 + 1), 4-grams (0 + 1) / (1 + 1).
    expected = (3 / 4 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4)
    assert alone(bleu_4, "赤い丸がある", references=["赤い丸が見える"]) == pytest.approx([expected])
    # Two words against four: all precisions are 1, and the brevity penalty is exp(1 - 4 / 2).
    assert alone(bleu_4, "赤い丸", references=["赤い丸がある"]) == pytest.approx([math.exp(-1)])
    assert alone(bleu_4, "", "犬", references=["犬"]) == [0, 1]


def test_bleu_4_is_sacrebleus():
    words = [" ".join(tokens) for tokens in tokenise(CAPTIONS.values())]
    for value, hypothesis, references in zip(
        scored(bleu_4, CAPTIONS, REFERENCES), words, REFERENCES.values(), strict=True
    ):
        references = [" ".join(tokens) for tokens in tokenise(references)]
        settings = {"smooth_method": "add-k", "smooth_value": 1, "tokenize": "none", "use_effective_order": False}
        expected = sacrebleu.sentence_bleu(hypothesis, references, **settings).score / 100
        assert value == pytest.approx(expected, abs=1e-9)


def test_chrf_is_sacrebleus():
    values = scored(chrf, CAPTIONS, REFERENCES)
    expected = [sacrebleu.sentence_chrf(CAPTIONS[i], REFERENCES[i]).score / 100 for i in CAPTIONS]
    assert values == pytest.approx(expected, abs=1e-9)


def test_chair_counts_what_neither_references_nor_instances_name():
    lexicon = Lexicon("scenes_ja")
    captions = {"7": "赤い丸、青い星、緑の三角", "8": "赤い丸と青い丸", "9": "三角がある"}
    values = scored(chair, captions, REFERENCES, lexicon=lexicon, instances={"8": {"red circle"}})
    assert values == pytest.approx([-1 / 3, -1 / 2, 0])
    found = hallucination(captions, REFERENCES, {"8": {"red circle"}}, lexicon, defaultdict(list))
    mentioned, wrong = found["chair_i"].of, found["chair_i"].count
    assert values == pytest.approx([-w / max(1, m) for w, m in zip(wrong, mentioned, strict=True)])


# Form --------------------------------------------------------------------------------------------------------------
def test_length_is_free_inside_the_band():
    # 4, 5 and 2 words, none, and 12.
    texts = ["赤い丸がある", "赤い丸がいない", "赤い丸", "", "犬" + "と犬" * 5 + "犬"]
    assert [len(words) for words in tokenise(texts)] == [4, 5, 2, 0, 12]
    values = alone(length, *texts, band=(4, 5))
    assert values == pytest.approx([0, 0, -1 / 2, -1, -1])
    assert alone(length, "犬" + "と犬" * 5 + "犬", band=(4, 8)) == pytest.approx([-1 / 2])


def test_japanese_counts_characters_that_are_not():
    values = alone(japanese, "白い犬、2匹。", "白い犬ab", "a dog", "", "这是一只狗", "犬<|im_end|>")
    assert values == pytest.approx([0, -2 / 5, -1, -1, -1, -1])
    assert "non_japanese" in form_faults("这是一只狗")


def test_repetition_counts_fourgrams_that_occurred_before():
    once, twice = "赤い丸がある", "赤い丸がある赤い丸がある"  # 8 words, five 4-grams, one of them for the second time
    assert len(tokenise([twice])[0]) == 8
    assert alone(repetition, once, twice, "", "ああああああ", "赤い丸" * 3) == pytest.approx([0, -1 / 5, 0, -1, -1])


def test_copy_is_a_training_caption_of_another_image():
    trained = frozenset(normalised(caption) for captions in TRAINED.values() for caption in captions)
    values = alone(copy, "赤い円がある", "赤い円がある。", "赤い円", references=["丸"], trained=trained)
    assert values == [-1, -1, 0]
    assert alone(copy, "赤い円がある", references=["赤い円がある"], trained=trained) == [0]
