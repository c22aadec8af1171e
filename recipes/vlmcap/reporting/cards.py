"""The model card of what was trained: README.md and .eval_results/, from its metrics.json and audit.json alone.

The words are in model_cards/: captioner.md.j2 is what all cards share, <recipe>.md.j2 what a recipe says beside it.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import jinja2
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump
from markupsafe import Markup

from vlmcap.atomic_write import write_atomically
from vlmcap.credentials import redact
from vlmcap.errors import UserError
from vlmcap.evaluation.audit import audit_rates, rate_text, read_audit
from vlmcap.evaluation.scoring import SCORE_LABELS
from vlmcap.markdown import code_span, escape_unseen, fenced, prose, visible
from vlmcap.models.arguments import UNQUANTISED
from vlmcap.places import ROOT, paths_root
from vlmcap.versions import OLDEST

TEMPLATES = ROOT / "model_cards"
EVAL_RESULTS = ".eval_results/captioning.yaml"
# The smallest published bases, BLIP and ViT with GPT-2, have more than 200 million parameters, the miniatures a few.
MINIATURE_PARAMETERS = 100_000_000
LLAMA = "llama-3.2"  # in the id of every model under the licence of Llama 3.2
SMOLLM2 = "smollm2"  # in the id of every SmolLM2: of Llama's architecture, trained by others, under Apache-2.0
MINIATURES = "recipes/miniatures/"
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
    "form.copied_prompt": "copied from the prompt",
    "form.special_tokens": "special tokens or chat markup",
    "overlap.image_in_training": "images that are in the training data",
    "overlap.picture_in_training": "pictures that are in the training data, byte for byte",
    "overlap.references_in_training": "references that are training captions, word for word",
    "overlap.training_caption": "captions that are training captions, word for word",
}
# Counts that are about the references alone, and so are the same for base and adapter.
OF_REFERENCES = ("references", "mean_reference_tokens", "reference_type_token_ratio")
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


class CardError(UserError):
    """A card cannot be written from these documents. The message names the file or the key, and the fix."""


@dataclass(frozen=True)
class Recipe:
    """What the card of a recipe says in its metadata and table heads, and how its result is loaded."""

    base: str  # what a miniature says nothing about
    title: str  # {base}, or {encoder} and {decoder}, are names of models without their owner
    task: str
    language: str
    license: str  # of the published weights; of a miniature's Apache-2.0
    tags: tuple[str, ...]
    load: str  # Python that makes `model` and `processor` as they were measured, filled by `load_snippet`
    pipeline_tag: str = "image-to-text"  # image alone in, text out; image-text-to-text is with a prompt
    trained: str = "adapter"
    untrained: str = "base, zero-shot"
    saw: tuple[str, ...] = ()  # corpora of "saw" that are worth a line


RECIPES = {
    "sft_qwen2vl_jp": Recipe(
        base="Qwen2-VL",
        title="{base}, adapted to Japanese image captions",
        task="Japanese image captioning",
        language="ja",
        license="apache-2.0",
        tags=("japanese", "lora", "qwen2_vl", "sft", "trl"),
        load="""\
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor{nf4_import}

base, adapter = {base}, {repo}
processor = AutoProcessor.from_pretrained(adapter){nf4}
model = AutoModelForImageTextToText.from_pretrained(
    base,{revision}
    dtype={dtype},
    device_map="auto",{quantised}
){unpacked}
model = PeftModel.from_pretrained(model, adapter).eval()""",
        pipeline_tag="image-text-to-text",
        saw=("STAIR", "YJ", "COCO"),
    ),
    "sft_blip_vi": Recipe(
        base="BLIP",
        title="{base}, adapted to Vietnamese image captions",
        task="Vietnamese image captioning",
        language="vi",
        license="bsd-3-clause",
        tags=("vietnamese", "lora", "blip"),
        load="""\
from vlmcap.models.blip import load_blip_adapter

model, processor = load_blip_adapter({repo})""",
        saw=("COCO",),
    ),
    "sft_vit_gpt2_food": Recipe(
        base="ViT or GPT-2",
        title="{encoder} with {decoder}, trained on image titles",
        task="Image titles",
        language="en",
        license="apache-2.0",
        tags=("food", "vit", "gpt2", "vision-encoder-decoder"),
        load="""\
