"""What scripts/bench_training.py measures: trainers on random weights, their steps, and what a step must compute.

`args` is the script's BenchArguments, `preset` the widths and depths of the model.
"""

import ctypes
import gc
import re
import statistics
import threading
import time
from dataclasses import asdict
from pathlib import Path

import datasets
import psutil
import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, TrainerCallback
from trl import SFTConfig, SFTTrainer

from vlmcap import provenance
from vlmcap.data.images import open_image
from vlmcap.miniature.qwen2_vl import JAPANESE_PROMPT
from vlmcap.miniature.scenes import scenes
from vlmcap.models.load import ModelArguments, base_model, count_parameters, load_model, lora_config
from vlmcap.training.collator import BadImages
from vlmcap.training.shared_prefix import PADDING, PREFIX, branch_mask
from vlmcap.training.trainer import CaptionTrainer
from vlmcap.training.trainer_arguments import CaptionSFTConfig

# NVIDIA's data sheets: dense 16-bit tensor-core operations a second.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "A10": 125e12, "T4": 65e12}
# What a model is loaded in on a GPU for a precision, as the recipe does on one that has no other.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def build_checkpoint(preset: dict, processor, folder: Path, seed: int, device: str = "cpu") -> None:
    """A random Qwen2-VL of the preset's size, saved in bfloat16 as the real one is published.

    device: where the weights are drawn. A GPU draws other numbers, and is done in a second.
    """
    token = processor.tokenizer.convert_tokens_to_ids
    text = dict(preset["text"])
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": text.pop("mrope_section")}
    text |= {"rope_parameters": rope, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6}
    text |= {"pad_token_id": token("<|endoftext|>"), "bos_token_id": None, "eos_token_id": token("<|im_end|>")}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=preset["vision"] | {"hidden_size": text["hidden_size"]},
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen2VLForConditionalGeneration(config)
    torch.set_default_dtype(default)
    model.save_pretrained(folder)


def build_rows(images: int, folder: Path, seed: int) -> datasets.Dataset:
    """Drawn scenes of 640 x 480 pixels with five captions each, as long as real ones: 15 tokens."""
    rows = []
    for number, scene in enumerate(scenes(images, seed, held_out=False)):
        path = folder / f"{number}.png"
        scene.draw().resize((640, 480)).save(path)
        rows.append({"image_id": number, "file_name": path.name, "captions": scene.japanese()})
        rows[-1]["image"] = {"bytes": None, "path": str(path)}
    features = datasets.Features(
        {
            "image_id": datasets.Value("int64"),
            "file_name": datasets.Value("string"),
            "captions": datasets.List(datasets.Value("string")),
            "image": datasets.Image(decode=False),
        }
    )
    return datasets.Dataset.from_list(rows, features=features)


def build_trainer(engine: str, args, preset: dict, folder: Path, processor, rows: datasets.Dataset):
    """A trainer on the checkpoint in `folder`, one optimizer step an epoch: all images with all their captions."""
    fast = engine.startswith("shared_prefix")
    flags = {"bf16": None, "fp16": False} if args.precision is None else {"bf16": False, "fp16": False}
    if args.precision in ("bf16", "fp16"):
        flags[args.precision] = True
    settings = {
        "output_dir": str(folder / engine),
        "per_device_train_batch_size": len(rows) if fast else sum(map(len, rows["captions"])),
        "max_steps": 1,
        "learning_rate": 1e-4,
        "label_smoothing_factor": 0.0 if engine == "trl_stock_lean" else 0.1,
        "gradient_checkpointing": args.gradient_checkpointing if fast else engine == "trl_stock",
        "use_cpu": args.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_length": None,
        "seed": args.seed,
    }
    model = load_model(
        str(args.model or folder / "model"),
        load_in_4bit=preset["load_in_4bit"],
        dtype=DTYPES.get(args.precision) if args.device == "cuda" else None,
        attn_implementation="flex_attention" if engine == "shared_prefix_flex" else "sdpa",
    )
    # Without dropout, so that losses and gradients can be compared.
    peft_config = lora_config(model, ModelArguments(model_name_or_path=args.preset, lora_dropout=0.0))
    torch.manual_seed(args.seed)
    if fast:
        return CaptionTrainer(
            model=model,
            args=CaptionSFTConfig(**settings, **flags),
            rows=rows,
            processing_class=processor,
            prompt=JAPANESE_PROMPT,
            bad_images=BadImages(folder / "bad_images.jsonl", limit=0),
            peft_config=peft_config,
        )
    examples = [
        {
            "images": [open_image(row)],
            "prompt": [{"role": "user", "content": JAPANESE_PROMPT}],
            "completion": [{"role": "assistant", "content": caption}],
        }
        for row in rows
        for caption in row["captions"]
    ]
    recipe = CaptionSFTConfig(output_dir=str(folder), **flags, use_cpu=settings["use_cpu"])  # resolves the precision
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings, bf16=recipe.bf16, fp16=recipe.fp16),
        train_dataset=datasets.Dataset.from_list(examples),
        processing_class=processor,
        peft_config=peft_config,
    )
    if not recipe.bf16:  # neither float32 on a CPU nor the GradScaler takes TRL's bfloat16 trainables
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return trainer


