"""Human judgements of captions: a blinded and balanced set to judge, the check of what comes back, the statistics.

An item is a preference, two systems' captions of an image beside each other, or a rating of one caption (fluency and
adequacy from 1 to 5, whether it names something that is not there). The key says which system wrote what and where it
stood; a rater's page is made from `blinded_items` alone.

    key        {"format", "systems", "seed", "settings", "images": [image_id],
                "items": {item: {"kind": "preference", "image_id", "systems": [a, b], "captions": [a's, b's]}
                             or {"kind": "rating", "image_id", "systems": [all who wrote it], "captions": [text]}},
                "identical": [{"image_id", "systems": [a, b]}],
                "raters": {rater: {"fingerprint", "order": [item], "left": {preference item: system}}}}
    answers    {"format", "rater", "fingerprint", "session", "answers": {item: {"seconds", "changed": ms since 1970,
                "choice": "left" | "right" | "tie",
                or "fluency": 1-5, "adequacy": 1-5, "hallucination": "yes" | "no"}}}
"""

import hashlib
import itertools
import json
import math
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

KEY_FORMAT = "vlmcap-human-key/1"
ANSWERS_FORMAT = "vlmcap-human-answers/1"
CHOICES = ("left", "right", "tie")
QUESTIONS = {"fluency": (1, 2, 3, 4, 5), "adequacy": (1, 2, 3, 4, 5), "hallucination": ("no", "yes")}
LEVEL = 0.95
NORMAL_QUANTILE = statistics.NormalDist().inv_cdf((1 + LEVEL) / 2)


class HumanError(ValueError):
    """A set that cannot be drawn, or answers that cannot be counted. The message names the file and the item."""


