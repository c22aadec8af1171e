"""Adapt Qwen2-VL-2B-Instruct to Japanese image captioning with QLoRA, and measure the result beside the base model.

One GPU with 16 GB or more, settings of recipes/configs/sft_qwen2vl_jp/base.yaml:

    accelerate launch recipes/sft_qwen2vl_jp.py

A T4 (float16, smaller images):

    accelerate launch --config_file accelerate_configs/t4.yaml recipes/sft_qwen2vl_jp.py \\
        --config recipes/configs/sft_qwen2vl_jp/t4.yaml

Any key of the YAML can be set on the command line, and an interrupted run continues:

    accelerate launch recipes/sft_qwen2vl_jp.py --dataset you/stair-captions-ja --image_dir images --lora_r 16 \\
        --output_dir outputs/r16 --resume_from_checkpoint latest

The whole path in miniature, on a CPU, in minutes: `make demo`.

In `output_dir` it leaves checkpoints, `base/` and `adapter/` with predictions.jsonl and metrics.json each, the adapter
with its processor and model card in `adapter/`, and `samples.html`. `--push_to_hub --hub_model_id you/name` publishes
`adapter/` (private until you say otherwise).
"""

import gc
import hashlib
import json
import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from transformers.trainer_utils import get_last_checkpoint

from vlmcap import provenance
from vlmcap.arguments import parse
from vlmcap.data.images import (
    DatasetError,
    check_images,
    check_no_overlap,
    dataset_record,
    load_captions,
    open_image,
)
from vlmcap.evaluation.audit import AuditError, read_instances, write_audit
from vlmcap.evaluation.constraints import ConstraintError
from vlmcap.evaluation.generate import (
    GenerationArguments,
    PredictionsError,
    decoding_record,
    generate,
    image_size_record,
    model_record,
    weights_hash,
)
from vlmcap.evaluation.lexicon import Lexicon, LexiconError
from vlmcap.evaluation.scoring import ScoreError, read_predictions, write_metrics
from vlmcap.evaluation.tokenise import TokenizerError, tokenizer_signature
from vlmcap.models.load import ModelArguments, ModelError, load_adapter, load_model, load_processor, lora_config
from vlmcap.reporting.cards import is_miniature, score_rows, write_adapter_card
from vlmcap.reporting.gallery import write_sample_page
from vlmcap.reporting.hub import PushError, check_push_rights, push_adapter
from vlmcap.training.collator import BadImages, drop_missing
from vlmcap.training.features import cache_features
from vlmcap.training.report import settings_report, training_report
from vlmcap.training.trainer import CaptionSFTConfig, CaptionTrainer
from vlmcap.training.validation import CaptionValidation

BASE_CONFIG = Path(__file__).parent / "configs/sft_qwen2vl_jp/base.yaml"


@dataclass
class DataArguments:
    """What is trained and evaluated on."""

    dataset: str = field(
        metadata={
            "help": "Caption dataset made by scripts/publish_datasets.py: Hub id (you/stair-captions-ja) or folder."
        }
    )
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of the dataset on the Hub."})
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder of the photographs, for a dataset published without them."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(
        default="validation",
        metadata={"help": "Split whose captions rank the checkpoints, with eval_strategy: steps."},
    )
    test_split: str = field(default="test", metadata={"help": "Split on which base and adapter are scored."})
    include_yj_images: bool = field(
        default=False,
        metadata={"help": "Train on images that YJ Captions describes too; YJ is then no held-out test."},
    )
    max_train_images: int | None = field(default=None, metadata={"help": "Train on the first N images only."})
    max_validation_images: int = field(default=300, metadata={"help": "Validate on this many images, drawn by seed."})
    max_test_images: int | None = field(default=None, metadata={"help": "Score on the first N test images only."})
    max_bad_images: float = field(
        default=0.01, metadata={"help": "Share of training pictures that may be unreadable before the run stops."}
    )
    base_saw: str = field(
        default="unknown",
        metadata={
            "help": "Whether the base model saw STAIR, YJ Captions and COCO: unknown, no or train. Goes into the card."
        },
    )
    tokenizer: str = field(default="unidic-lite", metadata={"help": "Word segmentation for the metrics."})
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


def find_checkpoint(output_dir: Path, resume: str | None) -> str | None:
    """The checkpoint to continue from: a folder, or `latest` for the newest in output_dir."""
    latest = get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
    if resume is None and latest:
        raise SystemExit(
            f"error: {output_dir} holds {Path(latest).name} of an earlier run. Continue it with"
            " --resume_from_checkpoint latest, choose another --output_dir, or delete it."
        )
    if resume == "latest" and not latest:
        raise SystemExit(f"error: --resume_from_checkpoint latest, but {output_dir} holds no checkpoint")
    return latest if resume == "latest" else resume


