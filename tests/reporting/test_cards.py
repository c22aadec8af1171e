"""The card: everything the document says, nothing it does not say."""

import ast
import copy
import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from tests.reporting.documents import (
    NAMES,
    PARTS,
    SHA,
    adapter_document,
    audit_document,
    family_document,
    language_document,
    miniature_document,
    preference_document,
)
from vlmcap.reporting.card_facts import CardError
from vlmcap.reporting.cards import render_adapter_card, score_rows, write_adapter_card
from vlmcap.reporting.snippets import load_snippet

LABELS = dict(zip(NAMES, ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"), strict=True))


def table_cells(card: str, first: str) -> list[str]:
    """The cells after the first in the table row that starts with `first`."""
    (row,) = re.findall(rf"^\| {re.escape(first)} \|(.*)\|$", card, re.M)
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)]


def snippet(card: str) -> str:
    return re.findall(r"```python\n(.*?)```", card, re.S)[0]


def prose(card: str) -> str:
    return " ".join(card.split())


def write(folder, metrics):
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return write_adapter_card(folder)


def test_a_card_of_preferences_has_the_start_beside_base_and_result():
    metrics = preference_document()
    card = render_adapter_card(metrics, "user/adapter")
    beside = card.split("### Beside the adapter")[1].split("### Preferences")[0]
    for name in NAMES:
        base, start, adapter = table_cells(beside, LABELS[name])
        assert base.startswith(f"{metrics['base']['scores'][name]:.4f}") and start == "0.1234"
        assert adapter.startswith(f"{metrics['scores'][name]:.4f}")
    assert table_cells(card, "share of them whose chosen caption is the more probable one") == ["52.0%", "91.0%"]
    assert "| pairs that were not trained on: 432 |" in card and "4,321 pairs of captions of" in prose(card)
    assert f"started from the adapter `user/start` (commit `{SHA}`)" in prose(card)
    assert "Pairs seen in training: 8,642" in card and "Left out of the scored split: 17 images" in card
    data = ModelCard(card).data
    assert "dpo" in data.tags and "sft" not in data.tags and data.base_model_relation == "adapter"


def test_each_language_has_its_table():
    metrics = language_document()
    card = render_adapter_card(metrics, "user/adapter")
    languages = metrics["languages"]
    assert (
        "adapted to Japanese and English image captions" in card and "one short Japanese or English sentence" in card
    )
    data = ModelCard(card).data
    assert (
        data.language == ["ja", "en"] and {"japanese", "english"} <= set(data.tags) and "vietnamese" not in data.tags
    )
    values = {m["name"]: m["value"] for m in data.to_dict()["model-index"][0]["results"][0]["metrics"]}
    assert values["CIDEr-D, ja/plain"] == metrics["scores"]["cider_d"]
    assert values["CIDEr-D, vi"] == languages["vi"]["scores"]["cider_d"]

    overview = card.split("Captions of `en`:")[0]
    assert table_cells(overview, "`en`")[:3] == ["`Describe this image.`", "yes", "5,000"]
    prompt, trained, images, base, adapter = table_cells(overview, "`vi`")
    assert (prompt, trained, images) == ("`Mô tả ảnh này.`", "no", "920")
    assert base.startswith("0.8000 [") and adapter.startswith("0.4000 [")
    english, others = card.split("Captions of `en`:")[1].split("### Languages that were not trained on")
    base, adapter, signature = table_cells(english, "CIDEr-D")
    assert base.startswith("0.8000") and adapter.startswith("**0.8800** [") and "english-13a" in signature
    before, after, ratio, _ = table_cells(others.split("###")[0], "CIDEr-D")
    assert before.startswith("0.8000") and after.startswith("**0.4000**") and ratio == "0.50"
    code = snippet(card)
    assert '    "en": "Describe this image.",' in code and "Mô tả" not in code
    assert 'prompt = prompts["ja/plain"]' in code and "- `vi`: `Mô tả ảnh này.`" in card

    metrics["training"]["start"] = preference_document()["training"]["start"]
    metrics["training"]["start"]["languages"] = {"en": {"scores": dict.fromkeys(NAMES, 0.4321), "intervals": {}}}
    english = render_adapter_card(metrics).split("Captions of `en`:")[1].split("### Languages that were")[0]
    assert table_cells(english, "CIDEr-D")[1] == "0.4321"


