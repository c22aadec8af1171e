"""A browser for the pages, scored runs to compare, an adapter with what it says."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from tests.browser import browser, page  # noqa: F401
from tests.reporting.documents import adapter_document, document
from vlmcap.evaluation.scoring import ScoreOptions, write_metrics

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u202etxet\u202c"


def sentence(rng: random.Random) -> str:
    parts = (
        "赤い 青い 白い 黒い",
        "犬が 猫が 鳥が 馬が",
        "公園で 海辺で 道で",
        "走っています 寝ています 立っています",
    )
    return "".join(rng.choice(words.split()) for words in parts)


# The scorer's part of a metrics document; the rest is the run record.
SCORERS = "scores signatures intervals bootstrap register_normalised counts notices per_image".split()


@pytest.fixture(scope="session")
def scored_runs(tmp_path_factory) -> dict[str, Path]:
    """Folders of four runs on the same 40 images, as scoring leaves them: metrics.json beside predictions.jsonl.

    `good` says what a reference says for most images, `twin` the same except for one image, `weak` anything at all.
    `wild` is `weak` with a hostile caption for image 7, an empty one for image 8, flags for both and a training log.
    Peak memory is measured for all but `wild`.
    """
    rng = random.Random(0)
    references = {str(image): [sentence(rng) for _ in range(3)] for image in range(1, 41)}
    good = {
        image: rng.choice(captions) if rng.random() < 0.7 else sentence(rng) for image, captions in references.items()
    }
    weak = {image: sentence(rng) for image in references}
    predictions = {"good": good, "twin": good | {"5": sentence(rng)}, "weak": weak}
    predictions["wild"] = weak | {"7": HOSTILE, "8": ""}
    root = tmp_path_factory.mktemp("scored")
    lines = [{"image_id": int(image), "captions": captions} for image, captions in references.items()]
    (root / "references.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folders = {}
    for number, (name, captions) in enumerate(predictions.items()):
        folder = folders[name] = root / name
        folder.mkdir()
        lines = [{"image_id": int(image), "caption": caption} for image, caption in captions.items()]
        (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        record = document((0.0,) * 6, 20.0 + number, None)
        record = {key: value for key, value in record.items() if key not in SCORERS}
        record |= {"peak_memory_bytes": None if name == "wild" else (4 + number) * 2**30}
        (folder / "predictions.run.json").write_text(json.dumps(record))
        more = {"training": {"log": training_log()}} if name == "wild" else {}
        options = ScoreOptions(meteor=False)  # Java takes seconds to start
        write_metrics(folder / "predictions.jsonl", references, folder / "metrics.json", more=more, options=options)
    (root / "wild" / "audit.json").write_text(
        json.dumps({"flagged": {"7": ["not Japanese"], "8": ["empty", "<b>short"]}})
    )
    return folders


def training_log() -> list[dict]:
    """Loss every ten steps, CIDEr-D of validation captions every fifty."""
    losses = [{"step": step, "epoch": step / 100, "loss": 30 / step} for step in range(10, 201, 10)]
    return [line | ({"eval_cider_d": line["step"] / 100} if line["step"] % 50 == 0 else {}) for line in losses]


PICTURES = 8
SETTINGS = {"num_beams": 3, "max_new_tokens": 16}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> list:
    """Files as phones and drawing programs write them: lying on their side by EXIF, or with a transparent ground."""
    from vlmcap.miniature.scenes import scenes

    folder, paths = tmp_path_factory.mktemp("pictures"), []
    sideways = Image.Exif()
    sideways[0x0112] = 6
    for number, scene in enumerate(scenes(PICTURES, seed=5, held_out=True)):
        drawn, path = scene.draw(), folder / f"{number}.png"
        if number % 2:
            drawn.rotate(90).save(path, exif=sideways)
        else:
            ground = Image.new("RGB", drawn.size, drawn.getpixel((0, 0)))
            alpha = ImageChops.difference(drawn, ground).convert("L").point(lambda value: 255 if value else 0)
            hidden = Image.composite(drawn, Image.new("RGB", drawn.size), alpha)  # black is under the ground
            hidden.putalpha(alpha)
            hidden.save(path)
        paths.append(path)
    return paths


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, miniature_dir):
    """An adapter of the miniature in NF4, with a projector of its own, that changes what is said."""
    import torch
    from peft import get_peft_model

    from vlmcap.models.load import ModelArguments, load_model, load_processor, lora_config
    from vlmcap.steps.save import name_special_tokens

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = load_model(str(miniature_dir))
    model = get_peft_model(model, lora_config(model, ModelArguments(str(miniature_dir))))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    load_processor(str(miniature_dir)).save_pretrained(folder)
    name_special_tokens(folder)
    return folder


@pytest.fixture(scope="session")
def measured(measure) -> list[str]:
    """The captions that a run scores."""
    said = measure(adapter_document()["prompt"])
    assert len(set(said)) > PICTURES / 2
    return said


@pytest.fixture(scope="session")
def measure(adapter, miniature_dir, pictures) -> Callable[[str], list[str]]:
    """prompt -> what the base in NF4 with the adapter on it says of the pictures."""
    from vlmcap.captioning.arguments import GenerationArguments
    from vlmcap.captioning.generate import caption_with_prompt
    from vlmcap.data.images import open_image
    from vlmcap.models.load import load_adapter, load_model, load_processor

    model, processor = load_adapter(load_model(str(miniature_dir)), str(adapter)), load_processor(str(adapter))
    rows = [{"image": {"bytes": None, "path": str(path)}, "image_id": 0} for path in pictures]

    def say(prompt: str) -> list[str]:
        arguments = GenerationArguments(prompt=prompt, **SETTINGS)
        return [caption_with_prompt(model, processor, [open_image(row)], arguments)[0] for row in rows]

    return say
