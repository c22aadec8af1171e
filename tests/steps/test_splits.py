"""What a run will need hours later is looked at before its first step: rows, references, folders, the Hub."""

from types import SimpleNamespace

import datasets
import pytest
from huggingface_hub import HfApi
from PIL import Image

from vlmcap.data.errors import DataError
from vlmcap.data.images import references_of
from vlmcap.errors import UserError
from vlmcap.evaluation.caption_files import ScoreError
from vlmcap.evaluation.tokenise import TokenizerError
from vlmcap.steps.arguments import EvaluationArguments
from vlmcap.steps.early import check_early
from vlmcap.steps.splits import load_splits
from vlmcap.training.arguments import CaptionerDataArguments, CaptionerFields, CaptionSFTFields, SplitArguments
from vlmcap.training.collator import caption_examples
from vlmcap.training.inherited import SFT_CONFIG, TRAINING_ARGUMENTS, parsed_as
from vlmcap.upload import PushError, check_push_rights

TRAIN = [(1, ["犬"]), (2, [" "]), (1, ["", "白い犬"]), (3, ["猫"]), (4, [])]


@pytest.fixture
def arguments(tmp_path):
    """arguments(test=[(9, ["👍"])], ...): of a dataset with these rows, whose pictures are in a folder."""

    def arguments(**changed) -> SplitArguments:
        splits = {"train": TRAIN, "validation": [(20, ["鳥"])], "test": [(30, ["馬"]), (30, ["白い馬"])]} | changed
        for split, rows in splits.items():
            ids, captions = zip(*rows, strict=True)
            columns = {"image_id": ids, "file_name": [f"{i}.png" for i in ids], "captions": captions}
            datasets.Dataset.from_dict(columns).to_parquet(tmp_path / f"data/{split}-00000-of-00001.parquet")
            for name in columns["file_name"]:
                Image.new("RGB", (28, 28)).save(tmp_path / name)
        (tmp_path / "data/README.md").write_text("---\nlicense: cc0-1.0\n---\n")
        return SplitArguments(str(tmp_path / "data"), image_dir=str(tmp_path))

    return arguments


def test_training_rows_are_images_with_captions(arguments, tmp_path, capfd):
    splits = load_splits(arguments(), tmp_path / "out", True, 0, include_yj_images=False)
    assert references_of(splits.train) == {"1": ["犬", "白い犬"], "3": ["猫"]}
    assert caption_examples(splits.train, 5)["captions"][:] == [["犬", "白い犬"], ["猫"]]  # an image is one example
    assert references_of(splits.test) == {"30": ["馬", "白い馬"]}
    assert splits.empty == {"captions": 2, "images": 2} and not any(splits.train["in_yj"])
    printed = capfd.readouterr()
    assert "(train): 5 rows of 4 images, grouped by image_id" in printed.err
    assert "Left out of train: 2 empty captions, and 2 images without any other" in printed.out


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"test": [(30, ["馬"]), (31, ["👍"])]}, r"data \(test\): 1 images have an empty reference.*\(31\)"),
        ({"validation": [(21, []), (22, ["鳥"])]}, r"data \(validation\): 1 images have an empty list .*\(21\)"),
        ({"train": [(1, [""]), (2, [])]}, r"data \(train\) has no image with a caption to train on"),
    ],
)
def test_captions_that_would_stop_the_run_later_stop_it_at_the_start(arguments, tmp_path, rows, message):
    arguments = arguments(**rows)
    for path in tmp_path.glob("*.png"):
        path.unlink()  # captions are looked at before pictures
    with pytest.raises((ScoreError, DataError), match=message):
        load_splits(arguments, tmp_path / "out", True, 0)


def test_what_scores_and_files_need_is_checked_early(arguments, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("VLMCAP_METEOR_JAR", "none.jar")
    (tmp_path / "file").touch()
    data = arguments()
    here = {"dataset": data.dataset, "image_dir": data.image_dir}
    capfd.readouterr()
    settings = SimpleNamespace(push_to_hub=False, output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True)
    settings.eval_strategy = "steps"
    check_early(settings, CaptionerDataArguments(**here))
    assert not (tmp_path / "out").exists()
    said = "METEOR will be left out: $VLMCAP_METEOR_JAR names none.jar, which is not a file"
    assert capfd.readouterr().err == f"{said}\n"
    check_early(settings, EvaluationArguments(**here))
    assert capfd.readouterr().err == f"{said}\n"
    check_early(settings, EvaluationArguments(**here, meteor=False))
    assert capfd.readouterr().err == ""
    with pytest.raises(TokenizerError, match="unknown tokenizer 'mecab'"):
        check_early(settings, CaptionerDataArguments(**here, tokenizer="mecab"))
    with pytest.raises(UserError, match="spice_dir .*lacks spice-1.0.jar, lib/stanford"):
        check_early(settings, CaptionerDataArguments(**here, spice_dir=str(tmp_path)))
    settings.output_dir = str(tmp_path / "file/out")
    with pytest.raises(NotADirectoryError, match=f"{tmp_path}/file"):
        check_early(settings, CaptionerDataArguments(**here))
    for fields, chain, metric in (
        (CaptionSFTFields, SFT_CONFIG, "loss"),
        (CaptionerFields, TRAINING_ARGUMENTS, "meteor"),
    ):
        with pytest.raises(ValueError, match=f"metric_for_best_model: {metric} is not measured during training"):
            parsed_as(fields, chain)(output_dir="x", metric_for_best_model=metric)


def test_a_push_that_would_be_refused_is_refused_early(hub):
    check_push_rights("user/new")
    HfApi().create_repo("user/seen", private=False)
    with pytest.raises(PushError, match="--hub_model_id user/seen: the repository exists and is public, but private"):
        check_push_rights("user/seen")
    with pytest.raises(PushError, match=r"--repo_id user/a name: Repo id must"):
        check_push_rights("user/a name", "--repo_id", "dataset")
