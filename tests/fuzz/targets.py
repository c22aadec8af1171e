"""What is fuzzed: functions that take what others wrote, each with what must hold whatever they are given.

A reader may give rows or raise its module's own error, whose message names the file; nothing else. A check fails with
an AssertionError or with any exception that it does not expect.
"""

import csv
import html.parser
import io
import json
import math
import re
import shutil
import tarfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import yaml
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from PIL import Image
from safetensors.numpy import save

from tests.fuzz.strategies import json_files, jsonl_files, mutated, places, recoded, replaced, texts, yaml_files
from tests.reporting.documents import adapter_document, family_document
from vlmcap.arguments import parse
from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.captioning.baselines import BaselineError, read_prompts, read_table, table_text
from vlmcap.captioning.generate import read_words
from vlmcap.captioning.predictions import PredictionsError, read_done
from vlmcap.data import clean, titles, vietnamese
from vlmcap.data.arguments import PublishArguments
from vlmcap.data.errors import DataError
from vlmcap.data.images import BadImageError, open_image
from vlmcap.data.instructions import load_instructions
from vlmcap.data.publish import build
from vlmcap.data.sources import read_rows
from vlmcap.data.splits import read_ids, read_karpathy
from vlmcap.errors import UserError
from vlmcap.evaluation.audit_checks import form_faults, read_instances
from vlmcap.evaluation.audit_document import AuditError, audit_table, read_audit
from vlmcap.evaluation.caption_files import ScoreError, read_predictions, read_references
from vlmcap.evaluation.external import chrf, chrf_statistics
from vlmcap.evaluation.lexicon import Lexicon, LexiconError
from vlmcap.evaluation.metrics import caption_statistics, corpus_scores, document_frequencies
from vlmcap.evaluation.register import to_plain
from vlmcap.evaluation.scoring import SCORE_LABELS, ScoreOptions, quick_scores, read_idf, score, write_metrics
from vlmcap.evaluation.tokenise import TOKENIZERS, tokenise
from vlmcap.experiments.ablation import AblationError, cells, read_grid
from vlmcap.human.page import rater_page
from vlmcap.human.report import markdown, report
from vlmcap.human.study import ANSWERS_FORMAT, HumanError, blinded_items, draw, read_answers, read_key
from vlmcap.models.weights import ModelError, read_adapter
from vlmcap.reporting.cards import render_adapter_card, write_adapter_card
from vlmcap.reporting.gallery import write_sample_page
from vlmcap.strict_parsing import parse_json, parse_yaml

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Target:
    """`check(input, folder)` must hold for whatever `inputs` draws; it may write into the folder.

    `seeds`: valid files, for an input of bytes; the coverage-guided fuzzer begins with them.
    """

    name: str
    inputs: SearchStrategy
    check: Callable[[object, Path], None]
    seeds: tuple[bytes, ...] = ()


TARGETS: dict[str, Target] = {}


def target(name: str, inputs: SearchStrategy, seeds: tuple[bytes, ...] = ()) -> Callable:
    def add(check: Callable[[object, Path], None]) -> Callable:
        TARGETS[name] = Target(name, inputs, check, seeds)
        return check

    return add


def reader(name: str, file: str, inputs: SearchStrategy, error: type, read: Callable, *seeds: bytes) -> None:
    """A target that writes `file` and reads it."""

    def check(data: bytes, folder: Path) -> None:
        path = folder / file
        path.write_bytes(data)
        try:
            read(path)
        except error as refused:
            assert file in str(refused), f"the message does not name the file: {refused}"

    TARGETS[name] = Target(name, inputs, check, seeds)


