"""Models that need an environment of their own: built with uv, spoken to through JSON lines.

The other side of the conversation, and its format, is isolated_runners/protocol.py.
"""

import base64
import hashlib
import io
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

import datasets
from accelerate import PartialState
from filelock import FileLock

from vlmcap.atomic_write import write_atomically
from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.captioning.baselines import Baseline
from vlmcap.captioning.generate import decoding_record
from vlmcap.captioning.isolated_runners.protocol import PROTOCOL
from vlmcap.captioning.predictions import PredictionsError, PredictionsFile, write_captions
from vlmcap.data.images import open_image
from vlmcap.errors import UserError
from vlmcap.places import find_uv
from vlmcap.provenance import public_name

RUNNERS = Path(__file__).parent / "isolated_runners"
ENVIRONMENTS = Path("~/.cache/vlmcap/envs")
LOAD_TIMEOUT = 3600.0  # seconds; the first start downloads the model
CAPTION_TIMEOUT = 600.0  # seconds for one caption, on a CPU too


class IsolatedError(UserError):
    """An environment cannot be built, or a runner failed. The message ends with what it last printed."""


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise IsolatedError(f"{what} failed: {' '.join(command)}\n{_tail((done.stdout + done.stderr).splitlines())}")


def _tail(lines: list[str]) -> str:
    return "\n".join(f"  {line}" for line in lines[-15:])


def build_environment(row: Baseline, env_dir: Path = ENVIRONMENTS) -> Path:
    """The folder of the row's environment, built when it is not there yet.

    It is in `env_dir` under the row's key and a hash of its Python version, requirements, date and source: other
    pins make another environment. No package is newer than the row's `packages_until`. It counts as built when
    `complete.json`, written last, lists what was installed.

    Raises:
        IsolatedError: uv or git failed.
    """
    recipe = {key: getattr(row, key) for key in ("python", "requirements", "packages_until", "source")}
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    env_dir = env_dir.expanduser().resolve()
    env_dir.mkdir(parents=True, exist_ok=True)
    folder = env_dir / f"{row.key}-{digest}"
    complete = folder / "complete.json"
    with FileLock(env_dir / f"{folder.name}.lock"):
        if complete.exists():
            return folder
        shutil.rmtree(folder, ignore_errors=True)  # half-built
        uv = find_uv()
        print(f"Building the environment of {row.key} in {folder}", file=sys.stderr, flush=True)
        _run([uv, "venv", "--quiet", "--python", row.python, str(folder)], f"The environment of {row.key}")
        python = str(folder / "bin/python")
        install = [uv, "pip", "install", "--quiet", "--python", python]
        install += ["--exclude-newer", f"{row.packages_until}T23:59:59Z"]  # a date alone is one of this machine's zone
        _run([*install, *row.requirements], f"Installing {row.key}")
        if row.source:
            code = str(folder / "source")
            _run(["git", "init", "--quiet", code], f"Fetching the code of {row.key}")
            _run(["git", "-C", code, "fetch", "--quiet", "--depth", "1", row.source["url"], row.source["commit"]],
                 f"Fetching the code of {row.key}")  # fmt: skip
            _run(["git", "-C", code, "checkout", "--quiet", row.source["commit"]], f"Fetching the code of {row.key}")
        frozen = subprocess.run([uv, "pip", "freeze", "--python", python], capture_output=True, text=True, check=True)
        write_atomically(complete, json.dumps(recipe | {"installed": frozen.stdout.splitlines()}, indent=2))
    return folder


