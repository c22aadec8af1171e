"""Training on preferences from an adapter to card and captions, and what the recipe refuses."""

import pytest

from tests.invariants import tiny
from tests.recipes.files import captions, read
from vlmcap.captioning.arguments import GenerationArguments

SETTINGS = "--max_steps 4 --save_steps 2 --eval_steps 2 --max_new_tokens 12 --per_device_train_batch_size 4".split()
PROMPT = GenerationArguments().prompt


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
    """Preferences about two of the four test images; held-out pairs are drawn, captions are not validated, and the
    features of pictures are cached."""
    lines = (scenes / "preferences_test.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (scenes / "judged.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
    words = ["--heldout_preferences", "", "--heldout_share", 0.5, "--eval_strategy", "no", "--max_steps", 1]
    words += ["--cache_image_features", tmp_path / "features"]
    done = recipe(tmp_path / "run", *words, preferences="judged.jsonl")
    assert "Left out of test: 1 of 4 images, which preferences are about" in done.stderr
    metrics = read(tmp_path / "run/adapter/metrics.json")
    assert len(list((tmp_path / "features").glob("*/features.bin"))) == 1
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
