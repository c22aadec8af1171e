"""Small training runs that tests/faults/test_training.py starts in processes of their own, and ends in every way.

The processes are forked from a server that has imported all of this: a run takes a second, not ten.
"""

import ctypes
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from tests.invariants import tiny
from vlmcap.captioning.arguments import BeamArguments, GenerationArguments
from vlmcap.data.errors import DataError
from vlmcap.data.images import load_captions
from vlmcap.models.load import ModelArguments, lora_config
from vlmcap.models.vit_gpt2 import VitGpt2Arguments, build_vit_gpt2, freeze, load_vit_gpt2, parameter_groups
from vlmcap.steps.begin import find_checkpoint
from vlmcap.steps.save import save_trained
from vlmcap.steps.splits import Splits
from vlmcap.training import checkpoints, features
from vlmcap.training.captioner import CaptionerTrainer
from vlmcap.training.checkpoints import CheckpointError
from vlmcap.training.collator import BadImages
from vlmcap.training.dpo import CaptionDPOTrainer
from vlmcap.training.trainer import CaptionTrainer
from vlmcap.training.trainer_arguments import CaptionerTrainingArguments, CaptionSFTConfig
from vlmcap.training.validation import CaptionValidation

MINIATURES = tiny.MINIATURE.parent
CAPTIONING = ("sft_qwen2vl_jp", GenerationArguments())  # what captioning.json is written from
# Four steps an epoch, the last of one micro-batch: 14 examples in batches of 2, two of them a step.
SETTINGS = {
    "max_steps": 10,
    "save_steps": 3,
    "save_total_limit": 1,
    "logging_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 3,
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 5,
}
PROJECTED = ("step", "epoch", "loss", "grad_norm", "learning_rate", "mean_token_accuracy", "reward_accuracy")


def splits_of(pictures: Path) -> Splits:
    rows = load_captions(str(pictures / "data"), "train", image_dir=str(pictures))
    rows = rows.add_column("in_yj", [False] * len(rows))
    bad_images = BadImages(pictures / "bad_images.jsonl", limit=0)
    return Splits(
        rows, rows.select([0, 2]), rows.select([1]), {"id": "pictures"}, {"id": "pictures"}, None, bad_images
    )


def qwen_trainer(pictures: Path, output_dir: Path, cache: bool = False, **changes) -> CaptionTrainer:
    """A random Qwen2-VL with dropout in front of its LoRA, two captions of an image at a time."""
    splits = splits_of(pictures)
    model, processor = tiny.build_model("qwen2_vl"), tiny.build_processor("qwen2_vl")
    settings = {"gradient_checkpointing": False, "captions_per_image": 2} | SETTINGS | changes
    args = CaptionSFTConfig(str(output_dir), **settings)
    generation = GenerationArguments(prompt=tiny.PROMPT, max_new_tokens=8)
    cached = validation_features = None
    if cache:
        features.BATCH = 2
        cached, validation_features = (
            features.cache_features(
                output_dir.parent / "features", model, processor, rows, "tiny", None, splits.bad_images
            )
            for rows in (splits.train, splits.validation)
        )
    validation = CaptionValidation(splits.validation, processor, generation, features=validation_features)
    arguments = ModelArguments(model_name_or_path="tiny", lora_dropout=0.1, lora_top_layers=2)
    return CaptionTrainer(
        model=model,
        args=args,
        rows=splits.train,
        processing_class=processor,
        prompt=tiny.PROMPT,
        bad_images=splits.bad_images,
        peft_config=lora_config(model, arguments),
        features=cached,
        validation=validation,
    )


def captioner_trainer(pictures: Path, output_dir: Path, **changes) -> CaptionerTrainer:
    """ViT + GPT-2, saved whole, 23 captions one by one in transformers' own order."""
    splits = splits_of(pictures)
    arguments = VitGpt2Arguments(str(MINIATURES / "vit"), None, str(MINIATURES / "gpt2"))
    model, processor = build_vit_gpt2(arguments, seed=0)
    freeze(model, arguments)
    return CaptionerTrainer(
        model,
        CaptionerTrainingArguments(str(output_dir), **SETTINGS | {"per_device_train_batch_size": 3} | changes),
        splits.train,
        splits.validation,
        splits.bad_images,
        processor,
        ("decoder_input_ids", "decoder_attention_mask"),
        BeamArguments(num_beams=1, max_new_tokens=8),
        "unidic-lite",
        parameter_groups(model, 1e-3, 2e-3, 0.01),
        lambda folder: load_vit_gpt2(folder)[0],
    )


def preference_trainer(pictures: Path, output_dir: Path, **changes) -> CaptionDPOTrainer:
    """A random Qwen2-VL on 14 pairs, one by one."""
    splits = splits_of(pictures)
    generation = GenerationArguments(prompt=tiny.PROMPT, max_new_tokens=8)
    validation = CaptionValidation(splits.validation, tiny.build_processor("qwen2_vl"), generation)
    settings = {"pairs_per_image": 1, "save_strategy": "steps"} | SETTINGS | changes
    return tiny.build_preference_trainer(pictures, output_dir, validation, **settings)


