"""Captioning is killed at every line, continued, and ends with each image once."""

import json
import os
import resource
import runpy
import signal
import stat
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import datasets
import pytest
from accelerate import PartialState

from tests.faults import ranks
from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.captioning.baselines import Baseline
from vlmcap.captioning.isolated import IsolatedModel, generate_isolated
from vlmcap.captioning.predictions import PredictionsError, PredictionsFile, shares, write_captions
from vlmcap.data.images import load_captions
from vlmcap.miniature.scenes import scenes

RECORD = {
    "model": {"id": "a/b"},
    "dataset": {"id": "c/d"},
    "saw": {},
    "prompt": "何?",
    "decoding": {"batch_size": 2},
}
IMAGES = 5
SOURCES = "vlmcap/captioning/predictions.py", "vlmcap/atomic_write.py"


def caption_rows(output: Path, images: int = IMAGES, word: str = "画像") -> None:
    assert PartialState(cpu=True).num_processes == int(os.environ.get("WORLD_SIZE", "1"))
    rows = datasets.Dataset.from_dict({"image_id": list(range(10, 10 + images))})

    def captions(numbers, files):
        return ([f"{word}{10 + i}"] for i in numbers)

    write_captions(captions, rows, [PredictionsFile(output, RECORD)], lambda: None)


def caption_both(output: Path, word: str = "画像") -> None:
    """Two files at once, as base and adapter are captioned: `output`, and one below it."""
    rows = datasets.Dataset.from_dict({"image_id": list(range(10, 10 + IMAGES))})

    def captions(numbers, files):
        return ([f"{word}{10 + i}"] * len(files) for i in numbers)

    write_captions(captions, rows, [PredictionsFile(path, RECORD) for path in both(output)], lambda: None)


def both(output: Path) -> list[Path]:
    return [output, output.parent / "adapter" / output.name]


def expected(images: int = IMAGES) -> str:
    return "".join(f'{{"image_id": {i}, "caption": "画像{i}"}}\n' for i in range(10, 10 + images))


def kept_lines(output: Path) -> set[str]:
    """The whole lines of captions that a run has left."""
    files = [path for path in (output, *shares(output)) if path.exists()]
    return {line for path in files for line in path.read_text(encoding="utf-8").split("\n")[:-1]}


def check(output: Path, kept: Iterable[str] = ()) -> None:
    """The whole file in the order of the rows, with the lines that were kept, a complete record, nothing beside them.

    A continued run says another word: what it had captioned again would show.
    """
    lines = output.read_text(encoding="utf-8").split("\n")[:-1]
    said = [json.loads(line) for line in lines]
    assert [entry["image_id"] for entry in said] == list(range(10, 10 + IMAGES)) and set(kept) <= set(lines)
    assert all(entry["caption"] in (f"画像{entry['image_id']}", f"続き{entry['image_id']}") for entry in said)
    record = json.loads(output.with_suffix(".run.json").read_text(encoding="utf-8"))
    assert record["created"] and record["seconds"] > 0
    names = sorted(path.name for path in output.parent.glob("[!.]*") if path.is_file())
    assert names == ["predictions.jsonl", "predictions.run.json"]


def forked(function, *args) -> int:
    """Exit status of a fork of this process that calls `function(*args)`."""
    pid = os.fork()
    if pid == 0:
        function(*args)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(line: int, output: Path) -> None:
    ranks.kill_at_line(line, *SOURCES)
    caption_both(output)
    sys.settrace(None)


def kill_everywhere(folder: Path) -> None:
    """Kills a run at the first and at the last time that it reaches each of its lines, and continues it.

    What a reader finds meanwhile is whole or not there.
    """
    os.environ["PATH"] = ""  # no git: asking for the commit takes longer than all else together
    PartialState(cpu=True)
    executed = ranks.record_lines(*SOURCES)
    caption_both(folder / "whole/predictions.jsonl")
    sys.settrace(None)
    first = {place: number for number, place in reversed(list(enumerate(executed, 1)))}
    last = {place: number for number, place in enumerate(executed, 1)}
    results = []
    for number in sorted({*first.values(), *last.values()}):
        output = folder / str(number) / "predictions.jsonl"
        status = forked(killed_at, number, output)
        whole = all(path.read_text(encoding="utf-8") == expected() for path in both(output) if path.exists())
        result = {"number": number, "line": executed[number - 1], "status": status, "whole": whole}
        results.append(result | {"kept": [sorted(kept_lines(path)) for path in both(output)]})
        caption_both(output, word="続き")
    (folder / "results.json").write_text(json.dumps(results))


def test_killed_at_every_line(fault, tmp_path):
    assert ranks.run(kill_everywhere, tmp_path, log=tmp_path / "log") == 0, ranks.tail(tmp_path / "log")
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) > 100 and {len(result["kept"][0]) for result in results} >= {0, 1, 2, 5}
    for result in results:
        with fault(f"kill -9 of captioning at {result['line']}, the {result['number']}-th line that it executes"):
            assert (result["status"], result["whole"]) == (-signal.SIGKILL, True)
            output = tmp_path / str(result["number"]) / "predictions.jsonl"
            for path, kept in zip(both(output), result["kept"], strict=True):
                check(path, kept)


