"""Whether a checkpoint belongs to the run that resumes from it: what must match, and what may change."""

import hashlib
import json

from datasets import Dataset
from torch import nn
from transformers import TrainingArguments

from vlmcap import provenance
from vlmcap.training.checkpoints import CheckpointError

# What says which examples a step is made of: with another value, a continued run would see some twice, others never.
MUST_MATCH = (
    "seed data_seed per_device_train_batch_size gradient_accumulation_steps world_size captions_per_image"
    " pairs_per_image dataloader_drop_last"
).split()
# Where the rest of what must match comes from, where no setting has its name.
SOURCES = {
    "training captions": "dataset, revision, split, images that can be read, prompts and instructions",
    "image sizes": "min_pixels and max_pixels",
}
# What else decides the losses. It may be changed on purpose (a longer run). Then a line says so.
MAY_CHANGE = (
    "max_steps num_train_epochs learning_rate encoder_learning_rate decoder_learning_rate lr_scheduler_type"
    " lr_scheduler_kwargs warmup_steps weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm optim optim_args"
    " label_smoothing_factor beta loss_type label_smoothing bf16 fp16 gradient_checkpointing shared_prefix"
    " cache_image_features eval_strategy eval_steps save_strategy save_steps logging_steps load_best_model_at_end"
    " metric_for_best_model early_stopping_patience early_stopping_threshold ignore_data_skip num_generations"
    " max_completion_length temperature top_p top_k use_bias_correction_kl epsilon epsilon_high scale_rewards"
    " mask_truncated_completions reward_weights"
).split()


def must_match(args: TrainingArguments, examples: Dataset, model: nn.Module) -> dict:
    """What decides which examples a step is made of, and which weights it changes; `examples` as `caption_examples`
    returns them."""
    settings = args.to_dict() | {"world_size": args.world_size}
    captions, trained = hashlib.sha256(), hashlib.sha256()
    columns = [name for name in ("row", "captions", "prompts", "system") if name in examples.column_names]
    for values in zip(*(examples[name] for name in columns), strict=True):
        captions.update(json.dumps(values).encode())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained.update(json.dumps([name, list(parameter.shape)]).encode())
    hashes = {"training captions": captions.hexdigest(), "trained weights": trained.hexdigest()}
    return {key: settings.get(key) for key in MUST_MATCH} | hashes


def may_change(args: TrainingArguments, model: nn.Module) -> dict:
    """What else decides the losses, as JSON has it."""
    settings = args.to_dict()
    loaded = {"model": provenance.public_name(model.config._name_or_path)}
    for config in getattr(model, "peft_config", {}).values():
        loaded |= {"lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    return json.loads(json.dumps({key: settings.get(key) for key in MAY_CHANGE} | loaded, default=str))


def changes(before: dict, now: dict) -> dict[str, str]:
    """Each key whose value is another one now, with a text that says so."""
    changed = [key for key in now if before.get(key) != now[key]]
    short = {key: [str(values.get(key))[:40] for values in (before, now)] for key in changed}
    return {key: f"{key} {now} (was {before})" for key, (before, now) in short.items()}


def check_same_run(checkpoint: str, before: dict, now: dict) -> None:
    """Compares `must_match` of a checkpoint with that of the run that resumes from it.

    Raises:
        CheckpointError: they differ; names each difference, and what to set back.
    """
    refused = changes(before, now)
    if "per_device_train_batch_size" in refused:
        refused.pop("image sizes", None)  # they are looked at for batches of several alone
    if refused:
        sources = ", ".join(f"{key} are those of {where}" for key, where in SOURCES.items() if key in refused)
        raise CheckpointError(
            f"{checkpoint} belongs to a run with other settings or data: {', '.join(refused.values())}. Resumed"
            " from it, the run would see some captions twice and others never: set them back"
            f"{sources and f' ({sources})'}, or start a new run in another --output_dir."
        )
