r"""Score captions against references, with signatures, intervals and a register-normalised variant, into metrics.json.

    python scripts/eval_captioning.py --predictions predictions.jsonl --references references.jsonl \
        --output metrics.json

    # against a split of a published dataset (Hub id or local folder; its images are not needed)
    python scripts/eval_captioning.py --predictions predictions.jsonl --dataset USER/stair-captions --split test

    # of a dataset in several languages, the English captions; those of style polite
    python scripts/eval_captioning.py --predictions run/languages/en/predictions.jsonl --dataset data/multi --keys en
    python scripts/eval_captioning.py --predictions predictions.jsonl --dataset data/multi --keys ja/polite

    # English titles; Vietnamese; another Japanese dictionary; text that is tokenised already, tokens between spaces
    python scripts/eval_captioning.py --predictions p.jsonl --references r.jsonl --tokenizer english
    python scripts/eval_captioning.py --predictions p.jsonl --references r.jsonl --tokenizer vietnamese
    python scripts/eval_captioning.py --predictions p.jsonl --references r.jsonl --tokenizer ipadic
    python scripts/eval_captioning.py --predictions p.jsonl --references r.jsonl --tokenizer none

    # CIDEr-D with the idf of another split, so that scores of any set of images compare: write it once, use it often
    python scripts/eval_captioning.py --dataset USER/stair-captions --split train --write_idf stair_idf.json
    python scripts/eval_captioning.py --predictions p.jsonl --references r.jsonl --idf stair_idf.json

    # SPICE (English) and JaSPICE (Japanese) by services of your own
    python scripts/eval_captioning.py --predictions p.jsonl --references r.jsonl --tokenizer english \
        --spice_url http://127.0.0.1:8080/spice
    python scripts/eval_captioning.py --predictions p.jsonl --references r.jsonl --jaspice_url http://127.0.0.1:2115

    # BLEU, ROUGE-L, CIDEr-D and chrF alone, as fast as can be; all of it from a file
    python scripts/eval_captioning.py --predictions p.jsonl --references r.jsonl --no_meteor --resamples 0 \
        --no_register_normalised
    python scripts/eval_captioning.py --config eval.yaml

    # COCO's own formats: a results list, and the annotations of the images in it
    python scripts/eval_captioning.py --predictions results.json --references captions_val2014.json --tokenizer english

Predictions are lines {"image_id", "caption"} or COCO's results [{"image_id", "caption"}, ...], references lines
{"image_id", "captions": [...]} or COCO's captions_*.json; both must be of the same images. If the run record that
scripts/infer_baseline.py writes is beside the predictions (predictions.run.json), it goes into metrics.json too.

METEOR is Java's: `java` on the PATH and meteor-1.5.jar, named by $VLMCAP_METEOR_JAR or found in an installed
pycocoevalcap. It knows English. It has no Japanese, and is computed on characters there, which its signature says.
A score that cannot be computed is left out, and a notice says why.
"""

from dataclasses import dataclass, field
from pathlib import Path

from vlmcap.arguments import run_main
from vlmcap.atomic_write import check_output
from vlmcap.evaluation.caption_files import ScoreError, read_references
from vlmcap.evaluation.scoring import ScoreOptions, score_table, write_idf, write_metrics
from vlmcap.evaluation.tokenise import TOKENIZERS, tokenizer_of


@dataclass
class EvalArguments:
    predictions: str | None = field(
        default=None, metadata={"help": 'Predictions, JSONL lines {"image_id", "caption"} or COCO\'s results list.'}
    )
    references: str | None = field(
        default=None,
        metadata={
            "help": 'References, JSONL lines {"image_id", "captions"} or COCO\'s captions_*.json; or give --dataset.'
        },
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
    tokenizer: str = field(
        default="unidic-lite",
        metadata={"help": f"One of {', '.join(TOKENIZERS)}; with --keys of other languages their own."},
    )
    output: str = field(default="metrics.json", metadata={"help": "Where to write the scores."})
    write_idf: str | None = field(
        default=None, metadata={"help": "Write the references' idf to this file, for --idf, and score nothing."}
    )


def main(args: EvalArguments, options: ScoreOptions) -> None:
    if (args.references is None) == (args.dataset is None):
        raise ScoreError("give the references either as --references FILE or as --dataset ID_OR_DIR, one of the two")
    if (args.predictions is None) == (args.write_idf is None):
        raise ScoreError("give either --predictions FILE to score or --write_idf FILE to write an idf, one of the two")
    if args.keys and args.dataset is None:
        raise ScoreError(f"--keys {args.keys[0]} chooses captions of a --dataset: give one, or leave it out")
    check_output(Path(args.write_idf or args.output))
    tokenizer = tokenizer_of(args.keys[0].split("/")[0], args.tokenizer) if args.keys else args.tokenizer
    if args.references is not None:
        references = read_references(args.references)
    else:
        from vlmcap.data.images import dataset_references  # takes 3 s, which scoring from files need not wait for

        key = args.keys[0] if args.keys else None
        references = dataset_references(args.dataset, args.split, args.dataset_revision, key, args.keys)
    if args.write_idf:
        frequencies = write_idf(references, args.write_idf, tokenizer)
        print(f"{len(frequencies.ngrams):,} n-grams of {frequencies.images:,} images written to {args.write_idf}")
        return
    metrics = write_metrics(args.predictions, references, args.output, tokenizer, options=options)
    print(score_table(metrics))
    for notice in metrics["notices"]:
        print(f"notice: {notice}")
    print(f"written to {args.output}")


if __name__ == "__main__":
    run_main(main, __doc__, EvalArguments, ScoreOptions)
