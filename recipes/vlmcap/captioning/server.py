"""Captions through an OpenAI-compatible chat server: vLLM, `transformers serve`, llama.cpp and others.

A picture is read here as everywhere, scaled down to the pixel bound, and sent as a data URI (PNG).
"""

import base64
import io
import math
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator

import httpx2
from PIL import Image

from vlmcap.captioning.arguments import CaptionArguments
from vlmcap.captioning.captioner import decoding_of, find_settings, language_of
from vlmcap.captioning.pictures import read_ahead, read_picture
from vlmcap.errors import UserError, notice

MAX_PIXELS = 1_003_520  # of a picture that is sent, where nothing else is asked: 1,280 image tokens of Qwen2-VL
TRIES = 6  # of one request; with FIRST_WAIT they take 31 seconds and more
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds before the second try, and before any
IN_A_ROW = 10  # so many pictures that the server could not answer one after another end the run
PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
MEANT_FOR_ALL = (401, 403, 404, 405)  # another picture would get the same answer
TIMEOUT = httpx2.Timeout(30, read=300)


class ServerError(UserError):
    """The server cannot be used as asked. The message says what it answered; captions so far are kept."""


class AnswerError(ValueError):
    """One picture was not answered, for the reason that the message gives."""


class ChatServer:
    """Asks a server for the caption of a picture; threads may share it.

    Args:
        address: e.g. http://localhost:8000, with or without /v1.
        model: name of the served model; None takes the only one that there is.
        max_pixels: larger pictures are scaled down.
        first_wait: seconds before a second try; every further wait is twice as long.
        language: of the captions, an ISO 639-1 code.

    Raises:
        ServerError: the address is malformed; there is no such server; `model` is None and it serves several.
    """

    def __init__(
        self,
        address: str,
        model: str | None,
        prompt: str,
        max_new_tokens: int,
        max_pixels: int | None = None,
        concurrency: int = 8,
        first_wait: float = FIRST_WAIT,
        language: str = "ja",
    ):
        if not address.startswith(("http://", "https://")):
            raise ServerError(f"--server {address}: an address such as http://localhost:8000 is needed")
        key = os.environ.get("CAPTION_SERVER_KEY")
        self.address = address.rstrip("/").removesuffix("/v1")
        self.client = httpx2.Client(
            base_url=f"{self.address}/v1/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=TIMEOUT,
            limits=httpx2.Limits(max_connections=concurrency),
        )
        self.prompt, self.max_new_tokens, self.language = prompt, max_new_tokens, language
        self.max_pixels, self.first_wait = max_pixels or MAX_PIXELS, first_wait
        self.stopped = threading.Event()
        self.model = model or self._only_model()

    def record(self) -> dict:
        """ "model", "prompt" and "decoding" of a run record."""
        decoding = {"max_new_tokens": self.max_new_tokens, "temperature": 0, "max_pixels": self.max_pixels}
        return {
            "model": {"id": self.model, "server": self.address},
            "prompt": self.prompt,
            "decoding": decoding,
        }

    def caption(self, path: str) -> list[str]:
        """The caption of the picture in a file, as a list of one.

        Raises:
            BadImageError: it cannot be read.
            AnswerError: the server refuses this picture, or fails at it TRIES times.
            ServerError: it would answer any picture so, or cannot be reached.
        """
        parts = [
            {"type": "image_url", "image_url": {"url": data_uri(read_picture(path), self.max_pixels)}},
            {"type": "text", "text": self.prompt},
        ]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": self.max_new_tokens,
            "temperature": 0,
        }
        return [self._patiently(lambda: self.client.post("chat/completions", json=body), _content)]

    def stop(self) -> None:
        """Ends waits and connections of all threads; afterwards nothing can be asked."""
        self.stopped.set()
        self.client.close()

    def _only_model(self) -> str:
        names = self._patiently(lambda: self.client.get("models"), _model_names)
        if len(names) != 1:
            raise ServerError(f"{self.address} serves {', '.join(names) or 'no model'}: choose with --model NAME")
        return names[0]

    def _patiently(self, ask: Callable[[], httpx2.Response], read: Callable[[object], object]):
        """What `read` makes of the answer. What passes (overload, server errors, broken connections, answers in
        another form) is tried again, after waits that grow, or as long as the server asks."""
        for tried in range(1, TRIES + 1):
            asked_wait, unreachable = None, False
            try:
                response = ask()
                if response.status_code == 200:
                    return read(response)
                problem = f"the server answers {response.status_code}: {_said(response)}"
                if response.status_code in MEANT_FOR_ALL or response.is_redirect:
                    raise ServerError(f"{self.address}: {problem}. Check --server, --model and CAPTION_SERVER_KEY.")
                if response.status_code not in PASSING:
                    raise AnswerError(problem)
                asked_wait = _retry_after(response)
            except httpx2.ConnectError as error:
                problem, unreachable = f"no connection ({error})", True
            except httpx2.HTTPError as error:
                problem = f"no answer ({type(error).__name__}: {error})"
            except _FormError as error:
                problem = str(error)
            if tried < TRIES:
                wait = self.first_wait * 2 ** (tried - 1) * random.uniform(1, 1.25)
                self.stopped.wait(min(wait if asked_wait is None else asked_wait, LONGEST_WAIT))
            if self.stopped.is_set():
                raise AnswerError("stopped")
        if unreachable:
            raise ServerError(
                f"{self.address} cannot be reached: {problem}. The captions so far are kept: when it runs, the same"
                " command continues."
            )
        raise AnswerError(f"{problem}, {TRIES} times")


