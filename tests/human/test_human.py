"""Human evaluation: what is drawn, what is refused, what is counted."""

import copy
import hashlib
import itertools
import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, Image, List, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmcap.human.report import (
    krippendorff_alpha,
    markdown,
    report,
    sign_flip_test,
    sign_test,
    wilson_interval,
)
from vlmcap.human.study import (
    ANSWERS_FORMAT,
    HumanError,
    blinded_items,
    draw,
    preference_rows,
    read_answers,
    read_key,
)
from vlmcap.miniature.scenes import scenes

PROMPT = "この画像を説明してください。"
WORDS = ["犬が走る", "猫が眠る", "鳥が飛ぶ", "馬が跳ねる"]


def captions(systems: int, images: int, seed: int = 0, repeat: bool = False) -> dict[str, dict[str, str]]:
    """Of system s for image i; with `repeat`, systems often write the same."""
    rng = random.Random(seed)
    return {
        f"system-{s}": {str(i): rng.choice(WORDS) if repeat else f"文{s}の{i}" for i in range(images)}
        for s in range(systems)
    }


def answers_document(key: dict, rater: str, answers: dict, session: str = "s") -> dict:
    fingerprint = key["raters"][rater]["fingerprint"]
    return {
        "format": ANSWERS_FORMAT,
        "rater": rater,
        "fingerprint": fingerprint,
        "session": session,
        "answers": answers,
    }


def write(path: Path, document) -> Path:
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    return path


def all_answers(key: dict, rater: str, best: str) -> dict:
    """A rater who always prefers the system `best`, rates its captions 5, 4 and true and others 2, 1 and invented."""
    answers = {}
    for name in key["raters"][rater]["order"]:
        item = key["items"][name]
        if item["kind"] == "preference":
            left = key["raters"][rater]["left"][name]
            choice = "tie" if best not in item["systems"] else "left" if left == best else "right"
            answers[name] = {"choice": choice, "seconds": 2.0, "changed": 1000}
        else:
            good = best in item["systems"]
            given = {
                "fluency": 5 if good else 2,
                "adequacy": 4 if good else 1,
                "hallucination": "no" if good else "yes",
            }
            answers[name] = given | {"seconds": 6.0, "changed": 1000}
    return answers


# --- drawing


