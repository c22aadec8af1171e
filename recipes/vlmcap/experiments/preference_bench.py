"""What scripts/bench_training.py measures of training on preferences: a step of TRL's DPOTrainer against one here.

`args` is the script's BenchArguments, `preset` the widths and depths of the model. Each picture has one pair, of its
first caption, chosen, and its last one. Both trainers start from the same adapter, and a step begins a little beside
it, so that margins are not zero. The log-probabilities of the reference are computed once here, before the first step,
and are not part of it; TRL computes them in every step (it refuses to do it before for pictures).
"""

import statistics
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import datasets
import torch
from peft import get_peft_model
from trl import DPOConfig, DPOTrainer

from vlmcap import provenance
from vlmcap.data.images import open_image
from vlmcap.data.picture_files import PictureFile
from vlmcap.experiments import bench
from vlmcap.miniature.qwen2_vl import JAPANESE_PROMPT
from vlmcap.models.load import ModelArguments, count_parameters, load_model, lora_config
from vlmcap.models.weights import read_adapter
from vlmcap.training.collator import BadImages
from vlmcap.training.dpo import CaptionDPOTrainer
from vlmcap.training.trainer_arguments import CaptionDPOConfig

# Steps a round.
ENGINES = {"trl_dpo": 1, "trl_dpo_lean": 1, "dpo": 3}


def measure(args, preset: dict, folder: Path, processor, rows: datasets.Dataset) -> dict:
    """The JSON document, after a line for each engine and round.

    Args:
        rows: as `bench.build_rows` returns them, with the checkpoint in `args.model` or `folder` / "model".
    """
    start = _with_adapter(args, preset, folder)
    weights = bench.random_adapter(start, args.seed)
    for name, parameter in start.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(weights[name])
    start.save_pretrained(folder / "adapter", save_embedding_layers=False)
    beside = {name: value + 0.01 * value.std() * torch.randn_like(value) for name, value in weights.items()}
    trainers = {engine: _build(engine, args, preset, folder, processor, rows) for engine in ENGINES}
    trainers["dpo"].find_reference()
    watches = {engine: bench.Watch(args.device) for engine in trainers}
    first, gradients = {}, {}
    for engine, trainer in trainers.items():
        trainer.add_callback(watches[engine])
        watches[engine].keep_gradients = True
        loss = bench.step(trainer, beside)
        gradients[engine] = {n: g for n, g in watches[engine].gradients.items() if ".ref." not in n}
        watches[engine].keep_gradients, watches[engine].gradients = False, None
        watches[engine].seconds.clear()
        watches[engine].peak.clear()
        first[engine] = {"loss": loss}
    for engine in ("trl_dpo", "trl_dpo_lean"):
        first[engine]["max_grad_rel_diff"] = bench.relative_difference(gradients["dpo"], gradients[engine])
    for number in range(args.rounds):
        for engine, trainer in trainers.items():
            for _ in range(ENGINES[engine]):
                bench.step(trainer, beside)
            print(f"round {number + 1}: {engine:<16}{watches[engine].seconds[-1]:9.3f} s a step", flush=True)
    return _document(args, preset, trainers, watches, first, len(rows))


def _with_adapter(args, preset: dict, folder: Path):
    model = load_model(str(args.model or folder / "model"), load_in_4bit=preset["load_in_4bit"])
    torch.manual_seed(args.seed)
    return get_peft_model(model, _configuration(args, model))


def _configuration(args, model):
    return lora_config(model, ModelArguments(model_name_or_path=args.preset, lora_dropout=0.0))


