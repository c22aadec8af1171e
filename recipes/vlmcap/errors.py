"""The one base of the errors that a user can fix, and notices, which stop nothing."""

import os
import sys


class UserError(ValueError):
    """Something is not as it must be. The message names the file or the setting, the value, and the fix.

    Scripts and recipes end with the message instead of a traceback, see `vlmcap.arguments.run_main`.
    """


def notice(text: str) -> None:
    """Prints a line to stderr, from the first process of a launcher alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