def left_minus_right(key: dict, raters) -> tuple[Counter, Counter]:
    """Times on the left less times on the right, of each system and of each system in each pair."""
    systems, pairs = Counter(), Counter()
    for rater in raters:
        for name, left in key["raters"][rater]["left"].items():
            for system in key["items"][name]["systems"]:
                sign = 1 if system == left else -1
                systems[system] += sign
                pairs[system, frozenset(key["items"][name]["systems"])] += sign
    return systems, pairs


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_sides_and_systems_are_balanced(data):
    systems, images = data.draw(st.integers(2, 6)), data.draw(st.integers(1, 14))
    raters, seed = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 10**6))
    shared = data.draw(st.none() | st.integers(0, images))
    pairs_per_image = data.draw(st.none() | st.integers(0, math.comb(systems, 2)))
    ratings_per_image = data.draw(st.none() | st.integers(1, systems))
    texts = captions(systems, images + 3, seed, repeat=data.draw(st.booleans()))
    ids = [str(i) for i in range(images + 3)]
    key = draw(texts, ids, images, raters, seed, shared, pairs_per_image, ratings_per_image)
    shared_images = set(key["images"][: images if shared is None else shared])

    for rater, entry in key["raters"].items():
        allowed = 1 if shared is None or shared in (0, images) else 2
        for difference in left_minus_right(key, [rater]):
            assert all(abs(value) <= allowed for value in difference.values())
        own = [key["items"][name]["image_id"] for name in entry["order"]]
        everybody = {n for n, item in key["items"].items() if item["image_id"] in shared_images}
        assert everybody <= set(entry["order"]) and len(set(entry["order"])) == len(own)
        preferences = [n for n in entry["order"] if key["items"][n]["kind"] == "preference"]
        assert set(preferences) == set(entry["left"])
    if shared is None and raters % 2 == 0:
        assert not any(itertools.chain(*(d.values() for d in left_minus_right(key, key["raters"]))))
    else:
        limit = 1 if shared is None else 2 * raters
        assert all(abs(v) <= limit for v in left_minus_right(key, key["raters"])[0].values())

    # Every item is asked of somebody; only those of shared images of more than one.
    asked = Counter(name for entry in key["raters"].values() for name in entry["order"])
    for name, item in key["items"].items():
        assert asked[name] == (raters if item["image_id"] in shared_images else 1)

    # Pairs and ratings come equally often; the same captions are neither compared nor rated twice.
    items = list(key["items"].values())
    compared = Counter(frozenset(item["systems"]) for item in items if item["kind"] == "preference")
    compared.update(frozenset(entry["systems"]) for entry in key["identical"])
    every_pair = [frozenset(pair) for pair in itertools.combinations(texts, 2)]
    assert max(compared[pair] for pair in every_pair) - min(compared[pair] for pair in every_pair) <= 1
    if pairs_per_image is None:
        assert set(compared.values()) == {images}
    rated = Counter(system for item in items if item["kind"] == "rating" for system in item["systems"])
    assert max(rated[s] for s in texts) - min(rated[s] for s in texts) <= 1
    assert rated.total() == images * (systems if ratings_per_image is None else ratings_per_image)
    for item in items:
        assert len(set(item["captions"])) == len(item["captions"])
        assert [texts[system][item["image_id"]] for system in item["systems"]] == (
            item["captions"] if item["kind"] == "preference" else item["captions"] * len(item["systems"])
        )
    ratings = [(item["image_id"], item["captions"][0]) for item in items if item["kind"] == "rating"]
    assert len(set(ratings)) == len(ratings)
    for entry in key["identical"]:
        assert len({texts[system][entry["image_id"]] for system in entry["systems"]}) == 1


def test_the_same_seed_draws_the_same_and_raters_have_orders_of_their_own():
    ids = [str(i) for i in range(40)]
    first, again, other = (draw(captions(3, 40), ids, 12, 3, seed) for seed in (1, 1, 2))
    assert json.dumps(first) == json.dumps(again)
    assert first["images"] != other["images"]
    orders = [entry["order"] for entry in first["raters"].values()]
    assert len({tuple(order) for order in orders}) == 3 and len({frozenset(order) for order in orders}) == 1
    kinds = [first["items"][name]["kind"] for name in orders[0]]
    assert kinds == ["preference"] * 36 + ["rating"] * 36


def test_what_a_rater_gets_does_not_depend_on_the_names():
    """Everything a page is made of stays the same when the systems have other names."""
    texts = captions(3, 9)
    renamed = dict(zip(["zebra", "aardvark", "gnu"], texts.values(), strict=True))
    ids = [str(i) for i in range(9)]
    key, other = draw(texts, ids, 9, 2), draw(renamed, ids, 9, 2)
    for rater in key["raters"]:
        assert blinded_items(key, rater) == blinded_items(other, rater)
        assert key["raters"][rater]["fingerprint"] == other["raters"][rater]["fingerprint"]
        text = json.dumps(blinded_items(key, rater), ensure_ascii=False)
        assert "system" not in text
    # Nor does the number of an item tell anything: those of an image (6 each) are not together.
    images = [item["image_id"] for item in key["items"].values()]
    assert sum(a == b for a, b in itertools.pairwise(images)) < 15


def test_images_of_one_rater_alone_hold_every_pair_equally_often():
    key = draw(captions(3, 9), [str(i) for i in range(9)], 9, 3, shared_images=0, pairs_per_image=1)
    for entry in key["raters"].values():
        pairs = [frozenset(key["items"][name]["systems"]) for name in entry["left"]]
        assert len(pairs) == 3 and len(set(pairs)) == 3


