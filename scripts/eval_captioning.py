r"""Score captions against references: BLEU-1..4, ROUGE-L and CIDEr-D into a metrics.json.

    python scripts/eval_captioning.py --predictions predictions.jsonl --references references.jsonl \
        --tokenizer unidic-lite --output metrics.json

    # against a split of a published dataset (Hub id or local folder; its images are not needed)
    python scripts/eval_captioning.py --predictions predictions.jsonl --dataset USER/stair-captions --split test

    # text that is tokenised already, tokens between spaces
    python scripts/eval_captioning.py --predictions p.jsonl --references r.jsonl --tokenizer none

    # the same from a file
    python scripts/eval_captioning.py --config eval.yaml

Predictions are lines {"image_id", "caption"}, references lines {"image_id", "captions": [...]}. If the run record that
scripts/infer_baseline.py writes lies beside the predictions (predictions.run.json), it goes into metrics.json too.
5,000 images with five references each take two to three seconds on one CPU core.
"""

import sys
from dataclasses import dataclass, field

from vlmcap.arguments import parse
from vlmcap.evaluation.scoring import ScoreError, dataset_references, read_references, score_table, write_metrics
from vlmcap.evaluation.tokenise import TokenizerError


@dataclass
class EvalArguments:
    predictions: str = field(metadata={"help": 'Predictions, JSONL lines {"image_id", "caption"}.'})
    references: str | None = field(
        default=None, metadata={"help": 'References, JSONL lines {"image_id", "captions"}; or give --dataset.'}
    )
    dataset: str | None = field(
        default=None, metadata={"help": "Published dataset with the references instead: Hub id or local folder."}
    )
    split: str = field(default="test", metadata={"help": "Split of --dataset."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Revision of --dataset on the Hub."})
    tokenizer: str = field(
        default="unidic-lite", metadata={"help": "unidic-lite, characters or none (split at spaces)."}
    )
    output: str = field(default="metrics.json", metadata={"help": "Where to write the scores."})


def main(args: EvalArguments) -> None:
    if (args.references is None) == (args.dataset is None):
        raise ScoreError("give the references either as --references FILE or as --dataset ID_OR_DIR, one of the two")
    if args.references is not None:
        references = read_references(args.references)
    else:
        references = dataset_references(args.dataset, args.split, args.dataset_revision)
    print(score_table(write_metrics(args.predictions, references, args.output, args.tokenizer)))
    print(f"written to {args.output}")


if __name__ == "__main__":
    try:
        main(*parse(__doc__, EvalArguments))
    except (OSError, ScoreError, TokenizerError) as error:
        sys.exit(f"error: {error}")
