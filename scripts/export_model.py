"""Merge an adapter into its base: one model that transformers loads alone, and that vLLM serves.

    python scripts/export_model.py --adapter outputs/demo/adapter --output_dir outputs/demo/merged --check_images 200

    hf auth login                                                                       # once; a token that may write
    python scripts/export_model.py --adapter you/name --output_dir outputs/merged --dtype float16 \\
        --push_to_hub --repo_id you/name-merged

An adapter that was trained on the base in NF4 is merged into the weights that NF4 left, made numbers again: merged
into the published weights it would be another model. What the base was is read from the adapter's metrics.json. The
memory that it takes is printed first: about 6 GiB for Qwen2-VL-2B in float16 or bfloat16, 10 GiB in float32.

In output_dir it leaves model.safetensors (or several files), config.json, processor, tokenizer and chat template,
generation_config.json with the beams of the measured run, the model card, merge.json (what was merged, and the check)
and the adapter's metrics and audit, from which the card is printed.

--check_images N captions N pictures with the adapter on its base and with the merged model, and counts equal captions:
those of the dataset that the adapter was scored on, of --dataset, or of a folder of pictures (--image_dir alone). The
same command with a folder that holds this export checks and pushes without merging again.

Adapters of recipes/sft_qwen2vl_jp.py and recipes/sft_blip_vi.py are merged. recipes/sft_vit_gpt2_food.py leaves a
whole model already, and a ViT with a Llama is a class that transformers does not have.
"""

from dataclasses import dataclass, field

from vlmcap.arguments import run_main
from vlmcap.errors import UserError


@dataclass
class ExportArguments:
    adapter: str = field(metadata={"help": "Trained adapter: folder with adapter and metrics.json, or Hub id."})
    output_dir: str = field(metadata={"help": "Folder of the merged model; must be empty or hold this export."})
    adapter_revision: str | None = field(default=None, metadata={"help": "Revision of the adapter on the Hub."})
    model: str | None = field(
        default=None, metadata={"help": "Its base, Hub id or folder; default the one that the adapter names."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "float16, bfloat16 or float32; default the one that the adapter was scored in.",
            "choices": ["float16", "bfloat16", "float32"],
        },
    )
    check_images: int = field(
        default=0, metadata={"help": "Caption N pictures with the adapter and the merged model and count equal ones."}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Their dataset: Hub id or folder; default the one the adapter was scored on."}
    )
    split: str = field(default="test", metadata={"help": "Their split."})
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder of the dataset's photographs; without --dataset, any pictures."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Push the folder to --repo_id."})
    repo_id: str | None = field(default=None, metadata={"help": "Model repository on the Hub, as user/name."})
    public: bool = field(default=False, metadata={"help": "Make the repository public. Without it, it is private."})


def main(args: ExportArguments) -> None:
    if args.push_to_hub and not args.repo_id:
        raise UserError("--push_to_hub needs --repo_id user/name")
    if args.check_images < 0:
        raise UserError(f"--check_images {args.check_images}: give a number of pictures, or 0 for no check")

    from vlmcap.steps.export import export_model

    export_model(args)


if __name__ == "__main__":
    run_main(main, __doc__, ExportArguments, interrupted="Nothing is in --output_dir unless the merge was complete.")
