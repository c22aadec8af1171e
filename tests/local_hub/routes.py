"""The Hub's routes that huggingface_hub, datasets, transformers and peft call, and the tests' control routes.

A route gets the request handler `h`, and as keywords the named groups of its pattern; `repo` arrives as the Repo. What
it returns is sent as JSON, unless it sent an answer itself.
"""

import base64
import fnmatch
import hashlib
import json
import re
import secrets
import time
import urllib.parse

import yaml

from .faults import Fault
from .store import File, HubError, Repo, now

ROUTES = []
KIND = r"(?P<kind>models|datasets|spaces)"
REPO = r"(?P<repo>[^/]+/[^/]+)"
PAGE = rf"/((?P<kind>datasets|spaces)/)?{REPO}"  # where a repository has its web page: models at the root


def route(methods: str, pattern: str, write: bool = False):
    def register(function):
        ROUTES.append((methods.split(), re.compile(pattern + "/?"), function, write))
        return function

    return register


def page_url(h, kind: str, repo_id: str) -> str:
    return f"{h.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"


# ---- account, repositories ---------------------------------------------------------------------------------
@route("GET", "/api/whoami-v2")
def whoami(h):
    user = h.user()
    if not user:
        raise HubError(401, None, "Invalid username or password.")
    token = {"displayName": "test", "role": user["role"]}
    return {
        "type": "user",
        "id": user["name"],
        "name": user["name"],
        "fullname": user["name"],
        "email": f"{user['name']}@example.org",
        "emailVerified": True,
        "isPro": False,
        "orgs": [],
        "auth": {"type": "access_token", "accessToken": token},
    }


@route("POST", "/api/repos/create")
def create(h):
    asked = h.json()
    kind = asked.get("type", "model") + "s"
    namespace = asked.get("organization") or (h.user() or {}).get("name", "")
    h.need_write(namespace)
    repo_id = f"{namespace}/{asked['name']}"
    url = page_url(h, kind, repo_id)
    with h.hub.lock:
        if (kind, repo_id) in h.hub.repos:  # the client reads "url" of a 409 too (exist_ok=True)
            message = f"You already created this {kind[:-1]} repo"
            raise HubError(409, None, message, body={"error": message, "url": url})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repo = h.hub.repos[kind, repo_id] = Repo(kind, repo_id, private)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in h.hub.lfs_suffixes)
        repo.commit("main", {".gitattributes": h.hub.blobs.regular(attributes.encode())}, "initial commit")
    return {"url": url, "name": repo_id, "id": repo_id}


@route("DELETE", "/api/repos/delete")
def delete(h):
    asked = h.json()
    namespace = asked.get("organization") or (h.user() or {}).get("name", "")
    h.need_write(namespace)
    key = (asked.get("type", "model") + "s", f"{namespace}/{asked['name']}")
    h.repo(*key)
    del h.hub.repos[key]
    return {}


@route("GET", f"/api/{KIND}/{REPO}(/revision/(?P<rev>[^/]+))?")
def info(h, repo, rev="main"):
    commit = repo.at(rev)
    card = {}
    if "README.md" in commit.files:
        card, _ = read_card(h.hub.blobs.read(commit.files["README.md"]).decode())
    answer = {
        "_id": hashlib.md5(repo.id.encode()).hexdigest()[:24],
        "id": repo.id,
        "author": repo.id.split("/")[0],
        "sha": commit.sha,
        "lastModified": commit.date,
        "createdAt": repo.created,
        "private": repo.private,
        "disabled": False,
        "gated": False,
        "downloads": 0,
        "likes": 0,
        "tags": card.get("tags") or [],
        "cardData": card,
        "siblings": [sibling(path, file, "blobs" in h.query) for path, file in sorted(commit.files.items())],
        "usedStorage": sum(file.size for file in commit.files.values()),
    }
    if repo.kind == "models":
        answer |= {key: card.get(key) for key in ("pipeline_tag", "library_name")} | {"modelId": repo.id}
    return answer


