"""The parts of scripts/gpu_check.py that no benchmark is: each in a process of its own, a row of figures at a time.

    python -m vlmcap.experiments.gpu_parts --part memory --folder DIR --preset tiny --device cpu --json rows.json

After each row the file of rows is written again, so that a process that is stopped leaves what it has found.
"""

import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import bitsandbytes as bnb
import datasets
import torch
from safetensors.torch import load_file
from transformers import PrinterCallback, ProcessorMixin, TrainerCallback

from vlmcap import provenance
from vlmcap.arguments import run_main
from vlmcap.atomic_write import write_atomically
from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.experiments.bench import Watch, build_checkpoint, build_rows
from vlmcap.experiments.captioning_bench import Bench, draw_lengths, random_model
from vlmcap.experiments.presets import PRESETS
from vlmcap.models.arguments import ModelArguments
from vlmcap.models.load import compute_dtype, count_parameters, load_model, load_processor, lora_config
from vlmcap.places import ROOT
from vlmcap.steps.begin import find_checkpoint
from vlmcap.strict_parsing import parse_yaml
from vlmcap.training.collator import BadImages
from vlmcap.training.report import estimate_memory
from vlmcap.training.trainer import CaptionTrainer
from vlmcap.training.trainer_arguments import CaptionSFTConfig

MINIATURE = str(ROOT / "recipes/miniatures/qwen2_vl")
CONFIGS = ROOT / "recipes/configs/sft_qwen2vl_jp"
FSDP = ROOT / "accelerate_configs/fsdp_qlora.yaml"
T4_BYTES = int(14.5 * 2**30)  # what a T4 has left of its 16 GB
LONG = 64  # tokens of a caption in the start report's estimate
PROMPT_TOKENS = 40  # and of prompt and template beside the picture
# Resuming: a checkpoint after these steps, killed after one more, as many again.
SAVED, STEPS = 3, 6


@dataclass
class PartArguments:
    part: str = field(metadata={"help": "The part."})
    folder: str = field(metadata={"help": "Folder of the check, with the random model in it once it is built."})
    preset: str = field(default="qwen2vl_2b", metadata={"help": f"One of {', '.join(PRESETS)}."})
    device: str = field(default="cuda", metadata={"help": "cpu or cuda."})
    json: str = field(default="rows.json", metadata={"help": "File for the rows."})

    @property
    def small(self) -> bool:
        """Whether everything is as small as it can be, to show that it runs."""
        return self.device == "cpu"

    @property
    def model(self) -> str:
        return str(Path(self.folder) / "model")

    @property
    def load_in_4bit(self) -> bool:
        return PRESETS[self.preset]["load_in_4bit"]


def read(config: str, kind: type, **more):
    """A dataclass filled from a configuration of the recipe and `more`."""
    settings, names = parse_yaml((CONFIGS / config).read_bytes()), {f.name for f in fields(kind)}
    return kind(**{name: value for name, value in settings.items() if name in names} | more)


def processor_of(args: PartArguments, max_pixels: int) -> ProcessorMixin:
    return load_processor(MINIATURE, max_pixels=12_544 if args.small else max_pixels)


