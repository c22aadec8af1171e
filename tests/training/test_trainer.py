"""Whole runs against the stock SFTTrainer, from an adapter, and with every setting that has an effect."""

import datasets
import pytest
import torch
from peft import get_peft_model
from PIL import Image
from trl import SFTConfig, SFTTrainer

from tests.invariants import tiny
from tests.training.runs import PROMPT, caption_trainer, config, weights
from vlmcap.models.load import ModelArguments, ModelError, load_model, lora_config, read_trained_adapter
from vlmcap.training.checkpoints import CheckpointError
from vlmcap.training.collator import caption_examples


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


EFFECTS = {
    "the order of examples": {"data_seed": 6},
    "the optimizer": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "the schedule": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 9e-4}},
    "the gradients": {"max_grad_norm": 1e-3},
}


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
