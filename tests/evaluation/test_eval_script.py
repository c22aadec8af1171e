import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi

from vlmcap.data.errors import DataError
from vlmcap.data.images import dataset_references
from vlmcap.evaluation.caption_files import read_predictions, read_references
from vlmcap.evaluation.scoring import ScoreOptions, score, write_metrics

PREDICTIONS = {1: "赤い車が道路を走っている", 2: "白い猫が窓辺で眠っている"}
# METEOR takes seconds to start: test_external.py has it.
LEAN = ["--no_meteor", "--resamples", "20"]
OPTIONS = ScoreOptions(meteor=False, resamples=20)
REFERENCES = {1: ["赤い車が道を走っている", "道路を走る赤い車"], 2: ["窓辺で白い猫が寝ている", "眠る白猫"]}


def expected(tokenizer: str = "unidic-lite") -> dict:
    return score(
        {str(i): caption for i, caption in PREDICTIONS.items()},
        {str(i): captions for i, captions in REFERENCES.items()},
        tokenizer,
        OPTIONS,
    )


@pytest.fixture
def predictions(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps({"image_id": i, "caption": c}) + "\n" for i, c in PREDICTIONS.items()))
    return path


@pytest.fixture
def references(tmp_path):
    path = tmp_path / "references.jsonl"
    path.write_text("".join(json.dumps({"image_id": i, "captions": c}) + "\n" for i, c in REFERENCES.items()))
    return path


@pytest.fixture
def dataset(tmp_path):
    """A published split with embedded photographs, none of which is a readable image."""
    folder = tmp_path / "dataset"
    (folder / "data").mkdir(parents=True)
    table = pa.table(
        {
            "image": [{"bytes": b"not an image", "path": None}] * 2,
            "image_id": list(REFERENCES),
            "captions": list(REFERENCES.values()),
        }
    )
    pq.write_table(table, folder / "data" / "test-00000-of-00001.parquet")
    (folder / "README.md").write_text(
        "---\n"
        "configs:\n- config_name: default\n  data_files:\n  - split: test\n    path: data/test-*\n"
        "dataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: image_id\n    dtype: int64\n"
        "  - name: captions\n    list: string\n"
        "---\n"
    )
    return folder


def test_scores_two_files_and_prints_them_with_their_signatures(run_script, tmp_path, predictions, references):
    output = tmp_path / "new" / "metrics.json"
    done = run_script(
        "eval_captioning.py", "--predictions", predictions, "--references", references, "--output", output, *LEAN
    )
    metrics = json.loads(output.read_text(encoding="utf-8"))
    assert metrics == expected()
    for name, value in metrics["scores"].items():
        low, high = metrics["intervals"][name]
        assert f"{value:.4f}  [{low:.4f}, {high:.4f}]   {metrics['signatures'][name]}" in done.stdout
    assert str(output) in done.stdout


def test_the_run_record_beside_the_predictions_goes_in(run_script, tmp_path, predictions, references):
    record = {"model": {"id": "user/モデル"}, "decoding": {"num_beams": 3}, "seconds": 1.5}
    (tmp_path / "predictions.run.json").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
    config, output = tmp_path / "eval.yaml", tmp_path / "metrics.json"
    config.write_text(
        f"predictions: {predictions}\nreferences: {references}\ntokenizer: characters\noutput: {output}\n"
        "meteor: false\nresamples: 20\n"
    )
    run_script("eval_captioning.py", "--config", config)
    assert json.loads(output.read_text(encoding="utf-8")) == expected("characters") | record


def test_scores_against_a_local_dataset_whose_images_cannot_be_read(run_script, tmp_path, predictions, dataset):
    output, shard = tmp_path / "metrics.json", dataset / "data" / "test-00000-of-00001.parquet"
    rows = [  # one a caption
        {"image": {"bytes": b"not an image", "path": None}, "image_id": i, "captions": [caption]}
        for i, captions in REFERENCES.items()
        for caption in captions
    ]
    pq.write_table(pa.Table.from_pylist(rows), shard)
    run_script("eval_captioning.py", "--predictions", predictions, "--dataset", dataset, "--output", output, *LEAN)
    assert json.loads(output.read_text(encoding="utf-8")) == expected()


def test_references_of_a_dataset_on_the_hub(hub, dataset):
    HfApi().create_repo("user/captions", repo_type="dataset")
    HfApi().upload_folder(repo_id="user/captions", repo_type="dataset", folder_path=dataset)
    assert dataset_references("user/captions", "test") == {str(i): captions for i, captions in REFERENCES.items()}
    with pytest.raises(
        DataError, match="user/captions has no split 'tset'; it has test. Name one of them with --split"
    ):
        dataset_references("user/captions", "tset")
    with pytest.raises(DataError, match=r"user/none \(test\) cannot be loaded: DatasetNotFoundError"):
        dataset_references("user/none", "test")


