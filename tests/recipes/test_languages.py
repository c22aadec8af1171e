"""One adapter for several languages and styles: trained, scored by key, and asked in each of them."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from tests.recipes.files import captions, read
from tests.steps.languages import write_dataset
from vlmcap.evaluation.audit_document import read_audit

SETTINGS = (
    "--config recipes/configs/sft_qwen2vl_jp/demo.yaml --max_steps 4 --save_steps 2 --eval_steps 2 --max_new_tokens 12"
    " --load_best_model_at_end false --max_validation_images 2"
).split()
PROMPTS = {"ja/plain": "普通体で。", "en": ["Describe this image.", "What is it?"], "vi": "Mô tả ảnh này."}
ALSO = {"ja/polite": "丁寧に。"}
NAMES = ["languages/en", "languages/vi", "languages/ja-polite"]


@pytest.fixture
def recipe(run_script, tmp_path):
    """recipe(...): the demo's settings on scenes with captions of four kinds."""
    write_dataset(tmp_path)
    words = [*SETTINGS, "--dataset", tmp_path / "data", "--image_dir", tmp_path]
    words += ["--instances", tmp_path / "instances.json"]
    words += ["--prompts", json.dumps(PROMPTS), "--also_score", json.dumps(ALSO), "--output_dir", tmp_path / "run"]
    return lambda *more, expect=0: run_script("recipes/sft_qwen2vl_jp.py", *words, *more, expect=expect)


def test_a_run_in_three_languages(hub, run_script, recipe, without_meteor, miniature_dir, tmp_path):
    done = recipe()
    run = tmp_path / "run"
    metrics = read(run / "adapter/metrics.json")
    languages = metrics["languages"]
    assert list(languages) == ["ja/plain", "en", "vi", "ja/polite"] and metrics["key"] == "ja/plain"
    assert languages["ja/plain"] == {"trained": True, "prompt": PROMPTS["ja/plain"]}
    assert [languages[key]["trained"] for key in ("en", "vi", "ja/polite")] == [True, True, False]
    assert languages["en"]["signatures"]["cider_d"].startswith("cider_d|tok:english-13a")
    assert languages["vi"]["counts"]["images"] == languages["vi"]["base"]["counts"]["images"] == 2
    assert metrics["training"]["captions"] == 6 * 8 + 2 * 2, "polite captions are not trained on"

    # Every key has its files, and each agrees with what the main document says of it.
    assert all(f"\n{key}\n" in done.stdout for key in list(languages)[:1] + list(languages)[1:])
    for name, key in zip(NAMES, list(languages)[1:], strict=True):
        for part in ("base", "adapter"):
            own = read(run / part / name / "metrics.json")
            said = captions(run / part / name / "predictions.jsonl")
            assert own["key"] == key and list(map(str, said)) == own["per_image"]["image_id"]
            assert own["prompt"] == (PROMPTS | ALSO)[key] or own["prompt"] in PROMPTS[key]
            audit = read_audit(run / part / name / "audit.json")
            assert ("persons" in audit) == key.startswith("ja") == ("non_japanese" in audit["form"])
        del own["per_image"]
        assert languages[key] == {"trained": key != "ja/polite"} | own
    # The audit of the main key brings those of the others, which the card shows.
    of_english = read(run / "adapter/languages/en/audit.json")
    brought = read_audit(run / "adapter/audit.json")["languages"]
    assert list(brought) == list(languages)[1:] and brought["en"]["form"] == of_english["form"]
    assert brought["en"]["base"]["form"] == read(run / "base/languages/en/audit.json")["form"]
    assert (run / "adapter/README.md").read_text(encoding="utf-8").count("share of |") == 4
    page = (run / "samples.html").read_text(encoding="utf-8")
    assert page.count('<p class="key">ja/polite</p>') == page.count("<figure>") == 6
    assert page.count('<p class="key">vi</p>') == 2, "a picture without such captions says nothing of them"
    # The scripts find the same, by key.
    english = ["--predictions", run / "adapter/languages/en/predictions.jsonl", "--dataset", tmp_path / "data"]
    run_script("eval_captioning.py", *english, "--keys", "en", "--output", tmp_path / "metrics.json")
    assert read(tmp_path / "metrics.json")["scores"] == languages["en"]["scores"]
    run_script("audit_captions.py", *english, "--keys", "en", "--output", tmp_path / "audit.json")
    assert read(tmp_path / "audit.json")["counts"] == read(run / "adapter/languages/en/audit.json")["counts"]
    runs = [f"{part}={run / part}" for part in ("base", "adapter")]
    done = run_script("compare_runs.py", *runs, "--dataset", tmp_path / "data", "--output_dir", tmp_path / "compared")
    table = (tmp_path / "compared/metrics.md").read_text(encoding="utf-8")
    assert set(re.findall("^## `(.*)`", table, re.M)) == set(languages) and "ja-polite/metrics.csv" in done.stdout
    validated = [entry for entry in metrics["training"]["log"] if "eval_cider_d" in entry]
    keys = ["ja-plain", "en", "vi"]
    assert "eval_cider_d_ja-polite" not in validated[0]
    for entry in validated:
        assert entry["eval_cider_d"] == pytest.approx(sum(entry[f"eval_cider_d_{key}"] for key in keys) / 3)

    # Continued, it captions nothing again; a key more is captioned alone.
    before = (run / "base/languages/en/predictions.jsonl").stat().st_mtime_ns
    shutil.rmtree(run / "base/languages/vi")
    recipe("--resume_from_checkpoint", "latest", "--push_to_hub", "--hub_model_id", "user/languages")
    assert (run / "base/languages/en/predictions.jsonl").stat().st_mtime_ns == before
    assert len(captions(run / "base/languages/vi/predictions.jsonl")) == 2

    # Anybody asks it in each language: as it was scored.
    picture = tmp_path / "test0.png"
    for options, name in (
        ([], "."),
        (["--language", "ja"], "."),
        (["--language", "en"], "languages/en"),
        (["--language", "vi"], "languages/vi"),
    ):
        said = run_script("caption.py", picture, "--adapter", run / "adapter", *options).stdout
        assert said == f"{picture}\t{captions(run / 'adapter' / name / 'predictions.jsonl')[300]}\n"
    refused = run_script("caption.py", picture, "--adapter", run / "adapter", "--style", "polite", expect=1).stderr
    assert "--style polite:" in refused and "it has ja/plain, en, vi" in refused

    # So does the code on the card, with the adapter from the Hub, in every language.
    card = ModelCard.load("user/languages")
    assert card.data.language == ["ja", "en", "vi"]
    code = "import vlmcap.models.nf4\n" + re.search(r"## Quick start.*?```python\n(.*?)```", card.text, re.S).group(1)
    code = code.replace('"recipes/miniatures/qwen2_vl"', repr(str(miniature_dir)))
    assert '"user/languages"' in code
    shutil.copy(picture, tmp_path / "photo.jpg")
    for key, name in (("ja/plain", "."), ("en", "languages/en"), ("vi", "languages/vi")):
        asked = code.replace('prompts["ja/plain"]', f'prompts["{key}"]')
        pasted = subprocess.run([sys.executable, "-c", asked], cwd=tmp_path, capture_output=True, text=True)
        expected = captions(run / "adapter" / name / "predictions.jsonl")[300]
        assert pasted.stdout.strip() == expected, pasted.stderr
