"""Results of the raters' answers: win rates, ratings, agreement, with intervals and tests."""

import itertools
import statistics
from collections import Counter
from collections.abc import Sequence

import numpy as np

from vlmcap.human.study import QUESTIONS, given_in, questions_of, votes_of
from vlmcap.markdown import markdown_escape, markdown_table

LEVEL = 0.95


def report(key: dict, answers: dict[str, dict[str, dict]], resamples: int = 10_000, seed: int = 0) -> dict:
    """Win rates, ratings, agreement and a summary of each rater, from a key and `read_answers`.

    An image counts once: the raters' answers about it are averaged first (win 1, tie 1/2, loss 0), then the images.
    Intervals are 95 % percentile bootstraps over images. Images on which two systems wrote the same caption count as
    ties, weighted with the share of the asked ones that has answers.

    Returns:
        {"counts", "preferences": {"pairs": [...], "systems": {...}}, "ratings": {"systems": {...}, "differences":
        [...]}, "agreement", "raters", "bootstrap"}. A figure without answers is None.
    """
    votes = votes_of(key, answers)
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


def krippendorff_alpha(units: Sequence[Sequence], metric: str) -> float | None:
    """Krippendorff's alpha: 1 for perfect agreement, 0 for chance.

    Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", sections C and D; any number of raters, missing
    answers allowed.

    Args:
        units: the values that each unit was given; units with fewer than two are skipped.
        metric: "nominal", or "ordinal" for values that can be sorted.

    The package `krippendorff` gives the same values, and is under the GPL.

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
    from scipy.stats import binomtest

    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def sign_flip_test(differences: Sequence[float], resamples: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of a mean of paired differences against zero, by random exchange of the two sides.

    Fisher's randomisation test as in Noreen 1989, p = (1 + at least as far) / (1 + resamples). Not SciPy's
    `permutation_test`, which refuses a single difference.
    """
    differences = np.asarray(differences, dtype=np.float64)
    flips = np.random.default_rng(seed).choice([-1.0, 1.0], size=(resamples, len(differences)))
    # The tolerance keeps sums that are equal except for rounding on the side of "as far".
    as_far = np.abs(flips @ differences) >= abs(differences.sum()) - 1e-9
    return float((1 + as_far.sum()) / (1 + resamples))


def wilson_interval(successes: int, trials: int) -> list[float]:
    """95 % interval of a share (Wilson 1927)."""
    from scipy.stats import binomtest

    return [*map(float, binomtest(successes, trials).proportion_ci(LEVEL, method="wilson"))]


def markdown(report: dict) -> str:
    """The report as Markdown tables for people."""
    blocks = []
    systems, ratings = report["preferences"]["systems"], report["ratings"]["systems"]
    rows = [
        [
            markdown_escape(system),
            _cell(systems[system], "{:.1%}"),
            *(_cell(ratings[system][q], _shape(q)) for q in QUESTIONS),
        ]
        for system in systems
    ]
    header = ["system", "win rate", "fluency (1-5)", "adequacy (1-5)", "hallucination"]
    blocks.append(markdown_table([header, *rows]))
    rows = [
        [
            markdown_escape(" against ".join(pair["systems"])),
            _cell(pair, "{:.1%}"),
            "{wins} / {ties} / {losses}".format(**pair["answers"]),
            str(pair["identical_images"]),
            "{wins} : {losses}".format(**pair["sign_test"]),
            _number(pair["sign_test"]["p_value"], "{:.2g}"),
        ]
        for pair in report["preferences"]["pairs"]
    ]
    header = ["pair", "win rate of the first", "answers: win / tie / loss", "same caption", "images won : lost", "p"]
    blocks += [markdown_table([header, *rows])] if rows else []
    rows = [
        [
            markdown_escape(" - ".join(row["systems"])),
            row["question"],
            _cell(row, "{:+.3f}"),
            _number(row["p_value"], "{:.2g}"),
        ]
        for row in report["ratings"]["differences"]
    ]
    blocks += [markdown_table([["difference", "question", "mean", "p"], *rows], 2)] if rows else []
    rows = [
        [name, entry["metric"], _number(entry["alpha"], "{:.3f}"), str(entry["units"])]
        for name, entry in report["agreement"].items()
    ]
    header = ["agreement", "metric", "Krippendorff's alpha", "items with two or more answers"]
    blocks.append(markdown_table([header, *rows], 2))
    rows = [
        [
            markdown_escape(rater),
            f"{entry['complete']} of {entry['items']}",
            _number(entry["seconds_per_preference"], "{:.1f}"),
            _number(entry["seconds_per_rating"], "{:.1f}"),
            _cell(entry["left"], "{:.1%}"),
            _number(entry["tie_share"], "{:.1%}"),
        ]
        for rater, entry in report["raters"].items()
    ]
    header = ["rater", "complete items", "s / preference", "s / rating", "left, of the decided", "ties"]
    blocks.append(markdown_table([header, *rows]))
    counts = report["counts"]
    blocks.append(
        f"{counts['images']} images, {counts['preferences']} preferences, {counts['ratings']} ratings,"
        f" {counts['raters']} of {counts['raters_asked']} raters. Intervals: 95 % bootstrap over images (raters:"
        f" Wilson). A tie counts half; {counts['identical_captions']} comparisons were not asked because both captions"
        " are the same, and count as ties. p of pairs: sign test over images; of differences: random exchange of the"
        " two systems. No p is corrected for the number of comparisons."
    )
    return "\n".join(blocks)


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
    kinds = {name: questions_of(key["items"][name]["kind"]) for name in key["raters"][rater]["order"]}
    complete = [name for name in given if given_in(given[name]).keys() == kinds[name].keys()]
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
