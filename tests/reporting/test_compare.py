"""Comparison tables: figures of the documents and no others, honest marks, clear refusals."""

import csv
import json
import re
import shutil

import pytest

from tests.reporting.documents import family_document
from vlmcap.data.errors import DataError
from vlmcap.evaluation.caption_files import ScoreError
from vlmcap.evaluation.scoring import SCORE_LABELS, paired_comparison
from vlmcap.reporting.compare import write_comparison
from vlmcap.reporting.runs import read_runs
from vlmcap.reporting.significance import holm
from vlmcap.reporting.tables import latex_escape, write_overview

NAMES = ("good", "twin", "weak", "wild")


@pytest.fixture
def runs(scored_runs, tmp_path):
    """Copies of the four runs, to be changed; the first is the reference."""
    return [shutil.copytree(scored_runs[name], tmp_path / "runs" / name) for name in NAMES]


@pytest.fixture(scope="module")
def compared(scored_runs, tmp_path_factory):
    """The comparison of the four runs, and their documents."""
    paths = write_comparison(read_runs(list(scored_runs.values())), tmp_path_factory.mktemp("comparison"))
    return paths, {name: json.loads((folder / "metrics.json").read_text()) for name, folder in scored_runs.items()}


def edit(folder, change):
    path = folder / "metrics.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def compare(runs, tmp_path, **options):
    return write_comparison(read_runs(runs), tmp_path / "out", **options)


def markdown_tables(path) -> list[list[dict[str, str]]]:
    tables = [block.splitlines() for block in path.read_text().split("\n\n") if block.startswith("|")]
    tables = [[[c.strip() for c in line.strip("|").split(" | ")] for line in table] for table in tables]
    return [[dict(zip(table[0], row, strict=True)) for row in table[2:]] for table in tables]


def latex_rows(path) -> dict[str, list[list[str]]]:
    """System -> its rows in the LaTeX tables, each with the row of intervals after it where there is one."""
    rows, name = {}, None
    for line in path.read_text().splitlines():
        if line.startswith("{") and line.endswith(r" \\"):
            first, *cells = line.removesuffix(r" \\").split(" & ")
            name = first[1:-1] or name
            rows.setdefault(name, []).append(cells)
    return rows


def test_csv_has_every_figure_in_full(compared):
    paths, documents = compared
    with paths["csv"].open(encoding="utf-8", newline="") as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(NAMES)
    for name, document in documents.items():
        row = rows[name]
        for prefix, part in (("", document), ("register_normalised_", document["register_normalised"])):
            for key, value in part["scores"].items():
                assert float(row[f"{prefix}{key}"]) == value
                assert [float(row[f"{prefix}{key}_{end}"]) for end in ("low", "high")] == part["intervals"][key]
                assert row[f"{prefix}{key}_signature"] == part["signatures"][key]
        for key, value in document["counts"].items():
            assert float(row[key]) == value
        for key in ("prompt", "commit", "created"):
            assert row[key] == document[key]
        assert json.loads(row["decoding"]) == document["decoding"]
        assert float(row["images_per_second"]) == document["images_per_second"]
        assert int(row["parameters"]) == document["model"]["parameters"]
        assert row["peak_memory_bytes"] == ("" if name == "wild" else str(document["peak_memory_bytes"]))
        assert (row["saw_STAIR"], row["saw_YJ"], row["saw_COCO"]) == ("unknown", "no", "unknown")


