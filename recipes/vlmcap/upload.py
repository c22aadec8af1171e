"""A folder to the Hub: all of it in one commit or none of it, and compared with what arrived.

`HfApi.upload_folder` is not used: with hf_xet installed it cuts what is large or takes longer than five minutes into
several commits (huggingface_hub 2.4, `_upload_pipeline.py`); between two of them users load a card without its data.
"""

import fnmatch
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import httpx2
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, get_session
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import DatasetInfo, ModelInfo, SpaceInfo
from huggingface_hub.utils import (
    DEFAULT_IGNORE_PATTERNS,
    filter_repo_objects,
    parse_ratelimit_headers,
    validate_repo_id,
)

from vlmcap.atomic_write import git_blob_id
from vlmcap.credentials import redact
from vlmcap.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")
RepoType = Literal["model", "dataset", "space"]
RepoInfo = DatasetInfo | ModelInfo | SpaceInfo

# How long a call that may still succeed is tried again, in seconds: longer than the window of the Hub's rate limits.
PATIENCE = 300
LONGEST_WAIT = 32  # between two tries, unless the Hub asks for more
# huggingface_hub's client waits for an answer without a time limit.
TIMEOUT = httpx2.Timeout(60, read=120)
# 409 and 412: another commit or creation was under way. The next try looks first at what has become of the repository.
PASSING = (408, 409, 412, 429, 500, 502, 503, 504)
BROKEN = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
# What a call of huggingface_hub raises: HfHubHTTPError (an httpx2.HTTPError), a bare httpx2 error without connection,
# OSError without token or in offline mode, RuntimeError from an LFS or Xet upload, ValueError from validation and from
# an answer that is not JSON.
FAILURES = (httpx2.HTTPError, OSError, RuntimeError, ValueError, yaml.YAMLError)
UNFINISHED = [".*.new", "*/.*.new"]  # what vlmcap.atomic_write leaves when it is killed


class PushError(UserError):
    """A push ended. The message says at which step, why, what is on the Hub now, and the command that finishes it."""


def push_folder(
    folder: str | Path,
    repo_id: str,
    repo_type: RepoType,
    private: bool,
    message: str,
    command: str,
    ignore: Sequence[str] = (),
    replace: str | None = None,
) -> tuple[str, str]:
    """Publishes a folder with its README.md in one commit on `main`; returns (URL of the repository, commit).

    The card is validated first; the repository is made when it does not exist. Files that the Hub has already are not
    sent, and when it has all of them nothing is committed. The commit is made on top of the one that was looked at, so
    that it cannot happen twice and overwrites nobody who committed meanwhile. What passes (server errors, rate limits,
    broken connections, expired upload addresses, conflicts) is tried again for PATIENCE seconds and as the Hub asks
    with Retry-After. At the end names, sizes and hashes of the commit are compared with the folder.

    Args:
        private: of a repository that is made; an existing one must be so already.
        message: the commit's.
        command: the one that finishes the push, for the error's message.
        ignore: patterns of files that stay here.
        replace: pattern of files on the Hub that are deleted in the same commit, unless the folder has them.

    Raises:
        PushError: the push ended before all of this was done; the folder is as it was.
    """
    folder = Path(folder)
    api = HfApi()
    repo = {"repo_id": repo_id, "repo_type": repo_type}
    files: list[CommitOperationAdd] = []
    before = None
    step = "reading the folder"
    try:
        files += _files(folder, [*ignore, *UNFINISHED, *DEFAULT_IGNORE_PATTERNS])
        card = RepoCard((folder / "README.md").read_text(encoding="utf-8"))
        step = "validating the card"
        patiently(lambda: card.validate(repo_type))
        step = "creating the repository"
        before = patiently(lambda: _look_or_create(api, repo, private))
        _check_visibility(before, private)
        step = "uploading the files"

        def commit() -> str:
            now = api.repo_info(**repo, files_metadata=True)
            changes = _changes(files, now, replace)
            if not changes:
                return now.sha
            if now.sha != before.sha:
                raise ValueError(f"somebody else committed to {repo_id} meanwhile ({now.sha[:12]})")
            return api.create_commit(**repo, operations=changes, commit_message=message, parent_commit=before.sha).oid

        revision = patiently(commit)
        step = "comparing what arrived"
        arrived = patiently(lambda: api.repo_info(**repo, revision=revision, files_metadata=True))
        if wrong := _changes(files, arrived, replace):
            names = ", ".join(change.path_in_repo for change in wrong)
            raise ValueError(f"commit {revision[:12]} does not hold what the folder does: {names}")
    except FAILURES as error:
        state = _state(api, repo, before, lambda now: _changes(files, now, replace))
        fix = (
            "Log in with a token that may write (`hf auth login`); then"
            if is_refused(error)
            else "Once that is fixed,"
        )
        raise PushError(
            f"pushing {folder} to {repo_id} failed while {step}: {reason(error)}.\n"
            f"{state} Nothing was lost here. {fix} this finishes it, and sends only what is missing:\n  {command}"
        ) from error
    return f"{api.endpoint}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}", revision


