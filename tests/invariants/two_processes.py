"""Started by torchrun in test_processes.py: a training run whose losses and first gradients rank 0 writes down."""

import json
import os
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from tests.invariants import tiny


class Gradients(TrainerCallback):
    """Gradients of the first optimizer step."""

    def __init__(self):
        self.first = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.first:
            self.first = {
                n.removeprefix("module."): p.grad.clone() for n, p in model.named_parameters() if p.requires_grad
            }


def train(pictures: Path, output: Path, **settings) -> dict:
    """Trains for three steps; returns their losses, the gradients of the first, and what wrapped the model."""
    settings = {"max_steps": 3, "max_grad_norm": 0.0, "learning_rate": 1e-2, "captions_per_image": 7} | settings
    trainer = tiny.build_trainer(output, tiny.read_pictures(pictures), **settings)
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "gradients": gradients.first, "wrapper": type(trainer.model_wrapped).__name__}


def step_sharded(pictures: Path, output: Path) -> dict:
    """One loss and its gradients on every process's half of the images, with torch's `fully_shard` around each
    language layer and the whole model, as accelerate puts it on GPUs (it refuses to on a CPU)."""
    trainer = tiny.build_trainer(output, tiny.read_pictures(pictures), captions_per_image=7)
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
    return {"losses": [loss.item()], "gradients": gradients, "wrapper": type(model).__name__}


if __name__ == "__main__":
    pictures, output, settings = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    result = train(pictures, output, **settings) if settings else step_sharded(pictures, output)
    if os.environ["RANK"] == "0":
        torch.save(result, output / "result.pt")
