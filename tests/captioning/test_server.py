"""Captions through a real HTTP server that answers as OpenAI's chat interface does, and fails in many ways."""

import base64
import io
import json
import threading
from pathlib import Path

import pytest
from PIL import Image

from vlmcap.captioning import server as server_module
from vlmcap.captioning.arguments import CaptionArguments
from vlmcap.captioning.output import caption_paths, read_journal
from vlmcap.captioning.server import TRIES, AnswerError, ChatServer, ServerError, data_uri, server_captions

PROMPT = "説明してください。"


@pytest.fixture
def paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(f"{number}.png")
    return [f"{number}.png" for number in range(12)]


def client(chat, **options):
    return ChatServer(chat.address, options.pop("model", None), PROMPT, 40, first_wait=0, **options)


def test_what_is_asked(chat, paths, monkeypatch):
    monkeypatch.setenv("CAPTION_SERVER_KEY", "secret")
    assert client(chat).caption("7.png") == ["色 7,0,0"]
    path, key, body = chat.requests[-1]
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    assert body["model"] == "qwen" and body["max_tokens"] == 40 and body["temperature"] == 0
    assert body["messages"][0]["content"][1] == {"type": "text", "text": PROMPT}
    record = json.dumps(client(chat).record())
    assert "qwen" in record and PROMPT in json.loads(record)["prompt"] and "secret" not in record


def test_the_picture_is_read_as_everywhere_and_bounded(chat, tmp_path):
    photo = Image.new("RGBA", (400, 100), (0, 0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    photo.save(tmp_path / "p.png", exif=exif)
    client(chat, max_pixels=10_000).caption(str(tmp_path / "p.png"))
    url = chat.requests[-1][2]["messages"][0]["content"][0]["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert image.size == (50, 200) and image.mode == "RGB" and image.getpixel((5, 5)) == (255, 255, 255)
    small = Image.new("RGB", (9, 9))
    assert Image.open(io.BytesIO(base64.b64decode(data_uri(small, 81)[22:]))).size == (9, 9)


@pytest.mark.parametrize(
    "fault",
    [
        429,
        500,
        503,
        408,
        "break",
        b"<html>garbage",
        {"choices": []},
        {"choices": [{"message": {"content": " "}}]},
        [1],
    ],
    ids=str,
)
def test_what_passes_is_tried_again(chat, paths, fault):
    chat.script = [fault] * (TRIES - 1)
    assert client(chat).caption("3.png") == ["色 3,0,0"]
    assert len(chat.requests) == TRIES
    chat.always = fault
    with pytest.raises(AnswerError, match=f"{TRIES} times"):
        client(chat).caption("3.png")


def test_a_server_that_is_too_slow_is_asked_again(chat, paths, monkeypatch):
    monkeypatch.setattr(server_module, "TIMEOUT", server_module.httpx2.Timeout(5, read=0.05))
    chat.together = threading.Event()  # nobody sets it: no answer comes
    with pytest.raises(AnswerError, match="no answer .ReadTimeout"):
        client(chat, model="qwen").caption("1.png")
    chat.together.set()
    assert len(chat.requests) == TRIES


def test_waits_grow_and_follow_the_server(chat, paths, monkeypatch):
    waits = []
    served = ChatServer(chat.address, "qwen", PROMPT, 40, first_wait=1)
    monkeypatch.setattr(served.stopped, "wait", waits.append)
    chat.script = ["break", "break", "break", 429, "break"]
    served.caption("1.png")
    assert [round(wait) for wait in waits[:2]] == [1, 2] and 4 <= waits[2] <= 5 and waits[3] == 0 and waits[4] >= 16


def test_a_picture_that_is_refused_is_listed_and_the_others_captioned(chat, paths):
    chat.script = [None, 400]
    args = CaptionArguments(pictures=paths, output="c.jsonl")
    served = client(chat)
    failed = caption_paths(paths, lambda todo: server_captions(todo, served, 1), args, served.record())
    assert list(failed.values()) == ['the server answers 400: {"error": {"message": "injected 400"}}']
    assert len(list(read_journal(Path("c.jsonl")))) == 11
    again = client(chat)
    assert not caption_paths(paths, lambda todo: server_captions(todo, again, 4), args, again.record())
    assert len(chat.requests) == 13  # the eleven are not asked again
    assert dict(read_journal(Path("c.jsonl"))) == {f"{n}.png": [f"色 {n},0,0"] for n in range(12)}


def test_a_server_that_fails_for_all_ends_the_run(chat, paths, monkeypatch):
    for status, message in ((401, "answers 401"), (404, "answers 404")):
        chat.always = status
        with pytest.raises(ServerError, match=message):
            list(server_captions(paths, client(chat), 2))
    monkeypatch.setattr(server_module, "TRIES", 1)
    chat.always = 500
    with pytest.raises(ServerError, match="no caption for 10 pictures one after another"):
        list(server_captions(paths, client(chat), 2))


def test_a_server_that_is_not_there(chat, paths):
    served = client(chat)
    chat.shutdown()
    chat.server_close()
    args = CaptionArguments(pictures=paths, output="c.jsonl")
    with pytest.raises(ServerError, match="cannot be reached.*the same command continues"):
        caption_paths(paths, lambda todo: server_captions(todo, served, 2), args, served.record())


def test_requests_at_once_are_bounded(chat, paths):
    chat.together = threading.Barrier(3)  # answers when three have come: fewer at once would never be answered
    assert len(list(server_captions(paths, client(chat, concurrency=3), 3))) == 12
    assert chat.most == 3


def test_names_of_models(chat):
    chat.models = ["a", "b"]
    with pytest.raises(ServerError, match="serves a, b: choose with --model"):
        client(chat)
    assert client(chat, model="b").model == "b"
    with pytest.raises(ServerError, match="an address such as"):
        ChatServer("localhost:8000", "a", PROMPT, 40)
