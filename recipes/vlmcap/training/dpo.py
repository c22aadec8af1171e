"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) of an adapter, from pairs of captions.

All captions of an image that some pair compares are branches of one sequence, each once, however many pairs it is in:
the image is encoded once a step, where TRL's DPOTrainer encodes it for the chosen and the rejected caption of every
pair, and again for the reference. The reference is the adapter that training starts from. Its log-probabilities are
computed once, before the first step, and kept in output_dir.
"""

import hashlib
import json
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from peft import PeftConfig, get_peft_model
from torch import nn
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, ProcessorMixin, Trainer, set_seed
from trl.trainer.utils import disable_dropout_in_model

from vlmcap.atomic_write import write_atomically
from vlmcap.captioning.predictions import weights_hash
from vlmcap.models.load import MODEL_TYPES, ModelError, free_frozen_parts, is_quantised
from vlmcap.models.tower import feed_features
from vlmcap.models.weights import Adapter
from vlmcap.training import shared_prefix
from vlmcap.training.collator import BadImages
from vlmcap.training.features import FeatureCache
from vlmcap.training.policy import caption_log_probs, caption_sums
from vlmcap.training.report import training_report
from vlmcap.training.resumable import ResumableTrainer
from vlmcap.training.sampler import SimilarSizeSampler, count_image_tokens
from vlmcap.training.shared_prefix import SharedPrefixCollator
from vlmcap.training.trackers import trackers
from vlmcap.training.trainer import start_from
from vlmcap.training.trainer_arguments import CaptionDPOConfig
from vlmcap.training.validation import CaptionValidation

HEX = 16  # digits of a hash in a file's name


def pair_examples(rows: Dataset, pairs_per_image: int) -> Dataset:
    """Training examples: {"row": index into `rows`, "captions": texts, "chosen", "rejected": places in them}, and
    "prompts", [prompt] of each caption, where the rows have several.

    An image with more than `pairs_per_image` pairs yields several examples.

    Args:
        rows: as `read_preferences` returns them.
    """
    examples = {"row": [], "captions": [], "prompts": [], "chosen": [], "rejected": []}
    for row, (asked, *sides) in enumerate(zip(rows["asked"], rows["chosen"], rows["rejected"], strict=True)):
        for start in range(0, len(asked), pairs_per_image):
            some = slice(start, start + pairs_per_image)
            chosen, rejected = (list(zip(asked[some], texts[some], strict=True)) for texts in sides)
            captions = list(dict.fromkeys([*chosen, *rejected]))
            examples["row"].append(row)
            examples["captions"].append([text for _, text in captions])
            examples["prompts"].append([[prompt] for prompt, _ in captions])
            examples["chosen"].append([captions.index(pair) for pair in chosen])
            examples["rejected"].append([captions.index(pair) for pair in rejected])
    if len({prompt for asked in rows["asked"] for prompt in asked}) < 2:
        del examples["prompts"]
    return Dataset.from_dict(examples)


class PairCollator(SharedPrefixCollator):
    """Turns examples of `pair_examples` into shared-prefix batches with pairs.

    Returns what SharedPrefixCollator returns, for at most K captions and P pairs an image, but
        token_labels: its labels.
        labels: int64, (B, P), 1 for a pair, -100 where an image has fewer: what a step counts and averages over.
        chosen, rejected: int64, (B, P), places of their captions among the captions of the image.
        reference: float32, (B, K), log-probabilities of the captions under the starting adapter; 0 while they are not
            in the examples yet.
    """

    def __call__(self, examples: list[dict]) -> dict:
        batch = super().__call__(examples)
        shape = len(examples), max(len(example["chosen"]) for example in examples)
        labels = torch.full(shape, -100)
        chosen, rejected = torch.zeros((2, *shape), dtype=torch.long)
        reference = torch.zeros(len(examples), max(len(example["captions"]) for example in examples))
        for row, example in enumerate(examples):
            pairs = len(example["chosen"])
            labels[row, :pairs] = 1
            chosen[row, :pairs] = torch.tensor(example["chosen"])
            rejected[row, :pairs] = torch.tensor(example["rejected"])
            if "reference" in example:
                reference[row, : len(example["captions"])] = torch.tensor(example["reference"])
        pairs = {"labels": labels, "chosen": chosen, "rejected": rejected, "reference": reference}
        return batch | {"token_labels": batch["labels"]} | pairs


def preference_loss(margins: torch.Tensor, beta: float, loss_type: str, label_smoothing: float = 0.0) -> torch.Tensor:
    """The loss of each pair, as in trl/trainer/dpo_trainer.py (1.16).

    Args:
        margins: by how much the log-probability of the chosen caption has grown since the start, less that of the
            rejected one.
        loss_type: sigmoid (Rafailov et al. 2023, equation 7), or robust (Chowdhury et al. 2024, arXiv 2403.00409): the
            unbiased estimate of it where a share `label_smoothing` of the preferences is the wrong way round.
    """
    loss = -logsigmoid(beta * margins)
    if loss_type == "robust":
        flipped = -logsigmoid(-beta * margins)
        loss = ((1 - label_smoothing) * loss - label_smoothing * flipped) / (1 - 2 * label_smoothing)
    return loss


class CaptionDPOTrainer(ResumableTrainer, Trainer):
    """transformers' Trainer with TRL's DPO loss over pairs of captions that share their image. Dropout is off, as in
    TRL by default.

    Args:
        rows, heldout: preferences to train on, and those that are only looked at; as `read_preferences` returns them.
        processing_class: processor of the model.
        prompt: the user's text after the image.
        bad_images: the list of unreadable pictures; with a limit of 0, for a pair cannot change its picture.
        peft_config: of the shapes of `adapter`.
        adapter: the weights that training starts from, and the reference.
        features, heldout_features: cached image features of the rows. The model's vision encoder is then taken out.
        validation: scores the model by its captions at every evaluation, beside the held-out pairs.

    Raises:
        ModelError: the shared-prefix engine does not know the architecture; FSDP, which shards the reference too.
    """

    accuracy = "reward_accuracy"  # share of pairs with a positive margin since the last line of the log

    def __init__(
        self,
        model: PreTrainedModel,
        args: CaptionDPOConfig,
        rows: Dataset,
        heldout: Dataset,
        processing_class: ProcessorMixin,
        prompt: str,
        bad_images: BadImages,
        peft_config: PeftConfig,
        adapter: Adapter,
        features: FeatureCache | None = None,
        heldout_features: FeatureCache | None = None,
        validation: CaptionValidation | None = None,
    ):
        self.rows, self.bad_images, self.validation = rows, bad_images, validation
        self.shared_prefix = shared_prefix.supports(model)
        if not self.shared_prefix:
            raise ModelError(
                f"preferences are trained on with the shared-prefix engine alone, and {model.config.model_type} is"
                f" none of {', '.join(MODEL_TYPES)}"
            )
        self.attention = model.config.get_text_config()._attn_implementation
        examples, unseen = (pair_examples(some, args.pairs_per_image) for some in (rows, heldout))
        self.sizes = [0] * len(examples)
        if args.per_device_train_batch_size > 1:
            tokens = count_image_tokens(rows, processing_class)
            self.sizes = [tokens[row] for row in examples["row"]]
        collator = partial(PairCollator, processor=processing_class, prompt=prompt, bad_images=bad_images, model=model)
        self.heldout_collator = collator(heldout, features=heldout_features)
        collator = collator(rows, features=features)
        self.reference_facts = reference_facts(
            model, args, processing_class, prompt, adapter, peft_config, rows, heldout
        )
        if features is not None:
            feed_features(model)
        set_seed(args.seed)
        model = get_peft_model(model, peft_config)
        start_from(model, adapter)
        disable_dropout_in_model(model)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=examples,
            eval_dataset=unseen,
            processing_class=processing_class,
            callbacks=trackers(args, validation),
        )
        if self.is_fsdp_enabled:
            raise ModelError("preferences cannot be trained on while FSDP shards the model: use DDP, or one GPU")
        self.model_accepts_loss_kwargs = True  # `compute_loss` takes the number of pairs of the whole step
        free_frozen_parts(self.model)
        sizes = hashlib.sha256(json.dumps(self.sizes).encode()).hexdigest()
        self.figures = {"pairs": sum(map(len, examples["chosen"])), "unseen_pairs": sum(map(len, unseen["chosen"]))}
        self.set_up_run(
            {"image sizes": sizes, "adapter": weights_hash(adapter.folder)}
            | {key: self.reference_facts[key] for key in ("pairs", "prompt")}
        )

    def _get_train_sampler(self, train_dataset=None) -> SimilarSizeSampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SimilarSizeSampler(self.sizes, self.args.per_device_train_batch_size, seed)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """As the parent, once the reference's log-probabilities are known; and then looks at the held-out pairs."""
        self.find_reference()
        done = super().train(resume_from_checkpoint, **kwargs)
        self.figures["after"] = self.preferred(self.accelerator.unwrap_model(self.model))
        return done

    def find_reference(self) -> None:
        """Puts the reference's log-probabilities into the examples: those of an earlier run with the same facts, or
        computed now and kept."""
        if "reference" in self.train_dataset.column_names:
            return
        key = hashlib.sha256(json.dumps(self.reference_facts, sort_keys=True).encode()).hexdigest()[:HEX]
        path = Path(self.args.output_dir) / f"reference-{key}.json"
        found = [json.loads(path.read_bytes()) if self.args.should_save and path.exists() else None]
        (found,) = broadcast_object_list(found)
        if found is None:
            examples = {"train": (self.train_dataset, self.data_collator)}
            examples["heldout"] = (self.eval_dataset, self.heldout_collator)
            model = self.accelerator.unwrap_model(self.model).eval()
            found = {name: self.log_probs(model, *some, f"reference, {name}") for name, some in examples.items()}
            if self.args.should_save:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, json.dumps({"facts": self.reference_facts} | found, ensure_ascii=False))
        self.train_dataset = self.train_dataset.add_column("reference", found["train"])
        self.eval_dataset = self.eval_dataset.add_column("reference", found["heldout"])
        _, preferred = self._margins(found["heldout"])
        self.figures["before"] = {"preference_rate": share(preferred)}

    @torch.no_grad()
    def log_probs(
        self, model: nn.Module, examples: Dataset, collator: PairCollator, title: str | None = None
    ) -> list[list[float]]:
        """The log-probability of each caption of each example, under a model in evaluation mode. Every process
        computes its share, and all of them return all.

        Args:
            title: of a progress bar.
        """
        mine = range(self.args.process_index, len(examples), self.args.world_size)
        loader = DataLoader(
            examples.select(mine),
            self.args.per_device_eval_batch_size,
            collate_fn=collator,
            num_workers=self.args.dataloader_num_workers,
        )
        sums = []
        for batch in tqdm(loader, desc=title, disable=title is None or not self.args.should_save):
            with self.compute_loss_context_manager():
                sums += self._sums(model, self._prepare_inputs(batch))[0].tolist()
        counts = map(len, examples.select(mine)["captions"])
        values = {place: row[:count] for place, row, count in zip(mine, sums, counts, strict=True)}
        values = dict(pair for part in gather_object([values]) for pair in part.items())
        return [values[place] for place in range(len(examples))]

    def _sums(self, model: nn.Module, batch: dict) -> tuple[torch.Tensor, dict]:
        """Log-probabilities of captions, float32, (B, K); and what of the batch is about pairs."""
        batch = dict(batch)
        pairs = {key: batch.pop(key) for key in ("labels", "chosen", "rejected", "reference")}
        batch["labels"] = batch.pop("token_labels")
        values = caption_log_probs(model, batch, self.attention)
        return caption_sums(values, batch, pairs["reference"].shape[1]), pairs

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        sums, pairs = self._sums(model, inputs)
        grown = sums - pairs["reference"]
        margins = grown.gather(1, pairs["chosen"]) - grown.gather(1, pairs["rejected"])
        kept = pairs["labels"] != -100
        loss = preference_loss(margins, self.args.beta, self.args.loss_type, self.args.label_smoothing)
        loss = (loss * kept).sum() / (kept.sum() if num_items_in_batch is None else num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # num_items counts every rank, and DDP averages gradients
        self.hits_and_tokens += torch.stack([((margins > 0) & kept).sum(), kept.sum()])
        return (loss, {"margins": margins}) if return_outputs else loss

    def _margins(self, log_probs: list[list[float]]) -> tuple[list[float], list[bool]]:
        """Of each held-out pair: its margin, and whether the chosen caption is the more probable one."""
        margins, preferred = [], []
        columns = (self.eval_dataset[name] for name in ("chosen", "rejected", "reference"))
        for values, chosen, rejected, start in zip(log_probs, *columns, strict=True):
            for better, worse in zip(chosen, rejected, strict=True):
                preferred.append(values[better] > values[worse])
                margins.append(values[better] - start[better] - values[worse] + start[worse])
        return margins, preferred

    def preferred(self, model: nn.Module) -> dict[str, float]:
        """What a model says of the held-out pairs.

        Returns:
            preference_rate: share of pairs whose chosen caption is more probable than the rejected one.
            reward_accuracy, reward_margin: share of pairs with a positive margin, and beta times the mean margin
                (TRL's rewards/accuracies and rewards/margins).
        """
        training = model.training
        log_probs = self.log_probs(model.eval(), self.eval_dataset, self.heldout_collator)
        model.train(training)
        margins, preferred = self._margins(log_probs)
        return {
            "preference_rate": share(preferred),
            "reward_accuracy": share([margin > 0 for margin in margins]),
            "reward_margin": self.args.beta * sum(margins) / len(margins),
        }

    def validate(self, model: nn.Module) -> dict[str, float]:
        return (self.validation(model) if self.validation else {}) | self.preferred(model)

    def summary(self) -> dict:
        """The parent's, and `preferences`: {"pairs", "unseen_pairs", "pairs_seen", "before", "after"}, the last two as
        `preferred` returns them; of the start there is no margin."""
        per_epoch = self.figures["pairs"]
        return super().summary() | {"preferences": self.figures | {"pairs_seen": round(self.state.epoch * per_epoch)}}


def share(values: list[bool]) -> float:
    return sum(values) / len(values)


def reference_facts(
    model: PreTrainedModel,
    args: CaptionDPOConfig,
    processor: ProcessorMixin,
    prompt: str,
    adapter: Adapter,
    peft_config: PeftConfig,
    rows: Dataset,
    heldout: Dataset,
) -> dict:
    """All that the reference's log-probabilities depend on, as JSON has it; `pairs` hashes pictures and texts."""
    pairs = hashlib.sha256()
    for some in (rows, heldout):
        for row in some.select_columns(["sha256", "asked", "chosen", "rejected"]):
            pairs.update(json.dumps(row, sort_keys=True).encode())
    return {
        "adapter": weights_hash(adapter.folder),
        "model": model.config._name_or_path,
        "revision": peft_config.revision,
        "quantised": is_quantised(model),
        "dtype": str(model.dtype),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        "pairs_per_image": args.pairs_per_image,
        "prompt": prompt,
        "image_processor": json.loads(json.dumps(processor.image_processor.to_dict(), default=str)),
        "pairs": pairs.hexdigest(),
    }


def dpo_report(trainer: CaptionDPOTrainer, model_name: str, max_pixels: int | None, caption_tokens: int) -> str:
    """The text printed at the start; arguments as of `training_report`."""
    args, figures = trainer.args, trainer.figures
    smoothing = f", label smoothing {args.label_smoothing}" if args.loss_type == "robust" else ""
    return "\n".join(
        [
            training_report(trainer, model_name, max_pixels, caption_tokens),
            f"Preferences: {figures['pairs']:,} pairs of {len(trainer.rows):,} images, at most"
            f" {args.pairs_per_image} of an image a step; {figures['unseen_pairs']:,} pairs held out; loss"
            f" {args.loss_type}, beta {args.beta}{smoothing}",
        ]
    )