def build_trainer(args: PartArguments, config: str, images: int, output_dir: Path, long: bool = False, **changes):
    """The recipe's trainer with the settings of a configuration, on the random model and drawn pictures.

    long: captions of LONG tokens in place of some 15.
    """
    model_args = read(config, ModelArguments, model_name_or_path=args.model, model_revision=None)
    processor = processor_of(args, model_args.max_pixels)
    output_dir.mkdir(parents=True, exist_ok=True)
    rows = build_rows(images, output_dir, seed=0)
    if long:
        rows = rows.map(lambda row: {"captions": [lengthen(text, processor) for text in row["captions"]]})
    without = {"eval_strategy": "no", "load_best_model_at_end": False, "early_stopping_patience": None}
    without |= {"save_strategy": "no", "dataloader_num_workers": 0, "report_to": "none", "disable_tqdm": True}
    if args.device == "cpu":
        without |= {"fp16": False, "use_cpu": True}
    settings = {"output_dir": str(output_dir), "logging_steps": 1} | without | changes
    training_args = read(config, CaptionSFTConfig, **settings)
    dtype = torch.float16 if training_args.fp16 else None
    model = load_model(args.model, load_in_4bit=args.load_in_4bit, dtype=dtype)
    trainer = CaptionTrainer(
        model=model,
        args=training_args,
        rows=rows,
        processing_class=processor,
        prompt=read(config, GenerationArguments).prompt,
        bad_images=BadImages(output_dir / "bad_images.jsonl", limit=0),
        peft_config=lora_config(model, model_args),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def lengthen(caption: str, processor: ProcessorMixin) -> str:
    """A caption of LONG tokens at most, the end of turn included, and hardly fewer."""
    text = caption
    while count_tokens(text, processor) < LONG:
        text += caption
    while count_tokens(text, processor) > LONG:
        text = text[:-1]
    return text


def count_tokens(caption: str, processor: ProcessorMixin) -> int:
    return len(processor.tokenizer(caption, add_special_tokens=False)["input_ids"]) + 1


def losses(trainer: CaptionTrainer) -> list[float]:
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not all(map(math.isfinite, found)):
        raise FloatingPointError(f"losses that are no numbers: {found}")
    return found


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# The parts: each yields its rows ------------------------------------------------------------------------------------
def model(args: PartArguments) -> Iterator[dict]:
    """Builds the random model that all parts load, and loads it as the recipe does."""
    start = time.perf_counter()
    build_checkpoint(PRESETS[args.preset], load_processor(MINIATURE), Path(args.model), 0, args.device)
    built = time.perf_counter()
    loaded = load_model(args.model, load_in_4bit=args.load_in_4bit)
    yield {
        "preset": args.preset,
        "parameters": count_parameters(loaded),
        "layers_in_4_bits": sum(isinstance(module, bnb.nn.Linear4bit) for module in loaded.modules()),
        "weights_bytes": sum(p.numel() * p.element_size() for p in loaded.parameters()),
        "seconds_to_build": built - start,
        "seconds_to_load": time.perf_counter() - built,
    }


def t4(args: PartArguments) -> Iterator[dict]:
    """t4.yaml in float16 with a T4's memory: captions of drawn scenes, then those of the start report's estimate."""
    if args.device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, T4_BYTES / total))
    for long in (False, True):
        yield steps(args, "t4.yaml", long)


def memory(args: PartArguments) -> Iterator[dict]:
    """base.yaml as it is and with gradient checkpointing: the start report's estimate against what was needed."""
    for checkpointing in (False, True):
        try:
            yield steps(args, "base.yaml", True, gradient_checkpointing=checkpointing)
        except torch.OutOfMemoryError as error:
            found = str(error).splitlines()[0]
            yield {"settings": "base.yaml", "gradient_checkpointing": checkpointing, "out_of_memory": found}


def steps(args: PartArguments, config: str, long: bool, **changes) -> dict:
    """A few steps with a configuration: seconds, losses, memory, and the estimate of memory for these captions."""
    free_memory()
    count = 2 if args.small else 5
    folder = Path(args.folder) / "steps"
    images = 1 if args.small else parse_yaml((CONFIGS / config).read_bytes())["per_device_train_batch_size"]
    changes |= {"per_device_train_batch_size": images, "max_steps": count}
    trainer = build_trainer(args, config, images, folder, long, **changes)
    watch = Watch(args.device)
    trainer.add_callback(watch)
    captions = (caption for captions in trainer.rows["captions"] for caption in captions)
    lengths = [count_tokens(caption, trainer.processing_class) for caption in captions]
    trainer.train()
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    pixels = read(config, ModelArguments).max_pixels if not args.small else 12_544
    side = trainer.processing_class.image_processor.patch_size * 2
    estimate = estimate_memory(
        trainer.model, trainer.args, pixels // side**2 + PROMPT_TOKENS, max(lengths), trainer.shared_prefix
    )
    scaler = trainer.accelerator.scaler
    return {
        "settings": config,
        "precision": "bf16" if trainer.args.bf16 else "fp16" if trainer.args.fp16 else "fp32",
        "gradient_checkpointing": trainer.args.gradient_checkpointing,
        "images": images,
        "captions": len(lengths),
        "caption_tokens": max(lengths),
        "step_s": watch.seconds,
        "step_s_median": statistics.median(watch.seconds[1:]),  # the first prepares
        "losses": losses(trainer),
        "loss_scale": scaler and scaler.get_scale(),
        "estimate_bytes": sum(estimate.values()),
        "estimate_parts": estimate,
        "peak_mem_bytes": weights + max(watch.peak),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if args.device == "cuda" else None,
    }


