"""A metrics document as the recipe writes it for an adapter, with invented figures."""

import copy

SHA = "0123456789abcdef0123456789abcdef01234567"
GPU = {
    "device": "Tesla T4",
    "device_memory_bytes": 15_843_721_216,
    "cpu": "Intel(R) Xeon(R) CPU @ 2.00GHz",
    "cores": 4,
    "memory_bytes": 33_670_000_000,
}
CPU = {"device": "CPU", "device_memory_bytes": None, "cpu": "Some CPU", "cores": 2, "memory_bytes": 8_000_000_000}
NAMES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")


def document(scores: tuple[float, ...], seconds: float, adapter: str | None) -> dict:
    return {
        "scores": dict(zip(NAMES, scores, strict=True)),
        "signatures": {name: f"{name}|tok:unidic-lite-1.0.8|norm:nfkc|punct:drop|nref:5|v:0.1" for name in NAMES},
        "intervals": {name: [score - 0.0123, score + 0.0134] for name, score in zip(NAMES, scores, strict=True)},
        "bootstrap": {"resamples": 1000, "seed": 0, "level": 0.95},
        "register_normalised": {
            "scores": {name: score + 0.0021 for name, score in zip(NAMES, scores, strict=True)},
            "signatures": {name: f"{name}|tok:unidic-lite-1.0.8|norm:nfkc|punct:drop|nref:5|v:0.1" for name in NAMES},
            "intervals": {},
        },
        "counts": {
            "images": 5000,
            "references": 25010,
            "empty_predictions": 3,
            "mean_caption_tokens": 11.72,
            "mean_reference_tokens": 12.6,
            "type_token_ratio": 0.0345,
            "reference_type_token_ratio": 0.0678,
        },
        "notices": [],
        "model": {
            "id": "Qwen/Qwen2-VL-2B-Instruct",
            "revision": SHA,
            "adapter": adapter,
            "adapter_revision": None,
            "dtype": "float16",
            "quantization": "nf4",
            "parameters": 2_208_985_600,
            "trainable_parameters": None,
        },
        "dataset": {"id": "user/stair-captions", "revision": SHA[::-1], "split": "test", "license": "cc-by-4.0"},
        "prompt": 'この画像を日本語の一文で説明してください。"短く"',
        "decoding": {
            "num_beams": 3,
            "max_new_tokens": 64,
            "do_sample": False,
            "batch_size": 8,
            "min_pixels": 3136,
            "max_pixels": 401408,
        },
        "saw": {
            "STAIR": "train" if adapter else "unknown",
            "YJ": "no",
            "COCO": "train images" if adapter else "unknown",
            "note": "Split of Karpathy, by image.",
        },
        "hardware": GPU,
        "seconds": seconds,
        "images_per_second": 5000 / seconds,
        "peak_memory_bytes": 5_200_000_000,
        "versions": {"python": "3.11.7", "torch": "2.15.0", "transformers": "5.23.0"},
        "commit": SHA[5:] + "abcde",
        "created": "2026-01-02T03:04:05+00:00",
    }


def adapter_document() -> dict:
    """An adapter of Qwen2-VL-2B, base and data on the Hub."""
    adapter = document((0.65432, 0.51234, 0.41239, 0.3217, 0.5128, 0.91827364), 2500.0, "outputs/run/adapter")
    adapter["base"] = document((0.2101, 0.1202, 0.0703, 0.0404, 0.2505, 0.1606), 2600.0, None)
    adapter["training"] = {
        "config": {"lora_r": 32, "bf16": False, "target": ["q_proj", "v_proj"], "scheduler": "cosine", "note": "a|b"},
        "dataset": {"id": "user/stair-captions", "revision": SHA[::-1], "split": "train"},
        "images": 86787,
        "captions": 433_935,
        "in_yj_images": 0,
        "steps": 81363,
        "epochs": 3.0,
        "seconds": 40_000.4,
        "data_wait_share": 0.0123,
        "peak_memory_bytes": 11_000_000_000,
        "train_loss": 1.7421,
        "bad_images": 2,
        "hardware": GPU,
        "seed": 42,
        "trainable_parameters": 26_345_984,
    }
    return adapter


