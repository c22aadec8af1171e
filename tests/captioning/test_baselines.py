"""The table of baselines: reading, prompts, what was seen, commits, and code of others that does not run."""

import json
import re
from functools import partial

import pytest
import yaml
from huggingface_hub import HfApi

from tests.faults import ranks
from vlmcap.captioning.arguments import GenerationArguments
from vlmcap.captioning.baselines import (
    BaselineError,
    check_remote_code,
    choose_prompts,
    read_prompts,
    read_table,
    saw_record,
    table_text,
)
from vlmcap.captioning.isolated import RUNNERS
from vlmcap.evaluation.tokenise import TOKENIZERS
from vlmcap.models.load import COMMIT, ModelError, load_model, load_processor, resolve_revision

DEFAULT_PROMPT = GenerationArguments.prompt
COMMIT_READ = "0123456789abcdef0123456789abcdef01234567"
HERE = {
    "id": "org/here",
    "revision": None,
    "license": "mit",
    "gated": False,
    "class": "Qwen2VLForConditionalGeneration",
    "native_prompt": "Describe this image.",
    "runs": "here",
    "parameters": 2.2,
    "saw": {"STAIR": "train", "YJ": "no", "COCO": "unknown", "note": "A card."},
}
APART = HERE | {
    "id": "org/apart",
    "class": "remote",
    "runs": "isolated",
    "remote_code": True,
    "runner": "asagi.py",
    "python": "3.11",
    "packages_until": "2024-10-31",
    "requirements": ["transformers==4.45.1"],
}


