"""Captions of a stream: those of `generate`, in order, for several prompts, and for base and adapter at once."""

import json
from dataclasses import replace

import datasets
import pytest
import torch
from peft import get_peft_model
from PIL import Image

from tests.invariants import tiny
from vlmcap.captioning import stream as streams
from vlmcap.captioning.arguments import BeamArguments, GenerationArguments
from vlmcap.captioning.engines import ADAPTER, BASE
from vlmcap.captioning.generate import caption_batch
from vlmcap.captioning.predictions import PredictionsError, model_record
from vlmcap.captioning.split import SplitFile, caption_split
from vlmcap.captioning.stream import CaptionStream, caption_images
from vlmcap.data.images import load_captions, open_image
from vlmcap.evaluation.scoring import quick_scores
from vlmcap.evaluation.tasks import CaptionTask
from vlmcap.miniature.scenes import scenes
from vlmcap.models.load import ModelArguments, load_model, load_processor, lora_config
from vlmcap.training.validation import CaptionValidation

ARGS = GenerationArguments(prompt="Describe this image briefly.", max_new_tokens=24, generation_batch_size=3)
PROMPTS = [ARGS.prompt, "Describe this image.", "この画像を日本語で短く説明してください。", "What is it?"]


def build(folder: str):
    """The miniature with an adapter whose captions differ from the base's."""
    model = load_model(folder, load_in_4bit=False)
    arguments = ModelArguments(model_name_or_path=folder, lora_dropout=0.0, lora_top_layers=2)
    model = get_peft_model(model, lora_config(model, arguments)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.12)
    return model


@pytest.fixture(scope="module")
def model(miniature_dir):
    return build(str(miniature_dir))


@pytest.fixture(scope="module")
def processor(miniature_dir):
    return load_processor(str(miniature_dir))


@pytest.fixture(scope="module")
def images():
    """Of several sizes, so that prompts have several lengths."""
    drawn = [scene.draw() for scene in scenes(8, seed=21, held_out=True)]
    return [
        image.resize(size) for image, size in zip(drawn, [(84, 84), (112, 56), (140, 140), (56, 84)] * 2, strict=True)
    ]


@pytest.fixture
def rows(images, tmp_path):
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    found = [{"image_id": n, "file_name": f"{n}.png", "captions": ["赤い丸"]} for n in range(len(images))]
    datasets.Dataset.from_list(found).to_parquet(tmp_path / "data/test-00000-of-00001.parquet")
    return load_captions(str(tmp_path / "data"), "test", image_dir=str(tmp_path))


def run(images, *args, **kwargs) -> list[list[str]]:
    stream = CaptionStream(*args, **kwargs)
    assert stream.shares
    return list(stream.run(map(stream.prepare, images)))


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 1}, {"japanese_only": True}, {"no_repeat_ngram_size": 2}, {"generation_batch_size": 16}],
    ids=str,
)
def test_what_generate_says(model, processor, images, settings):
    args = replace(ARGS, **settings)
    several = min(2, args.num_beams)
    expected = [caption_batch(model, processor, [image], args, several)[0] for image in images]
    assert run(images, model, processor, args, several) == expected
    assert len({first for first, *_ in expected}) > 3


def test_several_prompts_of_a_picture(model, processor, images):
    """Each as if it were asked alone: what they begin with runs once, and the picture with it."""
    expected = [[caption_batch(model, processor, [i], replace(ARGS, prompt=p))[0][0] for p in PROMPTS] for i in images]
    assert any(len(set(said)) > 1 for said in expected), "some prompts lead to other captions"
    stream, tokens = CaptionStream(model, processor, ARGS, prompts=PROMPTS), []
    layer = model.get_base_model().model.language_model.layers[0]
    hook = layer.register_forward_hook(lambda module, inputs, output: tokens.append(inputs[0].shape[:2]))
    (said,) = stream.run([stream.prepare(images[0])])
    hook.remove()
    assert said == expected[0]
    beginning = stream.prepare(images[0])["input_ids"].shape[1]
    assert tokens[:2] == [(1, beginning), (len(PROMPTS), max(map(len, stream.endings)))]
    for batch_size in (1, 3, 16):
        args = replace(ARGS, generation_batch_size=batch_size)
        assert run(images, model, processor, args, prompts=PROMPTS) == expected


@pytest.mark.parametrize("architecture", tiny.FAMILY)
def test_several_prompts_of_each_architecture(architecture):
    model, processor = tiny.build_model(architecture).eval(), tiny.build_processor(architecture)
    images = [scene.draw().resize(size) for scene, size in zip(scenes(6, 3, False), tiny.SIZES, strict=True)]
    args = replace(ARGS, max_new_tokens=8)
    expected = [[caption_batch(model, processor, [i], replace(args, prompt=p))[0][0] for p in PROMPTS] for i in images]
    assert run(images, model, processor, args, prompts=PROMPTS) == expected