def test_items_show_what_the_key_says():
    key = draw(captions(2, 5), [str(i) for i in range(5)], 5, 2)
    items, images = blinded_items(key, "2")
    for shown in items:
        item = key["items"][shown["id"]]
        assert images[shown["image"]] == item["image_id"]
        if item["kind"] == "preference":
            left = item["systems"].index(key["raters"]["2"]["left"][shown["id"]])
            assert shown["captions"] == [item["captions"][left], item["captions"][1 - left]]
    mirrored = {item["id"]: item["captions"] for item in blinded_items(key, "1")[0] if item["kind"] == "preference"}
    assert mirrored == {item["id"]: item["captions"][::-1] for item in items if item["kind"] == "preference"}


def test_only_images_that_every_system_captioned_are_drawn():
    texts = captions(2, 6)
    for image_id in ("0", "3"):
        del texts["system-1"][image_id]
    ids = [str(i) for i in range(8)]
    assert set(draw(texts, ids, 4, 1)["images"]) == {"1", "2", "4", "5"}
    with pytest.raises(HumanError, match=r"--images 5: only 4 of the 8 images .*\(system-0 6, system-1 4\)"):
        draw(texts, ids, 5, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 0}, "--images 0 must be at least 1"),
        ({"raters": 0}, "--raters 0 must be at least 1"),
        ({"shared_images": 4}, "--shared_images 4 must be at least 0 and at most 3"),
        ({"pairs_per_image": 2}, "--pairs_per_image 2 must be at least 0 and at most 1"),
        ({"ratings_per_image": 3}, "--ratings_per_image 3 must be at least 0 and at most 2"),
        ({"pairs_per_image": 0, "ratings_per_image": 0}, "nothing to ask"),
    ],
)
def test_numbers_that_cannot_be_met_are_named(change, message):
    with pytest.raises(HumanError, match=message):
        draw(captions(2, 3), ["0", "1", "2"], **({"images": 3, "raters": 1} | change))


# --- what comes back


@pytest.fixture
def key() -> dict:
    return draw(captions(2, 6), [str(i) for i in range(6)], 6, 2)


def preference_of(key: dict, rater: str = "1") -> str:
    return key["raters"][rater]["order"][0]


def rating_of(key: dict, rater: str = "1") -> str:
    return key["raters"][rater]["order"][-1]


def test_complete_files_are_read_without_a_warning(key, tmp_path):
    files = [write(tmp_path / f"{r}.json", answers_document(key, r, all_answers(key, r, "system-0"))) for r in "12"]
    answers, warnings = read_answers(files, key)
    assert warnings == [] and answers["2"] == all_answers(key, "2", "system-0")


def test_unfinished_files_count_and_say_what_is_open(key, tmp_path):
    answers = {preference_of(key): {"choice": "tie"}, rating_of(key): {"fluency": 3}}
    read, warnings = read_answers([write(tmp_path / "a.json", answers_document(key, "1", answers))], key)
    assert read == {"1": answers}
    unfinished, absent = warnings
    assert f"{tmp_path / 'a.json'}: rater 1 is not finished; of 18 items 16 not answered: i" in unfinished
    assert f"1 answered in part, without {rating_of(key)} (adequacy, hallucination)" in unfinished
    assert absent == "rater 2: no file; 18 items without this rater's answer"
    counted = report(key, read, 100)
    assert counted["counts"]["preferences"] == 1 and counted["counts"]["ratings"] == 1
    assert counted["raters"]["1"]["complete"] == 1
    assert counted["preferences"]["pairs"][0]["win_rate"] == 0.5
    assert markdown(counted)


def unpadded(table: str) -> str:
    """A Markdown table without the spaces that make its columns equally wide."""
    return re.sub(" +", " ", table)