@pytest.fixture
def write(tmp_path):
    def write(**models):
        path = tmp_path / "table.yaml"
        models = json.loads(json.dumps(models))  # else YAML writes aliases for what rows share
        document = {"common_prompt": "短く説明してください。", "models": models}
        path.write_text(yaml.safe_dump(document, allow_unicode=True, sort_keys=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def table(write):
    return read_table(write(here=HERE, apart=APART))


@pytest.fixture(scope="module")
def published(repo_root):
    return read_table(repo_root / "recipes/configs/baselines.yaml")


def test_the_published_table_names_the_models_that_are_asked_for(published):
    ids = {row.id.split("/")[1] for row in published.rows.values()}
    asked = """Qwen2-VL-2B-Instruct llava-jp-1.3b-v1.0 Asagi-2B japanese-stable-vlm paligemma-3b-mix-224
        Qwen2.5-VL-3B-Instruct Qwen2.5-VL-7B-Instruct Qwen3-VL-2B-Instruct InternVL3-2B-hf gemma-3-4b-it
        SmolVLM2-2.2B-Instruct sarashina2.2-vision-3b Heron-NVILA-Lite-2B-hf blip-image-captioning-base
        blip2-opt-2.7b"""
    assert ids == set(asked.split())
    seen = {key: row.saw for key, row in published.rows.items()}
    assert seen["asagi_2b"]["STAIR"] == seen["asagi_2b"]["YJ"] == "train"
    assert seen["llava_jp_1_3b"]["STAIR"] == seen["japanese_stable_vlm"]["STAIR"] == "train"
    assert seen["heron_nvila_2b"]["STAIR"] == seen["heron_nvila_2b"]["COCO"] == "train"
    assert [key for key in seen if "YJ is not in its list" in seen[key]["note"] and seen[key]["YJ"] == "no"] == [
        "llava_jp_1_3b", "japanese_stable_vlm", "heron_nvila_2b",
    ]  # fmt: skip
    assert seen["paligemma_3b_mix"]["COCO"] == "translated"


def test_what_the_isolated_rows_pin(published):
    llava, sarashina, heron = (
        published.row(key) for key in ("llava_jp_1_3b", "sarashina2_2_vision_3b", "heron_nvila_2b")
    )
    assert "transformers==4.35.2" in llava.requirements and llava.parameters == 1.73
    assert llava.revision == "e083ee7911fb018568dc59c3f30693944f68f356"
    assert llava.source["commit"] == "210f2b89832b5693a1f7fa638e05ea4ba94d679d"
    assert sarashina.gated and not heron.gated
    assert "transformers==4.57.1" in sarashina.requirements and "transformers==4.57.1" in heron.requirements
    assert {row.python for row in published.rows.values() if row.runs == "isolated"} == {"3.11"}


def test_rows_that_run_apart_have_a_runner_and_refuse_to_run_code_unasked(published):
    apart = [row for row in published.rows.values() if row.runs == "isolated"]
    assert len(apart) == 5
    for row in apart:
        assert (RUNNERS / row.runner).is_file()
        with pytest.raises(BaselineError, match="--trust_remote_code"):
            check_remote_code(row.id, COMMIT_READ, row, trust_remote_code=False)


@pytest.mark.parametrize(
    ("study", "example"),
    [("qwen2_5_vl_7b", "例:"), ("qwen2_5_vl_7b_food", "Examples:"), ("qwen2_5_vl_7b_vi", "Ví dụ:")],
)
def test_prompts_of_the_studies_are_read(repo_root, study, example):
    prompts = read_prompts(repo_root / f"recipes/configs/prompts/{study}.yaml")
    assert list(prompts) == ["plain", "task", "descriptive"]
    assert [example in prompt for prompt in prompts.values()] == [False, False, True]
    assert len(prompts["plain"]) < len(prompts["task"]) < len(prompts["descriptive"])


def test_commands_of_the_studies_name_a_tokenizer_and_options_that_exist(repo_root):
    script = (repo_root / "scripts/infer_baseline.py").read_text(encoding="utf-8")
    for study, tokenizer in (("food", "english"), ("vi", "vietnamese")):
        text = (repo_root / f"recipes/configs/prompts/qwen2_5_vl_7b_{study}.yaml").read_text(encoding="utf-8")
        options = re.findall(r"--(\w+)", text)
        assert {"dataset", "split", "tokenizer", "output_dir"} < set(options)
        assert all(f"    {option}: " in script for option in options)
        assert f"--tokenizer {tokenizer}" in text and tokenizer in TOKENIZERS


def test_a_row_that_takes_no_prompt(write, published):
    table = read_table(write(blip=HERE | {"native_prompt": None}))
    row = table.row("blip")
    assert choose_prompts(table, row, DEFAULT_PROMPT, None, None) == {"none": (None, None)}
    for arguments, option in (
        (("短く", None, None), "--prompt"),
        ((DEFAULT_PROMPT, "native", None), "--prompt_kind"),
        ((DEFAULT_PROMPT, None, "study.yaml"), "--prompts"),
        (("短く", "given", None), "--prompt and --prompt_kind"),
    ):
        with pytest.raises(BaselineError, match=f"blip takes no prompt, it only captions: leave out {option}$"):
            choose_prompts(table, row, *arguments)
    assert [key for key, row in published.rows.items() if row.native_prompt is None] == ["blip_base", "blip2_opt_2_7b"]
    assert sum("(takes none)" in line for line in table_text(published).splitlines()[2:-5]) == 2


def test_runners_that_never_saw_their_model_are_marked(published, write):
    experimental = {key for key, row in published.rows.items() if row.experimental}
    assert experimental == {key for key, row in published.rows.items() if row.runs == "isolated"}
    text = table_text(published)
    assert text.count("isolated (experimental, code)") == 5
    assert "experimental: its runner has never seen the model" in text
    assert "All search alike, without their own sampling and penalties" in text


def test_the_table_as_text(table):
    lines = table_text(table).splitlines()
    assert lines[2].split()[:4] == ["here", "org/here", "2.2", "mit"]
    assert lines[3].split()[0] == "apart" and "isolated (code)" in lines[3]
    assert lines[2].index("mit") == lines[3].index("mit")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"license": ...}, "row x: `license` is missing"),
        ({"licence": "mit"}, "row x: unknown key `licence`"),
        ({"class": "Qwen2VL"}, "row x: `class` Qwen2VL is neither in transformers"),
        ({"class": ...}, "row x: `class` is missing"),
        ({"gated": "no"}, "row x: `gated` cannot be 'no'"),
        ({"runs": "there"}, "row x: `runs` cannot be 'there'"),
        ({"revision": "main"}, "row x: `revision` must be a commit"),
        ({"saw": HERE["saw"] | {"YJ": False}}, 'row x: `saw.YJ` must be one of .*quote "no".* but is False'),
        ({"saw": {"STAIR": "no", "YJ": "no", "note": "?"}}, "row x: `saw.COCO` .* None"),
        ({"saw": HERE["saw"] | {"note": ""}}, "row x: `saw.note` must be a text"),
        (APART | {"runner": ...}, "row x: `runner` is missing"),
        (APART | {"requirements": ["torch>=2"]}, "row x: `requirements`: 'torch>=2' is not pinned"),
        (APART | {"source": {"url": "https://github.com/a/b", "commit": "main"}}, "row x: `source` needs"),
        (APART | {"source": {"url": "https://github.com/a/b", "commit": 7}}, "row x: `source` needs"),
        (
            APART | {"source": {"url": "ext::sh -c planted", "commit": COMMIT_READ}},
            "row x: `source` needs `url`, begin",
        ),
        (APART | {"python": "--planted"}, "row x: `python` must be a version"),
        (APART | {"packages_until": ...}, "row x: `packages_until` is missing"),
        (APART | {"packages_until": "--planted"}, "row x: `packages_until` must be a date"),
        ({"experimental": "yes"}, "row x: `experimental` cannot be 'yes'"),
        (APART | {"requirements": ["--index-url=http://planted/==1"]}, "row x: `requirements`: .* is not pinned"),
    ],
)
def test_a_malformed_row_is_named(write, change, message):
    row = {key: value for key, value in (HERE | change).items() if value is not ...}
    with pytest.raises(BaselineError, match=f"table.yaml, {message}"):
        read_table(write(x=row))


