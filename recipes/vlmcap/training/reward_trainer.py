"""GRPO for captions: samples as branches of their image, rewarded, and trained on as branches of the same image."""

import hashlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin, Trainer, set_seed

from vlmcap.atomic_write import write_atomically
from vlmcap.captioning.predictions import weights_hash
from vlmcap.errors import UserError, notice
from vlmcap.models.load import ModelError, free_frozen_parts
from vlmcap.models.tower import feed_features
from vlmcap.models.weights import Adapter
from vlmcap.rewards.combined import Rewards
from vlmcap.rewards.watch import warning
from vlmcap.training import shared_prefix
from vlmcap.training.caption_tokens import Branch
from vlmcap.training.collator import BadImages, caption_examples
from vlmcap.training.features import FeatureCache
from vlmcap.training.grpo import advantages_of, grpo_loss, score_alike
from vlmcap.training.policy import StartWeights, caption_log_probs
from vlmcap.training.report import training_report
from vlmcap.training.resumable import ResumableTrainer
from vlmcap.training.sampler import count_image_tokens
from vlmcap.training.sampling import CaptionSampler, PictureCollator, RepeatingSampler, fed_with
from vlmcap.training.shared_prefix import lay_out
from vlmcap.training.trackers import trackers
from vlmcap.training.trainer import start_from
from vlmcap.training.trainer_arguments import CaptionGRPOConfig
from vlmcap.training.validation import CaptionValidation

LAID_OUT = ("input_ids", "position_ids", *shared_prefix.LAYOUT)


@dataclass
class Samples:
    """The samples of an optimizer step in this process, as JSON has them: `tokens` of every caption, by batch and
    image, its end included; `advantages`, by batch and image; `old_log_probs`, by batch, (B, W), of the model that
    drew them, once the first of several steps was taken on them."""

    tokens: list[list[list[list[int]]]]
    advantages: list[list[list[float]]]
    old_log_probs: list[list[list[float]] | None]


