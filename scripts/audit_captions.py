r"""Audit captions: things that are not in the picture, words about persons, broken form, copies of training captions.

    python scripts/audit_captions.py --predictions run/predictions.jsonl --references references.jsonl \
        --output run/audit.json

    # what is in a picture out of COCO's instance annotations too, as CHAIR does (Karpathy's test split: val2014)
    python scripts/audit_captions.py --predictions run/predictions.jsonl --dataset USER/stair-captions \
        --instances annotations/instances_val2014.json --output run/audit.json

    # overlap with the training data; pictures are compared when they are embedded or in --image_dir
    python scripts/audit_captions.py --predictions run/predictions.jsonl --dataset data/stair \
        --train_dataset data/stair --image_dir data/images --output run/audit.json

    # hold flagged captions back for a person to look at
    python scripts/audit_captions.py --predictions run/predictions.jsonl --references references.jsonl \
        --review_queue run/review --hold_back hallucination non_japanese

    # a mitigation beside what it should fix: the same audit of both, rates side by side
    python scripts/audit_captions.py --compare run/audit.json run_japanese_only/audit.json

    # of a dataset in several languages, the English captions
    python scripts/audit_captions.py --predictions run/languages/en/predictions.jsonl --dataset data/multi --keys en

    # the miniature's scenes
    python scripts/audit_captions.py --predictions outputs/demo/adapter/predictions.jsonl \
        --dataset outputs/demo/dataset --lexicon scenes_ja --instances outputs/demo/scenes/instances.json \
        --output outputs/demo/adapter/audit.json

The prompt and max_new_tokens come from the run record beside the predictions (predictions.run.json). --tokenizer, the
model's, finds the captions that were cut at max_new_tokens; without it the last word of a caption tells.
5,000 captions with five references each take 20 seconds on one CPU core.
"""

from dataclasses import dataclass, field
from pathlib import Path

from vlmcap.arguments import run_main
from vlmcap.atomic_write import check_output
from vlmcap.captioning.arguments import HELD_BACK
from vlmcap.errors import UserError


@dataclass
class AuditArguments:
    predictions: str | None = field(
        default=None, metadata={"help": 'Captions, JSONL lines {"image_id", "caption"} or COCO\'s results list.'}
    )
    references: str | None = field(
        default=None, metadata={"help": 'References, JSONL {"image_id", "captions"} or COCO\'s captions_*.json.'}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Published dataset with the references instead: Hub id or local folder."}
    )
    split: str = field(default="test", metadata={"help": "Split of --dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of --dataset on the Hub."})
    keys: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Of a --dataset in several languages: the key of the captions, e.g. ja/polite or en; then other"
            " keys of the run, if captions belong to them instead."
        },
    )
    language: str | None = field(
        default=None,
        metadata={
            "help": "Of the captions, e.g. en; default: of --keys, else ja. The lexicons are for Japanese alone."
        },
    )
    instances: list[str] = field(
        default_factory=list, metadata={"help": "COCO's instance annotations, instances_*.json, of all the images."}
    )
    lexicon: str = field(default="coco_ja", metadata={"help": "Things: coco_ja, scenes_ja or a YAML file."})
    persons: str = field(default="persons_ja", metadata={"help": "Words about persons: persons_ja or a YAML file."})
    train_dataset: str | None = field(
        default=None, metadata={"help": "What the model was trained on, for the overlap."}
    )
    train_split: str = field(default="train", metadata={"help": "Split of --train_dataset."})
    image_dir: str | None = field(default=None, metadata={"help": "Folder of the pictures of both datasets."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "The model's: finds captions cut at max_new_tokens."}
    )
    review_queue: str | None = field(
        default=None, metadata={"help": "Folder for released.jsonl and held_back.jsonl, every caption in one of them."}
    )
    hold_back: list[str] = field(
        default_factory=lambda: list(HELD_BACK), metadata={"help": "Reasons for which a caption is held back."}
    )
    compare: list[str] = field(default_factory=list, metadata={"help": "Print these audit.json side by side instead."})
    output: str = field(default="audit.json", metadata={"help": "Where to write the audit."})


def load_rows(dataset: str, split: str, image_dir: str | None):
    """A split with its pictures where they are available, without them otherwise; empty captions are left out."""
    from vlmcap.data import images

    rows = images.load_captions(dataset, split, image_dir) if image_dir else images.load_rows(dataset, split)
    return images.without_empty_captions(rows)[0]


def main(args: AuditArguments) -> None:
    if args.predictions is None and not args.compare:
        raise UserError("give --predictions FILE, or --compare with two audits")
    check_output(Path(args.output))

    from transformers import AutoTokenizer

    from vlmcap.data.images import dataset_references
    from vlmcap.evaluation.audit import write_audit
    from vlmcap.evaluation.audit_document import audit_table, read_audit, write_review_queue
    from vlmcap.evaluation.caption_files import read_references

    if args.compare:
        print(audit_table({path: read_audit(path) for path in args.compare}))
        return
    references = read_references(args.references) if args.references else None
    if args.dataset and references is None:
        key = args.keys[0] if args.keys else None
        references = dataset_references(args.dataset, args.split, args.dataset_revision, key, args.keys)
    train_rows = load_rows(args.train_dataset, args.train_split, args.image_dir) if args.train_dataset else None
    test_rows = load_rows(args.dataset, args.split, args.image_dir) if args.train_dataset and args.dataset else None
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer, trust_remote_code=False) if args.tokenizer else None
    audit = write_audit(
        args.predictions,
        references,
        args.output,
        lexicon=args.lexicon,
        persons=args.persons,
        instances=args.instances,
        train_rows=train_rows,
        test_rows=test_rows,
        count_tokens=tokenizer and (lambda caption: len(tokenizer(caption, add_special_tokens=False).input_ids)),
        language=args.language or (args.keys[0].split("/")[0] if args.keys else "ja"),
    )
    print(audit_table({args.predictions: audit}))
    print(f"written to {args.output}")
    if args.review_queue:
        released, held_back = write_review_queue(args.predictions, audit, args.review_queue, args.hold_back)
        print(f"{released:,} captions released, {held_back:,} held back: {args.review_queue}")


if __name__ == "__main__":
    run_main(main, __doc__, AuditArguments)
