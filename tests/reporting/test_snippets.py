"""The code of cards and README, run as it is: it loads the model that was measured and sees what that one saw."""

import json
import re
import shutil
import subprocess

import pytest
import yaml
from PIL import Image

from tests.reporting.conftest import SETTINGS
from tests.reporting.documents import PARTS, adapter_document, family_document, miniature_document
from vlmcap.errors import UserError
from vlmcap.places import find_uv
from vlmcap.reporting.cards import render_adapter_card
from vlmcap.reporting.snippets import quick_start
from vlmcap.versions import OLDEST


def blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.S)


def test_the_readme_loads_what_base_yaml_measures(repo_root):
    config = yaml.safe_load((repo_root / "recipes/configs/sft_qwen2vl_jp/base.yaml").read_text(encoding="utf-8"))
    metrics = adapter_document()
    metrics["model"] |= {"id": config["model_name_or_path"], "revision": config["model_revision"], "dtype": "bfloat16"}
    assert config["load_in_4bit"] and metrics["model"]["quantization"] == "nf4"
    metrics["prompt"] = config["prompt"]
    metrics["decoding"] |= {key: config[key] for key in ("num_beams", "max_new_tokens")}
    text = (repo_root / "recipes/vlmcap/captioning/README.md").read_text(encoding="utf-8")
    assert quick_start(metrics, "you/name") + "\n" in blocks(text)


@pytest.mark.parametrize("projector", [True, False])
def test_vllm_and_its_way_out_are_on_the_card(projector):
    metrics = adapter_document()
    metrics["training"]["config"]["train_projector"] = projector
    card = render_adapter_card(metrics, "user/adapter")
    assert ("vLLM needs it: it refuses adapters with `modules_to_save`" in card) == projector
    assert ".dequantize()" in blocks(card)[1] and "merge_and_unload()" in blocks(card)[1]
    metrics["model"]["quantization"] = None
    assert "dequantize" not in render_adapter_card(metrics) and "merge_and_unload()" in render_adapter_card(metrics)


def code_of(miniature_dir, adapter, quantization: str | None) -> list[str]:
    metrics = miniature_document(str(miniature_dir))
    for run in (metrics, metrics["base"]):
        run["decoding"] |= SETTINGS
        run["model"]["quantization"] = quantization
    card = render_adapter_card(metrics, "user/adapter").replace('"user/adapter"', repr(str(adapter)))
    return blocks(card.replace('"recipes/miniatures/qwen2_vl"', repr(str(miniature_dir))))


def say(code: str, names: dict, pictures: list, capsys) -> list[str]:
    """What the second half of a quick start prints for each picture, with the model that the first half has loaded."""
    for path in pictures:
        exec(code.replace('"photo.jpg"', repr(str(path))), names)
    return capsys.readouterr().out.splitlines()


def test_quick_start_and_merged_model_say_what_was_measured(
    adapter, miniature_dir, pictures, measured, tmp_path, monkeypatch, capsys, repacking_processor
):
    """In this process, where vlmcap.models.nf4 keeps the miniature's scales right (real widths need no keeping)."""
    from transformers import AutoModelForImageTextToText

    start, merge = code_of(miniature_dir, adapter, "nf4")
    load, caption = start[: start.index("photo = ")], start[start.index("photo = ") :]
    names = {}
    exec(load, names)
    capsys.readouterr()
    assert say(caption, names, pictures, capsys) == measured

    monkeypatch.chdir(tmp_path)
    exec(merge, {})
    names["model"] = AutoModelForImageTextToText.from_pretrained("merged", dtype="float32", device_map="auto")
    names["processor"] = names["AutoProcessor"].from_pretrained("merged")
    capsys.readouterr()
    assert not hasattr(names["model"].config, "quantization_config")
    assert say(caption, names, pictures, capsys) == measured

    exec(code_of(miniature_dir, adapter, None)[1], {})  # into the published weights
    names["model"] = AutoModelForImageTextToText.from_pretrained("merged", dtype="float32", device_map="auto")
    assert say(caption, names, pictures, capsys) != measured


