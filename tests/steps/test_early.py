"""What recipes ask before anything heavy is imported or loaded."""

import shlex
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset
from huggingface_hub import HfApi
from PIL import Image

from vlmcap.captioning.arguments import PromptArguments
from vlmcap.data.errors import DataError
from vlmcap.errors import UserError
from vlmcap.evaluation.tokenise import TokenizerError
from vlmcap.models.arguments import check_attention
from vlmcap.steps import early
from vlmcap.steps.early import check_early, check_trackers


def test_the_trackers_are_those_of_transformers():
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert INTEGRATION_TO_CALLBACK.keys() == {*early.TRACKERS, "kubeflow"}


@pytest.mark.parametrize(
    ("report_to", "message"),
    [
        ("clearml", "report_to: clearml needs the Python package clearml, which is not installed"),
        (["mlflow"], "report_to: mlflow needs the Python package mlflow"),
        ("wandb", "package wandb, which is not installed: install it with `pip install wandb`, or leave"),
        ("tensorbord", "report_to: 'tensorbord' is none of none, all, kubeflow, azure_ml"),
    ],
)
def test_a_tracker_that_is_missing_is_named(report_to, message):
    with pytest.raises(UserError, match=message):
        check_trackers(report_to)


def test_a_tracker_that_is_installed_is_taken(tmp_path, monkeypatch):
    monkeypatch.setitem(early.TRACKERS, "tensorboard", ("none", "tensorboardX"))  # either of two packages will do
    (tmp_path / "tensorboardX.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for report_to in ("tensorboard", ["tensorboard"], "none", "all", None, []):
        check_trackers(report_to)
    assert "tensorboardX" not in sys.modules


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "kernels-community/flash-attn2", "sdp"])
def test_attention_that_is_missing_or_code_from_the_hub_is_refused(name):
    with pytest.raises(ValueError, match=f"attn_implementation: .?{name}.? (needs the module|is none of sdpa)"):
        check_attention(name)


CARD = "---\nlicense: mit\nlanguage:\n- ja\n---\n"
COLUMNS = ("image_id", "file_name", "captions")


def write_dataset(folder, splits=("train", "validation", "test"), columns=COLUMNS, card=CARD, **changed):
    """folder/own, ten rows a split, and folder/pictures with theirs."""
    (folder / "own/data").mkdir(parents=True)
    (folder / "pictures").mkdir()
    for split in splits:
        names = [f"{split} {number}.png" for number in range(10)]
        values = {"image_id": names, "file_name": names, "captions": [[f"絵その{name}"] for name in names]} | changed
        pq.write_table(pa.table({name: values[name] for name in columns}), folder / f"own/data/{split}-0.parquet")
        for number, name in enumerate(names):
            Image.new("RGB", (8, 8), (number, len(split), 9)).save(folder / "pictures" / name)
    if card:
        (folder / "own/README.md").write_text(card, encoding="utf-8")


def check(folder, dataset="own", image_dir="pictures", eval_strategy="steps", use_cpu=True, prompts=None, **options):
    """As a recipe with this dataset."""
    settings = SimpleNamespace(use_cpu=use_cpu, eval_strategy=eval_strategy, output_dir=str(folder))
    settings.report_to, settings.push_to_hub = "none", False
    splits = {f"{split}_split": split for split in ("train", "validation", "test")}
    here = folder / dataset
    data = {"dataset": str(here) if here.exists() else dataset, "dataset_revision": None, "tokenizer": "characters"}
    data["image_dir"] = image_dir and str(folder / image_dir)
    check_early(settings, SimpleNamespace(**data | splits | options), PromptArguments(prompts))