def test_coco_results_and_annotations_score_like_lines(run_script, tmp_path):
    results, annotations = tmp_path / "results.json", tmp_path / "captions_val2014.json"
    results.write_text(json.dumps([{"image_id": i, "caption": c} for i, c in PREDICTIONS.items()], indent=1))
    flat = [{"image_id": i, "id": 9, "caption": c} for i, captions in REFERENCES.items() for c in captions]
    document = {"info": {}, "images": [{"id": i, "file_name": "x.jpg"} for i in REFERENCES], "annotations": flat}
    annotations.write_text("\ufeff" + json.dumps(document), encoding="utf-8")
    files = ["--predictions", results, "--references", annotations, "--output", tmp_path / "metrics.json"]
    run_script("eval_captioning.py", *files, *LEAN)
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")) == expected()

    document["images"].append({"id": 3})
    annotations.write_text(json.dumps(document))
    unmatched = run_script("eval_captioning.py", *files, *LEAN, expect=1)
    assert "1 images have references but no prediction (3)" in unmatched.stderr


def test_more_keys_are_beside_the_scores(tmp_path, predictions):
    references = {str(i): captions for i, captions in REFERENCES.items()}
    metrics = write_metrics(
        predictions, references, tmp_path / "metrics.json", "characters", {"base": expected()}, OPTIONS
    )
    assert metrics == expected("characters") | {"base": expected()}
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")) == metrics


def test_an_idf_is_written_and_used(run_script, tmp_path, predictions, references):
    idf, output = tmp_path / "idf.json", tmp_path / "metrics.json"
    done = run_script("eval_captioning.py", "--references", references, "--write_idf", idf)
    assert f"of 2 images written to {idf}" in done.stdout
    files = ["--predictions", predictions, "--references", references, "--output", output, *LEAN]
    run_script("eval_captioning.py", *files, "--idf", idf)
    metrics = json.loads(output.read_text(encoding="utf-8"))
    assert metrics["scores"] == expected()["scores"] and "|df:refs|" not in metrics["signatures"]["cider_d"]
    other = run_script("eval_captioning.py", *files, "--idf", idf, "--tokenizer", "characters", expect=1)
    assert f"{idf} was made with another tokenizer" in other.stderr


def test_what_is_left_out_is_printed(run_script, tmp_path, predictions, references):
    done = run_script(
        *("eval_captioning.py", "--predictions", predictions, "--references", references),
        *("--output", tmp_path / "metrics.json", "--resamples", "0", "--no_register_normalised"),
        env={"VLMCAP_METEOR_JAR": str(tmp_path / "none.jar")},
    )
    assert (
        "notice: METEOR is left out: " in done.stdout and "CIDEr-D" in done.stdout and "reg:plain" not in done.stdout
    )


def test_mistakes_stop_the_script_with_what_to_do(run_script, tmp_path, predictions, references):
    neither = run_script("eval_captioning.py", "--predictions", predictions, expect=1)
    assert neither.stderr.startswith("error: give the references either as --references FILE or as --dataset")
    missing = run_script(
        "eval_captioning.py", "--predictions", tmp_path / "none", "--references", references, expect=1
    )
    assert f"--predictions {tmp_path / 'none'}: No such file or directory" in missing.stderr
    output = tmp_path / "metrics.json"
    files = ["--predictions", predictions, "--references", references, "--output", output, *LEAN]
    unknown = run_script("eval_captioning.py", *files, "--tokenizer", "mecab", expect=1)
    assert (
        "unknown tokenizer 'mecab': choose one of unidic-lite, ipadic, characters, vietnamese, english, none"
        in unknown.stderr
    )
    (tmp_path / "predictions.run.json").write_text('{"model": ')
    broken = run_script("eval_captioning.py", *files, expect=1)
    assert "predictions.run.json: not JSON" in broken.stderr
    assert not output.exists()


def test_a_human_caption_is_held_out_and_scored_against_the_others(run_script, tmp_path):
    captions = {"1": ["犬が走る", "犬が駆ける", "走る犬"], "2": ["猫が眠る"], "3": ["鳥が飛ぶ", "飛ぶ鳥"]}
    lines = [json.dumps({"image_id": i, "captions": texts}) for i, texts in captions.items()]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    command = ["hold_out_captions.py", "--references", tmp_path / "captions.jsonl", "--output_dir", tmp_path / "out"]
    assert "2 of 3 images, 3 references left" in run_script(*command).stdout
    assert read_predictions(tmp_path / "out/predictions.jsonl") == {"1": "犬が走る", "3": "鳥が飛ぶ"}
    references = read_references(tmp_path / "out/references.jsonl")
    assert references == {"1": ["犬が駆ける", "走る犬"], "3": ["飛ぶ鳥"]}
    assert "--min_captions 1" in run_script(*command, "--min_captions", 1, expect=1).stderr
