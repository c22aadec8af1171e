"""Pushes a trained adapter to the Hugging Face Hub: adapter, processor, metrics.json and its model card.

    hf auth login                                                                    # once; a token that may write
    python scripts/push_adapter.py --adapter_dir outputs/sft_qwen2vl_jp/adapter --repo_id user/qwen2vl-2b-jp-captions
    python scripts/push_adapter.py --adapter_dir outputs/demo/adapter --repo_id user/miniature-jp --public

The repository is private unless --public is given. The folder is the one that recipes/sft_qwen2vl_jp.py leaves as
OUTPUT_DIR/adapter; checkpoints and optimizer state in it stay on this machine. A push that fails loses nothing and
can be repeated.
"""

import sys
from dataclasses import dataclass, field

from vlmcap.arguments import parse
from vlmcap.reporting.cards import load_snippet, read_metrics
from vlmcap.reporting.hub import push_adapter


@dataclass
class PushArguments:
    adapter_dir: str = field(metadata={"help": "Folder with adapter, processor and metrics.json: OUTPUT_DIR/adapter."})
    repo_id: str = field(metadata={"help": "Model repository on the Hub, as user/name; made if it does not exist."})
    public: bool = field(default=False, metadata={"help": "Make the repository public. Without it, it is private."})


def main() -> None:
    (args,) = parse(__doc__, PushArguments)
    try:
        url = push_adapter(args.adapter_dir, args.repo_id, private=not args.public)
    except (FileNotFoundError, RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"Pushed to {url} ({'public' if args.public else 'private'}). To load it:\n")
    print(load_snippet(read_metrics(args.adapter_dir)["model"]["id"], args.repo_id))


if __name__ == "__main__":
    main()
