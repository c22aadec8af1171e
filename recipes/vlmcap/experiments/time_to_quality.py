"""What scripts/bench_time_to_quality.py measures and draws: trainings of the miniature, seconds a step, curves."""

import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path

import datasets
import torch
import yaml
from matplotlib.figure import Figure
from transformers import PrinterCallback, TrainerCallback

from vlmcap import provenance
from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.captioning.stream import caption_images
from vlmcap.data.arguments import PublishArguments
from vlmcap.data.images import load_captions, open_image
from vlmcap.data.publish import publish
from vlmcap.evaluation.scoring import quick_scores
from vlmcap.miniature.scenes import write_scene_dataset
from vlmcap.models.arguments import ModelArguments
from vlmcap.models.load import load_model, load_processor, lora_config
from vlmcap.places import ROOT
from vlmcap.training.collator import BadImages
from vlmcap.training.trainer import CaptionTrainer
from vlmcap.training.trainer_arguments import CaptionSFTConfig

DEMO = ROOT / "recipes/configs/sft_qwen2vl_jp/demo.yaml"
MINIATURE = ROOT / "recipes/miniatures/qwen2_vl"
SEEDS = (42, 43, 44)  # of LoRA's weights, dropout and the order of captions
# Learning rate and steps of the left panel: the demo's before this measurement, which may change demo.yaml.
SAME_RATE, SAME_STEPS = 5e-3, 300
REACHED = (2.0, 3.0, 4.0, 4.5)  # CIDEr-D


