"""Let people judge captions: write blinded pages to rate them on, and count what comes back.

    python scripts/human_eval.py export --systems base=outputs/base/predictions.jsonl \\
        adapter=outputs/adapter/predictions.jsonl --dataset you/stair-captions --split test --image_dir images \\
        --images 100 --raters 3 --output_dir outputs/human

draws 100 images and writes a page for each rater (`rater_1.html`, ...: one file that works offline, on a computer or a
phone), `key.json`, which says who wrote what and stays with you, and the pictures. A rater compares every pair of
systems on every image (left, right, about the same), then rates every caption: fluency and adequacy from 1 to 5,
whether it names something that is not there. With two systems that is 100 comparisons and 200 ratings, about an hour
and a half; `--pairs_per_image`, `--ratings_per_image` and `--shared_images` make it less. The same arguments write the
same files.

    python scripts/human_eval.py import answers_*.json --key outputs/human/key.json --output_dir outputs/human/result

checks the files the raters sent back, prints win rates, ratings, agreement and a line for each rater, and writes
`human_eval.json` (the same with every figure), `human_eval.md` and `preferences.jsonl`, and prints the command that
trains an adapter on those (recipes/dpo_qwen2vl_jp.py). TRL's DPOTrainer takes them with a vision model too. Their
pictures are paths as seen from the folder where this was run:

    from datasets import load_dataset
    from trl import DPOConfig, DPOTrainer

    rows = load_dataset("json", data_files="outputs/human/result/preferences.jsonl", split="train")
    DPOTrainer(model, args=DPOConfig(max_length=None), processing_class=processor, train_dataset=rows).train()

Files that are not finished count with what they have, and the output says so.
"""

import hashlib
import json
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from vlmcap.arguments import run_main
from vlmcap.evaluation.caption_files import read_predictions
from vlmcap.human.report import markdown, report
from vlmcap.human.study import HumanError, draw, preference_rows, read_answers, read_key


@dataclass
class ExportArguments:
    systems: list[str] = field(
        metadata={"help": "Systems to compare, each as NAME=FILE (predictions.jsonl or COCO's results list)."}
    )
    dataset: str = field(metadata={"help": "Caption dataset with the images: Hub id or folder."})
    output_dir: str = field(metadata={"help": "Folder to write, e.g. outputs/human."})
    split: str = field(default="test", metadata={"help": "Split of the dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of the dataset on the Hub."})
    image_dir: str | None = field(
        default=None, metadata={"help": "Folder of the photographs, for a dataset published without them."}
    )
    images: int = field(default=100, metadata={"help": "How many images are drawn."})
    raters: int = field(default=3, metadata={"help": "How many pages are written, one for each rater."})
    seed: int = field(default=0, metadata={"help": "Seed of the drawing, of sides and orders."})
    shared_images: int | None = field(
        default=None,
        metadata={"help": "So many images go to every rater, each of the others to one alone. Default: all to all."},
    )
    pairs_per_image: int | None = field(
        default=None, metadata={"help": "Pairs of systems compared on an image, in turn. Default: every pair."}
    )
    ratings_per_image: int | None = field(
        default=None, metadata={"help": "Systems rated on an image, in turn. Default: every system."}
    )


@dataclass
class ImportArguments:
    answers: list[str] = field(metadata={"help": "Files the raters sent back; the option's name may be left out."})
    key: str = field(metadata={"help": "key.json of the export."})
    output_dir: str = field(metadata={"help": "Folder to write, e.g. outputs/human/result."})
    prompt: str | None = field(
        default=None,
        metadata={
            "help": "The user's text after the image in preferences.jsonl. Default: the prompt that all predictions"
            " were made with, by the run records beside them."
        },
    )
    resamples: int = field(default=10_000, metadata={"help": "Bootstrap resamples of the images."})
    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap."})


