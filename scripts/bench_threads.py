"""Compare numbers of threads and ways to wait, on a quiet machine and beside two busy processes, all in one run.

    python scripts/bench_threads.py --json out.json                            # two CPU cores, quiet: 5 minutes
    python scripts/bench_threads.py --rounds 1 --seconds 2 --images 20         # a try

Run it on a machine that does nothing else: the busy processes it starts itself (two Python loops). Every setting is a
process of its own, or two, with its environment (10 GB of memory in all); they take turns, so that other work on the
machine slows all of them:

    one                    OMP_NUM_THREADS=1
    two                    OMP_NUM_THREADS=2, with the spinning that torch's OpenMP (libgomp) does by default
    two, spin 20000        and with GOMP_SPINCOUNT=20000: a waiting thread looks this many times, then sleeps
    two, spin 1000         and with 1000
    two, passive           and with OMP_WAIT_POLICY=PASSIVE: it sleeps at once

Three kinds of work are timed, in seconds a turn's unit, of which the median counts:

    train    a training step of `make demo`: the miniature in NF4, 3 images with 5 captions
    test     the same in two processes at a time, as `make test` runs the tests
    score    BLEU, ROUGE-L, CIDEr-D, chrF and 100 resamples of made-up captions of --images images

`busy` is slower than `quiet` by the factor in `slowdown`; a setting is bad when it is above 3 anywhere. Of those that
are not, `chosen` is the fastest: the geometric mean, over work and machine, of its time by the best time.
"""

import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vlmcap.arguments import run_main
from vlmcap.places import check_miniature

REPOSITORY = Path(__file__).resolve().parents[1]
SETTINGS = {
    "one": {"OMP_NUM_THREADS": "1"},
    "two": {"OMP_NUM_THREADS": "2"},
    "two, spin 20000": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "20000"},
    "two, spin 1000": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "1000"},
    "two, passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
}
WORK = ("train", "test", "score")
MACHINES = ("quiet", "busy")
BUSY_PROCESSES = 2
WORST_SLOWDOWN = 3


@dataclass
class BenchArguments:
    settings: list[str] = field(
        default_factory=lambda: list(SETTINGS), metadata={"help": f"Of {', '.join(map(repr, SETTINGS))}."}
    )
    rounds: int = field(default=3, metadata={"help": "Rounds; in each, every setting takes its turns."})
    seconds: float = field(default=2, metadata={"help": "A turn takes this long, and one step at least."})
    images: int = field(default=100, metadata={"help": "Images of the captions that are scored."})
    json: str | None = field(default=None, metadata={"help": "File to write the figures to."})


def main(args: BenchArguments) -> None:
    if unknown := [name for name in args.settings if name not in SETTINGS]:
        sys.exit(f"error: {unknown[0]!r} is none of {', '.join(SETTINGS)}")
    check_miniature(str(REPOSITORY / "recipes/miniatures/qwen2_vl"))
    with tempfile.TemporaryDirectory() as folder:
        result = bench(args, Path(folder))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2), encoding="utf-8")
    print_result(result)


# The processes that work ---------------------------------------------------------------------------------------------
def work(turns, folder: Path, images: int) -> None:
    """A process of a setting. For each (kind of work, seconds) that comes through `turns` it sends the seconds that
    each unit took; None ends it."""
    train, score = trainer_of(folder), scorer_of(images)
    train(0), score()  # what is done once at the first time
    turns.send("ready")
    while (turn := turns.recv()) is not None:
        kind, seconds = turn
        if kind == "score":
            times, begin = [], time.perf_counter()
            while not times or time.perf_counter() - begin < seconds:
                start = time.perf_counter()
                score()
                times.append(time.perf_counter() - start)
        else:
            times = train(seconds)
        turns.send(times)


def trainer_of(folder: Path):
    """train(seconds): steps of the demo for so long; returns the seconds that each took."""
    import datasets
    import yaml
    from transformers import PrinterCallback, TrainerCallback

    from vlmcap.data.images import load_captions
    from vlmcap.miniature.qwen2_vl import JAPANESE_PROMPT
    from vlmcap.miniature.scenes import scenes
    from vlmcap.models.load import ModelArguments, load_model, load_processor, lora_config
    from vlmcap.training.collator import BadImages
    from vlmcap.training.trainer import CaptionTrainer
    from vlmcap.training.trainer_arguments import CaptionSFTConfig

    demo = yaml.safe_load((REPOSITORY / "recipes/configs/sft_qwen2vl_jp/demo.yaml").read_text(encoding="utf-8"))
    folder.mkdir()
    rows = []
    for number, scene in enumerate(scenes(60, seed=0, held_out=False)):
        scene.draw().save(folder / f"{number}.png")
        rows.append({"image_id": number, "file_name": f"{number}.png", "captions": scene.japanese()})
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).to_parquet(folder / "data/train-00000-of-00001.parquet")

    class Turn(TrainerCallback):
        """Ends training when the turn is over; `times` are the seconds of its steps."""

        def on_train_begin(self, args, state, control, **kwargs):
            self.times, self.begin = [], time.perf_counter()
            self.last = self.begin

        def on_step_end(self, args, state, control, **kwargs):
            now = time.perf_counter()
            self.times.append(now - self.last)
            self.last = now
            control.should_training_stop = now - self.begin >= self.seconds
            control.should_log = False

    name = str(REPOSITORY / demo["model_name_or_path"])
    settings = ("per_device_train_batch_size", "captions_per_image", "learning_rate", "label_smoothing_factor", "seed")
    model = load_model(name)
    trainer = CaptionTrainer(
        model=model,
        args=CaptionSFTConfig(
            output_dir=str(folder / "run"),
            max_steps=100_000,
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            **{key: demo[key] for key in settings},
        ),
        rows=load_captions(str(folder / "data"), "train", image_dir=str(folder)),
        processing_class=load_processor(name, max_pixels=demo["max_pixels"]),
        prompt=JAPANESE_PROMPT,
        bad_images=BadImages(folder / "bad_images.jsonl", limit=0),
        peft_config=lora_config(model, ModelArguments(model_name_or_path=name)),
    )
    turn = Turn()
    trainer.add_callback(turn)
    trainer.remove_callback(PrinterCallback)

    def train(seconds: float) -> list[float]:
        turn.seconds = seconds
        trainer.train()
        return turn.times[1:] or turn.times  # the first has the data loader's start in it

    return train


