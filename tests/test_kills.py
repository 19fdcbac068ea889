"""Runs that are killed with SIGKILL at random moments end with the weights of an undisturbed run, bit by bit.

Each session is `python -m training.run` on the debug recipe with short stages, forked from a process that has done the
imports, and killed after a random time.
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from training.recipes.recipe import load_recipe
from training.run import main as run

RECIPE, SAVE_STEPS = "debug_cpu", 4
SETTINGS = {"max_steps": 24, "logging_steps": 1, "eval_steps": 8, "save_steps": SAVE_STEPS, "batch_size": 16}


def stages() -> list[str]:
    return [stage.name for stage in load_recipe(RECIPE).stages]


def session(folder: Path, seconds: float | None) -> bool:
    """Run, and kill it after so many seconds; returns whether it was killed."""
    overrides = [f"stages.{stage}.training.{key}={value}" for stage in stages() for key, value in SETTINGS.items()]
    started, log = time.monotonic(), folder.parent / "output.txt"
    child = os.fork()
    if child == 0:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os._exit(run([RECIPE, f"output_dir={folder}", "publish.verify=false", *overrides]))
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, log.read_text()[-2000:]
            return False
        if seconds is not None and time.monotonic() - started >= seconds:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.01)


def lost_steps(folder: Path) -> list[int]:
    """Steps that were done and had to be done again, one number for each session of a stage that was cut short."""
    lost = []
    for path in folder.glob("stages/*/sessions.json"):
        sessions = json.loads(path.read_text())
        pairs = zip(sessions, sessions[1:], strict=False)
        lost += [max(before["to_step"] - after["from_step"], 0) for before, after in pairs]
    return lost


def differing(left: Path, right: Path) -> list[str]:
    """Weights of any stage that are not equal bit by bit."""
    wrong = []
    for folder in sorted(left.glob("stages/*/model/model.safetensors")):
        one, two = load_file(folder), load_file(right / folder.relative_to(left))
        names = one.keys() | two.keys()
        equal = {name for name in one.keys() & two.keys() if torch.equal(one[name], two[name])}
        wrong += [f"{folder.parent.parent.name}.{name}" for name in sorted(names - equal)]
    return wrong


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_with_equal_weights(tmp_path: Path):
    torch.set_num_threads(1)
    straight, killed, kills, dice = tmp_path / "straight", tmp_path / "killed", 0, random.Random(1)
    started = time.monotonic()
    session(straight, None)
    duration = time.monotonic() - started
    assert {path.name for path in straight.glob("stages/*")} == set(stages())
    while kills < 4 or killed.exists():
        if session(killed, dice.uniform(0.02, 0.3) * duration):
            kills += 1
            continue
        assert differing(straight, killed) == []
        assert max(lost_steps(killed), default=0) <= SAVE_STEPS
        shutil.rmtree(killed)


def test_weights_that_differ_are_found(tmp_path: Path):
    for side, value in (("left", 1.0), ("right", 1.0 + 2**-20)):
        folder = tmp_path / side / "stages" / "one" / "model"
        folder.mkdir(parents=True)
        save_file({"same": torch.ones(2), "w": torch.full((2,), value)}, folder / "model.safetensors")
    assert differing(tmp_path / "left", tmp_path / "right") == ["one.w"]
    assert differing(tmp_path / "left", tmp_path / "left") == []


def test_lost_steps_are_those_after_the_checkpoint_that_a_session_resumed_from(tmp_path: Path):
    folder = tmp_path / "stages" / "one"
    folder.mkdir(parents=True)
    sessions = [{"from_step": 0, "to_step": 7}, {"from_step": 4, "to_step": 12}, {"from_step": 12, "to_step": 24}]
    (folder / "sessions.json").write_text(json.dumps(sessions))
    assert lost_steps(tmp_path) == [3, 0]
