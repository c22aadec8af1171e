"""A training run at the real size with random weights: what it needs and whether it works, before a GPU is rented."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, set_seed

from vlmcap.atomic_write import write_atomically
from vlmcap.errors import UserError
from vlmcap.miniature.scenes import write_scene_dataset
from vlmcap.models.load import count_parameters
from vlmcap.models.weights import hub_errors, loading
from vlmcap.strict_parsing import parse_json, parse_yaml

# Everything of a model but its weights: configuration, tokenizer, chat template, processor.
SMALL_FILES = ["*.json", "*.txt", "*.jinja"]
WEIGHTS_INDEX = "*.index.json"
# Of main memory, measured on a CPU with Qwen2-VL-2B, NF4 and 2 images a step: 12.6 GiB for 2,208,985,600 parameters,
# with room to spare. On a GPU the weights alone pass through main memory.
CPU_BYTES_A_PARAMETER, GPU_BYTES_A_PARAMETER = 6.3, 4.5
ESTIMATE = re.compile(r"Memory: about ([\d.]+) GiB a device \((.*?)\);")
PHASES = ("loading", "training", "captioning and scoring")
PICTURES = 21
PAUSE = 0.1  # seconds between two looks at the memory


class RehearsalError(UserError):
    """The rehearsal cannot begin, or a command of it failed. The message names what is missing."""


@dataclass(frozen=True)
class Measured:
    """What the recipe's process did. Bytes are None for a phase that was not seen."""

    seconds: dict[str, float]
    peak_bytes: dict[str, int | None]
    estimate_gib: float | None
    estimate_parts: str


def fetch_small_files(model: str, revision: str | None, folder: Path) -> None:
    """Copies configuration, tokenizer and processor of a model into `folder`, from a folder or the Hub; no weights.

    Raises:
        ModelError: it is not a folder, and the Hub does not have it or cannot be asked.
        RehearsalError: there is no config.json.
    """
    source = Path(model)
    if not source.is_dir():
        with loading(model), hub_errors(model, revision, "a model"):
            source = Path(
                snapshot_download(
                    model, revision=revision, allow_patterns=SMALL_FILES, ignore_patterns=[WEIGHTS_INDEX]
                )
            )
    if not (source / "config.json").is_file():
        raise RehearsalError(f"{model} has no config.json: give a folder or a Hub id with the files of a model")
    folder.mkdir(parents=True)
    for pattern in SMALL_FILES:
        for path in sorted(source.glob(pattern)):
            if not path.match(WEIGHTS_INDEX):
                shutil.copyfile(path, folder / path.name)


def planned_parameters(folder: Path) -> int:
    """Parameters of the model that a folder's config.json describes, without making one of them."""
    with loading(str(folder)):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            return count_parameters(AutoModelForImageTextToText.from_config(config, trust_remote_code=False))


def check_room(parameters: int, folder: Path) -> None:
    """Enough disk for the weights and the checkpoints, enough memory for the run; else RehearsalError with both."""
    on_gpu = torch.cuda.is_available()
    memory = parameters * (GPU_BYTES_A_PARAMETER if on_gpu else CPU_BYTES_A_PARAMETER)
    disk = parameters * 2 * 1.6  # bfloat16, then the adapter and two checkpoints with their optimizer
    for what, needed, free, fix in (
        ("disk", disk, shutil.disk_usage(folder).free, "free some, or choose an --output_dir on another disk"),
        ("memory", memory, psutil.virtual_memory().available, "close other programs, or take a larger machine"),
    ):
        if needed > free:
            raise RehearsalError(
                f"a rehearsal of {parameters:,} parameters needs about {needed / 2**30:.1f} GiB of {what}, and"
                f" {free / 2**30:.1f} GiB are free: {fix}, or rehearse a smaller model (--model)"
            )


def write_random_weights(folder: Path, seed: int) -> None:
    """Writes random weights for the config.json of a folder into it: bfloat16, safetensors, as `seed` draws them."""
    set_seed(seed)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    if (folder / "generation_config.json").is_file():  # with the tokens that end a caption
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.save_pretrained(folder)