def test_a_prompt_that_is_the_beginning_of_another(model, processor, images):
    prompts = ["Describe", "Describe this", "Describe"]
    expected = [caption_batch(model, processor, [images[0]], replace(ARGS, prompt=p))[0][0] for p in prompts]
    assert run(images[:1], model, processor, ARGS, prompts=prompts) == [expected]


def test_base_and_adapter(model, processor, images):
    with model.disable_adapter():
        base = [caption_batch(model, processor, [image], ARGS)[0][0] for image in images]
    adapter = [caption_batch(model, processor, [image], ARGS)[0][0] for image in images]
    assert sum(a != b for a, b in zip(base, adapter, strict=True)) > 3
    both = run(images, model, processor, ARGS, models=(BASE, ADAPTER))
    assert both == [list(pair) for pair in zip(base, adapter, strict=True)]
    assert run(images, model, processor, ARGS, models=[BASE]) == [[caption] for caption in base]
    prompts = PROMPTS[:2]
    four = run(images, model, processor, ARGS, prompts=prompts, models=(BASE, ADAPTER))
    assert [said[0::2] for said in four] == both


def test_pictures_are_taken_as_they_are_needed(model, processor, images):
    taken = []

    def watched():
        for number, image in enumerate(images * 4):
            taken.append(number)
            yield image

    stream = CaptionStream(model, processor, ARGS)
    for number, _ in enumerate(stream.run(map(stream.prepare, watched()))):
        assert len(taken) - number <= 3 * ARGS.generation_batch_size


def test_other_models_go_through_generate(repo_root, images, capsys):
    from vlmcap.models.blip import load_blip

    model, processor = load_blip(str(repo_root / "recipes/miniatures/blip"))
    streams._say_stock.cache_clear()
    args = BeamArguments(max_new_tokens=8, generation_batch_size=3)
    said = caption_images(model.eval(), processor, images, args, 2)
    assert said == caption_batch(model, processor, images, args, 2)
    caption_images(model, processor, images[:1], args)
    assert capsys.readouterr().err.count("captioning in batches with transformers' generate; the engine") == 1
    flash = tiny.build_model("qwen2_vl")
    flash.config.get_text_config()._attn_implementation = "flash_attention_2"
    CaptionStream(flash, tiny.build_processor("qwen2_vl"), ARGS)
    assert "needs --attn_implementation sdpa" in capsys.readouterr().err


def test_large_pictures_share_a_batch_in_smaller_numbers(monkeypatch):
    monkeypatch.setattr(streams, "BATCH_PIXELS", 250)
    images = [Image.new("RGB", (10, 10)) for _ in range(7)] + [Image.new("RGB", (30, 10))]
    assert [len(batch) for batch in streams._batches(images, 3)] == [2, 2, 2, 1, 1]


# Files ---------------------------------------------------------------------------------------------------------------
def record(model):
    return {"model": model_record(model, "a/b", "main"), "dataset": {"id": "c/d"}, "saw": {}}


def texts(path) -> list[str]:
    return [json.loads(line)["caption"] for line in path.read_text(encoding="utf-8").splitlines()]


class Interrupted(Exception):
    pass


def interrupt(monkeypatch, after: int) -> None:
    """The next run ends when the engine has found so many captions."""
    run_engines, found = streams.run_engines, []

    def interrupted(*args):
        for caption in run_engines(*args):
            if len(found) == after:
                monkeypatch.undo()
                raise Interrupted
            found.append(caption)
            yield caption

    monkeypatch.setattr(streams, "run_engines", interrupted)


def file(model, path, args=ARGS, which=ADAPTER, **more) -> SplitFile:
    return SplitFile(path / "predictions.jsonl", record(model), args, which, **more)


@pytest.mark.parametrize("after", [0, 1, 5, 9, 13])
def test_base_and_adapter_keep_a_file_each_and_resume(model, processor, rows, tmp_path, monkeypatch, after):
    whole = [file(model, tmp_path / f"whole/{which}", which=which) for which in (BASE, ADAPTER)]
    caption_split(model, processor, rows, *whole)
    assert texts(whole[0].path) != texts(whole[1].path)

    files = [file(model, tmp_path / which, which=which) for which in (BASE, ADAPTER)]
    caption_split(model, processor, rows.select([5, 2]), files[1])  # one is ahead
    interrupt(monkeypatch, after)
    with pytest.raises(Interrupted):
        caption_split(model, processor, rows, *files)
    caption_split(model, processor, rows, *files)
    for resumed, expected in zip(files, whole, strict=True):
        assert resumed.path.read_bytes() == expected.path.read_bytes()
        assert not list(resumed.path.parent.glob("*rank*"))
    before = [one.path.stat().st_mtime_ns for one in files]
    caption_split(model, processor, rows, *files)
    assert [one.path.stat().st_mtime_ns for one in files] == before, "finished files are left alone"


