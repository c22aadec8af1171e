"""The one base of the errors that a user can fix, and notices, which stop nothing."""

import os
import sys
from pathlib import Path


class UserError(ValueError):
    """Something is not as it must be. The message names the file or the setting, the value, and the fix.

    Scripts and recipes end with the message instead of a traceback, see `vlmcap.arguments.run_main`.
    """


def needs_file(folder: Path) -> str:
    """What to say where a folder was given for a file, with files that are in it."""
    files = [str(path) for path in sorted(folder.glob("*")) if path.is_file()]
    return f"is a folder, and a file is needed{', such as ' if files else ''}{', '.join(files[:3])}"


def notice(text: str) -> None:
    """Prints a line to stderr, from the first process of a launcher alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