def test_the_captions_of_each_language_have_their_audit():
    metrics = language_document()
    audit = audit_document(metrics)
    english = audit_document(metrics["languages"]["en"])
    english["form"]["non_latin"] = english["form"].pop("non_japanese")
    del english["flagged"], english["hallucination"], english["persons"]
    audit["languages"] = {"en": english}
    card = render_adapter_card(metrics, audit=audit)
    japanese, english = card.split("### What the captions say")[1].split("| `en`: share of |")
    assert "captions of `ja/plain` are flagged" in japanese and "| `ja/plain`: share of |" in japanese
    assert len(table_cells(japanese, "not Japanese")) == len(table_cells(english, "not in Latin letters")) == 2
    assert "not in Latin letters" not in japanese and "not Japanese" not in english

    audit["languages"]["en"]["prompt"] = "Describe."
    with pytest.raises(CardError, match="the audit of en has other captions than the scores: prompt differs"):
        render_adapter_card(metrics, audit=audit)


def test_a_language_whose_base_was_scored_in_another_way_is_refused():
    metrics = language_document()
    metrics["languages"]["vi"]["base"]["prompt"] = "Mô tả."
    with pytest.raises(CardError, match="base and adapter differ in prompt of vi and cannot be in one table"):
        render_adapter_card(metrics)


def test_every_score_is_the_document_s():
    metrics = adapter_document()
    card = render_adapter_card(metrics, "user/adapter")
    (result,) = ModelCard(card).data.to_dict()["model-index"][0]["results"]
    assert {m["name"]: m["value"] for m in result["metrics"]} == {LABELS[n]: metrics["scores"][n] for n in NAMES}
    assert result["dataset"] == {
        "name": "user/stair-captions",
        "type": "user/stair-captions",
        "split": "test",
        "revision": SHA[::-1],
    }
    raw = card.split("register-normalised")[0]
    for name in NAMES:
        base, adapter, signature = table_cells(raw, LABELS[name])
        for cell, run, value in ((base, metrics["base"], "{:.4f}"), (adapter, metrics, "**{:.4f}**")):
            low, high = run["intervals"][name]
            assert cell == f"{value.format(run['scores'][name])} [{low:.4f}, {high:.4f}]"
        assert signature.replace("\\|", "|") == f"`{metrics['signatures'][name]}`"
    assert score_rows(metrics)[-1] == ["CIDEr-D", "0.1606", "0.9183"]


def test_metadata_of_an_adapter_on_the_hub():
    data = ModelCard(render_adapter_card(adapter_document(), "user/adapter")).data.to_dict()
    expected = {
        "base_model": "Qwen/Qwen2-VL-2B-Instruct",
        "base_model_relation": "adapter",
        "datasets": ["user/stair-captions"],
        "language": ["ja"],
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "image-text-to-text",
    }
    assert {key: data[key] for key in expected} == expected
    assert data["model-index"][0]["name"] == "adapter"


