"""Captions of pictures in files that the same command continues: JSON lines, text, CSV, a .txt beside each picture.

Captions go batch by batch into a journal of lines as in predictions.jsonl, `{"image_id": path, "caption": ...}`, with
a run record beside it. With `--format jsonl` it is the output itself; another format is written from it at the end.
"""

import csv
import fcntl
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tqdm.auto import tqdm

from vlmcap import provenance
from vlmcap.atomic_write import write_atomically
from vlmcap.captioning.arguments import CaptionArguments
from vlmcap.captioning.pictures import PictureError, printable, shown_name
from vlmcap.captioning.predictions import cut_half_line, read_done, run_record_path
from vlmcap.data.images import BadImageError

ASKED = ("model", "prompt", "decoding")
Captions = list[str] | Exception
Stream = Callable[[list[str]], Iterable[tuple[str, Captions]]]


def journal_path(args: CaptionArguments) -> Path | None:
    """The file of JSON lines that a command continues: --output, or OUTPUT.jsonl beside it; None without --output."""
    if args.output is None:
        return None
    return Path(args.output if args.format == "jsonl" else f"{args.output}.jsonl")


def caption_paths(paths: list[str], caption: Stream, args: CaptionArguments, record: dict) -> dict[str, str]:
    """Captions the pictures that are not captioned yet, and writes journal, sidecars or stdout as `args` asks.

    Args:
        paths: as `find_pictures` returns them.
        caption: paths -> (path, captions or why there is none) of each, such as `caption_pictures`.
        record: "model", "prompt" and "decoding" of the run record.

    Returns:
        Path -> reason, of the pictures without a caption or without their .txt.

    Raises:
        PredictionsError: the journal was started with another model, prompt or decoding, or is damaged.
        PictureError: another command writes it, or it cannot be written.
    """
    failed = _shared_sidecars(paths, args.output) if args.sidecar else {}
    journal = journal_path(args)
    if journal is None:
        done: dict = {}
        if args.sidecar and not args.overwrite:
            done = dict.fromkeys(shown_name(path) for path in paths if os.path.lexists(sidecar_path(path)))
        _caption(paths, caption, args, done, failed, None)
        return failed
    try:
        with _open_journal(journal, record, Path(args.output)) as (done, file):
            if args.sidecar:
                for path in (path for path in paths if shown_name(path) in done and path not in failed):
                    _write_sidecar(path, _captions(done[shown_name(path)]), args, failed)
            _caption(paths, caption, args, done, failed, file)
    except OSError as error:
        raise PictureError(
            f"{error.filename or journal} cannot be read or written: {error.strerror or error}. The captions so far"
            " are kept: fix it (make room), then run the same command again."
        ) from error
    return failed


@contextmanager
def _open_journal(journal: Path, record: dict, output: Path) -> Iterator[tuple[dict, BinaryIO]]:
    """The lines that are there, by image id, and the file to append to. One process at a time has it."""
    run_record = run_record_path(journal)
    for path in (journal, output):
        if path.exists() and path.stat().st_size and not run_record.exists():
            raise PictureError(
                f"{path} exists, and is not of this command (there is no {run_record.name}): choose another --output"
            )
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PictureError(
                f"another command is writing {journal}: wait for it, or choose another --output"
            ) from error
        asked = {key: record[key] for key in ASKED}
        done, _ = read_done(journal, asked)
        if not done:
            origin = {"versions": provenance.versions(), "commit": provenance.git_commit()}
            text = json.dumps(asked | origin | {"created": provenance.now()}, ensure_ascii=False, indent=2)
            write_atomically(run_record, text + "\n")
        cut_half_line(journal)
        yield done, file