def write_pictures(images: Path | None, captions: Path | None, folder: Path, held_out: int, seed: int) -> list[str]:
    """The arguments of scripts/publish_datasets.py for these pictures; without any, for drawn scenes.

    Args:
        images: folder of pictures.
        captions: their captions in COCO format.
        folder: for lists of ids and drawn scenes.
        held_out: pictures in validation and in test, each.

    Raises:
        RehearsalError: the captions cannot be read, or are of too few pictures.
    """
    folder.mkdir(parents=True)
    if images is None:
        write_scene_dataset(folder, PICTURES - 2 * held_out, held_out, held_out, seed)
        annotations = ["--annotations", folder / "stair_train.json", folder / "stair_val.json"]
        annotations += ["--yj_annotations", folder / "yj.json", "--images", folder / "images"]
        name, license = "Rehearsal: drawn scenes", ["--license", "cc0-1.0"]
    else:
        try:
            document = parse_json(captions.read_bytes())
            with_caption = {entry["image_id"] for entry in document["annotations"]}
            ids = [entry["id"] for entry in document["images"] if entry["id"] in with_caption]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RehearsalError(
                f"{captions} is not a file of captions in COCO format ({type(error).__name__}: {error}): it holds"
                ' {"images": [{"id", "file_name"}, ...], "annotations": [{"id", "image_id", "caption"}, ...]}'
            ) from error
        if len(ids) < 2 * held_out + 2:
            raise RehearsalError(
                f"{captions} has captions of {len(ids)} pictures; {2 * held_out + 2} are needed: {held_out} each for"
                " validation and test, and 2 to train on"
            )
        lists = ids[:held_out], ids[held_out : 2 * held_out], ids[2 * held_out :]
        for split, chosen in zip(("val", "test"), lists, strict=False):
            (folder / f"{split}_ids.txt").write_text("".join(f"{image_id}\n" for image_id in chosen))
        flagged = set(lists[2])
        kept = [entry for entry in document["annotations"] if entry["image_id"] in flagged]
        yj = {"images": [entry for entry in document["images"] if entry["id"] in flagged], "annotations": kept}
        (folder / "yj.json").write_text(json.dumps(yj, ensure_ascii=False), encoding="utf-8")
        annotations = ["--annotations", captions, "--yj_annotations", folder / "yj.json", "--images", images]
        name, license = f"Rehearsal: {len(ids)} pictures of {images.name}", []
    lists = ["--val_ids", folder / "val_ids.txt", "--test_ids", folder / "test_ids.txt"]
    about = ["--source", "stair", "--card", "rehearsal", "--pretty_name", name, *license]
    return list(map(str, [*about, *annotations, *lists]))


def recipe_settings(config: Path, model: Path, dataset: Path, output_dir: Path, drawn: bool, args) -> list[str]:
    """The recipe's command line: the configuration as it is, except for the model, the data, and how much is done."""
    settings = parse_yaml(config.read_bytes())
    changed = {
        "model_name_or_path": model,
        "dataset": dataset,
        "output_dir": output_dir,
        "include_yj_images": "true",  # all training pictures are flagged
        "per_device_train_batch_size": args.images_per_step,
        "gradient_accumulation_steps": 1,
        "max_steps": args.steps,
        "eval_steps": args.steps,
        "save_steps": args.steps,
        "logging_steps": 1,
        "max_validation_images": args.held_out,
        "max_test_images": args.held_out,
        "generation_batch_size": args.held_out,
        "max_new_tokens": args.max_new_tokens,
    }
    if drawn:  # as many image tokens as a photograph has
        changed["min_pixels"] = settings.get("max_pixels", 313600)
    words = ["--config", str(config)]
    return words + [str(word) for key, value in changed.items() for word in (f"--{key}", value)]


