"""captioning.json: written by what trains, read strictly, overridden by the command line."""

import json
from dataclasses import asdict, replace

import pytest

from vlmcap.arguments import parse
from vlmcap.captioning.arguments import (
    CaptionArguments,
    GenerationArguments,
    check_caption_arguments,
    name_pictures,
)
from vlmcap.captioning.captioner import decoding_of, language_of
from vlmcap.captioning.settings import (
    NAME,
    CaptioningSettings,
    SettingsError,
    check_prompts,
    read_settings,
    write_settings,
)
from vlmcap.errors import UserError
from vlmcap.models.weights import ModelError

SETTINGS = CaptioningSettings("sft_qwen2vl_jp", "何？", True, "bfloat16", 3136, 7056, 4, 40, 2, False)


def test_what_is_written_is_read(tmp_path):
    assert read_settings(str(tmp_path)) is None
    write_settings(tmp_path, SETTINGS)
    assert read_settings(str(tmp_path)) == SETTINGS


def test_it_is_read_from_the_hub(hub, tmp_path):
    from huggingface_hub import HfApi

    api = HfApi()
    repo = api.create_repo("user/with-settings").repo_id
    assert read_settings(repo) is None
    write_settings(tmp_path, SETTINGS)
    commit = api.upload_file(path_or_fileobj=tmp_path / NAME, path_in_repo=NAME, repo_id=repo).oid
    assert read_settings(repo, commit) == SETTINGS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "sft_other"}, "recipe cannot be 'sft_other'"),
        ({"num_beams": 0}, "num_beams cannot be 0"),
        ({"num_beams": True}, "num_beams cannot be True"),
        ({"num_beams": 3.0}, "num_beams cannot be 3.0"),
        ({"load_in_4bit": 1}, "load_in_4bit cannot be 1"),
        ({"dtype": "float64"}, "dtype cannot be 'float64'"),
        ({"prompt": ["a"]}, "prompt cannot be"),
        ({"max_pixels": "many"}, "max_pixels cannot be 'many'"),
        ({"prompts": {}}, "prompts cannot be {}"),
        ({"prompts": {"EN": "a"}}, "prompts cannot be {'EN': 'a'}"),
        ({"prompts": {"en": ["a"]}}, "prompts cannot be {'en': "),
        ({"trust_remote_code": True}, "the key 'trust_remote_code' is not known"),
    ],
)
def test_what_is_refused(tmp_path, change, message):
    (tmp_path / NAME).write_text(json.dumps(asdict(SETTINGS) | change))
    with pytest.raises(SettingsError, match=f"captioning.json of .*: {message}"):
        read_settings(str(tmp_path))


def test_files_of_earlier_versions_have_one_prompt(tmp_path):
    found = asdict(SETTINGS)
    del found["prompts"]
    (tmp_path / NAME).write_text(json.dumps(found))
    assert read_settings(str(tmp_path)) == SETTINGS


@pytest.mark.parametrize(
    ("given", "prompt", "language"),
    [
        ({}, "普通", "ja"),
        ({"language": "ja"}, "普通", "ja"),
        ({"style": "polite"}, "丁寧", "ja"),
        ({"language": "en"}, "Describe.", "en"),
        ({"language": "en", "style": "alt"}, "Alt.", "en"),
        ({"prompt": "何？"}, "何？", "ja"),
    ],
)
def test_a_language_and_a_style_choose_a_prompt(given, prompt, language):
    prompts = {"ja/plain": "普通", "ja/polite": "丁寧", "en/alt": "Alt.", "en": "Describe."}
    args, settings = CaptionArguments(adapter="a", **given), replace(SETTINGS, prompt="普通", prompts=prompts)
    assert decoding_of(args, settings).prompt == prompt and language_of(args, settings) == language


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ({"language": "vi"}, True, "--language vi: a has no prompt for vi .*; it has ja/plain, en"),
        ({"language": "en", "style": "polite"}, True, "--language en --style polite: a has no prompt for en/polite"),
        ({"style": "alt"}, True, "--style alt: a has no prompt for ja/alt"),
        ({"language": "en"}, False, "--language en: a was not trained with several prompts"),
        ({"language": "en"}, None, "--language en: a was not trained with several prompts"),
    ],
)
def test_a_prompt_that_is_not_there(given, settings, message):
    settings = settings is not None and replace(SETTINGS, prompts={"ja/plain": "普", "en": "e"} if settings else None)
    with pytest.raises(SettingsError, match=message):
        decoding_of(CaptionArguments(adapter="a", **given), settings or None)


