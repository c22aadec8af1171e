"""Whole runs against the stock SFTTrainer, unreadable pictures, resumed runs, the start-up report."""

import json
import shutil
import signal
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import datasets
import psutil
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from trl import SFTConfig, SFTTrainer

from tests.invariants import tiny
from vlmcap.arguments import run_main
from vlmcap.data.errors import DataError
from vlmcap.data.images import load_captions
from vlmcap.miniature.scenes import scenes
from vlmcap.models.load import (
    ModelArguments,
    ModelError,
    chat_prompt,
    load_model,
    load_processor,
    lora_config,
    read_trained_adapter,
)
from vlmcap.training.arguments import CaptionSFTFields
from vlmcap.training.checkpoints import CheckpointError
from vlmcap.training.collator import BadImages, CaptionCollator, caption_examples, drop_missing
from vlmcap.training.inherited import SFT_CONFIG, parsed_as
from vlmcap.training.report import estimate_memory, training_report
from vlmcap.training.trainer import CaptionSFTConfig, CaptionTrainer

PROMPT = "この画像を日本語で短く説明してください。"


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


def test_training_starts_from_an_adapter(miniature_dir, processor, rows, tmp_path):
    """Every weight to the last bit, under NF4 too; a checkpoint of that run is refused by a run from another start."""
    first = caption_trainer(miniature_dir, processor, rows, config(tmp_path / "first", max_steps=1))
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    asked = ModelArguments(str(miniature_dir), adapter=str(tmp_path / "adapter"))
    second = caption_trainer(
        miniature_dir, processor, rows, config(tmp_path / "second"), read_trained_adapter(asked), lora_alpha=32
    )
    before = weights(first)
    assert weights(second).keys() == before.keys() and any("merger" in name for name in before)
    assert all(torch.equal(value, before[name]) for name, value in weights(second).items())
    assert all(value.dtype == torch.float32 for value in weights(second).values())
    second.train()
    assert [name for name, value in weights(second).items() if torch.equal(value, before[name])] == []
    with pytest.raises(CheckpointError, match="adapter None [(]was sha256:"):
        caption_trainer(miniature_dir, processor, rows, config(tmp_path / "second")).train(
            str(tmp_path / "second/checkpoint-2")
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_r": 8, "lora_alpha": 4}, "this run's lora_r 8, lora_alpha 4: set --lora_r 32 --lora_alpha 32$"),
        ({"lora_top_layers": 2, "train_projector": False}, "set --lora_top_layers 6 --train_projector true$"),
        ({"lora_target_modules": ["q_proj", "v_proj"]}, "set --lora_target_modules down_proj gate_proj k_proj"),
    ],
)
def test_settings_other_than_the_adapters_are_named(miniature_dir, tmp_path, change, message):
    model = load_model(str(miniature_dir), load_in_4bit=False)
    get_peft_model(model, lora_config(model, ModelArguments(str(miniature_dir)))).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        read_trained_adapter(ModelArguments(str(miniature_dir), adapter=str(tmp_path), **change))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_same_training_as_the_stock_trainer(miniature_dir, processor, rows, tmp_path, checkpointing):
    """Two optimizer steps of two accumulated batches end at the same weights as with TRL's own SFTTrainer.

    NF4, one caption a step and in the same order (the stock trainer cannot take several captions of an image as one
    example; tests/invariants compares those, a step at a time). Adam's epsilon is large: at its default the first
    steps depend on the signs of gradients, of rounding errors too.
    """
    settings = {"gradient_checkpointing": checkpointing, "captions_per_image": 1, "adam_epsilon": 1e-3}
    ours = caption_trainer(miniature_dir, processor, rows, config(tmp_path / "ours", **settings))
    examples = caption_examples(rows, 1)
    stock_rows = [
        {
            "images": [Image.open(rows[e["row"]]["image"]["path"]).convert("RGB")],
            "prompt": [{"role": "user", "content": PROMPT}],
            "completion": [{"role": "assistant", "content": e["captions"][0]}],
        }
        for e in examples
    ]
    model = load_model(str(miniature_dir))
    args = {key: getattr(ours.args, key) for key in SFTConfig.__dataclass_fields__ if key != "dataset_kwargs"}
    args |= {"output_dir": str(tmp_path / "stock"), "fp16": False, "bf16": False}
    stock = SFTTrainer(
        model=model,
        args=SFTConfig(**args),
        train_dataset=datasets.Dataset.from_list(stock_rows),
        processing_class=processor,
        peft_config=lora_config(model, ModelArguments(model_name_or_path=str(miniature_dir), lora_dropout=0.0)),
    )
    stock._get_train_sampler = ours._get_train_sampler
    for parameter in stock.model.parameters():  # from TRL's bfloat16, so that both start from the same float32 weights
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    start = weights(ours)
    stock_parameters = dict(stock.model.named_parameters())
    for name, value in start.items():
        stock_parameters[name].data.copy_(value)
    ours.train()
    stock.train()
    losses = [[log["loss"] for log in t.state.log_history if "loss" in log] for t in (ours, stock)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    after = weights(stock)
    for name, value in weights(ours).items():
        moved = (value - start[name]).norm()
        assert moved > 0, f"{name} did not train"
        assert (value - after[name]).norm() < 1e-3 * moved, name


def test_trainables_are_float32(miniature_dir, processor, rows, tmp_path):
    trainer = caption_trainer(miniature_dir, processor, rows, config(tmp_path))
    assert {value.dtype for value in weights(trainer).values()} == {torch.float32}


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


EFFECTS = {
    "the order of examples": {"data_seed": 6},
    "the optimizer": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "the schedule": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 9e-4}},
    "the gradients": {"max_grad_norm": 1e-3},
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    tiny.write_pictures(folder)
    return tiny.read_pictures(folder)


