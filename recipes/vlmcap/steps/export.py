"""An adapter and its base as one model that transformers loads alone: merged, compared with the adapter, pushed."""

import gc
import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from httpx2 import HTTPError
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError, RepositoryNotFoundError
from transformers import PreTrainedModel, ProcessorMixin

from vlmcap import provenance
from vlmcap.atomic_write import write_atomically
from vlmcap.captioning.arguments import BeamArguments, GenerationArguments
from vlmcap.captioning.generate import search_config
from vlmcap.captioning.predictions import weights_hash
from vlmcap.captioning.settings import settings_of, write_settings
from vlmcap.captioning.stream import caption_images
from vlmcap.data.images import load_captions, open_image
from vlmcap.data.picture_files import ENDINGS
from vlmcap.errors import UserError
from vlmcap.models.blip import load_blip_adapter
from vlmcap.models.load import load_adapter, load_model, load_processor, resolve_revision
from vlmcap.models.merge import SHARD, check_memory, merge
from vlmcap.models.weights import Adapter, ModelError, hub_errors, read_adapter
from vlmcap.reporting.card_facts import is_miniature, local_name, trained_keys
from vlmcap.reporting.cards import in_file, render_adapter_card
from vlmcap.steps.save import name_special_tokens
from vlmcap.strict_parsing import parse_json
from vlmcap.upload import FAILURES, PushError, check_push_rights, patiently, push_folder, reason

DTYPES = ("float16", "bfloat16", "float32")
MERGE = "merge.json"
METRICS, AUDIT = "adapter_metrics.json", "adapter_audit.json"
WEIGHTS = "model*.safetensors*"
LICENCE = ("license", "license_name", "license_link")
BLIP = "sft_blip_vi"
# Recipes whose results cannot be merged, or need not be.
REFUSED = {
    "sft_vit_gpt2_food": "it is a whole model already, which transformers loads alone: push it with"
    " scripts/push_adapter.py",
    "sft_vit_llama_food": "a ViT with a Llama is a class of this project (VitLlama), which transformers does not have:"
    " it could not load the merged model alone. Use the adapter, with vlmcap.models.vit_llama.load_vit_llama",
}


class ExportError(UserError):
    """The adapter cannot be merged, or the folder holds something else. The message names the fix."""


@dataclass(frozen=True)
class Source:
    """What is merged: an adapter, its documents, and its base at the commit that it was scored on."""

    adapter: Adapter
    metrics: dict
    audit: dict | None
    base: str
    revision: str | None

    @property
    def is_blip(self) -> bool:
        return self.metrics.get("recipe") == BLIP

    @property
    def quantised(self) -> bool:
        return self.metrics["model"]["quantization"] is not None

    @property
    def beams(self) -> BeamArguments:
        """The beam search of the measured run, without constraints, which no generation_config.json can hold."""
        decoding = self.metrics["decoding"]
        kept = {key: decoding[key] for key in ("num_beams", "max_new_tokens")}
        if self.metrics["prompt"] is None:
            return BeamArguments(**kept, no_repeat_ngram_size=decoding.get("no_repeat_ngram_size", 0))
        return GenerationArguments(**kept, prompt=self.metrics["prompt"])


def export_model(args) -> None:
    """Everything that scripts/export_model.py does; `args` are its ExportArguments.

    Raises:
        ExportError: the adapter is of a recipe that leaves none to merge; the folder holds something else.
        ModelError: as `read_adapter`, `check_memory` and `merge`.
        CardError: the adapter's metrics.json is not the document of an adapter scored beside its base.
        PushError: as `push_folder`, or the repository holds something else.
    """
    folder = Path(args.output_dir)
    if args.push_to_hub:
        check_push_rights(args.repo_id, "--repo_id", private=not args.public)
        check_repository(args.repo_id)
    source = read_source(args.adapter, args.adapter_revision, args.model)
    record = merge_record(source, args.dtype or source.metrics["model"]["dtype"])
    place, rows = pictures(args, source.metrics["dataset"]) if args.check_images else (None, [])
    there = read_export(folder, record)
    if there:
        record = there
        print(f"{folder} holds this export already: it is not merged again", flush=True)
    else:
        write_merged(source, record, folder)
    if rows:
        record["check"] = check = {"pictures": place} | compare_captions(source, record, folder, rows)
        print(f"{check['equal']} of {check['images']} captions of the merged model are the adapter's", flush=True)
    write_card(source, record, folder, args.repo_id)
    print(f"Merged model and model card: {folder}")
    if args.push_to_hub:
        given = {key: getattr(args, key) for key in ("adapter", "adapter_revision", "model", "output_dir", "dtype")}
        words = [word for key, value in given.items() if value for word in (f"--{key}", value)]
        print(f"Pushed to {push_export(folder, args.repo_id, not args.public, words)}")


