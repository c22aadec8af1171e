"""The Hub misbehaving: every endpoint of every publish, and of loading, with every fault.

A push either completes or ends with a message; what that says of the Hub is compared with what the hub holds. The
default branch is always in the old state or the new one, and the same push again finishes with one commit in all.
`python -m tests.faults.hub_table` prints what happened as a table.
"""

import concurrent.futures
import dataclasses
import json
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi, HfFileSystem, close_session, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import filter_repo_objects

from tests.local_hub import Hub
from tests.local_hub.clock import Clock
from tests.reporting.documents import adapter_document, family_document
from vlmcap import upload
from vlmcap.data import publish as build
from vlmcap.data.errors import DataError
from vlmcap.reporting.hub import PRIVATE, push_adapter
from vlmcap.reporting.metric_space import push_metric_space, write_metric_space
from vlmcap.upload import PushError, check_push_rights

FOR_EVER = 10**6
NAMES = ("adapter", "dataset", "space")
ROWS = {"image_id": [1, 2], "captions": [["赤い車"], ["白い犬", "犬"]]}


@dataclasses.dataclass
class Publish:
    """One of the three publishes: its folder, its repository, the call, and the command its errors must name."""

    kind: str
    repo_id: str
    folder: Path
    call: Callable[[Path, str], object]
    command: str
    changed: str  # a file that another version of the folder has otherwise

    def push(self, folder: Path | None = None) -> None:
        self.call(folder or self.folder, self.repo_id)

    def files(self) -> dict[str, bytes]:
        paths = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]
        kept = filter_repo_objects(paths, ignore_patterns=PRIVATE if self.kind == "models" else [])
        return {path: (self.folder / path).read_bytes() for path in kept}


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download", "vlmcap.upload"):
        monkeypatch.setattr(f"{module}.time", clock)
    return clock


@pytest.fixture
def row(request):
    """row(publish, endpoint, fault, outcome): a line of the table that tests/faults/hub_table.py prints."""

    def note(publish: Publish | str, *cells: str) -> None:
        what = publish if isinstance(publish, str) else publish.kind
        request.node.user_properties.append(("row", [*cells, what]))

    return note


@pytest.fixture
def adapter(tmp_path) -> Publish:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(adapter_document()))
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
    for name in ("adapter_config.json", "processor_config.json", "tokenizer_config.json", "training_args.bin"):
        (folder / name).write_text("{}")
    command = f"python scripts/push_adapter.py --adapter_dir {folder} --repo_id user/adapter"
    return Publish("models", "user/adapter", folder, push_adapter, command, "adapter_config.json")


@pytest.fixture
def dataset(tmp_path) -> Publish:
    folder = tmp_path / "captions"
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.table(ROWS), folder / "data" / "test-0a1b2c3d-00000-of-00001.parquet")
    (folder / build.REPORT).write_text(json.dumps({"splits": {"test": {}}, "fingerprint": "0a1b2c3d"}))
    configs = "[{config_name: default, data_files: [{split: test, path: data/test-0a1b2c3d-*.parquet}]}]"
    (folder / "README.md").write_text(f"---\nlanguage: ja\nconfigs: {configs}\n---\n# Captions\n")
    command = f"python scripts/push_dataset.py --folder {folder} --repo_id user/captions"
    return Publish("datasets", "user/captions", folder, build.push, command, "README.md")


@pytest.fixture
def space(tmp_path) -> Publish:
    folder = write_metric_space(tmp_path, "user/metric")
    command = f"python scripts/publish_metric.py --output_dir {tmp_path} --push_to_hub --repo_id user/metric"
    return Publish("spaces", "user/metric", folder, push_metric_space, command, "requirements.txt")


@pytest.fixture
def publish(request) -> Publish:
    return request.getfixturevalue(request.param)


every_publish = pytest.mark.parametrize("publish", NAMES, indirect=True)


def on_hub(hub, publish: Publish) -> dict[str, bytes] | None:
    """What users load by default; None without a repository."""
    repo = hub.repos.get((publish.kind, publish.repo_id))
    return repo and {path: hub.blobs.read(file) for path, file in repo.at().files.items() if path != ".gitattributes"}


def commits(hub, publish: Publish) -> int:
    repo = hub.repos.get((publish.kind, publish.repo_id))
    return len(repo.commits) - 1 if repo else 0  # without the repository's first


