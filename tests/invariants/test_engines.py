"""The shared-prefix engine computes what one caption at a time computes: losses and every trainable gradient."""

import pickle

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.nn.attention.flex_attention import create_mask
from torch.utils._python_dispatch import TorchDispatchMode

from tests.invariants.tiny import FAMILY, PROMPT, assert_same_step, build_model, build_processor, loss_and_gradients
from vlmcap.models.load import ModelError, chat_prompt, load_model, load_processor
from vlmcap.training.collator import BadImages, caption_examples
from vlmcap.training.shared_prefix import (
    LAYOUT,
    PADDING,
    PREFIX,
    SharedPrefixCollator,
    attention_mask,
    branch_mask,
    supports,
)

ALL = {"captions_per_image": 7}  # as many as an image has: one example an image


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("architecture", FAMILY)
def test_shared_prefix_is_one_at_a_time(trainer_of, architecture, smoothing):
    """Images of several sizes, ragged captions: prefixes padded on the left, captions on the right."""
    settings = ALL | {"label_smoothing_factor": smoothing}
    shared = loss_and_gradients(trainer_of(architecture, **settings))
    single = loss_and_gradients(trainer_of(architecture, shared_prefix=False, **settings))
    assert_same_step(shared, single)


@pytest.mark.parametrize("architecture", FAMILY)
def test_shared_prefix_is_the_stock_trainer(trainer_of, stock_trainer_of, architecture):
    shared = loss_and_gradients(trainer_of(architecture, **ALL))
    assert_same_step(shared, loss_and_gradients(stock_trainer_of(architecture)))


def test_without_smoothing_it_is_the_stock_trainer_too(trainer_of, stock_trainer_of):
    """TRL takes another path without smoothing: the loss that transformers computes from chunked logits."""
    shared = loss_and_gradients(trainer_of(label_smoothing_factor=0.0, **ALL))
    assert_same_step(shared, loss_and_gradients(stock_trainer_of(label_smoothing_factor=0.0)))


@pytest.mark.parametrize("architecture", FAMILY)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_captions_a_prefix(trainer_of, architecture, count):
    """Groups of 1, 2 or 3 captions, the last of an image smaller: 23 captions in 23, 14 or 10 examples."""
    grouped = trainer_of(architecture, captions_per_image=count, per_device_train_batch_size=23)
    assert len(grouped.train_dataset) == {1: 23, 2: 14, 3: 10}[count]
    assert_same_step(loss_and_gradients(grouped), loss_and_gradients(trainer_of(architecture, **ALL)))


@pytest.mark.parametrize("architecture", FAMILY)
def test_ragged_is_padded(trainer_of, architecture):
    """A batch of images with unequal prefixes and captions, all padded, against every image alone, without padding."""
    batch = loss_and_gradients(trainer_of(architecture, **ALL))
    alone = trainer_of(architecture, per_device_train_batch_size=1, gradient_accumulation_steps=6, **ALL)
    for example in alone.get_train_dataloader():
        assert (example["segments"] != PADDING).all()
    assert_same_step(loss_and_gradients(alone), batch)


@pytest.mark.parametrize("shared_prefix", [True, False])
@pytest.mark.parametrize("architecture", FAMILY)
def test_accumulated_is_batched(trainer_of, stock_trainer_of, architecture, shared_prefix):
    """Micro-batches of 4 and 2 images, with unequal numbers of caption tokens, against one batch of 6."""
    settings = ALL | {"shared_prefix": shared_prefix}
    accumulated = trainer_of(architecture, per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings)
    accumulated = loss_and_gradients(accumulated)
    assert_same_step(accumulated, loss_and_gradients(trainer_of(architecture, **settings)))
    assert_same_step(accumulated, loss_and_gradients(stock_trainer_of(architecture)))


@pytest.mark.parametrize("architecture", FAMILY)
def test_checkpointing_on_is_off(trainer_of, stock_trainer_of, architecture):
    on = loss_and_gradients(trainer_of(architecture, gradient_checkpointing=True, **ALL))
    assert_same_step(on, loss_and_gradients(trainer_of(architecture, **ALL)))
    assert_same_step(on, loss_and_gradients(stock_trainer_of(architecture, gradient_checkpointing=True)))


