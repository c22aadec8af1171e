"""scripts/export_model.py: one model that says what the adapter says, loads without vlmcap, and goes to the Hub."""

import json
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import get_peft_model
from transformers import AutoModelForImageTextToText

from tests.local_hub.faults import Fault
from tests.reporting.documents import family_document, miniature_document
from vlmcap.captioning.settings import read_settings
from vlmcap.errors import UserError
from vlmcap.miniature import family
from vlmcap.miniature.scenes import scenes
from vlmcap.models import blip
from vlmcap.models.load import ModelArguments, load_model, load_processor, lora_config
from vlmcap.models.merge import check_memory, needed_memory
from vlmcap.models.weights import ModelError
from vlmcap.reporting.cards import render_adapter_card
from vlmcap.reporting.hub import push_adapter
from vlmcap.steps.export import base_licence, export_model, merge_record, read_source
from vlmcap.steps.save import name_special_tokens
from vlmcap.upload import PushError

PICTURES = 6
DECODING = {"num_beams": 3, "max_new_tokens": 16}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, scene in enumerate(scenes(PICTURES, seed=5, held_out=True)):
        scene.draw().save(folder / f"{number}.png")
    return folder


def changed(model) -> None:
    """Weights that no training made, and that change what is said."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter += 0.02 * torch.randn_like(parameter)


def qwen2_vl_adapter(folder, base, load_in_4bit: bool):
    model = load_model(str(base), load_in_4bit=load_in_4bit)
    model = get_peft_model(model, lora_config(model, ModelArguments(str(base))))
    changed(model)
    model.save_pretrained(folder)
    load_processor(str(base), min_pixels=3136, max_pixels=7056).save_pretrained(folder)
    metrics = miniature_document(str(base), str(folder))
    for run in (metrics, metrics["base"]):
        run["decoding"] |= DECODING
        run["model"]["quantization"] = "nf4" if load_in_4bit else None
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, miniature_dir):
    """Trained on the miniature in NF4, with a projector of its own."""
    return qwen2_vl_adapter(tmp_path_factory.mktemp("adapter"), miniature_dir, load_in_4bit=True)


def arguments(adapter, output_dir, **given) -> SimpleNamespace:
    """Those of the script."""
    rest = dict.fromkeys(("adapter_revision", "model", "dtype", "dataset", "image_dir", "repo_id"))
    rest |= {"check_images": 0, "split": "test", "push_to_hub": False, "public": False}
    return SimpleNamespace(**rest | {"adapter": str(adapter), "output_dir": str(output_dir)} | given)


def record(folder) -> dict:
    return json.loads((folder / "merge.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def merged(adapter, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "merged"
    export_model(arguments(adapter, folder, check_images=99, image_dir=str(pictures)))
    return folder


def test_the_merged_model_says_what_the_adapter_says(merged, adapter):
    check = record(merged)["check"]
    assert (check["images"], check["equal"], check["different"], check["num_beams"]) == (PICTURES, PICTURES, [], 3)
    model = AutoModelForImageTextToText.from_pretrained(merged)
    assert not hasattr(model.config, "quantization_config") and model.dtype == torch.float32
    config = json.loads((merged / "generation_config.json").read_text())
    assert config["num_beams"] == 3 and config["do_sample"] is False and config["max_new_tokens"] == 16
    assert not {"temperature", "top_k", "top_p"} & config.keys()
    assert load_processor(str(merged)).image_processor.size == {"shortest_edge": 3136, "longest_edge": 7056}
    assert (merged / "chat_template.jinja").read_text() == (adapter / "chat_template.jinja").read_text()


def test_caption_script_needs_no_options_for_it(merged, adapter):
    settings = read_settings(str(merged))
    assert not settings.load_in_4bit and settings.dtype == "float32"
    assert (settings.num_beams, settings.min_pixels, settings.max_pixels) == (3, 3136, 7056)
    assert settings.prompt == json.loads((adapter / "metrics.json").read_text(encoding="utf-8"))["prompt"]


def test_the_card_says_what_was_merged_and_what_was_compared(merged, miniature_dir):
    card = ModelCard.load(merged / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-text-to-text"
    assert card.data.license == "apache-2.0" and "lora" not in card.data.tags and not card.data.eval_results
    assert f"{PICTURES} of {PICTURES} captions of the merged model are equal to the adapter's" in card.text
    assert "this adapter before the merge" in card.text and "weights that NF4 left" in card.text
    assert "peft" not in card.text.split("## Quick start")[1].split("## ")[0]


def test_a_model_that_says_something_else_is_counted(merged, adapter, pictures, tmp_path, capsys):
    """Of the same export with another projector: what is compared is what is on disk."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "merged"
    folder.mkdir()
    for path in merged.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    for key in weights:
        if "merger" in key:
            weights[key] = -weights[key]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    export_model(arguments(adapter, folder, check_images=PICTURES, image_dir=str(pictures)))
    assert "holds this export already" in capsys.readouterr().out
    check = record(folder)["check"]
    assert check["equal"] < PICTURES and len(check["different"]) == PICTURES - check["equal"]
    assert f"{check['equal']} of {PICTURES} captions" in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_all_weights_have_the_type_that_was_asked_for(adapter, tmp_path, dtype):
    export_model(arguments(adapter, tmp_path / "merged", dtype=dtype))
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert record(tmp_path / "merged")["dtype"] == dtype


