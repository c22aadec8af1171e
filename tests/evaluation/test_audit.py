"""The audit: lexicons on real captions, hallucination, persons, form, overlap, the review queue."""

import json

import datasets
import pytest

from vlmcap.captioning.arguments import FORM
from vlmcap.evaluation.audit import write_audit
from vlmcap.evaluation.audit_checks import form_faults, form_of
from vlmcap.evaluation.audit_document import AuditError, audit_rates, audit_table, read_audit, write_review_queue
from vlmcap.evaluation.caption_files import read_references
from vlmcap.evaluation.lexicon import Lexicon, LexiconError
from vlmcap.miniature.scenes import JAPANESE, scenes, write_instances

PROMPT = "この画像を日本語で短く説明してください。"


@pytest.fixture(scope="module")
def coco():
    return Lexicon("coco_ja")


@pytest.fixture(scope="module")
def persons():
    return Lexicon("persons_ja")


def write_predictions(folder, captions: dict, record: dict | None = None):
    folder.mkdir(exist_ok=True)
    path = folder / "predictions.jsonl"
    lines = [json.dumps({"image_id": i, "caption": c}, ensure_ascii=False) for i, c in captions.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if record:
        (folder / "predictions.run.json").write_text(json.dumps(record), encoding="utf-8")
    return path


def rate(document: dict, path: str) -> tuple[int, int]:
    found = audit_rates(document)[path]
    return found["count"], found["of"]


# Lexicons ----------------------------------------------------------------------------------------------------------
CAPTIONS = {
    "ホットドッグを食べている": ["hot dog"],
    "犬がホットケーキを見ている": ["dog"],
    "シマウマと馬がいる": ["zebra", "horse"],
    "しまうま、縞馬、シマウマ": ["zebra", "zebra", "zebra"],
    "電車と自転車と車": ["train", "bicycle", "car/bus/truck"],
    "消防車と機関車と軽トラックが並ぶ": ["truck", "train", "truck"],
    "車椅子と乳母車": ["chair"],
    "ボールを蹴る": ["sports ball/bowl"],
    "サッカーボールと白いボウル": ["sports ball", "bowl"],
    "腕時計をして時計台を見る": ["clock"],
    "テレビゲームとテレビ": ["tv"],
    "パソコンのマウスとキーボード": ["mouse", "keyboard"],
    "鼠色のマウスパッド": [],
    "オレンジの電車にオレンジがある": ["train", "orange"],
    "オレンジ色の花": [],
    "バナナが2本と本が一冊": ["banana", "book"],
    "犬の置物と熊のぬいぐるみ": ["teddy bear"],
    "猫の絵が描かれたカップ": ["cup"],
    "本のようなオブジェ": [],
    "流しで水を流している": ["sink"],
    "盲導犬と子犬": ["dog", "dog"],
    "二人の男性と警備員が立つ": ["person", "person"],
    "大人用の車いす": ["chair"],
    "ガラスのテーブルとグラス": ["dining table", "wine glass/cup/vase"],
    "バス停でバスを待つ人々": ["bus", "person"],
    "スキー場のスキーヤー": ["person"],
    "いすに座るくまとりんご": ["chair", "bear", "apple"],
    "トイレットペーパーとトイレ": ["toilet"],
    "花柄の服と風景": [],
}


@pytest.mark.parametrize(("caption", "expected"), CAPTIONS.items())
def test_things_are_found_by_their_words(coco, caption, expected):
    assert ["/".join(mention.categories) for mention in coco.find(caption)] == expected


def test_the_lexicon_has_the_80_categories_of_coco(coco):
    assert len(coco.categories) == 80 and {"person", "hair drier", "toothbrush", "potted plant"} <= {*coco.categories}
    assert coco.words() > 1000


def test_every_scene_s_caption_names_what_is_drawn():
    lexicon = Lexicon("scenes_ja")
    assert len(lexicon.categories) == 24
    for scene in scenes(150, seed=3, held_out=False):
        drawn = sorted(f"{thing.colour} {thing.shape}" for thing in (scene.first, scene.second))
        for caption in scene.japanese() + scene.japanese(polite=True):
            assert sorted(m.categories[0] for m in lexicon.find(caption)) == drawn


def test_words_about_persons(persons):
    expected = {
        "若い女性が立っている": {"female", "young"},
        "男の子とおじいさん": {"male", "child", "elderly"},
        "白人男性の選手": {"male", "ethnicity"},
        "男女が並ぶ": {"female", "male"},
        "車椅子の女性を押す看護師": {"female", "disability", "occupation"},
        "女性用の靴と母の日の花": set(),
        "人が子犬と歩く": set(),
        "彼女と彼氏": {"female", "male", "couple"},
    }
    assert {caption: persons.named(caption) for caption in expected} == expected


def test_lexicons_on_the_real_yj_captions(coco, persons, data_dir):
    """Nine captions in ten name a category, as they would: COCO's pictures were chosen for having one."""
    document = json.loads((data_dir / "yj_subset/yjcaptions_subset.json").read_text(encoding="utf-8"))
    captions = [annotation["caption"] for annotation in document["annotations"]][::10]
    found = [coco.find(caption) for caption in captions]
    assert 0.88 < sum(map(bool, found)) / len(found) < 0.95
    named = {category for mentions in found for mention in mentions for category in mention.categories}
    assert len(named) >= 78
    gendered = sum(bool(persons.named(caption) & {"female", "male"}) for caption in captions) / len(captions)
    assert 0.18 < gendered < 0.28
    faulty = [caption for caption in captions if form_faults(caption, PROMPT)]
    assert len(faulty) < 0.005 * len(captions)


def test_crossmodal_captions_have_few_faults_of_form(data_dir):
    lines = (data_dir / "xm3600_ja/references.jsonl").read_text(encoding="utf-8").splitlines()[::5]
    captions = [caption for line in lines for caption in json.loads(line)["captions"]]
    assert sum(bool(form_faults(caption, PROMPT)) for caption in captions) < 0.01 * len(captions)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("- a list", "`categories` is needed|key `categories`"),
        ("categories: {dog: 犬}", "categories: dog must be a list of words"),
        ("categories: {dog: [犬]}\nnone: [犬]", "犬 is a word of dog and of `none`"),
        ("categories: {dog: [犬]}\nnothing: [犬]", "unknown keys.*nothing"),
        ("categories: {dog: [犬", "not YAML"),
        ("categories: {1: [犬]}", "the category 1 must be a text"),
        ("categories: {'': [犬]}", "the category '' must be a text"),
        ("categories: {dog: [犬]}\ngroups: [dog]", "groups must be a mapping"),
        ("categories: {dog: [犬]}\ngroups: {g: [cat]}", "groups: 'g' must be a name with a list of categories"),
        ("categories: {dog: [犬]}\ngroups: {g: {dog: 1}}", "groups: 'g' must be a name with a list of categories"),
        ("categories: {dog: [犬]}\n3: [犬]", "unknown keys.*3"),
        ("categories: {dog: &a [*a]}", "not YAML .*alias"),
        ("categories: !!int ''", "not YAML"),
    ],
)
def test_a_malformed_lexicon_is_named(tmp_path, content, says):
    path = tmp_path / "mine.yaml"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(LexiconError, match=says):
        Lexicon(path)