def test_prompts_keep_a_file_each(model, processor, rows, tmp_path):
    asked = [replace(ARGS, prompt=prompt) for prompt in PROMPTS[:3]]
    files = [file(model, tmp_path / str(number), args) for number, args in enumerate(asked)]
    caption_split(model, processor, rows, *files)
    for one, args in zip(files, asked, strict=True):
        alone = file(model, tmp_path / "alone", args)
        caption_split(model, processor, rows, alone)
        assert one.path.read_bytes() == alone.path.read_bytes()
        alone.path.unlink()
        assert json.loads(one.path.with_suffix(".run.json").read_text(encoding="utf-8"))["prompt"] == args.prompt
    with pytest.raises(PredictionsError, match="started with another prompt"):
        caption_split(model, processor, rows, *(replace(one, path=files[0].path) for one in files[1:2]))


@pytest.mark.parametrize("after", [0, 4, 11])
def test_each_prompt_has_its_own_images_and_resumes(model, processor, rows, tmp_path, monkeypatch, after):
    """Base and adapter, three prompts, of which two are asked of some of the images, and two of them are equal."""
    ids = list(rows["image_id"])
    asked = [(PROMPTS[0], None), (PROMPTS[1], ids[1::2]), (PROMPTS[0], ids[:3])]

    def files(folder):
        return [
            file(model, tmp_path / folder / which / str(number), replace(ARGS, prompt=prompt), which, image_ids=some)
            for which in (BASE, ADAPTER)
            for number, (prompt, some) in enumerate(asked)
        ]

    for one in files("alone"):
        caption_split(model, processor, rows, one)
    interrupt(monkeypatch, after)
    with pytest.raises(Interrupted):
        caption_split(model, processor, rows, *files("together"))
    block, runs = model.get_base_model().model.visual.blocks[0], []
    hook = block.register_forward_hook(lambda *call: runs.append(1))
    caption_split(model, processor, rows, *files("together"))
    hook.remove()
    assert len(runs) <= len(rows), "a picture goes through the encoder once for all its captions"
    for one, alone in zip(files("together"), files("alone"), strict=True):
        assert one.path.read_bytes() == alone.path.read_bytes()
    lines = [len(texts(one.path)) for one in files("together")]
    assert lines == [8, 4, 3] * 2


# Validation ----------------------------------------------------------------------------------------------------------
def test_validation_runs_the_encoder_once_a_picture(model, processor, rows, capsys):
    validation = CaptionValidation(rows, processor, ARGS)
    block = model.get_base_model().model.visual.blocks[0]
    runs = []
    hook = block.register_forward_hook(lambda *call: runs.append(1))
    first = validation(model)
    said, count = dict(validation.latest), len(runs)
    assert count == len(rows)
    assert validation(model) == first and validation.latest == said and len(runs) == count
    hook.remove()
    assert list(said.values()) == [
        caption for (caption,) in caption_images(model, processor, map(open_image, rows), ARGS)
    ]
    assert capsys.readouterr().err.count("features of 8 pictures stay in memory between evaluations (0.00 GiB") == 1


def test_validation_asks_for_all_keys_in_one_pass(model, processor, rows):
    """A key is asked for where there are references of it; each is scored with its own words."""
    ids, names = rows["image_id"][:], list(map(str, rows["image_id"]))
    japanese = CaptionTask(replace(ARGS, prompt=PROMPTS[0]), "characters", ids, dict.fromkeys(names, ["赤い丸"]), "ja")
    english = dict.fromkeys(names[1::3], ["a red circle on the left"])
    english = CaptionTask(replace(ARGS, prompt=PROMPTS[1]), "english", ids[1::3], english, "en/alt")
    validation = CaptionValidation(rows, processor, ARGS, tasks=[japanese, english])
    block, runs = model.get_base_model().model.visual.blocks[0], []
    hook = block.register_forward_hook(lambda *call: runs.append(1))
    scores = validation(model)
    assert len(runs) == len(rows) and validation(model) == scores and len(runs) == len(rows)
    hook.remove()
    said = {}
    for task in (japanese, english):
        pictures = [open_image(row) for row in rows if str(row["image_id"]) in task.references]
        texts = [caption for (caption,) in caption_images(model, processor, pictures, task.args)]
        said[task.key] = dict(zip(task.references, texts, strict=True))
        alone = quick_scores(said[task.key], task.references, task.tokenizer)
        assert scores[f"cider_d_{task.key.replace('/', '-')}"] == alone["cider_d"]
    assert validation.latest_of == said and validation.latest == said["ja"]
    assert scores["cider_d"] == (scores["cider_d_ja"] + scores["cider_d_en-alt"]) / 2


def test_features_that_do_not_fit_are_computed_again(model, processor, rows, monkeypatch, capsys):
    expected = CaptionValidation(rows, processor, ARGS)
    expected(model)
    monkeypatch.setattr("vlmcap.training.validation.SHARE_OF_MEMORY", 0.0)
    validation = CaptionValidation(rows, processor, ARGS)
    for _ in range(2):
        validation(model)
        assert validation.latest == expected.latest and not validation.kept
    assert capsys.readouterr().err.count("of 8 pictures are computed at each evaluation") == 1
