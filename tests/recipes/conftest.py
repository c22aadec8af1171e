import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import get_peft_model
from trl import TrlParser

from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.captioning.settings import settings_of, write_settings
from vlmcap.miniature.scenes import write_scene_dataset
from vlmcap.models.arguments import ModelArguments
from vlmcap.models.load import load_model, load_processor, lora_config
from vlmcap.training.inherited import complete
from vlmcap.training.trainer_arguments import (
    CaptionDPOConfig,
    CaptionerTrainingArguments,
    CaptionGRPOConfig,
    CaptionSFTConfig,
    FoodTrainingArguments,
)

TRAINING = {
    "sft_qwen2vl_jp": CaptionSFTConfig,
    "dpo_qwen2vl_jp": CaptionDPOConfig,
    "grpo_qwen2vl_jp": CaptionGRPOConfig,
    "sft_blip_vi": CaptionerTrainingArguments,
    "sft_vit_gpt2_food": FoodTrainingArguments,
    "sft_vit_llama_food": CaptionerTrainingArguments,
}


@pytest.fixture
def parser_of(repo_root, tmp_path) -> Callable[[str], Callable]:
    """parser_of("sft_blip_vi")("base.yaml", "--seed", "1"): the recipe's dataclasses, as `main` has them."""

    def parser_of(recipe: str):
        spec = importlib.util.spec_from_file_location(recipe, repo_root / f"recipes/{recipe}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)

        def parse(config: Path | str, *overrides: str):
            command = ["--config", str(config), "--output_dir", str(tmp_path), *overrides]
            *others, settings = TrlParser(module.ARGUMENTS).parse_args_and_config(command)
            return *others, complete(TRAINING[recipe], settings)

        return parse

    return parser_of


@pytest.fixture
def without_meteor(monkeypatch):
    """METEOR's Java takes eight seconds for each file of scores; the Qwen2-VL round trip has it."""
    monkeypatch.setenv("VLMCAP_METEOR_JAR", "none.jar")


@pytest.fixture(scope="session")
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
