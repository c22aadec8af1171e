"""Trainers of the miniature, for the tests of training."""

from pathlib import Path

from vlmcap.models.load import ModelArguments, load_model, lora_config
from vlmcap.training.collator import BadImages
from vlmcap.training.trainer import CaptionTrainer
from vlmcap.training.trainer_arguments import CaptionSFTConfig

PROMPT = "この画像を日本語で短く説明してください。"


def config(tmp_path, **changes):
    settings = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "gradient_checkpointing": False,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
    }
    return CaptionSFTConfig(**settings | changes)


def caption_trainer(miniature_dir, processor, rows, args, adapter=None, **changes):
    model = load_model(str(miniature_dir))
    arguments = ModelArguments(model_name_or_path=str(miniature_dir), lora_dropout=0.0, **changes)
    bad_images = BadImages(Path(args.output_dir) / "bad_images.jsonl", limit=2)
    return CaptionTrainer(
        model=model,
        args=args,
        rows=rows,
        processing_class=processor,
        prompt=PROMPT,
        bad_images=bad_images,
        peft_config=lora_config(model, arguments),
        adapter=adapter,
    )


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