def attempt(hub, publish: Publish) -> str | None:
    """Pushes; returns None or the message, after comparing what it says with what the hub holds."""
    before, made = on_hub(hub, publish), commits(hub, publish)
    try:
        publish.push()
        message = None
    except (PushError, DataError) as error:
        message = str(error)
    now, new = on_hub(hub, publish), publish.files()
    assert now in (before, {}, new) and (now != {} or before in (None, {})), "half-published"
    assert commits(hub, publish) - made == (0 if now in (before, {}) else 1)
    if message is None:
        assert now == new
        return None
    said, state, command = message.split("\n")
    assert said.startswith(f"pushing {publish.folder} to {publish.repo_id} failed while ")
    assert command == f"  {publish.command}" and "Nothing was lost here" in state and "Signature" not in message
    assert "hf_user_write" not in message
    if "is as it was" in state:
        assert now != new or before == new
    elif "holds every file of this push (" in state:
        assert now == new
    elif "has no " in state:
        assert now is None or "401" in said
    elif "No file of this push" in state:
        assert now != new
    else:
        assert "holds either every file of this push or, as before at commit" in state
    return message


def finishes(hub, publish: Publish) -> None:
    """The same push again, without the fault: one commit of this version in all."""
    hub.faults.clear()
    made, there = commits(hub, publish), on_hub(hub, publish) == publish.files()
    assert attempt(hub, publish) is None
    assert commits(hub, publish) == made + (not there)


# ---- endpoint x fault --------------------------------------------------------------------------------------
ENDPOINTS = {
    "validate card": ("POST", "/api/validate-yaml"),
    "repository info": ("GET", r"/api/\w+/user/\w+(\?.*)?$"),
    "create": ("POST", "/api/repos/create"),
    "preupload": ("POST", "/preupload/main"),
    "LFS batch": ("POST", "/info/lfs/objects/batch"),
    "LFS upload": ("PUT", "/lfs-upload/"),
    "LFS verify": ("POST", "/info/lfs/verify"),
    "commit": ("POST", "/commit/main"),
    "info of the commit": ("GET", r"/api/\w+/user/\w+/revision/"),
}
PASSING = {
    "500": {"status": 500},
    "502, an HTML page, twice": {"status": 502, "body": b"<html>Bad gateway</html>", "times": 2},
    "429, Retry-After 70": {"status": 429, "headers": {"Retry-After": "70"}},
    "connection dropped": {"action": "drop"},
    "answer lost": {"action": "lost"},
    "answer truncated": {"action": "truncate", "after": 5},
}
LASTING = {
    "500": {"status": 500},
    "429, Retry-After 70": {"status": 429, "headers": {"Retry-After": "70"}},
    "connection dropped": {"action": "drop"},
    "answer lost": {"action": "lost"},
    "401, token revoked": {"status": 401},
    "403": {"status": 403},
}


def reaches(publish: str, endpoint: str) -> bool:
    return publish != "space" or not endpoint.startswith("LFS")  # a Space's files are all small text


def cases(faults: dict) -> list:
    return [
        pytest.param(publish, endpoint, name, id=f"{publish}-{endpoint}-{name}")
        for publish in NAMES
        for endpoint in ENDPOINTS
        for name in faults
        if reaches(publish, endpoint)
    ]


@pytest.mark.parametrize(("publish", "endpoint", "name"), cases(PASSING), indirect=["publish"])
def test_what_passes_is_waited_for(publish, endpoint, name, hub, clock, fault, row):
    method, path = ENDPOINTS[endpoint]
    armed = hub.fail(method=method, path=path, **PASSING[name])
    with fault(f"{endpoint}: {name}"):
        assert attempt(hub, publish) is None
        assert armed.hits >= 1
        assert commits(hub, publish) == 1
        if "Retry-After" in name:
            assert max(clock.slept) >= 70
        finishes(hub, publish)
    row(publish, endpoint, f"{name}, then none", "completes")


@pytest.mark.parametrize(("publish", "endpoint", "name"), cases(LASTING), indirect=["publish"])
def test_what_lasts_ends_with_the_command_that_finishes(publish, endpoint, name, hub, clock, fault, row, monkeypatch):
    monkeypatch.setattr(upload, "PATIENCE", 100)
    method, path = ENDPOINTS[endpoint]
    armed = hub.fail(method=method, path=path, times=FOR_EVER, **LASTING[name])
    with fault(f"{endpoint}: {name} for ever"):
        message = attempt(hub, publish)
        assert armed.hits >= 1
        # What was done, though its answer was lost, is found done by the next try: it asks first. So is a file that
        # arrived and could not be verified.
        found_done = name == "answer lost" and endpoint in ("commit", "create", "LFS upload")
        found_done |= endpoint == "LFS verify" and name[:3] not in ("401", "403", "429")
        assert (message is None) == found_done, message
        assert sum(clock.slept) < 1000
        finishes(hub, publish)
    row(publish, endpoint, f"{name} for ever", "stops; again: completes" if message else "completes")


