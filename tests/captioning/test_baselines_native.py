"""Every row of the table that runs here: a tiny random model of its class with its processor, in the same code."""

import json

import datasets
import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    BertTokenizer,
    Blip2Processor,
    BlipImageProcessor,
    BlipProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GemmaTokenizer,
    GotOcr2ImageProcessor,
    GPT2Tokenizer,
    InternVLProcessor,
    InternVLVideoProcessor,
    PaliGemmaProcessor,
    Qwen2Tokenizer,
    SiglipImageProcessor,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from tests.invariants import tiny
from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.captioning.baselines import read_table
from vlmcap.captioning.generate import caption_with_prompt, caption_without_prompt, check_beams
from vlmcap.captioning.predictions import PredictionsError, model_record
from vlmcap.captioning.split import SplitFile, caption_split
from vlmcap.data.images import load_captions
from vlmcap.miniature.scenes import scenes
from vlmcap.models.load import ModelError, chat_prompt, load_model, load_processor

QWEN = {"Qwen2VL": "qwen2_vl", "Qwen2_5_VL": "qwen2_5_vl", "Qwen3VL": "qwen3_vl"}
UNPROMPTED = ["Blip", "Blip2"]
FAMILIES = [*QWEN, "InternVL", "Gemma3", "SmolVLM", "PaliGemma", *UNPROMPTED]
TURN = (
    "{% for m in messages %}START{{ m['role'] }}\n{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}END\n{% endfor %}{% if add_generation_prompt %}STARTmodel\n{% endif %}"
)
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "head_dim": 8}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZE = {"height": 28, "width": 28}


def template(start: str, image: str, end: str, bos: str = "") -> str:
    return bos + TURN.replace("START", start).replace("IMAGE", image).replace("END", end)


def learn(tokenizer):
    """A vocabulary of 600 pieces from captions of scenes, with the special tokens of `tokenizer`."""
    texts = [text for scene in scenes(200, 0, held_out=False) for text in (*scene.english(), *scene.japanese())]
    texts += ["この画像を日本語で説明してください。", "caption ja\n", "user\nmodel\n"] * 100
    learned = tokenizer.train_new_from_iterator(texts, 600, show_progress=False)
    learned.model_max_length = 2048
    return learned


def internvl():
    special = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = learn(
        Qwen2Tokenizer(
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            extra_special_tokens=special | {"video_token": "<video>", "start": "<|im_start|>"},
        )
    )
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=SIZE, crop_to_patches=True, min_patches=1, max_patches=3),
        tokenizer,
        InternVLVideoProcessor(),
        image_seq_length=1,
        chat_template=template("<|im_start|>", "<IMG_CONTEXT>", "<|im_end|>"),
    )
    config = transformers.InternVLConfig(
        vision_config=VISION | {"image_size": [28, 28], "patch_size": [14, 14]},
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(tokenizer), "eos_token_id": None},
        image_token_id=processor.image_token_id,
        image_seq_length=1,
    )
    return processor, config


