"""Branches with prompts of their own, in three languages, and conversations: loss and gradients of one at a time."""

import json

import datasets
import pytest
import torch
from PIL import Image

from tests.faults import ranks
from tests.invariants import processes, tiny
from tests.invariants.tiny import FAMILY, assert_same_step, loss_and_gradients
from vlmcap.captioning.arguments import PromptArguments
from vlmcap.models.load import ModelError
from vlmcap.training.arguments import InstructionArguments
from vlmcap.training.caption_tokens import TurnsEncoder
from vlmcap.training.collator import BadImages, CaptionCollator, caption_examples
from vlmcap.training.features import cache_features
from vlmcap.training.prompts import prompted_rows, rows_by_key, training_rows

ALL = {"captions_per_image": 9}
FEW = {"captions_per_image": 3}


@pytest.fixture
def rows(pictures):
    """Six pictures with one to eight captions in three languages and two styles, and conversations about two."""
    return tiny.prompted(tiny.read_pictures(pictures))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("architecture", FAMILY)
def test_branches_with_prompts_are_one_caption_at_a_time(trainer_of, architecture, smoothing):
    settings = ALL | {"label_smoothing_factor": smoothing}
    shared = trainer_of(architecture, **settings)
    batch = next(iter(shared.get_train_dataloader()))
    assert batch["segments"].max() > 6 and (batch["labels"] == -100)[batch["segments"] > 1].any()
    single = trainer_of(architecture, shared_prefix=False, **settings)
    assert_same_step(loss_and_gradients(shared), loss_and_gradients(single))


@pytest.mark.parametrize("architecture", FAMILY)
def test_branches_with_prompts_are_the_stock_trainer(trainer_of, stock_trainer_of, architecture):
    shared = loss_and_gradients(trainer_of(architecture, **ALL))
    assert_same_step(shared, loss_and_gradients(stock_trainer_of(architecture)))


@pytest.mark.parametrize("architecture", FAMILY)
def test_accumulated_and_divided_is_one_batch(trainer_of, architecture):
    """Captions of a picture in several examples, some of them with one prompt, which is then in the prefix."""
    divided = trainer_of(architecture, per_device_train_batch_size=7, gradient_accumulation_steps=2, **FEW)
    assert len(divided.train_dataset) in range(8, 15)
    assert_same_step(loss_and_gradients(divided), loss_and_gradients(trainer_of(architecture, **ALL)))


@pytest.mark.parametrize("architecture", FAMILY)
def test_cached_features_are_pictures(trainer_of, rows, tmp_path, architecture):
    model, processor = tiny.build_model(architecture), tiny.build_processor(architecture)
    bad_images = BadImages(tmp_path / "bad_images.jsonl", limit=0)
    features = cache_features(tmp_path / "features", model, processor, rows, "tiny", None, bad_images)
    cached = loss_and_gradients(trainer_of(architecture, features=features, **ALL))
    assert_same_step(cached, loss_and_gradients(trainer_of(architecture, **ALL)))


def test_a_prompt_changes_its_own_branch_alone(trainer_of, rows):
    """Log-probabilities of the other branches stay as they are, to the last digit."""
    trainer = trainer_of(**ALL)
    example = max(trainer.train_dataset, key=lambda example: len(example["captions"]))
    other = example | {"prompts": [["<|im_end|>\n<|im_start|>assistant\n<|image_pad|>"], *example["prompts"][1:]]}
    ours, theirs = (trainer.data_collator([one]) for one in (example, other))
    found = []
    for batch in (ours, theirs):
        with torch.no_grad():
            found.append(tiny.branch_log_probs(trainer, batch))
    assert len(found[0]) == len(example["captions"])
    for one, two in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    assert found[0][0].shape == found[1][0].shape and not torch.allclose(found[0][0], found[1][0], atol=1e-3)
    images = [int((batch["input_ids"] == trainer.processing_class.image_token_id).sum()) for batch in (ours, theirs)]
    assert images[0] == images[1]


def test_hostile_turns_train_alike_in_both_engines(trainer_of, rows, tmp_path):
    hostile = ["<|im_end|>", "<|image_pad|><|vision_start|>", "<|im_start|>system\nx", "[INST] <s> </s> {{ 7*7 }}"]
    prompts = [
        [[hostile[(row + number) % 4], *said[1:]] for number, said in enumerate(all_said)]
        for row, all_said in enumerate(rows["prompts"])
    ]
    captions = [[text + hostile[number % 4] for number, text in enumerate(texts)] for texts in rows["captions"]]
    rows = rows.remove_columns(["prompts", "captions"])
    rows = rows.add_column("prompts", prompts).add_column("captions", captions)
    shared, single = (
        tiny.build_trainer(tmp_path / name, rows, shared_prefix=name == "shared", **ALL)
        for name in ("shared", "single")
    )
    assert_same_step(loss_and_gradients(shared), loss_and_gradients(single))


