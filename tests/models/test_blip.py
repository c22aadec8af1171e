"""BLIP for Vietnamese: its tokenizer, what is trained, saving; on a tiny random BLIP with an invented vocabulary."""

import json
import shutil
import string
import unicodedata

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoProcessor,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    GenerationConfig,
)

from vlmcap.data import vietnamese
from vlmcap.data.clean import clean_text
from vlmcap.models.blip import CHARACTERS, BlipArguments, add_lora, learn_vietnamese, load_blip, load_blip_adapter
from vlmcap.models.load import ModelError

SIZE = 32
CAPTIONS = [
    "Một quả bóng trên bãi cỏ.",
    "Bông hoa đỏ, quả bóng xanh.",
    "Ngôi sao đứng cạnh quả bóng, phía dưới là bông hoa.",
    "Tỉ số là 3-4.",
    "Ông ấy nói: “Đẹp quá!” (rất to)",
    "Quả bỏng ngô; xem ở http://vi.dụ/bóng?",
]
# As in BERT's vocabulary: special tokens first, lower case, hardly an accent, pieces that continue a word with ##.
WORDS = "the red ball on grass ban bong bo co cung hoa mot qua so to xanh ##ng ##ong ##an ##oi ##ai ##uoi".split()
SIGNS = string.ascii_lowercase + string.digits + string.punctuation
SPECIAL = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*SPECIAL, *SIGNS, *(f"##{sign}" for sign in SIGNS), *WORDS]
START = len(VOCABULARY)  # [DEC], which the model knows and the published tokenizer does not


