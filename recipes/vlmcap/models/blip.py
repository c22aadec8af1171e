"""BLIP for Vietnamese captions: a tokenizer that keeps tone marks, LoRA on the text decoder, rows for the new pieces.

    picture -> ViT (frozen, no graph) -> text decoder (LoRA on its attention) -> [DEC] t1 t2 ... [SEP]

An adapter holds the LoRA matrices and the embeddings of the new pieces; `load_blip_adapter` needs nothing else. Plain
transformers and PEFT load it too (`merge_and_unload` because of `_keep_head_bias`):

    config = PeftConfig.from_pretrained(adapter)
    processor = AutoProcessor.from_pretrained(adapter)
    model = BlipForConditionalGeneration.from_pretrained(config.base_model_name_or_path, revision=config.revision)
    model.resize_token_embeddings(len(processor.tokenizer))
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
"""

import re
import string
import unicodedata

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from vlmcap.models.arguments import BlipArguments
from vlmcap.models.load import compute_dtype, local_device
from vlmcap.models.weights import ModelError, check_adapter, load_weights, loading, read_adapter

# The tokens that begin a caption and a text to be encoded. BLIP was trained with them after BERT's 30,522 pieces; the
# published tokenizer lacks them (github.com/salesforce/BLIP, models/blip.py, init_tokenizer).
START, ENCODE = "[DEC]", "[ENC]"
CONTINUES = "##"  # begins a WordPiece that continues a word
ATTENTION = re.compile(r"text_decoder\.bert\.encoder\.layer\.\d+\.((?:cross)?attention\..+)")

TONES = ("", "\u0300", "\u0301", "\u0303", "\u0309", "\u0323")  # none, grave, acute, tilde, hook above, dot below
VOWELS = "".join(unicodedata.normalize("NFC", vowel + tone) for vowel in "aăâeêioôơuưy" for tone in TONES)
# Every Vietnamese letter in both cases, ASCII letters, digits and punctuation.
CHARACTERS = VOWELS + VOWELS.upper() + "đĐ" + string.ascii_letters + string.digits + string.punctuation


def load_blip(
    name: str, revision: str | None = None, dtype: torch.dtype | None = None
) -> tuple[BlipForConditionalGeneration, BlipProcessor]:
    """BLIP as published, on this process's device, in `dtype` or else `compute_dtype()`; its tokenizer completed by
    [DEC] and [ENC].

    Safetensors alone are loaded. The main branch of Salesforce/blip-image-captioning-base may have none:
    `resolve_revision` finds the conversion that the Hub's bot keeps in a pull request.

    Raises:
        ModelError: there is no such model, it is not a BLIP captioner, or its tokenizer does not fit its embeddings.
    """
    _blip_config(name, revision)
    with loading(name):
        processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
    options = {"dtype": dtype or compute_dtype(), "device_map": {"": local_device()}}
    model = load_weights(BlipForConditionalGeneration, name, revision, **options)
    tokenizer, config = processor.tokenizer, model.config.text_config
    tokenizer.add_special_tokens({"bos_token": START})
    tokenizer.add_special_tokens({"eos_token": tokenizer.sep_token, "additional_special_tokens": [ENCODE]})
    found = len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    wanted = config.vocab_size, config.bos_token_id, config.sep_token_id, config.pad_token_id
    if found != wanted:
        raise ModelError(
            f"{name}: pieces, {START}, [SEP] and [PAD] are {found} in its tokenizer with {START} and {ENCODE} added,"
            f" and {wanted} (vocab_size, bos_token_id, sep_token_id, pad_token_id) in the text_config of its"
            " config.json. They must be the same: choose a BLIP captioner with its own tokenizer."
        )
    return model, processor


def _blip_config(name: str, revision: str | None) -> BlipConfig:
    with loading(name):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    if config.architectures != ["BlipForConditionalGeneration"]:
        raise ModelError(f"{name} is a {config.architectures}; choose a BLIP captioner (BlipForConditionalGeneration)")
    return config


def learn_vietnamese(processor: BlipProcessor, captions: list[str], new_pieces: int) -> BlipProcessor:
    """A processor whose tokenizer writes captions as they are: `decode(encode(caption)) == caption`.

    BLIP's own is BERT's uncased one. It lowercases, decomposes letters (NFD) and drops all combining marks, so that
    bóng, bông and bỏng become bong; no training brings back what its labels do not have. It also splits at
    punctuation and forgets where there was a space ("3-4" comes back as "3 - 4").

    This one takes text in NFC, splits it at spaces alone, and keeps the WordPiece rule: the longest piece first, `##`
    before what continues a word, punctuation included. Each piece keeps its id; after them come every Vietnamese
    letter and every character of the captions, alone and continuing, so that nothing becomes [UNK], and the most
    frequent words of the captions. Vietnamese writes its syllables apart: a few hundred of them are nearly all there
    are in captions, whole ones, each seen often enough to be learned.

    Runs of white space become one space, and a word that begins with ## loses it. Text is framed as [DEC] text [SEP]
    unless `add_special_tokens=False`.

    Args:
        processor: as `load_blip` returns it. It stays as it is.
        captions: those of the training split.
        new_pieces: how many words to learn, of those that occur twice at least.
    """
    stock = processor.tokenizer
    words = Tokenizer(models.WordLevel(unk_token=stock.unk_token))
    words.normalizer = normalizers.NFC()
    words.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    everything = trainers.WordLevelTrainer(vocab_size=2**31, min_frequency=2, show_progress=False)
    words.train_from_iterator(captions, everything)

    vocab = stock.get_vocab()
    characters = CHARACTERS + "".join(sorted(set(unicodedata.normalize("NFC", "".join(captions)))))
    for character in "".join(characters.split()):
        for piece in (character, CONTINUES + character):
            vocab.setdefault(piece, len(vocab))
    learned = [word for word in sorted(words.get_vocab(), key=words.token_to_id) if word not in vocab]
    vocab |= {word: len(vocab) + i for i, word in enumerate(learned[:new_pieces])}

    backend = Tokenizer(models.WordPiece(vocab, unk_token=stock.unk_token, continuing_subword_prefix=CONTINUES))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.WordPiece(prefix=CONTINUES, cleanup=False)
    ends = [(token, vocab[token]) for token in (START, stock.sep_token)]
    backend.post_processor = processors.TemplateProcessing(single=[START, "$A", stock.sep_token], special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **stock.special_tokens_map,
        additional_special_tokens=[ENCODE],
        clean_up_tokenization_spaces=False,
        model_max_length=stock.model_max_length,
        model_input_names=["input_ids", "attention_mask"],
    )
    return BlipProcessor(processor.image_processor, tokenizer)


