"""Whether there is such a dataset, before anything heavy is imported."""

from pathlib import Path

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from vlmcap.data.errors import DataError


def find_dataset(dataset: str, revision: str | None = None) -> str | None:
    """The commit of a dataset on the Hub; None for a folder.

    Raises:
        DataError: it is a file; or there is no such folder and no such dataset on the Hub.
    """
    if Path(dataset).is_file():
        raise a_file(dataset)
    if Path(dataset).exists():
        return None
    try:
        return HfApi().dataset_info(dataset, revision=revision).sha
    except (httpx2.HTTPError, OSError, HFValidationError) as error:
        raise no_such_dataset(dataset, error) from error


def a_file(dataset: str) -> DataError:
    """Says that a file is not a dataset, and how to build one of it."""
    return DataError(
        f"{dataset} is a file, and a dataset is a folder or an id on the Hub. Build it with: python"
        f" scripts/publish_datasets.py own --annotations {dataset} --language ja --output_dir data/own"
    )


def no_such_dataset(dataset: str, error: Exception) -> DataError:
    """Says that there is no such dataset, why, and how to build one."""
    return DataError(
        f"{dataset} is not a folder, and the Hub does not have it as a dataset ({str(error).splitlines()[0]})."
        " Build it with: python scripts/publish_datasets.py --source stair --tokenizer"
        f" Qwen/Qwen2-VL-2B-Instruct --output_dir {dataset}"
    )
