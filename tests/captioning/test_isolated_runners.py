"""The runners of models in environments of their own, with stand-ins for the models: tiny GPT-2s that take pictures.

A stand-in takes a picture as two rows of patches without a batch axis, as Sarashina's processor makes it.
"""

import importlib
import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import BatchFeature, GPT2Config, GPT2LMHeadModel

from vlmcap.captioning.baselines import read_table
from vlmcap.captioning.isolated import RUNNERS

# Runner -> what it imports from transformers to load model and inputs.
CLASSES = {
    "asagi": ("AutoModel", "AutoProcessor"),
    "heron_nvila": ("AutoModelForImageTextToText", "AutoProcessor"),
    "japanese_stable_vlm": ("AutoModelForVision2Seq", "AutoImageProcessor", "AutoTokenizer"),
    "sarashina_vision": ("AutoModelForCausalLM", "AutoProcessor"),
}
DECODING = {"num_beams": 3, "max_new_tokens": 4}
PROMPT, END, PAD = [5, 6, 7], 1, 2
PATCHES = torch.tensor([[0.0], [1.0]])


class Seer(GPT2LMHeadModel):
    """Keeps what came with the tokens of its first step."""

    def forward(self, input_ids=None, pixel_values=None, image_grid_thw=None, token_type_ids=None, **rest):
        if len(input_ids[0]) > 1:
            self.seen = {"beams": len(input_ids), "pixel_values": pixel_values, "token_type_ids": token_type_ids}
        return super().forward(input_ids, **rest)


class Processor:
    """Tokens and patches of any text and picture; its texts are the numbers of the tokens, after `before`."""

    eos_token_id, pad_token_id = END, PAD

    def __init__(self, before=""):
        self.before, self.asked, self.tokenizer = before, [], self

    def __call__(self, *text, images=None, **options):
        self.asked.append(text[0] if text else options.get("text"))
        ids = torch.tensor([PROMPT])
        encoded = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        if images is not None:
            encoded |= {"pixel_values": PATCHES, "image_grid_thw": torch.tensor([[1, 1, 2]])}
        return BatchFeature(encoded)

    def apply_chat_template(self, talk, add_generation_prompt, tokenize=False):
        return json.dumps(talk[0]["content"], ensure_ascii=False, default=str)

    def decode(self, ids, skip_special_tokens):
        return self.before + " ".join(str(int(token)) for token in ids)

    def batch_decode(self, rows, skip_special_tokens):
        return [self.decode(row, skip_special_tokens) for row in rows]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of a stand-in's weights; its configuration knows no token that ends or pads."""
    folder = tmp_path_factory.mktemp("substitute")
    torch.manual_seed(0)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    model = Seer(GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2, n_positions=64, **ends))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def runner(monkeypatch):
    """runner("asagi"): the module, as it is imported in its environment."""
    monkeypatch.syspath_prepend(str(RUNNERS))

    def runner(name):
        for module in ("loading", "protocol", name):
            monkeypatch.delitem(sys.modules, module, raising=False)
        return importlib.import_module(name)

    return runner


@pytest.fixture
def replace(monkeypatch):
    """replace("AutoModel", substitute): what the runner's `from transformers import AutoModel` finds."""

    def replace(name, substitute):
        getattr(transformers, name, None)  # the first look at it may put another module into sys.modules
        monkeypatch.setitem(vars(sys.modules["transformers"]), name, substitute)

    return replace


@pytest.fixture
def load(runner, replace, published):
    """load("asagi", folder): the runner's `caption`, the model it loaded, its processor, options of the loads."""

    def load(name, folder=published, before=""):
        loaded, processor, options = [], Processor(before), []

        def model_of(*args, **given):
            options.append(given)
            loaded.append(Seer.from_pretrained(*args, **{k: v for k, v in given.items() if k != "trust_remote_code"}))
            return loaded[0]

        def processor_of(*args, **given):
            options.append(given)
            return processor

        for number, cls in enumerate(CLASSES[name]):
            make = processor_of if number else model_of
            replace(cls, SimpleNamespace(from_pretrained=make))
        header = {"model": str(folder), "revision": "c" * 40, "trust_remote_code": True, "decoding": DECODING}
        caption, about = runner(name).load(header)
        assert about["dtype"] in ("float32", "bfloat16", "float16")
        return SimpleNamespace(caption=caption, model=loaded[0][0], processor=processor, options=options)

    return load


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    return buffer.getvalue()


