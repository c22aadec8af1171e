"""What a run leaves of training: the weights, and beside them captioning.json and training.json."""

import json
import shutil
from pathlib import Path

from accelerate import PartialState
from transformers import Trainer

from vlmcap import provenance
from vlmcap.atomic_write import write_atomically
from vlmcap.captioning.arguments import BeamArguments, PromptArguments
from vlmcap.captioning.predictions import delete_predictions, weights_hash
from vlmcap.captioning.settings import settings_of, write_settings
from vlmcap.steps.arguments import NO_PROMPTS, reported_prompts, trained_prompts
from vlmcap.steps.splits import Splits
from vlmcap.training import checkpoints


def save_trained(
    trainer: Trainer,
    folder: Path,
    splits: Splits,
    config: dict,
    recipe: str,
    generation_args: BeamArguments,
    prompts: PromptArguments = NO_PROMPTS,
) -> None:
    """Saves what was trained and, beside it, captioning.json: how it captions, and training.json: what was trained on,
    with which settings, and the results.

    The files are written beside `folder` and renamed into it, training.json last: without it the folder is not
    whole. Captions that are there are deleted before different weights come.

    Args:
        trainer: a ResumableTrainer.
        config: the settings that the model card prints.
        recipe: its name, e.g. "sft_blip_vi".
        generation_args: how the trained model is asked for captions.
        prompts: of a model that is trained with several.

    Raises:
        CheckpointError: the disk is full; what was in `folder` is unchanged.
    """
    new = folder.with_name(f"{folder.name}.new")
    if PartialState().is_main_process:
        shutil.rmtree(new, ignore_errors=True)
    fix = "The checkpoints are whole: free space, then continue with --resume_from_checkpoint latest."
    with checkpoints.reported(str(folder), folder.parent, fix):
        try:
            trainer.save_model(str(new))
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
    if not PartialState().is_main_process:
        return
    training = {
        "config": config | reported_prompts(prompts),
        "dataset": splits.record,
        "images": len(splits.train),
        "captions": sum(map(len, splits.train["captions"])),
        "in_yj_images": sum(map(bool, splits.train["in_yj"])),
        "validation_split": splits.validation_split,
        "bad_images": splits.bad_images.count(),
        "empty_captions": splits.empty,
        "hardware": provenance.hardware(),
        "seed": trainer.args.seed,
    }
    text = json.dumps(training | trainer.summary(), ensure_ascii=False, indent=2)
    with checkpoints.reported(str(folder), folder.parent, fix):
        folder.mkdir(exist_ok=True)
        if weights_hash(folder) != weights_hash(new):
            for other in (folder, *folder.glob("languages/*")):
                delete_predictions(other / "predictions.jsonl")
        (folder / "training.json").unlink(missing_ok=True)
        name_special_tokens(new)
        model = trainer.accelerator.unwrap_model(trainer.model)
        write_settings(
            new, settings_of(recipe, model, trainer.processing_class, generation_args, trained_prompts(prompts))
        )
        for path in [path for path in new.rglob("*") if path.is_file()]:
            target = folder / path.relative_to(new)
            target.parent.mkdir(exist_ok=True)
            path.replace(target)
        shutil.rmtree(new)
        write_atomically(folder / "training.json", text)


def name_special_tokens(folder: Path) -> None:
    """Writes a saved tokenizer's list of further special tokens under the name that transformers 4 and 5 read.

    transformers 5 writes `extra_special_tokens`, for which 4.57 needs a mapping and fails; 5 reads the older name too.
    """
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
        write_atomically(path, json.dumps(settings, ensure_ascii=False, indent=2))