def miniature_document(model: str = "recipes/miniatures/qwen2_vl", adapter: str = "outputs/demo/adapter") -> dict:
    """The miniature's adapter: everything local, on a CPU, where peak memory is not measured."""
    metrics = copy.deepcopy(adapter_document())
    for run in (metrics, metrics["base"]):
        run["model"] |= {
            "id": model,
            "revision": None,
            "dtype": "float32",
            "quantization": None,
            "parameters": 3_312_345,
        }
        run["dataset"] |= {"id": "outputs/demo/dataset", "revision": None}
        run |= {"hardware": CPU, "peak_memory_bytes": None}
        run["decoding"] |= {"min_pixels": 7056, "max_pixels": 7056}
    metrics["model"]["adapter"] = adapter
    metrics["training"]["dataset"] |= {"id": "outputs/demo/dataset", "revision": None}
    metrics["training"] |= {"hardware": CPU, "peak_memory_bytes": None}
    return metrics


def language_document() -> dict:
    """Of a run with several prompts: Japanese and English trained, Vietnamese scored beside them."""
    metrics = adapter_document() | {"key": "ja/plain"}
    metrics["languages"] = {"ja/plain": {"trained": True, "prompt": metrics["prompt"]}}
    for key, tokens, share in (("en", "english-13a", 1.1), ("vi", "vietnamese-pyvi", 0.5)):
        one = document((0.3, 0.25, 0.2, 0.1 * share, 0.4, 0.8 * share), 2500.0, "outputs/run/adapter")
        one["base"] = document((0.3, 0.25, 0.2, 0.1, 0.4, 0.8), 2600.0, None)
        for run in (one, one["base"]):
            run |= {"key": key, "prompt": {"en": "Describe this image.", "vi": "Mô tả ảnh này."}[key]}
            run["signatures"] = {name: f"{name}|tok:{tokens}|nref:5|v:0.1" for name in NAMES}
            run["counts"] = run["counts"] | {"images": 5000 if key == "en" else 920}
            del run["register_normalised"]
        metrics["languages"][key] = {"trained": key == "en", "prompt": one["prompt"]} | one
    return metrics


def preference_document() -> dict:
    """Of recipes/dpo_qwen2vl_jp.py: preferences, and the scores of the adapter that it started from."""
    metrics = adapter_document() | {"recipe": "dpo_qwen2vl_jp"}
    training = metrics["training"]
    training["config"] |= {"adapter": "user/start", "adapter_revision": SHA}
    training["start"] = {"adapter": "user/start", "audit": {}, "intervals": {}}
    training["start"]["scores"] = dict.fromkeys(NAMES, 0.1234)
    after = {"preference_rate": 0.91, "reward_accuracy": 0.87, "reward_margin": 1.25}
    training["preferences"] = {"pairs": 4321, "unseen_pairs": 432, "pairs_seen": 8642, "left_out": {"test": 17}}
    training["preferences"] |= {"before": {"preference_rate": 0.52}, "after": after}
    return metrics


PARTS = {
    "sft_blip_vi": {"base": "Salesforce/blip-image-captioning-base"},
    "sft_vit_gpt2_food": {"encoder": "google/vit-base-patch16-224-in21k", "decoder": "openai-community/gpt2"},
    "sft_vit_llama_food": {"encoder": "google/vit-base-patch16-224-in21k", "decoder": "meta-llama/Llama-3.2-1B"},
}


