"""The caption corpora: all facts of each in one entry of `CORPORA`. Imports nothing heavy, for command lines.

| source      | annotations                         | splits                                   | rules in     |
|-------------|-------------------------------------|------------------------------------------|--------------|
| stair       | COCO format, downloaded or given    | Karpathy's, of lists, or drawn           | `clean`      |
| yj          | COCO format, downloaded or given    | one held-out test split                  | `clean`      |
| coco        | COCO format, given                  | Karpathy's, of lists, or drawn           | `clean`      |
| uit_viic    | COCO format, three files or one     | of the file names, or a seeded hold-out  | `vietnamese` |
| food_titles | CSV of image names and titles       | 80/10/10, seeded                         | `titles`     |
| own         | many forms, see `own`               | sizes, seeded                            | by language  |
| multi       | those of several of the others      | each corpus keeps its own                | of each      |

How each is read and split is in `readers`, `own` and `multi`; what follows (photographs, cleaning, writing) is the
same for all, and in `publish`. recipes/README.md says how to add one.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

# Run records and tables say of every model what it has seen of these.
SEEN_CORPORA = ("STAIR", "YJ", "COCO")
# Forms of what captions are told apart by: a language, a style, and both as one key (`vlmcap.data.keys`).
LANGUAGE, STYLE = "[a-z]{2,3}", "[a-z0-9_-]+"
KEY = f"{LANGUAGE}(/{STYLE})?"


@dataclass(frozen=True)
class Archive:
    """A file of a repository on GitHub: address with a place for the commit, the commit, and git's id of the file."""

    url: str
    commit: str
    blob: str
    branch: str = "master"


