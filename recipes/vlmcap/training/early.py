"""What a recipe asks before it imports what takes seconds: is there a dataset, and what it will need at its end?"""

from pathlib import Path

from vlmcap.data.lookup import find_dataset
from vlmcap.errors import UserError, notice
from vlmcap.evaluation.external import ScorerUnavailable, check_local_spice, check_meteor
from vlmcap.evaluation.tokenise import tokenizer_signature
from vlmcap.files import check_writable
from vlmcap.training.arguments import MeasuredFields, SplitArguments
from vlmcap.upload import check_push_rights


def check_early(settings: MeasuredFields, data_args: SplitArguments) -> None:
    """Needs no torch. Says whether METEOR will be left out.

    Raises:
        PushError: with `push_to_hub`, the Hub's token may not push to `hub_model_id`, or what is there is public.
        DatasetError: there is no such folder and no such dataset on the Hub.
        TokenizerError: there is no such tokenizer for the scores.
        UserError: `spice_dir` holds no SPICE, or there is no Java for it.
        OSError: a folder that the run writes into cannot be written.
    """
    if settings.push_to_hub:
        check_push_rights(settings.hub_model_id)
    find_dataset(data_args.dataset, data_args.dataset_revision)
    tokenizer_signature(data_args.tokenizer)
    settings_of_some = vars(data_args)
    if settings_of_some.get("spice_dir"):
        try:
            check_local_spice(data_args.spice_dir)
        except ScorerUnavailable as error:
            raise UserError(f"spice_dir {data_args.spice_dir}: {error}") from error
    for folder in (settings.output_dir, settings_of_some.get("base_dir")):
        if folder:
            check_writable(Path(folder))
    try:
        check_meteor()
    except ScorerUnavailable as error:
        notice(f"METEOR will be left out: {error}")
