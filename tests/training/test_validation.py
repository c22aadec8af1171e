"""Captions generated during training: they choose the checkpoint, stop the run, and leave the training as it is."""

from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file

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
def make(folder, miniature_dir):
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
        rows = load_captions(str(folder / "data"), "train", image_dir=str(folder))
        bad_images = BadImages(output_dir / "bad_images.jsonl", limit=0)

        def features(rows: datasets.Dataset):
            names = (str(miniature_dir), None)
            return cache_features(output_dir / "features", model, processor, rows, *names, bad_images)

        validation = None
        if validate:
            validation_rows = load_captions(str(folder / "data"), "validation", image_dir=str(folder))
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


def test_the_best_captions_choose_the_checkpoint_and_stop_the_run(make, tmp_path):
    trainer = make(tmp_path, early_stopping_patience=2)
    trainer.train()
    summary = trainer.summary()
    curve = {entry["step"]: entry["eval_cider_d"] for entry in summary["log"] if "eval_cider_d" in entry}
    best = max(curve, key=curve.get)
    # The more Japanese it writes, the worse it does on English references: the best model is not the last.
    assert curve[best] > 2 * curve[max(curve)], curve
    assert max(curve) == best + 2 < 8, "stopped after two evaluations without a better one"
    assert summary["best"] == {"step": best, "metric": "cider_d", "score": curve[best]}
    assert summary["trainable_parameters"] > 0

    trainer.save_model(str(tmp_path / "adapter"))
    kept = load_file(tmp_path / "adapter/adapter_model.safetensors")
    chosen = load_file(tmp_path / f"checkpoint-{best}/adapter_model.safetensors")
    assert kept.keys() == chosen.keys()
    assert all(torch.equal(kept[name], chosen[name]) for name in kept)
    last = load_file(tmp_path / f"checkpoint-{max(curve)}/adapter_model.safetensors")
    assert not all(torch.equal(kept[name], last[name]) for name in kept)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_validation_leaves_the_training_as_it_is(make, tmp_path, checkpointing):
    settings = {"max_steps": 3, "gradient_checkpointing": checkpointing}
    plain = make(tmp_path / "plain", validate=False, **settings)
    plain.train()
    # Sets the seed of dropout again.
    watched = make(tmp_path / "watched", load_best_model_at_end=False, save_total_limit=1, **settings)
    watched.train()
    assert [path.name for path in (tmp_path / "watched").glob("checkpoint-*")] == ["checkpoint-3"], "the latest"
    losses = [[entry["loss"] for entry in t.summary()["log"] if "loss" in entry] for t in (plain, watched)]
    assert losses[0] == losses[1]
    assert watched.summary()["best"] is None
    parameters = dict(watched.model.named_parameters())
    for name, parameter in plain.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, parameters[name]), name


def test_cached_features_are_scored_as_pictures_are(make, tmp_path):
    live, cached = (make(tmp_path / name, cached=name == "cached", max_steps=1) for name in ("live", "cached"))
    scores = live.evaluate()
    assert scores["eval_cider_d"] > 1
    assert {k: v for k, v in cached.evaluate().items() if k != "eval_seconds"} == {
        k: v for k, v in scores.items() if k != "eval_seconds"
    }


def test_the_last_model_is_scored_too(make, tmp_path):
    trainer = make(tmp_path, max_steps=3, eval_steps=2, save_steps=2)
    trainer.train()
    assert [entry["step"] for entry in trainer.summary()["log"] if "eval_cider_d" in entry] == [2, 3]


def test_ranking_without_evaluations_is_refused():
    with pytest.raises(ValueError, match="set eval_strategy: steps and eval_steps.*switch them off"):
        CaptionSFTConfig(use_cpu=True, early_stopping_patience=3)
    with pytest.raises(ValueError, match="needs load_best_model_at_end"):
        CaptionSFTConfig(use_cpu=True, early_stopping_patience=3, eval_strategy="steps", eval_steps=5)
