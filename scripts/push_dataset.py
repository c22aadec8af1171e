"""Pushes a dataset that scripts/publish_datasets.py wrote to the Hugging Face Hub: card and shards in one commit.

    hf auth login                                                                    # once; a token that may write
    python scripts/push_dataset.py --folder outputs/yj --repo_id USER/yj-captions             # private unless --public

`publish_datasets.py --push_to_hub` does the same when it has built the dataset; this sends one that is there already,
and finishes a push that failed. Files that the Hub has already are not sent again; shards of an earlier build that are
not in the folder are deleted in the same commit.
"""

from dataclasses import dataclass, field

from vlmcap.arguments import run_main


@dataclass
class PushDatasetArguments:
    folder: str = field(metadata={"help": "The folder that scripts/publish_datasets.py wrote, its --output_dir."})
    repo_id: str = field(metadata={"help": "Dataset on the Hub, as USER/NAME; made if it does not exist."})
    public: bool = field(default=False, metadata={"help": "Make the dataset public. Without it, it is private."})


def main(args: PushDatasetArguments) -> None:
    from vlmcap.data.publish import push

    url, revision = push(args.folder, args.repo_id, private=not args.public)
    print(f"pushed to {url} (revision {revision})")


if __name__ == "__main__":
    run_main(main, __doc__, PushDatasetArguments)