def test_there_is_no_such_lexicon():
    with pytest.raises(LexiconError, match="coco_ja, persons_ja, scenes_ja"):
        Lexicon("coco_jp")


# Hallucination -----------------------------------------------------------------------------------------------------
def test_hallucination_by_references_and_instances(tmp_path):
    predictions = write_predictions(
        tmp_path,
        {1: "犬と猫がいる", 2: "男性がボールを投げている", 3: "赤い花", 4: "馬に乗る人", 5: "テーブルの上の皿"},
    )
    references = {"1": ["犬が寝ている", "子犬"], "2": ["人が球技をする"], "3": ["花"], "4": ["騎手と馬"], "5": ["皿"]}
    of_references = write_audit(predictions, references, tmp_path / "audit.json")["hallucination"]
    assert of_references["objects_from"] == ["references"]
    # 猫 of 1, ボール of 2 and テーブル of 5 are in no reference: 3 of 5 captions, 3 of 7 mentions.
    assert rate({"h": of_references}, "h.chair_s") == (3, 5) and rate({"h": of_references}, "h.chair_i") == (3, 7)
    assert rate({"h": of_references}, "h.coverage") == (4, 4)
    assert of_references["hallucinated_words"] == {"猫": 1, "ボール": 1, "テーブル": 1}
    assert of_references["per_image"]["2"]["hallucinated"] == ["ボール"]
    low, high = of_references["chair_s"]["interval"]
    assert low < of_references["chair_s"]["rate"] < high

    names = Lexicon("coco_ja").categories
    instances = {
        "images": [{"id": i} for i in range(1, 7)],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": [
            {"image_id": 2, "category_id": names.index("sports ball"), "iscrowd": 0},
            {"image_id": 5, "category_id": names.index("dining table"), "iscrowd": 0},
            {"image_id": 5, "category_id": names.index("cup"), "iscrowd": 1},
        ],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(instances))
    document = write_audit(predictions, references, tmp_path / "audit.json", instances=[path])
    both = document["hallucination"]
    assert both["objects_from"] == ["instances", "references"]
    assert rate({"h": both}, "h.chair_i") == (1, 7) and rate({"h": both}, "h.coverage") == (6, 7)
    assert both["categories"]["cat"] == {"mentions": 1, "hallucinated": 1}
    assert document["flagged"] == {"1": ["hallucination"], "2": ["gender_unsupported"]}
    alone = write_audit(predictions, None, tmp_path / "audit.json", instances=[path])["hallucination"]
    assert alone["objects_from"] == ["instances"] and rate({"h": alone}, "h.chair_i") == (5, 7)
    assert "hallucination" not in write_audit(predictions, None, tmp_path / "audit.json")
    assert json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))["settings"]["lexicon"]["sha256"]