MISSING = {
    "no test split": (
        {"splits": ["train", "validation"]},
        {},
        "no split 'test'; it has train, validation. .*--test_sp",
    ),
    "no validation split": (
        {"splits": ["train", "test"]},
        {},
        "no split 'validation'; it has train, test. Name one of them with --validation_split, train without",
    ),
    "no training split": ({}, {"train_split": "tarin"}, "no split 'tarin'; .* Name one of them with --train_split"),
    "no captions": ({"columns": COLUMNS[:2]}, {}, r"\(train\) has no column captions; it has image_id, file_name\."),
    "no ids": ({"columns": COLUMNS[1:]}, {}, r"\(train\) has no column image_id; it has file_name, captions\."),
    "captions that are no lists": ({"captions": ["x"] * 10}, {}, "the column captions is string, expected lists of"),
    "pictures that are numbers": (
        {"image": [1] * 10, "columns": (*COLUMNS, "image")},
        {},
        "the column image is int64, expected pictures",
    ),
    "no folder of the pictures": (
        {},
        {"image_dir": None},
        "holds captions but no images. Name the folder .*--image_dir",
    ),
    "no such folder": ({}, {"image_dir": "no/pictures"}, r"--image_dir \S*/no/pictures is not a folder"),
    "no card": ({"card": None}, {}, "has no README.md, the card that says its licence"),
    "a damaged file": ({"columns": ()}, {}, r"\(train\) cannot be loaded: "),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_a_dataset_lacks_is_named(tmp_path, name):
    written, asked, message = MISSING[name]
    write_dataset(tmp_path, **written)
    if name == "a damaged file":
        (tmp_path / "own/data/train-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=message):
        check(tmp_path, **asked)


def test_a_dataset_on_the_hub(hub, tmp_path):
    write_dataset(tmp_path, splits=["train", "validation"])
    HfApi().create_repo("user/some", repo_type="dataset")
    HfApi().upload_folder(repo_id="user/some", repo_type="dataset", folder_path=tmp_path / "own")
    with pytest.raises(DataError, match="(?s)user/some has no split 'test'; .*--annotations user/some --images"):
        check(tmp_path, "user/some")
    check(tmp_path, "user/some", test_split="validation")


def test_what_several_prompts_need(tmp_path):
    write_dataset(tmp_path)
    check(tmp_path)
    with pytest.raises(DataError, match="no column languages, so its captions cannot be told apart by ja/plain, en"):
        check(tmp_path, prompts={"ja/plain": "x", "en": "y"})
    with pytest.raises(TokenizerError, match="captions in 'de' cannot be scored: there are tokenizers for ja, en, vi"):
        check(tmp_path, prompts={"ja": "x", "de": "y"})


def test_no_validation_split_is_needed_without_validation(tmp_path):
    write_dataset(tmp_path, splits=["train", "test"])
    check(tmp_path, eval_strategy="no")


@pytest.mark.parametrize("lacks", [{"splits": ["train"]}, {"columns": COLUMNS[1:]}], ids=["split", "column"])
def test_the_command_in_the_message_makes_the_dataset_that_is_needed(run_script, tmp_path, lacks):
    write_dataset(tmp_path, **lacks)
    with pytest.raises(DataError) as error:
        check(tmp_path)
    program, *words = shlex.split(str(error.value).splitlines()[-1])[1:]
    output_dir = words.index("--output_dir") + 1
    assert (program, words[output_dir]) == ("scripts/publish_datasets.py", "data/own_split")
    words[output_dir] = tmp_path / "made"
    run_script(program, *words)
    check(tmp_path, "made", image_dir=None)
    made = load_dataset(str(tmp_path / "made"))
    wanted = 10 * len(lacks.get("splits", "123"))
    assert sum(map(len, made.values())) == wanted and len(made["test"]) == len(made["validation"]) == wanted / 10
    assert made["train"][0]["image"].size == (8, 8) and made["train"][0]["file_name"].endswith(".png")


@pytest.mark.parametrize(("use_cpu", "of_accelerate"), [(True, "False"), (False, "True")])
def test_use_cpu_hides_the_gpus_and_deepspeed_is_refused(tmp_path, monkeypatch, use_cpu, of_accelerate):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("ACCELERATE_USE_CPU", of_accelerate)  # as `accelerate launch` writes it
    write_dataset(tmp_path)
    check(tmp_path, use_cpu=use_cpu)
    assert early.os.environ["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="accelerate is configured for DeepSpeed.*: use DDP or FSDP"):
        check(tmp_path)
