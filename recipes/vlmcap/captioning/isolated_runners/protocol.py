"""What a runner says to the script that started it. Standard library only: it runs in every environment.

JSON lines, UTF-8. The script sends a header, then one request an image:

    {"protocol": 1, "model": "org/name", "revision": "<commit>", "trust_remote_code": true,
     "decoding": {"num_beams": 3, "max_new_tokens": 64, "do_sample": false}}
    {"image_id": 7, "image": "<PNG in base64>", "prompt": "..."}

The runner answers the header when the model is loaded, then each request in turn, and ends with its input:

    {"ready": {"versions": {"python": "3.11.9", "torch": "2.4.0", ...}, "parameters": 2300000000, "dtype": "bfloat16"}}
    {"image_id": 7, "caption": "...", "peak_memory_bytes": 6100000000}

or, when anything fails, it says {"error": "..."} instead and ends. What else it prints goes to stderr.
"""

import base64
import json
import os
import platform
import sys
import traceback
from importlib import metadata

PROTOCOL = 1
LIBRARIES = ("torch", "torchvision", "transformers", "accelerate", "pillow", "numpy")


def versions():
    """Versions of Python and of those libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    return found


def peak_memory():
    """Bytes of device memory held at most; None without a GPU."""
    torch = sys.modules.get("torch")
    return torch.cuda.max_memory_reserved() if torch and torch.cuda.is_available() else None


def serve(load):
    """Answers requests until the input ends.

    Args:
        load: takes the header and returns (caption, about): `caption(png: bytes, prompt: str) -> str`, and what is
            known of the model, {"parameters": int, "dtype": str}.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not come between the answers

    def say(answer):
        answers.write(json.dumps(answer, ensure_ascii=False) + "\n")
        answers.flush()

    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    try:
        header = json.loads(requests.readline())
        if header["protocol"] != PROTOCOL:
            raise ValueError(f"protocol {header['protocol']}, but this runner speaks {PROTOCOL}")
        caption, about = load(header)
        say({"ready": {"versions": versions(), **about}})
        for line in requests:
            request = json.loads(line)
            text = caption(base64.b64decode(request["image"]), request["prompt"])
            say({"image_id": request["image_id"], "caption": text, "peak_memory_bytes": peak_memory()})
    except Exception as error:
        traceback.print_exc()
        say({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)