def _bytes(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


# JSON and YAML -----------------------------------------------------------------------------------------------------
TREE = {"a": [1, 2.5, "x", None, True], "b": {"c": {"d": ["e"]}}}


@target("documents", st.one_of(json_files(TREE), yaml_files(TREE)), (_bytes(TREE), yaml.safe_dump(TREE).encode()))
def check_documents(data: bytes, folder: Path) -> None:
    for parsed in (parse_json, parse_yaml):
        try:
            value = parsed(data)
        except ValueError:
            continue
        repr(value).encode()  # no half of a surrogate pair, no depth that exhausts the stack
        if parsed is parse_json:
            assert parse_json(json.dumps(value, allow_nan=False)) == value


# Cleaning ----------------------------------------------------------------------------------------------------------
RULES = {"japanese": clean.TEXT_RULES, "vietnamese": vietnamese.TEXT_RULES, "titles": titles.TEXT_RULES}


def letters(text: str) -> str:
    """Letters and digits without marks, width and case; ー, which a dash becomes, is left out."""
    bare = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    return "".join(c for c in bare if unicodedata.category(c)[0] in "LN" and c not in "ー－")


def is_subsequence(part: str, whole: str) -> bool:
    rest = iter(whole)
    return all(character in rest for character in part)


def invents(language: str, before: str, after: str) -> bool:
    """Whether cleaning wrote a letter that was not there; what fixes typos and decodes entities may."""
    if language == "vietnamese" and vietnamese._TYPO.search(unicodedata.normalize("NFC", before)):
        return False
    if language == "titles" and re.search(r"&#?\w+;|[\x80-\x9f]", before):
        return False
    return not is_subsequence(letters(after), letters(before))


@target("cleaning", st.tuples(st.sampled_from(list(RULES)), texts(surrogates=True)))
def check_cleaning(given: tuple[str, str], folder: Path) -> None:
    language, text = given
    cleaned = clean.clean_text(text, RULES[language])
    cleaned.encode()
    assert clean.clean_text(cleaned, RULES[language]) == cleaned, f"not idempotent: {cleaned!r}"
    assert not invents(language, text, cleaned), f"invented: {cleaned!r}"
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Co", "Cf") for c in cleaned), f"control: {cleaned!r}"


@target("cleaning_rows", st.tuples(st.sampled_from(list(RULES)), st.lists(st.lists(texts(), max_size=4), max_size=4)))
def check_cleaning_rows(given: tuple[str, list[list[str]]], folder: Path) -> None:
    language, images = given
    rows = [
        {"image_id": i, "captions": captions, "caption_ids": [10 * i + j for j in range(len(captions))]}
        for i, captions in enumerate(images)
    ]
    cleaner = clean.CaptionCleaner(None, rules=RULES[language])
    cleaned = cleaner.clean(rows)
    found = cleaner.report()
    json.dumps(found)
    removed = sum(rule["count"] for rule in found["rules"] if rule["action"] == "removed")
    assert found["captions_in"] == sum(map(len, images)) and found["images_in"] == len(images)
    assert found["captions_out"] == sum(len(row["captions"]) for row in cleaned) == found["captions_in"] - removed
    assert found["images_out"] == len(cleaned) and all(row["captions"] for row in cleaned)
    for row in cleaned:
        assert len(row["captions"]) == len(row["caption_ids"]) == len(set(row["captions"]))
        sources = {10 * row["image_id"] + j: text for j, text in enumerate(images[row["image_id"]])}
        for caption_id, caption in zip(row["caption_ids"], row["captions"], strict=True):
            assert clean.clean_text(sources[caption_id], RULES[language]) == caption
    again = clean.CaptionCleaner(None, rules=RULES[language])
    assert again.clean(cleaned) == cleaned and not any(rule["count"] for rule in again.report()["rules"])


# Annotation files --------------------------------------------------------------------------------------------------
COCO = {
    "info": {"description": "captions", "license": "cc-by-4.0"},
    "licenses": [{"id": 1, "name": "by", "url": "http://x"}],
    "images": [
        {"id": 1, "license": 1, "file_name": "COCO_val2014_000000000001.jpg", "coco_url": ""},
        {"id": 2, "license": 1, "file_name": "b.jpg"},
    ],
    "annotations": [
        {"id": 10, "image_id": 1, "caption": "犬が走る"},
        {"id": 11, "image_id": 2, "caption": "猫"},
        {"id": 12, "image_id": 1, "caption": "白い犬"},
    ],
}


def archive(kind: str, members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, data in members:
                zipped.writestr(name, data)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as tarred:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tarred.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


ARCHIVES = tuple(archive(kind, [("a/val_captions.json", _bytes(COCO)), ("a/x.txt", b"x")]) for kind in ("zip", "tgz"))
COCO_FILES = st.one_of(json_files(COCO), json_files(COCO), mutated(*ARCHIVES))


def read_source(source: str, path: Path) -> None:
    rows, files = read_rows([path], source)
    assert sum(len(row["captions"]) for row in rows) == files[0].captions
    json.dumps([rows, files[0].description, files[0].license], ensure_ascii=False).encode()


for source in ("stair", "yj", "coco", "uit_viic"):
    read = partial(read_source, source)
    reader(f"annotations_{source}", "captions_val.json", COCO_FILES, DataError, read, _bytes(COCO), *ARCHIVES)

TALK = [
    {"role": "system", "content": "x"},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "何色？"}]},
    {"role": "assistant", "content": "赤です"},
]
INSTRUCTIONS = [{"messages": TALK, "image": "a.png", "image_id": 3}, {"messages": TALK[1:], "file_name": "b.png"}]


def read_instructions(path: Path) -> None:
    for row in load_instructions(str(path)):
        assert row["messages"][-1]["role"] == "assistant" and all(turn["content"] for turn in row["messages"])
        json.dumps([row["image_id"], row["file_name"], row["messages"]], ensure_ascii=False).encode()


reader("instructions", "rows.json", json_files(INSTRUCTIONS), DataError, read_instructions, _bytes(INSTRUCTIONS))
KARPATHY = {"images": [{"cocoid": 1, "split": "val"}, {"cocoid": 2, "split": "test"}, {"cocoid": 3, "split": "train"}]}
reader("karpathy", "dataset_coco.json", json_files(KARPATHY), DataError, read_karpathy, _bytes(KARPATHY))
IDS = b"184613\nval2014/COCO_val2014_000000403013.jpg 403013\n\n7\n"
reader("ids", "ids.txt", mutated(IDS) | st.binary(max_size=60), DataError, read_ids, IDS)


