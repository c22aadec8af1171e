"""Twelve scenes with captions, six pictures for tiny models, and trainers of the miniature with validation."""

from pathlib import Path

import datasets
import pytest

from tests.invariants import tiny
from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.data.images import load_captions
from vlmcap.miniature.scenes import scenes
from vlmcap.models.load import ModelArguments, load_model, load_processor, lora_config
from vlmcap.training.collator import BadImages
from vlmcap.training.features import cache_features
from vlmcap.training.trainer import CaptionTrainer
from vlmcap.training.trainer_arguments import CaptionSFTConfig
from vlmcap.training.validation import CaptionValidation

PROMPT = "Describe this image briefly."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of twelve scenes and their captions as a published dataset without images."""
    folder = tmp_path_factory.mktemp("scenes")
    rows = []
    for number, scene in enumerate(scenes(12, seed=3, held_out=False)):
        scene.draw().save(folder / f"{number}.png")
        rows.append({"image_id": number, "file_name": f"{number}.png", "captions": scene.japanese()[: 1 + number % 3]})
    datasets.Dataset.from_list(rows).to_parquet(folder / "data/train-00000-of-00001.parquet")
    return folder


@pytest.fixture
def rows(folder):
    return load_captions(str(folder / "data"), "train", image_dir=str(folder))


@pytest.fixture(scope="module")
def processor(miniature_dir):
    return load_processor(str(miniature_dir))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    tiny.write_pictures(folder)
    return tiny.read_pictures(folder)


@pytest.fixture(scope="session")
def validated(tmp_path_factory):
    """Eight scenes whose training captions are Japanese and whose validation captions are English."""
    folder = tmp_path_factory.mktemp("scenes")
    for split, texts in (("train", lambda s: s.japanese()), ("validation", lambda s: s.english())):
        rows = []
        for number, scene in enumerate(scenes(8, seed=len(split), held_out=False)):
            name = f"{split}{number}.png"
            scene.draw().save(folder / name)
            rows.append({"image_id": number + 100 * len(split), "file_name": name, "captions": texts(scene)})
        datasets.Dataset.from_list(rows).to_parquet(folder / f"data/{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def make(validated, miniature_dir):
    """make(output_dir, ...): a trainer of the miniature, which writes English and is trained to write Japanese."""

    def make(output_dir: Path, validate: bool = True, cached: bool = False, **changes) -> CaptionTrainer:
        settings = {
            "output_dir": str(output_dir),
            "max_steps": 8,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "seed": 5,
        }
        if validate:
            settings |= {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
        model = load_model(str(miniature_dir), load_in_4bit=False)
        processor = load_processor(str(miniature_dir))
        rows = load_captions(str(validated / "data"), "train", image_dir=str(validated))
        bad_images = BadImages(output_dir / "bad_images.jsonl", limit=0)

        def features(rows: datasets.Dataset):
            names = (str(miniature_dir), None)
            return cache_features(output_dir / "features", model, processor, rows, *names, bad_images)

        validation = None
        if validate:
            validation_rows = load_captions(str(validated / "data"), "validation", image_dir=str(validated))
            generation = GenerationArguments(prompt=PROMPT, num_beams=2, max_new_tokens=24, generation_batch_size=3)
            validation_features = features(validation_rows) if cached else None
            validation = CaptionValidation(validation_rows, processor, generation, features=validation_features)
        return CaptionTrainer(
            model=model,
            args=CaptionSFTConfig(**settings | changes),
            rows=rows,
            processing_class=processor,
            prompt=PROMPT,
            bad_images=bad_images,
            peft_config=lora_config(model, ModelArguments()),
            features=features(rows) if cached else None,
            validation=validation,
        )

    return make
