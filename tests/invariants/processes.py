"""Training runs that test_processes.py starts, alone and as one of several; process 0 writes down the result."""

import os
import runpy
import sys
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from tests.invariants import rewarded, tiny
from vlmcap.captioning.arguments import BeamArguments, GenerationArguments
from vlmcap.models.vit_gpt2 import VitGpt2Arguments, build_vit_gpt2
from vlmcap.training import validation
from vlmcap.training.captioner import CaptionerTrainer
from vlmcap.training.collator import BadImages
from vlmcap.training.trainer_arguments import CaptionerTrainingArguments

FSDP_CONFIG = Path(__file__).resolve().parents[2] / "accelerate_configs/fsdp_qlora.yaml"


class Gradients(TrainerCallback):
    """Gradients of the first optimizer step."""

    def __init__(self):
        self.first = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.first:
            self.first = {
                n.removeprefix("module."): whole(p.grad)
                for n, p in model.named_parameters()
                if p.requires_grad and not n.endswith("k_proj.bias")  # zero up to rounding: softmax does not see it
            }


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def write(result: dict, output: Path) -> None:
    if os.environ.get("RANK", "0") == "0":
        torch.save(result, output)


def result_of(trainer, gradients: Gradients) -> dict:
    log = trainer.state.log_history
    return {
        "losses": [entry["loss"] for entry in log if "loss" in entry],
        "scores": [{k: v for k, v in entry.items() if k != "eval_seconds"} for entry in log if "eval_loss" in entry],
        "gradients": gradients.first,
        "wrapper": type(trainer.model_wrapped).__name__,
    }


def train(pictures: Path, output: Path, settings: dict) -> None:
    """A few steps of Qwen2-VL: losses, the gradients of the first step, and what wrapped the model."""
    train_on(tiny.read_pictures(pictures), output, settings)


def train_prompted(pictures: Path, output: Path, settings: dict) -> None:
    """The same, of captions with prompts of their own, and conversations."""
    train_on(tiny.prompted(tiny.read_pictures(pictures)), output, settings)


def train_on(rows, output: Path, settings: dict) -> None:
    settings = {"max_steps": 6, "max_grad_norm": 0.0, "learning_rate": 1e-2} | settings
    trainer = tiny.build_trainer(output.parent, rows, **settings)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    write(result_of(trainer, gradients), output)


def train_on_rewards(pictures: Path, output: Path, settings: dict) -> None:
    """The same of training on rewards, with the samples that each process draws for its images."""
    folder = output.parent / os.environ.get("RANK", "0")
    adapter = rewarded.write_adapter(folder)
    settings = {"max_steps": 4, "learning_rate": 1e-2, "loss_type": "dapo", "scale_rewards": "batch"} | settings
    trainer = rewarded.build(output.parent, tiny.read_pictures(pictures), adapter, **settings)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    figures = ("reward", "reward_std", "kl", "completions/mean_length", "completions/distinct", "frac_reward_zero_std")
    scores = [{name: entry[name] for name in figures} for entry in log]
    write(result_of(trainer, gradients) | {"scores": scores}, output)


def train_preferences(pictures: Path, output: Path, settings: dict) -> None:
    """The same of training on preferences, one to three pairs of an image at a time, with the held-out pairs after
    every second step."""
    settings = {"max_steps": 6, "max_grad_norm": 0.0, "learning_rate": 1e-3, "pairs_per_image": 2} | settings
    settings |= {"beta": 0.1, "eval_strategy": "steps", "eval_steps": 2}
    trainer = tiny.build_preference_trainer(
        pictures, output.parent / f"run-{os.environ.get('WORLD_SIZE')}", **settings
    )
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    result = result_of(trainer, gradients)
    log = [entry for entry in trainer.state.log_history if "eval_reward_margin" in entry]
    result["scores"] = [{k: v for k, v in entry.items() if k.startswith(("eval_pref", "eval_rew"))} for entry in log]
    write(result, output)


