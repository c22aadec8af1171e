"""The metric for Hugging Face's evaluate: from its folder, from a folder that needs no vlmcap, and from a Space."""

import json

import evaluate
import pytest
from huggingface_hub import HfApi

from vlmcap.evaluation.scoring import ScoreOptions, score
from vlmcap.reporting.hub import PushError
from vlmcap.reporting.metric_space import SOURCE, push_metric_space, write_metric_space

PREDICTIONS = ["赤い車が道路を走っています。", "窓辺で猫が寝ている"]
REFERENCES = [["赤い車が走っている", "道を走る赤い車"], ["猫が窓辺で眠っている"]]
# Loads the metric in a process where nothing of the project can be imported, and prints its answer.
ALONE = """
import json, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "vlmcap":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import evaluate
metric = evaluate.load(sys.argv[1])
answer = metric.compute(predictions=json.loads(sys.argv[2]), references=json.loads(sys.argv[3]), resamples=20)
assert "vlmcap" not in sys.modules
print(json.dumps(answer))
"""


def expected(**options) -> dict:
    document = score(
        {"0": PREDICTIONS[0], "1": PREDICTIONS[1]},
        {"0": REFERENCES[0], "1": REFERENCES[1]},
        options.pop("tokenizer", "unidic-lite"),
        ScoreOptions(**{"resamples": 0, "register_normalised": False, "meteor": False} | options),
    )
    del document["per_image"]
    return document.pop("scores") | document


@pytest.fixture
def load_alone(fresh_python, tmp_path):
    def load_alone(name, **env) -> dict:
        words = [str(name), json.dumps(PREDICTIONS), json.dumps(REFERENCES)]
        env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
        return json.loads(fresh_python(ALONE, *words, folder=tmp_path, env=env).splitlines()[-1])

    return load_alone


def test_the_metric_is_loaded_from_the_checkout():
    metric = evaluate.load(str(SOURCE))
    assert metric.compute(predictions=PREDICTIONS, references=REFERENCES) == expected()
    more = {"tokenizer": "characters", "resamples": 10, "register_normalised": True}
    assert metric.compute(predictions=PREDICTIONS, references=REFERENCES, **more) == expected(**more)


def test_the_metric_says_what_is_wrong():
    metric = evaluate.load(str(SOURCE))
    with pytest.raises(ValueError, match=r"empty list of references \(1\)"):
        metric.compute(predictions=PREDICTIONS, references=[REFERENCES[0], []])


def test_one_reference_needs_no_list():
    metric = evaluate.load(str(SOURCE))
    mixed = [REFERENCES[0], REFERENCES[1][0]]
    assert metric.compute(predictions=PREDICTIONS, references=mixed) == expected()
    metric.add(prediction=PREDICTIONS[0], reference=REFERENCES[0])
    metric.add(prediction=PREDICTIONS[1], reference=REFERENCES[1][0])
    assert metric.compute() == expected()


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["\ud83d"], ["猫"], r"predictions\[0\] holds '\\ud83d', half of a surrogate pair, which no UTF-8 text can"),
        (["猫", "犬"], ["猫", ["犬", "犬\udc36"]], r"references\[1\]\[1\] holds '\\udc36', half of a surrogate pair"),
        ([None], ["猫"], r"predictions\[0\] must be a text, but is None"),
        (["猫"], [["猫", 3]], r"references\[0\]\[1\] must be a text, but is 3"),
        (["猫"], "猫", "give two lists with an entry for each image"),
        (["猫"], None, "give two lists with an entry for each image"),
    ],
)
def test_what_is_not_a_text_is_named(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        evaluate.load(str(SOURCE)).compute(predictions=predictions, references=references)


def test_the_folder_needs_no_vlmcap_and_no_network(load_alone, tmp_path):
    folder = write_metric_space(tmp_path / "made")
    offline = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert load_alone(folder, **offline) == expected(resamples=20)
    texts = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    assert "from vlmcap" not in texts and "import vlmcap" not in texts


def test_the_script_pushes_a_private_space_that_evaluate_loads(hub, run_script, load_alone, tmp_path):
    done = run_script(
        *("publish_metric.py", "--output_dir", tmp_path, "--push_to_hub", "--repo_id", "user/my_caption_scores")
    )
    assert "pushed to" in done.stdout and "spaces/user/my_caption_scores" in done.stdout
    info = HfApi().repo_info("user/my_caption_scores", repo_type="space")
    assert info.private
    files = {file.rfilename for file in info.siblings}
    assert {"README.md", "app.py", "requirements.txt", "my_caption_scores.py", "scoring.py"} <= files
    readme = HfApi().hf_hub_download("user/my_caption_scores", "README.md", repo_type="space")
    with open(readme, encoding="utf-8") as file:
        text = file.read()
    assert text.startswith("---\n") and "sdk: gradio" in text and 'evaluate.load("user/my_caption_scores")' in text
    app = HfApi().hf_hub_download("user/my_caption_scores", "app.py", repo_type="space")
    with open(app, encoding="utf-8") as file:
        assert 'evaluate.load("./my_caption_scores.py")' in file.read()
    assert load_alone("user/my_caption_scores") == expected(resamples=20)


def test_a_space_of_the_other_visibility_is_refused(hub, tmp_path):
    folder = write_metric_space(tmp_path, "user/metric")
    push_metric_space(folder, "user/metric", private=False)
    with pytest.raises(PushError, match="exists and is public, but private was asked for"):
        push_metric_space(folder, "user/metric")


def test_pushing_needs_a_name(run_script, tmp_path):
    done = run_script("publish_metric.py", "--output_dir", tmp_path, "--push_to_hub", expect=1)
    assert done.stderr.startswith("error: --push_to_hub needs --repo_id you/name")
