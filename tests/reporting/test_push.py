"""scripts/push_adapter.py against the local hub: what arrives, what stays, what is said when it fails."""

import ast
import hashlib
import json

import pytest
import yaml
from huggingface_hub import HfApi, ModelCard, hf_hub_download

from tests.local_hub.faults import Fault
from tests.reporting.documents import adapter_document, family_document, miniature_document
from vlmcap import upload
from vlmcap.reporting.hub import PushError, check_llama_name, push_adapter
from vlmcap.upload import check_push_rights

REPO = "user/adapter"


@pytest.fixture
def adapter_dir(tmp_path):
    """What the recipe leaves, with invented bytes for weights, and what the trainer may leave beside it."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(adapter_document()))
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
    for name in ("adapter_config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "checkpoint-10").mkdir()
    for name in (
        "checkpoint-10/model.safetensors",
        "training_args.bin",
        "optimizer.pt",
        "rng_state.pth",
        "old.pt",
        "weights.pkl",
        "predictions.rank0.jsonl",
        "samples.html",
    ):
        (folder / name).write_bytes(b"not for others")
    return folder


def hashes(folder):
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "README.md" and ".eval_results" not in p.parts)
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_script_pushes_privately_in_one_commit_and_prints_how_to_load(hub, adapter_dir, run_script):
    done = run_script("push_adapter.py", "--adapter_dir", adapter_dir, "--repo_id", REPO)

    info = HfApi().model_info(REPO)
    assert info.private
    assert {sibling.rfilename for sibling in info.siblings} == {
        ".gitattributes",
        "README.md",
        ".eval_results/captioning.yaml",
        "metrics.json",
        "adapter_model.safetensors",
        "adapter_config.json",
        "processor_config.json",
        "tokenizer_config.json",
        "tokenizer.json",
    }
    assert len(HfApi().list_repo_commits(REPO)) == 2  # the repository's first and ours
    address, code = done.stdout.split("To load it:\n")
    assert f"{hub.endpoint}/{REPO} (private)" in address
    assert REPO in code and "quantization_config=nf4" in code  # as it was measured
    ast.parse(code)
    assert "hf_user_write" not in done.stdout + done.stderr


def test_the_pushed_card_names_the_repository_and_was_validated(hub, adapter_dir, tmp_path):
    assert push_adapter(adapter_dir, REPO, private=False) == f"{hub.endpoint}/{REPO}"
    assert not HfApi().model_info(REPO).private
    card = ModelCard.load(hf_hub_download(REPO, "README.md", cache_dir=tmp_path / "cache"))
    assert card.data.base_model == "Qwen/Qwen2-VL-2B-Instruct" and f'"{REPO}"' in card.text
    entries = yaml.safe_load(hub.file("models", REPO, ".eval_results/captioning.yaml"))
    assert entries[0]["source"]["url"] == f"https://huggingface.co/{REPO}/blob/main/metrics.json"
    assert [entry["path"] for entry in hub.log][0] == "/api/validate-yaml"


def test_a_miniature_with_local_base_and_data_can_be_pushed(hub, adapter_dir):
    (adapter_dir / "metrics.json").write_text(json.dumps(miniature_document("/nowhere/base")))
    push_adapter(adapter_dir, REPO)
    assert b"base_model" not in hub.file("models", REPO, "README.md")


def test_a_refused_commit_is_reported_and_the_folder_stays(hub, adapter_dir, run_script):
    before = hashes(adapter_dir)
    hub.faults.append(Fault(method="POST", path="/commit/main", status=403, body={"error": "storage quota"}, times=99))
    done = run_script("push_adapter.py", "--adapter_dir", adapter_dir, "--repo_id", REPO, expect=1)
    assert "Traceback" not in done.stderr
    assert "failed while uploading the files" in done.stderr and "storage quota" in done.stderr
    assert f"python scripts/push_adapter.py --adapter_dir {adapter_dir} --repo_id {REPO}" in done.stderr
    assert hashes(adapter_dir) == before

    hub.faults.clear()
    push_adapter(adapter_dir, REPO)  # the command that the message gives
    assert hub.file("models", REPO, "metrics.json") == (adapter_dir / "metrics.json").read_bytes()


def test_a_connection_that_breaks_is_reported(hub, adapter_dir, monkeypatch):
    monkeypatch.setattr(upload, "PATIENCE", 0)
    hub.faults.append(Fault(method="POST", path="/validate-yaml", action="drop", times=99))
    with pytest.raises(PushError, match="(?s)failed while validating the card.*Nothing was lost"):
        push_adapter(adapter_dir, REPO)


def test_metadata_that_the_hub_refuses_creates_no_repository(hub, adapter_dir):
    refusal = {"errors": [{"message": '"license" must be one of a list'}]}
    hub.faults.append(Fault(method="POST", path="/validate-yaml", status=400, body=refusal))
    with pytest.raises(PushError, match='validating the card: .*"license.* must be one of a list'):
        push_adapter(adapter_dir, REPO)
    assert not [entry for entry in hub.log if entry["path"] == "/api/repos/create"]


def test_somebody_else_s_namespace_is_refused(hub, adapter_dir):
    with pytest.raises(
        PushError,
        match="(?s)failed while creating the repository.*403.*has no model repository other/adapter.*hf auth login",
    ):
        push_adapter(adapter_dir, "other/adapter")


def test_a_private_push_does_not_land_in_a_public_repository(hub, adapter_dir):
    HfApi().create_repo(REPO, private=False)
    with pytest.raises(PushError, match="exists and is public, but private was asked for.*pass --public"):
        push_adapter(adapter_dir, REPO)
    assert HfApi().list_repo_files(REPO) == [".gitattributes"]
    push_adapter(adapter_dir, REPO, private=False)


def test_an_incomplete_folder_is_named_before_anything_is_sent(hub, adapter_dir):
    (adapter_dir / "metrics.json").unlink()
    (adapter_dir / "processor_config.json").unlink()
    lacks = "lacks processor_config.json or preprocessor_config.json, metrics.json"
    with pytest.raises(FileNotFoundError, match=f"(?s){lacks}.*recipes/sft_qwen2vl_jp.py"):
        push_adapter(adapter_dir, REPO)
    with pytest.raises(FileNotFoundError, match="there is no adapter folder"):
        push_adapter(adapter_dir / "nowhere", REPO)
    assert not hub.log


def test_rights_are_checked_before_the_work(hub):
    check_push_rights("user/adapter")
    with pytest.raises(PushError, match="--push_to_hub needs --hub_model_id USER/NAME"):
        check_push_rights(None)
    with pytest.raises(PushError, match="other/adapter: user can push to user only"):
        check_push_rights("other/adapter")
    hub.fail(path="/api/whoami-v2", status=401)
    with pytest.raises(PushError, match="401.*`hf auth login` logs in"):
        check_push_rights("user/adapter")


@pytest.mark.parametrize("repo_type", ["model", "dataset", "space"])
def test_what_is_refused_names_the_options_of_the_command(hub, monkeypatch, repo_type):
    """A recipe has no --public, and publish_space.py no --push_to_hub."""
    words, option, push, fix = {
        "model": ((), "--hub_model_id", "--push_to_hub", "push later with scripts/push_adapter.py --public"),
        "dataset": (("--repo_id", "dataset"), "--repo_id", "--push_to_hub", "pass --public"),
        "space": (("--repo_id", "space", True, "--repo_id"), "--repo_id", "--repo_id", "pass --public"),
    }[repo_type]
    HfApi().create_repo("user/seen", private=False, repo_type=repo_type, space_sdk="gradio")
    refused = {"seen": f"{option} seen: give it as", "user/seen": f"{option} user/seen: .* on the Hub, or {fix}"}
    for name, message in refused.items():
        with pytest.raises(PushError, match=message):
            check_push_rights(name, *words)
    hub.fail(path="/api/whoami-v2", status=401)
    with pytest.raises(PushError, match=f"^{push}: the Hub does not say who you are"):
        check_push_rights("user/new", *words)
    monkeypatch.setenv("HF_TOKEN", "hf_user_read")
    with pytest.raises(PushError, match=f"^{push}: the token of user may only read"):
        check_push_rights("user/new", *words)


def family_folder(adapter_dir, recipe, **options):
    """The folder as another recipe leaves it."""
    (adapter_dir / "metrics.json").write_text(json.dumps(family_document(recipe, **options)))
    if recipe == "sft_vit_gpt2_food":
        (adapter_dir / "adapter_model.safetensors").rename(adapter_dir / "model.safetensors")
        (adapter_dir / "adapter_config.json").rename(adapter_dir / "config.json")
        (adapter_dir / "generation_config.json").write_text("{}")
    return adapter_dir


def test_a_whole_model_is_pushed_without_pickles(hub, adapter_dir, run_script):
    folder = family_folder(adapter_dir, "sft_vit_gpt2_food")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    done = run_script("push_adapter.py", "--adapter_dir", folder, "--repo_id", "user/dishes")
    files = set(HfApi().list_repo_files("user/dishes"))
    assert {"model.safetensors", "config.json", "generation_config.json", "README.md", "metrics.json"} <= files
    assert not [name for name in files if name.endswith((".bin", ".pt", ".html")) or "checkpoint" in name]
    code = done.stdout.split("To load it:\n")[1]
    assert 'VisionEncoderDecoderModel.from_pretrained("user/dishes")' in code
    ast.parse(code)
    assert HfApi().list_repo_commits("user/dishes")[0].title == "Upload model, processor, metrics and model card"
    card = ModelCard.load("user/dishes")
    card.validate()
    assert card.data.base_model == ["google/vit-base-patch16-224-in21k", "openai-community/gpt2"]


@pytest.mark.parametrize("miniature", [False, True])
@pytest.mark.parametrize("recipe", ["sft_blip_vi", "sft_vit_gpt2_food", "sft_vit_llama_food"])
def test_every_card_of_the_family_is_valid(hub, adapter_dir, recipe, miniature):
    (adapter_dir / "LICENSE.txt").write_text("the licence")
    push_adapter(family_folder(adapter_dir, recipe, miniature=miniature), "user/Llama-x")
    card = ModelCard(hub.file("models", "user/Llama-x", "README.md").decode())
    assert card.data.pipeline_tag == "image-to-text" and card.data.library_name
    assert (card.data.base_model is None) == miniature


def test_what_is_built_with_llama_carries_its_licence_and_its_name(hub, adapter_dir):
    folder = family_folder(adapter_dir, "sft_vit_llama_food")
    with pytest.raises(PushError, match='user/dishes cannot be the name .* begins with "Llama"'):
        push_adapter(folder, "user/dishes")
    with pytest.raises(
        PushError, match="(?s)failed while adding the licence of meta-llama/Llama-3.2-1B: .*Put LICENSE.txt of"
    ):
        push_adapter(folder, "user/Llama-dishes")
    assert "/api/repos/create" not in [entry["path"] for entry in hub.log]

    (folder / "LICENSE.txt").write_text("the licence")
    push_adapter(folder, "user/Llama-dishes")
    assert hub.file("models", "user/Llama-dishes", "LICENSE.txt") == b"the licence"
    notice = hub.file("models", "user/Llama-dishes", "NOTICE").decode()
    assert notice.startswith("Llama 3.2 is licensed under the Llama 3.2 Community License, Copyright")

    check_llama_name("user/dishes", "openai-community/gpt2")
    check_llama_name(None, "meta-llama/Llama-3.2-1B")
    with pytest.raises(PushError):
        check_llama_name("user/dishes", "weights/Llama-3.2-3B")


def test_the_licence_of_llama_is_fetched_with_its_revision(hub, adapter_dir):
    api = HfApi()
    api.create_repo("user/Llama-3.2-1B")
    upload = {"path_in_repo": "LICENSE.txt", "repo_id": "user/Llama-3.2-1B"}
    sha = api.upload_file(path_or_fileobj=b"the licence", **upload).oid
    api.upload_file(path_or_fileobj=b"another", **upload)
    metrics = family_document("sft_vit_llama_food")
    for run in (metrics, metrics["base"]):
        run["model"]["parts"]["decoder"] = {"id": "user/Llama-3.2-1B", "revision": sha}
    (adapter_dir / "metrics.json").write_text(json.dumps(metrics))
    push_adapter(adapter_dir, "user/Llama-dishes")
    assert hub.file("models", "user/Llama-dishes", "LICENSE.txt") == b"the licence"


@pytest.mark.parametrize(
    ("recipe", "weights", "pickle"),
    [
        ("sft_blip_vi", "adapter_model.safetensors", "adapter_model.bin"),
        ("sft_vit_gpt2_food", "model.safetensors", "pytorch_model.bin"),
    ],
)
def test_weights_in_pickles_are_no_weights(hub, adapter_dir, recipe, weights, pickle):
    folder = family_folder(adapter_dir, recipe)
    (folder / weights).rename(folder / pickle)
    with pytest.raises(FileNotFoundError, match=f"lacks {weights}"):
        push_adapter(folder, REPO)
    assert not hub.log
