"""What is printed before a run."""

from types import SimpleNamespace

import psutil
import torch

from tests.training.runs import caption_trainer, config
from vlmcap.training.report import estimate_memory, training_report


def test_report_says_what_trains_and_how_much(miniature_dir, processor, rows, tmp_path):
    trainer = caption_trainer(miniature_dir, processor, rows, config(tmp_path, max_steps=-1, num_train_epochs=3))
    text = training_report(trainer, "a/b", max_pixels=7056, caption_tokens=16)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert f"{trained:,}  of " in text
    assert "language_model.layers.7.mlp.up_proj (LoRA)" in text and "visual.merger.mlp.0" in text
    assert "56 linear layers in NF4" in text
    assert "12 images, 24 captions an epoch; 8 images a step" in text and "6 steps in all" in text


def test_memory_that_the_loaded_model_holds_is_not_missing_for_it(
    miniature_dir, processor, rows, tmp_path, monkeypatch
):
    """The report is printed when the weights are in memory: what else a step needs must be free, and no more."""
    trainer = caption_trainer(miniature_dir, processor, rows, config(tmp_path))
    parts = estimate_memory(trainer.model, trainer.args, 9 + 40, 16, shared_prefix=True)
    free = sum(parts.values()) - parts["weights"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for available, fits in ((free, True), (free - 1, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda available=available: SimpleNamespace(available=available))
        text = training_report(trainer, "a/b", max_pixels=7056, caption_tokens=16)
        assert ("may not fit" not in text) == fits