def test_the_card_states_how_the_scores_came_about():
    metrics = adapter_document()
    card = render_adapter_card(metrics, "user/adapter")
    assert metrics["prompt"] in card
    assert re.findall(r"\| peak device memory \|(.*)\|", card) == [" 4.84 GiB | 4.84 GiB ", " 10.24 GiB "]
    assert re.findall(r"\| time \|(.*)\|", card) == [
        " 43 min 20 s | 41 min 40 s ",
        " 11 h 6 min, 1.2% of it waiting for data ",
    ]
    assert table_cells(card, "saw STAIR in training") == ["unknown", "train"]
    assert table_cells(card, "saw COCO in training") == ["unknown", "train images"]
    assert "95% intervals of a bootstrap over images (1,000 resamples, seed 0)" in card
    assert table_cells(card, "revision") == [f"`{SHA}`", "not recorded"]
    assert table_cells(card, "`num_beams`") == ["3"] and table_cells(card, "`max_pixels`") == ["401408"]
    assert table_cells(card, "`target`") == ['`["q_proj", "v_proj"]`'] and table_cells(card, "`note`") == ["`a\\|b`"]
    assert "Tesla T4 (14.76 GiB)" in card and "torch 2.15.0" in card and metrics["commit"] in card
    assert "Split of Karpathy, by image." in card
    assert "measured with the base quantised to NF4, as here" in card


def test_scores_with_the_register_normalised(tmp_path):
    metrics = adapter_document()
    metrics["register_normalised"]["intervals"] = {"cider_d": [0.9, 0.94]}
    _, after = render_adapter_card(metrics).split("| metric, register-normalised |")
    assert table_cells(after, "CIDEr-D") == ["0.1627", "0.9204 [0.9000, 0.9400]"]
    for run in (metrics, metrics["base"]):
        del run["register_normalised"], run["intervals"], run["bootstrap"]
    card = render_adapter_card(metrics)
    assert "register-normalised" not in card and "bootstrap" not in card
    assert table_cells(card, "CIDEr-D")[:2] == ["0.1606", "**0.9183**"]


def test_what_the_captions_say_is_out_of_the_audit(tmp_path):
    metrics = adapter_document()
    assert "No audit was made of them" in render_adapter_card(metrics)
    audit = audit_document(metrics)
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    card = write(tmp_path, metrics).read_text()
    assert "No audit" not in card and "2 of 5,000 captions are flagged" in card
    made_up = table_cells(card, "captions with a thing that is not in the picture (CHAIRs)")
    assert made_up == ["28.1% [28.0, 28.2]", "12.2% [12.1, 12.3]"]
    assert table_cells(card, "the other gender than the references'")[1] == "3.4% [3.3, 3.5]"
    assert "in the picture is what the instance annotations or the references name." in card
    assert "`coco_ja.yaml` (1,234 words)" in card and "overlap" not in card

    del audit["base"], audit["hallucination"]
    card = render_adapter_card(metrics, audit=audit)
    assert "CHAIR" not in card and table_cells(card, "cut off") == ["not audited", "0.2% [0.1, 0.3]"]
    audit["hallucination"] = audit_document(metrics)["hallucination"] | {"objects_from": ["references"]}
    assert "a thing which is there and which no reference names counts as made up" in render_adapter_card(
        metrics, audit=audit
    )


def test_an_audit_of_other_captions_makes_no_card(tmp_path):
    metrics = adapter_document()
    audit = audit_document(metrics)
    audit["base"]["decoding"] = {"num_beams": 1}
    with pytest.raises(ValueError, match="audit of the base has other captions than the scores: decoding differs"):
        render_adapter_card(metrics, audit=audit)
    audit = audit_document(metrics)
    audit["counts"]["images"] = 10
    with pytest.raises(ValueError, match="the audit is of 10 images, the scores of 5000"):
        render_adapter_card(metrics, audit=audit)
    (tmp_path / "audit.json").write_text("{}")
    with pytest.raises(ValueError, match="audit.json: not an audit"):
        write(tmp_path, metrics)


def test_constrained_decoding_is_said_beside_the_quick_start():
    metrics = adapter_document()
    assert "constrained decoding" not in render_adapter_card(metrics)
    for run in (metrics, metrics["base"]):
        run["decoding"] |= {"japanese_only": True, "avoid_words": ["美人"]}
    assert "constrained decoding (`japanese_only`, `avoid_words`)" in render_adapter_card(metrics)


