"""Publishing by reference: what was trained goes to the Hub, and the bases are fetched, checked, or refused."""

import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from modeling_memory import MemoryEncoderDecoderForCausalLM, MemoryProcessor
from tests.conftest import build_tiny_tokenizer, tiny_decoder_config, tiny_encoder_config
from tests.loopback_hub import LoopbackHub, Repository
from tests.memory_models import BLANK, CHUNK, COPY, SLOT, WINDOW, build_model, random_ids
from tests.processes import run_clean
from training import publish
from training.publishing.hub_folder import REPOSITORY

COMMIT = "0" * 39 + "1"
USER = """
import sys
sys.modules["modeling_memory"] = None
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/model", revision=sys.argv[1], trust_remote_code=True)
input_ids = torch.load(sys.argv[2])
torch.save((model(input_ids).logits, model.generate(input_ids, max_new_tokens=9, do_sample=False)), sys.argv[3])
"""


def changed(folder, place):
    """A copy of a model's folder, one of its weights changed."""
    shutil.copytree(folder, place)
    weights = load_file(place / "model.safetensors")
    weights["lm_head.weight"][3, 4] += 1e-3
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    return place


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """A pretrained decoder, which stops where its own generation settings say."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(tiny_decoder_config()).eval()
    model.generation_config.eos_token_id = 5
    model.generation_config.repetition_penalty = 1.2
    folder = tmp_path_factory.mktemp("bases") / "decoder"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(decoder):
    fields = {"chunk_length": CHUNK, "window_length": WINDOW, "memory_token_id": SLOT}
    fields |= {"copy_token_id": COPY, "blank_token_id": BLANK, "freeze_decoder": True}
    encoder = LlamaForCausalLM(tiny_encoder_config("llama"))
    model = MemoryEncoderDecoderForCausalLM.from_encoder_decoder_pretrained(encoder, decoder, **fields)
    with torch.no_grad():  # what a training leaves: another projector, and one changed matrix of the decoder
        model.projector.out.weight.add_(0.1 * torch.randn_like(model.projector.out.weight))
        model.decoder.model.layers[0].mlp.up_proj.weight.add_(0.01)
    return model


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    MemoryProcessor(build_tiny_tokenizer(), chunk_length=CHUNK, window_length=WINDOW).save_pretrained(folder)
    return folder


def arguments(checkpoint, target, decoder, commit=COMMIT):
    base = ["--by-reference", "--base", f"decoder=me/base@{commit}", "--base-folder", f"decoder={decoder}"]
    return [str(checkpoint), "--to", str(target), "--name", "me/model", "--licence", "mit", *base]


def answers(model):
    input_ids = random_ids(2, 29)
    with torch.no_grad():
        return model(input_ids).logits, model.generate(input_ids, max_new_tokens=9, do_sample=False)


def test_a_folder_by_reference_is_small_and_names_its_base(checkpoint, decoder, model, tmp_path, capsys, monkeypatch):
    # It is loaded in clean processes below, where the base is on a hub.
    monkeypatch.setattr(publish, "verify_hub_folder", lambda *_, **__: {"hub": {"loaded": ["AutoModel"]}})
    assert publish.main(arguments(checkpoint, tmp_path / "hub", decoder)) == 0
    assert "loads bit for bit" in capsys.readouterr().out
    trained = load_file(tmp_path / "hub" / "trained.safetensors")
    assert "decoder.model.layers.0.mlp.up_proj.weight" in trained and "projector.out.weight" in trained
    assert "decoder.lm_head.weight" not in trained and not list((tmp_path / "hub").glob("model*.safetensors*"))
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    (reference,) = config["references"].values()
    assert (reference["id"], reference["revision"]) == ("me/base", COMMIT)
    check_card_of_base(tmp_path / "hub", str(decoder))
    # What was published by reference is published again, by reference and by value, without naming the base.
    again = [str(tmp_path / "hub"), "--licence", "mit", "--base-folder", f"decoder={decoder}"]
    assert publish.main([*again, "--to", str(tmp_path / "again"), "--by-reference"]) == 0
    assert json.loads((tmp_path / "again" / "config.json").read_text())["references"] == config["references"]
    assert publish.main([*again, "--to", str(tmp_path / "value")]) == 0
    loaded = MemoryEncoderDecoderForCausalLM.from_pretrained(tmp_path / "value")
    for found, wanted in zip(answers(loaded), answers(model), strict=True):
        assert torch.equal(found, wanted)


def check_card_of_base(hub, place):
    """The card names the base by its commit, and nothing names the folder that it was read from."""
    card = ModelCard.load(hub / "README.md")
    assert card.data.base_model == ["me/base"] and card.data.license == "mit"
    assert f"- decoder: me/base at `{COMMIT}`" in card.text
    assert "`from_pretrained` fetches the rest, and refuses other weights than these:" in card.text
    for path in hub.rglob("*.*"):
        assert place.encode() not in path.read_bytes(), path


@pytest.fixture
def package(decoder, tmp_path, monkeypatch):
    """The decoder as an installed package brings it, version 1.2."""
    site = tmp_path / "site"
    shutil.copytree(decoder, site / "tiny_base")
    (site / "tiny_base" / "__init__.py").touch()
    info = site / "tiny_base-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.2\n")
    (info / "RECORD").write_text("tiny_base/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(site))
    return "package:tiny_base"


def test_a_base_in_a_package_is_referred_to_by_the_package(checkpoint, package, model, tmp_path, capsys, monkeypatch):
    """Named for a checkpoint by value, and taken from one that is saved by reference."""
    checked = []

    def load_as_a_user_does(folder, *_, bases, **__):  # a clean process would not see this test's packages
        checked.append(bases["decoder"])
        for found, wanted in zip(answers(publish.load_checkpoint(folder)[0].eval()), answers(model), strict=True):
            assert torch.equal(found, wanted)
        return {"hub": {"loaded": ["AutoModel"]}}

    monkeypatch.setattr(publish, "verify_hub_folder", load_as_a_user_does)
    named = ["--licence", "mit", "--by-reference"]
    assert publish.main([str(checkpoint), "--to", str(tmp_path / "hub"), *named, "--base", f"decoder={package}"]) == 0
    assert publish.main([str(tmp_path / "hub"), "--to", str(tmp_path / "again"), *named]) == 0
    for folder in (tmp_path / "hub", tmp_path / "again"):
        (reference,) = json.loads((folder / "config.json").read_text())["references"].values()
        assert (reference["id"], reference["revision"], reference["distribution"]) == (package, "1.2", "tiny-base")
        assert "decoder.lm_head.weight" not in load_file(folder / "trained.safetensors")
        card = (folder / "README.md").read_text()
        assert package in card and str(tmp_path) not in card
    assert [base.revision for base in checked] == ["1.2", "1.2"]
    publish.check_bases_on_hub({"decoder": checked[0]})  # nothing is asked of the Hub: no hub answers here
    given = [str(tmp_path / "hub"), "--to", str(tmp_path / "third"), *named]
    assert publish.main([*given, "--base-folder", "decoder=."]) == 2
    assert "package:tiny_base is read where it is" in capsys.readouterr().err
    (tmp_path / "site" / "tiny_base" / "config.json").unlink()
    assert publish.main([str(checkpoint), *given[1:], "--base", f"decoder={package}"]) == 2
    assert "no config.json, so it is no base to refer to by --base" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--base", "decoder=me/base"], "expected a commit of 40 hexadecimal digits"),
        (["--base", "middle=me/base"], "PART one of encoder, decoder"),
        (["--base-folder", "encoder=."], "what the encoder comes from is not known"),
        (["--base-folder", "decoder=nowhere"], "is no folder"),
    ],
)
def test_a_base_that_is_not_pinned_or_not_known_is_refused(checkpoint, decoder, tmp_path, capsys, change, message):
    assert publish.main([*arguments(checkpoint, tmp_path / "hub", decoder), *change]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "hub").exists()


def test_a_base_that_is_another_model_or_needs_code_is_refused(checkpoint, decoder, tmp_path, capsys):
    torch.manual_seed(7)
    other = LlamaForCausalLM(tiny_decoder_config())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1e-3)
    other.save_pretrained(tmp_path / "other")
    assert publish.main(arguments(checkpoint, tmp_path / "hub", tmp_path / "other")) == 2
    assert "is not its base" in capsys.readouterr().err
    build_model().save_pretrained(tmp_path / "ours")
    assert publish.main(arguments(checkpoint, tmp_path / "hub", tmp_path / "ours")) == 2
    assert "needs code of its own" in capsys.readouterr().err
    assert publish.main([str(checkpoint), "--to", str(tmp_path / "hub"), "--base", f"decoder=me/base@{COMMIT}"]) == 2
    assert "are for --by-reference" in capsys.readouterr().err
    assert publish.main([str(checkpoint), "--to", str(tmp_path / "hub"), "--by-reference"]) == 2
    assert "--base decoder=ID@REVISION" in capsys.readouterr().err
    assert not (tmp_path / "hub").exists()


def test_from_the_checkpoint_to_a_user_whose_base_is_on_the_hub_too(checkpoint, decoder, model, tmp_path):
    """Publish, load and run the card's snippet; then with a base that is another one now, each refused by name.

    Before the push, one clean process is given the base as a folder, the other finds it in the Hub's cache.
    """
    torch.save(random_ids(2, 29), tmp_path / "inputs.pt")
    with LoopbackHub() as hub:
        hub.repositories["me/base"] = Repository()
        files = {path.name: path.read_bytes() for path in decoder.iterdir()}
        files["README.md"] = b"---\nlicense: mit\n---\n# A base\n"
        commit = hub.commit("me/base", "main", files)
        hub.commit("me/base", "main", {"model.safetensors": b"a later commit, which nobody asked for"})
        environment = hub.environment(tmp_path / "home")

        command = ["-m", "training.publish", str(checkpoint), "--to", str(tmp_path / "hub"), "--push", "me/model"]
        command += ["--by-reference", "--base", f"decoder=me/base@{commit}"]
        done = run_clean(command, REPOSITORY, **environment)
        assert done.returncode == 0, done.stderr
        revision = hub.repositories["me/model"].refs["main"]
        assert "trained.safetensors" in hub.repositories["me/model"].files()

        card = hub.repositories["me/model"].files()["README.md"].decode()
        assert "Weights: mit, that of me/base." in card
        snippet = re.search(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
        places = [revision, str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt")]
        user = ["-P", "-c", USER + snippet[1], *places]
        done = run_clean(user, tmp_path, **hub.environment(tmp_path / "user"))
        assert (done.returncode, done.stdout.strip() != "") == (0, True), done.stderr
        for found, wanted in zip(torch.load(tmp_path / "outputs.pt"), answers(model), strict=True):
            assert torch.equal(found, wanted)

        # A folder that is no copy of what the Hub has at that commit is never pushed.
        other = changed(decoder, tmp_path / "other")
        done = run_clean([*command, "--base-folder", f"decoder={other}"], REPOSITORY, **environment)
        assert done.returncode == 2 and "is not the one in" in done.stderr, done.stderr
        assert hub.repositories["me/model"].refs["main"] == revision

        # A Hub that serves other weights under the same commit is refused by who loads.
        weights = (other / "model.safetensors").read_bytes()
        hub.repositories["me/base"].commits[commit] = {**files, "model.safetensors": weights}
        done = run_clean(user, tmp_path, **hub.environment(tmp_path / "late"))
        assert done.returncode and "The base of the decoder (me/base) has other weights" in done.stderr, done.stderr
