"""Cleaning of Vietnamese captions: what each rule fixes, what none may touch, and how often on the real captions."""

import json

import pytest

from vlmcap.data.clean import CaptionCleaner, clean_text
from vlmcap.data.vietnamese import TEXT_RULES, TYPOS

RULES = {rule.name: rule.apply for rule in TEXT_RULES}


@pytest.mark.parametrize(
    ("rule", "before", "after"),
    [
        ("control", "Một\u200b con chó", "Một con chó"),
        ("unicode", "Một cậ\u0301u", "Một cậ\u0301u"),
        ("unicode", "ngu\u031bo\u031b\u0300i", "người"),
        ("spacing", "Một con chó , một quả bóng\t .", "Một con chó, một quả bóng."),
        ("spacing", " Hai  người ", "Hai người"),
        ("capitals", "MỘt con chó, HÌnh ảnh, nGười", "Một con chó, Hình ảnh, người"),
        ("tone_marks", "Hóa trang trước tòa nhà, thúy, qúa, khỏe", "Hoá trang trước toà nhà, thuý, quá, khoẻ"),
        ("typos", "Vận dộng viên cầm vowjt, Nguwofi đàn ông", "Vận động viên cầm vowjt, Người đàn ông"),
        ("typos", "Cậu bé vung vợ tennis", "Cậu bé vung vợt tennis"),
        ("repeated_word", "Người đàn ông ông đánh đánh bóng", "Người đàn ông đánh bóng"),
        ("repeated_word", "Đá bóng bóng bóng bóng", "Đá bóng"),
        ("stray_end", "Hai người trên sân /", "Hai người trên sân."),
        ("stray_end", "Hai người trên sân. ]", "Hai người trên sân."),
        ("stray_end", "Hai người trên sân.,", "Hai người trên sân."),
        ("stray_end", "Hai người trên sân. 1", "Hai người trên sân."),
        ("fragment", "Ng", ""),
        ("fragment", "`", ""),
    ],
)
def test_what_a_rule_fixes(rule, before, after):
    assert RULES[rule](before) == after


@pytest.mark.parametrize(
    "text",
    [
        "một con chó với quả bóng",  # a small letter first, no full stop: as the annotator wrote
        "Cầu thủ áo số 24 đứng cạnh chai Coca-Cola, xem TV ở NASA.",
        "Hình ảnh 3D của iPhone.",
        "Đứa trẻ cầm đồ chơi chơi trên cỏ.",  # plays with a toy: chơi twice on purpose
        "Cậu bé mặc đồng phục bóng đá đá bóng.",
        "Từ từ, xa xa có hai vợ chồng.",
        "Cầu thủ dang tay, đội nón, cầm banh.",
        "Chuẩn bị quay lại, quý khách!",
        "Chờ đã...",
    ],
)
def test_what_no_rule_touches(text):
    assert clean_text(text, TEXT_RULES) == text


def test_typos_are_fixed_and_no_rule_changes_them_again():
    for wrong, right in TYPOS.items():
        assert wrong != right and wrong == wrong.lower()
        assert clean_text(f"Đây {right} kia.", TEXT_RULES) == f"Đây {right} kia.", wrong


def test_real_captions(data_dir):
    """The rules were decided on these captions, so their counts are known."""
    cleaner, texts, cleaned = CaptionCleaner(None, rules=TEXT_RULES), [], []
    for part in ("train", "val", "test"):
        path = data_dir / "uit_viic" / f"uitviic_captions_{part}2017.json"
        for annotation in json.loads(path.read_text(encoding="utf-8"))["annotations"]:
            texts.append(annotation["caption"])
            row = {"image_id": len(texts), "captions": [texts[-1]], "caption_ids": [annotation["id"]]}
            cleaned += [caption for row in cleaner.clean([row]) for caption in row["captions"]]
    report = cleaner.report()
    assert {rule["name"]: rule["count"] for rule in report["rules"]} == {
        "control": 0,
        "unicode": 0,
        "markup": 0,
        "spacing": 18_258,
        "capitals": 28,
        "tone_marks": 6,
        "typos": 551,
        "repeated_word": 8,
        "stray_end": 94,
        "fragment": 3,
        "empty": 3,
        "exact_duplicate": 0,
        "normalised_duplicate": 0,
    }
    assert (report["captions_in"], report["captions_out"]) == (19_256, 19_253)
    assert all(clean_text(text, TEXT_RULES) == text for text in cleaned)
    assert not any(" ." in text or " ," in text or "\t" in text or "]" in text or "`" in text for text in cleaned)
    typos = " ".join(texts).lower()
    assert [wrong for wrong in TYPOS if wrong not in typos and wrong not in " ".join(cleaned).lower()] == [
        "ném bón. g",  # these two are in the captions with the space of the tokeniser: "bón . g"
        "đám đôn. g",
        "núi,, ột nhóm",
    ]
