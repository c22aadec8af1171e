"""What may be loaded: weights from safetensors alone, and adapters that fit their base.

A pickle can run any program when it is loaded, so none is. An adapter is two files of a stranger: its configuration is
taken apart key by key, and the header of its weights is compared with what PEFT expects on the base model, which is
built for that without memory (device "meta"). No weight is read before.
"""

import copy
import itertools
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import bitsandbytes as bnb
import torch
from httpx2 import HTTPError
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import cached_file, find_adapter_config_file

from vlmcap.errors import UserError
from vlmcap.models.nf4 import keep_as_quantised
from vlmcap.strict_parsing import parse_json, shown

COMMIT = re.compile(r"[0-9a-f]{40}")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERTER = "SFconvertbot"  # the account of the Hub's Space safetensors/convert
CARD_FILES = ("README.md", ".gitattributes")
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

MAX_CONFIG_BYTES = 2**20
MAX_ADAPTER_BYTES = 8 * 2**30  # rank 512 on every layer of a 7B model is 5 GiB in float32
MAX_RANK = 512
MAX_NAMES = 1024
DTYPES = ("F32", "F16", "BF16")
DESCRIPTIVE = {"peft_type", "peft_version", "auto_mapping", "inference_mode", "megatron_core", "qalora_group_size"}


