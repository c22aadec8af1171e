"""What scripts/bench_training.py measures: trainers on random weights, their steps, and what a step must compute.

`args` is the script's BenchArguments, `preset` the widths and depths of the model. The last part of the module is
shared with `preference_bench` and `reward_bench`, which train an adapter further.
"""

import ctypes
import gc
import re
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import datasets
import psutil
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PrinterCallback, Qwen2VLConfig, Qwen2VLForConditionalGeneration, TrainerCallback
from trl import SFTConfig, SFTTrainer

from vlmcap import provenance
from vlmcap.data.images import open_image
from vlmcap.experiments.presets import ENGINES, PROMPTS
from vlmcap.markdown import text_table
from vlmcap.miniature.qwen2_vl import JAPANESE_PROMPT
from vlmcap.miniature.scenes import scenes
from vlmcap.models.load import ModelArguments, base_model, count_parameters, load_model, lora_config
from vlmcap.training.collator import BadImages, caption_examples, conversations
from vlmcap.training.shared_prefix import PADDING, PREFIX, SharedPrefixCollator, branch_mask
from vlmcap.training.trainer import CaptionTrainer
from vlmcap.training.trainer_arguments import CaptionSFTConfig

# NVIDIA's data sheets: dense 16-bit tensor-core operations a second.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "A10": 125e12, "T4": 65e12}
# What a model is loaded in on a GPU for a precision, as the recipe does on one that has no other.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Of a document -> what the column of a table is called.
SPEEDUPS = {"speedup_vs_stock": "vs stock", "speedup_vs_stock_lean": "vs lean"}
SPEEDUPS |= {"speedup_vs_trl": "vs TRL", "speedup_vs_trl_lean": "vs lean"}


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


def build_rows(images: int, folder: Path, seed: int, languages: Sequence[str] = ()) -> datasets.Dataset:
    """Drawn scenes of 640 x 480 pixels with five captions each, as long as real ones: 15 tokens.

    languages: of `PROMPTS`; the captions are in each of them in turn, and have its prompt.
    """
    features = {
        "image_id": datasets.Value("int64"),
        "file_name": datasets.Value("string"),
        "captions": datasets.List(datasets.Value("string")),
        "image": datasets.Image(decode=False),
    }
    if languages:
        features["prompts"] = datasets.List(datasets.List(datasets.Value("string")))
    rows = []
    for number, scene in enumerate(scenes(images, seed, held_out=False)):
        path = folder / f"{number}.png"
        scene.draw().resize((640, 480)).save(path)
        captions = {"ja": scene.japanese(), "en": scene.english(), "vi": scene.vietnamese()}
        row = {"image_id": number, "file_name": path.name, "captions": captions["ja"]}
        if languages:
            turns = [languages[place % len(languages)] for place in range(5)]
            row["captions"] = [captions[language][place] for place, language in enumerate(turns)]
            row["prompts"] = [[PROMPTS[language]] for language in turns]
        rows.append(row | {"image": {"bytes": None, "path": str(path)}})
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def build_trainer(engine: str, args, preset: dict, folder: Path, processor, rows: datasets.Dataset):
    """A trainer on the checkpoint in `folder`, one optimizer step an epoch: all images with all their captions."""
    fast = engine.startswith("shared_prefix")
    flags = {"bf16": None, "fp16": False} if args.precision is None else {"bf16": False, "fp16": False}
    if args.precision in ("bf16", "fp16"):
        flags[args.precision] = True
    settings = one_step(engine, args, folder) | {
        "per_device_train_batch_size": len(rows) if fast else sum(map(len, rows["captions"])),
        "learning_rate": 1e-4,
        "label_smoothing_factor": 0.0 if engine == "trl_stock_lean" else 0.1,
        "gradient_checkpointing": args.gradient_checkpointing if fast else engine == "trl_stock",
        "max_length": None,
    }
    model = load_model(
        str(args.model or folder / "model"),
        load_in_4bit=preset["load_in_4bit"],
        dtype=DTYPES.get(args.precision) if args.device == "cuda" else None,
        attn_implementation="flex_attention" if engine == "shared_prefix_flex" else "sdpa",
    )
    peft_config = adapter_config(args, model)
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
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": caption}],
        }
        for row in rows
        for prompt, caption in conversations(row, JAPANESE_PROMPT)[0]
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
        train_in_float32(trainer.model)
    return trainer


