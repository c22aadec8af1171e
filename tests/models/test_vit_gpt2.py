"""ViT + GPT-2: captions come back sub-word for sub-word, what is frozen stays, and a saved model says the same."""

import csv
import json
import logging
import re

import datasets
import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    VisionTextDualEncoderProcessor,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)
from transformers.trainer_utils import align_special_tokens

from vlmcap.models.load import ModelError
from vlmcap.models.vit_gpt2 import VitGpt2Arguments, build_vit_gpt2, freeze, load_vit_gpt2, parameter_groups
from vlmcap.training.captioner import PictureCollator
from vlmcap.training.collator import BadImages, caption_examples

# One word to fourteen, sub-words that repeat inside a title and across titles, hyphens, accents, marks after spaces.
TITLES = [
    "Coconut Coco Cocoa",
    "Chocolate-Avocado Candies",
    "Crème Brûlée",
    "Coconut Cocoa Coco Cookies with Cocoa-Coconut Cream",
    "Soup",
    "Crème Fraîche and Jalapeño Soup",
    "Candied Chocolate Candies",
    "Mac 'n' Cheese , 's Best",
    "Banana-Banana Bread with Bananas, Brown Bread and a Bread-and-Butter Banana Pudding",
    "Jalapeño-Cheese Cheesecake (Cheese-Free)",
]
DEPTH = 3
NEW = ("crossattention", "ln_cross_attn", "enc_to_dec_proj")