@pytest.mark.parametrize("name", ["predictions.jsonl", "predictions.rank0.jsonl"])
def test_half_a_line_is_cut_off(fault, tmp_path, name):
    """A line that was cut after any byte is captioned again; the whole line before it is kept."""
    whole = expected(3).encode()
    first, second = whole.index(b"\n") + 1, whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for cut in range(first + 1, second):
        output = tmp_path / str(cut) / "predictions.jsonl"
        output.parent.mkdir()
        (output.parent / name).write_bytes(whole[:cut])
        output.with_suffix(".run.json").write_text(json.dumps(RECORD | {"seconds": 1.0}))
        with fault(f"{name} cut at byte {cut}"):
            caption_rows(output, word="続き")
            check(output, [whole[: first - 1].decode()])
            assert "続き11" in output.read_text(encoding="utf-8")


def killed_rank(line: int, victim: int, output: Path) -> None:
    if os.environ.get("RANK", "0") == str(victim):
        ranks.kill_at_line(line, *SOURCES)
    caption_rows(output)
    sys.settrace(None)


# Started by `first` processes, of which one is killed at a line, and continued by `then`. Process 0 writes the run
# record from line 40, captions until 115, joins the shares until 210, ends the record at 230, removes the shares.
@pytest.mark.parametrize(
    ("first", "victim", "line", "then"),
    [
        *[(2, 0, 40, 2), (2, 1, 60, 1), (3, 2, 65, 2), (3, 0, 100, 3), (3, 1, 70, 1)],
        *[(2, 0, 150, 3), (2, 0, 206, 2), (2, 0, 232, 1), (2, 0, 236, 2)],
    ],
)
def test_several_processes(fault, tmp_path, first, victim, line, then):
    output, log = tmp_path / "out/predictions.jsonl", tmp_path / "log"
    with fault(f"kill -9 of process {victim} of {first} at line {line} of captioning, continued by {then}"):
        statuses = ranks.run_ranks(first, killed_rank, line, victim, output, log=log)
        assert statuses[victim] == -signal.SIGKILL, (statuses, ranks.tail(log))
        kept, again = kept_lines(output), (caption_rows, output, IMAGES, "続き")
        if then == 1:
            assert ranks.run(*again, log=log) == 0, ranks.tail(log)
        else:
            assert ranks.run_ranks(then, *again, log=log) == [0] * then, ranks.tail(log)
        check(output, kept)


def test_a_killed_join_is_not_joined_twice(fault, tmp_path):
    """The captions are in the finished file and still in the shares."""
    output = tmp_path / "predictions.jsonl"
    caption_rows(output)
    lines = expected().splitlines(keepends=True)
    (tmp_path / "predictions.rank0.jsonl").write_text("".join(lines[::2]), encoding="utf-8")
    (tmp_path / "predictions.rank1.jsonl").write_text("".join(lines[1::2]), encoding="utf-8")
    with fault("kill -9 between joining the shares and removing them"):
        caption_rows(output)
        check(output)


def full(output: Path, size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        caption_rows(output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))  # of the log


@pytest.mark.parametrize("size", [100, 230, 400])
def test_a_full_disk_ends_with_one_sentence(fault, tmp_path, size):
    """No room for the record, for the captions, for the finished record (a file size limit stands for the disk)."""
    output, log = tmp_path / "out/predictions.jsonl", tmp_path / "log"
    with fault(f"no file can be larger than {size} bytes"):
        assert ranks.run(full, output, size, log=log) == 1
        last = ranks.tail(log).strip().splitlines()[-1]
        assert "cannot be read or written: File too large. The captions so far are kept" in last, last
        assert not output.exists() or output.read_text(encoding="utf-8") == expected()
        caption_rows(output)
        check(output)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"image_id": 10, "caption": "a"}\n{"image_id": 11\n', "line 2 is damaged, no JSON in UTF-8"),
        (b"\0\0\0\0\n", "line 1 is damaged, no JSON in UTF-8"),
        (b'"a"\n', "line 1 is damaged, no JSON object: 'a'"),
        (b'{"image_id": [10], "caption": "a"}\n', 'line 1 has no "image_id" and "caption"'),
    ],
)
def test_damaged_predictions_are_named(fault, tmp_path, content, message):
    output = tmp_path / "predictions.jsonl"
    output.with_suffix(".rank0.jsonl").write_bytes(content)
    with fault(f"predictions hold {content!r}"), pytest.raises(PredictionsError, match=message) as error:
        caption_rows(output)
    assert str(error.value).endswith(f"Delete predictions.rank0.jsonl in {tmp_path}, or choose another --output.")


