"""What a recipe asks before it imports what takes seconds: may it push, and is there a dataset?"""

from vlmcap.data.lookup import find_dataset
from vlmcap.training.arguments import MeasuredFields, SplitArguments
from vlmcap.upload import check_push_rights


def check_early(settings: MeasuredFields, data_args: SplitArguments) -> None:
    """Needs no torch.

    Raises:
        PushError: with `push_to_hub`, the Hub's token may not push to `hub_model_id`.
        DatasetError: there is no such folder and no such dataset on the Hub.
    """
    if settings.push_to_hub:
        check_push_rights(settings.hub_model_id)
    find_dataset(data_args.dataset, data_args.dataset_revision)