def draw(
    captions: dict[str, dict[str, str]],
    image_ids: Sequence[str],
    images: int,
    raters: int,
    seed: int = 0,
    shared_images: int | None = None,
    pairs_per_image: int | None = None,
    ratings_per_image: int | None = None,
) -> dict:
    """Draws the items and gives them to the raters; the same arguments give the same key.

    Every pair of systems is compared equally often and every system rated equally often, up to one image where
    `pairs_per_image` or `ratings_per_image` leaves a choice. On every page each pair of systems, and each system over
    all of its pairs, stands left as often as right up to one (up to two with images of the rater's own). Rater 2 sees
    what both share with the sides of rater 1 exchanged, rater 4 those of rater 3, and so on. Two systems with the same
    caption of an image are not compared on it (`identical`), and a caption is rated once an image.

    Args:
        captions: system -> image id -> caption.
        image_ids: the images to draw from; those without a caption of every system are passed over.
        images: how many to draw.
        raters: how many pages.
        shared_images: so many images go to every rater, each of the others to one alone; None: all are shared.
        pairs_per_image: pairs of systems compared on an image, in turn; None: every pair.
        ratings_per_image: systems rated on an image, in turn; None: every system.

    Raises:
        HumanError: a number that cannot be met, or nothing to ask.
    """
    systems = list(captions)
    pairs = list(itertools.combinations(systems, 2))
    limits = {
        "images": (images, 1, None),
        "raters": (raters, 1, None),
        "shared_images": (shared_images, 0, images),
        "pairs_per_image": (pairs_per_image, 0, len(pairs)),
        "ratings_per_image": (ratings_per_image, 0, len(systems)),
    }
    for name, (value, least, most) in limits.items():
        if value is not None and (value < least or (most is not None and value > most)):
            raise HumanError(
                f"--{name} {value} must be at least {least}{f' and at most {most}' if most is not None else ''}"
            )
    if "tie" in captions:
        raise HumanError("no system can be called 'tie': give it another name")
    common = [image_id for image_id in image_ids if all(image_id in captions[system] for system in systems)]
    if len(common) < images:
        found = ", ".join(f"{name} {sum(i in captions[name] for i in image_ids):,}" for name in systems)
        raise HumanError(
            f"--images {images}: only {len(common):,} of the {len(image_ids):,} images have a caption of every system"
            f" ({found}). Ask for fewer, or caption the same images with every system."
        )

    rng = random.Random(seed)
    drawn = rng.sample(common, images)
    rng.shuffle(pairs)
    items, identical = [], []
    for place, image_id in enumerate(drawn):
        texts = {system: captions[system][image_id].strip() for system in systems}
        for pair in _in_turn(pairs, pairs_per_image, place):
            if texts[pair[0]] == texts[pair[1]]:
                identical.append({"image_id": image_id, "systems": list(pair)})
            else:
                items.append(_item("preference", image_id, pair, [texts[system] for system in pair]))
        authors = defaultdict(list)
        for system in _in_turn(systems, ratings_per_image, place):
            authors[texts[system]].append(system)
        items += [_item("rating", image_id, names, [text]) for text, names in authors.items()]
    if not items:
        raise HumanError("nothing to ask: give two systems with different captions, or --ratings_per_image 1 or more")
    rng.shuffle(items)  # so that neither the number of an item nor its neighbours tell who wrote it

    key = {
        "format": KEY_FORMAT,
        "systems": {system: {} for system in systems},
        "seed": seed,
        "settings": {name: value for name, (value, _, _) in limits.items()},
        "images": drawn,
        "items": {f"i{number:05d}": item for number, item in enumerate(items, 1)},
        "identical": identical,
        "raters": {},
    }
    shared_count = images if shared_images is None else shared_images
    shared, others = set(drawn[:shared_count]), drawn[shared_count:]
    sides = {}
    for rater in range(raters):
        # Neighbours in the drawn order, so that everybody's own images hold every pair equally often.
        own = set(others[len(others) * rater // raters : len(others) * (rater + 1) // raters])
        sides = _exchanged(key["items"], sides) if rater % 2 else _balanced_sides(key["items"], shared, rng)
        left = sides | _balanced_sides(key["items"], own, rng)
        order = []
        for kind in ("preference", "rating"):
            block = [
                name
                for name, item in key["items"].items()
                if item["kind"] == kind and item["image_id"] in shared | own
            ]
            order += rng.sample(block, len(block))
        key["raters"][str(rater + 1)] = {"fingerprint": "", "order": order, "left": {i: left[i] for i in sorted(left)}}
    for rater, entry in key["raters"].items():
        content = json.dumps([rater, blinded_items(key, rater)[0]])
        entry["fingerprint"] = hashlib.sha256(content.encode()).hexdigest()[:16]
    return key


def blinded_items(key: dict, rater: str) -> tuple[list[dict], list[str]]:
    """What a rater sees, in order: `{"id", "kind", "image", "captions"}`; and the ids of the images.

    `image` is a place in the list of images, which are in the order of their first appearance. `captions` are the left
    and the right one, or the one to rate.
    """
    entry = key["raters"][rater]
    places, items = {}, []
    for name in entry["order"]:
        item = key["items"][name]
        first_is_left = item["kind"] == "rating" or entry["left"][name] == item["systems"][0]
        shown = item["captions"] if first_is_left else item["captions"][::-1]
        place = places.setdefault(item["image_id"], len(places))
        items.append({"id": name, "kind": item["kind"], "image": place, "captions": shown})
    return items, list(places)


def read_key(path: str | Path) -> dict:
    """The key of an export. Raises HumanError when the file is something else."""
    return _read_object(path, KEY_FORMAT, "key.json of an export")


def read_answers(paths: Sequence[str | Path], key: dict) -> tuple[dict[str, dict[str, dict]], list[str]]:
    """The answers of every rater, checked against the key.

    Several files of one person (same rater, same session: each download holds everything so far) are joined; where
    they answer an item differently, the later answer counts.

    Returns:
        rater -> item -> answer as the page saved it; and warnings: what is missing, what was joined.

    Raises:
        HumanError: with every fault of every file: no answers file, of another export, an unknown item, an answer out
            of range, one page answered by two persons.
    """
    faults, warnings, answers, files = [], [], {}, {}
    for path in paths:
        try:
            document = _read_object(path, ANSWERS_FORMAT, "file of answers")
        except HumanError as error:
            faults.append(str(error))
            continue
        rater, session = str(document.get("rater")), document.get("session")
        found = _check_answers(path, document, key)
        faults += found
        if found:
            continue
        if rater not in answers:
            answers[rater], files[rater] = dict(document["answers"]), (path, session)
            continue
        before, session_before = files[rater]
        if session != session_before:
            faults.append(
                f"{path}: the page of rater {rater} was answered by somebody else already, in {before}. Give one of"
                " the two files, and export with one more rater for the other person."
            )
            continue
        changed = 0
        for name, answer in document["answers"].items():
            old = answers[rater].get(name)
            changed += old is not None and _given(old) != _given(answer)
            if old is None or answer.get("changed", 0) >= old.get("changed", 0):
                answers[rater][name] = answer
        warnings.append(
            f"{path}: continues {before} (rater {rater}); joined, {changed} answers differ and the later one counts"
        )
    if faults:
        raise HumanError("\n".join(faults))
    return answers, warnings + _missing(answers, files, key)


def _check_answers(path: str | Path, document: dict, key: dict) -> list[str]:
    entry = key["raters"].get(str(document.get("rater")))
    if entry is None or document.get("fingerprint") != entry["fingerprint"]:
        return [
            f"{path}: rater {document.get('rater')!r} with fingerprint {document.get('fingerprint')!r} belongs to"
            " another export than the key. Give the key.json that was written together with that page."
        ]
    if not isinstance(document.get("answers"), dict):
        return [f'{path}: "answers" must be an object, but is {document.get("answers")!r:.80}']
    faults, asked = [], set(entry["order"])
    for name, answer in document["answers"].items():
        if name not in asked:
            faults.append(f"{path}: item {name} is not on the page of rater {document['rater']}")
            continue
        if not isinstance(answer, dict):
            faults.append(f"{path}: item {name}: an answer must be an object, but is {answer!r:.80}")
            continue
        allowed = _allowed(key["items"][name]["kind"])
        for question, value in answer.items():
            if question in ("seconds", "changed"):
                if type(value) not in (int, float) or not 0 <= value < math.inf:
                    faults.append(f"{path}: item {name}: {question} must be a number from 0, but is {value!r}")
            elif question not in allowed:
                faults.append(f"{path}: item {name}: unknown question {question!r}, must be one of {list(allowed)}")
            elif type(value) not in (int, str) or value not in allowed[question]:
                values = ", ".join(map(str, allowed[question]))
                faults.append(f"{path}: item {name}: {question} must be one of {values}, but is {value!r}")
    return faults


def _missing(answers: dict[str, dict[str, dict]], files: dict, key: dict) -> list[str]:
    """A line for every rater without a file, and for every file that leaves something open."""
    lines = []
    for rater, entry in key["raters"].items():
        if rater not in answers:
            lines.append(f"rater {rater}: no file; {len(entry['order'])} items without this rater's answer")
            continue
        none, partly = [], []
        for name in entry["order"]:
            given = _given(answers[rater].get(name, {}))
            open_questions = [question for question in _allowed(key["items"][name]["kind"]) if question not in given]
            if not given:
                none.append(name)
            elif open_questions:
                partly.append(f"{name} ({', '.join(open_questions)})")
        if none or partly:
            parts = [f"{len(none)} not answered: {_few(none)}"] if none else []
            parts += [f"{len(partly)} answered in part, without {_few(partly)}"] if partly else []
            lines.append(
                f"{files[rater][0]}: rater {rater} is not finished; of {len(entry['order'])} items {'; '.join(parts)}."
                " What is there counts."
            )
    return lines


def report(key: dict, answers: dict[str, dict[str, dict]], resamples: int = 10_000, seed: int = 0) -> dict:
    """Win rates, ratings, agreement and a summary of each rater, from a key and `read_answers`.

    An image counts once: the raters' answers about it are averaged first (win 1, tie 1/2, loss 0), then the images.
    Intervals are 95 % percentile bootstraps over images. Images on which two systems wrote the same caption count as
    ties, weighted with the share of the asked ones that has answers.

    Returns:
        {"counts", "preferences": {"pairs": [...], "systems": {...}}, "ratings": {"systems": {...}, "differences":
        [...]}, "agreement", "raters", "bootstrap"}. A figure without answers is None.
    """
    votes = _votes(key, answers)
    scores = _scores(key, answers)
    bootstrap = _Bootstrap(len(key["images"]), resamples, seed)
    seconds = [answer.get("seconds", 0) for given in answers.values() for answer in given.values()]
    return {
        "counts": {
            "images": len(key["images"]),
            "items": len(key["items"]),
            "identical_captions": len(key["identical"]),
            "raters": len(answers),
            "raters_asked": len(key["raters"]),
            "preferences": sum(len(given) for given in votes.values()),
            "ratings": sum(any(q in answer for q in QUESTIONS) for a in answers.values() for answer in a.values()),
            "hours": sum(seconds) / 3600,
        },
        "preferences": _preference_report(key, votes, bootstrap),
        "ratings": _rating_report(key, scores, bootstrap),
        "agreement": _agreement_report(key, votes, scores),
        "raters": {rater: _rater_report(key, rater, given) for rater, given in answers.items()},
        "bootstrap": {"resamples": resamples, "seed": seed, "level": LEVEL},
    }


def preference_rows(key: dict, answers: dict[str, dict[str, dict]], prompt: str, pictures: dict[str, str]) -> list:
    """Rows for TRL's DPOTrainer with a vision model: the caption most raters preferred, and the other.

    A row needs more votes for one caption than for the other and than for a tie. The format is that of
    trl/trainer/dpo_trainer.py, DataCollatorForVisionPreference (1.16), which passes over the further columns:
    image_id, the two systems and the votes.

    Args:
        prompt: the user's text behind the image.
        pictures: image id -> path.
    """
    rows = []
    for name, given in _votes(key, answers).items():
        item = key["items"][name]
        count = Counter(given.values())
        chosen, rejected = sorted((0, 1), key=lambda place: -count[item["systems"][place]])
        votes = [count[item["systems"][place]] for place in (chosen, rejected)]
        if votes[0] <= max(votes[1], count["tie"]):
            continue
        rows.append(
            {
                "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}],
                "chosen": [_assistant(item["captions"][chosen])],
                "rejected": [_assistant(item["captions"][rejected])],
                "images": [pictures[item["image_id"]]],
                "image_id": item["image_id"],
                "chosen_system": item["systems"][chosen],
                "rejected_system": item["systems"][rejected],
                "votes_chosen": votes[0],
                "votes_rejected": votes[1],
                "votes_tie": count["tie"],
            }
        )
    return rows


def krippendorff_alpha(units: Sequence[Sequence], metric: str) -> float | None:
    """Krippendorff's alpha: 1 for perfect agreement, 0 for chance.

    Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", sections C and D; any number of raters, missing
    answers allowed.

    Args:
        units: the values that each unit was given; units with fewer than two are passed over.
        metric: "nominal", or "ordinal" for values that can be sorted.

    Returns:
        None where alpha is not defined: no unit with two values, or all values the same.
    """
    units = [unit for unit in units if len(unit) > 1]
    kinds = sorted({value for unit in units for value in unit})
    if len(kinds) < 2:
        return None
    place = {value: number for number, value in enumerate(kinds)}
    coincidences = np.zeros((len(kinds), len(kinds)))
    for unit in units:
        count = np.bincount([place[value] for value in unit], minlength=len(kinds))
        coincidences += (np.outer(count, count) - np.diag(count)) / (len(unit) - 1)
    totals = coincidences.sum(0)
    if metric == "nominal":
        distance = 1.0 - np.eye(len(kinds))
    else:
        middles = np.cumsum(totals) - totals / 2  # the sum from c to k less half of both ends is a difference of these
        distance = np.subtract.outer(middles, middles) ** 2
    observed = (coincidences * distance).sum()
    expected = (np.outer(totals, totals) * distance).sum() / (totals.sum() - 1)
    return float(1 - observed / expected)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of the sign test: the binomial with 1/2, ties left out."""
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    return min(1.0, 2 * tail)


def sign_flip_test(differences: Sequence[float], resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of a mean of paired differences against zero, by random exchange of the two sides.

    Fisher's randomisation test as in Noreen 1989, p = (1 + at least as far) / (1 + resamples).
    """
    differences = np.asarray(differences, dtype=np.float64)
    flips = np.random.default_rng(seed).choice([-1.0, 1.0], size=(resamples, len(differences)))
    # The tolerance keeps sums that are equal but for rounding on the side of "as far".
    as_far = np.abs(flips @ differences) >= abs(differences.sum()) - 1e-9
    return float((1 + as_far.sum()) / (1 + resamples))


def wilson_interval(successes: int, trials: int) -> list[float]:
    """95 % interval of a share (Wilson 1927)."""
    z2 = NORMAL_QUANTILE**2
    share = successes / trials
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = NORMAL_QUANTILE * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    return [middle - half, middle + half]


def markdown(report: dict) -> str:
    """The report as Markdown tables for people."""
    blocks = []
    systems, ratings = report["preferences"]["systems"], report["ratings"]["systems"]
    rows = [
        [system, _cell(systems[system], "{:.1%}"), *(_cell(ratings[system][q], _shape(q)) for q in QUESTIONS)]
        for system in systems
    ]
    blocks.append(_table(["system", "win rate", "fluency (1-5)", "adequacy (1-5)", "hallucination"], rows))
    rows = [
        [
            " against ".join(pair["systems"]),
            _cell(pair, "{:.1%}"),
            "{wins} / {ties} / {losses}".format(**pair["answers"]),
            str(pair["identical_images"]),
            "{wins} : {losses}".format(**pair["sign_test"]),
            _number(pair["sign_test"]["p_value"], "{:.2g}"),
        ]
        for pair in report["preferences"]["pairs"]
    ]
    header = ["pair", "win rate of the first", "answers: win / tie / loss", "same caption", "images won : lost", "p"]
    blocks += [_table(header, rows)] if rows else []
    rows = [
        [" - ".join(row["systems"]), row["question"], _cell(row, "{:+.3f}"), _number(row["p_value"], "{:.2g}")]
        for row in report["ratings"]["differences"]
    ]
    blocks += [_table(["difference", "question", "mean", "p"], rows)] if rows else []
    rows = [
        [name, entry["metric"], _number(entry["alpha"], "{:.3f}"), str(entry["units"])]
        for name, entry in report["agreement"].items()
    ]
    blocks.append(_table(["agreement", "metric", "Krippendorff's alpha", "items with two or more answers"], rows))
    rows = [
        [
            rater,
            f"{entry['complete']} of {entry['items']}",
            _number(entry["seconds_per_preference"], "{:.1f}"),
            _number(entry["seconds_per_rating"], "{:.1f}"),
            _cell(entry["left"], "{:.1%}"),
            _number(entry["tie_share"], "{:.1%}"),
        ]
        for rater, entry in report["raters"].items()
    ]
    header = ["rater", "complete items", "s / preference", "s / rating", "left, of the decided", "ties"]
    blocks.append(_table(header, rows))
    counts = report["counts"]
    blocks.append(
        f"{counts['images']} images, {counts['preferences']} preferences, {counts['ratings']} ratings,"
        f" {counts['raters']} of {counts['raters_asked']} raters. Intervals: 95 % bootstrap over images (raters:"
        f" Wilson). A tie counts half; {counts['identical_captions']} comparisons were not asked because both captions"
        " are the same, and count as ties. p of pairs: sign test over images; of differences: random exchange of the"
        " two systems. No p is corrected for the number of comparisons."
    )
    return "\n\n".join(blocks)


class _Bootstrap:
    """One set of resamples of the images for every figure."""

    def __init__(self, images: int, resamples: int, seed: int):
        rng = np.random.default_rng(seed)
        self.counts = rng.multinomial(images, np.full(images, 1 / images), size=resamples).astype(np.float64)

    def mean(self, values: np.ndarray, weights: np.ndarray) -> tuple[float | None, list[float] | None]:
        """Weighted mean over the images, (images,) each, and its interval over the resamples that have any weight."""
        total = weights.sum()
        if total == 0:
            return None, None
        sums, weight_sums = self.counts @ (values * weights), self.counts @ weights
        means = sums[weight_sums > 0] / weight_sums[weight_sums > 0]
        interval = np.percentile(means, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
        return float((values * weights).sum() / total), interval.tolist()


def _votes(key: dict, answers: dict[str, dict[str, dict]]) -> dict[str, dict[str, str]]:
    """Preference item -> rater -> the system preferred, or "tie"."""
    votes = {name: {} for name, item in key["items"].items() if item["kind"] == "preference"}
    for rater, given in answers.items():
        for name, answer in given.items():
            if "choice" in answer:
                first, second = key["items"][name]["systems"]
                left = key["raters"][rater]["left"][name]
                right = second if left == first else first
                votes[name][rater] = {"left": left, "right": right, "tie": "tie"}[answer["choice"]]
    return votes


def _scores(key: dict, answers: dict[str, dict[str, dict]]) -> dict[str, dict[str, list[int]]]:
    """Question -> rating item -> the raters' answers; for hallucination 1 is yes and 0 is no."""
    ratings = [name for name, item in key["items"].items() if item["kind"] == "rating"]
    scores = {question: {name: [] for name in ratings} for question in QUESTIONS}
    for given in answers.values():
        for name, answer in given.items():
            for question in QUESTIONS:
                if question in answer:
                    value = answer[question]
                    scores[question][name].append(int(value == "yes") if question == "hallucination" else value)
    return scores


def _preference_report(key: dict, votes: dict[str, dict[str, str]], bootstrap: _Bootstrap) -> dict:
    place = {image_id: number for number, image_id in enumerate(key["images"])}
    sums, weights = ({system: np.zeros(len(place)) for system in key["systems"]} for _ in range(2))
    rows = []
    for pair in itertools.combinations(key["systems"], 2):
        names = [name for name in votes if set(key["items"][name]["systems"]) == set(pair)]
        asked = [name for name in names if votes[name]]
        same = [entry["image_id"] for entry in key["identical"] if set(entry["systems"]) == set(pair)]
        if not names and not same:
            continue
        value, weight = np.full(len(place), 0.5), np.zeros(len(place))
        weight[[place[image_id] for image_id in same]] = len(asked) / len(names) if names else 1
        worth = {pair[0]: 1.0, "tie": 0.5, pair[1]: 0.0}
        for name in asked:
            image = place[key["items"][name]["image_id"]]
            value[image] = statistics.fmean(worth[vote] for vote in votes[name].values())
            weight[image] = 1
        for system, oriented in zip(pair, (value, 1 - value), strict=True):
            sums[system] += oriented * weight
            weights[system] += weight
        mean, interval = bootstrap.mean(value, weight)
        count = Counter(vote for name in asked for vote in votes[name].values())
        wins, losses = int((value > 0.5).sum()), int((value < 0.5).sum())
        rows.append(
            {
                "systems": list(pair),
                "win_rate": mean,
                "interval": interval,
                "images": len(asked),
                "identical_images": len(same),
                "answers": {"wins": count[pair[0]], "ties": count["tie"], "losses": count[pair[1]]},
                "sign_test": {"wins": wins, "losses": losses, "p_value": sign_test(wins, losses)},
                "alpha": krippendorff_alpha([list(votes[name].values()) for name in names], "nominal"),
            }
        )
    totals = {}
    for system, weight in weights.items():
        averages = np.divide(sums[system], weight, out=np.zeros(len(place)), where=weight > 0)
        mean, interval = bootstrap.mean(averages, weight)
        totals[system] = {"win_rate": mean, "interval": interval}
    return {"pairs": rows, "systems": totals}


def _rating_report(key: dict, scores: dict[str, dict[str, list[int]]], bootstrap: _Bootstrap) -> dict:
    place = {image_id: number for number, image_id in enumerate(key["images"])}
    values = {system: {question: np.full(len(place), np.nan) for question in QUESTIONS} for system in key["systems"]}
    answers = Counter()
    for question, of_items in scores.items():
        for name, given in of_items.items():
            item = key["items"][name]
            for system in item["systems"] if given else ():
                values[system][question][place[item["image_id"]]] = statistics.fmean(given)
                answers[system, question] += len(given)
    systems = {system: {} for system in key["systems"]}
    for system, question in itertools.product(systems, QUESTIONS):
        value = values[system][question]
        rated = ~np.isnan(value)
        mean, interval = bootstrap.mean(np.nan_to_num(value), rated.astype(np.float64))
        systems[system][question] = {
            "mean": mean,
            "interval": interval,
            "images": int(rated.sum()),
            "answers": answers[system, question],
        }
    differences = []
    for (a, b), question in itertools.product(itertools.combinations(key["systems"], 2), QUESTIONS):
        difference = values[a][question] - values[b][question]
        both = ~np.isnan(difference)
        if both.any():
            mean, interval = bootstrap.mean(np.nan_to_num(difference), both.astype(np.float64))
            p_value = sign_flip_test(difference[both])
            row = {"systems": [a, b], "question": question, "mean": mean, "interval": interval, "p_value": p_value}
            differences.append(row | {"images": int(both.sum())})
    return {"systems": systems, "differences": differences}


def _agreement_report(key: dict, votes: dict[str, dict[str, str]], scores: dict) -> dict:
    # First, second or tie in the order of the key: the same words for every pair of systems.
    words = {system: number for number, system in enumerate(key["systems"])}
    preferences = []
    for name, given in votes.items():
        first = min(key["items"][name]["systems"], key=words.get)
        preferences.append(
            [vote if vote == "tie" else "first" if vote == first else "second" for vote in given.values()]
        )
    units = {"preference": ("nominal", preferences)}
    for question, of_items in scores.items():
        units[question] = ("nominal" if question == "hallucination" else "ordinal", list(of_items.values()))
    return {
        name: {
            "metric": metric,
            "alpha": krippendorff_alpha(values, metric),
            "units": sum(len(unit) > 1 for unit in values),
        }
        for name, (metric, values) in units.items()
    }


def _rater_report(key: dict, rater: str, given: dict[str, dict]) -> dict:
    kinds = {name: _allowed(key["items"][name]["kind"]) for name in key["raters"][rater]["order"]}
    complete = [name for name in given if _given(given[name]).keys() == kinds[name].keys()]
    seconds = {"preference": [], "rating": []}
    for name in complete:
        if "seconds" in given[name]:
            seconds[key["items"][name]["kind"]].append(given[name]["seconds"])
    choices = Counter(answer["choice"] for answer in given.values() if "choice" in answer)
    decided = choices["left"] + choices["right"]
    return {
        "items": len(kinds),
        "complete": len(complete),
        "seconds_per_preference": statistics.median(seconds["preference"]) if seconds["preference"] else None,
        "seconds_per_rating": statistics.median(seconds["rating"]) if seconds["rating"] else None,
        "left": {
            "share": choices["left"] / decided if decided else None,
            "interval": wilson_interval(choices["left"], decided) if decided else None,
            "decided": decided,
        },
        "tie_share": choices["tie"] / choices.total() if choices else None,
    }


def _in_turn(things: list, count: int | None, place: int) -> list:
    """The `count` things whose turn it is at the place-th image; all of them for None."""
    if count is None:
        return things
    return [things[(place * count + step) % len(things)] for step in range(count)]


def _item(kind: str, image_id: str, systems: Sequence[str], captions: list[str]) -> dict:
    return {"kind": kind, "image_id": image_id, "systems": list(systems), "captions": captions}


def _exchanged(items: dict[str, dict], left: dict[str, str]) -> dict[str, str]:
    return {name: next(s for s in items[name]["systems"] if s != system) for name, system in left.items()}


def _balanced_sides(items: dict[str, dict], image_ids: set[str], rng: random.Random) -> dict[str, str]:
    """Preference item of these images -> the system on the left.

    Of every pair of systems each stands left in half of its items. The odd item that is left over for some pairs is an
    edge between two systems; walking closed paths over all edges, with one more node where a system has an odd number
    of them, leaves every system as often as it enters it: left and right differ by one at most.
    """
    of_pair = defaultdict(list)
    for name, item in items.items():
        if item["kind"] == "preference" and item["image_id"] in image_ids:
            of_pair[tuple(item["systems"])].append(name)
    left, edges = {}, defaultdict(list)
    for (a, b), names in of_pair.items():
        rng.shuffle(names)
        half = len(names) // 2
        left |= dict.fromkeys(names[:half], a) | dict.fromkeys(names[half : 2 * half], b)
        for name in names[2 * half :]:
            edges[a].append((name, b))
            edges[b].append((name, a))
    for system in [system for system, at in edges.items() if len(at) % 2]:
        edges[system].append((f"end {system}", None))
        edges[None].append((f"end {system}", system))
    for at in edges.values():
        rng.shuffle(at)
    walked = set()
    for here in list(edges):
        while edges[here]:
            name, there = edges[here].pop()
            if name not in walked:
                walked.add(name)
                left[name] = here
                here = there
    return {name: system for name, system in left.items() if name in items}


def _allowed(kind: str) -> dict[str, tuple]:
    return {"choice": CHOICES} if kind == "preference" else QUESTIONS


def _given(answer: dict) -> dict:
    """The answers proper, without times."""
    return {question: value for question, value in answer.items() if question not in ("seconds", "changed")}


def _assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _read_object(path: str | Path, expected: str, what: str) -> dict:
    try:
        document = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise HumanError(f"{path}: not JSON in UTF-8 ({error}); a {what} is needed") from error
    found = document.get("format") if isinstance(document, dict) else None
    if found != expected:
        raise HumanError(f"{path}: this is no {what} (format {found!r}, not {expected!r})")
    return document


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _number(value: float | None, shape: str) -> str:
    return "-" if value is None else shape.format(value)


def _shape(question: str) -> str:
    return "{:.1%}" if question == "hallucination" else "{:.2f}"


def _cell(entry: dict, shape: str) -> str:
    """The figure of a row with its interval."""
    value = next(entry[name] for name in ("win_rate", "mean", "share") if name in entry)
    if value is None:
        return "-"
    low, high = entry["interval"]
    return f"{shape.format(value)} [{shape.format(low)}, {shape.format(high)}]"


def _table(header: list[str], rows: list[list[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
    lines = ["| " + " | ".join(row) + " |" for row in escaped]
    return "\n".join([lines[0], "|" + " --- |" * len(header), *lines[1:]])
