"""The miniatures' world: drawn scenes of two coloured shapes; English, Japanese and Vietnamese captions; titles.

Everything is drawn and written from a seed, so no file is needed. A scene is two different shapes side by side or one
above the other. One combination in ten (colours, shapes and arrangement together) is held out: validation and test
scenes show only combinations that no training scene shows.
"""

import csv
import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

SIZE = 84  # pixels: 6 x 6 ViT patches of 14, which Qwen2-VL merges 2 x 2 to 9 image tokens

# colour -> (RGB, English, Japanese modifier, Vietnamese)
COLOURS = {
    "red": ((220, 50, 47), "red", "赤い", "đỏ"),
    "blue": ((38, 89, 200), "blue", "青い", "xanh dương"),
    "yellow": ((235, 200, 20), "yellow", "黄色い", "vàng"),
    "green": ((40, 150, 60), "green", "緑の", "xanh lá"),
    "purple": ((140, 60, 170), "purple", "紫の", "tím"),
    "black": ((30, 30, 30), "black", "黒い", "đen"),
}
SHAPES = {
    "circle": ("circle", "丸", "hình tròn"),
    "square": ("square", "四角", "hình vuông"),
    "triangle": ("triangle", "三角", "hình tam giác"),
    "star": ("star", "星", "ngôi sao"),
}

ENGLISH = {
    "horizontal": (
        "a {a} on the left and a {b} on the right",
        "a {a} to the left of a {b}",
        "a {b} to the right of a {a}",
        "there is a {a} on the left of a {b}",
        "a {a} and a {b} side by side",
    ),
    "vertical": (
        "a {a} at the top and a {b} at the bottom",
        "a {a} above a {b}",
        "a {b} below a {a}",
        "there is a {a} above a {b}",
        "a {a} and a {b} one above the other",
    ),
}
# Plain form without a final 。, as STAIR writes; each image has all five.
JAPANESE = {
    "horizontal": (
        "{a}が左に、{b}が右にある",
        "左に{a}、右に{b}が描かれている",
        "{b}の左に{a}がある",
        "{a}の右に{b}が置かれている",
        "{a}と{b}が横に並んでいる",
    ),
    "vertical": (
        "{a}が上に、{b}が下にある",
        "上に{a}、下に{b}が描かれている",
        "{b}の上に{a}がある",
        "{a}の下に{b}が置かれている",
        "{a}と{b}が縦に並んでいる",
    ),
}
# The same in polite form with 。, as YJ Captions writes.
JAPANESE_POLITE = {
    "horizontal": (
        "{a}が左に、{b}が右にあります。",
        "左に{a}、右に{b}が描かれています。",
        "{b}の左に{a}があります。",
        "{a}の右に{b}が置かれています。",
        "{a}と{b}が横に並んでいます。",
    ),
    "vertical": (
        "{a}が上に、{b}が下にあります。",
        "上に{a}、下に{b}が描かれています。",
        "{b}の上に{a}があります。",
        "{a}の下に{b}が置かれています。",
        "{a}と{b}が縦に並んでいます。",
    ),
}
FEW = (0, 4)  # the wordings that a few polite captions beside plain ones have
# Whole sentences with a final full stop, as UIT-ViIC writes.
VIETNAMESE = {
    "horizontal": (
        "{a} ở bên trái, {b} ở bên phải.",
        "bên trái là {a}, bên phải là {b}.",
        "{b} nằm bên phải {a}.",
        "có một {a} ở bên trái {b}.",
        "{a} và {b} nằm cạnh nhau.",
    ),
    "vertical": (
        "{a} ở phía trên, {b} ở phía dưới.",
        "phía trên là {a}, phía dưới là {b}.",
        "{b} nằm dưới {a}.",
        "có một {a} ở phía trên {b}.",
        "{a} và {b} xếp theo chiều dọc.",
    ),
}
# Title Case, as dishes are named; one an image.
TITLE = {"horizontal": "{a} with {b}", "vertical": "{a} over {b}"}


class Thing(NamedTuple):
    colour: str
    shape: str


class Place(NamedTuple):
    """Where a thing is drawn, in shares of the picture's side: its middle, its radius; `shade` darkens its colour."""

    x: float
    y: float
    radius: float
    shade: float


