"""What tests of environments of their own share."""

import subprocess

import pytest

from vlmcap.errors import UserError
from vlmcap.places import find_uv


@pytest.fixture(scope="session")
def environments(tmp_path_factory):
    """Where this session's environments are built; skips when there is no uv, or it finds no package."""
    try:
        uv = find_uv()
    except UserError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("environments")
    probe = ["pip", "install", "--quiet", "--target", str(folder / "probe"), "--no-deps", "pillow==11.3.0"]
    done = subprocess.run([uv, *probe], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"uv cannot install pillow here: {done.stderr.strip()[-300:]}")
    return folder