from transformers import AutoProcessor, VisionEncoderDecoderModel

processor = AutoProcessor.from_pretrained({repo})
model = VisionEncoderDecoderModel.from_pretrained({repo})""",
        trained="model",
        untrained="before training",
    ),
    "sft_vit_llama_food": Recipe(
        base="ViT or Llama",
        # Llama's licence requires a name that begins with "Llama".
        title="{decoder} with {encoder}, adapted to image titles",
        task="Image titles",
        language="en",
        license="llama3.2",
        tags=("food", "lora", "vit", "llama"),
        load="""\
from vlmcap.models.vit_llama import load_vit_llama

model, processor = load_vit_llama({repo})""",
        untrained="before training",
    ),
}


def recipe_of(metrics: dict) -> Recipe:
    """The recipe that wrote a metrics document; one that names none is of sft_qwen2vl_jp.

    Raises:
        CardError: it names a recipe that has no card.
    """
    return RECIPES[_recipe_name(metrics)]


def _recipe_name(metrics: dict) -> str:
    name = metrics.get("recipe", "sft_qwen2vl_jp")
    if name not in RECIPES:
        raise CardError(f"recipe is {name!r}, which has no card; there are those of {', '.join(RECIPES)}")
    return name


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
    if audit:
        _check_audit(audit, metrics)
    base, training = metrics["base"], metrics["training"]
    parts = model_parts(metrics["model"])
    adapter_name = repo_id or local_name(metrics["model"]["adapter"] or ".")
    best = training.get("best")
    template, recipe, start = f"{_recipe_name(metrics)}.md.j2", recipe_of(metrics), quick_start(metrics, adapter_name)
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
            title=_title(metrics),
            miniature=is_miniature(metrics),
            miniature_encoder=miniature_encoder(metrics),
            built_with_llama=built_with_llama(metrics),
            smollm2=_is_decoder(metrics, SMOLLM2),
            base_on_hub=_on_hub(metrics),
            base_name=" + ".join(_name(part["id"]) for part in parts.values()),
            base_link=Markup(" with ".join(_link(part["id"]) for part in parts.values())),
            base_revisions=[part["revision"] for part in model_parts(base["model"]).values()],
            parts={place: {"link": _link(part["id"])} for place, part in parts.items()},
            best_label=_label(best["metric"].removeprefix("eval_")) if best else None,
            adapter_name=adapter_name,
            dataset_link=_link(metrics["dataset"]["id"], "datasets/"),
            training_dataset_link=_link(training["dataset"]["id"], "datasets/"),
            scores=[
                {
                    "label": _label(name),
                    "base": _score(base, name),
                    "adapter": _score(metrics, name, bold=True),
                    "signature": metrics["signatures"][name],
                }
                for name in metrics["scores"]
            ],
            normalised=[
                {
                    "label": _label(name),
                    "base": _score(base["register_normalised"], name),
                    "adapter": _score(metrics["register_normalised"], name),
                }
                for name in metrics.get("register_normalised", {}).get("scores", {})
            ],
            audit=audit,
            audited=_audited(audit) if audit else [],
            constraints=[
                key for key in ("japanese_only", "no_repeat_ngram_size", "avoid_words") if key in metrics["decoding"]
            ],
            quick_start=Markup(start),
            merge=Markup(merge_snippet(metrics, adapter_name)),
        )
    )
    metadata = (_merged_metadata(metrics, repo_id, merged) if merged else _metadata(metrics, repo_id)).to_yaml()
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
        "quoted": lambda text: Markup(_quoted(text)),
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
        {"label": label, "base": rate_text(theirs.get(path)), "adapter": rate_text(ours.get(path))}
        for path, label in AUDITED.items()
        if path in ours
    ]


def score_rows(metrics: dict) -> list[list[str]]:
    """The table of base and trained model as text, the header first: for the sample page and for the terminal."""
    rows = [["", recipe_of(metrics).untrained, recipe_of(metrics).trained]]
    for name, score in metrics["scores"].items():
        rows.append([_label(name), f"{metrics['base']['scores'][name]:.4f}", f"{score:.4f}"])
    return rows


def eval_result_entries(metrics: dict, repo_id: str | None = None) -> list[EvalResultEntry]:
    """One entry per score for `.eval_results/*.yaml` (https://huggingface.co/docs/hub/eval-results).

    The format requires a dataset id of the Hub: scores on a local dataset give an empty list. The task id is
    "<split>_<metric>"; the Hub shows an entry once the dataset's own eval.yaml registers that task.
    """
    dataset = metrics["dataset"]
    if not is_hub_id(dataset["id"]):
        return []
    source = {}
    if repo_id:
        source = {
            "source_url": f"https://huggingface.co/{repo_id}/blob/main/metrics.json",
            "source_name": "metrics.json",
        }
    beams = metrics["decoding"]["num_beams"]
    return [
        EvalResultEntry(
            dataset_id=dataset["id"],
            task_id=f"{dataset['split']}_{name}",
            dataset_revision=dataset["revision"],
            value=score,
            date=metrics["created"],
            notes=f"{metrics['signatures'][name]}, num_beams {beams}",
            **source,
        )
        for name, score in metrics["scores"].items()
    ]


def is_miniature(metrics: dict) -> bool:
    """Whether the base is the project's own miniature, recognised by its size."""
    return metrics["base"]["model"]["parameters"] < MINIATURE_PARAMETERS


def miniature_encoder(metrics: dict) -> bool:
    """Whether pictures are seen by a miniature of the project, while the text model is a real one."""
    encoder = model_parts(metrics["model"]).get("encoder", {"id": ""})["id"]
    return encoder.startswith(MINIATURES) and not is_miniature(metrics)


def built_with_llama(metrics: dict) -> bool:
    """Whether the licence of Llama 3.2 holds for what was trained: its decoder is one, by its name."""
    return _is_decoder(metrics, LLAMA)


def _is_decoder(metrics: dict, name: str) -> bool:
    return name in model_parts(metrics["model"]).get("decoder", {"id": ""})["id"].lower()


def is_hub_id(name: str) -> bool:
    """Whether a model or dataset id is "user/name" of the Hub and not a local folder that happens to look like one."""
    if len(name) > 96 or not HUB_ID.fullmatch(name):  # huggingface_hub's limit
        return False
    return not Path(name).exists() and not (paths_root() / name).exists()


def local_name(path: str) -> str:
    """How a card names a local folder: relative to the clone, or to the working folder of an installed package, when
    inside it, else by its last part alone, so that no card tells the world where somebody's home folder is."""
    root = paths_root()
    full = Path(os.path.abspath(root / path))
    return full.relative_to(root).as_posix() if full.is_relative_to(root) else full.name


def load_snippet(metrics: dict, repo: str) -> str:
    """Python that loads model and processor as they were measured, NF4 included; `repo` is a Hub id or a folder."""
    return recipe_of(metrics).load.format(**_loaded(metrics, repo))


def merge_snippet(metrics: dict, repo: str) -> str:
    """Python that makes one model of base and adapter and writes it into the folder `merged`.

    The weights that the adapter was trained on are those of NF4, so it is merged into these, made numbers again
    (`dequantize`); the published weights are others, and 4-bit ones would be rounded again.
    """
    return MERGE.format(**_loaded(metrics, repo))


MERGE = """\
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor{nf4_import}

base, adapter = {base}, {repo}{nf4}
model = AutoModelForImageTextToText.from_pretrained(
    base,{revision}
    dtype={dtype},
    device_map="auto",{quantised}
){dequantised}
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained("merged")
AutoProcessor.from_pretrained(adapter).save_pretrained("merged")"""

NF4 = """
nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype={},
    llm_int8_skip_modules=[
{}    ],
)"""

UNPACKED = """
for module in model.modules():  # as in training on every CPU, see bitsandbytes issue 2078
    module.support_avx512bf16_for_cpu = False"""

DEQUANTISED = """.dequantize()
for config in (model.config, model.config.text_config, model.config.vision_config):
    vars(config).pop("_pre_quantization_dtype", None)  # transformers 4 leaves it, and cannot save it"""


def _loaded(metrics: dict, repo: str) -> dict[str, str]:
    """What the templates of code are filled with; what belongs to NF4 is empty where the base was not quantised."""
    model = metrics["model"]
    dtype = _quoted(model["dtype"].removeprefix("torch."))
    revision = f"\n    revision={_quoted(model['revision'])}," if model["revision"] and is_hub_id(model["id"]) else ""
    unquantised = "".join(f"        {_quoted(name)},\n" for name in UNQUANTISED)
    nf4 = {
        "nf4_import": ", BitsAndBytesConfig",
        "nf4": NF4.format(dtype, unquantised),
        "quantised": "\n    quantization_config=nf4,",
        "unpacked": UNPACKED,
        "dequantised": DEQUANTISED,
    }
    filled = nf4 if model["quantization"] else dict.fromkeys(nf4, "")
    return filled | {"base": _quoted(_name(model["id"])), "repo": _quoted(repo), "revision": revision, "dtype": dtype}


MERGED = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

name = {repo}
processor = AutoProcessor.from_pretrained(name)
model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", device_map="auto")"""


def quick_start(metrics: dict, name: str, load: str | None = None) -> str:
    """Python that captions one photograph with the settings of the measured run, ready to paste.

    Args:
        name: of the adapter or model, a Hub id or a folder.
        load: Python that makes `model` and `processor` of it, with `{repo}` for the name; default the recipe's own.
    """
    load = (load.format(repo=_quoted(name)) if load else load_snippet(metrics, name)).splitlines()
    imports = ["from PIL import Image, ImageOps", *(line for line in load if line.startswith("from "))]
    if metrics["prompt"] is None:
        keys = ("num_beams", "max_new_tokens", "no_repeat_ngram_size", "do_sample")
        caption = PICTURE + CAPTION
    else:
        keys, caption = ("num_beams", "max_new_tokens", "do_sample"), PROMPT + PICTURE + ANSWER
    decoding = {key: metrics["decoding"][key] for key in keys if key in metrics["decoding"]}
    decoding["repetition_penalty"] = 1.0  # some bases bring another, which the measured captions were made without
    settings = ", ".join(f"{key}={value!r}" for key, value in decoding.items())
    lines = [*imports, *(line for line in load if line not in imports), ""]
    return "\n".join(lines) + "\n" + caption.format(settings=settings, prompt=_quoted(metrics["prompt"] or ""))


# As vlmcap.data.images.open_image reads a picture: upright, transparency on white.
PICTURE = """\
photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGBA")
image = Image.new("RGB", photo.size, "white")
image.paste(photo, mask=photo)
"""

CAPTION = """\
pixel_values = processor.image_processor(image, return_tensors="pt").pixel_values.to(model.device)
ids = model.generate(
    pixel_values=pixel_values, {settings}
)
print(processor.batch_decode(ids, skip_special_tokens=True)[0])"""

PROMPT = """\
prompt = {prompt}
messages = [{{"role": "user", "content": [{{"type": "image"}}, {{"type": "text", "text": prompt}}]}}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
"""

ANSWER = """\
inputs = processor(text=[text], images=[image], return_tensors="pt").to(model.device)
output = model.generate(**inputs, {settings})
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())"""


def _quoted(text: str) -> str:
    """A string of Python in double quotes and one line; what cannot be seen is written out."""
    return escape_unseen(json.dumps(text, ensure_ascii=False))


def _check(metrics: dict) -> None:
    missing = [key for key in (*REQUIRED, "training", "base") if key not in metrics]
    missing += [f"base.{key}" for key in REQUIRED if key not in metrics.get("base", {})]
    if missing:
        raise CardError(
            f"the document lacks {', '.join(missing)}. A card needs the adapter's scores and run record, the training "
            "run and the base's whole document: recipes/sft_qwen2vl_jp.py writes all of it after training."
        )
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
                f"base and adapter differ in {what} and cannot be in one table (base: {visible(str(theirs))};"
                f" adapter: {visible(str(ours))}). Score both again with the same settings."
            )