class _FormError(ValueError):
    """The answer is not in the form that the interface has."""


def _content(response: httpx2.Response) -> str:
    try:
        content = response.json()["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise _FormError(f"the answer is not a chat completion ({_said(response)!r})") from error
    if not isinstance(content, str) or not content.strip():
        raise _FormError(f"the answer holds no text ({_said(response)!r})")
    return " ".join(content.encode("utf-8", "replace").decode().split())


def _model_names(response: httpx2.Response) -> list[str]:
    try:
        return [str(model["id"]) for model in response.json()["data"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _FormError(f"the answer is not a list of models ({_said(response)!r})") from error


def _said(response: httpx2.Response) -> str:
    return " ".join(response.text.split())[:200]


def _retry_after(response: httpx2.Response) -> float | None:
    text = response.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() else None


def data_uri(image: Image.Image, max_pixels: int) -> str:
    """The picture as PNG in a data URI, scaled down to `max_pixels` at most; its shape stays, to a pixel."""
    if image.width * image.height > max_pixels:
        scale = math.sqrt(max_pixels / (image.width * image.height))
        size = [max(1, math.floor(side * scale)) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def server_captions(
    paths: Iterable[str], server: ChatServer, concurrency: int
) -> Iterator[tuple[str, list[str] | Exception]]:
    """(path, its caption or why there is none), one by one in order, `concurrency` requests at once.

    Raises:
        ServerError: the server fails for all pictures, or for IN_A_ROW of them one after another.
    """
    failing = 0
    try:
        for path, said in read_ahead(paths, server.caption, concurrency, concurrency):
            if isinstance(said, ServerError):
                raise said
            failing = failing + 1 if isinstance(said, AnswerError) else 0
            if failing == IN_A_ROW:
                raise ServerError(
                    f"{server.address} gave no caption for {IN_A_ROW} pictures one after another; of the last: {said}."
                    " The captions so far are kept: the same command continues."
                )
            yield path, said
    finally:
        server.stop()


def open_server(args: CaptionArguments) -> ChatServer:
    """The server of a command line; prompt, length and pixel bound are those of `args.adapter` where there is one.

    Raises:
        ServerError: as `ChatServer`.
        ModelError, SettingsError: there is no such adapter, or its captioning.json is damaged.
    """
    settings = find_settings(args)[2] if args.adapter else None
    decoding = decoding_of(args, settings)
    if decoding.num_beams > 1 and settings:
        notice(f"the server searches in its own way: {args.adapter} was scored with {decoding.num_beams} beams")
    max_pixels = args.max_pixels or (settings and settings.max_pixels)
    return ChatServer(
        args.server,
        args.model,
        decoding.prompt,
        decoding.max_new_tokens,
        max_pixels,
        args.concurrency,
        language=language_of(args, settings),
    )
