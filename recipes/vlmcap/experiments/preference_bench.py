"""What scripts/bench_training.py measures of training on preferences: a step of TRL's DPOTrainer against one here.

`args` is the script's BenchArguments, `preset` the widths and depths of the model. Each picture has one pair, of its
first caption, chosen, and its last one. Both trainers start from the same adapter, and a step begins a little beside
it, so that margins are not zero. The log-probabilities of the reference are computed once here, before the first step,
and are not part of it; TRL computes them in every step (it refuses to do it before for pictures).
"""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import datasets
import torch
from trl import DPOConfig, DPOTrainer

from vlmcap.data.images import open_image
from vlmcap.data.picture_files import PictureFile
from vlmcap.experiments import bench
from vlmcap.miniature.qwen2_vl import JAPANESE_PROMPT
from vlmcap.models.weights import read_adapter
from vlmcap.training.collator import BadImages
from vlmcap.training.dpo import CaptionDPOTrainer
from vlmcap.training.trainer_arguments import CaptionDPOConfig


def measure(args, preset: dict, folder: Path, processor, rows: datasets.Dataset) -> Iterator[dict]:
    """The JSON document after each round; arguments as of `bench.measure`."""
    weights = bench.write_adapter(args, preset, folder)
    beside = {name: value + 0.01 * value.std() * torch.randn_like(value) for name, value in weights.items()}
    trainers = {engine: _build(engine, args, preset, folder, processor, rows) for engine in args.engines}
    if "dpo" in trainers:
        trainers["dpo"].find_reference()
    watches = bench.watch_all(trainers, bench.Watch, args)
    first, gradients = {}, {}
    for engine, trainer in trainers.items():
        watches[engine].keep_gradients = True
        first[engine] = {"loss": bench.step(trainer, beside), "max_grad_rel_diff": None}
        gradients[engine] = {n: g for n, g in watches[engine].gradients.items() if ".ref." not in n}
        watches[engine].forget()
    if ours := gradients.pop("dpo", None):
        for engine, theirs in gradients.items():
            first[engine]["max_grad_rel_diff"] = bench.relative_difference(ours, theirs)
    for _ in bench.rounds(args, trainers, watches, beside):
        found = bench.step_rows(trainers, watches, {"pairs": len(rows)})
        yield {
            "rows": [row | first[row["engine"]] for row in found],
            "speedup_vs_trl": bench.speedups(found, "trl_dpo"),
            "speedup_vs_trl_lean": bench.speedups(found, "trl_dpo_lean"),
            "batch": {"images": len(rows), "pairs": len(rows)},
        } | bench.machine(args, preset, next(iter(trainers.values())).model)


def _build(engine: str, args, preset: dict, folder: Path, processor, rows: datasets.Dataset):
    """A trainer, one optimizer step an epoch: all pictures, a pair of each."""
    settings = bench.one_step(engine, args, folder) | {
        "per_device_train_batch_size": len(rows),
        "learning_rate": 1e-5,
        "gradient_checkpointing": engine == "trl_dpo",  # DPOConfig's default
    }
    ours = CaptionDPOConfig(**settings)
    if engine == "dpo":
        hashes = [sha256(PictureFile(row["image"]["path"]).read()).hexdigest() for row in rows]
        pairs = rows.remove_columns("captions").add_column("sha256", hashes)
        pairs = pairs.add_column("chosen", [[texts[0]] for texts in rows["captions"]])
        pairs = pairs.add_column("rejected", [[texts[-1]] for texts in rows["captions"]])
        pairs = pairs.add_column("asked", [[JAPANESE_PROMPT]] * len(rows))
        model = bench.load_base(args, preset, folder)
        return CaptionDPOTrainer(
            model=model,
            args=ours,
            rows=pairs,
            heldout=pairs.select([0]),
            processing_class=processor,
            prompt=JAPANESE_PROMPT,
            bad_images=BadImages(folder / "bad_images.jsonl", limit=0),
            peft_config=bench.adapter_config(args, model),
            adapter=read_adapter(str(folder / "adapter")),
        )
    examples = [
        {
            "images": [open_image(row)],
            "prompt": [{"role": "user", "content": JAPANESE_PROMPT}],
            "chosen": [{"role": "assistant", "content": row["captions"][0]}],
            "rejected": [{"role": "assistant", "content": row["captions"][-1]}],
        }
        for row in rows
    ]
    trainer = DPOTrainer(
        model=bench.load_adapted(args, preset, folder),
        args=DPOConfig(**settings, max_length=None, bf16=ours.bf16, fp16=ours.fp16),
        train_dataset=datasets.Dataset.from_list(examples),
        processing_class=processor,
    )
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad = parameter.requires_grad and ".ref." not in name
    bench.train_in_float32(trainer.model)
    return trainer
