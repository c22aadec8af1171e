"""TRL's SFTTrainer for captions: precision by device, one forward a step, a free vision tower, our own model card."""

import time
import warnings
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from peft import PeftConfig, get_peft_model
from transformers import EarlyStoppingCallback, PreTrainedModel, ProcessorMixin, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from vlmcap.models.load import compute_dtype, free_frozen_parts
from vlmcap.training import shared_prefix
from vlmcap.training.collator import BadImages, CaptionCollator, caption_examples
from vlmcap.training.features import FeatureCache, feed_features
from vlmcap.training.loss import smoothed_cross_entropy
from vlmcap.training.sampler import SimilarSizeSampler, count_image_tokens
from vlmcap.training.shared_prefix import SharedPrefixCollator
from vlmcap.training.validation import CaptionValidation


@dataclass
class CaptionSFTConfig(SFTConfig):
    """SFTConfig with the defaults that caption training needs.

    `bf16` and `fp16` may be left out: bfloat16 on compute capability 8.0 and later, float16 on older GPUs, float32 on
    a CPU. Asking for bf16 on an older GPU is an error, since torch would emulate it.
    """

    max_length: int | None = field(
        default=None,
        metadata={"help": "Keep unset: a bound cuts image tokens. Bound the image with max_pixels instead."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep false: the collator reads columns that the model does not take."}
    )
    dataset_kwargs: dict | str | None = field(
        default_factory=lambda: {"skip_prepare_dataset": True},
        metadata={"help": "Keep: captions are tokenised with their images, in the collator."},
    )
    accelerator_config: dict | str | None = field(
        default_factory=lambda: {"non_blocking": torch.cuda.is_available()},
        metadata={"help": "Of accelerate; by default batches travel to the GPU from pinned memory, beside its work."},
    )
    captions_per_image: int = field(
        default=5,
        metadata={
            "help": "Captions of an image that are trained on together, at the cost of little more than one. An image"
            " with more of them comes up more often. The batch size counts images."
        },
    )
    shared_prefix: bool = field(
        default=True,
        metadata={"help": "Feed image and prompt once for all of them; false feeds them with every caption anew."},
    )
    cache_image_features: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which the frozen vision encoder's outputs are kept, so that it runs once an image and"
            " not once an epoch. Takes about 4 MB an image of 391 tokens; the exact size is printed first."
        },
    )
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Label smoothing of the caption tokens."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop when the validation captions have not improved for this many evaluations (every eval_steps"
            " with eval_strategy: steps). They are ranked by metric_for_best_model, cider_d by default."
        },
    )

    def __post_init__(self):
        dtype = compute_dtype()
        if self.bf16 is None and not self.fp16:
            self.bf16, self.fp16 = dtype == torch.bfloat16, dtype == torch.float16
        if self.bf16 and dtype == torch.float16:
            raise ValueError(
                f"bf16=true, but {torch.cuda.get_device_name()} has compute capability"
                f" {'.'.join(map(str, torch.cuda.get_device_capability()))} and no bfloat16. Set fp16: true, or leave"
                " both out."
            )
        if self.cache_image_features and not self.shared_prefix:
            raise ValueError("cache_image_features needs the shared-prefix engine: leave shared_prefix at true")
        validates = self.eval_strategy != "no"
        if (self.early_stopping_patience or self.load_best_model_at_end) and not validates:
            raise ValueError(
                "early_stopping_patience and load_best_model_at_end rank the model by captions of validation images:"
                " set eval_strategy: steps and eval_steps, or switch them off (0 and false)"
            )
        if self.early_stopping_patience and not self.load_best_model_at_end:
            raise ValueError(
                "early_stopping_patience needs load_best_model_at_end: true, or the worse models are kept"
            )
        # Without load_best_model_at_end there must be no metric: to keep the best checkpoint, the parent would delete
        # the latest, from which the run continues.
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "cider_d"
        super().__post_init__()


