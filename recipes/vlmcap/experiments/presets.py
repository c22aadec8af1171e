"""What the benchmarks compare, and sizes of the models that they build with random weights. Imports nothing heavy."""

# Widths and depths. The real ones are those of Qwen2-VL-2B-Instruct's config.json. The proxy keeps its proportions:
# vision encoder and projector are 30% of the parameters, the ViT is half as large as the language layers. The tiny one
# shows that a program runs, and nothing else.
PRESETS = {
    "cpu_proxy": {
        "text": {"hidden_size": 512, "intermediate_size": 2992, "num_hidden_layers": 11, "vocab_size": 32_000}
        | {"num_attention_heads": 8, "num_key_value_heads": 2, "mrope_section": [8, 12, 12]},
        "vision": {"depth": 16, "embed_dim": 384, "num_heads": 6, "mlp_ratio": 4},
        "load_in_4bit": False,
    },
    "qwen2vl_2b": {
        "text": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 151_936}
        | {"num_attention_heads": 12, "num_key_value_heads": 2, "mrope_section": [16, 24, 24]},
        "vision": {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4},
        "load_in_4bit": True,
    },
    "tiny": {
        "text": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 8, "vocab_size": 640}
        | {"num_attention_heads": 2, "num_key_value_heads": 1, "mrope_section": [8, 12, 12]},
        "vision": {"depth": 2, "embed_dim": 64, "num_heads": 2, "mlp_ratio": 2},
        "load_in_4bit": True,
    },
}

# What scripts/bench_training.py compares, by method: TRL's trainer as a user would set it up, a leaner one, and this
# project's. The number is that of steps a round.
ENGINES = {
    "sft": {"trl_stock": 1, "trl_stock_lean": 1, "shared_prefix": 3, "shared_prefix_flex": 3},
    "dpo": {"trl_dpo": 1, "trl_dpo_lean": 1, "dpo": 3},
    "grpo": {"trl_grpo": 1, "trl_grpo_lean": 1, "grpo": 3},
}
# Prompts of captions in several languages.
PROMPTS = {
    "ja": "この画像を日本語で短く説明してください。",
    "en": "Describe this image briefly.",
    "vi": "Mô tả hình ảnh này.",
}