@pytest.mark.parametrize("architecture", FAMILY)
def test_eager_attention_is_sdpa(trainer_of, architecture):
    eager = loss_and_gradients(trainer_of(architecture, attention="eager", **ALL))
    assert_same_step(eager, loss_and_gradients(trainer_of(architecture, **ALL)))


@pytest.mark.usefixtures("compiler")
def test_flex_attention_is_sdpa(miniature_dir, rows, tmp_path):
    """Forward only: the kernel has no backward on a CPU."""
    logits = []
    for attention in ("sdpa", "flex_attention"):
        model = load_model(str(miniature_dir), load_in_4bit=False, attn_implementation=attention).eval()
        assert supports(model) and model.model.visual.config._attn_implementation == "sdpa"
        bad_images = BadImages(tmp_path / "bad_images.jsonl", limit=0)
        collate = SharedPrefixCollator(rows, load_processor(str(miniature_dir)), PROMPT, bad_images, model)
        batch = collate([{"row": row, "captions": rows[row]["captions"]} for row in range(len(rows))])
        segments = batch["segments"]
        inputs = {key: value for key, value in batch.items() if key not in LAYOUT}
        with torch.no_grad():
            output = model(**inputs, attention_mask=attention_mask(segments, attention))
        logits.append(output.logits[segments != PADDING])
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_block_mask_is_the_dense_mask(trainer_of):
    """What FlexAttention is given on a GPU, written out. The kernel itself has no backward on a CPU."""
    segments = next(iter(trainer_of(**ALL).get_train_dataloader()))["segments"]
    rows, length = segments.shape
    block_mask = attention_mask(segments, "flex_attention")
    written_out = create_mask(block_mask.mask_mod, rows, 1, length, length, device="cpu")
    assert torch.equal(written_out, branch_mask(segments))
    assert block_mask.shape == (rows, 1, length, length)


def test_a_caption_sees_its_image_and_itself(trainer_of):
    segments = next(iter(trainer_of(**ALL).get_train_dataloader()))["segments"]
    mask = branch_mask(segments)[:, 0]
    assert (segments == PADDING).any() and segments.max() == 8
    for row, query, key in mask.nonzero().tolist():
        assert key <= query
        if query != key:
            assert segments[row, key] in (PREFIX, segments[row, query]) and segments[row, key] != PADDING
    assert mask.any(2).all()  # no row of nothing, which would have no softmax


def test_changing_a_caption_leaves_its_siblings_alone(trainer_of):
    """Directly: no number of a caption depends on another caption of the same image."""
    trainer = trainer_of(**ALL)
    batch = next(iter(trainer.get_train_dataloader()))
    segments, start = batch["segments"], batch["caption_start"]
    inputs = {key: value for key, value in batch.items() if key not in LAYOUT}
    inputs["attention_mask"] = branch_mask(segments)
    other = inputs | {"input_ids": inputs["input_ids"].clone()}
    row = int((segments == 3).any(1).nonzero()[0])
    other["input_ids"][row, segments[row] == 2] += 1
    with torch.no_grad():
        before, after = (trainer.model(**i).logits[row, start:] for i in (inputs, other))
    assert torch.equal(before[segments[row, start:] == 3], after[segments[row, start:] == 3])
    assert not torch.equal(before[segments[row, start:] == 2], after[segments[row, start:] == 2])