@every_publish
@pytest.mark.parametrize("status", [412, 409])
def test_what_is_not_a_conflict_is_tried_again(publish, status, hub, clock, fault, row):
    hub.fail(method="POST", path="/commit/main", status=status, times=2)
    with fault(f"commit: {status}, twice"):
        assert attempt(hub, publish) is None
        assert commits(hub, publish) == 1
    row(publish, "commit", f"{status}, then none", "completes")


@pytest.mark.parametrize("times", [1, FOR_EVER])
@pytest.mark.parametrize("publish", ["adapter", "dataset"], indirect=True)
def test_an_expired_upload_address_is_asked_for_again(publish, times, hub, clock, fault, row):
    hub.fail(method="PUT", path="/lfs-upload/", status=403, body=b"<Error>Request has expired</Error>", times=times)
    with fault(f"LFS upload: address expired, {times} times"):
        message = attempt(hub, publish)
        assert (message is None) == (times == 1)
        assert "hf auth login" not in (message or "")
        addresses = [entry["path"] for entry in hub.log if entry["method"] == "PUT"]
        assert len(set(addresses)) == len(addresses) >= 2
        finishes(hub, publish)
    outcome = ("once", "completes") if times == 1 else ("for ever", "stops; again: completes")
    row(publish, "LFS upload", f"403, address expired, {outcome[0]}", outcome[1])


def test_the_same_for_a_file_in_parts(adapter, hub, clock, fault, monkeypatch, row):
    monkeypatch.setattr(hub, "part_bytes", 4000)
    hub.fail(method="PUT", path="/part/2", status=403)
    hub.fail(method="POST", path="/lfs-complete/", status=500)
    hub.fail(method="PUT", path="/part/3", action="drop", after=100)
    with fault("LFS upload in parts: expired, dropped, 500 at the end"):
        assert attempt(hub, adapter) is None
        assert commits(hub, adapter) == 1
    row(adapter, "LFS upload in parts", "403, dropped and 500, then none", "completes")


# ---- a fault after every request -----------------------------------------------------------------------------
def another_version(hub, publish: Publish) -> int:
    """Publishes the folder, changes it; returns how many requests a push of the new version makes."""
    publish.push()
    (publish.folder / publish.changed).write_bytes((publish.folder / publish.changed).read_bytes() + b"\n")
    new = publish.folder / "more.txt"
    new.write_text("more")
    publish.push()
    new.write_text("still more")
    hub.log.clear()
    publish.push()
    requests, _ = len(hub.log), hub.log.clear()
    return requests


def next_version(publish: Publish) -> None:
    more = publish.folder / "more.txt"
    more.write_text(more.read_text() + "!")


@every_publish
def test_the_hub_is_down_for_a_minute_after_any_request(publish, hub, clock, fault, row):
    for done in range(another_version(hub, publish)):
        next_version(publish)
        made = commits(hub, publish)
        hub.fail(action="pass", skip=done, before=hub.go_down)
        clock.at(60, hub.come_back)
        with fault(f"hub down for a minute after request {done}"):
            assert attempt(hub, publish) is None
            assert commits(hub, publish) == made + 1
        if hub.is_down:  # after the last request
            hub.come_back()
    row(publish, "every request", "hub down for a minute", "completes")


@every_publish
def test_the_hub_is_down_for_good_after_any_request(publish, hub, clock, fault, row, monkeypatch):
    monkeypatch.setattr(upload, "PATIENCE", 20)
    requests = another_version(hub, publish)
    for done in range(requests):
        next_version(publish)
        made = commits(hub, publish)
        hub.fail(action="pass", skip=done, before=hub.go_down)
        with fault(f"hub down for good after request {done}"):
            message = attempt(hub, publish)
            assert (message is None) == (done == requests - 1)
            assert message is None or "no connection to 127.0.0.1" in message or "POST" in message
            hub.come_back()
            finishes(hub, publish)
            assert commits(hub, publish) == made + 1
    row(publish, "every request", "hub down for good", "stops; again: completes")


