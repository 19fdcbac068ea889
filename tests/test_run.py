"""A recipe runs from text to a Hub folder; killed anywhere it resumes to the same weights; a mistake is one line."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html import escape
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from modeling_memory import MemoryEncoderDecoderForCausalLM
from training import run as run_module
from training.data.objectives import SpecialTokens
from training.recipes import recipe as recipe_module
from training.recipes.recipe import REPOSITORY, load_recipe
from training.records.figures import write_figures
from training.records.record import check_record, write_json, write_record
from training.run import main
from training.train.build import build_stage_model, child_config
from training.train.trainer import MemoryTrainer

RECIPES = sorted((REPOSITORY / "configuration" / "recipes").glob("*.yaml"))
SENTENCE = "the old house stood by a river where boats went down to sea and people sang of wind rain snow"


def text(seed: int, num_words: int = 3000) -> str:
    words = SENTENCE.split()
    order = torch.randint(len(words), (num_words,), generator=torch.Generator().manual_seed(seed)).tolist()
    return f"text number {seed}: " + " ".join(words[i] for i in order)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The debug recipe on three tiny texts, with a few steps a stage and no verification."""
    raw = yaml.safe_load((REPOSITORY / "configuration" / "recipes" / "debug_cpu.yaml").read_text())
    raw["name"], raw["output_dir"] = "tiny", str(tmp_path / "out")
    for seed, split in enumerate(("train", "validation", "test")):
        (tmp_path / f"{split}.txt").write_text(text(seed), encoding="utf-8")
        raw["data"][split] = [str(tmp_path / f"{split}.txt")]
    raw["tokenizer"]["vocab_size"] = 290
    for stage in raw["stages"]:
        stage["training"].update(max_steps=4, batch_size=2, logging_steps=2, save_steps=2, eval_steps=4, eval_rows=4)
    raw["evaluation"].update(num_rows=2, num_generated_rows=1)
    raw["publish"]["verify"] = False
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


@pytest.fixture
def short_recipe(recipe: Path) -> Path:
    """The first three stages of it, not evaluated."""
    raw = yaml.safe_load(recipe.read_text())
    raw["stages"] = raw["stages"][:3]
    raw["evaluation"], raw["publish"] = {"suites": []}, {"verify": False}
    recipe.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return recipe


def weights(out: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(out / "stages" / stage / "model" / "model.safetensors")


def assert_same_weights(left: Path, right: Path, stages: list[str]) -> None:
    for stage in stages:
        one, two = weights(left, stage), weights(right, stage)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one), stage