def save_parts(folder):
    """A ViT and a GPT-2 of a few thousand weights as folders, the tokenizer learned from words that are no titles."""
    torch.manual_seed(0)
    vit = ViTConfig(
        hidden_size=48,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
    )
    ViTModel(vit).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"vocab_size": 290, "special_tokens": ["<|endoftext|>"]}
    trainer = trainers.BpeTrainer(**special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator(["Coco Cocoon Chocolates Candy Bread Cheese Bananas Crème"] * 2, trainer)
    bpe = json.loads(bpe.to_str())["model"]
    tokenizer = GPT2Tokenizer(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]])
    tokenizer.save_pretrained(folder / "gpt2")
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    gpt2 = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=DEPTH, n_head=4, n_positions=96, **ends)
    GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """For models this small a second thread costs more than it brings, and much more beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return save_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def arguments(parts):
    def arguments(**changes):
        names = {"encoder_name_or_path": str(parts / "vit"), "decoder_name_or_path": str(parts / "gpt2")}
        return VitGpt2Arguments(**names | changes)

    return arguments


def pictures(count):
    """Pictures that differ in colour and in where a bar is, 40 x 36 pixels."""
    images = []
    for i in range(count):
        image = Image.new("RGB", (40, 36), (25 * i, 255 - 25 * i, 120))
        image.paste((255, 255, 255), (4 * i, 0, 4 * i + 4, 36))
        images.append(image)
    return images


def make_batch(processor, images, titles, folder):
    """One batch of all of them, by the collator of the recipe."""
    rows = []
    for i, (image, title) in enumerate(zip(images, titles, strict=True)):
        image.save(folder / f"{i}.png")
        rows.append({"image": {"path": str(folder / f"{i}.png"), "bytes": None}, "image_id": i, "captions": [title]})
    rows = datasets.Dataset.from_list(rows)
    names = ("decoder_input_ids", "decoder_attention_mask")
    collator = PictureCollator(rows, processor, names, BadImages(folder / "bad.jsonl", 0))
    return collator(list(caption_examples(rows, 1)))


def fit(model, batch, steps):
    """Trains on one batch; returns the last loss."""
    labels = batch["labels"]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    optimizer = torch.optim.AdamW(parameter_groups(model, 3e-3, 3e-3, 0.0))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    model.train()
    for _ in range(steps):
        loss = F.cross_entropy(model(**inputs).logits.transpose(1, 2), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    return loss.item()


def generate(model, processor, images, num_beams, max_new_tokens=90):
    tokenizer = processor.tokenizer
    config = GenerationConfig(
        num_beams=num_beams,
        do_sample=False,
        max_new_tokens=max_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
    )
    pixel_values = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    return model.generate(pixel_values=pixel_values, generation_config=config)


@pytest.fixture(scope="module")
def overfitted(arguments, tmp_path_factory):
    """A model that knows ten pictures and their titles, its processor, and the pictures."""
    model, processor = build_vit_gpt2(arguments(freeze_embeddings=False), seed=1)
    images = pictures(len(TITLES))
    batch = make_batch(processor, images, TITLES, tmp_path_factory.mktemp("pictures"))
    assert fit(model, batch, steps=150) < 0.2
    return model, processor, images


@pytest.mark.parametrize("num_beams", [1, 3])
def test_titles_come_back_sub_word_for_sub_word(overfitted, num_beams):
    model, processor, images = overfitted
    tokens = [processor.tokenizer(title)["input_ids"] for title in TITLES]
    assert min(map(len, tokens)) < 6 and max(map(len, tokens)) > 40  # ragged, and words in several pieces
    ids = generate(model, processor, images, num_beams)
    end = processor.tokenizer.eos_token_id
    longest = max(map(len, tokens)) + 2  # start and end
    assert ids.shape == (len(TITLES), longest) and longest < 90  # none continued to max_new_tokens
    for row, caption in zip(ids.tolist(), tokens, strict=True):
        assert row == [end, *caption, end] + [end] * (longest - len(caption) - 2)
    assert processor.batch_decode(ids, skip_special_tokens=True) == TITLES


def test_labels_masked_by_the_pad_token_lose_the_end(arguments, tmp_path):
    """What the length-wise labels are for: pad is eos, so that `labels == pad` hides the end of every caption."""
    model, processor = build_vit_gpt2(arguments(freeze_embeddings=False), seed=1)
    images = pictures(len(TITLES))
    batch = make_batch(processor, images, TITLES, tmp_path)
    batch["labels"][batch["labels"] == processor.tokenizer.pad_token_id] = -100
    assert fit(model, batch, steps=150) < 0.2  # the loss shows nothing
    captions = processor.batch_decode(generate(model, processor, images, 1), skip_special_tokens=True)
    assert not set(captions) & set(TITLES)
    assert all(caption.startswith(title) for caption, title in zip(captions, TITLES, strict=True))


def test_a_loaded_model_says_the_same(overfitted, tmp_path):
    model, processor, images = overfitted
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, reloaded = load_vit_gpt2(str(tmp_path))
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), VisionTextDualEncoderProcessor)
    assert loaded.encoder.pooler is None and not loaded.training
    assert loaded.decoder.lm_head.weight is loaded.decoder.transformer.wte.weight
    before, after = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for num_beams in (1, 3):
        assert torch.equal(
            generate(loaded, reloaded, images, num_beams), generate(model, processor, images, num_beams)
        )
    captions = loaded.generate(
        reloaded.image_processor(images, return_tensors="pt")["pixel_values"], max_new_tokens=90
    )
    assert reloaded.batch_decode(captions, skip_special_tokens=True) == TITLES  # with the saved settings alone


def test_nothing_saved_names_a_folder_of_this_machine(overfitted, parts, tmp_path):
    model, processor, _ = overfitted
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for path in tmp_path.glob("*.json"):
        assert str(parts.parent) not in path.read_text(encoding="utf-8"), path.name
    assert model.config.encoder._name_or_path == "vit"


def test_training_and_generation_warn_of_nothing(overfitted, tmp_path, caplog):
    model, processor, images = overfitted
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    pixel_values = processor.image_processor(images[:2], return_tensors="pt")["pixel_values"]
    try:
        align_special_tokens(model, processor)  # what the Trainer does first
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        for writer in (model, load_vit_gpt2(str(tmp_path))[0]):
            for num_beams in (1, 3):
                generate(writer, processor, images[:2], num_beams)
            writer.generate(pixel_values, max_new_tokens=9)
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_parts_keep_their_weights_and_the_rest_is_seeded(parts, arguments):
    model, processor = build_vit_gpt2(arguments(), seed=5)
    again, _ = build_vit_gpt2(arguments(), seed=5)
    other, _ = build_vit_gpt2(arguments(), seed=6)
    sources = {f"encoder.{n}": p for n, p in ViTModel.from_pretrained(parts / "vit").named_parameters()}
    sources |= {f"decoder.{n}": p for n, p in GPT2LMHeadModel.from_pretrained(parts / "gpt2").named_parameters()}
    drawn = set()
    others = dict(other.named_parameters())
    for (name, parameter), same in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, same), name
        if any(new in name for new in NEW):
            drawn |= {not torch.equal(parameter, others[name])} if parameter.ndim > 1 else set()
        else:
            assert torch.equal(parameter, sources.pop(name)), name
    assert drawn == {True}
    assert sources.keys() == {"encoder.pooler.dense.weight", "encoder.pooler.dense.bias"}
    ends = {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"}
    for settings in (model.config, model.generation_config):
        assert {getattr(settings, key) for key in ends} == {processor.tokenizer.eos_token_id}
    assert processor.tokenizer.pad_token == processor.tokenizer.bos_token == "<|endoftext|>"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_parts_of_one_width_need_no_projection(parts, arguments, tmp_path):
    assert hasattr(build_vit_gpt2(arguments(), seed=0)[0], "enc_to_dec_proj")
    vit = ViTConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=32, patch_size=8)
    ViTModel(vit).save_pretrained(tmp_path)
    # As the repository of the real ViT states its size.
    settings = {"do_normalize": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": 32}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    model, processor = build_vit_gpt2(arguments(encoder_name_or_path=str(tmp_path)), seed=0)
    assert not hasattr(model, "enc_to_dec_proj")
    batch = make_batch(processor, pictures(2), TITLES[:2], tmp_path)
    assert batch["pixel_values"].shape == (2, 3, 32, 32)
    labels = batch.pop("labels")
    assert model(**batch).logits.shape == (*labels.shape, len(processor.tokenizer))


# Freezing


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def expected_names(model, train, vit_blocks, gpt2_blocks, embeddings):
    """The rule again, by name: `embeddings` are trained, the blocks below the two numbers are not."""

    def expected(name):
        if any(new in name for new in NEW):
            return True
        part = name.split(".")[0]
        if train not in (part, "both"):
            return False
        if re.search(r"embeddings|\.wte|\.wpe", name):
            return embeddings
        block = re.search(r"encoder\.layers\.(\d+)|decoder\.transformer\.h\.(\d+)", name)
        if block is None:
            return name.startswith(("encoder.layernorm.", "decoder.transformer.ln_f."))
        return int(block[1] or block[2] or 0) >= (vit_blocks if part == "encoder" else gpt2_blocks)

    return {name for name, _ in model.named_parameters() if expected(name)}


# New layers: 3 blocks of 8 and the projection, 26. A ViT block has 16 parameters, its last norm 2, its embeddings 4; a
# GPT-2 block 12 of its own, its last norm 2, its embeddings 2, which are its output layer too.
CASES = [
    ("encoder", 0, 0, True, 26 + 48 + 2),
    ("encoder", 2, 3, True, 26 + 16 + 2),
    ("encoder", DEPTH, 0, True, 26 + 2),
    ("encoder", 0, 0, False, 26 + 48 + 2 + 4),
    ("decoder", 0, 0, True, 26 + 36 + 2),
    ("decoder", 3, 1, True, 26 + 24 + 2),
    ("decoder", 0, DEPTH, True, 26 + 2),
    ("decoder", 0, 0, False, 26 + 36 + 2 + 2),
    ("both", 0, 0, True, 26 + 48 + 2 + 36 + 2),
    ("both", 1, 2, True, 26 + 32 + 2 + 12 + 2),
    ("both", DEPTH, DEPTH, True, 26 + 2 + 2),
    ("both", 0, 0, False, 26 + 48 + 2 + 4 + 36 + 2 + 2),
]


@pytest.mark.parametrize(("train", "vit_blocks", "gpt2_blocks", "freeze_embeddings", "count"), CASES)
def test_exactly_what_is_asked_for_is_trained(
    arguments, train, vit_blocks, gpt2_blocks, freeze_embeddings, count, tmp_path
):
    args = arguments(
        train=train,
        freeze_vit_blocks=vit_blocks,
        freeze_gpt2_blocks=gpt2_blocks,
        freeze_embeddings=freeze_embeddings,
    )
    model, processor = build_vit_gpt2(args, seed=0)
    freeze(model, args)
    trained = trained_names(model)
    assert trained == expected_names(model, train, vit_blocks, gpt2_blocks, not freeze_embeddings)
    assert len(trained) == count
    assert model.decoder.lm_head.weight is model.decoder.transformer.wte.weight

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fit(model, make_batch(processor, pictures(3), TITLES[:3], tmp_path), steps=1)
    assert {
        name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])
    } == trained


def test_freezing_again_replaces_what_was_frozen(arguments):
    args = arguments(train="decoder", freeze_gpt2_blocks=2)
    model, _ = build_vit_gpt2(args, seed=0)
    freeze(model, arguments(train="encoder", freeze_vit_blocks=1))
    freeze(model, args)
    assert trained_names(model) == expected_names(model, "decoder", 0, 2, False)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("train", "frozen"), [("encoder", 2), ("both", 1), ("decoder", 0)])
def test_below_the_lowest_trained_block_nothing_is_recorded(arguments, train, frozen, checkpointing, tmp_path):
    args = arguments(train=train, freeze_vit_blocks=frozen)
    model, processor = build_vit_gpt2(args, seed=0)
    freeze(model, args)
    if checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    recorded, calls = {}, dict.fromkeys(range(DEPTH), 0)
    for i, block in enumerate(model.encoder.layers):
        block.register_forward_hook(lambda module, inputs, output, i=i: recorded.update({i: output.requires_grad}))
        block.mlp.register_forward_pre_hook(lambda module, inputs, i=i: calls.update({i: calls[i] + 1}))
    batch = make_batch(processor, pictures(2), TITLES[:2], tmp_path)
    labels = batch.pop("labels")
    F.cross_entropy(model(**batch).logits.transpose(1, 2), labels).backward()
    lowest = DEPTH if train == "decoder" else frozen
    assert recorded == {i: i >= lowest for i in range(DEPTH)}
    assert calls == {i: 1 + (checkpointing and i >= lowest) for i in range(DEPTH)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze_vit_blocks": 4}, r"freeze_vit_blocks=4: .*vit has 3 blocks, so choose 0 to 3"),
        ({"freeze_gpt2_blocks": 13}, r"freeze_gpt2_blocks=13: .*gpt2 has 3 blocks, so choose 0 to 3"),
        ({"freeze_vit_blocks": -1}, "freeze_vit_blocks=-1"),
    ],
)
def test_more_frozen_blocks_than_there_are(arguments, changes, message):
    args = arguments(**changes)
    model, _ = build_vit_gpt2(args, seed=0)
    with pytest.raises(ModelError, match=message):
        freeze(model, args)


def test_parameter_groups(arguments):
    args = arguments(freeze_vit_blocks=1)
    model, _ = build_vit_gpt2(args, seed=0)
    freeze(model, args)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 1e-5, 3e-4, 0.01)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (1e-5, 0.01),
        (1e-5, 0.0),
        (3e-4, 0.01),
        (3e-4, 0.0),
    ]
    named = [{names[parameter] for parameter in group["params"]} for group in groups]
    assert set().union(*named) == trained_names(model) and sum(map(len, named)) == len(trained_names(model))
    for group in (named[0], named[2]):
        assert not any(name.endswith("bias") or "norm" in name or ".ln_" in name for name in group)
    for group in (named[1], named[3]):
        assert all(name.endswith("bias") or "norm" in name or ".ln_" in name for name in group)
    assert {name.split(".")[0] for name in named[0] | named[1]} == {"encoder"}
    assert {name.split(".")[0] for name in named[2] | named[3]} == {"decoder", "enc_to_dec_proj"}

    args = arguments(train="decoder")
    freeze(model, args)
    assert [group["lr"] for group in parameter_groups(model, 1e-5, 3e-4, 0.01)] == [3e-4, 3e-4]


# What cannot be loaded


def test_other_models_are_refused(parts, arguments, tmp_path):
    vit, gpt2 = str(parts / "vit"), str(parts / "gpt2")
    with pytest.raises(ModelError, match="gpt2 is a model of type 'gpt2', where one of type 'vit' is needed"):
        build_vit_gpt2(arguments(encoder_name_or_path=gpt2), seed=0)
    with pytest.raises(ModelError, match="vit is a model of type 'vit', where one of type 'gpt2' is needed"):
        build_vit_gpt2(arguments(decoder_name_or_path=vit), seed=0)
    with pytest.raises(ModelError, match="nowhere cannot be loaded"):
        build_vit_gpt2(arguments(encoder_name_or_path=str(tmp_path / "nowhere")), seed=0)
    with pytest.raises(ModelError, match="vit is made of vit and vit; choose a model trained by"):
        load_vit_gpt2(vit)


def test_revisions_on_the_hub(hub, parts, arguments, tmp_path):
    api, commits = HfApi(), {}

    def publish(name, folder):
        api.create_repo(f"user/{name}")
        commits[name] = api.upload_folder(repo_id=f"user/{name}", folder_path=folder).oid
        api.upload_file(repo_id=f"user/{name}", path_or_fileobj=b"{}", path_in_repo="config.json")  # of no use

    publish("vit", parts / "vit")
    publish("gpt2", parts / "gpt2")
    args = arguments(
        encoder_name_or_path="user/vit",
        encoder_revision=commits["vit"],
        decoder_name_or_path="user/gpt2",
        decoder_revision=commits["gpt2"],
    )
    model, processor = build_vit_gpt2(args, seed=3)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    publish("dishes", tmp_path)
    loaded, reloaded = load_vit_gpt2("user/dishes", commits["dishes"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert reloaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert (loaded.config.encoder._name_or_path, loaded.config.decoder._name_or_path) == ("user/vit", "user/gpt2")


def test_real_titles_round_trip(data_dir, parts):
    """Byte-level pieces lose nothing of any real title."""
    tokenizer = AutoTokenizer.from_pretrained(parts / "gpt2")
    with (data_dir / "food_titles/titles.csv").open(encoding="utf-8", newline="") as file:
        titles = [row["Title"] for row in csv.DictReader(file)]
    assert len(titles) >= 2_000
    ids = tokenizer(titles)["input_ids"]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == titles