def add_lora(model: BlipForConditionalGeneration, processor: BlipProcessor, args: BlipArguments) -> PeftModel:
    """LoRA on the attention of the text decoder, rows of its embeddings for the new pieces; everything else is frozen.

    The rows are trained and saved, with the decoder's head that shares them; old rows and the head's biases are not,
    those of new pieces are zero. New rows begin at random, spread as the old ones are about their mean. To begin each
    as the mean of the old pieces that spell it without marks was worse: English has no word for bóng there, and rows
    that share most of what they are take long to be told apart. On the miniature, 150 steps of 8 captions ended at a
    loss of 3.6 so (3.6 less the mean of the old rows, 1.0 less their own mean), 1.2 around the mean of the old rows,
    0.84 around zero. LoRA and rows are drawn from torch's generator (`set_seed`).

    Args:
        model: as `load_blip` returns it; changed in place.
        processor: as `learn_vietnamese` returns it.

    Returns:
        The model with its trainable parameters in float32.

    Raises:
        ModelError: a target module matches nothing, or something beside the decoder's attention.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    attention = sorted({match[1] for match in map(ATTENTION.fullmatch, linears) if match})
    for target in args.lora_target_modules:
        hit = [name for name in linears if name == target or name.endswith(f".{target}")]
        stray = [name for name in hit if not ATTENTION.fullmatch(name)]
        if stray or not hit:
            raise ModelError(
                f"lora_target_modules: {target!r} matches {stray[0] if stray else 'nothing'}; LoRA is added to the"
                f" text decoder's attention alone, where there are {', '.join(attention)}"
            )
    old = model.config.text_config.vocab_size
    _resize(model, processor.tokenizer)
    rows = model.get_input_embeddings().weight.data
    rows[old:].normal_(std=rows[:old].float().std(0).mean().item())
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target_modules,
        trainable_token_indices={"word_embeddings": list(range(old, len(processor.tokenizer)))},
        revision=args.model_revision,
    )
    # Frozen is not free: with gradient checkpointing, its inputs are made to require gradients.
    model.vision_model.forward = torch.no_grad()(model.vision_model.forward)
    return _keep_head_bias(get_peft_model(model, config))


def load_blip_adapter(
    adapter: str, revision: str | None = None, dtype: torch.dtype | None = None
) -> tuple[PeftModel, BlipProcessor]:
    """A trained model and its processor, for inference, from an adapter's folder or Hub id alone; `dtype` as in
    `load_blip`.

    Raises:
        ModelError: as `load_blip`, `read_adapter` and `check_adapter`.
    """
    found = read_adapter(adapter, revision)
    with loading(adapter):
        processor = AutoProcessor.from_pretrained(adapter, revision=found.revision, trust_remote_code=False)
    base = found.config.base_model_name_or_path, found.config.revision
    config = _blip_config(*base)
    with torch.device("meta"):
        skeleton = BlipForConditionalGeneration(config)
        _resize(skeleton, processor.tokenizer)
    check_adapter(found, skeleton, *base)
    model, _ = load_blip(*base, dtype)
    _resize(model, processor.tokenizer)
    model = PeftModel.from_pretrained(model, str(found.folder), config=found.config)
    return _keep_head_bias(model).eval(), processor


def _resize(model: BlipForConditionalGeneration, tokenizer: PreTrainedTokenizerBase) -> None:
    """Embeddings, tied head and its bias get rows for all pieces; new biases are zero, other new rows random."""
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


def _keep_head_bias(model: PeftModel) -> PeftModel:
    """Adds the head's bias, which PEFT 0.21 leaves out where trained rows are tied to a head, until they are merged.

    See https://github.com/huggingface/peft/issues/3649. No release has the fix yet, so the head is asked: what it
    makes of zeros is its bias.
    """
    head = model.get_base_model().text_decoder.cls.predictions.decoder.token_adapter
    weight = head.get_base_layer().weight
    if not head(weight.new_zeros(1, weight.shape[1])).any():
        head.register_forward_hook(_add_bias)
    return model


def _add_bias(head: nn.Module, _, logits: torch.Tensor) -> torch.Tensor:
    return logits if head.merged or head.disable_adapters else logits + head.get_base_layer().bias
