"""ViT + GPT-2: a `VisionEncoderDecoderModel` of two pretrained parts, and what of it is trained.

GPT-2 reads the image through cross-attention, which it was pretrained without: these layers are new weights, drawn by
seed, and are trained whatever else is frozen. A caption is `<|endoftext|> tokens <|endoftext|>`: GPT-2 has one special
token, which begins it, ends it and pads after its end. So `token == pad_token_id` says nothing about padding: labels
masked that way lose the end of the caption, and the decoder does not stop and repeats itself. Captions and padding are
told apart by length (`vlmcap.training.captioner`). Generation stops at the first `<|endoftext|>` after the start.
"""

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    GPT2LMHeadModel,
    ProcessorMixin,
    VisionEncoderDecoderModel,
    VisionTextDualEncoderProcessor,
    ViTModel,
)

from vlmcap.models.arguments import VitGpt2Arguments
from vlmcap.models.load import load_part, local_device
from vlmcap.models.weights import ModelError, load_weights, loading
from vlmcap.provenance import public_name


def build_vit_gpt2(args: VitGpt2Arguments, seed: int) -> tuple[VisionEncoderDecoderModel, ProcessorMixin]:
    """Joins the pretrained parts with new cross-attention, in float32 on this process's device.

    Between parts of different width is a new linear projection too. All parameters require gradients (see `freeze`).
    The processor holds the encoder's image processor and the decoder's tokenizer, and is reloaded by `AutoProcessor`.

    Args:
        seed: of the new weights; torch's generator is set to it.

    Raises:
        ModelError: there is no such model, or it is not a ViT, or not a GPT-2.
    """
    encoder = (args.encoder_name_or_path, args.encoder_revision)
    decoder = (args.decoder_name_or_path, args.decoder_revision)
    torch.manual_seed(seed)
    vit = load_part(ViTModel, "vit", *encoder, dtype=torch.float32, add_pooling_layer=False)
    gpt2 = load_part(GPT2LMHeadModel, "gpt2", *decoder, new="cross", dtype=torch.float32, add_cross_attention=True)
    with loading(encoder[0]):
        image_processor = AutoImageProcessor.from_pretrained(encoder[0], revision=encoder[1], trust_remote_code=False)
    with loading(decoder[0]):
        tokenizer = AutoTokenizer.from_pretrained(decoder[0], revision=decoder[1], trust_remote_code=False)
    tokenizer.pad_token = tokenizer.bos_token = tokenizer.eos_token
    tokenizer.clean_up_tokenization_spaces = False  # " ," and " 's" of a caption are its own
    model = VisionEncoderDecoderModel(encoder=vit, decoder=gpt2)
    model.config.encoder._name_or_path = public_name(encoder[0])
    model.config.decoder._name_or_path = public_name(decoder[0])
    ends = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    ends = dict.fromkeys(ends, tokenizer.eos_token_id)
    model.config.update(ends)
    model.config.decoder.pad_token_id = tokenizer.pad_token_id  # as the Trainer would set it, with a warning
    model.generation_config = GenerationConfig(**ends)
    return model.to(local_device()), VisionTextDualEncoderProcessor(image_processor, tokenizer)


def load_vit_gpt2(
    name: str, revision: str | None = None
) -> tuple[VisionEncoderDecoderModel, VisionTextDualEncoderProcessor]:
    """Loads a trained model and its processor, in float32 on this process's device, for inference.

    Raises:
        ModelError: there is no such model, or it is not a ViT with GPT-2.
    """
    with loading(name):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    parts = [getattr(config, part, config).model_type for part in ("encoder", "decoder")]
    if parts != ["vit", "gpt2"]:
        raise ModelError(f"{name} is made of {' and '.join(parts)}; choose a model trained by sft_vit_gpt2_food.py")
    config.decoder.pad_token_id = None  # or GPT-2 takes the start of a caption for padding, and warns
    # By default, transformers gives the encoder a pooler, which nothing uses and no checkpoint holds.
    encoder = ViTModel(config.encoder, add_pooling_layer=False)
    model = load_weights(VisionEncoderDecoderModel, name, revision, encoder, config=config, dtype=torch.float32)
    with loading(name):
        processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
    return model.to(local_device()).eval(), processor


def freeze(model: VisionEncoderDecoderModel, args: VitGpt2Arguments) -> None:
    """Sets which parameters require gradients.

    The new layers always do: the cross-attention of every decoder block with its norm, frozen block or not, and the
    projection between parts of different width. Of a part that is not trained nothing else does. Of one that is, the
    embeddings and its first blocks do not where `args` says so; its last norm does. Below the first trained encoder
    block no graph is recorded, unless the encoder's embeddings are trained.

    Raises:
        ModelError: more blocks to freeze than there are.
    """
    gpt2 = model.decoder.transformer
    for key, blocks in (("freeze_vit_blocks", model.encoder.layers), ("freeze_gpt2_blocks", gpt2.h)):
        count = getattr(args, key)
        if not 0 <= count <= len(blocks):
            name = args.encoder_name_or_path if key == "freeze_vit_blocks" else args.decoder_name_or_path
            raise ModelError(f"{key}={count}: {name} has {len(blocks)} blocks, so choose 0 to {len(blocks)}")
    model.encoder.requires_grad_(args.train != "decoder")
    model.decoder.requires_grad_(args.train != "encoder")
    frozen = [*model.encoder.layers[: args.freeze_vit_blocks], *gpt2.h[: args.freeze_gpt2_blocks]]
    if args.freeze_embeddings:
        frozen += [model.encoder.embeddings, gpt2.wte, gpt2.wpe]
    for module in frozen:
        module.requires_grad_(False)
    for block in gpt2.h:
        block.crossattention.requires_grad_(True)
        block.ln_cross_attn.requires_grad_(True)


def parameter_groups(
    model: nn.Module, encoder_learning_rate: float, decoder_learning_rate: float, weight_decay: float
) -> list[dict]:
    """The trained parameters as groups for AdamW; biases and norms are not decayed.

    The cross-attention and the projection in front of it belong to the decoder, also where the rest of it is frozen.

    Returns:
        Groups `{"params", "lr", "weight_decay"}`: encoder decayed, encoder not decayed, decoder decayed, decoder not
        decayed; those without parameters are left out.
    """
    groups = []
    for rate, in_encoder in ((encoder_learning_rate, True), (decoder_learning_rate, False)):
        trained = [
            parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and name.startswith("encoder.") == in_encoder
        ]
        matrices = [parameter for parameter in trained if parameter.ndim > 1]
        vectors = [parameter for parameter in trained if parameter.ndim == 1]
        groups.append({"params": matrices, "lr": rate, "weight_decay": weight_decay})
        groups.append({"params": vectors, "lr": rate, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]
