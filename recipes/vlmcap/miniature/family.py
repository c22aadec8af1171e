"""The other miniatures: a BLIP, a ViT, a GPT-2 and a Llama of about a million parameters each.

They stand for Salesforce/blip-image-captioning-base, google/vit-base-patch16-224-in21k, openai-community/gpt2 and
meta-llama/Llama-3.2-1B, with the same classes, module names and special tokens, and know the same drawn scenes as the
Qwen2-VL miniature (vlmcap.miniature.qwen2_vl):

    blip    describes a scene in English; has never seen a Vietnamese word, and its tokenizer strips every tone mark
    vit     knows what is in a scene, as ImageNet's ViT knows what is in a photograph; has never seen a word
    gpt2    writes English captions and titles of scenes that it cannot see, in other words than `Scene.title()`
    llama   likewise

Held-out combinations (`Scene.held_out`) are in nothing that they learn from. They are a demonstration that the
machinery learns, and say nothing about the quality of the real models.
"""

import random
import string
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
    get_cosine_schedule_with_warmup,
)
from transformers.image_processing_utils import BaseImageProcessor

from vlmcap.miniature.scenes import COLOURS, SHAPES, SIZE, Scene, scenes

PATCH = 14  # pixels: 6 x 6 patches
IMAGE_SIZE = {"height": SIZE, "width": SIZE}
VISION = {"hidden_size": 128, "num_attention_heads": 4, "image_size": SIZE, "patch_size": PATCH}
EVALUATED = 200  # held-out scenes
LEARNING_RATE = 1e-3
ARRANGEMENTS = ("horizontal", "vertical")
# How many answers there are to each of the five questions of `answers`.
QUESTIONS = (len(COLOURS), len(SHAPES), len(COLOURS), len(SHAPES), len(ARRANGEMENTS))

# Title Case, in other words than `Scene.title()`: what is learned from these is the words, not its style.
TITLES = (
    "{b} Near a {a}",
    "A {a} and a {b} Together",
    "Picture of a {b} Beside the {a}",
    "{b}, {a} and Nothing Else",
    "Only One {a}",
    "The {b} We Drew over Lunch with Friends",
)
# What Llama 3's pre-tokenizer calls a word: contractions, words, numbers of up to three digits, signs, white space.
LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
LLAMA_SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>")
# A piece holds at most six bytes, or the few words would become single tokens.
PIECES = {"vocab_size": 400, "max_token_length": 6, "show_progress": False}


def answers(scene: Scene) -> list[int]:
    """What is in a scene: colour and shape of `first`, of `second`, and the arrangement, each as an index."""
    things = [
        index
        for thing in (scene.first, scene.second)
        for index in (list(COLOURS).index(thing.colour), list(SHAPES).index(thing.shape))
    ]
    return [*things, ARRANGEMENTS.index(scene.arrangement)]


def english_texts(scene: Scene) -> list[str]:
    """What the language models read about a scene: its five captions, and as many titles."""
    a, b = (f"{COLOURS[t.colour][1]} {SHAPES[t.shape][0]}".title() for t in (scene.first, scene.second))
    return scene.english() + [template.format(a=a, b=b) for template in TITLES]


