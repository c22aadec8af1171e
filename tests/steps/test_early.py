"""What recipes ask before anything heavy is imported or loaded."""

import sys
from types import SimpleNamespace

import pytest

from vlmcap.errors import UserError
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


@pytest.mark.parametrize(("use_cpu", "of_accelerate"), [(True, "False"), (False, "True")])
def test_use_cpu_hides_the_gpus_and_deepspeed_is_refused(tmp_path, monkeypatch, use_cpu, of_accelerate):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("ACCELERATE_USE_CPU", of_accelerate)  # as `accelerate launch` writes it
    settings = SimpleNamespace(use_cpu=use_cpu, report_to="none", push_to_hub=False, output_dir=str(tmp_path))
    data = SimpleNamespace(dataset=str(tmp_path), dataset_revision=None, tokenizer="characters")
    check_early(settings, data)
    assert early.os.environ["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="accelerate is configured for DeepSpeed.*: use DDP or FSDP"):
        check_early(settings, data)
