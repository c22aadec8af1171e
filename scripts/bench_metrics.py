"""Time our BLEU, ROUGE-L and CIDEr-D, tokenising included, against pycocoevalcap's three on the same tokens.

    python scripts/bench_metrics.py                              # 5,000 images x 5 references; about 1 minute
    python scripts/bench_metrics.py --json bench_metrics.json    # and writes the figures
    python scripts/bench_metrics.py --images 500 --rounds 1

The captions are made up from a seed: Japanese sentences of subject, place, object and action, as varied as human ones
in length and repetition. Every round times, in turn,

    ours                raw text to scores: tokenising with unidic-lite, then the three metrics
    pycocoevalcap       its three scorers alone, on tokens that are joined already: its tokenising is not counted
    pycocoevalcap+tok   the same with the tokenising that ours uses, for information

and a median over the rounds is reported: `speedup_vs_pycocoevalcap` is pycocoevalcap / ours, the bound is 4.
`bootstrap_1000_seconds` is the time of 1,000 resamples of BLEU, ROUGE-L, CIDEr-D and chrF, the bound is 20 seconds; it
is computed from per-image statistics, whose own time is printed beside it. The scores of both must be equal to 1e-9.
It exits with 1 when a bound is missed.

pycocoevalcap is needed for this alone: `pip install pycocoevalcap`.
"""

import contextlib
import importlib.util
import io
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import numpy as np

from vlmcap.arguments import run_main
from vlmcap.evaluation.bootstrap import resampled_scores
from vlmcap.evaluation.external import chrf_statistics
from vlmcap.evaluation.metrics import caption_statistics
from vlmcap.evaluation.scoring import quick_scores
from vlmcap.evaluation.tokenise import tokenise

LEAST_SPEEDUP, MAX_BOOTSTRAP_SECONDS = 4, 20
SUBJECTS = (
    "男性 女性 子供 犬 猫 男の子 女の子 二人の男性 若い女性 数人の人々 キリン 馬 白い犬 サーファー 野球選手".split()
)
ADJECTIVES = "赤い 青い 白い 黒い 大きな 小さな 古い 茶色い 緑の 木製の 金属製の たくさんの".split()
THINGS = (
    "車 自転車 傘 ピザ ケーキ ソファ テーブル 時計 電車 バス 標識 スケートボード ボール ノートパソコン 花瓶".split()
)
PLACES = "公園 道路 海岸 台所 部屋 草原 駅 通り 川 雪山 店 競技場 空港 庭 湖".split()
RELATIONS = "のそばで の上で の前で の中で の隣で の下で".split()
ACTIONS = "立って 座って 走って 歩いて 見て 遊んで 食べて 眠って 飛んで 待って".split()


@dataclass
class BenchArguments:
    images: int = field(default=5000, metadata={"help": "Number of images."})
    references_per_image: int = field(default=5, metadata={"help": "References of each image."})
    rounds: int = field(default=3, metadata={"help": "Rounds, of which the median is taken."})
    seed: int = field(default=0, metadata={"help": "Seed of the captions and of the bootstrap."})
    json: str | None = field(default=None, metadata={"help": "Write the figures to this file."})


def made_up_caption(generator: random.Random, topic: list[str]) -> str:
    """A Japanese sentence; captions of one image share the words of its topic, more or less."""
    subject, place, thing = (
        word if generator.random() < 0.6 else generator.choice(words)
        for word, words in zip(topic, (SUBJECTS, PLACES, THINGS), strict=True)
    )
    where = f"{generator.choice(ADJECTIVES)}{place}{generator.choice(RELATIONS)}"
    what = f"{generator.choice(ADJECTIVES)}{thing}{generator.choice(['を持って', 'と一緒に', 'に乗って', 'の近くで'])}"
    parts = [where, f"{subject}が", what if generator.random() < 0.7 else "", f"{generator.choice(ACTIONS)}いる"]
    return "".join(parts) + generator.choice(["", "。", "様子"])


def made_up_corpus(images: int, references_per_image: int, seed: int) -> tuple[dict, dict]:
    """Predictions and references, image id -> caption or captions."""
    generator = random.Random(seed)
    predictions, references = {}, {}
    for image in range(images):
        topic = [generator.choice(words) for words in (SUBJECTS, PLACES, THINGS)]
        predictions[str(image)] = made_up_caption(generator, topic)
        references[str(image)] = [made_up_caption(generator, topic) for _ in range(references_per_image)]
    return predictions, references