@every_publish
def test_the_token_is_revoked_after_any_request(publish, hub, clock, fault, row, monkeypatch):
    requests = another_version(hub, publish)
    users = hub.users
    for done in range(requests):
        next_version(publish)
        made = commits(hub, publish)
        hub.fail(action="pass", skip=done, before=lambda: monkeypatch.setattr(hub, "users", {}))
        with fault(f"token revoked after request {done}"):
            message = attempt(hub, publish)
            assert message is None or ("401" in message and "hf auth login" in message)
            assert max(clock.slept, default=0) == 0, "waited, though nothing will change"
            monkeypatch.setattr(hub, "users", users)
            finishes(hub, publish)
            assert commits(hub, publish) == made + 1
    row(publish, "every request", "token revoked", "stops at once; again: completes")


# ---- several machines ----------------------------------------------------------------------------------------
def elsewhere(hub, publish: Publish, files: dict[str, bytes]) -> None:
    """Another machine's commit of these files."""
    repo = hub.repos[publish.kind, publish.repo_id]
    added = {path: hub.blobs.regular(content) for path, content in files.items()}
    repo.commit("main", repo.at().files | added, "by another machine")


@every_publish
def test_a_commit_of_another_machine_is_not_overwritten(publish, hub, clock, fault, row):
    theirs = {publish.changed: b"theirs"}
    hub.fail(method="POST", path="/preupload/", action="pass", before=lambda: elsewhere(hub, publish, theirs))
    with fault("another machine commits other files in the middle"):
        with pytest.raises((PushError, DataError), match="(?s)somebody else committed.*differs from the folder in"):
            publish.push()
        assert on_hub(hub, publish) == theirs
        publish.push()
        assert on_hub(hub, publish) == publish.files()
        assert commits(hub, publish) == 2
    row(publish, "commit", "another machine's other files", "stops; again: completes")


@every_publish
def test_the_same_files_from_another_machine_are_ours_too(publish, hub, clock, fault, row):
    def same():
        elsewhere(hub, publish, publish.files())

    hub.fail(method="POST", path="/preupload/", action="pass", before=same)
    with fault("another machine commits the same files in the middle"):
        publish.push()
        assert on_hub(hub, publish) == publish.files()
        assert commits(hub, publish) == 1
    row(publish, "commit", "another machine's same files", "completes")


@every_publish
def test_four_machines_at_once_make_one_commit(publish, hub, fault, row, tmp_path):
    folders = [shutil.copytree(publish.folder, tmp_path / f"machine{i}" / publish.folder.name) for i in range(4)]
    hub.fail(method="POST", path="/preupload/", action="delay", seconds=0.3, times=4)
    with fault("four machines push the same folder at once"):
        with concurrent.futures.ThreadPoolExecutor(4) as machines:
            for done in [machines.submit(publish.push, folder) for folder in folders]:
                done.result()
        assert on_hub(hub, publish) == dataclasses.replace(publish, folder=folders[0]).files()
        assert commits(hub, publish) == 1
    row(publish, "all", "four machines at once", "completes, one commit")


# ---- what arrived --------------------------------------------------------------------------------------------
@every_publish
def test_a_commit_that_lost_a_file_is_noticed(publish, hub, clock, fault, row):
    last = sorted(publish.files())[-1]
    hub.fail(method="POST", path="/commit/main", action="partial")
    with fault("the commit lost a file"):
        with pytest.raises((PushError, DataError), match=f"(?s)does not hold what the folder does: {last}.*differs"):
            publish.push()
        publish.push()
        assert on_hub(hub, publish) == publish.files()
    row(publish, "commit", "a file is lost", "stops; again: completes")


def test_a_file_that_gitignore_keeps_out_is_noticed(adapter, hub, fault, row):
    HfApi().create_repo(adapter.repo_id, private=True)
    elsewhere(hub, adapter, {".gitignore": b"*.safetensors"})
    with fault("a .gitignore on the Hub drops the weights"):
        with pytest.raises(PushError, match="does not hold what the folder does: adapter_model.safetensors"):
            adapter.push()
    row(adapter, "commit", "the Hub's .gitignore drops a file", "stops")