def test_an_adapter_of_a_base_that_was_not_quantised(miniature_dir, pictures, tmp_path):
    (tmp_path / "adapter").mkdir()
    adapter = qwen2_vl_adapter(tmp_path / "adapter", miniature_dir, load_in_4bit=False)
    export_model(arguments(adapter, tmp_path / "merged", check_images=PICTURES, image_dir=str(pictures)))
    assert record(tmp_path / "merged")["check"]["equal"] == PICTURES
    assert "NF4" not in (tmp_path / "merged/README.md").read_text(encoding="utf-8")


def test_blip(pictures, tmp_path):
    base, folder, processor = tmp_path / "base", tmp_path / "adapter", family.build_blip_processor()
    family.build_blip(processor).save_pretrained(base)
    processor.save_pretrained(base)
    model, processor = blip.load_blip(str(base))
    processor = blip.learn_vietnamese(processor, ["Hình tròn màu đỏ ở bên trái."] * 2, new_pieces=4)
    model = blip.add_lora(model, processor, blip.BlipArguments())
    changed(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    metrics = family_document("sft_blip_vi", miniature=True)
    metrics["model"]["dtype"] = "float32"
    (folder / "metrics.json").write_text(json.dumps(metrics))
    export_model(arguments(folder, tmp_path / "merged", check_images=PICTURES, image_dir=str(pictures)))
    assert record(tmp_path / "merged")["check"]["equal"] == PICTURES
    assert (
        'AutoModelForImageTextToText.from_pretrained(name, dtype="auto"' in (tmp_path / "merged/README.md").read_text()
    )


ALONE = """
import json, sys
sys.modules["vlmcap"] = sys.modules["peft"] = sys.modules["bitsandbytes"] = None
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
folder, prompt, *pictures = sys.argv[1:]
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
pipe = pipeline("image-text-to-text", folder)
said = []
for picture in pictures:
    inputs = processor(text=[text], images=[Image.open(picture)], return_tensors="pt")
    ids = model.generate(**inputs)[0, inputs["input_ids"].shape[1]:]
    asked = [{"role": "user", "content": [{"type": "image", "path": picture}, {"type": "text", "text": prompt}]}]
    said.append([processor.decode(ids, skip_special_tokens=True),
                 pipe(text=asked, return_full_text=False)[0]["generated_text"]])
print(json.dumps(said))
"""


def test_transformers_loads_it_alone_and_searches_as_the_run_did(fresh_python, merged, adapter, pictures, tmp_path):
    """generate and pipeline without any setting, where neither vlmcap nor PEFT nor bitsandbytes can be imported."""
    from vlmcap.captioning.generate import caption_with_prompt
    from vlmcap.data.images import open_image
    from vlmcap.models.load import load_adapter

    source = read_source(str(adapter), None, None)
    model = load_adapter(load_model(source.base), str(adapter))
    files = sorted(pictures.glob("*.png"))
    rows = ({"image": {"bytes": None, "path": str(path)}, "image_id": 0} for path in files)
    processor = load_processor(str(adapter))
    wanted = [caption_with_prompt(model, processor, [open_image(row)], source.beams)[0] for row in rows]
    said = json.loads(fresh_python(ALONE, str(merged), source.metrics["prompt"], *map(str, files), folder=tmp_path))
    assert [[" ".join(text.split()) for text in pair] for pair in said] == [[text, text] for text in wanted]


def test_the_script_takes_an_adapter_from_the_hub_and_pushes_privately_in_one_commit(
    hub, adapter, run_script, tmp_path
):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in adapter.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    name_special_tokens(copy)
    push_adapter(copy, "user/adapter")
    command = ["export_model.py", "--adapter", "user/adapter", "--output_dir", tmp_path / "merged"]
    push = ["--push_to_hub", "--repo_id"]
    refused = run_script(*command, *push, "user/adapter", expect=1).stderr
    assert "holds adapter_config.json, and no merge.json" in refused and not (tmp_path / "merged").exists()

    hub.faults.append(Fault(method="POST", path="/commit/main", status=403, body={"error": "storage quota"}, times=99))
    failed = run_script(*command, *push, "user/merged", expect=1)
    assert "Memory: about 1.0 GiB for 3,379,808 parameters in float32" in failed.stdout
    again = f"python scripts/export_model.py --adapter user/adapter --output_dir {tmp_path}/merged --push_to_hub"
    assert "storage quota" in failed.stderr and f"{again} --repo_id user/merged" in failed.stderr

    hub.faults.clear()
    done = run_script(*command, *push, "user/merged")  # the command that the message gives
    assert "holds this export already" in done.stdout and f"Pushed to {hub.endpoint}/user/merged" in done.stdout
    info = HfApi().model_info("user/merged")
    assert info.private and len(HfApi().list_repo_commits("user/merged")) == 2  # the repository's first and ours
    files = {file.rfilename for file in info.siblings}
    assert {"model.safetensors", "generation_config.json", "merge.json", "README.md", "chat_template.jinja"} <= files
    assert not {"adapter_config.json", "metrics.json"} & files
    found = json.loads(hub.file("models", "user/merged", "merge.json"))
    assert found["adapter"] == {"id": "user/adapter", "revision": HfApi().model_info("user/adapter").sha}
    assert '"user/merged"' in hub.file("models", "user/merged", "README.md").decode()


def test_what_cannot_be_exported(adapter, merged, tmp_path, hub):
    with pytest.raises(UserError, match="has no metrics.json"):
        export_model(arguments(tmp_path, tmp_path / "out"))
    for recipe, why in (("sft_vit_gpt2_food", "a whole model already"), ("sft_vit_llama_food", "VitLlama")):
        (tmp_path / "metrics.json").write_text(json.dumps(family_document(recipe)))
        with pytest.raises(UserError, match=f"metrics.json of .*: it cannot be merged: .*{why}"):
            export_model(arguments(tmp_path, tmp_path / "out"))
    with pytest.raises(UserError, match="is not empty, and holds no export of .* in bfloat16: delete it"):
        export_model(arguments(adapter, merged, dtype="bfloat16"))
    with pytest.raises(UserError, match="holds no picture"):
        export_model(arguments(adapter, tmp_path / "out", check_images=1, image_dir=str(adapter)))
    with pytest.raises(PushError, match="user can push to user only"):
        export_model(arguments(adapter, tmp_path / "out", push_to_hub=True, repo_id="other/x"))
    assert not (tmp_path / "out").exists()


def test_the_licence_is_that_of_the_base_s_weights(adapter, miniature_dir, tmp_path):
    source = read_source(str(adapter), None, None)
    assert base_licence(source) == {"license": "apache-2.0"}  # the miniature's
    source.metrics["base"]["model"]["parameters"] = 2_208_985_600
    source = type(source)(source.adapter, source.metrics, None, str(tmp_path), None)
    assert base_licence(source) == {}
    card = render_adapter_card(source.metrics, merged=merge_record(source, "float16") | {"name": "you/x"})
    assert ModelCard(card).data.license is None and "It is not recorded here" in card
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: some-research\n---\nA model")
    assert base_licence(source) == {"license": "other", "license_name": "some-research"}
    card = render_adapter_card(source.metrics, merged=merge_record(source, "float16") | {"name": "you/x"})
    assert ModelCard(card).data.to_dict()["license_name"] == "some-research" and "`some-research`" in card


def test_the_real_size_needs_at_most_8_gib(qwen2vl_dir):
    parameters, parts = needed_memory(str(qwen2vl_dir), None, torch.bfloat16)
    assert parameters == 2_208_985_600 and sum(parts.values()) < 8 * 2**30
    assert sum(needed_memory(str(qwen2vl_dir), None, torch.float32)[1].values()) > 10 * 2**30


def test_too_little_memory_is_said_before_the_base_is_loaded(miniature_dir, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**29))
    with pytest.raises(ModelError, match="about 1.0 GiB .*0.5 GiB are free: give --dtype float16, close"):
        check_memory(str(miniature_dir), None, torch.float32)


def test_the_card_s_commands_name_the_folder_as_a_shell_takes_it(merged, adapter):
    source, name = read_source(str(adapter), None, None), "you/my_model"
    card = render_adapter_card(source.metrics, name, merged=record(merged) | {"name": name})
    assert "transformers serve you/my_model\n" in card and "vllm serve you/my_model --limit-mm" in card
