"""scripts/infer_baseline.py on the miniature: rows of the table, several prompts, what it refuses."""

import importlib.util
import json

import datasets
import pytest

from vlmcap.arguments import parse
from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.captioning.baselines import BaselineError
from vlmcap.captioning.predictions import PredictionsError
from vlmcap.errors import UserError
from vlmcap.miniature.scenes import scenes

PROMPTS = "short: Describe this image briefly.\nlong: |-\n  Describe this image.\n  Name the colours.\n"


@pytest.fixture(scope="module")
def script(repo_root):
    spec = importlib.util.spec_from_file_location("infer_baseline", repo_root / "scripts/infer_baseline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        module.main(*parse("", module.Arguments, GenerationArguments, command_line=[str(a) for a in arguments]))

    return run


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Arguments for five scenes."""
    folder = tmp_path_factory.mktemp("scenes")
    rows = []
    for number, scene in enumerate(scenes(5, seed=9, held_out=True)):
        scene.draw().save(folder / f"{number}.png")
        rows.append({"image_id": number, "file_name": f"{number}.png", "captions": scene.japanese()})
    datasets.Dataset.from_list(rows).to_parquet(folder / "data/test-00000-of-00001.parquet")
    (folder / "data/README.md").write_text("---\nlicense: cc0-1.0\ntags: [scenes-captions]\n---\n")
    return ["--dataset", folder / "data", "--image_dir", folder, "--max_new_tokens", 8]


def record(path):
    return json.loads(path.with_suffix(".run.json").read_text(encoding="utf-8"))


def test_the_table_is_listed(script, capsys):
    script("--list")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["key", "id", "B"]
    assert any(line.startswith("asagi_2b ") and "isolated (experimental, code)" in line for line in lines)


def test_a_model_that_is_not_in_the_table(script, dataset, miniature_dir, tmp_path):
    output = tmp_path / "predictions.jsonl"
    script("--model", miniature_dir, "--output", output, "--saw_coco", "no", "--max_images", 2, *dataset)
    run = record(output)
    assert run["prompt_kind"] == "given" and run["prompt"] == GenerationArguments.prompt
    assert run["saw"] == {"STAIR": "unknown", "YJ": "unknown", "COCO": "no", "note": "As stated on the command line."}
    assert run["model"]["id"] == "qwen2_vl" and "baseline" not in run["model"]
    assert len(output.read_text(encoding="utf-8").splitlines()) == 2


def test_a_row_of_the_table(script, dataset, miniature_dir, tmp_path):
    """Qwen2-VL's row on the miniature's weights: prompts, licence and what was seen come from the table."""
    output = tmp_path / "predictions.jsonl"
    row = ["--baseline", "qwen2_vl_2b", "--model", miniature_dir]
    script(*row, "--prompt_kind", "native", "--output", output, *dataset)
    run = record(output)
    assert (run["prompt_kind"], run["prompt"]) == ("native", "Describe this image.")
    assert (run["model"]["baseline"], run["model"]["license"]) == ("qwen2_vl_2b", "apache-2.0")
    assert run["saw"].keys() == {"STAIR", "YJ", "COCO", "note"}
    with pytest.raises(PredictionsError, match="started with another prompt"):
        script(*row, "--prompt_kind", "common", "--output", output, *dataset)


def test_in_4bit_on_every_processor(run_script, repo_root, dataset, miniature_dir, tmp_path):
    """Where bitsandbytes would repack weights and load compiled code from the Hub: same captions, no such code."""
    forced = repo_root / "tests/avx512_bf16"
    captions = []
    for name, path in (("plain", ""), ("forced", f"{forced}:{forced / 'kernels_installed'}")):
        output = tmp_path / name / "predictions.jsonl"
        arguments = ("--model", miniature_dir, "--load_in_4bit", "--output", output, *dataset)
        done = run_script("infer_baseline.py", *arguments, env={"PYTHONPATH": path}, fresh=True)
        assert "kernels-community" not in done.stderr
        captions.append(output.read_text(encoding="utf-8"))
    assert captions[0] == captions[1]


def test_a_model_that_takes_no_prompt(script, dataset, repo_root, tmp_path):
    """BLIP's row on the miniature's weights, which describe drawn scenes in English as they come."""
    output, weights = tmp_path / "predictions.jsonl", repo_root / "recipes/miniatures/blip"
    row = ["--baseline", "blip_base", "--model", weights]
    script(*row, "--output", output, *dataset[:-1], 24)
    run = record(output)
    assert run["prompt"] is run["prompt_kind"] is None
    assert run["model"]["license"] == "bsd-3-clause" and run["saw"]["COCO"] == "train"
    said = [json.loads(line)["caption"] for line in output.read_text(encoding="utf-8").splitlines()]
    held_out = list(scenes(5, seed=9, held_out=True))
    assert sum(text in scene.english() for text, scene in zip(said, held_out, strict=True)) >= 3
    with pytest.raises(BaselineError, match="blip_base takes no prompt, it only captions: leave out --prompt$"):
        script(*row, "--prompt", "短く", "--output", tmp_path / "other.jsonl", *dataset)
    for option, message in (("--prompt", "leave out --prompt$"), ("--avoid_words", "--avoid_words cannot be used")):
        with pytest.raises(BaselineError, match=message):  # a model that is not in the table
            script("--model", weights, option, "x", "--output", tmp_path / "other.jsonl", *dataset)


def test_several_prompts_of_one_model(script, dataset, miniature_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no Java, which METEOR would start for seconds
    prompts, output_dir = tmp_path / "prompts.yaml", tmp_path / "study"
    prompts.write_text(PROMPTS)
    arguments = ["--model", miniature_dir, "--prompts", prompts, "--output_dir", output_dir, *dataset]
    script(*arguments)
    said = {name: (output_dir / name / "predictions.jsonl").read_text(encoding="utf-8") for name in ("short", "long")}
    assert said["short"] != said["long"]
    documents = {name: json.loads((output_dir / name / "metrics.json").read_text(encoding="utf-8")) for name in said}
    assert documents["long"]["prompt"] == "Describe this image.\nName the colours."
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "prompt" and "CIDEr-D" in lines[0]
    assert [line.split()[0] for line in lines[1:3]] == ["short", "long"]
    assert f"{documents['short']['scores']['bleu_1']:.4f}" in lines[1].split()
    assert f"compare_runs.py {output_dir}/short/metrics.json {output_dir}/long/metrics.json" in lines[-1]
    script(*arguments)  # complete: nothing is captioned again
    assert (output_dir / "short/predictions.jsonl").read_text(encoding="utf-8") == said["short"]


def test_constraints_are_recorded_when_they_are_on(script, dataset, miniature_dir, tmp_path):
    words, output = tmp_path / "words.txt", tmp_path / "predictions.jsonl"
    words.write_text("太郎\n\n花子\n", encoding="utf-8")
    arguments = ["--model", miniature_dir, "--max_images", 1, *dataset]
    script(*arguments, "--output", output, "--avoid_words", words, "--no_repeat_ngram_size", 3)
    decoding = record(output)["decoding"]
    assert decoding["avoid_words"] == ["太郎", "花子"] and decoding["no_repeat_ngram_size"] == 3
    assert "japanese_only" not in decoding
    for text, message in ((b"\xff\xfe", "cannot be read as UTF-8"), (b"\n \n", "holds no word")):
        words.write_bytes(text)
        with pytest.raises(PredictionsError, match=f"words.txt {message}"):
            script(*arguments, "--output", tmp_path / "other.jsonl", "--avoid_words", words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model or --baseline, --dataset and --output are needed"),
        (["--model", "m", "--dataset", "d", "--prompts", "p.yaml"], "--dataset and --output_dir are needed"),
        (["--baseline", "qwen", "--dataset", "d", "--output", "o"], "there is no such row; there are qwen2_vl_2b,"),
        (["--baseline", "asagi_2b", "--dataset", "d", "--output", "o"], "asagi_2b runs code of MIL-UT/Asagi-2B"),
        (
            ["--baseline", "asagi_2b", "--trust_remote_code", "--dataset", "d", "--output", "o"],
            "at a commit only, but the revision is None",
        ),
    ],
)
def test_what_is_refused(script, arguments, message):
    with pytest.raises(UserError, match=message):
        script(*arguments)