def test_what_another_upload_left_is_removed_by_the_next_commit(dataset, hub):
    HfApi().create_repo(dataset.repo_id, private=True, repo_type="dataset")
    elsewhere(hub, dataset, {"data/train-00000-of-00002.parquet": b"old"})
    dataset.push()
    assert on_hub(hub, dataset) == dataset.files()


def test_a_dataset_folder_that_lacks_a_shard_is_not_pushed(dataset, hub):
    shard = next(dataset.folder.glob("data/*.parquet"))
    shard.rename(shard.with_name("test-0a1b2c3d-00000-of-00002.parquet"))
    with pytest.raises(DataError, match="shards of the test split are missing"):
        dataset.push()
    (dataset.folder / build.REPORT).write_text("[1]")
    with pytest.raises(DataError, match="not the report of a build"):
        dataset.push()
    (dataset.folder / build.REPORT).unlink()
    with pytest.raises(DataError, match="no dataset of scripts/publish_datasets.py"):
        dataset.push()
    assert not hub.log


def test_unfinished_files_stay_here(adapter, hub):
    (adapter.folder / ".README.md.123.new").write_text("half")
    (adapter.folder / ".eval_results").mkdir()
    (adapter.folder / ".eval_results" / ".captioning.yaml.123.new").write_text("half")
    adapter.push()
    assert not [path for path in on_hub(hub, adapter) if path.endswith(".new")]


# ---- tokens, rights ------------------------------------------------------------------------------------------
@every_publish
@pytest.mark.parametrize("there", [False, True])
def test_without_a_token(publish, there, hub, clock, fault, row, monkeypatch):
    if there:
        publish.push()
    made, before = commits(hub, publish), on_hub(hub, publish)
    monkeypatch.delenv("HF_TOKEN")
    with fault("no token"):
        with pytest.raises(
            (PushError, DataError), match="(?s)401.*no .* repository .* that this login can see.*hf auth"
        ):
            publish.push()
        assert (commits(hub, publish), on_hub(hub, publish)) == (made, before)
        assert not clock.slept
    row(publish, "all", f"no token, private repository {'there' if there else 'not there'}", "stops at once")


