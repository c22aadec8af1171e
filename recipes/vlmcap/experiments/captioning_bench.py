"""What scripts/bench_captioning.py measures: `generate` and this project's engine on the same pictures.

Weights are random, so captions would end anywhere. Each picture gets a length, drawn from those of real captions, and
every engine ends its caption there.
"""

import random
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, ProcessorMixin

from vlmcap import provenance
from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.captioning.branches import BranchGenerator, Rows
from vlmcap.captioning.engines import ADAPTER, BASE, run_engines
from vlmcap.captioning.generate import search_config
from vlmcap.experiments.bench import Watch, random_adapter
from vlmcap.miniature.qwen2_vl import JAPANESE_PROMPT
from vlmcap.miniature.scenes import scenes
from vlmcap.models.load import ModelArguments, chat_prompt, count_parameters, load_model, lora_config

# Lengths of 70 captions of STAIR's validation part in tokens of Qwen2-VL, from 9 to 34: number of captions of each.
STAIR_LENGTHS = {9: 2, 10: 2, 11: 4, 12: 4, 13: 3, 14: 4, 15: 9, 16: 9, 17: 7, 18: 5, 19: 3, 20: 2, 21: 3, 22: 5}
STAIR_LENGTHS |= {24: 2, 25: 4, 26: 1, 27: 1, 28: 1, 32: 1, 34: 1}