@pytest.mark.parametrize(
    ("count", "says"),
    [(0, "None of the 86,787 images trained on"), (13555, "**13,555 are also images of YJ Captions**")],
)
def test_training_on_images_of_yj_is_said(count, says):
    metrics = adapter_document()
    metrics["training"]["in_yj_images"] = count
    assert says in render_adapter_card(metrics)


@pytest.mark.parametrize("metrics", [adapter_document(), *map(family_document, PARTS)], ids=["qwen2vl", *PARTS])
def test_changing_any_number_of_the_document_changes_the_card(metrics):
    """No figure is dropped on the way, and none comes from elsewhere. The log is for plots."""
    metrics["training"].pop("log", None)
    card = render_adapter_card(metrics)
    silent = []

    def walk(node, path):
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value, [*path, key])
            elif isinstance(value, int | float) and not isinstance(value, bool):
                node[key] = value * 3 + 1
                try:
                    changed = render_adapter_card(metrics) != card
                except ValueError as error:  # base and adapter no longer scored alike: refused, not ignored
                    changed = "cannot be in one table" in str(error)
                if not changed:
                    silent.append(".".join([*path, key]))
                node[key] = value

    walk(metrics, [])
    assert not silent


def test_what_was_not_measured_is_not_zero():
    card = render_adapter_card(miniature_document())
    assert re.findall(r"\| peak device memory \|(.*)\|", card) == [" not measured | not measured ", " not measured "]
    assert "None" not in card.replace("None of the", "") and " 0 MiB" not in card


def test_local_folders_stay_out_of_the_metadata(tmp_path, repo_root):
    """recipes/vlmcap looks like a Hub id; an absolute path would tell where the author's home is."""
    for model, name in (
        ("recipes/vlmcap", "recipes/vlmcap"),
        (str(repo_root / "recipes" / "vlmcap"), "recipes/vlmcap"),
        (str(tmp_path / "my-base"), "my-base"),
        (f"user/{300 * 'x'}", f"user/{300 * 'x'}"),  # no name of a repository, nor one that a file can have
    ):
        metrics = miniature_document(model)
        metrics["dataset"]["id"] = metrics["base"]["dataset"]["id"] = str(tmp_path / "scenes")
        metrics["training"]["dataset"]["id"] = "../elsewhere/scenes"
        card = render_adapter_card(metrics)
        data = ModelCard(card).data.to_dict()
        assert not {"base_model", "base_model_relation", "datasets"} & data.keys()
        assert f"makes `{name}` (a local folder) describe" in card
        assert str(tmp_path) not in card and str(repo_root) not in card
        assert data["model-index"][0]["results"][0]["dataset"]["type"] == "scenes"


def test_the_miniature_says_nothing_about_qwen2_vl():
    card = render_adapter_card(miniature_document())
    assert "demonstration that the machinery learns, and no evidence about Qwen2-VL" in card
    assert "demonstration" not in render_adapter_card(adapter_document())

    large = miniature_document()
    large["model"]["parameters"] = large["base"]["model"]["parameters"] = 700_000_000
    card = render_adapter_card(large)
    assert "no evidence about Qwen2-VL" in card and "demonstration" not in card


