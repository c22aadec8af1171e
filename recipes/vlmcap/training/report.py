"""What a training run is about to do, printed before it starts."""

import math
import re
from collections import defaultdict

import bitsandbytes as bnb
import psutil
import torch
from torch import nn

from vlmcap.models.load import VISION_TOWERS, base_model, count_parameters
from vlmcap.training.trainer import CaptionTrainer
from vlmcap.training.trainer_arguments import CaptionSFTConfig


def settings_report(**groups: dict) -> str:
    """Every resolved setting of a run, a group of settings a paragraph."""
    lines = []
    for title, settings in groups.items():
        lines.append(f"Settings: {title}")
        lines += [f"  {key:<28}{value}" for key, value in settings.items()]
    return "\n".join(lines)


def trainable_modules(model: nn.Module) -> dict[str, tuple[int, torch.dtype]]:
    """Module name -> (trainable parameters, dtype), LoRA's A and B counted as one module."""
    modules = defaultdict(lambda: [0, None])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = re.sub(r"^base_model\.model\.(model\.)?", "", name)
            name = re.sub(r"\.lora_[AB]\..*$", " (LoRA)", name)
            name = re.sub(r"\.modules_to_save\.default", "", re.sub(r"\.(weight|bias)$", "", name))
            modules[name][0] += parameter.numel()
            modules[name][1] = parameter.dtype
    return {name: (count, dtype) for name, (count, dtype) in modules.items()}


def estimate_memory(
    model: nn.Module, args: CaptionSFTConfig, prefix_tokens: int, caption_tokens: int, shared_prefix: bool
) -> dict[str, int]:
    """Bytes of one training step on one device, by part. An estimate for planning, not a measurement.

    weights: as they are in memory (4-bit ones packed). gradients and optimizer: of the trainable parameters, float32,
    with AdamW's two moments. activations: in 2 bytes (4 without mixed precision); with gradient checkpointing the
    inputs of every layer and one layer in full, otherwise every layer in full; a layer in full is 10 * hidden +
    4 * intermediate numbers a token (attention without its L x L matrix; measured at the widths of Qwen2-VL-2B: 0.78
    of that in a frozen layer, 1.90 in one with LoRA, 1.01 over 22 and 6 of them). logits: of the caption positions
    over the vocabulary, and their gradient.

    Args:
        prefix_tokens: of image and prompt.
        caption_tokens: of one caption.
    """
    text = base_model(model).config.get_text_config()
    captions = args.per_device_train_batch_size * args.captions_per_image
    prefixes = args.per_device_train_batch_size if shared_prefix else captions
    number = 2 if args.bf16 or args.fp16 else 4
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens = prefixes * prefix_tokens + captions * caption_tokens
    layer = tokens * (10 * text.hidden_size + 4 * text.intermediate_size) * number
    stored = tokens * text.hidden_size * number * text.num_hidden_layers
    return {
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "gradients and optimizer": trainable * 12,
        "activations": stored + layer if args.gradient_checkpointing else layer * text.num_hidden_layers,
        "logits": 2 * number * captions * caption_tokens * text.vocab_size,
    }


def training_report(trainer: CaptionTrainer, model_name: str, max_pixels: int | None, caption_tokens: int) -> str:
    """The text printed at the start: what trains, what is quantised, how much of everything, and whether it fits.

    Args:
        max_pixels: of a picture; None, where the processor has no such bound, is counted as 400 image tokens.
        caption_tokens: of a long caption, for the memory estimate.
    """
    image_tokens = 400
    if max_pixels is not None:
        image_tokens = max_pixels // (trainer.processing_class.image_processor.patch_size * 2) ** 2
    parts = estimate_memory(trainer.model, trainer.args, image_tokens + 40, caption_tokens, trainer.shared_prefix)
    engine = "reference, one caption a sequence"
    if trainer.shared_prefix:
        engine = "shared prefix, an image and its prompt once for all its captions"
    lines = [f"Trainable modules of {model_name}", *_trainables(trainer.model), _quantised(trainer.model)]
    return "\n".join([*lines, _data(trainer), f"Engine: {engine}", *_memory(parts)])


def _trainables(model: nn.Module) -> list[str]:
    trainables, total = trainable_modules(model), count_parameters(model)
    trained = sum(count for count, _ in trainables.values())
    width = max(map(len, trainables))
    lines = [f"  {name:<{width}}  {count:>12,}  {_short(dtype)}" for name, (count, dtype) in trainables.items()]
    return [*lines, f"  {'all':<{width}}  {trained:>12,}  of {total:,} ({trained / total:.2%})"]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _quantised(model: nn.Module) -> str:
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    packed = sum(isinstance(module, bnb.nn.Linear4bit) for _, module in linears)
    if not packed:
        return "Quantised: nothing"
    tower = next(module for name, module in linears if any(tower in name for tower in VISION_TOWERS))
    return (
        f"Quantised: {packed} linear layers in NF4 (double quantisation); vision tower in"
        f" {_short(tower.weight.dtype)}, frozen"
    )


def _data(trainer: CaptionTrainer) -> str:
    args, examples = trainer.args, trainer.train_dataset
    images = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    captions = sum(map(len, examples["captions"]))
    per_epoch = math.ceil(len(trainer._get_train_sampler()) / images)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "float32"
    return (
        f"Data: {len(trainer.rows):,} images, {captions:,} captions an epoch; {images} images a step"
        f" ({args.per_device_train_batch_size} a device x {args.gradient_accumulation_steps} accumulated x"
        f" {args.world_size} processes) with {captions / len(examples):.1f} captions each; {per_epoch:,} steps an"
        f" epoch, {steps:,} steps in all; {precision}, seed {args.seed}"
    )


def _memory(parts: dict[str, int]) -> list[str]:
    if torch.cuda.is_available():
        device, has = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    else:
        # The weights are in memory already, and the estimate counts them.
        device, has = "this machine", psutil.virtual_memory().available + parts["weights"]
    needs = sum(parts.values())
    detail = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    lines = [f"Memory: about {needs / 2**30:.1f} GiB a device ({detail}); {device} has {has / 2**30:.1f} GiB"]
    if needs > has:
        lines.append(
            "  That may not fit: lower per_device_train_batch_size (and raise gradient_accumulation_steps) or"
            " max_pixels, or set gradient_checkpointing: true."
        )
    return lines
