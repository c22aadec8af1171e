"""The arguments that trainers take: a recipe's fields joined with those of transformers or TRL, and the checks of both
that need torch."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from trl import SFTConfig

from vlmcap.models.load import compute_dtype
from vlmcap.training.arguments import (
    CaptionDPOFields,
    CaptionerFields,
    CaptionGRPOFields,
    CaptionSFTFields,
    FoodFields,
    TrainerFields,
)


def choose_by_device(args: TrainerFields) -> None:
    """Sets what was left out and depends on the device: precision, and how batches travel.

    The devices are those of `local_device`, where models are loaded: CUDA (to torch, ROCm is CUDA too) or the CPU.
    By default, the Trainer would take others that torch finds, such as Apple's MPS, and send batches there.

    Raises:
        ValueError: bf16 on a GPU older than compute capability 8.0, where torch would emulate it.
    """
    args.use_cpu = args.use_cpu or not torch.cuda.is_available()
    dtype = compute_dtype()
    if args.bf16 is None and not args.fp16:
        args.bf16, args.fp16 = dtype == torch.bfloat16, dtype == torch.float16
    if args.bf16 and dtype == torch.float16:
        raise ValueError(
            f"bf16=true, but {torch.cuda.get_device_name()} has compute capability"
            f" {'.'.join(map(str, torch.cuda.get_device_capability()))} and no bfloat16. Set fp16: true, or leave"
            " both out."
        )
    args.bf16 = bool(args.bf16)
    if args.accelerator_config is None:
        args.accelerator_config = {"non_blocking": torch.cuda.is_available()}
    if args.dataloader_pin_memory is None:
        args.dataloader_pin_memory = torch.cuda.is_available()


def check_optimizer(args: TrainingArguments) -> None:
    """Makes the optimizer and the schedule for one number, so that what is missing is known before a model is loaded.

    Raises:
        ValueError: a package or a setting is missing or wrong; or `optim_args` would have no effect.
    """

    def reason(error: Exception) -> str:
        return next(iter(str(error).strip().splitlines()), type(error).__name__)

    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind([nn.Parameter(torch.zeros(1))], **settings)
        without = copy.copy(args)
        without.optim_args = None
        if args.optim_args and settings == Trainer.get_optimizer_cls_and_kwargs(without)[1]:
            raise ValueError("it reads none of optim_args")
    except (ImportError, LookupError, TypeError, ValueError) as error:
        given = f" with optim_args {args.optim_args}" if args.optim_args else ""
        raise ValueError(f"optim: {args.optim.value}{given} cannot be used: {reason(error)}") from error
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, args.lr_scheduler_kwargs)
    except (LookupError, TypeError, ValueError) as error:
        given = f"{args.lr_scheduler_type.value} with lr_scheduler_kwargs {args.lr_scheduler_kwargs}"
        raise ValueError(f"lr_scheduler_type: {given} cannot be used: {reason(error)}") from error


@dataclass
class CaptionSFTConfig(CaptionSFTFields, SFTConfig):
    """SFTConfig with the defaults that caption training needs."""

    def __post_init__(self):
        choose_by_device(self)
        super().__post_init__()
        check_optimizer(self)


@dataclass
class CaptionDPOConfig(CaptionDPOFields, TrainingArguments):
    """TrainingArguments with the settings of training on preferences."""

    def __post_init__(self):
        choose_by_device(self)
        super().__post_init__()
        check_optimizer(self)


@dataclass
class CaptionGRPOConfig(CaptionGRPOFields, TrainingArguments):
    """TrainingArguments with the settings of GRPO."""

    def __post_init__(self):
        choose_by_device(self)
        super().__post_init__()
        check_optimizer(self)


@dataclass
class CaptionerTrainingArguments(CaptionerFields, TrainingArguments):
    """TrainingArguments with the defaults that caption training needs."""

    def __post_init__(self):
        choose_by_device(self)
        super().__post_init__()
        check_optimizer(self)


@dataclass
class FoodTrainingArguments(FoodFields, CaptionerTrainingArguments):
    """CaptionerTrainingArguments with a learning rate for each half."""