class Watch(TrainerCallback):
    """Seconds and peak memory (above what was in use before) of every step; gradients of the last one, when asked."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.seconds, self.peak = [], []
        self.keep_gradients, self.gradients = False, None

    def memory(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else psutil.Process().memory_info().rss

    def on_step_begin(self, args, state, control, **kwargs):
        gc.collect()
        if not self.cuda:
            ctypes.CDLL(None).malloc_trim(0)  # hands freed memory back, or the next peak would hide in it
        self.before, self.highest, self.stopped = self.memory(), 0, False
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            self.sampler = threading.Thread(target=self.sample, daemon=True)
            self.sampler.start()
        self.start = time.perf_counter()

    def sample(self):
        while not self.stopped:
            self.highest = max(self.highest, self.memory())
            time.sleep(0.02)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.keep_gradients:
            self.gradients = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}

    def on_step_end(self, args, state, control, **kwargs):
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)
        if self.cuda:
            self.peak.append(torch.cuda.max_memory_allocated() - self.before)
        else:
            self.stopped = True
            self.sampler.join()
            self.peak.append(self.highest - self.before)


def useful_flops(model, batch: dict) -> float:
    """Floating-point operations that a step on a shared-prefix batch cannot do without; a multiply and an add are two.

    ViT forward: 2 x parameters x patches, and 4 x patches^2 x width a layer for attention. Projector: forward, and
    twice that backward. Language layers over prefix and captions: 2 x parameters x tokens forward, the same backward
    to the activations; attention 4 x width x visible pairs a layer, and twice that backward. Logits: 2 x width x
    vocabulary a caption token forward, the same backward. LoRA's own products are left out.
    """
    vision, text = base_model(model).config.vision_config, base_model(model).config.get_text_config()
    # Counted from the widths: packed 4-bit weights do not tell their number.
    h, kv = text.hidden_size, text.hidden_size * text.num_key_value_heads // text.num_attention_heads
    language = text.num_hidden_layers * (2 * h * h + 2 * h * kv + 3 * h * text.intermediate_size)
    tower = vision.depth * (4 + 2 * vision.mlp_ratio) * vision.embed_dim**2
    merged = 4 * vision.embed_dim
    patches = batch["image_grid_thw"].prod(1)
    captions = (batch["labels"] != -100).sum().item()
    tokens = (batch["segments"] != PADDING).sum().item()
    pairs = branch_mask(batch["segments"]).sum().item()
    work = 2 * tower * patches.sum().item() + 4 * (patches**2).sum().item() * vision.embed_dim * vision.depth
    work += 3 * 2 * (merged * merged + merged * h) * patches.sum().item() / 4
    work += 2 * 2 * language * tokens + 3 * 4 * h * pairs * text.num_hidden_layers
    return work + 2 * 2 * h * text.vocab_size * captions


def peak_flops(device: str) -> tuple[float, str]:
    """Operations a second at best, and where the figure comes from."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        for key, peak in PEAK_FLOPS.items():
            if re.search(rf"\b{key}\b", name):
                return peak, f"data sheet of the {key}, dense 16-bit"
    size = 8192 if device == "cuda" else 2048
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    source = f"{size} x {size} matrix product in {str(dtype).removeprefix('torch.')}, timed here"
    return 2 * size**3 / min(seconds), source


def relative_difference(ours: dict, theirs: dict) -> float:
    """Largest ||a - b|| / ||b|| over the trainable tensors."""
    return max(float((ours[name] - gradient).norm() / gradient.norm()) for name, gradient in theirs.items())


