"""What the hub keeps: repositories, commits, files by content, and Xet uploads turned back into plain files."""

import dataclasses
import datetime
import hashlib
import json
import re
import secrets
import shutil
import struct
from pathlib import Path

LFS_SUFFIXES = (
    ".safetensors .parquet .arrow .bin .pt .pth .h5 .onnx .model .zip .gz .tar .png .jpg .jpeg .webp .gif".split()
)


class HubError(Exception):
    """An error answer; the clients build their exceptions from X-Error-Code and X-Error-Message."""

    def __init__(self, status: int, code: str | None = None, message: str = "", headers=None, body=None):
        super().__init__(f"{status} {code or ''} {message}")
        self.status = status
        self.headers = dict(headers or {})
        if code:
            self.headers["X-Error-Code"] = code
        if message:
            self.headers["X-Error-Message"] = message
        self.body = body or {"error": message or f"error {status}"}


@dataclasses.dataclass
class File:
    size: int
    oid: str  # git blob sha1 (of the pointer, for LFS files)
    sha256: str  # key of the content in the blob store
    lfs: bool


@dataclasses.dataclass
class Commit:
    sha: str
    parent: str | None
    files: dict[str, File]  # by path: a full snapshot
    title: str
    message: str
    date: str


class Repo:
    def __init__(self, kind: str, id_: str, private: bool):
        self.kind = kind  # "models", "datasets" or "spaces"
        self.id = id_
        self.private = private
        self.created = now()
        self.branches: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.commits: dict[str, Commit] = {}
        self.lfs: set[str] = set()  # sha256 of what was uploaded to this repository
        self.requests: list[dict] = []  # pull requests, open ones; their branch is refs/pr/NUMBER

    def commit(self, branch: str, files: dict[str, File], title: str, message: str = "") -> Commit:
        parent = self.branches.get(branch)
        content = [parent, title, secrets.token_hex(4), sorted((path, file.oid) for path, file in files.items())]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, files, title, message, now())
        self.branches[branch] = sha
        return self.commits[sha]

    def at(self, rev: str = "main") -> Commit:
        """The commit a branch, tag, ref or sha names; HubError 404 RevisionNotFound."""
        rev = re.sub(r"^refs/(heads|tags)/", "", rev)
        sha = self.branches.get(rev) or self.tags.get(rev) or (rev if rev in self.commits else None)
        if not sha:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        return self.commits[sha]


class Blobs:
    """File contents by sha256, in a folder."""

    def __init__(self, root: Path, xet: bool):
        self.root = root
        self.xet = xet
        (root / "blobs").mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256

    def read(self, file: File) -> bytes:
        return self.path(file.sha256).read_bytes()

    def put(self, data: bytes) -> str:
        sha256 = hashlib.sha256(data).hexdigest()
        if not self.path(sha256).exists():
            self.path(sha256).write_bytes(data)
        return sha256

    def regular(self, data: bytes) -> File:
        return File(len(data), git_oid(data), self.put(data), False)

    def lfs(self, repo: Repo, sha256: str) -> File:
        if sha256 not in repo.lfs and self.xet and (self.path(sha256).exists() or self.import_xet(sha256)):
            repo.lfs.add(sha256)
        if sha256 not in repo.lfs:
            message = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
            raise HubError(400, None, message)
        size = self.path(sha256).stat().st_size
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return File(size, git_oid(pointer), sha256, True)

    def new_cas(self) -> str:
        return f"local://{self.root / 'cas' / secrets.token_hex(4)}"  # one per upload: hf_xet locks it

    def import_xet(self, sha256: str) -> bool:
        """Xet uploads go to a local:// CAS (hf_xet's own simulation): find the file there, keep its plain bytes."""
        import hf_xet

        for cas in (self.root / "cas").glob("*"):
            for shard in cas.glob("xet/xorbs/shards/*.mdb"):
                found = shard_files(shard.read_bytes()).get(sha256)
                if not found:
                    continue
                copy = self.root / "cas-copy" / secrets.token_hex(4)  # the uploading client may still lock the CAS
                shutil.copytree(cas, copy)
                with hf_xet.XetSession().new_file_download_group(endpoint=f"local://{copy}") as group:
                    group.start_download_file(hf_xet.XetFileInfo(*found), str(self.path(sha256)))
                shutil.rmtree(copy)
                return True
        return False


def shard_files(shard: bytes) -> dict[str, tuple[str, int]]:
    """sha256 -> (Xet hash, size) of the files in a Xet shard (48-byte records; hashes are 4 little-endian u64)."""

    def hash_at(offset: int) -> str:
        return "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", shard, offset))

    offset, files = 48, {}
    while shard[offset : offset + 32] != b"\xff" * 32:
        flags, segments = struct.unpack_from("<II", shard, offset + 32)
        size = sum(struct.unpack_from("<I", shard, offset + 48 * (i + 1) + 36)[0] for i in range(segments))
        has_verification, has_sha256 = flags >> 31 & 1, flags >> 30 & 1
        end = offset + 48 * (1 + segments + (segments if has_verification else 0))
        if has_sha256:
            files[hash_at(end)] = (hash_at(offset), size)
            end += 48
        offset = end
    return files


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
