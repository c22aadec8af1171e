"""The miniature can be made again, and what is committed is small and of the real model's kind."""

import pytest
from transformers import AutoConfig

from vlmcap.miniature.qwen2_vl import JAPANESE, JAPANESE_PROMPT, LANGUAGES, build_processor, pretrain
from vlmcap.miniature.scenes import scenes
from vlmcap.models.load import PROJECTOR, VISION_TOWERS, chat_prompt, load_model, load_processor


@pytest.mark.parametrize("known", [JAPANESE, LANGUAGES])
def test_pretraining_writes_a_model_that_loads(tmp_path, known):
    pretrain(tmp_path, steps=2, batch_size=8, scene_count=12, known=known)
    model, processor = load_model(str(tmp_path)), load_processor(str(tmp_path))
    projectors = [name for name, _ in model.named_modules() if PROJECTOR.fullmatch(name)]
    assert projectors == ["model.visual.merger"] and model.get_submodule(VISION_TOWERS[0])
    assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")


@pytest.mark.parametrize(("name", "known"), [("qwen2_vl", JAPANESE), ("qwen2_vl_languages", LANGUAGES)])
def test_committed_checkpoint(miniature_dir, name, known):
    folder = miniature_dir.with_name(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 10_000_000
    assert AutoConfig.from_pretrained(folder).model_type == "qwen2_vl"
    committed, built = load_processor(str(folder)), build_processor(known)
    assert committed.tokenizer.get_vocab() == built.tokenizer.get_vocab()
    assert committed.chat_template == built.chat_template
    assert chat_prompt(committed, JAPANESE_PROMPT).count("<|image_pad|>") == 1


def test_a_miniature_that_knows_several_kinds_of_text_writes_them_in_few_tokens(miniature_dir):
    scene = next(scenes(1, seed=7, held_out=True))
    tokenizer = load_processor(str(miniature_dir.with_name("qwen2_vl_languages"))).tokenizer
    for captions in (scene.english(), *(captions(scene) for captions in LANGUAGES.values())):
        for caption in captions:
            ids = tokenizer(caption)["input_ids"]
            assert len(ids) < 32 and tokenizer.decode(ids) == caption
