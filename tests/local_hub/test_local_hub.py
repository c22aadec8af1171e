"""The hub itself, through the clients that the project uses."""

import hashlib
import os
import subprocess
import sys

import datasets
import httpx2
import huggingface_hub
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from tests.local_hub import Hub

REPO = "user/adapter"
WEIGHTS = bytes(range(256)) * 1000


@pytest.fixture
def folder(tmp_path):
    """What a push uploads: a text file (sent in the commit), a binary (LFS), a subfolder."""
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "README.md").write_text("---\nlanguage: ja\n---\n猫がいる\n")
    (source / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (source / "sub" / "notes.txt").write_text("赤い傘")
    return source


def test_private_upload_and_download_from_a_clean_cache(hub, folder, tmp_path):
    api = HfApi()
    api.create_repo(REPO, private=True)
    commit = api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="weights")

    got = huggingface_hub.snapshot_download(REPO, cache_dir=tmp_path / "cache")

    for path in ("README.md", "adapter_model.safetensors", "sub/notes.txt"):
        with open(os.path.join(got, path), "rb") as file:
            assert file.read() == (folder / path).read_bytes() == hub.file("models", REPO, path)
    info = api.model_info(REPO, files_metadata=True)
    assert info.private and info.sha == commit.oid and info.card_data.language == "ja"
    lfs = {sibling.rfilename: sibling.lfs.sha256 for sibling in info.siblings if sibling.lfs}
    assert lfs == {"adapter_model.safetensors": hashlib.sha256(WEIGHTS).hexdigest()}
    assert not [entry for entry in hub.log if "bug" in entry]
    # as on the real Hub, the token does not travel to the CDN
    assert [entry["auth"] for entry in hub.log if entry["path"].startswith("/cdn/")] == [False]


def test_a_private_repository_is_hidden_from_others(hub, folder, tmp_path):
    HfApi().create_repo(REPO, private=True)
    HfApi().upload_folder(repo_id=REPO, folder_path=folder)
    for token in (False, "hf_other_write"):
        with pytest.raises(RepositoryNotFoundError):
            huggingface_hub.snapshot_download(REPO, cache_dir=tmp_path / "cache", token=token)
    assert HfApi(token="hf_user_read").model_info(REPO).id == REPO


def test_only_a_write_token_of_the_owner_writes(hub, folder):
    for token, status in (("hf_user_read", 403), ("hf_other_write", 403), ("hf_nobody", 401), (False, 401)):
        with pytest.raises(HfHubHTTPError) as error:
            HfApi().create_repo(REPO, token=token)
        assert error.value.response.status_code == status
    HfApi().create_repo(REPO)
    with pytest.raises(HfHubHTTPError) as error:
        HfApi(token="hf_user_read").upload_folder(repo_id=REPO, folder_path=folder)
    assert error.value.response.status_code == 403
    assert HfApi().whoami()["name"] == "user"


def test_creating_twice_needs_exist_ok(hub):
    api = HfApi()
    api.create_repo(REPO)
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo(REPO)
    assert error.value.response.status_code == 409
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO


def test_dataset_of_parquet_is_pushed_and_loaded(hub, tmp_path):
    rows = {"image_id": [7, 8], "captions": [["犬が走る", "走る犬"], ["白い皿"]]}
    train, test = datasets.Dataset.from_dict(rows), datasets.Dataset.from_dict({k: v[:1] for k, v in rows.items()})
    datasets.DatasetDict({"train": train, "test": test}).push_to_hub("user/captions", private=True)

    got = datasets.load_dataset("user/captions", cache_dir=str(tmp_path / "cache"))

    assert got["train"].to_dict() == rows
    assert got["test"]["image_id"] == [7]
    assert hub.repos["datasets", "user/captions"].private


def test_a_child_process_talks_to_the_same_hub(hub, folder):
    HfApi().create_repo(REPO, private=True)
    HfApi().upload_folder(repo_id=REPO, folder_path=folder)
    code = f"import huggingface_hub as h; print(open(h.hf_hub_download({REPO!r}, 'sub/notes.txt')).read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "赤い傘", done.stderr


def test_commit_on_an_old_parent_is_refused(hub):
    api = HfApi()
    api.create_repo(REPO)
    old = api.model_info(REPO).sha
    api.upload_file(repo_id=REPO, path_in_repo="a.txt", path_or_fileobj=b"1")
    with pytest.raises(HfHubHTTPError) as error:
        api.upload_file(repo_id=REPO, path_in_repo="a.txt", path_or_fileobj=b"2", parent_commit=old)
    assert error.value.response.status_code == 412
    assert hub.file("models", REPO, "a.txt") == b"1"


