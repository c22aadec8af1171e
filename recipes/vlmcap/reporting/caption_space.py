"""A page that captions pictures with a published adapter, as a Space of the Hub: one folder, needs no vlmcap."""

import json
import re
import shlex
import shutil
from pathlib import Path

import jinja2
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import yaml_dump

from vlmcap.atomic_write import write_atomically
from vlmcap.data import pictures
from vlmcap.errors import UserError
from vlmcap.markdown import code_span
from vlmcap.models.arguments import UNQUANTISED
from vlmcap.models.load import resolve_revision
from vlmcap.places import ROOT
from vlmcap.reporting.card_facts import LANGUAGES, language_names, trained_keys
from vlmcap.reporting.cards import is_hub_id, read_metrics, render_adapter_card
from vlmcap.upload import push_folder

SOURCE = ROOT / "recipes" / "caption_space"
RECIPES = ("sft_qwen2vl_jp", "dpo_qwen2vl_jp", "grpo_qwen2vl_jp")
CONSTRAINTS = ("japanese_only", "no_repeat_ngram_size", "avoid_words")


class SpaceError(UserError):
    """A Space cannot be made of this adapter. The message says why, and the fix."""


def write_caption_space(adapter: str, output_dir: str | Path, revision: str | None = None) -> Path:
    """Writes the page for an adapter of recipes/sft_qwen2vl_jp.py to `output_dir`; returns the folder.

    What it loads and says is from the adapter's metrics.json: base and its commit, dtype, quantisation, prompts,
    beams, and the limits of its model card. The adapter's commit is written down too, so that the Space stays as it
    is.

    Args:
        adapter: Hub id, or a folder, for a page that runs on this machine alone.
        revision: of an adapter on the Hub.

    Raises:
        SpaceError: the adapter has no metrics.json, or another recipe trained it.
        ModelError: there is no such adapter, or the Hub cannot be reached.
        CardError: metrics.json is not as the recipe writes it.
    """
    folder = Path(output_dir)
    commit = resolve_revision(adapter, revision)
    metrics = _metrics(adapter, commit)
    space = _describe(metrics, adapter, commit)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "space.json", json.dumps(space, ensure_ascii=False, indent=2) + "\n")
    write_atomically(folder / "README.md", _readme(space, metrics))
    for file in (SOURCE / "app.py", SOURCE / "requirements.txt", Path(pictures.__file__)):
        shutil.copy(file, folder)
    return folder


def _metrics(adapter: str, commit: str | None) -> dict:
    if Path(adapter).exists():
        metrics = read_metrics(adapter)
    else:
        try:
            metrics = read_metrics(Path(hf_hub_download(adapter, "metrics.json", revision=commit)).parent)
        except EntryNotFoundError as error:
            raise SpaceError(
                f"{adapter} has no metrics.json, which says what its captions were measured with: push it with"
                " scripts/push_adapter.py"
            ) from error
    if metrics.get("recipe", RECIPES[0]) not in RECIPES:
        raise SpaceError(
            f"{adapter} was trained by recipes/{metrics['recipe']}.py; a Space is made for adapters of"
            f" {', '.join(f'recipes/{recipe}.py' for recipe in RECIPES)} alone"
        )
    return metrics


def _describe(metrics: dict, adapter: str, commit: str | None) -> dict:
    """space.json, which app.py reads."""
    card = render_adapter_card(metrics, adapter if is_hub_id(adapter) else None)
    model = metrics["model"]
    base, adapter = (str(Path(name).resolve()) if Path(name).exists() else name for name in (model["id"], adapter))
    title = re.search(r"^# (.+)$", card, re.MULTILINE)[1]
    links = ", ".join(f"[{name}](https://huggingface.co/{name})" for name in (adapter, base) if is_hub_id(name))
    introduction = f"Describes a picture in one short {language_names(metrics, 'or')} sentence."
    return {
        "title": title,
        "introduction": f"{introduction} Models and scores: {links}." if links else introduction,
        "base": {
            "id": base,
            "revision": model["revision"] if is_hub_id(base) else None,
            "dtype": model["dtype"].removeprefix("torch."),
            "quantization": model["quantization"],
            "unquantised": UNQUANTISED,
        },
        "adapter": {"id": adapter, "revision": commit},
        "prompts": {_name(key): prompt for key, prompt in trained_keys(metrics).items()} or {"": metrics["prompt"]},
        "decoding": {key: metrics["decoding"][key] for key in ("num_beams", "max_new_tokens")},
        "limits": re.search(r"^## Limits and risks\n+(.*?)\n+## ", card, re.MULTILINE | re.DOTALL)[1],
    }


def _name(key: str) -> str:
    """ja/polite -> "Japanese, polite", for the page's visitors."""
    language, *style = key.split("/")
    return ", ".join((LANGUAGES[language], *style))


def _readme(space: dict, metrics: dict) -> str:
    requirements = (SOURCE / "requirements.txt").read_text(encoding="utf-8")
    metadata = {
        "title": space["title"][:60],
        "emoji": "🖼️",
        "sdk": "gradio",
        "sdk_version": re.search(r"^gradio==(.+)$", requirements, re.MULTILINE)[1],
        "python_version": "3.12",
        "app_file": "app.py",
        "suggested_hardware": "cpu-basic",
        "models": [part["id"] for part in (space["adapter"], space["base"]) if is_hub_id(part["id"])],
        "license": "apache-2.0",
        "short_description": f"Picture in, {language_names(metrics, 'or')} caption out"[:60],
        "pinned": False,
    }
    templates = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    templates.filters["code"] = code_span
    template = templates.from_string((SOURCE / "README.md.j2").read_text(encoding="utf-8"))
    constraints = [key for key in CONSTRAINTS if metrics["decoding"].get(key)]
    return f"---\n{yaml_dump(metadata)}---\n\n" + template.render(**space, constraints=constraints)


def push_caption_space(folder: Path, repo_id: str, private: bool = True) -> str:
    """Pushes a folder of `write_caption_space` to the Space `repo_id` in one commit; returns its URL.

    Raises:
        SpaceError: base or adapter is a folder of this machine, which a Space does not see.
        PushError: the Hub refuses or cannot be reached, or an existing Space has the other visibility.
    """
    space = json.loads((folder / "space.json").read_text(encoding="utf-8"))
    for part, fix in (("adapter", "push it with scripts/push_adapter.py"), ("base", "it must be on the Hub")):
        if not is_hub_id(space[part]["id"]):
            raise SpaceError(f"the {part} is a folder, {space[part]['id']}, which a Space cannot load: {fix}")
    command = ["python", "scripts/publish_space.py", "--adapter", space["adapter"]["id"], "--repo_id", repo_id]
    command += ["--output_dir", str(folder)] + ([] if private else ["--public"])
    url, _ = push_folder(folder, repo_id, "space", private, "Upload the page and its model", shlex.join(command))
    return url
