"""4-bit weights stay as they were quantised, also on CPUs where bitsandbytes would repack them (AVX512-BF16)."""

from ctypes import c_longlong

import bitsandbytes as bnb
import pytest
import torch

from tests.invariants.tiny import PROMPT, build_model, build_processor, build_trainer, loss_and_gradients
from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.captioning.generate import caption_with_prompt
from vlmcap.data.images import open_image
from vlmcap.models.load import load_model
from vlmcap.models.nf4 import in_whole_blocks

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
                    said.append(caption_with_prompt(trainer.model, processor, images, generation))
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


def scales_by_row(packed, absmax, out, blocksize, rows, width):
    """What bitsandbytes 0.50.2 does on AVX512: `width // blocksize` scales a row, from the row's own first."""
    size, width = blocksize.value, width.value
    for number in range(rows.value * width):
        row, column = divmod(number, width)
        out[number] = packed[number] * absmax[row * (width // size) + column // size]


@pytest.mark.parametrize(("rows", "width"), [(4, 160), (6, 32), (3, 128), (5, 24), (1, 72)])
def test_scales_are_those_of_the_blocks_on_avx512(rows, width):
    count, size = rows * width, 64
    absmax = [1.0 + block for block in range(-(-count // size))]
    out = [0.0] * count
    in_whole_blocks(scales_by_row)([1.0] * count, absmax, out, *map(c_longlong, (size, rows, width)))
    assert out == [absmax[number // size] for number in range(count)]


@pytest.mark.parametrize(("rows", "width"), [(160, 160), (160, 400), (64, 24), (32, 128), (3, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantised_is_code_by_scale(rows, width, dtype):
    """On whatever processor this is."""
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4")
    state.dtype = dtype
    codes = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], dim=1).reshape(-1).int()
    scales = state.absmax.repeat_interleave(state.blocksize)[: rows * width]
    expected = (state.code[codes] * scales).reshape(rows, width).to(dtype)
    assert torch.equal(bnb.functional.dequantize_4bit(packed, state), expected)
