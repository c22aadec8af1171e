"""scripts/caption.py with every kind of model that the recipes make, on miniatures, and the files that it writes."""

import importlib.util
import json
import shutil

import pytest
import torch
from peft import get_peft_model

from vlmcap.arguments import parse, run_main
from vlmcap.captioning.arguments import FORM, BeamArguments, CaptionArguments, GenerationArguments, name_pictures
from vlmcap.captioning.generate import caption_batch
from vlmcap.captioning.pictures import read_picture
from vlmcap.captioning.settings import NAME, read_settings, settings_of, write_settings
from vlmcap.errors import UserError
from vlmcap.miniature.scenes import scenes
from vlmcap.models import blip, vit_gpt2, vit_llama
from vlmcap.models.arguments import BlipArguments, ModelArguments, VitGpt2Arguments, VitLlamaArguments
from vlmcap.models.load import load_adapter, load_model, load_processor, lora_config

ENGLISH = GenerationArguments(prompt="Describe this image briefly.", num_beams=3, max_new_tokens=12)
BEAMS = BeamArguments(num_beams=2, max_new_tokens=8)


@pytest.fixture(scope="module")
def script(repo_root):
    spec = importlib.util.spec_from_file_location("caption", repo_root / "scripts/caption.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*words):
        module.main(*parse("", CaptionArguments, command_line=name_pictures([str(word) for word in words])))

    run.module = module
    return run


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "a b").mkdir()
    for number, scene in enumerate(scenes(4, seed=9, held_out=True)):
        scene.draw().save(folder / f"{'a b/' * (number % 2)}{number}.png")
    return folder


@pytest.fixture(scope="module")
def miniatures(repo_root):
    return {name: str(repo_root / "recipes/miniatures" / name) for name in "qwen2_vl blip vit gpt2 llama".split()}


