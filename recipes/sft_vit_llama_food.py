"""Teach Llama 3.2 to name dishes from one vector of a frozen ViT: a trained projection as soft prefix, and LoRA.

The dataset first (the CSV and the pictures of the Food Ingredients and Recipes dataset), then the training, on one GPU
with 16 GB or more, with the settings of recipes/configs/sft_vit_llama_food/base.yaml. Llama 3.2 is gated: accept its
licence on its page and log in (`hf auth login`).

    python scripts/publish_datasets.py food_titles --annotations titles.csv --images "Food Images" \\
        --output_dir data/food_titles
    accelerate launch recipes/sft_vit_llama_food.py

Any key of the YAML can be set on the command line, and an interrupted run continues:

    accelerate launch recipes/sft_vit_llama_food.py --decoder_name_or_path meta-llama/Llama-3.2-3B \\
        --load_in_4bit true --output_dir outputs/vit_llama_3b
    accelerate launch recipes/sft_vit_llama_food.py --image_prefix patches --output_dir outputs/vit_llama_patches
    accelerate launch recipes/sft_vit_llama_food.py --resume_from_checkpoint latest

A grid over rank, alpha, dropout and prefix:

    python scripts/run_ablation.py --config recipes/configs/sft_vit_llama_food/grid.yaml

In `output_dir` it leaves checkpoints, `base/` (the model before training) and `adapter/` with predictions.jsonl and
metrics.json each, LoRA and projection with processor and model card in `adapter/`, and `samples.html`.
`--push_to_hub --hub_model_id you/Llama-name` publishes `adapter/` (private until you say otherwise). The whole path in
miniature, on a CPU: `make demo-family`.
"""

from dataclasses import asdict
from pathlib import Path

from vlmcap.arguments import run_main
from vlmcap.captioning.arguments import BeamArguments
from vlmcap.models.arguments import VitLlamaArguments
from vlmcap.training.arguments import CONTINUE, CaptionerDataArguments, CaptionerFields
from vlmcap.training.inherited import TRAINING_ARGUMENTS, complete, parsed_as

BASE_CONFIG = Path(__file__).parent / "configs/sft_vit_llama_food/base.yaml"


def main(
    data_args: CaptionerDataArguments,
    model_args: VitLlamaArguments,
    beam_args: BeamArguments,
    settings: CaptionerFields,
) -> None:
    # Slow imports, after the command line and the dataset were checked.
    from vlmcap.steps.early import check_early

    check_early(settings, data_args)

    from accelerate import PartialState
    from transformers import set_seed

    from vlmcap.captioning.generate import check_predictions
    from vlmcap.data.corpora import SEEN_CORPORA
    from vlmcap.evaluation.scoring import ScoreOptions
    from vlmcap.evaluation.tasks import one_task
    from vlmcap.models.vit_llama import add_lora, build_vit_llama, load_vit_llama
    from vlmcap.reporting.hub import check_llama_name
    from vlmcap.steps.begin import begin
    from vlmcap.steps.finish import finish, saw_records
    from vlmcap.steps.save import save_trained
    from vlmcap.steps.splits import load_splits
    from vlmcap.training.captioner import (
        REPORTED_SETTINGS,
        CaptionerTrainer,
        captioner_report,
        check_caption_lengths,
        resolve_parts,
        two_part_record,
    )
    from vlmcap.training.trainer_arguments import CaptionerTrainingArguments

    training_args = complete(CaptionerTrainingArguments, settings)
    adapter_dir = Path(training_args.output_dir) / "adapter"
    groups = {"data": asdict(data_args), "model": asdict(model_args), "generation": asdict(beam_args)}
    run = begin(training_args, REPORTED_SETTINGS, **groups)
    check_llama_name(run.push_to, model_args.decoder_name_or_path)

    # Data: one row an image.
    splits = load_splits(data_args, run.output_dir, training_args.eval_strategy != "no", run.seed)

    # Model: frozen ViT, frozen Llama with LoRA, and between them a projection that is trained in full.
    model_args = resolve_parts(model_args)
    model, processor = build_vit_llama(model_args, run.seed)
    saw, trained_saw = saw_records(dict(zip(SEEN_CORPORA, data_args.base_saw, strict=True)), splits)
    base_record = {"model": two_part_record(model, model_args), "dataset": splits.test_record, "saw": saw}
    base_dir = run.output_dir / "base"
    check_predictions(processor, base_dir / "predictions.jsonl", beam_args, base_record)
    captions = [caption for captions in splits.train["captions"] for caption in captions]
    lengths = check_caption_lengths(captions, processor, beam_args.max_new_tokens)
    set_seed(run.seed)
    model = add_lora(model, model_args)
    trainer = CaptionerTrainer(
        model=model,
        args=training_args,
        rows=splits.train,
        validation_rows=splits.validation,
        bad_images=splits.bad_images,
        processing_class=processor,
        names=("input_ids", "attention_mask"),
        generation=beam_args,
        tokenizer=data_args.tokenizer,
    )
    if PartialState().is_main_process:
        print(captioner_report(trainer), lengths, sep="\n", flush=True)

    # Training
    trainer.train(resume_from_checkpoint=run.checkpoint)
    save_trained(trainer, adapter_dir, splits, run.config(model_args), Path(__file__).stem, beam_args)
    del trainer, model

    # Evaluation: the model before training and the adapter as saved on disk, with the same decoding.
    finish(
        run,
        Path(__file__).stem,
        [one_task(beam_args, data_args.tokenizer, splits.test)],
        splits,
        base_dir=base_dir,
        base_record=base_record,
        load_base=lambda: build_vit_llama(model_args, run.seed),
        trained_dir=adapter_dir,
        trained_saw=trained_saw,
        load_trained=lambda: load_vit_llama(str(adapter_dir)),
        options=ScoreOptions(spice_url=data_args.spice_url, spice_dir=data_args.spice_dir),
    )


ARGUMENTS = (CaptionerDataArguments, VitLlamaArguments, BeamArguments, parsed_as(CaptionerFields, TRAINING_ARGUMENTS))

if __name__ == "__main__":
    run_main(main, __doc__, *ARGUMENTS, config=BASE_CONFIG, interrupted=CONTINUE)
