"""Captions of the sharing engine are those of `generate`, token for token, picture by picture (float32, CPU)."""

import random

import pytest
import torch
from peft import get_peft_model
from transformers import GenerationConfig, LogitsProcessorList

from tests.invariants import tiny
from vlmcap.captioning.branches import BranchGenerator, supports_branches
from vlmcap.captioning.constraints import constraints
from vlmcap.captioning.engines import ADAPTER, BASE, run_engines
from vlmcap.miniature.scenes import scenes
from vlmcap.models.load import ModelArguments, chat_prompt, load_model, load_processor, lora_config

ENDS = 60  # of the tokens end a caption, else a random model would hardly ever end one
PROMPTS = (tiny.PROMPT, "説明", "Describe this picture in one short sentence, please.")


def pictures(count: int = 6) -> list:
    return [
        scene.draw().resize(size) for scene, size in zip(scenes(6, seed=3, held_out=False), tiny.SIZES, strict=True)
    ][:count]


def inputs_of(architecture: str, images: list, prompt: str = tiny.PROMPT) -> list[dict]:
    processor = tiny.build_processor(architecture)
    text = chat_prompt(processor, prompt)
    return [processor(images=[[image]], text=[text], return_tensors="pt") for image in images]


def configuration(model, **settings) -> GenerationConfig:
    text = model.config.get_text_config()
    defaults = {"num_beams": 3, "do_sample": False, "max_new_tokens": 12, "eos_token_id": text.eos_token_id}
    defaults |= {"repetition_penalty": 1.0, "length_penalty": 1.0, "early_stopping": False, "num_return_sequences": 1}
    return GenerationConfig(**(defaults | {"pad_token_id": text.pad_token_id} | settings))


def randomised(architecture: str, seed: int, attention: str = "sdpa"):
    """Another tiny model for each seed, with logits flat enough that all beams matter."""
    model = tiny.build_model(architecture, attention).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.08)
    return model


def ours(model, inputs, config, rows=4, limits=None) -> list:
    found = list(BranchGenerator(model, config, limits or LogitsProcessorList(), rows).run(inputs))
    return sorted(found, key=lambda caption: caption.number)


@torch.inference_mode()
def stock(model, one, config, limits=None):
    """Tokens of `generate` for one picture, padded as the engine pads, and their scores."""
    output = model.generate(
        **one, generation_config=config, logits_processor=limits, return_dict_in_generate=True, output_scores=True
    )
    tokens = output.sequences[:, one["input_ids"].shape[1] :]
    ends = config.eos_token_id
    pad = config.pad_token_id or (ends if isinstance(ends, int) else ends[0])
    tokens = torch.nn.functional.pad(tokens, (0, config.max_new_tokens - tokens.shape[1]), value=pad)
    return tokens, getattr(output, "sequences_scores", None)


def assert_same(model, inputs, config, rows=4, limits=lambda length: None) -> list:
    found = ours(model, inputs, config, rows, limits(0))
    assert [caption.number for caption in found] == list(range(len(inputs)))
    for caption, one in zip(found, inputs, strict=True):
        tokens, scores = stock(model, one, config, limits(one["input_ids"].shape[1]))
        assert torch.equal(caption.tokens, tokens), (caption.number, caption.tokens, tokens)
        if scores is not None:
            assert torch.allclose(caption.scores, scores, atol=1e-5)
    return found


def written(caption, config) -> int:
    """How many tokens the best caption has, its end included."""
    ends = torch.isin(caption.tokens[0], torch.tensor(config.eos_token_id)).nonzero()
    return int(ends[0]) + 1 if len(ends) else config.max_new_tokens


