"""The document of scores: what is in it, how it is written, and what two of them say about each other."""

import json

import numpy as np
import pytest

from vlmcap.evaluation.bootstrap import interval, resampled_scores, scores_of
from vlmcap.evaluation.caption_files import ScoreError, read_predictions, read_references
from vlmcap.evaluation.scoring import (
    SCORE_LABELS,
    ScoreOptions,
    check_references,
    paired_comparison,
    quick_scores,
    read_idf,
    score,
    score_table,
    write_metrics,
)

NAMES = ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d", "chrf"]
OPTIONS = ScoreOptions(resamples=200, meteor=False)


def corpus(images: int, seed: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Polite predictions of plain references, some of them right."""
    generator = np.random.default_rng(seed)

    def caption(topic):
        words = (str(generator.choice(list(many))) if generator.random() < 0.3 else one for many, one in topic)
        return "{}{}が{}で{}ている".format(*words)

    topics = [
        [(many, str(generator.choice(list(many)))) for many in ("赤白黒青", "犬猫馬車", "道庭川駅", "見待寝出")]
        for _ in range(images)
    ]
    references = {str(i): [caption(topic) for _ in range(3)] for i, topic in enumerate(topics)}
    return {str(i): caption(topic).replace("いる", "います。") for i, topic in enumerate(topics)}, references


@pytest.fixture(scope="module")
def texts():
    return corpus(80, 0)


@pytest.fixture(scope="module")
def document(texts):
    return score(*texts, options=OPTIONS)


def test_the_parts_of_a_document(document):
    assert list(document["scores"]) == list(document["signatures"]) == list(document["intervals"]) == NAMES
    assert all(type(value) is float for value in document["scores"].values())
    for name, (low, high) in document["intervals"].items():
        assert low < document["scores"][name] < high and high - low < 0.6 * document["scores"][name], name
    assert document["bootstrap"] == {"resamples": 200, "seed": 0, "level": 0.95}
    assert document["notices"] == []
    assert set(NAMES) <= set(SCORE_LABELS)


def test_signatures_carry_what_makes_scores_comparable(texts, document):
    shared = "tok:unidic-lite-1.0.8|norm:nfkc|punct:drop|case:lc"
    assert document["signatures"]["bleu_4"] == f"bleu_4|{shared}|nref:3|v:0.1"
    assert document["signatures"]["cider_d"] == f"cider_d|{shared}|df:refs|nref:3|v:0.1"
    chrf = "norm:nfkc|punct:keep|case:mixed|nc:6|nw:0|space:no|eff:yes|scale:1|sacrebleu:"
    assert document["signatures"]["chrf"].startswith(f"chrf|{chrf}")
    plain = document["register_normalised"]["signatures"]
    assert plain["cider_d"] == f"cider_d|{shared}|reg:plain|df:refs|nref:3|v:0.1"
    assert "|reg:plain|" in plain["chrf"] and list(plain) == NAMES
    predictions, references = texts
    ragged = score(predictions, references | {"0": ["赤"]}, "none", ScoreOptions(resamples=0, meteor=False))
    assert ragged["signatures"]["rouge_l"] == "rouge_l|tok:none|norm:none|punct:keep|case:mixed|nref:1-3|v:0.1"


def test_register_normalised_scores_are_those_of_plain_text(texts, document):
    predictions, references = texts
    plain = {image_id: text.replace("います。", "いる") for image_id, text in predictions.items()}
    normalised = document["register_normalised"]
    assert {name: normalised["scores"][name] for name in NAMES[:6]} == pytest.approx(quick_scores(plain, references))
    assert normalised["scores"]["bleu_4"] > document["scores"]["bleu_4"] + 0.1
    assert set(normalised) == {"scores", "signatures", "intervals"}


@pytest.mark.parametrize("tokenizer", ["ipadic", "characters", "vietnamese", "english", "none"])
def test_the_register_is_normalised_for_japanese_tokenizers_alone(tokenizer):
    japanese = tokenizer in ("ipadic", "characters")
    made = score({"1": "犬がいます"}, {"1": ["犬がいる"]}, tokenizer, ScoreOptions(resamples=10, meteor=False))
    assert ("register_normalised" in made) == japanese
    if japanese:
        assert made["register_normalised"]["scores"]["bleu_1"] == pytest.approx(1)


def test_options_leave_parts_out(texts):
    lean = score(*texts, options=ScoreOptions(resamples=0, meteor=False, register_normalised=False))
    assert lean["intervals"] == {} and "bootstrap" not in lean and "register_normalised" not in lean
    assert {name: lean["scores"][name] for name in NAMES[:6]} == pytest.approx(quick_scores(*texts), rel=1e-12)
    with pytest.raises(ScoreError, match="resamples=-1: choose 0"):
        score(*texts, options=ScoreOptions(resamples=-1))
    with pytest.raises(ScoreError, match="--spice_url .* and --spice_dir .*: give one of the two"):
        score(*texts, options=ScoreOptions(meteor=False, spice_url="http://a", spice_dir="b"))


def test_per_image_columns_give_the_scores_back(texts, document):
    per_image = document["per_image"]
    assert per_image["image_id"] == list(texts[1])
    assert list(per_image) == ["image_id", "bleu_4", "rouge_l", "cider_d", "chrf", "statistics"]
    assert np.mean(per_image["cider_d"]) == pytest.approx(document["scores"]["cider_d"])
    first = quick_scores({"0": texts[0]["0"]}, {"0": texts[1]["0"]})
    assert per_image["bleu_4"][0] == pytest.approx(first["bleu_4"])
    rows = {name: np.array(columns, float) for name, columns in per_image["statistics"].items()}
    assert rows["bleu"].shape == (80, 9) and rows["chrf"].shape == (80, 18)
    again = scores_of(rows, np.ones((1, 80)))
    assert {name: again[name][0] for name in again} == pytest.approx(
        {name: document["scores"][name] for name in again}, rel=1e-12
    )
    assert document["intervals"]["bleu_2"] == interval(resampled_scores(rows, 200, 0)["bleu_2"])


def test_metrics_json_has_every_column_on_one_line(texts, tmp_path):
    predictions, references = texts
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps({"image_id": i, "caption": c}) + "\n" for i, c in predictions.items()))
    metrics = write_metrics(
        path, references, tmp_path / "metrics.json", more={"training": {"x": [1, 2]}}, options=OPTIONS
    )
    text = (tmp_path / "metrics.json").read_text(encoding="utf-8")
    assert json.loads(text) == metrics and metrics["training"] == {"x": [1, 2]}
    lines = text.splitlines()
    assert len(lines) < 150
    for column in ("image_id", "bleu_4", "chrf", "bleu"):
        assert any(line.strip().startswith(f'"{column}": [') and line.rstrip(",").endswith("]") for line in lines)


def test_the_table_has_score_interval_and_signature(document):
    table = score_table(document)
    low, high = document["intervals"]["cider_d"]
    line = next(line for line in table.splitlines() if line.startswith("CIDEr-D"))
    assert line.split()[1:4] == [f"{document['scores']['cider_d']:.4f}", f"[{low:.4f},", f"{high:.4f}]"]
    assert line.endswith(document["signatures"]["cider_d"])
    assert "with polite endings made plain on both sides:" in table and "|reg:plain|" in table
    assert "80 images, 240 references, 0 empty predictions" in table and "type-token ratio" in table


def test_a_better_system_is_found_better(texts, document):
    predictions, references = texts
    worse = dict(predictions) | {str(i): "魚" for i in range(40)}
    other = score(worse, references, options=OPTIONS)
    comparison = paired_comparison(document, json.loads(json.dumps(other)), resamples=500)
    assert list(comparison) == NAMES
    for name, result in comparison.items():
        assert result["difference"] == document["scores"][name] - other["scores"][name] > 0
        assert 0 < result["interval"][0] < result["difference"] < result["interval"][1]
        assert result["p_value"] == 1 / 501
    back = paired_comparison(other, document, resamples=500)
    assert back["chrf"]["difference"] == -comparison["chrf"]["difference"]
    assert back["chrf"]["p_value"] == comparison["chrf"]["p_value"]


def test_equal_systems_are_equal_in_any_order_of_images(texts, document):
    predictions, references = texts
    turned = score(predictions, dict(reversed(references.items())), options=OPTIONS)
    for result in paired_comparison(document, turned, resamples=50).values():
        assert result["difference"] == pytest.approx(0, abs=1e-12)
        assert result["interval"] == pytest.approx([0, 0], abs=1e-12)


def test_a_small_chance_difference_is_not_significant(texts, document):
    predictions, references = texts
    swapped = predictions | {"0": predictions["1"], "1": predictions["0"]}
    comparison = paired_comparison(document, score(swapped, references, options=OPTIONS), resamples=500)
    assert comparison["bleu_1"]["p_value"] > 0.05


def test_what_cannot_be_compared_is_refused(texts, document):
    predictions, references = texts
    with pytest.raises(ScoreError, match="the second metrics document has no per_image"):
        paired_comparison(document, {name: part for name, part in document.items() if name != "per_image"})
    fewer = score(*({i: side[i] for i in list(side)[1:]} for side in texts), options=OPTIONS)
    with pytest.raises(ScoreError, match=r"different images: 1 differ \(0\)"):
        paired_comparison(document, fewer)
    other = score(predictions, references | {"0": ["赤い犬"]}, options=OPTIONS)
    with pytest.raises(ScoreError, match="different references: 240 and 238"):
        paired_comparison(document, other)
    characters = score(predictions, references, "characters", OPTIONS)
    with pytest.raises(ScoreError, match="bleu_1 was computed in different ways: .*unidic.* and .*characters"):
        paired_comparison(document, characters)


# What others wrote -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"image_id": true, "caption": "a"}', "must be an integer or a string, but is True"),
        (b'{"image_id": NaN, "caption": "a"}', "NaN is not a finite number"),
        (b'{"image_id": 1, "caption": "a", "caption": "b"}', "'caption' occurs twice"),
        (b'{"image_id": 1, "caption": "\\ud800"}', "half of a surrogate pair"),
        (b'{"image_id": 1, "caption": "\xff"}', "not JSON in UTF-8"),
        (b"[" * 100_000, "levels of nesting"),
        (b"[" * 60 + b"]" * 60, "a JSON object is needed"),
    ],
)
def test_hostile_lines_are_named(tmp_path, line, message):
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(b'{"image_id": 7, "caption": "a"}\n' + line)
    with pytest.raises(ScoreError, match=message) as refused:
        read_predictions(path)
    assert f"{path}, line 2: " in str(refused.value) and len(str(refused.value)) < 500


IMAGES = b'{"images": [{"id": 1}], "annotations": '


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_predictions, b'[{"image_id": 1, "caption": "a"}, 7]', "entry 2: a JSON object is needed, but this is 7"),
        (read_predictions, b'[{"image_id": 1, "caption": null}]', 'entry 1: "caption" must be a string'),
        (
            read_predictions,
            b'[{"image_id": 1, "caption": "a"}, {"image_id": "1"}]',
            "image_id 1 is on entry 1 already",
        ),
        (read_predictions, b'[{"image_id": 1, "caption": "a"}', "file.json: not JSON in UTF-8"),
        (read_references, IMAGES + b"3}", "file.json: 'annotations' must be a list of objects"),
        (read_references, IMAGES + b'[{"image_id": 2, "caption": "a"}]}', "image_id 2 is not among the images"),
        (read_references, IMAGES + b'[{"image_id": 1}]}', r'annotations\[0\]: "caption" must be a string'),
        (read_references, b'{"images": [{}], "annotations": []}', r'images\[0\]: "id" must be an integer'),
    ],
)
def test_a_malformed_coco_file_is_named_with_the_place(tmp_path, read, content, message):
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ScoreError, match=message) as refused:
        read(tmp_path / "file.json")
    assert str(tmp_path / "file.json") in str(refused.value)


@pytest.mark.parametrize("tokenizer", ["unidic-lite", "vietnamese", "none"])
def test_references_that_cannot_be_scored_are_found_without_predictions(tokenizer):
    check_references({"1": ["犬"], "2": ["a", "b"]}, tokenizer, "data (test)")
    for references, message in (
        ({"1": ["犬"], "7": []}, r"1 images have an empty list of references \(7\)"),
        ({"1": ["犬"], "8": ["犬", " \u3000"]}, r"1 images have an empty reference.*\(8\): remove those captions"),
        ({}, "there is no image"),
    ):
        with pytest.raises(ScoreError, match=rf"^data \(test\): {message}"):
            check_references(references, tokenizer, "data (test)")
    if tokenizer != "none":
        with pytest.raises(ScoreError, match=r"empty reference.*\(9\)"):
            check_references({"9": ["👍"]}, tokenizer, "data (test)")


def test_an_id_as_a_number_and_as_a_text_is_one_id(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"image_id": 1, "caption": "a"}\n{"image_id": "1", "caption": "b"}\n')
    with pytest.raises(ScoreError, match="line 2: image_id 1 is on line 1 already"):
        read_predictions(path)


@pytest.mark.parametrize("tokenizer", ["unidic-lite", "vietnamese", "none"])
def test_half_a_surrogate_pair_is_named_with_its_image(tokenizer):
    for predictions, references in (({"7": "a\ud800"}, {"7": ["a"]}), ({"7": "a"}, {"7": ["a", "\udfffb"]})):
        with pytest.raises(ScoreError, match="image 7: half of a surrogate pair"):
            quick_scores(predictions, references, tokenizer)


def test_a_run_record_cannot_say_scores(tmp_path):
    predictions = tmp_path / "p.jsonl"
    predictions.write_text('{"image_id": 1, "caption": "犬"}\n', encoding="utf-8")
    for content, message in (
        ('{"scores": {"cider_d": 10}, "counts": {}}', "counts, scores are what the scorer measures"),
        ('{"seconds": NaN}', "not JSON"),
        ("[" * 100_000, "levels of nesting"),
    ):
        (tmp_path / "p.run.json").write_text(content)
        with pytest.raises(ScoreError, match=f"p.run.json: .*{message}"):
            write_metrics(predictions, {"1": ["犬"]}, tmp_path / "m.json", options=OPTIONS)
        assert not (tmp_path / "m.json").exists()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"images": 10**400}, "a number above 0"),
        ({"ngrams": {"犬": 4}}, "said to be in 4 of 3 images"),
        ({"ngrams": {"犬": True}}, "said to be in True"),
        ({"tokenizer": [[[[[["x"] * 9] * 9] * 9] * 9] * 9]}, "made with another tokenizer"),
    ],
)
def test_what_is_not_an_idf_file_is_named(tmp_path, document, message):
    path = tmp_path / "idf.json"
    good = {"tokenizer": "tok:none|norm:none|punct:keep|case:mixed", "images": 3, "ngrams": {"犬": 2}}
    path.write_text(json.dumps(good))
    assert read_idf(path, "none").ngrams == {"犬": 2}
    path.write_text(json.dumps(good | document))
    with pytest.raises(ScoreError, match=message) as refused:
        read_idf(path, "none")
    assert str(path) in str(refused.value) and len(str(refused.value)) < 1000


def test_a_seed_below_zero_is_refused():
    with pytest.raises(ScoreError, match="seed=-1"):
        score({"1": "犬"}, {"1": ["犬"]}, options=ScoreOptions(seed=-1, meteor=False))