def read_source(adapter: str, adapter_revision: str | None, model: str | None) -> Source:
    """The adapter with its metrics and audit, and its base: `model`, or the one that it names.

    Raises:
        ExportError: it is the result of a recipe in REFUSED.
        ModelError: as `read_adapter` and `check_adapter_of`; there is no metrics.json.
    """
    metrics = read_document(adapter, adapter_revision, "metrics.json")
    if metrics is None:
        raise ExportError(
            f"{adapter} has no metrics.json, which says whether its base was in NF4: give the folder that a recipe"
            " leaves, OUTPUT_DIR/adapter, or what was pushed from it"
        )
    with in_file(f"metrics.json of {adapter}"):
        if why := REFUSED.get(metrics.get("recipe")):
            raise ExportError(f"it cannot be merged: {why}")
        render_adapter_card(metrics)  # not after the merge, that no card can be printed from it
        if metrics["model"]["dtype"] not in DTYPES:
            raise ExportError(f"dtype is {metrics['model']['dtype']!r}, and must be one of {', '.join(DTYPES)}")
    found = read_adapter(adapter, adapter_revision)
    base = model or found.config.base_model_name_or_path
    revision = resolve_revision(base, metrics["model"]["revision"])
    return Source(found, metrics, read_document(adapter, found.revision, "audit.json"), base, revision)


def read_document(adapter: str, revision: str | None, name: str) -> dict | None:
    """A JSON document beside an adapter, None when there is none."""
    path = Path(adapter, name)
    if not Path(adapter).exists():
        try:
            with hub_errors(adapter, revision, "an adapter"):
                path = Path(hf_hub_download(adapter, name, revision=revision))
        except ModelError as error:
            if isinstance(error.__cause__, RemoteEntryNotFoundError):
                return None
            raise
    if not path.is_file():
        return None
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ExportError(f"{name} of {adapter} is not JSON: {error}") from error


def merge_record(source: Source, dtype: str) -> dict:
    """What merge.json holds, before the captions are compared."""
    adapter, folder = source.adapter, Path(source.adapter.name)
    return {
        "adapter": {
            "id": provenance.public_name(adapter.name),
            "revision": weights_hash(folder) if folder.exists() else adapter.revision,
        },
        "base": {"id": provenance.public_name(source.base), "revision": source.revision},
        "dtype": dtype,
        "quantization": source.metrics["model"]["quantization"],
        "licence": base_licence(source),
        "check": None,
        "versions": provenance.versions(),
        "commit": provenance.git_commit(),
        "created": provenance.now(),
    }


def base_licence(source: Source) -> dict[str, str]:
    """The licence in the metadata of the base's card, as a card's keys; of a miniature Apache-2.0; {} if unknown."""
    if is_miniature(source.metrics):
        return {"license": "apache-2.0"}
    path = Path(source.base, "README.md")
    if not Path(source.base).exists():
        try:
            path = Path(hf_hub_download(source.base, "README.md", revision=source.revision))
        except (HTTPError, OSError):  # no card, or no network
            return {}
    if not path.is_file():
        return {}
    data = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    return {key: data[key] for key in LICENCE if isinstance(data.get(key), str)}


def read_export(folder: Path, record: dict) -> dict | None:
    """The record of this very export in a folder; None when the folder is empty or is not there.

    Raises:
        ExportError: the folder holds something else.
    """
    if not folder.exists() or not any(folder.iterdir()):
        return None
    try:
        there = parse_json((folder / MERGE).read_bytes())
        same = all(there[key] == record[key] for key in ("adapter", "base", "dtype"))
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise ExportError(
            f"{folder} is not empty, and holds no export of {record['adapter']['id']} in {record['dtype']}: delete it,"
            " or choose another --output_dir"
        )
    return there


def write_merged(source: Source, record: dict, folder: Path) -> None:
    """Writes the merged model with its processor and records into `folder`, all of it or nothing.

    Raises:
        ModelError: it does not fit into memory; as `load_model` and `check_adapter`.
    """
    dtype = getattr(torch, record["dtype"])
    print(check_memory(source.base, source.revision, dtype), flush=True)
    if source.is_blip:
        model, processor = load_blip_adapter(source.adapter.name, source.adapter.revision)
        model = model.merge_and_unload().to(dtype)
    else:
        model = merge(source.adapter, source.base, source.revision, source.quantised, dtype)
        processor = load_processor(source.adapter.name, source.adapter.revision)
    model.generation_config = search_config(model, processor.tokenizer, source.beams)
    if source.is_blip:
        model.generation_config.no_repeat_ngram_size = source.beams.no_repeat_ngram_size
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new, max_shard_size=SHARD)
    processor.save_pretrained(new)
    name_special_tokens(new)
    if not source.is_blip:  # scripts/caption.py --model FOLDER needs no options then
        prompts = trained_keys(source.metrics) or None
        write_settings(new, settings_of("sft_qwen2vl_jp", model, processor, source.beams, prompts))
    metrics = {key: value for key, value in source.metrics.items() if key != "per_image"}  # larger than all the rest
    for name, document in ((METRICS, metrics), (AUDIT, source.audit), (MERGE, record)):
        if document:
            write_atomically(new / name, json.dumps(document, ensure_ascii=False, indent=2))
    if folder.exists():
        folder.rmdir()  # it is empty
    new.rename(folder)