def pycocoevalcap_scores(hypotheses: list[list[str]], references: list[list[list[str]]]) -> tuple[float, list[float]]:
    """Seconds of pycocoevalcap's BLEU, ROUGE-L and CIDEr-D on tokens, and the six scores."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    results = {image: [" ".join(tokens)] for image, tokens in enumerate(hypotheses)}
    truths = {image: [" ".join(tokens) for tokens in refs] for image, refs in enumerate(references)}
    with contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        bleus, _ = Bleu(4).compute_score(truths, results, verbose=0)
        rouge, _ = Rouge().compute_score(truths, results)
        cider, _ = Cider().compute_score(truths, results)
        seconds = time.perf_counter() - start
    return seconds, [*map(float, bleus), float(rouge), float(cider)]


def timed(function: Callable, *args) -> tuple[float, object]:
    start = time.perf_counter()
    result = function(*args)
    return time.perf_counter() - start, result


def bench(args: BenchArguments) -> dict:
    """All figures, as they go into the JSON file."""
    from vlmcap import provenance

    predictions, references = made_up_corpus(args.images, args.references_per_image, args.seed)
    flat = [caption for captions in references.values() for caption in captions]

    def tokens() -> tuple[list, list]:
        each = iter(tokenise(flat))
        return tokenise(predictions.values()), [[next(each) for _ in captions] for captions in references.values()]

    tokenise(["辞書を読み込む"])
    ours, theirs, tokenising = [], [], []
    for _ in range(args.rounds):
        seconds, scores = timed(quick_scores, predictions, references)
        ours.append(seconds)
        seconds, (hypotheses, reference_tokens) = timed(tokens)
        tokenising.append(seconds)
        seconds, expected = pycocoevalcap_scores(hypotheses, reference_tokens)
        theirs.append(seconds)

    words = caption_statistics(hypotheses, reference_tokens)
    chrf_seconds, chrf_rows = timed(chrf_statistics, list(predictions.values()), list(references.values()))
    rows = {
        "bleu": np.hstack([words.correct, words.guess, words.reference_length[:, None]]),
        "rouge_l": words.rouge_l,
        "cider_d": words.cider_d,
        "chrf": chrf_rows,
    }
    bootstrap_seconds, _ = timed(resampled_scores, rows, 1000, args.seed)
    median = statistics.median
    return {
        "images": args.images,
        "references_per_image": args.references_per_image,
        "tokens": sum(map(len, hypotheses)) + sum(len(tokens) for refs in reference_tokens for tokens in refs),
        "distinct_captions": len({*predictions.values(), *flat}),
        "ours_with_tokenising_seconds": median(ours),
        "tokenising_seconds": median(tokenising),
        "pycocoevalcap_seconds": median(theirs),
        "pycocoevalcap_with_tokenising_seconds": median(a + b for a, b in zip(theirs, tokenising, strict=True)),
        "speedup_vs_pycocoevalcap": median(theirs) / median(ours),
        "largest_difference": max(abs(a - b) for a, b in zip(scores.values(), expected, strict=True)),
        "chrf_statistics_seconds": chrf_seconds,
        "bootstrap_1000_seconds": bootstrap_seconds,
        "rounds": {"ours": ours, "tokenising": tokenising, "pycocoevalcap": theirs},
        "versions": provenance.versions()
        | {name: metadata.version(name) for name in ("pycocoevalcap", "sacrebleu", "numpy")},
        "hardware": provenance.hardware(),
        "commit": provenance.git_commit(),
        "created": provenance.now(),
    }


def main(args: BenchArguments) -> None:
    if importlib.util.find_spec("pycocoevalcap") is None:
        sys.exit("error: pycocoevalcap is not installed, and this compares with it: pip install pycocoevalcap")
    figures = bench(args)
    for name, value in figures.items():
        if isinstance(value, int | float):
            print(f"{name:<40} {value:,.4g}" if isinstance(value, float) else f"{name:<40} {value:,}")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    missed = []
    if figures["speedup_vs_pycocoevalcap"] < LEAST_SPEEDUP:
        missed.append(f"less than {LEAST_SPEEDUP} times as fast as pycocoevalcap")
    if figures["bootstrap_1000_seconds"] > MAX_BOOTSTRAP_SECONDS:
        missed.append(f"1,000 resamples took more than {MAX_BOOTSTRAP_SECONDS} s")
    if figures["largest_difference"] > 1e-9:
        missed.append("scores differ from pycocoevalcap's")
    if missed:
        sys.exit(f"error: {'; '.join(missed)}")


if __name__ == "__main__":
    run_main(main, __doc__, BenchArguments)