def test_markdown_and_latex_repeat_the_scores(compared):
    paths, documents = compared
    scores, systems = markdown_tables(paths["md"])
    latex = latex_rows(paths["tex"])
    for row, system in zip(scores, systems, strict=True):
        name, document = row["System"], documents[row["System"]]
        marked, intervals, _ = latex[name]
        for place, (label, text) in enumerate(list(row.items())[1:]):
            plain = label.endswith("plain endings")
            part = document["register_normalised"] if plain else document
            key = next(key for key, name in SCORE_LABELS.items() if name == label.removesuffix(", plain endings"))
            if key not in part["scores"]:
                assert text == "-" == marked[place]
                continue
            digits = 1 if max(d["scores"].get(key, 0) for d in documents.values()) >= 10 else 3
            value, low, high = (f"{x:.{digits}f}" for x in (part["scores"][key], *part["intervals"][key]))
            assert re.fullmatch(rf"(\*\*)?{value}(\*\*)?(\\\*)?<br>{low}–{high}", text)
            assert re.fullmatch(rf"(\\textbf{{)?{value}}}?(\$\^{{\*}}\$)?", marked[place])
            assert intervals[place] == rf"{{\scriptsize {low}--{high}}}"
            best = part["scores"][key] == max(
                (d["register_normalised"] if plain else d)["scores"].get(key, 0) for d in documents.values()
            )
            assert best == text.startswith("**") == marked[place].startswith(r"\textbf")
        assert system["Saw STAIR"] == "unknown" and system["Saw YJ"] == "no" and system["Saw COCO"] == "unknown"
        assert system["Parameters"] == "2.21 B"
        assert system["Captions/s"] == f"{document['images_per_second']:.2f}"
        assert system["Peak memory"] == ("-" if name == "wild" else f"{document['peak_memory_bytes'] / 2**30:.2f} GiB")
    legend = paths["md"].read_text()
    assert "user/stair-captions" in legend and documents["good"]["dataset"]["revision"] in legend
    assert "40 images, 120 references" in legend
    assert all(f"`{signature}`" in legend for signature in documents["good"]["signatures"].values())


@pytest.mark.parametrize("reference", [None, "weak"])
def test_marks_are_where_the_corrected_p_is_below_5_percent(runs, tmp_path, reference):
    paths = compare(runs, tmp_path, reference=reference)
    documents = [json.loads((folder / "metrics.json").read_text()) for folder in runs]
    base = NAMES.index(reference) if reference else 0
    others = [number for number in range(4) if number != base]
    tests = {number: paired_comparison(documents[number], documents[base]) for number in others}
    rows, _ = markdown_tables(paths["md"])
    marked = {True: 0, False: 0}
    for key, label in SCORE_LABELS.items():
        if key not in tests[others[0]]:
            continue
        adjusted = holm([tests[number][key]["p_value"] for number in others])
        expected = {number: p < 0.05 for number, p in zip(others, adjusted, strict=True)} | {base: False}
        for number, row in enumerate(rows):
            assert (r"\*<br>" in row[label]) == expected[number], (row["System"], label)
            marked[expected[number]] += 1
    assert marked[True] and marked[False] > len(tests[others[0]])
    assert rf"\*: differs from {reference or 'good'}, p &lt; 0.05" in paths["md"].read_text()


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_the_base_inside_an_adapter_s_document_is_not_a_run(runs, tmp_path):
    base = json.loads((runs[2] / "metrics.json").read_text())
    edit(runs[0], lambda document: document.update(base=base))
    rows, _ = markdown_tables(compare(runs[:1], tmp_path)["md"])
    assert [row["System"] for row in rows] == ["good"]
    assert "*" not in json.dumps(rows)  # nothing to be better than


def test_a_score_that_a_run_lacks_is_a_dash(runs, tmp_path):
    def forget(document):
        for part in (document, document["register_normalised"]):
            for what in ("scores", "signatures", "intervals"):
                part[what].pop("rouge_l", None)
        document["notices"] = ["ROUGE-L was skipped"]

    edit(runs[0], forget)
    paths = compare(runs[:2], tmp_path)
    rows, _ = markdown_tables(paths["md"])
    assert rows[0]["ROUGE-L"] == "-" and rows[1]["ROUGE-L"].startswith("**0.")
    assert "- good: ROUGE-L was skipped." in paths["md"].read_text()
    with paths["csv"].open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first["rouge_l"] == "" == second["rouge_l_p_value"] and second["cider_d_p_value"] != ""


def test_captions_of_unknown_origin_can_be_compared(runs, tmp_path):
    """Scored without a run record: no model, no dataset, no memory."""
    known = ("model", "dataset", "saw", "prompt", "decoding", "hardware", "peak_memory_bytes", "images_per_second")
    for folder in runs[:2]:
        edit(folder, lambda document: [document.pop(key) for key in known])
    paths = compare(runs[:2], tmp_path)
    assert "memory" not in paths
    _, systems = markdown_tables(paths["md"])
    assert set(systems[0].values()) == {"good", "-"}
    assert "Dataset: not recorded; 40 images" in paths["md"].read_text()