@pytest.mark.parametrize("metrics", [adapter_document(), miniature_document()], ids=["hub", "local"])
@pytest.mark.parametrize("repo_id", ["user/adapter", None])
def test_quick_start_is_python(metrics, repo_id):
    code = snippet(render_adapter_card(metrics, repo_id))
    strings = {n.value for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert metrics["prompt"] in strings
    assert (repo_id or metrics["model"]["adapter"]) in strings
    assert "num_beams=3, max_new_tokens=64" in code
    assert ("BitsAndBytesConfig" in code) == bool(metrics["model"]["quantization"])
    assert load_snippet(metrics, "user/adapter").splitlines()[-1] in snippet(render_adapter_card(metrics))


def test_eval_results_are_of_the_hub_s_format(tmp_path):
    metrics = adapter_document()
    write(tmp_path, metrics)
    (path,) = (tmp_path / ".eval_results").iterdir()
    entries = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert path.suffix == ".yaml"
    assert {entry.task_id: entry.value for entry in entries} == {f"test_{n}": metrics["scores"][n] for n in NAMES}
    assert {(entry.dataset_id, entry.dataset_revision, entry.date) for entry in entries} == {
        ("user/stair-captions", SHA[::-1], metrics["created"])
    }
    assert all(metrics["signatures"][n] in entry.notes for n, entry in zip(NAMES, entries, strict=True))

    write(tmp_path, miniature_document())  # a local dataset has no id that the format would take
    assert not path.exists()


def test_the_card_survives_what_peft_does_to_a_readme(tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model

    readme = write(tmp_path, adapter_document())
    card = readme.read_text()
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    model.save_pretrained(tmp_path)
    assert readme.read_text() != card
    assert write_adapter_card(tmp_path).read_text() == card


def test_what_makes_no_honest_card_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="metrics.json does not exist.*sft_qwen2vl_jp.py"):
        write_adapter_card(tmp_path)
    (tmp_path / "metrics.json").write_text('{"scores": ')
    with pytest.raises(ValueError, match="metrics.json is not JSON"):
        write_adapter_card(tmp_path)

    only_scores = {key: adapter_document()[key] for key in ("scores", "signatures", "counts")}
    with pytest.raises(ValueError, match="metrics.json: the document lacks model, dataset.*training, base"):
        write(tmp_path, only_scores)

    other = copy.deepcopy(adapter_document())
    other["base"]["dataset"]["split"] = "validation"
    with pytest.raises(ValueError, match="differ in dataset .*'validation'.*'test'"):
        write(tmp_path, other)
    other = copy.deepcopy(adapter_document())
    other["base"]["decoding"]["batch_size"] = 1  # does not change what is decoded
    write(tmp_path, other)
    other["base"]["decoding"]["num_beams"] = 1
    with pytest.raises(ValueError, match="differ in decoding"):
        write(tmp_path, other)


HUB = {
    "sft_blip_vi": {
        "base_model": "Salesforce/blip-image-captioning-base",
        "base_model_relation": "adapter",
        "language": ["vi"],
        "library_name": "peft",
        "license": "bsd-3-clause",
        "datasets": ["user/uit-viic"],
    },
    "sft_vit_gpt2_food": {
        "base_model": ["google/vit-base-patch16-224-in21k", "openai-community/gpt2"],
        "base_model_relation": "finetune",
        "language": ["en"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "datasets": ["user/food-titles"],
    },
    "sft_vit_llama_food": {
        "base_model": ["google/vit-base-patch16-224-in21k", "meta-llama/Llama-3.2-1B"],
        "base_model_relation": "adapter",
        "language": ["en"],
        "library_name": "peft",
        "license": "llama3.2",
        "datasets": ["user/food-titles"],
    },
}


@pytest.mark.parametrize("recipe", HUB)
def test_metadata_of_the_family(recipe):
    data = ModelCard(render_adapter_card(family_document(recipe), "user/Llama-x")).data.to_dict()
    assert {key: data[key] for key in HUB[recipe]} == HUB[recipe]
    (result,) = data["model-index"][0]["results"]
    assert data["pipeline_tag"] == result["task"]["type"] == "image-to-text"
    assert {m["name"]: m["value"] for m in result["metrics"]} == {
        LABELS[n]: family_document(recipe)["scores"][n] for n in NAMES
    }
    assert not {"japanese", "qwen2_vl", "trl", "miniature"} & set(data["tags"])

    data = ModelCard(render_adapter_card(family_document(recipe, miniature=True))).data.to_dict()
    assert not {"base_model", "base_model_relation", "datasets"} & data.keys()
    assert data["license"] == "apache-2.0" and "miniature" in data["tags"]


@pytest.mark.parametrize("recipe", PARTS)
def test_a_card_of_the_family_describes_its_own_model(recipe):
    metrics = family_document(recipe)
    card = render_adapter_card(metrics, "user/Llama-x")
    assert not re.search("Qwen|Japan|SFTTrainer|register|None", card)
    assert "There is no prompt" in card and table_cells(card, "`image_size`") == ['`{"height": 384, "width": 384}`']
    assert all(f"https://huggingface.co/{name}" in card for name in PARTS[recipe].values())
    assert table_cells(card, "revision")[0] == ", ".join([f"`{SHA}`"] * len(PARTS[recipe]))
    assert table_cells(card, "checkpoint") == ["step 1,200, of the best CIDEr-D (0.7312) on split `validation`"]
    assert "flatter" not in card and "demonstration" not in card
    noun = "model" if recipe == "sft_vit_gpt2_food" else "adapter"
    assert f"this {noun} | signature |" in card
    assert score_rows(metrics)[0] == ["", "base, zero-shot" if recipe == "sft_blip_vi" else "before training", noun]
    assert ("vlmcap" in snippet(card)) == (recipe != "sft_vit_gpt2_food")

    miniature = render_adapter_card(family_document(recipe, miniature=True))
    about = {"sft_blip_vi": "BLIP", "sft_vit_gpt2_food": "ViT or GPT-2", "sft_vit_llama_food": "ViT or Llama"}[recipe]
    assert f"demonstration that the machinery learns, and no evidence about {about}.**" in miniature
    assert "Photographs of sport" not in miniature and "One kitchen" not in miniature
    assert ("Photographs of sport" if recipe == "sft_blip_vi" else "One kitchen") in card


@pytest.mark.parametrize("recipe", PARTS)
def test_quick_starts_of_the_family_are_python(recipe):
    for metrics, repo in ((family_document(recipe), "user/Llama-x"), (family_document(recipe, miniature=True), None)):
        code = snippet(render_adapter_card(metrics, repo))
        ast.parse(code)
        assert f'"{repo or metrics["model"]["adapter"]}"' in code
        assert "num_beams=3, max_new_tokens=40, no_repeat_ngram_size=3, do_sample=False" in code


def test_which_split_chose_the_checkpoint():
    metrics = family_document("sft_vit_gpt2_food")
    metrics["training"]["best"] = {"step": 7, "metric": "eval_loss", "score": 0.5}
    assert table_cells(render_adapter_card(metrics), "checkpoint")[0].startswith("step 7, of the best loss (0.5000)")
    metrics["training"]["validation_split"] = "test"
    assert "the scores flatter the model" in render_adapter_card(metrics)
    metrics["training"] |= {"best": None, "validation_split": "validation"}
    assert "chose nothing" in table_cells(render_adapter_card(metrics), "checkpoint")[0]
    metrics["training"]["validation_split"] = None
    assert table_cells(render_adapter_card(metrics), "checkpoint") == ["the last; nothing was held out to choose one"]


def test_published_figures_are_quoted_as_theirs_and_for_their_data_alone():
    metrics = family_document("sft_blip_vi")
    card = render_adapter_card(metrics)
    for figure in "0.524 0.412 0.293 0.312 0.489 0.719 0.161 1.12 0.48 0.42".split():
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", card), figure
    assert "they are quoted, not compared" in prose(card)
    assert "except for a table that is marked as others'" in card
    for run in (metrics, metrics["base"]):
        run["dataset"]["corpus"] = None
    for other in (metrics, family_document("sft_blip_vi", miniature=True)):
        card = render_adapter_card(other)
        assert "0.524" not in card and "no number here comes from anywhere else." in card


@pytest.mark.parametrize("recipe", ["sft_qwen2vl_jp", "sft_blip_vi", "sft_vit_gpt2_food", "sft_vit_llama_food"])
def test_limits_of_what_was_trained_on_own_data_name_no_corpus_of_others(recipe):
    metrics = adapter_document() if recipe == "sft_qwen2vl_jp" else family_document(recipe)
    for dataset in (metrics["dataset"], metrics["base"]["dataset"], metrics["training"]["dataset"]):
        dataset["corpus"] = "own"
    ending = render_adapter_card(metrics).split("## Limits and risks")[1]
    assert "It makes things up" in ending and "It knows what it was trained on" in ending
    assert not [word for word in ("COCO", "sport", "dish", "recipe site", "YJ") if word in ending]


def test_what_the_licence_of_llama_asks_for_is_on_the_card():
    metrics = family_document("sft_vit_llama_food")
    card = render_adapter_card(metrics, "user/Llama-3.2-1B-dishes")
    assert ModelCard(card).data.license == "llama3.2"
    notice = "Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright © Meta Platforms, Inc."
    assert card.count("**Built with Llama.**") == 2 and notice in prose(card)
    assert card.split("\n# ")[1].startswith("Llama")
    # Another Llama has another licence, and the miniature is none.
    for run in (metrics, metrics["base"]):
        run["model"]["parts"]["decoder"]["id"] = "someone/other-llama"
    other = render_adapter_card(metrics, "user/x")
    assert ModelCard(other).data.license == "other"
    for card in (other, render_adapter_card(family_document("sft_vit_llama_food", miniature=True))):
        assert "Built with Llama" not in card and "Meta" not in card


def test_smollm2_is_under_its_own_licence_and_no_derivative_of_llama():
    metrics = family_document("sft_vit_llama_food")
    for run in (metrics, metrics["base"]):
        run["model"]["parts"]["decoder"]["id"] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    card = render_adapter_card(metrics, "user/dishes")
    data = ModelCard(card).data
    assert data.license == "apache-2.0" and "smollm2" in data.tags and not {"llama", "miniature"} & set(data.tags)
    assert data.base_model == ["google/vit-base-patch16-224-in21k", "HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert "under Apache-2.0, as SmolLM2 is" in prose(card) and "ViT is under Apache-2.0 too" in prose(card)
    assert not re.search("Built with Llama|Llama 3.2|asks you to accept|miniature", card)


def test_a_miniature_encoder_is_said_where_the_text_weights_are_real():
    metrics = family_document("sft_vit_llama_food", miniature=True)
    for run in (metrics, metrics["base"]):
        run["model"] |= {"parameters": 135_234_567}
        run["model"]["parts"]["decoder"]["id"] = "outputs/smollm2/SmolLM2-135M-Instruct"
    card = render_adapter_card(metrics)
    data = ModelCard(card).data
    assert data.license == "apache-2.0" and "miniature" in data.tags and data.base_model is None
    assert "It sees through the project's miniature" in card and "no evidence about titles of" in card
    assert "was trained on rendered scenes" in prose(card) and "It knows coloured shapes only" in card
    assert "scripts/fetch_smollm2.py" in card and "The miniature ViT is under Apache-2.0" in prose(card)
    assert not re.search("Built with Llama|allergies|machinery learns|read from a local folder", card)


def test_nf4_is_said_where_the_quick_start_is():
    metrics = family_document("sft_vit_llama_food")
    assert "NF4" not in render_adapter_card(metrics)
    for run in (metrics, metrics["base"]):
        run["model"]["quantization"] = "nf4"
    assert "The decoder is loaded in NF4" in render_adapter_card(metrics)


def test_a_recipe_without_a_card_is_named():
    with pytest.raises(
        ValueError, match="recipe is 'sft_other', which has no card; there are those of sft_qwen2vl_jp"
    ):
        render_adapter_card(adapter_document() | {"recipe": "sft_other"})