class CaptionTrainer(SFTTrainer):
    """SFTTrainer for caption rows. It differs from its parent in cost, not in result: the loss is the stock trainer's.

    An image and its prompt are fed once for up to `captions_per_image` captions (`vlmcap.training.shared_prefix`),
    logits are computed once a step and for caption positions alone (the stock trainer computes them everywhere, and
    runs a second forward when labels are smoothed), and nothing is recorded below the projector. An architecture
    that the shared-prefix engine does not know, or `shared_prefix: false`, gets one caption a sequence.

    Args:
        rows: as `load_captions` returns them.
        processing_class: processor of the model.
        prompt: the user's text behind the image.
        bad_images: the list of unreadable pictures.
        features: cached image features of the rows, for the shared-prefix engine. The model's vision encoder is then
            taken out.
        validation: scores the model at every evaluation (`eval_strategy`), as "eval_cider_d" and so on.
    """

    _tag_names = ["trl", "sft", "image-captioning", "japanese"]

    def __init__(
        self,
        model: PreTrainedModel,
        args: CaptionSFTConfig,
        rows: Dataset,
        processing_class: ProcessorMixin,
        prompt: str,
        bad_images: BadImages,
        peft_config: PeftConfig,
        features: FeatureCache | None = None,
        validation: CaptionValidation | None = None,
    ):
        self.rows, self.bad_images, self.validation = rows, bad_images, validation
        examples = caption_examples(rows, args.captions_per_image)
        self.sizes = [0] * len(examples)
        if args.per_device_train_batch_size > 1 and model.config.model_type in shared_prefix.MODEL_TYPES:
            tokens = count_image_tokens(rows, processing_class)
            self.sizes = [tokens[row] for row in examples["row"]]
        self.shared_prefix = args.shared_prefix and shared_prefix.supports(model)
        self.attention = model.config.get_text_config()._attn_implementation
        data = (rows, processing_class, prompt, bad_images)
        if self.shared_prefix:
            collator = SharedPrefixCollator(*data, model, features)
        else:
            collator = CaptionCollator(*data)
        if features is not None:
            feed_features(model)
        set_seed(args.seed)  # of LoRA's weights
        model = get_peft_model(model, peft_config)
        trained = {n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad}
        with warnings.catch_warnings():
            # TRL warns that smoothing costs it a second forward and will go; `compute_loss` below needs neither.
            warnings.filterwarnings("ignore", message="`label_smoothing_factor` is deprecated")
            super().__init__(
                model=model,
                args=args,
                data_collator=collator,
                train_dataset=examples,
                eval_dataset=validation and validation.rows,
                processing_class=processing_class,
            )
        # `compute_loss` takes the number of caption tokens of the whole step. transformers counts them for Qwen2-VL
        # alone of the family; for the others accumulated batches would each weigh the same, however few their tokens.
        self.model_accepts_loss_kwargs = True
        # TRL casts the trainable weights of a quantised model to bfloat16. That drops digits of the projector, most
        # AdamW updates of this size are rounded away, and on a T4 the float16 GradScaler fails on bfloat16 gradients.
        # FSDP needs a single dtype.
        if not self.is_fsdp_enabled:
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.data = trained[name]
        if self.is_fsdp_enabled and validation is not None:
            raise ValueError(
                "captions cannot be generated while FSDP shards the model: set eval_strategy: no,"
                " load_best_model_at_end: false and early_stopping_patience: 0"
            )
        free_frozen_parts(self.model)
        self.trainable_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.clock = RunClock()
        self.add_callback(self.clock)
        if args.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        self.hits_and_tokens = torch.zeros(2, dtype=torch.long, device=args.device)

    def _get_train_sampler(self, train_dataset=None) -> SimilarSizeSampler:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return SimilarSizeSampler(self.sizes, self.args.per_device_train_batch_size, seed)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels, start = inputs.pop("labels"), inputs.pop("caption_start")
        labels = labels[:, start:]
        batch, width = labels.shape
        # The hidden state at position i predicts token i + 1, so the last one predicts nothing.
        positions = torch.arange(start - 1, start - 1 + width, device=labels.device)
        sources = torch.arange(width, device=labels.device).expand(batch, -1)
        if self.shared_prefix:
            segments = inputs.pop("segments")
            sources = shared_prefix.branch_sources(segments, start)
            inputs["attention_mask"] = shared_prefix.attention_mask(segments, self.attention)
        outputs = model(**inputs, logits_to_keep=positions, use_cache=False)
        logits = outputs.logits.flatten(0, 1)
        sources = (sources + width * torch.arange(batch, device=labels.device)[:, None]).flatten()
        labels = labels.flatten()
        kept = labels != -100
        num_items = kept.sum() if num_items_in_batch is None else num_items_in_batch
        loss = smoothed_cross_entropy(logits, sources, labels, self.args.label_smoothing_factor) / num_items
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # num_items counts every rank, and DDP averages gradients

        hits = (logits.argmax(1)[sources] == labels) & kept
        self.hits_and_tokens += torch.stack([hits.sum(), kept.sum()])  # stays on the device: no waiting for it here
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Times the wait for the data loader. On a GPU this bounds the wait from above: queued work may go on."""
        start = time.perf_counter()
        samples = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.clock.waited += time.perf_counter() - start
        return samples

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Scores of the captions that the model writes now for the validation images, as `eval_cider_d` and so on."""
        start = time.perf_counter()
        self.model.eval()
        with self.compute_loss_context_manager():
            scores = self.validation(self.accelerator.unwrap_model(self.model))
        seconds = time.perf_counter() - start
        self.clock.start += seconds  # not training
        self.clock.begin += seconds
        metrics = {f"{metric_key_prefix}_{name}": round(score, 6) for name, score in scores.items()}
        metrics[f"{metric_key_prefix}_seconds"] = round(seconds, 1)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.model.train()
        return metrics

    def log(self, logs, *args, **kwargs):
        """Adds the seconds so far, the share of them spent waiting for data, the share of caption tokens predicted
        right, and the number of unreadable training pictures once there is one."""
        if self.model.training:
            logs["elapsed_seconds"] = self.clock.seconds()
            logs["data_wait_share"] = self.clock.wait_share()
            hits, tokens = self.accelerator.reduce(self.hits_and_tokens).tolist()
            self.hits_and_tokens.zero_()
            if tokens:
                logs["mean_token_accuracy"] = hits / tokens
            if count := self.bad_images.count():
                logs["bad_images"] = count
        super().log(logs, *args, **kwargs)

    def summary(self) -> dict:
        """What the run came to, interruptions included: steps, epochs, seconds of training without validation, share
        of them spent waiting for data (since the last continuation), last logged loss, bytes, the log.

        `best`: step and score of the checkpoint that was kept, when the captions of validation images chose it.
        """

        def last(key: str) -> float:
            return next(entry[key] for entry in reversed(self.state.log_history) if key in entry)

        best = None
        if self.args.load_best_model_at_end:
            best = {
                "step": self.state.best_global_step,
                "metric": self.args.metric_for_best_model,
                "score": self.state.best_metric,
            }
        kept = ("step", "epoch", "loss", "mean_token_accuracy", "elapsed_seconds", "eval_cider_d", "eval_seconds")
        log = [{key: entry[key] for key in kept if key in entry} for entry in self.state.log_history]
        return {
            "steps": self.state.global_step,
            "epochs": round(self.state.epoch, 4),
            "seconds": last("elapsed_seconds"),
            "data_wait_share": last("data_wait_share"),
            "train_loss": last("loss"),
            "peak_memory_bytes": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None,
            "trainable_parameters": self.trainable_parameters,
            "best": best,
            "log": [entry for entry in log if "loss" in entry or "eval_cider_d" in entry],
        }

    def create_model_card(self, *args, **kwargs) -> None:
        """Does nothing. The card is written from measured results (`vlmcap.reporting.cards`); the parent calls this at
        every checkpoint and push, and would replace it by a generic one."""


class RunClock(TrainerCallback):
    """Seconds spent training, over all interruptions: log lines carry them, and checkpoints carry the log lines.
    `waited`: seconds of them spent waiting for data."""

    def __init__(self):
        self.begin = self.start = time.perf_counter()
        self.waited = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        earlier = [entry["elapsed_seconds"] for entry in state.log_history if "elapsed_seconds" in entry]
        self.begin = time.perf_counter()
        self.start = self.begin - (earlier[-1] if earlier else 0)
        self.waited = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        last = state.global_step == state.max_steps
        control.should_log |= last  # the last loss, however few the steps
        control.should_evaluate |= last and args.eval_strategy != "no"  # or the last model could not be the best

    def seconds(self) -> float:
        return round(time.perf_counter() - self.start, 1)

    def wait_share(self) -> float:
        """Share of the time since the start, or the last continuation, that was spent waiting for data."""
        return round(self.waited / (time.perf_counter() - self.begin), 4)