class Examiner(nn.Module):
    """Heads that ask a ViT what is in a scene, and are thrown away: five questions to its pooled vector, and to every
    patch which colour and which shape is on it, or paper."""

    def __init__(self):
        super().__init__()
        self.whole = nn.Linear(VISION["hidden_size"], sum(QUESTIONS))
        self.patches = nn.Linear(VISION["hidden_size"], len(COLOURS) + 1 + len(SHAPES) + 1)

    def forward(self, pooled: torch.Tensor, hidden: torch.Tensor, batch: list[Scene]) -> torch.Tensor:
        """The loss of pooled (scenes, 128) and of hidden states (scenes, 1 + patches, 128)."""
        targets = torch.tensor([answers(scene) for scene in batch])
        loss = sum(F.cross_entropy(logits, targets[:, i]) for i, logits in enumerate(self.answers(pooled)))
        colours, shapes = on_patches(batch)
        logits = self.patches(hidden[:, 1:]).flatten(0, 1).split((len(COLOURS) + 1, len(SHAPES) + 1), -1)
        return loss + F.cross_entropy(logits[0], colours.flatten()) + F.cross_entropy(logits[1], shapes.flatten())

    def answers(self, pooled: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits of the five questions."""
        return self.whole(pooled).split(QUESTIONS, -1)


def on_patches(batch: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """(scenes, patches) int64 each: colour and shape, counted from 1, of the thing at a patch's middle; 0 is paper."""
    side = torch.arange(PATCH / 2, SIZE, PATCH)
    y, x = (axis.flatten()[:, None] for axis in torch.meshgrid(side, side, indexing="ij"))
    left, top, width, height = torch.tensor([scene.boxes() for scene in batch]).unbind(-1)
    inside = [
        (low[:, None] <= at) & (at <= (low + extent)[:, None])
        for low, extent, at in ((left, width, x), (top, height, y))
    ]
    covered = (inside[0] & inside[1]).long()  # scenes, patches, things; no two things overlap
    numbers = 1 + torch.tensor([answers(scene)[:4] for scene in batch]).view(len(batch), 1, 2, 2)
    return tuple((covered[..., None] * numbers).sum(2).unbind(-1))


def build_blip_processor(seed: int = 0) -> BlipProcessor:
    """BERT's uncased WordPiece with the words of English captions, which can spell any other ASCII word.

    The vocabulary is put together by hand: the WordPiece trainer of tokenizers learns another one in every process.
    """
    words = {word for scene in scenes(500, seed, held_out=False) for text in scene.english() for word in text.split()}
    letters = string.digits + string.ascii_lowercase
    pieces = [*letters, *string.punctuation, *(f"##{letter}" for letter in letters), *sorted(words - set(letters))]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(special + pieces)}, model_max_length=512)
    return BlipProcessor(BlipImageProcessor(size=IMAGE_SIZE), tokenizer)


def build_blip(processor: BlipProcessor, seed: int = 0) -> BlipForConditionalGeneration:
    """A randomly initialised BLIP: ViT of 3 layers x 128, text decoder of 4 x 128, 1.2M parameters.

    As in the published one, captions start from [DEC], which the model knows and the tokenizer does not.
    """
    tokenizer = processor.tokenizer
    torch.manual_seed(seed)
    text = {
        "vocab_size": len(tokenizer) + 2,
        "hidden_size": 128,
        "encoder_hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": len(tokenizer),
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = VISION | {"intermediate_size": 256, "num_hidden_layers": 3, "initializer_range": 0.02}
    return BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision))


def build_vit(seed: int = 0) -> ViTModel:
    """A randomly initialised ViT of 4 layers x 128 with a pooler, 0.9M parameters."""
    torch.manual_seed(seed)
    return ViTModel(ViTConfig(**VISION, intermediate_size=512, num_hidden_layers=4))


def build_gpt2_tokenizer(seed: int = 0) -> GPT2Tokenizer:
    """GPT-2's byte-level BPE with at most 400 pieces. <|endoftext|> is its only special token: none is for padding."""
    texts = [text for scene in scenes(500, seed, held_out=False) for text in english_texts(scene)]
    tokenizer = GPT2Tokenizer().train_new_from_iterator(texts, **PIECES)
    tokenizer.model_max_length = 128
    return tokenizer


def build_gpt2(tokenizer: GPT2Tokenizer, seed: int = 0) -> GPT2LMHeadModel:
    """A randomly initialised GPT-2 of 4 layers x 128, 0.9M parameters."""
    torch.manual_seed(seed)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=128, n_layer=4, n_head=4, **ends)
    )


