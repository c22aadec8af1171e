"""Caption pictures: files, folders, patterns, a list; to the terminal, a file, a page, or a .txt beside each picture.

    python scripts/caption.py photo.jpg --adapter you/name
    python scripts/caption.py photos --adapter you/name --output captions.jsonl     # or .csv, .html, .txt
    python scripts/caption.py 'photos/**/*.jpg' --adapter outputs/sft_qwen2vl_jp/adapter --sidecar
    find photos -newer list.txt -name '*.jpg' -print0 | python scripts/caption.py - --adapter you/name

Prompt, precision, quantisation, image size and decoding are those that the adapter was trained with: the recipes write
them into captioning.json beside the weights. An option overrides them. The base model and its commit are in the
adapter's configuration. All four recipes' adapters and models are loaded, and models without an adapter:

    python scripts/caption.py photos --model Qwen/Qwen2-VL-2B-Instruct --load_in_4bit --output captions.csv

Three captions of each picture; Japanese script alone, without certain words; captions of broken form set aside:

    python scripts/caption.py photos --adapter you/name --num_captions 3 --output captions.html
    python scripts/caption.py photos --adapter you/name --japanese_only --avoid_words words.txt \\
        --output captions.jsonl --review_queue review

An adapter that was trained with several prompts is asked with one of them, by default with the first:

    python scripts/caption.py photos --adapter you/name --language en
    python scripts/caption.py photos --adapter you/name --language ja --style polite

Through a server with OpenAI's chat interface (vLLM, `transformers serve`, llama.cpp), which holds the model; with
--adapter, prompt and image size come from its captioning.json. A key is taken from CAPTION_SERVER_KEY.

    python scripts/caption.py photos --server http://localhost:8000 --model name --output captions.jsonl

With --output the same command continues where it ended, also after a kill, and captions what is new in a folder; for
that, captions of another format than jsonl are also kept in OUTPUT.jsonl. With --sidecar alone, pictures that have a
.txt are done. Pictures that cannot be read are listed at the end, with the reason, and the exit status is 1.
"""

import sys
from functools import partial

from vlmcap.arguments import run_main
from vlmcap.captioning.arguments import CaptionArguments, check_caption_arguments, name_pictures


def main(args: CaptionArguments) -> None:
    check_caption_arguments(args)

    from vlmcap.captioning.output import caption_paths, journal_path, read_journal, write_formatted
    from vlmcap.captioning.pictures import (
        PictureError,
        caption_pictures,
        find_pictures,
        printable,
        read_picture,
        shown_name,
    )

    paths = find_pictures(args.pictures)
    if args.server:
        from vlmcap.captioning.server import open_server, server_captions

        server = open_server(args)
        caption, record = partial(server_captions, server=server, concurrency=args.concurrency), server.record()
        prompted, language = True, server.language
    else:
        from vlmcap.captioning.captioner import load_captioner

        captioner = load_captioner(args)
        caption = partial(caption_pictures, stream=captioner.stream, workers=args.workers)
        record, language = captioner.record, captioner.language
        prompted = record["prompt"] is not None
    failed = caption_paths(paths, caption, args, record)

    if args.output and args.format == "html":
        from vlmcap.reporting.caption_pages import write_caption_pages

        by_name = {shown_name(path): path for path in paths}
        entries = list(read_journal(journal_path(args)))
        pages = write_caption_pages(
            args.output, "Captions", entries, lambda name: read_picture(by_name.get(name, name))
        )
        print(f"{len(entries):,} captions on {len(pages):,} pages from {args.output} on", file=sys.stderr)
    elif args.output and args.format != "jsonl":
        write_formatted(args)
    if args.review_queue:
        from vlmcap.evaluation.audit_checks import form_of
        from vlmcap.evaluation.review import review_form

        known = [reason for reason in form_of(language) if prompted or reason != "non_japanese"]
        queue = (journal_path(args), args.review_queue, args.hold_back or known)
        released, held_back = review_form(*queue, language)
        print(f"{released:,} captions released, {held_back:,} held back: {args.review_queue}", file=sys.stderr)
    if failed:
        reasons = "\n".join(f"  {printable(shown_name(path))}: {printable(why)}" for path, why in failed.items())
        raise PictureError(f"{len(failed):,} of {len(paths):,} pictures failed:\n{reasons}")


if __name__ == "__main__":
    again = "The same command continues, with --output or --sidecar."
    run_main(main, __doc__, CaptionArguments, command_line=name_pictures(sys.argv[1:]), interrupted=again)
