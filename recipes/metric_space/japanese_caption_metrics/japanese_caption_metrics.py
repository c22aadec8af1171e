"""Scores of image captions with their signatures, as a metric of Hugging Face's evaluate.

metric = evaluate.load("recipes/metric_space/japanese_caption_metrics")
metric.compute(predictions=["赤い車が走っている"], references=[["赤い車が道を走る", "道路を走る車"]])
"""

import datasets
import evaluate

from vlmcap.evaluation.scoring import ScoreOptions, score

DESCRIPTION = """
BLEU-1..4, ROUGE-L, CIDEr-D and chrF of image captions, with a signature each. Japanese is split into words by MeCab
with unidic-lite 1.0.8; on the same tokens the scores equal those of pycocoevalcap 1.2 to 1e-9.
"""
INPUTS = """
Args:
    predictions: list of str, one caption an image.
    references: list of lists of str, one or more reference captions an image; a single one may come without its list.
    tokenizer: unidic-lite (default), ipadic, characters, vietnamese, english, or none (tokenised already).
    resamples: bootstrap resamples for 95% intervals; 0 (default) leaves them out.
    register_normalised: score a second time with polite endings made plain on both sides; default False.
    meteor: METEOR on characters, if Java and meteor-1.5.jar are there; default False.
Returns:
    bleu_1 .. bleu_4, rouge_l, chrf (0 to 1) and cider_d (0 to 10) as float; signatures; intervals; counts; notices.
    CIDEr-D takes its document frequencies from all references given: a single image scores 0.
"""
CITATION = """
@inproceedings{vedantam2015cider, title={CIDEr: Consensus-based Image Description Evaluation}, author={Vedantam,
Ramakrishna and Zitnick, C. Lawrence and Parikh, Devi}, booktitle={CVPR}, year={2015}}
"""


def check_text(caption: object, where: str) -> None:
    if not isinstance(caption, str):
        raise ValueError(f"{where} must be a text, but is {caption!r:.60}")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds {caption[error.start]!r}, half of a surrogate pair, which no UTF-8 text can: read the text"
            " again in its right encoding"
        ) from error


class JapaneseCaptionMetrics(evaluate.Metric):
    """Scores of captions, one an image, against one or more references."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
            ),
        )

    def add(self, *, prediction=None, reference=None, **kwargs):
        """As `add_batch`, for one image."""
        given = {"predictions": prediction, "references": reference} | kwargs
        self.add_batch(predictions=[given["predictions"]], references=[given["references"]])

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """As the parent's, with a reference that is given without its list.

        Raises:
            ValueError: a caption is not a text, or not UTF-8: with half of a surrogate pair.
        """
        if any(given is None or isinstance(given, str) for given in (predictions, references)):
            raise ValueError("predictions and references: give two lists with an entry for each image")
        references = [[given] if isinstance(given, str) else given for given in references]
        for image, caption in enumerate(predictions):
            check_text(caption, f"predictions[{image}]")
        for image, captions in enumerate(references):
            for number, caption in enumerate(captions):
                check_text(caption, f"references[{image}][{number}]")
        super().add_batch(predictions=predictions, references=references, **kwargs)

    def _compute(
        self,
        predictions,
        references,
        tokenizer="unidic-lite",
        resamples=0,
        register_normalised=False,
        meteor=False,
    ):
        ids = [str(image) for image in range(len(predictions))]
        document = score(
            dict(zip(ids, predictions, strict=True)),
            dict(zip(ids, references, strict=True)),
            tokenizer,
            ScoreOptions(resamples=resamples, register_normalised=register_normalised, meteor=meteor),
        )
        del document["per_image"]
        return document.pop("scores") | document
