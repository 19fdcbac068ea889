"""A switch that saves time or memory changes neither losses nor weights, alone and with the others."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import test_launch
from tests.test_launch import assert_same, train
from training.train import trainer as trainer_module

ALL_AT_ONCE = {"gradient_checkpointing": True, "loss_chunk": 8, "compile": True}


def switched(case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **training: Any) -> dict[str, Any]:
    with monkeypatch.context() as patch:
        patch.setitem(test_launch.CASES, case, {**test_launch.CASES[case], "training": training})
        return train(case, folder, batch_size=8)


@pytest.fixture
def fast_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler up to its backend, which takes minutes; the test marked slow has it, too."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()  # they count for the whole process
    monkeypatch.setattr(
        trainer_module, "compile_blocks", functools.partial(trainer_module.compile_blocks, backend="aot_eager")
    )


def test_activations_computed_again_change_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = train("slots", tmp_path / "plain", batch_size=8)
    assert_same(plain, switched("slots", tmp_path / "switched", monkeypatch, gradient_checkpointing=True))


@pytest.mark.parametrize(
    "case",
    [
        "documents",
        "reconstruction",
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("all objectives", "slots")),
    ],
)
def test_compiled_layers_change_no_result(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast_compiler: None
):
    plain = train(case, tmp_path / "plain", batch_size=8)
    compiled = switched(case, tmp_path / "compiled", monkeypatch, compile=True)
    assert_same(plain, compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("case", ["documents", pytest.param("slots", marks=pytest.mark.slow)])
def test_all_switches_together_change_no_result(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast_compiler: None
):
    """Documents grouped by length, activations computed again, logits in chunks, compiled; bfloat16 beside them."""
    plain = train(case, tmp_path / "plain", batch_size=8)
    assert_same(plain, switched(case, tmp_path / "together", monkeypatch, **ALL_AT_ONCE))
    half = switched(case, tmp_path / "half", monkeypatch, bf16=True)
    both = switched(case, tmp_path / "both", monkeypatch, bf16=True, **ALL_AT_ONCE)
    for one, two, three in zip(plain["logs"], half["logs"], both["logs"], strict=True):
        for key in one:
            if key.endswith("loss"):
                assert two[key] == pytest.approx(one[key], rel=2e-2)
                assert three[key] == pytest.approx(one[key], rel=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["slots", "all objectives"])
def test_layers_compiled_by_inductor_change_no_result(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.compiler.reset()
    plain = train(case, tmp_path / "plain", batch_size=8)
    assert_same(plain, switched(case, tmp_path / "compiled", monkeypatch, compile=True))