def check_push_rights(
    repo_id: str | None,
    option: str = "--hub_model_id",
    repo_type: RepoType = "model",
    private: bool = True,
    asked: str = "--push_to_hub",
) -> None:
    """Asks before hours of work whether `push_folder` may do what it will do then.

    Args:
        option: the one that names `repo_id`, for the error's message.
        asked: the one without which nothing is pushed.

    Raises:
        PushError: `repo_id` is not the name of a repository, the Hub's token may not write to its namespace, or the
            repository exists with another visibility.
    """
    if not repo_id:
        raise PushError(f"{asked} needs {option} USER/NAME")
    if "/" not in repo_id:
        raise PushError(f"{option} {repo_id}: give it as USER/NAME")
    api = HfApi()
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PushError(f"{option} {repo_id}: {str(error).splitlines()[0]}") from error
    try:
        account = patiently(api.whoami)
    except FAILURES as error:
        fix = "`hf auth login` logs in" if is_refused(error) else f"start again when it can, or without {asked}"
        raise PushError(f"{asked}: the Hub does not say who you are: {reason(error)}; {fix}") from error
    namespaces = [account["name"], *(org["name"] for org in account.get("orgs", []))]
    if repo_id.split("/")[0] not in namespaces:
        raise PushError(f"{option} {repo_id}: {account['name']} can push to {', '.join(namespaces)} only")
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PushError(f"{asked}: the token of {account['name']} may only read; log in with one that may write")
    try:
        there = patiently(lambda: api.repo_info(repo_id, repo_type=repo_type))
        # Recipes push privately and have no --public.
        _check_visibility(there, private, later=option == "--hub_model_id")
    except RepositoryNotFoundError:
        return  # the push will make it
    except FAILURES as error:
        raise PushError(f"{option} {repo_id}: {reason(error)}") from error


def patiently(call: Callable[[], T]) -> T:
    """What `call` returns; called again while it fails with what may pass, for PATIENCE seconds at most.

    huggingface_hub tries uploads and downloads again by itself (`http_backoff`), but neither commits nor requests for
    information. Raises what `call` raises.
    """
    start, wait = time.monotonic(), 1.0
    while True:
        get_session().timeout = TIMEOUT
        try:
            return call()
        except FAILURES as error:
            asked = _seconds_to_wait(error)
            if asked is None or time.monotonic() - start + max(wait, asked) > PATIENCE:
                raise
            seconds = max(wait, asked)
            logger.warning("The Hub: %s. Trying again in %.0f s.", reason(error), seconds)
        time.sleep(seconds)
        wait = min(2 * wait, LONGEST_WAIT)


def reason(error: Exception) -> str:
    """What went wrong, in one line. Without the query of an address: that of an upload is a signature."""
    cause = _cause(error)
    if isinstance(cause, HfHubHTTPError):
        response = cause.response
        said = cause.server_message or response.headers.get("X-Error-Message") or ""
        where = f"{response.request.method} {response.request.url.path}"
        text = f"{response.status_code} {response.reason_phrase}{': ' if said else ''}{said} ({where})"
        if asked := _asked_wait(response.headers):
            text += f", with the request to wait {asked:.0f} s"
    elif isinstance(cause, httpx2.TransportError):
        text = f"no connection to {cause.request.url.host} ({type(cause).__name__}: {cause})"
    elif isinstance(cause, json.JSONDecodeError):
        text = "the Hub's answer is not JSON"
    else:
        text = str(cause)
    return redact(" ".join(text.split()).rstrip("."))


def _cause(error: Exception) -> Exception:
    """The error of the connection or of the Hub's answer that caused what huggingface_hub raised; else `error`."""
    cause = error
    while cause and not isinstance(cause, (HfHubHTTPError, *BROKEN)):
        cause = cause.__cause__
    return cause or error


