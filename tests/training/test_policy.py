"""Log-probabilities of captions: torch's own and their gradients, sums a caption, the weights of the start."""

import pytest
import torch

from tests.invariants import tiny
from vlmcap.training import loss
from vlmcap.training.policy import StartWeights, caption_log_probs, caption_sums, token_log_probs
from vlmcap.training.shared_prefix import PREFIX


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 33, 10**6])
def test_values_and_gradient_with_shared_rows(monkeypatch, temperature, chunk):
    """Rows that predict several labels, or none; in chunks of any size."""
    monkeypatch.setattr(loss, "CHUNK_NUMBERS", chunk)
    torch.manual_seed(0)
    logits = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    sources, labels = torch.tensor([0, 0, 0, 2, 3, 4]), torch.tensor([1, 1, 7, -100, 0, 10])
    found = token_log_probs(logits, sources, labels, temperature)
    expected = (logits / temperature).log_softmax(1)[sources, labels.clamp(min=0)] * (labels != -100)
    torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(lambda z: token_log_probs(z, sources, labels, temperature), logits)


def test_half_precision_logits_are_summed_in_float32():
    torch.manual_seed(0)
    logits = (torch.randn(6, 5000) * 4).half().requires_grad_()
    sources, labels = torch.arange(6), torch.randint(0, 5000, (6,))
    found = token_log_probs(logits, sources, labels)
    assert found.dtype == torch.float32
    exact = logits.detach().float().log_softmax(1)[sources, labels]
    torch.testing.assert_close(found.detach(), exact, rtol=1e-6, atol=1e-6)
    found.sum().backward()
    assert logits.grad.dtype == torch.float16


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    tiny.write_pictures(folder)
    return tiny.read_pictures(folder)


def test_captions_that_share_an_image_and_the_weights_of_the_start(tmp_path, rows):
    """Each caption has the log-probability that it has alone; changed weights give others, the start's the first."""
    trainer = tiny.build_trainer(tmp_path, rows)
    examples, collator = trainer.train_dataset, trainer.data_collator
    model, start = trainer.model.eval(), StartWeights(trainer.model)
    batch = collator([examples[index] for index in range(4)])
    counts = [len(captions) for captions in examples["captions"][:4]]
    with torch.no_grad():
        log_probs = caption_log_probs(model, batch, "sdpa", 0.9)
        sums = caption_sums(log_probs, batch, max(counts))
        lengths = caption_sums((batch["labels"][:, batch["caption_start"] :] != -100).float(), batch, max(counts))
        for row, captions in enumerate(examples["captions"][:4]):
            for number, caption in enumerate(captions):
                alone = collator([{"row": row, "captions": [caption]}])
                expected = caption_log_probs(model, alone, "sdpa", 0.9)
                torch.testing.assert_close(sums[row, number], expected.sum(), rtol=1e-5, atol=1e-5)
                assert lengths[row, number] == (alone["segments"] > PREFIX).sum()
            assert not sums[row, len(captions) :].any()
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05)
        changed = caption_log_probs(model, batch, "sdpa", 0.9)
        with start.used_by(model):
            assert torch.equal(caption_log_probs(model, batch, "sdpa", 0.9), log_probs)
        assert torch.equal(caption_log_probs(model, batch, "sdpa", 0.9), changed)
        assert not torch.allclose(changed, log_probs, atol=1e-3)
