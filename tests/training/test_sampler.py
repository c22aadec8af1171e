"""Batches of similar images, in an order that depends on seed and epoch alone."""

import datasets
import torch
from PIL import Image
from torch.utils.data import BatchSampler

from vlmcap.data.images import load_captions
from vlmcap.models.load import load_processor
from vlmcap.training.sampler import SimilarSizeSampler, count_image_tokens


def spread(sampler, sizes, batch_size):
    """Mean difference between the largest and the smallest of a batch."""
    batches = [[sizes[i] for i in batch] for batch in BatchSampler(sampler, batch_size, drop_last=False)]
    return sum(max(batch) - min(batch) for batch in batches) / len(batches)


def test_every_example_once_in_similar_batches():
    sizes = torch.randint(50, 400, (1003,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = SimilarSizeSampler(sizes, 4, seed=1)
    order = list(sampler)
    assert sorted(order) == list(range(1003)) and len(sampler) == 1003
    assert spread(sampler, sizes, 4) < 0.1 * spread(torch.randperm(1003).tolist(), sizes, 4)
    batches = list(BatchSampler(sampler, 4, drop_last=False))
    assert [len(batch) for batch in batches] == [4] * 250 + [3]
    heaviest = max(batches[:-1], key=lambda batch: sum(sizes[i] for i in batch))
    assert sum(sizes[i] for i in batches[0]) == sum(sizes[i] for i in heaviest)


def test_order_is_of_seed_and_epoch_alone():
    sizes = [3, 1, 2] * 40
    first, again, other = (SimilarSizeSampler(sizes, 4, seed) for seed in (7, 7, 8))
    torch.manual_seed(0)
    epochs = []
    for epoch in range(3):
        first.set_epoch(epoch)
        epochs.append(list(first))
    torch.manual_seed(99)
    again.set_epoch(2)
    assert list(again) == epochs[2] and epochs[0] != epochs[1] != epochs[2]
    assert list(other) != epochs[0]


def test_equal_sizes_are_shuffled():
    """Without sizes (other architectures) the order is a plain shuffle: batches are not runs of the dataset."""
    order = list(SimilarSizeSampler([0] * 400, 4, seed=0))
    assert sorted(order) == list(range(400))
    assert sum(b - a == 1 for a, b in zip(order, order[1:], strict=False)) < 10


def test_small_datasets():
    assert list(SimilarSizeSampler([5], 4, seed=0)) == [0]
    assert sorted(SimilarSizeSampler([5, 6, 7, 8], 4, seed=0)) == [0, 1, 2, 3]


def test_image_tokens_from_the_header(miniature_dir, tmp_path):
    processor = load_processor(str(miniature_dir), max_pixels=400 * 28 * 28)
    sizes = {"a.png": (640, 480), "b.jpg": (480, 640), "c.png": (1200, 900), "d.png": (84, 84)}
    for name, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / name)
    (tmp_path / "e.png").write_bytes(b"no picture")
    rows = [{"image_id": i, "file_name": n, "captions": ["x"]} for i, n in enumerate([*sizes, "e.png"])]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "data/train-00000-of-00001.parquet")
    rows = load_captions(str(tmp_path / "data"), "train", image_dir=str(tmp_path))
    tokens = count_image_tokens(rows, processor)
    assert tokens[:2] == [391, 391] and tokens[3:] == [9, 0]
    for row, count in zip(rows.select(range(4)), tokens, strict=False):
        with Image.open(row["image"]["path"]) as image:
            grid = processor.image_processor([image.convert("RGB")], return_tensors="pt")["image_grid_thw"]
        assert grid.prod() // 4 == count
