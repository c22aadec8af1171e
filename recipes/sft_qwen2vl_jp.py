"""Adapt Qwen2-VL-2B-Instruct to Japanese image captioning with QLoRA, and measure the result beside the base model.

One GPU with 16 GB or more, settings of recipes/configs/sft_qwen2vl_jp/base.yaml:

    accelerate launch recipes/sft_qwen2vl_jp.py

A T4 (float16, smaller images):

    accelerate launch --config_file accelerate_configs/t4.yaml recipes/sft_qwen2vl_jp.py \\
        --config recipes/configs/sft_qwen2vl_jp/t4.yaml

Any key of the YAML can be set on the command line, and an interrupted run continues:

    accelerate launch recipes/sft_qwen2vl_jp.py --dataset you/stair-captions-ja --image_dir images --lora_r 16 \\
        --output_dir outputs/r16 --resume_from_checkpoint latest

One adapter for several languages and styles, and conversations about pictures beside captions (README.md beside this
file, "Several languages"):

    accelerate launch recipes/sft_qwen2vl_jp.py --config recipes/configs/sft_qwen2vl_jp/languages.yaml

An adapter can be trained further, on other captions for instance:

    accelerate launch recipes/sft_qwen2vl_jp.py --adapter you/name --dataset you/other-captions --learning_rate 2e-5 \\
        --output_dir outputs/further

The whole path in miniature, on a CPU, in minutes: `make demo`.

In `output_dir` it leaves checkpoints, `base/` and `adapter/` with predictions.jsonl and metrics.json each, the adapter
with its processor and model card in `adapter/`, and `samples.html`. `--push_to_hub --hub_model_id you/name` publishes
`adapter/` (private until you say otherwise).
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from vlmcap.arguments import run_main
from vlmcap.captioning.arguments import GenerationArguments, PromptArguments
from vlmcap.models.arguments import ModelArguments
from vlmcap.steps.arguments import EvaluationArguments
from vlmcap.training.arguments import CONTINUE, CaptionSFTFields, InstructionArguments, SplitArguments
from vlmcap.training.inherited import SFT_CONFIG, complete, parsed_as

BASE_CONFIG = Path(__file__).parent / "configs/sft_qwen2vl_jp/base.yaml"


@dataclass
class DataArguments(EvaluationArguments, InstructionArguments, SplitArguments):
    """What is trained and evaluated on, and how captions are scored and audited."""

    include_yj_images: bool = field(
        default=False,
        metadata={"help": "Train on images that YJ Captions describes too; YJ is then no held-out test."},
    )
    base_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which runs share the base's captions, found again by model, data, prompt and decoding;"
            " default output_dir/base, of this run alone."
        },
    )


# The trainer's settings that the model card prints.
REPORTED_SETTINGS = (
    "learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm optim num_train_epochs max_steps"
    " per_device_train_batch_size captions_per_image gradient_accumulation_steps world_size shared_prefix"
    " label_smoothing_factor gradient_checkpointing bf16 fp16 seed"
).split()


def main(
    data_args: DataArguments,
    model_args: ModelArguments,
    generation_args: GenerationArguments,
    prompt_args: PromptArguments,
    settings: CaptionSFTFields,
) -> None:
    generation_args = prompt_args.main(generation_args)

    # Slow imports, after the command line and the dataset were checked.
    from vlmcap.steps.early import adapter_folder, check_early

    check_early(settings, data_args, prompt_args)
    adapter_dir = adapter_folder(settings.output_dir, model_args.adapter, needs_start=False)

    from accelerate import PartialState

    from vlmcap.models.load import lora_config
    from vlmcap.steps.begin import begin
    from vlmcap.steps.prompted import find_base, plan_evaluation, plan_validation, read_for_audit
    from vlmcap.steps.save import save_trained
    from vlmcap.steps.splits import load_splits
    from vlmcap.training.prompts import training_rows
    from vlmcap.training.report import training_report
    from vlmcap.training.trainer import CaptionTrainer
    from vlmcap.training.trainer_arguments import CaptionSFTConfig

    training_args = complete(CaptionSFTConfig, settings)
    groups = {"data": asdict(data_args), "model": asdict(model_args), "generation": asdict(generation_args)}
    run = begin(training_args, REPORTED_SETTINGS, **groups, prompts=asdict(prompt_args))

    # Data: one row an image, and rows of what is trained on, where captions have prompts of their own.
    validates = training_args.eval_strategy != "no"
    splits = load_splits(data_args, run.output_dir, validates, run.seed, data_args.include_yj_images, prompt_args)
    read_for_audit(data_args, generation_args, splits.test)
    held_out = {data_args.test_split: splits.test}
    if validates:
        held_out[data_args.validation_split] = splits.validation
    rows = training_rows(splits.train, prompt_args, data_args, generation_args.prompt, run.seed, held_out)

    # Model: NF4 language model, LoRA on its top layers, the projector in full, the vision tower frozen.
    base = find_base(model_args, generation_args, prompt_args)
    model = base.load()

    # The base's captions, of another run perhaps, must be such that they can be taken or continued after training.
    evaluation = plan_evaluation(
        base, model, generation_args, prompt_args, data_args, splits, run.output_dir, shared_dir=data_args.base_dir
    )

    features_of = base.feature_cache(training_args.cache_image_features, model, splits.bad_images)
    features, validation = features_of(rows), None
    if features:
        rows, splits = features.rows, splits.trained_on(features.rows)
    if validates:
        validation = plan_validation(
            base, generation_args, prompt_args, data_args, splits.validation, features_of(splits.validation)
        )
    trainer = CaptionTrainer(
        model=model,
        args=training_args,
        rows=rows,
        processing_class=base.processor,
        prompt=generation_args.prompt,
        bad_images=splits.bad_images,
        peft_config=lora_config(model, model_args),
        features=features,
        validation=validation,
        adapter=base.start,
    )
    if PartialState().is_main_process:
        print(training_report(trainer, model_args.model_name_or_path, model_args.max_pixels, 64), flush=True)

    # Training
    trainer.train(resume_from_checkpoint=run.checkpoint)
    save_trained(
        trainer, adapter_dir, splits, run.config(base.args), Path(__file__).stem, generation_args, prompt_args
    )
    del trainer, model

    # Evaluation: the base and the adapter as saved on disk, on the same images with the same decoding; then scores,
    # audits, model card and a page of samples.
    evaluation.finish(run, Path(__file__).stem, adapter_dir, splits)


ARGUMENTS = (
    DataArguments,
    ModelArguments,
    GenerationArguments,
    PromptArguments,
    parsed_as(CaptionSFTFields, SFT_CONFIG),
)

if __name__ == "__main__":
    run_main(main, __doc__, *ARGUMENTS, config=BASE_CONFIG, interrupted=CONTINUE)