def build_llama_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Llama 3's byte-level BPE with at most 400 pieces. As in the published, its pad token is there but not set."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=list(LLAMA_SPECIAL_TOKENS), initial_alphabet=alphabet, **PIECES)
    texts = [text for scene in scenes(500, seed, held_out=False) for text in english_texts(scene)]
    backend.train_from_iterator(texts, trainer)
    start, end, _ = LLAMA_SPECIAL_TOKENS
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=[start, "$A"], special_tokens=[(start, backend.token_to_id(start))]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=start, eos_token=end, clean_up_tokenization_spaces=False
    )


def build_llama(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """A randomly initialised Llama of 6 layers x 128, 1.1M parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def pretrain_blip(output_dir: Path, steps: int = 2500, batch_size: int = 16, seed: int = 0) -> dict[str, float]:
    """Trains the BLIP on pictures with English captions, [DEC] caption [SEP]; saves it in float16.

    At the same time an Examiner asks its ViT what is in the picture, which stands for the ViT of ImageNet that BLIP's
    began as.

    Returns:
        The share of `EVALUATED` held-out scenes whose caption is one of the scene's five.
    """
    rng = random.Random(seed)
    processor = build_blip_processor(seed)
    model = build_blip(processor, seed)
    examiner = Examiner()
    start, end, pad = (getattr(model.config.text_config, f"{name}_token_id") for name in ("bos", "sep", "pad"))

    def loss() -> torch.Tensor:
        batch = random_scenes(rng, batch_size)
        ids = _padded([start, *_ids(processor.tokenizer, rng.choice(s.english())), end] for s in batch)
        tower = model.vision_model(**_pixels(processor.image_processor, batch))
        output = model.text_decoder(
            input_ids=ids.masked_fill(ids == -100, pad),
            attention_mask=(ids != -100).long(),
            encoder_hidden_states=tower.last_hidden_state,
        )
        return _next_token_loss(output.logits, ids) + examiner(tower.pooler_output, tower.last_hidden_state, batch)

    _train(nn.ModuleList([model, examiner]), loss, steps, "pretraining blip")
    model.to(torch.float16).save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    saved = BlipForConditionalGeneration.from_pretrained(output_dir, dtype=torch.float32, use_safetensors=True)
    return {"captions": exact_captions(saved, processor, Scene.english)}


def pretrain_vit(output_dir: Path, steps: int = 2500, batch_size: int = 16, seed: int = 0) -> dict[str, float]:
    """Trains the ViT to answer an Examiner's questions about pictures; saves it in float16.

    In 800 steps of 48 pictures, the five questions to the pooled vector alone taught it colours (100%) but not shapes
    (34 to 43%, where guessing has 25%); with the questions to patches and as many pictures in batches of 16, all.

    Returns:
        The shares of right answers to each of the five questions about `EVALUATED` held-out scenes.
    """
    rng = random.Random(seed)
    processor = ViTImageProcessor(size=IMAGE_SIZE)
    model = build_vit(seed)
    examiner = Examiner()

    def loss() -> torch.Tensor:
        batch = random_scenes(rng, batch_size)
        output = model(**_pixels(processor, batch))
        return examiner(output.pooler_output, output.last_hidden_state, batch)

    _train(nn.ModuleList([model, examiner]), loss, steps, "pretraining vit")
    model.to(torch.float16).save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    saved = ViTModel.from_pretrained(output_dir, dtype=torch.float32, use_safetensors=True)
    held_out = list(scenes(EVALUATED, seed + 1, held_out=True))
    with torch.no_grad():
        logits = examiner.answers(saved(**_pixels(processor, held_out)).pooler_output)
    right = torch.stack([part.argmax(-1) for part in logits], -1) == torch.tensor([answers(s) for s in held_out])
    return dict(
        zip(("colour 1", "shape 1", "colour 2", "shape 2", "arrangement"), right.float().mean(0).tolist(), strict=True)
    )


def pretrain_gpt2(output_dir: Path, steps: int = 300, batch_size: int = 48, seed: int = 0) -> dict[str, float]:
    """Trains the GPT-2 on English texts alone, <|endoftext|> text <|endoftext|>; saves it in float16.

    Returns:
        Its loss a token on texts about held-out scenes, in nats.
    """
    tokenizer = build_gpt2_tokenizer(seed)
    return _pretrain_language_model(build_gpt2(tokenizer, seed), tokenizer, output_dir, steps, batch_size, seed)


def pretrain_llama(output_dir: Path, steps: int = 300, batch_size: int = 48, seed: int = 0) -> dict[str, float]:
    """Likewise the Llama, <|begin_of_text|> text <|end_of_text|>."""
    tokenizer = build_llama_tokenizer(seed)
    return _pretrain_language_model(build_llama(tokenizer, seed), tokenizer, output_dir, steps, batch_size, seed)


def _pretrain_language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    steps: int,
    batch_size: int,
    seed: int,
) -> dict[str, float]:
    rng = random.Random(seed)

    def loss_on(batch: list[Scene]) -> torch.Tensor:
        texts = [rng.choice(english_texts(scene)) for scene in batch]
        ids = _padded([tokenizer.bos_token_id, *_ids(tokenizer, t), tokenizer.eos_token_id] for t in texts)
        mask = ids != -100
        output = model(input_ids=ids.masked_fill(~mask, 0), attention_mask=mask.long(), use_cache=False)
        return _next_token_loss(output.logits, ids)

    _train(model, lambda: loss_on(random_scenes(rng, batch_size)), steps, f"pretraining {model.config.model_type}")
    with torch.no_grad():
        loss = loss_on(list(scenes(EVALUATED, seed + 1, held_out=True))).item()
    model.to(torch.float16).save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return {"loss": loss}


def random_scenes(rng: random.Random, count: int) -> list[Scene]:
    """`count` scenes that are not held out, new ones at every call."""
    return list(scenes(count, rng.getrandbits(32), held_out=False))


@torch.no_grad()
def exact_captions(
    model: PreTrainedModel,
    processor: BlipProcessor,
    captions: Callable[[Scene], list[str]],
    count: int = EVALUATED,
    seed: int = 1,
) -> float:
    """Share of `count` held-out scenes whose caption, by greedy search, is one of `captions(scene)`."""
    held_out = list(scenes(count, seed, held_out=True))
    ids = model.eval().generate(**_pixels(processor.image_processor, held_out), max_new_tokens=40)
    said = processor.batch_decode(ids, skip_special_tokens=True)
    return sum(text in captions(scene) for text, scene in zip(said, held_out, strict=True)) / len(held_out)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _padded(rows: Iterable[list[int]]) -> torch.Tensor:
    """(rows, longest) int64, with -100 after the shorter ones."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-100)


def _pixels(processor: BaseImageProcessor, batch: list[Scene]) -> dict[str, torch.Tensor]:
    """{"pixel_values": (scenes, 3, SIZE, SIZE) float32}."""
    return {"pixel_values": processor([scene.draw() for scene in batch], return_tensors="pt")["pixel_values"]}


def _next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _train(module: nn.Module, loss: Callable[[], torch.Tensor], steps: int, description: str) -> None:
    """AdamW on new batches, 2% of the steps for warm-up, then a cosine. Leaves the module in evaluation mode."""
    decay = [p for p in module.parameters() if p.ndim > 1]
    rest = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=50, num_training_steps=steps)
    module.train()
    bar = tqdm(range(steps), desc=description)
    for step in bar:
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{value.item():.3f}")
    module.eval()


PRETRAIN = {"blip": pretrain_blip, "vit": pretrain_vit, "gpt2": pretrain_gpt2, "llama": pretrain_llama}