def precision(args: PartArguments) -> Iterator[dict]:
    """How many captions change with the engine and with the batch size: the miniature, which knows drawn scenes and
    ends its captions itself, and the random model, in which many next words are equally likely."""
    dtypes = [torch.float32, torch.float16, torch.bfloat16]
    if args.device == "cuda" and compute_dtype() != torch.bfloat16:
        dtypes.remove(torch.bfloat16)
    sizes = Sizes(images=64, max_new_tokens=40)
    for dtype in dtypes:
        miniature = load_model(MINIATURE, load_in_4bit=False, dtype=dtype).eval()
        yield compare(Bench(sizes, miniature, load_processor(MINIATURE), None), "miniature", dtype)
    sizes = Sizes(images=3, batch_size=2, max_new_tokens=12) if args.small else Sizes(images=8)
    for dtype in dtypes[1:]:
        free_memory()
        random = random_model(args.model, PRESETS[args.preset], sizes.seed, dtype)
        lengths = draw_lengths(sizes.images, sizes.seed)
        bench = Bench(sizes, random, processor_of(args, 313_600), [min(n, sizes.max_new_tokens) for n in lengths])
        yield compare(bench, "random weights", dtype)


@dataclass
class Sizes:
    """What `Bench` reads of its arguments."""

    images: int
    batch_size: int = 16
    num_beams: int = 3
    max_new_tokens: int = 64
    seed: int = 0


def compare(bench: Bench, name: str, dtype: torch.dtype) -> dict:
    sizes, found = bench.args, {}
    for batch in (sizes.batch_size, 1):
        bench.args = replace(sizes, batch_size=batch)
        found |= {("stock", batch): bench.stock(), ("branches", batch): bench.branches()}

    def differ(one: tuple, other: tuple) -> int:
        return sum(a != b for a, b in zip(found[one], found[other], strict=True))

    large = sizes.batch_size
    return {
        "model": name,
        "precision": str(dtype).removeprefix("torch."),
        "captions": sizes.images,
        "batch_size": large,
        "branches_differ_from_stock": differ(("branches", large), ("stock", large)),
        "branches_differ_from_stock_one_by_one": differ(("branches", 1), ("stock", 1)),
        "branches_differ_by_batch_size": differ(("branches", large), ("branches", 1)),
        "stock_differs_by_batch_size": differ(("stock", large), ("stock", 1)),
    }


def resume(args: PartArguments) -> Iterator[dict]:
    """A run that is killed and resumed, against one that is not: the weights after the last step. And how far two
    runs that were not resumed are from each other, which is what the device's kernels repeat."""
    whole, killed = (Path(args.folder) / name for name in ("whole", "killed"))
    trainer = resumable_trainer(args, whole)
    trainer.train()
    whole_losses = losses(trainer)
    del trainer
    free_memory()
    status = own_process(args, "resume_killed")
    if status != -signal.SIGKILL:
        raise RuntimeError(f"the run that kills itself ended with status {status}")
    checkpoint = find_checkpoint(killed, "latest")
    trainer = resumable_trainer(args, killed)
    trainer.train(resume_from_checkpoint=checkpoint)
    begin, repeated = (weights(folder, SAVED) for folder in (whole, killed))
    end, resumed = (weights(folder, STEPS) for folder in (whole, killed))
    yield {
        "steps": STEPS,
        "resumed_after": int(Path(checkpoint).name.removeprefix("checkpoint-")),
        "largest_change": largest_difference(end, begin),  # of a weight since the checkpoint
        "repeated_difference": largest_difference(begin, repeated),
        "resumed_difference": largest_difference(end, resumed),
        "losses": whole_losses,
        "losses_resumed": losses(trainer),
    }


