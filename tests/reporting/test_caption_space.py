"""The page of an adapter as a Space: it needs no vlmcap, and says in a browser what was measured."""

import json
import os
import re
import socket
import subprocess
import sys

import pytest
import yaml
from huggingface_hub import HfApi
from PIL import Image

from tests.reporting.conftest import SETTINGS
from tests.reporting.documents import adapter_document, family_document, miniature_document
from vlmcap.miniature.qwen2_vl import ENGLISH_PROMPT
from vlmcap.models.load import ModelError
from vlmcap.places import find_uv
from vlmcap.reporting.caption_space import SOURCE, SpaceError, push_caption_space, write_caption_space
from vlmcap.reporting.cards import render_adapter_card

REQUIREMENTS = (SOURCE / "requirements.txt").read_text(encoding="utf-8")
GRADIO, PILLOW = (re.search(rf"^{name}==.+$", REQUIREMENTS, re.MULTILINE)[0] for name in ("gradio", "pillow"))
# Runs a page where nothing of the project can be imported; one file of it keeps the miniature's scales right in NF4
# (real widths need no keeping).
ALONE = """
import importlib.util, runpy, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "vlmcap":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
spec = importlib.util.spec_from_file_location("nf4", sys.argv[1])
spec.loader.exec_module(importlib.util.module_from_spec(spec))
sys.path.insert(0, sys.argv[2])
runpy.run_path(sys.argv[2] + "/app.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def space(adapter, miniature_dir, tmp_path_factory):
    """The page of the miniature's adapter in NF4, which is asked in two languages."""
    metrics = miniature_document(str(miniature_dir), str(adapter))
    for run in (metrics, metrics["base"]):
        run["decoding"] |= SETTINGS
        run["model"]["quantization"] = "nf4"
    metrics["prompt"] = metrics["base"]["prompt"] = adapter_document()["prompt"]
    prompts = {"ja/plain": metrics["prompt"], "en": ENGLISH_PROMPT}
    metrics["key"] = "ja/plain"
    metrics["languages"] = {key: {"trained": True, "prompt": prompt} for key, prompt in prompts.items()}
    (adapter / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    return write_caption_space(str(adapter), tmp_path_factory.mktemp("space"))


@pytest.fixture(scope="module")
def address(space, overlay, repo_root, tmp_path_factory):
    """Where the page runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("visitors")
    env = {"PYTHONPATH": overlay(GRADIO, PILLOW), "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    env |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-c", ALONE, str(repo_root / "recipes/vlmcap/models/nf4.py"), str(space)]
    with (folder / "stderr").open("w+") as errors:
        app = subprocess.Popen(
            command, cwd=folder, env=os.environ | env, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        try:
            for line in app.stdout:
                if "Running on local URL" in line:
                    break
            else:
                pytest.fail(f"the page ended: {(folder / 'stderr').read_text()}")
            yield f"http://127.0.0.1:{port}"
        finally:
            app.kill()
            app.wait()


def test_a_visitor_reads_the_caption_that_was_measured(address, page, pictures, measured, measure, space):
    """Of a picture with a transparent ground and of one that is on its side by EXIF, and of this one in English."""
    limits = json.loads((space / "space.json").read_text(encoding="utf-8"))["limits"]
    for number in (0, 1):
        page.goto(address)
        page.get_by_text(re.search(r"\*\*(.+?)\*\*", limits)[1]).wait_for()
        page.locator("input[type=file]").first.set_input_files(str(pictures[number]))
        page.locator("img[src*='/file=']").first.wait_for()
        page.get_by_role("button", name="Caption", exact=True).click()
        page.wait_for_function("document.querySelectorAll('textarea')[0]?.value")
        said, others = (page.locator("textarea").nth(place).input_value() for place in (0, 1))
        assert said == measured[number]
        assert 1 <= len(others.splitlines()) < SETTINGS["num_beams"] and said not in others.splitlines()
    page.get_by_label("Language").click()
    page.get_by_role("option", name="English").click()
    page.get_by_role("button", name="Caption", exact=True).click()
    page.wait_for_function("before => document.querySelectorAll('textarea')[0]?.value != before", arg=said)
    assert page.locator("textarea").nth(0).input_value() == measure(ENGLISH_PROMPT)[1] != said
    assert all(url.startswith((address, "data:", "blob:")) for url in page.requests_made), page.requests_made


ASK = """
import sys
from gradio_client import Client, handle_file
client = Client(sys.argv[1], verbose=False)
for picture in (handle_file(sys.argv[2]), None):
    try:
        print(client.predict(picture, api_name="/caption"))
    except Exception as error:
        print(error)
"""


def test_a_program_is_told_what_is_wrong_with_its_picture(address, fresh_python, overlay, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.ico")
    said = fresh_python(ASK, address, str(tmp_path / "a.ico"), env={"PYTHONPATH": overlay(GRADIO, PILLOW)})
    assert "a.ico: not an image of a kind that is read here (JPEG, PNG" in said and "Upload a picture" in said


def test_what_the_page_loads_is_what_was_measured_and_what_it_says_is_the_card(space, adapter, miniature_dir):
    written = json.loads((space / "space.json").read_text(encoding="utf-8"))
    metrics = json.loads((adapter / "metrics.json").read_text(encoding="utf-8"))
    assert written["base"]["id"] == str(miniature_dir.resolve()) and written["base"]["quantization"] == "nf4"
    prompts = {"Japanese, plain": metrics["prompt"], "English": ENGLISH_PROMPT}
    assert list(written["prompts"].items()) == list(prompts.items()) and written["decoding"] == SETTINGS
    assert written["limits"] in render_adapter_card(metrics) and "coloured shapes only" in written["limits"]
    assert "one short Japanese or English sentence" in written["introduction"]
    assert "scores above" not in written["limits"]  # the page has no scores
    _, head, text = (space / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["short_description"] == "Picture in, Japanese or English caption out"
    assert (metadata["sdk"], metadata["app_file"]) == ("gradio", "app.py") and written["limits"] in text
    assert f"gradio=={metadata['sdk_version']}" == GRADIO
    assert {path.name for path in space.iterdir()} == {
        *("README.md", "app.py", "pictures.py", "requirements.txt", "space.json")
    }
    assert not re.search(r"^\s*(from|import) vlmcap", "".join(p.read_text() for p in space.glob("*.py")), re.M)


def test_the_pins_are_those_of_the_tests_and_can_be_installed_together(repo_root, overlay, tmp_path):
    """All but gradio, which our environment does not have, and the Pillow that it needs."""
    ours = (repo_root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert {pin for pin in REQUIREMENTS.split() if pin not in ours} == {GRADIO, PILLOW}
    overlay(GRADIO, PILLOW)  # there is a package index
    command = [find_uv(), "pip", "compile", "--quiet", "--python-version", "3.12", str(SOURCE / "requirements.txt")]
    done = subprocess.run([*command, "-o", str(tmp_path / "all.txt")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_page_of_an_adapter_for_one_prompt_has_that_alone(hub, tmp_path):
    publish(hub, adapter_document())
    folder = write_caption_space("user/adapter", tmp_path / "page")
    written = json.loads((folder / "space.json").read_text(encoding="utf-8"))
    assert written["prompts"] == {"": adapter_document()["prompt"]}
    assert "one short Japanese sentence" in written["introduction"]


def publish(hub, metrics: dict, name: str = "user/adapter") -> None:
    HfApi().create_repo(name, private=True)
    if metrics:
        HfApi().upload_file(path_or_fileobj=json.dumps(metrics).encode(), path_in_repo="metrics.json", repo_id=name)


def test_the_script_pushes_a_private_space(hub, run_script, tmp_path):
    publish(hub, adapter_document())
    names = ["--adapter", "user/adapter", "--repo_id", "user/demo", "--output_dir", tmp_path / "page"]
    assert "spaces/user/demo" in run_script("publish_space.py", *names).stdout
    info = HfApi().repo_info("user/demo", repo_type="space")
    assert info.private and "space.json" in {file.rfilename for file in info.siblings}
    written = json.loads((tmp_path / "page/space.json").read_text(encoding="utf-8"))
    assert written["adapter"] == {"id": "user/adapter", "revision": HfApi().model_info("user/adapter").sha}
    assert written["base"]["id"] == "Qwen/Qwen2-VL-2B-Instruct" and written["base"]["dtype"] == "float16"
    assert "It makes things up" in written["limits"]
    done = run_script("publish_space.py", *names, "--public", expect=1)
    assert "exists and is private, but public was asked for" in done.stderr


def test_what_no_space_can_be_made_of(hub, space, tmp_path):
    with pytest.raises(
        SpaceError, match="the adapter is a folder, .*, which a Space cannot load: push it with scripts"
    ):
        push_caption_space(space, "user/demo")
    publish(hub, {}, "user/empty")
    with pytest.raises(SpaceError, match="user/empty has no metrics.json"):
        write_caption_space("user/empty", tmp_path)
    publish(hub, family_document("sft_blip_vi"), "user/blip")
    with pytest.raises(SpaceError, match="user/blip was trained by recipes/sft_blip_vi.py"):
        write_caption_space("user/blip", tmp_path)
    with pytest.raises(ModelError, match="user/none is not a folder, and the Hub does not have it"):
        write_caption_space("user/none", tmp_path)