def run_measured(command: list[str], trained: Path, cwd: Path) -> Measured:
    """Runs the recipe, shows what it prints, and looks at its memory ten times a second.

    The memory is that of the largest process below: loader workers share the training process' pages. It counts files
    that are mapped, as the system's own figures do.

    Args:
        trained: the file that appears when training has ended.

    Raises:
        RehearsalError: the recipe failed.
    """
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"}
    )
    started, peaks = {PHASES[0]: start}, dict.fromkeys(PHASES)
    phase, ended = [PHASES[0]], threading.Event()

    def watch() -> None:
        while not ended.wait(PAUSE):
            if phase[0] == PHASES[1] and trained.exists():
                phase[0] = PHASES[2]
                started[phase[0]] = time.perf_counter()
            peaks[phase[0]] = max(peaks[phase[0]] or 0, largest_process(process.pid))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    estimate, parts = None, ""
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            if found := ESTIMATE.search(line):
                estimate, parts = float(found[1]), found[2]
                phase[0] = PHASES[1]
                started[phase[0]] = time.perf_counter()
        status = process.wait()
    except BaseException:
        process.kill()  # asked to end, it would take a step and save
        raise
    finally:
        ended.set()
        watcher.join()
    if status:
        raise RehearsalError(
            f"the recipe ended with status {status}: what it said is printed above. SIGKILL in it means that the"
            " memory of this machine ran out."
        )
    ends = [*list(started.values())[1:], time.perf_counter()]
    seconds = {name: end - begin for (name, begin), end in zip(started.items(), ends, strict=True)}
    return Measured(seconds, peaks, estimate, parts)


def largest_process(root: int) -> int:
    """Resident bytes of the largest process among a process and all below it."""
    found = 0
    try:
        for process in [psutil.Process(root), *psutil.Process(root).children(recursive=True)]:
            found = max(found, process.memory_info().rss)
    except psutil.NoSuchProcess:
        pass  # ended between two looks
    return found


def rehearse(args, root: Path) -> dict:
    """The whole path once; prints as it goes, and returns (and writes as rehearsal.json) what was measured.

    Args:
        args: see scripts/rehearse.py.
        root: of the clone, where scripts and recipes are.

    Raises:
        RehearsalError: something is missing, does not fit, or failed.
        ModelError: there is no such model.
    """
    start = time.perf_counter()
    output_dir = Path(args.output_dir).absolute()
    if output_dir.exists() and any(output_dir.iterdir()):
        raise RehearsalError(f"{args.output_dir} is not empty: delete it, or choose another --output_dir")
    config = (root / args.recipe_config).absolute()
    model, revision, images, captions = _inputs(args, root, config)

    output_dir.mkdir(parents=True, exist_ok=True)
    model_dir, run_dir = output_dir / "model", output_dir / "run"
    fetch_small_files(model, revision, model_dir)
    parameters = planned_parameters(model_dir)
    try:
        check_room(parameters, output_dir)
    except RehearsalError:
        shutil.rmtree(model_dir)  # the same command is run again
        raise
    publish = write_pictures(images, captions, output_dir / "pictures", args.held_out, args.seed)
    print(
        f"Rehearsal of {model}: {parameters:,} parameters with random weights, {images or 'drawn scenes'}\n"
        "With Qwen2-VL-2B about ten minutes on two CPU cores that do nothing else; a GPU is faster.",
        flush=True,
    )
    write_random_weights(model_dir, args.seed)
    seconds = {"random weights": time.perf_counter() - start}

    start = time.perf_counter()
    dataset = output_dir / "dataset"
    publish += ["--tokenizer", str(model_dir), "--output_dir", str(dataset)]
    done = subprocess.run([sys.executable, str(root / "scripts/publish_datasets.py"), *publish], cwd=root)
    if done.returncode:
        raise RehearsalError(f"scripts/publish_datasets.py ended with status {done.returncode}")
    seconds["publishing"] = time.perf_counter() - start

    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    if not torch.cuda.is_available():
        launch += ["--config_file", str(root / "accelerate_configs/cpu.yaml")]
    settings = recipe_settings(config, model_dir, dataset, run_dir, images is None, args)
    adapter = run_dir / "adapter"
    measured = run_measured(
        [*launch, str(root / "recipes/sft_qwen2vl_jp.py"), *settings], adapter / "training.json", root
    )
    result = summary(model, parameters, seconds, measured, adapter, args)
    write_atomically(output_dir / "rehearsal.json", json.dumps(result, indent=2))
    print(report(result), flush=True)
    return result