def test_without_answers_there_is_no_figure(key):
    empty = report(key, {}, 50)
    assert empty["preferences"]["pairs"][0]["win_rate"] is None and empty["agreement"]["fluency"]["alpha"] is None
    assert "| system-0 | - | - | - | - |" in unpadded(markdown(empty))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d, k: d.update(fingerprint="0" * 16), "rater '1' with fingerprint '0{16}' belongs to another export"),
        (lambda d, k: d.update(rater="7"), "rater '7' with fingerprint .* belongs to another export"),
        (lambda d, k: d.update(format="x"), "this is not a file of answers"),
        (lambda d, k: d.update(answers=[1]), '"answers" must be an object'),
        (lambda d, k: d["answers"].update(i99999={"choice": "tie"}), "item i99999 is not on the page of rater 1"),
        (lambda d, k: d["answers"].update({rating_of(k): {"fluency": 6}}), "fluency must be one of 1, .*5, but is 6"),
        (lambda d, k: d["answers"].update({rating_of(k): {"fluency": True}}), "fluency must be .*, but is True"),
        (lambda d, k: d["answers"].update({rating_of(k): {"adequacy": [1]}}), r"adequacy must be .*, but is \[1\]"),
        (lambda d, k: d["answers"].update({rating_of(k): {"choice": "left"}}), "unknown question 'choice'"),
        (lambda d, k: d["answers"].update({preference_of(k): {"choice": "a"}}), "must be one of left, right, tie"),
        (lambda d, k: d["answers"].update({preference_of(k): "left"}), "an answer must be an object"),
        (lambda d, k: d["answers"].update({preference_of(k): {"seconds": -1}}), "seconds must be a number from 0"),
        (
            lambda d, k: d["answers"].update({preference_of(k): {"seconds": 10**400}}),
            "seconds must be a number from 0",
        ),
        (lambda d, k: d["answers"].update({preference_of(k): {"changed": math.nan}}), "NaN is not a finite number"),
    ],
)
def test_faults_name_the_file_and_the_item(key, tmp_path, change, message):
    document = answers_document(key, "1", all_answers(key, "1", "system-0"))
    change(document, key)
    path = write(tmp_path / "bad.json", document)
    with pytest.raises(HumanError, match=f"{path}: .*{message}"):
        read_answers([path], key)


@pytest.mark.parametrize(
    "change",
    [
        lambda k: k.pop("raters"),
        lambda k: k.update(images=[]),
        lambda k: k["images"].insert(0, k["images"][0]),
        lambda k: k.update(items=[]),
        lambda k: k["items"][preference_of(k)].update(systems=["system-0", "system-0"]),
        lambda k: k["items"][preference_of(k)].update(captions=["犬", "猫"]),
        lambda k: k["items"][rating_of(k)].update(captions=[3]),
        lambda k: k["items"][rating_of(k)].update(kind="preference"),
        lambda k: k["items"][rating_of(k)].update(image_id="elsewhere"),
        lambda k: k["raters"]["1"]["order"].append("i99999"),
        lambda k: k["raters"]["1"]["left"].update({preference_of(k): "nobody"}),
        lambda k: k.update(identical=[{"image_id": "1", "systems": ["system-0"]}]),
    ],
)
def test_a_key_that_was_edited_is_refused(key, tmp_path, change):
    path = write(tmp_path / "key.json", key)
    assert read_key(path) == key
    change(key)
    with pytest.raises(HumanError, match="key.json: the key is damaged or was edited"):
        read_key(write(path, key))


def test_every_fault_of_every_file_is_reported_at_once(key, tmp_path):
    first = answers_document(key, "1", {rating_of(key): {"fluency": 0}, preference_of(key): {"choice": ""}})
    (tmp_path / "cut.json").write_text('{"format": ')
    with pytest.raises(HumanError) as error:
        read_answers([write(tmp_path / "a.json", first), tmp_path / "cut.json"], key)
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert {rating_of(key), preference_of(key)} == {line.split("item ")[1][:6] for line in lines[:2]}
    assert f"{tmp_path / 'cut.json'}: not JSON" in lines[2]


