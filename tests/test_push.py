"""Pushing to the Hub: through the real client, against a server of our own, with everything that can go wrong."""

import hashlib
import re

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from tests.loopback_hub import READER, TOKEN, LoopbackHub
from training.publish import ALLOWED_FILES
from training.publishing.push import PushError, push_folder

NAME = "me/model"


@pytest.fixture
def hub(monkeypatch):
    """A Hub, and the client of this process allowed to reach it: without Xet, and without its pauses."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "hub", "one")


def write(folder, text, shards=2):
    folder.mkdir(exist_ok=True)
    (folder / "encoder_tokenizer").mkdir(exist_ok=True)
    for old in folder.glob("model*"):
        old.unlink()
    (folder / "README.md").write_text(f"---\nlicense: apache-2.0\n---\n# {text}\n")
    (folder / "config.json").write_text("{}")
    (folder / "encoder_tokenizer" / "vocab.json").write_text("{}")
    names = [f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)]
    for name in names if shards > 1 else ["model.safetensors"]:
        (folder / name).write_text(f"{name} {text}")
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(text)
    return folder


def push(hub, folder, name=NAME, token=TOKEN, **kwargs):
    return push_folder(folder, name, replaces=ALLOWED_FILES, api=HfApi(endpoint=hub.url, token=token), **kwargs)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def published(hub, revision="main"):
    files = hub.repositories[NAME].files(revision)
    return {name: data for name, data in files.items() if name != ".gitattributes"}


def test_a_push_is_one_commit_of_all_files(hub, folder):
    pushed = push(hub, folder, message="First")
    repository = hub.repositories[NAME]
    assert published(hub) == contents(folder)
    assert repository.messages == ["initial commit", "First"] and not repository.private
    assert repository.refs["main"] == pushed.revision and pushed.url.endswith(f"/commit/{pushed.revision}")


def test_a_second_publication_leaves_nothing_old_that_loading_would_take(hub, folder):
    """Shards beside an old single file would serve the old weights; code and pickles of old would run."""
    push(hub, write(folder, "one", shards=1))
    strangers = {"figures/loss.png": b"png", "pytorch_model.bin": b"pickle", "old_code.py": b"", "notes.md": b"mine"}
    hub.commit(NAME, "main", strangers)
    pushed = push(hub, write(folder, "two", shards=3))
    kept = {"figures/loss.png": b"png", "notes.md": b"mine"}
    assert published(hub) == contents(folder) | kept
    assert set(pushed.deleted) == {"model.safetensors", "pytorch_model.bin", "old_code.py"}
    push(hub, write(folder, "three", shards=1))
    assert published(hub) == contents(folder) | kept


def test_pushing_the_same_again_changes_nothing(hub, folder):
    first = push(hub, folder)
    uploads = [line for line in hub.log if line.startswith("PUT")]
    again = push(hub, folder)
    assert again.revision == first.revision and len(hub.repositories[NAME].messages) == 2
    assert [line for line in hub.log if line.startswith("PUT")] == uploads


def test_private_is_private_or_nothing(hub, folder):
    push(hub, folder, private=True)
    assert hub.repositories[NAME].private
    push(hub, folder, private=True)
    push(hub, folder, "me/open")
    before = dict(hub.repositories["me/open"].refs)
    with pytest.raises(ValueError, match="is there and public, so --private cannot hold"):
        push(hub, write(folder, "two"), "me/open", private=True)
    assert hub.repositories["me/open"].refs == before


def test_a_branch_is_made_from_main_and_main_is_left(hub, folder):
    push(hub, folder)
    main = published(hub)
    pushed = push(hub, write(folder, "two", shards=1), branch="try")
    assert published(hub) == main and published(hub, "try") == contents(folder)
    assert hub.repositories[NAME].refs["try"] == pushed.revision
    for again in ({"branch": "try"}, {"revision": "try"}):
        push(hub, write(folder, f"three {again}"), **again)
        assert published(hub, "try") == contents(folder) and published(hub) == main


def test_a_pull_request_is_opened_and_added_to(hub, folder):
    push(hub, folder)
    main = published(hub)
    pushed = push(hub, write(folder, "two", shards=1), pull_request=True)
    assert pushed.revision == "refs/pr/1" and pushed.url == f"{hub.url}/{NAME}/discussions/1"
    assert published(hub) == main and published(hub, "refs/pr/1") == contents(folder)
    push(hub, write(folder, "three"), revision="refs/pr/1")
    assert published(hub, "refs/pr/1") == contents(folder) and published(hub) == main


@pytest.mark.parametrize(
    ("token", "name", "arguments", "message"),
    [
        ("hf_wrong", NAME, {}, "does not accept the token; log in with `hf auth login`"),
        (READER, "me/other", {}, "your token may not write to me/other"),
        (READER, NAME, {}, "your token may not write to me/model"),
        (TOKEN, "them/model", {}, "your token may not write to them/model"),
        (TOKEN, "me/missing", {"pull_request": True}, "me/missing is not there .* publish to its main first"),
        (TOKEN, "me/missing", {"branch": "try"}, "me/missing is not there .* publish to its main first"),
        (TOKEN, NAME, {"revision": "nowhere"}, "has no revision nowhere; make a branch with --branch nowhere"),
    ],
)
def test_what_is_refused_says_why_and_changes_nothing(hub, folder, token, name, arguments, message):
    push(hub, folder)
    before = {key: dict(repository.refs) for key, repository in hub.repositories.items()}
    with pytest.raises(PushError, match=message) as caught:
        push(hub, write(folder, "two"), name, token, **arguments)
    assert "\n" not in str(caught.value)
    assert {key: repository.refs for key, repository in hub.repositories.items()} == before


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("model", {}, "expected user/name"),
        ("me/mo del", {}, "me/mo del"),
        (NAME, {"branch": "a", "pull_request": True}, "--branch and --pull-request were given"),
        (NAME, {"branch": "a", "private": True}, "--private is for a new repository"),
    ],
)
def test_contradictions_are_named_before_the_hub_is_asked(hub, folder, name, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        push(hub, folder, name, **arguments)
    assert not hub.log


def test_an_interrupted_upload_publishes_nothing_and_goes_on(hub, folder):
    push(hub, folder)
    before = published(hub)
    write(folder, "two", shards=4)
    unlucky = hashlib.sha256((folder / "model-00003-of-00004.safetensors").read_bytes()).hexdigest()
    hub.fail = {f"PUT /lfs/{unlucky}": (500, 1000)}
    with pytest.raises(PushError, match="uploading failed .* rerun the same command to resume; nothing was published"):
        push(hub, folder)
    assert published(hub) == before
    hub.fail, hub.log = {}, []
    push(hub, folder)
    assert published(hub) == contents(folder)
    assert [line for line in hub.log if line.startswith("PUT")] == [f"PUT /lfs/{unlucky}"]


def test_a_refused_commit_publishes_nothing(hub, folder):
    hub.fail = {"POST .*/commit/": (500, 1)}
    with pytest.raises(PushError, match="committing failed .* nothing was published"):
        push(hub, folder)
    assert not published(hub)
    hub.log = []
    push(hub, folder)
    assert published(hub) == contents(folder) and not [line for line in hub.log if line.startswith("PUT")]


def test_a_refused_pull_request_says_that_it_is_not_there(hub, folder):
    push(hub, folder)
    hub.fail = {"POST .*/commit/": (403, 1)}
    with pytest.raises(PushError, match="your token may not write to me/model; .*; nothing was published"):
        push(hub, write(folder, "two"), pull_request=True)


def test_a_commit_whose_answer_was_lost_is_found(hub, folder):
    hub.lose_answers = {"POST .*/commit/main": 1}
    pushed = push(hub, folder)
    assert published(hub) == contents(folder) and pushed.revision == hub.repositories[NAME].refs["main"]
    hub.lose_answers = {"POST .*/commit/main": 1}
    with pytest.raises(PushError, match="whether it arrived is not known: look at me/model before you push again"):
        push(hub, write(folder, "two"), pull_request=True)


def test_a_commit_of_somebody_else_is_not_overwritten(hub, folder):
    push(hub, folder)

    def interfere():
        hub.before_commit = None
        hub.commit(NAME, "main", {"config.json": b"theirs"})

    hub.before_commit = interfere
    with pytest.raises(PushError, match="has got another commit since this push began; look at it and push again"):
        push(hub, write(folder, "two"))
    assert published(hub)["config.json"] == b"theirs"
    push(hub, folder)
    assert published(hub) == contents(folder)


def test_a_missing_token_is_named(hub, folder, tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(PushError, match="no token was found; log in with `hf auth login` or set HF_TOKEN"):
        push(hub, folder, token=None)
    assert not hub.log


def test_a_hub_that_loses_a_file_is_noticed(hub, folder, monkeypatch):
    honest = hub.commit

    def lose(name, ref, changes, message=""):
        return honest(name, ref, {key: data for key, data in changes.items() if key != "config.json"}, message)

    monkeypatch.setattr(hub, "commit", lose)
    with pytest.raises(PushError, match="config.json is missing from the commit"):
        push(hub, folder)


def test_offline_and_unreachable_hubs_are_named(folder, monkeypatch):
    with pytest.raises(PushError, match="HF_HUB_OFFLINE forbids the network; unset it to push"):
        push_folder(folder, NAME, replaces=ALLOWED_FILES, api=HfApi(endpoint="http://127.0.0.1:9", token=TOKEN))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(PushError, match="asking who you are failed"):
        push_folder(folder, NAME, replaces=ALLOWED_FILES, api=HfApi(endpoint="http://127.0.0.1:9", token=TOKEN))
