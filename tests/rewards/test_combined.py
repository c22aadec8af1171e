"""The rewards of a run: weights, functions of the user, and what is said of one that fails."""

import datasets
import numpy as np
import pytest

from vlmcap.captioning.arguments import PromptArguments
from vlmcap.evaluation.metrics import document_frequencies
from vlmcap.evaluation.scoring import read_idf
from vlmcap.evaluation.tokenise import tokenise
from vlmcap.rewards.arguments import DEFAULT_WEIGHTS, REWARDS, RewardArguments, RewardError, weights_of
from vlmcap.rewards.combined import Rewards, rewards_of_run
from vlmcap.rewards.functions import cider_d

TRAINED = {1: ["赤い丸が描かれている", "赤い円がある"], 2: ["青い星がある", "緑の三角"], 3: ["黒い四角が描かれている"]}
CAPTIONS = ["赤い丸がある", "赤い円", "青い星"]
REFERENCES = [TRAINED[1], TRAINED[1], TRAINED[2]]
ROWS = [{"image_id": 1}, {"image_id": 1}, {"image_id": 2}]


@pytest.fixture(scope="module")
def train_rows():
    return datasets.Dataset.from_dict({"image_id": list(TRAINED), "captions": list(TRAINED.values())})


@pytest.fixture
def own(tmp_path, train_rows):
    """own("return ..."): rewards of a function of the user with this body, and CIDEr-D."""

    def own(body: str) -> Rewards:
        file = tmp_path / "mine.py"
        file.write_text(f"def my_reward(captions, references, rows):\n    {body}\n", encoding="utf-8")
        return Rewards(["cider_d", f"{file}:my_reward"], [1, 2], train_rows)

    return own


def test_every_reward_by_its_name(train_rows):
    rewards = Rewards(REWARDS, [1.0] * len(REWARDS), train_rows, lexicon="scenes_ja")
    rewarded = rewards(CAPTIONS, REFERENCES, ROWS)
    assert rewarded.per_function.shape == (3, len(REWARDS))
    assert rewarded.total == pytest.approx(rewarded.per_function.sum(1))
    assert np.isfinite(rewarded.total).all()


def test_frequencies_and_band_are_of_the_training_split(tmp_path, train_rows):
    rewards = Rewards(["cider_d"], None, train_rows, idf_path=tmp_path / "idf.json")
    tokens = [tokenise(captions) for captions in TRAINED.values()]
    assert rewards.idf == document_frequencies(tokens) == read_idf(tmp_path / "idf.json", "unidic-lite")
    lengths = [len(words) for captions in tokens for words in captions]
    assert rewards.band == (min(lengths), max(lengths))
    expected = cider_d(CAPTIONS, REFERENCES, ROWS, idf=rewards.idf)
    assert rewards(CAPTIONS, REFERENCES, ROWS).total == pytest.approx(expected)


def test_weights(own):
    rewarded = own("return [len(caption) for caption in captions]")(CAPTIONS, REFERENCES, ROWS)
    assert rewarded.per_function[:, 1].tolist() == [6, 3, 3]
    assert rewarded.total == pytest.approx(rewarded.per_function[:, 0] + 2 * rewarded.per_function[:, 1])


def test_a_function_gets_captions_references_and_rows(own):
    body = "return [float(len(r) + row['image_id']) for c, r, row in zip(captions, references, rows)]"
    assert own(body)(CAPTIONS, REFERENCES, ROWS).per_function[:, 1].tolist() == [3, 3, 4]


def test_a_function_of_a_module(tmp_path, monkeypatch, train_rows):
    (tmp_path / "rewards_of_mine.py").write_text("def short(captions, *_):\n    return [-len(c) for c in captions]\n")
    monkeypatch.syspath_prepend(tmp_path)
    rewards = Rewards(["rewards_of_mine:short"], None, train_rows)
    assert rewards(CAPTIONS, REFERENCES, ROWS).total.tolist() == [-6, -3, -3]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [0.0, float('nan'), 0.0]", "my_reward returned nan for image 1, '赤い円'"),
        ("return [0.0, 0.0, float('inf')]", "my_reward returned inf for image 2, '青"),
        ("return [0.0, 0.0]", r"my_reward returned 2 values, \[0.0, 0.0\], for 3 captions: image 1"),
        ("return ['good', 0.0, 0.0]", "my_reward returned 'good' for image 1, '赤い丸がある'"),
        ("return None", "my_reward returned None for image 1"),
        (
            "return [1 / (row['image_id'] - 2) for row in rows]",
            "my_reward raised ZeroDivisionError.* image 2, '青い星'",
        ),
        ("return [0.0] if len(captions) == 1 else 1 / 0", "my_reward raised ZeroDivisionError.* image 1, .*; image 2"),
    ],
)
def test_a_function_that_fails_is_named_with_image_and_value(own, body, said):
    with pytest.raises(RewardError, match=said):
        own(body)(CAPTIONS, REFERENCES, ROWS)