def test_settings_that_the_table_says_are_obeyed_have_an_effect(pictures, tmp_path):
    """Those of which it is least plain (vlmcap/training/inherited.yaml): each ends at other weights, or says so."""

    def trained(**settings):
        settings = {"max_steps": 3, "per_device_train_batch_size": 3, "max_grad_norm": 0.1, **settings}
        trainer = tiny.build_trainer(tmp_path, pictures, learning_rate=1e-3, **settings)
        trainer.train()
        return trainer

    def same(a, b) -> bool:
        ours, theirs = weights(a), weights(b)
        return all(ours[name].equal(theirs[name]) for name in ours)

    plain = trained()
    assert same(plain, trained())
    for what, settings in EFFECTS.items():
        without = trained(optim="sgd") if "optim" in settings else plain
        assert not same(without, trained(**settings)), what
    assert not plain.model.is_activation_checkpointing
    saving = {"save_strategy": "steps", "save_steps": 3, "save_only_model": True}
    other = trained(activation_checkpointing=True, logging_steps=2, logging_first_step=True, **saving)
    assert other.model.is_activation_checkpointing
    assert [entry["step"] for entry in other.state.log_history if "loss" in entry] == [1, 2, 3]
    assert (tmp_path / "run/checkpoint-3/adapter_model.safetensors").exists()
    assert not list((tmp_path / "run").rglob("optimizer.pt"))


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


def test_unreadable_picture_is_replaced_listed_and_counted(folder, processor, tmp_path):
    copy = tmp_path / "images"
    copy.mkdir()
    for number in range(12):
        (copy / f"{number}.png").write_bytes((folder / f"{number}.png").read_bytes())
    (copy / "4.png").write_bytes((folder / "4.png").read_bytes()[:400])
    rows = load_captions(str(folder / "data"), "train", image_dir=str(copy))
    bad_images = BadImages(tmp_path / "bad.jsonl", limit=1)
    collate = CaptionCollator(rows, processor, PROMPT, bad_images)
    batch = collate([{"row": 4, "captions": ["これは学習されない"]}])
    neighbour = CaptionCollator(rows, processor, PROMPT, bad_images)([{"row": 5, "captions": rows[5]["captions"][:1]}])
    assert torch.equal(batch["pixel_values"], neighbour["pixel_values"])
    assert torch.equal(batch["input_ids"], neighbour["input_ids"])
    collate([{"row": 4, "captions": [""]}])
    assert bad_images.count() == 1
    entry = json.loads(bad_images.path.read_text().splitlines()[0])
    assert (entry["image_id"], entry["file_name"]) == (4, "4.png") and "truncated" in entry["reason"]
    (copy / "6.png").unlink()
    with pytest.raises(DataError, match="2 training pictures cannot be read, more than the 1 .* 6.png: no such file"):
        collate([{"row": 6, "captions": [""]}])