class Watch(TrainerCallback):
    """Seconds and peak memory (above what was in use before) of every step; gradients of the last one, when asked."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.seconds, self.peak = [], []
        self.keep_gradients, self.gradients = False, None

    def forget(self) -> None:
        """What a first step, which is slower or was compared, has left."""
        self.keep_gradients, self.gradients = False, None
        self.seconds.clear()
        self.peak.clear()

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
        watch.forget()
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


def measure(args, preset: dict, folder: Path, processor, rows: datasets.Dataset) -> Iterator[dict]:
    """The JSON document after each round.

    Args:
        rows: as `build_rows` returns them, with the checkpoint in `args.model` or `folder` / "model".
    """
    trainers = {engine: build_trainer(engine, args, preset, folder, processor, rows) for engine in args.engines}
    watches = watch_all(trainers, Watch, args)
    model = next(iter(trainers.values())).model
    adapter = random_adapter(model, args.seed)
    first = compare_first_steps(trainers, watches, adapter)
    examples = list(caption_examples(rows, 5))
    bad_images = BadImages(folder / "bad_images.jsonl", limit=0)
    batch = SharedPrefixCollator(rows, processor, JAPANESE_PROMPT, bad_images, base_model(model))(examples)
    for _ in rounds(args, trainers, watches, adapter):
        yield summarise(args, preset, trainers, watches, first, batch)


def summarise(args, preset: dict, trainers: dict, watches: dict, first: dict, batch: dict) -> dict:
    peak, peak_source = peak_flops(args.device)
    model = next(iter(trainers.values())).model
    work = useful_flops(model, batch)
    captions = caption_lengths(batch)
    vision = base_model(model).model.visual.named_parameters()
    rows = step_rows(trainers, watches, {"captions": len(captions), "images": args.images})
    for row in rows:
        row |= {"max_grad_rel_diff": None, "mfu": work / row["step_s_median"] / peak} | first[row["engine"]]
    document = machine(args, preset, model)
    document["model"]["vision_parameters"] = sum(p.numel() for n, p in vision if ".modules_to_save." not in n)
    return {
        "rows": rows,
        "speedup_vs_stock": speedups(rows, "trl_stock"),
        "speedup_vs_stock_lean": speedups(rows, "trl_stock_lean"),
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
    } | document


def caption_lengths(batch: dict) -> list[int]:
    """Tokens of every caption of a shared-prefix batch, end of turn included."""
    trained = batch["segments"] * (batch["labels"] != -100)
    return [int((row == segment).sum()) for row in trained for segment in row.unique() if segment > PREFIX]


# Of every method -----------------------------------------------------------------------------------------------------
def one_step(engine: str, args, folder: Path) -> dict:
    """What all trainers are set to: one optimizer step an epoch, of which nothing is kept but the log."""
    return {
        "output_dir": str(folder / engine),
        "max_steps": 1,
        "use_cpu": args.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": args.seed,
    }


def adapter_config(args, model) -> LoraConfig:
    """Without dropout, so that losses and gradients can be compared."""
    return lora_config(model, ModelArguments(model_name_or_path=args.preset, lora_dropout=0.0))


def load_base(args, preset: dict, folder: Path):
    return load_model(str(args.model or folder / "model"), load_in_4bit=preset["load_in_4bit"])


def write_adapter(args, preset: dict, folder: Path) -> dict[str, torch.Tensor]:
    """A random adapter in `folder` / "adapter", from which training further starts. Returns its weights."""
    model = load_base(args, preset, folder)
    model = get_peft_model(model, adapter_config(args, model))
    weights = random_adapter(model, args.seed)
    for name, value in weights.items():
        model.get_parameter(name).data.copy_(value)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return weights


def load_adapted(args, preset: dict, folder: Path) -> PeftModel:
    """The base with the adapter of `write_adapter`, for TRL to train."""
    return PeftModel.from_pretrained(load_base(args, preset, folder), folder / "adapter", is_trainable=True)


def train_in_float32(model) -> None:
    """As this project's trainers do; the GradScaler of float16 fails on TRL's bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def watch_all(trainers: dict, kind: type, args) -> dict:
    """Engine -> the watch of its trainer, of this kind."""
    watches = {engine: kind(args.device) for engine in trainers}
    for engine, trainer in trainers.items():
        trainer.add_callback(watches[engine])
        trainer.remove_callback(PrinterCallback)
    return watches


