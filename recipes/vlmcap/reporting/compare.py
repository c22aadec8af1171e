"""Several runs side by side: tables in CSV, Markdown and LaTeX, plots, and a page with every caption."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import datasets
from PIL import Image

from vlmcap.atomic_write import write_atomically
from vlmcap.data.errors import DataError
from vlmcap.data.images import (
    BadImageError,
    dataset_record,
    dataset_references,
    load_captions,
    open_image,
    references_of,
)
from vlmcap.data.keys import rows_of_key
from vlmcap.evaluation.caption_files import ScoreError, read_references
from vlmcap.evaluation.scoring import SCORE_LABELS
from vlmcap.evaluation.tasks import folder_name
from vlmcap.markdown import code_span, visible
from vlmcap.reporting.gallery import disagreement, select_images, write_comparison_page
from vlmcap.reporting.plots import (
    has_curve,
    plot_quality_against_memory,
    plot_scores,
    plot_training_curves,
    sizes_differ,
)
from vlmcap.reporting.runs import ScoredRun, by_key, check_comparable, choose_scores, shared_signatures
from vlmcap.reporting.significance import compare_with
from vlmcap.reporting.tables import latex_tables, legend, markdown_tables, score_table, system_table, write_csv


def write_comparison(
    runs: list[ScoredRun],
    output_dir: str | Path,
    reference: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    image_dir: str | None = None,
    references: str | Path | None = None,
    max_gallery_images: int = 500,
    seed: int = 0,
    resamples: int = 1000,
    scores: Sequence[str] | None = None,
) -> dict[str, Path]:
    """Writes tables, plots and the page of all runs into `output_dir`; where captions have several keys
    (`vlmcap.data.keys`), those of each key into a folder of its own, and the tables of all keys into `metrics.md`.

    Args:
        runs: as `read_runs` returns them; all scored on the same images with the same signatures.
        reference: name of the run that the others are tested against; the first if None.
        dataset, split, image_dir: where the page's references and pictures come from, as for `load_captions`. None:
            the dataset that the runs were scored on, when it is a folder that is still there; else the page shows
            captions without references and pictures.
        references: JSONL of references instead of those of the dataset.
        max_gallery_images: with more, the page shows half of this many with the greatest disagreement and as many
            drawn at random with `seed`.
        resamples: of the paired bootstrap.
        scores: columns of the score table and panels of its plot, in this order; without any, all that there are.
            Those that no run has are left out. metrics.csv holds all of them.

    Returns:
        {"csv", "md", "tex", "scores", "html": path}, "memory" if run records say that the models are of different
        sizes, and "curves" if a run has a training log.

    Raises:
        ScoreError: runs that cannot be in one table, no run named `reference`, references that lack images, no such
            score, or one that no run has and no other beside it.
        DataError: `dataset` cannot be read or is not the build that was scored.
    """
    groups, tables, paths = by_key(runs), [], {}
    sources = (dataset, split, image_dir, references)
    options = (max_gallery_images, seed, resamples, scores)
    if len(groups) == 1:
        return _write_group(runs, Path(output_dir), reference, *sources, *options, list(groups))
    for key, group in groups.items():
        name, there = folder_name(key or "without_key"), [run.name for run in group]
        compared = reference if reference in there or reference not in [run.name for run in runs] else None
        written = _write_group(group, Path(output_dir) / name, compared, *sources, *options, [key, *groups])
        paths |= {f"{name}/{kind}": path for kind, path in written.items()}
        title = code_span(key) if key else "Runs without keys"
        tables.append(f"## {title}\n\n{written['md'].read_text(encoding='utf-8')}")
    path = Path(output_dir) / "metrics.md"
    write_atomically(path, "\n".join(tables))
    return {"md": path} | paths


def _write_group(
    runs: list[ScoredRun],
    output_dir: Path,
    reference: str | None,
    dataset: str | None,
    split: str | None,
    image_dir: str | None,
    references: str | Path | None,
    max_gallery_images: int,
    seed: int,
    resamples: int,
    scores: Sequence[str] | None,
    keys: Sequence[str | None],
) -> dict[str, Path]:
    """What `write_comparison` does for captions of the first of `keys`; the others are keys of other captions."""
    reference = reference or runs[0].name
    if reference not in [run.name for run in runs]:
        raise ScoreError(f"no run is called {reference!r}: the runs are {', '.join(run.name for run in runs)}")
    check_comparable(runs)
    chosen = choose_scores(scores, runs)
    captions, picture, remarks = _references_and_pictures(runs, dataset, split, image_dir, references, keys)

    output_dir.mkdir(parents=True, exist_ok=True)
    tests = compare_with(reference, runs, resamples)
    tables = [score_table(runs, tests, chosen), system_table(runs)]
    notes = legend(runs, reference, resamples, chosen)
    signatures = {SCORE_LABELS[key]: signature for key, signature in shared_signatures(runs).items() if key in chosen}

    paths = {"csv": output_dir / "metrics.csv", "md": output_dir / "metrics.md", "tex": output_dir / "metrics.tex"}
    write_csv(paths["csv"], runs, tests)
    write_atomically(paths["md"], markdown_tables(*tables, notes, signatures))
    write_atomically(paths["tex"], latex_tables(*tables, notes, signatures))
    plots = _write_plots(runs, output_dir, chosen)

    apart = {
        image: disagreement([run.captions[image] for run in runs if run.captions is not None])
        for image in runs[0].cider_d
    }
    shown, selection = select_images(apart, max_gallery_images, seed)
    page = write_comparison_page(
        output_dir / "comparison.html",
        title=f"{len(runs)} {'systems' if len(runs) > 1 else 'system'} on {len(apart):,} images",
        tables=tables,
        notes=notes,
        signatures=signatures,
        plots=list(plots.values()),
        systems=[run.name for run in runs],
        cards=_cards(runs, shown, captions, picture),
        disagreements=apart,
        audited=any(run.flagged for run in runs),
        remarks=[selection, *remarks],
    )
    return paths | plots | {"html": page}


def _write_plots(runs: Sequence[ScoredRun], output_dir: Path, scores: Sequence[str]) -> dict[str, Path]:
    """The plots that say something of these runs, in the order of the page."""
    documents = {run.name: run.metrics for run in runs}
    plots = {"scores": plot_scores(documents, output_dir / "scores.svg", scores)}
    if sizes_differ(documents):
        plots["memory"] = plot_quality_against_memory(documents, output_dir / "quality_against_memory.svg")
    if any(map(has_curve, documents.values())):
        plots["curves"] = plot_training_curves(documents, output_dir / "training_curves.svg")
    return plots


def _references_and_pictures(
    runs: Sequence[ScoredRun],
    dataset: str | None,
    split: str | None,
    image_dir: str | None,
    references: str | Path | None,
    keys: Sequence[str | None],
) -> tuple[dict[str, list[str]], Callable[[str], Image.Image | None], list[str]]:
    """References by image id, a function from image id to picture, and remarks for the page on what it lacks."""
    scored = runs[0].metrics.get("dataset") or {}
    if dataset is None and scored and Path(scored["id"]).is_dir():
        dataset = scored["id"]
    if dataset is None and image_dir is not None:
        raise DataError("--image_dir needs --dataset: its rows say which file shows which image")
    captions, rows = {}, None
    if dataset is not None:
        captions, rows = _read_dataset(dataset, split or scored.get("split", "test"), image_dir, scored, keys)
    if references is not None:
        captions = read_references(references)
    lacking = [image for image in runs[0].cider_d if image not in captions] if captions else []
    if lacking:
        raise ScoreError(
            f"{references or dataset} lacks {len(lacking):,} of the images that were scored ("
            f"{visible(', '.join(lacking[:5]))}{', ...' if len(lacking) > 5 else ''}): name the references or the"
            " split that they were scored with"
        )

    remarks = [] if captions else ["References are not shown: neither --dataset nor --references was given."]
    if rows is None:
        remarks.append("Pictures are not shown: no --dataset with pictures, and no --image_dir was given.")
    remarks += [
        f"Captions of {run.name} are not shown: there is no predictions.jsonl beside its metrics file."
        for run in runs
        if run.captions is None
    ]
    places = {str(image): place for place, image in enumerate(rows["image_id"])} if rows is not None else {}

    def picture(image: str) -> Image.Image | None:
        try:
            return open_image(rows[places[image]]) if image in places else None
        except BadImageError:  # the page has a place for a picture that is missing
            return None

    return captions, picture, remarks


def _read_dataset(
    dataset: str, split: str, image_dir: str | None, scored: dict, keys: Sequence[str | None]
) -> tuple[dict, datasets.Dataset | None]:
    """References by image id; rows with pictures, or None if the dataset has none and no folder was given.

    References are those of the first of `keys`, if that is one, beside which the others count.

    A dataset that was scored is read as it was then: the Hub's at its revision, a folder only if it is that build.
    """
    revision = scored["revision"] if dataset == scored.get("id") else None
    if revision and Path(dataset).exists() and dataset_record(dataset, split)["revision"] != revision:
        raise DataError(
            f"{dataset} has changed since the runs were scored on its {revision}: score the predictions again, or "
            "name another folder with --dataset"
        )
    revision = None if Path(dataset).exists() else revision
    key, known = keys[0], [name for name in dict.fromkeys(keys) if name]
    try:
        rows = load_captions(dataset, split, image_dir, revision)
    except DataError:
        if image_dir is not None:
            raise
        return dataset_references(dataset, split, revision, key, known), None
    texts = rows.remove_columns("image")
    return references_of(rows_of_key(texts, key, known) if key else texts), rows


def _cards(
    runs: Sequence[ScoredRun], images: Sequence[str], references: dict[str, list[str]], picture: Callable
) -> Iterator:
    """What the page shows of each image, one after the other: pictures are large."""
    for image in images:
        yield {
            "image_id": image,
            "image": picture(image),
            "references": references.get(image, []),
            "captions": [
                {
                    "text": None if run.captions is None else run.captions[image],
                    "score": run.cider_d[image],
                    "flags": run.flagged.get(image, []),
                }
                for run in runs
            ],
        }
