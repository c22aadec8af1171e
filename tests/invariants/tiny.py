"""Tiny random models of every supported architecture, pictures of several sizes with ragged captions, trainers."""

import json
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from peft import get_peft_model
from PIL import Image
from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor, Qwen3VLProcessor
from trl import SFTConfig, SFTTrainer

from vlmcap.data.images import load_captions
from vlmcap.data.preferences import read_preferences
from vlmcap.miniature.scenes import scenes
from vlmcap.models.load import ModelArguments, load_processor, lora_config
from vlmcap.models.weights import read_adapter
from vlmcap.training.collator import BadImages, conversations
from vlmcap.training.dpo import CaptionDPOTrainer
from vlmcap.training.policy import caption_log_probs
from vlmcap.training.prompts import prompted_rows, with_instructions
from vlmcap.training.trainer import CaptionTrainer
from vlmcap.training.trainer_arguments import CaptionDPOConfig, CaptionSFTConfig

MINIATURE = Path(__file__).resolve().parents[2] / "recipes/miniatures/qwen2_vl"
PROMPT = "この画像を日本語で短く説明してください。"
OTHERS = ["Describe this image briefly.", "Mô tả ảnh này."]
FAMILY = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PAIRS = 14  # of preferences.jsonl
# Width x height in pixels: 9 to 24 image tokens, so that prefixes of one batch differ in length.
SIZES = ((84, 84), (112, 84), (84, 140), (168, 112), (112, 112), (84, 112))


def write_pictures(folder: Path) -> None:
    """Six pictures in six sizes with one to seven captions each, and the published rows in data/."""
    rows = []
    for number, (scene, size) in enumerate(zip(scenes(6, seed=3, held_out=False), SIZES, strict=True)):
        scene.draw().resize(size).save(folder / f"{number}.png")
        captions = [*scene.japanese(), *scene.japanese(polite=True)][: (5, 1, 3, 7, 2, 5)[number]]
        rows.append({"image_id": number, "file_name": f"{number}.png", "captions": captions})
    datasets.Dataset.from_list(rows).to_parquet(folder / "data/train-00000-of-00001.parquet")


def write_preferences(folder: Path) -> None:
    """Beside the pictures: preferences.jsonl, two or three pairs of all but one; prompted.jsonl, the same with three
    prompts; and the adapter of `build_start`."""
    rows = datasets.Dataset.from_parquet(str(folder / "data/train-00000-of-00001.parquet"))
    lines = []
    for row in rows.filter(lambda row: len(row["captions"]) > 1):
        texts = row["captions"]
        # Captions of unequal lengths, some of them in two pairs of an image, chosen and rejected.
        pairs = [(texts[0], texts[1]), (texts[-1] + "。", texts[0]), (texts[1], texts[0] + "と" + texts[1])]
        for chosen, rejected in pairs[: 2 if len(texts) == 2 else 3]:
            lines.append({"prompt": PROMPT, "chosen": chosen, "rejected": rejected, "image": row["file_name"]})
    assert len(lines) == PAIRS
    prompted = [line | {"prompt": (PROMPT, *OTHERS)[number % 3]} for number, line in enumerate(lines)]
    for name, written in (("preferences", lines), ("prompted", prompted)):
        text = "".join(json.dumps(line) + "\n" for line in written)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    start = build_start()
    start.peft_config["default"].base_model_name_or_path = "tiny"
    start.save_pretrained(folder / "adapter", save_embedding_layers=False)


def build_start():
    """The adapter that training on preferences starts from, on its base."""
    model = build_model("qwen2_vl")
    arguments = ModelArguments(model_name_or_path="tiny", lora_dropout=0.1, lora_top_layers=2)
    model = get_peft_model(model, lora_config(model, arguments))
    randomise_adapter(model)
    return model


def build_preference_trainer(
    pictures: Path, output_dir: Path, validation=None, source="preferences.jsonl", others=(), **settings
) -> CaptionDPOTrainer:
    """A CaptionDPOTrainer on preferences beside `pictures`, held out too; one batch an epoch by default."""
    rows = read_preferences(str(pictures / source), PROMPT, str(pictures), others=others)
    settings = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": len(rows),
        "gradient_checkpointing": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "beta": 0.3,
    } | settings
    model = build_model("qwen2_vl")
    return CaptionDPOTrainer(
        model=model,
        args=CaptionDPOConfig(**settings),
        rows=rows,
        heldout=rows,
        processing_class=build_processor("qwen2_vl"),
        prompt=PROMPT,
        bad_images=BadImages(pictures / "bad_images.jsonl", limit=0),
        peft_config=lora_config(model, ModelArguments(model_name_or_path="tiny", lora_top_layers=2)),
        adapter=read_adapter(str(pictures / "adapter")),
        validation=validation,
    )


