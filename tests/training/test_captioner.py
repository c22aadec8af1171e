"""CaptionerTrainer on the miniatures of ViT and GPT-2: batches, loss, validation, checkpoints that are really read."""

import math
import re
from dataclasses import replace

import datasets
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

from vlmcap.captioning.arguments import BeamArguments
from vlmcap.data.errors import DataError
from vlmcap.errors import UserError
from vlmcap.markdown import prose
from vlmcap.miniature.scenes import scenes
from vlmcap.models.blip import load_blip
from vlmcap.models.vit_gpt2 import VitGpt2Arguments, build_vit_gpt2, freeze, load_vit_gpt2, parameter_groups
from vlmcap.models.vit_llama import VitLlamaArguments, build_vit_llama
from vlmcap.steps.splits import Splits
from vlmcap.training.captioner import CaptionerTrainer, PictureCollator, check_caption_lengths
from vlmcap.training.collator import BadImages
from vlmcap.training.trainer_arguments import CaptionerTrainingArguments

NAMES = ("decoder_input_ids", "decoder_attention_mask")


@pytest.fixture(scope="module")
def arguments(repo_root):
    folder = repo_root / "recipes/miniatures"
    return VitGpt2Arguments(str(folder / "vit"), None, str(folder / "gpt2"))


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")

    def rows(count: int, seed: int, first: int) -> datasets.Dataset:
        rows = []
        for number, scene in enumerate(scenes(count, seed, held_out=False), start=first):
            path = folder / f"{number}.png"
            scene.draw().save(path)
            image = {"bytes": None, "path": str(path)}
            rows.append({"image": image, "image_id": number, "file_name": path.name, "captions": [scene.title()]})
        return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image(decode=False))

    bad_images = BadImages(folder / "bad_images.jsonl", 0)
    return Splits(rows(24, 0, 1), rows(5, 1, 100), rows(2, 2, 200), {}, {}, "validation", bad_images)


def rows_of(splits):
    return splits.train, splits.validation, splits.bad_images


def build(arguments, splits, output_dir, **more):
    model, processor = build_vit_gpt2(arguments, seed=0)
    freeze(model, arguments)
    settings = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "eval_strategy": "steps", "logging_steps": 1}
    settings |= {"per_device_train_batch_size": 6, "load_best_model_at_end": True, "learning_rate": 1e-3}
    args = CaptionerTrainingArguments(str(output_dir), **(settings | {"report_to": [], "disable_tqdm": True} | more))
    groups = parameter_groups(model, 1e-3, 2e-3, 0.01)
    beams = BeamArguments(num_beams=1, max_new_tokens=16)
    return CaptionerTrainer(
        model,
        args,
        *rows_of(splits),
        processor,
        NAMES,
        beams,
        "english",
        groups,
        lambda folder: load_vit_gpt2(folder)[0],
    )


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)


def test_batches_tell_padding_by_length(arguments, splits):
    _, processor = build_vit_gpt2(arguments, seed=0)
    batch = PictureCollator(splits.train, processor, NAMES, splits.bad_images).texts(["Red Star", "Blue Star over"])
    tokenizer = processor.tokenizer
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    short, long = (tokenizer(text)["input_ids"] for text in ("Red Star", "Blue Star over"))
    rest = len(long) - len(short)
    assert rest > 0 and bos == eos == tokenizer.pad_token_id
    assert batch[NAMES[0]].tolist() == [[bos, *short, *[eos] * rest], [bos, *long]]
    assert batch["labels"].tolist() == [[*short, eos, *[-100] * rest], [*long, eos]]
    assert batch[NAMES[1]].sum(1).tolist() == [len(short) + 1, len(long) + 1]


def test_loss_is_the_smoothed_one_and_validation_loss_the_plain_one(arguments, splits, tmp_path):
    trainer = build(arguments, splits, tmp_path, label_smoothing_factor=0.2)
    model = trainer.model.eval()
    batch = trainer.validation_collator([{"row": i, "captions": splits.validation[i]["captions"]} for i in range(5)])
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.flatten(0, 1)
        loss = trainer.compute_loss(model, dict(batch))
    labels = batch["labels"].flatten()
    kept = labels != -100
    assert loss.item() == pytest.approx(
        F.cross_entropy(logits[kept], labels[kept], label_smoothing=0.2).item(), abs=1e-5
    )
    plain = F.cross_entropy(logits[kept], labels[kept]).item()
    scores = trainer.validate(model)
    assert scores["loss"] == pytest.approx(plain, abs=1e-5)
    assert scores["loss_and_bleu"] == pytest.approx((scores["bleu_2"] + math.exp(-plain)) / 2, abs=1e-5)