def test_an_image_without_references(own):
    with pytest.raises(RewardError, match="image 2 has no references"):
        own("return [0.0] * 3")(CAPTIONS, [["丸"], ["丸"], []], ROWS)


@pytest.mark.parametrize(
    ("names", "weights", "said"),
    [
        (["cider"], None, "there is no reward 'cider'. Choose from cider_d"),
        ([], None, "reward_funcs is empty"),
        (["chrf", "chrf"], None, "chrf occurs twice"),
        (["chrf", "copy"], [1.0], "1 numbers for the 2 rewards chrf, copy"),
        (["chrf"], [float("nan")], "the weight of chrf is nan"),
        (["chrf"], [0.0], "all are 0"),
    ],
)
def test_settings_that_do_not_fit(names, weights, said):
    with pytest.raises(RewardError, match=said):
        weights_of(names, weights)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:f", "ModuleNotFoundError"),
        ("no/such/file.py:f", "FileNotFoundError"),
        ("json:no_function", "json has no function 'no_function'"),
    ],
)
def test_a_function_that_is_not_there(train_rows, name, said):
    with pytest.raises(RewardError, match=said):
        Rewards([name], None, train_rows)


def test_default_weights():
    names = RewardArguments().reward_funcs
    assert weights_of(names, None) == [DEFAULT_WEIGHTS[name] for name in names]
    assert weights_of(["copy", "m:f"], None) == [1, 1]


def test_each_key_has_its_own_words_and_frequencies(tmp_path):
    """A caption is rewarded as by the rewards of its language alone; a Japanese rule says nothing of English."""
    said = {"ja": ["赤い丸がある", "赤い円だ"], "en": ["a red circle", "the circle is red"]}
    others = {"ja": ["青い星がある"], "en": ["two dogs run"]}
    rows = datasets.Dataset.from_dict(
        {
            "image_id": [1, 2],
            "captions": [[*said["ja"], *said["en"]], [*others["ja"], *others["en"]]],
            "languages": [["ja", "ja", "en", "en"], ["ja", "en"]],
        }
    )
    prompts = PromptArguments(prompts={"ja": "説明", "en": "Describe."})
    names = ["cider_d", "japanese", "length"]
    rewards = rewards_of_run(names, [1.0, 2.0, 0.5], rows, prompts, tokenizer="unidic-lite", idf_dir=tmp_path)
    captions = ["赤い丸がある", "a red circle", "a blue circle", "赤い"]
    keys = ["ja", "en", "en", "ja"]
    found = rewards(captions, [said[key] for key in keys], [{"image_id": 1, "key": key} for key in keys])
    assert found.per_function[1, 0] > found.per_function[2, 0] > 0 and found.per_function[0, 0] > 0
    assert found.per_function[:, 1].tolist() == [0, 0, 0, 0]
    assert found.total == pytest.approx(found.per_function @ [1.0, 2.0, 0.5])
    alone = datasets.Dataset.from_dict({"image_id": [1, 2], "captions": [said["en"], others["en"]]})
    english = Rewards(names, [1.0, 2.0, 0.5], alone, tokenizer="english", language="en")
    expected = english(captions[1:3], [said["en"]] * 2, [{"image_id": 1}] * 2)
    assert found.per_function[1:3].tolist() == expected.per_function.tolist()
    assert read_idf(tmp_path / "idf-en.json", "english") == english.idf
    one = rewards_of_run(names, None, alone, PromptArguments(), tokenizer="english", idf_dir=tmp_path)
    assert isinstance(one, Rewards) and (tmp_path / "idf.json").is_file()
