"""What the project's trainers share: runs that resume to the last digit from checkpoints that are whole, and end on
SIGTERM and Ctrl-C; the smoothed loss of captions; validation by captions; logs with what the model card states."""

import os
import pickle
import shutil
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback

from vlmcap.errors import UserError
from vlmcap.training import checkpoints, same_run
from vlmcap.training.callbacks import STOPS, RunClock, StopOnSignal, Stopped, obey_parent_alone
from vlmcap.training.checkpoints import UNFINISHED, CheckpointError
from vlmcap.training.loss import smoothed_cross_entropy


class ResumableTrainer:
    """Methods for a Trainer beside it: `class X(ResumableTrainer, Trainer)`, which calls `set_up_run` when it is built
    and has `validate`, the scores of the model as it is.

    `accuracy` names the share that `hits_and_tokens` counts, in the log.
    """

    accuracy = "mean_token_accuracy"

    def set_up_run(self, must_match: dict | None = None) -> None:
        """The last line of a trainer's `__init__`. `must_match`: what else must be the same when the run resumes, in
        JSON's types."""
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
        self.must_match = same_run.must_match(self.args, self.train_dataset, self.model) | (must_match or {})
        self.may_change = same_run.may_change(self.args, self.model)

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
            same_run.check_same_run(resume_from_checkpoint, self.resumed["must_match"], self.must_match)
            changed = same_run.changes(self.resumed["may_change"], self.may_change)
            if changed and self.args.should_save:
                print(
                    f"Note: since {resume_from_checkpoint}, settings were changed: {', '.join(changed.values())}. The"
                    " run continues with the new ones; its losses will not be those of a run that had them from the"
                    " start.",
                    flush=True,
                )
        with self.stop_on_signal.listening():
            try:
                return super().train(resume_from_checkpoint, **kwargs)
            except pickle.UnpicklingError as error:
                raise CheckpointError(
                    f"{resume_from_checkpoint} holds a pickle of more than tensors and numbers, which is not loaded:"
                    f" {str(error).splitlines()[0]}"
                ) from error
            except Stopped:
                raise SystemExit(self._end_stopped()) from None

    def _end_stopped(self) -> int:
        """Ends a training that was asked to stop and has saved. Returns the status with which the process ends."""
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        stopped, step = self.stop_on_signal.stopping, self.state.global_step
        if self.args.should_save:
            print(
                f"{STOPS[stopped]}: saved {self.args.output_dir}/checkpoint-{step} after step {step} of"
                f" {self.state.max_steps}. The same command with --resume_from_checkpoint latest resumes from it.",
                file=sys.stderr,
                flush=True,
            )
        return 128 + stopped

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
                    record |= {"must_match": self.must_match, "may_change": self.may_change}
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
        """Scores of `validate`, as `eval_cider_d` and so on.

        Raises:
            UserError: another dataset is given, or the trainer was built without validation rows.
        """
        if eval_dataset is not None or self.eval_dataset is None:
            raise UserError(
                "evaluate() captions and scores the validation rows that the trainer was built with, and no other"
                " dataset: build a trainer with the rows to score as its validation rows, and call evaluate() without"
                " a dataset"
            )
        start = time.perf_counter()
        self.model.eval()
        with self.compute_loss_context_manager():
            scores = self.validate(self.accelerator.unwrap_model(self.model))
        seconds = time.perf_counter() - start
        self.clock.pause(seconds)
        metrics = {f"{metric_key_prefix}_{name}": round(score, 6) for name, score in scores.items()}
        metrics[f"{metric_key_prefix}_seconds"] = round(seconds, 1)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.model.train()
        return metrics

    def predict(self, *args, **kwargs):
        """Raises UserError: the collators read the training pictures, whatever dataset the parent is given."""
        raise UserError(
            "predict() is not supported, for any dataset: caption pictures with `caption_with_prompt` or"
            " `caption_without_prompt` of vlmcap.captioning.generate"
        )

    def log(self, logs, *args, **kwargs):
        """Adds the seconds so far, the share of them spent waiting for data, the share of caption tokens predicted
        right, and the number of unreadable training pictures once there is one."""
        if self.model.training:
            logs["elapsed_seconds"] = self.clock.seconds()
            logs["data_wait_share"] = self.clock.wait_share()
            hits, tokens = self.accelerator.reduce(self.hits_and_tokens).tolist()
            self.hits_and_tokens.zero_()
            if tokens:
                logs[self.accuracy] = hits / tokens
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
        kept = ("step", "epoch", "loss", self.accuracy, "elapsed_seconds")
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
