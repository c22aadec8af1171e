"""Every configuration file is one the recipe and accelerate can read."""

from dataclasses import replace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from tests.recipes.files import assert_describes_itself
from vlmcap.miniature.qwen2_vl import ENGLISH_PROMPT, LANGUAGES

NAMES = ("base", "t4", "demo")


@pytest.fixture
def parse(parser_of):
    return parser_of("sft_qwen2vl_jp")


@pytest.mark.parametrize("name", NAMES)
def test_recipe_config_parses(repo_root, parse, name):
    path = repo_root / f"recipes/configs/sft_qwen2vl_jp/{name}.yaml"
    # float16 is refused where there is no GPU, which is what t4.yaml is for.
    data, model, generation, prompts, training = parse(path, *(["--fp16", "false"] if name == "t4" else []))
    assert model.load_in_4bit and model.train_projector
    assert (model.lora_r, model.lora_alpha, model.lora_dropout, model.lora_top_layers) == (32, 32, 0.05, 6)
    assert generation.num_beams == 3 and prompts.prompts is None
    assert training.shared_prefix and training.captions_per_image == 5
    images = training.per_device_train_batch_size * training.gradient_accumulation_steps
    assert images * training.captions_per_image == (15 if name == "demo" else 20)  # captions an optimizer step
    assert training.label_smoothing_factor == 0.1
    assert training.lr_scheduler_type == "cosine" and training.optim == "adamw_torch"
    assert training.max_length is None and not training.remove_unused_columns
    assert not (training.bf16 or training.fp16)  # chosen by the device: float32 on a CPU


def test_the_settings_for_own_pictures(repo_root, parse):
    data, model, _, _, training = parse(repo_root / "recipes/configs/sft_qwen2vl_jp/own.yaml")
    assert data.dataset == "data/own" and data.image_dir is None
    assert (model.lora_r, model.lora_alpha, model.train_projector) == (16, 16, False)
    assert training.save_steps % training.eval_steps == 0 and training.load_best_model_at_end


@pytest.mark.parametrize(("name", "like"), [("languages", "base"), ("languages_demo", "demo")])
def test_the_settings_for_several_languages(repo_root, parse, name, like):
    """The same model as with one language, in the demo from the miniature that has read them, and a prompt for each
    kind of captions of the corpora that are joined."""
    folder = repo_root / "recipes/configs/sft_qwen2vl_jp"
    assert_describes_itself(folder / f"{name}.yaml")
    data, model, generation, prompts, training = parse(folder / f"{name}.yaml")
    _, trained, *_ = parse(folder / f"{like}.yaml")
    if name == "languages_demo":
        trained = replace(trained, model_name_or_path="recipes/miniatures/qwen2_vl_languages")
        asked = [prompts.first_wordings[key] for key in ("ja/plain", "ja/polite", "vi", "en")]
        assert asked == [*LANGUAGES, ENGLISH_PROMPT]
    assert model == trained
    assert list(prompts.wordings) == ["ja/plain", "ja/polite", "en", "vi"]
    assert prompts.main(generation).prompt == prompts.wordings["ja/plain"][0]
    assert data.include_yj_images and training.shared_prefix and training.captions_per_image == 5


@pytest.mark.parametrize("name", NAMES)
def test_configs_of_preferences(repo_root, parser_of, name):
    """They start from what the SFT recipe's file of the same name trains: the same model, prompt and decoding."""
    path = repo_root / f"recipes/configs/dpo_qwen2vl_jp/{name}.yaml"
    assert_describes_itself(path)
    no_gpu = ["--fp16", "false"] if name == "t4" else []
    data, model, generation, _, training = parser_of("dpo_qwen2vl_jp")(path, *no_gpu)
    _, trained, asked, _, _ = parser_of("sft_qwen2vl_jp")(
        repo_root / f"recipes/configs/sft_qwen2vl_jp/{name}.yaml", *no_gpu
    )
    assert replace(model, adapter=None, lora_dropout=0) == replace(trained, lora_dropout=0) and generation == asked
    assert training.beta == 0.1 or name == "demo"
    assert training.loss_type == "sigmoid" and training.save_steps % training.eval_steps == 0
    assert bool(data.preferences) == bool(model.adapter) == (name == "demo")


@pytest.mark.parametrize("name", NAMES)
def test_configs_of_rewards(repo_root, parser_of, name):
    """They too start from what the SFT recipe's file of the same name trains, and without dropout."""
    path = repo_root / f"recipes/configs/grpo_qwen2vl_jp/{name}.yaml"
    assert_describes_itself(path)
    no_gpu = ["--fp16", "false"] if name == "t4" else []
    _, model, _, generation, _, training = parser_of("grpo_qwen2vl_jp")(path, *no_gpu)
    _, trained, asked, _, _ = parser_of("sft_qwen2vl_jp")(
        repo_root / f"recipes/configs/sft_qwen2vl_jp/{name}.yaml", *no_gpu
    )
    assert replace(model, adapter=None) == replace(trained, lora_dropout=0) and generation == asked
    assert bool(model.adapter) == (name == "demo") and training.save_steps % training.eval_steps == 0
    assert training.max_completion_length <= generation.max_new_tokens and training.num_generations >= 5


@pytest.mark.parametrize("name", [*NAMES, "own"])
def test_every_key_says_what_it_does(repo_root, name):
    text = (repo_root / f"recipes/configs/sft_qwen2vl_jp/{name}.yaml").read_text(encoding="utf-8")
    assert "accelerate launch" in text.split("\n\n")[0], "the exact command stands at the top"
    if name in ("base", "own"):
        keys = [line for line in text.splitlines() if line and not line.startswith("#")]
        plain = {"train_split", "test_split", "output_dir", "seed", "logging_steps", "save_steps", "save_total_limit"}
        plain |= {"model_name_or_path", "lr_scheduler_type", "weight_decay", "max_grad_norm", "optim", "prompt"}
        plain |= {"num_beams", "max_new_tokens", "generation_batch_size"}
        assert [k for k in keys if "#" not in k and k.split(":")[0] not in plain] == []


def test_unknown_keys_are_refused(repo_root, parse, tmp_path):
    document = yaml.safe_load((repo_root / "recipes/configs/sft_qwen2vl_jp/demo.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "typo.yaml"
    path.write_text(yaml.safe_dump(document | {"lora_rank": 8}))
    with pytest.raises(ValueError, match="lora_rank"):
        parse(path)


@pytest.mark.parametrize("name", ["cpu", "single_gpu", "t4", "ddp", "fsdp_qlora"])
def test_accelerate_config_loads(repo_root, name):
    config = load_config_from_file(str(repo_root / f"accelerate_configs/{name}.yaml"))
    assert config.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp_qlora": "FSDP"}.get(name, "NO")
    assert config.use_cpu == (name == "cpu")