@dataclass(frozen=True)
class Corpus:
    """The facts of a corpus.

    Attributes:
        title: its name on cards.
        language: of the captions, as the Hub writes it (ISO 639-1).
        style: of the captions, as `multi` names it; "" where nothing sets them apart.
        images, captions: sizes of the public release; 0 where there is none.
        license: of the captions, as the Hub writes it, where the annotation files state none.
        reader: "module:function" for pkgutil.resolve_name, called with PublishArguments; returns `readers.CorpusRows`.
        rules: "module:NAME" of the cleaning rules, a sequence of `clean.TextRule`.
        languages: language -> rules, of a corpus whose language is a setting (--language).
        tags: of its cards, beside image-captioning and NAME-captions.
        annotations: what --annotations must be; "" where the files can be downloaded (`archive`).
        archive: the official one.
        options: settings of PublishArguments that not all corpora have and this one takes.
        needs: those of them, or others, that it cannot do without, each with an example.
        max_tokens: longest caption in tokens; None: the lengths of the training captions set the limit.
        coco_folder: the one that has all of them, for annotation files that name none.
        coco_licenses: its files have COCO's licence numbers without the table that explains them.
        in_yj: column `in_yj` until somebody compares: True, False or None (unknown).
        seen: what a model trained on it has seen of SEEN_CORPORA: "train" (the captions) or "train images".
        lengths: whether its card has a table of caption lengths.
        word_cloud: whether its card shows the most frequent words.
        drawn_cards: cards of drawn scenes that have its form (`--card`).
        joins: the corpora that it can be made of (--corpora), for one that has no captions of its own.
    """

    title: str
    language: str
    images: int
    captions: int
    license: str
    reader: str
    rules: str
    style: str = ""
    languages: dict[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    annotations: str = ""
    archive: Archive | None = None
    options: tuple[str, ...] = ()
    needs: dict[str, str] = field(default_factory=dict)
    max_tokens: int | None = None
    coco_folder: str | None = None
    coco_licenses: bool = False
    in_yj: bool | None = None
    seen: dict[str, str] = field(default_factory=dict)
    lengths: bool = False
    word_cloud: bool = False
    drawn_cards: tuple[str, ...] = ()
    joins: tuple[str, ...] = ()


# Sizes and licences of the public releases: captions.stair.center; Miyazaki and Shimizu, ACL 2016; cocodataset.org,
# train and validation, the same in 2014 and 2017; Lam et al., ICCCI 2020, whose paper says 19,250 captions, six fewer
# than its files hold; Kaggle, Food Ingredients and Recipes Dataset with Images.
CORPORA = {
    "stair": Corpus(
        title="STAIR Captions v1.2",
        language="ja",
        images=123_287,
        captions=616_435,
        license="cc-by-4.0",
        reader="vlmcap.data.readers:read_stair",
        rules="vlmcap.data.clean:TEXT_RULES",
        style="plain",
        tags=("coco", "japanese"),
        archive=Archive(
            "https://github.com/STAIR-Lab-CIT/STAIR-captions/raw/{commit}/stair_captions_v1.2.tar.gz",
            "6ac656e65d80cbe2c914d93626a1d5454e35a5d6",
            "25aaad5f686580b6aaddabd0c741f60bb73c0f49",
        ),
        options=(
            "karpathy",
            "val_ids",
            "test_ids",
            "val_size",
            "test_size",
            "yj_annotations",
            "latest_archives",
        ),
        needs={"tokenizer": "Qwen/Qwen2-VL-2B-Instruct"},
        max_tokens=64,
        in_yj=False,
        seen={"STAIR": "train", "COCO": "train images"},
        drawn_cards=("scenes",),
    ),
    "yj": Corpus(
        title="YJ Captions 26k",
        language="ja",
        images=26_500,
        captions=131_730,
        license="cc-by-4.0",
        reader="vlmcap.data.readers:read_yj",
        rules="vlmcap.data.clean:TEXT_RULES",
        style="polite",
        tags=("coco", "japanese"),
        archive=Archive(
            "https://github.com/yahoojapan/YJCaptions/raw/{commit}/yjcaptions26k.zip",
            "2f2d6de87ce90b7ff1fd318efef17b1ce0e127db",
            "17d1fd8056e4ef43bc5e7a9420f950ee956573c9",
        ),
        options=("karpathy", "val_ids", "test_ids", "latest_archives"),
        needs={"tokenizer": "Qwen/Qwen2-VL-2B-Instruct"},
        max_tokens=64,
        coco_folder="train2014",
        in_yj=True,
        seen={"YJ": "train", "COCO": "train images"},
    ),
    "coco": Corpus(
        title="COCO Captions",
        language="en",
        images=123_287,
        captions=616_767,
        license="cc-by-4.0",
        reader="vlmcap.data.readers:read_coco",
        rules="vlmcap.data.clean:LATIN_RULES",
        tags=("coco", "english"),
        annotations="the files captions_train2014.json and captions_val2014.json, or those of 2017, which hold the "
        "same images and captions. This script does not download them",
        options=("karpathy", "val_ids", "test_ids", "val_size", "test_size", "yj_annotations"),
        seen={"COCO": "train"},
        lengths=True,
    ),
    "uit_viic": Corpus(
        title="UIT-ViIC",
        language="vi",
        images=3_850,
        captions=19_256,
        license="unknown",
        reader="vlmcap.data.readers:read_uit_viic",
        rules="vlmcap.data.vietnamese:TEXT_RULES",
        tags=("coco", "vietnamese"),
        annotations="the three files uitviic_captions_{train,val,test}2017.json, or the training file alone. This "
        "script does not download them",
        options=("holdout", "yj_annotations"),
        coco_licenses=True,
        seen={"COCO": "train images"},
        lengths=True,
        drawn_cards=("scenes_vi",),
    ),
    "food_titles": Corpus(
        title="Dish titles of Food Ingredients and Recipes with Images",
        language="en",
        images=13_501,
        captions=13_501,
        license="cc-by-sa-3.0",
        reader="vlmcap.data.readers:read_food_titles",
        rules="vlmcap.data.titles:TEXT_RULES",
        tags=("food", "english"),
        annotations="the CSV with the columns Image_Name and Title. This script does not download it",
        options=("holdout",),
        lengths=True,
        word_cloud=True,
        drawn_cards=("scene_titles",),
    ),
    "own": Corpus(
        title="Own captions",
        language="",
        images=0,
        captions=0,
        license="unknown",
        reader="vlmcap.data.own:read_own",
        rules="",
        languages={
            "ja": "vlmcap.data.clean:TEXT_RULES",
            "en": "vlmcap.data.clean:LATIN_RULES",
            "vi": "vlmcap.data.clean:LATIN_RULES",
            "none": "vlmcap.data.clean:OTHER_RULES",
        },
        annotations="a folder of pictures and captions, a .csv, .tsv, .jsonl or .json file, or the id of a dataset",
        options=("image_column", "caption_column", "language", "author", "val_size", "test_size"),
        needs={"language": "ja"},
        lengths=True,
    ),
    "multi": Corpus(
        title="COCO captions in several languages",
        language="",
        images=0,
        captions=0,
        license="other",
        reader="vlmcap.data.multi:read_multi",
        rules="",
        tags=("coco", "multilingual"),
        options=(
            "corpora",
            "stair_annotations",
            "yj_annotations",
            "coco_annotations",
            "uit_viic_annotations",
            "own_annotations",
            "own_key",
            "yj_split",
            "drop_held_out",
            "karpathy",
            "val_ids",
            "test_ids",
            "val_size",
            "test_size",
            "holdout",
            "image_column",
            "caption_column",
            "latest_archives",
        ),
        needs={"corpora": "stair coco", "tokenizer": "Qwen/Qwen2-VL-2B-Instruct"},
        max_tokens=64,
        seen={"COCO": "train images"},
        drawn_cards=("scenes_multi",),
        joins=("stair", "yj", "coco", "uit_viic", "own"),
    ),
}


def card_names() -> list[str]:
    """What a dataset's tag NAME-captions may name, and the template of its card, NAME_captions.md.j2."""
    return [name for corpus, facts in CORPORA.items() for name in (corpus, *facts.drawn_cards)]


def seen_of(corpora: Iterable[str | None]) -> dict[str, str]:
    """What a model trained on corpora has seen of SEEN_CORPORA, captions before images; names not here say nothing."""
    seen: dict[str, str] = {}
    for facts in (CORPORA[name] for name in corpora if name in CORPORA):
        seen |= {name: what for name, what in facts.seen.items() if seen.get(name) != "train"}
    return seen


def taken_by(option: str) -> list[str]:
    """The corpora that take a setting that not all have; [] for one that all have."""
    return [corpus for corpus, facts in CORPORA.items() if option in facts.options]
