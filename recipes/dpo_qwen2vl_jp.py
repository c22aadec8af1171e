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

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from vlmcap.arguments import run_main
from vlmcap.captioning.arguments import GenerationArguments, PromptArguments
from vlmcap.errors import UserError
from vlmcap.models.arguments import ModelArguments
from vlmcap.steps.arguments import EvaluationArguments
from vlmcap.training.arguments import CONTINUE, CaptionDPOFields, PreferenceArguments
from vlmcap.training.inherited import TRAINING_ARGUMENTS, complete, parsed_as

BASE_CONFIG = Path(__file__).parent / "configs/dpo_qwen2vl_jp/base.yaml"


@dataclass
class DataArguments(EvaluationArguments, PreferenceArguments):
    """What is trained on and evaluated, and how captions are scored and audited."""


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
    prompt_args: PromptArguments,
    settings: CaptionDPOFields,
) -> None:
    generation_args = prompt_args.main(generation_args)

    # Slow imports, after the command line and the dataset were checked.
    from vlmcap.steps.early import adapter_folder, check_early

    check_early(settings, data_args, prompt_args)
    if not data_args.preferences:
        raise UserError("--preferences is needed: preferences.jsonl of scripts/human_eval.py, or a dataset of them")
    adapter_dir = adapter_folder(settings.output_dir, model_args.adapter)

    from accelerate import PartialState

    from vlmcap.data.preferences import check_unseen, hold_out, read_preferences
    from vlmcap.models.load import lora_config
    from vlmcap.steps.begin import begin
    from vlmcap.steps.prompted import check_start, find_base, plan_evaluation, plan_validation, read_for_audit
    from vlmcap.steps.save import save_trained
    from vlmcap.steps.splits import load_scored_splits
    from vlmcap.training.dpo import CaptionDPOTrainer, dpo_report
    from vlmcap.training.trainer_arguments import CaptionDPOConfig

    training_args = complete(CaptionDPOConfig, settings)
    groups = {"data": asdict(data_args), "model": asdict(model_args), "generation": asdict(generation_args)}
    run = begin(training_args, REPORTED_SETTINGS, **groups, prompts=asdict(prompt_args))

    # Model and adapter: what is asked of them is known before the data are read.
    base = find_base(model_args, generation_args, prompt_args)
    check_start(base, generation_args, prompt_args)

    # Data: preferences, one row an image, and the splits that the model is scored with.
    asked, *others = prompt_args.all_wordings(generation_args.prompt)
    read = partial(read_preferences, prompt=asked, others=others, image_dir=data_args.preferences_image_dir)
    of_dataset = {"split": data_args.preferences_split, "revision": data_args.preferences_revision}
    preferences = read(data_args.preferences, **of_dataset)
    if data_args.heldout_preferences:
        heldout = read(data_args.heldout_preferences)
        check_unseen(preferences, heldout)
    else:
        preferences, heldout = hold_out(preferences, data_args.heldout_share, run.seed)
    validates = training_args.eval_strategy != "no"
    splits, left_out = load_scored_splits(data_args, run.output_dir, validates, run.seed, preferences, prompt_args)

    read_for_audit(data_args, generation_args, splits.test)
    model = base.load()
    evaluation = plan_evaluation(base, model, generation_args, prompt_args, data_args, splits, run.output_dir)

    features_of = base.feature_cache(training_args.cache_image_features, model, splits.bad_images)
    features, heldout_features, validation = features_of(preferences), features_of(heldout), None
    if validates:
        validation = plan_validation(
            base, generation_args, prompt_args, data_args, splits.validation, features_of(splits.validation)
        )
    trainer = CaptionDPOTrainer(
        model=model,
        args=training_args,
        rows=preferences,
        heldout=heldout,
        processing_class=base.processor,
        prompt=generation_args.prompt,
        bad_images=splits.bad_images,
        peft_config=lora_config(model, model_args),
        adapter=base.start,
        features=features,
        heldout_features=heldout_features,
        validation=validation,
    )
    trainer.figures["left_out"] = left_out
    if PartialState().is_main_process:
        print(dpo_report(trainer, model_args.model_name_or_path, model_args.max_pixels, 64), flush=True)

    # Training. The weights are loaded as those of the SFT recipe, which captioning.json says.
    trainer.train(resume_from_checkpoint=run.checkpoint)
    save_trained(trainer, adapter_dir, splits, run.config(base.args), "sft_qwen2vl_jp", generation_args, prompt_args)
    del trainer, model

    # Evaluation: base, starting adapter and the adapter as saved on disk, on the same images with the same decoding.
    evaluation.score_start(run.output_dir / "start", adapter_dir, splits)
    evaluation.finish(run, Path(__file__).stem, adapter_dir, splits)


ARGUMENTS = (
    DataArguments,
    ModelArguments,
    GenerationArguments,
    PromptArguments,
    parsed_as(CaptionDPOFields, TRAINING_ARGUMENTS),
)

if __name__ == "__main__":
    run_main(main, __doc__, *ARGUMENTS, config=BASE_CONFIG, interrupted=CONTINUE)
