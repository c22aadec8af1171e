"""Where a number came from: library versions, git commit, hardware. Every metrics file and card carries these."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import psutil

from vlmcap.credentials import redact
from vlmcap.versions import installed_versions

LIBRARIES = (
    "vlmcap torch torchvision transformers trl peft bitsandbytes datasets accelerate huggingface-hub fugashi "
    "unidic-lite sacrebleu"
).split()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that shape a result; what is not installed is left out."""
    return {"python": platform.python_version()} | installed_versions(LIBRARIES)


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, `-dirty` after it for uncommitted changes; None outside one."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # Fails when the package is installed inside the checkout of another project.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (subprocess.CalledProcessError, FileNotFoundError):
        return None
    return commit + ("-dirty" if status.strip() else "")


def hardware() -> dict:
    """The device the work ran on. Memory sizes are bytes; `device_memory_bytes` is None on a CPU."""
    import torch  # names, versions and times are asked for where it is not loaded

    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    return {
        "device": gpu.name if gpu else "CPU",
        "device_memory_bytes": gpu.total_memory if gpu else None,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def public_name(name: str) -> str:
    """How a record that may be published names a Hub id or folder: an absolute path by its last part alone, an address
    without user and password."""
    return redact(Path(name).name if Path(name).is_absolute() else name)


def now() -> str:
    """Current time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