def base_folder(output_dir: Path, base_dir: str | None, record: dict) -> Path:
    """Where the base's captions lie: `output_dir/base`, or a folder of `base_dir` named by a hash of `record`."""
    if base_dir is None:
        return output_dir / "base"
    text = json.dumps(record, sort_keys=True, ensure_ascii=False)
    return Path(base_dir) / hashlib.sha256(text.encode()).hexdigest()[:12]


def main(
    data_args: DataArguments,
    model_args: ModelArguments,
    generation_args: GenerationArguments,
    training_args: CaptionSFTConfig,
) -> None:
    output_dir = Path(training_args.output_dir)
    adapter_dir = output_dir / "adapter"
    is_main = PartialState().is_main_process
    # The trainer's own push would run in the background at every checkpoint, hiding failures, and without our card.
    push, training_args.push_to_hub = training_args.push_to_hub, False
    if push:
        check_push_rights(training_args.hub_model_id)
    checkpoint = find_checkpoint(output_dir, training_args.resume_from_checkpoint)

    everything = training_args.to_dict() | {"world_size": training_args.world_size}
    trainer_settings = {key: everything[key] for key in REPORTED_SETTINGS}
    if is_main:
        groups = {"data": asdict(data_args), "model": asdict(model_args), "generation": asdict(generation_args)}
        print(settings_report(**groups, training=trainer_settings), flush=True)

    # Data: one row an image. What cannot be read is found before hours are spent, what overlaps ends the run.
    train_set = dataset_record(data_args.dataset, data_args.train_split, data_args.dataset_revision)
    test_set = train_set | {"split": data_args.test_split}
    with PartialState().local_main_process_first():
        source = {"image_dir": data_args.image_dir, "revision": train_set["revision"]}
        train_rows = load_captions(data_args.dataset, data_args.train_split, **source)
        test_rows = load_captions(data_args.dataset, data_args.test_split, **source)
    check_no_overlap(train_rows, test_rows, data_args.test_split)
    if not data_args.include_yj_images:
        train_rows = train_rows.select([i for i, in_yj in enumerate(train_rows["in_yj"]) if not in_yj])
    train_rows = train_rows.select(range(min(data_args.max_train_images or len(train_rows), len(train_rows))))
    test_rows = test_rows.select(range(min(data_args.max_test_images or len(test_rows), len(test_rows))))
    bad_images = BadImages(output_dir / "bad_images.jsonl", int(data_args.max_bad_images * len(train_rows)))
    if is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        bad_images.path.unlink(missing_ok=True)
        check_images(test_rows, data_args.test_split)
    validation_rows = None
    if training_args.eval_strategy != "no":
        validation_rows = load_captions(data_args.dataset, data_args.validation_split, **source)
        check_no_overlap(train_rows, validation_rows, data_args.validation_split)
        validation_rows = validation_rows.shuffle(seed=training_args.seed)
        validation_rows = validation_rows.select(range(min(data_args.max_validation_images, len(validation_rows))))
        if is_main:
            check_images(validation_rows, data_args.validation_split)
    train_rows = drop_missing(train_rows, bad_images, write=is_main)

    # What scores and audit will read hours later is read now.
    tokenizer_signature(data_args.tokenizer)
    decoding_record(generation_args)
    things = Lexicon(data_args.lexicon)
    if data_args.instances:
        read_instances(data_args.instances, things, map(str, test_rows["image_id"]))

    # Model: NF4 language model, LoRA on its top layers, the projector in full, the vision tower frozen.
    names = (model_args.model_name_or_path, model_args.model_revision)
    processor = load_processor(*names, model_args.min_pixels, model_args.max_pixels)
    model = load_model(*names, model_args.load_in_4bit, model_args.attn_implementation)
    features = validation_features = validation = None
    if training_args.cache_image_features:
        cache = partial(cache_features, Path(training_args.cache_image_features), model, processor)
        features = cache(train_rows, *names, bad_images)
        train_rows = features.rows
        if validation_rows is not None:
            validation_features = cache(validation_rows, *names, bad_images)
    if validation_rows is not None:
        validation = CaptionValidation(
            validation_rows, processor, generation_args, data_args.tokenizer, validation_features
        )
    trainer = CaptionTrainer(
        model=model,
        args=training_args,
        rows=train_rows,
        processing_class=processor,
        prompt=generation_args.prompt,
        bad_images=bad_images,
        peft_config=lora_config(model, model_args),
        features=features,
        validation=validation,
    )
    if is_main:
        print(training_report(trainer, model_args.model_name_or_path, model_args.max_pixels, 64), flush=True)

    # Training
    trainer.train(resume_from_checkpoint=checkpoint)
    adapter_predictions = adapter_dir / "predictions.jsonl"
    before = weights_hash(adapter_dir)
    trainer.save_model(str(adapter_dir))
    if is_main:
        if weights_hash(adapter_dir) != before:
            adapter_predictions.unlink(missing_ok=True)  # of the adapter before this training
        (adapter_dir / "training_args.bin").unlink(missing_ok=True)  # a pickle; the card has the settings
        training = {
            "config": asdict(model_args) | trainer_settings | {"model_name_or_path": provenance.public_name(names[0])},
            "dataset": train_set,
            "images": len(train_rows),
            "captions": sum(map(len, train_rows["captions"])),
            "in_yj_images": sum(train_rows["in_yj"]),
            "bad_images": bad_images.count(),
            "hardware": provenance.hardware(),
            "seed": training_args.seed,
        }
        training |= trainer.summary()
        text = json.dumps(training, ensure_ascii=False, indent=2)
        (adapter_dir / "training.json").write_text(text, encoding="utf-8")

    del trainer, model
    gc.collect()
    torch.cuda.empty_cache()
    PartialState().wait_for_everyone()

    # Evaluation: the base and the adapter as they lie on disk, on the same images with the same decoding.
    model = load_model(*names, model_args.load_in_4bit, model_args.attn_implementation)
    saw = dict.fromkeys(("STAIR", "YJ", "COCO"), data_args.base_saw)
    saw["note"] = "As stated in the configuration (base_saw)."
    record = {"model": model_record(model, *names), "dataset": test_set, "saw": saw}
    asked = {"prompt": generation_args.prompt, "images": len(test_rows)}
    asked |= decoding_record(generation_args) | image_size_record(processor)
    base_dir = base_folder(output_dir, data_args.base_dir, record | asked)
    base_predictions = base_dir / "predictions.jsonl"
    generate(model, processor, test_rows, base_predictions, generation_args, record)

    model = load_adapter(model, str(adapter_dir))
    if train_set["corpus"] == "stair":
        yj = "train images" if any(train_rows["in_yj"]) else data_args.base_saw
        saw = {"STAIR": "train", "YJ": yj, "COCO": "train images"}
        saw["note"] = "Fine-tuned on the training split, photographs of COCO; else what the base model saw."
    record = {"model": model_record(model, *names, adapter=str(adapter_dir)), "dataset": test_set, "saw": saw}
    generate(model, processor, test_rows, adapter_predictions, generation_args, record)
    if not is_main:
        return

    # Scores, model card, a page of samples
    references = {str(i): captions for i, captions in zip(test_rows["image_id"], test_rows["captions"], strict=True)}
    base = write_metrics(base_predictions, references, base_dir / "metrics.json", data_args.tokenizer)
    del base["per_image"]  # as large as the rest together, and in the base's own file
    more = {"training": json.loads((adapter_dir / "training.json").read_text(encoding="utf-8")), "base": base}
    metrics = write_metrics(adapter_predictions, references, adapter_dir / "metrics.json", data_args.tokenizer, more)
    audit = partial(
        write_audit,
        references=references,
        lexicon=data_args.lexicon,
        instances=data_args.instances or [],
        count_tokens=lambda caption: len(processor.tokenizer(caption, add_special_tokens=False)["input_ids"]),
    )
    base_audit = audit(base_predictions, output=base_dir / "audit.json")
    trained_on = train_rows.remove_columns("image")  # scripts/audit_captions.py compares the pictures too
    audit(adapter_predictions, output=adapter_dir / "audit.json", train_rows=trained_on, base=base_audit)
    write_adapter_card(adapter_dir, training_args.hub_model_id)
    said = {"base": read_predictions(base_predictions), "adapter": read_predictions(adapter_predictions)}
    samples = [
        {"image": open_image(row), "image_id": row["image_id"], "references": row["captions"]}
        | {system: captions[str(row["image_id"])] for system, captions in said.items()}
        for row in test_rows.shuffle(seed=training_args.seed).select(range(min(24, len(test_rows))))
    ]
    note = f"{len(samples)} of {len(test_rows)} images of {data_args.test_split}, drawn at random."
    if is_miniature(metrics):
        note += " Drawn scenes and a miniature model: a demonstration, no evidence about Qwen2-VL."
    page = write_sample_page(output_dir / "samples.html", "Before and after", samples, score_rows(metrics), note)
    print()
    for name, *values in score_rows(metrics):
        print(f"{name:<12}" + "".join(f"{value:>18}" for value in values))
    print(f"\nAdapter and model card: {adapter_dir}\nSample captions:        {page}")
    if push:
        print(f"Pushed to {push_adapter(adapter_dir, training_args.hub_model_id)}")


ARGUMENTS = (DataArguments, ModelArguments, GenerationArguments, CaptionSFTConfig)

if __name__ == "__main__":
    command_line = sys.argv[1:] if "--config" in sys.argv else ["--config", str(BASE_CONFIG), *sys.argv[1:]]
    try:
        main(*parse(__doc__, *ARGUMENTS, command_line=command_line))
    except (
        AuditError,
        ConstraintError,
        DatasetError,
        LexiconError,
        ModelError,
        PredictionsError,
        PushError,
        ScoreError,
        TokenizerError,
    ) as error:
        sys.exit(f"error: {error}")
