"""TRL's SFTTrainer for captions: precision by device, one forward a step, a free vision tower, our own model card."""

import time
import warnings
from dataclasses import dataclass, field

import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from vlmcap.models.load import compute_dtype, free_vision_tower
from vlmcap.training.collator import CaptionCollator


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
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Label smoothing of the caption tokens."})

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
        super().__post_init__()


def smoothed_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, epsilon: float, num_items: torch.Tensor | int
) -> torch.Tensor:
    """Label-smoothed cross-entropy, summed over the labelled positions and divided by `num_items`.

    (1 - eps) * -log p(label) + eps * mean over the vocabulary of -log p, the definition of transformers' LabelSmoother
    (Szegedy et al. 2016, section 7), written with one log-sum-exp: lse - (1 - eps) * z[label] - eps * mean(z).

    Args:
        logits: (N, V), any float dtype; computed in float32.
        labels: (N,) int64, -100 where no loss is taken.
        epsilon: smoothing, 0 for plain cross-entropy.
        num_items: labelled positions of the whole optimizer step.
    """
    kept = labels != -100
    logits, labels = logits[kept].float(), labels[kept]
    target = logits.gather(1, labels[:, None]).squeeze(1)
    loss = logits.logsumexp(1) - (1 - epsilon) * target - epsilon * logits.mean(1)
    return loss.sum() / num_items


class CaptionTrainer(SFTTrainer):
    """SFTTrainer that trains on `caption_examples` through a `CaptionCollator`.

    It differs from its parent in cost, not in result: the loss equals the stock trainer's. Logits are computed for the
    caption positions alone and once a step (the stock trainer computes them for all positions and runs a second
    forward when labels are smoothed), and nothing is back-propagated through the frozen ViT.
    """

    _tag_names = ["trl", "sft", "image-captioning", "japanese"]

    def __init__(self, *args, data_collator: CaptionCollator, **kwargs):
        with warnings.catch_warnings():
            # TRL warns that smoothing costs it a second forward and will go; `compute_loss` below needs neither.
            warnings.filterwarnings("ignore", message="`label_smoothing_factor` is deprecated")
            super().__init__(*args, data_collator=data_collator, **kwargs)
        self.clock = RunClock()
        self.add_callback(self.clock)
        free_vision_tower(self.model)
        # TRL casts the trainable weights of a quantised model to bfloat16. There, most AdamW updates of this size are
        # rounded away, and on a T4 the float16 GradScaler fails on bfloat16 gradients. FSDP needs a single dtype.
        if not self.is_fsdp_enabled:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        first = int((labels != -100).any(0).nonzero()[0])
        # The hidden state at position i predicts token i + 1.
        positions = torch.arange(first - 1, labels.shape[1] - 1, device=labels.device)
        outputs = model(**inputs, logits_to_keep=positions, use_cache=False)
        logits, targets = outputs.logits.flatten(0, 1), labels[:, first:].flatten()
        kept = targets != -100
        num_items = kept.sum() if num_items_in_batch is None else num_items_in_batch
        loss = smoothed_cross_entropy(logits, targets, self.args.label_smoothing_factor, num_items)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # num_items counts every rank, and DDP averages gradients

        mode = "train" if self.model.training else "eval"
        hits = self.accelerator.gather_for_metrics(((logits.argmax(1) == targets) & kept).sum()).sum()
        count = self.accelerator.gather_for_metrics(kept.sum()).sum()
        self._metrics[mode]["mean_token_accuracy"].append((hits / count).item())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        """Adds the seconds so far, and the number of unreadable training pictures once there is one."""
        if self.model.training:
            logs["elapsed_seconds"] = self.clock.seconds()
            if count := self.data_collator.bad_images.count():
                logs["bad_images"] = count
        super().log(logs, *args, **kwargs)

    def summary(self) -> dict:
        """What the run came to, interruptions included: steps, epochs, seconds, bytes, the last logged loss."""

        def last(key: str) -> float:
            return next(entry[key] for entry in reversed(self.state.log_history) if key in entry)

        return {
            "steps": self.state.global_step,
            "epochs": round(self.state.epoch, 4),
            "seconds": last("elapsed_seconds"),
            "train_loss": last("loss"),
            "peak_memory_bytes": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else None,
            "trainable_parameters": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
        }

    def create_model_card(self, *args, **kwargs) -> None:
        """Does nothing. The card is written from measured results (`vlmcap.reporting.cards`); the parent calls this at
        every checkpoint and push, and would replace it by a generic one."""


class RunClock(TrainerCallback):
    """Seconds spent training, over all interruptions: log lines carry them, and checkpoints carry the log lines."""

    def on_train_begin(self, args, state, control, **kwargs):
        earlier = [entry["elapsed_seconds"] for entry in state.log_history if "elapsed_seconds" in entry]
        self.start = time.perf_counter() - (earlier[-1] if earlier else 0)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= state.global_step == state.max_steps  # the last loss, however few the steps

    def seconds(self) -> float:
        return round(time.perf_counter() - self.start, 1)