class CaptionGRPOTrainer(ResumableTrainer, Trainer):
    """GRPO (`vlmcap.training.grpo`) of captions, from an adapter on.

    In every step the frozen vision encoder runs once an image. From its output `num_generations` captions are sampled
    as branches of the image (`CaptionSampler`), and laid out as branches again for one forward with gradients
    (`shared_prefix`).

    Args:
        rows: as `load_captions` or `rows_by_key` return them; their captions are the references of the rewards.
        processing_class: processor of the model.
        prompt: the user's text after the image.
        bad_images: the list of unreadable pictures.
        peft_config: of the adapter.
        adapter: the weights to start from, and the reference of the KL divergence.
        rewards: what captions are worth.
        sampled_at_once: images a device.
        features: cached image features of the rows. The model's vision encoder is then taken out.
        validation: scores the model at every evaluation (`eval_strategy`), and before the first step.
        figures: captions and references by image, tokenizer -> figures of quality beside the rewards, for validation
            captions (`vlmcap.rewards.watch.caption_figures`).

    Raises:
        ModelError: the shared-prefix engine does not know the model, or FSDP shards it.
        UserError: fewer images than a step takes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: CaptionGRPOConfig,
        rows: Dataset,
        processing_class: ProcessorMixin,
        prompt: str,
        bad_images: BadImages,
        peft_config: PeftConfig,
        adapter: Adapter,
        rewards: Rewards,
        sampled_at_once: int = 16,
        features: FeatureCache | None = None,
        validation: CaptionValidation | None = None,
        figures: Callable[..., dict[str, float]] | None = None,
    ):
        if not shared_prefix.supports(model):
            raise ModelError(
                f"{type(model).__name__} cannot be trained on rewards: captions are sampled and trained on as branches"
                " of their image, which the shared-prefix engine does for Qwen2-VL, Qwen2.5-VL and Qwen3-VL"
            )
        self.rows, self.bad_images, self.validation, self.shared_prefix = rows, bad_images, validation, True
        self.texts = rows.remove_columns("image")
        self.rewards, self.figures, self.features = rewards, figures, features
        self.adapter = adapter
        self.attention = model.config.get_text_config()._attn_implementation
        images = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        if len(rows) < images:
            raise UserError(
                f"there are {len(rows)} images to train on, and a step takes {images} (per_device_train_batch_size"
                f" {args.per_device_train_batch_size} x gradient_accumulation_steps {args.gradient_accumulation_steps}"
                f" x {args.world_size} processes): lower one of them"
            )
        examples = caption_examples(rows, max(map(len, rows["captions"])))
        self.sizes = [0] * len(examples)
        if args.per_device_train_batch_size > 1:
            self.sizes = count_image_tokens(rows, processing_class)
        collator = PictureCollator(rows, processing_class, prompt, bad_images, model, features)
        if features is not None:
            feed_features(model)
        set_seed(args.seed)  # of dropout
        model = get_peft_model(model, peft_config)
        start_from(model, adapter)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=examples,
            eval_dataset=validation and validation.rows,
            processing_class=processing_class,
            callbacks=trackers(args, validation),
        )
        if self.is_fsdp_enabled:
            raise ModelError("captions cannot be sampled while FSDP shards the model: use one GPU or DDP")
        self.model_accepts_loss_kwargs = True  # `compute_loss` takes the number of tokens of the whole step
        free_frozen_parts(self.model)
        self.start = StartWeights(self.model) if args.beta else None
        self.sampler = CaptionSampler(self.model, processing_class, args, sampled_at_once)
        self.samples, self.batches = None, []
        # What is logged: of every step since the last line; of its tokens (see `grpo_loss`); and of the whole run.
        self.step_figures = defaultdict(list)
        self.token_sums = torch.zeros(4, dtype=torch.float64, device=args.device)
        self.totals = {"samples": 0, "images": 0, "images_alike": 0}
        self.warned = False
        sizes = hashlib.sha256(json.dumps(self.sizes).encode()).hexdigest()
        must_match = {"image sizes": sizes, "num_iterations": args.num_iterations}
        self.set_up_run(must_match | {"adapter": weights_hash(adapter.folder)})
        self.may_change |= {"reward_funcs": rewards.names}

    # Samples -------------------------------------------------------------------------------------------------------
    def _get_train_sampler(self, train_dataset=None) -> RepeatingSampler:
        args = self.args
        seed, batch = args.seed if args.data_seed is None else args.data_seed, args.per_device_train_batch_size
        step = batch * args.gradient_accumulation_steps * args.world_size
        return RepeatingSampler(self.sizes, batch, seed, step, args.num_iterations)

    def _get_num_items_in_batch(self, batch_samples, device):
        """There are no captions yet: `get_batch_samples` counts their tokens."""

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of an optimizer step with their samples, and how many tokens count in it, a process."""
        pictures, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.state.global_step % self.args.num_iterations == 0:
            self.samples = None
        if self.samples is None or not self.batches:  # else the samples are trained on once more
            pictures = [self._prepare_inputs(batch) for batch in pictures]
            with self._evaluating(), fed_with(self.model, self.features) as encode:
                for batch in pictures:
                    batch["pixel_values"] = torch.cat(encode([batch]))
                if self.samples is None:
                    self.samples = self._draw(pictures)
                self.batches = [self._laid_out(number, batch) for number, batch in enumerate(pictures)]
        tokens = torch.stack([batch["trained"].sum() for batch in self.batches]).sum()
        return self.batches, self.accelerator.reduce(tokens) / self.accelerator.num_processes

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Within it the model has no dropout and records nothing; it is computed in the precision of the training."""
        self.model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            yield
        self.model.train()

    def _draw(self, pictures: list[dict]) -> Samples:
        """Samples captions of a step's pictures, whose pixels are encoded, and rewards them."""
        rows = [row for batch in pictures for row in batch["rows"].tolist()]
        begin = time.perf_counter()
        tokens = self.sampler.draw(pictures, rows, self.state.global_step)
        self.step_figures["seconds/sampling"].append(time.perf_counter() - begin)
        advantages = self._reward(rows, tokens)
        batched, start = Samples([], [], []), 0
        for batch in pictures:
            end = start + len(batch["rows"])
            batched.tokens.append(tokens[start:end])
            batched.advantages.append(advantages[start:end])
            batched.old_log_probs.append(None)
            start = end
        return batched

    def _reward(self, rows: list[int], tokens: list[list[list[int]]]) -> list[list[float]]:
        """Advantages of the samples of some rows; what is logged of them is kept."""
        count, device = self.args.num_generations, self.args.device
        samples = [sample for image in tokens for sample in image]
        texts = self.processing_class.tokenizer.batch_decode(samples, skip_special_tokens=True)
        captions = [" ".join(text.split()) for text in texts]
        records = [self.texts[row] for row in rows for _ in range(count)]
        begin = time.perf_counter()
        rewarded = self.rewards(captions, [record["captions"] for record in records], records)
        self.step_figures["seconds/rewards"].append(time.perf_counter() - begin)

        # One row a sample, of all processes: rewards, their sum, tokens, truncated, distinct captions of the image.
        distinct = [len(set(captions[i : i + count])) / count for i in range(0, len(captions), count)]
        rest = [[len(s), self.sampler.truncated(s), distinct[i // count]] for i, s in enumerate(samples)]
        own = torch.cat(
            [torch.tensor(rewarded.per_function), torch.tensor(rewarded.total)[:, None], torch.tensor(rest)], dim=1
        )
        gathered = self.accelerator.gather(own.to(device, torch.float64)).cpu()
        *each, total, lengths, truncated, distinct = gathered.unbind(1)
        # In float32, as in TRL: what differs by less scores alike.
        alike = score_alike(total.float().view(-1, count))
        for name, values in zip(self.rewards.names, each, strict=True):
            self.step_figures[f"rewards/{name}/mean"].append(values.mean().item())
            self.step_figures[f"rewards/{name}/std"].append(values.std().item())
        figures = {
            "reward": total.mean(),
            "reward_std": total.std(),
            "frac_reward_zero_std": alike.double().mean(),
            "completions/mean_length": lengths.mean(),
            "completions/clipped_ratio": truncated.mean(),
            "completions/distinct": distinct.mean(),
        }
        for name, value in figures.items():
            self.step_figures[name].append(value.item())
        self.totals["samples"] += len(total)
        self.totals["images"] += len(alike)
        self.totals["images_alike"] += int(alike.sum())
        rewards = torch.tensor(rewarded.total, dtype=torch.float32).view(-1, count)
        return advantages_of(rewards, self.args.scale_rewards, total.float()).tolist()

    def _laid_out(self, number: int, pictures: dict) -> dict:
        """The batch that is trained on: pictures with their samples as branches, and what belongs to these."""
        samples = self.samples
        prefix = [pictures[name].cpu() for name in ("input_ids", "attention_mask", "position_ids")]
        branches = [[Branch(tokens, [True] * len(tokens)) for tokens in image] for image in samples.tokens[number]]
        batch = lay_out(*prefix, branches)
        trained = batch["labels"][:, batch["caption_start"] :] != -100
        if self.args.mask_truncated_completions:
            segments = batch["segments"][:, batch["caption_start"] :]
            for row, image in enumerate(samples.tokens[number]):
                for branch, sample in enumerate(image):
                    if self.sampler.truncated(sample):
                        trained[row] &= segments[row] != shared_prefix.PREFIX + 1 + branch
        old = samples.old_log_probs[number]
        batch |= {"trained": trained, "advantages": torch.tensor(samples.advantages[number])}
        batch |= {"number": number, "old_log_probs": None if old is None else torch.tensor(old)}
        batch = self._prepare_inputs(batch | {key: pictures[key] for key in ("pixel_values", "image_grid_thw")})
        if self.start is not None:
            with self.start.used_by(self.model):
                batch["reference_log_probs"] = self._log_probs(self.model, batch)
        return batch

    # Steps ---------------------------------------------------------------------------------------------------------
    def _log_probs(self, model: nn.Module, batch: dict) -> torch.Tensor:
        inputs = {key: batch[key] for key in (*LAID_OUT, "pixel_values", "image_grid_thw")}
        return caption_log_probs(model, inputs, self.attention, self.args.temperature)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with fed_with(self.model, self.features):
            log_probs = self._log_probs(model, inputs)
        old, number = inputs["old_log_probs"], inputs["number"]
        if old is None:  # the model is the one that drew the samples
            old = log_probs.detach()
            if self.args.num_iterations > 1:
                self.batches[number]["old_log_probs"] = old
                self.samples.old_log_probs[number] = old.tolist()
        loss, sums = grpo_loss(
            log_probs,
            old,
            inputs.get("reference_log_probs"),
            inputs,
            self.args,
            accumulated=self.current_gradient_accumulation_steps,
            tokens=num_items_in_batch,
        )
        self.token_sums += sums
        return loss

    # Validation and log --------------------------------------------------------------------------------------------
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Scores of validation captions, `reward` and `rewards/NAME` of them, and means of `figures` over the keys."""
        scores = self.validation(model)
        known = {str(record["image_id"]): record for record in self.validation.rows.remove_columns("image")}
        captions, references, records, figures = [], [], [], []
        for task in self.validation.tasks:
            said = self.validation.latest_of[task.key]
            captions += said.values()
            references += [task.references[image] for image in said]
            records += [known[image] | {"captions": task.references[image], "key": task.key} for image in said]
            if self.figures:
                figures.append(self.figures(said, task.references, tokenizer=task.tokenizer))
        rewarded = self.rewards(captions, references, records)
        means = zip(self.rewards.names, rewarded.per_function.mean(0).tolist(), strict=True)
        scores |= {"reward": float(rewarded.total.mean())} | {f"rewards/{name}": mean for name, mean in means}
        return scores | {name: sum(of[name] for of in figures) / len(figures) for name in (figures or [{}])[0]}

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        self._warn(metrics)
        return metrics

    def _warn(self, metrics: dict[str, float]) -> None:
        """One line in a run, where the held-out reward rises while captions get worse."""
        if self.figures is None or self.warned:
            return
        before = next(entry for entry in self.state.log_history if "eval_reward" in entry)
        before, now = ({key.removeprefix("eval_"): value for key, value in one.items()} for one in (before, metrics))
        if text := warning(before, now):
            self.warned = True
            if PartialState().is_main_process:
                notice(text)

    def _run_epoch(self, *, epoch, epochs_trained, resume_from_checkpoint, **kwargs) -> None:
        """Takes over what a checkpoint has of samples and figures. At the start of a run, scores the starting adapter,
        with which later evaluations are compared; early stopping does not count it."""
        if self.resumed and epoch == epochs_trained:
            state = json.loads(self._state_file(resume_from_checkpoint).read_bytes())
            self.samples = state["samples"] and Samples(**state["samples"])
            self.step_figures.update(state["step_figures"])
            self.token_sums = self.token_sums.new_tensor(state["token_sums"])
            self.totals = state["totals"]
        elif self.validation is not None and self.state.global_step == 0:
            begin = time.perf_counter()
            with self._evaluating():
                scores = self.validate(self.model)
                self.log({f"eval_{name}": round(score, 6) for name, score in scores.items()})
            self.clock.pause(time.perf_counter() - begin)
        more = {"epochs_trained": epochs_trained, "resume_from_checkpoint": resume_from_checkpoint}
        super()._run_epoch(epoch=epoch, **more, **kwargs)

    def log(self, logs, *args, **kwargs):
        """Adds the means over the steps since the last line, of GRPO's figures under their names in TRL."""
        if self.model.training:
            logs |= {name: sum(values) / len(values) for name, values in self.step_figures.items()}
            tokens, kl, low, high = self.accelerator.reduce(self.token_sums).tolist()
            if tokens:
                if self.args.beta:
                    logs["kl"] = kl / tokens
                logs |= {"clip_ratio/low_mean": low / tokens, "clip_ratio/high_mean": high / tokens}
                logs["clip_ratio/region_mean"] = (low + high) / tokens
            self.step_figures.clear()
            self.token_sums.zero_()
        super().log(logs, *args, **kwargs)

    def summary(self) -> dict:
        """As the parent's, with `sampled`: samples and images so far, and images whose samples all scored alike."""
        return super().summary() | {"sampled": self.totals}

    # Checkpoints ---------------------------------------------------------------------------------------------------
    def _save_rng_state(self, output_dir: str) -> None:
        """And what was sampled and is not trained on to the end, and not logged."""
        super()._save_rng_state(output_dir)
        done = (self.state.global_step % self.args.num_iterations) == 0
        state = {
            "samples": None if done else vars(self.samples),
            "step_figures": self.step_figures,
            "token_sums": self.token_sums.tolist(),
            "totals": self.totals,
        }
        write_atomically(self._state_file(output_dir), json.dumps(state))

    def _state_file(self, folder: str) -> Path:
        return Path(folder) / f"samples_{self.args.process_index}.json"


def grpo_report(trainer: CaptionGRPOTrainer, model_name: str, max_pixels: int | None, caption_tokens: int) -> str:
    """The text printed at the start; arguments as of `training_report`."""
    args, rewards = trainer.args, trainer.rewards
    weighed = ", ".join(f"{name} {weight:g}" for name, weight in zip(rewards.names, rewards.weights, strict=True))
    reference = f"KL divergence from the starting adapter, beta {args.beta:g}" if args.beta else "no KL divergence"
    return "\n".join(
        [
            training_report(trainer, model_name, max_pixels, caption_tokens),
            f"Samples: {args.num_generations} of each image, at temperature {args.temperature:g}, of"
            f" {args.max_completion_length} tokens at most; its captions are the references of the rewards",
            f"Rewards and their weights: {weighed}",
            f"Loss: {args.loss_type}, rewards scaled by {args.scale_rewards}, {args.num_iterations} optimizer steps on"
            f" the same samples; {reference}",
        ]
    )