def test_too_few_resamples_to_mark_anything_are_said_to_be(runs, tmp_path):
    text = compare(runs, tmp_path, resamples=50)["md"].read_text()
    assert "can mark no difference among so many systems" in text and r"\*<br>" not in text
    assert "can mark no difference" not in compare(runs, tmp_path)["md"].read_text()


def test_a_notice_of_all_runs_is_printed_once(runs, tmp_path):
    for folder, notices in zip(runs, (["a", "b."], ["a"], ["a", "b."], ["a"]), strict=True):
        edit(folder, lambda document, notices=notices: document.update(notices=notices))
    text = compare(runs, tmp_path)["md"].read_text()
    assert "- All systems: a.\n- good, weak: b.\n" in text


def test_runs_are_named_by_their_folders_or_by_hand(scored_runs, tmp_path):
    for place in ("a/adapter", "b/adapter", "b/base"):
        shutil.copytree(scored_runs["good"], tmp_path / place)
    shutil.copy(scored_runs["good"] / "metrics.json", tmp_path / "b" / "other.json")
    shutil.copytree(scored_runs["good"], tmp_path / "lora_r=8" / "adapter")

    def names(*runs):
        return [run.name for run in read_runs(runs)]

    a, b, base = (tmp_path / place for place in ("a/adapter", "b/adapter", "b/base"))
    assert names(a, base / "metrics.json", tmp_path / "b" / "other.json") == ["adapter", "base", "other"]
    assert names(a, b, base) == ["a/adapter", "b/adapter", "base"]
    assert names(f"r = 8={a}", f"lora_r=8={tmp_path}/lora_r=8/adapter") == ["r = 8", "lora_r=8"]
    assert names(tmp_path / "lora_r=8" / "adapter") == ["adapter"]
    with pytest.raises(ScoreError, match="several runs are called x: name them apart"):
        names(f"x={a}", f"x={b}")
    with pytest.raises(ScoreError, match="several runs are called .*a/adapter: name them apart"):
        names(a, a)
    with pytest.raises(ScoreError, match="must be printable text"):
        names(f"a\u202eb={a}")


def test_what_cannot_be_read_is_named(runs, tmp_path):
    with pytest.raises(ScoreError, match="nowhere: no such metrics file"):
        read_runs([runs[0], tmp_path / "nowhere"])
    with pytest.raises(ScoreError, match="no runs given"):
        read_runs([])
    with pytest.raises(ScoreError, match="no run is called 'best': the runs are good, twin"):
        compare(runs[:2], tmp_path, reference="best")
    (tmp_path / "metrics.json").write_text('{"scores": {}}')
    with pytest.raises(ScoreError, match="metrics.json lacks signatures, intervals, bootstrap, counts, per_image"):
        read_runs([tmp_path])
    (tmp_path / "metrics.json").write_text('{"scores": ')
    with pytest.raises(ScoreError, match="metrics.json is not JSON"):
        read_runs([tmp_path])
    shutil.copy(runs[1] / "predictions.jsonl", tmp_path / "more.jsonl")
    with (runs[0] / "predictions.jsonl").open("a") as file:
        file.write('{"image_id": 99, "caption": "犬"}\n')
    with pytest.raises(ScoreError, match="predictions.jsonl has 41 images and .* was scored on 40"):
        read_runs(runs)


@pytest.mark.parametrize("key, value", [("id", "user/yj"), ("revision", "abc"), ("split", "validation")])
def test_other_datasets_are_refused(runs, tmp_path, key, value):
    edit(runs[2], lambda document: document["dataset"].update({key: value}))
    with pytest.raises(ScoreError, match=rf"good and weak differ in dataset {key} \(.* and {value}\)"):
        compare(runs, tmp_path)
    assert not (tmp_path / "out").exists()


