"""Benchmarks measure what they say: equal paths or nothing, in turn, all of it written down. No test is timed."""

import copy
import doctest
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import measure, snippet, speed, time_to_accuracy
from benchmarks.measure import UnequalPathsError, assert_equal, compare, fit_exponent, interleave, save_record, spread
from modeling_memory import MemoryAutoencoder, MemoryAutoencoderConfig
from tests.reference import memory_loop
from tests.reference.plain_autoencoder import plain_autoencoder
from training.records.record import describe_code

WORDS = ["the", "old", "house", "stood", "by", "a", "river", "where", "boats", "went", "down", "to", "sea"]
SPREAD = {"median", "min", "max", "first_quartile", "third_quartile"}


@pytest.mark.parametrize("module", [measure, speed, time_to_accuracy, snippet])
def test_examples_in_docstrings_are_true(module: Any):
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


def test_runs_are_timed_in_turn_after_a_warm_up():
    order: list[str] = []
    seconds = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repetitions=3, warmup=2)
    assert order == ["a", "b"] * 5
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_exponent_is_the_slope_of_the_logarithms():
    sizes = [2, 4, 8, 16, 32]
    quadratic = fit_exponent(sizes, [0.5 * n**2 for n in sizes])
    assert quadratic["exponent"] == pytest.approx(2) and quadratic["r_squared"] == pytest.approx(1)
    noisy = fit_exponent(sizes, [n * factor for n, factor in zip(sizes, (1.1, 0.9, 1.2, 0.8, 1.0), strict=True)])
    assert 0.8 < noisy["exponent"] < 1.2 and 0.9 < noisy["r_squared"] < 1
    assert spread([7.0]) == dict.fromkeys(SPREAD, 7.0)


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
    metrics = speed_record["metrics"]
    assert set(metrics) == {"encode", "train_step", "generate", "scaling", "scaling_short_chunks"}
    for name in ("encode", "train_step", "generate"):
        result = metrics[name]
        assert set(result) == {"given", "equality", "seconds", "spread", "ratio"}
        assert result["equality"]["largest_difference"] <= result["equality"]["tolerance"]
        fast, plain = result["seconds"]["fast"], result["seconds"]["plain"]
        assert len(fast) == len(plain) == 2 and min(fast + plain) > 0
        ratios = [slow / quick for slow, quick in zip(plain, fast, strict=True)]
        assert result["ratio"]["min"] == pytest.approx(min(ratios))
        assert result["ratio"]["median"] == pytest.approx(sum(ratios) / 2)
        assert set(result["ratio"]) == set(result["spread"]["fast"]) == SPREAD
    assert metrics["generate"]["given"]["roll_overs"] == 1  # 12 + 10 tokens in windows of 8, of which 8 were full


def test_scaling_is_fitted_to_the_medians(speed_record: dict[str, Any]):
    metrics = speed_record["metrics"]
    assert metrics["scaling"]["target_exponent"] == 1.1
    for key, chunk_length in (("scaling", 8), ("scaling_short_chunks", 4)):
        assert metrics[key]["given"]["chunk_length"] == chunk_length
        windows = metrics[key]["given"]["windows"]
        assert windows == [2, 3, 4]
        for name in ("train_step", "read"):
            result = metrics[key][name]
            assert [len(result["seconds"][str(n)]) for n in windows] == [2, 2, 2]
            medians = [result["spread"][str(n)]["median"] for n in windows]
            assert result["fit"] == pytest.approx(fit_exponent(windows, medians))


def test_full_sizes_are_those_of_the_main_job():
    sizes = speed.Sizes()
    assert (sizes.hidden_size, sizes.encoder_layers, sizes.decoder_layers, sizes.num_heads) == (256, 3, 4, 4)
    assert (sizes.vocab_size, sizes.chunk_length, sizes.window_length) == (2048, 32, 64)
    assert (sizes.scaling_windows, sizes.scaling_window_length) == ((2, 4, 8, 16, 32), 256)
    assert sizes.window_length // sizes.scaling_short_chunk == 4


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


# ---------------------------------------------------------------------------------------------------------------------
# the plain autoencoder


