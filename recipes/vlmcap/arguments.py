"""The command line of every script and recipe: dataclass fields, `--config file.yaml`, and the manual as help."""

import argparse
import sys

from trl import TrlParser


class ManualFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of the manual and shows defaults."""


def parse(manual: str, *dataclasses: type, command_line: list[str] | None = None) -> tuple:
    """Instances of the dataclasses, from the command line over `--config` over the fields' defaults.

    `--help` begins with `manual`, the docstring of the script. A configuration file that is missing, is no mapping or
    holds an unknown key ends the program with a message that names it.
    """
    parser = TrlParser(dataclasses, description=manual, formatter_class=ManualFormatter)
    try:
        return parser.parse_args_and_config(command_line)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