@st.composite
def csv_files(draw) -> bytes:
    """CSV of titles, with any texts in its cells."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator=draw(st.sampled_from(["\n", "\r\n", "\r"])))
    writer.writerow(draw(st.sampled_from([["", "Title", "Image_Name"], ["Image_Name", "Title"], ["Title"]])))
    for _ in range(draw(st.integers(0, 4))):
        writer.writerow(draw(st.lists(texts(), min_size=2, max_size=3)))
    return buffer.getvalue().encode(draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"])), "replace")


TITLES = b'id,Title,Image_Name\n0,"Mac, ""and"" cheese",mac\n1,Newton\'s soup,soup\n'


def read_titles(path: Path) -> None:
    rows, left_out, file = titles.read_titles(path, None)
    assert len(rows) + len(left_out) == file.images
    assert all(row["captions"] == [row["captions"][0].strip()] for row in rows)


reader("titles", "titles.csv", csv_files() | mutated(TITLES), DataError, read_titles, TITLES)


# One's own captions: a table, COCO's form or a text beside a picture, of two pictures that are there.
OWN_ROWS = (
    {"file_name": "a.png", "caption": "赤い丸", "image_id": "1"},
    {"file_name": "b.png", "caption": ["空", {"raw": "青い空"}], "image_id": "x"},
)
OWN_COCO = {
    "images": [{"id": 1, "file_name": "a.png"}, {"id": "x", "file_name": "b.png"}],
    "annotations": [{"image_id": 1, "caption": "赤い丸"}, {"image_id": "x", "caption": "空"}],
}
OWN_CSV = 'file_name,caption\na.png,赤い丸\nb.png,"空, 青い"\n'
OWN_TEXT = "赤い丸\n丸い形\n"


@st.composite
def own_tables(draw) -> bytes:
    """CSV with any texts in its cells, mostly of pictures that are there."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=draw(st.sampled_from(",;\t")))
    writer.writerow(
        draw(st.sampled_from([["file_name", "caption"], ["image", "text", "image_id"], ["image", "image"]]))
    )
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.sampled_from(["a.png", "b.png", "b.png", "./a.png", "..\\a.png", ""]) | texts())
        writer.writerow([name, *draw(st.lists(texts(), min_size=1, max_size=2))])
    encodings = ["utf-8", "utf-8-sig", "utf-16", "cp932"]
    return buffer.getvalue().encode(draw(st.sampled_from(encodings)), "replace")


OWN_FILES = {
    "rows.csv": own_tables() | mutated(OWN_CSV.encode()) | recoded(OWN_CSV),
    "rows.jsonl": jsonl_files(*OWN_ROWS),
    "rows.json": json_files(list(OWN_ROWS), OWN_COCO),
    "a.txt": st.one_of(texts().map(str.encode), mutated(OWN_TEXT.encode()), recoded(OWN_TEXT)),
    "metadata.jsonl": jsonl_files(*OWN_ROWS),
}
OWN_FILE = st.sampled_from(list(OWN_FILES)).flatmap(lambda name: st.tuples(st.just(name), OWN_FILES[name]))


@target("own", st.tuples(OWN_FILE, st.sampled_from(["ja", "en", "none"]), st.sampled_from([0, 0.5])))
def check_own(given: tuple, folder: Path) -> None:
    (name, data), language, share = given
    place = folder / "own"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for picture, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (2, 2), colour).save(place / picture)
    (place / name).write_bytes(data)
    annotations = place if name in ("a.txt", "metadata.jsonl") else place / name
    output_dir = folder / "own_built"
    args = PublishArguments("own", str(output_dir), annotations=[str(annotations)], language=language, overwrite=True)
    args.val_size, args.test_size = 0, share
    try:
        summary = build(args)
    except UserError as refused:
        assert len(str(refused)) < 5_000
        return
    rows = [
        row
        for split in summary["splits"]
        for row in pq.read_table(next(output_dir.glob(f"data/{split}-*"))).to_pylist()
    ]
    json.dumps(rows, ensure_ascii=False).encode()
    assert len({row["image_id"] for row in rows}) == len(rows) <= 2
    assert all(row["captions"] and all(map(str.strip, row["captions"])) for row in rows)
    assert {row["file_name"] for row in rows} <= {"a.png", "b.png"}
    assert summary["cleaning"]["captions_out"] == sum(len(row["captions"]) for row in rows)


# Predictions, references, the files beside them --------------------------------------------------------------------
LINES = ({"image_id": 1, "caption": "犬が走る"}, {"image_id": "2", "caption": "", "logprob": -1.5})
REFERENCES = ({"image_id": 1, "captions": ["犬が走る", "白い犬"]}, {"image_id": "2", "captions": ["猫"]})
JSONL = b"\n".join(map(_bytes, LINES))


def read_captions(path: Path) -> None:
    for image_id, caption in read_predictions(path).items():
        f"{image_id}{caption}".encode()


def read_refs(path: Path) -> None:
    for image_id, captions in read_references(path).items():
        "".join([image_id, *captions]).encode()


reader("predictions", "predictions.jsonl", jsonl_files(*LINES), ScoreError, read_captions, JSONL)
reader(
    "references", "refs.jsonl", jsonl_files(*REFERENCES), ScoreError, read_refs, b"\n".join(map(_bytes, REFERENCES))
)  # fmt: skip
COCO_CAPTIONS = {"images": [{"id": 1}], "annotations": [{"image_id": 1, "id": 2, "caption": "犬が走る"}]}
reader("coco_results", "results.json", json_files(list(LINES)), ScoreError, read_captions, _bytes(LINES))
reader("coco_captions", "captions.json", json_files(COCO_CAPTIONS), ScoreError, read_refs, _bytes(COCO_CAPTIONS))

