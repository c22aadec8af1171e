"""Journal, sidecars and formats: what is written, continued, and left as it is."""

import csv
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from vlmcap.captioning.arguments import CaptionArguments
from vlmcap.captioning.output import caption_paths, journal_path, read_journal, write_formatted
from vlmcap.captioning.pictures import PictureError, caption_pictures
from vlmcap.captioning.predictions import PredictionsError
from vlmcap.evaluation.caption_files import read_predictions

RECORD = {"model": {"id": "a/b"}, "prompt": "p", "decoding": {"num_beams": 3, "num_captions": 1}}


@pytest.fixture
def paths(tmp_path, monkeypatch):
    """Ten pictures, told apart by their colour; the one called 3 is damaged."""
    monkeypatch.chdir(tmp_path)
    for number in range(10):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(f"{number}.png")
    (tmp_path / "3.png").write_bytes(b"no picture")
    return [f"{number}.png" for number in range(10)]


class Model:
    """Says the colour of a picture, counts the calls, and ends the process at one of them."""

    def __init__(self, kill_at=None, captions=1):
        self.seen, self.kill_at, self.captions = [], kill_at, captions

    def prepare(self, image):
        return image.getpixel((0, 0))[0]

    def run(self, colours):
        for colour in colours:
            if self.kill_at is not None and len(self.seen) >= self.kill_at:
                os._exit(9)
            self.seen.append(colour)
            yield [f"色 {colour}, {n}" for n in range(self.captions)]

    def stream(self, paths):
        return caption_pictures(paths, self, workers=2)


def run(paths, model, record=RECORD, **options):
    args = CaptionArguments(pictures=paths, num_captions=model.captions, **options)
    return args, caption_paths(paths, model.stream, args, record)


def text(name: str) -> str:
    return Path(name).read_text(encoding="utf-8")


def in_fork(function) -> int:
    process = os.fork()
    if process == 0:
        try:
            function()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_json_lines_are_predictions_and_continue(paths):
    model = Model()
    _, failed = run(paths[:6], model, output="out/captions.jsonl")
    assert list(failed) == ["3.png"] and "not an image" in failed["3.png"]
    again = Model()
    run(paths, again, output="out/captions.jsonl")
    assert sorted(again.seen) == [6, 7, 8, 9]
    said = read_predictions("out/captions.jsonl")  # what the other scripts read
    assert said == {f"{n}.png": f"色 {n}, 0" for n in range(10) if n != 3}
    nothing = Model()
    run(paths, nothing, output="out/captions.jsonl")
    assert nothing.seen == []


@pytest.mark.parametrize("kill_at", [0, 2, 5, 7])
@pytest.mark.parametrize(
    "options", [{"output": "c.jsonl"}, {"output": "c.csv"}, {"output": "c.jsonl", "sidecar": True}]
)
def test_killed_at_any_picture_it_continues(paths, kill_at, options):
    status = in_fork(lambda: run(paths, Model(kill_at), **options))
    assert status == 9
    journal = journal_path(CaptionArguments(**options))
    kept = journal.read_bytes().count(b"\n")
    assert kept == kill_at
    with journal.open("ab") as file:
        file.write(b'{"image_id": "half')  # as a kill in the middle of a write leaves it
    model = Model()
    args, failed = run(paths, model, **options)
    assert len(model.seen) == 9 - kept and list(failed) == ["3.png"]
    assert sorted(name for name, _ in read_journal(journal)) == [p for p in paths if p != "3.png"]
    if args.sidecar:
        assert all(text(f"{n}.txt") == f"色 {n}, 0\n" for n in range(10) if n != 3)


def test_sidecars_missing_after_a_kill_are_written_from_the_journal(paths):
    run(paths, Model(), output="c.jsonl", sidecar=True)
    os.unlink("5.txt")
    model = Model()
    run(paths, model, output="c.jsonl", sidecar=True)
    assert model.seen == [] and text("5.txt") == "色 5, 0\n"