def shard() -> None:
    """FSDP in this process as accelerate_configs/fsdp_qlora.yaml has it, in float32 and on a CPU, where accelerate
    would fall back to DistributedDataParallel."""
    arguments, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(FSDP_CONFIG), "--mixed_precision", "no", "x.py"])
    )
    place = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    os.environ |= prepare_multi_gpu_env(arguments) | place
    begin = AcceleratorState.__init__

    def sharded(state, *args, fsdp_plugin=None, **kwargs):
        begin(state, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            state.fsdp_plugin = fsdp_plugin
        if getattr(state, "fsdp_plugin", None):  # every AcceleratorState() takes the type again from PartialState
            state.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = sharded


def train_sharded(pictures: Path, output: Path, settings: dict) -> None:
    shard()
    train(pictures, output, settings)


def script(path: str, *arguments: str, sharded: bool = False) -> None:
    """A script or recipe, as if started with these arguments."""
    if sharded:
        shard()
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def train_captioner(pictures: Path, output: Path, settings: dict) -> None:
    """The same of ViT + GPT-2 without dropout, validated by captions and by loss after every second step."""
    rows = tiny.read_pictures(pictures)
    miniatures = tiny.MINIATURE.parent
    model, processor = build_vit_gpt2(
        VitGpt2Arguments(str(miniatures / "vit"), None, str(miniatures / "gpt2")), seed=0
    )
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    settings = {"max_steps": 6, "eval_steps": 2, "eval_strategy": "steps", "save_strategy": "no"} | settings
    settings |= {"report_to": [], "disable_tqdm": True, "logging_steps": 1, "use_cpu": True, "max_grad_norm": 0.0}
    trainer = CaptionerTrainer(
        model,
        CaptionerTrainingArguments(str(output.parent / "run"), **settings),
        rows,
        rows.select(range(5)),
        BadImages(output.parent / "bad.jsonl", 0),
        processor,
        ("decoder_input_ids", "decoder_attention_mask"),
        BeamArguments(num_beams=2, max_new_tokens=8, generation_batch_size=2),
        "english",
    )
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    write(result_of(trainer, gradients), output)


def step_sharded(pictures: Path, output: Path, settings: dict) -> None:
    """One loss and its gradients on every process's part of the images, with torch's `fully_shard` around each
    language layer and the whole model."""
    rows = tiny.read_pictures(pictures)
    trainer = tiny.build_trainer(output.parent, rows, **settings)
    for layer in trainer.model.get_base_model().model.language_model.layers:
        fully_shard(layer)
    model = fully_shard(trainer.model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(rank, len(trainer.train_dataset), world)])
    num_items = (batch["labels"] != -100).sum()
    torch.distributed.all_reduce(num_items)
    loss = trainer.compute_loss(model, batch, num_items_in_batch=num_items)
    loss.backward()
    gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.requires_grad}
    loss = loss.detach() / world  # FSDP averages over processes, which `compute_loss` has multiplied out
    torch.distributed.all_reduce(loss)
    write({"losses": [loss.item()], "scores": [], "gradients": gradients, "wrapper": type(model).__name__}, output)


def validate(pictures: Path, output: Path, settings: dict) -> None:
    """Ids of the images that this process captions for validation, and the scores it returns."""
    PartialState(cpu=True)
    asked = []
    open_image = validation.open_image

    def opened(row: dict):
        asked.append(row["image_id"])
        return open_image(row)

    validation.open_image = opened
    rows: datasets.Dataset = tiny.read_pictures(pictures)
    processor = tiny.build_processor("qwen2_vl")
    beams = GenerationArguments(prompt=tiny.PROMPT, num_beams=2, max_new_tokens=8, generation_batch_size=2)
    scores = validation.CaptionValidation(rows.select(range(settings["images"])), processor, beams)(
        tiny.build_model("qwen2_vl").eval()
    )
    torch.save({"asked": asked, "scores": scores}, f"{output}.{os.environ.get('RANK', '0')}")