def scorer_of(images: int):
    """score(): scores and resamples captions of so many images."""
    from vlmcap.evaluation.scoring import ScoreOptions, score
    from vlmcap.miniature.scenes import scenes

    drawn = list(scenes(images, seed=0, held_out=False))
    references = {str(number): scene.japanese() for number, scene in enumerate(drawn)}
    predictions = {str(number): scene.japanese(polite=True)[0] for number, scene in enumerate(drawn)}
    options = ScoreOptions(resamples=100, meteor=False)  # METEOR is a Java program, with threads of its own
    return lambda: score(predictions, references, options=options)


def spin() -> None:
    while True:
        pass


# The comparison ------------------------------------------------------------------------------------------------------
@contextmanager
def environment(variables: dict[str, str]):
    """The variables of a setting, for the processes that are started meanwhile."""
    names = {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ |= variables | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]
        os.environ |= before


@contextmanager
def busy(machine: str):
    """Two processes that compute without end, on a busy machine."""
    loops = [multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in range(BUSY_PROCESSES)]
    loops = loops if machine == "busy" else []
    try:
        for loop in loops:
            loop.start()
        time.sleep(1 if loops else 0)
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.join()


def bench(args: BenchArguments, folder: Path) -> dict:
    """All figures, as they go into the JSON file."""
    context = multiprocessing.get_context("spawn")
    workers = {}
    for number, name in enumerate(args.settings):
        workers[name] = []
        with environment(SETTINGS[name]):
            for copy in range(2):
                ours, theirs = context.Pipe()
                place = folder / f"{number}-{copy}"
                process = context.Process(target=work, args=(theirs, place, args.images), daemon=True)
                process.start()
                theirs.close()
                workers[name].append((process, ours))
        for _, turn in workers[name]:
            turn.recv()  # two at a time: ten that start together would take longer
    times = {name: {kind: {machine: [] for machine in MACHINES} for kind in WORK} for name in args.settings}
    for _ in range(args.rounds):
        for machine in MACHINES:
            with busy(machine):
                for kind in WORK:
                    for name in args.settings:
                        turns = [turn for _, turn in workers[name]][: 2 if kind == "test" else 1]
                        for turn in turns:
                            turn.send((kind, args.seconds))
                        for turn in turns:
                            times[name][kind][machine] += turn.recv()
    for pair in workers.values():
        for process, turn in pair:
            turn.send(None)
            process.join()
    return summary(times) | {"arguments": vars(args), "cores": os.cpu_count()}


def summary(times: dict) -> dict:
    """Medians and ratios of times[setting][work][machine], and the chosen setting."""
    rows = {
        name: {
            kind: {machine: statistics.median(seconds) for machine, seconds in machines.items()}
            | {"units": {machine: len(seconds) for machine, seconds in machines.items()}}
            for kind, machines in kinds.items()
        }
        for name, kinds in times.items()
    }
    for kinds in rows.values():
        for row in kinds.values():
            row["slowdown"] = row["busy"] / row["quiet"]
    best = {(kind, machine): min(rows[name][kind][machine] for name in rows) for kind in WORK for machine in MACHINES}
    costs = {
        name: math.exp(
            statistics.fmean(math.log(kinds[kind][machine] / least) for (kind, machine), least in best.items())
        )
        for name, kinds in rows.items()
    }
    worst = {name: max(row["slowdown"] for row in kinds.values()) for name, kinds in rows.items()}
    fit = [name for name in rows if worst[name] <= WORST_SLOWDOWN]
    return {
        "settings": {name: SETTINGS[name] for name in rows},
        "seconds": rows,
        "worst_slowdown": worst,
        "time_by_best": costs,
        "chosen": min(fit, key=costs.get) if fit else None,
    }


def print_result(result: dict) -> None:
    heads = [f"{kind} {column}" for kind in WORK for column in ("quiet", "busy", "slowdown")]
    print(f"{'':<18}" + "".join(f"{head:>15}" for head in heads) + f"{'by best':>9}")
    for name, kinds in result["seconds"].items():
        cells = [
            f"{kinds[kind][column]:>13.3f} s" if column != "slowdown" else f"{kinds[kind][column]:>14.1f}x"
            for kind in WORK
            for column in ("quiet", "busy", "slowdown")
        ]
        print(f"{name:<18}" + "".join(cells) + f"{result['time_by_best'][name]:>9.2f}")
    print(
        f"chosen: {result['chosen'] or f'none, all are more than {WORST_SLOWDOWN} times slower beside busy processes'}"
    )


if __name__ == "__main__":
    run_main(main, __doc__, BenchArguments)
