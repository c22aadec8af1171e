"""Training pictures that cannot be read, and what the reference engine is fed."""

import json
import shutil

import datasets
import pytest
import torch
from PIL import Image

from tests.training.runs import PROMPT
from vlmcap.data.errors import DataError
from vlmcap.data.images import load_captions
from vlmcap.models.load import chat_prompt, load_processor
from vlmcap.training.collator import BadImages, CaptionCollator, drop_missing


def test_unreadable_picture_is_replaced_listed_and_counted(folder, processor, tmp_path):
    copy = tmp_path / "images"
    copy.mkdir()
    for number in range(12):
        (copy / f"{number}.png").write_bytes((folder / f"{number}.png").read_bytes())
    (copy / "4.png").write_bytes((folder / "4.png").read_bytes()[:400])
    rows = load_captions(str(folder / "data"), "train", image_dir=str(copy))
    bad_images = BadImages(tmp_path / "bad.jsonl", limit=1)
    collate = CaptionCollator(rows, processor, PROMPT, bad_images)
    batch = collate([{"row": 4, "captions": ["これは学習されない"]}])
    neighbour = CaptionCollator(rows, processor, PROMPT, bad_images)([{"row": 5, "captions": rows[5]["captions"][:1]}])
    assert torch.equal(batch["pixel_values"], neighbour["pixel_values"])
    assert torch.equal(batch["input_ids"], neighbour["input_ids"])
    collate([{"row": 4, "captions": [""]}])
    assert bad_images.count() == 1
    entry = json.loads(bad_images.path.read_text().splitlines()[0])
    assert (entry["image_id"], entry["file_name"]) == (4, "4.png") and "truncated" in entry["reason"]
    (copy / "6.png").unlink()
    with pytest.raises(DataError, match="2 training pictures cannot be read, more than the 1 .* 6.png: no such file"):
        collate([{"row": 6, "captions": [""]}])


def test_a_strip_is_a_bad_picture_in_live_training_too(folder, processor, tmp_path):
    """The image processor refuses sides that differ more than 200 times; the feature cache leaves them out."""
    copy = tmp_path / "images"
    shutil.copytree(folder, copy)
    Image.new("RGB", (1000, 3)).save(copy / "4.png")
    rows = load_captions(str(folder / "data"), "train", image_dir=str(copy))
    bad_images = BadImages(tmp_path / "bad.jsonl", limit=1)
    batch = CaptionCollator(rows, processor, PROMPT, bad_images)([{"row": 4, "captions": ["犬"]}])
    assert len(batch["input_ids"]) == 1 and bad_images.count() == 1


def test_missing_files_are_dropped_and_listed_before_training(folder, tmp_path):
    copy = tmp_path / "images"
    copy.mkdir()
    for number in range(1, 12):
        (copy / f"{number}.png").write_bytes((folder / f"{number}.png").read_bytes())
    rows = load_captions(str(folder / "data"), "train", image_dir=str(copy))
    bad_images = BadImages(tmp_path / "bad.jsonl", limit=1)
    assert drop_missing(rows, bad_images)["image_id"][:] == list(range(1, 12))
    assert bad_images.count() == 1


def test_dataset_without_images_names_the_fix(folder, tmp_path):
    with pytest.raises(
        DataError, match="holds captions but no images. Name the folder of the pictures with --image_dir"
    ):
        load_captions(str(folder / "data"), "train")
    rows = datasets.load_dataset(str(folder / "data"), split="train")
    rows.add_column("coco_url", ["http://images.test/1.jpg"] * len(rows)).to_parquet(tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match=r"holds captions but no images.*fetch_images.py.*--image_dir"):
        load_captions(str(tmp_path), "train")


def test_loss_covers_the_caption_alone(rows, processor, tmp_path):
    collate = CaptionCollator(rows, processor, PROMPT, BadImages(tmp_path / "bad.jsonl", 0))
    batch = collate([{"row": 0, "captions": ["赤い丸がある", "青い四角が左にある"]}])
    trained = [
        processor.decode(ids[labels != -100]) for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    assert trained == ["赤い丸がある<|im_end|>\n", "青い四角が左にある<|im_end|>\n"]


def assert_same_prompt(rows, processor, folder):
    """Token for token: what training puts in front of the caption is what generation starts from."""
    collate = CaptionCollator(rows, processor, PROMPT, BadImages(folder / "bad.jsonl", 0))
    batch = collate([{"row": 0, "captions": ["犬"]}])
    trained = batch["input_ids"][0][batch["labels"][0] == -100]
    image = Image.open(rows[0]["image"]["path"]).convert("RGB")
    inputs = processor(images=[[image]], text=[chat_prompt(processor, PROMPT)], return_tensors="pt")
    assert torch.equal(trained, inputs["input_ids"][0])


def test_trained_and_generated_from_the_same_prompt(rows, processor, tmp_path):
    assert_same_prompt(rows, processor, tmp_path)


def test_trained_and_generated_from_the_same_prompt_with_the_real_template(rows, qwen2vl_dir, tmp_path):
    assert_same_prompt(rows, load_processor(str(qwen2vl_dir)), tmp_path)