def family_document(recipe: str, miniature: bool = False) -> dict:
    """What one of the three smaller recipes leaves: no prompt, one size of image, validation in the log."""
    metrics = copy.deepcopy(adapter_document())
    parts = {place: {"id": name, "revision": SHA} for place, name in PARTS[recipe].items()}
    if miniature:
        folders = {"base": "blip", "encoder": "vit", "decoder": recipe.split("_")[2]}
        parts = {place: {"id": f"recipes/miniatures/{folders[place]}", "revision": None} for place in parts}
    corpora = {"sft_blip_vi": ("uit_viic", "scenes_vi")}
    corpus = corpora.get(recipe, ("food_titles", "scene_titles"))[miniature]
    data = "outputs/demo_family/data" if miniature else f"user/{corpus.replace('_', '-')}"
    trained = "model" if recipe == "sft_vit_gpt2_food" else "adapter"
    dataset = {"id": data, "revision": "build 01234567" if miniature else SHA[::-1], "split": "test"}
    dataset |= {"license": {"uit_viic": "unknown", "food_titles": "cc-by-sa-3.0"}.get(corpus, "cc0-1.0")}
    dataset |= {"corpus": corpus}
    for run in (metrics, metrics["base"]):
        del run["register_normalised"]
        run["model"] |= {
            "id": " + ".join(part["id"] for part in parts.values()),
            "revision": parts["base"]["revision"] if "base" in parts else None,
            "quantization": None,
            "parameters": 2_345_678 if miniature else 247_414_016,
        }
        if len(parts) > 1:
            run["model"]["parts"] = copy.deepcopy(parts)
        run |= {"dataset": dict(dataset), "prompt": None, "recipe": recipe}
        run["decoding"] = {"num_beams": 3, "max_new_tokens": 40, "do_sample": False, "batch_size": 16}
        run["decoding"] |= {"no_repeat_ngram_size": 3, "image_size": {"height": 384, "width": 384}}
        run["saw"] = {
            "STAIR": "no",
            "YJ": "no",
            "COCO": "unknown",
            "note": "As stated in the configuration (base_saw).",
        }
    metrics["model"]["adapter"] = f"outputs/{recipe}/{trained}"
    training = metrics["training"]
    training["dataset"] = dataset | {"split": "train"}
    training |= {
        "validation_split": "validation",
        "best": {"step": 1200, "metric": "cider_d", "score": 0.7312},
        "log": family_log(),
    }
    del training["in_yj_images"]
    return metrics


def family_log() -> list[dict]:
    """Loss every 50 steps; loss and scores of validation captions every 200."""
    log = []
    for step in range(50, 1601, 50):
        log.append({"step": step, "epoch": step / 400, "loss": 1 + 150 / step, "elapsed_seconds": step / 4})
        if step % 200 == 0:
            scores = {"eval_bleu_2": 0.4 - 60 / step, "eval_cider_d": 0.75 - 120 / step}
            log.append({"step": step, "eval_loss": 1.4 + 80 / step + step / 8000, **scores})
    return log


def rate(count: int, of: int = 5000) -> dict:
    """A rate of an audit."""
    return {"rate": count / of, "interval": [count / of - 0.001, count / of + 0.001], "count": count, "of": of}


def audit_document(metrics: dict) -> dict:
    """The audit of the captions of `adapter_document()`, with that of the base, as the recipe writes it."""

    def audit(run: dict, made_up: int) -> dict:
        said = {word: rate(count) for word, count in (("predictions", 800), ("references", 700), ("unsupported", 90))}
        faults = ("empty", "repetition", "truncated", "non_japanese", "copied_prompt", "special_tokens")
        return {
            "counts": {"images": 5000, "references": 25010},
            "hallucination": {
                "objects_from": ["instances", "references"],
                "chair_s": rate(made_up),
                "chair_i": rate(made_up + 7, 9100),
                "coverage": rate(5400, 14000),
                "captions_with_objects": rate(4700),
                "mentions_per_caption": 1.8,
                "categories": {},
                "hallucinated_words": {},
            },
            "persons": {
                "groups": {"gender": {"female": said, "male": said}},
                "gender": {"error": rate(31, 900), "unsupported": rate(55, 4000), "left_out": rate(40, 900)},
            },
            "form": {fault: rate(10 + place) for place, fault in enumerate(faults)},
            "flagged": {"1": ["hallucination"], "2": ["truncated"]},
            "settings": {
                "lexicon": {"name": "coco_ja.yaml", "sha256": "0" * 64, "words": 1234},
                "persons": {"name": "persons_ja.yaml", "sha256": "1" * 64, "words": 321},
                "bootstrap": {"resamples": 1000, "seed": 0, "level": 0.95},
            },
        } | {key: run[key] for key in ("model", "dataset", "prompt", "decoding")}

    return audit(metrics, 612) | {"base": audit(metrics["base"], 1404)}
