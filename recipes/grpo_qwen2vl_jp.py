"""Train a captioning adapter of sft_qwen2vl_jp.py further on rewards (GRPO): on the metric that it is measured with,
and on what its captions must not do. Measure the result beside the base model and the adapter that it started from.

One GPU with 16 GB or more, settings of recipes/configs/grpo_qwen2vl_jp/base.yaml:

    accelerate launch recipes/grpo_qwen2vl_jp.py --adapter you/name

A T4 (float16, smaller images):

    accelerate launch --config_file accelerate_configs/t4.yaml recipes/grpo_qwen2vl_jp.py \\
        --config recipes/configs/grpo_qwen2vl_jp/t4.yaml --adapter you/name

In every step some captions are sampled for each image and rewarded: what scores better than the others of its image
becomes more likely. Rewards are those of recipes/vlmcap/rewards/README.md, or functions of your own:

    accelerate launch recipes/grpo_qwen2vl_jp.py --adapter you/name --reward_funcs cider_d chair mine.py:no_colours \\
        --reward_weights 1 1 0.5

A reward can rise while captions get worse: validation also counts invented things (CHAIR) and distinct captions, and a
line warns when they get worse. Any key of the YAML can be set on the command line, and an interrupted run continues
with `--resume_from_checkpoint latest`. The whole path in miniature, on a CPU, in minutes:

    make demo
    accelerate launch --config_file accelerate_configs/cpu.yaml recipes/grpo_qwen2vl_jp.py \\
        --config recipes/configs/grpo_qwen2vl_jp/demo.yaml

In `output_dir` it leaves what the SFT recipe leaves, `start/`: captions and scores of the starting adapter, and
`idf.json`: the document frequencies of the training captions (`eval_captioning.py --idf` takes them).
"""

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from vlmcap.arguments import run_main
from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.errors import UserError
from vlmcap.models.arguments import ModelArguments
from vlmcap.rewards.arguments import RewardArguments, weights_of
from vlmcap.training.arguments import CONTINUE, CaptionGRPOFields, SplitArguments
from vlmcap.training.inherited import TRAINING_ARGUMENTS, complete, parsed_as

BASE_CONFIG = Path(__file__).parent / "configs/grpo_qwen2vl_jp/base.yaml"


@dataclass
class DataArguments(SplitArguments):
    """What is trained on and evaluated, and how captions are scored and audited."""

    include_yj_images: bool = field(
        default=False,
        metadata={"help": "Train on images that YJ Captions describes too; YJ is then no held-out test."},
    )
    base_saw: str = field(
        default="unknown",
        metadata={
            "help": "Whether the base model saw STAIR, YJ Captions and COCO: unknown, no or train. Goes into the card."
        },
    )
    lexicon: str = field(
        default="coco_ja",
        metadata={"help": "Things that the audit and the reward chair look for: coco_ja or a YAML file."},
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
    "num_generations max_completion_length temperature top_p top_k loss_type scale_rewards beta num_iterations epsilon"
    " epsilon_high mask_truncated_completions learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm"
    " optim num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps world_size"
    " gradient_checkpointing bf16 fp16 seed"
).split()


