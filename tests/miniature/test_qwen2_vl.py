"""The miniature can be made again, and what is committed is small and of the real model's kind."""

from transformers import AutoConfig

from vlmcap.miniature.qwen2_vl import JAPANESE_PROMPT, build_processor, pretrain
from vlmcap.models.load import PROJECTOR, VISION_TOWERS, chat_prompt, load_model, load_processor


def test_pretraining_writes_a_model_that_loads(tmp_path):
    pretrain(tmp_path, steps=2, batch_size=8, scene_count=12)
    model, processor = load_model(str(tmp_path)), load_processor(str(tmp_path))
    projectors = [name for name, _ in model.named_modules() if PROJECTOR.fullmatch(name)]
    assert projectors == ["model.visual.merger"] and model.get_submodule(VISION_TOWERS[0])
    assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")


def test_committed_checkpoint(miniature_dir):
    assert sum(path.stat().st_size for path in miniature_dir.iterdir()) < 10_000_000
    assert AutoConfig.from_pretrained(miniature_dir).model_type == "qwen2_vl"
    committed, built = load_processor(str(miniature_dir)), build_processor()
    assert committed.tokenizer.get_vocab() == built.tokenizer.get_vocab()
    assert committed.chat_template == built.chat_template
    assert chat_prompt(committed, JAPANESE_PROMPT).count("<|image_pad|>") == 1