def test_other_images_and_signatures_are_refused(runs, tmp_path):
    edit(runs[1], lambda d: d["per_image"].update(image_id=["77", *d["per_image"]["image_id"][1:]]))
    (runs[1] / "predictions.jsonl").unlink()
    with pytest.raises(ScoreError, match=r"good and twin were scored on different images .* has 1, 77\)"):
        compare(runs[:2], tmp_path)
    edit(runs[3], lambda document: document["signatures"].update(cider_d="cider_d|tok:characters|v:0.1"))
    with pytest.raises(ScoreError, match=r"good and wild differ in cider_d's signature .*cider_d\|tok:characters"):
        compare([runs[0], runs[2], runs[3]], tmp_path)


def test_the_order_of_images_in_a_document_does_not_matter(runs, tmp_path):
    before = markdown_tables(compare(runs[:3], tmp_path)["md"])

    def turn_round(document):
        columns = document["per_image"]
        statistics = columns.get("statistics", {})
        for part in (columns, statistics):
            part.update({key: values[::-1] for key, values in part.items() if isinstance(values, list)})

    edit(runs[1], turn_round)
    assert markdown_tables(compare(runs[:3], tmp_path)["md"]) == before


def test_references_that_lack_images_are_refused(runs, tmp_path):
    (tmp_path / "few.jsonl").write_text('{"image_id": 1, "captions": ["犬"]}\n')
    with pytest.raises(ScoreError, match=r"few.jsonl lacks 39 of the images that were scored \(2, 3, 4, 5, 6, ...\)"):
        compare(runs, tmp_path, references=tmp_path / "few.jsonl")
    with pytest.raises(DataError, match="--image_dir needs --dataset"):
        compare(runs, tmp_path, image_dir="images")


def test_latex_special_characters_are_escaped(runs, tmp_path):
    name = r"[a]_b & 50% #1 $x$ {y} ~ ^ \z <c> | \"q\""
    paths = compare([f"{name}={runs[0]}", f"twin={runs[1]}"], tmp_path, reference="twin")
    text = paths["tex"].read_text()
    escaped = r"[a]\_b \& 50\% \#1 \$x\$ \{y\} \textasciitilde{} \textasciicircum{} \textbackslash{}z \textless{}c"
    assert f"\n{{{escaped}" in text  # in braces, or the [ would be read as an argument of the \\ before it
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert not re.search(r"(?<!\\)[%#~|<>\"]", body)
    assert not re.search(r"(?<!\\)_", body)
    plain = re.sub(r"\\[&%$#_{}\\]", "", body)
    assert plain.count("{") == plain.count("}")
    columns = {len(line.split(" & ")) for line in plain.splitlines() if line.endswith("& ") or " & " in line}
    assert len(columns) <= 2  # two tables, each with as many cells in every row
    assert latex_escape("a–b") == "a--b"
    markdown = paths["md"].read_text()
    assert r"\[a\]\_b &amp; 50% #1 $x$ {y} \~ ^ \\z &lt;c&gt; \|" in markdown


def test_the_script_takes_bare_runs(runs, tmp_path, run_script):
    out = tmp_path / "out"
    done = run_script("compare_runs.py", runs[0], f"second={runs[1] / 'metrics.json'}", "--output_dir", out)
    assert {path.name for path in out.iterdir()} == {
        *("metrics.csv", "metrics.md", "metrics.tex", "comparison.html", "scores.svg", "quality_against_memory.svg")
    }
    assert done.stdout.split() == [str(out / name) for name in ("metrics.csv", "metrics.md", "metrics.tex")] + [
        str(out / name) for name in ("scores.svg", "quality_against_memory.svg", "comparison.html")
    ]
    done = run_script("compare_runs.py", "--runs", tmp_path / "nowhere", expect=1)
    assert done.stderr.startswith("error: ") and "no such metrics file" in done.stderr
    assert "Traceback" not in done.stderr