@pytest.mark.parametrize("model", ["blip", "vit_gpt2", "vit_llama"])
def test_the_logged_loss_is_the_mean_over_all_caption_tokens(repo_root, arguments, splits, tmp_path, model):
    """Of all accumulated batches, the first token of each caption included; transformers leaves it out for BLIP."""
    folder, names = repo_root / "recipes/miniatures", ("input_ids", "attention_mask")
    if model == "blip":
        model, processor = load_blip(str(folder / "blip"), None)
        processor.tokenizer.pad_token = processor.tokenizer.pad_token or processor.tokenizer.eos_token
    elif model == "vit_gpt2":
        (model, processor), names = build_vit_gpt2(arguments, seed=0), NAMES
    else:
        model, processor = build_vit_llama(VitLlamaArguments(str(folder / "vit"), None, str(folder / "llama")), 0)
    args = CaptionerTrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=2,
        logging_steps=1,
        label_smoothing_factor=0,
        report_to=[],
        disable_tqdm=True,
    )
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    trainer = CaptionerTrainer(
        model, args, *rows_of(splits), processor, names, BeamArguments(num_beams=1, max_new_tokens=16), "english"
    )
    batches = list(trainer.get_train_dataloader())[:2]
    with torch.no_grad():
        pairs = [(model(**{k: v for k, v in b.items() if k != "labels"}).logits, b["labels"]) for b in batches]
    losses = torch.cat(
        [F.cross_entropy(x.flatten(0, 1), y.flatten(), reduction="none")[y.flatten() != -100] for x, y in pairs]
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


def test_the_best_checkpoint_is_the_model_and_a_resumed_run_equals_the_uninterrupted_one(arguments, splits, tmp_path):
    """transformers reads nothing of an encoder whose weights are saved under their names of version 4."""
    whole = build(arguments, splits, tmp_path / "whole", metric_for_best_model="loss", save_total_limit=2)
    whole.train()
    best = whole.state.best_global_step
    assert same(whole.model, load_vit_gpt2(tmp_path / f"whole/checkpoint-{best}")[0])

    last = load_vit_gpt2(tmp_path / "whole/checkpoint-4")[0]
    first = load_vit_gpt2(tmp_path / "whole/checkpoint-2")[0]
    assert not same(first.encoder, last.encoder)
    continued = build(arguments, splits, tmp_path / "continued", metric_for_best_model="loss")
    continued.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert same(load_vit_gpt2(tmp_path / "continued/checkpoint-4")[0], last)
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, continued)]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_trackers_are_given_captions(arguments, splits, tmp_path):
    trainer = build(arguments, splits, tmp_path, report_to=["tensorboard"], max_steps=1, eval_steps=1, save_steps=1)
    trainer.train()
    (run,) = (tmp_path / "runs").iterdir()
    read = EventAccumulator(str(run), {"tensors": 0}).Reload()
    (table,) = read.Tensors("validation/captions/text_summary")
    said = re.sub(" +", " ", table.tensor_proto.string_val[0].decode())
    assert all(f"| {image_id} | {prose(text)} |" in said for image_id, text in trainer.validation.latest.items())
    assert read.Scalars("eval/loss")[0].value == pytest.approx(
        next(e for e in trainer.state.log_history if "eval_loss" in e)["eval_loss"], rel=1e-5
    )


def test_what_is_not_measured_cannot_choose_the_model(tmp_path):
    with pytest.raises(ValueError, match="metric_for_best_model: meteor is not measured during training"):
        CaptionerTrainingArguments(
            str(tmp_path), eval_strategy="steps", load_best_model_at_end=True, metric_for_best_model="meteor"
        )
    args = CaptionerTrainingArguments(
        str(tmp_path), eval_strategy="steps", load_best_model_at_end=True, metric_for_best_model="loss_and_bleu"
    )
    assert args.greater_is_better


def test_captions_that_would_be_cut_stop_the_run(arguments, splits):
    _, processor = build_vit_gpt2(arguments, seed=0)
    titles = [captions[0] for captions in splits.train["captions"]]
    longest = max(len(processor.tokenizer(title)["input_ids"]) for title in titles)
    assert f"longest {longest}; max_new_tokens {longest + 1} would cut 0 of 24" in check_caption_lengths(
        titles, processor, longest + 1
    )
    with pytest.raises(DataError, match=f"Set max_new_tokens to {longest + 1} or so"):
        check_caption_lengths(titles, processor, longest)


def test_data_seed_orders_the_captions(arguments, splits, tmp_path):
    def order(seed: int) -> list[list[int]]:
        loader = build(arguments, splits, tmp_path, data_seed=seed).get_train_dataloader()
        return list(loader.base_dataloader.batch_sampler)

    assert order(1) == order(1) != order(2)


def test_another_dataset_is_refused(arguments, splits, tmp_path):
    """The scores would have been those of the validation rows."""
    trainer = build(arguments, splits, tmp_path)
    assert trainer.evaluate()["eval_loss"] > 0
    for other in (splits.train, {"train": splits.train}):
        with pytest.raises(UserError, match=r"validation rows that the trainer was built with, .* build a trainer"):
            trainer.evaluate(other)
    with pytest.raises(UserError, match=r"predict\(\) is not supported, .*vlmcap.captioning.generate"):
        trainer.predict(splits.train)
    without = build(
        arguments, replace(splits, validation=None), tmp_path, eval_strategy="no", load_best_model_at_end=False
    )
    with pytest.raises(UserError, match="validation rows that the trainer was built with"):
        without.evaluate()