def test_sidecars_alone(paths, capsys):
    Path("4.txt").write_text("mine", encoding="utf-8")
    model = Model(captions=2)
    _, failed = run(paths, model, sidecar=True)
    assert 4 not in model.seen and text("4.txt") == "mine"
    assert text("7.txt") == "色 7, 0\n色 7, 1\n"
    assert not os.path.exists("3.txt") and list(failed) == ["3.png"]
    assert "7.png\t色 7, 0\n7.png\t色 7, 1\n" in capsys.readouterr().out
    model = Model(captions=2)
    run(paths, model, sidecar=True)
    assert model.seen == []
    run(paths, model, sidecar=True, overwrite=True)
    assert len(model.seen) == 9 and text("4.txt") == "色 4, 0\n色 4, 1\n"


def test_a_sidecar_is_of_one_picture(paths):
    Image.new("RGB", (4, 4), (77, 0, 0)).save("0.jpg")
    Image.new("RGB", (4, 4)).save("picture", format="PNG")
    os.rename("picture", "named.txt")
    _, failed = run(["0.png", "0.jpg", "named.txt"], Model(), sidecar=True, overwrite=True)
    assert failed.keys() == {"0.jpg", "named.txt"}
    assert "its .txt would be that of 0.png" in failed["0.jpg"] and "overwrite it" in failed["named.txt"]
    assert text("0.txt") == "色 0, 0\n"
    assert Image.open("named.txt").size == (4, 4)
    _, failed = run(["5.png", "6.png"], Model(), sidecar=True, output="6.txt")
    assert list(failed) == ["6.png"]


def test_a_sidecar_that_cannot_be_written_is_listed(paths):
    name = "n" * 249 + ".png"  # with its .txt and what is written first, longer than a file name may be
    os.rename("1.png", name)
    _, failed = run([name, "2.png"], Model(), output="c.jsonl", sidecar=True)
    assert list(failed) == [name] and "cannot be written" in failed[name]
    assert os.path.exists("2.txt")


def test_csv_and_text(paths):
    os.rename("1.png", 'a, "b"\n😀.png')
    names = ["0.png", 'a, "b"\n😀.png']
    args, _ = run(names, Model(captions=2), output="c.csv")
    write_formatted(args)
    with open("c.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["file", "caption", "caption_2"], *([n, f"色 {i}, 0", f"色 {i}, 1"] for i, n in enumerate(names))]
    args, _ = run(names, Model(captions=2), output="c.txt")
    write_formatted(args)
    lines = text("c.txt").split("\n")
    assert lines[2] == 'a, "b"\\n😀.png\t色 1, 0' and len(lines) == 5


@pytest.mark.parametrize("form", ["text", "jsonl", "csv"])
def test_stdout(paths, capsys, form):
    run(["0.png", "1.png", "2.png"], Model(), format=form)
    out = capsys.readouterr().out.splitlines()
    if form == "jsonl":
        assert [json.loads(line)["caption"] for line in out] == ["色 0, 0", "色 1, 0", "色 2, 0"]
    elif form == "csv":
        assert out[0] == "file,caption" and out[1:] == [f'{n}.png,"色 {n}, 0"' for n in range(3)]
    else:
        assert out == [f"{n}.png\t色 {n}, 0" for n in range(3)]


def test_what_is_not_continued(paths):
    run(paths[:2], Model(), output="c.jsonl")
    with pytest.raises(PredictionsError, match="started with another prompt"):
        run(paths, Model(), RECORD | {"prompt": "q"}, output="c.jsonl")
    for name in ("mine.jsonl", "mine.csv"):
        Path(name).write_text("a file of the user's", encoding="utf-8")
        with pytest.raises(PictureError, match=f"{name} exists, and is not of this command"):
            run(paths, Model(), output=name)
        assert text(name) == "a file of the user's"


def test_two_commands_do_not_write_one_file(paths):
    class Second(Model):
        def run(self, colours):
            with pytest.raises(PictureError, match="another command is writing c.jsonl"):
                run(paths, Model(), output="c.jsonl")
            return super().run(colours)

    run(paths[:2], Second(), output="c.jsonl")


def test_a_full_disk_keeps_what_is_written(paths):
    def full(todo):
        yield from list(Model().stream(todo))[:4]
        raise OSError(28, "No space left on device")

    args = CaptionArguments(pictures=paths, output="c.jsonl")
    with pytest.raises(PictureError, match="No space left on device.*run the same command again"):
        caption_paths(paths, full, args, RECORD)
    assert len(list(read_journal(journal_path(args)))) == 3
