"""Weights have the licence of what they were made from, however that is named; what nobody said is unknown."""

import json

import pytest
from huggingface_hub import ModelCard, constants
from transformers import LlamaForCausalLM

from modeling_memory import MemoryProcessor
from tests.conftest import build_tiny_tokenizer, tiny_decoder_config
from tests.memory_models import CHUNK, WINDOW, build_model
from tests.records import RECORD
from training import publish
from training.publishing.cards import CARDS, render_card
from training.publishing.hub_folder import write_hub_folder
from training.publishing.provenance import base_licence, licence_table, training_sources, weights_licence
from training.recipes.strict_yaml import parse_yaml


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture
def processor():
    return MemoryProcessor(build_tiny_tokenizer(), chunk_length=CHUNK, window_length=WINDOW)


def base_folder(folder, card=None, config=None):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    if card is not None:
        (folder / "README.md").write_text(f"---\n{card}\n---\n# A model\n")
    return str(folder)


@pytest.mark.parametrize(
    ("name", "licence"),
    [
        ("meta-llama/Llama-3.2-1B", "llama3.2"),
        ("somebody/llama-3.2-1b-tuned", "llama3.2"),
        ("meta-llama/Meta-Llama-3.1-8B", "llama3.1"),
        ("meta-llama/Meta-Llama-3-8B", "llama3"),
        ("meta-llama/Llama-2-7b-hf", "llama2"),
        ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "apache-2.0"),
        ("google/gemma-3-270m", "gemma"),
        ("HuggingFaceTB/SmolLM2-135M", "apache-2.0"),
        ("somebody/SmolLM2-135M-tuned", None),
        ("openai-community/gpt2", "mit"),
        ("package:not_installed/Llama_3.2_1B", "llama3.2"),
        ("package:not_installed/model", None),
        ("me/model", None),
    ],
)
def test_a_base_without_its_card_at_hand_is_known_by_its_name_or_not_at_all(name, licence):
    assert base_licence(name) == licence


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("license: llama3.2", "llama3.2"),
        ("license: [mit]", "mit"),
        ("license: other\nlicense_name: house", "house"),
        ("license: unknown", None),
        ("language: en", None),
        ("license: [", None),
    ],
)
def test_a_folder_says_it_in_its_own_card(tmp_path, card, licence):
    assert base_licence(base_folder(tmp_path / "base", card)) == licence


def test_a_folder_is_known_by_its_config_and_its_name_too(tmp_path):
    assert base_licence(base_folder(tmp_path / "a" / "Llama-3.2-1B")) == "llama3.2"
    named = {"model_type": "llama", "_name_or_path": "google/gemma-2-2b"}
    assert base_licence(base_folder(tmp_path / "b" / "model", config=named)) == "gemma"
    assert base_licence(base_folder(tmp_path / "c" / "model")) is None
    assert base_licence(base_folder(tmp_path / "d" / "Llama-3.2-1B", "license: mit")) == "mit", "its own card first"