def sibling(path: str, file: File, blobs: bool) -> dict:
    answer = {"rfilename": path}
    if blobs:
        answer |= {"size": file.size, "blobId": file.oid}
    if blobs and file.lfs:
        answer["lfs"] = {"size": file.size, "sha256": file.sha256, "pointerSize": 130}
    return answer


@route("GET", f"/api/{KIND}/{REPO}/refs")
def refs(h, repo):
    def listed(table, folder):
        names = [name for name in table if not name.startswith("refs/pr/")]
        return [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": table[name]} for name in names]

    branches, tags = listed(repo.branches, "heads"), listed(repo.tags, "tags")
    return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}


@route("GET", f"/api/{KIND}/{REPO}/commits/(?P<rev>[^/]+)")
def commits(h, repo, rev):
    answer, commit = [], repo.at(rev)
    authors = [{"user": repo.id.split("/")[0]}]
    while commit:
        answer.append({"id": commit.sha, "title": commit.title, "message": commit.message, "date": commit.date})
        answer[-1]["authors"] = authors
        commit = repo.commits.get(commit.parent)
    return answer


@route("GET", f"/api/{KIND}/{REPO}/discussions")
def discussions(h, repo):
    asked = h.query.get("author", [None])[0]
    found = [request for request in reversed(repo.requests) if asked in (None, request["author"]["name"])]
    return {"discussions": found, "count": len(found), "start": 0}


@route("POST DELETE", f"/api/{KIND}/{REPO}/(?P<what>branch|tag)/(?P<name>[^/]+)", write=True)
def branch_or_tag(h, repo, what, name):
    table = repo.branches if what == "branch" else repo.tags
    if h.command == "DELETE":
        table.pop(name, None)
        return {}
    asked = h.json()
    name, at = (name, asked.get("startingPoint") or "main") if what == "branch" else (asked["tag"], name)
    if name in table:
        raise HubError(409, None, f"Reference already exists: {name}")
    table[name] = repo.at(at).sha
    return {}


# ---- reading -----------------------------------------------------------------------------------------------
def file_node(path: str, file: File) -> dict:
    node = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
    if file.lfs:
        node["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
    return node


def folder_node(path: str) -> dict:
    return {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}


def listing(files: dict[str, File], base: str, recursive: bool) -> list[dict]:
    prefix = base.strip("/") + "/" if base.strip("/") else ""
    answer, seen = [], set()
    for path, file in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            folder = prefix + "/".join(parts[:depth])
            if folder not in seen:
                seen.add(folder)
                answer.append(folder_node(folder))
        if recursive or len(parts) == 1:
            answer.append(file_node(path, file))
    return answer


@route("GET", f"/api/{KIND}/{REPO}/tree/(?P<rev>[^/]+)(/(?P<path>.+))?")
def tree(h, repo, rev, path=""):
    answer = listing(repo.at(rev).files, path, h.query.get("recursive", ["false"])[0].lower() in ("true", "1"))
    if path and not answer:
        raise HubError(404, "EntryNotFound", f"{path} does not exist on {rev}")
    return answer  # one page: no Link header


@route("POST", f"/api/{KIND}/{REPO}/paths-info/(?P<rev>[^/]+)")
def paths_info(h, repo, rev):
    if "json" in h.headers.get("Content-Type", ""):
        paths = h.json()["paths"]
    else:
        paths = urllib.parse.parse_qs(h.body.decode()).get("paths", [])
    files, answer = repo.at(rev).files, []
    for path in (path.strip("/") for path in paths):
        if path in files:
            answer.append(file_node(path, files[path]))
        elif any(name.startswith(path + "/") for name in files):
            answer.append(folder_node(path))
    return answer


@route("GET HEAD", f"{PAGE}/(resolve|raw)/(?P<rev>[^/]+)/(?P<path>.+)")
def resolve(h, repo, rev, path):
    commit = repo.at(rev)
    if path not in commit.files:
        raise HubError(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit.sha})
    file = commit.files[path]
    headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes", "ETag": f'"{file.oid}"'}
    if not file.lfs:
        return h.send_range(h.hub.blobs.read(file), headers)
    headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
    headers["Location"] = f"{h.hub.cdn}/cdn/{file.sha256}?Signature={secrets.token_hex(4)}"
    h.send(302, b"", headers)


