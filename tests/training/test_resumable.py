"""Runs that resume, and which refuse to; what they leave; evaluation of other datasets."""

import signal
from threading import Thread

import pytest
import torch

from tests.invariants import tiny
from tests.training.runs import caption_trainer, config, weights
from vlmcap.arguments import run_main
from vlmcap.data.images import load_captions
from vlmcap.errors import UserError
from vlmcap.models.load import load_processor
from vlmcap.training.arguments import CaptionSFTFields
from vlmcap.training.checkpoints import CheckpointError
from vlmcap.training.inherited import SFT_CONFIG, parsed_as


def test_resumed_run_ends_where_an_uninterrupted_one_does(miniature_dir, processor, rows, tmp_path):
    whole = caption_trainer(miniature_dir, processor, rows, config(tmp_path / "whole", max_steps=4))
    whole.train()
    half = caption_trainer(miniature_dir, processor, rows, config(tmp_path / "half", max_steps=4, save_steps=3))
    half.train()
    continued = caption_trainer(miniature_dir, processor, rows, config(tmp_path / "half", max_steps=4))
    continued.train(resume_from_checkpoint=str(tmp_path / "half/checkpoint-3"))  # inside the second epoch
    assert continued.state.global_step == 4
    expected = weights(whole)
    for name, value in weights(continued).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 6}, r"seed 6 \(was 5\)"),
        ({"data_seed": 1}, r"data_seed 1 \(was None\)"),
        ({"per_device_train_batch_size": 2}, r"per_device_train_batch_size 2 \(was 4\)"),
        ({"gradient_accumulation_steps": 1}, r"gradient_accumulation_steps 1 \(was 2\)"),
        ({"captions_per_image": 2}, r"captions_per_image 2 \(was 5\), training captions \w+ \(was"),
        ({}, r"training captions \w+ \(was"),
        ({"lora_r": 4}, r"trained weights \w+ \(was"),
    ],
    ids=lambda value: next(iter(value), "rows") if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_run_is_refused(
    miniature_dir, processor, rows, tmp_path_factory, checkpoint, changes, named
):
    changes = dict(changes)
    model = {key: changes.pop(key) for key in ("lora_r",) if key in changes}
    other = rows if changes or model else rows.select(range(11))
    folder = tmp_path_factory.mktemp("other")
    trainer = caption_trainer(miniature_dir, processor, other, config(folder, **changes), **model)
    with pytest.raises(CheckpointError, match=f"belongs to a run with other settings or data: {named}"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_other_image_sizes_make_other_batches(miniature_dir, rows, tmp_path, checkpoint):
    smaller = load_processor(str(miniature_dir), min_pixels=28 * 28, max_pixels=2 * 28 * 28)
    # Of a batch of one picture they are not looked at: then they say nothing of min_pixels and max_pixels.
    single = caption_trainer(miniature_dir, smaller, rows, config(tmp_path, per_device_train_batch_size=1))
    with pytest.raises(CheckpointError, match=r"data: per_device_train_batch_size 1 \(was 4\)\.[^(]*$"):
        single.train(resume_from_checkpoint=str(checkpoint))
    trainer = caption_trainer(miniature_dir, smaller, rows, config(tmp_path))
    with pytest.raises(CheckpointError, match=r"image sizes \w+ \(was \w+\)\..*min_pixels and max_pixels"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


@pytest.fixture(scope="module")
def checkpoint(miniature_dir, processor, folder, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("run")
    rows = load_captions(str(folder / "data"), "train", image_dir=str(folder))
    caption_trainer(miniature_dir, processor, rows, config(output_dir, max_steps=1)).train()
    return output_dir / "checkpoint-1"


def test_changed_settings_that_are_no_other_run_are_said(miniature_dir, processor, rows, tmp_path, checkpoint, capsys):
    args = config(tmp_path, max_steps=2, learning_rate=5e-4)
    trainer = caption_trainer(miniature_dir, processor, rows, args)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert "settings were changed: max_steps 2 (was 1), learning_rate 0.0005 (was 0.001)" in capsys.readouterr().out
    assert trainer.state.global_step == 2


def test_training_from_a_thread(pictures, tmp_path, capfd):
    """As a notebook's cell or a web page starts it: a recipe's command line, no signals, and a line that says so."""
    trainers = []

    def main(settings) -> None:
        trainers.append(tiny.build_trainer(tmp_path, pictures, max_steps=settings.max_steps))
        trainers[0].train()

    command = ["--output_dir", str(tmp_path), "--max_steps", "2"]
    arguments = (main, "Trains.", parsed_as(CaptionSFTFields, SFT_CONFIG))
    thread = Thread(target=run_main, args=arguments, kwargs={"command_line": command})
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    thread.start()
    thread.join()
    assert trainers[0].state.global_step == 2
    assert "Training in a thread: SIGTERM and Ctrl-C save no checkpoint" in capfd.readouterr().err
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_checkpoints_carry_no_generic_model_card_and_no_pickled_arguments(miniature_dir, processor, rows, tmp_path):
    trainer = caption_trainer(miniature_dir, processor, rows, config(tmp_path, save_steps=2))
    (tmp_path / "README.md").write_text("our card")
    trainer.train()
    assert not list(tmp_path.rglob("training_args.bin"))
    assert (tmp_path / "checkpoint-2/adapter_model.safetensors").exists()
    assert (tmp_path / "README.md").read_text() == "our card"


def test_another_dataset_is_refused(pictures, tmp_path):
    """It would have been scored by the captions of the validation rows, or by pictures that were trained on."""
    trainer = tiny.build_trainer(tmp_path, pictures)
    for call in (trainer.evaluate, lambda: trainer.evaluate(pictures), lambda: trainer.evaluate({"other": pictures})):
        with pytest.raises(UserError, match=r"validation rows that the trainer was built with, .* build a trainer"):
            call()
    with pytest.raises(UserError, match=r"predict\(\) is not supported, .*vlmcap.captioning.generate"):
        trainer.predict(pictures)
