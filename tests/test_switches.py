"""A switch that saves memory changes neither losses nor weights."""

from pathlib import Path

import pytest

from tests import test_launch
from tests.test_launch import assert_same, train


def test_activations_computed_again_change_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    case = test_launch.CASES["slots"]
    plain = train("slots", tmp_path / "plain", batch_size=8)
    monkeypatch.setitem(test_launch.CASES, "slots", {**case, "training": {"gradient_checkpointing": True}})
    assert_same(plain, train("slots", tmp_path / "switched", batch_size=8))
