"""The paper-scale recipe fits together: each stage takes a step, small here and, marked slow, at its own sizes."""

import pytest

from training import run
from training.recipes.recipe import load_recipe
from training.records.record import read_json

CORPORA = "training/corpora"


def one_step(folder: str) -> list[str]:
    """Overrides that leave the models as they are and take one step on little text."""
    overrides = [
        f"output_dir={folder}",
        "use_cpu=true",
        "threads=1",
        f"data.train=[{CORPORA}/books/validation.parquet]",
        f"data.validation=[{CORPORA}/wikinews/validation.parquet]",
        f"data.test=[{CORPORA}/wikinews/test.parquet]",
        "data.max_train_tokens=40000",
        "tokenizer.max_train_bytes=400000",
        "evaluation.num_rows=2",
        "evaluation.num_generated_rows=1",
        "publish.verify=false",
    ]
    for stage in load_recipe("paper_scale").stages:
        key = f"stages.{stage.name}.training"
        overrides += [f"{key}.max_steps=1", f"{key}.batch_size=2", f"{key}.eval_rows=2", f"{key}.compile=false"]
    return overrides


def small() -> list[str]:
    """Overrides that narrow the models; lengths stay."""
    parts = {"autoencoder.model.encoder": 32, "autoencoder.model.decoder": 32, "decoder.model": 32}
    overrides = [f"stages.{part}.hidden_size={width}" for part, width in parts.items()]
    overrides += [f"stages.{part}.num_hidden_layers=2" for part in parts]
    return [*overrides, "stages.decoder.model.intermediate_size=64", "tokenizer.vocab_size=400"]


def test_it_is_the_papers_scale():
    recipe = load_recipe("paper_scale")
    model = recipe.stage("autoencoder").model
    assert model["chunk_length"] == 256 and recipe.tokenizer.vocab_size == 8000
    assert {model[part]["hidden_size"] for part in ("encoder", "decoder")} == {512}
    assert [stage.name for stage in recipe.stages[2:4]] == ["blank_copy", "combined"]
    assert all(stage.training.save_steps for stage in recipe.stages), "a killed stage has to go on"


@pytest.mark.parametrize("sizes", [small(), pytest.param([], marks=pytest.mark.slow)], ids=["small", "own"])
def test_every_stage_takes_a_step(sizes, tmp_path):
    assert run.main(["paper_scale", *one_step(str(tmp_path / "run")), *sizes]) == 0
    record = read_json(tmp_path / "run" / "record.json")
    assert record is not None and list(record["stages"]) == [
        "autoencoder", "decoder", "blank_copy", "combined", "no_memory", "full_context",
    ]  # fmt: skip
    assert all(stage["steps"] == 1 for stage in record["stages"].values())
    assert record["metrics"]["copy"]["memory"]["num_tokens"] == 2 * 512
