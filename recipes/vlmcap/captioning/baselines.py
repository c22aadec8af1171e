"""The table of models to compare with: what each is, how its authors ask it for a caption, and what it has seen.

The table is a YAML file (recipes/configs/baselines.yaml, which explains every key). Nothing here loads a model.
"""

import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import transformers
from transformers.utils import cached_file

from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.data.corpora import SEEN_CORPORA
from vlmcap.errors import UserError
from vlmcap.models.weights import COMMIT
from vlmcap.places import own_file
from vlmcap.strict_parsing import parse_json, parse_yaml, shown

SOURCES = ("https://", "file://")
SEEN = ("train", "no", "unknown", "translated")
# Where transformers looks for references to code (`auto_map`).
CODE_REFERENCES = ("config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


class BaselineError(UserError):
    """The table or a prompts file is malformed, or a row cannot be run as asked. The message names row and key."""


@dataclass
class Baseline:
    """One row of the table, where the keys are explained; its `class` is `model_class` here."""

    key: str
    id: str
    revision: str | None
    license: str
    gated: bool
    model_class: str
    native_prompt: str | None
    runs: str
    parameters: float
    saw: dict[str, str]
    remote_code: bool = False
    experimental: bool = False
    runner: str | None = None
    python: str | None = None
    packages_until: str | None = None
    requirements: list[str] = field(default_factory=list)
    source: dict[str, str] | None = None

    @property
    def foreign_code(self) -> bool:
        """Whether running it executes code that is neither this project's nor an installed release."""
        return self.remote_code or self.source is not None


@dataclass
class BaselineTable:
    common_prompt: str
    rows: dict[str, Baseline]

    def row(self, key: str) -> Baseline:
        """The row with this key; BaselineError names those there are."""
        if key not in self.rows:
            raise BaselineError(f"--baseline {key}: there is no such row; there are {', '.join(self.rows)}")
        return self.rows[key]


def _read_yaml(path: str | Path) -> dict:
    try:
        document = parse_yaml(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise BaselineError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(document, dict):
        raise BaselineError(f"{path}: a mapping is needed, but this is {shown(document)}")
    return document


def read_table(path: str | Path) -> BaselineTable:
    """Reads and checks a table of baselines.

    Raises:
        BaselineError: naming file, row and key: a key that is missing, unknown or of the wrong kind, a corpus without
            a word on whether it was seen, a revision that is not a commit, a class that transformers does not have, an
            isolated row without runner, python, a date for its packages and pinned requirements.
    """
    document = _read_yaml(path)
    if not isinstance(document.get("common_prompt"), str) or not isinstance(document.get("models"), dict):
        raise BaselineError(f"{path}: `common_prompt` (text) and `models` (a mapping of rows) are needed")
    rows = {key: _read_row(f"{path}, row {key}", key, row) for key, row in document["models"].items()}
    return BaselineTable(document["common_prompt"], rows)


def _read_row(where: str, key: str, row: dict) -> Baseline:
    if not isinstance(row, dict):
        raise BaselineError(f"{where}: a mapping is needed, but this is {shown(row)}")
    if not isinstance(key, str) or not re.fullmatch(r"\w[\w.-]*", key):
        raise BaselineError(f"{where}: the key names a folder; use letters, digits, ., - and _")
    row = {"model_class" if name == "class" else name: value for name, value in row.items()} | {"key": key}
    known = {f.name: f for f in fields(Baseline)}
    for name in row.keys() - known.keys():
        raise BaselineError(f"{where}: unknown key `{name}`")
    for name, known_field in known.items():
        label = "class" if name == "model_class" else name
        required = known_field.default is MISSING and known_field.default_factory is MISSING
        if required and name not in row:
            raise BaselineError(f"{where}: `{label}` is missing")
        if name in row and not _is_kind(row[name], name):
            raise BaselineError(f"{where}: `{label}` cannot be {shown(row[name])}")
    for corpus in (*SEEN_CORPORA, "note"):
        value = row["saw"].get(corpus)
        if corpus == "note" and not value or corpus != "note" and value not in SEEN:
            allowed = "a text" if corpus == "note" else f'one of {", ".join(SEEN)} (quote "no" in YAML)'
            raise BaselineError(f"{where}: `saw.{corpus}` must be {allowed}, but is {shown(value)}")
    if row["revision"] is not None and not COMMIT.fullmatch(row["revision"]):
        raise BaselineError(f"{where}: `revision` must be a commit of 40 hexadecimal digits or null")
    if row["model_class"] not in ("remote", "package") and not hasattr(transformers, row["model_class"]):
        raise BaselineError(f"{where}: `class` {row['model_class']} is neither in transformers, nor remote or package")
    if row["runs"] == "isolated":
        for name in ("runner", "python", "packages_until", "requirements"):
            if not row.get(name):
                raise BaselineError(f"{where}: `{name}` is missing, which an isolated row needs")
        if not re.fullmatch(r"\d+(\.\d+)*", row["python"]):
            raise BaselineError(f"{where}: `python` must be a version such as '3.11', but is {row['python']!r:.80}")
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", row["packages_until"]):
            raise BaselineError(
                f"{where}: `packages_until` must be a date such as '2025-11-30', but is {row['packages_until']!r:.80}"
            )
        for requirement in row["requirements"]:
            if requirement.startswith("-") or "==" not in requirement and not COMMIT.search(requirement):
                raise BaselineError(
                    f"{where}: `requirements`: {requirement!r} is not pinned (name==version, or a commit)"
                )
        if source := row.get("source"):  # git knows addresses that run programs (ext::)
            url, commit = (str(source.get(key)) for key in ("url", "commit"))
            if not url.startswith(SOURCES) or not COMMIT.fullmatch(commit):
                raise BaselineError(
                    f"{where}: `source` needs `url`, beginning with {' or '.join(SOURCES)}, and `commit`, 40"
                    " hexadecimal digits"
                )
    return Baseline(**row)


def _is_kind(value, name: str) -> bool:
    if name in ("gated", "remote_code", "experimental"):
        return isinstance(value, bool)
    if name == "parameters":
        return isinstance(value, int | float)
    if name in ("saw", "source"):
        return isinstance(value, dict)
    if name == "requirements":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if name == "runs":
        return value in ("here", "isolated")
    return isinstance(value, str) or (name in ("revision", "native_prompt") and value is None)


def table_text(table: BaselineTable) -> str:
    """The table as aligned lines of text, the common prompt below it."""
    lines = [("key", "id", "B", "licence", "runs", *SEEN_CORPORA, "native prompt")]
    for row in table.rows.values():
        gated = " (gated)" if row.gated else ""
        seen = [row.saw[corpus] for corpus in SEEN_CORPORA]
        marks = ["experimental"] * row.experimental + ["code"] * row.foreign_code
        runs = row.runs + (f" ({', '.join(marks)})" if marks else "")
        lines.append(
            (
                row.key,
                row.id,
                f"{row.parameters:g}",
                row.license + gated,
                runs,
                *seen,
                row.native_prompt or "(takes none)",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(
        1, "  ".join("-" * min(width, 20) if i == len(widths) - 1 else "-" * width for i, width in enumerate(widths))
    )
    return "\n".join(
        [
            *text,
            "",
            "STAIR, YJ, COCO: what the model was trained on. (gated): accept the licence on its page and log in.",
            "experimental: its runner has never seen the model. code: of others, runs with --trust_remote_code only.",
            "(takes none): it only captions, in English. All search alike, without their own sampling and penalties.",
            f"Common prompt: {table.common_prompt}",
        ]
    )


def check_remote_code(name: str, revision: str | None, row: Baseline | None, trust_remote_code: bool) -> bool:
    """Whether code of the model's repository may run: with `--trust_remote_code`, at a commit, when it is needed.

    Args:
        name: Hub id or folder of the model.
        revision: what was asked for, before any look at the Hub.

    Raises:
        BaselineError: the row runs code of others without the flag, or the flag is given for a repository on the Hub
            without a commit, or the code of that commit is in another repository, at no commit.
    """
    if row and row.foreign_code and not trust_remote_code:
        what = f"code of {name}" if row.remote_code else f"code of {row.source['url']} at {row.source['commit']}"
        raise BaselineError(
            f"{row.key} runs {what}. Read it, then give --trust_remote_code"
            + (" and --model_revision with the commit that you read." if row.remote_code else ".")
        )
    if not trust_remote_code or (row and not row.remote_code):
        return False
    if not Path(name).exists() and not COMMIT.fullmatch(revision or ""):
        raise BaselineError(
            f"--trust_remote_code runs the code of {name} at a commit only, but the revision is {revision}: give"
            " --model_revision (or `revision` in the table) the 40 hexadecimal digits of the commit that you read"
        )
    for file in CODE_REFERENCES:
        try:
            path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise BaselineError(f"{name}: {str(error).strip().splitlines()[0]}") from error
        try:
            document = parse_json(Path(path).read_bytes()) if path else {}
        except ValueError as error:
            raise BaselineError(f"{file} of {name} cannot be read: {error}") from error
        references = document.get("auto_map") if isinstance(document, dict) else None
        elsewhere = [text for text in _strings(references) if "--" in text]
        if elsewhere:
            raise BaselineError(
                f"{file} of {name} refers to code in another repository ({elsewhere[0]}), which no commit pins:"
                " download both, point the reference at the copy, and give the folder as --model"
            )
    return True


def _strings(value) -> list[str]:
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for item in items for text in _strings(item)]


def saw_record(row: Baseline | None, given: dict[str, str | None], adapter: bool) -> dict[str, str]:
    """The "saw" part of a run record: STAIR, YJ, COCO and a note.

    Args:
        row: of the table; None when the model is none of it.
        given: corpus -> what the command line says; None where it says nothing, and then the row counts.
        adapter: an adapter is on the model. It may have seen what its base has not: only "train" and "translated"
            of the row still hold.
    """
    known = row.saw if row else dict.fromkeys(SEEN_CORPORA, "unknown")
    saw = {c: "unknown" if adapter and known[c] == "no" else known[c] for c in SEEN_CORPORA}
    said = {corpus: value for corpus, value in given.items() if value is not None}
    if said and not row:
        note = "As stated on the command line."
    elif row:
        note = row.saw["note"]
        note += " Adapter: only what its base saw is known." if adapter and not said else ""
        note += f" {', '.join(said)}: as stated on the command line." if said else ""
    else:
        note = "Not stated."
    return saw | said | {"note": note}


def read_prompts(path: str | Path) -> dict[str, str]:
    """Name -> prompt, from a YAML mapping or from a mapping below `prompts:`.

    Raises:
        BaselineError: naming file and name: no prompts, a prompt that is not a text, a name that cannot be a folder.
    """
    document = _read_yaml(own_file(str(path)))
    if isinstance(document.get("prompts"), dict):
        document = document["prompts"]
    if not document:
        raise BaselineError(f"{path} holds no prompts")
    for name, prompt in document.items():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise BaselineError(f"{path}: {name!r} cannot be the name of a folder; use letters, digits, - and _")
        if not isinstance(prompt, str) or not prompt.strip():
            raise BaselineError(f"{path}: the prompt `{name}` must be a text, but is {prompt!r:.80}")
    return document


def choose_prompts(
    table: BaselineTable, row: Baseline | None, given: str, kind: str | None, study: str | None
) -> dict[str, tuple[str | None, str | None]]:
    """The prompts to caption with: name -> (kind, prompt). Without a study it is one, and its name is its kind.

    A row that takes no prompt has `without_prompt`.

    Args:
        given: the value of `--prompt`.
        kind: native, common or given; None for common with a row, unless `--prompt` was set, and for given without.
        study: a prompts file, all of whose prompts are "given".

    Raises:
        BaselineError: native without a row, a kind other than given beside a set `--prompt` or beside a study, or a
            prompts file that `read_prompts` refuses.
    """
    if row and row.native_prompt is None:
        return without_prompt(row.key, given, kind, study)
    prompt_is_set = given != GenerationArguments.prompt
    if (study or prompt_is_set) and kind in ("native", "common"):
        raise BaselineError(f"--prompt_kind {kind} beside {'--prompts' if study else '--prompt'}: give one of them")
    if study:
        return {name: ("given", prompt) for name, prompt in read_prompts(study).items()}
    kind = kind or ("common" if row and not prompt_is_set else "given")
    if kind == "native" and row is None:
        raise BaselineError("--prompt_kind native is the prompt of a row of the table: give --baseline, or --prompt")
    prompts = {"given": given, "common": table.common_prompt, "native": row and row.native_prompt}
    return {kind: (kind, prompts[kind])}


def without_prompt(
    name: str, given: str, kind: str | None, study: str | None
) -> dict[str, tuple[str | None, str | None]]:
    """What stands in for the prompts of a model that takes none: one run whose kind and prompt are null.

    Raises:
        BaselineError: `--prompt`, `--prompt_kind` or `--prompts` is set; arguments as of `choose_prompts`.
    """
    is_set = {"--prompt": given != GenerationArguments.prompt, "--prompt_kind": kind, "--prompts": study}
    if options := [option for option, value in is_set.items() if value]:
        raise BaselineError(f"{name} takes no prompt, it only captions: leave out {' and '.join(options)}")
    return {"none": (None, None)}