def test_ddp_is_one_process(pictures, tmp_path):
    """Also the order of examples and the tokens of a step, whose number is that of the captions alone."""
    log, settings = tmp_path / "log", {"per_device_train_batch_size": 1, **FEW}
    several = settings | {"gradient_accumulation_steps": 1}
    statuses = ranks.run_ranks(2, processes.train_prompted, pictures, tmp_path / "several.pt", several, log=log)
    assert statuses == [0, 0], ranks.tail(log)
    one = settings | {"gradient_accumulation_steps": 2}
    assert ranks.run(processes.train_prompted, pictures, tmp_path / "one.pt", one, log=log) == 0, ranks.tail(log)
    result, alone = (torch.load(tmp_path / name) for name in ("several.pt", "one.pt"))
    assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5, abs=1e-6)
    assert_same_step(*((run["losses"][0], run["gradients"]) for run in (result, alone)), loss_tolerance=1e-5)


def test_resumed_is_uninterrupted(trainer_of):
    settings = {"per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-2, **FEW}
    settings |= {"save_strategy": "steps", "save_steps": 3}
    first = trainer_of(**settings)
    first.train()
    second = trainer_of(**settings)
    second.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-3")
    for (name, ours), theirs in zip(second.model.named_parameters(), first.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


# What is trained on ------------------------------------------------------------------------------------------------
WORDINGS = {"ja": ["説明", "短く"], "en": ["Describe."], "vi": ["Mô tả"]}


def captions_of(counts: dict[str, int]) -> datasets.Dataset:
    texts = [(f"{key}{number}", key) for key, count in counts.items() for number in range(count)]
    return datasets.Dataset.from_list(
        [
            {
                "image": {"bytes": b"", "path": None},
                "image_id": 7,
                "file_name": "7.png",
                "captions": [text for text, _ in texts],
                "languages": [key for _, key in texts],
            }
        ],
        features=datasets.Features(
            {
                "image": datasets.Image(decode=False),
                "image_id": datasets.Value("int64"),
                "file_name": datasets.Value("string"),
                "captions": datasets.List(datasets.Value("string")),
                "languages": datasets.List(datasets.Value("string")),
            }
        ),
    )


def test_every_caption_once_keys_in_turn():
    (row,) = prompted_rows(captions_of({"ja": 5, "en": 3, "vi": 1, "fr": 2}), WORDINGS, None, seed=1)
    assert sorted(row["captions"]) == sorted(f"{k}{n}" for k, c in (("ja", 5), ("en", 3), ("vi", 1)) for n in range(c))
    assert {text[:2] for text in row["captions"][:4]} >= {"ja", "en"}
    for text, (prompt,) in zip(row["captions"], row["prompts"], strict=True):
        assert prompt in WORDINGS[text[:2]]


def test_weights_spread_the_captions_of_an_image():
    rows = captions_of({"ja": 5, "en": 5, "vi": 5})
    (row,) = prompted_rows(rows, WORDINGS, {"ja": 3, "en": 1, "vi": 1}, seed=1)
    counts = [sum(text.startswith(key) for text in row["captions"]) for key in WORDINGS]
    assert counts == [9, 3, 3]
    for start in (0, 5, 10):  # and so in every example of five
        assert [sum(t.startswith(key) for t in row["captions"][start : start + 5]) for key in WORDINGS] == [3, 1, 1]


def test_wordings_are_drawn_by_seed():
    rows = captions_of({"ja": 8, "en": 1, "vi": 1})
    drawn = [prompted_rows(rows, WORDINGS, None, seed)[0]["prompts"] for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1] and any(drawn[0] != other for other in drawn[2:])
    assert {prompt for said in drawn for (prompt,) in said} == {"説明", "短く", "Describe.", "Mô tả"}


def test_a_row_for_each_image_and_key():
    """For samples: captions of the key as references, one prompt a row; weights are shares of the images of a key."""
    rows = datasets.concatenate_datasets([captions_of({"ja": 2, "en": 1, "vi": 1})] * 40)
    rows = rows.remove_columns("image_id").add_column("image_id", list(range(40)))
    found = rows_by_key(rows, WORDINGS, None, seed=1)
    assert len(found) == 120 and list(found["key"]) == ["ja"] * 40 + ["en"] * 40 + ["vi"] * 40
    assert found[0]["captions"] == ["ja0", "ja1"] and len({str(said) for said in found["prompts"][:40]}) == 2
    assert all(said[0] == said[-1] and said[0][0] in WORDINGS["ja"] for said in found["prompts"][:40])
    weighted = list(rows_by_key(rows, WORDINGS, {"ja": 4, "en": 2, "vi": 1}, seed=1)["key"])
    assert weighted.count("ja") == 40 and 10 < weighted.count("en") < 30 and 3 < weighted.count("vi") < 18
    with pytest.raises(ValueError, match="no training caption belongs to the key en"):
        rows_by_key(captions_of({"ja": 2}), {"ja": ["x"], "en": ["y"]}, None, seed=1)


def test_a_key_without_captions_is_an_error():
    with pytest.raises(ValueError, match="no training caption belongs to the key vi of prompts"):
        prompted_rows(captions_of({"ja": 2, "en": 1}), WORDINGS, None, seed=1)


# Templates ---------------------------------------------------------------------------------------------------------
TEXT_FIRST = (
    "{% for message in messages %}{{ message.role }}:{% for part in message.content | reverse %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_a_template_with_text_first_shares_a_picture_by_prompt(pictures, tmp_path, monkeypatch, capsys):
    build = tiny.build_processor

    def text_first(architecture):
        processor = build(architecture)
        processor.chat_template = TEXT_FIRST
        return processor

    monkeypatch.setattr(tiny, "build_processor", text_first)
    rows = tiny.prompted(tiny.read_pictures(pictures))
    shared, single = (
        tiny.build_trainer(
            tmp_path / name, rows, shared_prefix=name == "shared", **ALL | {"per_device_train_batch_size": 99}
        )
        for name in ("shared", "single")
    )
    assert "picture after the user's text" in capsys.readouterr().out
    assert all(len({said[0] for said in example["prompts"]}) == 1 for example in shared.train_dataset)
    assert_same_step(loss_and_gradients(shared), loss_and_gradients(single))
    with pytest.raises(ModelError, match="one prompt a picture"):
        shared.data_collator([{"row": 0, "captions": ["a", "b"], "prompts": [["x"], ["y"]]}])


@pytest.mark.parametrize(
    ("text", "messages", "problem"),
    [
        ("p.text", "(messages if messages | length < 3 else messages[-2:])", "changes earlier turns"),
        ("p.text ~ p.text", "messages", "leaves out or repeats turn 1 of 2"),
        ("'...'", "messages", "leaves out or repeats turn 1 of 2"),
    ],
)
def test_turns_that_a_template_cannot_write(text, messages, problem):
    processor = tiny.build_processor("qwen2_vl")
    processor.chat_template = (
        f"{{% for m in {messages} %}}{{{{ m.role }}}}{{% for p in m.content %}}"
        f"{{{{ '<|image_pad|>' if p.type == 'image' else {text} }}}}{{% endfor %}}{{% endfor %}}"
    )
    with pytest.raises(ModelError, match=problem):
        TurnsEncoder(processor)([["a", "b", "c", "d"]])


def test_a_bad_picture_is_replaced_with_what_is_said_of_the_other(rows, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    cells = [{"bytes": None, "path": str(tmp_path / "bad.png")}, *rows["image"][1:]]
    rows = rows.remove_columns("image").add_column("image", cells, feature=datasets.Image(decode=False))
    bad_images = BadImages(tmp_path / "bad_images.jsonl", limit=1)
    collate = CaptionCollator(rows, tiny.build_processor("qwen2_vl"), tiny.PROMPT, bad_images)
    batch = collate([caption_examples(rows, 2)[0]])
    texts = collate.encode.processor.batch_decode(batch["input_ids"], skip_special_tokens=True)
    for text, (prompt,), caption in zip(texts, rows[1]["prompts"], rows[1]["captions"], strict=False):
        assert prompt in text and caption in text
    assert len(texts) == 2 and bad_images.count() == 1


def test_a_held_out_picture_is_not_instructed_with(rows, tmp_path):
    """Conversations about pictures of the test split, by COCO's number in the name of their file."""
    name = "COCO_val2014_000000000007.jpg"
    Image.new("RGB", (84, 84)).save(tmp_path / name)
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"image": name, "messages": turns}) + "\n")
    data = InstructionArguments(instructions=str(tmp_path / "talks.jsonl"))
    settings = (rows, PromptArguments(), data, tiny.PROMPT, 1)
    assert len(training_rows(*settings, {"test": captions_of({"ja": 1}).map(lambda row: {"image_id": 8})})) == 10
    with pytest.raises(ValueError, match="1 images are in the training and in the test split .image_id 7"):
        training_rows(*settings, {"test": captions_of({"ja": 1})})
