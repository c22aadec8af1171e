"""What the project's trainers share: precision by device, smoothed loss, validation by captions, checkpoints that are
whole and resume to the last digit, an end on SIGTERM and Ctrl-C, clock, summary."""

import copy
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Thread, current_thread, main_thread

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, get_scheduler

from vlmcap import provenance
from vlmcap.models.load import compute_dtype
from vlmcap.training import checkpoints
from vlmcap.training.arguments import MeasuredFields
from vlmcap.training.checkpoints import UNFINISHED, CheckpointError
from vlmcap.training.loss import smoothed_cross_entropy

# What asks a run to stop. It ends with 128 + the signal, as a shell reports a process that the signal ended.
STOPS = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
# What says which examples a step is made of: with another value, a continued run would see some twice, others never.
ORDER = (
    "seed data_seed per_device_train_batch_size gradient_accumulation_steps world_size captions_per_image"
    " dataloader_drop_last"
).split()
# Where what must stay comes from, where no setting has its name.
SOURCES = {
    "training captions": "dataset, revision, split and images that can be read",
    "image sizes": "min_pixels and max_pixels",
}
# What else decides the losses. It may be changed on purpose (a longer run). Then a line says so.
COURSE = (
    "max_steps num_train_epochs learning_rate encoder_learning_rate decoder_learning_rate lr_scheduler_type"
    " lr_scheduler_kwargs warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm optim optim_args"
    " label_smoothing_factor bf16 fp16 gradient_checkpointing shared_prefix cache_image_features eval_strategy"
    " eval_steps save_strategy save_steps logging_steps load_best_model_at_end metric_for_best_model"
    " early_stopping_patience early_stopping_threshold ignore_data_skip"
).split()


def choose_by_device(args: MeasuredFields) -> None:
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