class ModelError(UserError):
    """The model is not what the configuration asks for. The message names the value and the fix."""


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turns what transformers raises about a repository or folder into a ModelError that says what to do."""
    try:
        yield
    except ModelError:
        raise
    except (OSError, HTTPError) as error:
        if "file named" in str(error) and "safetensors" in str(error):  # a failed download's address may say it too
            raise ModelError(only_pickles(name)) from error
        raise ModelError(
            f"{name} cannot be loaded: {_first_line(error)} A gated model: accept its licence at"
            f" https://huggingface.co/{name} and log in with `hf auth login`."
        ) from error
    except (ValueError, KeyError, ImportError, SafetensorError) as error:
        if "trust_remote_code" not in str(error):
            raise ModelError(f"{name} cannot be loaded ({type(error).__name__}): {_first_line(error)}") from error
        raise ModelError(
            f"{name} needs code of its own repository, which is not run: read it, then give --trust_remote_code and"
            " --model_revision with the commit that you read"
        ) from error


def only_pickles(name: str) -> str:
    """The message about a repository or folder without safetensors."""
    return (
        f"{name} has no weights in safetensors, and others are not loaded: a pickle (.bin, .pt) can run any program."
        f" https://huggingface.co/spaces/safetensors/convert lets {CONVERTER} open a pull request with a conversion,"
        " which the same command then finds. Or, if you trust the file, load it once with `use_safetensors=False`"
        " where it can do no harm, call `save_pretrained(FOLDER)`, and give FOLDER instead."
    )


def find_conversion(name: str, commit: str) -> str | None:
    """The commit of an open pull request in which the Hub's own bot adds safetensors to a model of pickles alone.

    It must add nothing else and keep all other files as they are at `commit`, except for the card: what is loaded is
    the published model.

    Args:
        name: of a model on the Hub.
        commit: the revision that has pickles alone.
    """
    api = HfApi()

    def files(revision: str) -> tuple[str, dict[str, str]]:
        info = api.model_info(name, revision=revision, files_metadata=True)
        return info.sha, {file.rfilename: file.blob_id for file in info.siblings if file.rfilename not in CARD_FILES}

    try:
        _, published = files(commit)
        requests = api.get_repo_discussions(
            name, author=CONVERTER, discussion_type="pull_request", discussion_status="open"
        )
        for request in requests:
            if not request.is_pull_request or (request.author, request.status) != (CONVERTER, "open"):
                continue
            converted, offered = files(request.git_reference)
            added = offered.keys() - published.keys()
            weights = all(file.endswith((".safetensors", ".safetensors.index.json")) for file in added)
            if added and weights and published.items() <= offered.items():
                return converted
    except HfHubHTTPError as error:
        if error.response.status_code not in (403, 404):  # discussions that the owner has closed
            raise
    return None


@contextmanager
def without_conversion() -> Iterator[None]:
    """Keeps transformers from loading conversions of pickles; `find_conversion` looks for them.

    For a repository's main branch it would ask a Space on the Hub, and take the answer from a pull request whose
    author it does not always look at (transformers 5.23, safetensors_conversion.py). Only this variable turns it off.
    """
    before = os.environ.get("DISABLE_SAFETENSORS_CONVERSION")
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    try:
        yield
    finally:
        del os.environ["DISABLE_SAFETENSORS_CONVERSION"]
        if before is not None:
            os.environ["DISABLE_SAFETENSORS_CONVERSION"] = before


def load_weights(kind: type, name: str, revision: str | None, *args, new: str = "", **options) -> PreTrainedModel:
    """`kind.from_pretrained` from safetensors alone, with a weight of its shape for every parameter.

    By default, transformers takes pickles where an index of safetensors names them, puts an adapter on the model
    when there is an `adapter_config.json`, loading another base and perhaps pickles for it, and draws weights that are
    missing at random. Tied weights do not count as missing; weights without a use are in transformers' own report.

    Args:
        kind: a model class, or an Auto class.
        args: positional arguments of its `from_pretrained` after the name.
        new: what marks the names of weights that are new, and so in no checkpoint.

    Raises:
        ModelError: there is no such model, its weights are no safetensors, not whole, of other shapes or stored in
            other bits than asked for, or it is an adapter.
    """
    with loading(name):
        refuse_adapter(name, revision)
        check_index(name, revision)
        check_stored_bits(name, revision, options.get("quantization_config") is not None)
        with without_conversion():
            model, report = kind.from_pretrained(
                name,
                *args,
                revision=revision,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # else a traceback that names no weight
                **options,
            )
    check_report(report, name, model, new)
    keep_as_quantised(model)
    return model


def refuse_adapter(name: str, revision: str | None) -> None:
    """Raises ModelError where an adapter is given as the model."""
    if find_adapter_config_file(name, revision=revision):
        raise ModelError(
            f"{name} is an adapter (it has an {ADAPTER_CONFIG}): give its base as the model, and it as --adapter, an"
            " option of sft_qwen2vl_jp.py and infer_baseline.py"
        )


def check_stored_bits(name: str, revision: str | None, load_in_4bit: bool) -> None:
    """Raises ModelError where the weights are stored in 4 bits and not asked for in 4 bits, or are asked for in 4 bits
    and stored quantised in another way."""
    stored = PreTrainedConfig.get_config_dict(name, revision=revision)[0].get("quantization_config")
    if not isinstance(stored, dict):
        return
    if stored.get("load_in_4bit") and not load_in_4bit:
        raise ModelError(
            f"{name} is stored in 4 bits already: set load_in_4bit: true, or give the model that it was made from"
        )
    if load_in_4bit and not stored.get("load_in_4bit"):
        raise ModelError(
            f"{name} is stored quantised already ({shown(stored.get('quant_method'))}), and not as load_in_4bit does:"
            " give the model that it was made from"
        )


def check_report(report: dict, name: str, model: PreTrainedModel, new: str = "") -> None:
    """No weight is missing and none has another shape, by the `output_loading_info` of `from_pretrained`.

    Args:
        new: what marks the names of weights that are new, and so in no checkpoint.

    Raises:
        ModelError: naming the first five weights.
    """
    missing = {key for key in report["missing_keys"] if not new or new not in key}
    shapes = {key for key, *_ in report["mismatched_keys"]}
    for key, module in model.named_modules():  # transformers 5.23 compares no shape that it quantises
        state = getattr(module.weight, "quant_state", None) if isinstance(module, bnb.nn.Linear4bit) else None
        if state is not None and state.shape != (module.out_features, module.in_features):
            shapes.add(f"{key}.weight")
    for problem, keys in (("has no weights for", missing), ("has other shapes for", shapes)):
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            raise ModelError(f"{name} {problem} {', '.join(sorted(keys)[:5])}{more} of a {type(model).__name__}")


def check_index(name: str, revision: str | None) -> None:
    """An index of sharded weights names files beside it, safetensors alone; else ModelError."""
    if PreTrainedConfig.get_config_dict(name, revision=revision)[0].get("transformers_weights"):
        raise ModelError(f"config.json of {name} names other weights (transformers_weights): they belong into {INDEX}")
    path = cached_file(name, INDEX, revision=revision, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return
    shards = _read_json(Path(path), f"{INDEX} of {name}").get("weight_map")
    if not isinstance(shards, dict):
        raise ModelError(f"{INDEX} of {name} has no weight_map")
    for key, shard in shards.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            raise ModelError(
                f"{INDEX} of {name}: {key} is in {shown(shard)}, but must be in a .safetensors file beside it"
            )


@dataclass(frozen=True)
class Adapter:
    """What is known of an adapter before its weights are read.

    Attributes:
        name: as it was asked for.
        revision: the commit on the Hub; None for a folder.
        folder: where its configuration and its weights are.
        config: made of those keys that are understood.
        tensors: name -> shape, from the header.
    """

    name: str
    revision: str | None
    folder: Path
    config: LoraConfig
    tensors: dict[str, tuple[int, ...]]


def read_adapter(name: str, revision: str | None = None) -> Adapter:
    """An adapter's configuration and the header of its weights, from a folder or from the Hub.

    Raises:
        ModelError: there is no such adapter, its weights are a pickle, malformed or too large, or its configuration
            asks for what is not accepted; the message names file and key.
    """
    if Path(name).exists():
        folder, files, commit = Path(name), {p.name: p.stat().st_size for p in Path(name).glob("*")}, None
    else:
        folder, files, commit = None, *_list_files(name, revision)
    if files is not None:
        for file, limit in ((ADAPTER_CONFIG, MAX_CONFIG_BYTES), (ADAPTER_WEIGHTS, MAX_ADAPTER_BYTES)):
            if file not in files and file == ADAPTER_WEIGHTS and any(f.endswith(PICKLES) for f in files):
                raise ModelError(only_pickles(name))
            if file not in files:
                raise ModelError(f"{name} is not an adapter: it has no {file}")
            if (files[file] or 0) > limit:
                raise ModelError(f"{file} of {name} has {files[file]:,} bytes; at most {limit:,} are read")
    paths = {}
    for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):  # nothing of the weights comes before the configuration is read
        with loading(name):
            paths[file] = folder / file if folder else Path(hf_hub_download(name, file, revision=commit))
        if file == ADAPTER_CONFIG:
            config = read_lora_config(paths[file], name)
    return Adapter(name, commit, paths[ADAPTER_CONFIG].parent, config, read_header(paths[ADAPTER_WEIGHTS], name))


def _list_files(name: str, revision: str | None) -> tuple[dict[str, int] | None, str | None]:
    """Sizes of the files of a repository and its commit; None and the revision as it is without a network."""
    with hub_errors(name, revision, "an adapter"):
        try:
            info = HfApi().model_info(name, revision=revision, files_metadata=True)
        except OfflineModeIsEnabled:
            return None, revision
    return {file.rfilename: file.size for file in info.siblings}, info.sha


@contextmanager
def hub_errors(name: str, revision: str | None, what: str) -> Iterator[None]:
    """Turns what asking the Hub about a repository raises into a ModelError: not there, or not to be reached."""
    try:
        yield
    except OfflineModeIsEnabled:
        raise
    except (HTTPError, OSError, HFValidationError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, HFValidationError | RepositoryNotFoundError) or (
            status and status != 429 and status < 500
        ):
            raise ModelError(
                f"{name} is not a folder, and the Hub does not have it as {what}, or not at revision {revision}, or"
                f" not for you ({_first_line(error)})"
            ) from error
        raise ModelError(
            f"{name} is not a folder, and {constants.ENDPOINT} could not be asked for it ({_first_line(error)}): try"
            " again later, or give a local folder; what is in the cache is found with HF_HUB_OFFLINE=1"
        ) from error


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*$")]
Names = Annotated[list[Name], Field(max_length=MAX_NAMES)]
# A regular expression of a stranger can take exponential time. These are alternatives of a name with .* at its ends.
SIMPLE = r"(\.\*)?[A-Za-z0-9_-]+(\\?\.[A-Za-z0-9_-]+)*(\\?\.\.\*)?"
SimplePattern = Annotated[str, Field(pattern=rf"^{SIMPLE}(\|{SIMPLE})*$", max_length=1000)]
Rank = Annotated[int, Field(ge=1, le=MAX_RANK)]
Scale = Annotated[float, Field(ge=0, lt=1e6)]
Whole = Annotated[int, Field(ge=0, le=2**31)]


class LoraKeys(BaseModel):
    """The keys of adapter_config.json that are understood; a description says what a value must be."""

    model_config = ConfigDict(strict=True, extra="forbid")

    r: Rank = Field(description=f"a whole number from 1 to {MAX_RANK}")
    target_modules: Names = Field(min_length=1, description="a list of names, no regular expression")
    base_model_name_or_path: str = Field(description="a text")
    revision: str = Field("", description="a text")
    lora_alpha: Scale = Field(0, description="a number")
    lora_dropout: float = Field(0, ge=0, le=1, description="a number from 0 to 1")
    use_rslora: bool = Field(False, description="true or false")
    exclude_modules: Names | SimplePattern = Field(
        [], description="a list of names, or names with .* at their ends joined by |"
    )
    modules_to_save: Names = Field([], description="a list of names")
    layers_to_transform: Whole | Annotated[list[Whole], Field(max_length=MAX_NAMES)] = Field(
        [], description="numbers of layers"
    )
    layers_pattern: Name | Names = Field([], description="names")
    rank_pattern: dict[Name, Rank] = Field({}, max_length=MAX_NAMES, description=f"names with ranks to {MAX_RANK}")
    alpha_pattern: dict[Name, Scale] = Field({}, max_length=MAX_NAMES, description="names with numbers")
    trainable_token_indices: list[Whole] | Annotated[dict[Name, list[Whole]], Field(max_length=MAX_NAMES)] = Field(
        [], description="numbers of rows, or names with those"
    )
    init_lora_weights: bool | Literal["gaussian"] = Field(True, description="true, false or gaussian")
    bias: Literal["none"] = Field("none", description="none")
    task_type: Literal["CAUSAL_LM"] = Field("CAUSAL_LM", description="CAUSAL_LM or null")


def read_lora_config(path: Path, name: str) -> LoraConfig:
    """The LoRA configuration of an adapter, built from the keys that are understood.

    Accepted are LoRA's rank, scale, dropout and rsLoRA; target, excluded and fully trained modules by name; layers by
    number; ranks and scales by name; trained rows of embeddings. Refused is what holds anything else: other kinds of
    adapter, DoRA, biases, layer replication, Megatron (PEFT would import a module that the file names), PiSSA and its
    like (PEFT would rewrite the base), regular expressions.

    Raises:
        ModelError: naming the key.
    """
    where = f"{ADAPTER_CONFIG} of {name}"
    found = _read_json(path, where)
    if found.get("peft_type") != "LORA":
        raise ModelError(f"{where}: peft_type is {shown(found.get('peft_type'))}, and only LORA is loaded")
    kept = {
        key: value
        for key, value in found.items()
        if key not in DESCRIPTIVE and value is not None and value is not False and value not in ("", {}, [])
    }
    try:
        LoraKeys.model_validate(kept)  # as it is: pydantic would make 16.0 of the scale 16
        return LoraConfig(**kept, inference_mode=True)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = problem["loc"][0]
        if problem["type"] == "extra_forbidden":
            raise ModelError(
                f"{where}: {key} is {shown(found[key])}, which is not supported: only LoRA without it is loaded"
            ) from error
        wanted = LoraKeys.model_fields[key].description
        if problem["type"] == "missing":
            raise ModelError(f"{where}: {key} is {shown(found.get(key))}, but must be {wanted}") from error
        raise ModelError(f"{where}: {key} must be {wanted}, but is {shown(found[key])}") from error
    except (ValueError, TypeError) as error:
        raise ModelError(f"{where}: {_first_line(error)}") from error


def read_header(path: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a safetensors file, whose header alone is read.

    The library checks that offsets are in the file, cover it and do not overlap.

    Raises:
        ModelError: the file is malformed, or a tensor is of a type other than float32, float16 and bfloat16.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118, it is not a dict
            dtypes = {key: piece.get_dtype() for key, piece in slices.items()}
            shapes = {key: tuple(piece.get_shape()) for key, piece in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path.name} of {name} is damaged or no safetensors file: {_first_line(error)}") from error
    for key, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise ModelError(f"{path.name} of {name}: {key} is {dtype}, and must be one of {', '.join(DTYPES)}")
    return shapes


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """A model without weights (device "meta"), with the modules of the one given before any quantisation."""
    config = copy.deepcopy(model.config)  # transformers 5.23 sets the attention in the config that it is given
    with torch.device("meta"):
        return type(model)._from_config(config, attn_implementation="eager")


def check_adapter(adapter: Adapter, base: PreTrainedModel, name: str, revision: str | None) -> None:
    """The adapter was trained on this model, and its tensors are those that PEFT expects there, in their shapes.

    Args:
        base: on device "meta"; adapted in place.
        name: Hub id or folder of the model. A folder may hold anything: then only the tensors are compared, and a
            warning says so when it has another name than the one the adapter was trained on.
        revision: commit of the model, None for a folder. It is compared when the adapter names one too.

    Raises:
        ModelError: naming the key of the configuration or the tensor.
    """
    where, config = f"adapter {adapter.name}", adapter.config
    stated = config.base_model_name_or_path
    if not Path(name).exists():
        if stated.lower() != name.lower():
            raise ModelError(f"{where} was trained on {stated}, and not on {name}: give that as the model")
        if (
            all(COMMIT.fullmatch(commit or "") for commit in (revision, config.revision))
            and revision != config.revision
        ):
            raise ModelError(
                f"{where} was trained on commit {config.revision} of {name}, and not on {revision}: give"
                f" --model_revision {config.revision}"
            )
    elif Path(stated).name != Path(name).name:
        warnings.warn(
            f"{where} was trained on {stated}; whether {name} is that model, its tensors' shapes alone can tell",
            stacklevel=2,
        )
    expected = expected_tensors(base, config, where)
    for key in sorted(expected.keys() - adapter.tensors.keys()):
        raise ModelError(f"{where} does not fit {name}: it has no tensor {key}")
    for key in sorted(adapter.tensors.keys() - expected.keys()):
        raise ModelError(f"{where} does not fit {name}: its tensor {key} belongs nowhere")
    for key, shape in expected.items():
        if adapter.tensors[key] != shape:
            raise ModelError(f"{where} does not fit {name}: {key} is {adapter.tensors[key]}, but {shape} is needed")


def expected_tensors(base: PreTrainedModel, config: LoraConfig, where: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what PEFT saves of an adapter with this configuration on this model."""
    layers = [layer for layer, _ in base.named_modules()]
    for key in ("target_modules", "modules_to_save"):
        for target in getattr(config, key) or []:
            if not any(layer == target or layer.endswith(f".{target}") for layer in layers):
                raise ModelError(f"{where}: {key} names {target}, which a {type(base).__name__} does not have")
    indices = config.trainable_token_indices or []
    rows = itertools.chain(*(indices.values() if isinstance(indices, dict) else [indices]))
    last, size = max(rows, default=-1), base.get_input_embeddings().num_embeddings
    if last >= size:  # on device "meta" no index is looked at
        raise ModelError(f"{where}: trainable_token_indices names row {last}, but a {type(base).__name__} has {size}")
    try:
        with torch.device("meta"):
            model = PeftModel(base, copy.deepcopy(config))
    except (ValueError, IndexError, AttributeError, TypeError, KeyError) as error:
        raise ModelError(f"{where} does not fit a {type(base).__name__}: {_first_line(error)}") from error
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {key: tuple(tensor.shape) for key, tensor in expected.items()}


def _read_json(path: Path, where: str) -> dict:
    try:
        document = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{where} cannot be read: {_first_line(error)}") from error
    if not isinstance(document, dict):
        raise ModelError(f"{where} must be a JSON object, but is {shown(document)}")
    return document


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