def prompted(rows: datasets.Dataset) -> datasets.Dataset:
    """The pictures with one to eight captions in three languages and two styles, each with the prompt of its key, and
    three conversations about two of them, one with a system's turn."""
    captions, languages, styles = [], [], []
    for number, scene in enumerate(scenes(len(rows), seed=3, held_out=False)):
        said = [
            *((text, "ja", "plain") for text in scene.japanese()[:2]),
            *((text, "en", "") for text in scene.english()[:3]),
            *((text, "ja", "polite") for text in scene.japanese(polite=True)[:1]),
            *((text, "vi", "") for text in scene.vietnamese()[:2]),
        ]
        said = said[number : number + (8, 5, 1, 4, 3, 2)[number]] if number else said
        for column, values in zip((captions, languages, styles), zip(*said, strict=True), strict=True):
            column.append(list(values))
    rows = rows.select_columns(["image", "image_id", "file_name"])
    for name, values in (("captions", captions), ("languages", languages), ("styles", styles)):
        rows = rows.add_column(name, values)
    wordings = {
        "ja/plain": ["説明して", "この画像を日本語で短く説明してください。"],
        "ja/polite": ["丁寧に説明してください"],
    }
    wordings |= {"en": ["Describe this image briefly."], "vi": ["Mô tả ảnh này."]}
    instructions = rows.select([1, 1, 4]).select_columns(["image", "image_id", "file_name"])
    talks = [
        [("user", "What is it?"), ("assistant", "a star"), ("user", "色は?"), ("assistant", "赤です")],
        [("user", "How many?"), ("assistant", "two")],
        [("system", "Be brief."), ("user", "Where?"), ("assistant", "above"), ("user", "?"), ("assistant", "below")],
    ]
    talks = [[{"role": role, "content": text} for role, text in talk] for talk in talks]
    instructions = instructions.add_column("messages", talks)
    return with_instructions(prompted_rows(rows, wordings, None, seed=2), instructions, PROMPT)


def branch_log_probs(trainer, batch: dict) -> list[torch.Tensor]:
    """Of each branch of a batch of one picture: the log-probabilities of its trained tokens."""
    values = caption_log_probs(trainer.model, batch, trainer.attention)
    start = batch["caption_start"]
    segments, trained = batch["segments"][0, start:], batch["labels"][0, start:] != -100
    return [values[0, (segments == segment) & trained] for segment in range(2, int(segments.max()) + 1)]


def read_pictures(folder: Path) -> datasets.Dataset:
    return load_captions(str(folder / "data"), "train", image_dir=str(folder))


def build_processor(architecture: str):
    """The miniature's tokenizer and template with the image processor of an architecture."""
    miniature = load_processor(str(MINIATURE))
    kind = Qwen3VLProcessor if architecture == "qwen3_vl" else Qwen2VLProcessor
    patch = {"patch_size": 16 if architecture == "qwen3_vl" else 14}
    return kind(
        image_processor=Qwen2VLImageProcessor(size={"shortest_edge": 56 * 56, "longest_edge": 280 * 280}, **patch),
        video_processor=Qwen2VLVideoProcessor(**patch),
        tokenizer=miniature.tokenizer,
        chat_template=miniature.chat_template,
    )