@every_publish
def test_offline(publish, hub, clock, fault, row, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with fault("HF_HUB_OFFLINE"):
        message = attempt(hub, publish)
        assert "HF_HUB_OFFLINE" in message and not clock.slept
    row(publish, "all", "HF_HUB_OFFLINE is set", "stops at once")


@pytest.mark.parametrize(
    "spec", [{"status": 500}, {"status": 429, "headers": {"Retry-After": "3"}}, {"action": "drop"}]
)
def test_rights_are_asked_for_again(spec, hub, clock, fault, row):
    hub.fail(path="/api/whoami-v2", **spec)
    with fault(f"whoami: {spec}"):
        check_push_rights("user/adapter")
    row("before training", "whoami", f"{spec.get('status', 'dropped')}, then none", "completes")


def test_an_unreachable_hub_is_not_taken_for_a_missing_login(hub, clock, fault, row):
    hub.fail(path="/api/whoami-v2", action="drop", times=FOR_EVER)
    with fault("whoami: down for good"):
        with pytest.raises(PushError, match="no connection to 127.0.0.1 .*start again when it can") as error:
            check_push_rights("user/adapter")
        assert "hf auth login" not in str(error.value)
    row("before training", "whoami", "dropped for ever", "stops before training")


def test_a_token_that_may_only_read_is_refused_before_the_work(hub, fault, monkeypatch, row):
    monkeypatch.setenv("HF_TOKEN", "hf_user_read")
    with fault("whoami: read token"):
        with pytest.raises(PushError, match="the token of user may only read"):
            check_push_rights("user/adapter")
    row("before training", "whoami", "token may only read", "stops before training")


# ---- the licence of Llama ------------------------------------------------------------------------------------
@pytest.fixture
def llama(adapter, hub) -> Publish:
    """The adapter's folder as a model trained on user/Llama-3.2-1B, which is on the hub with its licence."""
    api = HfApi()
    api.create_repo("user/Llama-3.2-1B")
    licence = f"the licence {secrets.token_hex(8)} ".encode() * 50  # not one that another test left in the cache
    sha = api.upload_file(path_or_fileobj=licence, path_in_repo="LICENSE.txt", repo_id="user/Llama-3.2-1B")
    metrics = family_document("sft_vit_llama_food")
    for run in (metrics, metrics["base"]):
        run["model"]["parts"]["decoder"] = {"id": "user/Llama-3.2-1B", "revision": sha.oid}
    (adapter.folder / "metrics.json").write_text(json.dumps(metrics))
    command = adapter.command.replace("user/adapter", "user/Llama-dishes")
    hub.log.clear()
    return dataclasses.replace(
        adapter,
        repo_id="user/Llama-dishes",
        command=command,
    )


LICENCE = {
    "500 twice": ({"status": 500, "times": 2}, "completes"),
    "429, Retry-After 70": ({"status": 429, "headers": {"Retry-After": "70"}}, "completes"),
    "connection dropped": ({"action": "drop"}, "completes"),
    "truncated": ({"method": "GET", "action": "truncate", "after": 50}, "completes"),
    "reset": ({"method": "GET", "action": "cut", "after": 50}, "completes"),
    "500 for ever": ({"status": 500, "times": FOR_EVER}, "stops"),
    "403, licence not accepted": (
        {"status": 403, "headers": {"X-Error-Code": "GatedRepo"}, "times": FOR_EVER},
        "stops",
    ),
    "truncated for ever": ({"method": "GET", "action": "truncate", "after": 50, "times": FOR_EVER}, "stops"),
}


@pytest.mark.parametrize("name", LICENCE)
def test_the_licence_arrives_whole_or_nothing_is_pushed(name, llama, hub, clock, fault, row):
    spec, outcome = LICENCE[name]
    armed = hub.fail(path="/resolve/.*/LICENSE.txt", **spec)
    with fault(f"licence: {name}"):
        if outcome == "stops":
            with pytest.raises(
                PushError, match="(?s)adding the licence of user/Llama-3.2-1B.*Nothing was sent"
            ) as error:
                llama.push()
            assert str(error.value).endswith(f"\n  {llama.command}")
            assert not (llama.folder / "LICENSE.txt").exists()
            assert ("models", llama.repo_id) not in hub.repos
        else:
            llama.push()
        assert armed.hits
        hub.faults.clear()
        llama.push()
        assert hub.file("models", llama.repo_id, "LICENSE.txt") == hub.file(
            "models", "user/Llama-3.2-1B", "LICENSE.txt"
        )
        assert commits(hub, llama) == 1
    row("Llama's licence", "download", name, "stops; again: completes" if outcome == "stops" else outcome)


# ---- loading -------------------------------------------------------------------------------------------------
def load_file(publish: Publish, cache: Path) -> object:
    got = hf_hub_download(publish.repo_id, "adapter_model.safetensors", cache_dir=cache)
    return Path(got).read_bytes()


def load_snapshot(publish: Publish, cache: Path) -> object:
    got = Path(snapshot_download(publish.repo_id, repo_type=publish.kind[:-1], cache_dir=cache))
    paths = [path for path in got.rglob("*") if path.is_file() and path.name != ".gitattributes"]
    return {path.relative_to(got).as_posix(): path.read_bytes() for path in paths}


def load_rows(publish: Publish, cache: Path) -> object:
    HfFileSystem.clear_instance_cache()
    return datasets.load_dataset(publish.repo_id, split="test", cache_dir=str(cache))[:]


def whole(publish: Publish, load: Callable) -> object:
    if load is load_file:
        return publish.files()["adapter_model.safetensors"]
    return ROWS if load is load_rows else publish.files()


LOADING = {
    "one file of the adapter": ("adapter", load_file),
    "snapshot of the adapter": ("adapter", load_snapshot),
    "load_dataset": ("dataset", load_rows),
    "snapshot of the Space": ("space", load_snapshot),
}
DOWNLOADS = {
    "info, tree": ("GET", r"/api/\w+/user/"),
    "resolve": ("HEAD|GET", "/resolve/"),
    "CDN": ("GET", "/cdn/"),
}
WIRE = {
    "500": {"status": 500},
    "429, Retry-After 7": {"status": 429, "headers": {"Retry-After": "7"}},
    "dropped": {"action": "drop"},
    "truncated": {"action": "truncate", "after": 40},
    "reset": {"action": "cut", "after": 40},
}
# Requests that are not made, or have no body to be cut.
NEVER = {
    "one file of the adapter": {"info, tree": WIRE, "resolve": ("truncated", "reset")},
    "snapshot of the Space": {"CDN": WIRE},
}


@pytest.mark.parametrize("times", [1, FOR_EVER])
@pytest.mark.parametrize(
    ("loading", "endpoint", "what"),
    [
        (loading, endpoint, what)
        for loading in LOADING
        for endpoint in DOWNLOADS
        for what in WIRE
        if what not in NEVER.get(loading, {}).get(endpoint, ())
    ],
)
def test_what_is_loaded_is_whole(loading, endpoint, what, times, hub, clock, fault, row, request, tmp_path):
    name, load = LOADING[loading]
    publish = request.getfixturevalue(name)
    publish.push()
    method, path = DOWNLOADS[endpoint]
    shutil.rmtree(Path(os.environ["HF_HOME"]) / "hub", ignore_errors=True)  # load_dataset's downloads
    armed = hub.fail(method=method, path=path, times=times, **WIRE[what])
    with fault(f"{loading}, {endpoint}: {what}"):
        outcome = "loads"
        try:
            assert load(publish, tmp_path / "cache") == whole(publish, load)
        except (OSError, httpx2.HTTPError, RuntimeError, ValueError) as error:
            outcome = "stops; again: loads"
            assert "hf_user_write" not in str(error)
        assert armed.hits
        hub.faults.clear()
        close_session()
        hub.settle()  # the other downloads of a snapshot
        assert load(publish, tmp_path / "cache") == whole(publish, load)
    row(loading, endpoint, f"{what}, {'once' if times == 1 else 'for ever'}", outcome)


@every_publish
def test_a_private_repository_shows_nothing_without_a_token(publish, hub, fault, row, monkeypatch, tmp_path):
    publish.push()
    monkeypatch.delenv("HF_TOKEN")
    with fault("load a private repository without a token"):
        with pytest.raises(HfHubHTTPError, match="401"):
            load_snapshot(publish, tmp_path / "cache")
        assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.stat().st_size]
    row(publish, "load", "private, no token", "stops")


