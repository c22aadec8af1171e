"""The model card of what was trained: README.md and .eval_results/, from its metrics.json and audit.json alone.

The words are in model_cards/: captioner.md.j2 is what all cards share, <recipe>.md.j2 what a recipe says beside it.
"""

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import jinja2
from huggingface_hub import eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump
from markupsafe import Markup

from vlmcap.atomic_write import write_atomically
from vlmcap.credentials import redact
from vlmcap.evaluation.audit_document import audit_rates, rate_text, read_audit
from vlmcap.markdown import code_span, escape_unseen, fenced, prose, visible
from vlmcap.places import ROOT
from vlmcap.reporting.card_facts import (
    SMOLLM2,
    CardError,
    built_with_llama,
    card_title,
    is_decoder,
    is_hub_id,
    is_miniature,
    language_names,
    local_name,
    miniature_encoder,
    model_parts,
    on_hub,
    other_keys,
    public_id,
    recipe_name,
    recipe_of,
    score_label,
)
from vlmcap.reporting.card_metadata import card_metadata, eval_result_entries, merged_metadata
from vlmcap.reporting.snippets import MERGED, merge_snippet, quick_start, quoted
from vlmcap.versions import OLDEST

TEMPLATES = ROOT / "model_cards"
EVAL_RESULTS = ".eval_results/captioning.yaml"
# What a document must hold before a card can be printed: the scorer's part, the run record's, the recipe's.
REQUIRED = (
    "scores signatures counts model dataset prompt decoding saw hardware seconds images_per_second peak_memory_bytes "
    "versions commit created"
).split()
# The rates of an audit that the card shows, as it calls them.
AUDITED = {
    "hallucination.chair_s": "captions with a thing that is not in the picture (CHAIRs)",
    "hallucination.chair_i": "such mentions among all mentions of things (CHAIRi)",
    "hallucination.coverage": "things in the picture that are mentioned",
    "persons.groups.gender.female.predictions": "captions that say female",
    "persons.groups.gender.female.references": "references that say female",
    "persons.groups.gender.male.predictions": "captions that say male",
    "persons.groups.gender.male.references": "references that say male",
    "persons.gender.error": "the other gender than the references'",
    "persons.gender.unsupported": "a gender where no reference says one",
    "form.empty": "empty",
    "form.repetition": "repeating",
    "form.truncated": "cut off",
    "form.non_japanese": "not Japanese",
    "form.non_latin": "not in Latin letters",
    "form.copied_prompt": "copied from the prompt",
    "form.special_tokens": "special tokens or chat markup",
    "overlap.image_in_training": "images that are in the training data",
    "overlap.picture_in_training": "pictures that are in the training data, byte for byte",
    "overlap.references_in_training": "references that are training captions, word for word",
    "overlap.training_caption": "captions that are training captions, word for word",
}
# Counts that are about the references alone, and so are the same for base and adapter.
OF_REFERENCES = ("references", "mean_reference_tokens", "reference_type_token_ratio")


def write_adapter_card(adapter_dir: str | Path, repo_id: str | None = None) -> Path:
    """Writes `README.md` into `adapter_dir` and, for scores on a Hub dataset, `.eval_results/captioning.yaml`.

    Both are written whole from `adapter_dir/metrics.json` and, where there is one, `audit.json`, whatever was there
    before, so a README that the trainer or PEFT's `save_pretrained` has rewritten is put right by calling this again.
    Returns the path of the README.

    Raises:
        FileNotFoundError: there is no metrics.json in the folder.
        CardError: metrics.json is not the document of an adapter scored beside its base (see `render_adapter_card`),
            or audit.json no audit.
    """
    adapter_dir = Path(adapter_dir)
    metrics = read_metrics(adapter_dir)
    audit_path = adapter_dir / "audit.json"
    audit = read_audit(audit_path) if audit_path.exists() else None
    with in_file(adapter_dir / "metrics.json"):
        card = render_adapter_card(metrics, repo_id, audit)
    readme = adapter_dir / "README.md"
    write_atomically(readme, card)

    results = adapter_dir / EVAL_RESULTS
    entries = eval_result_entries(metrics, repo_id)
    if entries:
        results.parent.mkdir(exist_ok=True)
        write_atomically(results, yaml_dump(eval_result_entries_to_yaml(entries)))
    else:
        results.unlink(missing_ok=True)
    return readme


