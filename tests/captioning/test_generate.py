"""Beam search over batches, continued runs, the run record."""

import json
from dataclasses import replace
from types import SimpleNamespace

import datasets
import pytest
from transformers import GenerationConfig

from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.captioning.generate import caption_with_prompt, check_predictions, decoding_record, search_config
from vlmcap.captioning.predictions import PredictionsError, model_record
from vlmcap.captioning.split import SplitFile, caption_split
from vlmcap.data.images import BadImageError, load_captions
from vlmcap.miniature.scenes import scenes
from vlmcap.models.load import count_parameters, load_model, load_processor

ARGS = GenerationArguments(prompt="Describe this image briefly.", max_new_tokens=12, generation_batch_size=3)


@pytest.fixture(scope="module")
def model(miniature_dir):
    return load_model(str(miniature_dir))


@pytest.fixture(scope="module")
def processor(miniature_dir):
    return load_processor(str(miniature_dir))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    rows = []
    for number, scene in enumerate(scenes(7, seed=9, held_out=True)):
        scene.draw().save(folder / f"{number}.png")
        rows.append({"image_id": number, "file_name": f"{number}.png", "captions": scene.japanese()})
    datasets.Dataset.from_list(rows).to_parquet(folder / "data/test-00000-of-00001.parquet")
    return folder


@pytest.fixture
def rows(folder):
    return load_captions(str(folder / "data"), "test", image_dir=str(folder))


def record(model):
    return {"model": model_record(model, "a/b", "main"), "dataset": {"id": "c/d", "revision": None, "split": "test"}}


def test_tokens_that_end_a_caption_come_from_the_tokenizer_where_the_model_has_none():
    tokenizer = SimpleNamespace(bos_token_id=5, eos_token_id=7, pad_token_id=9)
    for own, found in (({}, (7, 9)), ({"eos_token_id": [3, 4], "pad_token_id": 0}, ([3, 4], 0))):
        config = search_config(SimpleNamespace(generation_config=GenerationConfig(**own)), tokenizer, ARGS)
        assert (config.eos_token_id, config.pad_token_id) == found


def test_a_batch_says_what_single_images_say(model, processor):
    """Left padding: a short prompt beside a longer one must not change its caption."""
    images = [scene.draw() for scene in scenes(3, seed=1, held_out=True)]
    together = caption_with_prompt(model, processor, images, ARGS)
    alone = [caption_with_prompt(model, processor, [image], ARGS)[0] for image in images]
    assert together == alone
    assert len(set(together)) > 1


def test_the_miniature_speaks_english_about_unseen_scenes(model, processor):
    """The committed checkpoint is the pretrained one, not random weights: colours and shapes of new combinations."""
    drawn = list(scenes(20, seed=77, held_out=True))
    args = GenerationArguments(prompt="Describe this image briefly.", max_new_tokens=40)
    said = caption_with_prompt(model, processor, [s.draw() for s in drawn], args)
    right = sum(
        s.first.colour in t and s.first.shape in t and s.second.shape in t for s, t in zip(drawn, said, strict=True)
    )
    assert right >= 14


def test_predictions_and_run_record(model, processor, rows, tmp_path):
    output = tmp_path / "run/predictions.jsonl"
    caption_split(model, processor, rows, SplitFile(output, record(model), ARGS))
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [line["image_id"] for line in lines] == list(range(7)) and all(line["caption"] for line in lines)
    run = json.loads((tmp_path / "run/predictions.run.json").read_text(encoding="utf-8"))
    assert run["decoding"] | {"num_beams": 3, "max_new_tokens": 12, "do_sample": False} == run["decoding"]
    assert run["model"]["quantization"] == "nf4" and run["model"]["parameters"] == count_parameters(model)
    assert run["seconds"] > 0 and run["versions"]["transformers"] and run["hardware"]["cores"]


def test_an_interrupted_run_resumes(model, processor, rows, tmp_path):
    whole, broken = tmp_path / "whole/predictions.jsonl", tmp_path / "broken/predictions.jsonl"
    caption_split(model, processor, rows, SplitFile(whole, record(model), ARGS))
    caption_split(model, processor, rows.select(range(4)), SplitFile(broken, record(model), ARGS))
    first = broken.read_bytes()
    broken.write_bytes(first + b'{"image_id": 4, "cap')  # killed while writing
    caption_split(model, processor, rows, SplitFile(broken, record(model), ARGS))
    assert broken.read_bytes().startswith(first)
    assert broken.read_bytes() == whole.read_bytes()


def test_shares_of_a_crashed_distributed_run_are_kept(model, processor, rows, tmp_path):
    output = tmp_path / "predictions.jsonl"
    caption_split(model, processor, rows.select([0]), SplitFile(output, record(model), ARGS))
    (tmp_path / "predictions.rank1.jsonl").write_text('{"image_id": 5, "caption": "kept"}\n{"image_id": 6, "ca')
    caption_split(model, processor, rows, SplitFile(output, record(model), ARGS))
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert sorted(line["image_id"] for line in lines) == list(range(7))
    assert {"image_id": 5, "caption": "kept"} in lines
    assert not list(tmp_path.glob("*rank*"))


def test_predictions_of_other_settings_are_not_resumed(model, processor, rows, tmp_path):
    output = tmp_path / "predictions.jsonl"
    caption_split(model, processor, rows.select([0]), SplitFile(output, record(model), ARGS))
    other = GenerationArguments(prompt="この画像を説明して", max_new_tokens=12, generation_batch_size=3)
    before = output.read_bytes()
    check_predictions(processor, output, ARGS, record(model))
    with pytest.raises(PredictionsError, match="started with another prompt"):
        check_predictions(processor, output, other, record(model))  # as a recipe asks before it trains
    with pytest.raises(PredictionsError, match="started with another prompt"):
        caption_split(model, processor, rows, SplitFile(output, record(model), other))
    assert output.read_bytes() == before


def test_an_unreadable_test_picture_stops_the_run(model, processor, rows, folder, tmp_path):
    rows = rows.map(lambda row: {"image": {"bytes": b"no picture", "path": None}} if row["image_id"] == 2 else row)
    with pytest.raises(BadImageError, match="2.png"):
        caption_split(model, processor, rows, SplitFile(tmp_path / "predictions.jsonl", record(model), ARGS))


def test_words_to_avoid_are_avoided(model, processor, tmp_path):
    images = [scene.draw() for scene in scenes(3, seed=1, held_out=True)]
    said = caption_with_prompt(model, processor, images, ARGS)
    words = tmp_path / "words.txt"
    words.write_text(said[0].split()[1] + "\n", encoding="utf-8")
    avoiding = replace(ARGS, avoid_words=str(words))
    now = caption_with_prompt(model, processor, images, avoiding)
    assert now[0] and said[0].split()[1] not in now[0]
    assert decoding_record(ARGS).keys() == {"num_beams", "max_new_tokens", "do_sample", "batch_size"}
    assert decoding_record(avoiding)["avoid_words"] == [said[0].split()[1]]