def gemma3():
    special = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = learn(
        GemmaTokenizer(extra_special_tokens=special | {"turn": "<start_of_turn>", "end": "<end_of_turn>"})
    )
    tokenizer.add_bos_token = True  # as the published one
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size=SIZE, do_pan_and_scan=False),
        tokenizer,
        chat_template=template("<start_of_turn>", "<start_of_image>", "<end_of_turn>", "{{ bos_token }}"),
        image_seq_length=4,
    )
    config = transformers.Gemma3Config(
        text_config=TEXT
        | {"vocab_size": len(tokenizer), "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config=VISION | {"image_size": 28, "patch_size": 14, "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    return processor, config


def smolvlm():
    special = {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
    special |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
    special |= {f"r{r}c{c}": f"<row_{r}_col_{c}>" for r in (1, 2, 3) for c in (1, 2, 3)}
    names = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
    tokenizer = learn(GPT2Tokenizer(**names, unk_token="<|endoftext|>", extra_special_tokens=special))
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28}),
        tokenizer,
        SmolVLMVideoProcessor(size={"longest_edge": 28}, max_image_size={"longest_edge": 28}),
        image_seq_len=1,
        chat_template=template("<|im_start|>", "<image>", "<end_of_utterance>"),
    )
    config = transformers.SmolVLMConfig(
        text_config=TEXT
        | {"model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id},
        vision_config=VISION | {"image_size": 28, "patch_size": 14},
        scale_factor=2,
        image_token_id=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return processor, config


def paligemma():
    tokenizer = learn(GemmaTokenizer())
    pictures = SiglipImageProcessor(size=SIZE)
    pictures.image_seq_length = 4
    processor = PaliGemmaProcessor(pictures, tokenizer)
    config = transformers.PaliGemmaConfig(
        text_config=TEXT | {"model_type": "gemma", "vocab_size": len(tokenizer)},
        vision_config=VISION
        | {
            "model_type": "siglip_vision_model",
            "image_size": 28,
            "patch_size": 14,
            "projection_dim": 32,
            "vision_use_head": False,
        },
        projection_dim=32,
        image_token_index=processor.image_token_id,
    )
    return processor, config


def blip():
    tokenizer = learn(BertTokenizer())
    config = transformers.BlipConfig(
        text_config=TEXT
        | {"vocab_size": len(tokenizer) + 2, "bos_token_id": len(tokenizer), "encoder_hidden_size": 16}
        | {name: getattr(tokenizer, name) for name in ("sep_token_id", "pad_token_id")},
        vision_config=VISION | {"image_size": 28, "patch_size": 14, "initializer_range": 0.02},
    )
    return BlipProcessor(BlipImageProcessor(size=SIZE), tokenizer), config


def blip2():
    """Over an OPT, whose tokenizer is GPT-2's with </s> at both ends; a new line ends a caption."""
    tokenizer = learn(GPT2Tokenizer(bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="</s>"))
    processor = Blip2Processor(BlipImageProcessor(size=SIZE), tokenizer, num_query_tokens=4)
    config = transformers.Blip2Config(
        text_config={"model_type": "opt", "vocab_size": len(tokenizer), "hidden_size": 32, "ffn_dim": 64}
        | {"num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}
        | {name: getattr(tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
        | {"eos_token_id": tokenizer.convert_tokens_to_ids("Ċ")},
        qformer_config={"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"encoder_hidden_size": 16, "initializer_range": 0.04},
        vision_config=VISION | {"image_size": 28, "patch_size": 14, "initializer_range": 0.1},  # 1e-10 by default
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return processor, config


BUILD = {"InternVL": internvl, "Gemma3": gemma3, "SmolVLM": smolvlm, "PaliGemma": paligemma}
BUILD |= {"Blip": blip, "Blip2": blip2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family -> folder of a saved model and processor, made when first asked for."""
    made = {}

    def folder(family: str) -> str:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            if family in QWEN:
                processor, config = tiny.build_processor(QWEN[family]), tiny.build_model(QWEN[family]).config
                eos = processor.tokenizer.eos_token_id
            else:
                processor, config = BUILD[family]()
                eos = [processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id]  # Gemma 3 publishes a list
            # A head of its own: with the embeddings as head, a random model repeats the last token whatever it sees.
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
            torch.manual_seed(0)
            model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
            with torch.no_grad():  # larger than at initialisation, so that attention, positions and pictures matter
                for name, parameter in model.named_parameters():
                    if parameter.ndim > 1:
                        if not parameter.any():
                            parameter.normal_(std=0.1)  # Gemma 3's projector begins at zero
                        parameter.mul_(3 if "language_model" in name or "lm_head" in name else 6)
            model.generation_config.eos_token_id = eos
            model.save_pretrained(made[family])
            processor.save_pretrained(made[family])
        return str(made[family])

    return folder


def load(folder: str):
    """A model and its processor, as scripts/infer_baseline.py loads them: BLIP has no sdpa."""
    return load_model(folder, load_in_4bit=False, attn_implementation=None), load_processor(folder)


@pytest.fixture(scope="module")
def pictures():
    """Scenes in four sizes: rows of a batch have different numbers of image tokens where a model allows it."""
    drawn = [scene.draw() for scene in scenes(4, seed=2, held_out=True)]
    sizes = ((84, 84), (168, 84), (84, 140), (112, 112))
    return [picture.resize(size) for picture, size in zip(drawn, sizes, strict=True)]


def test_every_native_row_is_tested(repo_root):
    table = read_table(repo_root / "recipes/configs/baselines.yaml")
    classes = {row.model_class for row in table.rows.values() if row.runs == "here"}
    assert classes == {f"{family}ForConditionalGeneration" for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_says_what_single_images_say(family, folders, pictures):
    model, processor = load(folders(family))
    assert type(model).__name__ == f"{family}ForConditionalGeneration"
    caption = caption_without_prompt if family in UNPROMPTED else caption_with_prompt
    logits, head = [], model.get_output_embeddings()
    for beams in (1, 3):
        args = GenerationArguments(prompt="caption ja", num_beams=beams, max_new_tokens=8)
        hook = head and head.register_forward_hook(lambda module, inputs, output: logits.append(output[:, -1]))
        together = caption(model, processor, pictures, args)
        if hook:
            hook.remove()
        assert together == [caption(model, processor, [picture], args)[0] for picture in pictures]
        assert all(together) and len(set(together)) > 1  # something is said, and the picture matters
    if head:  # at its first step every beam of a picture sees all of it, and so says the same
        first = next(step for step in logits if len(step) == 3 * len(pictures)).unflatten(0, (len(pictures), 3))
        torch.testing.assert_close(first, first[:, :1].expand_as(first))


def test_beams_that_would_get_patches_mixed_up_are_refused(folders):
    """A model of a stranger's code, on transformers that repeat row by row."""

    class Stranger(transformers.GPT2LMHeadModel):
        def forward(self, input_ids=None, pixel_values=None, **rest):
            return super().forward(input_ids, **rest)

    class Careful(Stranger):
        def _expand_inputs_for_generation(self, **inputs):
            return super()._expand_inputs_for_generation(**inputs)

    config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=9)
    patches = torch.zeros(10, 4)
    own = load(folders("Qwen2VL"))[0]
    for model, rows, beams in ((own, patches, 3), (Stranger(config), patches, 1), (Stranger(config), patches[:2], 3)):
        check_beams(model, rows, 2, beams)
    check_beams(Careful(config), patches, 2, 3)
    with pytest.raises(PredictionsError, match="Stranger takes 2 pictures as 10 rows of patches.*--num_beams 1"):
        check_beams(Stranger(config), patches, 2, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_and_run_record(family, folders, pictures, tmp_path):
    rows = [{"image_id": i, "file_name": f"{i}.png", "captions": ["赤い丸"]} for i in range(len(pictures))]
    for row, picture in zip(rows, pictures, strict=True):
        picture.save(tmp_path / row["file_name"])
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    rows = load_captions(str(tmp_path / "data"), "test", image_dir=str(tmp_path))
    folder = folders(family)
    model, processor = load(folder)
    record = {"model": model_record(model, folder, None), "dataset": {"id": "c/d"}, "saw": {}}
    args = GenerationArguments(prompt="caption ja", max_new_tokens=4, generation_batch_size=3)
    caption_split(model, processor, rows, SplitFile(tmp_path / "predictions.jsonl", record, args))
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["image_id"] for line in lines] == [0, 1, 2, 3]
    run = json.loads((tmp_path / "predictions.run.json").read_text(encoding="utf-8"))
    size = {"min_pixels", "max_pixels"} if family in QWEN else {"image_size"}
    assert run["decoding"].keys() == {"num_beams", "max_new_tokens", "do_sample", "batch_size"} | size
    assert run["prompt"] == (None if family in UNPROMPTED else "caption ja")
    assert run["model"]["parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in QWEN])
def test_pixel_bounds_are_refused_where_they_mean_nothing(family, folders):
    with pytest.raises(ModelError, match=f"max_pixels=3136: {family}Processor.*Leave both out"):
        load_processor(folders(family), max_pixels=3136)


@pytest.mark.parametrize("family", ["InternVL", "Gemma3", "SmolVLM", "PaliGemma"])
def test_language_layers_in_nf4(family, folders, pictures):
    """`load_model` checks itself that the layers are 4-bit and that the tower is not."""
    folder = folders(family)
    model = load_model(folder, load_in_4bit=True)
    args = GenerationArguments(prompt="caption ja", max_new_tokens=4)
    assert len(caption_with_prompt(model, load_processor(folder), pictures, args)) == 4


def test_one_beginning_of_text(folders):
    """Gemma 3's template and tokenizer both write it; PaliGemma's processor puts it between image and text."""
    seen = {}

    def keep(**inputs):
        seen.update(inputs)
        return torch.zeros((1, inputs["input_ids"].shape[1] + 1), dtype=torch.long)

    for family in ("Gemma3", "PaliGemma"):
        processor, model = load_processor(folders(family)), load_model(folders(family), load_in_4bit=False)
        model.generate = keep
        caption_with_prompt(model, processor, [Image.new("RGB", (84, 84))], GenerationArguments(prompt="caption ja"))
        assert seen["input_ids"][0].tolist().count(processor.tokenizer.bos_token_id) == 1, family
    text = processor.tokenizer.decode(seen["input_ids"][0])
    assert text == "<image>" * 4 + "<bos>caption ja\n"


def test_a_models_own_penalty_and_sampling_do_not_enter(folders, pictures):
    """Qwen2.5-VL is published with repetition_penalty 1.05 and sampling: all baselines search the same way."""
    folder = folders("Qwen2_5_VL")
    model, processor = load_model(folder, load_in_4bit=False), load_processor(folder)
    args = GenerationArguments(prompt="caption ja", max_new_tokens=12)
    before = caption_with_prompt(model, processor, pictures, args)
    own = {"repetition_penalty": 5.0, "length_penalty": -5.0, "no_repeat_ngram_size": 1, "min_length": 99}
    model.generation_config.update(do_sample=True, temperature=9.0, **own)
    assert caption_with_prompt(model, processor, pictures, args) == before


def test_a_processor_without_a_template_is_refused(folders):
    processor = load_processor(folders("InternVL"))
    processor.chat_template = None
    with pytest.raises(ModelError, match="InternVLProcessor has no chat template"):
        chat_prompt(processor, "caption ja")