@contextmanager
def in_file(path: str | Path) -> Iterator[None]:
    """Turns what printing a card from a damaged document raises into a CardError that names the document's file."""
    try:
        yield
    except ValueError as error:
        raise CardError(f"{path}: {error}") from error
    except (AttributeError, IndexError, KeyError, TypeError, jinja2.UndefinedError) as error:
        raise CardError(
            f"{path} is not as the recipe writes it ({type(error).__name__}: {error}): score again"
        ) from error


def read_metrics(adapter_dir: str | Path) -> dict:
    """`adapter_dir/metrics.json` as a dict. Raises FileNotFoundError or CardError (no JSON), naming the file."""
    path = Path(adapter_dir) / "metrics.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: a model card is printed from measured results. recipes/sft_qwen2vl_jp.py writes "
            "the file after training, when it has scored the base and the adapter."
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CardError(f"{path} is not JSON: {error}") from error


def render_adapter_card(
    metrics: dict, repo_id: str | None = None, audit: dict | None = None, merged: dict | None = None
) -> str:
    """The model card (YAML block and Markdown) of an adapter or a trained model, as text.

    Args:
        metrics: its metrics document: its own scores and run record, with the training run under "training" and the
            whole document of the base (what there was before training), scored alike, under "base". Its "recipe"
            chooses the card (see `recipe_of`).
        repo_id: "user/name" on the Hub for the quick start; None makes the quick start name the local folder.
        audit: the audit of the adapter's captions, with that of the base's under "base" where there is one.

    Raises:
        CardError: keys are missing, or base and adapter were not scored on the same data in the same way, so that a
            table with both would mislead; an audit of other captions.
    """
    _check(metrics)
    scored = {metrics.get("key"): metrics} | other_keys(metrics)
    for key, one in _by_key(audit, metrics).items():
        _check_audit(one, scored[key], "" if one is audit else f" of {key}")
    base, training = metrics["base"], metrics["training"]
    parts = model_parts(metrics["model"])
    adapter_name = repo_id or local_name(metrics["model"]["adapter"] or ".")
    best = training.get("best")
    template, recipe, start = f"{recipe_name(metrics)}.md.j2", recipe_of(metrics), quick_start(metrics, adapter_name)
    if merged:
        adapter_name = merged["adapter"]["id"]
        start = quick_start(metrics, merged["name"], MERGED)
        recipe = replace(recipe, trained=f"{recipe.trained} before the merge")
    text = (
        _environment()
        .get_template("merged.md.j2" if merged else template)
        .render(
            m=metrics,
            merged=merged,
            served_name=Markup(escape_unseen(shlex.quote(merged["name"]))) if merged else None,
            adapter_card=template,
            adapter_link=_link(adapter_name),
            recipe=recipe,
            base=base,
            training=training,
            title=card_title(metrics),
            miniature=is_miniature(metrics),
            miniature_encoder=miniature_encoder(metrics),
            built_with_llama=built_with_llama(metrics),
            smollm2=is_decoder(metrics, SMOLLM2),
            base_on_hub=on_hub(metrics),
            base_name=" + ".join(public_id(part["id"]) for part in parts.values()),
            base_link=Markup(" with ".join(_link(part["id"]) for part in parts.values())),
            base_revisions=[part["revision"] for part in model_parts(base["model"]).values()],
            parts={place: {"link": _link(part["id"])} for place, part in parts.items()},
            best_label=score_label(best["metric"].removeprefix("eval_")) if best else None,
            adapter_name=adapter_name,
            dataset_link=_link(metrics["dataset"]["id"], "datasets/"),
            training_dataset_link=_link(training["dataset"]["id"], "datasets/"),
            scores=[
                {
                    "label": score_label(name),
                    "base": _score(base, name),
                    "adapter": _score(metrics, name, bold=True),
                    "signature": metrics["signatures"][name],
                }
                for name in metrics["scores"]
            ],
            normalised=[
                {
                    "label": score_label(name),
                    "base": _score(base["register_normalised"], name),
                    "adapter": _score(metrics["register_normalised"], name),
                }
                for name in metrics.get("register_normalised", {}).get("scores", {})
            ],
            started=_started(metrics, audit) if "start" in training else [],
            languages=metrics.get("languages", {}),
            spoken=language_names(metrics, "or"),
            overview=_overview(metrics),
            others={key: _key_rows(metrics, key) for key in other_keys(metrics)},
            audit=audit,
            audits={key: {"audit": one, "rows": _audited(one)} for key, one in _by_key(audit, metrics).items()},
            constraints=[
                key for key in ("japanese_only", "no_repeat_ngram_size", "avoid_words") if key in metrics["decoding"]
            ],
            quick_start=Markup(start),
            merge=Markup(merge_snippet(metrics, adapter_name)),
        )
    )
    metadata = (merged_metadata(metrics, repo_id, merged) if merged else card_metadata(metrics, repo_id)).to_yaml()
    return redact(f"---\n{metadata}\n---\n\n" + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
        finalize=_shown,  # whatever the documents hold is shown as text: no link, no heading, no HTML, no second row
    )
    environment.globals["oldest"] = {name: Markup(f'"{name}>={version}"') for name, version in OLDEST.items()}
    environment.filters |= {
        "cell": _cell,
        "code": _code,
        "device": _device,
        "duration": _duration,
        "fenced": lambda text: Markup(fenced(text)),
        "memory": _memory,
        "quoted": lambda text: Markup(quoted(text)),
        "rate": lambda value: "not measured" if value is None else f"{value:.2f}",
        "recorded": lambda value: "not recorded" if value is None else _code(value),
        "value": _value,
    }
    return environment


