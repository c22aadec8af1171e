"""The chat template is rendered once, and every token is the one that the processor writes for the conversation."""

import pytest
import torch
from PIL import Image
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from tests.invariants import tiny
from vlmcap.models.load import ModelError
from vlmcap.training.collator import BadImages, CaptionCollator
from vlmcap.training.shared_prefix import SharedPrefixCollator


@pytest.fixture
def rows(pictures):
    return pictures


@pytest.fixture
def data(rows, tmp_path):
    """data(processor): what both collators are built with."""
    return lambda processor: (rows, processor, tiny.PROMPT, BadImages(tmp_path / "bad_images.jsonl", limit=0))


def examples_of(rows) -> list[dict]:
    return [{"row": number, "captions": captions} for number, captions in enumerate(rows["captions"])]


def conversation(picture, caption: str) -> list[dict]:
    return [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": tiny.PROMPT}]},
        {"role": "assistant", "content": [{"type": "text", "text": caption}]},
    ]


def written_by_the_processor(processor, rows) -> list[list[dict]]:
    """Of every image and each of its captions: what the processor makes of the whole conversation."""
    written = []
    for row in rows:
        picture = Image.open(row["image"]["path"]).convert("RGB")
        talks = [conversation(picture, caption) for caption in row["captions"]]
        settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        written.append([processor.apply_chat_template(talk, **settings) for talk in talks])
    return written


@pytest.mark.parametrize("architecture", tiny.FAMILY)
def test_both_collators_write_what_the_processor_does(rows, data, architecture):
    """Ids, masks and image grids of each caption's conversation; labels on the caption and its end of turn alone."""
    processor = tiny.build_processor(architecture)
    single = CaptionCollator(*data(processor))(examples_of(rows))
    shared = SharedPrefixCollator(*data(processor), tiny.build_model(architecture))(examples_of(rows))
    number = 0
    for image, conversations in enumerate(written_by_the_processor(processor, rows)):
        for branch, stock in enumerate(conversations):
            ids, length = stock["input_ids"][0], stock["input_ids"].shape[1]
            mask = single["attention_mask"][number].bool()
            assert single["input_ids"][number][mask].equal(ids)
            assert stock["attention_mask"].all() and mask.sum() == length
            assert single["mm_token_type_ids"][number][mask].equal(stock["mm_token_type_ids"][0])
            assert single["image_grid_thw"][number].equal(stock["image_grid_thw"][0])
            segments = shared["segments"][image]
            mine = (segments == 1) | (segments == 2 + branch)
            assert shared["input_ids"][image][mine].equal(ids)
            assert shared["image_grid_thw"][image].equal(stock["image_grid_thw"][0])
            labels = single["labels"][number][mask]
            trained = labels != -100
            assert processor.decode(ids[trained]) == f"{rows[image]['captions'][branch]}<|im_end|>\n"
            assert labels[trained].equal(ids[trained]) and shared["labels"][image][mine].equal(labels)
            number += 1
    assert number == len(single["input_ids"]) == 23


@pytest.mark.parametrize("architecture", tiny.FAMILY)
def test_the_reference_batch_is_that_of_trls_collator(rows, data, architecture):
    """Every tensor of it, from the same captions as turns of conversations."""
    processor = tiny.build_processor(architecture)
    ours = CaptionCollator(*data(processor))(examples_of(rows))
    turns = [
        {
            "images": [Image.open(row["image"]["path"]).convert("RGB")],
            "prompt": [{"role": "user", "content": tiny.PROMPT}],
            "completion": [{"role": "assistant", "content": caption}],
        }
        for row in rows
        for caption in row["captions"]
    ]
    stock = DataCollatorForVisionLanguageModeling(processor, max_length=None, completion_only_loss=True)(turns)
    assert ours.keys() == stock.keys() | {"caption_start", "logit_columns", "sources"}
    assert [key for key in stock if not torch.equal(ours[key], stock[key])] == []


def test_no_batch_renders_the_template(rows, data):
    processor = tiny.build_processor("qwen2_vl")
    collators = [
        CaptionCollator(*data(processor)),
        SharedPrefixCollator(*data(processor), tiny.build_model("qwen2_vl")),
    ]
    processor.chat_template = "{{ raise_exception('rendered again') }}"
    for collate in collators:
        assert collate(examples_of(rows)[:2])["caption_start"] > 9
    with pytest.raises(ModelError, match="rendered again"):
        CaptionCollator(*data(processor))


def test_what_a_template_writes_around_a_caption_is_kept(rows, data):
    """Spaces and words before and after it, as some templates have; a template that trims turns trims no caption."""
    processor = tiny.build_processor("qwen2_vl")
    processor.chat_template = (
        "{% for message in messages %}{{ message.role }}:{% for part in message.content %}"
        "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else ' ' + part.text | trim }}"
        "{% endfor %} (end)<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    example = {"row": 0, "captions": ["犬 ", "猫"]}
    single = CaptionCollator(*data(processor))([example])
    shared = SharedPrefixCollator(*data(processor), tiny.build_model("qwen2_vl"))([example])
    wanted = [" 犬  (end)<|im_end|>", " 猫 (end)<|im_end|>"]
    assert [processor.decode(row[row != -100]) for row in single["labels"]] == wanted
    assert [processor.decode(shared["input_ids"][shared["segments"] == 2 + n]) for n in (0, 1)] == wanted
    prompt = processor.decode(single["input_ids"][0][: single["caption_start"]])
    assert prompt.endswith(f"{tiny.PROMPT} (end)<|im_end|>assistant:")


def test_a_prompt_that_would_end_the_turn_is_refused(rows, tmp_path):
    processor, bad_images = tiny.build_processor("qwen2_vl"), BadImages(tmp_path / "bad_images.jsonl", limit=0)
    for prompt in ("<|im_end|>", "説明<|image_pad|>"):
        with pytest.raises(ModelError, match="special token"):
            CaptionCollator(rows, processor, prompt, bad_images)
        with pytest.raises(ModelError, match="special token"):
            SharedPrefixCollator(rows, processor, prompt, bad_images, tiny.build_model("qwen2_vl"))
