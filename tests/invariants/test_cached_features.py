"""Training on cached image features is training on the pictures: losses and every gradient, digit for digit."""

import pytest
import torch
from peft.utils.other import fsdp_auto_wrap_policy

from tests.invariants import tiny
from vlmcap.models.tower import feed_features
from vlmcap.training.collator import BadImages
from vlmcap.training.features import cache_features

ALL = {"captions_per_image": 7}


@pytest.fixture
def cached_trainer_of(trainer_of, rows, tmp_path):
    """cached_trainer_of("qwen2_vl"): as trainer_of, on the features of the same model."""

    def build(architecture, **settings):
        model, processor = tiny.build_model(architecture), tiny.build_processor(architecture)
        bad_images = BadImages(tmp_path / "bad_images.jsonl", limit=0)
        features = cache_features(tmp_path / "features", model, processor, rows, "tiny", None, bad_images)
        return trainer_of(architecture, features=features, **settings)

    return build


def record_inputs(trainer) -> list[torch.Tensor]:
    """What goes into the projectors that are trained, from now on."""
    inputs = []
    for name, module in trainer.model.named_modules():
        if name.endswith("modules_to_save.default"):
            module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    return inputs


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", tiny.FAMILY)
def test_cached_is_live(trainer_of, cached_trainer_of, architecture, checkpointing):
    """Six pictures in six sizes: with several images in a batch, windows (Qwen2.5-VL) and DeepStack (Qwen3-VL)."""
    live = trainer_of(architecture, gradient_checkpointing=checkpointing, **ALL)
    cached = cached_trainer_of(architecture, gradient_checkpointing=checkpointing, **ALL)
    inputs = record_inputs(cached), record_inputs(live)
    loss, gradients = tiny.loss_and_gradients(cached)
    expected_loss, expected = tiny.loss_and_gradients(live)
    assert len(inputs[0]) == len(inputs[1]) == (3 if architecture == "qwen3_vl" else 1)
    for ours, theirs in zip(*inputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert not ours.requires_grad
    tiny.assert_same_step((loss, gradients), (expected_loss, expected), tolerance=1e-6)
    assert any(".merger." in name for name in gradients)


@pytest.mark.parametrize("architecture", tiny.FAMILY)
def test_cached_in_small_batches_is_live(trainer_of, cached_trainer_of, architecture):
    """Features of a picture do not depend on the pictures beside it, neither when computed nor when used."""
    cached = cached_trainer_of(architecture, per_device_train_batch_size=2, gradient_accumulation_steps=3, **ALL)
    live = trainer_of(architecture, **ALL)
    tiny.assert_same_step(tiny.loss_and_gradients(cached), tiny.loss_and_gradients(live))


@pytest.mark.parametrize("architecture", tiny.FAMILY)
def test_cached_is_live_with_a_frozen_projector(trainer_of, cached_trainer_of, architecture):
    settings = ALL | {"train_projector": False}
    ours, theirs = cached_trainer_of(architecture, **settings), trainer_of(architecture, **settings)
    tiny.assert_same_step(tiny.loss_and_gradients(ours), tiny.loss_and_gradients(theirs), tolerance=1e-6)


@pytest.mark.parametrize("architecture", tiny.FAMILY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_the_live_ones(rows, tmp_path, architecture, dtype):
    """Also under the autocast in which a GPU trains: it changes no digit of a tower of that dtype."""
    model, processor = tiny.build_model(architecture).to(dtype), tiny.build_processor(architecture)
    bad_images = BadImages(tmp_path / "bad_images.jsonl", limit=0)
    features = cache_features(tmp_path, model, processor, rows, "tiny", None, bad_images)
    batch = features.batch([4, 0, 3])
    assert batch["pixel_values"].dtype == model.model.visual.dtype == dtype
    pictures = [tiny.Image.open(rows[row]["image"]["path"]).convert("RGB") for row in (4, 0, 3)]
    live = processor.image_processor(pictures, return_tensors="pt")
    assert torch.equal(batch["image_grid_thw"], live["image_grid_thw"])
    with torch.no_grad(), torch.autocast("cpu", dtype):
        expected = model.model.get_image_features(live["pixel_values"], live["image_grid_thw"])
        feed_features(model)
        ours = model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    assert model.model.visual.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(ours.pooler_output, expected.pooler_output, strict=True))


@pytest.mark.parametrize("architecture", tiny.FAMILY)
def test_the_tower_is_gone(architecture):
    model = tiny.build_model(architecture)
    block = model.model.visual.blocks[0]
    tower_name, kind = type(block).__name__, type(model.model.language_model.layers[0])
    block_size = sum(p.numel() for p in block.parameters())
    before = sum(p.numel() for p in model.model.visual.parameters())
    feed_features(model)
    left = {name for name, _ in model.model.visual.named_parameters() if "merger" not in name}
    assert left == ({"pos_embed.weight"} if architecture == "qwen3_vl" else set())
    assert before - sum(p.numel() for p in model.model.visual.parameters()) > 3 * block_size
    # FSDP's wrapping policy names classes of layers and fails on one that the model does not have.
    policy = fsdp_auto_wrap_policy(model)
    wrapped = {k for p in policy.keywords["policies"] for k in p.keywords.get("transformer_layer_cls", ())}
    assert kind in wrapped and tower_name not in {k.__name__ for k in wrapped}