def _shown(value) -> str:
    return value if isinstance(value, Markup) else prose(str(value))


def _code(value) -> Markup:
    return Markup(code_span(str(value)))


def _cell(value) -> Markup:
    """Text, or Markdown, that keeps to one cell of a table."""
    return Markup(re.sub(r"(?<!\\)\|", r"\|", _shown(value)))


def _value(value) -> str:
    """A setting: numbers, true and null as they are, everything else as code."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return _code(text) if isinstance(value, str | list | dict) else text


def _score(scored: dict, name: str, bold: bool = False) -> str:
    """A score and, where there is one, its interval: `0.5128 [0.5011, 0.5240]`."""
    value = f"{scored['scores'][name]:.4f}"
    interval = scored.get("intervals", {}).get(name)
    return (f"**{value}**" if bold else value) + (f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else "")


def _audited(audit: dict) -> list[dict]:
    """The rows of the audit's table, of what was audited."""
    ours, theirs = audit_rates(audit), audit_rates(audit["base"]) if "base" in audit else {}
    return [
        {"path": path, "label": label, "base": rate_text(theirs.get(path)), "adapter": rate_text(ours.get(path))}
        for path, label in AUDITED.items()
        if path in ours
    ]


def _started(metrics: dict, audit: dict | None) -> list[dict]:
    """The rows of base, starting adapter and this one side by side: scores, and how often things are made up."""
    base, start = metrics["base"], metrics["training"]["start"]
    rows = [
        {"label": score_label(name)}
        | {"base": _score(base, name), "start": _score(start, name), "adapter": _score(metrics, name)}
        for name in metrics["scores"]
    ]
    for row in _audited(audit) if audit else []:
        if row["path"].startswith("hallucination."):
            rows.append(row | {"start": rate_text(start["audit"].get(row["path"]))})
    return rows


def _overview(metrics: dict) -> list[dict]:
    """A row for each key: its prompt, whether it was trained on, its images and CIDEr-D."""
    return [
        {"key": key, "prompt": one["prompt"], "trained": one["trained"], "images": scored["counts"]["images"]}
        | {"base": _score(scored["base"], "cider_d"), "adapter": _score(scored, "cider_d")}
        for key, one in metrics.get("languages", {}).items()
        for scored in [metrics | one]
    ]