def test_an_unknown_row_names_those_there_are(table):
    with pytest.raises(BaselineError, match="--baseline there: .* there are here, apart"):
        table.row("there")


@pytest.mark.parametrize(
    ("key", "prompt", "kind", "expected"),
    [
        (None, DEFAULT_PROMPT, None, ("given", DEFAULT_PROMPT)),
        (None, DEFAULT_PROMPT, "common", ("common", "短く説明してください。")),
        ("here", DEFAULT_PROMPT, None, ("common", "短く説明してください。")),
        ("here", DEFAULT_PROMPT, "native", ("native", "Describe this image.")),
        ("here", DEFAULT_PROMPT, "given", ("given", DEFAULT_PROMPT)),
        ("here", "何が写っていますか", None, ("given", "何が写っていますか")),
    ],
)
def test_which_prompt(table, key, prompt, kind, expected):
    assert choose_prompts(table, key and table.row(key), prompt, kind, None) == {expected[0]: expected}


def test_prompts_that_contradict_each_other_are_refused(table, tmp_path):
    study = tmp_path / "prompts.yaml"
    study.write_text("prompts: {short: 短く, long: 詳しく}", encoding="utf-8")
    row = table.row("here")
    assert choose_prompts(table, row, DEFAULT_PROMPT, None, study) == {
        "short": ("given", "短く"),
        "long": ("given", "詳しく"),
    }
    for arguments in ((DEFAULT_PROMPT, "native", study), ("何か", "common", None)):
        with pytest.raises(BaselineError, match="give one of them"):
            choose_prompts(table, row, *arguments)
    with pytest.raises(BaselineError, match="give --baseline"):
        choose_prompts(table, None, DEFAULT_PROMPT, "native", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}", "holds no prompts"), ("a: [", "cannot be read as YAML"), ("- a", "mapping is needed"),
     ("../x: 短く", "cannot be the name of a folder"), ("short: 3", "prompt `short` must be a text")],
)  # fmt: skip
def test_a_malformed_prompts_file_is_named(tmp_path, text, message):
    path = tmp_path / "prompts.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BaselineError, match=f"prompts.yaml.*{message}"):
        read_prompts(path)


def test_what_a_model_saw(table):
    row, nothing = table.row("here"), {"STAIR": None, "YJ": None, "COCO": None}
    assert saw_record(row, nothing, adapter=False) == HERE["saw"]
    assert saw_record(None, nothing, adapter=False) == {
        "STAIR": "unknown", "YJ": "unknown", "COCO": "unknown", "note": "Not stated.",
    }  # fmt: skip
    assert saw_record(None, nothing | {"YJ": "train"}, adapter=False)["YJ"] == "train"
    # What its base has not seen, an adapter may have.
    with_adapter = saw_record(row, nothing, adapter=True)
    assert (with_adapter["STAIR"], with_adapter["YJ"]) == ("train", "unknown")
    said = saw_record(row, nothing | {"YJ": "train"}, adapter=True)
    assert said["YJ"] == "train" and "YJ: as stated on the command line" in said["note"]


def test_code_runs_with_the_flag_and_at_a_commit_alone(table):
    row = table.row("apart")
    with pytest.raises(BaselineError, match="apart runs code of org/apart.*--trust_remote_code"):
        check_remote_code(row.id, COMMIT_READ, row, trust_remote_code=False)
    for revision in (None, "main", COMMIT_READ[:12]):
        with pytest.raises(BaselineError, match=f"at a commit only, but the revision is {revision}"):
            check_remote_code(row.id, revision, row, trust_remote_code=True)
        with pytest.raises(BaselineError, match="at a commit only"):
            check_remote_code("org/any", revision, None, trust_remote_code=True)
    # A row that needs none gets none, flag or not; neither does any other model without the flag.
    assert not check_remote_code("org/here", None, table.row("here"), trust_remote_code=True)
    assert not check_remote_code("org/any", None, None, trust_remote_code=False)


def test_code_of_a_cloned_package_needs_the_flag_too(write):
    source = {"url": "https://github.com/a/b", "commit": COMMIT_READ}
    row = read_table(write(x=APART | {"class": "package", "remote_code": False, "source": source})).row("x")
    with pytest.raises(BaselineError, match=f"x runs code of https://github.com/a/b at {COMMIT_READ}"):
        check_remote_code(row.id, None, row, trust_remote_code=False)
    assert not check_remote_code(row.id, None, row, trust_remote_code=True)  # none of the model's own repository