def build_model(architecture: str, attention: str = "sdpa", hidden: int = 48):
    """A random model of four language layers in float32, the same weights each time; `hidden` is their width."""
    tokenizer = build_processor(architecture).tokenizer
    token = tokenizer.convert_tokens_to_ids
    text = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": 4, "head_dim": hidden // 4}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    section = [hidden // 8 - 2 * (hidden // 24), hidden // 24, hidden // 24]
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}}
    text |= {"pad_token_id": token("<|endoftext|>"), "bos_token_id": None, "eos_token_id": token("<|im_end|>")}
    vision = {
        "qwen2_vl": {"depth": 3, "embed_dim": 32, "num_heads": 2, "hidden_size": hidden},
        "qwen2_5_vl": {
            **{"depth": 3, "hidden_size": 32, "num_heads": 2, "out_hidden_size": hidden, "intermediate_size": 48},
            **{"fullatt_block_indexes": [2], "window_size": 56},
        },
        "qwen3_vl": {
            **{"depth": 3, "hidden_size": 32, "num_heads": 2, "out_hidden_size": hidden, "intermediate_size": 48},
            **{"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
        },
    }[architecture]
    tokens = {"image_token_id": token("<|image_pad|>"), "video_token_id": token("<|video_pad|>")}
    tokens |= {"vision_start_token_id": token("<|vision_start|>"), "vision_end_token_id": token("<|vision_end|>")}
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[architecture]
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=vision, **tokens, tie_word_embeddings=True
    )
    config._attn_implementation = attention
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    with torch.no_grad():  # larger than at initialisation, so that attention and positions matter
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def build_trainer(
    folder: Path,
    rows,
    architecture="qwen2_vl",
    attention="sdpa",
    train_projector=True,
    features=None,
    model=None,
    **settings,
) -> CaptionTrainer:
    """A CaptionTrainer on all pictures, one batch an epoch; of a tiny random model where none is given.

    LoRA on the top two of four layers, without dropout, with B as random as A: at its usual zeros A had no gradient.
    """
    settings = {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": len(rows),
        "gradient_checkpointing": False,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
    } | settings
    model = model or build_model(architecture, attention)
    arguments = ModelArguments(
        model_name_or_path="tiny", lora_dropout=0.0, lora_top_layers=2, train_projector=train_projector
    )
    trainer = CaptionTrainer(
        model=model,
        args=CaptionSFTConfig(**settings),
        rows=rows,
        processing_class=build_processor(architecture),
        prompt=PROMPT,
        bad_images=BadImages(folder / "bad_images.jsonl", limit=0),
        peft_config=lora_config(model, arguments),
        features=features,
    )
    randomise_adapter(trainer.model)
    return trainer


def randomise_adapter(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


def build_stock_trainer(folder: Path, rows, architecture="qwen2_vl", **settings) -> SFTTrainer:
    """TRL's own SFTTrainer on the same captions as prompt-completion examples, with the same adapter. Each of the
    assistant's turns is an example, after all before it."""
    examples = [
        {
            "images": [Image.open(row["image"]["path"]).convert("RGB")],
            "prompt": [{"role": "system", "content": system}] * bool(system)
            + [
                {"role": ("user", "assistant")[number % 2], "content": text}
                for number, text in enumerate(turns[:reply])
            ],
            "completion": [{"role": "assistant", "content": turns[reply]}],
        }
        for row in rows
        for talks, system in [conversations(row, PROMPT)]
        for turns in talks
        for reply in range(1, len(turns), 2)
    ]
    settings = {
        "output_dir": str(folder / "stock"),
        "per_device_train_batch_size": len(examples),
        "gradient_checkpointing": False,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "max_length": None,
        "label_smoothing_factor": 0.1,
    } | settings
    model = build_model(architecture)
    arguments = ModelArguments(model_name_or_path="tiny", lora_dropout=0.0, lora_top_layers=2)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=datasets.Dataset.from_list(examples),
        processing_class=build_processor(architecture),
        peft_config=lora_config(model, arguments),
    )
    randomise_adapter(trainer.model)
    return trainer


def loss_and_gradients(trainer) -> tuple[float, dict[str, torch.Tensor]]:
    """Of one optimizer step over the whole dataset, all micro-batches of it, as `train()` computes them."""
    trainer.model.zero_grad()
    device = trainer.args.device
    count = trainer.args.gradient_accumulation_steps
    trainer.current_gradient_accumulation_steps = count
    batches, num_items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), count, device)
    assert len(batches) == count
    loss = sum(float(trainer.training_step(trainer.model, batch, num_items)) for batch in batches)
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return loss, gradients


def assert_same_step(ours, theirs, tolerance=1e-5, loss_tolerance=1e-6):
    """Losses within 1e-6 of each other, every gradient within 1e-5 of its norm, none of them zero."""
    assert ours[0] == pytest.approx(theirs[0], rel=loss_tolerance)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        size = theirs[1][name].norm()
        assert size > 0, f"{name} has no gradient"
        assert (gradient - theirs[1][name]).norm() <= tolerance * size, name