def _key_rows(metrics: dict, key: str) -> list[dict]:
    """The rows of the table of a key: base, starting adapter if there is one, this one, and how much is left of the
    base's score."""
    scored, started = metrics["languages"][key], metrics["training"].get("start", {}).get("languages", {}).get(key)
    rows = []
    for name, score in scored["scores"].items():
        before = scored["base"]["scores"][name]
        row = {"label": score_label(name), "signature": scored["signatures"][name]}
        row |= {"base": _score(scored["base"], name), "adapter": _score(scored, name, bold=True)}
        row["start"] = _score(started, name) if started and name in started["scores"] else "-"
        row["ratio"] = f"{score / before:.2f}" if before else "-"
        rows.append(row)
    return rows


def score_rows(metrics: dict) -> list[list[str]]:
    """The table of base and trained model as text, the header first: for the sample page and for the terminal."""
    rows = [["", recipe_of(metrics).untrained, recipe_of(metrics).trained]]
    for name, score in metrics["scores"].items():
        rows.append([score_label(name), f"{metrics['base']['scores'][name]:.4f}", f"{score:.4f}"])
    return rows


def _check(metrics: dict) -> None:
    missing = [key for key in (*REQUIRED, "training", "base") if key not in metrics]
    missing += [f"base.{key}" for key in REQUIRED if key not in metrics.get("base", {})]
    if missing:
        raise CardError(
            f"the document lacks {', '.join(missing)}. A card needs the adapter's scores and run record, the training "
            "run and the base's whole document: recipes/sft_qwen2vl_jp.py writes all of it after training."
        )
    _check_alike(metrics)
    for key, document in other_keys(metrics).items():
        _check_alike(document, f" of {key}")


def _check_alike(metrics: dict, of_key: str = "") -> None:
    base = metrics["base"]
    for what, theirs, ours in (
        ("dataset", base["dataset"], metrics["dataset"]),
        ("number of images", base["counts"]["images"], metrics["counts"]["images"]),
        *((f"counts: {key}", base["counts"].get(key), metrics["counts"].get(key)) for key in OF_REFERENCES),
        ("prompt", base["prompt"], metrics["prompt"]),
        ("decoding", base["decoding"] | {"batch_size": 0}, metrics["decoding"] | {"batch_size": 0}),
        ("signatures", base["signatures"], metrics["signatures"]),
        ("bootstrap", base.get("bootstrap"), metrics.get("bootstrap")),
    ):
        if theirs != ours:
            raise CardError(
                f"base and adapter differ in {what}{of_key} and cannot be in one table (base: {visible(str(theirs))};"
                f" adapter: {visible(str(ours))}). Score both again with the same settings."
            )


def _by_key(audit: dict | None, metrics: dict) -> dict[str | None, dict]:
    """The audits of the captions of each key, the main one first; without keys the only one, of None."""
    return {metrics.get("key"): audit, **audit.get("languages", {})} if audit else {}


def _check_audit(audit: dict, metrics: dict, of_key: str = "") -> None:
    audits = {"audit": (audit, metrics), "audit of the base": (audit.get("base"), metrics["base"])}
    for name, (other, run) in audits.items():
        if other is None:
            continue
        for key in ("model", "dataset", "prompt", "decoding"):
            if other.get(key, run[key]) != run[key]:
                raise CardError(
                    f"the {name}{of_key} has other captions than the scores: {key} differs. Audit them again."
                )
        audited, scored = other["counts"]["images"], run["counts"]["images"]
        if audited != scored:
            raise CardError(
                f"the {name}{of_key} is of {audited} images, the scores of {scored}. Audit the captions again."
            )


def _link(name: str, kind: str = "") -> Markup:
    if is_hub_id(name):
        return Markup(f"[{name}](https://huggingface.co/{kind}{name})")
    return Markup(f"{code_span(local_name(name))} (a local folder)")


def _device(hardware: dict) -> str:
    memory = hardware["device_memory_bytes"]
    device = "" if hardware["device"] == "CPU" else f"{hardware['device']} ({_memory(memory)}), "
    return f"{device}{hardware['cpu']}, {hardware['cores']} cores, {_memory(hardware['memory_bytes'])} RAM"


def _memory(n_bytes: int | None) -> str:
    if n_bytes is None:
        return "not measured"
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "not measured"
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
