"""Push a Hub folder: one commit that brings all of it, or nothing.

The library's own `upload_folder` may split a long upload into several commits and never deletes what an earlier
publication left behind, and an old `model.safetensors` wins over new shards. Here the large files go ahead, which
nobody sees and which an interrupted push does not repeat; then one commit adds the new files and deletes the old ones,
provided that nobody else has committed meanwhile.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash

MAIN = "main"
NOTHING = "nothing was published"

# What an earlier publication may have left and loading would take: weights, code, adapters.
SUPERSEDED_FILES = re.compile(
    r"[^/]+\.(safetensors|bin|pt|pth|ckpt|msgpack|h5|gguf)|[^/]+\.(safetensors|bin)\.index\.json|[^/]+\.py|"
    r"adapter_config\.json"
)


class PushError(RuntimeError):
    """A push that did not happen, with the reason and the remedy."""

    exit_status = 2


@dataclass(frozen=True)
class Pushed:
    """What a push made.

    Attributes:
        repo_id (`str`): The repository.
        revision (`str`): The commit, or the pull request's `refs/pr/N`: what to pin in `from_pretrained`.
        url (`str`): Page of the commit or of the pull request.
        deleted (`tuple[str, ...]`): Files of earlier publications that the commit deleted.
    """

    repo_id: str
    revision: str
    url: str
    deleted: tuple[str, ...]


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    replaces: re.Pattern[str],
    private: bool = False,
    revision: str | None = None,
    branch: str | None = None,
    pull_request: bool = False,
    message: str = "Publish model",
    api: HfApi | None = None,
) -> Pushed:
    """Publish a folder on the Hub in one commit.

    Args:
        folder (`Path`): A whole and checked Hub folder.
        repo_id (`str`): `user/name`; created if it is not there and nothing but a push to `main` is asked for.
        replaces (`re.Pattern`): Names of files of an earlier publication: deleted where the folder lacks them, as
            weights, code and adapters always are. Others stay.
        private (`bool`): Create the repository private. One that is there and public is refused.
        revision (`str`, *optional*): A branch that is there, or `refs/pr/N` to add to an open pull request.
        branch (`str`, *optional*): A branch to commit to; made from `main` if it is not there.
        pull_request (`bool`): Open a pull request against `main` instead of committing to it.
        message (`str`): First line of the commit.
        api (`HfApi`, *optional*): The client; default: that of the environment (`HF_TOKEN`, `HF_ENDPOINT`).

    Returns:
        [`Pushed`]: The commit.

    Raises:
        ValueError: If the arguments contradict each other or the repository.
        PushError: If the Hub refuses or cannot be reached, with what to do. Nothing is published then: what was
            uploaded waits, unseen, for the next try.
    """
    check_target(repo_id, private=private, revision=revision, branch=branch, pull_request=pull_request)
    api = api or HfApi()
    with explained(repo_id, "asking who you are"):
        api.whoami()
    only_main = not (revision or branch or pull_request)
    head, found = _find_head(api, repo_id, private=private, revision=revision, branch=branch, create=only_main)
    with explained(repo_id, "listing its files"):
        remote = _remote_files(api, repo_id, head)
    local = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    deleted = tuple(name for name in remote if name not in local and _is_superseded(name, replaces))
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in local.items()]
    with explained(repo_id, "uploading"):
        api.preupload_lfs_files(
            repo_id, additions, revision=found or MAIN, create_pr=pull_request, free_memory=False, num_threads=4
        )
    target = found or branch or MAIN
    if found is None and branch is not None:
        with explained(repo_id, f"making the branch {branch}"):
            api.create_branch(repo_id, branch=branch, revision=head)
    pinned, url = _commit(api, repo_id, deleted, additions, head, target, pull_request, message, replaces)
    with explained(repo_id, "reading back what was published", outcome="it is published, but look at it"):
        check_same_files(additions, _remote_files(api, repo_id, pinned), replaces)
    return Pushed(repo_id, pinned, url, deleted)


def check_target(repo_id: str, *, private: bool, revision: str | None, branch: str | None, pull_request: bool) -> None:
    """Check what can be checked before anything is written.

    Raises:
        ValueError: If the name cannot be a repository's or the arguments contradict each other.
    """
    validate_repo_id(repo_id)
    if repo_id.count("/") != 1:
        raise ValueError(f"the repository is {repo_id!r}; expected user/name or organisation/name")
    given = [
        name
        for name, value in (("--revision", revision), ("--branch", branch), ("--pull-request", pull_request))
        if value
    ]
    if len(given) > 1:
        raise ValueError(
            f"{' and '.join(given)} were given, but a push has one target: --revision for a branch or pull request "
            "that is there, --branch for a new branch, --pull-request for a new pull request against main"
        )
    if private and given:
        raise ValueError(f"--private is for a new repository, {given[0]} for one that is there; leave one out")


def _commit(
    api: HfApi,
    repo_id: str,
    deleted: Sequence[str],
    additions: Sequence[CommitOperationAdd],
    head: str,
    target: str,
    pull_request: bool,
    message: str,
    replaces: re.Pattern[str],
) -> tuple[str, str]:
    """Commit, and return what to pin and where to look; an answer that got lost is looked for."""
    unknown = f"whether it arrived is not known: look at {repo_id} before you push again"
    try:
        with explained(repo_id, "committing", outcome=unknown if pull_request else NOTHING, refused=NOTHING):
            commit = api.create_commit(
                repo_id,
                [*(CommitOperationDelete(path_in_repo=name) for name in deleted), *additions],
                commit_message=message,
                revision=target,
                parent_commit=head,
                create_pr=pull_request,
            )
    except PushError as error:
        if pull_request or isinstance(error.__cause__, HfHubHTTPError):
            raise
        with explained(repo_id, "committing", outcome=unknown):
            landed: Any = api.repo_info(repo_id, revision=target)
        if landed.sha == head:
            raise
        check_same_files(additions, _remote_files(api, repo_id, landed.sha), replaces)
        return landed.sha, f"{api.endpoint}/{repo_id}/commit/{landed.sha}"
    if pull_request:
        assert commit.pr_revision is not None and commit.pr_url is not None
        return commit.pr_revision, commit.pr_url
    return commit.oid, commit.commit_url


def check_same_files(
    additions: Sequence[CommitOperationAdd], remote: Mapping[str, RepoFile], replaces: re.Pattern[str]
) -> None:
    """Compare what the Hub has with the folder, byte for byte by their checksums.

    Raises:
        PushError: If something of the folder is missing or differs, or an old file survived.
    """
    names = {addition.path_in_repo for addition in additions}
    for addition in additions:
        name, file = addition.path_in_repo, remote.get(addition.path_in_repo)
        if file is None:
            raise PushError(f"{name} is missing from the commit; push again")
        if file.lfs is not None:
            same = file.lfs.sha256 == addition.upload_info.sha256.hex()
        else:
            with addition.as_file() as stream:
                same = file.blob_id == git_hash(stream.read())
        if not same:
            raise PushError(f"{name} in the commit is not the one of the folder; push again")
    stale = [name for name in remote if name not in names and _is_superseded(name, replaces)]
    if stale:
        raise PushError(f"the commit still has {', '.join(stale)} of an earlier publication; delete it by hand")


def _is_superseded(name: str, replaces: re.Pattern[str]) -> bool:
    return bool(SUPERSEDED_FILES.fullmatch(name) or replaces.fullmatch(name))


def _find_head(
    api: HfApi, repo_id: str, *, private: bool, revision: str | None, branch: str | None, create: bool
) -> tuple[str, str | None]:
    """Commit that the push builds on, and the revision it goes to; `None` for a branch that is not there yet."""
    try:
        with explained(repo_id, "looking it up"):
            info: Any = api.repo_info(repo_id, revision=MAIN)
    except PushError as error:
        if not isinstance(error.__cause__, RepositoryNotFoundError):
            raise
        if not create:
            raise PushError(
                f"{repo_id} is not there (or your token may not see it), so it has no branch or pull request; publish "
                "to its main first, without --revision, --branch and --pull-request"
            ) from error
        with explained(repo_id, "creating it"):
            api.create_repo(repo_id, private=private)
            info = api.repo_info(repo_id, revision=MAIN)
    if private and not info.private:
        raise ValueError(
            f"{repo_id} is there and public, so --private cannot hold; make it private on the Hub or take another name"
        )
    target = revision or branch
    if target in (None, MAIN):
        return info.sha, MAIN
    try:
        with explained(repo_id, f"looking up {target}"):
            there: Any = api.repo_info(repo_id, revision=target)
            return there.sha, target
    except PushError as error:
        if not isinstance(error.__cause__, RevisionNotFoundError):
            raise
        if branch is None:
            raise PushError(
                f"{repo_id} has no revision {revision}; make a branch with --branch {revision}, or leave it out for "
                "main"
            ) from error
        return info.sha, None


def _remote_files(api: HfApi, repo_id: str, revision: str) -> dict[str, RepoFile]:
    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


@contextmanager
def explained(repo_id: str, step: str, outcome: str = NOTHING, refused: str = "") -> Iterator[None]:
    """Turn what the client raises into one line that says what to do.

    Args:
        repo_id (`str`): The repository.
        step (`str`): What is being done.
        outcome (`str`): What an error here means for what is on the Hub.
        refused (`str`): The same, of an error by which the Hub said no; default: `outcome`.

    Raises:
        PushError: In place of every error but those of this module.
    """
    try:
        yield
    except (PushError, AssertionError):
        raise
    except Exception as error:  # the client raises a dozen unrelated classes, those of its HTTP library included
        said_no = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        raise PushError(f"{_explain(error, repo_id, step)}; {(said_no and refused) or outcome}") from error


def _explain(error: BaseException, repo_id: str, step: str) -> str:
    """Say what went wrong and what to do.

    >>> _explain(LocalTokenNotFoundError(), "me/model", "uploading").partition(";")[0]
    'no token was found'
    """
    while error.__cause__ is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    response: Any = error.response if isinstance(error, HfHubHTTPError) else None
    status = None if response is None else response.status_code
    if isinstance(error, LocalTokenNotFoundError):
        return "no token was found; log in with `hf auth login` or set HF_TOKEN to a token that may write"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids the network; unset it to push"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} lacks the revision"
    if status == 401 and "whoami" in str(response.url):
        return "the Hub does not accept the token; log in with `hf auth login` or set HF_TOKEN to a valid one"
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} is not there, or your token may not see it; check the name"
    if status in (401, 403):
        return f"your token may not write to {repo_id}; take one with write access to it"
    if status in (409, 412):
        return f"{repo_id} has got another commit since this push began; look at it and push again"
    detail = str(error).strip().splitlines() or [type(error).__name__]
    return f"{step} failed for {repo_id} ({detail[0]}); rerun the same command to resume"
