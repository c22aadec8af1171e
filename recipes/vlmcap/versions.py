"""The library versions that the tests ran on, and one line where another is installed."""

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata

# Libraries whose private methods this project overrides or calls (library_overrides.yaml). setup.cfg accepts these
# minor versions and no others. `pip install -U transformers` installs another all the same.
TESTED = {
    "transformers": ("5.23.0", "5.24.0"),
    "trl": ("1.16.0",),
    "peft": ("0.21.2",),
    "accelerate": ("1.15.0",),
    "bitsandbytes": ("0.50.2",),
    "evaluate": ("0.4.6",),
    "sacrebleu": ("2.6.0",),
}

# The oldest that the code on the cards was run with (tests/reporting/test_snippets.py). What it needs is less than the
# project does.
OLDEST = {"transformers": "4.57.1", "peft": "0.17.0", "accelerate": "1.10.0", "bitsandbytes": "0.48.0"}


def minor(version: str) -> str:
    """5.23 of 5.23.0."""
    return ".".join(version.split(".")[:2])


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Name -> version of the packages that are installed. With the clone on PYTHONPATH, vlmcap is none of them."""
    found = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def untested_versions() -> str | None:
    """A line that names each library of another minor version than the tested ones, and those; None without any."""
    found = installed_versions(TESTED)
    others = [
        f"{name} {version} is installed, and tested is {' and '.join(TESTED[name])}"
        for name, version in found.items()
        if minor(version) not in map(minor, TESTED[name])
    ]
    return f"Note: {'; '.join(others)}. Results may differ." if others else None


def is_first_process() -> bool:
    """Whether this is the one process of a run that speaks for all, as far as the launcher's environment says."""
    return os.environ.get("RANK", "0") == "0"


def report_untested_versions() -> None:
    """Prints `untested_versions` to stderr, in one process of a run."""
    line = untested_versions()
    if line and is_first_process():
        print(line, file=sys.stderr, flush=True)
