"""Adapt Qwen2-VL-2B-Instruct to Japanese image captioning with QLoRA, and measure the result beside the base model.

One GPU with 16 GB or more, settings of recipes/configs/sft_qwen2vl_jp/base.yaml:

    accelerate launch recipes/sft_qwen2vl_jp.py

A T4 (float16, smaller images):

    accelerate launch --config_file accelerate_configs/t4.yaml recipes/sft_qwen2vl_jp.py \\
        --config recipes/configs/sft_qwen2vl_jp/t4.yaml

Any key of the YAML can be set on the command line, and an interrupted run continues:

    accelerate launch recipes/sft_qwen2vl_jp.py --dataset you/stair-captions-ja --image_dir images --lora_r 16 \\
        --output_dir outputs/r16 --resume_from_checkpoint latest

An adapter can be trained further, on other captions for instance:

    accelerate launch recipes/sft_qwen2vl_jp.py --adapter you/name --dataset you/other-captions --learning_rate 2e-5 \\
        --output_dir outputs/further

The whole path in miniature, on a CPU, in minutes: `make demo`.

In `output_dir` it leaves checkpoints, `base/` and `adapter/` with predictions.jsonl and metrics.json each, the adapter
with its processor and model card in `adapter/`, and `samples.html`. `--push_to_hub --hub_model_id you/name` publishes
`adapter/` (private until you say otherwise).
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

from vlmcap.arguments import run_main
from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.errors import UserError
from vlmcap.models.arguments import ModelArguments
from vlmcap.training.arguments import CONTINUE, CaptionSFTFields, SplitArguments
from vlmcap.training.inherited import SFT_CONFIG, complete, parsed_as

BASE_CONFIG = Path(__file__).parent / "configs/sft_qwen2vl_jp/base.yaml"


@dataclass
class DataArguments(SplitArguments):
    """What is trained and evaluated on, and how captions are scored and audited."""

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
        default="coco_ja", metadata={"help": "Things the audit looks for in captions: coco_ja or a YAML file."}
    )
    instances: list[str] | None = field(
        default=None,
        metadata={
            "help": "COCO's instances_*.json of the test images, for the audit; without them the references alone say"
            " what is in an image."
        },
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


def base_folder(output_dir: Path, base_dir: str | None, record: dict) -> Path:
    """Where the base's captions are: `output_dir/base`, or a folder of `base_dir` named by a hash of `record`."""
    if base_dir is None:
        return output_dir / "base"
    text = json.dumps(record, sort_keys=True, ensure_ascii=False)
    return Path(base_dir) / hashlib.sha256(text.encode()).hexdigest()[:12]