def test_scores_are_chosen_in_their_order(runs, tmp_path):
    paths = compare(runs[:2], tmp_path, scores=["rouge_l", "meteor", "bleu_1"])
    rows, _ = markdown_tables(paths["md"])
    assert list(rows[0]) == ["System", "ROUGE-L", "BLEU-1"], "no run has METEOR"
    assert "CIDEr-D" not in paths["tex"].read_text() and "`bleu_2" not in paths["md"].read_text()
    with paths["csv"].open(newline="") as file:
        assert all(float(row["cider_d"]) > 0 for row in csv.DictReader(file)), "the file has them all"
    assert "BLEU-2" not in paths["scores"].read_text()
    with pytest.raises(ScoreError, match="no score 'bleu_5': choose of bleu_1, "):
        compare(runs[:2], tmp_path, scores=["bleu_5"])
    with pytest.raises(ScoreError, match="no run has spice or jaspice; there are bleu_1, "):
        compare(runs[:2], tmp_path, scores=["spice", "jaspice"])


def family(folder, recipe, system=None):
    """A run of the family on the images of `folder`."""
    document = family_document(recipe)
    record = document if system is None else document[system]
    keys = ("model", "dataset", "prompt", "decoding", "saw", "recipe", "training")
    edit(folder, lambda metrics: metrics.update({key: record[key] for key in keys if key in record}))


def test_runs_of_the_family_are_compared_and_shown(runs, tmp_path):
    family(runs[0], "sft_vit_llama_food", "base")
    family(runs[1], "sft_vit_llama_food")
    paths = compare(runs[:2], tmp_path)
    _, systems = markdown_tables(paths["md"])
    parts = "google/vit-base-patch16-224-in21k@01234567 + meta-llama/Llama-3.2-1B@01234567"
    assert [row["Model"] for row in systems] == [parts, parts]
    assert [row["Trained weights"] for row in systems] == ["-", "outputs/sft_vit_llama_food/adapter"]
    with paths["csv"].open(newline="") as file:
        first, _ = csv.DictReader(file)
    assert first["prompt"] == "" and json.loads(first["decoding"])["image_size"] == {"height": 384, "width": 384}
    assert "CIDEr-D, validation" in paths["curves"].read_text() and "eval_loss-1" in paths["curves"].read_text()
    assert "vit-base-patch16" in paths["html"].read_text()


@pytest.mark.parametrize(("sizes", "drawn"), [((5e9, 5e9), False), ((5e9, 5.1e9), False), ((5e9, 6e9), True)])
def test_quality_against_memory_needs_two_sizes(runs, tmp_path, sizes, drawn):
    for folder, size in zip(runs[:2], sizes, strict=True):
        edit(folder, lambda document, size=size: document.update(peak_memory_bytes=size))
    paths = compare(runs[:2], tmp_path)
    assert ("memory" in paths) == drawn == (tmp_path / "out/quality_against_memory.svg").exists()
    assert ("quality against memory" in paths["html"].read_text()) == drawn
    edit(runs[1], lambda document: document["model"].update(parameters=10**9))
    edit(runs[1], lambda document: document.update(peak_memory_bytes=None))
    assert "memory" in compare(runs[:2], tmp_path), "the number of parameters differs"