@pytest.mark.parametrize("architecture", tiny.FAMILY)
@pytest.mark.parametrize("part", range(4))
def test_random_models_prompts_and_settings(architecture, part):
    """17 models a part, 204 in all: of each another prompt, number of pictures, width, penalties and ends."""
    lengths = set()
    for seed in range(17 * part, 17 * (part + 1)):
        draw = random.Random(seed)
        model = randomised(architecture, seed)
        vocabulary = model.config.get_text_config().vocab_size
        config = configuration(
            model,
            num_beams=draw.randint(1, 5),
            max_new_tokens=draw.randint(2, 12),
            eos_token_id=draw.sample(range(10, vocabulary), draw.choice((1, 4, ENDS))),
            length_penalty=draw.choice((1.0, 1.0, 0.0, 0.7, 2.0, -1.0)),
            early_stopping=draw.choice((False, False, True, "never")),
            repetition_penalty=draw.choice((1.0, 1.0, 1.3)),
        )
        config.num_return_sequences = draw.randint(1, config.num_beams)
        inputs = inputs_of(architecture, draw.sample(pictures(), draw.randint(1, 4)), draw.choice(PROMPTS))
        found = assert_same(model, inputs, config, rows=draw.randint(1, 4))
        lengths |= {written(caption, config) for caption in found}
    assert len(lengths) > 3, "the captions of random models should end at many lengths"


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_attention_implementations(attention):
    model = randomised("qwen2_vl", 1, "eager" if attention == "eager" else "sdpa")
    model.config.get_text_config()._attn_implementation = attention  # flex_attention is for the language model alone
    reference = randomised("qwen2_vl", 1)
    config = configuration(model, eos_token_id=list(range(10, 10 + ENDS)), num_return_sequences=3)
    inputs = inputs_of("qwen2_vl", pictures(4))
    found = ours(model, inputs, config)
    assert model.config.get_text_config()._attn_implementation == attention
    for caption, one in zip(found, inputs, strict=True):
        assert torch.equal(caption.tokens, stock(reference, one, config)[0])


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_batch_size_and_order_do_not_matter(miniature_dir, rows):
    """The miniature's captions end at different lengths, so that pictures come and go."""
    model, processor = load_model(str(miniature_dir), load_in_4bit=False).eval(), load_processor(str(miniature_dir))
    text = chat_prompt(processor, tiny.PROMPT)
    images = [scene.draw() for scene in scenes(12, seed=5, held_out=False)]
    inputs = [processor(images=[[image]], text=[text], return_tensors="pt") for image in images]
    config = configuration(model, max_new_tokens=24)
    expected = assert_same(model, inputs, config, rows=5)
    assert len({written(caption, config) for caption in expected}) > 2
    backwards = ours(model, inputs[::-1], config, rows)[::-1]
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(backwards, expected, strict=True))


AVOIDED = list("abcdefghijklmnoのいるにがを丸形上下")  # what random captions are full of
LIMITS = {
    "japanese_only": {"japanese_only": True},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "avoid_words": {"avoid_words": AVOIDED},
    "all": {"japanese_only": True, "no_repeat_ngram_size": 2, "avoid_words": AVOIDED},
}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", LIMITS)
def test_constraints(name, beams):
    model, tokenizer = randomised("qwen2_vl", 3), tiny.build_processor("qwen2_vl").tokenizer
    config = configuration(model, num_beams=beams)

    def limits(prompt_length: int):
        asked = LIMITS[name] | {"max_new_tokens": config.max_new_tokens, "eos_token_id": config.eos_token_id}
        return constraints(tokenizer, prompt_length, **asked)

    inputs = inputs_of("qwen2_vl", pictures(3))
    found = assert_same(model, inputs, config, limits=limits)
    free = ours(model, inputs, config)
    assert any(not torch.equal(a.tokens, b.tokens) for a, b in zip(found, free, strict=True))


def test_ties():
    """Tokens with the same row of the output matrix have the same score to the last bit."""
    model = randomised("qwen2_vl", 4)
    with torch.no_grad():
        weights = model.get_input_embeddings().weight
        weights[100:300] = weights[100:101]
    for beams in (1, 3, 5):
        assert_same(model, inputs_of("qwen2_vl", pictures(3)), configuration(model, num_beams=beams))


@pytest.mark.parametrize("beams", [1, 2, 4])
def test_one_token_alone(beams):
    model = randomised("qwen3_vl", 5)
    config = configuration(model, num_beams=beams, max_new_tokens=1, num_return_sequences=beams)
    assert_same(model, inputs_of("qwen3_vl", pictures(5)), config)


