"""Training of captioners that take a picture and no prompt: BLIP, ViT + GPT-2, ViT + Llama."""

import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin, Trainer, set_seed

from vlmcap import provenance
from vlmcap.captioning.arguments import BeamArguments
from vlmcap.captioning.predictions import model_record
from vlmcap.data.errors import DataError
from vlmcap.models.load import count_parameters, resolve_revision
from vlmcap.training.collator import BadImages, caption_examples, read_example
from vlmcap.training.report import trainable_modules
from vlmcap.training.resumable import ResumableTrainer
from vlmcap.training.trackers import trackers
from vlmcap.training.trainer_arguments import CaptionerTrainingArguments
from vlmcap.training.validation import CaptionValidation

# The trainer's settings that the model card prints.
REPORTED_SETTINGS = (
    "learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm optim num_train_epochs max_steps"
    " per_device_train_batch_size gradient_accumulation_steps world_size label_smoothing_factor metric_for_best_model"
    " early_stopping_patience early_stopping_threshold bf16 fp16 seed"
).split()


def resolve_parts(args):
    """`args`, a dataclass with `encoder_name_or_path`, `encoder_revision` and the decoder's, with the commits that are
    loaded as its revisions."""
    return replace(
        args,
        encoder_revision=resolve_revision(args.encoder_name_or_path, args.encoder_revision),
        decoder_revision=resolve_revision(args.decoder_name_or_path, args.decoder_revision),
    )


def two_part_record(model: PreTrainedModel, args) -> dict:
    """The "model" part of the run record of an untrained encoder-decoder; `args` as `resolve_parts` returns them."""
    parts = {
        "encoder": {"id": provenance.public_name(args.encoder_name_or_path), "revision": args.encoder_revision},
        "decoder": {"id": provenance.public_name(args.decoder_name_or_path), "revision": args.decoder_revision},
    }
    name = " + ".join(part["id"] for part in parts.values())
    return model_record(model, name, None) | {"parts": parts}