def resumable_trainer(args: PartArguments, output_dir: Path) -> CaptionTrainer:
    changes = {"save_strategy": "steps", "save_steps": SAVED, "max_steps": STEPS, "warmup_steps": 0}
    return build_trainer(args, "base.yaml", 4, output_dir, per_device_train_batch_size=2, **changes)


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors")


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


class KillAfter(TrainerCallback):
    """Ends this process at once when a step is done, as a failing machine does."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def resume_killed(args: PartArguments) -> Iterator[dict]:
    trainer = resumable_trainer(args, Path(args.folder) / "killed")
    trainer.add_callback(KillAfter(SAVED + 1))
    trainer.train()
    yield {"killed": False}


def fsdp(args: PartArguments) -> Iterator[dict]:
    """One step with accelerate_configs/fsdp_qlora.yaml, and the same step without it."""
    alone = sharded_trainer(args, 1)
    alone.train()
    expected = losses(alone)
    del alone
    free_memory()
    found = Path(args.folder) / "fsdp.json"
    processes = min(2, max(1, torch.cuda.device_count()))
    launch = ["accelerate.commands.launch", "--config_file", str(FSDP), "--num_processes", str(processes)]
    launch += ["--main_process_port", "0", *(["--mixed_precision", "no"] if args.device == "cpu" else []), "-m"]
    if status := own_process(args, "fsdp_step", *launch, json_file=found):
        raise RuntimeError(f"accelerate launch ended with status {status}")
    (row,) = json.loads(found.read_text(encoding="utf-8"))["rows"]
    yield row | {"processes": processes, "loss_alone": expected[0]}
    if args.device == "cuda" and not row["wrapper"].startswith("FSDP"):
        raise RuntimeError(f"the model was not sharded: it was wrapped in {row['wrapper']}")


def sharded_trainer(args: PartArguments, processes: int) -> CaptionTrainer:
    """Two images a step, whoever takes them."""
    folder = Path(args.folder) / "fsdp" / os.environ.get("RANK", "alone")
    images = {"per_device_train_batch_size": 2 // processes, "max_steps": 1}
    return build_trainer(args, "base.yaml", 2, folder, **images)


def fsdp_step(args: PartArguments) -> Iterator[dict]:
    trainer = sharded_trainer(args, int(os.environ["WORLD_SIZE"]))
    watch = Watch(args.device)
    trainer.add_callback(watch)
    trainer.train()
    yield {
        "wrapper": type(trainer.model_wrapped).__name__,
        "loss": losses(trainer)[0],
        "step_s": watch.seconds[0],
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if args.device == "cuda" else None,
    }


PARTS = {part.__name__: part for part in (model, t4, memory, precision, resume, resume_killed, fsdp, fsdp_step)}


def own_process(args: PartArguments, part: str, *launcher: str, json_file: Path | None = None) -> int:
    """Exit status of a process of its own for a part that is in two; `launcher`: words after `python -m`."""
    words = [
        *launcher,
        "vlmcap.experiments.gpu_parts",
        "--part",
        part,
        "--folder",
        args.folder,
        "--preset",
        args.preset,
    ]
    words += ["--device", args.device, "--json", str(json_file or Path(args.folder) / f"{part}.json")]
    return subprocess.run([sys.executable, "-m", *words]).returncode


def main(args: PartArguments) -> None:
    datasets.disable_progress_bars()
    rows = []
    for row in PARTS[args.part](args):
        rows.append(row)
        if os.environ.get("RANK", "0") == "0":
            write_atomically(Path(args.json), json.dumps({"rows": rows} | machine(args), indent=2) + "\n")
        print(", ".join(f"{name} {value}" for name, value in row.items() if isinstance(value, int | float | str)))


def machine(args: PartArguments) -> dict:
    """Where the rows come from, as every record of a benchmark says it."""
    cuda = args.device == "cuda"
    return {
        "capability": list(torch.cuda.get_device_capability()) if cuda else None,
        "hardware": provenance.hardware(),
        "versions": provenance.versions(),
        "commit": provenance.git_commit(),
        "created": provenance.now(),
    }


if __name__ == "__main__":
    run_main(main, __doc__, PartArguments)
