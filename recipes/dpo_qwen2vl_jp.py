"""Train a captioning adapter of sft_qwen2vl_jp.py further on preferences (DPO), and measure the result beside the base
model and the adapter that it started from.

One GPU with 16 GB or more, settings of recipes/configs/dpo_qwen2vl_jp/base.yaml:

    accelerate launch recipes/dpo_qwen2vl_jp.py --adapter you/name --preferences outputs/human/result/preferences.jsonl

A T4 (float16, smaller images):

    accelerate launch --config_file accelerate_configs/t4.yaml recipes/dpo_qwen2vl_jp.py \\
        --config recipes/configs/dpo_qwen2vl_jp/t4.yaml --adapter you/name --preferences preferences.jsonl

Preferences are pairs of captions of a picture, one chosen and one rejected: what `scripts/human_eval.py import`
writes, or any TRL preference dataset with images. Pairs of one picture share it: its captions are branches of one
sequence. The log-probabilities of the starting adapter are computed once and kept in `output_dir`. A tenth of the
pictures is held out: before and after, the share of their pairs is measured whose chosen caption is the more probable.

Any key of the YAML can be set on the command line, and an interrupted run continues with `--resume_from_checkpoint
latest`. The whole path in miniature, on a CPU, in minutes, with preferences made by a rule:

    make demo
    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/dpo_qwen2vl_jp.py \\
        --config recipes/configs/dpo_qwen2vl_jp/demo.yaml

In `output_dir` it leaves what the SFT recipe leaves, and `start/`: captions and scores of the starting adapter.
"""

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from vlmcap.arguments import run_main
from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.errors import UserError
from vlmcap.models.arguments import ModelArguments
from vlmcap.training.arguments import CONTINUE, CaptionDPOFields, PreferenceArguments
from vlmcap.training.inherited import TRAINING_ARGUMENTS, complete, parsed_as

BASE_CONFIG = Path(__file__).parent / "configs/dpo_qwen2vl_jp/base.yaml"


@dataclass
class DataArguments(PreferenceArguments):
    """What is trained on and evaluated, and how captions are scored and audited."""

    base_saw: str = field(
        default="unknown",
        metadata={
            "help": "Whether the base model saw STAIR, YJ Captions and COCO: unknown, no or train. Goes into the card."
        },
    )
    lexicon: str = field(
        default="coco_ja", metadata={"help": "Things the audit looks for in captions: coco_ja or a YAML file."}
    )
    instances: list[str] | None = field(
        default=None,
        metadata={
            "help": "COCO's instances_*.json of the test images, for the audit; without them the references alone say"
            " what is in an image."
        },
    )


# The trainer's settings that the model card prints.
REPORTED_SETTINGS = (
    "beta loss_type label_smoothing learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm optim"
    " num_train_epochs max_steps per_device_train_batch_size pairs_per_image gradient_accumulation_steps world_size"
    " gradient_checkpointing bf16 fp16 seed"
).split()


