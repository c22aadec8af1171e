"""Teach ViT + GPT-2 (VisionEncoderDecoder) to name dishes, training encoder, decoder or both.

The dataset first (the CSV and the pictures of the Food Ingredients and Recipes dataset), then the training, on one GPU
with 16 GB or more, with the settings of recipes/configs/sft_vit_gpt2_food/base.yaml:

    python scripts/publish_datasets.py food_titles --annotations titles.csv --images "Food Images" \\
        --output_dir data/food_titles
    accelerate launch recipes/sft_vit_gpt2_food.py

Any key of the YAML can be set on the command line, and an interrupted run continues:

    accelerate launch recipes/sft_vit_gpt2_food.py --train decoder --freeze_gpt2_blocks 6 --output_dir outputs/d6
    accelerate launch recipes/sft_vit_gpt2_food.py --resume_from_checkpoint latest

The study, a grid each of encoder, decoder and both, with learning curves and tables side by side at its end:

    python scripts/run_ablation.py --config recipes/configs/sft_vit_gpt2_food/decoder.yaml

In `output_dir` it leaves checkpoints, `base/` (the model before training) and `model/` with predictions.jsonl and
metrics.json each, the whole model with its processor and model card in `model/`, and `samples.html`. `--push_to_hub
--hub_model_id you/name` publishes `model/` (private until you say otherwise). The whole path in miniature, on a CPU:
`make demo-family`.
"""

from dataclasses import asdict
from pathlib import Path

from vlmcap.arguments import run_main
from vlmcap.captioning.arguments import BeamArguments
from vlmcap.models.arguments import VitGpt2Arguments
from vlmcap.training.arguments import CONTINUE, CaptionerDataArguments, FoodFields
from vlmcap.training.inherited import TRAINING_ARGUMENTS, complete, parsed_as

BASE_CONFIG = Path(__file__).parent / "configs/sft_vit_gpt2_food/base.yaml"


def main(
    data_args: CaptionerDataArguments,
    model_args: VitGpt2Arguments,
    beam_args: BeamArguments,
    settings: FoodFields,
) -> None:
    # Slow imports, after the command line and the dataset were checked.
    from vlmcap.steps.early import check_early

    check_early(settings, data_args)

    from accelerate import PartialState

    from vlmcap.captioning.generate import check_predictions
    from vlmcap.data.corpora import SEEN_CORPORA
    from vlmcap.evaluation.scoring import ScoreOptions
    from vlmcap.evaluation.tasks import one_task
    from vlmcap.models.vit_gpt2 import build_vit_gpt2, freeze, load_vit_gpt2, parameter_groups
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
    from vlmcap.training.trainer_arguments import FoodTrainingArguments

    training_args = complete(FoodTrainingArguments, settings)
    model_dir = Path(training_args.output_dir) / "model"
    groups = {"data": asdict(data_args), "model": asdict(model_args), "generation": asdict(beam_args)}
    reported = [*REPORTED_SETTINGS, "encoder_learning_rate", "decoder_learning_rate"]
    run = begin(training_args, reported, **groups)

    # Data: one row an image.
    splits = load_splits(data_args, run.output_dir, training_args.eval_strategy != "no", run.seed)

    # Model: a pretrained ViT and a pretrained GPT-2 with new cross-attention; what is not studied is frozen.
    model_args = resolve_parts(model_args)
    model, processor = build_vit_gpt2(model_args, run.seed)
    saw, trained_saw = saw_records(dict(zip(SEEN_CORPORA, data_args.base_saw, strict=True)), splits)
    base_record = {"model": two_part_record(model, model_args), "dataset": splits.test_record, "saw": saw}
    base_dir = run.output_dir / "base"
    check_predictions(processor, base_dir / "predictions.jsonl", beam_args, base_record)
    freeze(model, model_args)
    captions = [caption for captions in splits.train["captions"] for caption in captions]
    lengths = check_caption_lengths(captions, processor, beam_args.max_new_tokens)
    rates = (
        training_args.encoder_learning_rate or training_args.learning_rate,
        training_args.decoder_learning_rate or training_args.learning_rate,
    )
    trainer = CaptionerTrainer(
        model=model,
        args=training_args,
        rows=splits.train,
        validation_rows=splits.validation,
        bad_images=splits.bad_images,
        processing_class=processor,
        names=("decoder_input_ids", "decoder_attention_mask"),
        generation=beam_args,
        tokenizer=data_args.tokenizer,
        parameter_groups=parameter_groups(model, *rates, training_args.weight_decay),
        read_checkpoint=lambda folder: load_vit_gpt2(folder)[0],
    )
    if PartialState().is_main_process:
        print(captioner_report(trainer), lengths, sep="\n", flush=True)

    # Training
    trainer.train(resume_from_checkpoint=run.checkpoint)
    save_trained(trainer, model_dir, splits, run.config(model_args), Path(__file__).stem, beam_args)
    del trainer, model

    # Evaluation: the model before training and the trained one as saved on disk, with the same decoding.
    finish(
        run,
        Path(__file__).stem,
        [one_task(beam_args, data_args.tokenizer, splits.test)],
        splits,
        base_dir=base_dir,
        base_record=base_record,
        load_base=lambda: build_vit_gpt2(model_args, run.seed),
        trained_dir=model_dir,
        trained_saw=trained_saw,
        load_trained=lambda: load_vit_gpt2(str(model_dir)),
        options=ScoreOptions(spice_url=data_args.spice_url, spice_dir=data_args.spice_dir),
    )


ARGUMENTS = (CaptionerDataArguments, VitGpt2Arguments, BeamArguments, parsed_as(FoodFields, TRAINING_ARGUMENTS))

if __name__ == "__main__":
    run_main(main, __doc__, *ARGUMENTS, config=BASE_CONFIG, interrupted=CONTINUE)
