"""How commands end: one line and a status for what a user can mend, a traceback for what only we can."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_evaluate import saved  # noqa: F401
from tests.test_run import recipe, short_recipe  # noqa: F401
from training import domains, evaluate, probe
from training import run as run_module
from training.command_line import (
    TRACEBACK,
    Parser,
    check_place,
    device,
    named_file,
    positive_number,
    run_command,
    whole_number,
)
from training.places import REPOSITORY
from training.train.stopping import StoppedError
from training.train.trainer import NonFiniteLossError


def command(error: BaseException | None = None, result: Any = None) -> Any:
    """A command that ends in an error, or with a result."""

    def run(options: argparse.Namespace, line: str) -> Any:
        if error is not None:
            raise error
        return result

    return lambda words: run_command(Parser(prog="python -m training.tried"), run, words)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("seed is 'a',\n expected a number"), 2, "error: seed is 'a', expected a number"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2,
         "error: a.txt: No such file or directory; correct the path"),
        (OSError("Can't load the model"), 2, "error: Can't load the model"),
        (PermissionError(13, "Permission denied", "/x"), 2,
         "error: /x: Permission denied; choose a place that you may read and write"),
        (ImportError("No module named 'gguf'", name="gguf"), 2,
         "error: No module named 'gguf'; install it with: pip install \"modeling-memory[gguf]\""),
        (NonFiniteLossError("the loss is nan"), 1, "error: the loss is nan"),
        (StoppedError("stopped by SIGTERM"), 143, "error: stopped by SIGTERM"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), 1, "error: memory ran out"),
        (KeyboardInterrupt(), 130, "interrupted: rerun the same command to resume"),
    ],
)  # fmt: skip
def test_what_a_user_can_mend_is_one_line(error: BaseException, status: int, line: str, capsys: Any):
    assert command(error)([]) == status
    told = capsys.readouterr().err.strip()
    assert told.startswith(line) and "\n" not in told


@pytest.mark.parametrize(
    "error", [KeyError("a"), TypeError("b"), RuntimeError("c"), ImportError("d", name="training.e")]
)
def test_a_bug_shows_where_it_is(error: Exception):
    with pytest.raises(type(error)):
        command(error)([])


def test_the_traceback_of_a_mistake_is_there_for_the_asking(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="wrong"):
        command(ValueError("wrong"))(["--traceback"])
    monkeypatch.setenv(TRACEBACK, "1")
    with pytest.raises(ValueError, match="wrong"):
        command(ValueError("wrong"))([])


def test_the_status_is_what_a_command_returns_and_the_record_names_no_traceback():
    seen = []
    parser = Parser(prog="python -m training.tried")
    parser.add_argument("place")
    assert run_command(parser, lambda options, line: seen.append(line), ["/somewhere/else/x", "--traceback"]) == 0
    assert seen == ["python -m training.tried x"]
    assert command(result=1)([]) == 1 and command(result={"record": 1})([]) == 0


@pytest.mark.parametrize(
    ("read", "text"),
    [(whole_number(), "0"), (whole_number(), "-1"), (whole_number(), "1.5"), (whole_number(2), "1"),
     (positive_number, "nan"), (positive_number, "inf"), (positive_number, "0"), (positive_number, "fast"),
     (device, "nope"), (device, "cuda:99"), (named_file, "news"), (named_file, "=a"), (named_file, "a=")],
)  # fmt: skip
def test_senseless_values_of_options_are_refused(read: Any, text: str, capsys: Any):
    parser = Parser(prog="python -m training.tried")
    parser.add_argument("--value", type=read)
    assert run_command(parser, lambda options, line: None, ["--value", text]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: argument --value: {text!r}") and told.count("\n") == 1


def test_threads_below_one_are_refused(capsys: Any):
    assert probe.main(["model", "--threads", "-1"]) == 2
    assert "argument --threads: '-1': expected a whole number of 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [(probe, "/nowhere"), (domains, "/nowhere --to {out}/d.json"),
     (run_module, "/nowhere"), (evaluate, "/nowhere --suite copy"),
     (evaluate, "{model} --suite clm --text {text} --no-memory /nowhere"),
     (evaluate, "{model} --suite clm --text {text} --full-context /nowhere"),
     (evaluate, "{model} --suite clm --text {text} --record {text}/record.json"),
     (evaluate, "{model} --suite fidelity --text {text} --domain news"),
     (evaluate, "{model} --suite fidelity --text {text} --domain news=/nowhere"),
     (evaluate, "{model} --suite blank_copy --text {text} --domain news={text}"),
     (probe, "{model} --to {text}/below"), (domains, "{model} --to {text}/below"), (evaluate, ""),
     (evaluate, "{model} --suite copy --unknown")],
    ids=lambda line: f"{line[0].__name__.rpartition('.')[2]} {line[1]}",
)  # fmt: skip
def test_a_wrong_command_line_is_told_before_anything_is_loaded(
    line: tuple[Any, str],
    saved: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
):
    verb, words = line
    if verb in (evaluate, domains):
        monkeypatch.setattr(
            f"{verb.__name__}.load_model", evaluate.load_model if "/nowhere" in words.split()[:1] else 1
        )
    given = words.format(model=saved[0], text=saved[1], out=tmp_path).split()
    monkeypatch.chdir(tmp_path)
    assert verb.main(given) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1, told
    assert not list(tmp_path.rglob("*.json"))


def test_what_was_measured_stays_when_a_later_suite_fails(
    saved: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    plain = evaluate.evaluate_suite

    def fails_at_clm(evaluation: Any, suite: str, *rest: Any) -> Any:
        if suite == "clm":
            raise OSError(28, "No space left on device")
        return plain(evaluation, suite, *rest)

    monkeypatch.setattr(evaluate, "evaluate_suite", fails_at_clm)
    words = [str(saved[0]), "--text", str(saved[1]), "--limit", "4", "--suite", "blank_copy", "--suite", "clm"]
    assert evaluate.main(words) == 2
    (record,) = (tmp_path / "runs" / "evaluations").iterdir()
    kept = json.loads(record.read_text())
    assert set(kept["metrics"]) == {"blank_copy"} and kept["run"]["status"] == "running"
    monkeypatch.setattr(evaluate, "evaluate_suite", plain)
    assert evaluate.main([*words, "--record", "mine.json"]) == 0
    kept = json.loads((tmp_path / "mine.json").read_text())
    assert set(kept["metrics"]) == {"blank_copy", "clm"} and kept["run"]["status"] == "success"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.decoder.training.learning_rate=.nan", "stages.decoder.training.learning_rate is nan"),
        ("stages.decoder.training.weight_decay=.inf", "stages.decoder.training.weight_decay is inf"),
        ("stages.decoder.model.rms_norm_eps=.nan", "stages.decoder.model.rms_norm_eps is nan"),
        ("stages.decoder.model.hidden_size=100000000", "this machine has"),
        ("stages.decoder.model.hidden_size=1e8", "write 1.0e+8"),
        ("threads=-1", "threads is -1"),
        ("tokenizer.vocab_size=-5", "tokenizer.vocab_size is -5"),
        ("data.max_train_tokens=0", "data.max_train_tokens is 0"),
    ],
)
def test_senseless_values_of_a_recipe_are_named(
    short_recipe: Path,  # noqa: F811
    override: str,
    message: str,
    capsys: Any,
):
    assert run_module.main([str(short_recipe), override]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and message in told and told.count("\n") == 1, told


def test_a_recipe_of_brackets_is_refused(tmp_path: Path, capsys: Any):
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    assert run_module.main([str(tmp_path / "deep.yaml")]) == 2
    assert "nested too deeply" in capsys.readouterr().err


def test_places_of_results(tmp_path: Path):
    (tmp_path / "file").touch()
    assert check_place(tmp_path / "a" / "b.json") == tmp_path / "a" / "b.json"
    assert check_place(tmp_path / "file") == tmp_path / "file"
    with pytest.raises(ValueError, match="is a file; name another place"):
        check_place(tmp_path / "file" / "a.json")


def test_a_reader_that_closes_the_pipe_is_no_error():
    line = f"{sys.executable} -m training.evaluate --help | true"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(line, shell=True, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert ended.stderr == ""


def test_counting_weights_first_draws_no_random_number():
    """The model is built on the meta device before it is built: its weights are those of a single build."""
    from training.train.build import build_within_memory

    torch.manual_seed(0)
    counted = build_within_memory(lambda: torch.nn.Linear(3, 2), "model").weight
    torch.manual_seed(0)
    assert torch.equal(counted, torch.nn.Linear(3, 2).weight)