def test_two_downloads_of_one_person_are_joined_and_two_persons_on_one_page_refused(key, tmp_path):
    names = key["raters"]["1"]["order"][:3]
    early = {names[0]: {"choice": "left", "changed": 1}, names[1]: {"choice": "tie", "changed": 2}}
    late = {names[0]: {"choice": "right", "changed": 9}, names[2]: {"choice": "left", "changed": 8}}
    a = write(tmp_path / "a.json", answers_document(key, "1", early))
    b = write(tmp_path / "b.json", answers_document(key, "1", late))
    for files in ([a, b], [b, a]):
        answers, warnings = read_answers(files, key)
        assert {name: answer["choice"] for name, answer in answers["1"].items()} == dict(
            zip(names, ["right", "tie", "left"], strict=True)
        )
        assert f"{files[1]}: continues {files[0]} (rater 1); joined, 1 answers differ" in warnings[0]
    other = write(tmp_path / "c.json", answers_document(key, "1", late, session="t"))
    with pytest.raises(HumanError, match=f"{other}: the page of rater 1 was answered by somebody else .* in {a}"):
        read_answers([a, other], key)


# --- statistics


def letters(*rows: str) -> list[list]:
    """Units from one string a rater, a character a unit, `.` for no answer."""
    return [[value for value in unit if value != "."] for unit in zip(*rows, strict=True)]


def test_alpha_of_the_published_examples():
    """Krippendorff 2011, sections A (binary), B (nominal), C (any number of raters, missing data) and D (ordinal)."""
    binary = letters("0100000010", "1110010000")
    assert krippendorff_alpha(binary, "nominal") == pytest.approx(0.095, abs=5e-4)
    nominal = letters("aabbdcccedda", "babbbcccEddd".lower())
    assert krippendorff_alpha(nominal, "nominal") == pytest.approx(0.692, abs=5e-4)
    four = letters("12332141 2...".replace(" ", ""), "1233224125.3", ".3332342251.", "12332441251.")
    assert krippendorff_alpha(four, "nominal") == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(four, "ordinal") == pytest.approx(0.815, abs=5e-4)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(1, 5), max_size=4), max_size=12), st.sampled_from(["nominal", "ordinal"]))
def test_alpha_is_its_definition(units, metric):
    """Mean distance of pairs within units over that of all pairs of values, a loop for every sum."""
    paired = [unit for unit in units if len(unit) > 1]
    values = [value for unit in paired for value in unit]
    if len(set(values)) < 2:
        assert krippendorff_alpha(units, metric) is None
        return

    def distance(a, b):
        if metric == "nominal":
            return float(a != b)
        low, high = sorted((a, b))
        return (sum(values.count(g) for g in range(low, high + 1)) - (values.count(a) + values.count(b)) / 2) ** 2

    within = sum(sum(distance(a, b) for a, b in itertools.permutations(u, 2)) / (len(u) - 1) for u in paired)
    across = sum(distance(a, b) for a, b in itertools.permutations(values, 2)) / (len(values) - 1)
    assert krippendorff_alpha(units, metric) == pytest.approx(1 - within / across, abs=1e-9)


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (3, 3), (8, 1), (2, 9)])
def test_sign_test_counts_every_outcome(wins, losses):
    n = wins + losses
    as_far = sum(abs(sum(toss) - n / 2) >= abs(wins - n / 2) for toss in itertools.product((0, 1), repeat=n))
    assert sign_test(wins, losses) == pytest.approx(as_far / 2**n)