def main(
    data_args: DataArguments,
    model_args: ModelArguments,
    generation_args: GenerationArguments,
    settings: CaptionDPOFields,
) -> None:
    # Slow imports, after the command line and the dataset were checked.
    from vlmcap.steps.early import check_early

    check_early(settings, data_args)
    adapter_dir = Path(settings.output_dir) / "adapter"
    if not data_args.preferences:
        raise UserError("--preferences is needed: preferences.jsonl of scripts/human_eval.py, or a dataset of them")
    if not model_args.adapter:
        raise UserError("--adapter is needed: the adapter that training starts from, of recipes/sft_qwen2vl_jp.py")
    if Path(model_args.adapter).resolve() == adapter_dir.resolve():
        raise UserError(
            f"--adapter {model_args.adapter} would be overwritten by this run: choose another --output_dir"
        )

    from accelerate import PartialState

    from vlmcap.captioning.generate import check_predictions, decoding_record
    from vlmcap.captioning.predictions import model_record
    from vlmcap.captioning.settings import check_prompt
    from vlmcap.data.corpora import SEEN_CORPORA
    from vlmcap.data.images import references_of
    from vlmcap.data.preferences import check_unseen, hold_out, read_preferences
    from vlmcap.evaluation.audit import write_audit
    from vlmcap.evaluation.audit_checks import read_instances
    from vlmcap.evaluation.lexicon import Lexicon
    from vlmcap.models.load import (
        chat_prompt,
        load_adapter,
        load_model,
        load_processor,
        lora_config,
        read_trained_adapter,
        resolve_revision,
    )
    from vlmcap.provenance import public_name
    from vlmcap.steps.begin import begin
    from vlmcap.steps.finish import finish, saw_records
    from vlmcap.steps.save import save_trained
    from vlmcap.steps.splits import load_scored_splits
    from vlmcap.steps.start import score_start
    from vlmcap.training.dpo import CaptionDPOTrainer, dpo_report
    from vlmcap.training.features import cache_features
    from vlmcap.training.trainer_arguments import CaptionDPOConfig
    from vlmcap.training.validation import CaptionValidation

    training_args = complete(CaptionDPOConfig, settings)
    is_main = PartialState().is_main_process
    groups = {"data": asdict(data_args), "model": asdict(model_args), "generation": asdict(generation_args)}
    run = begin(training_args, REPORTED_SETTINGS, **groups)

    # Model and adapter: what is asked of them is known before the data are read.
    name, revision = model_args.model_name_or_path, model_args.model_revision
    model_args = replace(model_args, model_revision=resolve_revision(name, revision))
    names = (name, model_args.model_revision)
    processor = load_processor(*names, model_args.min_pixels, model_args.max_pixels)
    chat_prompt(processor, generation_args.prompt)  # refuses one that would end the turn
    start = read_trained_adapter(model_args)
    model_args = replace(model_args, adapter_revision=start.revision)
    check_prompt(start.name, start.revision, generation_args.prompt)

    # Data: preferences, one row an image, and the splits that the model is scored with.
    read = partial(read_preferences, prompt=generation_args.prompt, image_dir=data_args.preferences_image_dir)
    of_dataset = {"split": data_args.preferences_split, "revision": data_args.preferences_revision}
    preferences = read(data_args.preferences, **of_dataset)
    if data_args.heldout_preferences:
        heldout = read(data_args.heldout_preferences)
        check_unseen(preferences, heldout)
    else:
        preferences, heldout = hold_out(preferences, data_args.heldout_share, run.seed)
    validates = training_args.eval_strategy != "no"
    splits, left_out = load_scored_splits(data_args, run.output_dir, validates, run.seed, preferences)

    # What scores and audit will read hours later is read now.
    decoding_record(generation_args)
    things = Lexicon(data_args.lexicon)
    if data_args.instances:
        read_instances(data_args.instances, things, map(str, splits.test["image_id"]))
    model = load_model(*names, model_args.load_in_4bit, model_args.attn_implementation)
    saw, trained_saw = saw_records(dict.fromkeys(SEEN_CORPORA, data_args.base_saw), splits)
    base_dir, start_dir = run.output_dir / "base", run.output_dir / "start"
    base_record = {"model": model_record(model, *names), "dataset": splits.test_record, "saw": saw}
    check_predictions(processor, base_dir / "predictions.jsonl", generation_args, base_record)

    features = heldout_features = validation_features = validation = None
    if training_args.cache_image_features:
        cache = partial(cache_features, Path(training_args.cache_image_features), model, processor)
        features, heldout_features = (cache(rows, *names, splits.bad_images) for rows in (preferences, heldout))
        if validates:
            validation_features = cache(splits.validation, *names, splits.bad_images)
    if validates:
        validation = CaptionValidation(
            splits.validation, processor, generation_args, data_args.tokenizer, validation_features
        )
    trainer = CaptionDPOTrainer(
        model=model,
        args=training_args,
        rows=preferences,
        heldout=heldout,
        processing_class=processor,
        prompt=generation_args.prompt,
        bad_images=splits.bad_images,
        peft_config=lora_config(model, model_args),
        adapter=start,
        features=features,
        heldout_features=heldout_features,
        validation=validation,
    )
    trainer.figures["left_out"] = left_out
    if is_main:
        print(dpo_report(trainer, model_args.model_name_or_path, model_args.max_pixels, 64), flush=True)

    # Training. The weights are loaded as those of the SFT recipe, which captioning.json says.
    trainer.train(resume_from_checkpoint=run.checkpoint)
    save_trained(trainer, adapter_dir, splits, run.config(model_args), "sft_qwen2vl_jp", generation_args)
    del trainer, model

    # Evaluation: base, starting adapter and the adapter as saved on disk, on the same images with the same decoding.
    def load_base():
        return load_model(*names, model_args.load_in_4bit, model_args.attn_implementation), processor

    def load_with(adapter: str, revision: str | None = None):
        return load_adapter(load_base()[0], adapter, revision), processor

    audited = partial(
        write_audit,
        references=references_of(splits.test),
        lexicon=data_args.lexicon,
        instances=data_args.instances or [],
        count_tokens=lambda caption: len(processor.tokenizer(caption, add_special_tokens=False)["input_ids"]),
    )

    def audit_of(folder: Path, **more) -> dict:
        return audited(folder / "predictions.jsonl", output=folder / "audit.json", **more)

    score_start(
        start_dir,
        adapter_dir,
        start,
        partial(load_with, start.name, start.revision),
        generation_args,
        splits,
        base_record,
        data_args.tokenizer,
        audit_of,
    )
    trained_saw["note"] += (
        f" Training started from the adapter {public_name(start.name)}; what that saw is not listed."
    )
    finish(
        run,
        Path(__file__).stem,
        generation_args,
        splits,
        base_dir=base_dir,
        base_record=base_record,
        load_base=load_base,
        trained_dir=adapter_dir,
        trained_saw=trained_saw,
        load_trained=partial(load_with, str(adapter_dir)),
        tokenizer=data_args.tokenizer,
        audit=lambda: audit_of(adapter_dir, train_rows=splits.train.remove_columns("image"), base=audit_of(base_dir)),
    )


ARGUMENTS = (DataArguments, ModelArguments, GenerationArguments, parsed_as(CaptionDPOFields, TRAINING_ARGUMENTS))

if __name__ == "__main__":
    run_main(main, __doc__, *ARGUMENTS, config=BASE_CONFIG, interrupted=CONTINUE)