TRAINERS = {
    "shared prefix": qwen_trainer,
    "one caption a sequence": partial(qwen_trainer, shared_prefix=False),
    "cached features": partial(qwen_trainer, cache=True),
    "captioner": captioner_trainer,
    "preferences": preference_trainer,
}


class Kill:
    """Ends the process with SIGKILL when it is about to write for the nth time: to open a file for that, or to make,
    rename, cut off or delete one. What it was about to do is in the file `told`."""

    EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")

    def __init__(self, at: int, told: Path):
        self.left, self.told = at, told
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[0], (str, Path)) and args[2] & (os.O_WRONLY | os.O_RDWR)
        made_before = event == "os.mkdir" and Path(args[0]).exists()
        if not (writes or event in self.EVENTS) or made_before or self.left == 0:
            return
        self.left -= 1
        if self.left == 0:  # opening the file below is an event, too
            self.told.write_text(f"{event} {Path(args[0]).name}", encoding="utf-8")
            os.kill(os.getpid(), signal.SIGKILL)


def limit_file_size(size: int, kill: bool) -> None:
    """The kernel ends the process in the middle of the write that makes a file larger; or the write fails."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def trace(trainer, path: Path) -> None:
    """Writes a line for each batch that goes through the model: step, hash of its tokens and pixels."""

    def line(model, args, kwargs) -> None:
        if model.training:
            digest = hashlib.sha256()
            for key in sorted(kwargs):
                if torch.is_tensor(kwargs[key]):
                    digest.update(kwargs[key].contiguous().numpy().tobytes())
            with path.open("a") as file:
                file.write(f"{trainer.state.global_step} {digest.hexdigest()}\n")

    trainer.model.register_forward_pre_hook(line, with_kwargs=True)


def use_scaler(trainer) -> None:
    """A GradScaler as in float16, on the CPU: its first losses overflow, it skips those steps, and grows again."""
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=2)


def record(trainer) -> dict:
    """What must be the same, whatever happened on the way."""
    log = [
        {key: value for key, value in entry.items() if key in PROJECTED or key.startswith(("eval_", "bad"))}
        for entry in trainer.state.log_history
        if "loss" in entry or any(key.startswith("eval_") for key in entry)
    ]
    for entry in log:
        entry.pop("eval_seconds", None)
    return {
        "log": log,
        "steps": trainer.state.global_step,
        "best": [trainer.state.best_global_step, trainer.state.best_metric],
        "learning_rates": [group["lr"] for group in trainer.optimizer.param_groups],
        "scale": trainer.accelerator.scaler and trainer.accelerator.scaler.state_dict(),
        "random": [random.random(), torch.rand(()).item()],
    }


def recipe(
    kind: str,
    pictures: Path,
    folder: Path,
    resume: str | None = None,
    scaler: bool = False,
    stop_at: int | None = None,
    stop_in_validation: int | None = None,
    stops: tuple[int, ...] = (signal.SIGTERM,),
    kill_in: int | None = None,
    hold: Path | None = None,
    rank: tuple[int, int, int] | None = None,
    size_limit: int | None = None,
    kill: bool = False,
    **changes,
) -> None:
    """As a recipe does: finds a checkpoint, trains, saves; leaves `result.json`. An error is a line and status 1.

    Args:
        stop_at, kill_in: sends itself `stops`, or SIGKILL, when this many steps are done and the next one runs.
        stop_in_validation: sends itself `stops` in the validation after this many steps.
        rank: number of the process, of how many, and a free port.
        hold: a file; while it is there, the second step waits in front of its batches.
        size_limit: bytes a file may have; with `kill`, the process ends in the middle of the write.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background has it ignored
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, as in a process that was not forked here
    if rank is not None:
        keys = ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK")
        os.environ |= dict(zip(keys, map(str, [*rank, rank[0]]), strict=True)) | {"MASTER_ADDR": "127.0.0.1"}
    try:
        if size_limit is not None:
            limit_file_size(size_limit, kill)
        checkpoint = find_checkpoint(folder / "run", resume)
        trainer = TRAINERS[kind](pictures, folder / "run", **changes)
        if scaler:
            use_scaler(trainer)
        trace(trainer, folder / "trace.txt")

        pending = list(stops)  # once: a step has several batches

        def stop() -> None:
            while pending:
                os.kill(os.getpid(), pending.pop())

        def slowly(*call) -> None:
            if trainer.model.training:
                while hold is not None and hold.exists() and trainer.state.global_step == 1:
                    time.sleep(0.02)
                if trainer.state.global_step == stop_at:
                    stop()
                if trainer.state.global_step == kill_in:
                    os.kill(os.getpid(), signal.SIGKILL)
            elif trainer.state.global_step == stop_in_validation:
                stop()

        trainer.model.register_forward_pre_hook(slowly)
        trainer.train(resume_from_checkpoint=checkpoint)
        save_trained(trainer, folder / "run/trained", splits_of(pictures), {}, *CAPTIONING)
    except (CheckpointError, DataError) as error:
        print(f"error: {error}", flush=True)
        sys.exit(1)
    if trainer.args.should_save:
        (folder / "result.json").write_text(json.dumps(record(trainer)), encoding="utf-8")


