"""Adapt BLIP to Vietnamese image captions with LoRA (UIT-ViIC), and measure the result beside zero-shot BLIP.

The dataset first, with the photographs (COCO train2017) in a folder; then the training, on one GPU with 16 GB or more,
with the settings of recipes/configs/sft_blip_vi/base.yaml:

    python scripts/publish_datasets.py uit_viic --annotations uitviic_captions_train2017.json \\
        uitviic_captions_val2017.json uitviic_captions_test2017.json --output_dir data/uit_viic
    python scripts/fetch_images.py --dataset data/uit_viic --output_dir data/images_vi
    accelerate launch recipes/sft_blip_vi.py

Any key of the YAML can be set on the command line, and an interrupted run continues:

    accelerate launch recipes/sft_blip_vi.py --lora_r 32 --output_dir outputs/blip_r32
    accelerate launch recipes/sft_blip_vi.py --resume_from_checkpoint latest

BLIP's own tokenizer takes the tone marks off Vietnamese words: the recipe learns pieces that keep them from the
training captions, and trains their embeddings beside LoRA.

In `output_dir` it leaves checkpoints, `base/` and `adapter/` with predictions.jsonl and metrics.json each, the adapter
with its processor and model card in `adapter/`, and `samples.html`. `--push_to_hub --hub_model_id you/name` publishes
`adapter/` (private until you say otherwise). The whole path in miniature, on a CPU: `make demo-family`.
"""

from dataclasses import asdict, replace
from pathlib import Path

from vlmcap.arguments import run_main
from vlmcap.captioning.arguments import BeamArguments
from vlmcap.models.arguments import BlipArguments
from vlmcap.training.arguments import CONTINUE, CaptionerDataArguments, CaptionerFields
from vlmcap.training.inherited import TRAINING_ARGUMENTS, complete, parsed_as

BASE_CONFIG = Path(__file__).parent / "configs/sft_blip_vi/base.yaml"


def main(
    data_args: CaptionerDataArguments,
    model_args: BlipArguments,
    beam_args: BeamArguments,
    settings: CaptionerFields,
) -> None:
    # Slow imports, after the command line and the dataset were checked.
    from vlmcap.steps.early import check_early

    check_early(settings, data_args)

    from accelerate import PartialState
    from transformers import set_seed

    from vlmcap.captioning.generate import check_predictions
    from vlmcap.captioning.predictions import model_record
    from vlmcap.data.corpora import SEEN_CORPORA
    from vlmcap.evaluation.scoring import ScoreOptions
    from vlmcap.evaluation.tasks import one_task
    from vlmcap.models.blip import add_lora, learn_vietnamese, load_blip, load_blip_adapter
    from vlmcap.models.load import resolve_revision
    from vlmcap.steps.begin import begin
    from vlmcap.steps.finish import finish, saw_records
    from vlmcap.steps.save import save_trained
    from vlmcap.steps.splits import load_splits
    from vlmcap.training.captioner import REPORTED_SETTINGS, CaptionerTrainer, captioner_report, check_caption_lengths
    from vlmcap.training.trainer_arguments import CaptionerTrainingArguments

    training_args = complete(CaptionerTrainingArguments, settings)
    adapter_dir = Path(training_args.output_dir) / "adapter"
    groups = {"data": asdict(data_args), "model": asdict(model_args), "generation": asdict(beam_args)}
    run = begin(training_args, REPORTED_SETTINGS, **groups)

    # Data: one row an image.
    splits = load_splits(data_args, run.output_dir, training_args.eval_strategy != "no", run.seed)

    # Model: the vision encoder frozen, LoRA on the decoder's attention, embeddings of the new pieces trained.
    name, revision = model_args.model_name_or_path, model_args.model_revision
    model_args = replace(model_args, model_revision=resolve_revision(name, revision))
    names = (name, model_args.model_revision)
    set_seed(run.seed)
    model, processor = load_blip(*names)
    saw, trained_saw = saw_records(dict(zip(SEEN_CORPORA, data_args.base_saw, strict=True)), splits)
    base_record = {"model": model_record(model, *names), "dataset": splits.test_record, "saw": saw}
    base_dir = run.output_dir / "base"
    check_predictions(processor, base_dir / "predictions.jsonl", beam_args, base_record)
    captions = [caption for captions in splits.train["captions"] for caption in captions]
    processor = learn_vietnamese(processor, captions, model_args.new_pieces)
    lengths = check_caption_lengths(captions, processor, beam_args.max_new_tokens)
    model = add_lora(model, processor, model_args)
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

    # Evaluation: zero-shot BLIP and the adapter as saved on disk, on the same images with the same decoding.
    finish(
        run,
        Path(__file__).stem,
        [one_task(beam_args, data_args.tokenizer, splits.test)],
        splits,
        base_dir=base_dir,
        base_record=base_record,
        load_base=lambda: load_blip(*names),
        trained_dir=adapter_dir,
        trained_saw=trained_saw,
        load_trained=lambda: load_blip_adapter(str(adapter_dir)),
        options=ScoreOptions(spice_url=data_args.spice_url, spice_dir=data_args.spice_dir),
    )


ARGUMENTS = (CaptionerDataArguments, BlipArguments, BeamArguments, parsed_as(CaptionerFields, TRAINING_ARGUMENTS))

if __name__ == "__main__":
    run_main(main, __doc__, *ARGUMENTS, config=BASE_CONFIG, interrupted=CONTINUE)