class Scene(NamedTuple):
    """`first` is left of (horizontal) or above (vertical) `second`; `seed` fixes the drawing."""

    first: Thing
    second: Thing
    arrangement: str
    seed: int

    def held_out(self) -> bool:
        """Whether this combination of things and arrangement is kept for validation and test."""
        key = f"{self.first}|{self.second}|{self.arrangement}"
        return hashlib.sha256(key.encode()).digest()[0] % 10 == 0

    def english(self) -> list[str]:
        a, b = (f"{COLOURS[t.colour][1]} {SHAPES[t.shape][0]}" for t in (self.first, self.second))
        return [template.format(a=a, b=b) for template in ENGLISH[self.arrangement]]

    def japanese(self, polite: bool = False) -> list[str]:
        """Five captions in plain form, or two in polite form."""
        if polite:
            return [self.polite_japanese()[place] for place in FEW]
        return self._japanese(JAPANESE)

    def polite_japanese(self) -> list[str]:
        """The five captions of `japanese` in polite form, in the same order."""
        return self._japanese(JAPANESE_POLITE)

    def _japanese(self, templates: dict[str, tuple[str, ...]]) -> list[str]:
        a, b = (COLOURS[t.colour][2] + SHAPES[t.shape][1] for t in (self.first, self.second))
        return [template.format(a=a, b=b) for template in templates[self.arrangement]]

    def false_japanese(self, rng: random.Random) -> tuple[str, str, str]:
        """A caption, the same with one mistake, and what is mistaken: a shape, or the order of the things. These are
        the mistakes that the adapter of `make demo` makes itself; it hardly confuses colours or arrangements."""
        place = rng.randrange(len(JAPANESE[self.arrangement]))
        # The last wording is as true of things the other way round.
        kind = "shape" if place == 4 else rng.choice(("shape", "order"))
        if kind == "order":
            first, second = self.second, self.first
        else:
            things = [self.first, self.second]
            side = rng.randrange(2)
            colour, shape = things[side]
            things[side] = Thing(colour, rng.choice([other for other in SHAPES if other != shape]))
            first, second = things
        other = Scene(first, second, self.arrangement, self.seed)
        return self.japanese()[place], other.japanese()[place], kind

    def vietnamese(self) -> list[str]:
        a, b = (f"{SHAPES[t.shape][2]} màu {COLOURS[t.colour][3]}" for t in (self.first, self.second))
        sentences = [template.format(a=a, b=b) for template in VIETNAMESE[self.arrangement]]
        return [sentence[0].upper() + sentence[1:] for sentence in sentences]

    def title(self) -> str:
        """One English title, as a dish is named: "Red Circle with Blue Star", "Red Circle over Blue Star"."""
        a, b = (f"{COLOURS[t.colour][1]} {SHAPES[t.shape][0]}".title() for t in (self.first, self.second))
        return TITLE[self.arrangement].format(a=a, b=b)

    def draw(self) -> Image.Image:
        """The scene as an 84 x 84 RGB picture: place, size, paper and brightness vary with the seed."""
        paper, places = self._layout()
        image = Image.new("RGB", (SIZE * 4, SIZE * 4), paper)
        pen = ImageDraw.Draw(image)
        for thing, place in zip((self.first, self.second), places, strict=True):
            fill = tuple(int(channel * place.shade) for channel in COLOURS[thing.colour][0])
            outline = _outline(thing.shape, *(v * SIZE * 4 for v in place[:3]))
            if thing.shape == "circle":
                pen.ellipse(outline, fill=fill)
            elif thing.shape == "square":
                pen.rectangle(outline, fill=fill)
            else:
                pen.polygon(outline, fill=fill)
        return image.resize((SIZE, SIZE), Image.Resampling.BOX)

    def boxes(self) -> list[list[float]]:
        """[x, y, width, height] in pixels of `first` and of `second`, as COCO annotates instances."""
        boxes = []
        for thing, place in zip((self.first, self.second), self._layout()[1], strict=True):
            xs, ys = zip(*_outline(thing.shape, *(v * SIZE for v in place[:3])), strict=True)
            boxes.append([round(v, 2) for v in (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))])
        return boxes

    def _layout(self) -> tuple[tuple[int, int, int], list[Place]]:
        """The paper's colour and where the things are on it, from the seed."""
        rng = random.Random(self.seed)
        paper = rng.randint(225, 255)
        colour = (paper, paper, paper - rng.randint(0, 12))
        places = []
        for start in (0.26, 0.74):
            along = start + rng.uniform(-0.02, 0.02)
            across = 0.5 + rng.uniform(-0.14, 0.14)
            x, y = (along, across) if self.arrangement == "horizontal" else (across, along)
            places.append(Place(x, y, rng.uniform(0.17, 0.205), rng.uniform(0.88, 1.0)))
        return colour, places