def test_a_repository_in_the_cache_says_it_in_its_own_card(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--me--base" / "snapshots" / ("0" * 40)
    base_folder(snapshot, "license: cc-by-nc-4.0")
    (tmp_path / "models--me--base" / "refs").mkdir()
    (tmp_path / "models--me--base" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert base_licence("me/base") == "cc-by-nc-4.0"


def test_a_package_says_it_in_its_metadata():
    """Of a package that is always there, named as recipes name them."""
    assert base_licence("package:torch/nn") not in (None, "unknown")


def test_a_stage_of_a_run_has_the_licence_of_what_the_run_read(tmp_path):
    folder = tmp_path / "run" / "stages" / "decoder" / "model"
    base_folder(folder)
    assert base_licence(str(folder)) is None
    (tmp_path / "run" / "record.json").write_text(json.dumps(RECORD))
    assert base_licence(str(folder)) == "apache-2.0"
    foreign = {**RECORD, "recipe": {**RECORD["recipe"], "data": {"train": ["mine.txt"]}}}
    (tmp_path / "run" / "record.json").write_text(json.dumps(foreign))
    assert base_licence(str(folder)) is None


@pytest.mark.parametrize(
    ("bases", "texts", "licence"),
    [
        ({"a": "llama3.2"}, {"books": "cc0-1.0"}, "llama3.2"),
        ({"a": "mit"}, {"books": "cc0-1.0"}, "mit"),
        ({"a": "mit", "b": "apache-2.0"}, {}, "apache-2.0"),
        ({"a": "apache-2.0", "b": "gemma"}, {"books": "cc0-1.0"}, "gemma"),
        ({}, {"wikipedia": "cc-by-sa-3.0", "books": "cc0-1.0"}, "cc-by-sa-3.0"),
        ({}, {"tales": "public-domain"}, "apache-2.0"),
        ({"a": "gemma"}, {"wikipedia": "cc-by-sa-3.0"}, "unknown"),
        ({"a": "gemma", "b": None}, {}, "unknown"),
        ({}, {"mine": None}, "unknown"),
        ({}, {}, "unknown"),
    ],
)
def test_the_weights_have_the_licence_that_binds(bases, texts, licence):
    assert weights_licence(bases, texts).id == licence
    assert weights_licence(bases, texts, "mit").id == "mit"


def test_every_text_and_every_base_of_the_tables_has_a_licence_that_is_listed():
    table = licence_table()
    assert not set(table["free"]) & set(table["binding"])
    listed = {*table["free"], *table["binding"]}
    sources = parse_yaml((CARDS / "sources.yaml").read_text(), "sources.yaml")
    assert {source["license"] for source in sources.values()} <= listed
    assert {*table["bases"].values(), *table["datasets"].values()} <= listed


def test_a_card_names_the_licence_of_its_base_and_not_this_projects(model):
    recipe = {**RECORD["recipe"], "pretrained": {"llama": {"path": "meta-llama/Llama-3.2-1B"}}}
    recipe["stages"] = [{"name": "copy", "from": {"decoder": "llama"}}]
    for record, context in (
        (RECORD, {"base_models": ["meta-llama/Llama-3.2-1B"]}),
        ({**RECORD, "recipe": recipe}, {}),
    ):
        card = ModelCard(str(render_card(model, record, context)))
        assert card.data.license == "llama3.2" and card.data.base_model == ["meta-llama/Llama-3.2-1B"]
        assert "Weights: llama3.2, that of meta-llama/Llama-3.2-1B." in card.text
        assert "Code: Apache-2.0, see [LICENSE.code](LICENSE.code)." in card.text


def test_a_base_in_a_folder_is_named_without_its_place(model, tmp_path):
    folder = base_folder(tmp_path / "private" / "My-Model", "license: gemma")
    card = ModelCard(str(render_card(model, RECORD, {"base_models": [folder]})))
    assert card.data.license == "gemma" and card.data.base_model is None
    assert "Made from My-Model." in card.text and "private" not in str(card)


def test_text_without_a_source_has_neither_licence_nor_language(model):
    mine = {**RECORD, "recipe": {**RECORD["recipe"], "data": {"train": ["mon_corpus_francais.txt"]}}, "inputs": {}}
    card = ModelCard(str(render_card(model, mine)))
    assert card.data.license == "unknown" and card.data.language is None
    assert "Weights: unknown, since the licence of mon_corpus_francais.txt is not known" in card.text
    assert ModelCard(str(render_card(model))).data.language is None


def test_a_dataset_of_the_hub_has_the_licence_and_language_of_its_source():
    train = ["hub:roneneldan/TinyStories@abc", "hub:me/texts@abc"]
    known, unknown = training_sources({"recipe": {"data": {"train": train}}})
    assert (known["license"], known["language"]) == ("cdla-sharing-1.0", "en")
    assert "license" not in unknown and "language" not in unknown


def test_the_file_of_the_codes_licence_is_not_taken_for_that_of_foreign_weights(model, processor, tmp_path):
    folder = write_hub_folder(model, processor, tmp_path / "hub", RECORD)
    assert (folder / "LICENSE").exists() and not (folder / "LICENSE.code").exists()
    write_hub_folder(model, processor, folder, RECORD, {"licence": "gemma"})
    assert (folder / "LICENSE.code").exists() and not (folder / "LICENSE").exists()


@pytest.mark.parametrize("base", ["me/unknown", "folder"])
def test_publishing_what_stands_on_something_unknown_is_refused_until_it_is_said(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(publish, "verify_hub_folder", lambda *_, **__: {"hub": {"loaded": ["AutoModel"]}})
    LlamaForCausalLM(tiny_decoder_config()).save_pretrained(tmp_path / "model")
    name = base_folder(tmp_path / "base") if base == "folder" else base
    command = [str(tmp_path / "model"), "--to", str(tmp_path / "hub"), "--base-model", name]
    assert publish.main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the licence of the weights is not known") and "--licence ID" in error
    assert not (tmp_path / "hub").exists()
    assert publish.main([*command, "--licence", "gemma"]) == 0
    assert ModelCard.load(tmp_path / "hub" / "README.md").data.license == "gemma"


def test_a_push_without_any_record_is_refused_and_a_local_folder_says_unknown(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(publish, "verify_hub_folder", lambda *_, **__: {"hub": {"loaded": ["AutoModel"]}})
    LlamaForCausalLM(tiny_decoder_config()).save_pretrained(tmp_path / "model")
    command = [str(tmp_path / "model"), "--to", str(tmp_path / "hub")]
    assert publish.main([*command, "--push", "me/model"]) == 2
    assert "neither bases nor training text are recorded" in capsys.readouterr().err
    assert publish.main(command) == 0
    assert ModelCard.load(tmp_path / "hub" / "README.md").data.license == "unknown"