def main(
    data_args: DataArguments,
    model_args: ModelArguments,
    generation_args: GenerationArguments,
    settings: CaptionSFTFields,
) -> None:
    # Slow imports, after the command line and the dataset were checked.
    from vlmcap.steps.early import check_early

    check_early(settings, data_args)
    adapter_dir = Path(settings.output_dir) / "adapter"
    if model_args.adapter and Path(model_args.adapter).resolve() == adapter_dir.resolve():
        raise UserError(
            f"--adapter {model_args.adapter} would be overwritten by this run: choose another --output_dir"
        )

    from accelerate import PartialState

    from vlmcap.captioning.generate import check_predictions, decoding_record, image_size_record
    from vlmcap.captioning.predictions import model_record
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
    from vlmcap.steps.begin import begin
    from vlmcap.steps.finish import finish, saw_records
    from vlmcap.steps.save import save_trained
    from vlmcap.steps.splits import load_splits
    from vlmcap.training.features import cache_features
    from vlmcap.training.report import training_report
    from vlmcap.training.trainer import CaptionTrainer
    from vlmcap.training.trainer_arguments import CaptionSFTConfig
    from vlmcap.training.validation import CaptionValidation

    training_args = complete(CaptionSFTConfig, settings)
    is_main = PartialState().is_main_process
    groups = {"data": asdict(data_args), "model": asdict(model_args), "generation": asdict(generation_args)}
    run = begin(training_args, REPORTED_SETTINGS, **groups)

    # Data: one row an image.
    validates = training_args.eval_strategy != "no"
    splits = load_splits(data_args, run.output_dir, validates, run.seed, data_args.include_yj_images)

    # What scores and audit will read hours later is read now.
    decoding_record(generation_args)
    things = Lexicon(data_args.lexicon)
    if data_args.instances:
        read_instances(data_args.instances, things, map(str, splits.test["image_id"]))

    # Model: NF4 language model, LoRA on its top layers, the projector in full, the vision tower frozen.
    name, revision = model_args.model_name_or_path, model_args.model_revision
    model_args = replace(model_args, model_revision=resolve_revision(name, revision))
    names = (name, model_args.model_revision)
    processor = load_processor(*names, model_args.min_pixels, model_args.max_pixels)
    chat_prompt(processor, generation_args.prompt)  # refuses one that would end the turn
    further = None
    if model_args.adapter:
        further = read_trained_adapter(model_args)
        model_args = replace(model_args, adapter_revision=further.revision)
    model = load_model(*names, model_args.load_in_4bit, model_args.attn_implementation)

    # The base's captions, of another run perhaps, must be such that they can be taken or continued after training.
    saw, trained_saw = saw_records(dict.fromkeys(SEEN_CORPORA, data_args.base_saw), splits)
    base_record = {"model": model_record(model, *names), "dataset": splits.test_record, "saw": saw}
    asked = {"prompt": generation_args.prompt, "images": len(splits.test)}
    asked |= decoding_record(generation_args) | image_size_record(processor)
    base_dir = base_folder(run.output_dir, data_args.base_dir, base_record | asked)
    check_predictions(processor, base_dir / "predictions.jsonl", generation_args, base_record)

    features = validation_features = validation = None
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
    trainer = CaptionTrainer(
        model=model,
        args=training_args,
        rows=splits.train,
        processing_class=processor,
        prompt=generation_args.prompt,
        bad_images=splits.bad_images,
        peft_config=lora_config(model, model_args),
        features=features,
        validation=validation,
        adapter=further,
    )
    if is_main:
        print(training_report(trainer, model_args.model_name_or_path, model_args.max_pixels, 64), flush=True)

    # Training
    trainer.train(resume_from_checkpoint=run.checkpoint)
    save_trained(trainer, adapter_dir, splits, run.config(model_args), Path(__file__).stem, generation_args)
    del trainer, model

    # Evaluation: the base and the adapter as saved on disk, on the same images with the same decoding; then scores,
    # audits, model card and a page of samples.
    if further:
        started = f"Training started from the adapter {public_name(further.name)}; what that saw is not listed."
        trained_saw["note"] += f" {started}"

    def load_base():
        return load_model(*names, model_args.load_in_4bit, model_args.attn_implementation), processor

    def audit():
        audited = partial(
            write_audit,
            references=references_of(splits.test),
            lexicon=data_args.lexicon,
            instances=data_args.instances or [],
            count_tokens=lambda caption: len(processor.tokenizer(caption, add_special_tokens=False)["input_ids"]),
        )
        base = audited(base_dir / "predictions.jsonl", output=base_dir / "audit.json")
        trained_on = splits.train.remove_columns("image")  # scripts/audit_captions.py compares the pictures too
        adapter = {"output": adapter_dir / "audit.json", "train_rows": trained_on, "base": base}
        audited(adapter_dir / "predictions.jsonl", **adapter)

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
        load_trained=lambda: (load_adapter(load_base()[0], str(adapter_dir)), processor),
        tokenizer=data_args.tokenizer,
        audit=audit,
    )


ARGUMENTS = (DataArguments, ModelArguments, GenerationArguments, parsed_as(CaptionSFTFields, SFT_CONFIG))

if __name__ == "__main__":
    run_main(main, __doc__, *ARGUMENTS, config=BASE_CONFIG, interrupted=CONTINUE)