def _outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of a triangle or star; two opposite ones of the box around a circle or square."""
    if shape in ("circle", "square"):
        side = radius * (0.88 if shape == "square" else 1)
        return [(x - side, y - side), (x + side, y + side)]
    points = 3 if shape == "triangle" else 10
    radii = itertools.cycle([radius * 1.12] if shape == "triangle" else [radius * 1.15, radius * 0.48])
    corners = []
    for corner, length in zip(range(points), radii, strict=False):
        angle = 2 * math.pi * corner / points - math.pi / 2
        corners.append((x + length * math.cos(angle), y + length * math.sin(angle)))
    return corners


def scenes(count: int, seed: int, held_out: bool | None) -> Iterator[Scene]:
    """`count` random scenes: of the held-out combinations, of the others, or (None) of all. Seeded."""
    rng = random.Random(seed)
    things = [Thing(colour, shape) for colour in COLOURS for shape in SHAPES]
    while count:
        first, second = rng.sample(things, 2)
        scene = Scene(first, second, rng.choice(("horizontal", "vertical")), rng.getrandbits(32))
        if held_out is None or scene.held_out() == held_out:
            count -= 1
            yield scene


def write_scene_dataset(directory: Path, train: int, validation: int, test: int, seed: int = 0) -> None:
    """Writes a Japanese scene dataset as STAIR and YJ Captions come: pictures and COCO-format annotation files.

    `directory/images/*.png`, `stair_train.json`, `stair_val.json` (plain form, five captions an image),
    `yj.json` (polite form, two captions on a tenth of the training images), `val_ids.txt` and `test_ids.txt`; and
    `instances.json`, what is drawn where in all scenes, as COCO annotates instances;
    `preferences.jsonl` and `preferences_test.jsonl`, preferences of a true caption to a false one, of the training and
    of the test scenes.
    """
    numbered = _numbered_scenes(train, validation + test, seed)
    names = {n: f"COCO_{'train2014' if n <= train else 'val2014'}_{n:012d}.png" for n, _ in numbered}
    _draw(directory, numbered, names)

    def write(name: str, selected: list[tuple[int, Scene]], polite: bool = False) -> None:
        annotations = [
            {"id": number * 10 + place + 10_000_000 * polite, "image_id": number, "caption": text}
            for number, scene in selected
            for place, text in enumerate(scene.japanese(polite))
        ]
        _write_coco(directory / name, "Japanese", [(n, names[n]) for n, _ in selected], annotations)

    write("stair_train.json", numbered[:train])
    write("stair_val.json", numbered[train:])
    write("yj.json", numbered[: train // 10], polite=True)
    write_instances(directory / "instances.json", [(n, names[n], scene) for n, scene in numbered])
    _write_ids(directory, numbered[train:], validation)
    write_preferences(directory / "preferences.jsonl", numbered[:train], names, seed)
    write_preferences(directory / "preferences_test.jsonl", numbered[train + validation :], names, seed + 1)


def write_language_scenes(directory: Path, train: int, validation: int, test: int, seed: int = 0) -> None:
    """Writes the scenes of `write_scene_dataset` with five captions each in plain and polite Japanese, English and
    Vietnamese, as the corpora come that `publish_datasets.py multi` joins.

    `directory/images/*.png`; `stair_train.json` and `stair_val.json` (plain), `yj.json` (polite, of all scenes),
    `captions_train2014.json` and `captions_val2014.json` (English), `uitviic_captions_{train,val,test}2017.json`;
    `val_ids.txt`, `test_ids.txt` and `instances.json`.
    """
    numbered = _numbered_scenes(train, validation + test, seed)
    names = {n: f"COCO_{'train2014' if n <= train else 'val2014'}_{n:012d}.png" for n, _ in numbered}
    _draw(directory, numbered, names)
    training, held_out = numbered[:train], numbered[train:]
    files = (
        ("stair_train", "Japanese", training, Scene.japanese),
        ("stair_val", "Japanese", held_out, Scene.japanese),
        ("yj", "polite Japanese", numbered, Scene.polite_japanese),
        ("captions_train2014", "English", training, Scene.english),
        ("captions_val2014", "English", held_out, Scene.english),
        ("uitviic_captions_train2017", "Vietnamese", training, Scene.vietnamese),
        ("uitviic_captions_val2017", "Vietnamese", held_out[:validation], Scene.vietnamese),
        ("uitviic_captions_test2017", "Vietnamese", held_out[validation:], Scene.vietnamese),
    )
    for name, language, selected, captions in files:
        annotations = [
            {"id": number * 10 + place, "image_id": number, "caption": text}
            for number, scene in selected
            for place, text in enumerate(captions(scene))
        ]
        _write_coco(directory / f"{name}.json", language, [(n, names[n]) for n, _ in selected], annotations)
    write_instances(directory / "instances.json", [(n, names[n], scene) for n, scene in numbered])
    _write_ids(directory, held_out, validation)


def write_vietnamese_scenes(directory: Path, train: int, validation: int, test: int, seed: int = 0) -> None:
    """Writes a Vietnamese scene dataset as UIT-ViIC comes: pictures and a COCO-format annotation file each split.

    `directory/images/*.png` and `uitviic_captions_{train,val,test}2017.json` with five captions an image.
    """
    numbered = _numbered_scenes(train, validation + test, seed)
    names = {number: f"{number:012d}.png" for number, _ in numbered}
    _draw(directory, numbered, names)
    ends = (0, train, train + validation, train + validation + test)
    for part, start, end in zip(("train", "val", "test"), ends[:-1], ends[1:], strict=True):
        selected = numbered[start:end]
        annotations = [
            {"id": number * 10 + place, "image_id": number, "caption": text}
            for number, scene in selected
            for place, text in enumerate(scene.vietnamese())
        ]
        path = directory / f"uitviic_captions_{part}2017.json"
        _write_coco(path, "Vietnamese", [(n, names[n]) for n, _ in selected], annotations)


def write_title_scenes(directory: Path, count: int, seed: int = 0) -> None:
    """Writes `count` titled scenes as the dish titles come: `directory/images/*.png` and `titles.csv`.

    A title names a combination. So a split that keeps equal titles together, as `corpora.read_food_titles` does, tests
    on combinations that no training scene shows.
    """
    numbered = list(enumerate(scenes(count, seed, held_out=None), start=1))
    names = {n: f"{scene.title().lower().replace(' ', '-')}-{n}.png" for n, scene in numbered}
    _draw(directory, numbered, names)
    with (directory / "titles.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["Image_Name", "Title"])
        writer.writerows([names[n].removesuffix(".png"), scene.title()] for n, scene in numbered)


def _write_ids(directory: Path, held_out: list[tuple[int, Scene]], validation: int) -> None:
    """Writes `val_ids.txt`, of the first of the held-out scenes, and `test_ids.txt`, of the others."""
    ids = [number for number, _ in held_out]
    (directory / "val_ids.txt").write_text("".join(f"{i}\n" for i in ids[:validation]))
    (directory / "test_ids.txt").write_text("".join(f"{i}\n" for i in ids[validation:]))


def _numbered_scenes(train: int, held_out: int, seed: int) -> list[tuple[int, Scene]]:
    """(image id, scene), first the training scenes, then those of held-out combinations."""
    drawn = [*scenes(train, seed, held_out=False), *scenes(held_out, seed + 1, held_out=True)]
    return list(enumerate(drawn, start=1))


def _draw(directory: Path, numbered: list[tuple[int, Scene]], names: dict[int, str]) -> None:
    (directory / "images").mkdir(parents=True, exist_ok=True)
    for number, scene in numbered:
        scene.draw().save(directory / "images" / names[number])


def _write_coco(path: Path, language: str, images: list[tuple[int, str]], annotations: list[dict]) -> None:
    document = {
        "info": {"description": f"Drawn scenes with {language} captions, generated by vlmcap"},
        "licenses": [{"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}],
        "images": [{"id": n, "file_name": name, "coco_url": "", "license": 1} for n, name in images],
        "annotations": annotations,
    }
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def write_preferences(path: Path, selected: list[tuple[int, Scene]], names: dict[int, str], seed: int) -> None:
    """Writes two preferences of each (image id, scene), a line each, in TRL's form: a caption to the same caption with
    one mistake. Pictures are named as seen from the folder of the file."""
    rng = random.Random(seed)
    lines = []
    for number, scene in selected:
        for _ in range(2):
            chosen, rejected, kind = scene.false_japanese(rng)
            line = {"chosen": chosen, "rejected": rejected, "images": [f"images/{names[number]}"]}
            lines.append(json.dumps(line | {"image_id": number, "mistake": kind}, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def write_instances(path: Path, selected: list[tuple[int, str, Scene]]) -> None:
    """Writes COCO-format instance annotations of (image id, file name, scene); a category is a colour and a shape."""
    things = [Thing(colour, shape) for colour in COLOURS for shape in SHAPES]
    numbers = {thing: number for number, thing in enumerate(things, start=1)}
    annotations = [
        {
            "id": image_id * 10 + place,
            "image_id": image_id,
            "category_id": numbers[thing],
            "bbox": box,
            "area": round(box[2] * box[3], 2),
            "iscrowd": 0,
        }
        for image_id, _, scene in selected
        for place, (thing, box) in enumerate(zip((scene.first, scene.second), scene.boxes(), strict=True))
    ]
    document = {
        "info": {"description": "What is drawn in drawn scenes, generated by vlmcap"},
        "images": [{"id": i, "file_name": name, "width": SIZE, "height": SIZE} for i, name, _ in selected],
        "categories": [
            {"id": number, "name": f"{thing.colour} {thing.shape}", "supercategory": thing.shape}
            for thing, number in numbers.items()
        ],
        "annotations": annotations,
    }
    path.write_text(json.dumps(document), encoding="utf-8")