def _build(engine: str, args, preset: dict, folder: Path, processor, rows: datasets.Dataset):
    """A trainer, one optimizer step an epoch: all pictures, a pair of each."""
    settings = {
        "output_dir": str(folder / engine),
        "per_device_train_batch_size": len(rows),
        "max_steps": 1,
        "learning_rate": 1e-5,
        "gradient_checkpointing": engine == "trl_dpo",  # DPOConfig's default
        "use_cpu": args.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": args.seed,
    }
    resolved = CaptionDPOConfig(output_dir=str(folder), use_cpu=settings["use_cpu"])  # the precision of the device
    if engine == "dpo":
        hashes = [sha256(PictureFile(row["image"]["path"]).read()).hexdigest() for row in rows]
        pairs = rows.remove_columns("captions").add_column("sha256", hashes)
        pairs = pairs.add_column("chosen", [[texts[0]] for texts in rows["captions"]])
        pairs = pairs.add_column("rejected", [[texts[-1]] for texts in rows["captions"]])
        model = load_model(str(args.model or folder / "model"), load_in_4bit=preset["load_in_4bit"])
        return CaptionDPOTrainer(
            model=model,
            args=CaptionDPOConfig(**settings),
            rows=pairs,
            heldout=pairs.select([0]),
            processing_class=processor,
            prompt=JAPANESE_PROMPT,
            bad_images=BadImages(folder / "bad_images.jsonl", limit=0),
            peft_config=_configuration(args, model),
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
    model = _with_adapter(args, preset, folder)
    model.load_adapter(str(folder / "adapter"), "default", is_trainable=True)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**settings, max_length=None, bf16=resolved.bf16, fp16=resolved.fp16),
        train_dataset=datasets.Dataset.from_list(examples),
        processing_class=processor,
    )
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad = parameter.requires_grad and ".ref." not in name
        if parameter.requires_grad:  # in float32 as here; the GradScaler of float16 fails on TRL's bfloat16
            parameter.data = parameter.data.float()
    return trainer


def _document(args, preset: dict, trainers: dict, watches: dict, first: dict, pairs: int) -> dict:
    rows = []
    for engine, watch in watches.items():
        weights = sum(p.numel() * p.element_size() for p in trainers[engine].model.parameters())
        rows.append(
            {
                "engine": engine,
                "pairs_per_s": pairs / statistics.median(watch.seconds),
                "step_s_median": statistics.median(watch.seconds),
                "step_s": watch.seconds,
                "peak_mem_bytes": weights + max(watch.peak),
                "max_grad_rel_diff": None,
            }
            | first[engine]
        )
    seconds = {row["engine"]: row["step_s_median"] for row in rows}
    return {
        "rows": rows,
        "speedup_vs_trl": {engine: seconds["trl_dpo"] / value for engine, value in seconds.items()},
        "speedup_vs_trl_lean": {engine: seconds["trl_dpo_lean"] / value for engine, value in seconds.items()},
        "settings": asdict(args),
        "model": {
            "parameters": count_parameters(trainers["dpo"].model),
            "weights": "random",
            "quantization": "nf4" if preset["load_in_4bit"] else None,
        },
        "batch": {"images": pairs, "pairs": pairs},
        "hardware": provenance.hardware(),
        "versions": provenance.versions(),
        "commit": provenance.git_commit(),
        "created": provenance.now(),
    }


def table(document: dict) -> str:
    """The rows as lines of text."""
    heads = ["step", "pairs/s", "vs TRL", "vs lean", "peak GiB", "loss", "gradients differ"]
    lines = [f"{'':<16}" + "".join(f"{head:>12}" for head in heads[:-1]) + f"{heads[-1]:>18}"]
    for row in document["rows"]:
        engine, differ = row["engine"], row["max_grad_rel_diff"]
        cells = [f"{row['step_s_median']:.3f} s", f"{row['pairs_per_s']:.2f}"]
        cells += [f"{document[key][engine]:.2f}x" for key in ("speedup_vs_trl", "speedup_vs_trl_lean")]
        cells += [f"{row['peak_mem_bytes'] / 2**30:.2f}", f"{row['loss']:.5f}"]
        line = f"{engine:<16}" + "".join(f"{cell:>12}" for cell in cells)
        lines.append(line + f"{'-' if differ is None else f'{differ:.1e}':>18}")
    return "\n".join(lines)
