"""Devices that were not tried, as torch would report them: nothing is sent where no model is."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState

from tests.invariants import tiny
from vlmcap import provenance
from vlmcap.models.load import compute_dtype, local_device
from vlmcap.training.trainer_arguments import CaptionerTrainingArguments


@pytest.fixture
def mps(monkeypatch):
    """An Apple machine to transformers and accelerate; to torch, whose tensors cannot go there, this one."""
    monkeypatch.setattr("transformers.training_args.is_torch_mps_available", lambda: True)
    monkeypatch.setattr("accelerate.state.is_mps_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_beside_mps_the_cpu_trains(mps, tmp_path):
    assert PartialState().device.type == "mps"
    tiny.write_pictures(tmp_path)
    trainer = tiny.build_trainer(tmp_path, tiny.read_pictures(tmp_path), use_cpu=False)
    trainer.train()
    assert trainer.state.global_step == 1 and trainer.args.device.type == trainer.model.device.type == "cpu"
    settings = CaptionerTrainingArguments(output_dir=str(tmp_path))
    assert settings.device.type == PartialState().device.type == local_device() == "cpu"
    assert not (settings.bf16 or settings.fp16 or settings.dataloader_pin_memory)


@pytest.mark.parametrize(("capability", "dtype"), [((9, 4), torch.bfloat16), ((11, 0), torch.bfloat16)])
def test_rocm_is_cuda_to_torch(monkeypatch, capability, dtype):
    """MI300 and RX 7900: what `torch.cuda` of a ROCm build says of them."""
    properties = SimpleNamespace(name="AMD Instinct", total_memory=2**36, gcnArchName="gfx942")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    assert (compute_dtype(), local_device()) == (dtype, "cuda:0")
    assert provenance.hardware() | {"device": "AMD Instinct", "device_memory_bytes": 2**36} == provenance.hardware()
