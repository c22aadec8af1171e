"""4-bit weights stay as they were quantised, also on CPUs where bitsandbytes would repack them (AVX512-BF16)."""

import bitsandbytes as bnb
import pytest
import torch

from tests.invariants.tiny import PROMPT, build_model, build_processor, build_trainer, loss_and_gradients
from vlmcap.data.images import open_image
from vlmcap.evaluation.generate import GenerationArguments, caption_images
from vlmcap.models.load import load_model

# The miniature's widths are no multiples of 64: repacking crashes. The other model's are: it is repacked in silence.
MODELS = ["miniature", "widths of 64"]


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    build_model("qwen2_vl", hidden=128).save_pretrained(folder)
    return folder


def quantised(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every 4-bit weight and every tensor of its quantisation state, by the name of its layer."""
    return {
        f"{name.removesuffix('.base_layer')} {key}": tensor.clone()
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
        for key, tensor in {"weight": module.weight.data, **module.weight.quant_state.as_dict(packed=True)}.items()
    }


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("name", MODELS)
def test_captioning_leaves_the_training_as_it_is(repacking_processor, name, miniature_dir, wide_model, rows, tmp_path):
    generation = GenerationArguments(prompt=PROMPT, num_beams=2, max_new_tokens=4, generation_batch_size=3)
    processor, images = build_processor("qwen2_vl"), [open_image(row) for row in rows]

    def train(captioning: bool):
        """Two steps; with captions of all pictures before each of them and after the last."""
        torch.manual_seed(0)
        model = load_model(str(miniature_dir if name == "miniature" else wide_model))
        loaded = quantised(model)
        trainer = build_trainer(tmp_path / str(captioning), rows, model=model)
        steps, said = [], []
        for step in range(3):
            if captioning:
                trainer.model.eval()
                with torch.inference_mode():
                    said.append(caption_images(trainer.model, processor, images, generation))
            if step < 2:
                steps.append(loss_and_gradients(trainer))
                with torch.no_grad():
                    for parameter in trainer.model.parameters():
                        if parameter.requires_grad:
                            parameter -= 0.5 * parameter.grad
        return loaded, quantised(model), steps, said

    loaded, plain, steps, _ = train(captioning=False)
    assert_equal(plain, loaded)
    _, watched, watched_steps, said = train(captioning=True)
    assert_equal(watched, loaded)
    assert len({tuple(captions) for captions in said}) > 1, "training changes what is said"
    for (loss, gradients), (watched_loss, watched_gradients) in zip(steps, watched_steps, strict=True):
        assert loss == watched_loss
        assert all(gradient.any() for gradient in gradients.values())
        assert_equal(gradients, watched_gradients)