def write_base(folder, vocab_size=START + 2) -> None:
    tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(VOCABULARY)}, model_max_length=64)
    BlipProcessor(BlipImageProcessor(size={"height": SIZE, "width": SIZE}), tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "initializer_range": 0.1}
    text = {
        "vocab_size": vocab_size,
        "hidden_size": 48,
        "encoder_hidden_size": 32,
        "max_position_embeddings": 64,
        "bos_token_id": START,
        "eos_token_id": 2,  # as published: no end of a caption
        "sep_token_id": VOCABULARY.index("[SEP]"),
        "pad_token_id": 0,
    }
    vision = {"hidden_size": 32, "image_size": SIZE, "patch_size": 8}
    model = BlipForConditionalGeneration(BlipConfig(text_config=text | layers, vision_config=vision | layers))
    model.get_input_embeddings().weight.data.normal_(std=0.5)  # the head's too: large enough to be sure of a piece
    model.text_decoder.cls.predictions.decoder.bias.data.normal_()
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a random BLIP with its processor, as the published one is."""
    folder = tmp_path_factory.mktemp("blip")
    write_base(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """One for each caption: four by four random colours."""
    colours = torch.rand(len(CAPTIONS), 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return colours.repeat_interleave(SIZE // 4, dim=2).repeat_interleave(SIZE // 4, dim=3)


@pytest.fixture
def adapted(base):
    """adapted(lora_r=...): model and processor before training."""

    def adapted(**changes):
        args = BlipArguments(model_name_or_path=base, **changes)
        model, processor = load_blip(base)
        processor = learn_vietnamese(processor, CAPTIONS * 2, args.new_pieces)
        torch.manual_seed(0)
        return add_lora(model, processor, args), processor

    return adapted


def batch(processor, captions=CAPTIONS) -> tuple[dict, torch.Tensor]:
    """input_ids and attention_mask, and labels: labels[:, i] follows input_ids[:, i]."""
    tokenizer = processor.tokenizer
    rows = [tokenizer(caption, add_special_tokens=False)["input_ids"] for caption in captions]
    width = max(map(len, rows)) + 1
    ids = torch.tensor([[tokenizer.bos_token_id, *row] + [0] * (width - 1 - len(row)) for row in rows])
    labels = torch.tensor([[*row, tokenizer.eos_token_id] + [-100] * (width - 1 - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (labels != -100).long()}, labels


def train(model, processor, pictures, steps, lr) -> None:
    texts, labels = batch(processor)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for _ in range(steps):
        logits = model(pixel_values=pictures, **texts).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def say(model, processor, pictures, num_beams=1) -> list[str]:
    tokenizer = processor.tokenizer
    config = GenerationConfig(
        num_beams=num_beams,
        do_sample=False,
        max_new_tokens=40,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
    )
    ids = model.generate(pixel_values=pictures, generation_config=config)
    return processor.batch_decode(ids, skip_special_tokens=True)


def logits_of(model, processor, pictures) -> torch.Tensor:
    with torch.no_grad():
        return model(pixel_values=pictures, **batch(processor)[0]).logits


def uit_viic(data_dir) -> dict[str, list[str]]:
    """Captions of the three files, as published."""
    splits = {}
    for split in ("train", "val", "test"):
        text = (data_dir / f"uit_viic/uitviic_captions_{split}2017.json").read_text(encoding="utf-8")
        splits[split] = [annotation["caption"] for annotation in json.loads(text)["annotations"]]
    return splits


def round_trip(processor, captions) -> list[str]:
    ids = processor.tokenizer(captions)["input_ids"]
    return processor.batch_decode(ids, skip_special_tokens=True)


def test_the_published_tokenizer_is_completed_and_takes_the_marks_off(base, pictures):
    model, processor = load_blip(base)
    tokenizer = processor.tokenizer
    assert (tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("[ENC]")) == (START, START + 1)
    assert (tokenizer.eos_token, tokenizer.pad_token_id, len(tokenizer)) == ("[SEP]", 0, START + 2)
    assert round_trip(processor, ["Quả bóng, bông hoa", "Tỉ số là 3-4"]) == ["qua bong, bong hoa", "ti so la 3 - 4"]
    assert len(say(model, processor, pictures, 3)) == len(CAPTIONS)  # zero-shot


def test_captions_come_back_as_they_went_in(base, tmp_path):
    _, stock = load_blip(base)
    processor = learn_vietnamese(stock, CAPTIONS * 2, 500)
    unseen = ['Nghiễm nhiên, "KHUỶU" tay ở 12:30-13:45 (`Ừ`)...', "[Đ] ~ #1 ^_^ đ/ộ", *CHARACTERS]
    unseen += ["x" + character for character in CHARACTERS]
    decomposed = [unicodedata.normalize("NFD", caption) for caption in CAPTIONS]
    processor.save_pretrained(tmp_path)
    for loaded in (processor, AutoProcessor.from_pretrained(tmp_path)):
        tokenizer = loaded.tokenizer
        assert type(loaded) is BlipProcessor and tokenizer.is_fast
        assert round_trip(loaded, CAPTIONS + unseen) == CAPTIONS + unseen
        assert round_trip(loaded, decomposed) == CAPTIONS
        ids = [i for row in tokenizer(CAPTIONS + unseen, add_special_tokens=False)["input_ids"] for i in row]
        assert not set(ids) & set(tokenizer.all_special_ids)
        assert (tokenizer.bos_token_id, tokenizer.eos_token, tokenizer.pad_token_id) == (START, "[SEP]", 0)
        framed = loaded(text="Quả bóng")
        assert loaded.decode(framed["input_ids"]) == "[DEC] Quả bóng [SEP]"
        assert framed.keys() == {"input_ids", "attention_mask"}
    assert all(caption != back for caption, back in zip(CAPTIONS, round_trip(stock, CAPTIONS), strict=True))


def test_old_pieces_keep_their_ids_and_the_most_frequent_words_are_learned(base):
    _, stock = load_blip(base)
    vocab = learn_vietnamese(stock, CAPTIONS * 2, 2).tokenizer.get_vocab()
    assert {piece: vocab[piece] for piece in stock.tokenizer.get_vocab()} == stock.tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert vocab.keys() >= {"bóng", "quả", "“", "##”", "Ỹ", "##ỹ"} and not {"đỏ", "Quả", "hoa,"} & vocab.keys()
    tokenizer = learn_vietnamese(stock, CAPTIONS * 2, 500).tokenizer
    assert tokenizer.tokenize("Quả bóng, 3-4.") == ["Quả", "bóng", "##,", "3", "##-", "##4", "##."]
    assert tokenizer.tokenize("xanh xảnh") == ["xanh", "x", "##ả", "##n", "##h"]
    once = learn_vietnamese(stock, CAPTIONS, 500).tokenizer
    assert "Ngôi" in tokenizer.get_vocab() and "Ngôi" not in once.get_vocab()  # seen once alone


def test_every_caption_of_uit_viic_comes_back(base, data_dir, tmp_path):
    """Cleaned, and as published up to white space and decomposed letters; with pieces of the training file alone."""
    _, stock = load_blip(base)
    splits = uit_viic(data_dir)
    cleaned = {s: [clean_text(c, vietnamese.TEXT_RULES) for c in captions] for s, captions in splits.items()}
    processor = learn_vietnamese(stock, cleaned["train"], BlipArguments().new_pieces)
    processor.save_pretrained(tmp_path)
    saved = AutoProcessor.from_pretrained(tmp_path)
    published = [" ".join(unicodedata.normalize("NFC", c).split()) for captions in splits.values() for c in captions]
    captions = [caption for captions in cleaned.values() for caption in captions]
    assert len(captions) == len(published) == 19_256
    lost = sum(a != b for a, b in zip(captions, round_trip(stock, captions), strict=True))
    assert lost > 19_200  # a few captions are ASCII, lower case, and nothing else
    for texts in (captions, published):
        ids = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert saved.tokenizer(texts, add_special_tokens=False)["input_ids"] == ids
        assert processor.tokenizer.unk_token_id not in {i for row in ids for i in row}
        assert processor.batch_decode(ids) == texts and saved.batch_decode(ids) == texts
        assert sum(map(len, ids)) / len(ids) < 15  # of 12.1 words


def test_lora_on_the_decoders_attention_and_the_new_rows_alone_are_trained(adapted):
    model, processor = adapted(lora_r=4)
    trained = {n.removeprefix("base_model.model."): p for n, p in model.named_parameters() if p.requires_grad}
    leaves = ["self.query", "self.key", "self.value", "output.dense"]
    attention = [f"{part}.{leaf}" for part in ("attention", "crossattention") for leaf in leaves]
    layers = [f"text_decoder.bert.encoder.layer.{i}.{leaf}" for i in (0, 1) for leaf in attention]
    rows = "text_decoder.bert.embeddings.word_embeddings.token_adapter.trainable_tokens_delta.default"
    assert trained.keys() == {f"{layer}.lora_{m}.default.weight" for layer in layers for m in "AB"} | {rows}
    assert trained[rows].shape == (len(processor.tokenizer) - START - 2, 48)
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())


def test_the_frozen_encoder_is_free(adapted, pictures):
    model, processor = adapted()
    model.enable_input_require_grads()  # as under gradient checkpointing
    model.train()
    model.get_base_model().vision_model.embeddings.patch_embedding.register_forward_hook(
        lambda module, inputs, output: output.requires_grad_(True)
    )
    output = model(pixel_values=pictures, **batch(processor)[0])
    assert not output.image_embeds.requires_grad and output.logits.requires_grad


def test_training_moves_nothing_else(adapted, pictures):
    model, processor = adapted(lora_dropout=0.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model, processor, pictures, steps=2, lr=1e-2)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


def test_target_modules_outside_the_decoders_attention_are_refused(base):
    for target, found in (("qkv", "vision_model"), ("dense", "intermediate.dense"), ("q_proj", "nothing")):
        model, processor = load_blip(base)
        with pytest.raises(ModelError, match=rf"'{target}' matches .*{found}.*attention\.self\.query"):
            add_lora(model, processor, BlipArguments(base, lora_target_modules=["query", target]))


def test_new_rows_begin_apart_and_as_large_as_the_old(base):
    model, processor = load_blip(base)
    processor = learn_vietnamese(processor, CAPTIONS * 2, 500)
    old = model.get_input_embeddings().weight.clone()

    def begin(seed):
        model, _ = load_blip(base)
        torch.manual_seed(seed)
        add_lora(model, processor, BlipArguments(base))
        return model.text_decoder.cls.predictions.decoder.token_adapter.get_base_layer().weight  # tied

    weight = begin(0)
    new = weight[len(old) :]
    assert torch.equal(weight[: len(old)], old) and len(weight) == len(processor.tokenizer)
    assert new.std().item() == pytest.approx(old.std(0).mean().item(), rel=0.05)
    rows = torch.nn.functional.normalize(new)
    assert (rows @ rows.T - torch.eye(len(rows))).max() < 0.9
    assert torch.equal(begin(0), weight) and not torch.equal(begin(1), weight)


def test_a_fresh_adapter_changes_no_logit(adapted, pictures):
    """PEFT 0.21 leaves out the biases of a head whose rows are trained (huggingface/peft#3649)."""
    model, processor = adapted()
    base = model.get_base_model()
    model.eval()
    with_adapter = logits_of(model, processor, pictures)
    with model.disable_adapter():
        without = logits_of(model, processor, pictures)
    bias = base.text_decoder.cls.predictions.bias
    assert bias[: START + 2].abs().min() > 0 and not bias[START + 2 :].any()
    torch.testing.assert_close(with_adapter, without)
    merged = logits_of(model.merge_and_unload(), processor, pictures)
    torch.testing.assert_close(merged, with_adapter)


def test_pictures_and_captions_are_learned_with_every_mark_saved_and_reloaded(adapted, base, pictures, tmp_path):
    model, processor = adapted(lora_dropout=0.0)
    model.eval()
    assert not set(say(model, processor, pictures)) & set(CAPTIONS)
    train(model, processor, pictures, steps=80, lr=1e-2)
    assert say(model, processor, pictures) == CAPTIONS
    assert say(model, processor, pictures, num_beams=3) == CAPTIONS
    assert say(model, processor, pictures.flip(0)) == CAPTIONS[::-1]
    expected = logits_of(model, processor, pictures)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    reloaded, saved = load_blip_adapter(str(tmp_path))
    assert torch.equal(logits_of(reloaded, saved, pictures), expected)
    assert say(reloaded, saved, pictures, num_beams=3) == CAPTIONS
    assert not any(p.requires_grad for p in reloaded.parameters())

    rows = {k: t.shape for k, t in load_file(tmp_path / "adapter_model.safetensors").items() if ".lora_" not in k}
    new = len(saved.tokenizer) - START - 2
    assert list(rows.values()) == [(new, 48)]  # of the embeddings, the new rows alone, once

    # Plain transformers and PEFT, as the docstring of vlmcap.models.blip and the card say
    config = PeftConfig.from_pretrained(tmp_path)
    assert config.base_model_name_or_path == base
    plain = BlipForConditionalGeneration.from_pretrained(config.base_model_name_or_path, revision=config.revision)
    plain.resize_token_embeddings(len(saved.tokenizer))
    plain = PeftModel.from_pretrained(plain, tmp_path).merge_and_unload()
    torch.testing.assert_close(logits_of(plain, saved, pictures), expected, rtol=1e-4, atol=1e-4)
    ids = plain.generate(pixel_values=pictures, num_beams=3, max_new_tokens=40)
    assert saved.batch_decode(ids, skip_special_tokens=True) == CAPTIONS
    plain.save_pretrained(tmp_path / "merged")  # with the tied head
    merged = BlipForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(merged, saved, pictures), logits_of(plain, saved, pictures))


