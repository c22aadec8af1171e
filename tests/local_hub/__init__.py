"""A tiny Hugging Face Hub for tests: real HTTP for the real clients, standard library and PyYAML.

In a test, the `hub` fixture of tests/conftest.py. Alone:

    python -m tests.local_hub --port 8899 --root /tmp/hubdata
    export HF_ENDPOINT=http://127.0.0.1:8899 HF_TOKEN=hf_user_write HF_HUB_DISABLE_XET=1

The Hub API is at http://127.0.0.1:PORT; "CDN" URLs use http://localhost:PORT, so that clients see another origin
(X-Linked-Etag redirect, no Authorization header), as with the real Hub and its CDN.
Control, for tests in another process: POST /__faults__ [spec, ...], GET /__log__, POST /__reset__[?repos].
"""

from .faults import Fault
from .server import Hub
from .store import Commit, File, HubError, Repo

__all__ = ["Commit", "Fault", "File", "Hub", "HubError", "Repo"]