def test_an_adapter_is_trained_further_with_its_own_prompts(tmp_path):
    write_settings(tmp_path, replace(SETTINGS, prompts={"ja": "普", "en": "e"}))
    check_prompts(str(tmp_path), None, ["e"])
    with pytest.raises(SettingsError, match="is asked '普' or 'e' .* would ask '何？': set --prompts to that"):
        check_prompts(str(tmp_path), None, ["普", "何？"], "--prompts")
    (tmp_path / "elsewhere").mkdir()
    check_prompts(str(tmp_path / "elsewhere"), None, ["何？"])


@pytest.mark.parametrize("text", ["", "[]", "{", '{"recipe": "a", "recipe": "b"}', '{"recipe": "sft_blip_vi"}'])
def test_damaged_files(tmp_path, text):
    (tmp_path / NAME).write_text(text)
    with pytest.raises(SettingsError, match="captioning.json of"):
        read_settings(str(tmp_path))


def test_the_command_line_overrides():
    def asked(**given):
        return decoding_of(CaptionArguments(adapter="a", **given), SETTINGS)

    expected = GenerationArguments(
        prompt="何？", num_beams=4, max_new_tokens=40, no_repeat_ngram_size=2, japanese_only=False
    )
    assert asked() == expected
    assert asked(num_beams=1, no_repeat_ngram_size=0, japanese_only=True) == replace(
        expected, num_beams=1, no_repeat_ngram_size=0, japanese_only=True
    )
    assert decoding_of(CaptionArguments(model="m"), None) == GenerationArguments()
    with pytest.raises(UserError, match="--num_captions 5 is more than the beam is wide, 4: add --num_beams 5"):
        asked(num_captions=5)
    assert asked(num_captions=5, num_beams=5).num_beams == 5


def test_pictures_anywhere_on_the_command_line():
    words = "a.jpg --adapter x b --sidecar c.jpg --num_beams 2 - --hold_back empty repetition d --overwrite true"
    (args,) = parse("", CaptionArguments, command_line=name_pictures(words.split()))
    assert args.pictures == ["a.jpg", "b", "c.jpg", "-", "d"]
    assert args.sidecar and args.overwrite and args.adapter == "x" and args.hold_back == ["empty", "repetition"]
    (args,) = parse("", CaptionArguments, command_line=name_pictures(["--adapter=x", "--", "-odd.jpg"]))
    assert args.pictures == ["./-odd.jpg"]
    (args,) = parse("", CaptionArguments, command_line=name_pictures("--japanese-only a --load_in_4bit b".split()))
    assert args.pictures == ["a", "b"] and args.japanese_only and args.load_in_4bit


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pictures": ["a"]}, "--adapter, --model or --server are needed"),
        ({"model": "m"}, "pictures, and"),
        ({"pictures": ["a"], "model": "m", "format": "html"}, "add --output captions.html"),
        ({"pictures": ["a"], "model": "m", "review_queue": "r"}, "add --output captions.jsonl"),
        ({"pictures": ["a"], "model": "m", "overwrite": True}, "add --sidecar"),
        ({"pictures": ["a"], "model": "m", "language": "en", "prompt": "p"}, "and --prompt is another: give one"),
        ({"pictures": ["a"], "model": "m", "num_captions": 3, "num_beams": 2}, "add --num_beams 3"),
        ({"pictures": ["a"], "server": "http://x", "num_captions": 2}, "--num_captions cannot be asked of a server"),
        ({"pictures": ["a"], "server": "http://x", "japanese_only": True}, "--japanese_only cannot be asked of"),
    ],
)
def test_what_excludes_each_other(given, message):
    with pytest.raises(UserError, match=message):
        check_caption_arguments(CaptionArguments(**given))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--format pdf", "--format must be one of text, jsonl"),
        ("--dtype int8", "--dtype must be one of"),
        ("--batch_size 0", "--batch_size must be 1 or more"),
        ("--hold_back hallucination", "--hold_back hallucination: without references there are only"),
    ],
)
def test_values_that_are_refused(words, message):
    with pytest.raises(SystemExit, match=message):
        parse("", CaptionArguments, command_line=words.split())


def test_the_format_follows_the_file():
    formats = {"c.jsonl": "jsonl", "c.CSV": "csv", "a/c.html": "html", "c.txt": "text", "csv/c": "text"}
    assert {name: CaptionArguments(output=name).format for name in formats} == formats


def test_no_such_adapter(hub):
    with pytest.raises(ModelError, match="nobody/nothing is not a folder, and the Hub does not have it"):
        from vlmcap.captioning.captioner import load_captioner

        load_captioner(CaptionArguments(pictures=["a"], adapter="nobody/nothing"))
