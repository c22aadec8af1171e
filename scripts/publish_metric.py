"""Write the metric of recipes/metric_space as a folder of its own, which needs no vlmcap, and push it as a Space.

    python scripts/publish_metric.py --output_dir outputs/metric                          # only writes the folder
    python -c 'import evaluate; evaluate.load("outputs/metric/japanese_caption_metrics")'  # and this loads it

    hf auth login                                                                          # a token that may write
    python scripts/publish_metric.py --output_dir outputs/metric --push_to_hub --repo_id you/japanese_caption_metrics
    python -c 'import evaluate; evaluate.load("you/japanese_caption_metrics")'

The Space is private unless --public is given, and then only who may read it can load the metric. The folder and its
script have the name of the repository, as evaluate demands.
"""

import sys
from dataclasses import dataclass, field

from vlmcap.arguments import run_main


@dataclass
class PublishMetricArguments:
    output_dir: str = field(metadata={"help": "The metric's folder is made in this one."})
    push_to_hub: bool = field(default=False, metadata={"help": "Push it as the Space --repo_id."})
    repo_id: str | None = field(default=None, metadata={"help": "Space on the Hub, as you/name."})
    public: bool = field(default=False, metadata={"help": "Make the Space public. Without it, it is private."})


def main(args: PublishMetricArguments) -> None:
    if args.push_to_hub and not args.repo_id:
        sys.exit("error: --push_to_hub needs --repo_id you/name")

    from vlmcap.reporting.metric_space import push_metric_space, write_metric_space

    folder = write_metric_space(args.output_dir, args.repo_id)
    print(f"written to {folder}")
    if args.push_to_hub:
        print(f"pushed to {push_metric_space(folder, args.repo_id, private=not args.public)}")


if __name__ == "__main__":
    run_main(main, __doc__, PublishMetricArguments)