@route("GET HEAD", "/cdn/(?P<sha256>[0-9a-f]{64})")
def cdn(h, sha256):
    h.send_range(h.hub.blobs.path(sha256).read_bytes(), {"ETag": f'"{sha256[:32]}"', "Accept-Ranges": "bytes"})


# ---- writing -----------------------------------------------------------------------------------------------
def read_card(text: str) -> tuple[dict, str | None]:
    """Metadata of a README and the YAML error, if any."""
    header = re.match(r"---\r?\n(.*?)\r?\n---", text, re.S)
    if not header:
        return {}, None
    try:
        return yaml.safe_load(header[1]) or {}, None
    except yaml.YAMLError as error:
        return {}, str(error)


@route("POST", "/api/validate-yaml")
def validate_yaml(h):
    metadata, error = read_card(h.json()["content"])
    errors = [error] if error else []
    if not isinstance(metadata, dict):
        metadata, errors = {}, ["metadata must be a mapping"]
    for key in ("base_model", "datasets"):
        values = metadata.get(key) or []
        for value in values if isinstance(values, list) else [values]:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(value)):
                errors.append(f'"{key}" with value "{value}" is not valid. Use a model id from https://hf.co/models.')
    if errors:
        raise HubError(400, body={"errors": [{"message": message} for message in errors], "warnings": []})
    warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    return {"errors": [], "warnings": warnings}


@route("POST", f"/api/{KIND}/{REPO}/preupload/(?P<rev>[^/]+)", write=True)
def preupload(h, repo, rev):
    files, answer = repo.at(rev).files, []
    ignored = h.hub.blobs.read(files[".gitignore"]).decode().split() if ".gitignore" in files else []
    for asked in h.json()["files"]:
        path = asked["path"]
        lfs = asked["size"] >= h.hub.lfs_bytes or path.endswith(h.hub.lfs_suffixes)
        skip = any(fnmatch.fnmatch(path, pattern) for pattern in ignored)
        answer.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": skip})
        old = files.get(path)
        if old and old.lfs == lfs:
            answer[-1]["oid"] = old.sha256 if lfs else old.oid
    return {"files": answer}


