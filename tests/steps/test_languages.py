"""A run with several prompts: what is captioned, scored, audited and written for each key."""

import datasets
import pytest

from vlmcap.captioning.arguments import GenerationArguments, PromptArguments
from vlmcap.data.errors import DataError
from vlmcap.data.images import load_captions
from vlmcap.evaluation.tasks import caption_tasks
from vlmcap.evaluation.tokenise import TokenizerError, tokenizer_of
from vlmcap.miniature.scenes import scenes
from vlmcap.steps.splits import load_splits
from vlmcap.training.arguments import SplitArguments

PROMPTS = {"ja/plain": "普通体で。", "ja/polite": ["丁寧に。", "丁寧体で。"], "en": "Describe this image."}
ALSO = {"vi": "Mô tả ảnh này."}


def write_dataset(folder) -> None:
    """Drawn scenes with captions of four kinds; Vietnamese ones of every third scene alone."""
    for split, count, seed in (("train", 6, 1), ("validation", 6, 2), ("test", 6, 3)):
        rows = []
        for number, scene in enumerate(scenes(count, seed=seed, held_out=split != "train")):
            name = f"{split}{number}.png"
            scene.draw().save(folder / name)
            kinds = [("ja", "plain", scene.japanese()), ("ja", "polite", scene.japanese(polite=True)[:2])]
            kinds += [("en", "", scene.english()[:3]), ("vi", "", scene.vietnamese()[: 2 * (number % 3 == 0)])]
            said = [(language, style, text) for language, style, texts in kinds for text in texts]
            languages, styles, captions = map(list, zip(*said, strict=True))
            rows.append({"image_id": seed * 100 + number, "file_name": name, "captions": captions})
            rows[-1] |= {"languages": languages, "styles": styles}
        (folder / "data/data").mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / f"data/data/{split}-00000-of-00001.parquet")
    (folder / "data/README.md").write_text("---\nlicense: cc0-1.0\n---\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("languages")
    write_dataset(folder)
    return folder


def tasks_of(folder, rows=None, **prompts):
    rows = rows or load_captions(str(folder / "data"), "test", str(folder))
    return caption_tasks(PromptArguments(**prompts), GenerationArguments(), "characters", rows, "data (test)")


def test_each_key_has_its_captions_prompt_and_tokenizer(folder):
    tasks = tasks_of(folder, prompts=PROMPTS, also_score=ALSO)
    assert [task.key for task in tasks] == ["ja/plain", "ja/polite", "en", "vi"]
    assert [task.args.prompt for task in tasks] == ["普通体で。", "丁寧に。", "Describe this image.", "Mô tả ảnh này."]
    assert [task.tokenizer for task in tasks] == ["characters", "characters", "english", "vietnamese"]
    assert [task.trained for task in tasks] == [True, True, True, False]
    assert [len(task.references) for task in tasks] == [6, 6, 6, 2] and tasks[3].image_ids == [300, 303]
    assert all(text.endswith(("る", "だ", "ている")) for text in tasks[0].references["300"])
    assert all("ます" in text or "です" in text for text in tasks[1].references["300"])
    assert [str(task.folder(folder).relative_to(folder)) for task in tasks] == [
        ".",
        "languages/ja-polite",
        "languages/en",
        "languages/vi",
    ]
    (alone,) = tasks_of(folder)
    assert alone.key is None and alone.tokenizer == "characters" and len(alone.references["300"]) == 12


def test_what_cannot_be_scored_is_refused(folder):
    with pytest.raises(DataError, match=r"data \(test\) has no caption of ja/alt"):
        tasks_of(folder, prompts={"ja/alt": "x"})
    with pytest.raises(TokenizerError, match="captions in 'de' cannot be scored: there are tokenizers for ja, en, vi"):
        tokenizer_of("de")


def test_splits_hold_what_is_asked_for(folder, tmp_path, capfd):
    """Training captions of trained keys alone, also where a key that is only scored is a style of a trained one."""
    arguments = SplitArguments(str(folder / "data"), image_dir=str(folder), max_test_images=2, max_validation_images=1)
    prompts = PromptArguments(prompts={"ja": "x", "vi": "y"}, also_score={"ja/polite": "z"})
    splits = load_splits(arguments, tmp_path, True, 0, prompts=prompts)
    said = [text for texts in splits.train["captions"] for text in texts]
    assert len(said) == 6 * 5 + 2 * 2 and not any("ます" in text or "red" in text for text in said)
    assert "Left out of train: 30 captions of no trained key, and 0 images without any other" in capfd.readouterr().out
    assert splits.test["image_id"][:] == [300, 301, 303], "two of each key"
    assert 1 <= len(splits.validation) <= 2
    known = set(caption_tasks(prompts, GenerationArguments(), "unidic-lite", splits.validation, "", True)[1].image_ids)
    assert len(known) == 1, "one with a Vietnamese caption"