IDF = {"tokenizer": "tok:none|norm:none|punct:keep|case:mixed", "images": 3, "ngrams": {"犬": 2, "犬 が": 3}}


def read_and_use_idf(path: Path) -> None:
    frequencies = read_idf(path, "none")
    value = caption_statistics([["犬", "が"]], [[["犬"], ["猫"]]], frequencies).cider_d[0]
    assert 0 <= value <= 10 + 1e-9


reader("idf", "idf.json", json_files(IDF), ScoreError, read_and_use_idf, _bytes(IDF))

ASKED = {"model": {"id": "a/b"}, "dataset": {"id": "c/d"}, "prompt": None, "decoding": {"num_beams": 3}}
RECORD = ASKED | {"seconds": 1.5, "versions": {"python": "3.11"}, "created": "2026-01-02T03:04:05+00:00"}


@target("run_record", json_files(RECORD), (_bytes(RECORD),))
def check_run_record(data: bytes, folder: Path) -> None:
    predictions = folder / "run.jsonl"
    predictions.write_bytes(_bytes({"image_id": 1, "caption": "犬"}))
    predictions.with_suffix(".run.json").write_bytes(data)
    options = ScoreOptions(resamples=0, meteor=False, register_normalised=False)
    try:
        written = write_metrics(predictions, {"1": ["犬が"]}, folder / "metrics.json", "characters", options=options)
    except ScoreError as refused:
        assert "run.run.json" in str(refused)
        return
    assert written["scores"]["bleu_1"] > 0
    assert parse_json((folder / "metrics.json").read_bytes())["scores"] == written["scores"]


@target("resume", jsonl_files(*LINES), (JSONL + b"\n",))
def check_resume(data: bytes, folder: Path) -> None:
    """What an earlier, killed run left: whole lines are kept, and every line is one image."""
    predictions = folder / "predictions.jsonl"
    predictions.write_bytes(data)
    predictions.with_suffix(".run.json").write_bytes(_bytes(RECORD))
    try:
        done, _ = read_done(predictions, ASKED)
    except PredictionsError as refused:
        assert "predictions.jsonl" in str(refused)
        return
    assert all(isinstance(line["caption"], str) for line in done.values())
    assert len(done) <= data.count(b"\n")


reader(
    "avoid_words",
    "words.txt",
    st.one_of(texts().map(str.encode), mutated("外国人\n黒人\n".encode())),
    PredictionsError,
    read_words,
)

AUDIT = {
    "counts": {"images": 2, "references": 4},
    "hallucination": {
        "objects_from": ["references"],
        "chair_s": {"rate": 0.5, "interval": [0.0, 1.0], "count": 1, "of": 2},
    },
    "persons": {"groups": {"gender": {}}},
    "form": {"empty": {"rate": None, "interval": None, "count": 0, "of": 0}},
    "flagged": {"1": ["empty"]},
    "settings": {"lexicon": {"name": "a", "sha256": "0" * 64}, "persons": {"name": "b", "sha256": "1" * 64}},
}


def read_and_show_audit(path: Path) -> None:
    audit = read_audit(path)
    audit_table({"a": audit, "b": audit}).encode()


reader("audit", "audit.json", json_files(AUDIT), AuditError, read_and_show_audit, _bytes(AUDIT))

INSTANCES = {
    "categories": [{"id": i, "name": name} for i, name in enumerate(Lexicon("scenes_ja").categories)],
    "images": [{"id": 1}, {"id": 2}],
    "annotations": [{"image_id": 1, "category_id": 0}, {"image_id": 2, "category_id": 1}],
}


def read_objects(path: Path) -> None:
    for found in read_instances([path], Lexicon("scenes_ja"), ["1", "2"]).values():
        assert found <= {category["name"] for category in INSTANCES["categories"]} or sorted(found)


def check_instances(data: bytes, folder: Path) -> None:
    (folder / "instances.json").write_bytes(data)
    try:
        read_objects(folder / "instances.json")
    except AuditError as refused:
        assert len(str(refused)) < 5_000


TARGETS["instances"] = Target("instances", json_files(INSTANCES), check_instances, (_bytes(INSTANCES),))

LEXICON = {
    "categories": {"dog": ["犬", "子犬"], "person": ["人", "-たち"]},
    "groups": {"g": ["dog"]},
    "none": ["人形"],
    "depictions": ["絵"],
}


def read_and_use_lexicon(path: Path) -> None:
    lexicon = Lexicon(path)
    for caption in ("犬と人形と子供たちの絵", "女性が走る"):
        assert all("/".join(mention.categories) for mention in lexicon.find(caption))
        assert lexicon.named(caption) <= set(lexicon.categories)
    assert all(set(members) <= set(lexicon.categories) for members in lexicon.groups.values())


LEXICON_FILE = yaml.safe_dump(LEXICON, allow_unicode=True).encode()
reader("lexicon", "lexicon.yaml", yaml_files(LEXICON), LexiconError, read_and_use_lexicon, LEXICON_FILE)

# Settings ----------------------------------------------------------------------------------------------------------
CONFIG = "recipes/configs/sft_qwen2vl_jp/demo.yaml"
GRID = {
    "recipe": str(REPOSITORY / "recipes/sft_qwen2vl_jp.py"),
    "config": str(REPOSITORY / CONFIG),
    "output_dir": "out",
    "launch": ["--cpu"],
    "settings": {"max_steps": 3},
    "vary": {"lora_r": [8, 64], "train_projector": [False]},
    "grid": {"seed": [1, 2]},
    "trained": "model",
    "scores": ["bleu_1"],
}