class WidestTensor(TorchDispatchMode):
    """The most rows of vocabulary width that any operation made."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.rows = width, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.shape[-1] == self.width:
                self.rows = max(self.rows, tensor.numel() // self.width)
        return out


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logits_of_caption_positions_alone(trainer_of, smoothing):
    """Forward and backward, no tensor has a row of logits for an image or prompt position."""
    trainer = trainer_of(label_smoothing_factor=smoothing, **ALL)
    batch = next(iter(trainer.get_train_dataloader()))
    captions, predicting = batch["labels"][:, batch["caption_start"] :], batch["logit_columns"]
    assert len(predicting) <= captions.shape[1] < batch["labels"].shape[1]
    with WidestTensor(trainer.model.config.get_text_config().vocab_size) as widest:
        trainer.training_step(trainer.model, batch, 100)
    assert widest.rows == len(captions) * len(predicting)


def count_passes(module: torch.nn.Module) -> dict[str, int]:
    """Counts forwards, and backwards through the output, of a module from now on."""
    counts = {"forward": 0, "backward": 0}
    forward = module.forward

    def counted(*args, **kwargs):
        counts["forward"] += 1
        out = forward(*args, **kwargs)
        if out.requires_grad:
            out.register_hook(lambda grad: counts.__setitem__("backward", counts["backward"] + 1))
        return out

    module.forward = counted
    return counts


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", FAMILY)
def test_frozen_tower_is_free(trainer_of, architecture, checkpointing):
    """A whole `train()` of one step: every ViT block runs forward once and backward never, also when the language
    layers, which do run backward, are checkpointed. The projectors get gradients."""
    trainer = trainer_of(architecture, gradient_checkpointing=checkpointing, **ALL)
    model = trainer.model.get_base_model().model
    blocks = [count_passes(block.mlp) for block in model.visual.blocks]
    layers = [count_passes(layer.mlp) for layer in model.language_model.layers]
    trainer.train()
    assert blocks == [{"forward": 1, "backward": 0}] * 3
    assert layers == [{"forward": 2 if checkpointing else 1, "backward": 1}] * 4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_projector_frees_the_layers_below_lora(trainer_of, checkpointing):
    trainer = trainer_of(train_projector=False, gradient_checkpointing=checkpointing, **ALL)
    layers = [count_passes(layer.mlp) for layer in trainer.model.get_base_model().model.language_model.layers]
    trainer.train()
    assert layers[:2] == [{"forward": 1, "backward": 0}] * 2
    assert layers[2:] == [{"forward": 2 if checkpointing else 1, "backward": 1}] * 2


@pytest.mark.parametrize("architecture", FAMILY)
def test_every_projector_trains(trainer_of, architecture):
    trained = {
        n for n, p in trainer_of(architecture).model.named_parameters() if p.requires_grad and ".lora_" not in n
    }
    inside = {name.split(".modules_to_save")[0].split("visual.")[1] for name in trained}
    deepstack = {"deepstack_merger_list.0", "deepstack_merger_list.1"} if architecture == "qwen3_vl" else set()
    assert inside == {"merger"} | deepstack


def test_flash_attention_is_refused_with_the_fix():
    model = build_model("qwen2_vl")
    model.config.get_text_config()._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ModelError, match="attn_implementation=flash_attention_2 takes no mask.*choose sdpa"):
        supports(model)


def test_collator_travels_to_workers_without_the_model(trainer_of):
    """Python 3.14 starts workers by pickling what they need: positions come along, weights do not."""
    trainer = trainer_of(**ALL)
    pickled = pickle.dumps(trainer.data_collator.get_rope_index)
    assert len(pickled) < 50_000
    settings = {"dataloader_num_workers": 2, **ALL}
    fresh = trainer_of(**settings).get_train_dataloader()
    for ours, theirs in zip(fresh, trainer.get_train_dataloader(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours if key != "caption_start")


def test_same_tokens_as_the_processor_writes(trainer_of, rows):
    """The prefix is tokenised without the processor, which would need the picture; it writes the same."""
    for architecture in FAMILY:
        trainer, processor = trainer_of(architecture, **ALL), build_processor(architecture)
        example = {"row": 3, "captions": rows[3]["captions"]}
        batch = trainer.data_collator([example])
        image = Image.open(rows[3]["image"]["path"]).convert("RGB")
        inputs = processor(images=[[image]], text=[chat_prompt(processor, PROMPT)], return_tensors="pt")
        assert torch.equal(batch["input_ids"][:, : batch["caption_start"]], inputs["input_ids"])
        assert torch.equal(batch["pixel_values"], inputs["pixel_values"])
        captions = [
            processor.decode(batch["input_ids"][0, batch["segments"][0] == 2 + n])
            for n in range(len(rows[3]["captions"]))
        ]
        assert captions == [caption + "<|im_end|>\n" for caption in rows[3]["captions"]]


def test_examples_keep_every_caption(rows):
    for count in (1, 2, 5, 9):
        examples = caption_examples(rows, count)
        assert isinstance(examples, Dataset) and max(map(len, examples["captions"])) == min(count, 7)
        assert sorted(c for e in examples["captions"] for c in e) == sorted(c for r in rows["captions"] for c in r)
    with pytest.raises(ValueError, match="captions_per_image=0: choose 1 or more"):
        caption_examples(rows, 0)