def autoencoder(encoder: dict[str, Any] | None = None, decoder: dict[str, Any] | None = None, **fields: Any):
    mixer = {
        "model_type": "masked_mixer",
        "vocab_size": 40,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "max_position_embeddings": 8,
        "initializer_range": 0.3,
    }
    config = MemoryAutoencoderConfig(
        encoder={**mixer, **(encoder or {})}, decoder={**mixer, **(decoder or {})}, **{"chunk_length": 6, **fields}
    )
    model = MemoryAutoencoder(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"expansion": "repeat"},
        {"chunk_length": 8, "decoder": {"hidden_size": 4}},  # longer than wide, and another width
        {"encoder": {"num_heads": 0}, "decoder": {"causal": False}},
    ],
    ids=["unroll", "repeat", "narrow decoder", "flat, not causal"],
)
def test_plain_autoencoder_equals_the_batched_one_in_logits_and_gradients(options: dict[str, Any]):
    model = autoencoder(**options)
    chunks = torch.randint(0, 40, (3, model.config.chunk_length))
    fast, plain = model(chunks).logits, plain_autoencoder(model, chunks)
    torch.testing.assert_close(plain, fast, atol=1e-12, rtol=0)
    probes, parameters = torch.randn_like(fast), list(model.parameters())
    for (name, _), one, other in zip(
        model.named_parameters(),
        torch.autograd.grad((fast * probes).sum(), parameters),
        torch.autograd.grad((plain * probes).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(other, one, atol=1e-11, rtol=0, msg=lambda text, name=name: f"{name}: {text}")
        assert one.abs().sum() > 0, name


@pytest.mark.parametrize(
    "options",
    [{"memories_per_chunk": 2}, {"pooling": "mean"}, {"bottleneck_size": 3}, {"encoder": {"kernel_size": 2}}],
)
def test_plain_autoencoder_refuses_what_it_does_not_cover(options: dict[str, Any]):
    with pytest.raises(ValueError, match="the plain autoencoder covers"):
        plain_autoencoder(autoencoder(**options), torch.zeros(1, 6, dtype=torch.long))


def test_plain_autoencoder_refuses_chunks_that_are_not_full():
    with pytest.raises(ValueError, match="5 tokens, expected 6"):
        plain_autoencoder(autoencoder(), torch.zeros(1, 5, dtype=torch.long))


# ---------------------------------------------------------------------------------------------------------------------
# time to accuracy


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three tiny texts of the same words."""
    for seed, split in enumerate(("train", "validation", "test")):
        order = torch.randint(len(WORDS), (2000,), generator=torch.Generator().manual_seed(seed)).tolist()
        (tmp_path / f"{split}.txt").write_text(f"text {seed}: " + " ".join(WORDS[i] for i in order))
    return tmp_path


def run_time_to_accuracy(data: Path, *options: str) -> tuple[int, dict[str, Any] | None]:
    out = data / "result.json"
    sizes = ["encoder", "decoder"]
    overrides = [f"stages.autoencoder.model.{part}.hidden_size=16" for part in sizes]
    overrides += ["stages.autoencoder.training.max_steps=12", "stages.autoencoder.training.batch_size=8"]
    overrides += [f"data.{split}=[{str(data / f'{split}.txt')!r}]" for split in ("train", "validation", "test")]
    arguments = ["--recipe", "debug_cpu", "--eval-steps", "3", "--eval-rows", "16"]
    arguments += ["--chunk-length", "4"]
    status = time_to_accuracy.main([*arguments, "--out", str(out), *options, *overrides, "tokenizer.vocab_size=280"])
    return status, json.loads(out.read_text()) if out.exists() else None


def test_recipe_and_baseline_run_to_the_accuracy(data: Path, capsys: pytest.CaptureFixture[str]):
    status, record = run_time_to_accuracy(data, "--target", "0.02", "--max-ratio", "1e9", "--threads", "1")
    assert status == 0 and record is not None
    assert str(data) not in json.dumps(record)
    metrics = record["metrics"]
    for side in ("recipe", "baseline"):
        result = metrics[side]
        assert result["reached"] and result["token_accuracy"] >= 0.02 and result["seconds"] > 0
        assert [point["step"] for point in result["curve"]] == list(range(3, result["steps"] + 1, 3))
        assert all(point["token_accuracy"] < 0.02 for point in result["curve"][:-1])
        times = [point["seconds"] for point in result["curve"]]
        assert all(early < late for early, late in itertools.pairwise(times))
    assert metrics["is_lower_bound"] is False
    assert metrics["ratio"] == pytest.approx(metrics["baseline"]["seconds"] / metrics["recipe"]["seconds"])
    assert metrics["equality"]["largest_difference"] <= metrics["equality"]["tolerance"]
    given = record["given"]
    assert given["tokens_per_memory"] == given["row_length"] == 4  # the recipe has 8
    assert given["rows_per_step"] == 2 * 8 and given["eval_tokens"] == 16 * 4
    assert given["stage"]["training"]["optimizer"] == "muon" and given["stage"]["training"]["bf16"] is True
    assert given["baseline"] == {"optimizer": "adamw", "learning_rate": 5e-4, "clip": 1.0}
    assert record["hardware"]["threads"] == 1 and record["seeds"] == {"weights_and_order": 0}
    assert "recipe" in capsys.readouterr().out


def test_a_baseline_that_runs_out_of_time_gives_a_lower_bound(data: Path, monkeypatch: pytest.MonkeyPatch):
    accuracies = iter([0.2, 0.95, 0.5, 0.6, 0.7])
    monkeypatch.setattr(time_to_accuracy.Task, "accuracy", lambda self, model: next(accuracies))
    status, record = run_time_to_accuracy(data, "--max-ratio", "1e-9")
    assert status == 0 and record is not None
    assert [point["token_accuracy"] for point in record["metrics"]["recipe"]["curve"]] == [0.2, 0.95]
    assert record["metrics"]["baseline"]["reached"] is False and record["metrics"]["baseline"]["steps"] == 3
    assert record["metrics"]["baseline"]["token_accuracy"] == 0.5 and record["metrics"]["is_lower_bound"] is True


def test_a_recipe_that_falls_short_leaves_no_ratio(data: Path, capsys: pytest.CaptureFixture[str]):
    status, record = run_time_to_accuracy(data, "--target", "1.0")
    assert status == 1 and record is not None
    assert record["run"]["status"] != "success" and record["metrics"]["ratio"] is None
    assert record["metrics"]["recipe"]["steps"] == 12 and "baseline" not in record["metrics"]
    assert "nothing to compare" in capsys.readouterr().out


def test_both_sides_begin_with_the_same_weights_and_rows(data: Path, monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, list[torch.Tensor]] = {"recipe": [], "baseline": []}
    starts: dict[str, dict[str, torch.Tensor]] = {}
    forward, plain = MemoryAutoencoder.forward, time_to_accuracy.plain_loss

    def note(side: str, model: MemoryAutoencoder, chunks: torch.Tensor) -> None:
        starts.setdefault(side, copy.deepcopy(model.state_dict()))
        seen[side].append(chunks.clone())

    def batched(self: MemoryAutoencoder, input_ids: Any = None, **options: Any) -> Any:
        if self.training:
            note("recipe", self, input_ids)
        return forward(self, input_ids=input_ids, **options)

    def looped(model: MemoryAutoencoder, chunks: torch.Tensor) -> torch.Tensor:
        if model.training:
            note("baseline", model, chunks)
        return plain(model, chunks)

    monkeypatch.setattr(MemoryAutoencoder, "forward", batched)
    monkeypatch.setattr(time_to_accuracy, "plain_loss", looped)
    accuracies = iter([0.1, 0.95, 0.1, 0.95])
    monkeypatch.setattr(time_to_accuracy.Task, "accuracy", lambda self, model: next(accuracies))
    assert run_time_to_accuracy(data, "--max-ratio", "1e9")[0] == 0
    assert [len(batches) for batches in seen.values()] == [6, 6]
    assert all(torch.equal(one, other) for one, other in zip(*seen.values(), strict=True))
    assert all(torch.equal(tensor, starts["baseline"][name]) for name, tensor in starts["recipe"].items())


def test_a_plain_loop_that_disagrees_is_not_raced(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    true = time_to_accuracy.plain_autoencoder
    monkeypatch.setattr(time_to_accuracy, "plain_autoencoder", lambda model, ids: 1.01 * true(model, ids))
    assert run_time_to_accuracy(data) == (1, None)
    assert "nothing is reported" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "90"], "--target is 90.0, expected a share"),
        (["--chunk-length", "0"], "--chunk-length is 0"),
        (["--eval-steps", "0"], "--eval-steps is 0"),
        (["--max-ratio", "0"], "--max-ratio is 0.0"),
        (["--stage", "decoder"], "no autoencoder stage called 'decoder'"),
    ],
)
def test_time_to_accuracy_names_what_is_wrong(
    data: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert run_time_to_accuracy(data, *options) == (2, None)
    assert message in capsys.readouterr().err
