"""The other miniatures are small, of the real models' kind, know what they should, and can be made again."""

import runpy

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BlipProcessor,
    ViTImageProcessor,
    ViTModel,
)

from vlmcap.miniature.family import (
    PRETRAIN,
    answers,
    build_blip_processor,
    build_gpt2_tokenizer,
    build_llama_tokenizer,
    english_texts,
    exact_captions,
    on_patches,
)
from vlmcap.miniature.scenes import Scene, scenes

LOAD = {"dtype": torch.float32, "use_safetensors": True}


@pytest.fixture(scope="module")
def folder(repo_root):
    return repo_root / "recipes" / "miniatures"


@pytest.mark.parametrize("name", PRETRAIN)
def test_a_committed_checkpoint_is_small_and_of_its_kind(name, folder):
    assert sum(path.stat().st_size for path in (folder / name).iterdir()) < 2_800_000
    assert AutoConfig.from_pretrained(folder / name).model_type == name


def test_blip_is_built_as_the_published_one(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder / "blip", **LOAD)
    processor = BlipProcessor.from_pretrained(folder / "blip")
    tokenizer, text = processor.tokenizer, model.config.text_config
    assert (text.vocab_size, text.bos_token_id) == (len(tokenizer) + 2, len(tokenizer))
    assert text.eos_token_id == text.sep_token_id == tokenizer.sep_token_id and tokenizer.bos_token is None
    decoder = model.text_decoder
    assert decoder.cls.predictions.decoder.weight is decoder.bert.embeddings.word_embeddings.weight
    assert tokenizer.get_vocab() == build_blip_processor().tokenizer.get_vocab()
    assert tokenizer.decode(tokenizer("A Caption: “100%” spelt?")["input_ids"], skip_special_tokens=True) != ""
    assert tokenizer.unk_token_id not in tokenizer("Anything, in ASCII & 100% of it!")["input_ids"]
    vietnamese = next(scenes(1, 0, held_out=True)).vietnamese()[0]
    assert tokenizer.decode(tokenizer(vietnamese)["input_ids"], skip_special_tokens=True) != vietnamese.lower()


def test_blip_describes_new_scenes_in_english_and_in_nothing_else(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder / "blip", **LOAD)
    processor = BlipProcessor.from_pretrained(folder / "blip")
    assert exact_captions(model, processor, Scene.english, count=40) > 0.8
    assert exact_captions(model, processor, Scene.vietnamese, count=40) == 0


@torch.no_grad()
def test_vit_tells_scenes_apart(folder):
    """A linear probe of the frozen pooled vector, fitted in closed form, knows colours and shapes of new scenes."""
    model = ViTModel.from_pretrained(folder / "vit", **LOAD)
    processor = ViTImageProcessor.from_pretrained(folder / "vit")

    def look(shown: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = processor([scene.draw() for scene in shown], return_tensors="pt")
        return model(**pixels).pooler_output, torch.tensor([answers(scene) for scene in shown])

    pooled, known = look(list(scenes(400, seed=3, held_out=False)))
    new, expected = look(list(scenes(60, seed=4, held_out=True)))
    for question in range(5):
        targets = torch.nn.functional.one_hot(known[:, question]).float()
        probe = torch.linalg.lstsq(pooled, targets, driver="gelsd").solution
        right = (new @ probe).argmax(-1) == expected[:, question]
        assert right.float().mean() > 0.9, question


def test_patches_know_what_is_on_them():
    (scene,) = scenes(1, seed=3, held_out=False)
    colours, shapes = on_patches([scene])
    assert colours.shape == shapes.shape == (1, 36)
    first, second = answers(scene)[:2], answers(scene)[2:4]
    pairs = set(zip(colours[0].tolist(), shapes[0].tolist(), strict=True))
    assert pairs == {(0, 0), *((colour + 1, shape + 1) for colour, shape in (first, second))}


def test_gpt2_has_its_one_special_token(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "gpt2")
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>" and tokenizer.pad_token is None
    assert tokenizer.get_vocab() == build_gpt2_tokenizer().get_vocab()
    assert len(tokenizer) == AutoConfig.from_pretrained(folder / "gpt2").vocab_size <= 400


def test_llama_has_the_special_tokens_of_llama_3(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")
    assert tokenizer.pad_token is None
    pad = tokenizer.convert_tokens_to_ids("<|finetune_right_pad_id|>")
    assert tokenizer.decode([pad], skip_special_tokens=True) == ""
    assert tokenizer("Red Circle")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.get_vocab() == build_llama_tokenizer().get_vocab()
    assert len(tokenizer) == AutoConfig.from_pretrained(folder / "llama").vocab_size


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@torch.no_grad()
def test_language_models_know_the_words_and_not_the_style(name, folder):
    """A text of a kind that they read does not surprise them, a title of `Scene.title()` does."""
    model = AutoModelForCausalLM.from_pretrained(folder / name, **LOAD)
    tokenizer = AutoTokenizer.from_pretrained(folder / name)
    (scene,) = scenes(1, seed=5, held_out=True)

    def surprise(text: str) -> float:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        return model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()

    known = [surprise(text) for text in english_texts(scene)]
    assert max(known) < 1.5 < surprise(scene.title()) < 8
    assert tokenizer.decode(tokenizer(scene.title())["input_ids"], skip_special_tokens=True) == scene.title()


@pytest.mark.parametrize("name", PRETRAIN)
def test_pretraining_writes_a_checkpoint(name, tmp_path):
    measured = PRETRAIN[name](tmp_path, steps=2, batch_size=4)
    assert AutoConfig.from_pretrained(tmp_path).model_type == name and (tmp_path / "model.safetensors").exists()
    assert all(0 <= share < 1 for share in measured.values()) or measured["loss"] > 3  # two steps teach nothing


def test_pretraining_is_seeded_and_started_by_the_script(tmp_path, run_script):
    done = run_script("pretrain_miniature.py", "--model", "gpt2", "--steps", 2, "--output_dir", tmp_path / "a")
    assert "on held-out scenes: loss " in done.stdout
    PRETRAIN["gpt2"](tmp_path / "b", steps=2)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(a[key], b[key])
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()


def test_the_script_offers_every_model(repo_root):
    script = runpy.run_path(str(repo_root / "scripts/pretrain_miniature.py"))
    assert script["MODELS"] == ("qwen2_vl", "qwen2_vl_languages", *PRETRAIN)
