"""Real SIGKILLs at random moments; `python -m benchmarks.kills` sends more of them and writes the record."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import kills


@pytest.mark.slow
def test_runs_killed_at_random_moments_end_with_equal_weights(tmp_path: Path):
    """Each loses at most the steps since the last checkpoint; the measurement itself goes on after a stop."""
    assert kills.measure(4, 1, tmp_path, minutes=0.0, hit=[]) is None, "no time left: nothing is killed yet"
    metrics = kills.measure(4, 1, tmp_path, hit=[])
    assert metrics is not None and metrics["kills"] >= 4 and metrics["weights_equal"]
    assert metrics["most_steps_lost"] <= metrics["steps_between_checkpoints"]
    assert sum(metrics["moments"].values()) == metrics["kills"]


def test_weights_that_differ_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kills, "stages", lambda: ["one"])
    for side, value in (("left", 1.0), ("right", 1.0 + 2**-20)):
        folder = tmp_path / side / "stages" / "one" / "model"
        folder.mkdir(parents=True)
        save_file({"same": torch.ones(2), "w": torch.full((2,), value)}, folder / "model.safetensors")
    assert kills.differing(tmp_path / "left", tmp_path / "right") == ["one.w"]
    assert kills.differing(tmp_path / "left", tmp_path / "left") == []


def test_lost_steps_are_those_behind_the_checkpoint_that_a_session_went_on_from(tmp_path: Path):
    folder = tmp_path / "stages" / "one"
    folder.mkdir(parents=True)
    sessions = [{"from_step": 0, "to_step": 7}, {"from_step": 4, "to_step": 12}, {"from_step": 12, "to_step": 24}]
    (folder / "sessions.json").write_text(json.dumps(sessions))
    assert kills.lost_steps(tmp_path) == [3, 0]
