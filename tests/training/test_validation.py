"""Captions generated during training: they choose the checkpoint, stop the run, and leave the training as it is."""

import pytest
import torch
from safetensors.torch import load_file

from vlmcap.training.trainer_arguments import CaptionSFTConfig


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
