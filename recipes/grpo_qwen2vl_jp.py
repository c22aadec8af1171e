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

from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from vlmcap.arguments import run_main
from vlmcap.captioning.arguments import GenerationArguments, PromptArguments
from vlmcap.models.arguments import ModelArguments
from vlmcap.rewards.arguments import RewardArguments, weights_of
from vlmcap.steps.arguments import EvaluationArguments
from vlmcap.training.arguments import CONTINUE, CaptionGRPOFields, SplitArguments
from vlmcap.training.inherited import TRAINING_ARGUMENTS, complete, parsed_as

BASE_CONFIG = Path(__file__).parent / "configs/grpo_qwen2vl_jp/base.yaml"


@dataclass
class DataArguments(EvaluationArguments, SplitArguments):
    """What is trained on and evaluated, and how captions are scored and audited."""

    include_yj_images: bool = field(
        default=False,
        metadata={"help": "Train on images that YJ Captions describes too; YJ is then no held-out test."},
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
    prompt_args: PromptArguments,
    settings: CaptionGRPOFields,
) -> None:
    weights = weights_of(reward_args.reward_funcs, settings.reward_weights)

    generation_args = prompt_args.main(generation_args)

    # Slow imports, after the command line and the dataset were checked.
    from vlmcap.steps.early import adapter_folder, check_early

    check_early(settings, data_args, prompt_args)
    adapter_dir = adapter_folder(settings.output_dir, model_args.adapter)

    from accelerate import PartialState

    from vlmcap.evaluation.audit_checks import read_instances
    from vlmcap.models.load import lora_config
    from vlmcap.rewards.combined import rewards_of_run
    from vlmcap.rewards.watch import caption_figures
    from vlmcap.steps.begin import begin
    from vlmcap.steps.prompted import check_start, find_base, plan_evaluation, plan_validation, read_for_audit
    from vlmcap.steps.save import save_trained
    from vlmcap.steps.splits import load_splits
    from vlmcap.training.prompts import rows_by_key
    from vlmcap.training.reward_trainer import CaptionGRPOTrainer, grpo_report
    from vlmcap.training.trainer_arguments import CaptionGRPOConfig

    training_args = complete(CaptionGRPOConfig, settings)
    is_main = PartialState().is_main_process
    groups = {"data": asdict(data_args), "model": asdict(model_args), "rewards": asdict(reward_args)}
    run = begin(
        training_args, REPORTED_SETTINGS, **groups, generation=asdict(generation_args), prompts=asdict(prompt_args)
    )

    # Model and adapter: what is asked of them is known before the data are read.
    base = find_base(model_args, generation_args, prompt_args)
    check_start(base, generation_args, prompt_args)

    # Data: one row an image (and key of prompts), with the captions that samples are compared with.
    validates = training_args.eval_strategy != "no"
    splits = load_splits(data_args, run.output_dir, validates, run.seed, data_args.include_yj_images, prompt_args)
    rewarded = [*splits.train["image_id"], *(splits.validation["image_id"] if validates else [])]
    rewards = rewards_of_run(
        reward_args.reward_funcs,
        weights,
        splits.train,
        prompt_args,
        tokenizer=data_args.tokenizer,
        idf_dir=run.output_dir if is_main else None,
        lexicon=data_args.lexicon,
        instances=reward_args.reward_instances,
        image_ids=list(map(str, rewarded)),
    )
    rows = splits.train
    if prompt_args.prompts:
        rows = rows_by_key(rows, prompt_args.wordings, prompt_args.prompt_weights, run.seed)

    things = read_for_audit(data_args, generation_args, splits.test)
    model = base.load()
    evaluation = plan_evaluation(base, model, generation_args, prompt_args, data_args, splits, run.output_dir)

    features_of = base.feature_cache(training_args.cache_image_features, model, splits.bad_images)
    features, validation, figures = features_of(rows), None, None
    if features:
        rows, splits = features.rows, splits.trained_on(features.rows)
    if validates:
        validation = plan_validation(
            base, generation_args, prompt_args, data_args, splits.validation, features_of(splits.validation)
        )
        ids, named = list(map(str, splits.validation["image_id"])), reward_args.reward_instances
        objects = read_instances(named, things, ids) if named else {}
        figures = partial(caption_figures, lexicon=things, instances=objects)
    trainer = CaptionGRPOTrainer(
        model=model,
        args=training_args,
        rows=rows,
        processing_class=base.processor,
        prompt=generation_args.prompt,
        bad_images=splits.bad_images,
        peft_config=lora_config(model, model_args),
        adapter=base.start,
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
    reported = run.config(base.args) | {"rewards": dict(zip(rewards.names, rewards.weights, strict=True))}
    save_trained(trainer, adapter_dir, splits, reported, "sft_qwen2vl_jp", generation_args, prompt_args)
    del trainer, model

    # Evaluation: base, starting adapter and the adapter as saved on disk, on the same images with the same decoding.
    evaluation.score_start(run.output_dir / "start", adapter_dir, splits)
    evaluation.finish(run, Path(__file__).stem, adapter_dir, splits)


ARGUMENTS = (
    DataArguments,
    ModelArguments,
    RewardArguments,
    GenerationArguments,
    PromptArguments,
    parsed_as(CaptionGRPOFields, TRAINING_ARGUMENTS),
)

if __name__ == "__main__":
    run_main(main, __doc__, *ARGUMENTS, config=BASE_CONFIG, interrupted=CONTINUE)