def test_every_isolated_row_is_tested(repo_root):
    rows = read_table(repo_root / "recipes/configs/baselines.yaml").rows.values()
    assert {row.runner for row in rows if row.runs == "isolated"} == {f"{name}.py" for name in (*CLASSES, "llava_jp")}


@pytest.mark.parametrize("name", CLASSES)
def test_every_beam_sees_the_whole_picture(name, load):
    """Row by row, the beams would get p0 p0 p0 p1 p1 p1."""
    loaded = load(name)
    caption = loaded.caption(png(), "何色")
    seen = loaded.model.seen
    assert seen["beams"] == 3 and seen["pixel_values"].flatten().tolist() == [0, 1, 0, 1, 0, 1]
    assert seen["token_type_ids"] is None
    words = caption.split()
    assert END not in map(int, words[:-1]) and len(words) <= len(PROMPT) + 4
    assert all(given["revision"] == "c" * 40 and given["trust_remote_code"] for given in loaded.options)


def test_heron_is_asked_as_its_card_says_and_answers_without_the_prompt(load):
    loaded = load("heron_nvila")
    caption = loaded.caption(png(), "何色")
    assert loaded.processor.asked == [json.dumps("<image>\n何色", ensure_ascii=False)]
    assert len(caption.split()) <= 4


@pytest.mark.parametrize("name", CLASSES)
def test_a_weight_that_is_missing_or_has_another_shape_is_named(name, load, published, tmp_path):
    """transformers would draw it at random, and caption."""
    for spoil, message in (
        (lambda weights: weights.pop("transformer.wpe.weight"), "no weights for transformer.wpe.weight of a Seer"),
        (
            lambda weights: weights.update({"transformer.ln_f.bias": torch.zeros(9)}),
            "other shapes for transformer.ln_f.bias of a Seer",
        ),
    ):
        folder = copied(published, tmp_path / name, spoil)
        with pytest.raises(ValueError, match=message):
            load(name, folder)


def copied(source, folder, change):
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_weights_without_a_use_are_listed(load, published, tmp_path, capsys):
    folder = copied(published, tmp_path / "more", lambda weights: weights.update({"tower.extra": torch.zeros(1)}))
    load("sarashina_vision", folder)
    assert "a Seer has no use for tower.extra" in capsys.readouterr().err


def test_the_models_own_search_is_not_used(runner):
    search_settings = runner("loading").search_settings
    own = SimpleNamespace(eos_token_id=[3, 4], pad_token_id=None, repetition_penalty=1.5, do_sample=True)
    settings = search_settings(DECODING, SimpleNamespace(generation_config=own), Processor())
    assert settings["eos_token_id"] == [3, 4] and settings["pad_token_id"] == PAD
    assert not settings["do_sample"] and settings["repetition_penalty"] == settings["length_penalty"] == 1.0
    assert settings["no_repeat_ngram_size"] == settings["min_length"] == 0
    assert search_settings(DECODING, SimpleNamespace(), Processor())["eos_token_id"] == END


@pytest.mark.parametrize("name", ["asagi", "japanese_stable_vlm"])
@pytest.mark.parametrize("prompted", [True, False], ids=["with the prompt", "without"])
@pytest.mark.parametrize(
    ("said", "caption"),
    [
        ("赤い車。", "赤い車。"),
        ("赤い車。\n\n### 指示:\n何色ですか。\n\n### 応答:\n赤。", "赤い車。"),
        ("赤い車。\n\n### 応答:\n青い車。", "赤い車。"),
        ("赤い車。\n二台ある。", "赤い車。\n二台ある。"),
    ],
)
def test_the_answer_ends_where_the_model_invents_another_turn(name, prompted, said, caption, runner):
    module = runner(name)
    text = (module.FORMAT.format("説明してください。") if prompted else "") + said
    assert module.response(text, module.START) == caption