def test_a_damaged_record_is_named(fault, tmp_path):
    output = tmp_path / "predictions.jsonl"
    caption_rows(output)
    output.with_suffix(".run.json").write_text('{"model": ')
    with fault("half a run record"), pytest.raises(PredictionsError, match="predictions.run.json is damaged, no JSON"):
        caption_rows(output)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    rows = []
    for number, scene in enumerate(scenes(6, seed=9, held_out=True)):
        scene.draw().save(folder / f"{number}.png")
        rows.append({"image_id": number, "file_name": f"{number}.png", "captions": scene.japanese()})
    datasets.Dataset.from_list(rows).to_parquet(folder / "data/test-00000-of-00001.parquet")
    (folder / "data/README.md").write_text("---\nlicense: cc0-1.0\ntags: [scenes-captions]\n---\n")
    return folder


def script(path: str, *arguments: str, kill_at_caption: int | None = None) -> None:
    sys.argv = [path, *arguments]
    if kill_at_caption:
        ranks.kill_at_call(kill_at_caption, "_lines", SOURCES[0])  # which makes the line that is written next
    runpy.run_path(path, run_name="__main__")


def test_infer_baseline_resumes(fault, pictures, repo_root, miniature_dir, tmp_path):
    program, log = str(repo_root / "scripts/infer_baseline.py"), tmp_path / "log"
    command = ["--model", miniature_dir, "--dataset", pictures / "data", "--image_dir", pictures, "--max_new_tokens"]
    command = [program, *map(str, command), "8", "--generation_batch_size", "1", "--output"]
    whole, output = tmp_path / "whole/predictions.jsonl", tmp_path / "killed/predictions.jsonl"
    assert ranks.run(script, *command, str(whole), log=log) == 0, ranks.tail(log)
    with fault("kill -9 of infer_baseline.py between captions"):
        killed = partial(script, kill_at_caption=3)
        assert ranks.run(killed, *command, str(output), log=log) == -signal.SIGKILL, ranks.tail(log)
        assert not output.exists() and len(kept_lines(output)) == 2
        assert ranks.run(script, *command, str(output), log=log) == 0, ranks.tail(log)
        assert output.read_bytes() == whole.read_bytes()


RUNNER = """
import os, signal, time
from pathlib import Path
from protocol import serve

def load(header):
    def caption(png, prompt):
        here = Path(__file__)
        while here.with_suffix(".hold").exists() and here.with_suffix(".count").stat().st_size == 2:
            time.sleep(0.01)
        if here.with_suffix(".kill").exists() and here.with_suffix(".count").stat().st_size == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        with here.with_suffix(".count").open("a") as file:
            file.write("x")
        return f"{len(png)} bytes"
    return caption, {"parameters": 3, "dtype": "float32"}

serve(load)
"""


def isolated(folder: Path, pictures: Path, output: Path) -> None:
    """Captions with a runner in the environment `folder`."""
    row = Baseline(
        "counter", "a/b", None, "mit", False, "package", None, "isolated", 0.0, {}, runner=str(folder / "count.py")
    )
    rows = load_captions(str(pictures / "data"), "test", image_dir=str(pictures))
    with IsolatedModel(row, folder, {"model": "a/b", "revision": None, "trust_remote_code": False}) as model:
        record = {"model": {"id": "a/b"}, "dataset": {"id": "c/d"}, "saw": {}}
        generate_isolated(model, rows, output, GenerationArguments(prompt="何?"), record)


@pytest.mark.parametrize("victim", ["runner", "script"])
def test_isolated_models_resume(fault, pictures, tmp_path, victim):
    """A runner that is killed is named; a script that is killed leaves no runner. No image is asked twice."""
    folder, output, log = tmp_path / "environment", tmp_path / "out/predictions.jsonl", tmp_path / "log"
    python = folder / "bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    (folder / "count.py").write_text(RUNNER)
    (folder / "count.count").touch()
    share = output.with_suffix(".rank0.jsonl")
    with fault(f"kill -9 of an isolated model's {victim}"):
        if victim == "runner":
            (folder / "count.kill").touch()
            assert ranks.run(isolated, folder, pictures, output, log=log) == 1
            assert "IsolatedError: " in ranks.tail(log) and "ended with exit status -9 (image 2)" in ranks.tail(log)
            (folder / "count.kill").unlink()
        else:
            (folder / "count.hold").touch()
            process = ranks.start(isolated, folder, pictures, output, log=log)
            while not share.exists() or share.read_bytes().count(b"\n") < 2:
                assert process.is_alive(), ranks.tail(log)
                time.sleep(0.01)
            process.kill()
            process.join()
            (folder / "count.hold").unlink()
            while ranks.processes_of(str(folder / "count.py")):  # it ends when it finds that nobody asks
                time.sleep(0.05)
        kept = share.read_bytes()
        assert ranks.run(isolated, folder, pictures, output, log=log) == 0, ranks.tail(log)
        said = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
        assert [line["image_id"] for line in said] == list(range(6)) and output.read_bytes().startswith(kept)
        # A kill may fall between the runner's count and the line of its caption.
        assert (folder / "count.count").stat().st_size <= 7