def test_revisions_and_deletions(hub, folder):
    api = HfApi()
    api.create_repo(REPO)
    first = api.upload_folder(repo_id=REPO, folder_path=folder).oid
    api.create_tag(REPO, tag="v1")
    api.delete_folder(repo_id=REPO, path_in_repo="sub")
    assert not api.file_exists(REPO, "sub/notes.txt")
    assert api.file_exists(REPO, "sub/notes.txt", revision="v1")
    assert api.list_repo_refs(REPO).tags[0].target_commit == first
    assert [commit.commit_id for commit in api.list_repo_commits(REPO)][1] == first
    assert {node.path for node in api.list_repo_tree(REPO, revision="v1")} >= {"README.md", "sub"}


def test_a_large_file_goes_up_in_parts(tmp_path, folder, monkeypatch):
    """In another process, as the endpoint is read at import."""
    with Hub(tmp_path / "hub", part_bytes=100_000).serve() as parts:
        upload = f"from huggingface_hub import HfApi; a = HfApi(); a.create_repo({REPO!r}); "
        upload += f"a.upload_folder(repo_id={REPO!r}, folder_path={str(folder)!r})"
        env = os.environ | {"HF_ENDPOINT": parts.endpoint}
        subprocess.run([sys.executable, "-c", upload], env=env, check=True, capture_output=True)
        assert parts.file("models", REPO, "adapter_model.safetensors") == WEIGHTS
        assert len([e for e in parts.log if "/part/" in e["path"]]) == 3


def test_xet_upload(tmp_path, folder):
    with Hub(tmp_path / "hub", xet=True).serve() as xet:
        upload = f"from huggingface_hub import HfApi; a = HfApi(); a.create_repo({REPO!r}); "
        upload += f"a.upload_folder(repo_id={REPO!r}, folder_path={str(folder)!r})"
        env = os.environ | {"HF_ENDPOINT": xet.endpoint, "HF_HUB_DISABLE_XET": "0"}
        subprocess.run([sys.executable, "-c", upload], env=env, check=True, capture_output=True)
        assert any("xet-write-token" in e["path"] for e in xet.log)
        assert xet.file("models", REPO, "adapter_model.safetensors") == WEIGHTS


def test_a_fault_hits_as_often_as_asked(hub):
    HfApi().create_repo(REPO)
    fault = hub.fail(method="GET", path="/api/models/", status=418, body={"error": "teapot"}, skip=1, times=2)
    statuses = [httpx2.get(f"{hub.endpoint}/api/models/{REPO}").status_code for _ in range(4)]
    assert statuses == [200, 418, 418, 200]
    assert fault.hits == 2


@pytest.mark.parametrize("action", ["drop", "lost", "truncate", "cut"])
def test_broken_connections_reach_the_client(hub, action):
    HfApi().create_repo(REPO)
    hub.fail(action=action, after=10)
    with pytest.raises(httpx2.TransportError):
        httpx2.post(f"{hub.endpoint}/api/models/{REPO}/paths-info/main", json={"paths": [".gitattributes"] * 50})


def test_a_lost_answer_was_handled(hub):
    hub.fail(path="/api/repos/create", action="lost")
    token = {"Authorization": "Bearer hf_user_write"}
    with pytest.raises(httpx2.TransportError):
        httpx2.post(f"{hub.endpoint}/api/repos/create", json={"name": "adapter"}, headers=token)
    assert ("models", REPO) in hub.repos


def test_faults_and_log_over_http(hub):
    httpx2.post(f"{hub.endpoint}/__faults__", json=[{"path": "whoami", "status": 503}])
    with pytest.raises(HfHubHTTPError) as error:
        HfApi().whoami()
    assert error.value.response.status_code == 503
    log = httpx2.get(f"{hub.endpoint}/__log__").json()
    assert [(entry["path"], entry["fault"]) for entry in log] == [("/api/whoami-v2", "status")]


def test_card_metadata_is_validated(hub):
    def validate(metadata):
        huggingface_hub.ModelCard(f"---\n{metadata}\n---\n# A card\n").validate()

    validate("base_model: Qwen/Qwen2-VL-2B-Instruct\ndatasets: [user/captions]\nlanguage: ja")
    for wrong in ("base_model: ./outputs/run", "datasets: [/data/stair]"):
        with pytest.raises(ValueError, match="is not valid"):
            validate(wrong)
    broken = httpx2.post(f"{hub.endpoint}/api/validate-yaml", json={"content": "---\nbase_model: [a\n---\n"})
    assert broken.status_code == 400


def test_reset_leaves_nothing(hub):
    HfApi().create_repo(REPO)
    hub.fail(path="whoami")
    hub.reset()
    assert not hub.repos and not hub.faults and not hub.log