def test_adapter_and_base_from_the_hub(hub, base, pictures, tmp_path):
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo("user/blip")
    commit = api.upload_folder(repo_id="user/blip", folder_path=base).oid
    args = BlipArguments("user/blip", model_revision=commit)
    model, processor = load_blip(args.model_name_or_path, args.model_revision)
    processor = learn_vietnamese(processor, CAPTIONS, args.new_pieces)
    model = add_lora(model, processor, args).eval()
    expected = logits_of(model, processor, pictures)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    api.create_repo("user/blip-vi")
    first = api.upload_folder(repo_id="user/blip-vi", folder_path=tmp_path).oid
    api.delete_file("adapter_config.json", "user/blip-vi")
    api.delete_file("model.safetensors", "user/blip")  # the adapter names the revision that it was trained on

    reloaded, saved = load_blip_adapter("user/blip-vi", revision=first)
    assert torch.equal(logits_of(reloaded, saved, pictures), expected)
    with pytest.raises(ModelError, match="user/blip-vi is not an adapter"):
        load_blip_adapter("user/blip-vi")


def test_what_is_not_a_blip_captioner_is_refused(base, tmp_path):
    with pytest.raises(ModelError, match="nowhere.*cannot be loaded"):
        load_blip(str(tmp_path / "nowhere"))
    write_base(tmp_path / "wide", vocab_size=START + 5)
    with pytest.raises(ModelError, match=rf"wide.*{START + 2}, {START}.*{START + 5}"):
        load_blip(str(tmp_path / "wide"))
    shutil.copytree(base, tmp_path / "questions")
    config = json.loads((tmp_path / "questions/config.json").read_text())
    text = json.dumps(config | {"architectures": ["BlipForQuestionAnswering"]})
    (tmp_path / "questions/config.json").write_text(text)
    with pytest.raises(ModelError, match="questions is a .*BlipForQuestionAnswering"):
        load_blip(str(tmp_path / "questions"))
