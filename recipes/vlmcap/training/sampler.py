"""The order of training examples: random, images of similar size in one batch, the same again after a restart."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import datasets
import torch
from accelerate import PartialState
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import ProcessorMixin

from vlmcap.data.images import BadImageError, image_size

SORTED_BATCHES = 50  # examples are sorted by size within so many batches at a time


def count_image_tokens(rows: datasets.Dataset, processor: ProcessorMixin) -> list[int]:
    """Image tokens that each row's picture will take, from its header alone; 0 if that cannot be read.

    Args:
        rows: as `load_captions` returns them.
        processor: with an image processor of the Qwen2-VL family.
    """
    cells = rows.select_columns(["image", "image_id", "file_name"])

    def count(row: int) -> int:
        try:
            width, height = image_size(cells[row])
            patches = processor.image_processor.get_number_of_image_patches(height, width)
        except BadImageError:
            return 0
        return patches // processor.image_processor.merge_size**2

    main = PartialState().is_main_process
    with ThreadPoolExecutor(8) as pool:
        counts = pool.map(count, range(len(rows)))
        return list(tqdm(counts, total=len(rows), desc="sizes of training pictures", disable=not main))


class SimilarSizeSampler(Sampler[int]):
    """Yields every example once an epoch so that consecutive `batch_size` of them have similar sizes.

    All examples are shuffled; each `SORTED_BATCHES` batches of them are sorted by size and cut; the batches are
    shuffled. The order depends on seed and epoch alone, so that a continued run keeps it, and every process of
    a distributed run has the same. The batch of the largest examples comes first: what does not fit fails at once.

    Args:
        sizes: of the examples, in any unit.
        batch_size: of one process.
        seed: of the order.
    """

    def __init__(self, sizes: list[int], batch_size: int, seed: int):
        self.sizes, self.batch_size, self.seed, self.epoch = torch.tensor(sizes), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.sizes), generator=generator)
        batches = []
        for chunk in order.split(SORTED_BATCHES * self.batch_size):
            chunk = chunk[self.sizes[chunk].argsort(stable=True)]
            batches += chunk.split(self.batch_size)
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []  # only the end may be short
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
        if batches:
            largest = max(range(len(batches)), key=lambda i: self.sizes[batches[i]].sum())
            batches[0], batches[largest] = batches[largest], batches[0]
        yield from torch.cat(batches + last).tolist()