def _seconds_to_wait(error: Exception) -> float | None:
    """How long the Hub asks to wait (0: it does not say); None when another try cannot help."""
    cause = _cause(error)
    if isinstance(cause, HfHubHTTPError):
        passes = cause.response.status_code in PASSING or _has_expired(cause.response)
        return _asked_wait(cause.response.headers) if passes else None
    # A bare RuntimeError is hf_xet's.
    return 0.0 if isinstance(cause, (*BROKEN, json.JSONDecodeError)) or type(cause) is RuntimeError else None


def _asked_wait(headers: httpx2.Headers) -> float:
    limit = parse_ratelimit_headers(headers)
    if limit and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    asked = headers.get("Retry-After", "")
    return float(asked) if asked.isdigit() else 0.0


def _has_expired(response: httpx2.Response) -> bool:
    """Whether an upload's address, which is signed and short-lived, is good no longer; the next try gets another."""
    return response.request.method == "PUT" and response.status_code == 403


def is_refused(error: Exception) -> bool:
    """Whether the Hub does not know this login, or does not allow it what was asked."""
    cause = _cause(error)
    if isinstance(cause, HfHubHTTPError):
        return cause.response.status_code in (401, 403, 404) and not _has_expired(cause.response)
    return isinstance(cause, LocalTokenNotFoundError)


def _check_visibility(there: RepoInfo, private: bool, later: bool = False) -> None:
    """Raises ValueError where the repository has another visibility. `later`: --public is an option of push_adapter.py
    alone."""
    if there.private != private:
        is_now, asked = ("public", "private") if private else ("private", "public")
        option = "pass --public" if private else "leave out --public"
        if later:
            option = "push later with scripts/push_adapter.py --public"
        raise ValueError(
            f"the repository exists and is {is_now}, but {asked} was asked for. Change its visibility in its "
            f"settings on the Hub, or {option}"
        )


def _look_or_create(api: HfApi, repo: dict, private: bool) -> RepoInfo:
    try:
        return api.repo_info(**repo)
    except RepositoryNotFoundError:
        sdk = "gradio" if repo["repo_type"] == "space" else None
        api.create_repo(**repo, private=private, space_sdk=sdk, exist_ok=True)
        return api.repo_info(**repo)


def _files(folder: Path, ignore: Sequence[str]) -> list[CommitOperationAdd]:
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    kept = filter_repo_objects(paths, ignore_patterns=ignore)
    return [CommitOperationAdd(path_in_repo=path, path_or_fileobj=folder / path) for path in kept]


def _changes(
    files: list[CommitOperationAdd], there: RepoInfo, replace: str | None
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What a commit on top of `there` must do to hold the files."""
    siblings = {sibling.rfilename: sibling for sibling in there.siblings}
    names = {file.path_in_repo for file in files}
    stale = [name for name in siblings if replace and fnmatch.fnmatch(name, replace) and name not in names]
    changed = [file for file in files if not _is_same(file, siblings.get(file.path_in_repo))]
    return [*(CommitOperationDelete(path_in_repo=name) for name in stale), *changed]


def _is_same(file: CommitOperationAdd, sibling) -> bool:
    if sibling is None or sibling.size != file.upload_info.size:
        return False
    if sibling.lfs:
        return sibling.lfs.sha256 == file.upload_info.sha256.hex()
    with file.as_file() as content:
        return sibling.blob_id == git_blob_id(content.read())


def _state(api: HfApi, repo: dict, before: RepoInfo | None, changes: Callable[[RepoInfo], list]) -> str:
    """One sentence on what the Hub holds after a push that failed; `before`: how the repository was found, or None."""
    repo_id = repo["repo_id"]
    try:
        now = api.repo_info(**repo, files_metadata=True)
    except FAILURES as error:
        if before:
            return (
                f"The Hub cannot be asked what became of {repo_id}: it holds either every file of this push or, as "
                f"before at commit {before.sha[:12]}, none."
            )
        if isinstance(error, RepositoryNotFoundError):
            return f"The Hub has no {repo['repo_type']} repository {repo_id} that this login can see."
        return f"No file of this push is on the Hub (an empty repository {repo_id} may be)."
    if before is None or now.sha == before.sha:
        return f"{repo_id} on the Hub is as it was (commit {now.sha[:12]}): no file of this push is in it."
    if different := changes(now):
        names = ", ".join(change.path_in_repo for change in different)
        return f"{repo_id} on the Hub is at commit {now.sha[:12]}, which differs from the folder in {names}."
    return f"{repo_id} on the Hub holds every file of this push (commit {now.sha[:12]})."