def read_and_spread_grid(path: Path) -> None:
    found = cells(read_grid(path))
    assert found and len({cell.folder for cell in found}) == len(found)
    assert all(Path(cell.folder).parts[-2] == "cells" and len(cell.folder.name.encode()) < 255 for cell in found)


def check_grid(data: bytes, folder: Path) -> None:
    (folder / "grid.yaml").write_bytes(data)
    try:
        read_and_spread_grid(folder / "grid.yaml")
    except AblationError as refused:
        assert len(str(refused)) < 5_000


TARGETS["grid"] = Target("grid", yaml_files(GRID), check_grid, (yaml.safe_dump(GRID).encode(),))

PROMPTS = {"prompts": {"short": "短く説明してください。", "long-1": "詳しく"}}
reader(
    "prompts", "prompts.yaml", yaml_files(PROMPTS, PROMPTS["prompts"]), BaselineError, read_prompts,
    yaml.safe_dump(PROMPTS).encode(),
)  # fmt: skip

TABLE = yaml.safe_load((REPOSITORY / "recipes/configs/baselines.yaml").read_text(encoding="utf-8"))
TABLE["models"] = {key: TABLE["models"][key] for key in list(TABLE["models"])[:3]}
reader(
    "baselines", "baselines.yaml", yaml_files(TABLE), BaselineError, lambda path: table_text(read_table(path)),
    yaml.safe_dump(TABLE, allow_unicode=True).encode(),
)  # fmt: skip

SETTINGS = {"prompt": "短く", "num_beams": 3, "japanese_only": True, "avoid_words": None, "resamples": 10, "idf": "x"}


@target("config", yaml_files(SETTINGS), (yaml.safe_dump(SETTINGS).encode(),))
def check_config(data: bytes, folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_bytes(data)
    try:
        made = parse("Manual.", GenerationArguments, ScoreOptions, command_line=["--config", str(path)])
    except SystemExit as refused:
        assert refused.code == 2 or "config.yaml" in str(refused), f"the message does not name the file: {refused}"
        return
    assert isinstance(made[0].num_beams, int) and isinstance(made[0].prompt, str | None)


# Ratings -----------------------------------------------------------------------------------------------------------
KEY = draw({"a": {"1": "犬", "2": "猫"}, "b": {"1": "白い犬", "2": "猫"}}, ["1", "2"], images=2, raters=2)
KEY |= {"dataset": {"id": "a/b"}, "prompt": "短く", "pictures": {"1": "images/1.png", "2": "images/2.png"}}


def answers_of(key: dict) -> dict:
    given = {
        name: {"choice": "left", "seconds": 2.5, "changed": 1.7e12}
        if key["items"][name]["kind"] == "preference"
        else {"fluency": 4, "adequacy": 5, "hallucination": "no", "seconds": 3}
        for name in key["raters"]["1"]["order"]
    }
    return {
        "format": ANSWERS_FORMAT,
        "rater": "1",
        "fingerprint": key["raters"]["1"]["fingerprint"],
        "session": "s",
        "answers": given,
    }


ANSWERS = answers_of(KEY)


def check_ratings(files: tuple[bytes, bytes], folder: Path) -> None:
    (folder / "key.json").write_bytes(files[0])
    (folder / "answers.json").write_bytes(files[1])
    try:
        key = read_key(folder / "key.json")
        answers, _ = read_answers([folder / "answers.json"], key)
    except HumanError as refused:
        assert "key.json" in str(refused) or "answers.json" in str(refused)
        return
    result = report(key, answers, resamples=20)
    parse_json(json.dumps(result, ensure_ascii=False).encode())
    markdown(result).encode()


WHOLE = st.just(_bytes(KEY)), st.just(_bytes(ANSWERS))
TARGETS["ratings"] = Target(
    "ratings",
    st.one_of(st.tuples(WHOLE[0], json_files(ANSWERS)), st.tuples(json_files(KEY), WHOLE[1])),
    check_ratings,
)

# Metrics -----------------------------------------------------------------------------------------------------------
WORDS = st.sampled_from("a b c 犬 が".split())
SENTENCES = st.lists(WORDS, max_size=7)
CORPORA = st.lists(st.tuples(SENTENCES, st.lists(SENTENCES, min_size=1, max_size=3)), min_size=1, max_size=5)


def ngrams(tokens: list[str], n: int) -> Counter:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def plain_bleu(corpus: list) -> list[float]:
    """Papineni et al. 2002, with the small constants of pycocoevalcap."""
    correct, guess, length, closest = [0.0] * 4, [0.0] * 4, 0, 0
    for hypothesis, references in corpus:
        length += len(hypothesis)
        closest += min((abs(len(ref) - len(hypothesis)), len(ref)) for ref in references)[1]
        for n in range(1, 5):
            most = Counter()
            for ref in references:
                most |= ngrams(ref, n)
            guess[n - 1] += max(0, len(hypothesis) - n + 1)
            correct[n - 1] += (ngrams(hypothesis, n) & most).total()
    ratio = (length + 1e-15) / (closest + 1e-9)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1
    precisions = [(c + 1e-15) / (g + 1e-9) for c, g in zip(correct, guess, strict=True)]
    return [math.prod(precisions[:n]) ** (1 / n) * penalty for n in range(1, 5)]


def plain_rouge(hypothesis: list[str], references: list[list[str]]) -> float:
    def common(a: list[str], b: list[str]) -> int:
        rows = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a, 1):
            for j, y in enumerate(b, 1):
                rows[i][j] = rows[i - 1][j - 1] + 1 if x == y else max(rows[i - 1][j], rows[i][j - 1])
        return rows[-1][-1]

    h = hypothesis or [""]
    precision = max(common(h, ref or [""]) / len(h) for ref in references)
    recall = max(common(h, ref or [""]) / len(ref or [""]) for ref in references)
    return (1 + 1.44) * precision * recall / (recall + 1.44 * precision) if precision else 0.0