def test_a_strip_is_a_bad_picture_in_live_training_too(folder, processor, tmp_path):
    """The image processor refuses sides that differ more than 200 times; the feature cache leaves them out."""
    copy = tmp_path / "images"
    shutil.copytree(folder, copy)
    Image.new("RGB", (1000, 3)).save(copy / "4.png")
    rows = load_captions(str(folder / "data"), "train", image_dir=str(copy))
    bad_images = BadImages(tmp_path / "bad.jsonl", limit=1)
    batch = CaptionCollator(rows, processor, PROMPT, bad_images)([{"row": 4, "captions": ["犬"]}])
    assert len(batch["input_ids"]) == 1 and bad_images.count() == 1


def test_missing_files_are_dropped_and_listed_before_training(folder, tmp_path):
    copy = tmp_path / "images"
    copy.mkdir()
    for number in range(1, 12):
        (copy / f"{number}.png").write_bytes((folder / f"{number}.png").read_bytes())
    rows = load_captions(str(folder / "data"), "train", image_dir=str(copy))
    bad_images = BadImages(tmp_path / "bad.jsonl", limit=1)
    assert drop_missing(rows, bad_images)["image_id"][:] == list(range(1, 12))
    assert bad_images.count() == 1


def test_dataset_without_images_names_the_mend(folder):
    with pytest.raises(DataError, match=r"holds captions but no images.*fetch_images.py.*--image_dir"):
        load_captions(str(folder / "data"), "train")


def test_loss_covers_the_caption_alone(rows, processor, tmp_path):
    collate = CaptionCollator(rows, processor, PROMPT, BadImages(tmp_path / "bad.jsonl", 0))
    batch = collate([{"row": 0, "captions": ["赤い丸がある", "青い四角が左にある"]}])
    trained = [
        processor.decode(ids[labels != -100]) for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
    ]
    assert trained == ["赤い丸がある<|im_end|>\n", "青い四角が左にある<|im_end|>\n"]


def assert_same_prompt(rows, processor, folder):
    """Token for token: what training puts in front of the caption is what generation starts from."""
    collate = CaptionCollator(rows, processor, PROMPT, BadImages(folder / "bad.jsonl", 0))
    batch = collate([{"row": 0, "captions": ["犬"]}])
    trained = batch["input_ids"][0][batch["labels"][0] == -100]
    image = Image.open(rows[0]["image"]["path"]).convert("RGB")
    inputs = processor(images=[[image]], text=[chat_prompt(processor, PROMPT)], return_tensors="pt")
    assert torch.equal(trained, inputs["input_ids"][0])


def test_trained_and_generated_from_the_same_prompt(rows, processor, tmp_path):
    assert_same_prompt(rows, processor, tmp_path)


def test_trained_and_generated_from_the_same_prompt_with_the_real_template(rows, qwen2vl_dir, tmp_path):
    assert_same_prompt(rows, load_processor(str(qwen2vl_dir)), tmp_path)


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
    """The report is printed when the weights lie in memory: what else a step needs must be free, and no more."""
    trainer = caption_trainer(miniature_dir, processor, rows, config(tmp_path))
    parts = estimate_memory(trainer.model, trainer.args, 9 + 40, 16, shared_prefix=True)
    free = sum(parts.values()) - parts["weights"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for available, fits in ((free, True), (free - 1, False)):
        monkeypatch.setattr(psutil, "virtual_memory", lambda available=available: SimpleNamespace(available=available))
        text = training_report(trainer, "a/b", max_pixels=7056, caption_tokens=16)
        assert ("may not fit" not in text) == fits