def main(
    data_args: DataArguments,
    model_args: ModelArguments,
    reward_args: RewardArguments,
    generation_args: GenerationArguments,
    settings: CaptionGRPOFields,
) -> None:
    weights = weights_of(reward_args.reward_funcs, settings.reward_weights)

    # Slow imports, after the command line and the dataset were checked.
    from vlmcap.steps.early import check_early

    check_early(settings, data_args)
    adapter_dir = Path(settings.output_dir) / "adapter"
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
    from vlmcap.rewards.combined import Rewards
    from vlmcap.rewards.watch import caption_figures
    from vlmcap.steps.begin import begin
    from vlmcap.steps.finish import finish, saw_records
    from vlmcap.steps.save import save_trained
    from vlmcap.steps.splits import load_splits
    from vlmcap.steps.start import score_start
    from vlmcap.training.features import cache_features
    from vlmcap.training.reward_trainer import CaptionGRPOTrainer, grpo_report
    from vlmcap.training.trainer_arguments import CaptionGRPOConfig
    from vlmcap.training.validation import CaptionValidation

    training_args = complete(CaptionGRPOConfig, settings)
    is_main = PartialState().is_main_process
    groups = {"data": asdict(data_args), "model": asdict(model_args), "rewards": asdict(reward_args)}
    run = begin(training_args, REPORTED_SETTINGS, **groups, generation=asdict(generation_args))

    # Model and adapter: what is asked of them is known before the data are read.
    name, revision = model_args.model_name_or_path, model_args.model_revision
    model_args = replace(model_args, model_revision=resolve_revision(name, revision))
    names = (name, model_args.model_revision)
    processor = load_processor(*names, model_args.min_pixels, model_args.max_pixels)
    chat_prompt(processor, generation_args.prompt)  # refuses one that would end the turn
    start = read_trained_adapter(model_args)
    model_args = replace(model_args, adapter_revision=start.revision)
    check_prompt(start.name, start.revision, generation_args.prompt)

    # Data: one row an image, with the captions that samples are compared with.
    validates = training_args.eval_strategy != "no"
    splits = load_splits(data_args, run.output_dir, validates, run.seed, data_args.include_yj_images)
    rewarded = [*splits.train["image_id"], *(splits.validation["image_id"] if validates else [])]
    rewards = Rewards(
        reward_args.reward_funcs,
        weights,
        splits.train,
        lexicon=data_args.lexicon,
        instances=reward_args.reward_instances,
        image_ids=list(map(str, rewarded)),
        tokenizer=data_args.tokenizer,
        idf_path=run.output_dir / "idf.json" if is_main else None,
    )

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

    features = validation_features = validation = figures = None
    if training_args.cache_image_features:
        cache = partial(cache_features, Path(training_args.cache_image_features), model, processor)
        features = cache(splits.train, *names, splits.bad_images)
        splits = replace(splits, train=features.rows)
        if validates:
            validation_features = cache(splits.validation, *names, splits.bad_images)
    if validates:
        validation = CaptionValidation(
            splits.validation, processor, generation_args, data_args.tokenizer, validation_features
        )
        ids, named = list(map(str, splits.validation["image_id"])), reward_args.reward_instances
        objects = read_instances(named, things, ids) if named else {}
        figures = partial(caption_figures, lexicon=things, instances=objects, tokenizer=data_args.tokenizer)
    trainer = CaptionGRPOTrainer(
        model=model,
        args=training_args,
        rows=splits.train,
        processing_class=processor,
        prompt=generation_args.prompt,
        bad_images=splits.bad_images,
        peft_config=lora_config(model, model_args),
        adapter=start,
        rewards=rewards,
        sampled_at_once=generation_args.generation_batch_size,
        features=features,
        validation=validation,
        figures=figures,
    )
    if is_main:
        longest = training_args.max_completion_length
        print(grpo_report(trainer, model_args.model_name_or_path, model_args.max_pixels, longest), flush=True)

    # Training. The weights are loaded as those of the SFT recipe, which captioning.json says.
    trainer.train(resume_from_checkpoint=run.checkpoint)
    reported = run.config(model_args) | {"rewards": dict(zip(rewards.names, rewards.weights, strict=True))}
    save_trained(trainer, adapter_dir, splits, reported, "sft_qwen2vl_jp", generation_args)
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


ARGUMENTS = (
    DataArguments,
    ModelArguments,
    RewardArguments,
    GenerationArguments,
    parsed_as(CaptionGRPOFields, TRAINING_ARGUMENTS),
)

if __name__ == "__main__":
    run_main(main, __doc__, *ARGUMENTS, config=BASE_CONFIG, interrupted=CONTINUE)