class Only:
    """A logits processor that allows some tokens, or all but some."""

    def __init__(self, tokens: list[int], allowed: bool):
        self.tokens, self.allowed = torch.tensor(tokens), allowed

    def __call__(self, ids, scores):
        among = torch.isin(torch.arange(scores.shape[1]), self.tokens)
        return scores.masked_fill(among != self.allowed, -torch.inf)


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_that_never_end(beams):
    model = randomised("qwen2_vl", 6)
    config = configuration(model, num_beams=beams, max_new_tokens=20)
    limits = LogitsProcessorList([Only([config.eos_token_id], allowed=False)])
    found = assert_same(model, inputs_of("qwen2_vl", pictures(3)), config, limits=lambda _: limits)
    assert all(written(caption, config) == 20 for caption in found)


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_that_end_at_once(beams):
    model = randomised("qwen2_vl", 7)
    config = configuration(model, num_beams=beams, eos_token_id=list(range(10, 10 + ENDS)))
    limits = LogitsProcessorList([Only(config.eos_token_id, allowed=True)])
    found = assert_same(model, inputs_of("qwen2_vl", pictures(5)), config, rows=2, limits=lambda _: limits)
    assert all(written(caption, config) == 1 for caption in found)


def test_samples_come_from_the_models_distribution():
    """The first tokens of 3,000 samples against the probabilities of the model, cut by top_k and temperature."""
    model = randomised("qwen2_vl", 8)
    config = configuration(
        model,
        num_beams=1,
        do_sample=True,
        num_return_sequences=600,
        max_new_tokens=2,
        temperature=1.5,
        top_k=5,
        top_p=1.0,
    )
    (one,) = inputs_of("qwen2_vl", pictures(1))
    generator = torch.Generator().manual_seed(0)
    found = BranchGenerator(model, config, LogitsProcessorList(), 2, generator).run([one] * 5)
    tokens = torch.cat([caption.tokens[:, 0] for caption in found])
    with torch.inference_mode():
        best = (model(**one).logits[0, -1] / 1.5).topk(5)
    expected = dict(zip(best.indices.tolist(), best.values.softmax(-1).tolist(), strict=True))
    assert set(tokens.tolist()) == set(expected)
    for token, probability in expected.items():
        deviation = (probability * (1 - probability) / len(tokens)) ** 0.5
        assert abs((tokens == token).float().mean().item() - probability) < 5 * deviation


def test_a_sample_is_continued_by_its_own_tokens():
    """With top_k 1 each sample is the greedy caption, whatever its neighbours in the cache are."""
    model = randomised("qwen2_vl", 9)
    inputs = inputs_of("qwen2_vl", pictures(4))
    greedy = configuration(model, num_beams=1, eos_token_id=list(range(10, 10 + ENDS)))
    sampled = configuration(
        model, num_beams=1, do_sample=True, top_k=1, num_return_sequences=3, eos_token_id=list(range(10, 10 + ENDS))
    )
    for one, three in zip(ours(model, inputs, greedy), ours(model, inputs, sampled), strict=True):
        assert torch.equal(three.tokens, one.tokens.expand(3, -1))


def test_what_the_engine_knows():
    assert supports_branches(tiny.build_model("qwen2_vl"))
    model = tiny.build_model("qwen2_vl")
    model.config.get_text_config()._attn_implementation = "flash_attention_2"
    assert not supports_branches(model)


@pytest.mark.parametrize("architecture", tiny.FAMILY)
def test_base_and_adapter_in_one_pass(architecture):
    """The captions of each alone; the vision encoder runs once a picture for both."""
    model = get_peft_model(randomised(architecture, 10), lora_config_of(architecture)).eval()
    tiny.randomise_adapter(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name and parameter.ndim > 1:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    config = configuration(model, eos_token_id=list(range(10, 10 + ENDS)))
    inputs = inputs_of(architecture, pictures())
    adapted = ours(model, inputs, config)
    with model.disable_adapter():
        based = ours(model, inputs, config)
    assert any(not torch.equal(a.tokens, b.tokens) for a, b in zip(adapted, based, strict=True))

    runs = []
    block = model.get_base_model().model.visual.blocks[0]
    hook = block.register_forward_hook(lambda *call: runs.append(len(call[2])))
    engines = {which: BranchGenerator(model, config, LogitsProcessorList(), rows=4) for which in (BASE, ADAPTER)}
    found = sorted(run_engines(model, engines, inputs), key=lambda pair: (pair[0], pair[1].number))
    hook.remove()
    assert sum(runs) == sum(int(one["image_grid_thw"].prod()) for one in inputs)
    for (which, caption), expected in zip(found, adapted + based, strict=True):
        assert torch.equal(caption.tokens, expected.tokens), (which, caption.number)


def lora_config_of(architecture: str):
    arguments = ModelArguments(model_name_or_path="tiny", lora_dropout=0.0, lora_top_layers=2)
    return lora_config(tiny.build_model(architecture), arguments)