def pictures(args, scored_on: dict) -> tuple[str, list[dict]]:
    """The pictures of the check, as rows that `open_image` reads, and what to call the place they are from.

    Args:
        scored_on: "dataset" of the adapter's metrics, which is taken when no other and no folder is given.

    Raises:
        ExportError: there is no picture in the folder.
        DataError: as `load_captions`.
    """
    if args.image_dir and not args.dataset:
        files = sorted(path for path in Path(args.image_dir).glob("*") if path.suffix.lower() in ENDINGS)
        if not files:
            raise ExportError(f"--image_dir {args.image_dir} holds no picture ({', '.join(ENDINGS)})")
        return local_name(args.image_dir), [
            {"image_id": path.name, "file_name": path.name, "image": {"bytes": None, "path": str(path)}}
            for path in files[: args.check_images]
        ]
    dataset = args.dataset or scored_on["id"]
    revision = scored_on["revision"] if not args.dataset and not Path(dataset).exists() else None
    rows = load_captions(dataset, args.split, args.image_dir, revision)
    rows = rows.select_columns(["image_id", "file_name", "image"])
    place = f"{provenance.public_name(dataset)}, {args.split}"
    return place, list(rows.select(range(min(args.check_images, len(rows)))))


def compare_captions(source: Source, record: dict, folder: Path, rows: list[dict]) -> dict:
    """Captions the pictures with the adapter on its base and with the merged model, as both are on disk.

    Returns:
        The "check" of merge.json: how many captions are equal, and those that are not.
    """
    beams = source.beams
    before = captions(*load_measured(source), rows, beams)
    gc.collect()
    dtype = getattr(torch, record["dtype"])
    merged = load_model(str(folder), load_in_4bit=False, attn_implementation=None, dtype=dtype)
    after = captions(merged, load_processor(str(folder)), rows, beams)
    different = [
        {"image_id": row["image_id"], "adapter": one, "merged": other}
        for row, one, other in zip(rows, before, after, strict=True)
        if one != other
    ]
    return {
        "num_beams": beams.num_beams,
        "max_new_tokens": beams.max_new_tokens,
        "images": len(rows),
        "equal": len(rows) - len(different),
        "different": different,
    }


def load_measured(source: Source) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The base with the adapter on it, as it was scored."""
    adapter = source.adapter
    if source.is_blip:
        return load_blip_adapter(adapter.name, adapter.revision)
    model = load_model(source.base, source.revision, source.quantised)
    model = load_adapter(model, adapter.name, adapter.revision, source.revision)
    return model, load_processor(adapter.name, adapter.revision)


def captions(model: PreTrainedModel, processor: ProcessorMixin, rows: list[dict], args: BeamArguments) -> list[str]:
    """The captions of the rows' pictures."""
    return [said for (said,) in caption_images(model, processor, map(open_image, rows), args)]


def write_card(source: Source, record: dict, folder: Path, repo_id: str | None) -> None:
    """Writes merge.json and the model card; `repo_id` is the name by which the card's code loads the model."""
    write_atomically(folder / MERGE, json.dumps(record, ensure_ascii=False, indent=2))
    merged = record | {"name": repo_id or local_name(str(folder.absolute()))}
    card = render_adapter_card(source.metrics, repo_id, source.audit, merged)
    write_atomically(folder / "README.md", card)


def push_export(folder: Path, repo_id: str, private: bool, words: list[str]) -> str:
    """Pushes the folder to `repo_id` in one commit, as `push_folder`; returns the repository's URL.

    Args:
        words: of the command line that made the folder, for the message of a push that failed.
    """
    check_repository(repo_id)
    command = ["python", "scripts/export_model.py", *words, "--push_to_hub", "--repo_id", repo_id]
    command = shlex.join(command if private else [*command, "--public"])
    message = "Upload merged model, processor and model card"
    return push_folder(folder, repo_id, "model", private, message, command, replace=WEIGHTS)[0]


def check_repository(repo_id: str) -> None:
    """Raises PushError where the repository holds something else than a merged model: an adapter's, for instance."""
    try:
        there = set(patiently(lambda: HfApi().list_repo_files(repo_id)))
    except RepositoryNotFoundError:
        return
    except FAILURES as error:
        raise PushError(f"--repo_id {repo_id}: {reason(error)}") from error
    if MERGE not in there and (other := sorted(there - {".gitattributes", "README.md"})):
        raise PushError(
            f"--repo_id {repo_id}: the repository holds {other[0]}, and no {MERGE} of a merged model. Choose another"
            " name; an adapter and its merged model are two repositories"
        )