def plain_cider(corpus: list) -> list[float]:
    """CIDEr-D of Vedantam et al. 2015."""
    documents = [{g for ref in references for n in range(1, 5) for g in ngrams(ref, n)} for _, references in corpus]
    frequency = Counter(gram for document in documents for gram in document)

    def weights(tokens: list[str], n: int) -> dict:
        return {g: c * math.log(len(corpus) / max(1, frequency[g])) for g, c in ngrams(tokens, n).items()}

    def norm(vector: dict) -> float:
        return math.sqrt(sum(value**2 for value in vector.values()))

    scores = []
    for hypothesis, references in corpus:
        total = 0.0
        for ref in references:
            for n in range(1, 5):
                h, r = weights(hypothesis, n), weights(ref, n)
                dot = sum(min(value, r.get(g, 0)) * r.get(g, 0) for g, value in h.items())
                norms = norm(h) * norm(r)
                similarity = dot / norms if norms else 0
                total += similarity * math.exp(-((len(hypothesis) - len(ref)) ** 2) / 72) / 4
        scores.append(10 * total / len(references))
    return scores


@target("metrics", st.tuples(CORPORA, st.randoms(use_true_random=False)))
def check_metrics(given: tuple, folder: Path) -> None:
    corpus, random = given
    hypotheses, references = zip(*corpus, strict=True)
    statistics = caption_statistics(hypotheses, references)
    scores = corpus_scores(statistics)
    np.testing.assert_allclose([scores[f"bleu_{n}"] for n in range(1, 5)], plain_bleu(corpus), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(statistics.rouge_l, [plain_rouge(*pair) for pair in corpus], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(statistics.cider_d, plain_cider(corpus), rtol=1e-9, atol=1e-9)
    assert all(math.isfinite(v) and -1e-9 <= v <= (10 if k == "cider_d" else 1) + 1e-6 for k, v in scores.items())
    shuffled = random.sample(corpus, len(corpus))
    shuffled = [(hypothesis, random.sample(refs, len(refs))) for hypothesis, refs in shuffled]
    again = corpus_scores(caption_statistics(*zip(*shuffled, strict=True)))
    np.testing.assert_allclose(list(again.values()), list(scores.values()), rtol=1e-9, atol=1e-9)
    fixed = caption_statistics(hypotheses, references, document_frequencies(references))
    np.testing.assert_allclose(fixed.cider_d, statistics.cider_d, rtol=1e-9, atol=1e-9)


def captioned(text: st.SearchStrategy, least: int) -> st.SearchStrategy:
    """Image -> caption and references."""
    references = st.lists(text, min_size=least, max_size=3)
    return st.dictionaries(texts().filter(bool), st.tuples(text, references), min_size=least, max_size=3)


CAPTIONS = captioned(texts(), 1) | captioned(texts(surrogates=True), 0)  # what is scored, and what is mostly refused


@target("scores", st.tuples(CAPTIONS, st.sampled_from(TOKENIZERS)))
def check_scores(given: tuple, folder: Path) -> None:
    captions, tokenizer = given
    predictions = {image_id: caption for image_id, (caption, _) in captions.items()}
    references = {image_id: refs for image_id, (_, refs) in captions.items()}
    try:
        document = score(predictions, references, tokenizer, ScoreOptions(resamples=10, meteor=False))
    except ScoreError as refused:
        assert len(str(refused)) < 5_000
        return
    assert set(document["scores"]) <= set(SCORE_LABELS)
    for name, value in document["scores"].items():
        low, high = document["intervals"][name]
        assert math.isfinite(value) and -1e-9 <= value <= (10 if name == "cider_d" else 1) + 1e-6
        assert math.isfinite(low) and low <= high + 1e-12
    parse_json(json.dumps(document, ensure_ascii=False).encode())
    quick = quick_scores(predictions, references, tokenizer)
    assert all(quick[name] == document["scores"][name] for name in quick)
    again = score(predictions, references, tokenizer, ScoreOptions(resamples=10, meteor=False))
    assert again == document


@target("tokenise", st.tuples(texts(), st.sampled_from(TOKENIZERS)))
def check_tokenise(given: tuple[str, str], folder: Path) -> None:
    text, tokenizer = given
    (tokens,) = tokenise([text], tokenizer)
    assert " ".join(tokens).split() == tokens
    assert all(token.split() == [token] for token in tokens)


@target("chrf", st.lists(st.tuples(texts(), st.lists(texts(), min_size=1, max_size=3)), min_size=1, max_size=3))
def check_chrf(corpus: list, folder: Path) -> None:
    hypotheses, references = zip(*corpus, strict=True)
    values = chrf(chrf_statistics(hypotheses, references))
    assert np.isfinite(values).all() and (values >= 0).all() and (values <= 1 + 1e-12).all()


@target("register", st.one_of(texts(), st.tuples(texts(), st.integers(0, 300)).map(lambda pair: pair[0] * pair[1])))
def check_register(text: str, folder: Path) -> None:
    plain = to_plain(text)
    assert to_plain(plain) == plain, f"not idempotent: {plain!r}"
    assert len(plain) <= len(text) + text.count("ん") + text.count("です") + text.count("で") + text.count("ま") + 4


@target("form", st.tuples(texts(), texts(), st.integers(0, 500)))
def check_form(given: tuple[str, str, int], folder: Path) -> None:
    caption, prompt, times = given
    assert form_faults(caption, prompt, 5, 64) <= set(
        "empty repetition truncated non_japanese copied_prompt special_tokens".split()
    )
    form_faults(caption * times, prompt)
    Lexicon("scenes_ja").find(caption)


# Cards and pages ---------------------------------------------------------------------------------------------------
DOCUMENTS = [adapter_document(), *(family_document(recipe) for recipe in ("sft_blip_vi", "sft_vit_llama_food"))]


def at(document: object, path: tuple) -> object:
    for key in path:
        document = document[key]
    return document


TEXT_PLACES = [[path for path in places(d) if isinstance(at(d, path), str)] for d in DOCUMENTS]
NEUTRAL = "neutral"


@st.composite
def hostile_metrics(draw) -> tuple[int, tuple, str]:
    """Which document, where in it, and what is there instead."""
    number = draw(st.integers(0, len(DOCUMENTS) - 1))
    return number, draw(st.sampled_from(TEXT_PLACES[number])), draw(texts())


def outline(card: str) -> list[int]:
    """Levels of the headings of a card, outside its code."""
    body, levels, fence = card.split("\n---\n", 1)[1], [], None
    for line in body.splitlines():
        found = re.match(r" {0,3}(`{3,}|~{3,})", line)
        if fence is None and found:
            fence = found[1]
        elif fence and re.fullmatch(rf" {{0,3}}{re.escape(fence[0])}{{{len(fence)},}}\s*", line):
            fence = None
        elif fence is None and re.match(r" {0,3}#{1,6}(\s|$)", line):
            levels.append(line.split()[0].count("#"))
    assert fence is None, "a code block is not closed"
    return levels


def metadata(card: str) -> object:
    assert card.startswith("---\n")
    return yaml.safe_load(card[4:].split("\n---\n", 1)[0])


def shape(value: object) -> object:
    """Keys and lengths of a metadata block."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    return [shape(inner) for inner in value] if isinstance(value, list) else type(value).__name__


@target("model_card", hostile_metrics())
def check_model_card(given: tuple[int, tuple, str], folder: Path) -> None:
    number, path, text = given
    try:
        card, neutral = (render_adapter_card(both_ways(DOCUMENTS[number], path, value)) for value in (text, NEUTRAL))
    except ValueError:
        return
    card.encode()
    found, expected = metadata(card), metadata(neutral)
    if path[-1] != "id" and path[-1] not in ("license", "recipe"):
        assert shape(found) == shape(expected), f"other metadata: {found}"
    assert set(found) - {"base_model", "base_model_relation", "datasets"} == set(expected) - {
        "base_model",
        "base_model_relation",
        "datasets",
    }
    assert outline(card) == outline(neutral), "other headings"


def both_ways(document: dict, path: tuple, value: object) -> dict:
    """The change made to the adapter's part and, where it has the same, to the base's: they must agree."""
    document = replaced(document, path, value)
    if path[0] not in ("base", "training"):
        try:
            if isinstance(at(document["base"], path), str) and path[0] in (
                "prompt",
                "dataset",
                "decoding",
                "signatures",
            ):
                document = replaced(document, ("base", *path), value)
        except (KeyError, IndexError):
            pass
    return document


@target("metrics_json", json_files(*DOCUMENTS), tuple(map(_bytes, DOCUMENTS)))
def check_metrics_json(data: bytes, folder: Path) -> None:
    """Whatever is in metrics.json: a card or a ValueError that names the file."""
    (folder / "metrics.json").write_bytes(data)
    try:
        write_adapter_card(folder)
    except ValueError as refused:
        assert "metrics.json" in str(refused) and isinstance(refused, UserError), f"the message is Python's: {refused}"


UIT = COCO | {"info": {"description": NEUTRAL, "license": "cc-by-4.0"}}
CARD_TEXTS = ("caption", "description", "license", "pretty_name", "repo_id", "coco_url", "license_name")


@target("dataset_card", st.tuples(st.sampled_from(CARD_TEXTS), texts()))
def check_dataset_card(given: tuple[str, str], folder: Path) -> None:
    cards = []
    for value in (given[1], NEUTRAL):
        texts_of = dict.fromkeys(CARD_TEXTS, NEUTRAL) | {given[0]: value}
        document = UIT | {
            "info": {"description": texts_of["description"], "license": texts_of["license"]},
            "licenses": [{"id": 1, "name": texts_of["license_name"], "url": ""}],
            "images": [{"id": i, "license": 1, "coco_url": texts_of["coco_url"]} for i in range(1, 21)],
            "annotations": [
                {"id": i, "image_id": i, "caption": f"{texts_of['caption']} mèo {i}"} for i in range(1, 21)
            ],
        }
        for image in document["images"]:
            image["file_name"] = f"{image['id']}.jpg"
        path = folder / "captions_train.json"
        path.write_bytes(json.dumps(document).encode())
        try:
            build(
                PublishArguments(
                    source="uit_viic",
                    output_dir=str(folder / "built"),
                    annotations=[str(path)],
                    pretty_name=texts_of["pretty_name"],
                    repo_id=texts_of["repo_id"],
                    overwrite=True,
                )
            )
        except DataError:
            return
        cards.append((folder / "built/README.md").read_text(encoding="utf-8"))
    assert outline(cards[0]) == outline(cards[1]), "other headings"
    found, expected = map(metadata, cards)
    assert found.keys() == expected.keys() and found["configs"][0].keys() == expected["configs"][0].keys()
    if given[0] == "pretty_name":
        assert found["pretty_name"] == given[1] or found["pretty_name"].split() == given[1].split() or not given[1]


class Tags(html.parser.HTMLParser):
    """Every start tag of a page with the names of its attributes, and what is loaded from elsewhere."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.addresses = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, tuple(name for name, _ in attributes)))
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "srcset", "data")]


