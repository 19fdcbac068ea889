"""What earlier releases saved still loads, and answers as it did: on every supported torch and transformers."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import modeling_memory
from modeling_memory import MemoryProcessor
from tests.save_fixtures import SAVED, ask

FOLDERS = sorted(folder for folder in SAVED.glob("*/*") if folder.is_dir())
# Torch versions and machines sum in different orders: float32 logits of models this small differ in their last digits.
TOLERANCE = 2e-5


def load(folder, **arguments):
    kind = AutoModel if folder.name == "autoencoder" else AutoModelForCausalLM
    return kind.from_pretrained(folder, **arguments)


def test_every_kind_of_model_of_this_version_is_saved():
    """A release that forgets its fixtures fails here: run `python -m tests.save_fixtures` before you release."""
    names = {folder.name for folder in FOLDERS if folder.parent.name == modeling_memory.__version__}
    assert names == {"memory", "two_tokenizers", "autoencoder", "mixer"}
    assert sum(path.stat().st_size for path in SAVED.rglob("*") if path.is_file()) < 1_000_000


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_a_saved_model_answers_as_it_did(folder):
    model, report = load(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    path = folder / "processor_config.json"
    kind = MemoryProcessor if path.exists() else AutoTokenizer
    answers, expected = (
        ask(folder.name, model, kind.from_pretrained(folder)),
        load_file(folder / "expected.safetensors"),
    )
    assert answers.keys() == expected.keys()
    for name, tensor in expected.items():
        assert answers[name].dtype == tensor.dtype and answers[name].shape == tensor.shape, name
        if name == "slots":  # what stands in columns of padding means nothing, and torch versions differ in it
            mask = expected["processor.attention_mask"][..., None]
            answers[name], tensor = answers[name] * mask, tensor * mask
        if tensor.is_floating_point():
            torch.testing.assert_close(
                answers[name], tensor, rtol=0, atol=TOLERANCE, msg=lambda text, n=name: f"{n}: {text}"
            )
        else:
            assert torch.equal(answers[name], tensor), name


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_parameter_names_and_shapes_are_pinned(folder):
    """A model built anew from a saved config has the saved names and shapes: a renamed parameter fails here."""
    config = AutoConfig.from_pretrained(folder)
    kind = AutoModel if folder.name == "autoencoder" else AutoModelForCausalLM
    model = kind.from_config(config)
    states = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)
    if "decoder.lm_head.weight" in states and "decoder.embed_out.weight" in saved:
        # From some release on the library renames GPT-NeoX's head on saving and back on loading.
        states["decoder.embed_out.weight"] = states.pop("decoder.lm_head.weight")
    assert states.keys() - saved.keys() == set(model.all_tied_weights_keys)
    assert {name: states[name] for name in saved} == saved


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_fields_of_a_saved_config_keep_their_meaning(folder):
    saved = json.loads((folder / "config.json").read_text())
    loaded = AutoConfig.from_pretrained(folder).to_dict()
    foreign = {"auto_map", "transformers_version", "architectures", "dtype", "encoder", "decoder"}
    assert {name: loaded.get(name) for name in saved.keys() - foreign} == {
        name: saved[name] for name in saved.keys() - foreign
    }
