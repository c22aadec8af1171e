"""Write a page that captions pictures with an adapter, and push it as a Space of the Hub.

    hf auth login                                                                          # a token that may write
    python scripts/publish_space.py --adapter you/name --repo_id you/demo                  # write and push it
    python scripts/publish_space.py --adapter outputs/sft_qwen2vl_jp/adapter               # only write it, to try it

The page takes an upload or the camera, shows the caption, the alternatives of the beam search and the limits from the
model card. It is one folder (--output_dir) that needs no vlmcap, for an adapter of recipes/sft_qwen2vl_jp.py:

    pip install -r outputs/space/requirements.txt && python outputs/space/app.py

(in an environment of its own: gradio needs an older Pillow than this project is tested with). It loads what the
adapter's metrics.json says was measured, as a rule the base in NF4 with the adapter on it, and needs no GPU.

The Space is private unless --public is given. For a private adapter, put a token that may read it into the Space's
secret HF_TOKEN.
"""

from dataclasses import dataclass, field

from vlmcap.arguments import run_main


@dataclass
class PublishSpaceArguments:
    adapter: str = field(metadata={"help": "Adapter on the Hub, as you/name; without --repo_id also a folder."})
    repo_id: str | None = field(
        default=None, metadata={"help": "Space on the Hub to push to, as you/name. Without it, nothing is pushed."}
    )
    adapter_revision: str | None = field(default=None, metadata={"help": "Revision of the adapter on the Hub."})
    output_dir: str = field(default="outputs/space", metadata={"help": "Folder to write the page to."})
    public: bool = field(default=False, metadata={"help": "Make the Space public. Without it, it is private."})


def main(args: PublishSpaceArguments) -> None:
    from vlmcap.upload import check_push_rights

    if args.repo_id:
        check_push_rights(args.repo_id, "--repo_id", "space", private=not args.public, asked="--repo_id")

    from vlmcap.reporting.caption_space import push_caption_space, write_caption_space

    folder = write_caption_space(args.adapter, args.output_dir, args.adapter_revision)
    print(f"written to {folder}")
    if args.repo_id:
        print(f"pushed to {push_caption_space(folder, args.repo_id, private=not args.public)}")


if __name__ == "__main__":
    run_main(main, __doc__, PublishSpaceArguments)