PIXEL = Image.new("RGB", (2, 2))


@target("sample_page", st.tuples(texts(), st.lists(texts(), min_size=5, max_size=5)))
def check_sample_page(given: tuple, folder: Path) -> None:
    pages = []
    for strange in (True, False):
        words = [f"{number}{text if strange else ''}" for number, text in enumerate((given[0], *given[1]))]
        title, reference, base, adapter, image_id, label = words
        said = {"references": [reference], "base": base, "adapter": adapter}
        item = {"image": PIXEL, "image_id": image_id, "captions": {title: said}}
        tables = {title: [["", "base", "adapter"], [label, "0.1", "0.2"]]}
        pages.append(write_sample_page(folder / "page.html", title, [item], tables, title).read_text(encoding="utf-8"))
    assert Tags(pages[0]).tags == Tags(pages[1]).tags, "text became markup"
    assert all(address.startswith(("data:", "#")) for address in Tags(pages[0]).addresses)


@target("rater_page", st.lists(texts(), min_size=4, max_size=4))
def check_rater_page(given: list[str], folder: Path) -> None:
    pages = []
    for first, second, third, fourth in (given, ["犬", "猫", "鳥", "馬"]):
        captions = {"a": {"1": first, "2": second}, "b": {"1": f"{third}b", "2": f"{fourth}c"}}
        key = draw(captions, ["1", "2"], images=2, raters=1, ratings_per_image=0)
        if len(blinded_items(key, "1")[0]) < 2:
            return
        picture = {"uri": "data:image/png;base64,", "width": 2, "height": 2, "drawing": True}
        pages.append(Tags(rater_page(key, "1", {"1": picture, "2": picture})))
    assert pages[0].tags == pages[1].tags, "text became markup"


