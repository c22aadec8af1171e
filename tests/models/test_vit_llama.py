"""A frozen ViT with a Llama under LoRA: gradients, padding, generation, saving; on tiny random models."""

import shutil

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from vlmcap.models.load import ModelError
from vlmcap.models.vit_llama import VitLlamaArguments, add_lora, build_vit_llama, load_vit_llama

SIZE, PATCHES = 32, 16
TITLES = [
    "Charred Cabbage with Walnut Cream",
    "Walnut Cream Cabbage Rolls",
    "Rolls-Royce Rolls with Rye and Rye",
    "Plum and Plum Brandy Dumplings",
    "Dumplings in Dumpling Broth",
    "Crème de Céleri, Chilled",
    "Chilled Cherry-Chocolate Custards",
    "Choco-Cherry Candied Cabbage",
    "Rye , Rye 's Best",
    "Twice-Twice-Baked Potatoes (for 2 or 22)",
]
BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"


def write_tokenizer(folder, specials=(BOS, EOS, PAD)) -> int:
    """Byte-level BPE learned from the titles, special tokens after the rest and no pad token, as in Llama 3.2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TITLES, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(list(specials))
    begin = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[begin])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=True
    )
    fast.save_pretrained(folder)
    return len(fast)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small are multiplied faster by one, by far where other processes compute too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders vit/ and llama/ of random models, larger than at initialisation, so that attention matters."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4}
    vit = ViTModel(
        ViTConfig(image_size=SIZE, patch_size=8, hidden_size=32, intermediate_size=64, **sizes, initializer_range=0.2)
    )
    vit.save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder / "vit")
    vocabulary = write_tokenizer(folder / "llama")
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_key_value_heads=2,
            **sizes,
            tie_word_embeddings=True,
            initializer_range=0.1,
            bos_token_id=vocabulary - 3,
            eos_token_id=vocabulary - 2,
        )
    )
    llama.generation_config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9)  # Llama 3.2's
    llama.save_pretrained(folder / "llama")
    return folder


@pytest.fixture(scope="module")
def arguments(parts):
    def arguments(**changes) -> VitLlamaArguments:
        return VitLlamaArguments(str(parts / "vit"), None, str(parts / "llama"), **changes)

    return arguments


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """One for each title: four by four random colours."""
    colours = torch.rand(len(TITLES), 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return colours.repeat_interleave(SIZE // 4, dim=2).repeat_interleave(SIZE // 4, dim=3)


def batch(processor, titles=TITLES) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels of the contract: labels[:, i] follows input_ids[:, i]."""
    tokenizer = processor.tokenizer
    captions = [tokenizer(title, add_special_tokens=False)["input_ids"] for title in titles]
    longest = max(map(len, captions)) + 1
    ids = torch.full((len(captions), longest), tokenizer.pad_token_id)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, caption in enumerate(captions):
        length = len(caption) + 1
        ids[row, :length] = torch.tensor([tokenizer.bos_token_id, *caption])
        labels[row, :length] = torch.tensor([*caption, tokenizer.eos_token_id])
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_of(model, pictures, texts) -> torch.Tensor:
    logits = model(pixel_values=pictures, input_ids=texts["input_ids"], attention_mask=texts["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), texts["labels"].flatten())


def decoding(processor, num_beams=1, **more) -> GenerationConfig:
    tokenizer = processor.tokenizer
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids |= {"pad_token_id": tokenizer.pad_token_id, "decoder_start_token_id": tokenizer.bos_token_id}
    return GenerationConfig(num_beams=num_beams, do_sample=False, **({"max_new_tokens": 40} | ids | more))


@pytest.fixture
def adapted(arguments):
    """adapted(image_prefix=...): a model whose LoRA matters, B as random as A, and its processor."""

    def adapted(**changes):
        args = arguments(**{"lora_dropout": 0.0} | changes)
        model, processor = build_vit_llama(args, seed=0)
        model = add_lora(model, args)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in sorted(model.named_parameters()):
            if ".lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        return model, processor

    return adapted


@pytest.mark.parametrize("image_prefix", ["pooled", "patches"])
def test_ten_titles_are_learned_sub_word_for_sub_word(arguments, pictures, image_prefix):
    args = arguments(
        image_prefix=image_prefix, lora_r=32, lora_alpha=32, lora_target_modules=["q_proj", "v_proj", "up_proj"]
    )
    model, processor = build_vit_llama(args, seed=0)
    torch.manual_seed(0)
    model = add_lora(model, args)
    texts = batch(processor)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    untrained = model.eval().generate(pixel_values=pictures, generation_config=decoding(processor))
    model.train()
    for _ in range(120):
        loss = loss_of(model, pictures, texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    assert not set(processor.batch_decode(untrained, skip_special_tokens=True)) & set(TITLES)
    for num_beams in (1, 3):
        ids = model.generate(pixel_values=pictures, generation_config=decoding(processor, num_beams))
        assert processor.batch_decode(ids, skip_special_tokens=True) == TITLES, num_beams
        ends = [processor.tokenizer(t, add_special_tokens=False)["input_ids"] for t in TITLES]
        ends = [[*caption, processor.tokenizer.eos_token_id] for caption in ends]
        assert [row[: len(e)] for row, e in zip(ids.tolist(), ends, strict=True)] == ends  # new tokens alone, no bos
    swapped = model.generate(pixel_values=pictures.flip(0), generation_config=decoding(processor))
    assert processor.batch_decode(swapped, skip_special_tokens=True) == TITLES[::-1]


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_gradients_reach_projection_and_lora_and_nothing_else(adapted, pictures, load_in_4bit):
    model, processor = adapted(load_in_4bit=load_in_4bit)
    model.train()
    loss_of(model, pictures, batch(processor)).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert moved == trained.keys()
    assert all(p.dtype == torch.float32 for p in trained.values())
    prefix = "base_model.model."
    layers = [f"{prefix}decoder.model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]
    expected = {f"{layer}.lora_{m}.default.weight" for layer in layers for m in "AB"}
    expected |= {f"{prefix}image_projection.modules_to_save.default.{p}" for p in ("weight", "bias")}
    assert moved == expected


def test_captions_between_steps_leave_the_4bit_decoder_as_it_is(repacking_processor, adapted, pictures):
    def step(captions: bool):
        model, processor = adapted(load_in_4bit=True)
        if captions:
            model.eval()
            model.generate(pixel_values=pictures, generation_config=decoding(processor, max_new_tokens=2))
        model.train()
        loss = loss_of(model, pictures, batch(processor))
        loss.backward()
        layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
        return loss, [layer.weight.data for layer in layers], [p.grad for p in model.parameters() if p.requires_grad]

    plain, captioned = step(captions=False), step(captions=True)
    assert plain[0] == captioned[0] and plain[1]
    assert all(map(torch.equal, plain[1], captioned[1])) and all(map(torch.equal, plain[2], captioned[2]))


def test_the_encoder_stays_in_eval_mode_and_records_nothing(adapted, pictures):
    model, _ = adapted()
    model.train()
    vit_llama = model.get_base_model()
    assert vit_llama.decoder.training and not any(m.training for m in vit_llama.encoder.modules())
    assert not vit_llama.image_features(pictures).requires_grad


def test_gradient_checkpointing_changes_no_gradient(adapted, pictures):
    def gradients(model, processor):
        model.train()
        loss_of(model, pictures, batch(processor)).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain = gradients(*adapted())
    model, processor = adapted()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    checkpointed = gradients(model, processor)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


@pytest.mark.parametrize(("image_prefix", "length"), [("pooled", 1), ("patches", PATCHES)])
def test_prefix_is_before_the_text_and_logits_after_each_token(adapted, pictures, image_prefix, length):
    """Against the Llama run by hand over the whole sequence."""
    model, processor = adapted(image_prefix=image_prefix)
    vit_llama = model.get_base_model()
    ids = batch(processor, TITLES[:1])["input_ids"]
    states = vit_llama.encoder(pictures[:1]).last_hidden_state
    features = states[:, :1] if image_prefix == "pooled" else states[:, 1:]
    prefix = vit_llama.image_projection(features) * vit_llama.config.prefix_scale
    assert prefix.shape[1] == length
    everything = torch.cat([prefix, vit_llama.decoder.model.embed_tokens(ids)], dim=1)
    logits = vit_llama.decoder(inputs_embeds=everything).logits[:, length:]
    torch.testing.assert_close(model(pixel_values=pictures[:1], input_ids=ids).logits, logits)


def test_padding_changes_no_logit_and_no_caption(adapted, pictures):
    model, processor = adapted(image_prefix="patches")
    texts = batch(processor)
    together = model(
        pixel_values=pictures, input_ids=texts["input_ids"], attention_mask=texts["attention_mask"]
    ).logits
    for row, title in enumerate(TITLES):
        alone = batch(processor, [title])["input_ids"]
        logits = model(pixel_values=pictures[row : row + 1], input_ids=alone).logits
        torch.testing.assert_close(together[row, : alone.shape[1]], logits[0], rtol=1e-4, atol=1e-5)
    config = decoding(processor, 3, max_new_tokens=8)
    ids = model.generate(pixel_values=pictures, generation_config=config)
    assert torch.equal(ids[4:5], model.generate(pixel_values=pictures[4:5], generation_config=config))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_follows_the_forward_pass(adapted, pictures, num_beams):
    """The cached steps of `generate` see what `forward` sees: greedy is the argmax of each position."""
    model, processor = adapted(image_prefix="patches")
    config = decoding(processor, num_beams, max_new_tokens=6, no_repeat_ngram_size=2)
    ids = model.generate(pixel_values=pictures, generation_config=config)
    assert ids.shape == (len(TITLES), 6)
    pairs = [list(zip(row, row[1:], strict=False)) for row in ids.tolist()]
    assert all(len(set(row)) == len(row) for row in pairs)  # no_repeat_ngram_size=2
    if num_beams == 1:
        bos = torch.full((len(TITLES), 1), processor.tokenizer.bos_token_id)
        ids = model.generate(pixel_values=pictures, generation_config=decoding(processor, max_new_tokens=6))
        logits = model(pixel_values=pictures, input_ids=torch.cat([bos, ids], dim=1)).logits
        assert torch.equal(logits[:, :-1].argmax(-1), ids)


def test_the_prefix_starts_as_large_as_an_embedding(arguments, pictures):
    model, _ = build_vit_llama(arguments(), seed=0)
    embeddings = model.get_input_embeddings().weight
    empty = torch.empty(len(pictures), 0, embeddings.shape[1])
    prefix = model.with_prefix(pictures, empty).detach()
    assert prefix.square().mean().sqrt() == pytest.approx(embeddings.square().mean().sqrt().item(), rel=0.2)
    five, _ = build_vit_llama(arguments(prefix_size=5), seed=0)
    torch.testing.assert_close(five.with_prefix(pictures, empty), 5 * prefix)
    same, _ = build_vit_llama(arguments(), seed=0)
    other, _ = build_vit_llama(arguments(), seed=1)
    assert torch.equal(same.with_prefix(pictures, empty), prefix)
    assert not torch.allclose(other.with_prefix(pictures, empty), prefix)


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("image_prefix", ["pooled", "patches"])
def test_saved_and_reloaded_in_one_call(adapted, pictures, tmp_path, image_prefix, load_in_4bit):
    model, processor = adapted(image_prefix=image_prefix, load_in_4bit=load_in_4bit)
    model.eval()
    model.get_base_model().image_projection.modules_to_save["default"].bias.data += 0.1  # as if trained
    texts = batch(processor)
    inputs = {"pixel_values": pictures, "input_ids": texts["input_ids"], "attention_mask": texts["attention_mask"]}
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    reloaded, reloaded_processor = load_vit_llama(str(tmp_path))
    assert torch.equal(reloaded(**inputs).logits, expected)
    assert not torch.equal(build_vit_llama_like(model)(**inputs).logits, expected)
    assert reloaded_processor.tokenizer.pad_token == PAD
    assert torch.equal(batch(reloaded_processor)["input_ids"], texts["input_ids"])
    assert not any(p.requires_grad for p in reloaded.parameters())
    quantised = [isinstance(m, Linear4bit) for m in reloaded.get_base_model().decoder.model.layers.modules()]
    assert any(quantised) == load_in_4bit


def build_vit_llama_like(model):
    """The same parts without what was trained."""
    config = model.get_base_model().config
    names = (config.encoder_name_or_path, None, config.decoder_name_or_path, None)
    args = VitLlamaArguments(*names, config.image_prefix, load_in_4bit=config.load_in_4bit)
    return build_vit_llama(args, seed=0)[0]


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_nothing_of_the_frozen_parts_is_saved(adapted, tmp_path, load_in_4bit):
    model, _ = adapted(load_in_4bit=load_in_4bit)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    projection = {n for n in tensors if n.startswith("base_model.model.image_projection.")}
    lora = {n for n in tensors if n.startswith("base_model.model.decoder.model.layers.") and ".lora_" in n}
    assert len(projection) == 2 and len(lora) == 2 * 2 * 2
    assert tensors.keys() == projection | lora
    assert not list(tmp_path.glob("*.bin")) and not (tmp_path / "model.safetensors").exists()


def test_nf4_on_the_layers_of_the_llama_alone(arguments):
    model, _ = build_vit_llama(arguments(load_in_4bit=True), seed=0)
    weight = model.decoder.model.layers[0].mlp.up_proj.weight
    assert weight.quant_type == "nf4" and weight.compress_statistics  # double quantisation
    quantised = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(quantised) == 2 * 7 and all(name.startswith("decoder.model.layers.") for name in quantised)


def test_a_processor_needs_no_code_of_ours(fresh_python, adapted, tmp_path):
    """AutoProcessor on the adapter's folder, beside a config.json of a type that transformers does not know."""
    model, processor = adapted()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoProcessor; p = AutoProcessor.from_pretrained(sys.argv[1]);"
        "print(p.tokenizer('Rye')['input_ids'], p.tokenizer.pad_token, p.image_processor.size['height'])"
    )
    printed = fresh_python(code, str(tmp_path))
    assert printed.strip() == f"{processor.tokenizer('Rye')['input_ids']} {PAD} {SIZE}"


def test_adapter_and_parts_from_the_hub(hub, parts, arguments, pictures, tmp_path):
    from huggingface_hub import HfApi

    api = HfApi()
    for name in ("vit", "llama"):
        api.create_repo(f"user/{name}")
        api.upload_folder(repo_id=f"user/{name}", folder_path=parts / name)
    args = VitLlamaArguments("user/vit", None, "user/llama", None)
    model, processor = build_vit_llama(args, seed=0)
    model = add_lora(model, args).eval()
    commit = api.model_info("user/llama").sha
    assert model.get_base_model().config.decoder_revision == commit
    expected = model(pixel_values=pictures, input_ids=batch(processor)["input_ids"]).logits
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    api.create_repo("user/titles")
    first = api.upload_folder(repo_id="user/titles", folder_path=tmp_path).oid
    api.delete_file("config.json", "user/titles")
    api.delete_file("model.safetensors", "user/llama")  # the adapter names the commit that it was trained on

    reloaded, _ = load_vit_llama("user/titles", revision=first)
    assert torch.equal(reloaded(pixel_values=pictures, input_ids=batch(processor)["input_ids"]).logits, expected)
    with pytest.raises(ModelError, match="user/titles"):
        load_vit_llama("user/titles")


def test_a_classifier_checkpoint_without_pooler_is_taken(parts, arguments, pictures, tmp_path):
    """google/vit-base-patch16-224 has a classification head and no pooler."""
    classifier = ViTForImageClassification(ViTModel.from_pretrained(parts / "vit").config)
    classifier.vit.load_state_dict(ViTModel.from_pretrained(parts / "vit", add_pooling_layer=False).state_dict())
    shutil.copytree(parts / "vit", tmp_path / "vit")
    classifier.save_pretrained(tmp_path / "vit")
    ours, _ = build_vit_llama(arguments(), seed=0)
    theirs, _ = build_vit_llama(VitLlamaArguments(str(tmp_path / "vit"), None, str(parts / "llama")), seed=0)
    assert torch.equal(theirs.image_features(pictures), ours.image_features(pictures))


def test_what_does_not_fit_is_refused(parts, arguments, tmp_path):
    model, _ = build_vit_llama(arguments(), seed=0)
    with pytest.raises(ModelError, match=r"'query' matches nothing .*; there are down_proj, gate_proj"):
        add_lora(model, arguments(lora_target_modules=["q_proj", "query"]))
    with pytest.raises(ModelError, match="nowhere.*cannot be loaded"):
        build_vit_llama(VitLlamaArguments(str(tmp_path / "nowhere"), None, str(parts / "llama")), seed=0)
    with pytest.raises(ModelError, match="of type 'vit', where one of type 'llama' is needed"):
        shutil.copytree(parts / "vit", tmp_path / "swapped")
        write_tokenizer(tmp_path / "swapped")
        build_vit_llama(VitLlamaArguments(str(parts / "vit"), None, str(tmp_path / "swapped")), seed=0)
    with pytest.raises(ModelError, match="has no pad_token"):
        shutil.copytree(parts / "llama", tmp_path / "llama")
        write_tokenizer(tmp_path / "llama", specials=(BOS, EOS))
        build_vit_llama(VitLlamaArguments(str(parts / "vit"), None, str(tmp_path / "llama")), seed=0)
    with pytest.raises(ModelError, match="is not an adapter: it has no adapter_config.json"):
        load_vit_llama(str(parts / "llama"))
