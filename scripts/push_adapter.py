"""Pushes what a recipe trained to the Hugging Face Hub: adapter or whole model, processor, metrics.json, model card.

    hf auth login                                                                    # once; a token that may write
    python scripts/push_adapter.py --adapter_dir outputs/sft_qwen2vl_jp/adapter --repo_id user/qwen2vl-2b-jp-captions
    python scripts/push_adapter.py --adapter_dir outputs/sft_vit_gpt2_food/model --repo_id user/vit-gpt2-dishes
    python scripts/push_adapter.py --adapter_dir outputs/demo/adapter --repo_id user/miniature-jp --public

The repository is private unless --public is given. The folder is the one that a recipe leaves: OUTPUT_DIR/adapter with
adapter_model.safetensors, or OUTPUT_DIR/model of recipes/sft_vit_gpt2_food.py with a whole model.safetensors.
Checkpoints, optimizer state and pickled weights (.bin) in it stay on this machine. A push that fails loses nothing and
can be repeated.

What was trained on Llama 3.2 must be called Llama-something; its licence is fetched from the base's repository (or
taken from LICENSE.txt in the folder) and published beside it, as it demands.
"""

from dataclasses import dataclass, field

from vlmcap.arguments import run_main


@dataclass
class PushArguments:
    adapter_dir: str = field(
        metadata={"help": "Folder with weights, processor and metrics.json: OUTPUT_DIR/adapter, or /model."}
    )
    repo_id: str = field(metadata={"help": "Model repository on the Hub, as user/name; made if it does not exist."})
    public: bool = field(default=False, metadata={"help": "Make the repository public. Without it, it is private."})


def main(args: PushArguments) -> None:
    from vlmcap.reporting.cards import read_metrics
    from vlmcap.reporting.hub import push_adapter
    from vlmcap.reporting.snippets import load_snippet

    url = push_adapter(args.adapter_dir, args.repo_id, private=not args.public)
    print(f"Pushed to {url} ({'public' if args.public else 'private'}). To load it:\n")
    print(load_snippet(read_metrics(args.adapter_dir), args.repo_id))


if __name__ == "__main__":
    run_main(main, __doc__, PushArguments)
