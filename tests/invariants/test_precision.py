"""What runs on a T4: float16 autocast, float32 trainables, a GradScaler, no bfloat16 anywhere. On a CPU, in the same
dtypes; speed and memory of the real thing are scripts/bench_training.py's business."""

import pytest
import torch
from peft import get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from tests.invariants.rewarded import TwoRewards
from tests.invariants.tiny import PROMPT
from vlmcap.data.preferences import read_preferences
from vlmcap.models import load
from vlmcap.models.load import ModelArguments, load_model, load_processor, lora_config
from vlmcap.models.weights import Adapter, read_adapter
from vlmcap.training.collator import BadImages
from vlmcap.training.dpo import CaptionDPOTrainer
from vlmcap.training.reward_trainer import CaptionGRPOTrainer
from vlmcap.training.trainer import CaptionTrainer
from vlmcap.training.trainer_arguments import CaptionDPOConfig, CaptionGRPOConfig, CaptionSFTConfig


class Dtypes(TorchDispatchMode):
    """Every dtype that an operation put out."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.seen.add(tensor.dtype)
        return out


@pytest.fixture
def trainer(monkeypatch, miniature_dir, rows, tmp_path):
    """The recipe's trainer on the miniature in NF4, loaded as on a T4; dropout and smoothing as in t4.yaml."""
    monkeypatch.setattr(load, "compute_dtype", lambda: torch.float16)
    model = load_model(str(miniature_dir))
    return CaptionTrainer(
        model=model,
        args=CaptionSFTConfig(
            output_dir=str(tmp_path), use_cpu=True, report_to="none", gradient_checkpointing=True, bf16=False
        ),
        rows=rows,
        processing_class=load_processor(str(miniature_dir)),
        prompt=PROMPT,
        bad_images=BadImages(tmp_path / "bad_images.jsonl", limit=0),
        peft_config=lora_config(model, ModelArguments(model_name_or_path=str(miniature_dir))),
    )


def train_in_float16(trainer, next_batch) -> list[float]:
    """Losses of three steps as accelerate makes them in fp16: autocast, scaled loss, unscaled gradients, an optimizer
    step. `next_batch()`: (batch, number of its tokens)."""
    model = trainer.model.train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float16, torch.float32}
    start = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = []
    with Dtypes() as dtypes:
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.float16):
                batch, tokens = next_batch()
                loss = trainer.compute_loss(model, batch, num_items_in_batch=tokens)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            assert torch.isfinite(norm)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert torch.bfloat16 not in dtypes.seen and torch.float16 in dtypes.seen
    assert not [n for n, p in trained.items() if torch.equal(p, start[n])]
    assert scaler.get_scale() == 2.0**10  # no step was skipped for an overflow
    return losses


def test_float16_training_on_float32_trainables(trainer):
    batch = trainer.data_collator(list(trainer.train_dataset))
    losses = train_in_float16(trainer, lambda: (dict(batch), None))
    assert losses[0] > losses[1] > losses[2]


def test_float16_training_on_rewards(trainer, monkeypatch, miniature_dir, rows, tmp_path):
    """Samples, log-probabilities of the start and losses, from the trainer's adapter on."""
    trainer.model.save_pretrained(tmp_path / "adapter")
    model = load_model(str(miniature_dir))
    config = lora_config(model, ModelArguments(model_name_or_path=str(miniature_dir)))
    settings = {"per_device_train_batch_size": len(rows), "max_completion_length": 8, "num_generations": 4}
    settings |= {"use_cpu": True, "report_to": "none", "gradient_checkpointing": True, "bf16": False, "beta": 0.1}
    rewarded = CaptionGRPOTrainer(
        model,
        CaptionGRPOConfig(str(tmp_path / "run"), **settings),
        rows,
        load_processor(str(miniature_dir)),
        PROMPT,
        BadImages(tmp_path / "bad_images.jsonl", limit=0),
        config,
        Adapter("adapter", None, tmp_path / "adapter", config, {}),
        TwoRewards(),
    )
    rewarded.current_gradient_accumulation_steps = 1
    loader = rewarded.get_train_dataloader()

    def next_batch():
        rewarded.state.global_step += 1
        (batch,), tokens = rewarded.get_batch_samples(iter(loader), 1, rewarded.args.device)
        assert batch["reference_log_probs"].dtype == torch.float32
        return batch, tokens

    assert all(abs(loss) < 1 for loss in train_in_float16(rewarded, next_batch))
    assert rewarded.totals == {"samples": 72, "images": 18, "images_alike": rewarded.totals["images_alike"]}


def test_float16_on_preferences(pictures, tmp_path, monkeypatch, miniature_dir):
    """Reference, loss and gradients of the miniature in NF4 as on a T4: log-probabilities are summed in float32."""
    monkeypatch.setattr(load, "compute_dtype", lambda: torch.float16)
    model = load_model(str(miniature_dir))
    configuration = lora_config(model, ModelArguments(model_name_or_path=str(miniature_dir)))
    start = get_peft_model(load_model(str(miniature_dir)), configuration)
    start.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    rows = read_preferences(str(pictures / "preferences.jsonl"), PROMPT).select([0, 1])
    trainer = CaptionDPOTrainer(
        model=model,
        args=CaptionDPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", bf16=False),
        rows=rows,
        heldout=rows.select([0]),
        processing_class=load_processor(str(miniature_dir)),
        prompt=PROMPT,
        bad_images=BadImages(tmp_path / "bad_images.jsonl", limit=0),
        peft_config=configuration,
        adapter=read_adapter(str(tmp_path / "adapter")),
    )
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    monkeypatch.setattr(trainer, "compute_loss_context_manager", lambda: torch.autocast("cpu", dtype=torch.float16))
    losses = []
    with Dtypes() as dtypes:
        trainer.find_reference()
        batch = trainer.data_collator(list(trainer.train_dataset))
        trainer.model.train()
        for _ in range(3):
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(trainer.model, dict(batch))
            assert loss.dtype == torch.float32
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            assert torch.isfinite(torch.nn.utils.clip_grad_norm_(trained, 1.0))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert torch.bfloat16 not in dtypes.seen and torch.float16 in dtypes.seen
    assert losses[0] == pytest.approx(0.6931, abs=1e-2) and losses[0] > losses[1] > losses[2]


def test_the_projector_keeps_its_digits(trainer, miniature_dir):
    """TRL rounds the trainables of a quantised model to bfloat16, which has three digits fewer than float16."""
    merger = load_model(str(miniature_dir)).model.visual.merger
    published = dict(merger.half().float().named_parameters())
    merger = trainer.model.get_base_model().model.visual.merger.modules_to_save["default"]
    for name, parameter in merger.named_parameters():
        assert torch.equal(parameter, published[name])
    lora = [p for n, p in trainer.model.named_parameters() if ".lora_A." in n]
    assert not all(torch.equal(p, p.bfloat16().float()) for p in lora)


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)])
def test_precision_follows_the_compute_capability(monkeypatch, tmp_path, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)  # what a T4 answers
    assert load.compute_dtype() == dtype
    if capability < (8, 0):
        with pytest.raises(ValueError, match="a GPU has compute capability 7.5 and no bfloat16. Set fp16: true"):
            CaptionSFTConfig(output_dir=str(tmp_path), bf16=True)
