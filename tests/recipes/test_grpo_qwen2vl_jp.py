"""Training on rewards from an adapter to card and captions, and what the recipe refuses."""

import pytest

from tests.recipes.files import captions, read

SETTINGS = (
    "--max_steps 4 --save_steps 2 --eval_steps 2 --logging_steps 1 --max_new_tokens 12 --generation_batch_size 4"
)
SETTINGS = [*SETTINGS.split(), "--max_completion_length", "12"]


@pytest.fixture
def recipe(run_script, scenes):
    """recipe(output_dir, ...): the demo's settings on the scenes."""

    def recipe(output_dir, *more, expect=0):
        words = ["--config", "recipes/configs/grpo_qwen2vl_jp/demo.yaml", *SETTINGS, "--output_dir", output_dir]
        words += ["--dataset", scenes / "dataset", "--adapter", scenes / "adapter"]
        words += ["--instances", scenes / "instances.json", "--reward_instances", scenes / "instances.json"]
        return run_script("recipes/grpo_qwen2vl_jp.py", *words, *more, expect=expect)

    return recipe


def test_from_an_adapter_to_a_card(run_script, recipe, scenes, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def short(captions, references, rows):\n    return [-len(c) for c in captions]\n"
    )
    mine, run = f"{tmp_path / 'mine.py'}:short", tmp_path / "run"
    settings = ["--reward_funcs", "cider_d", "chair", mine, "--reward_weights", 1, 0.5, 0.1]
    done = recipe(run, *settings)
    assert f"Rewards and their weights: cider_d 1, chair 0.5, {mine} 0.1" in done.stdout
    assert "Samples: 5 of each image" in done.stdout and "steps an epoch, 4 steps in all" in done.stdout
    metrics = read(run / "adapter/metrics.json")
    training = metrics["training"]
    assert training["sampled"]["samples"] == 5 * training["sampled"]["images"] == 80
    assert list(training["config"]["rewards"].values()) == [1.0, 0.5, 0.1]
    validated = [entry for entry in training["log"] if "eval_reward" in entry]
    assert [entry["step"] for entry in validated] == [0, 2, 4]
    assert {"eval_chair_s", "eval_distinct", "eval_words", "eval_rewards/cider_d"} <= validated[0].keys()
    assert metrics["recipe"] == "grpo_qwen2vl_jp"
    assert read(run / "adapter/captioning.json")["recipe"] == "sft_qwen2vl_jp"

    # Base, start and result side by side; an untouched LoRA says what its base says.
    assert captions(run / "start/predictions.jsonl") == captions(run / "base/predictions.jsonl")
    assert training["start"]["scores"] == metrics["base"]["scores"]
    card = (run / "adapter/README.md").read_text(encoding="utf-8")
    assert "| | base, zero-shot | starting adapter | this adapter |" in card
    assert "| `chair` | 0.5 |" in card and "80 samples of 16 images" in card and "It was trained on CIDEr-D" in card

    # It continues, and its document frequencies are those that scoring takes.
    recipe(run, *settings, "--resume_from_checkpoint", "latest", "--max_steps", 5)
    assert read(run / "adapter/metrics.json")["training"]["sampled"]["samples"] == 100
    predictions, out = run / "adapter/predictions.jsonl", tmp_path / "scores.json"
    words = ["--predictions", predictions, "--dataset", scenes / "dataset", "--idf", run / "idf.json", "--output", out]
    run_script("eval_captioning.py", *words)
    assert read(out)["scores"]["cider_d"] >= 0


def test_what_is_refused(recipe, scenes, tmp_path):
    run = tmp_path / "run"

    def refused(*more) -> str:
        return recipe(run, *more, expect=1).stderr

    assert "there is no reward 'cider'" in refused("--reward_funcs", "cider")
    assert "reward_weights has 1 numbers for the 2 rewards" in refused(
        "--reward_funcs", "cider_d", "chair", "--reward_weights", "1"
    )
    assert "--adapter is needed" in refused("--adapter", "")
    assert "choose another --output_dir" in refused("--adapter", run / "adapter")
    assert "lora_r 16: set --lora_r 32" in refused("--lora_r", 16)
    assert "images to train on, and a step takes 13 (per_device" in refused("--per_device_train_batch_size", 13)
    (tmp_path / "bad.py").write_text(
        "calls = []\n"
        "def bad(captions, references, rows):\n"
        "    calls.append(rows)\n"
        "    return [float('nan') if len(calls) > 4 else 1.0 for _ in captions]\n"
    )
    bad = f"{tmp_path / 'bad.py'}:bad"
    said = refused("--reward_funcs", bad)
    assert f"the reward {bad} returned nan for image " in said
    assert (run / "checkpoint-2/checkpoint.json").exists() and not (run / "checkpoint-4").exists()
