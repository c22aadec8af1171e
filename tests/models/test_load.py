"""NF4, LoRA, projector and the free vision tower, on the miniature."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import get_peft_model

from vlmcap.miniature.qwen2_vl import build_model
from vlmcap.models.load import (
    ModelArguments,
    ModelError,
    check_quantisation,
    count_parameters,
    free_frozen_parts,
    load_model,
    load_processor,
    lora_config,
)
from vlmcap.training.report import trainable_modules


@pytest.fixture(scope="module")
def arguments(miniature_dir):
    return ModelArguments(model_name_or_path=str(miniature_dir))


def test_nf4_on_the_language_layers_alone(miniature_dir):
    model = load_model(str(miniature_dir))
    assert isinstance(model.model.language_model.layers[0].mlp.up_proj, Linear4bit)
    assert model.model.language_model.layers[0].mlp.up_proj.weight.quant_type == "nf4"
    assert model.model.language_model.layers[0].mlp.up_proj.weight.compress_statistics  # double quantisation
    assert not any(isinstance(module, Linear4bit) for module in model.model.visual.modules())
    assert count_parameters(model) == count_parameters(load_model(str(miniature_dir), load_in_4bit=False))


def test_a_quantised_projector_is_refused(miniature_dir):
    model = load_model(str(miniature_dir))
    merger = model.model.visual.merger
    merger.mlp[0] = Linear4bit(merger.mlp[0].in_features, merger.mlp[0].out_features)
    with pytest.raises(ModelError, match=r"vision tower are quantised \(first: model.visual.merger.mlp.0\)"):
        check_quantisation(model)


def test_a_model_loaded_in_full_precision_is_refused_as_4bit(miniature_dir):
    with pytest.raises(ModelError, match="in full precision"):
        check_quantisation(load_model(str(miniature_dir), load_in_4bit=False))


def test_lora_on_the_top_layers_and_projector_in_full(miniature_dir, arguments):
    model = load_model(str(miniature_dir))
    trained = trainable_modules(get_peft_model(model, lora_config(model, arguments)))
    lora = {name for name in trained if "(LoRA)" in name}
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in lora} == {2, 3, 4, 5, 6, 7}
    assert len(lora) == 6 * 7
    others = trained.keys() - lora
    assert others and all(name.startswith("visual.merger") for name in others)
    merger = build_model(load_processor(str(miniature_dir))).model.visual.merger
    assert sum(trained[name][0] for name in others) == sum(p.numel() for p in merger.parameters())


def test_projector_frozen_when_asked(miniature_dir):
    model = load_model(str(miniature_dir))
    arguments = ModelArguments(model_name_or_path=str(miniature_dir), train_projector=False, lora_top_layers=1)
    assert len(trainable_modules(get_peft_model(model, lora_config(model, arguments)))) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_target_modules": ["q_proj", "query"]}, "'query' matches nothing .* there are down_proj, gate_proj"),
        ({"lora_top_layers": 9}, "lora_top_layers=9.*8 language layers, so choose 1 to 8"),
        ({"lora_top_layers": 0}, "lora_top_layers=0"),
    ],
)
def test_patterns_that_match_nothing_are_refused(miniature_dir, change, message):
    with pytest.raises(ModelError, match=message):
        lora_config(load_model(str(miniature_dir)), ModelArguments(model_name_or_path=str(miniature_dir), **change))


def test_pixel_bounds_travel_with_the_processor(miniature_dir, tmp_path):
    load_processor(str(miniature_dir), min_pixels=784, max_pixels=1568).save_pretrained(tmp_path)
    size = load_processor(str(tmp_path)).image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (784, 1568)


def test_frozen_tower_runs_once_and_is_not_back_propagated(miniature_dir, arguments):
    """Under gradient checkpointing with PEFT's input hooks, the setting in which the tower is not free by default."""
    model = load_model(str(miniature_dir))
    model = get_peft_model(model, lora_config(model, arguments))
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    free_frozen_parts(model)
    model.train()
    counts = {"forward": 0, "backward": 0}
    block = model.get_base_model().model.visual.blocks[-1]
    forward = block.mlp.forward

    def counted(x):
        counts["forward"] += 1
        out = forward(x)
        if out.requires_grad:
            out.register_hook(lambda grad: counts.__setitem__("backward", counts["backward"] + 1))
        return out

    block.mlp.forward = counted
    image_token = model.get_base_model().config.image_token_id
    ids = torch.tensor([[300] + [image_token] * 9 + [301, 302]])
    output = model(
        input_ids=ids,
        mm_token_type_ids=(ids == image_token).long(),
        pixel_values=torch.randn(36, 1176),
        image_grid_thw=torch.tensor([[1, 6, 6]]),
    )
    output.logits.sum().backward()
    assert counts == {"forward": 1, "backward": 0}
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    assert any("merger" in name and gradient.abs().sum() > 0 for name, gradient in gradients.items())
