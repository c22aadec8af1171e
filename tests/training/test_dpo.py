"""Training on preferences: what it learns, the reference that is kept, settings that are refused."""

import json

import pytest
import torch

from tests.invariants import tiny
from vlmcap.training.arguments import CaptionDPOFields
from vlmcap.training.dpo import pair_examples, preference_loss
from vlmcap.training.inherited import TRAINING_ARGUMENTS, parsed_as


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    tiny.write_pictures(folder)
    tiny.write_preferences(folder)
    return folder


def reference(folder):
    (path,) = folder.glob("reference-*.json")
    return path, json.loads(path.read_bytes())


def test_it_learns_and_says_how_much(pictures, tmp_path):
    """The chosen captions become more probable than the rejected ones, and the summary has before and after."""
    settings = {"max_steps": 30, "learning_rate": 3e-3, "eval_strategy": "steps", "eval_steps": 15}
    trainer = tiny.build_preference_trainer(pictures, tmp_path, lr_scheduler_type="constant", **settings)
    trainer.train()
    figures = trainer.summary()["preferences"]
    assert figures["pairs"] == figures["unseen_pairs"] == tiny.PAIRS and figures["pairs_seen"] == 30 * tiny.PAIRS
    before, after = figures["before"], figures["after"]
    assert after["preference_rate"] > before["preference_rate"]
    assert after["reward_accuracy"] == 1.0 and after["reward_margin"] > 1
    log = trainer.state.log_history
    seen = [entry["eval_preference_rate"] for entry in log if "eval_preference_rate" in entry]
    assert len(seen) == 2 and seen[-1] == pytest.approx(after["preference_rate"], abs=1e-6)
    first = next(entry for entry in log if "loss" in entry)
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)  # log 2: no margin yet
    assert "reward_accuracy" in first and "mean_token_accuracy" not in first


def test_the_reference_is_kept_and_found_again(pictures, tmp_path):
    """Values that were changed in the file are taken as they are: nothing is computed again. Other facts are another
    file."""
    tiny.build_preference_trainer(pictures, tmp_path).find_reference()
    path, kept = reference(tmp_path)
    kept["train"][0][0] += 1.0
    path.write_text(json.dumps(kept))
    again = tiny.build_preference_trainer(pictures, tmp_path, beta=0.1)
    again.find_reference()
    assert again.train_dataset["reference"][0][0] == pytest.approx(kept["train"][0][0])
    tiny.build_preference_trainer(pictures, tmp_path, pairs_per_image=1).find_reference()
    assert len(list(tmp_path.glob("reference-*.json"))) == 2


def test_each_caption_has_the_log_probability_of_its_sequence(pictures, tmp_path):
    """Whatever else is in the batch: one image and two pairs at a time, against all at once."""
    trainer = tiny.build_preference_trainer(pictures, tmp_path / "a", per_device_eval_batch_size=1)
    trainer.find_reference()
    other = tiny.build_preference_trainer(pictures, tmp_path / "b", pairs_per_image=1, per_device_eval_batch_size=9)
    other.find_reference()
    texts, alone = {}, {}
    for found, some in ((texts, trainer), (alone, other)):
        for example in some.train_dataset:
            for caption, value in zip(example["captions"], example["reference"], strict=True):
                found[example["row"], caption] = value
    assert texts.keys() == alone.keys()
    assert all(value == pytest.approx(alone[key], rel=1e-5) for key, value in texts.items())


def test_captions_of_several_pairs_are_laid_out_once():
    rows = {"chosen": [["a", "a", "b"]], "rejected": [["b", "c", "c"]], "asked": [["x"] * 3]}
    (whole,) = pair_examples(rows, 4)
    assert whole == {"row": 0, "captions": ["a", "b", "c"], "chosen": [0, 0, 1], "rejected": [1, 2, 2]}
    first, second = pair_examples(rows, 2)
    assert first["captions"] == ["a", "b", "c"] and second == {
        "row": 0, "captions": ["b", "c"], "chosen": [0], "rejected": [1]
    }  # fmt: skip
    (several,) = pair_examples(rows | {"asked": [["x", "x", "y"]]}, 4)
    assert several["captions"] == ["a", "b", "b", "c", "c"] and several["prompts"] == [
        ["x"],
        ["y"],
        ["x"],
        ["x"],
        ["y"],
    ]
    assert several["chosen"] == [0, 0, 1] and several["rejected"] == [2, 3, 4]


def test_robust_loss_is_an_unbiased_estimate():
    """Averaged over the flips that label_smoothing supposes, it is the loss of the true preference."""
    margins = torch.linspace(-3, 3, 7, dtype=torch.float64)
    flipped = 0.3 * preference_loss(-margins, 0.5, "robust", 0.3) + 0.7 * preference_loss(margins, 0.5, "robust", 0.3)
    torch.testing.assert_close(flipped, preference_loss(margins, 0.5, "sigmoid"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing: 0.1 must be .* loss_type: robust alone"),
        ({"label_smoothing": 0.5, "loss_type": "robust"}, "from 0 to below 0.5"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: 0.1 is of cross-entropy"),
        ({"beta": 0.0}, "beta: 0.0 must be above 0"),
        ({"load_best_model_at_end": True}, "rank the model by captions of"),
        ({"metric_for_best_model": "loss", "eval_strategy": "steps"}, "choose one of .*preference_rate"),
    ],
)
def test_settings_that_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        parsed_as(CaptionDPOFields, TRAINING_ARGUMENTS)(output_dir=str(tmp_path), **settings)