def rounds(args, trainers: dict, watches: dict, adapter: dict[str, torch.Tensor]) -> Iterator[None]:
    """In each round every engine takes its steps in turn, from the given weights; yields after a line for each."""
    for number in range(args.rounds):
        for engine, trainer in trainers.items():
            for _ in range(ENGINES[args.method][engine]):
                step(trainer, adapter)
            print(f"round {number + 1}: {engine:<16}{watches[engine].seconds[-1]:9.3f} s a step", flush=True)
        yield


def step_rows(trainers: dict, watches: dict, counts: dict[str, int]) -> list[dict]:
    """A row an engine: seconds, memory, and how many a second of what a step has (`counts`)."""
    rows = []
    for engine, watch in watches.items():
        seconds = statistics.median(watch.seconds)
        weights = sum(p.numel() * p.element_size() for p in trainers[engine].model.parameters())
        rows.append(
            {"engine": engine}
            | {f"{what}_per_s": count / seconds for what, count in counts.items()}
            | {"step_s_median": seconds, "step_s": watch.seconds, "peak_mem_bytes": weights + max(watch.peak)}
        )
    return rows


def speedups(rows: list[dict], peer: str) -> dict[str, float]:
    """Engine -> how many times faster than `peer` its step is; empty where that was not measured."""
    seconds = {row["engine"]: row["step_s_median"] for row in rows}
    return {engine: seconds[peer] / value for engine, value in seconds.items()} if peer in seconds else {}


def machine(args, preset: dict, model) -> dict:
    """What every document says of the model and of where it was measured."""
    quantization = "nf4" if preset["load_in_4bit"] else None
    return {
        "settings": asdict(args),
        "model": {"parameters": count_parameters(model), "weights": "random", "quantization": quantization},
        "hardware": provenance.hardware(),
        "versions": provenance.versions(),
        "commit": provenance.git_commit(),
        "created": provenance.now(),
    }


def table(document: dict) -> str:
    """The rows as lines of text."""
    lines = []
    for row in document["rows"]:
        cells = {"": row["engine"], "step": f"{row['step_s_median']:.3f} s"}
        for what in ("captions", "pairs", "samples"):
            if f"{what}_per_s" in row:
                cells[f"{what}/s"] = f"{row[f'{what}_per_s']:.2f}"
        for key, head in SPEEDUPS.items():
            if key in document:
                ratio = document[key].get(row["engine"])
                cells[head] = f"{ratio:.2f}x" if ratio else "-"
        cells["peak GiB"] = f"{row['peak_mem_bytes'] / 2**30:.2f}"
        if "mfu" in row:
            cells["MFU"] = f"{row['mfu']:.1%}"
        if "loss" in row:
            differ = row["max_grad_rel_diff"]
            cells |= {"loss": f"{row['loss']:.5f}", "gradients differ": "-" if differ is None else f"{differ:.1e}"}
        lines.append(cells)
    return text_table([list(lines[0]), *(list(cells.values()) for cells in lines)])