def _caption(
    paths: list[str],
    caption: Stream,
    args: CaptionArguments,
    done: dict,
    failed: dict[str, str],
    file: BinaryIO | None,
) -> None:
    todo = [path for path in paths if shown_name(path) not in done and path not in failed]
    write = None if file else _Printer(args)
    with tqdm(total=len(paths), initial=len(paths) - len(todo), desc="captions", file=sys.stderr) as bar:
        for path, captions in caption(todo) if todo else ():
            if isinstance(captions, Exception):
                failed[path] = _reason(captions)
            else:
                line = _entry(path, captions)
                if file:
                    file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
                    file.flush()
                else:
                    write([line])
                if args.sidecar:
                    _write_sidecar(path, captions, args, failed)
            bar.update()
            bar.set_postfix(failed=len(failed), refresh=False)


def _entry(path: str, captions: list[str]) -> dict:
    more = {"alternatives": captions[1:]} if len(captions) > 1 else {}
    return {"image_id": shown_name(path), "caption": captions[0]} | more


def _captions(entry: dict) -> list[str]:
    return [entry["caption"], *entry.get("alternatives", [])]


def _reason(error: Exception) -> str:
    return error.reason if isinstance(error, BadImageError) else str(error)


# Sidecars ----------------------------------------------------------------------------------------------------------
def sidecar_path(path: str) -> str:
    """photos/a.jpg -> photos/a.txt, where programs that train image models look for the caption."""
    return os.path.splitext(path)[0] + ".txt"


def _shared_sidecars(paths: list[str], output: str | None) -> dict[str, str]:
    """Path -> reason, of the pictures whose .txt would be another's, the output, or the picture itself."""
    taken, failed = {os.path.abspath(output): output} if output else {}, {}
    for path in paths:
        sidecar = os.path.abspath(sidecar_path(path))
        first = taken.setdefault(sidecar, path)
        if first != path:
            failed[path] = f"its .txt would be that of {shown_name(first)}: rename one of them"
        elif sidecar == os.path.abspath(path):
            failed[path] = "its captions would overwrite it: rename it"
    return failed


def _write_sidecar(path: str, captions: list[str], args: CaptionArguments, failed: dict[str, str]) -> None:
    """A line for each caption. A .txt that is there stays, unless it is to be overwritten and says something else."""
    target, text = Path(sidecar_path(path)), "".join(f"{caption}\n" for caption in captions).encode()
    try:
        if os.path.lexists(target) and (not args.overwrite or target.read_bytes() == text):
            return
        write_atomically(target, text)
    except OSError as error:
        failed[path] = f"{shown_name(str(target))} cannot be written: {error.strerror or error}"


# Formats -----------------------------------------------------------------------------------------------------------
def read_journal(journal: Path) -> Iterator[tuple[str, list[str]]]:
    """(path, captions) of every line of a finished journal."""
    with journal.open("rb") as lines:
        for line in lines:
            entry = json.loads(line)
            yield entry["image_id"], _captions(entry)


def write_formatted(args: CaptionArguments) -> None:
    """Writes --output as text or CSV from its journal, whole or not at all."""
    write_atomically(Path(args.output), _formatted(read_journal(journal_path(args)), args, header=True))


def _formatted(entries: Iterable[tuple[str, list[str]]], args: CaptionArguments, header: bool) -> str:
    """Text: a line for each caption, the path and a tab before it. CSV: a row for each picture."""
    if args.format == "text":
        return "".join(f"{printable(path)}\t{printable(caption)}\n" for path, said in entries for caption in said)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    if header:
        rows.writerow(["file", "caption", *(f"caption_{n}" for n in range(2, args.num_captions + 1))])
    rows.writerows([path, *said] for path, said in entries)
    return text.getvalue()


class _Printer:
    """Writes lines to stdout as they come, around the progress bar."""

    def __init__(self, args: CaptionArguments):
        self.args, self.header = args, True

    def __call__(self, lines: list[dict]) -> None:
        if self.args.format == "jsonl":
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        else:
            entries = [(line["image_id"], _captions(line)) for line in lines]
            text = _formatted(entries, self.args, self.header)
        self.header = False
        tqdm.write(text, file=sys.stdout, end="")
        sys.stdout.flush()
