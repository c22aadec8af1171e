"""A few steps and captions of the miniature with each number of threads given; test_processors.py starts it."""

import json
import sys
from pathlib import Path

import torch

from tests.invariants import tiny
from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.captioning.generate import caption_with_prompt
from vlmcap.data.images import open_image
from vlmcap.evaluation.scoring import quick_scores
from vlmcap.models.load import ModelArguments, load_model, load_processor, lora_config
from vlmcap.training.collator import BadImages
from vlmcap.training.trainer import CaptionTrainer
from vlmcap.training.trainer_arguments import CaptionSFTConfig


def steps_and_captions(folder: Path) -> dict:
    """Losses of four steps of the miniature in NF4, and the captions and scores of a validation after them."""
    folder.mkdir(parents=True)
    tiny.write_pictures(folder)
    rows, processor = tiny.read_pictures(folder), load_processor(str(tiny.MINIATURE), max_pixels=7056)
    model = load_model(str(tiny.MINIATURE))
    settings = {"per_device_train_batch_size": 3, "max_steps": 4, "learning_rate": 2.5e-3, "logging_steps": 1}
    settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 5}
    trainer = CaptionTrainer(
        model=model,
        args=CaptionSFTConfig(output_dir=str(folder / "run"), gradient_checkpointing=False, **settings),
        rows=rows,
        processing_class=processor,
        prompt=tiny.PROMPT,
        bad_images=BadImages(folder / "bad_images.jsonl", limit=0),
        peft_config=lora_config(model, ModelArguments(model_name_or_path=str(tiny.MINIATURE))),
    )
    trainer.train()
    images = [open_image(row) for row in rows]
    beams = GenerationArguments(prompt=tiny.PROMPT, num_beams=3, max_new_tokens=20)
    captions = caption_with_prompt(trainer.model.eval(), processor, images, beams)
    ids = list(map(str, rows["image_id"]))
    return {
        "capability": torch.backends.cpu.get_cpu_capability(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "captions": captions,
        "scores": quick_scores(dict(zip(ids, captions, strict=True)), dict(zip(ids, rows["captions"], strict=True))),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for threads in map(int, sys.argv[2:]):
        torch.set_num_threads(threads)
        result = steps_and_captions(folder / f"run-{threads}")
        (folder / f"{threads}.json").write_text(json.dumps(result), encoding="utf-8")