@dataclass(frozen=True)
class Batch:
    """What a step is made of. An image has five captions; two at a time are 2, 2 and 1 of them."""

    engine: str
    images: int
    captions_per_image: int

    @property
    def captions(self) -> float:
        """Captions a step, on average."""
        return self.images * 5 / -(-5 // self.captions_per_image)

    @property
    def name(self) -> str:
        return f"{self.engine.replace('_', ' ')}, {self.images} x {self.captions_per_image}"


REFERENCE, ONE_CAPTION = Batch("reference", 15, 1), Batch("shared_prefix", 15, 1)
TWO_CAPTIONS, ALL_CAPTIONS = Batch("shared_prefix", 9, 2), Batch("shared_prefix", 3, 5)
LARGE = Batch("shared_prefix", 15, 5)
SAME = (REFERENCE, ONE_CAPTION, TWO_CAPTIONS, ALL_CAPTIONS)  # 15 captions a step
# (batch, steps) -> learning rates. With one caption an image, shared prefix learns to the bit what the reference
# learns: it needs no rates of its own. 600 steps of 3 images and 150 of 15 take about as long as 300 of the reference.
GRID = {
    (REFERENCE, 300): (2.5e-3, 5e-3, 1e-2),
    (ONE_CAPTION, 300): (5e-3,),
    (TWO_CAPTIONS, 300): (2.5e-3, 5e-3, 1e-2),
    (ALL_CAPTIONS, 300): (2.5e-3, 5e-3, 1e-2),
    (ALL_CAPTIONS, 600): (2.5e-3, 5e-3),
    (LARGE, 150): (2.5e-3, 5e-3, 1e-2),
    (LARGE, 300): (2.5e-3, 5e-3),
}
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {
    REFERENCE: "#000000",
    ONE_CAPTION: "#56B4E9",
    TWO_CAPTIONS: "#009E73",
    ALL_CAPTIONS: "#E69F00",
    LARGE: "#CC79A7",
}


@dataclass(frozen=True)
class Training:
    batch: Batch
    steps: int
    learning_rate: float
    seed: int

    def record(self) -> dict:
        return asdict(self.batch) | {"steps": self.steps, "learning_rate": self.learning_rate, "seed": self.seed}


def build_dataset(folder: Path) -> None:
    """The demo's dataset in folder/dataset, as `make demo` builds it."""
    if (folder / "dataset").exists():
        return
    scenes = folder / "scenes"
    write_scene_dataset(scenes, train=2000, validation=200, test=200)
    publish(
        PublishArguments(
            source="stair",
            tokenizer=str(MINIATURE),
            annotations=[str(scenes / "stair_train.json"), str(scenes / "stair_val.json")],
            images=str(scenes / "images"),
            yj_annotations=[str(scenes / "yj.json")],
            val_ids=str(scenes / "val_ids.txt"),
            test_ids=str(scenes / "test_ids.txt"),
            output_dir=str(folder / "dataset"),
            card="scenes",
            license="cc0-1.0",
        )
    )


class Bench:
    """The demo's model, data and settings, and trainers on them."""

    def __init__(self, args):
        self.args, self.folder = args, Path(args.output_dir)
        self.settings = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
        self.model_args = self.read(ModelArguments, model_name_or_path=str(MINIATURE))
        self.generation_args = self.read(GenerationArguments)
        dataset = str(self.folder / "dataset")
        train = load_captions(dataset, "train")
        self.train = train.select([i for i, in_yj in enumerate(train["in_yj"]) if not in_yj])  # as the recipe does
        self.test = load_captions(dataset, "test").select(range(self.settings["max_test_images"]))
        bounds = (self.model_args.min_pixels, self.model_args.max_pixels)
        self.processor = load_processor(str(MINIATURE), None, *bounds)

    def read(self, kind: type, **more):
        """A dataclass filled from demo.yaml and `more`."""
        names = {f.name for f in fields(kind)}
        return kind(**{name: value for name, value in self.settings.items() if name in names} | more)

    def trainer(self, training: Training) -> CaptionTrainer:
        batch = training.batch
        settings = self.read(
            CaptionSFTConfig,
            output_dir=str(self.folder / "trainer"),
            shared_prefix=batch.engine == "shared_prefix",
            per_device_train_batch_size=batch.images,
            captions_per_image=batch.captions_per_image,
            learning_rate=training.learning_rate,
            max_steps=training.steps,
            seed=training.seed,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        model = load_model(str(MINIATURE), None, self.model_args.load_in_4bit, self.model_args.attn_implementation)
        trainer = CaptionTrainer(
            model=model,
            args=settings,
            rows=self.train,
            processing_class=self.processor,
            prompt=self.generation_args.prompt,
            bad_images=BadImages(self.folder / "bad_images.jsonl", limit=0),
            peft_config=lora_config(model, self.model_args),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def cider_d(self, model, rows: datasets.Dataset) -> float:
        """Score of a model that is in training, and stays so."""
        model.eval()
        pictures = (open_image(row) for row in rows)
        captions = [said for (said,) in caption_images(model, self.processor, pictures, self.generation_args)]
        model.train()
        ids = [str(image_id) for image_id in rows["image_id"]]
        references = dict(zip(ids, rows["captions"], strict=True))
        return quick_scores(dict(zip(ids, captions, strict=True)), references)["cider_d"]

    def learn(self, training: Training) -> dict:
        """One training: its curve on the first `test_images`, its final score on all test images of the demo."""
        commit = provenance.git_commit()  # of the code that runs, whatever is committed meanwhile
        trainer = self.trainer(training)
        curve = Curve(self, training.steps)
        trainer.add_callback(curve)
        trainer.train()
        record = training.record() | {"curve": curve.points, "cider_d": self.cider_d(trainer.model, self.test)}
        return record | {"commit": commit, "created": provenance.now()}

    def time_steps(self) -> dict:
        """Seconds a step of every batch, all in turns."""
        rounds, steps = self.args.timing_rounds, self.args.timing_steps
        # A turn is a call of `train`. Its first step begins with preparations, so that its end starts the clock.
        batches = dict.fromkeys(batch for batch, _ in GRID)
        trainers = {batch.name: self.trainer(Training(batch, steps + 1, SAME_RATE, SEEDS[0])) for batch in batches}
        turns = {name: [] for name in trainers}
        for number in range(rounds + 1):
            for name, trainer in trainers.items():
                clock = StepClock()
                trainer.add_callback(clock)
                trainer.train()
                trainer.remove_callback(clock)
                if number:  # round 0 warms up
                    turns[name].append((clock.ends[-1] - clock.ends[0]) / steps)
                    print(f"round {number}: {name:<24}{turns[name][-1]:9.4f} s a step", flush=True)
        medians = {name: statistics.median(seconds) for name, seconds in turns.items()}
        record = {"cores": torch.get_num_threads(), "commit": provenance.git_commit(), "created": provenance.now()}
        return {"seconds_a_step": medians, "turns": turns} | record


class Curve(TrainerCallback):
    """CIDEr-D at regular intervals, the last step included."""

    def __init__(self, bench: Bench, steps: int):
        self.bench, self.every = bench, steps / bench.args.points
        self.points = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step // self.every > (state.global_step - 1) // self.every:
            rows = self.bench.test.select(range(self.bench.args.test_images))
            self.points.append({"step": state.global_step, "cider_d": self.bench.cider_d(model, rows)})


class StepClock(TrainerCallback):
    """The moments at which steps end."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())


def read_runs(path: Path) -> dict[Training, dict]:
    """Finished trainings."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    runs = {}
    for run in map(json.loads, lines):
        batch = Batch(run["engine"], run["images"], run["captions_per_image"])
        runs[Training(batch, run["steps"], run["learning_rate"], run["seed"])] = run
    return runs


def best_rates(runs: dict[Training, dict]) -> dict[tuple[Batch, int], float]:
    """The learning rate of the highest final score, by the first seed."""
    return {
        key: max(rates, key=lambda rate: runs[Training(*key, rate, SEEDS[0])]["cider_d"])
        for key, rates in GRID.items()
    }


def learn_all(trainings: list[Training], args) -> dict[Training, dict]:
    """Runs what is not in runs.jsonl yet, writing every training there when it is finished. Returns all of them."""
    path = Path(args.output_dir) / "runs.jsonl"
    runs = read_runs(path)
    todo = [training for training in trainings if training not in runs]
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(learn, training, args) for training in todo]
        for number, future in enumerate(as_completed(futures), 1):
            run = future.result()
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")
            name = f"{run['engine']}, {run['images']} x {run['captions_per_image']}, {run['steps']} steps"
            print(f"{number}/{len(todo)}: {name} at {run['learning_rate']}: CIDEr-D {run['cider_d']:.2f}", flush=True)
    return read_runs(path)


def learn(training: Training, args) -> dict:
    """In a worker process."""
    torch.set_num_threads(1)
    return Bench(args).learn(training)


def summarise(runs: dict[Training, dict], timing: dict, args) -> dict:
    """The JSON document."""
    best = best_rates(runs)
    configurations = []
    for (batch, steps), rates in GRID.items():
        seconds = timing["seconds_a_step"][batch.name]
        for rate in rates:
            mine = [runs[t] for seed in SEEDS if (t := Training(batch, steps, rate, seed)) in runs]
            curve = []
            for points in zip(*(run["curve"] for run in mine), strict=True):
                step, scores = points[0]["step"], [point["cider_d"] for point in points]
                curve.append({"step": step, "seconds": step * seconds, "captions": step * batch.captions})
                curve[-1] |= {"cider_d": statistics.mean(scores), "lowest": min(scores), "highest": max(scores)}
            configurations.append(
                {"name": batch.name, **asdict(batch), "steps": steps, "learning_rate": rate}
                | {"best": rate == best[batch, steps], "seeds": len(mine)}
                | {"seconds_a_step": seconds, "seconds": steps * seconds, "captions": steps * batch.captions}
                | {"cider_d": statistics.mean(run["cider_d"] for run in mine)}
                | {"cider_d_of_seeds": [run["cider_d"] for run in mine]}
                | {"seconds_to": {s: next((p["seconds"] for p in curve if p["cider_d"] >= s), None) for s in REACHED}}
                | {"curve": curve}
            )
    return {
        "configurations": configurations,
        "runs": list(runs.values()),
        "timing": timing,
        "settings": asdict(args) | {"seeds": SEEDS, "demo": yaml.safe_load(DEMO.read_text(encoding="utf-8"))},
        "hardware": provenance.hardware(),
        "versions": provenance.versions() | {"matplotlib": metadata.version("matplotlib")},
        "commit": provenance.git_commit(),
        "created": provenance.now(),
    }


def plot(result: dict, path: Path) -> None:
    """The two panels, as SVG."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    same, best = figure.subplots(1, 2, sharey=True)
    configurations = result["configurations"]
    draw(same, [c for c in configurations if same_settings(c)], settings=False)
    # One caption an image is the reference's curve at the pace of the left panel.
    draw(best, [c for c in configurations if c["best"] and c["name"] != ONE_CAPTION.name], settings=True)
    for axes in (same, best):
        axes.set_xlabel(f"seconds of training, {result['timing']['cores']} CPU cores")
        axes.set(xlim=0, ylim=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    same.set_ylabel(f"CIDEr-D, {result['settings']['test_images']} test scenes")
    same.set_title(f"Same learning settings: 15 captions a step, {SAME_STEPS} steps, rate {SAME_RATE:g}", fontsize=10)
    best.set_title("Each at its best learning rate", fontsize=10)
    figure.suptitle(
        "Time to quality of a miniature model on drawn scenes (not Qwen2-VL)\n"
        "3 x 5: three images a step with five captions each; bands go from the lowest to the highest seed",
        fontsize=11,
    )
    figure.savefig(path, metadata={"Date": None})


def same_settings(configuration: dict) -> bool:
    settings = (configuration["steps"], configuration["learning_rate"])
    return configuration["name"] in {batch.name for batch in SAME} and settings == (SAME_STEPS, SAME_RATE)


def draw(axes, configurations: list[dict], settings: bool) -> None:
    """Means of the seeds as lines, lowest to highest as bands, names (and settings) in a column on the right."""
    colours = {batch.name: colour for batch, colour in COLOURS.items()}
    configurations = sorted(configurations, key=lambda c: c["curve"][-1]["cider_d"])
    column = 1.06 * max(c["seconds"] for c in configurations)
    height = 0.0
    for c in configurations:
        colour, style = colours[c["name"]], "-" if c["steps"] == SAME_STEPS else "--"
        fields = ("seconds", "cider_d", "lowest", "highest")
        seconds, mean, lowest, highest = ([point[field] for point in c["curve"]] for field in fields)
        axes.plot(seconds, mean, style, color=colour, linewidth=1.8, marker="o", markersize=3)
        axes.fill_between(seconds, lowest, highest, color=colour, alpha=0.13, linewidth=0)
        height = max(height + (0.46 if settings else 0.25), mean[-1])  # so that no text covers another
        axes.annotate(
            c["name"] + (f"\n{c['steps']} steps, rate {c['learning_rate']:g}" if settings else ""),
            (seconds[-1], mean[-1]),
            xytext=(column, height),
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 2, "shrinkB": 3}
            | {"relpos": (0, 0.5)},
        )


def table(result: dict) -> str:
    """A line for every configuration, the best learning rate of each marked."""
    lines = [
        f"{'engine, images x captions':<26}{'steps':>6}{'rate':>9}{'s/step':>8}{'seconds':>9}{'captions':>10}"
        f"{'CIDEr-D':>9}{'lowest':>8}{'highest':>9}{'seeds':>7}" + "".join(f"{f's to {s:g}':>10}" for s in REACHED)
    ]
    for c in result["configurations"]:
        rate = f"{c['learning_rate']:g}{'*' if c['best'] else ' '}"
        reached = ["-" if c["seconds_to"][s] is None else f"{c['seconds_to'][s]:.0f}" for s in REACHED]
        lines.append(
            f"{c['name']:<26}{c['steps']:>6}{rate:>9}{c['seconds_a_step']:>8.3f}{c['seconds']:>9.0f}{c['captions']:>10.0f}"
            f"{c['cider_d']:>9.2f}{min(c['cider_d_of_seeds']):>8.2f}{max(c['cider_d_of_seeds']):>9.2f}{c['seeds']:>7}"
            + "".join(f"{seconds:>10}" for seconds in reached)
        )
    return "\n".join(lines)


def measure(args) -> None:
    """All of it, as scripts/bench_time_to_quality.py says; `args` is its BenchArguments."""
    folder = Path(args.output_dir)
    timing_path = folder / "timing.json"
    build_dataset(folder)

    # Every rate with the first seed, then what is drawn with the others.
    runs = learn_all([Training(*key, rate, SEEDS[0]) for key, rates in GRID.items() for rate in rates], args)
    drawn = {(*key, rate) for key, rate in best_rates(runs).items()} | {(b, SAME_STEPS, SAME_RATE) for b in SAME}
    runs = learn_all([Training(*key, seed) for seed in SEEDS[1:] for key in sorted(drawn, key=str)], args)

    if args.timing_rounds:
        timing = Bench(args).time_steps()
        timing_path.write_text(json.dumps(timing, indent=2) + "\n", encoding="utf-8")
    timing = json.loads(timing_path.read_text(encoding="utf-8"))
    result = summarise(runs, timing, args)
    (folder / "results.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    plot(result, folder / "time_to_quality.svg")
    print(f"\n{table(result)}\n* best rate by the first seed\n\n{folder}/results.json and time_to_quality.svg")