def export_pages(args: ExportArguments) -> None:
    files = {}
    for system in args.systems:
        name, equals, path = system.partition("=")
        if not (name and equals and path) or name in files:
            raise HumanError(f"--systems {system!r} must be NAME=FILE, with a name of its own")
        files[name] = path

    from vlmcap.data.images import dataset_record, load_captions
    from vlmcap.human.page import write_export
    from vlmcap.provenance import public_name

    captions, records, prompts = {}, {}, set()
    for name, path in files.items():
        captions[name] = read_predictions(path)
        content = Path(path).read_bytes()
        records[name] = {"predictions": public_name(path), "sha256": hashlib.sha256(content).hexdigest()}
        record = Path(path).with_suffix(".run.json")
        record = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
        prompts.add(record.get("prompt"))
        records[name]["adapter"] = record.get("model", {}).get("adapter")
    dataset = dataset_record(args.dataset, args.split, args.dataset_revision)
    rows = load_captions(args.dataset, args.split, args.image_dir, dataset["revision"])
    places = {str(image_id): place for place, image_id in enumerate(rows["image_id"])}
    key = draw(
        captions,
        list(places),
        args.images,
        args.raters,
        args.seed,
        args.shared_images,
        args.pairs_per_image,
        args.ratings_per_image,
    )
    key |= {"systems": records, "dataset": dataset, "prompt": prompts.pop() if len(prompts) == 1 else None}
    write_export(key, {image_id: rows[places[image_id]] for image_id in key["images"]}, args.output_dir)
    for rater, entry in key["raters"].items():
        kinds = [key["items"][item]["kind"] for item in entry["order"]]
        page = Path(args.output_dir) / f"rater_{rater}.html"
        size = page.stat().st_size / 1e6
        print(f"{page}: {kinds.count('preference')} comparisons, {kinds.count('rating')} ratings, {size:.1f} MB")
    print(
        f"{len(key['identical'])} comparisons are not asked, both captions being the same; they will count as ties.\n"
        f"Keep {args.output_dir}/key.json; the raters must not see it."
    )


def import_answers(args: ImportArguments) -> None:
    key = read_key(args.key)
    answers, warnings = read_answers(args.answers, key)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    result = report(key, answers, args.resamples, args.seed)
    result |= {"warnings": warnings} | {name: key[name] for name in ("systems", "dataset", "settings")}
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    (output / "human_eval.json").write_text(json.dumps(result, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (output / "human_eval.md").write_text(markdown(result) + "\n", encoding="utf-8")
    print(f"{markdown(result)}\n\nwritten to {output}: human_eval.json, human_eval.md")

    prompt = args.prompt or key["prompt"]
    if prompt is None:
        print(
            "preferences.jsonl is not written: the predictions do not record one prompt for all systems. Give"
            " --prompt, the text after the image with which the model that is to learn from it is asked."
        )
        return
    pictures = {image_id: str(Path(args.key).parent / place) for image_id, place in key["pictures"].items()}
    rows = preference_rows(key, answers, prompt, pictures)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (output / "preferences.jsonl").write_text(lines, encoding="utf-8")
    print(f"preferences.jsonl: {len(rows)} rows")
    if rows:
        command = training_command(key, result, output / "preferences.jsonl", prompt)
        print(f"To train an adapter on them:\n\n    {command}")


def training_command(key: dict, result: dict, preferences: Path, prompt: str) -> str:
    """The command that trains on preferences, from the adapter that the raters preferred."""
    wins = result["preferences"]["systems"]
    best_first = sorted(key["systems"], key=lambda name: wins[name]["win_rate"] or 0, reverse=True)
    adapters = [key["systems"][name].get("adapter") for name in best_first]
    adapter = next(filter(None, adapters), "ADAPTER")
    words = ["accelerate", "launch", "recipes/dpo_qwen2vl_jp.py", "--adapter", adapter]
    words += ["--preferences", str(preferences), "--dataset", key["dataset"]["id"], "--prompt", prompt]
    return shlex.join(words)


def with_answers(words: list[str]) -> list[str]:
    """The command line of import, with `--answers` before paths without an option: other options take one value."""
    if "--answers" in words:
        return words
    values = [before.startswith("--") and "=" not in before for before in ["", *words[:-1]]]
    alone = [not (value or word.startswith("-")) for word, value in zip(words, values, strict=True)]
    bare = [word for word, is_alone in zip(words, alone, strict=True) if is_alone]
    rest = [word for word, is_alone in zip(words, alone, strict=True) if not is_alone]
    return [*rest, "--answers", *bare] if bare else rest


if __name__ == "__main__":
    verb, words = (sys.argv[1] if len(sys.argv) > 1 else None), sys.argv[2:]
    if verb == "export":
        run_main(export_pages, __doc__, ExportArguments, command_line=words)
    elif verb == "import":
        run_main(import_answers, __doc__, ImportArguments, command_line=with_answers(words))
    else:
        print(__doc__ + "\nOptions: human_eval.py export --help, human_eval.py import --help")
        sys.exit(0 if verb in ("-h", "--help") else "error: the first word must be export or import")
