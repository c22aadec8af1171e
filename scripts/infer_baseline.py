"""Caption a split with a model as it comes, or with an adapter on it: batched beam search of width 3, resumable.

Zero-shot Qwen2-VL-2B-Instruct on the held-out YJ Captions split, then its scores:

    python scripts/infer_baseline.py --model Qwen/Qwen2-VL-2B-Instruct --dataset you/yj-captions-ja --split test \\
        --image_dir images --output outputs/qwen2vl_yj/predictions.jsonl
    python scripts/eval_captioning.py --predictions outputs/qwen2vl_yj/predictions.jsonl \\
        --dataset you/yj-captions-ja --split test --output outputs/qwen2vl_yj/metrics.json

The same with a trained adapter, from the Hub or a folder:

    python scripts/infer_baseline.py --model Qwen/Qwen2-VL-2B-Instruct --adapter you/qwen2vl-jp --load_in_4bit \\
        --dataset you/stair-captions-ja --split test --image_dir images --output outputs/adapter/predictions.jsonl

A model of the table (recipes/configs/baselines.yaml): its id, commit, prompt, licence and what it has seen come from
there. It is asked with the one short Japanese prompt that all share, or with its own:

    python scripts/infer_baseline.py --list
    python scripts/infer_baseline.py --baseline paligemma_3b_mix --prompt_kind native \\
        --dataset you/stair-captions-ja --image_dir images --output outputs/paligemma/predictions.jsonl

BLIP and BLIP-2 take no prompt: they only caption, in English.

Some need an environment of their own, which is built with uv and kept, and run code of their authors. That happens
with --trust_remote_code alone, and at a commit that you name (after reading it). They are experimental: their runners
have never seen the model's weights.

    python scripts/infer_baseline.py --baseline asagi_2b --trust_remote_code --model_revision COMMIT \\
        --dataset you/stair-captions-ja --image_dir images --output outputs/asagi/predictions.jsonl

Several prompts of one model, loaded once: predictions and scores of each in a folder, and a table of all:

    python scripts/infer_baseline.py --baseline qwen2_5_vl_7b --prompts recipes/configs/prompts/qwen2_5_vl_7b.yaml \\
        --dataset you/stair-captions-ja --split validation --max_images 500 --image_dir images \\
        --output_dir outputs/prompts

The scores' words are Japanese unless `--tokenizer english` or `--tokenizer vietnamese` says otherwise, as for the
studies of recipes/configs/prompts/qwen2_5_vl_7b_food.yaml and qwen2_5_vl_7b_vi.yaml.

Beside predictions.jsonl it writes predictions.run.json: model, dataset, prompt, decoding, hardware, seconds, versions.
An interrupted run continues when the same command is run again. Several GPUs share the work under `accelerate
launch`, except for models in an environment of their own.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from vlmcap.arguments import run_main
from vlmcap.atomic_write import check_output
from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.errors import UserError
from vlmcap.evaluation.tokenise import TOKENIZERS
from vlmcap.models.arguments import check_attention
from vlmcap.places import as_typed_here

TABLE = Path(__file__).resolve().parents[1] / "recipes/configs/baselines.yaml"


@dataclass
class Arguments:
    model: str | None = field(
        default=None,
        metadata={
            "help": "Model: Hub id or folder, e.g. Qwen/Qwen2-VL-2B-Instruct. With --baseline: where its weights are,"
            " instead of the id of the table."
        },
    )
    baseline: str | None = field(default=None, metadata={"help": "Key of a row of the table; see --list."})
    dataset: str | None = field(
        default=None, metadata={"help": "Caption dataset made by publish_datasets.py: Hub id or folder."}
    )
    output: str | None = field(
        default=None, metadata={"help": "Predictions file to write, e.g. outputs/base/predictions.jsonl."}
    )
    split: str = field(default="test", metadata={"help": "Split to caption."})
    model_revision: str | None = field(
        default=None,
        metadata={
            "help": "Revision of the model on the Hub. Left out: the table's, or the commit that the adapter was"
            " trained on, or else the main branch's; its commit is recorded."
        },
    )
    adapter: str | None = field(default=None, metadata={"help": "Trained adapter: Hub id or folder."})
    adapter_revision: str | None = field(default=None, metadata={"help": "Revision of the adapter on the Hub."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of the dataset on the Hub."})
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder of the photographs, for a dataset published without them."}
    )
    max_images: int | None = field(default=None, metadata={"help": "Caption the first N images only."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Language model in NF4, as adapters of this project are trained and scored."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "sdpa, eager, flash_attention_2 or _3; default sdpa where the model has it (BLIP has not)."},
    )
    min_pixels: int | None = field(
        default=None, metadata={"help": "Smallest image in pixels; default the processor's. Qwen-VL family only."}
    )
    max_pixels: int | None = field(
        default=None, metadata={"help": "Largest image in pixels; default the processor's. Qwen-VL family only."}
    )
    saw_stair: str | None = field(
        default=None,
        metadata={"help": "Whether the model was trained on STAIR: train, no, unknown or translated. Recorded."},
    )
    saw_yj: str | None = field(default=None, metadata={"help": "The same for YJ Captions."})
    saw_coco: str | None = field(default=None, metadata={"help": "The same for COCO: its pictures or its captions."})
    prompt_kind: str | None = field(
        default=None,
        metadata={
            "help": "native (the model's own, of the table), common (the table's for all) or given (--prompt). Left"
            " out: given with --model; common with --baseline, unless --prompt is set.",
            "choices": ["native", "common", "given"],
        },
    )
    prompts: str | None = field(
        default=None,
        metadata={"help": "YAML file, name -> prompt: caption with each and compare. Needs --output_dir."},
    )
    output_dir: str | None = field(default=None, metadata={"help": "With --prompts: here a folder for each."})
    tokenizer: str = field(
        default="unidic-lite", metadata={"help": f"Words of the scores of --prompts: {', '.join(TOKENIZERS)}."}
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the code of the model's repository, at a commit of 40 hexadecimal digits only."},
    )
    table: str | None = field(
        default=None, metadata={"help": "Table of baselines; default recipes/configs/baselines.yaml."}
    )
    env_dir: str = field(
        default="~/.cache/vlmcap/envs", metadata={"help": "Where environments of isolated models are built and kept."}
    )
    list: bool = field(default=False, metadata={"help": "Print the table of baselines and end."})

    def __post_init__(self):
        if self.attn_implementation:
            check_attention(self.attn_implementation)


def main(args: Arguments, generation_args: GenerationArguments) -> None:
    where = "output_dir" if args.prompts else "output"
    if not args.list and not ((args.model or args.baseline) and args.dataset and getattr(args, where)):
        raise UserError(f"--model or --baseline, --dataset and --{where} are needed; --help shows examples")
    if args.output:
        check_output(Path(args.output))

    import torch
    from accelerate import PartialState

    from vlmcap.captioning.baselines import (
        BaselineError,
        check_remote_code,
        choose_prompts,
        read_table,
        saw_record,
        table_text,
        without_prompt,
    )
    from vlmcap.captioning.isolated import generate_isolated, isolated_record, start_isolated
    from vlmcap.captioning.predictions import model_record
    from vlmcap.captioning.split import SplitFile, caption_split
    from vlmcap.data.images import check_images, dataset_record, load_captions, references_of
    from vlmcap.evaluation.scoring import check_references
    from vlmcap.models.load import (
        check_adapter_of,
        load_adapter,
        load_model,
        load_processor,
        resolve_revision,
        takes_prompt,
    )
    from vlmcap.models.weights import COMMIT, read_adapter

    PartialState(cpu=not torch.cuda.is_available())  # else processes on CPUs would each believe to be alone
    table = read_table(args.table or TABLE)
    if args.list:
        print(table_text(table))
        return
    row = table.row(args.baseline) if args.baseline else None
    name = args.model or row.id
    revision = args.model_revision or (row.revision if row and not args.model else None)
    trusted = check_remote_code(name, revision, row, args.trust_remote_code)
    unfit = ("adapter", "load_in_4bit", "min_pixels", "max_pixels")
    if row and row.runs == "isolated" and (given := [f"--{option}" for option in unfit if getattr(args, option)]):
        raise BaselineError(f"{row.key} runs in its own environment, where there is no {', '.join(given)}")
    adapter = read_adapter(args.adapter, args.adapter_revision) if args.adapter else None
    if adapter and not revision and COMMIT.fullmatch(adapter.config.revision or ""):
        revision = adapter.config.revision
    revision = resolve_revision(name, revision)
    if adapter:
        check_adapter_of(adapter, name, revision, trusted)
    prompts = choose_prompts(table, row, generation_args.prompt, args.prompt_kind, args.prompts)

    dataset = dataset_record(args.dataset, args.split, args.dataset_revision)
    rows = load_captions(args.dataset, args.split, args.image_dir, dataset["revision"])
    if args.max_images:
        rows = rows.select(range(min(args.max_images, len(rows))))
    if args.prompts:
        check_references(references_of(rows), args.tokenizer, f"{args.dataset} ({args.split})")
    check_images(rows, args.split)
    said = {"STAIR": args.saw_stair, "YJ": args.saw_yj, "COCO": args.saw_coco}
    record = {"dataset": dataset, "saw": saw_record(row, said, adapter=bool(adapter))}

    if row and row.runs == "isolated":
        isolated = start_isolated(row, name, revision, generation_args, Path(args.env_dir))
        record["model"] = isolated_record(isolated, name, revision)
    else:
        isolated = None
        # The adapter's own processor, when there is one: it carries the image size of the training.
        source = (adapter.name, adapter.revision) if adapter else (name, revision)
        trust_processor = trusted and not adapter
        processor = load_processor(*source, args.min_pixels, args.max_pixels, trust_processor)
        if not takes_prompt(processor):
            if generation_args.japanese_only or generation_args.avoid_words:
                raise BaselineError(f"{name} only captions: --japanese_only and --avoid_words cannot be used with it")
            prompts = without_prompt(name, generation_args.prompt, args.prompt_kind, args.prompts)
        model = load_model(name, revision, args.load_in_4bit, args.attn_implementation, trusted)
        if adapter:
            model = load_adapter(model, adapter.name, adapter.revision, revision)
        record["model"] = model_record(model, name, revision, args.adapter, adapter and adapter.revision)
    if row:
        record["model"] |= {"baseline": row.key, "license": row.license}
    files = []
    for folder, (kind, prompt) in prompts.items():
        output = Path(args.output_dir, folder, "predictions.jsonl") if args.prompts else Path(args.output)
        files.append(SplitFile(output, record | {"prompt_kind": kind}, replace(generation_args, prompt=prompt)))
    if isolated:
        with isolated:
            for file in files:
                generate_isolated(isolated, rows, file.path, file.args, file.record)
    else:
        caption_split(model, processor, rows, *files)
    if not PartialState().is_main_process:
        return
    if args.prompts:
        print(score_prompts(Path(args.output_dir), list(prompts), references_of(rows), args.tokenizer))
        return
    command = as_typed_here("python scripts/eval_captioning.py")
    print(
        f"{len(rows):,} captions in {args.output}; score them with\n  {command} --predictions {args.output} --dataset"
        f" {args.dataset} --split {args.split} --output {Path(args.output).parent}/metrics.json"
    )


def score_prompts(folder: Path, names: list[str], references: dict[str, list[str]], tokenizer: str) -> str:
    """Scores the predictions of every prompt of a study and returns a table of text, a line a prompt.

    Beside `<folder>/<name>/predictions.jsonl` it writes metrics.json, which `scripts/compare_runs.py` reads.

    Args:
        references: image id -> captions of the images that were captioned.

    Raises:
        ScoreError, TokenizerError: as `write_metrics` does.
    """
    from vlmcap.evaluation.scoring import SCORE_LABELS, write_metrics

    documents = {
        name: write_metrics(folder / name / "predictions.jsonl", references, folder / name / "metrics.json", tokenizer)
        for name in names
    }
    scores = [s for s in SCORE_LABELS if any(s in document["scores"] for document in documents.values())]
    width = max(len("prompt"), *map(len, names))
    lines = [f"{'prompt':<{width}}" + "".join(f"{SCORE_LABELS[score]:>10}" for score in scores)]
    for name, document in documents.items():
        values = (document["scores"].get(score) for score in scores)
        cells = ("-" if value is None else f"{value:.4f}" for value in values)
        lines.append(f"{name:<{width}}" + "".join(f"{cell:>10}" for cell in cells))
    files = " ".join(str(folder / name / "metrics.json") for name in names)
    command = as_typed_here(f"  python scripts/compare_runs.py {files}")
    return "\n".join([*lines, "", "With intervals and captions side by side:", command])


if __name__ == "__main__":
    again = "The same command continues where this one ended."
    run_main(main, __doc__, Arguments, GenerationArguments, interrupted=again)
