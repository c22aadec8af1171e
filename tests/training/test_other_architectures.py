"""A vision-language model that the shared-prefix engine does not know trains with the reference engine."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
)

from tests.invariants import tiny
from vlmcap.models.load import ModelArguments, free_frozen_parts, load_processor, lora_config
from vlmcap.training.collator import BadImages
from vlmcap.training.trainer import CaptionTrainer
from vlmcap.training.trainer_arguments import CaptionSFTConfig


@pytest.fixture
def rows(tmp_path):
    tiny.write_pictures(tmp_path)
    return tiny.read_pictures(tmp_path)


@pytest.fixture
def llava(miniature_dir):
    """A random LLaVA: CLIP tower, two-layer projector, Qwen2 language model; its module names are not Qwen2-VL's."""
    miniature = load_processor(str(miniature_dir))
    tokenizer = miniature.tokenizer
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    token = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=token))
    pictures = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default", image_token="<|image_pad|>",
        num_additional_image_tokens=1, chat_template=miniature.chat_template,
    )  # fmt: skip
    return model, processor


def test_llava_trains_one_caption_at_a_time(llava, rows, tmp_path, capsys):
    model, processor = llava
    arguments = ModelArguments(model_name_or_path="llava", lora_top_layers=2)
    settings = {"max_steps": 2, "per_device_train_batch_size": 3, "report_to": "none", "save_strategy": "no"}
    trainer = CaptionTrainer(
        model=model,
        args=CaptionSFTConfig(output_dir=str(tmp_path), use_cpu=True, logging_steps=1, learning_rate=1e-2, **settings),
        rows=rows,
        processing_class=processor,
        prompt=tiny.PROMPT,
        bad_images=BadImages(tmp_path / "bad_images.jsonl", limit=0),
        peft_config=lora_config(model, arguments),
    )
    notice = capsys.readouterr().out.strip().splitlines()[-1]
    assert notice.startswith("Note: llava is trained one caption a sequence") and "qwen2_vl" in notice
    assert not trainer.shared_prefix
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert not [name for name in trained if "vision_tower" in name]
    assert {name.split(".layers.")[1][0] for name in trained if ".lora_" in name} == {"1", "2"}
    assert [name for name in trained if "multi_modal_projector.modules_to_save" in name]
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert not [n for n, p in trainer.model.named_parameters() if n in before and torch.equal(p, before[n])]
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_its_tower_is_frozen_and_free(llava):
    model, _ = llava
    model = get_peft_model(model, lora_config(model, ModelArguments(model_name_or_path="llava", lora_top_layers=2)))
    model.enable_input_require_grads()
    free_frozen_parts(model)
    features = model.get_base_model().model.vision_tower(torch.randn(1, 3, 28, 28)).last_hidden_state
    assert not features.requires_grad
