"""From a checkpoint to the Hub and back: the command itself, and the real client, in processes of their own."""

from pathlib import Path

import pytest
import torch

from modeling_memory import MemoryProcessor
from tests.conftest import build_tiny_tokenizer
from tests.loopback_hub import TOKEN, LoopbackHub
from tests.memory_models import CHUNK, WINDOW, build_model, random_ids
from tests.processes import run_clean
from training.publishing import hub_folder
from training.publishing.hub_folder import ALLOWED_FILES, REPOSITORY, write_hub_folder
from training.publishing.push import push_folder

# What a user runs: nothing of this repository, nothing of the package, only the name and the revision.
USER = """
import sys
sys.modules["modeling_memory"] = None
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor
name, revision, inputs, outputs = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(name, revision=revision, trust_remote_code=True)
body = AutoModel.from_pretrained(name, revision=revision, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.me.model."), type(model).__module__
assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in body.state_dict().items())
input_ids = torch.load(inputs)
torch.save((model(input_ids).logits, model.generate(input_ids, max_new_tokens=9, do_sample=False)), outputs)
print(processor.chunk_length)
"""


def processor():
    return MemoryProcessor(build_tiny_tokenizer(), chunk_length=CHUNK, window_length=WINDOW)


def changed(model, by):
    """The model with other weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return model


def load_as_a_user(hub: LoopbackHub, revision: str, work: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and text of what the Hub serves under a revision."""
    torch.save(random_ids(2, 29), work / "inputs.pt")
    files = [str(work / name) for name in ("inputs.pt", "outputs.pt")]
    done = run_clean(["-P", "-c", USER, "me/model", revision, *files], work, **hub.environment(work / "home"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(CHUNK)]
    return torch.load(work / "outputs.pt")


def expected(model):
    input_ids = random_ids(2, 29)
    with torch.no_grad():
        return model(input_ids).logits, model.generate(input_ids, max_new_tokens=9, do_sample=False)


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


def test_what_the_command_publishes_is_what_a_user_gets(hub, tmp_path):
    """The whole way, first with the command; then a second publication, other weights in other shards."""
    first = changed(build_model(), 0.1)
    checkpoint = tmp_path / "checkpoint"
    first.save_pretrained(checkpoint)
    processor().save_pretrained(checkpoint)
    arguments = ["-m", "training.publish", str(checkpoint), "--to", str(tmp_path / "hub"), "--push", "me/model"]
    arguments += ["--licence", "apache-2.0"]
    done = run_clean(arguments, REPOSITORY, **hub.environment(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["me/model"]
    revision = repository.refs["main"]
    assert f'from_pretrained("me/model", revision="{revision}", trust_remote_code=True)' in done.stdout
    assert "model.safetensors" in repository.files()
    for found, wanted in zip(load_as_a_user(hub, revision, tmp_path), expected(first), strict=True):
        assert torch.equal(found, wanted)

    second = changed(build_model(), 0.2)
    hub_folder.MAX_SHARD_SIZE, usual = "40KB", hub_folder.MAX_SHARD_SIZE
    try:
        folder = write_hub_folder(second, processor(), tmp_path / "hub")
    finally:
        hub_folder.MAX_SHARD_SIZE = usual
    pushed = push_in_process(hub, folder)
    assert "model.safetensors" not in repository.files()
    for name, model in (("main", second), (pushed.revision, second), (revision, first)):
        for found, wanted in zip(load_as_a_user(hub, name, tmp_path), expected(model), strict=True):
            assert torch.equal(found, wanted), name


# What a user of transformers runs, without this project's command; `tests` is on the path for the tiny model only.
LIBRARY_PUSH = """
import torch
from huggingface_hub import HfApi
from modeling_memory import MemoryEncoderDecoderForCausalLM
from tests.memory_models import build_model
model = build_model()
model.push_to_hub("me/model")
with torch.no_grad():
    model.decoder.lm_head.weight.add_(1)
try:
    model.push_to_hub("me/model", max_shard_size="40KB")
except ValueError as error:
    print(error)
print(HfApi().model_info("me/model").sha)
HfApi().delete_file("model.safetensors", "me/model")
model.push_to_hub("me/model", max_shard_size="40KB")
loaded = MemoryEncoderDecoderForCausalLM.from_pretrained("me/model")
print(torch.equal(loaded.decoder.lm_head.weight, model.decoder.lm_head.weight))
"""


def test_the_librarys_own_push_never_leaves_old_weights_beside_new_shards(hub, tmp_path):
    """`push_to_hub` deletes nothing, and an old single file wins over new shards: refused, nothing uploaded."""
    done = run_clean(
        ["-c", LIBRARY_PUSH], REPOSITORY, PYTHONPATH=str(REPOSITORY), **hub.environment(tmp_path / "home")
    )
    assert done.returncode == 0, done.stderr
    refusal, sha, same = done.stdout.strip().splitlines()
    assert "holds a model.safetensors of an earlier push" in refusal and "Nothing was uploaded" in refusal
    repository = hub.repositories["me/model"]
    assert not any("index" in name for name in repository.files(sha))
    assert same == "True" and "model.safetensors" not in repository.files()


def push_in_process(hub, folder):
    from unittest import mock

    from huggingface_hub import HfApi, constants

    with mock.patch.multiple(constants, HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True):
        return push_folder(folder, "me/model", replaces=ALLOWED_FILES, api=HfApi(endpoint=hub.url, token=TOKEN))


def test_a_folder_that_does_not_load_is_never_pushed(hub, tmp_path, monkeypatch, capsys):
    from training import publish
    from training.publishing.hub_folder import PublishError

    checkpoint = tmp_path / "checkpoint"
    build_model().save_pretrained(checkpoint)
    processor().save_pretrained(checkpoint)

    def fail(*_: object, **__: object) -> None:
        raise PublishError("logits differ")

    monkeypatch.setattr(publish, "verify_hub_folder", fail)
    for name, value in hub.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    arguments = [str(checkpoint), "--to", str(tmp_path / "hub"), "--push", "me/model", "--licence", "apache-2.0"]
    assert publish.main(arguments) == 2
    assert capsys.readouterr().err.strip().endswith("error: logits differ")
    assert not hub.log


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--push", "model"], "expected user/name"),
        (["--push", "me/model", "--branch", "a", "--pull-request"], "a push has one target"),
        (["--private"], "are for --push USER/NAME"),
    ],
)
def test_a_contradiction_is_named_before_anything_is_written(tmp_path, capsys, arguments, message):
    from training import publish

    assert publish.main([str(tmp_path), "--to", str(tmp_path / "hub"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "hub").exists()
