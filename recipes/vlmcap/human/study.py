"""Human judgements of captions: a blinded and balanced set to judge, the check of what comes back.

An item is a preference, two systems' captions of an image beside each other, or a rating of one caption (fluency and
adequacy from 1 to 5, whether it names something that is not there). The key says which system wrote what and on which
side it was; a rater's page is made from `blinded_items` alone.

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
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from vlmcap.errors import UserError
from vlmcap.strict_parsing import parse_json, shown

KEY_FORMAT = "vlmcap-human-key/1"
ANSWERS_FORMAT = "vlmcap-human-answers/1"
CHOICES = ("left", "right", "tie")
QUESTIONS = {"fluency": (1, 2, 3, 4, 5), "adequacy": (1, 2, 3, 4, 5), "hallucination": ("no", "yes")}
LATEST = 1e15  # ms since 1970, the year 33658: no time on a page is later


class HumanError(UserError):
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
    all of its pairs, is on the left as often as on the right up to one (up to two with images of the rater's own).
    Rater 2 sees what both share with the sides of rater 1 exchanged, rater 4 those of rater 3, and so on. Two systems
    with the same caption of an image are not compared on it (`identical`), and a caption is rated once an image.

    Args:
        captions: system -> image id -> caption.
        image_ids: the images to draw from; those without a caption of every system are skipped.
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
    settings = {"images": images, "raters": raters, "shared_images": shared_images}
    settings |= {"pairs_per_image": pairs_per_image, "ratings_per_image": ratings_per_image}
    _check_settings(settings, len(pairs), len(systems))
    if "tie" in captions:
        raise HumanError("no system can be called 'tie': give it another name")
    common = _common_images(captions, image_ids, images)

    rng = random.Random(seed)
    drawn = rng.sample(common, images)
    rng.shuffle(pairs)
    items, identical = _draw_items(captions, drawn, pairs, pairs_per_image, ratings_per_image)
    rng.shuffle(items)  # so that neither the number of an item nor its neighbours tell who wrote it

    key = {
        "format": KEY_FORMAT,
        "systems": {system: {} for system in systems},
        "seed": seed,
        "settings": settings,
        "images": drawn,
        "items": {f"i{number:05d}": item for number, item in enumerate(items, 1)},
        "identical": identical,
        "raters": {},
    }
    _give_to_raters(key, raters, images if shared_images is None else shared_images, rng)
    return key


def _check_settings(settings: dict[str, int | None], pairs: int, systems: int) -> None:
    bounds = {
        "images": (1, None),
        "raters": (1, None),
        "shared_images": (0, settings["images"]),
        "pairs_per_image": (0, pairs),
        "ratings_per_image": (0, systems),
    }
    for name, (least, most) in bounds.items():
        value = settings[name]
        if value is not None and (value < least or (most is not None and value > most)):
            raise HumanError(
                f"--{name} {value} must be at least {least}{f' and at most {most}' if most is not None else ''}"
            )


def _common_images(captions: dict[str, dict[str, str]], image_ids: Sequence[str], images: int) -> list[str]:
    """Those of `image_ids` that every system captioned, at least `images`."""
    common = [image_id for image_id in image_ids if all(image_id in of_system for of_system in captions.values())]
    if len(common) < images:
        found = ", ".join(f"{name} {sum(i in captions[name] for i in image_ids):,}" for name in captions)
        raise HumanError(
            f"--images {images}: only {len(common):,} of the {len(image_ids):,} images have a caption of every system"
            f" ({found}). Ask for fewer, or caption the same images with every system."
        )
    return common


def _draw_items(
    captions: dict[str, dict[str, str]],
    drawn: list[str],
    pairs: list[tuple[str, str]],
    pairs_per_image: int | None,
    ratings_per_image: int | None,
) -> tuple[list[dict], list[dict]]:
    """What is asked about the drawn images, and the pairs that are not because their captions are the same."""
    items, identical = [], []
    for place, image_id in enumerate(drawn):
        texts = {system: of_system[image_id].strip() for system, of_system in captions.items()}
        for pair in _in_turn(pairs, pairs_per_image, place):
            if texts[pair[0]] == texts[pair[1]]:
                identical.append({"image_id": image_id, "systems": list(pair)})
            else:
                items.append(_item("preference", image_id, pair, [texts[system] for system in pair]))
        authors = defaultdict(list)
        for system in _in_turn(list(captions), ratings_per_image, place):
            authors[texts[system]].append(system)
        items += [_item("rating", image_id, names, [text]) for text, names in authors.items()]
    if not items:
        raise HumanError("nothing to ask: give two systems with different captions, or --ratings_per_image 1 or more")
    return items, identical


def _give_to_raters(key: dict, raters: int, shared_images: int, rng: random.Random) -> None:
    """Fills `key["raters"]`: the order and the sides of each page, then its fingerprint."""
    shared, others = set(key["images"][:shared_images]), key["images"][shared_images:]
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
        entry["fingerprint"] = _fingerprint(key, rater)


def _fingerprint(key: dict, rater: str) -> str:
    """Sixteen hexadecimal digits of what the rater sees."""
    content = json.dumps([rater, blinded_items(key, rater)[0]])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


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
    """The key of an export. Raises HumanError when the file is something else, or was changed since."""
    key = _read_object(path, KEY_FORMAT, "key.json of an export")
    try:
        whole = _is_whole(key)
    except (KeyError, TypeError, AttributeError, ValueError):
        whole = False
    if not whole:
        raise HumanError(f"{path}: the key is damaged or was edited, so answers cannot be counted by it. Take a copy.")
    return key


def _is_whole(key: dict) -> bool:
    """Whether items, pages and images fit together; a key that is not one may raise instead."""
    systems, images = set(key["systems"]), set(key["images"])
    texts = [*systems, *images, *(caption for item in key["items"].values() for caption in item["captions"])]
    items = [
        item["image_id"] in images
        and systems.issuperset(item["systems"])
        and (len(item["systems"]) == len(item["captions"]) == len(set(item["systems"])) == 2
             if item["kind"] == "preference"
             else item["kind"] == "rating" and bool(item["systems"]) and len(item["captions"]) == 1)
        for item in key["items"].values()
    ]  # fmt: skip
    identical = [
        entry["image_id"] in images and len(entry["systems"]) == len(systems.intersection(entry["systems"])) == 2
        for entry in key["identical"]
    ]
    pages = [
        _fingerprint(key, rater) == entry["fingerprint"]
        and all(left in key["items"][name]["systems"] for name, left in entry["left"].items())
        for rater, entry in key["raters"].items()
    ]
    once = len(images) == len(key["images"]) > 0
    return once and all(isinstance(text, str) for text in texts) and all([*items, *identical, *pages])


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
            changed += old is not None and given_in(old) != given_in(answer)
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
            f"{path}: rater {shown(document.get('rater'))} with fingerprint"
            f" {shown(document.get('fingerprint'))} belongs to"
            " another export than the key. Give the key.json that was written together with that page."
        ]
    if not isinstance(document.get("answers"), dict):
        return [f'{path}: "answers" must be an object, but is {shown(document.get("answers"))}']
    faults, asked = [], set(entry["order"])
    for name, answer in document["answers"].items():
        if name not in asked:
            faults.append(f"{path}: item {name} is not on the page of rater {document['rater']}")
            continue
        if not isinstance(answer, dict):
            faults.append(f"{path}: item {name}: an answer must be an object, but is {shown(answer)}")
            continue
        allowed = questions_of(key["items"][name]["kind"])
        for question, value in answer.items():
            if question in ("seconds", "changed"):
                if type(value) not in (int, float) or not 0 <= value < LATEST:
                    found = shown(value)
                    faults.append(f"{path}: item {name}: {question} must be a number from 0, but is {found}")
            elif question not in allowed:
                faults.append(f"{path}: item {name}: unknown question {question!r}, must be one of {list(allowed)}")
            elif type(value) not in (int, str) or value not in allowed[question]:
                values = ", ".join(map(str, allowed[question]))
                found = shown(value)
                faults.append(f"{path}: item {name}: {question} must be one of {values}, but is {found}")
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
            given = given_in(answers[rater].get(name, {}))
            open_questions = [q for q in questions_of(key["items"][name]["kind"]) if q not in given]
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


def preference_rows(key: dict, answers: dict[str, dict[str, dict]], prompt: str, pictures: dict[str, str]) -> list:
    """Rows for TRL's DPOTrainer with a vision model: the caption most raters preferred, and the other.

    A row needs more votes for one caption than for the other and than for a tie. The format is that of
    trl/trainer/dpo_trainer.py, DataCollatorForVisionPreference (1.16), which ignores the further columns:
    image_id, the two systems and the votes.

    Args:
        prompt: the user's text after the image.
        pictures: image id -> path.
    """
    rows = []
    for name, given in votes_of(key, answers).items():
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


def votes_of(key: dict, answers: dict[str, dict[str, dict]]) -> dict[str, dict[str, str]]:
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

    Of every pair of systems each is on the left in half of its items. The odd item left over for some pairs is an
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


def questions_of(kind: str) -> dict[str, tuple]:
    return {"choice": CHOICES} if kind == "preference" else QUESTIONS


def given_in(answer: dict) -> dict:
    """The answers proper, without times."""
    return {question: value for question, value in answer.items() if question not in ("seconds", "changed")}


def _assistant(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def _read_object(path: str | Path, expected: str, what: str) -> dict:
    try:
        document = parse_json(Path(path).read_bytes())
    except ValueError as error:
        raise HumanError(f"{path}: not JSON in UTF-8 ({error}); a {what} is needed") from error
    found = document.get("format") if isinstance(document, dict) else None
    if found != expected:
        raise HumanError(f"{path}: this is not a {what} (format {shown(found)}, not {expected!r})")
    return document


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