def in_fork(function: Callable[[], None]) -> int:
    """Exit status of a function in a process forked from this one; -9 if SIGKILL ended it."""
    process = os.fork()
    if process == 0:
        status = 1
        torch.set_num_threads(1)  # makes torch's pool again, before threads that read pictures would, both at once
        try:
            function()
            status = 0
        except SystemExit as end:
            status = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_in_every_write(pictures: Path, folder: Path, base: Path, first: int, step: int, **changes) -> None:
    """For n = first, first + step, ...: a run that resumes from the checkpoint in `base` is killed at its nth write,
    and another one resumes from what that left. Appends to `folder/report.jsonl` what was killed and how it ended."""
    folder.mkdir()
    log = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    trainer = qwen_trainer(pictures, folder / "run", **changes)
    splits = splits_of(pictures)

    def resume_run(kill_at: int | None = None) -> None:
        checkpoint = find_checkpoint(folder / "run", "latest")
        (folder / "from").write_text(Path(checkpoint).name)
        if kill_at is not None:
            Kill(kill_at, folder / "told")
        trainer.train(resume_from_checkpoint=checkpoint)
        save_trained(trainer, folder / "run/trained", splits, {}, *CAPTIONING)
        if kill_at is None:
            (folder / "result.json").write_text(json.dumps(record(trainer)), encoding="utf-8")

    while True:
        shutil.rmtree(folder / "run", ignore_errors=True)
        shutil.copytree(base, folder / "run")
        (folder / "told").unlink(missing_ok=True)
        killed = in_fork(partial(resume_run, first))
        if killed == 0:
            break
        status = in_fork(resume_run)
        line = {"kill": killed, "write": first, "told": (folder / "told").read_text(), "status": status}
        line |= {"from": (folder / "from").read_text(), "files": tree(folder / "run")}
        line["result"] = json.loads((folder / "result.json").read_text())
        with (folder / "report.jsonl").open("a") as report:
            report.write(json.dumps(line) + "\n")
        first += step


def kill_in_every_write_of_features(pictures: Path, folder: Path) -> None:
    """As `kill_in_every_write`, for the feature cache."""
    folder.mkdir()
    log = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    features.BATCH = 2
    model, processor, splits = tiny.build_model("qwen2_vl"), tiny.build_processor("qwen2_vl"), splits_of(pictures)

    def cache(kill_at: int | None = None) -> None:
        if kill_at is not None:
            Kill(kill_at, folder / "told")
        arguments = (model, processor, splits.train, "tiny", None, splits.bad_images)
        features.cache_features(folder / "cache", *arguments)

    for write in itertools.count(1):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        killed = in_fork(partial(cache, write))
        line = {"kill": killed, "write": write}
        if killed != 0:
            line |= {"told": (folder / "told").read_text(), "status": in_fork(cache)}
        with (folder / "report.jsonl").open("a") as report:
            report.write(json.dumps(line | {"files": tree(folder / "cache")}) + "\n")
        if killed == 0:
            break


def on_small_disk(pictures: Path, folder: Path, size: int, **changes) -> None:
    """A run whose output folder is a file system of `size` bytes, and one that resumes when it has become larger.

    Leaves the report of both in `folder`: the small one in `full.json`. Status 77 where the kernel lets no user mount.
    """
    folder.mkdir()
    run = folder / "run"
    run.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER | CLONE_NEWNS
        sys.exit(77)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")

    def mount(size: int, flags: int = 0) -> None:
        if libc.mount(b"tmpfs", os.fsencode(run), b"tmpfs", flags, f"size={size}".encode()):
            sys.exit(77)

    mount(size)
    status = in_fork(partial(recipe, "shared prefix", pictures, folder, **changes))
    said = (folder / "output.txt").read_text().splitlines()
    left = {path.name: checkpoints.damage(path) for path in checkpoints.checkpoints(run)}
    report = {"status": status, "said": said[-1], "left": left, "folders": sorted(os.listdir(run))}
    (folder / "full.json").write_text(json.dumps(report))
    mount(100 * size, 0x20)  # MS_REMOUNT
    status = in_fork(partial(recipe, "shared prefix", pictures, folder, resume="latest", **changes))
    shutil.copytree(run / "trained", folder / "trained")
    sys.exit(status)


def tree(folder: Path) -> dict[str, str]:
    """Files below a folder and their hashes."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
