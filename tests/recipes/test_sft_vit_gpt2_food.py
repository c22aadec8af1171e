"""The ViT + GPT-2 recipe: its configurations and grids, and a run of the miniatures from drawn scenes to the hub."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file

from tests.recipes.files import assert_describes_itself, captions, read
from vlmcap.captioning.arguments import BeamArguments
from vlmcap.captioning.generate import caption_without_prompt
from vlmcap.experiments.ablation import cells, read_grid
from vlmcap.miniature.scenes import write_title_scenes
from vlmcap.models.vit_gpt2 import VitGpt2Arguments, build_vit_gpt2, freeze, load_vit_gpt2

FOLDER = "recipes/configs/sft_vit_gpt2_food"
STEPS = 100
SETTINGS = (
    f"--config {FOLDER}/demo.yaml --max_steps {STEPS} --save_steps {STEPS} --eval_steps {STEPS}"
    " --max_validation_images 8 --per_device_train_batch_size 16 --freeze_vit_blocks 2"
).split()


@pytest.fixture
def parse(parser_of):
    return parser_of("sft_vit_gpt2_food")


@pytest.mark.parametrize("name", ["base", "demo"])
def test_configurations_parse_and_say_what_they_do(repo_root, parse, name):
    path = repo_root / FOLDER / f"{name}.yaml"
    assert_describes_itself(path)
    data, model, beams, training = parse(path)
    assert data.tokenizer == "english" and beams.num_beams == 3
    assert (model.train, model.freeze_vit_blocks, model.freeze_gpt2_blocks, model.freeze_embeddings) == (
        "both",
        0,
        0,
        True,
    )
    assert training.load_best_model_at_end and training.metric_for_best_model == "loss_and_bleu"
    assert training.greater_is_better
    assert (training.early_stopping_patience, training.early_stopping_threshold) == (5, 0.001)
    assert training.save_steps % training.eval_steps == 0
    assert 0 < training.encoder_learning_rate < training.decoder_learning_rate
    assert not (training.bf16 or training.fp16)  # chosen by the device: float32 on a CPU
    if name == "base":
        public = VitGpt2Arguments()
        assert model.encoder_name_or_path == public.encoder_name_or_path
        assert model.decoder_name_or_path == public.decoder_name_or_path
    else:
        args = VitGpt2Arguments(**vars(model))
        built, _ = build_vit_gpt2(args, seed=0)
        freeze(built, args)


@pytest.mark.parametrize("name", ["encoder", "decoder", "both", "encoder_demo", "decoder_demo", "both_demo"])
def test_every_cell_of_the_study_is_one_the_recipe_takes(repo_root, parse, monkeypatch, name):
    monkeypatch.chdir(repo_root)
    grid = read_grid(f"{FOLDER}/{name}.yaml")
    mode, demo = name.removesuffix("_demo"), name.endswith("_demo")
    assert (grid.trained, grid.scores) == ("model", ["bleu_1", "bleu_2", "rouge_l", "meteor"])
    assert grid.config == f"{FOLDER}/{'demo' if demo else 'base'}.yaml"
    depth = 4 if demo else 12
    frozen = {"freeze_vit_blocks": {0}, "freeze_gpt2_blocks": {0}}
    for cell in cells(grid):
        changes = [text for key, value in cell.changes.items() for text in (f"--{key}", str(value).lower())]
        _, model, _, _ = parse(grid.config, *changes)
        assert model.train == mode
        for key, counts in frozen.items():
            counts.add(getattr(model, key))
    for key, counts in frozen.items():
        studied = mode == "both" or key == {"encoder": "freeze_vit_blocks", "decoder": "freeze_gpt2_blocks"}[mode]
        assert max(counts) == (depth if studied else 0) and len(counts) >= (3 if studied else 1)
    if mode == "both":
        stops = {cell.changes.get("metric_for_best_model") for cell in cells(grid)}
        assert {"loss", "bleu_2"} <= stops  # beside their combination, the reference


def test_drawn_scenes_are_named_and_the_model_goes_to_the_hub_and_back(hub, run_script, without_meteor, tmp_path):
    write_title_scenes(tmp_path / "scenes", 400, 0)
    publish = ["publish_datasets.py", "food_titles", "--annotations", tmp_path / "scenes/titles.csv"]
    publish += ["--images", tmp_path / "scenes/images", "--card", "scene_titles", "--output_dir", tmp_path / "dataset"]
    publish += ["--pretty_name", "Scenes", "--license", "cc0-1.0"]
    run_script(*publish, "--push_to_hub", "--repo_id", "user/scene-titles")
    # Another row of the first image, with a caption of white space.
    (shard,) = (tmp_path / "dataset/data").glob("train-*.parquet")
    table = pq.read_table(shard)
    place, field = table.schema.get_field_index("captions"), table.schema.field("captions")
    more = table.slice(0, 1).set_column(place, field, pa.array([[" "]], field.type))
    pq.write_table(pa.concat_tables([table, more]), shard)
    where = {"repo_id": "user/scene-titles", "repo_type": "dataset", "path_in_repo": f"data/{shard.name}"}
    HfApi().upload_file(path_or_fileobj=shard, **where)

    run = tmp_path / "run"
    command = ["recipes/sft_vit_gpt2_food.py", *SETTINGS, "--dataset", "user/scene-titles", "--output_dir", run]
    done = run_script(*command, "--push_to_hub", "--hub_model_id", "user/dishes")
    assert "crossattention" in done.stdout and "encoder.embeddings" not in done.stdout
    assert f"{len(table) + 1} rows of {len(table)} images" in done.stderr
    assert "Left out of train: 1 empty captions, and 0 images" in done.stdout
    metrics = read(run / "model/metrics.json")
    assert read(run / "model/captioning.json")["recipe"] == "sft_vit_gpt2_food"
    assert metrics["recipe"] == "sft_vit_gpt2_food" and metrics["prompt"] is None
    assert metrics["model"]["id"] == "recipes/miniatures/vit + recipes/miniatures/gpt2"
    assert metrics["model"]["parts"]["decoder"]["id"] == "recipes/miniatures/gpt2"
    assert metrics["training"]["config"]["freeze_vit_blocks"] == 2
    assert metrics["training"]["images"] == metrics["training"]["captions"] == len(table)
    assert metrics["training"]["empty_captions"] == {"captions": 1, "images": 0}
    assert metrics["training"]["best"]["metric"] == "loss_and_bleu"
    # Before training the cross-attention is noise and the picture unseen; afterwards new combinations are named.
    assert metrics["base"]["scores"]["bleu_2"] < 0.1 < 0.4 < metrics["scores"]["bleu_2"]
    assert metrics["base"]["scores"]["rouge_l"] < 0.25 < 0.55 < metrics["scores"]["rouge_l"]

    # What was frozen is what it was, to the bit; the rest moved.
    args = VitGpt2Arguments("recipes/miniatures/vit", None, "recipes/miniatures/gpt2", freeze_vit_blocks=2)
    before, _ = build_vit_gpt2(args, seed=42)
    freeze(before, args)
    model, processor = load_vit_gpt2("user/dishes")
    after = dict(model.named_parameters())
    for name, parameter in before.named_parameters():
        assert parameter.equal(after[name]) != parameter.requires_grad, name
    saved = load_file(run / "model/model.safetensors")
    assert not [name for name in saved if "pooler" in name]

    # On the Hub: model, processor and card, from which another loader says what was said before the push.
    files = set(HfApi().list_repo_files("user/dishes"))
    assert {"model.safetensors", "config.json", "processor_config.json", "README.md", "metrics.json"} <= files
    assert not [name for name in files if "optimizer" in name or "training_args" in name or "checkpoint" in name]
    card = ModelCard.load("user/dishes")
    card.validate()
    assert f"{metrics['scores']['cider_d']:.4f}" in card.text and "| empty captions left out | 1 |" in card.text
    said = captions(run / "model/predictions.jsonl")
    rows = load_dataset("user/scene-titles", split="test")
    beams = BeamArguments(num_beams=3, max_new_tokens=24)
    assert caption_without_prompt(model, processor, rows["image"][:], beams) == [said[i] for i in rows["image_id"]]

    assert "--resume_from_checkpoint latest" in run_script(*command, expect=1).stderr
    more = ["--resume_from_checkpoint", "latest", "--max_steps", str(STEPS + 2)]
    stopped = run_script(*command, *more, "--num_beams", 1, expect=1)  # captions of the base are there
    assert "base/predictions.jsonl was started with another decoding" in stopped.stderr
    assert not (run / f"checkpoint-{STEPS + 2}").exists()
    run_script(*command, *more)
    continued = read(run / "model/metrics.json")
    assert continued["training"]["steps"] == STEPS + 2
    assert continued["model"]["adapter_revision"] != metrics["model"]["adapter_revision"]
    assert continued["base"]["created"] == metrics["base"]["created"]