def _check_audit(audit: dict, metrics: dict) -> None:
    for name, other, run in (("audit", audit, metrics), ("audit of the base", audit.get("base"), metrics["base"])):
        if other is None:
            continue
        for key in ("model", "dataset", "prompt", "decoding"):
            if other.get(key, run[key]) != run[key]:
                raise CardError(f"the {name} has other captions than the scores: {key} differs. Audit them again.")
        if other["counts"]["images"] != run["counts"]["images"]:
            raise CardError(
                f"the {name} is of {other['counts']['images']} images, the scores of {run['counts']['images']}. Audit "
                "the captions again."
            )


def _metadata(metrics: dict, repo_id: str | None) -> ModelCardData:
    recipe, dataset, training_id = recipe_of(metrics), metrics["dataset"], metrics["training"]["dataset"]["id"]
    bases = [part["id"] for part in model_parts(metrics["model"]).values()]
    on_hub, whole = _on_hub(metrics), recipe.trained == "model"
    tags = ["image-captioning", *recipe.tags, "vlmcap"]
    if _is_decoder(metrics, SMOLLM2):
        tags[tags.index("llama")] = SMOLLM2
    results = [
        EvalResult(
            task_type=recipe.pipeline_tag,
            task_name=recipe.task,
            dataset_type=_name(dataset["id"]),
            dataset_name=_name(dataset["id"]),
            dataset_split=dataset["split"],
            dataset_revision=dataset["revision"],
            metric_type=name.split("_")[0],
            metric_name=_label(name),
            metric_value=score,
            metric_args={"signature": metrics["signatures"][name]},
        )
        for name, score in metrics["scores"].items()
    ]
    return ModelCardData(
        # The Hub's validation refuses a local path in base_model or datasets, so they are given for Hub ids only.
        base_model=(bases[0] if len(bases) == 1 else bases) if on_hub else None,
        base_model_relation=("finetune" if whole else "adapter") if on_hub else None,
        datasets=[training_id] if is_hub_id(training_id) else None,
        language=[recipe.language],
        library_name="transformers" if whole else "peft",
        license=_license(metrics),
        pipeline_tag=recipe.pipeline_tag,
        tags=tags + (["miniature"] if is_miniature(metrics) or miniature_encoder(metrics) else []),
        model_name=repo_id.split("/")[1] if repo_id else _title(metrics),
        eval_results=results,
    )