def random_adapter(model, seed: int) -> dict[str, torch.Tensor]:
    """Trainable weights to start every step from: the model's own, but B of LoRA random. At zero A has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    weights = {n: p.detach().float().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}
    for name, value in weights.items():
        if ".lora_B." in name:
            value.normal_(std=0.02, generator=generator)
    return weights


def step(trainer, adapter: dict[str, torch.Tensor]) -> float:
    """One optimizer step on all images, from the given weights. Returns its loss."""
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(adapter[name])
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def compare_first_steps(trainers: dict, watches: dict, adapter: dict) -> dict[str, dict]:
    """Engine -> loss of its first step, and how far its gradients are from this recipe's at the same smoothing."""
    losses, gradients = {}, {}
    for engine, trainer in trainers.items():
        watch, smoothing = watches[engine], trainer.args.label_smoothing_factor
        watch.keep_gradients = True
        both = engine == "shared_prefix" and "trl_stock_lean" in trainers
        for epsilon in (0.0, smoothing) if both else (smoothing,):
            trainer.args.label_smoothing_factor = epsilon
            losses[engine, epsilon] = step(trainer, adapter)
            gradients[engine, epsilon] = watch.gradients
        watch.keep_gradients, watch.gradients = False, None
        watch.seconds.clear()
        watch.peak.clear()
    first = {}
    for engine, epsilon in losses:
        ours = ("shared_prefix", epsilon)
        first[engine] = {"loss": losses[engine, epsilon]}
        if engine != "shared_prefix" and ours in gradients:
            first[engine]["loss_rel_diff"] = abs(losses[ours] / losses[engine, epsilon] - 1)
            first[engine]["max_grad_rel_diff"] = relative_difference(gradients[ours], gradients[engine, epsilon])
    if "trl_stock" in first and "shared_prefix" in first:
        first["shared_prefix"] |= {k: v for k, v in first["trl_stock"].items() if k != "loss"}
    return first


def summarise(args, preset: dict, trainers: dict, watches: dict, first: dict, batch: dict) -> dict:
    """The JSON document."""
    peak, peak_source = peak_flops(args.device)
    model = next(iter(trainers.values())).model
    work = useful_flops(model, batch)
    captions = caption_lengths(batch)
    vision = base_model(model).model.visual.named_parameters()
    rows = []
    for engine, watch in watches.items():
        seconds = statistics.median(watch.seconds)
        weights = sum(p.numel() * p.element_size() for p in trainers[engine].model.parameters())
        rows.append(
            {
                "engine": engine,
                "captions_per_s": len(captions) / seconds,
                "images_per_s": args.images / seconds,
                "step_s_median": seconds,
                "step_s": watch.seconds,
                "peak_mem_bytes": weights + max(watch.peak),
                "max_grad_rel_diff": None,
                "mfu": work / seconds / peak,
            }
            | first[engine]
        )
    by_engine = {row["engine"]: row["step_s_median"] for row in rows}
    return {
        "rows": rows,
        "speedup_vs_stock": {e: by_engine["trl_stock"] / s for e, s in by_engine.items() if "trl_stock" in by_engine},
        "speedup_vs_stock_lean": {
            e: by_engine["trl_stock_lean"] / s for e, s in by_engine.items() if "trl_stock_lean" in by_engine
        },
        "settings": asdict(args),
        "model": {
            "parameters": count_parameters(model),
            "vision_parameters": sum(p.numel() for n, p in vision if ".modules_to_save." not in n),
            "weights": "random",
            "quantization": "nf4" if preset["load_in_4bit"] else None,
        },
        "batch": {
            "images": args.images,
            "captions": len(captions),
            "image_tokens": int(batch["image_grid_thw"][0].prod()) // 4,
            "prefix_tokens": batch["caption_start"],
            "caption_tokens_mean": statistics.mean(captions),
        },
        "useful_flops_a_step": work,
        "peak_flops": peak,
        "peak_flops_source": peak_source,
        "max_memory_reserved_bytes": torch.cuda.max_memory_reserved() if args.device == "cuda" else None,
        "hardware": provenance.hardware(),
        "versions": provenance.versions(),
        "commit": provenance.git_commit(),
        "created": provenance.now(),
    }


def caption_lengths(batch: dict) -> list[int]:
    """Tokens of every caption of a shared-prefix batch, end of turn included."""
    return [int((row == segment).sum()) for row in batch["segments"] for segment in row.unique() if segment > PREFIX]
