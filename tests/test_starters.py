"""The starters: their recipes fit together, and the folders that ship load, remember, and say what they measured."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from benchmarks.snippet import find_snippet, run_snippet
from modeling_memory import MemoryAutoencoder
from training import run
from training.places import REPOSITORY
from training.publishing.cards import check_card, render_card
from training.publishing.hub_folder import check_complete, check_files, load_checkpoint, load_processor
from training.recipes.recipe import load_recipe
from training.records.record import read_json

RECIPES = sorted(path.stem for path in (REPOSITORY / "configuration" / "recipes").glob("starter_*.yaml"))
CARDS = REPOSITORY / "model_cards"
FOLDERS = sorted(path.name for path in CARDS.iterdir() if path.is_dir())
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
        "threads=1",
    ]
    for stage in recipe.stages:
        key = f"stages.{stage.name}.training"
        overrides += [f"{key}.max_steps=1", f"{key}.batch_size=8", f"{key}.eval_rows=2", f"{key}.warmup=0.0"]
    return overrides


def folder_named(name: str) -> Path:
    """A starter's folder."""
    return CARDS / name


def test_there_is_a_starter_of_every_kind():
    assert RECIPES == ["starter_autoencoder_64", "starter_memory", "starter_tiny"]
    assert FOLDERS == [
        "starter-autoencoder-32",
        "starter-autoencoder-64",
        "starter-decoder",
        "starter-memory",
        "starter-tiny",
    ]
    assert sum(path.stat().st_size for path in CARDS.rglob("*") if path.is_file()) <= BYTES_IN_ALL


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
    assert "| books, editions of Standard Ebooks |" in card.text


@pytest.mark.parametrize("name", FOLDERS)
def test_a_starters_card_is_made_from_its_record(name):
    """Every number of the page is the record's: a card made again from the record and the weights is the same page."""
    folder = folder_named(name)
    check_complete(folder)
    check_files(folder)
    card = ModelCard.load(folder / "README.md")
    check_card(card)
    record = read_json(folder / "record.json")
    assert record is not None and record["domains"], "a starter's card tells its limits from measurements"
    assert not record["code"]["dirty"] and record["run"]["status"] == "success"
    model, processor = load_checkpoint(folder)
    context = {"model_name": name}
    if getattr(model.config, "copy_token_id", None) is not None and processor is not None:
        context["copy_token"] = processor.tokenizer.convert_ids_to_tokens(model.config.copy_token_id)
    assert str(render_card(model, record, context)).strip() == (folder / "README.md").read_text().strip()


@pytest.mark.parametrize("name", FOLDERS)
def test_a_starters_snippet_runs_where_the_package_is_not_installed(name, tmp_path):
    (tmp_path / name).symlink_to(folder_named(name))
    snippet = re.search(r"^```python\n(.*?)^```$", (folder_named(name) / "README.md").read_text(), re.M | re.S)
    assert snippet is not None
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    hidden = "import sys; sys.modules['modeling_memory'] = None\n"
    done = subprocess.run(
        [sys.executable, "-P", "-c", hidden + snippet[1]],
        cwd=tmp_path,
        env={**environment, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    if name.startswith(("starter-tiny", "starter-autoencoder")):
        assert "remembered" in done.stdout


@pytest.mark.parametrize("name", ["starter-autoencoder-32", "starter-autoencoder-64"])
def test_an_autoencoder_reaches_what_its_card_says(name):
    """On a small part of the test split: within five points of the whole split's accuracy."""
    folder = folder_named(name)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    tokenizer = load_processor(folder)
    from training.data.texts import load_texts

    text = "\n".join(load_texts([SMALL / "books" / "test.parquet"])[:2])
    tokens = torch.tensor(tokenizer(text).input_ids)
    length = model.config.chunk_length
    chunks = tokens[: 32 * length].view(32, length)
    accuracy = (model.reconstruct(chunks) == chunks).double().mean().item()
    assert type(model).__name__ == MemoryAutoencoder.__name__
    stated = json.loads((folder / "record.json").read_text())["domains"]["books"]["metrics"]
    assert abs(accuracy - next(iter(stated.values()))["memory"]["token_accuracy"]) < 0.05


def test_the_readmes_first_lines_print_what_the_page_says():
    code = find_snippet((REPOSITORY / "README.md").read_text(encoding="utf-8"), "use")
    record = read_json(REPOSITORY / "benchmarks" / "results" / "use.json")
    assert record is not None and code == record["snippet"], "run python -m benchmarks.snippet use"
    assert run_snippet(code, REPOSITORY) == record["output"]


def test_the_memory_starter_copies_a_text_that_it_has_not_seen():
    folder = folder_named("starter-memory")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    from training.data.texts import load_texts

    text = load_texts([SMALL / "books" / "test.parquet"])[1]
    tokens = processor.tokenizer(text).input_ids
    for length in (3 * model.config.chunk_length, 8 * model.config.chunk_length + 5):
        inputs = processor(text="<copy>", context=processor.tokenizer.decode(tokens[:length]), return_tensors="pt")
        written = model.generate(**inputs, max_new_tokens=2 * length, do_sample=False)[0]
        written = written[inputs["input_ids"].shape[1] :].tolist()
        right = sum(one == other for one, other in zip(written, tokens[:length], strict=False)) / length
        assert right > 0.95


def test_the_decoder_starter_writes_on():
    folder = folder_named("starter-decoder")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("It was a dark and", return_tensors="pt").input_ids
    assert model.generate(prompt, max_new_tokens=8, do_sample=False).shape[1] > prompt.shape[1]
