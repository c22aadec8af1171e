"""Builds of datasets that are killed, run out of disk, or read files that have changed."""

import json
import resource
import signal
import subprocess
import sys

import pytest
from huggingface_hub import HfApi
from markdown_it import MarkdownIt

from vlmcap.data.arguments import PublishArguments
from vlmcap.data.errors import DataError
from vlmcap.data.publish import _changed_files, _visible, build, publish, summary_text
from vlmcap.data.sources import SourceFile

IMAGES = range(1, 41)


def write_annotations(folder, caption: str):
    """UIT-ViIC's training file; the build draws the test split from it, and it needs no tokenizer."""
    document = {
        "info": {"description": "<b>made up</b> | for\nthis test"},
        "images": [{"id": number, "file_name": f"{number:012d}.jpg", "coco_url": ""} for number in IMAGES],
        "annotations": [{"id": n, "image_id": n, "caption": f"{caption} số {n}."} for n in IMAGES],
    }
    path = folder / "train.json"
    path.write_text(json.dumps(document))
    return path


def arguments(folder, **changed) -> PublishArguments:
    places = {"annotations": [str(folder / "train.json")], "output_dir": str(folder / "out"), "overwrite": True}
    return PublishArguments(**{"source": "uit_viic", **places, **changed})


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What is replaced by a kill, and at which of its calls.
KILLS = {
    "while the rows are written": ("pyarrow.parquet.ParquetWriter", "write_table", 2),
    "before the old folder is moved away": ("pathlib.Path", "rename", 1),
    "when the old folder is away": ("pathlib.Path", "rename", 2),
    "before the old folder is deleted": ("shutil", "rmtree", 3),
}
# Forks before it has threads, so that all of them share one import of the libraries.
PROGRAM = """
import importlib, json, os, signal, sys
from vlmcap.data.publish import build
from vlmcap.data.arguments import PublishArguments

def build_and_die(place, name, number, arguments):
    module, _, attribute = place.rpartition(".")
    owner = getattr(importlib.import_module(module), attribute) if module else importlib.import_module(attribute)
    real, calls = getattr(owner, name), []
    def killing(*args, **kwargs):
        calls.append(name)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, name, killing)
    build(PublishArguments(**arguments))

for place, name, number, arguments in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        build_and_die(place, name, number, arguments)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status))
"""


def test_a_killed_build_leaves_the_old_dataset_or_the_new_one(fault, tmp_path):
    folders = {name: tmp_path / str(number) for number, name in enumerate(KILLS)}
    for folder in folders.values():
        folder.mkdir()
        write_annotations(folder, "Một con chó")
        build(arguments(folder))
        old = contents(folder / "out")
        write_annotations(folder, "Một con mèo")
    tasks = [[*KILLS[name], vars(arguments(folder))] for name, folder in folders.items()]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(tasks)], stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(KILLS)
    for name, folder in folders.items():
        with fault(f"a build killed {name}"):
            if name == "when the old folder is away":
                assert not (folder / "out").exists()  # the next build finds it again, also where that one fails
                with pytest.raises(DataError, match="no such file"):
                    build(arguments(folder, annotations=[str(folder / "train_gone.json")]))
            now = contents(folder / "out")
            if name == "before the old folder is deleted":
                assert now.keys() != old.keys()  # the fingerprint of the new rows is in the names of its files
            else:
                assert now == old
            assert build(arguments(folder))["splits"]["train"]["images"] == 36
            assert sorted(path.name for path in folder.iterdir()) == ["out", "train.json"]


def test_two_builds_of_one_folder(fault, tmp_path):
    from filelock import FileLock

    write_annotations(tmp_path, "Một con chó")
    (tmp_path / ".out.building").mkdir()
    with fault("two builds of one folder"), FileLock(tmp_path / ".out.building" / "lock"):
        with pytest.raises(DataError, match="out: another build is at work there"):
            build(arguments(tmp_path))
    build(arguments(tmp_path))


def test_a_full_disk_keeps_the_old_dataset(fault, tmp_path):
    write_annotations(tmp_path, "Một con chó")
    build(arguments(tmp_path))
    before = contents(tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))  # a write beyond fails, as on a full disk
    try:
        with fault("a disk that is full"):
            with pytest.raises(DataError, match=r"out: the build stopped \(.*\)\. That disk has [0-9.,]+ GB free"):
                build(arguments(tmp_path))
            assert contents(tmp_path / "out") == before
            assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "train.json"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_changed_file_is_reported(fault, tmp_path, hub):
    first = build(arguments(tmp_path, annotations=[str(write_annotations(tmp_path, "Một con chó"))]))
    assert first["changed_files"] == [] == build(arguments(tmp_path))["changed_files"]
    publish(arguments(tmp_path, push_to_hub=True, repo_id="user/captions"))
    write_annotations(tmp_path, "Một con mèo")
    with fault("a source that has changed since the last build"):
        summary = build(arguments(tmp_path))
        (changed,) = summary["changed_files"]
        assert changed["name"] == "train.json"
        assert changed["before"] == {"sha256": first["files"][0]["sha256"], "images": 40, "captions": 40}
        assert changed["now"]["sha256"] == summary["files"][0]["sha256"] != first["files"][0]["sha256"]
        text = "train.json is not the file that the build that this one replaces was made from: sha256 "
        assert text + first["files"][0]["sha256"] in summary_text(summary)
        assert text in (tmp_path / "out" / "README.md").read_text()
    with fault("a source that has changed since the dataset on the Hub"):
        elsewhere = arguments(tmp_path, output_dir=str(tmp_path / "new"), push_to_hub=True, repo_id="user/captions")
        assert publish(elsewhere)["changed_files"][0]["place"] == "user/captions on the Hub"
        path = HfApi().hf_hub_download("user/captions", "README.md", repo_type="dataset")
        card = open(path, encoding="utf-8").read()
        assert "user/captions on the Hub was made from" in card
        assert summary["files"][0]["sha256"] in card  # all 64 digits
        assert "`<b>made up</b> \\| for\\u000athis test`" in card  # what a file says of itself is not markup


def test_a_downloaded_release_is_known_by_its_address():
    old = {"name": "https://example.org/yj.zip", "sha256": "0" * 64, "images": 1, "captions": 2}
    new = SourceFile("https://example.org/yj.zip", "1" * 64, 1, 3, "", "")
    (changed,) = _changed_files([new], ([old], "before"))
    assert (changed["before"]["captions"], changed["now"]["captions"]) == (2, 3)


def test_what_is_not_a_report_is_not_silently_replaced(fault, tmp_path):
    write_annotations(tmp_path, "Một con chó")
    build(arguments(tmp_path))
    for content in ("[", "{}", '{"files": 3}', '{"files": [{"name": "a"}]}'):
        (tmp_path / "out" / "cleaning_report.json").write_text(content)
        with (
            fault(f"a report of {content}"),
            pytest.raises(DataError, match="cleaning_report.json: no report of a bu"),
        ):
            build(arguments(tmp_path))


@pytest.mark.parametrize("text", ["`", "``", "a```b", "|", "x\ny", "<script>", "`` x ``", "\u202e", "\\", "a`"])
def test_any_text_keeps_to_its_cell_and_is_not_markup(text):
    markdown = MarkdownIt("commonmark").enable("table")
    html = markdown.render(f"| a | b |\n|---|---|\n| {_visible(text)} | c |\n")
    assert html.count("<td>") == 2 and html.count("<code>") == 1 and "<script>" not in html