def randomised(model):
    """LoRA's B matrices are zero at the start, and would change nothing; A is drawn here too, the same each time."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * (0.2 if "lora_B" in name else 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def adapter(miniatures, tmp_path_factory):
    """A Qwen2-VL adapter with the files that its recipe leaves."""
    folder = tmp_path_factory.mktemp("qwen") / "adapter"
    processor = load_processor(miniatures["qwen2_vl"], max_pixels=84 * 84)
    model = load_model(miniatures["qwen2_vl"])
    model = randomised(get_peft_model(model, lora_config(model, ModelArguments(lora_r=4))))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    write_settings(folder, settings_of("sft_qwen2vl_jp", model, processor, ENGLISH))
    return folder


def save_blip(miniatures, folder):
    model, processor = blip.load_blip(miniatures["blip"])
    processor = blip.learn_vietnamese(processor, ["một hình tròn", "hình vuông"], 5)
    model = randomised(blip.add_lora(model, processor, BlipArguments()))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return "sft_blip_vi", model, processor


def save_vit_gpt2(miniatures, folder):
    args = VitGpt2Arguments(encoder_name_or_path=miniatures["vit"], decoder_name_or_path=miniatures["gpt2"])
    model, processor = vit_gpt2.build_vit_gpt2(args, seed=1)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return "sft_vit_gpt2_food", model.eval(), processor


def save_vit_llama(miniatures, folder):
    args = VitLlamaArguments(encoder_name_or_path=miniatures["vit"], decoder_name_or_path=miniatures["llama"])
    model, processor = vit_llama.build_vit_llama(args, seed=1)
    model = randomised(vit_llama.add_lora(model, args))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return "sft_vit_llama_food", model, processor


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_adapters_own_settings(script, photos, adapter, miniatures, tmp_path, capsys):
    settings = read_settings(str(adapter))
    assert settings.load_in_4bit and settings.max_pixels == 84 * 84 and settings.prompt == ENGLISH.prompt
    output = tmp_path / "captions.jsonl"
    script(photos, "--adapter", adapter, "--output", output, "--num_captions", 2)
    processor = load_processor(str(adapter))
    model = load_adapter(load_model(miniatures["qwen2_vl"]), str(adapter))
    images = [scene.draw() for scene in scenes(4, seed=9, held_out=True)]
    expected = caption_batch(model, processor, images, ENGLISH, 2)
    said = {line["image_id"]: [line["caption"], *line["alternatives"]] for line in lines(output)}
    names = [photos / f"{'a b/' * (number % 2)}{number}.png" for number in range(4)]
    assert said == {str(name): captions for name, captions in zip(names, expected, strict=True)}
    assert all(len(captions) == 2 for captions in expected) and any(len(set(said)) == 2 for said in expected)
    record = json.loads(output.with_suffix(".run.json").read_text(encoding="utf-8"))
    assert record["model"]["quantization"] == "nf4" and record["decoding"]["num_captions"] == 2

    script(names[2], "--adapter", adapter)  # to the terminal
    assert capsys.readouterr().out == f"{names[2]}\t{expected[2][0]}\n"


def test_options_override_and_constraints_hold(script, photos, adapter, tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("の\n", encoding="utf-8")
    output = tmp_path / "c.jsonl"
    options = ["--japanese_only", "--avoid_words", words, "--num_beams", 1, "--max_new_tokens", 6]
    script(photos, "--adapter", adapter, "--output", output, *options, "--load_in_4bit", "false")
    record = json.loads(output.with_suffix(".run.json").read_text(encoding="utf-8"))
    assert record["model"]["quantization"] is None
    assert record["decoding"]["avoid_words"] == ["の"] and record["decoding"]["num_beams"] == 1
    assert not any(c.isascii() and c.isalpha() or c == "の" for line in lines(output) for c in line["caption"])


def test_an_adapter_made_elsewhere(script, photos, adapter, tmp_path, capsys):
    copy = tmp_path / "adapter"
    shutil.copytree(adapter, copy, ignore=shutil.ignore_patterns(NAME, "processor_config.json", "tokenizer*"))
    script(photos / "0.png", "--adapter", copy, "--max_new_tokens", 4)
    captured = capsys.readouterr()
    assert "has no captioning.json" in captured.err and captured.out.startswith(f"{photos / '0.png'}\t")


def test_a_base_alone(script, photos, miniatures, capsys):
    script(photos, "--model", miniatures["qwen2_vl"], "--prompt", ENGLISH.prompt, "--format", "csv")
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize("save", [save_blip, save_vit_gpt2, save_vit_llama])
def test_the_relatives(script, photos, miniatures, tmp_path, capsys, save):
    recipe, model, processor = save(miniatures, tmp_path / "trained")
    paths = sorted(photos.rglob("*.png"))
    images = [read_picture(str(path)) for path in paths]
    expected = caption_batch(model, processor, images, BEAMS, 2)
    write_settings(tmp_path / "trained", settings_of(recipe, model, processor, BEAMS))
    output = tmp_path / "c.jsonl"
    script(*paths, "--adapter", tmp_path / "trained", "--output", output, "--num_captions", 2)
    assert [[line["caption"], *line["alternatives"]] for line in lines(output)] == expected

    (tmp_path / "trained" / NAME).unlink()  # the kind is found by the configurations
    script(paths[0], "--adapter", tmp_path / "trained", "--num_beams", 2, "--max_new_tokens", 8)
    captured = capsys.readouterr()
    assert captured.out == f"{paths[0]}\t{expected[0][0]}\n" and "has no captioning.json" in captured.err
    with pytest.raises(UserError, match="there is no --japanese_only: leave it out"):
        script(paths[0], "--adapter", tmp_path / "trained", "--japanese_only")


def test_pages_and_review_queue(script, photos, adapter, tmp_path, capsys):
    output = tmp_path / "out" / "captions.html"
    queue = tmp_path / "review"
    script(photos, "--adapter", adapter, "--output", output, "--review_queue", queue, "--num_captions", 3)
    page = output.read_text(encoding="utf-8")
    assert page.count("<figure>") == 4 and page.count("data:image/png;base64,") == 4
    assert "default-src 'none'" in page and "script-src 'none'" in page
    held = lines(queue / "held_back.jsonl")
    assert len(held) + len(lines(queue / "released.jsonl")) == 4
    assert held and all(set(line["reasons"]) <= set(FORM) and line["reasons"] for line in held)
    assert len(lines(output.with_name("captions.html.jsonl"))) == 4


def test_a_server_is_asked_as_the_adapter_was_trained(script, photos, adapter, chat, tmp_path):
    output = tmp_path / "c.jsonl"
    script(photos, "--server", f"{chat.address}/v1/", "--adapter", adapter, "--output", output)
    assert len(lines(output)) == 4 and all(line["caption"].startswith("色 ") for line in lines(output))
    for path, _, body in chat.requests:
        assert path == "/v1/chat/completions" and body["model"] == "qwen" and body["max_tokens"] == 12
        assert body["messages"][0]["content"][1]["text"] == ENGLISH.prompt
    script(photos, "--server", chat.address, "--adapter", adapter, "--output", output)
    assert len(chat.requests) == 4


def test_what_cannot_be_read_is_listed_at_the_end(script, photos, adapter, tmp_path, monkeypatch, capsys):
    (tmp_path / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut off")
    words = [photos, tmp_path / "damaged.jpg", tmp_path / "none\n.png", "--adapter", adapter]
    words = name_pictures([str(word) for word in [*words, "--output", tmp_path / "c.csv", "--max_new_tokens", "4"]])
    with pytest.raises(SystemExit) as end:
        run_main(script.module.main, "", CaptionArguments, command_line=words)
    message = str(end.value)
    assert message.startswith("error: 2 of 6 pictures failed:\n")
    assert "damaged.jpg: " in message and "none\\n.png: no such file" in message
    assert (tmp_path / "c.csv").read_text(encoding="utf-8").count("\n") == 5


def test_a_process_of_its_own(run_script, photos, adapter, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    done = run_script("caption.py", tmp_path / "photos", "none.png", "--adapter", adapter, "--sidecar", expect=1)
    assert "1 of 5 pictures failed:\n  none.png: no such file" in done.stderr
    assert len(done.stdout.splitlines()) == 4
    assert sorted(path.name for path in (tmp_path / "photos").rglob("*.txt")) == [f"{n}.txt" for n in range(4)]