def _inputs(args, root: Path, config: Path) -> tuple[str, str | None, Path | None, Path | None]:
    """Model, its revision, folder of pictures and file of captions: as given, else what is in the data folder, else
    the model of the recipe's configuration and drawn scenes."""
    named = parse_yaml(config.read_bytes())
    data = Path(os.environ.get("VLMCAP_DATA_DIR") or root.parent / "shared/data")
    model, revision = args.model, args.model_revision
    if model is None and (data / "qwen2_vl_2b").is_dir():
        model = str(data / "qwen2_vl_2b")
    elif model is None:
        model, revision = named["model_name_or_path"], revision or named.get("model_revision")
    images, captions = args.images and Path(args.images), args.captions and Path(args.captions)
    if images is None and not args.drawn_scenes and (data / "coco_yj_images").is_dir():
        images = data / "coco_yj_images"
    if images is not None:
        images = images.absolute()
        captions = (captions or images / "captions.json").absolute()
    return model, revision, images, captions


def summary(model: str, parameters: int, seconds: dict, measured: Measured, adapter: Path, args) -> dict:
    """What the rehearsal found, as rehearsal.json holds it. Sizes are bytes."""
    metrics = parse_json((adapter / "metrics.json").read_bytes())
    training = metrics["training"]
    clock = [entry["elapsed_seconds"] for entry in training["log"] if "loss" in entry]
    device = [training["peak_memory_bytes"], metrics["peak_memory_bytes"]]  # of a GPU; null on a CPU
    return {
        "model": model,
        "parameters": parameters,
        "trained_parameters": training["trainable_parameters"],
        "images_per_step": args.images_per_step,
        "captions_per_image": training["captions"] / training["images"],
        "estimated_captions_per_image": training["config"]["captions_per_image"],
        "device": training["hardware"]["device"],
        "cores": training["hardware"]["cores"],
        "estimated_memory_gib": measured.estimate_gib,
        "estimated_parts": measured.estimate_parts,
        "peak_memory_bytes": measured.peak_bytes,
        "peak_device_memory_bytes": max(device) if None not in device else None,
        # The first step warms up; it counts only where there is no other.
        "seconds_a_step": (clock[-1] - clock[0]) / (len(clock) - 1) if len(clock) > 1 else clock[0],
        "seconds": seconds | measured.seconds,
        "losses": [entry["loss"] for entry in training["log"] if "loss" in entry],
        "disk_bytes": sum(path.stat().st_size for path in adapter.parents[1].rglob("*") if path.is_file()),
        "card": str(adapter / "README.md"),
    }


def report(result: dict) -> str:
    """The lines printed at the end."""

    def gib(size: int | None) -> str:
        return "not seen" if size is None else f"{size / 2**30:.2f} GiB"

    peaks, device = result["peak_memory_bytes"], result["peak_device_memory_bytes"]
    of_training = device if device is not None else peaks["training"]
    phases = ", ".join(f"{name} {gib(size)}" for name, size in peaks.items())
    total = sum(result["seconds"].values())
    rows = {
        "parameters": f"{result['parameters']:,}, {result['trained_parameters']:,} of them trained",
        "memory, estimated": f"{result['estimated_memory_gib']:.1f} GiB ({result['estimated_parts']})",
        "memory, measured": f"{gib(of_training)} in training on {result['device']}",
        "main memory": phases,
        "a step": f"{result['seconds_a_step']:.1f} s, of {result['images_per_step']} images with"
        f" {result['captions_per_image']:.1f} captions; the estimate is for {result['estimated_captions_per_image']}"
        " of 64 tokens",
        "seconds": ", ".join(f"{name} {value:.0f}" for name, value in result["seconds"].items()) + f"; {total:.0f}",
        "disk": f"{result['disk_bytes'] / 1e9:.2f} GB",
        "card": result["card"],
    }
    lines = [f"  {name:<19}{value}" for name, value in rows.items()]
    return "\n".join(
        ["", f"Rehearsal of {result['model']}", *lines, "The weights are random: the scores mean nothing."]
    )
