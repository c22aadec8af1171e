"""What scripts/gpu_check.py does: parts in processes of their own, each with a share of the time, and their tables.

Imports nothing heavy, and nothing that would take memory of the GPU from a part.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import psutil

from vlmcap.atomic_write import write_atomically
from vlmcap.markdown import fenced, markdown_escape, markdown_table
from vlmcap.places import ROOT

LAST_LINES = 15  # of what a failed part wrote to stderr
# Sizes of the benchmarks: on a GPU of a data center, on a smaller one, and on a CPU, where they show that they run.
LARGE_BYTES = 40 * 2**30
LARGE = {"images": 4, "rounds": 3, "pictures": 48, "batch": 16, "caption_rounds": 2, "max_pixels": 313_600}
SMALLER = LARGE | {"images": 1, "rounds": 2, "pictures": 16, "caption_rounds": 1}
CPU = SMALLER | {"rounds": 1, "pictures": 3, "batch": 2, "max_pixels": 12_544}
ENGINES = {
    "trl_stock": "TRL's `SFTTrainer` (smoothing 0.1, gradient checkpointing)",
    "trl_stock_lean": "the same without smoothing and checkpointing",
    "shared_prefix": "this recipe (smoothing 0.1)",
    "shared_prefix_flex": "this recipe with FlexAttention",
    "trl_dpo": "TRL's `DPOTrainer` as configured by default (gradient checkpointing)",
    "trl_dpo_lean": "the same without checkpointing",
    "dpo": "this recipe",
    "trl_grpo": "TRL's `GRPOTrainer` as configured by default (gradient checkpointing)",
    "trl_grpo_lean": "the same without checkpointing",
    "grpo": "this recipe",
    "stock": "`generate`",
    "branches": "this project's engine",
    "stock_both": "`generate`, base and adapter",
    "branches_both": "this project's engine, base and adapter",
}
OF_MACHINE = ("hardware", "versions", "commit", "created", "capability")


# Tables: rows of a part -> rows of a table, header first -------------------------------------------------------------
def gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f} GiB"


def ratio(numerator: float | None, denominator: float | None) -> str:
    return "-" if None in (numerator, denominator) else f"{numerator / denominator:.2f}"


def model_table(rows: list[dict]) -> list[list[str]]:
    head = ["model", "parameters", "layers in NF4", "weights on the device", "drawn and written", "loaded"]
    return [head] + [
        [
            f"{row['preset']}, random weights",
            f"{row['parameters']:,}",
            str(row["layers_in_4_bits"]),
            gib(row["weights_bytes"]),
            f"{row['seconds_to_build']:.1f} s",
            f"{row['seconds_to_load']:.1f} s",
        ]
        for row in rows
    ]


def training_table(rows: list[dict]) -> list[list[str]]:
    captions = round(rows[0]["captions_per_s"] * rows[0]["step_s_median"])
    head = [f"one step of {captions} captions, five an image", "seconds", "captions/s", "against stock"]
    head += ["against lean", "peak memory", "MFU", "loss", "gradients differ"]
    by_engine = {row["engine"]: row["step_s_median"] for row in rows}
    return [head] + [
        [
            ENGINES.get(row["engine"], row["engine"]),
            f"{row['step_s_median']:.3f}",
            f"{row['captions_per_s']:.2f}",
            ratio(by_engine.get("trl_stock"), row["step_s_median"]),
            ratio(by_engine.get("trl_stock_lean"), row["step_s_median"]),
            gib(row["peak_mem_bytes"]),
            f"{row['mfu']:.0%}",
            f"{row['loss']:.4f}",
            "-" if row["max_grad_rel_diff"] is None else f"{row['max_grad_rel_diff']:.1e}",
        ]
        for row in rows
    ]


def preference_table(rows: list[dict]) -> list[list[str]]:
    return further_table(rows, "pairs", "dpo")


def reward_table(rows: list[dict]) -> list[list[str]]:
    return further_table(rows, "samples", "grpo")


def further_table(rows: list[dict], what: str, method: str) -> list[list[str]]:
    """Of training an adapter further, on `what`."""
    count = round(rows[0][f"{what}_per_s"] * rows[0]["step_s_median"])
    by_engine = {row["engine"]: row["step_s_median"] for row in rows}
    head = [f"one step of {count} {what}", "seconds", f"{what}/s", "against TRL", "against lean", "peak memory"]
    return [head] + [
        [
            ENGINES[row["engine"]],
            f"{row['step_s_median']:.3f}",
            f"{row[f'{what}_per_s']:.2f}",
            *(ratio(by_engine.get(f"trl_{method}{kind}"), row["step_s_median"]) for kind in ("", "_lean")),
            gib(row["peak_mem_bytes"]),
        ]
        for row in rows
    ]


def captioning_table(rows: list[dict]) -> list[list[str]]:
    by_engine = {row["engine"]: row["images_per_s"] for row in rows}
    peers = {engine: by_engine.get("stock_both" if engine.endswith("_both") else "stock") for engine in by_engine}
    return [["captions, beam 3", "images/s", "against `generate`", "peak memory", "captions equal"]] + [
        [
            ENGINES.get(row["engine"], row["engine"]),
            f"{row['images_per_s']:.2f}",
            ratio(row["images_per_s"], peers[row["engine"]]),
            gib(row["peak_mem_bytes"]),
            f"{row['identical_captions']} of {row['captions']}",
        ]
        for row in rows
    ]


def memory_table(rows: list[dict]) -> list[list[str]]:
    head = ["settings", "precision", "gradient checkpointing", "images x captions", "seconds"]
    head += ["estimate", "peak", "peak reserved"]
    table = [[*head, "estimate / peak"]]
    for row in rows:
        begin = [f"`{row['settings']}`", row.get("precision", "-"), "yes" if row["gradient_checkpointing"] else "no"]
        if "out_of_memory" in row:
            table.append([*begin, *["-"] * 5, f"out of memory: {markdown_escape(row['out_of_memory'])}"])
            continue
        size = f"{row['images']} x {row['captions'] // row['images']} captions of {row['caption_tokens']} tokens"
        memory = [gib(row[key]) for key in ("estimate_bytes", "peak_mem_bytes", "peak_reserved_bytes")]
        both = ratio(row["estimate_bytes"], row["peak_mem_bytes"])
        table.append([*begin, size, f"{row['step_s_median']:.3f}", *memory, both])
    return table


def precision_table(rows: list[dict]) -> list[list[str]]:
    head = ["captions that differ", "precision", "engine from `generate`, in batches", "one by one"]
    head += ["engine, in batches from one by one", "`generate`, likewise"]
    differ = ("branches_differ_from_stock", "branches_differ_from_stock_one_by_one")
    differ += ("branches_differ_by_batch_size", "stock_differs_by_batch_size")
    return [head] + [
        [
            f"{row['model']}, batches of {row['batch_size']}",
            row["precision"],
            *(f"{row[key]} of {row['captions']}" for key in differ),
        ]
        for row in rows
    ]


def resume_table(rows: list[dict]) -> list[list[str]]:
    def said(value: float) -> str:
        return "none, bitwise equal" if value == 0 else f"{value:.1e}"

    head = ["killed run", "resumed from uninterrupted", "two uninterrupted runs, at the checkpoint"]
    return [[*head, "largest change of a weight since"]] + [
        [
            f"{row['steps']} steps, resumed after {row['resumed_after']}: largest difference of a weight",
            said(row["resumed_difference"]),
            said(row["repeated_difference"]),
            f"{row['largest_change']:.1e}",
        ]
        for row in rows
    ]


def fsdp_table(rows: list[dict]) -> list[list[str]]:
    head = ["`fsdp_qlora.yaml`, one step", "processes", "loss", "loss without it", "seconds", "peak reserved"]
    return [head] + [
        [
            row["wrapper"],
            str(row["processes"]),
            f"{row['loss']:.4f}",
            f"{row['loss_alone']:.4f}",
            f"{row['step_s']:.2f}",
            gib(row["peak_reserved_bytes"]),
        ]
        for row in rows
    ]


# Parts ---------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Part:
    """
    title: what is measured.
    seconds: its share of the time, about what a data center's GPU takes.
    command: a benchmark of scripts/ and its options, with the names of sizes in braces; "" for one of gpu_parts.py.
    table: see above.
    capability: of the GPU at least.
    on_cpu: whether a CPU can do it.
    """

    title: str
    seconds: int
    command: str
    table: Callable[[list[dict]], list[list[str]]]
    capability: tuple[int, int] = (0, 0)
    on_cpu: bool = True


TRAINING = "bench_training --images {images} --rounds {rounds} --max_pixels {max_pixels}"
SFT = f"{TRAINING} --engines"
CAPTIONING = "bench_captioning --images {pictures} --batch_size {batch} --rounds {caption_rounds}"
# In this order. What only a benchmark of scripts/ measures is another row here: its JSON has "rows".
PARTS = {
    "model": Part("The model", 45, "", model_table),
    "training": Part("Training", 70, f"{SFT} trl_stock trl_stock_lean shared_prefix", training_table),
    "dpo": Part("Training on preferences", 50, f"{TRAINING} --method dpo", preference_table),
    "grpo": Part("Training on rewards", 55, f"{TRAINING} --method grpo", reward_table),
    "captioning": Part("Captioning", 75, f"{CAPTIONING} --max_pixels {{max_pixels}}", captioning_table),
    "t4": Part("`t4.yaml` in float16, with 14.5 GiB", 35, "", memory_table),
    "memory": Part("The start report's estimate of memory", 35, "", memory_table),
    "flex": Part("FlexAttention", 45, f"{SFT} shared_prefix shared_prefix_flex", training_table, (8, 0), on_cpu=False),
    "precision": Part("Captions by precision, engine and batch size", 50, "", precision_table),
    "resume": Part("Resuming", 45, "", resume_table),
    "fsdp": Part("FSDP-QLoRA", 35, "", fsdp_table, (8, 0)),
}


def check(args, start: float) -> dict:
    """Runs the parts one after the other and returns the JSON document, which is written after each of them.

    args: the script's arguments. start: when its minutes began, by `time.monotonic`.
    """
    end = start + 60 * args.minutes
    names = [name for name in PARTS if name == "model" or name in args.parts]  # the others load the model
    result = {"rows": {}, "parts": {}, "failures": {}, "settings": asdict(args)} | dict.fromkeys(OF_MACHINE)
    with tempfile.TemporaryDirectory() as folder:
        for position, name in enumerate(names):
            show = partial(say, start, name)
            if reason := missing(PARTS[name], args.device, result["capability"]):
                result["parts"][name] = {"status": "skipped", "reason": reason}
                show(f"skipped, {reason}")
            else:
                left = end - time.monotonic()
                # Most parts need less than their share, so one may take twice as much.
                share = PARTS[name].seconds / sum(PARTS[other].seconds for other in names[position:])
                check_part(name, args, Path(folder), max(0.0, min(left, 2 * share * left)), result, show)
            if args.json:
                write_atomically(Path(args.json), json.dumps(result, indent=2) + "\n")
    return result


def check_part(name: str, args, folder: Path, limit: float, result: dict, show: Callable[[str], None]) -> None:
    """Runs a part and puts what it found into `result`."""
    show(f"at most {limit:.0f} s")
    begin = time.monotonic()
    words = command(name, args, folder, sizes(args.device, result["hardware"]))
    wrong, lines = run(words, limit, folder / f"{name}.log", show)
    seconds = time.monotonic() - begin
    found = folder / f"{name}.json"
    document = json.loads(found.read_text(encoding="utf-8")) if found.exists() else {}
    result["rows"][name] = document.get("rows", [])
    for key in OF_MACHINE:
        result[key] = result[key] or document.get(key)
    result["parts"][name] = {"status": "failed" if wrong else "ok", "seconds": seconds, "limit_s": limit}
    if wrong:
        result["failures"][name] = {"reason": wrong, "last_lines": lines}
    show(f"{wrong or 'done'} after {seconds:.0f} s")


def say(start: float, name: str, line: str) -> None:
    minutes, seconds = divmod(int(time.monotonic() - start), 60)
    print(f"[{minutes:2}:{seconds:02}] {name}: {line}", flush=True)


def missing(part: Part, device: str, capability: list[int] | None) -> str | None:
    """Why a part cannot run on the device; None if it can, or nothing is known of the GPU."""
    if device == "cpu":
        return None if part.on_cpu else "it needs a GPU"
    if capability and tuple(capability) < part.capability:
        return f"it needs compute capability {'.'.join(map(str, part.capability))}"
    return None


def sizes(device: str, hardware: dict | None) -> dict:
    if device == "cpu":
        return CPU
    memory = hardware and hardware["device_memory_bytes"]
    return LARGE if memory and memory >= LARGE_BYTES else SMALLER


def command(name: str, args, folder: Path, sizes: dict) -> list[str]:
    """The words that start a part."""
    script, *options = PARTS[name].command.format(**sizes).split() or [None]
    if script:
        words = [str(ROOT / "scripts" / f"{script}.py"), *options, "--model", str(folder / "model")]
    else:
        words = ["-m", "vlmcap.experiments.gpu_parts", "--part", name, "--folder", str(folder)]
    where = ["--preset", args.preset, "--device", args.device, "--json", str(folder / f"{name}.json")]
    return [sys.executable, *words, *where]


def run(words: list[str], limit: float, log: Path, show: Callable[[str], None]) -> tuple[str | None, list[str]]:
    """Runs a command for `limit` seconds at most, shows its lines, and ends all processes below it.

    Returns what went wrong, None if nothing did, and the last lines that it wrote to stderr, which `log` keeps.
    """
    quiet = {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    quiet |= {"TOKENIZERS_PARALLELISM": "false"}
    with log.open("wb") as errors:
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace", env=os.environ | quiet
        )
    late = threading.Event()

    def stop() -> None:
        late.set()
        kill(process.pid)

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        for line in process.stdout:
            if line.strip():
                show(line.rstrip())
        status = process.wait()
    finally:
        timer.cancel()
        kill(process.pid)
    wrong = f"stopped at its limit of {limit:.0f} s" if late.is_set() else f"ended with status {status}"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return wrong if status or late.is_set() else None, lines[-LAST_LINES:]


def kill(root: int) -> None:
    """Ends a process and all below it; launchers give theirs a session of their own."""
    try:
        below = psutil.Process(root).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for process in [psutil.Process(root), *below]:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass  # ended meanwhile


def report(result: dict) -> str:
    """The tables as Markdown, a part a paragraph; what failed, with its last lines."""
    lines = [f"## GPU check: {hardware_line(result)}", ""]
    for name, part in result["parts"].items():
        rows, failure = result["rows"].get(name), result["failures"].get(name)
        lines += [f"### {PARTS[name].title}", ""]
        if rows:
            lines += [markdown_table(PARTS[name].table(rows)).rstrip(), ""]
        if part["status"] == "skipped":
            lines += [f"Skipped: {part['reason']}.", ""]
        if failure:
            lines += [
                f"**Failed**: {failure['reason']}. Its last lines:",
                "",
                fenced("\n".join(failure["last_lines"])),
            ]
            lines += [""]
    lines.append("The weights are random, except for the miniature's: speed and memory are measured, no captions.")
    return "\n".join(lines)


def hardware_line(result: dict) -> str:
    hardware, versions = result["hardware"], result["versions"]
    if hardware is None:
        return "unknown device"
    libraries = ", ".join(
        f"{name} {versions[name]}" for name in ("python", "torch", "transformers") if name in versions
    )
    return f"{hardware['device']}, {gib(hardware['device_memory_bytes'])}, {libraries}, {result['created'][:10]}"