def test_what_is_drawn_and_what_is_said_in_the_miniature(tmp_path):
    """Captions of scenes, a third of them with a thing of another colour: found, and nothing else."""
    drawn = list(scenes(60, seed=11, held_out=True))
    said = {}
    for number, scene in enumerate(drawn):
        other = next(s for s in drawn if {s.first, s.second}.isdisjoint({scene.first, scene.second}))
        told = scene._replace(second=other.first) if number % 3 == 0 else scene
        said[number] = told.japanese()[number % len(JAPANESE["horizontal"])]
    predictions = write_predictions(tmp_path, said)
    write_instances(tmp_path / "instances.json", [(n, f"{n}.png", scene) for n, scene in enumerate(drawn)])
    document = write_audit(
        predictions, None, tmp_path / "audit.json", lexicon="scenes_ja", instances=[tmp_path / "instances.json"]
    )
    assert rate(document, "hallucination.chair_s") == (20, 60) and rate(document, "hallucination.chair_i") == (20, 120)
    assert rate(document, "hallucination.coverage") == (100, 120)
    assert sorted(map(int, document["flagged"])) == list(range(0, 60, 3))


def test_annotations_that_are_none_are_refused(tmp_path):
    predictions = write_predictions(tmp_path, {1: "犬"})
    path = tmp_path / "instances_val2014.json"

    def audit(content):
        path.write_text(content)
        write_audit(predictions, None, tmp_path / "audit.json", instances=[path])

    with pytest.raises(AuditError, match="instances_val2014.json: not JSON.*cut off"):
        audit('{"images": [')
    with pytest.raises(AuditError, match="not COCO's instance annotations .*'categories'.*not captions_"):
        audit('{"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a dog"}]}')
    with pytest.raises(AuditError, match="not COCO's instance annotations .*7"):
        audit('{"images": [{"id": 1}], "categories": [], "annotations": [{"image_id": 1, "category_id": 7}]}')
    with pytest.raises(AuditError, match="categories of coco_ja.yaml are not annotated in it .person"):
        audit('{"images": [{"id": 1}], "categories": [{"id": 1, "name": "red circle"}], "annotations": []}')
    names = [{"id": i, "name": name} for i, name in enumerate(Lexicon("coco_ja").categories)]
    with pytest.raises(AuditError, match="1 images are in no instance annotations .1.: .*instances_val2014"):
        audit(json.dumps({"images": [{"id": 2}], "categories": names, "annotations": []}))
    with pytest.raises(AuditError, match="missing.json: the annotations cannot be read"):
        write_audit(predictions, None, tmp_path / "audit.json", instances=[tmp_path / "missing.json"])
    with pytest.raises(AuditError, match="1 predicted images have no references .1."):
        write_audit(predictions, {"2": ["犬"]}, tmp_path / "audit.json")


