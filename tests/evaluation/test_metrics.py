"""pycocoevalcap 1.2 is the oracle: the same tokens, joined by spaces, must give the same numbers."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from vlmcap.evaluation.caption_files import ScoreError, read_predictions, read_references
from vlmcap.evaluation.metrics import bleu, caption_statistics, corpus_scores, document_frequencies
from vlmcap.evaluation.scoring import ScoreOptions, quick_scores, read_idf, score, write_idf
from vlmcap.evaluation.tokenise import TokenizerError, tokenise

LEAN = ScoreOptions(resamples=0, register_normalised=False, meteor=False)
NAMES = ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d"]


def oracle(hypotheses: list[list[str]], references: list[list[list[str]]]) -> tuple[dict, np.ndarray]:
    """Corpus scores, and the six scores of every image as (6, images), of pycocoevalcap."""
    results = {image: [" ".join(tokens)] for image, tokens in enumerate(hypotheses)}
    truths = {image: [" ".join(tokens) for tokens in refs] for image, refs in enumerate(references)}
    bleus, image_bleus = Bleu(4).compute_score(truths, results, verbose=0)
    rouge, image_rouge = Rouge().compute_score(truths, results)
    cider, image_cider = Cider().compute_score(truths, results)
    return dict(zip(NAMES, [*bleus, rouge, cider], strict=True)), np.array([*image_bleus, image_rouge, image_cider])


def assert_equals_oracle(hypotheses, references):
    corpus, images = oracle(hypotheses, references)
    statistics = caption_statistics(hypotheses, references)
    assert corpus_scores(statistics) == pytest.approx(corpus, rel=0, abs=1e-9)
    image_bleus = bleu(statistics.correct, statistics.guess, statistics.reference_length)
    ours = np.vstack([image_bleus.T, statistics.rouge_l, statistics.cider_d])
    np.testing.assert_allclose(ours, images, rtol=0, atol=1e-9)


# Few words, so that sentences share n-grams and repeat them; and any text that splitting at white space leaves whole.
few_words = st.sampled_from("a man rides bike 犬 が 走っ て いる".split())
any_word = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda t: t.split() == [t])
words = st.one_of(few_words, few_words, few_words, any_word)
sentence = st.one_of(st.lists(words, max_size=2), st.lists(words, max_size=12))
corpora = st.lists(st.tuples(sentence, st.lists(sentence, min_size=1, max_size=5)), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
# pycocoevalcap stops with an error on references without a single token: see the next test.
@given(corpora.filter(lambda corpus: any(tokens for _, refs in corpus for tokens in refs)))
@example([([], [["犬"]])])
@example([([], [["犬"], []]), (["犬"], [[]])])
@example([(["a"], [["a"]]), (["b"], [["b"]])])
@example([(["a", "b"], [["a", "b"]])] * 5)
@example([(["a"] * 70, [["a"] * 80, ["b", "a"] * 40])])
def test_equals_pycocoevalcap_on_any_corpus(corpus):
    hypotheses, references = zip(*corpus, strict=True)
    assert_equals_oracle(list(hypotheses), list(references))


def test_references_without_a_token_are_scored_without_an_error():
    scores = corpus_scores(caption_statistics([["犬"], []], [[[]], [[], []]]))
    assert scores["cider_d"] == 0
    assert scores["bleu_4"] == pytest.approx(0, abs=1e-3)
    assert scores["rouge_l"] == 0.5  # two empty texts agree, as in pycocoevalcap


def test_an_ngram_of_every_image_weighs_exactly_nothing():
    # log(n) - log(n) must not leave a rounding error that the norm would blow up, for any number of images.
    for images in range(1, 200):
        assert not caption_statistics([["犬", "が"]] * images, [[["犬", "が"]]] * images).cider_d.any()


def test_equals_pycocoevalcap_on_a_larger_corpus():
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"w{i}" for i in range(60)])
    weights = 1 / np.arange(1, 61)

    def draw():
        return list(rng.choice(vocabulary, rng.integers(0, 15), p=weights / weights.sum()))

    references = [[draw() for _ in range(rng.integers(1, 8))] for _ in range(300)]
    assert_equals_oracle([draw() for _ in range(300)], references)


def test_scores_of_japanese_text_are_those_of_its_tokens():
    predictions = {"1": "黒い猫が椅子の上で寝ている", "2": "赤いバスが道路を走っています。", "3": ""}
    references = {
        "3": ["二人の男性がサーフィンをしている"],
        "1": ["黒い猫が椅子で眠っている。", "椅子の上の黒猫", "ネコが寝ている"],
        "2": ["赤いバスが町の道路を走っている", "２階建ての赤いバス"],
    }
    ids = ["1", "2", "3"]
    expected, _ = oracle(tokenise(predictions[i] for i in ids), [tokenise(references[i]) for i in ids])
    assert quick_scores(predictions, references) == pytest.approx(expected, rel=0, abs=1e-9)
    result = score(predictions, references, options=LEAN)
    assert {name: result["scores"][name] for name in NAMES} == pytest.approx(expected, rel=0, abs=1e-9)
    assert result["scores"]["cider_d"] > 1
    assert all(type(value) is float for value in result["scores"].values())
    assert result["counts"] == {
        "images": 3,
        "references": 6,
        "empty_predictions": 1,
        "mean_caption_tokens": pytest.approx((10 + 9) / 3),
        "mean_reference_tokens": pytest.approx(43 / 6),
        "type_token_ratio": pytest.approx(17 / 19),
        "reference_type_token_ratio": pytest.approx(26 / 43),
    }


def test_case_width_and_punctuation_do_not_move_a_score():
    references = {"1": ["Tシャツの犬が3匹"], "2": ["赤い車"]}
    plain = quick_scores({"1": "Tシャツの犬が3匹", "2": "赤い車"}, references)
    assert quick_scores({"1": "ｔシャツの、犬が３匹。", "2": "「赤い車」"}, references) == plain
    assert plain["bleu_1"] == pytest.approx(1)


# Text as people write it, Japanese and English, for the tokenizers: hypotheses may be empty or one word.
scraps = "犬 が 走っている 赤い 車 。 、 a man rides Bikes, 3匹 ３ です 女性 の 上 で ーー 々 ! ".split(" ")
text = st.one_of(st.sampled_from(["", "。", "犬", "dog"]), st.lists(st.sampled_from(scraps), max_size=9).map("".join))
reference_text = st.lists(st.sampled_from(scraps), min_size=1, max_size=9).map(lambda parts: "犬" + "".join(parts))


@pytest.mark.parametrize("tokenizer", ["unidic-lite", "ipadic", "characters", "none"])
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(text, st.lists(reference_text, min_size=1, max_size=5)), min_size=1, max_size=6))
def test_equals_pycocoevalcap_on_any_text(tokenizer, corpus):
    predictions = {str(i): hypothesis for i, (hypothesis, _) in enumerate(corpus)}
    references = {str(i): refs for i, (_, refs) in enumerate(corpus)}
    expected, _ = oracle(
        tokenise(predictions.values(), tokenizer), [tokenise(refs, tokenizer) for refs in references.values()]
    )
    assert quick_scores(predictions, references, tokenizer) == pytest.approx(expected, rel=0, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(corpora)
@example([([], [[]])])
def test_the_idf_of_the_references_given_gives_the_very_same_scores(corpus):
    hypotheses, references = map(list, zip(*corpus, strict=True))
    own = caption_statistics(hypotheses, references)
    fixed = caption_statistics(hypotheses, references, document_frequencies(references))
    np.testing.assert_array_equal(fixed.cider_d, own.cider_d)
    np.testing.assert_array_equal(fixed.correct, own.correct)


def test_a_fixed_idf_makes_a_subset_comparable():
    references = {str(i): [f"犬 w{i % 3} w{i} が いる", f"猫 w{i}"] for i in range(12)}
    predictions = {i: refs[0] for i, refs in references.items()}
    idf = document_frequencies([[text.split() for text in refs] for refs in references.values()])
    hypotheses = [text.split() for text in predictions.values()]
    tokens = [[text.split() for text in refs] for refs in references.values()]
    whole = caption_statistics(hypotheses, tokens)
    np.testing.assert_array_equal(caption_statistics(hypotheses[:4], tokens[:4], idf).cider_d, whole.cider_d[:4])
    assert abs(caption_statistics(hypotheses[:4], tokens[:4]).cider_d - whole.cider_d[:4]).max() > 0.01


def test_an_idf_file_is_written_read_and_named_in_the_signature(tmp_path):
    references = {"1": ["白い犬が走る", "走る犬"], "2": ["猫が寝ている"], "3": ["白い猫と犬"]}
    predictions = {"1": "白い犬", "2": "猫が寝る", "3": "犬"}
    path = tmp_path / "new" / "idf.json"
    written = write_idf(references, path)
    assert written.ngrams["犬"] == 2 and "走る" not in written.ngrams and read_idf(path, "unidic-lite") == written
    first = path.read_bytes()
    write_idf(dict(reversed(references.items())), path)
    assert path.read_bytes() == first
    own = score(predictions, references, options=LEAN)
    fixed = score(
        predictions,
        references,
        options=ScoreOptions(idf=str(path), resamples=0, meteor=False, register_normalised=False),
    )
    assert fixed["scores"] == own["scores"]
    digest = hashlib.sha256(first).hexdigest()[:8]
    assert fixed["signatures"]["cider_d"] == own["signatures"]["cider_d"].replace("df:refs", f"df:{digest}-3")
    assert fixed["signatures"]["bleu_4"] == own["signatures"]["bleu_4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": 3', "idf.json: not JSON"),
        ('{"images": 0, "ngrams": {}}', r'idf.json is not an idf file: it needs "images"'),
        ('{"images": 3, "ngrams": ["a"]}', r"idf.json is not an idf file"),
        ('{"images": 3, "ngrams": {"犬": 4}}', r"idf.json: '犬' is said to be in 4 of 3 images"),
        ('{"images": 3, "ngrams": {"犬": "2"}}', r"'犬' is said to be in '2' of 3 images"),
        ('{"images": 3, "ngrams": {}, "tokenizer": "tok:x"}', r"idf.json was made with another tokenizer: 'tok:x'"),
    ],
)
def test_a_wrong_idf_file_is_refused(tmp_path, text, message):
    path = tmp_path / "idf.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ScoreError, match=message):
        read_idf(path, "unidic-lite")


def test_bleu_of_many_resamples_at_once():
    statistics = caption_statistics([["a", "b"], ["c"], ["a"]], [[["a", "b"]], [["c", "d"]], [["b"], ["a", "a", "a"]]])
    resamples = np.array([[1, 1, 1], [0, 3, 0], [2, 0, 1]])
    together = bleu(
        resamples @ statistics.correct, resamples @ statistics.guess, resamples @ statistics.reference_length
    )
    for row, times in zip(together, resamples, strict=True):
        picked = np.repeat(np.arange(3), times)
        alone = bleu(
            statistics.correct[picked].sum(0),
            statistics.guess[picked].sum(0),
            statistics.reference_length[picked].sum(),
        )
        np.testing.assert_allclose(row, alone)


def test_fakecap_scores_are_the_published_ones(data_dir):
    folder = data_dir / "metric_vectors" / "fakecap"
    predictions, references = (
        read_predictions(folder / "predictions.jsonl"),
        read_references(folder / "references.jsonl"),
    )
    scores = quick_scores(predictions, references, "none")
    published = json.loads((folder / "published.json").read_text())
    assert scores == pytest.approx(published["pycocoevalcap_1_2"], rel=0, abs=1e-9)
    for name, value in scores.items():
        assert round(value, 3) == published["published_3_decimals"][name], name


def test_real_japanese_captions_equal_pycocoevalcap(data_dir):
    captions = read_references(data_dir / "xm3600_ja" / "references.jsonl")
    held_out = {image_id: texts for image_id, texts in list(captions.items())[:500] if len(texts) > 1}
    predictions = {image_id: texts[0] for image_id, texts in held_out.items()}
    references = {image_id: texts[1:] for image_id, texts in held_out.items()}
    expected, _ = oracle(tokenise(predictions.values()), [tokenise(texts) for texts in references.values()])
    assert quick_scores(predictions, references) == pytest.approx(expected, rel=0, abs=1e-9)


def test_ids_on_one_side_only_are_named():
    references = {str(i): ["犬"] for i in range(10)}
    with pytest.raises(ScoreError, match=r"8 images have references but no prediction \(2, 3, 4, 5, 6, \.\.\.\)"):
        score({"0": "犬", "1": "犬"}, references)
    with pytest.raises(ScoreError, match=r"1 images have references.*\(9\); 1 images have a prediction.*\(77\)"):
        score({str(i): "犬" for i in [*range(9), 77]}, references)


def test_missing_and_empty_references_are_named():
    with pytest.raises(ScoreError, match=r"empty list of references \(b\)"):
        score({"a": "犬", "b": "犬"}, {"a": ["犬"], "b": []})
    for empty in ["", "  ", "。"]:
        with pytest.raises(ScoreError, match=r"empty reference.*'unidic-lite' \(b\)"):
            score({"a": "犬", "b": "犬"}, {"a": ["犬"], "b": ["猫", empty]})
    assert quick_scores({"a": "犬"}, {"a": ["。"]}, "none")["bleu_1"] < 1e-6


def test_nothing_to_score_and_unknown_tokenizer():
    with pytest.raises(ScoreError, match="nothing to score"):
        score({}, {})
    with pytest.raises(TokenizerError, match="'juman'.*unidic-lite"):
        score({"a": "犬"}, {"a": ["犬"]}, "juman")


def test_files_are_read_with_ids_as_strings(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '\ufeff{"image_id": 1, "caption": "犬\u2028", "more": 2}\r\n\n{"image_id": "b", "caption": ""}', "utf-8"
    )
    assert read_predictions(path) == {"1": "犬\u2028", "b": ""}
    path.write_text('{"image_id": 1, "captions": ["犬", "猫"]}\n', "utf-8")
    assert read_references(path) == {"1": ["犬", "猫"]}


GOOD = '{"image_id": 1, "caption": "犬", "captions": ["犬"]}\n'


@pytest.mark.parametrize(
    ("read", "line", "message"),
    [
        (read_predictions, b'{"image_id": 2, "caption": ', "line 2: not JSON in UTF-8"),
        (read_predictions, '{"image_id": 2, "caption": "犬"}'.encode("shift_jis"), "line 2: not JSON in UTF-8"),
        (read_predictions, b"[1]", r"line 2: a JSON object is needed, but this is \[1\]"),
        (read_predictions, b'{"caption": "a"}', 'line 2: "image_id" must be .*None'),
        (read_predictions, b'{"image_id": 1.5, "caption": "a"}', 'line 2: "image_id" must be .*1.5'),
        (read_predictions, b'{"image_id": 2, "caption": null}', 'line 2: "caption" must be a string, but is None'),
        (read_predictions, b'{"image_id": "1", "caption": "a"}', "line 2: image_id 1 is on line 1 already"),
        (
            read_references,
            b'{"image_id": 2, "captions": "a"}',
            "line 2: \"captions\" must be a list of strings, but is 'a'",
        ),
        (read_references, b'{"image_id": 2, "captions": [null]}', 'line 2: "captions" must be a list of strings'),
        (read_references, b'{"image_id": 1, "captions": ["a"]}', "line 2: image_id 1 is on line 1 already"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, read, line, message):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(GOOD.encode() + line + b"\n")
    with pytest.raises(ScoreError, match=f"lines.jsonl, {message}"):
        read(path)