# Pictures and weights ----------------------------------------------------------------------------------------------
def pictures() -> tuple[bytes, ...]:
    encoded = []
    for mode, kind in (
        ("RGB", "JPEG"),
        ("RGBA", "PNG"),
        ("P", "GIF"),
        ("RGB", "WEBP"),
        ("I;16", "PNG"),
        ("CMYK", "JPEG"),
        ("L", "TIFF"),
    ):
        buffer = io.BytesIO()
        Image.new(mode, (7, 5)).save(buffer, kind)
        encoded.append(buffer.getvalue())
    return tuple(encoded)  # fmt: skip


PICTURES = pictures()


@target("pictures", mutated(*PICTURES) | st.binary(max_size=60), PICTURES)
def check_pictures(data: bytes, folder: Path) -> None:
    try:
        image = open_image({"image": {"bytes": data, "path": None}, "file_name": "a.jpg", "image_id": 1})
    except BadImageError as refused:
        assert refused.name == "a.jpg"
        return
    assert image.mode == "RGB" and image.width and image.height


ADAPTER = {
    "peft_type": "LORA",
    "base_model_name_or_path": "a/b",
    "r": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj"],
    "task_type": "CAUSAL_LM",
    "bias": "none",
    "modules_to_save": None,
}
TENSORS = save({"base_model.model.q_proj.lora_A.weight": np.zeros((2, 3), np.float32)})


@target(
    "adapter",
    st.one_of(st.tuples(json_files(ADAPTER), st.just(TENSORS)), st.tuples(st.just(_bytes(ADAPTER)), mutated(TENSORS))),
)
def check_adapter(files: tuple[bytes, bytes], folder: Path) -> None:
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "adapter/adapter_config.json").write_bytes(files[0])
    (folder / "adapter/adapter_model.safetensors").write_bytes(files[1])
    try:
        adapter = read_adapter(str(folder / "adapter"))
    except ModelError as refused:
        assert "adapter" in str(refused)
        return
    assert adapter.config.r >= 1 and all(isinstance(shape, tuple) for shape in adapter.tensors.values())  # fmt: skip