# Persons -----------------------------------------------------------------------------------------------------------
def test_gender_against_the_references(tmp_path):
    said = {1: "男性が滑る", 2: "女性が滑る", 3: "人が滑る", 4: "男性が滑る", 5: "犬", 6: "若い女性が滑る", 7: "男女"}
    references = {
        "1": ["女性が滑る", "人が滑る"],  # error
        "2": ["女性が滑る"],
        "3": ["女性が滑る", "人"],  # left out
        "4": ["人が滑る"],  # unsupported
        "5": ["犬"],
        "6": ["男性が滑る", "女性が滑る"],
        "7": ["男性"],
    }
    document = write_audit(write_predictions(tmp_path, said), references, tmp_path / "audit.json")
    gender = document["persons"]["gender"]
    assert rate(document, "persons.gender.error") == (1, 4)
    assert rate(document, "persons.gender.unsupported") == (1, 2)
    assert rate(document, "persons.gender.left_out") == (1, 4)
    assert gender["female_to_male"] == {"predictions": 1.0, "references": 2.0}
    assert gender["references_by_predictions"]["female"] == {"female": 1, "male": 1, "both": 0, "none": 1}
    assert rate(document, "persons.groups.gender.female.predictions") == (3, 7)
    assert rate(document, "persons.groups.gender.female.references") == (4, 10)
    assert rate(document, "persons.groups.age.young.unsupported") == (1, 1)
    flagged = {i: [r for r in reasons if r != "hallucination"] for i, reasons in document["flagged"].items()}
    assert {i: reasons for i, reasons in flagged.items() if reasons} == {
        "1": ["gender_mismatch"],
        "4": ["gender_unsupported"],
        "6": ["persons: age"],
    }
    assert "gender" not in write_audit(tmp_path / "predictions.jsonl", None, tmp_path / "audit.json")["persons"]


# Form --------------------------------------------------------------------------------------------------------------
FAULTS = {
    "": {"empty"},
    " 。、": {"empty"},
    "赤い丸が左に、青い星が右にある": set(),
    "机の上にりんごやバナナなど": set(),
    "男性が立っている様子。": set(),
    "猫がいますね": set(),
    "STOPと書かれた標識が立っている": set(),
    "白黒写真": set(),
    "男性がテーブルの": {"truncated"},
    "男性が道路を歩いて": {"truncated"},
    "赤い車、": {"truncated"},
    "「止まれ」と「": {"truncated"},
    "猫が\ufffd": {"truncated"},
    "a red circle on the left": {"non_japanese"},
    "一只猫坐在沙发上": {"non_japanese"},
    "両人在海上乗風破浪前進": {"non_japanese"},
    "車がある車がある車がある": {"repetition"},
    "白い皿の上に白い皿の上に白い皿の上に猫": {"repetition"},
    "ーーーーーーー猫": {"repetition"},
    "この画像を日本語で短く説明してください。": {"copied_prompt"},
    "はい、この画像を日本語で短く説明します": set(),
    "<|im_end|>猫がいる": {"special_tokens"},
    "assistant\n猫がいる": {"special_tokens"},
    "猫がいる</s>": {"special_tokens"},
}


@pytest.mark.parametrize(("caption", "faults"), FAULTS.items())
def test_faults_of_form(caption, faults):
    assert form_faults(caption, PROMPT) == faults


