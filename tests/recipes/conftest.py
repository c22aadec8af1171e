import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
from trl import TrlParser

from vlmcap.training.inherited import complete
from vlmcap.training.trainer_arguments import (
    CaptionDPOConfig,
    CaptionerTrainingArguments,
    CaptionSFTConfig,
    FoodTrainingArguments,
)

TRAINING = {
    "sft_qwen2vl_jp": CaptionSFTConfig,
    "dpo_qwen2vl_jp": CaptionDPOConfig,
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