@route("POST", rf"{PAGE}\.git/info/lfs/objects/batch", write=True)
def lfs_batch(h, repo):
    objects = []
    for asked in h.json()["objects"]:
        oid, size = asked["oid"], asked["size"]
        objects.append({"oid": oid, "size": size})
        if oid in repo.lfs:  # per repository, as on the Hub: the same file in another repository is uploaded again
            continue
        key = secrets.token_hex(8)  # the "signature": the PUT carries no token
        h.hub.uploads[key] = {"repo": repo, "oid": oid, "parts": {}}
        href, header = f"{h.hub.cdn}/lfs-upload/{key}", {}
        if h.hub.part_bytes and size > h.hub.part_bytes:
            parts = -(-size // h.hub.part_bytes)
            header = {str(part): f"{href}/part/{part}" for part in range(1, parts + 1)}
            header["chunk_size"] = str(h.hub.part_bytes)
            href = f"{h.hub.endpoint}/lfs-complete/{key}"
        verify = f"{page_url(h, repo.kind, repo.id)}.git/info/lfs/verify"
        objects[-1]["actions"] = {"upload": {"href": href, "header": header}, "verify": {"href": verify}}
    return {"transfer": "basic", "objects": objects}


@route("PUT", "/lfs-upload/(?P<key>[0-9a-f]+)(/part/(?P<part>[0-9]+))?")
def lfs_put(h, key, part=None):
    upload = h.hub.uploads.get(key)
    if not upload:
        raise HubError(403, None, "Request has expired")
    if part:
        upload["parts"][int(part)] = h.body
    else:
        keep_upload(h, upload, h.body)
    h.send(200, b"", {"ETag": f'"{hashlib.md5(h.body).hexdigest()}"'})


@route("POST", "/lfs-complete/(?P<key>[0-9a-f]+)")
def lfs_complete(h, key):
    upload = h.hub.uploads[key]
    keep_upload(h, upload, b"".join(upload["parts"][part["partNumber"]] for part in h.json()["parts"]))
    return {"success": True}


def keep_upload(h, upload: dict, data: bytes) -> None:
    if hashlib.sha256(data).hexdigest() != upload["oid"]:
        raise HubError(400, None, "BadDigest")
    upload["repo"].lfs.add(h.hub.blobs.put(data))


@route("POST", rf"{PAGE}\.git/info/lfs/verify", write=True)
def lfs_verify(h, repo):
    asked = h.json()
    if asked["oid"] not in repo.lfs or h.hub.blobs.path(asked["oid"]).stat().st_size != asked["size"]:
        raise HubError(404, None, "LFS object not found")
    return {}


@route("GET", f"/api/{KIND}/{REPO}/xet-(?P<operation>write|read)-token/(?P<rev>[^/]+)", write=True)
def xet_token(h, repo, operation, rev):
    if not h.hub.blobs.xet:
        raise HubError(404, None, "no Xet here: set HF_HUB_DISABLE_XET=1")
    return {"casUrl": h.hub.blobs.new_cas(), "exp": int(time.time()) + 3600, "accessToken": "xet"}


@route("POST", f"/api/{KIND}/{REPO}/commit/(?P<rev>[^/]+)", write=True)
def commit(h, repo, rev):
    operations = [json.loads(line) for line in h.body.decode().splitlines() if line.strip()]
    header = next(operation["value"] for operation in operations if operation["key"] == "header")
    with h.hub.lock:
        parent = repo.at(rev)
        if rev not in repo.branches:
            raise HubError(404, "RevisionNotFound", f"not a branch: {rev}")
        if "create_pr" in h.query:
            rev = open_pull_request(h, repo, parent, header["summary"])
        if header.get("parentCommit") and not parent.sha.startswith(header["parentCommit"]):
            raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for operation in operations:
            apply(h, repo, files, operation["key"], operation["value"])
        new = repo.commit(rev, files, header["summary"], header.get("description", ""))
    page = page_url(h, repo.kind, repo.id)
    answer = {"success": True, "commitOid": new.sha, "commitUrl": f"{page}/commit/{new.sha}"}
    if "create_pr" in h.query:
        answer["pullRequestUrl"] = f"{page}/discussions/{len(repo.requests)}"
    return answer


def open_pull_request(h, repo, parent, title: str) -> str:
    """Begins a pull request; returns its ref."""
    rev = f"refs/pr/{len(repo.requests) + 1}"
    repo.branches[rev] = parent.sha
    request = {"num": len(repo.requests) + 1, "title": title, "author": {"name": h.user()["name"]}, "status": "open"}
    request |= {"isPullRequest": True, "createdAt": now(), "repo": {"name": repo.id, "type": repo.kind[:-1]}}
    repo.requests.append(request)
    return rev


def apply(h, repo, files: dict[str, File], key: str, value: dict) -> None:
    """One operation of a commit, on the snapshot `files`."""
    if key == "file":
        files[value["path"]] = h.hub.blobs.regular(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        files[value["path"]] = h.hub.blobs.lfs(repo, value["oid"])
    elif key == "deletedFile":
        if value["path"] not in files:
            raise HubError(404, "EntryNotFound", "A file with this name doesn't exist")
        del files[value["path"]]
    elif key == "deletedFolder":
        for path in [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]:
            del files[path]


# ---- control -----------------------------------------------------------------------------------------------
@route("POST", "/__faults__")
def set_faults(h):
    h.hub.faults[:] = [Fault(**spec) for spec in h.json()]
    return {}


@route("GET", "/__log__")
def get_log(h):
    return [entry for entry in h.hub.log if not entry["path"].startswith("/__")]


@route("POST", "/__reset__")
def reset(h):
    with h.hub.lock:
        repos = {} if "repos" in h.query else dict(h.hub.repos)
        h.hub.reset()
        h.hub.repos.update(repos)
    return {}