def draw_lengths(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(list(STAIR_LENGTHS), list(STAIR_LENGTHS.values()), k=count)


def end_at(scores: torch.Tensor, step: int, length: int, end: int) -> torch.Tensor:
    """Scores (..., V) that end a caption after `length` tokens, and not before."""
    ends = torch.arange(scores.shape[-1], device=scores.device) == end
    return scores.masked_fill(ends if step < length else ~ends, -torch.inf)


class EndAt(LogitsProcessor):
    """For `generate`: rows of a batch, all beams of a picture after another."""

    def __init__(self, lengths: list[int], prompt_length: int, end: int):
        self.lengths, self.prompt_length, self.end = lengths, prompt_length, end

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step, pictures = input_ids.shape[1] - self.prompt_length, scores.chunk(len(self.lengths))
        ended = (end_at(rows, step, length, self.end) for rows, length in zip(pictures, self.lengths, strict=True))
        return torch.cat(list(ended))


class EndingGenerator(BranchGenerator):
    """The engine, with captions that end at given lengths."""

    lengths: list[int]
    end: int

    def _limited(self, work: Rows, scores: torch.Tensor) -> torch.Tensor:
        places = zip(scores, work.step.tolist(), work.number.tolist(), strict=True)
        return torch.stack([end_at(row, step, self.lengths[number], self.end) for row, step, number in places])


def random_model(folder: str | Path, preset: dict, seed: int, dtype: torch.dtype | None = None) -> PeftModel:
    """The checkpoint in a folder, with a random adapter. `dtype`: see `load_model`."""
    model = load_model(str(folder), load_in_4bit=preset["load_in_4bit"], dtype=dtype)
    arguments = ModelArguments(model_name_or_path=str(folder), lora_dropout=0.0)
    model = get_peft_model(model, lora_config(model, arguments)).eval()
    for name, value in random_adapter(model, seed).items():
        model.get_parameter(name).data.copy_(value)
    return model


class Bench:
    """Engines on one model; each method returns the captions of all pictures, as token ids.

    args: images, seed, num_beams, max_new_tokens and batch_size, which may be changed between two captionings.
    lengths: where the caption of each picture ends; None: where the model ends it.
    """

    def __init__(self, args, model: PreTrainedModel | PeftModel, processor: ProcessorMixin, lengths: list[int] | None):
        self.args, self.model, self.processor, self.lengths = args, model, processor, lengths
        self.images = [scene.draw().resize((640, 480)) for scene in scenes(args.images, args.seed, held_out=False)]
        self.text = chat_prompt(processor, JAPANESE_PROMPT)
        self.end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
        settings = GenerationArguments(num_beams=args.num_beams, max_new_tokens=args.max_new_tokens)
        self.config = search_config(self.model, processor.tokenizer, settings)

    def engines(self) -> dict:
        return {
            "stock": self.stock,
            "branches": self.branches,
            "stock_both": self.stock_both,
            "branches_both": self.branches_both,
        }

    def inputs(self, images: list[Image.Image]) -> dict:
        return self.processor(
            images=[[image] for image in images],
            text=[self.text] * len(images),
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )

    @torch.inference_mode()
    def stock(self) -> list[list[int]]:
        """`generate` as a careful user writes it: beams, batches, inference mode."""
        found, size = [], self.args.batch_size
        for start in range(0, len(self.images), size):
            inputs = self.inputs(self.images[start : start + size]).to(self.model.device, dtype=self.model.dtype)
            length = inputs["input_ids"].shape[1]
            limits = LogitsProcessorList()
            if self.lengths:
                limits.append(EndAt(self.lengths[start : start + size], length, self.end))
            output = self.model.generate(**inputs, generation_config=self.config, logits_processor=limits)
            found += [self.cut(row) for row in output[:, length:].tolist()]
        return found

    def stock_both(self) -> list[list[int]]:
        with self.model.disable_adapter():
            base = self.stock()
        return base + self.stock()

    def branches(self) -> list[list[int]]:
        found = {caption.number: caption for caption in self.generator().run(self.pictures())}
        return [self.cut(found[number].tokens[0].tolist()) for number in range(len(found))]

    def branches_both(self) -> list[list[int]]:
        found = {}
        for which, caption in run_engines(
            self.model, {BASE: self.generator(), ADAPTER: self.generator()}, self.pictures()
        ):
            found[which, caption.number] = self.cut(caption.tokens[0].tolist())
        return [found[which, number] for which in ("base", "adapter") for number in range(len(self.images))]

    def generator(self) -> BranchGenerator:
        parts = self.model, self.config, LogitsProcessorList(), self.args.batch_size
        if self.lengths is None:
            return BranchGenerator(*parts)
        generator = EndingGenerator(*parts)
        generator.lengths, generator.end = self.lengths, self.end
        return generator

    def pictures(self):
        return map(self.inputs, ([image] for image in self.images))

    def cut(self, tokens: list[int]) -> list[int]:
        return tokens[: tokens.index(self.end)] if self.end in tokens else tokens


def measure(bench: Bench, engines: list[str], rounds: int, device: str) -> Iterator[dict[str, dict]]:
    """After each round, in which every engine runs in turn: engine -> captions, seconds of each round, peak memory."""
    watches, found = {engine: Watch(device) for engine in engines}, {}
    for number in range(rounds):
        for engine in engines:
            watches[engine].on_step_begin(None, None, None)
            found[engine] = bench.engines()[engine]()
            watches[engine].on_step_end(None, None, None)
            print(f"round {number + 1}: {engine:<16}{watches[engine].seconds[-1]:9.1f} s", flush=True)
        yield {
            engine: {"captions": found[engine], "seconds": watch.seconds, "peak": max(watch.peak)}
            for engine, watch in watches.items()
        }


def summarise(args, bench: Bench, measured: dict[str, dict]) -> dict:
    """The JSON document. `identical_captions`: with those of `generate`, of all that the engine wrote."""
    weights = sum(p.numel() * p.element_size() for p in bench.model.parameters())
    rows, fastest = [], {engine: min(found["seconds"]) for engine, found in measured.items()}
    peer = {engine: "stock_both" if engine.endswith("_both") else "stock" for engine in measured}
    for engine, found in measured.items():
        expected = measured[peer[engine]]["captions"]
        same = sum(ours == theirs for ours, theirs in zip(found["captions"], expected, strict=True))
        rows.append(
            {
                "engine": engine,
                "images_per_s": len(bench.images) / fastest[engine],
                "seconds": found["seconds"],
                "peak_mem_bytes": weights + found["peak"],
                "identical_captions": same,
                "captions": len(expected),
            }
        )
    return {
        "rows": rows,
        "speedup_vs_stock": {engine: fastest[peer[engine]] / seconds for engine, seconds in fastest.items()},
        "settings": asdict(args),
        "model": {"parameters": count_parameters(bench.model), "weights": "random"},
        "caption_tokens": bench.lengths,
        "hardware": provenance.hardware(),
        "versions": provenance.versions(),
        "commit": provenance.git_commit(),
        "created": provenance.now(),
    }