def test_sign_flips_are_near_the_exact_randomisation():
    differences = [0.5, 1.0, -0.25, 2.0, 0.0, 1.5, 0.75]
    flips = np.array(list(itertools.product((1, -1), repeat=len(differences)))) @ differences
    exact = np.mean(np.abs(flips) >= sum(differences))
    assert sign_flip_test(differences) == pytest.approx(exact, abs=0.01)
    assert sign_flip_test([0.0, 0.0]) == 1.0


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_of_published_examples(successes, trials, low, high):
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3."""
    assert wilson_interval(successes, trials) == pytest.approx([low, high], abs=5e-5)


def test_figures_of_a_small_set_by_hand():
    """Two raters, four images: on image 3 both systems wrote the same; rater 2 sees the sides exchanged."""
    texts = captions(2, 4)
    texts["system-1"]["3"] = texts["system-0"]["3"]
    key = draw(texts, ["0", "1", "2", "3"], 4, 2)
    item_of = {(item["kind"], item["image_id"], *item["systems"]): name for name, item in key["items"].items()}
    assert len(key["identical"]) == 1 and len(item_of) == 3 + 7
    votes = {"0": ["system-0", "system-0"], "1": ["system-0", "tie"], "2": ["system-1", "system-0"]}
    answers = {"1": {}, "2": {}}
    for image_id, by_rater in votes.items():
        name = item_of["preference", image_id, "system-0", "system-1"]
        for rater, vote in zip("12", by_rater, strict=True):
            side = "left" if key["raters"][rater]["left"][name] == vote else "right"
            answers[rater][name] = {"choice": "tie" if vote == "tie" else side, "seconds": 3.0}
    answers["1"][item_of["rating", "0", "system-0"]] = {"fluency": 5, "hallucination": "yes"}
    answers["2"][item_of["rating", "0", "system-0"]] = {"fluency": 4, "hallucination": "no"}
    answers["1"][item_of["rating", "0", "system-1"]] = {"fluency": 2}
    answers["1"][item_of["rating", "3", "system-0", "system-1"]] = {"fluency": 3}
    result = report(key, answers, 2000)

    (pair,) = result["preferences"]["pairs"]
    assert pair["win_rate"] == pytest.approx((1 + 0.75 + 0.5 + 0.5) / 4)
    assert pair["answers"] == {"wins": 4, "ties": 1, "losses": 1}
    assert (pair["images"], pair["identical_images"]) == (3, 1)
    assert pair["sign_test"] == {"wins": 2, "losses": 0, "p_value": 0.5}
    assert pair["interval"][0] >= 0.5 and pair["interval"][1] <= 1
    assert result["preferences"]["systems"]["system-1"]["win_rate"] == pytest.approx(1 - pair["win_rate"])
    ratings = result["ratings"]["systems"]
    assert ratings["system-0"]["fluency"] | {"interval": 0} == {"mean": 3.75, "interval": 0, "images": 2, "answers": 3}
    assert ratings["system-1"]["fluency"]["mean"] == 2.5
    assert ratings["system-0"]["hallucination"]["mean"] == 0.5
    assert ratings["system-0"]["adequacy"]["mean"] is None
    (difference,) = result["ratings"]["differences"]
    assert (difference["question"], difference["mean"], difference["images"]) == ("fluency", 1.25, 2)
    agreement = result["agreement"]
    first = [["f", "f"], ["f", "t"], ["s", "f"]]
    assert agreement["preference"]["alpha"] == pytest.approx(krippendorff_alpha(first, "nominal"))
    assert agreement["fluency"] == {"metric": "ordinal", "alpha": krippendorff_alpha([[5, 4]], "ordinal"), "units": 1}
    lefts = sum(answer.get("choice") == "left" for answer in answers["2"].values())
    assert result["raters"]["2"]["left"]["share"] == lefts / 2 and result["raters"]["2"]["tie_share"] == 1 / 3
    assert result["raters"]["1"]["seconds_per_preference"] == 3.0
    text = unpadded(markdown(result))
    assert "| system-0 against system-1 | 68.8% [" in text and "| 4 / 1 / 1 | 1 | 2 : 0 |" in text


def test_identical_captions_weigh_as_much_as_the_answered_share():
    """Of 8 images 4 have the same caption; half of the other 4 are answered, all won: 3/4, not 4 ties to 2 wins."""
    texts = captions(2, 8)
    texts["system-1"] |= {str(i): texts["system-0"][str(i)] for i in range(4)}
    key = draw(texts, [str(i) for i in range(8)], 8, 1)
    everything = all_answers(key, "1", "system-0")
    preferences = [name for name, answer in everything.items() if "choice" in answer]
    part = {name: everything[name] for name in preferences[:2]}
    for answers in (everything, part):
        assert report(key, {"1": answers}, 100)["preferences"]["pairs"][0]["win_rate"] == pytest.approx(0.75)


def test_intervals_are_as_wide_as_theory_says():
    """200 images, one rater who prefers the first system with 0.7: the interval is near the normal one."""
    texts = captions(2, 200)
    key = draw(texts, [str(i) for i in range(200)], 200, 1, ratings_per_image=0)
    rng, answers = random.Random(0), {}
    for name, left in key["raters"]["1"]["left"].items():
        wins = rng.random() < 0.7
        answers[name] = {"choice": "left" if (left == "system-0") == wins else "right"}
    pair = report(key, {"1": answers})["preferences"]["pairs"][0]
    half = 1.96 * math.sqrt(pair["win_rate"] * (1 - pair["win_rate"]) / 200)
    assert pair["interval"] == pytest.approx([pair["win_rate"] - half, pair["win_rate"] + half], abs=0.006)
    assert report(key, {"1": answers}, seed=0) == report(key, {"1": answers}, seed=0)


# --- preferences for DPO


def test_rows_hold_the_majority_and_its_votes():
    key = draw(captions(2, 5), [str(i) for i in range(5)], 5, 3, ratings_per_image=0)
    names = list(key["items"])
    outcomes = [(0, 0, 1), (1, 1, None), (0, 1, None), (0, None, None), (1, None, "open")]
    answers = {rater: {} for rater in "123"}
    for name, votes in zip(names, outcomes, strict=True):
        for rater, vote in zip("123", votes, strict=True):
            system = None if vote in (None, "open") else key["items"][name]["systems"][vote]
            side = "left" if key["raters"][rater]["left"][name] == system else "right"
            if vote != "open":
                answers[rater][name] = {"choice": "tie" if system is None else side}
    pictures = {image_id: f"images/{image_id}.png" for image_id in key["images"]}
    rows = preference_rows(key, answers, "説明して", pictures)
    expected = [(names[0], 0, [2, 1, 0]), (names[1], 1, [2, 0, 1])]
    assert len(rows) == 2
    for row, (name, chosen, votes) in zip(rows, expected, strict=True):
        item = key["items"][name]
        assert row["chosen"][0]["content"] == [{"type": "text", "text": item["captions"][chosen]}]
        assert row["rejected"][0]["content"] == [{"type": "text", "text": item["captions"][1 - chosen]}]
        assert (row["chosen_system"], row["rejected_system"]) == (item["systems"][chosen], item["systems"][1 - chosen])
        assert [row["votes_chosen"], row["votes_rejected"], row["votes_tie"]] == votes
        assert row["images"] == [f"images/{item['image_id']}.png"] and row["image_id"] == item["image_id"]


# --- the script, from predictions to DPO


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """Eight scenes with embedded pictures, as publish_datasets.py leaves them, and predictions of two systems."""
    folder = tmp_path_factory.mktemp("published")
    drawn = list(scenes(8, 0, held_out=True))
    rows, good, poor = [], [], []
    for number, scene in enumerate(drawn, 1):
        path = folder / f"{number}.png"
        scene.draw().save(path)
        cell = {"bytes": path.read_bytes(), "path": path.name}
        rows.append({"image": cell, "image_id": number, "file_name": path.name, "captions": scene.japanese()})
        path.unlink()
        good.append({"image_id": number, "caption": scene.japanese()[0]})
        poor.append({"image_id": number, "caption": scene.japanese()[0] if number == 1 else "赤い星がある"})
    (folder / "data").mkdir()
    published = Dataset.from_list(rows).cast_column("image", Image())
    published.to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\nlicense: cc0-1.0\ntags:\n- scenes-captions\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: test\n    path: data/test-*\n---\n"
    )
    for name, lines in {"good": good, "poor": poor}.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        write(folder / f"{name}.run.json", {"prompt": PROMPT, "model": {"adapter": f"outputs/{name}/adapter"}})
    return folder


@pytest.fixture(scope="module")
def result(run_script, dataset, tmp_path_factory) -> Path:
    """An export answered by two raters who prefer the good system, and imported."""
    folder = tmp_path_factory.mktemp("human") / "human"
    systems = [f"secretgood={dataset / 'good.jsonl'}", f"secretpoor={dataset / 'poor.jsonl'}"]
    options = ["--dataset", dataset, "--images", 8, "--raters", 2, "--output_dir", folder]
    done = run_script("human_eval.py", "export", "--systems", *systems, *options)
    assert "rater_1.html: 7 comparisons, 15 ratings" in done.stdout
    assert "1 comparisons are not asked" in done.stdout
    key = json.loads((folder / "key.json").read_text(encoding="utf-8"))
    assert key["systems"]["secretgood"]["sha256"] == hashlib.sha256((dataset / "good.jsonl").read_bytes()).hexdigest()
    assert key["dataset"]["license"] == "cc0-1.0" and str(dataset) not in json.dumps(key)
    for rater in "12":
        document = answers_document(key, rater, all_answers(key, rater, "secretgood"))
        write(folder / f"answers_{rater}.json", document)
    files = [folder / "answers_1.json", folder / "answers_2.json"]
    imported = ["import", "--key", folder / "key.json", *files, "--output_dir", folder / "result"]
    done = run_script("human_eval.py", *imported, "--resamples", 200)
    assert "| secretgood | 93.8% [" in done.stdout and not done.stderr.count("warning: rater")
    command = (
        f"accelerate launch recipes/dpo_qwen2vl_jp.py --adapter outputs/good/adapter --preferences {folder}/result"
    )
    assert command in done.stdout and f"--prompt '{PROMPT}'" in done.stdout
    return folder / "result"


def test_export_and_import_end_in_a_report(result):
    document = json.loads((result / "human_eval.json").read_text(encoding="utf-8"))
    pair = document["preferences"]["pairs"][0]
    assert pair["systems"] == ["secretgood", "secretpoor"] and pair["answers"] == {"wins": 14, "ties": 0, "losses": 0}
    assert pair["sign_test"] == {"wins": 7, "losses": 0, "p_value": 2 / 2**7}
    assert document["ratings"]["systems"]["secretpoor"]["hallucination"]["mean"] == pytest.approx(7 / 8)
    assert document["agreement"]["adequacy"]["alpha"] == 1.0 and document["warnings"] == []
    assert "secretgood against secretpoor" in (result / "human_eval.md").read_text(encoding="utf-8")
    assert sum(1 for _ in (result / "preferences.jsonl").open()) == 7


@pytest.mark.parametrize("decoded", [False, True], ids=["paths", "decoded"])
def test_trl_trains_on_the_preferences(result, miniature_dir, tmp_path, decoded):
    """Two steps of DPO with vision on the miniature, its pictures as paths, as in the file, and as an Image column."""
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import DPOConfig, DPOTrainer

    file = str(result / "preferences.jsonl")
    rows = load_dataset("json", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    assert rows[0]["prompt"][0]["content"] == [{"type": "image"}, {"type": "text", "text": PROMPT}]
    assert rows[0]["votes_chosen"] == 2 and len(rows) == 7
    if decoded:
        rows = rows.cast_column("images", List(Image()))
    processor = AutoProcessor.from_pretrained(miniature_dir)
    config = DPOConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=3,
        max_length=None,
        learning_rate=1e-3,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
    )
    trainer = DPOTrainer(
        AutoModelForImageTextToText.from_pretrained(miniature_dir),
        args=config,
        processing_class=processor,
        train_dataset=rows,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
    batch = trainer.data_collator([copy.deepcopy(rows[i]) for i in range(2)])
    spoken = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
    texts = [text.strip() for text in processor.batch_decode(spoken, skip_special_tokens=True)]
    assert texts == [rows[i][side][0]["content"][0]["text"] for side in ("chosen", "rejected") for i in range(2)]
    first, second = batch["pixel_values"].chunk(4)[:2]
    assert first.shape == second.shape and not first.equal(second)
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4) and second["loss"] < first["loss"]


def test_the_manual_and_mistakes(run_script, tmp_path):
    shown = run_script("human_eval.py", "import", "--help").stdout
    assert "rater_1.html" in shown and "--answers" in shown and "--systems ExportArguments" not in shown
    other = write(tmp_path / "key.json", {"format": "something"})
    bad = run_script("human_eval.py", "import", "x.json", "--key", other, "--output_dir", tmp_path, expect=1)
    assert f"error: {other}: this is not a key.json of an export" in bad.stderr
