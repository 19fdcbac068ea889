"""Benchmarks measure what they say: equal paths or nothing, in turn, all of it written down. No test is timed."""

import doctest
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure, speed
from benchmarks.measure import UnequalPathsError, assert_equal, compare, interleave, save_record
from tests.reference import memory_loop
from training.records.record import describe_code

SPREAD = {"median", "min", "max", "first_quartile", "third_quartile"}


@pytest.mark.parametrize("module", [measure, speed])
def test_examples_in_docstrings_are_true(module: Any):
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


def test_runs_are_timed_in_turn_after_a_warm_up():
    order: list[str] = []
    seconds = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repetitions=3, warmup=2)
    assert order == ["a", "b"] * 5
    assert [len(values) for values in seconds.values()] == [3, 3]


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"y": torch.tensor([1.0, 2.1])}, "y differs by 4.76e-02"),
        ({"y": torch.tensor([1.0, float("nan")])}, "y differs by nan"),
        ({"y": torch.tensor([[1.0, 2.0]])}, r"y has the shapes \(2,\) and \(1, 2\)"),
        ({"z": torch.tensor([1.0, 2.0])}, r"give \['y'\] and \['z'\]"),
    ],
)
def test_unequal_results_are_refused(plain: dict[str, torch.Tensor], message: str):
    with pytest.raises(UnequalPathsError, match=message):
        assert_equal({"y": torch.tensor([1.0, 2.0])}, plain, tolerance=1e-3)


def test_integers_must_be_identical_and_nothing_is_timed_if_not():
    calls = []

    def path(last: int) -> dict[str, torch.Tensor]:
        calls.append(last)
        return {"tokens": torch.tensor([1, 2, last])}

    with pytest.raises(UnequalPathsError, match="1 of 3 numbers differ"):
        compare(lambda: path(3), lambda: path(4), tolerance=1.0, repetitions=5)
    assert calls == [3, 4]


def test_a_record_of_a_changed_tree_goes_to_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    clean, dirty = {"code": {"dirty": False}}, {"code": {"dirty": True}}
    assert save_record(clean, "x", None) == tmp_path / "x.json"
    assert save_record(dirty, "x", None) == tmp_path / "scratch" / "x.json"
    assert save_record(clean, "x", None, publish=False) == tmp_path / "scratch" / "x.json"
    assert save_record(dirty, "x", str(tmp_path / "asked.json")) == tmp_path / "asked.json"
    assert all(json.loads(path.read_text()) for path in tmp_path.rglob("*.json"))


# ---------------------------------------------------------------------------------------------------------------------
# speed


@pytest.fixture(scope="module")
def speed_record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("speed") / "speed.json"
    assert speed.main(["--quick", "--repetitions", "2", "--out", str(path)]) == 0
    assert str(path.parent) not in path.read_text()
    return json.loads(path.read_text())


def test_speed_record_holds_every_repetition_and_how_it_came_about(speed_record: dict[str, Any]):
    assert speed_record["run"]["status"] == "success" and speed_record["quick"] is True
    assert speed_record["run"]["command"].startswith("python -m benchmarks.speed --quick")
    assert speed_record["code"]["commit"] == describe_code()["commit"]
    assert {"commit", "dirty", "versions"} == set(speed_record["code"])
    assert {"device", "cpu", "cores", "threads", "load_before"} <= set(speed_record["hardware"])
    assert speed_record["dtype"] == "float32" and speed_record["seeds"] == {"weights": 0}
    assert speed_record["sizes"]["window_length"] == 8 and speed_record["peak_memory_bytes"]["process"] > 2**20
    assert set(speed_record["metrics"]) == {"encode", "train_step", "generate"}
    # 12 + 10 tokens in windows of 8, of which 8 were full
    assert speed_record["metrics"]["generate"]["given"]["roll_overs"] == 1


@pytest.mark.parametrize("name", ["encode", "train_step", "generate"])
def test_a_comparison_is_of_equal_results_and_keeps_every_ratio(speed_record: dict[str, Any], name: str):
    result = speed_record["metrics"][name]
    assert set(result) == {"given", "equality", "seconds", "spread", "ratio"}
    assert result["equality"]["largest_difference"] <= result["equality"]["tolerance"]
    fast, plain = result["seconds"]["fast"], result["seconds"]["plain"]
    assert len(fast) == len(plain) == 2 and min(fast + plain) > 0
    ratios = [slow / quick for slow, quick in zip(plain, fast, strict=True)]
    assert result["ratio"]["min"] == pytest.approx(min(ratios))
    assert result["ratio"]["median"] == pytest.approx(sum(ratios) / 2)
    assert set(result["ratio"]) == set(result["spread"]["fast"]) == SPREAD


def test_full_sizes_are_those_of_the_main_job():
    sizes = speed.Sizes()
    assert (sizes.hidden_size, sizes.encoder_layers, sizes.decoder_layers, sizes.num_heads) == (256, 3, 4, 4)
    assert (sizes.vocab_size, sizes.chunk_length, sizes.window_length) == (2048, 32, 64)


@pytest.mark.parametrize("name", ["encode_context", "causal_loss", "generate_greedily"])
def test_paths_that_disagree_end_without_a_record(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    true = getattr(memory_loop, name)

    def spoilt(*arguments: Any) -> Any:
        result = true(*arguments)
        if name == "encode_context":
            return [result[0] * 1.01, *result[1:]]
        return result * 1.01 if name == "causal_loss" else (result + 1) % 60

    monkeypatch.setattr(memory_loop, name, spoilt)
    assert speed.main(["--quick", "--repetitions", "1", "--out", str(tmp_path / "speed.json")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "differ" in error and error.endswith("nothing is reported\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--repetitions", "0"], ["--threads", "0"]])
def test_speed_refuses_senseless_options(options: list[str], capsys: pytest.CaptureFixture[str]):
    assert speed.main(["--quick", *options]) == 2
    assert f"error: {options[0]} is 0" in capsys.readouterr().err