class IsolatedModel:
    """A running model in its environment. A context manager: the runner ends with it.

    Attributes:
        about: what the runner said when it was ready: versions, parameters, dtype.
        peak_memory_bytes: device memory that it has held at most so far; None on a CPU.
    """

    def __init__(
        self,
        row: Baseline,
        folder: Path,
        header: dict,
        load_timeout: float = LOAD_TIMEOUT,
        caption_timeout: float = CAPTION_TIMEOUT,
    ):
        """Starts the runner in the environment `folder` and waits until the model is loaded.

        Args:
            header: "model", "revision", "trust_remote_code" and "decoding" for the runner.
            load_timeout: seconds until the model must be loaded.
            caption_timeout: seconds that one caption may take.

        Raises:
            IsolatedError: the runner failed or took too long.
        """
        self.row, self.caption_timeout, self.peak_memory_bytes = row, caption_timeout, None
        path = [str(RUNNERS)] + ([str(folder / "source")] if row.source else [])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONNOUSERSITE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONIOENCODING": "utf-8",
        }
        environment.pop("VIRTUAL_ENV", None)
        self.process = subprocess.Popen(
            [str(folder / "bin/python"), str(RUNNERS / row.runner)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            env=environment,
        )
        self.answers, self.printed = queue.Queue(), deque(maxlen=15)
        self.threads = [threading.Thread(target=read, daemon=True) for read in (self._read_answers, self._read_stderr)]
        for thread in self.threads:
            thread.start()
        try:
            self._send({"protocol": PROTOCOL} | header)
            self.about = self._answer(load_timeout, "loading the model")["ready"]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "IsolatedModel":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def caption(self, rows: datasets.Dataset, prompt: str) -> list[str]:
        """Captions of rows of `load_captions`, one after the other.

        Raises:
            IsolatedError: the runner failed, ended or took too long.
        """
        captions = []
        for row in rows:
            picture = io.BytesIO()
            open_image(row).save(picture, "PNG")  # the pixels that every other model gets
            image = base64.b64encode(picture.getvalue()).decode("ascii")
            self._send({"image_id": row["image_id"], "image": image, "prompt": prompt})
            answer = self._answer(self.caption_timeout, f"image {row['image_id']}")
            if answer.get("image_id") != row["image_id"]:
                raise IsolatedError(f"{self.row.runner} answered {answer!r:.200} to image {row['image_id']}")
            self.peak_memory_bytes = answer["peak_memory_bytes"]
            captions.append(" ".join(answer["caption"].split()))
        return captions

    def close(self) -> None:
        """Stops the runner, whatever it does."""
        self.process.kill()
        self.process.wait()
        for thread in self.threads:
            thread.join(5)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            try:
                stream.close()
            except BrokenPipeError:
                pass

    def _send(self, message: dict) -> None:
        try:
            self.process.stdin.write(json.dumps(message, ensure_ascii=False) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the answer that does not come says so

    def _answer(self, timeout: float, what: str) -> dict:
        try:
            line = self.answers.get(timeout=timeout)
        except queue.Empty:
            raise IsolatedError(self._failure(f"took more than {timeout:.0f} s", what)) from None
        if line is None:
            self.threads[1].join(5)  # the last words
            raise IsolatedError(self._failure(f"ended with exit status {self.process.wait()}", what))
        answer = json.loads(line)
        if "error" in answer:
            self.process.wait(10)
            self.threads[1].join(5)
            raise IsolatedError(self._failure(f"failed: {answer['error']}", what))
        return answer

    def _failure(self, what_happened: str, what: str) -> str:
        tail = _tail(list(self.printed))
        return f"{self.row.runner} {what_happened} ({what})." + (f" It last printed:\n{tail}" if tail else "")

    def _read_answers(self) -> None:
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put(None)

    def _read_stderr(self) -> None:
        for line in self.process.stderr:
            self.printed.append(line.rstrip("\n"))
            sys.stderr.write(line)


def start_isolated(
    row: Baseline, name: str, revision: str | None, args: GenerationArguments, env_dir: Path = ENVIRONMENTS
) -> IsolatedModel:
    """Builds the environment of a row when needed and loads its model there.

    Call it when `check_remote_code` has let the row pass: the runner is allowed to run the code that the row names.

    Raises:
        IsolatedError: the environment cannot be built, the model cannot be loaded, or there are several processes.
        PredictionsError: constrained decoding is asked for, which lives in this process.
    """
    if PartialState().num_processes > 1:
        raise IsolatedError(f"{row.key} runs in its own environment, in one process: leave `accelerate launch` out")
    decoding = decoding_record(args)
    constrained = decoding.keys() & {"japanese_only", "no_repeat_ngram_size", "avoid_words"}
    if constrained:
        raise PredictionsError(f"{row.key} runs in its own environment, where there is no {', '.join(constrained)}")
    if row.experimental:
        print(
            f"{row.key} is experimental: its runner has never seen the model. Look at its captions.", file=sys.stderr
        )
    header = {"model": name, "revision": revision, "trust_remote_code": row.remote_code, "decoding": decoding}
    return IsolatedModel(row, build_environment(row, env_dir), header)


def isolated_record(model: IsolatedModel, name: str, revision: str | None) -> dict:
    """The "model" part of the run record, as `model_record` makes it for a model of this process."""
    return {
        "id": public_name(name),
        "revision": revision,
        "adapter": None,
        "adapter_revision": None,
        "dtype": model.about["dtype"],
        "quantization": None,
        "parameters": model.about["parameters"],
    }


def generate_isolated(
    model: IsolatedModel, rows: datasets.Dataset, output: Path, args: GenerationArguments, record: dict
) -> None:
    """What `caption_split` does, with a model in its own environment: one image at a time, a line a caption.

    Args:
        record: "model", "dataset" and "saw" of the run record.

    Raises:
        IsolatedError: the runner failed; what is done stays, and the same call continues from there.
    """
    record |= {
        "prompt": args.prompt,
        "decoding": decoding_record(args) | {"batch_size": 1},
        "environment": {"requirements": model.row.requirements, "versions": model.about["versions"]},
    }
    write_captions(
        lambda numbers, _: (model.caption(rows.select([row]), args.prompt) for row in numbers),
        rows,
        [PredictionsFile(output, record)],
        lambda: model.peak_memory_bytes,
    )
