"""What the project's trainers share: precision by device, smoothed loss, validation by captions, clock, summary."""

import time
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback

from vlmcap.models.load import compute_dtype
from vlmcap.training.loss import smoothed_cross_entropy


@dataclass
class MeasuredArguments:
    """Fields for a TrainingArguments beside it: `class X(MeasuredArguments, TrainingArguments)`.

    `bf16` and `fp16` may be left out: bfloat16 on compute capability 8.0 and later, float16 on older GPUs, float32 on
    a CPU. Asking for bf16 on an older GPU is an error, since torch would emulate it.
    """

    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16; left out with fp16, the device decides (see the class)."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Keep false: the collator reads columns that the model does not take."}
    )
    accelerator_config: dict | str | None = field(
        default_factory=lambda: {"non_blocking": torch.cuda.is_available()},
        metadata={"help": "Of accelerate; by default batches travel to the GPU from pinned memory, beside its work."},
    )
    dataloader_pin_memory: bool = field(
        default_factory=torch.cuda.is_available, metadata={"help": "Page-locked memory for batches; default: on GPUs."}
    )
    label_smoothing_factor: float = field(default=0.1, metadata={"help": "Label smoothing of the caption tokens."})
    early_stopping_patience: int | None = field(
        default=None,
        metadata={
            "help": "Stop when the model has not improved for this many evaluations (every eval_steps with"
            " eval_strategy: steps). They are ranked by metric_for_best_model, by default cider_d."
        },
    )
    early_stopping_threshold: float = field(
        default=0.0, metadata={"help": "By how much that metric must be better to count as better."}
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
        self.bf16 = bool(self.bf16)
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


class MeasuredTrainer:
    """Methods for a Trainer beside it: `class X(MeasuredTrainer, Trainer)`, which calls `start_measuring` when it is
    built and has `validate`, the scores of the model as it is."""

    def start_measuring(self) -> None:
        self.trainable_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.clock = RunClock()
        self.add_callback(self.clock)
        if self.args.early_stopping_patience:
            patience, threshold = self.args.early_stopping_patience, self.args.early_stopping_threshold
            self.add_callback(EarlyStoppingCallback(patience, threshold))
        self.hits_and_tokens = torch.zeros(2, dtype=torch.long, device=self.args.device)

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Scores of a model in evaluation mode, without `eval_` before their names."""
        raise NotImplementedError

    def caption_loss(
        self, logits: torch.Tensor, sources: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Mean of the smoothed loss over `num_items` caption tokens (those given, if None); counts the tokens that are
        predicted right. Shapes as in `smoothed_cross_entropy`."""
        kept = labels != -100
        loss = smoothed_cross_entropy(logits, sources, labels, self.args.label_smoothing_factor)
        loss = loss / (kept.sum() if num_items is None else num_items)
        if self.args.average_tokens_across_devices and num_items is not None:
            loss = loss * self.accelerator.num_processes  # num_items counts every rank, and DDP averages gradients
        hits = (logits.argmax(1)[sources] == labels) & kept
        self.hits_and_tokens += torch.stack([hits.sum(), kept.sum()])  # stays on the device: no waiting for it here
        return loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Times the wait for the data loader. On a GPU this bounds the wait from above: queued work may go on."""
        start = time.perf_counter()
        samples = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.clock.waited += time.perf_counter() - start
        return samples

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Scores of `validate`, as `eval_cider_d` and so on."""
        start = time.perf_counter()
        self.model.eval()
        with self.compute_loss_context_manager():
            scores = self.validate(self.accelerator.unwrap_model(self.model))
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
        kept = ("step", "epoch", "loss", "mean_token_accuracy", "elapsed_seconds")
        log = [
            {key: value for key, value in entry.items() if key in kept or key.startswith("eval_")}
            for entry in self.state.log_history
        ]
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
