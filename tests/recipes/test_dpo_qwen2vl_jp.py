"""Training on preferences from an adapter to card and captions, and what the recipe refuses."""

import pytest
from peft import get_peft_model

from tests.invariants import tiny
from tests.recipes.files import captions, read
from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.captioning.settings import settings_of, write_settings
from vlmcap.miniature.scenes import write_scene_dataset
from vlmcap.models.arguments import ModelArguments
from vlmcap.models.load import load_model, load_processor, lora_config

SETTINGS = "--max_steps 4 --save_steps 2 --eval_steps 2 --max_new_tokens 12 --per_device_train_batch_size 4".split()
PROMPT = GenerationArguments().prompt


@pytest.fixture(scope="module")
def scenes(run_script, tmp_path_factory, miniature_dir):
    """Drawn scenes with preferences, their dataset, and an adapter of the demo's shapes that has learned nothing."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scene_dataset(folder, train=12, validation=3, test=4)
    publish = [
        "stair",
        "--tokenizer",
        miniature_dir,
        "--output_dir",
        folder / "dataset",
        "--images",
        folder / "images",
    ]
    publish += ["--annotations", folder / "stair_train.json", folder / "stair_val.json"]
    publish += ["--yj_annotations", folder / "yj.json"]
    publish += ["--val_ids", folder / "val_ids.txt", "--test_ids", folder / "test_ids.txt"]
    run_script("publish_datasets.py", *publish)
    model = load_model(str(miniature_dir))
    processor = load_processor(str(miniature_dir), None, 3136, 7056)
    adapted = get_peft_model(model, lora_config(model, ModelArguments(model_name_or_path=str(miniature_dir))))
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    write_settings(folder / "adapter", settings_of("sft_qwen2vl_jp", adapted, processor, GenerationArguments()))
    return folder


@pytest.fixture
def recipe(run_script, scenes):
    """recipe(output_dir, ...): the demo's settings on these scenes."""

    def recipe(output_dir, *more, preferences="preferences.jsonl", expect=0):
        words = ["--config", "recipes/configs/dpo_qwen2vl_jp/demo.yaml", *SETTINGS, "--output_dir", output_dir]
        words += ["--dataset", scenes / "dataset", "--preferences", scenes / preferences]
        words += ["--heldout_preferences", scenes / "preferences_test.jsonl", "--adapter", scenes / "adapter"]
        words += ["--instances", scenes / "instances.json"]
        return run_script("recipes/dpo_qwen2vl_jp.py", *words, *more, expect=expect)

    return recipe


def test_from_an_adapter_to_a_card(run_script, recipe, scenes, tmp_path):
    run = tmp_path / "run"
    done = recipe(run)
    assert "Preferences: 24 pairs of 12 images" in done.stdout and "8 pairs held out" in done.stdout
    metrics = read(run / "adapter/metrics.json")
    training = metrics["training"]
    seen = training["preferences"]
    assert (seen["pairs"], seen["unseen_pairs"], training["images"], training["steps"]) == (24, 8, 12, 4)
    assert 0 <= seen["before"]["preference_rate"] <= 1 and seen["after"].keys() > seen["before"].keys()
    assert [entry["step"] for entry in training["log"] if "eval_preference_rate" in entry] == [2, 4]
    assert (
        metrics["recipe"] == "dpo_qwen2vl_jp" and read(run / "adapter/captioning.json")["recipe"] == "sft_qwen2vl_jp"
    )

    # Base, start and result side by side; an untouched LoRA says what its base says.
    assert captions(run / "start/predictions.jsonl") == captions(run / "base/predictions.jsonl")
    assert training["start"]["scores"] == read(run / "start/metrics.json")["scores"] == metrics["base"]["scores"]
    card = (run / "adapter/README.md").read_text(encoding="utf-8")
    assert "continued with direct preference optimisation" in card and "24 pairs of captions of 12 images" in card
    assert "| | base, zero-shot | starting adapter | this adapter |" in card
    assert "| pairs that were not trained on: 8 | starting adapter | this adapter |" in card
    assert f"{seen['before']['preference_rate']:.1%} | {seen['after']['preference_rate']:.1%}" in card

    # The reference is kept: a run that continues does not compute it again.
    (reference,) = run.glob("reference-*.json")
    written = reference.stat().st_mtime_ns
    assert "--resume_from_checkpoint latest" in recipe(run, expect=1).stderr
    recipe(run, "--resume_from_checkpoint", "latest", "--max_steps", 6)
    assert read(run / "adapter/metrics.json")["training"]["steps"] == 6
    assert reference.stat().st_mtime_ns == written and len(list(run.glob("reference-*.json"))) == 1

    # Others use it as any adapter.
    picture = next((scenes / "images").iterdir())
    captioned = run_script("caption.py", picture, "--adapter", run / "adapter")
    assert captioned.stdout.startswith(f"{picture}\t")


def test_images_that_are_judged_are_not_scored(recipe, scenes, tmp_path):
    """Preferences about two of the four test images; held-out pairs are drawn, and captions are not validated."""
    lines = (scenes / "preferences_test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (scenes / "judged.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
    words = ["--heldout_preferences", "", "--heldout_share", 0.5, "--eval_strategy", "no", "--max_steps", 1]
    done = recipe(tmp_path / "run", *words, preferences="judged.jsonl")
    assert "Left out of test: 1 of 4 images, which preferences are about" in done.stderr
    metrics = read(tmp_path / "run/adapter/metrics.json")
    assert metrics["counts"]["images"] == 3 and metrics["training"]["preferences"]["left_out"] == {"test": 1}
    assert "Left out of the scored split: 1 images" in (tmp_path / "run/adapter/README.md").read_text(encoding="utf-8")


def test_what_is_refused(recipe, scenes, tmp_path):
    def refused(*more, **files) -> str:
        return recipe(tmp_path / "run", *more, expect=1, **files).stderr

    assert "lora_r 16: set --lora_r 32" in refused("--lora_r", 16)
    assert "would ask '何？': set --prompt to that of the adapter" in refused("--prompt", "何？")
    assert "choose another --output_dir" in refused("--adapter", tmp_path / "run/adapter")
    assert "none.jsonl cannot be read" in refused(preferences="none.jsonl")
    both = refused(preferences="preferences_test.jsonl")
    assert "4 pictures are in the preferences and in the held-out ones" in both
    other = tiny.build_start()  # of another base
    other.peft_config["default"].base_model_name_or_path = "tiny"
    other.save_pretrained(tmp_path / "other", save_embedding_layers=False)
    assert f"adapter {tmp_path / 'other'}" in refused("--adapter", tmp_path / "other")