def test_an_overview_keeps_datasets_apart(runs, tmp_path):
    family(runs[0], "sft_blip_vi", "base")
    family(runs[1], "sft_vit_gpt2_food")
    family(runs[2], "sft_blip_vi")
    edit(runs[2], lambda document: document["scores"].pop("bleu_4"))
    path, text = write_overview(read_runs([f"zero|shot={runs[0]}", *runs[1:3]]), tmp_path / "out")
    (rows,) = markdown_tables(path)
    assert path.name == "overview.md"
    assert [(row[""], row["dataset"], row["images"]) for row in rows] == [
        ("zero\\|shot", "user/uit-viic, test", "40"),
        ("weak", "user/uit-viic, test", "40"),
        ("twin", "user/food-titles, test", "40"),
    ]
    assert list(rows[0])[3:] == [
        *("BLEU-1", "BLEU-2", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr-D", "trained parameters", "seconds of training"),
    ]
    for row, folder in zip(rows, (runs[0], runs[2], runs[1]), strict=True):
        scores = json.loads((folder / "metrics.json").read_text())["scores"]
        assert row["CIDEr-D"] == f"{scores['cider_d']:.4f}" and row["METEOR"] == "-"
    assert [row["BLEU-4"] == "-" for row in rows] == [False, True, False]
    assert [row["trained parameters"] for row in rows] == ["-", "26,345,984", "26,345,984"]
    assert [row["seconds of training"] for row in rows] == ["-", "40,000", "40,000"]
    assert "Only rows of one dataset compare" in path.read_text() and "Only rows of one dataset compare" in text

    lines = text.splitlines()
    places = [lines.index(f"user/{name}, test: 40 images") for name in ("uit-viic", "food-titles")]
    assert [lines[place + 1].split()[0] for place in places] == ["zero|shot", "twin"]
    assert len({len(line) for line in lines[: places[1]] if line.endswith(("training", "-"))}) == 1
    assert max(map(len, lines)) < 120

    edit(runs[2], lambda document: document["signatures"].update(rouge_l="another"))
    with pytest.raises(ScoreError, match="differ in rouge_l's signature"):
        write_overview(read_runs(runs[:3]), tmp_path / "out")


def test_runs_may_be_before_and_after_options(runs, tmp_path, run_script):
    out = tmp_path / "out"
    options = ["--scores", "bleu_1", "rouge_l"]
    run_script("compare_runs.py", runs[0], *options, runs[1], "--output_dir", out, f"third={runs[2]}")
    rows, _ = markdown_tables(out / "metrics.md")
    assert [row["System"] for row in rows] == ["good", "twin", "third"]
    assert list(rows[0]) == ["System", "BLEU-1", "ROUGE-L"]

    done = run_script("compare_runs.py", "--overview", f"a, b={runs[0]}", runs[1], "--output_dir", tmp_path / "two")
    assert (tmp_path / "two/overview.md").exists() and "a, b" in done.stdout and "twin" in done.stdout
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["overview.md"]
    done = run_script("compare_runs.py", "--scores", "bleu_7", "--runs", runs[0], expect=1)
    assert "no score 'bleu_7'" in done.stderr and "Traceback" not in done.stderr


def with_key(folder, key: str, languages: list[str] | None = None) -> None:
    """The run says that its captions are of a key; the adapter's document names those of the other keys too."""
    edit(folder, lambda document: document.update({"key": key} | ({"languages": languages} if languages else {})))


def test_runs_with_several_prompts_are_compared_by_key(runs, tmp_path):
    good, twin, weak, _ = runs
    for run, key in ((good, "en"), (good, "ja/polite"), (twin, "en")):
        with_key(shutil.copytree(weak if key == "ja/polite" else run, run / "languages" / key.replace("/", "-")), key)
    with_key(good, "ja", {"ja": {}, "ja/polite": {}, "en": {}})
    with_key(twin, "ja")
    paths = compare([good, twin, weak], tmp_path, reference="twin", scores=["cider_d"])
    text = paths["md"].read_text(encoding="utf-8")
    assert re.findall("^## .*", text, re.M) == ["## `ja`", "## `ja/polite`", "## `en`", "## Runs without keys"]
    names = [name for name in paths if name.endswith("/md")]
    assert names == ["ja/md", "ja-polite/md", "en/md", "without_key/md"]
    rows = {name: [row["System"] for row in markdown_tables(paths[name])[0]] for name in names}
    assert rows == {"ja/md": ["good", "twin"], "ja-polite/md": ["good"], "en/md": ["good", "twin"]} | {
        "without_key/md": ["weak"]
    }
    assert all(paths[name].read_text(encoding="utf-8") in text for name in names)
    assert "differs from twin" in paths["en/md"].read_text(encoding="utf-8")
    with pytest.raises(ScoreError, match="no run is called 'best'"):
        compare([good, twin], tmp_path, reference="best")

    # One key is compared as runs without keys are.
    alone = compare([good / "languages/en", twin / "languages/en"], tmp_path / "alone")
    assert list(alone)[:3] == ["csv", "md", "tex"]
    overview = write_overview(read_runs([good, twin]), tmp_path / "overview")[1]
    assert overview.count("ja/polite") == 1 and overview.count(", en: ") == 1