class MeasuredTrainer:
    """Methods for a Trainer beside it: `class X(MeasuredTrainer, Trainer)`, which calls `start_measuring` when it is
    built and has `validate`, the scores of the model as it is."""

    def start_measuring(self) -> None:
        # `caption_loss` takes labels as long as the logits. transformers would leave the first of each row out of
        # `num_items_in_batch` where a model's own loss shifts them (BLIP), and the loss would be too large.
        self._loss_shifts_labels = False
        self.trainable_parameters = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.clock = RunClock()
        self.add_callback(self.clock)
        self.early_stopping = None
        if self.args.early_stopping_patience:
            patience, threshold = self.args.early_stopping_patience, self.args.early_stopping_threshold
            self.early_stopping = EarlyStoppingCallback(patience, threshold)
            self.add_callback(self.early_stopping)
        self.stop_on_signal = StopOnSignal(self.accelerator)
        self.add_callback(self.stop_on_signal)
        self.hits_and_tokens = torch.zeros(2, dtype=torch.long, device=self.args.device)
        self.saving_to = None
        self.order, self.course = self._order(), self._course()

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
        """Times the wait for the data loader. On a GPU this bounds the wait from above: queued work may continue."""
        start = time.perf_counter()
        samples = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.clock.waited += time.perf_counter() - start
        return samples

    def _get_num_items_in_batch(self, batch_samples, device):
        """Takes the labels from what accelerate repeats at the end of an epoch, so that every process has a whole last
        batch: examples from its beginning would count twice, and several processes would not train as one does.

        Exact where an example is a row of the batch; `shared_prefix: false` has a row a caption and needs a batch
        size of 1 for it.
        """
        size, ranks = self.args.per_device_train_batch_size, self.args.world_size
        rest = len(self.train_dataset) % (size * ranks)
        last = self.accelerator.gradient_state.end_of_dataloader and not self.args.dataloader_drop_last
        if ranks > 1 and rest and last and batch_samples:
            labels = batch_samples[-1]["labels"]
            kept = min(max(rest - size * self.args.process_index, 0), size)
            labels[len(labels) * kept // size :] = -100
        return super()._get_num_items_in_batch(batch_samples, device)

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        inner = loader.base_dataloader  # accelerate's own is a wrapper
        inner.worker_init_fn = partial(obey_parent_alone, inner.worker_init_fn)
        return loader

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        """Trains, or resumes from a checkpoint that `checkpoints.damage` finds whole.

        On SIGTERM and the first Ctrl-C it saves a checkpoint at the end of the step, says how to resume, and ends the
        process with status 143 or 130 (`SystemExit`); a second Ctrl-C ends it at once. A second training or evaluation
        may not follow in that process. In a thread, where Python gives nobody a signal, it says that it will not.

        Raises:
            CheckpointError: a checkpoint cannot be written; or the one to resume from belongs to another run, in what
                decides the order of examples (other settings that differ are printed).
        """
        self.resumed = None
        if resume_from_checkpoint is not None:
            self.resumed = checkpoints.read_manifest(Path(resume_from_checkpoint))
            self._check_same_run(resume_from_checkpoint)
        with self.stop_on_signal.listening():
            try:
                return super().train(resume_from_checkpoint, **kwargs)
            except pickle.UnpicklingError as error:
                raise CheckpointError(
                    f"{resume_from_checkpoint} holds a pickle of more than tensors and numbers, which is not loaded:"
                    f" {str(error).splitlines()[0]}"
                ) from error
            except Stopped:
                self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
                stopped = self.stop_on_signal.stopping
                step = self.state.global_step
                if self.args.should_save:
                    print(
                        f"{STOPS[stopped]}: saved {self.args.output_dir}/checkpoint-{step} after step {step} of"
                        f" {self.state.max_steps}. The same command with --resume_from_checkpoint latest resumes from"
                        " it.",
                        file=sys.stderr,
                        flush=True,
                    )
                raise SystemExit(128 + stopped) from None

    def _order(self) -> dict:
        """What decides which examples a step is made of, and which weights it changes."""
        settings = self.args.to_dict() | {"world_size": self.args.world_size}
        examples, trained = hashlib.sha256(), hashlib.sha256()
        for row, captions in zip(self.train_dataset["row"], self.train_dataset["captions"], strict=True):
            examples.update(json.dumps([row, captions]).encode())
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                trained.update(json.dumps([name, list(parameter.shape)]).encode())
        hashes = {"training captions": examples.hexdigest(), "trained weights": trained.hexdigest()}
        return {key: settings.get(key) for key in ORDER} | hashes

    def _course(self) -> dict:
        settings = self.args.to_dict()
        model = {"model": provenance.public_name(self.model.config._name_or_path)}
        for config in getattr(self.model, "peft_config", {}).values():
            model |= {"lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
        return json.loads(json.dumps({key: settings.get(key) for key in COURSE} | model, default=str))

    def _check_same_run(self, checkpoint: str) -> None:
        def changes(before: dict, now: dict) -> dict[str, str]:
            changed = [key for key in now if before.get(key) != now[key]]
            short = {key: [str(values.get(key))[:40] for values in (before, now)] for key in changed}
            return {key: f"{key} {now} (was {before})" for key, (before, now) in short.items()}

        refused = changes(self.resumed["order"], self.order)
        if "per_device_train_batch_size" in refused:
            refused.pop("image sizes", None)  # they are looked at for batches of several alone
        if refused:
            sources = ", ".join(f"{key} are those of {where}" for key, where in SOURCES.items() if key in refused)
            raise CheckpointError(
                f"{checkpoint} belongs to a run with other settings or data: {', '.join(refused.values())}. Resumed"
                " from it, the run would see some captions twice and others never: set them back"
                f"{sources and f' ({sources})'}, or start a new run in another --output_dir."
            )
        said = changes(self.resumed["course"], self.course)
        if said and self.args.should_save:
            print(
                f"Note: since {checkpoint}, settings were changed: {', '.join(said.values())}. The run continues with"
                " the new ones; its losses will not be those of a run that had them from the start.",
                flush=True,
            )

    def _get_output_dir(self, trial) -> str:
        return str(self.saving_to or super()._get_output_dir(trial))

    def _save(self, *args, **kwargs) -> None:
        """Without the pickle of the arguments, which could hold a token: nothing here reads it."""
        super()._save(*args, **kwargs)
        folder = kwargs.get("output_dir") or (args[0] if args else self.args.output_dir)
        if self.args.should_save:
            (Path(folder) / "training_args.bin").unlink(missing_ok=True)

    def _save_checkpoint(self, model, trial) -> None:
        """As the parent, but whole or not at all (see `checkpoints`), and older ones are deleted only then."""
        output_dir = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        since_log = {
            "loss": self.accelerator.gather(self._tr_loss[None]).tolist(),
            "hits_and_tokens": self.accelerator.gather(self.hits_and_tokens[None]).tolist(),
            "last_logged": self._globalstep_last_logged,
        }
        fix = "Earlier ones are as they were: free space, then continue with --resume_from_checkpoint latest."
        with checkpoints.reported(name, output_dir, fix):
            try:
                self.saving_to = output_dir / UNFINISHED
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.state.best_model_checkpoint == str(self.saving_to / name):
                    self.state.best_model_checkpoint = str(output_dir / name)
                best = self.state.best_model_checkpoint
                if self.args.should_save:
                    record = {"best": best and os.path.relpath(best, output_dir), "since_log": since_log}
                    record |= {"order": self.order, "course": self.course}
                    checkpoints.complete(self.saving_to / name, output_dir / name, record)
                    checkpoints.rotate(output_dir, self.args.save_total_limit, best)
                    with suppress(OSError):  # holds what an earlier run left
                        self.saving_to.rmdir()
                self.accelerator.wait_for_everyone()  # no process ends before the checkpoint has its name
            except BaseException:
                shutil.rmtree(self.saving_to / name, ignore_errors=True)
                raise
            finally:
                self.saving_to = None

    def _init_training_state(self, max_steps, steps, epochs, resume_from_checkpoint, trial):
        """Continues with the best checkpoint beside the one that is resumed from, wherever they are now, and
        with the evaluations that early stopping has counted."""
        begin = super()._init_training_state(max_steps, steps, epochs, resume_from_checkpoint, trial)
        if resume_from_checkpoint is not None and self.resumed["best"]:
            self.state.best_model_checkpoint = str(Path(resume_from_checkpoint).parent / self.resumed["best"])
        if self.early_stopping:
            name, fresh = type(self.early_stopping).__name__, self.early_stopping.state()
            counted = self.state.stateful_callbacks.setdefault(name, fresh)["attributes"]
            self.early_stopping.early_stopping_patience_counter = counted["early_stopping_patience_counter"]
        return begin

    def _run_epoch(self, *, epoch, epochs_trained, resume_from_checkpoint, **kwargs) -> None:
        """Takes the loss since the last log line over from the checkpoint. A run that had ended takes no more step:
        transformers 5.23 would take one where max_steps falls inside an epoch, or early stopping ended the run."""
        if self.resumed and epoch == epochs_trained:
            since_log, rank = self.resumed["since_log"], self.args.process_index
            self._tr_loss += since_log["loss"][rank]
            self.hits_and_tokens += torch.tensor(since_log["hits_and_tokens"][rank], device=self.args.device)
            self._globalstep_last_logged = since_log["last_logged"]
        stopped = self.early_stopping and (
            self.early_stopping.early_stopping_patience_counter >= self.early_stopping.early_stopping_patience
        )
        if stopped or self.state.global_step >= self.state.max_steps:
            self._load_rng_state(resume_from_checkpoint)
            self.control.should_training_stop = True
        else:
            # With several processes, accelerate 1.15 does not reach the sampler once batches are skipped (it is below
            # SkipBatchSampler and BatchSamplerShard): a run that resumes in its second epoch would repeat its first.
            sampler = kwargs["train_dataloader"].batch_sampler
            while hasattr(sampler, "batch_sampler"):
                sampler = sampler.batch_sampler
            if hasattr(sampler.sampler, "set_epoch"):
                sampler.sampler.set_epoch(epoch)
            more = {"epochs_trained": epochs_trained, "resume_from_checkpoint": resume_from_checkpoint}
            super()._run_epoch(epoch=epoch, **more, **kwargs)

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
        """The results of the run, interruptions included: steps, epochs, seconds of training without validation, share
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


class Stopped(Exception):
    """Training was asked to stop, and has saved."""


class StopOnSignal(TrainerCallback):
    """Saves and leaves training at the end of the step, or of the validation, in which a process got SIGTERM or
    Ctrl-C, every process at the same one.

    transformers' own (`enable_jit_checkpoint`, 5.23) waits three seconds, may save between backward pass and update,
    which no continued run can repeat, and lets each process decide alone.

    Attributes:
        asked: the signal that this process got; 0 for none.
        stopping: the largest that any process got when they last agreed.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.asked, self.stopping = accelerator, 0, 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals of `STOPS`. One that comes after the last step, which has its checkpoint, is sent again
        at the end."""
        if current_thread() is not main_thread():
            print("Training in a thread: SIGTERM and Ctrl-C save no checkpoint; save_steps does.", file=sys.stderr)
            yield
            return
        # Who starts a job in the background lets it ignore the terminal's Ctrl-C.
        heeded = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self.ask) for number in heeded}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.asked:
            signal.raise_signal(self.asked)

    def ask(self, number: int, frame) -> None:
        self.asked = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second ends the process
            if self.accelerator.is_main_process:
                os.write(2, b"\nCtrl-C: saving at the end of this step; a second Ctrl-C ends the run at once.\n")

    def on_step_end(self, args, state, control, **kwargs):
        self.stopping = self.asked
        if args.world_size > 1:
            asked = torch.tensor(self.asked, device=self.accelerator.device)
            self.stopping = int(self.accelerator.gather(asked[None]).max())
        control.should_save |= bool(self.stopping)

    on_evaluate = on_step_end

    def on_save(self, args, state, control, **kwargs):
        if self.stopping:
            raise Stopped


def obey_parent_alone(initialise: Callable[[int], None], worker: int) -> None:
    """Begins a worker of a DataLoader that no Ctrl-C ends, and SIGTERM only when its parent sends it.

    Who asks a job to stop sends SIGTERM to all of its processes, and a terminal Ctrl-C. Without its workers training
    could not finish the step. A worker whose parent is gone ends by itself.
    """
    initialise(worker)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "linux":
        return
    parent = multiprocessing.parent_process().pid

    def obey() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    Thread(target=obey, daemon=True).start()


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
