"""Files are whole or not there (vlmcap.atomic_write)."""

import os
import signal
import subprocess
import sys

import pytest

from vlmcap.atomic_write import write_atomically


def test_a_kill_in_the_middle_leaves_the_old_file(fault, tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("old")
    program = (
        "import os, pathlib, signal, sys\n"
        "from vlmcap.atomic_write import write_atomically\n"
        "os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(pathlib.Path(sys.argv[1]), 'new')\n"
    )
    with fault("kill -9 while a file is written"):
        done = subprocess.run([sys.executable, "-c", program, str(path)])
        assert done.returncode == -signal.SIGKILL
        assert path.read_text() == "old"
        write_atomically(path, "new")
        assert path.read_text() == "new"


def test_a_failed_write_leaves_the_old_file_and_no_other(fault, tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    path.write_text("old")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with fault("disk full while a file is written"):
        with pytest.raises(OSError, match="No space"):
            write_atomically(path, "new")
        assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"] and path.read_text() == "old"