def test_captions_cut_at_max_new_tokens(tmp_path):
    predictions = write_predictions(
        tmp_path,
        {1: "猫がいる", 2: "とても長い説明の中で猫がいる"},
        {"prompt": PROMPT, "decoding": {"max_new_tokens": 10}},
    )
    document = write_audit(predictions, None, tmp_path / "audit.json", count_tokens=len)
    assert rate(document, "form.truncated") == (1, 2) and document["form"]["compared_with_max_new_tokens"]
    without = write_audit(predictions, None, tmp_path / "audit.json")
    assert rate(without, "form.truncated") == (0, 2) and not without["form"]["compared_with_max_new_tokens"]
    assert without["prompt"] == PROMPT and without["form"]["compared_with_prompt"]


# Overlap -----------------------------------------------------------------------------------------------------------
def test_overlap_of_training_and_test(tmp_path):
    def row(image_id, captions, picture: bytes):
        path = tmp_path / f"{image_id}.png"
        path.write_bytes(picture)
        return {"image_id": image_id, "captions": captions, "image": {"bytes": None, "path": str(path)}}

    train = [row(1, ["犬が走る。", "白い犬"], b"one"), row(2, ["猫が寝る"], b"two"), row(3, ["馬"], b"three")]
    train[2]["captions"].append("。")  # no word: nobody copies it
    test = [row(11, ["犬が 走る", "茶色い犬"], b"two"), row(12, ["鳥"], b"four"), row(13, ["羊"], b"five")]
    test[2]["image"]["path"] += ".missing"
    rows = [datasets.Dataset.from_list(r).cast_column("image", datasets.Image(decode=False)) for r in (train, test)]
    predictions = write_predictions(tmp_path, {11: "白い、犬", 12: "", 13: "羊"})
    references = {str(r["image_id"]): r["captions"] for r in test}
    document = write_audit(predictions, references, tmp_path / "audit.json", train_rows=rows[0], test_rows=rows[1])
    assert rate(document, "overlap.image_in_training") == (0, 3)
    assert rate(document, "overlap.picture_in_training") == (1, 2)
    assert rate(document, "overlap.training_caption") == (1, 3)
    assert rate(document, "overlap.references_in_training") == (1, 4)
    assert document["overlap"]["training_images"] == 3 and document["overlap"]["training_captions"] == 5
    assert document["flagged"]["11"] == ["picture_in_training", "training_caption"]
    assert "training_caption" not in document["flagged"]["12"]

    itself = write_audit(
        write_predictions(tmp_path, {1: "鹿", 2: "鹿"}),
        None,
        tmp_path / "a.json",
        train_rows=rows[0].remove_columns("image"),
    )
    assert rate(itself, "overlap.image_in_training") == (2, 2) and "picture_in_training" not in itself["overlap"]


# What is done with it ----------------------------------------------------------------------------------------------
def test_every_caption_is_released_or_held_back(tmp_path):
    said = {1: "犬がいる", 2: "a dog", 3: "猫がいる", 4: "猫がいる猫がいる猫がいる"}
    predictions = write_predictions(tmp_path, said)
    audit = write_audit(predictions, {str(i): ["犬"] for i in said}, tmp_path / "audit.json")

    def queue(**more):
        counts = write_review_queue(predictions, audit, tmp_path / "queue", **more)
        files = [(tmp_path / f"queue/{name}.jsonl").read_text(encoding="utf-8") for name in ("released", "held_back")]
        released, held = ([json.loads(line) for line in text.splitlines()] for text in files)
        assert counts == (len(released), len(held))
        lines = sorted((line["image_id"], line["caption"]) for line in released + held)
        assert lines == sorted(said.items())
        return {line["image_id"]: line["reasons"] for line in held}

    assert queue() == {2: ["non_japanese"], 3: ["hallucination"], 4: ["hallucination", "repetition"]}
    assert queue(hold_back=["repetition"]) == {4: ["repetition"]}
    assert queue(hold_back=[]) == {}
    results = json.dumps([{"image_id": i, "caption": caption} for i, caption in said.items()])
    predictions.write_text(results, encoding="utf-8")  # COCO's format
    assert queue(hold_back=["repetition"]) == {4: ["repetition"]}
    with pytest.raises(AuditError, match="no audit gives the reason 'lies'; there are .*hallucination"):
        queue(hold_back=["lies"])