# ---- Xet -----------------------------------------------------------------------------------------------------
def test_over_xet_a_large_push_is_one_commit_too(tmp_path, fault, row):
    """huggingface_hub's own upload_folder makes two commits of this folder."""
    folder = tmp_path / "many"
    (folder / "data").mkdir(parents=True)
    for part in range(300):
        (folder / "data" / f"{part}.txt").write_text(str(part))
    (folder / "weights.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "README.md").write_text("---\nlanguage: ja\n---\n")
    code = (
        "from vlmcap.upload import push_folder\n"
        f"for _ in range(2): push_folder({str(folder)!r}, 'user/many', 'model', True, 'many', 'again')"
    )
    with Hub(tmp_path / "hub", xet=True).serve() as xet, fault("Xet: commit's answer lost, token endpoint 500 once"):
        xet.fail(method="POST", path="/commit/main", action="lost")
        xet.fail(path="/xet-write-token/", status=500)
        env = os.environ | {"HF_ENDPOINT": xet.endpoint, "HF_HUB_DISABLE_XET": "0"}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert xet.file("models", "user/many", "weights.safetensors") == bytes(range(256)) * 40
        assert len(xet.repos["models", "user/many"].commits) == 2
        assert any("xet-write-token" in entry["path"] for entry in xet.log)
    row("a model over Xet", "commit", "answer lost, 302 files", "completes, one commit")


# ---- the commands that the messages name -----------------------------------------------------------------------
@every_publish
def test_the_command_of_the_message_finishes(publish, hub, clock, fault, run_script):
    hub.fail(method="POST", path="/commit/main", status=403, times=FOR_EVER)
    with fault("commit: 403, then the command"):
        message = attempt(hub, publish)
        hub.faults.clear()
        run_script(*shlex.split(message.splitlines()[-1])[1:])
        assert on_hub(hub, publish) == publish.files()
        assert commits(hub, publish) == 1


@every_publish
def test_a_silent_hub_is_given_up(publish, hub, clock, fault, row, monkeypatch):
    """The commit that it is silent about comes through at last, after that of the next try."""

    def until_it_is_tried_again() -> None:
        while not any("/commit/main" in entry["path"] and "status" in entry for entry in list(hub.log)):
            time.sleep(0.01)

    monkeypatch.setattr(upload, "TIMEOUT", httpx2.Timeout(60, read=1))
    hub.fail(method="POST", path="/commit/main", action="pass", before=until_it_is_tried_again)
    with fault("commit: no answer for longer than the timeout"):
        assert attempt(hub, publish) is None and clock.slept
        hub.settle()
        assert commits(hub, publish) == 1
    row(publish, "commit", "silent for longer than the timeout", "completes")