def saved_by(recipe: str, folder, miniatures):
    """Untrained weights and processor of a recipe, of miniature size, as it saves them."""
    if recipe == "sft_blip_vi":
        from vlmcap.miniature import family
        from vlmcap.models import blip

        base, processor = folder.parent / "base", family.build_blip_processor()
        family.build_blip(processor).save_pretrained(base)
        processor.save_pretrained(base)
        model, processor = blip.load_blip(str(base))
        processor = blip.learn_vietnamese(processor, ["Hình tròn màu đỏ ở bên trái."] * 2, new_pieces=4)
        model = blip.add_lora(model, processor, blip.BlipArguments())
    elif recipe == "sft_vit_gpt2_food":
        from vlmcap.models import vit_gpt2

        parts = {"encoder_name_or_path": str(miniatures / "vit"), "decoder_name_or_path": str(miniatures / "gpt2")}
        model, processor = vit_gpt2.build_vit_gpt2(vit_gpt2.VitGpt2Arguments(**parts), seed=0)
    else:
        from vlmcap.models import vit_llama

        parts = {"encoder_name_or_path": str(miniatures / "vit"), "decoder_name_or_path": str(miniatures / "llama")}
        arguments = vit_llama.VitLlamaArguments(**parts)
        model, processor = vit_llama.build_vit_llama(arguments, seed=0)
        model = vit_llama.add_lora(model, arguments)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def without_vlmcap(recipe: str) -> str:
    """A quick start of the card that needs transformers and PEFT alone: BLIP's has one beside its own."""
    first, *other = blocks(render_adapter_card(family_document(recipe), "user/Llama-x"))
    return "\n".join([first.splitlines()[0], *other, first[first.index("photo = ") :]]) if other else first


@pytest.mark.parametrize("recipe", PARTS)
def test_quick_starts_of_the_family_run(fresh_python, recipe, tmp_path, repo_root):
    """The card's own code, in a fresh process, on what the recipe saves; BLIP's without `vlmcap` says the same."""
    folder = tmp_path / "trained"
    saved_by(recipe, folder, repo_root / "recipes" / "miniatures")
    Image.new("RGB", (84, 84), "red").save(tmp_path / "photo.jpg")
    codes = [blocks(render_adapter_card(family_document(recipe), "user/Llama-x"))[0], without_vlmcap(recipe)]
    said = []
    for code in codes if recipe == "sft_blip_vi" else codes[:1]:
        code = code.replace('"user/Llama-x"', repr(str(folder)))
        code = code.replace('"photo.jpg"', repr(str(tmp_path / "photo.jpg")))
        said.append(fresh_python(code, folder=repo_root))
    assert said[0].endswith("\n") and len(set(said)) == 1


@pytest.fixture(scope="module")
def transformers_4(tmp_path_factory) -> str:
    """A folder for PYTHONPATH with the oldest libraries that the cards name."""
    folder = tmp_path_factory.mktemp("oldest")
    wanted = [f"{name}=={version}" for name, version in OLDEST.items()]
    wanted += ["tokenizers==0.22.2", "huggingface-hub==0.36.2"]
    try:
        command = [find_uv(), "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *wanted]
    except UserError as error:
        pytest.skip(str(error))
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"uv cannot install {wanted[0]} here: {done.stderr.strip()[-300:]}")
    return str(folder)


def as_transformers_4_writes_it(model, folder):
    """A copy of the miniature with the keys that the published configuration has."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    rope = config["text_config"]["rope_parameters"]
    more = {"rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}, "tie_word_embeddings": True}
    config["text_config"] |= more | {"rope_theta": rope["rope_theta"]}
    (folder / "config.json").write_text(json.dumps(config | more))
    return folder


def test_transformers_4_says_the_same(
    fresh_python, transformers_4, adapter, pictures, measured, miniature_dir, repo_root, tmp_path, capsys, monkeypatch
):
    """Adapters of Qwen2-VL (merged too) and BLIP, a model of ViT and GPT-2, with what the recipes save beside them."""
    from vlmcap.steps.save import name_special_tokens

    base = as_transformers_4_writes_it(miniature_dir, tmp_path / "base")
    code = [
        block.replace(repr(str(miniature_dir)), repr(str(base))) for block in code_of(miniature_dir, adapter, "nf4")
    ]
    code.append('model = AutoModelForImageTextToText.from_pretrained("merged", dtype="float32")')
    code.append('processor = AutoProcessor.from_pretrained("merged")\n' + code[0][code[0].index("prompt = ") :])
    for recipe in ("sft_blip_vi", "sft_vit_gpt2_food"):
        folder = tmp_path / recipe / "trained"
        folder.parent.mkdir()
        saved_by(recipe, folder, repo_root / "recipes" / "miniatures")
        name_special_tokens(folder)
        code.append(without_vlmcap(recipe).replace('"user/Llama-x"', repr(str(folder))))
    code = "\n".join(code).replace('"photo.jpg"', repr(str(pictures[0])))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {})
    said = capsys.readouterr().out
    assert said.splitlines()[:2] == [measured[0]] * 2 and len(said.splitlines()) == 4
    check = f"import transformers; assert transformers.__version__ == {OLDEST['transformers']!r}\n"
    (tmp_path / "other").mkdir()
    assert fresh_python(check + code, folder=tmp_path / "other", env={"PYTHONPATH": transformers_4}) == said
