"""Pin models to commits: write those of today's main branches into configuration files.

    python scripts/pin_revisions.py --files recipes/configs/baselines.yaml recipes/configs/*/base.yaml

Where a file names a model of the Hub and its revision is null, the commit replaces null; comments stay, and so does
what is pinned already. Models that run code of their own repository are left out: read the code of a commit, then
write the commit yourself. Look at `git diff` and commit it.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from vlmcap.arguments import run_main
from vlmcap.atomic_write import write_atomically
from vlmcap.strict_parsing import parse_yaml

MODEL_LINE = re.compile(r"( *)(?:(\w+)_name_or_path|id): *([^\s#]+)")
REVISION_LINE = re.compile(r"( *)(\w*revision): *null\b(.*)")


@dataclass
class Arguments:
    files: list[str] = field(metadata={"help": "YAML files: the table of baselines, configurations of recipes."})


def pin_revisions(path: Path) -> list[str]:
    """Writes commits into a YAML file, where a model is named and its revision below is null.

    That is `id` with `revision` (the table of baselines), or `x_name_or_path` with `x_revision` (recipes). Everything
    else stays, comments too. A row with `remote_code` is not changed: its commit says that somebody read the code.

    Returns:
        A line for each such name: the commit of its main branch, or why there is none.

    Raises:
        ModelError: the file is not YAML.
    """
    from vlmcap.models.load import COMMIT, ModelError, resolve_revision

    try:
        text = path.read_text(encoding="utf-8")
        document = parse_yaml(text)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as YAML: {error}") from error
    rows = document.get("models") if isinstance(document, dict) else None
    rows = [row for row in rows.values() if isinstance(row, dict)] if isinstance(rows, dict) else []
    coded = {row.get("id") for row in rows if row.get("remote_code")}
    lines, named, report = text.split("\n"), {}, []
    for number, line in enumerate(lines):
        if found := MODEL_LINE.match(line):
            indent, part, name = found.groups()
            named[indent, f"{part}_revision" if part else "revision"] = name.strip("'\"")
        elif (found := REVISION_LINE.match(line)) and (name := named.get(found.groups()[:2])):
            if name in coded:
                report.append(f"{name}: runs its own code; read that of a commit, and write the commit yourself")
                continue
            try:
                commit = resolve_revision(name, "main")
            except ModelError as error:
                report.append(f"{name}: {error}")
                continue
            if commit and COMMIT.fullmatch(commit):
                lines[number] = f"{found[1]}{found[2]}: {commit}{found[3]}"
            report.append(f"{name}: {commit or 'a folder'}")
    write_atomically(path, "\n".join(lines))
    return report


def main(args: Arguments) -> None:
    for file in args.files:
        print(file, *pin_revisions(Path(file)), sep="\n  ")


if __name__ == "__main__":
    run_main(main, __doc__, Arguments)