def test_the_script_audits_and_compares(run_script, tmp_path):
    references = tmp_path / "references.jsonl"
    references.write_text(
        "".join(json.dumps({"image_id": i, "captions": ["犬がいる", "白い犬"]}) + "\n" for i in range(4))
    )
    before = write_predictions(tmp_path / "before", {0: "a dog", 1: "犬", 2: "猫", 3: "犬がいる"})
    after = write_predictions(tmp_path / "after", {0: "犬", 1: "犬", 2: "猫", 3: "犬がいる"})
    write_audit(after, read_references(references), after.with_name("audit.json"))
    audits = [path.with_name("audit.json") for path in (before, after)]
    done = run_script(
        "audit_captions.py", "--predictions", before, "--references", references, "--output", audits[0],
        "--review_queue", tmp_path / "queue", "--hold_back", "non_japanese",
    )  # fmt: skip
    assert "hallucination.chair_s" in done.stdout and "25.0% [0.0, 75.0]" in done.stdout
    assert "3 captions released, 1 held back" in done.stdout
    rows = {"image_id": [0, 5, 5], "file_name": list("abb"), "captions": [["犬"], ["猫"], ["馬", " "]]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train/data/train-00000-of-00001.parquet")
    files = ("--predictions", before, "--references", references, "--output", audits[0])
    run_script("audit_captions.py", *files, "--train_dataset", tmp_path / "train")
    overlap = json.loads(audits[0].read_text(encoding="utf-8"))["overlap"]
    assert (overlap["training_images"], overlap["training_captions"]) == (2, 3)
    done = run_script("audit_captions.py", "--compare", *audits)
    (line,) = (line.split() for line in done.stdout.splitlines() if "form.non_japanese" in line)
    assert line[1] == "25.0%" and line[4] == "0.0%"


def test_audits_of_different_things_are_not_compared(tmp_path):
    predictions = write_predictions(tmp_path, {1: "犬", 2: "猫"})
    one = write_audit(predictions, {"1": ["犬"], "2": ["猫"]}, tmp_path / "one.json")
    other = write_audit(predictions, None, tmp_path / "other.json")
    assert read_audit(tmp_path / "one.json") == one
    with pytest.raises(AuditError, match="a and b differ in number of references"):
        audit_table({"a": one, "b": other})
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(AuditError, match="bad.json: the audit must be a JSON object"):
        read_audit(tmp_path / "bad.json")
    assert set(FORM) <= one["form"].keys()


# What others wrote -------------------------------------------------------------------------------------------------
def test_a_run_without_a_prompt_is_audited(tmp_path):
    """BLIP and the like take no prompt, and their run records say null."""
    predictions = write_predictions(tmp_path, {1: "犬がいる"}, {"prompt": None, "decoding": {"max_new_tokens": 9}})
    document = write_audit(predictions, None, tmp_path / "audit.json")
    assert not document["form"]["compared_with_prompt"] and document["prompt"] is None


@pytest.mark.parametrize("content", ['{"prompt": 3}', '{"decoding": []}', "[]", "{", "[" * 100_000, '{"a": NaN}'])
def test_what_is_not_a_run_record_is_named(tmp_path, content):
    predictions = write_predictions(tmp_path, {1: "犬がいる"})
    (tmp_path / "predictions.run.json").write_text(content)
    with pytest.raises(AuditError, match="predictions.run.json: "):
        write_audit(predictions, None, tmp_path / "audit.json")


def test_line_separators_of_unicode_end_no_line_of_predictions(tmp_path):
    captions = {1: "犬\u2028がいる", 2: "猫\u0085がいる", 3: ""}
    predictions = write_predictions(tmp_path, captions)
    audit = write_audit(predictions, None, tmp_path / "audit.json")
    assert write_review_queue(predictions, audit, tmp_path / "queue", ["empty"]) == (2, 1)
    lines = (tmp_path / "queue/released.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["caption"] for line in lines] == [captions[1], captions[2]]


@pytest.mark.parametrize(
    "change",
    [
        {"counts": {}},
        {"counts": {"images": "2", "references": 3}},
        {"settings": {"lexicon": None}},
        {"form": {"empty": {"rate": 0.5, "interval": None, "count": 1, "of": 2}}},
        {"form": {"empty": {"rate": 0.5, "interval": [0, 1, 2], "count": 1, "of": 2}}},
        {"base": []},
        {"hallucination": []},
        {"flagged": []},
    ],
)
def test_what_is_not_an_audit_is_named(tmp_path, change):
    path = tmp_path / "audit.json"
    write_audit(write_predictions(tmp_path, {1: "犬がいる"}), None, path)
    audit = json.loads(path.read_text(encoding="utf-8"))
    assert audit_table({"a": read_audit(path)})
    path.write_text(json.dumps(audit | change))
    with pytest.raises(AuditError, match="audit.json: not an audit"):
        read_audit(path)


def test_long_captions_are_searched_for_repetitions():
    """In time that grows with their length: the square of it would be half a minute here."""
    text = "".join(chr(0x3041 + i * i * 7919 % 80) for i in range(100_000))
    assert form_faults(text) == {"repetition"}
    assert form_faults("長い犬の話" * 80 * 3) >= {"repetition"}


@pytest.mark.parametrize(
    ("caption", "language", "faults"),
    [
        ("a dog on the grass", "en", set()),
        ("two dogs, one cat, and", "en", set()),  # no grammar of English is known
        ("a dog on the grass,", "en", {"truncated"}),
        ("a dog (on the", "en", {"truncated"}),
        ("a man on a bench and a man on a chair", "en", set()),
        ("a man sits on a bench and a man sits on a bench", "en", {"repetition"}),
        ("草の上に犬がいる", "en", {"non_latin"}),
        ("一 dog", "en", set()),
        ("Describe this image in one short sentence: a dog", "en", {"copied_prompt"}),
        ("in one short sentence, a dog", "en", set()),
        ("<|im_end|> a dog", "en", {"special_tokens"}),
        ("...", "en", {"empty"}),
        ("Một con chó trên bãi cỏ", "vi", set()),
        ("草の上に犬がいる", "vi", {"non_latin"}),
        ("a dog on the grass", "ja", {"non_japanese"}),
        ("собака на траве", "ru", set()),
    ],
)
def test_each_language_has_its_own_form(caption, language, faults):
    asked = "Describe this image in one short sentence."
    assert form_faults(caption, asked, language=language) == faults <= set(form_of(language))


def test_captions_of_other_languages_are_not_audited_for_japanese_words(tmp_path):
    """A rate of Japanese words would be 0%, as if nothing were made up."""
    predictions = write_predictions(tmp_path / "en", {1: "a dog", 2: "猫がいる", 3: "a man"})
    references = {str(number): ["a cat", "the cat"] for number in (1, 2, 3)}
    audit = write_audit(predictions, references, tmp_path / "en/audit.json", language="en")
    assert read_audit(tmp_path / "en/audit.json") == audit
    assert "hallucination" not in audit and "persons" not in audit and "lexicon" not in audit["settings"]
    assert audit["flagged"] == {"2": ["non_latin"]} and audit["form"]["non_latin"]["count"] == 1
    assert "non_japanese" not in audit["form"] and audit["settings"]["language"] == "en"
    assert "form.non_latin" in audit_table({"en": audit})
    assert write_review_queue(predictions, audit, tmp_path / "queue", ["non_latin"]) == (2, 1)
    japanese = write_audit(predictions, references, tmp_path / "ja.json")
    assert "language" not in japanese["settings"] and japanese["form"]["non_japanese"]["count"] == 2
    with pytest.raises(AuditError, match="ja and en differ in language"):
        audit_table({"ja": japanese, "en": audit})