def test_run_leaves_record_figures_and_hub_folder_and_a_second_call_says_all_is_done(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main([str(recipe)]) == 0
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    record = json.loads((out / "record.json").read_text())
    names = [stage["name"] for stage in yaml.safe_load(recipe.read_text())["stages"]]
    assert str(tmp_path) not in (out / "record.json").read_text()
    assert list(record["stages"]) == names
    check_record(record)
    check_metrics(record)
    check_figures_and_page(out, (*names, "blank copy loss", record["run"]["command"]))
    assert re.search("(?s)seconds by part.*blank_copy.*regenerated from the memories alone.*Hub folder", printed)
    hub = MemoryEncoderDecoderForCausalLM.from_pretrained(out / "hub").state_dict()
    assert all(torch.equal(hub[name], tensor) for name, tensor in weights(out, "combined").items())
    assert not list(out.rglob("*.part"))  # nothing half written is left, neither files nor folders

    before = times_of(out)
    assert main([str(recipe)]) == 0
    again = capsys.readouterr().out
    assert again.startswith("all done") and "== stage" not in again and "blank_copy" in again
    assert before == times_of(out)


def times_of(folder: Path) -> dict[Path, int]:
    """When each file of a folder was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def check_metrics(record: dict[str, Any]) -> None:
    """What a run of all stages puts into its record."""
    assert record["run"]["status"] == "success" and record["run"]["command"].startswith("python -m training.run")
    assert set(record["metrics"]) == {"autoencoder", "retention", "blank_copy", "copy", "clm"}
    assert {"memory", "no_memory", "wrong_memory", "no_memory_model", "full_context_model"} <= set(
        record["metrics"]["clm"]
    )
    assert record["inputs"]["files"]["train"].keys() == {"train.txt"}
    check_stages(record["stages"])


def check_stages(stages: dict[str, Any]) -> None:
    """What each stage of a run leaves."""
    for stage in stages.values():
        logged = {key for log in stage["series"] for key in log}
        assert stage["steps"] == 4 and min(stage["seconds"], stage["parameters"]["total"]) > 0
        assert {"eval_loss"} <= logged and any(key.endswith("_token_accuracy") for key in logged)
    frozen = stages["blank_copy"]["parameters"]
    assert frozen["trainable"] < frozen["total"]
    # The three models that clm compares have read the same rows of text.
    compared = [stages[name] for name in ("combined", "no_memory", "full_context")]
    assert len({stage["targets"]["causal"] for stage in compared}) == 1


def check_figures_and_page(out: Path, parts: tuple[str, ...]) -> None:
    """A run's figures, and the page that shows it without another file or a network."""
    for figure in ("loss.png", "token_accuracy.png", "accuracy_by_position.png"):
        assert (out / "figures" / figure).stat().st_size > 5000
    page = (out / "summary.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "http" not in page and str(out.parent) not in page
    for part in (*parts, "regenerated from the memories alone"):
        assert escape(part) in page, part


@pytest.mark.parametrize("killed_in", ["autoencoder", "blank_copy"])
def test_stopped_run_resumes_to_the_same_weights(
    short_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
):
    class Stop(TrainerCallback):
        def __init__(self, label: str) -> None:
            self.label = label

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.label == killed_in and state.global_step == 3:
                raise KeyboardInterrupt

    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert main([str(short_recipe), f"output_dir={straight}"]) == 0
    plain = MemoryTrainer.__init__

    def with_stop(self: MemoryTrainer, *arguments: Any, **options: Any) -> None:
        plain(self, *arguments, **options)
        self.add_callback(Stop(options["label"]))

    with monkeypatch.context() as patch:
        patch.setattr(MemoryTrainer, "__init__", with_stop)
        assert main([str(short_recipe), f"output_dir={stopped}"]) == 130
    assert not (stopped / "stages" / killed_in / "model").exists()
    assert main([str(short_recipe), f"output_dir={stopped}"]) == 0
    assert json.loads((stopped / "stages" / killed_in / "stage.json").read_text())["resumed_at_step"] == 2
    assert_same_weights(straight, stopped, ["autoencoder", "decoder", "blank_copy"])


def test_run_killed_by_the_system_loses_nothing_and_resumes(short_recipe: Path, tmp_path: Path):
    out = tmp_path / "out"
    slow = "stages.decoder.training.max_steps=100000"
    process = subprocess.Popen(
        [sys.executable, "-m", "training.run", str(short_recipe), slow],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list((out / "stages" / "decoder").glob("checkpoints/checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "stages" / "decoder" / "stage.json").exists()
    kept = weights(out, "autoencoder")
    assert main([str(short_recipe)]) == 2  # the decoder was begun with another max_steps
    shutil.rmtree(out / "stages" / "decoder")
    assert main([str(short_recipe)]) == 0
    assert all(torch.equal(kept[name], tensor) for name, tensor in weights(out, "autoencoder").items())


def test_changed_recipe_is_refused_with_what_changed(short_recipe: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(short_recipe)]) == 0
    capsys.readouterr()
    assert main([str(short_recipe), "stages.decoder.training.max_steps=5"]) == 2
    error = capsys.readouterr().err
    assert "stage.training.max_steps = 4, and now it is 5" in error and "delete the folder" in error
    assert main([str(short_recipe), "tokenizer.vocab_size=280"]) == 2
    assert "tokenizer.vocab_size = 290, and now it is 280" in capsys.readouterr().err


def test_sources_of_several_lengths_share_a_batch_evenly(short_recipe: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(short_recipe), "stages.blank_copy.training.batch_size=3"]) == 2
    message = "stages.blank_copy.data.vary_source gives 2 lengths of source in turn, so training.batch_size must be a"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sede=1", "unknown key sede (did you mean seed?)"),
        ("stages.decoder.training.learning_rate=1e-4", "write 1.0e-4"),
        ("data.train=[nowhere/*.txt]", "data.train: no file matches 'nowhere/*.txt'"),
        ("stages.autoencoder.model.encoder.hiden_size=3", "model.encoder.hiden_size (did you mean hidden_size?)"),
        ("stages.decoder.model.model_type=lama", "model_type is 'lama' (did you mean llama?)"),
        ("stages.autoencoder.data.row_length=9", "whole number of chunks of 8"),
        ("stages.decoder.data.row_length=100000", "fewer than one row of 100000"),
        ("tokenizer.vocab_size=100", "vocab_size is 100"),
    ],
)
def test_mistakes_end_with_one_line_and_status_2(
    recipe: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
):
    assert main([str(recipe), override]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1


def test_missing_recipe_is_named(capsys: pytest.CaptureFixture[str]):
    assert main(["nowhere.yaml"]) == 2
    assert "nowhere.yaml was not found" in capsys.readouterr().err


def test_overlapping_splits_are_refused(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "test.txt").write_text((tmp_path / "train.txt").read_text())
    assert main([str(recipe)]) == 2
    assert "share a document" in capsys.readouterr().err


def test_nonfinite_loss_stops_the_run_and_keeps_the_checkpoint(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    plain = MemoryTrainer.compute_loss

    def spoilt(self: MemoryTrainer, model: Any, inputs: Any, **options: Any) -> torch.Tensor:
        if self.state.global_step == 3:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
        return plain(self, model, inputs, **options)

    monkeypatch.setattr(MemoryTrainer, "compute_loss", spoilt)
    assert main([str(recipe)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the loss is nan at step 4 (batch of rows ")
    assert (tmp_path / "out" / "stages" / "autoencoder" / "checkpoints" / "checkpoint-2").is_dir()


def test_help_explains_the_arguments(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert "key=value" in printed and "output_dir" in printed


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_builds_every_model(path: Path):
    """Configurations, references and frozen parts fit."""
    recipe = load_recipe(path)
    if recipe.pretrained:
        return  # tiny models of the same classes run these: tests/test_pair_recipes.py, tests/test_smollm2.py
    vocab_size = recipe.tokenizer.vocab_size
    special = SpecialTokens(pad=0, bos=1, eos=2, copy=3, blank=4, memory=vocab_size)
    models: dict[str, Any] = {}
    for stage in recipe.stages:
        models[stage.name] = build_stage_model(
            stage, special_tokens=special, vocab_size=vocab_size, load=models.__getitem__
        )
        assert any(parameter.requires_grad for parameter in models[stage.name].parameters())


def test_a_configuration_may_use_the_common_names_and_nothing_unknown():
    fields = {"model_type": "gpt2", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = child_config(fields, {"vocab_size": 30, "pad_token_id": 0}, "model")
    assert (config.n_embd, config.n_layer, config.vocab_size) == (8, 1, 30)
    with pytest.raises(ValueError, match=r"model\.hidden_sise \(did you mean hidden_size\?\); GPT2Config has no such"):
        child_config({**fields, "hidden_sise": 8}, {}, "model")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_has_the_four_header_lines(path: Path):
    header = path.read_text().splitlines()[:4]
    starts = ("# Purpose:", "# Command:", "# Hardware:", "# Expected:")
    assert all(line.startswith(start) for line, start in zip(header, starts, strict=True))
    assert f"configuration/recipes/{path.name}" in header[1]


def test_debug_recipe_and_its_readme_name_every_key():
    """The debug recipe is the reference of all keys: each field stands in it, if only in a comment."""
    debug = (REPOSITORY / "configuration" / "recipes" / "debug_cpu.yaml").read_text()
    own = [item for item in vars(recipe_module).values() if getattr(item, "__module__", "") == recipe_module.__name__]
    classes = [item for item in own if isinstance(item, type) and dataclasses.is_dataclass(item)]
    names = {item.name.rstrip("_") for c in classes for item in dataclasses.fields(c)}
    assert {name for name in names if f"{name}:" not in debug} == set()


def test_record_is_written_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "record.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_record_without_its_parts_or_with_a_place_is_refused(tmp_path: Path):
    record = {
        "run": {"recipe_name": "x", "command": "c", "created_at": "t", "status": "success"},
        "code": {"commit": "1", "dirty": False, "versions": {}},
        "hardware": {"device": "cpu", "cpu": "", "threads": 1, "processes": 1},
        "inputs": {"files": {}},
        "recipe": {},
        "metrics": {},
    }
    write_record(tmp_path / "good.json", record)
    assert json.loads((tmp_path / "good.json").read_text())["format_version"] == 1
    with pytest.raises(ValueError, match="no run.command"):
        check_record({**record, "run": {"recipe_name": "x"}})
    with pytest.raises(ValueError, match="no 'metrics'"):
        check_record({key: value for key, value in record.items() if key != "metrics"})
    with pytest.raises(ValueError, match="absolute path"):
        write_record(tmp_path / "bad.json", {**record, "metrics": {"note": f"see {REPOSITORY}/runs"}})


def test_figures_of_an_empty_run_are_none(tmp_path: Path):
    assert write_figures({"stages": {"a": {"series": []}}, "metrics": {}}, tmp_path) == []


def test_parser_is_what_the_readme_shows():
    options = run_module.build_parser().parse_args(["quickstart", "seed=1"])
    assert options.recipe == "quickstart" and options.overrides == ["seed=1"]