def _merged_metadata(metrics: dict, repo_id: str | None, merged: dict) -> ModelCardData:
    """Those of a fine-tuned base, under the licence of the base's weights; without scores, which are the adapter's."""
    data = _metadata(metrics, repo_id)
    data.base_model_relation = "finetune" if data.base_model else None
    data.library_name, data.eval_results, data.model_name = "transformers", None, None
    data.tags = [tag for tag in data.tags if tag != "lora"]
    data.license = None  # the recipe's is that of the adapter
    for key, value in merged["licence"].items():
        data[key] = value
    return data


def _license(metrics: dict) -> str:
    license_ = recipe_of(metrics).license
    if is_miniature(metrics) or _is_decoder(metrics, SMOLLM2):
        return "apache-2.0"
    return "other" if license_ == "llama3.2" and not built_with_llama(metrics) else license_


def _title(metrics: dict) -> str:
    names = {place: _name(part["id"]).split("/")[-1] for place, part in model_parts(metrics["model"]).items()}
    return recipe_of(metrics).title.format(**names)


def model_parts(model: dict) -> dict[str, dict]:
    """{"encoder", "decoder": {"id", "revision"}} of a model that was put together, {"base": ...} of any other."""
    return model.get("parts") or {"base": {"id": model["id"], "revision": model["revision"]}}


def _on_hub(metrics: dict) -> bool:
    return all(is_hub_id(part["id"]) for part in model_parts(metrics["model"]).values())


def _name(name: str) -> str:
    return name if is_hub_id(name) else local_name(name)


def _link(name: str, kind: str = "") -> Markup:
    if is_hub_id(name):
        return Markup(f"[{name}](https://huggingface.co/{kind}{name})")
    return Markup(f"{code_span(local_name(name))} (a local folder)")


def _label(score: str) -> str:
    return SCORE_LABELS.get(score, score)


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