# LLaVA-JP's code in the shape that its runner uses, without the language: its vision tower names another repository.
LLAVA = {
    "__init__.py": "",
    "constants.py": "DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX = '<image>', -200\n",
    "conversation.py": """
class Talk:
    roles = ("user", "system")
    def __init__(self):
        self.said = []
    def copy(self):
        return Talk()
    def append_message(self, role, text):
        self.said.append(text)
    def get_prompt(self):
        return self.said[0]
conv_templates = {"v1": Talk()}
""",
    "model/__init__.py": "",
    "model/clip_encoder.py": """
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel
class CLIPVisionTower(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.cfg_only = CLIPVisionConfig.from_pretrained(name)
        self.image_processor = CLIPImageProcessor.from_pretrained(name)
        self.vision_tower = CLIPVisionModel.from_pretrained(name)
""",
    "model/llava_gpt2.py": """
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from llava.model.clip_encoder import CLIPVisionTower
class LlavaConfig(GPT2Config):
    pass
class Inner(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.vision_tower = CLIPVisionTower(config.mm_vision_tower)
class LlavaGpt2ForCausalLM(GPT2LMHeadModel):
    config_class = LlavaConfig
    def __init__(self, config):
        super().__init__(config)
        assert config.pretrain_mm_mlp_adapter is None, "their code would read a pickle"
        self.model = Inner(config)
        self.post_init()
    def get_model(self):
        return self.model
    def forward(self, input_ids=None, images=None, **rest):
        if len(input_ids[0]) > 1:
            self.seen = input_ids, images
        return super().forward(input_ids.clamp(min=0), **rest)
""",
    "train/__init__.py": "",
    "train/dataset.py": """
import torch
def tokenizer_image_token(prompt, tokenizer, image_token, return_tensors):
    assert prompt.startswith("<image>")
    return torch.tensor([image_token, *tokenizer(prompt)["input_ids"][0].tolist(), tokenizer.eos_token_id])
""",
}


@pytest.fixture
def llava(runner, replace, monkeypatch, tmp_path, hub):
    """llava(folder): the runner's `caption` and the model; llava(): the same, of new weights that it wrote."""
    for name, text in LLAVA.items():
        path = tmp_path / "code/llava" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    module = runner("llava_jp")
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(module, "TOWER", tower | {"projection_dim": 8, "image_size": 14, "patch_size": 14})
    size = {"size": {"shortest_edge": 14}, "crop_size": {"height": 14, "width": 14}}
    monkeypatch.setattr(module, "PICTURES", size)
    tokenizer = Processor()
    replace("AutoTokenizer", SimpleNamespace(from_pretrained=lambda *args, **options: tokenizer))

    def load(folder=None):
        if folder is None:
            module.pin_vision_tower()
            code = importlib.import_module("llava.model.llava_gpt2")
            ends = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": PAD, "pretrain_mm_mlp_adapter": None}
            config = code.LlavaConfig(
                vocab_size=12, n_embd=8, n_layer=1, n_head=2, n_positions=64, mm_vision_tower="openai/clip", **ends
            )
            torch.manual_seed(0)
            code.LlavaGpt2ForCausalLM(config).save_pretrained(tmp_path / "weights")
            folder = tmp_path / "weights"
            config = json.loads((folder / "config.json").read_text())
            config["pretrain_mm_mlp_adapter"] = "checkpoints/mm_projector.bin"
            (folder / "config.json").write_text(json.dumps(config))
        kept = []
        monkeypatch.setattr(module, "about", lambda model: kept.append(model) or {})
        header = {"model": str(folder), "revision": None, "trust_remote_code": False, "decoding": DECODING}
        return SimpleNamespace(caption=module.load(header)[0], model=kept[0], folder=folder)

    yield load
    for name in [name for name in sys.modules if name.split(".")[0] == "llava"]:
        del sys.modules[name]


def test_llava_jps_tower_comes_with_its_checkpoint(llava, hub):
    """Nothing is read from the repository that its code names, and no pickle."""
    loaded = llava()
    caption = loaded.caption(png(), "何色")
    ids, images = loaded.model.seen
    assert ids.tolist() == [[-200, *PROMPT]] * 3 and images.shape == (3, 3, 14, 14)
    assert len(caption.split()) <= 4  # without the prompt
    assert not any("openai" in str(request) for request in hub.log)


def test_llava_jps_tower_must_be_in_its_checkpoint(llava, tmp_path):
    source = llava().folder

    def change(weights):
        name = next(name for name in weights if "vision_tower" in name and "patch_embedding" in name)
        del weights[name]

    folder = copied(source, tmp_path / "changed", change)
    with pytest.raises(ValueError, match="no weights for model.vision_tower.*patch_embedding"):
        llava(folder)