def test_a_branch_becomes_the_commit_it_means(hub):
    api = HfApi()
    api.create_repo("user/model")
    commit = api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="user/model").oid
    assert COMMIT.fullmatch(commit)
    assert resolve_revision("user/model", None) == resolve_revision("user/model", "main") == commit
    assert resolve_revision("user/model", COMMIT_READ) == COMMIT_READ
    with pytest.raises(ModelError, match="does not have it as a model, or not at revision gone"):
        resolve_revision("user/model", "gone")
    with pytest.raises(ModelError, match="user/none is not a folder"):
        resolve_revision("user/none", None)


def test_code_at_a_commit_that_points_elsewhere_is_refused(hub, table):
    api = HfApi()
    api.create_repo("user/model")
    config = json.dumps({"auto_map": {"AutoConfig": "configuration.Own", "AutoModel": "other/repo--modeling.Theirs"}})
    api.upload_file(path_or_fileobj=b'{"a": 1}', path_in_repo="config.json", repo_id="user/model")
    fine = resolve_revision("user/model", None)
    api.upload_file(path_or_fileobj=config.encode(), path_in_repo="config.json", repo_id="user/model")
    astray = resolve_revision("user/model", None)
    api.upload_file(path_or_fileobj=b'{"auto_map": {"A": 5}}', path_in_repo="config.json", repo_id="user/model")
    assert check_remote_code("user/model", resolve_revision("user/model", None), None, trust_remote_code=True)
    assert check_remote_code("user/model", fine, None, trust_remote_code=True)
    with pytest.raises(BaselineError, match="config.json of user/model refers to code in another repository"):
        check_remote_code("user/model", astray, table.row("apart"), trust_remote_code=True)


@pytest.fixture
def planted(miniature_dir, tmp_path):
    """A copy of the miniature whose config, model and processor come from code that leaves a mark when imported."""
    folder, mark = tmp_path / "planted", tmp_path / "mark"
    folder.mkdir()
    for file in miniature_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "own_code.py").write_text(
        f"open({str(mark)!r}, 'a').write('ran ')\n"
        "from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor\n"
        "class OwnConfig(Qwen2VLConfig):\n    model_type = 'own'\n"
        "class OwnModel(Qwen2VLForConditionalGeneration):\n    config_class = OwnConfig\n"
        "class OwnProcessor(Qwen2VLProcessor):\n    pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own_code.OwnConfig", "AutoModelForImageTextToText": "own_code.OwnModel"}
    config |= {"model_type": "own", "architectures": ["OwnModel"]}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    for name in ("processor_config.json", "tokenizer_config.json"):
        document = json.loads((folder / name).read_text()) | {"auto_map": {"AutoProcessor": "own_code.OwnProcessor"}}
        (folder / name).write_text(json.dumps(document | {"processor_class": "OwnProcessor"}))
    return folder, mark


def test_planted_code_is_not_executed(planted):
    folder, mark = planted
    for load in (load_processor, lambda name: load_model(name, load_in_4bit=False)):
        with pytest.raises(ModelError, match="needs code of its own repository, which is not run"):
            load(str(folder))
    assert not mark.exists()


def test_planted_code_would_be_executed_if_it_were_allowed(planted, tmp_path):
    """Else the test above would show nothing. In a process of its own: the classes stay registered."""
    folder, mark = planted
    load = partial(load_processor, str(folder), trust_remote_code=True)
    assert ranks.run(load, log=tmp_path / "log") == 0, ranks.tail(tmp_path / "log")
    assert mark.read_text().startswith("ran")


def test_a_missing_model_is_named(hub):
    with pytest.raises(ModelError, match="user/none cannot be loaded.*accept its licence"):
        load_processor("user/none")


@pytest.mark.parametrize(
    "text", ["!!int ''", "- " * 2000, "a: &a [x]\nb: *a", "models: !!python/object/apply:os.getcwd []"]
)
def test_hostile_yaml_is_named(tmp_path, text):
    path = tmp_path / "table.yaml"
    path.write_text(text)
    for read in (read_table, read_prompts):
        with pytest.raises(BaselineError, match="table.yaml cannot be read as YAML"):
            read(path)


@pytest.mark.parametrize("key", ["../x", "-x", ".x", "a b", "7"])
def test_a_key_must_be_the_name_of_a_folder(write, key):
    path = write(x=HERE)
    path.write_text(path.read_text(encoding="utf-8").replace("  x:", f"  {key}:"), encoding="utf-8")
    with pytest.raises(BaselineError, match=f"row {key}: the key names a folder"):
        read_table(path)