class PictureCollator:
    """Turns examples of `caption_examples(rows, 1)` into batches of pictures with one caption each.

    A caption of n tokens is fed as [bos, t1 .. tn] and its labels are [t1 .. tn, eos]: the logits at a place predict
    the label at the same place. Padding is known by the captions' lengths. GPT-2 has one token for bos, eos and
    padding: labels masked where they equal the padding would lose every eos, and the model would never stop.

    Args:
        rows: as `load_captions` returns them.
        processor: its tokenizer's `bos_token_id` begins a caption, `eos_token_id` ends it.
        names: how the model calls token ids and their mask.
        bad_images: the list of unreadable pictures, see `read_example`.

    Returns pixel_values (float32, (B, 3, H, W)); names[0], names[1] and labels (int64, (B, L)), labels -100 after
    the end of a caption.
    """

    def __init__(self, rows: Dataset, processor: ProcessorMixin, names: tuple[str, str], bad_images: BadImages):
        self.rows, self.processor, self.names, self.bad_images = rows, processor, names, bad_images

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        read = [read_example(self.rows, example, self.bad_images) for example in examples]
        pixels = self.processor.image_processor([image for image, _ in read], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels} | self.texts([example["captions"][0] for _, example in read])

    def texts(self, captions: list[str]) -> dict[str, torch.Tensor]:
        """The batch without its pictures."""
        tokenizer = self.processor.tokenizer
        tokens = tokenizer(captions, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        shape = len(tokens), max(map(len, tokens)) + 1
        ids = torch.full(shape, tokenizer.pad_token_id)
        mask, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
        for row, caption in enumerate(tokens):
            end = len(caption) + 1
            ids[row, :end] = torch.tensor([tokenizer.bos_token_id, *caption])
            labels[row, :end] = torch.tensor([*caption, tokenizer.eos_token_id])
            mask[row, :end] = 1
        return {self.names[0]: ids, self.names[1]: mask, "labels": labels}


class CaptionerTrainer(ResumableTrainer, Trainer):
    """transformers' Trainer for captioners: smoothed loss over caption tokens, validation by captions and by loss.

    Args:
        model: with its LoRA on, or its frozen parts frozen.
        rows: those to train on, as `load_captions` returns them.
        validation_rows: those to validate on; None without validation.
        bad_images: the list of unreadable pictures.
        processing_class: the model's processor, see PictureCollator.
        names: how the model calls token ids and their mask.
        generation: decoding of the validation captions.
        tokenizer: word segmentation of the metrics.
        parameter_groups: for the optimizer, each with its "lr"; None: everything trained at learning_rate.
        read_checkpoint: for a model that is saved whole, loads the one in a folder. transformers 5 saves
            models under the names that version 4 gave their weights, and its Trainer (5.23) looks for today's names
            when it continues or takes the best checkpoint: what it does not find it leaves as it is, with a warning.
            None for adapters, which keep their names.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: CaptionerTrainingArguments,
        rows: Dataset,
        validation_rows: Dataset | None,
        bad_images: BadImages,
        processing_class: ProcessorMixin,
        names: tuple[str, str],
        generation: BeamArguments,
        tokenizer: str,
        parameter_groups: list[dict] | None = None,
        read_checkpoint: Callable[[str], nn.Module] | None = None,
    ):
        set_seed(args.seed)  # of dropout
        self.rows, self.validation_rows, self.bad_images, self.validation = rows, validation_rows, bad_images, None
        self.read_checkpoint = read_checkpoint
        collator = partial(PictureCollator, processor=processing_class, names=names, bad_images=bad_images)
        if validation_rows is not None:
            self.validation = CaptionValidation(validation_rows, processing_class, generation, tokenizer)
            self.validation_collator = collator(validation_rows)
        optimizers = (None, None)
        if parameter_groups is not None:
            optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
            optimizers = optimizer_class(parameter_groups, **settings), None
        super().__init__(
            model=model,
            args=args,
            data_collator=collator(rows),
            train_dataset=caption_examples(rows, 1),
            eval_dataset=validation_rows,
            processing_class=processing_class,
            optimizers=optimizers,
            callbacks=trackers(args, self.validation),
        )
        self.model_accepts_loss_kwargs = True  # `compute_loss` takes the number of caption tokens of the whole step
        self.set_up_run()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.read_checkpoint is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.model.load_state_dict(self.read_checkpoint(resume_from_checkpoint).state_dict())

    def _load_best_model(self):
        if self.read_checkpoint is None:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels").flatten()
        outputs = model(**inputs)
        logits = outputs.logits.flatten(0, 1)
        sources = torch.arange(len(labels), device=labels.device)
        loss = self.caption_loss(logits, sources, labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def validate(self, model: nn.Module) -> dict[str, float]:
        scores = self.validation(model)
        loss = self.validation_loss(model)
        return scores | {"loss": loss, "loss_and_bleu": (scores["bleu_2"] + math.exp(-loss)) / 2}

    @torch.inference_mode()
    def validation_loss(self, model: nn.Module) -> float:
        """Mean cross-entropy, in nats, of a token of the validation captions (end of caption included), unsmoothed."""
        examples = caption_examples(self.validation_rows, 1)
        mine = examples.select(range(self.args.process_index, len(examples), self.args.world_size))
        total = tokens = 0
        for batch in DataLoader(mine, self.args.per_device_eval_batch_size, collate_fn=self.validation_collator):
            batch = self._prepare_inputs(batch)
            labels = batch.pop("labels").flatten()
            logits = model(**batch).logits.flatten(0, 1).float()
            total += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            tokens += (labels != -100).sum().item()
        sums = gather_object([(total, tokens)])
        return sum(total for total, _ in sums) / sum(tokens for _, tokens in sums)


def check_caption_lengths(captions: list[str], processor: ProcessorMixin, max_new_tokens: int) -> str:
    """A line about the lengths of training captions in tokens of the model's tokenizer.

    Raises:
        DataError: more than one caption in a hundred is longer than what the model may write.
    """
    lengths = np.array([len(ids) for ids in processor.tokenizer(captions, add_special_tokens=False)["input_ids"]])
    longer = int((lengths >= max_new_tokens).sum())  # the end of the caption is a token too
    quantiles = ", ".join(f"{share:.1%} {np.quantile(lengths, share):.0f}" for share in (0.5, 0.95, 0.99, 0.999))
    line = f"Caption lengths in tokens: {quantiles}, longest {lengths.max()}; max_new_tokens {max_new_tokens}"
    line += f" would cut {longer:,} of {len(lengths):,}"
    if longer > 0.01 * len(lengths):
        raise DataError(f"{line}, more than 1%. Set max_new_tokens to {lengths.max() + 1} or so.")
    return line


def captioner_report(trainer: CaptionerTrainer) -> str:
    """The text printed at the start: what trains, on how much, in how many steps."""
    model, args = trainer.model, trainer.args
    groups = defaultdict(lambda: [0, 0])
    for name, (count, _) in trainable_modules(model).items():
        group = groups[re.sub(r"\.\d+(?=\.)", ".*", name)]
        group[0] += 1
        group[1] += count
    width = max(map(len, groups))
    lines = ["Trainable modules (* stands for the number of a layer)"]
    lines += [f"  {name:<{width}}  {times:>4} x  {count:>12,}" for name, (times, count) in groups.items()]
    total = count_parameters(model)
    lines.append(
        f"  {'all':<{width}}          {trainer.trainable_parameters:>12,}  of {total:,}"
        f" ({trainer.trainable_parameters / total:.2%})"
    )
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    captions = len(trainer.train_dataset)
    per_epoch = math.ceil(captions / batch)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "float32"
    lines.append(
        f"Data: {len(trainer.rows):,} images, {captions:,} captions an epoch; {batch} captions a step"
        f" ({args.per_device_train_batch_size} a device x {args.gradient_accumulation_steps} accumulated x"
        f" {args.world_size} processes), {per_epoch:,} steps an epoch, {steps:,} at most;"
        f" {precision}, seed {args.seed}"
    )
    return "\n".join(lines)
