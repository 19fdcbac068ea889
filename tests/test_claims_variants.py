"""Variants train what they say, score what they say, are measured once, and wait for stages that are not there."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.claims import scoring, variants
from benchmarks.claims.cells import read_cell, read_cells
from benchmarks.claims.source import Source
from benchmarks.claims.variants import (
    border_targets,
    build_model,
    build_oracle,
    largest_activation,
    lifted_autoencoder,
    loss_without,
    measure_variants,
    next_token_metrics,
    score_behind,
)
from tests.claims_run import add_stage, tiny_run
from training.measure.baselines import cut_layers, next_token_loss, quantise, score_next_tokens
from training.measure.frozen import load_encoder
from training.measure.suites import Scores

STAGES = ("ae", "ae_transformer", "untrained", "decoder")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    patch = pytest.MonkeyPatch()
    patch.setattr("benchmarks.claims.source.SCORED_TOKENS", 512)
    torch.set_num_threads(1)
    return tiny_run(tmp_path_factory.mktemp("claims") / "study", STAGES)


def measure(source: Source, folder: Path, *names: str) -> dict[str, Any]:
    measure_variants(source.folder, folder, names, source.recipe)
    return {name: cell["metrics"] for name, cell in read_cells(folder).items()}


def test_border_targets_are_left_out_of_the_loss_and_of_the_gradient():
    tokens, logits = torch.randint(0, 9, (2, 7)), torch.randn(2, 7, 9, requires_grad=True)
    left_out = border_targets(7, 3)
    nats = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    places = [0, 1, 3, 4]  # targets 3 and 6 begin the second and the third window
    loss = loss_without(logits, tokens, left_out)
    torch.testing.assert_close(loss, nats[:, places].mean())
    (gradient,) = torch.autograd.grad(loss, logits)
    assert [place for place in range(7) if gradient[:, place].abs().max() > 0] == places
    torch.testing.assert_close(loss_without(logits, tokens, left_out & False), next_token_loss(logits, tokens))


def test_metrics_part_targets_at_borders_from_the_others():
    losses = torch.arange(6.0).expand(4, 6)
    scores = Scores(losses, losses > 2, torch.zeros(4, 6, dtype=torch.long))
    found = next_token_metrics(scores, vocab_size=9, window_length=3)
    assert found["all"]["loss_by_position"] == [0, 1, 2, 3, 4, 5]
    assert found["border"]["loss"] == 3.5 and found["border"]["num_tokens"] == 8
    assert found["inside"]["loss"] == 2.0 and found["inside"]["token_accuracy"] == 0.5


def test_windowed_models_are_measured_as_they_were_trained(source: Source, tmp_path: Path, monkeypatch: Any):
    left_out = []

    def spy(logits: torch.Tensor, rows: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        left_out.append(int(mask.sum()))
        return loss_without(logits, rows, mask)

    monkeypatch.setattr(variants, "loss_without", spy)
    found = measure(source, tmp_path, "parallel_100", "no_border_100", "recurrent_100", "recurrent_101")
    assert left_out == [0, 0, 7, 7, 0, 0, 0, 0]  # two steps each; seven later windows begin inside a row of 128
    rows = source.test_rows(128)
    for metrics in found.values():
        assert metrics["all"]["num_tokens"] == 127 * len(rows) and metrics["border"]["num_tokens"] == 7 * len(rows)
        assert len(metrics["all"]["loss_by_position"]) == 127 and metrics["all"]["loss"] < 1.5 * math.log(300)
    assert found["recurrent_100"]["all"]["loss"] != found["recurrent_101"]["all"]["loss"]
    assert found["parallel_100"]["parameters"]["total"] > found["recurrent_100"]["parameters"]["total"]
    cell = read_cell(tmp_path, "no_border_100")
    assert cell["steps"] == 2 and cell["text_tokens"] == 2 * 4 * 128


def test_measurements_are_made_once_and_go_on_from_a_checkpoint(source: Source, tmp_path: Path, monkeypatch: Any):
    whole = measure(source, tmp_path / "whole", "noise_1_16")["noise_1_16"]
    steps: list[int] = []
    fit = variants.fit

    def stop(module: Any, loss_of_step: Any, budget: Any, **options: Any) -> Any:
        def loss(step: int) -> torch.Tensor:
            steps.append(step)
            if len(steps) == 2:
                raise KeyboardInterrupt
            return loss_of_step(step)

        return fit(module, loss, budget, save_steps=1, **options)

    monkeypatch.setattr(variants, "fit", stop)
    with pytest.raises(KeyboardInterrupt):
        measure(source, tmp_path / "cut", "noise_1_16")
    assert not read_cells(tmp_path / "cut") and len(list((tmp_path / "cut" / "checkpoints").iterdir())) == 1
    torch.manual_seed(123)  # noise does not depend on what was drawn before
    again = measure(source, tmp_path / "cut", "noise_1_16")["noise_1_16"]
    assert steps == [0, 1, 1] and again == whole and not list((tmp_path / "cut" / "checkpoints").iterdir())
    measure(source, tmp_path / "cut", "noise_1_16")
    assert len(steps) == 3  # found, not trained


def test_another_recipe_or_another_stage_is_measured_again(source: Source, tmp_path: Path):
    first = measure(source, tmp_path, "recurrent_100")
    stages = [
        replace(stage, training=replace(stage.training, max_steps=1)) if stage.name == "memory" else stage
        for stage in source.recipe.stages
    ]
    changed = replace(source, recipe=replace(source.recipe, stages=stages))
    assert measure(changed, tmp_path, "recurrent_100") != first
    assert read_cell(tmp_path, "recurrent_100")["steps"] == 1


def test_an_oracle_is_scored_with_its_own_vector_and_with_another(source: Source, tmp_path: Path):
    found = measure(source, tmp_path, "oracle_token")["oracle_token"]
    assert found["own"]["loss"] != found["wrong"]["loss"] and found["own"]["num_tokens"] == 8 * 63
    model, rows = build_oracle(source, "projection", 64, seed=0), source.test_rows(64)[:3]
    torch.testing.assert_close(score_behind(model, rows, 0).losses, score_next_tokens(model, rows).losses)
    shifted = score_next_tokens(Swapped(model, rows), rows, batch_size=3)
    torch.testing.assert_close(score_behind(model, rows, 1, batch_size=2).losses, shifted.losses)
    kept = load_encoder(str(variants.encoder_folder(tmp_path, "oracle_token")))
    assert kept.position == "last" and kept.read(rows).shape == (3, 1, 16)


class Swapped(torch.nn.Module):
    """Each text behind the vector of the text in front of it."""

    def __init__(self, model: Any, rows: torch.Tensor) -> None:
        super().__init__()
        self.model, self.rows = model, rows

    def forward(self, own: torch.Tensor) -> torch.Tensor:
        return self.model(own, self.model.encode(self.rows[[2, 0, 1]]))


def test_narrow_vectors_are_stored_in_eight_bits(source: Source, tmp_path: Path, monkeypatch: Any):
    asked = []
    monkeypatch.setattr(
        "training.measure.baselines.quantise", lambda tensor, kind: asked.append(kind) or quantise(tensor, kind)
    )
    found = measure(source, tmp_path, "noise_none")["noise_none"]
    assert set(asked) == {"int8", "float8_e4m3fn", "float8_e5m2"}
    losses = [found[name]["loss"] for name in ("own", *sorted(set(asked)))]
    assert len(set(losses)) == 4 and found["narrow"]["largest"] > found["narrow"]["root_mean_square"] > 0
    increase = 100 * (found["int8"]["loss"] / found["own"]["loss"] - 1)
    assert found["int8"]["loss_increase_percent"] == pytest.approx(increase)


def test_the_lifted_encoder_stands_under_fresh_layers_and_is_what_the_decoder_reads(source: Source, tmp_path: Path):
    whole, lifted = lifted_autoencoder(source)
    assert len(lifted.encoder.layers) == 2 * len(whole.encoder.layers) == 4
    rows = source.test_rows(16)[:2]
    with torch.no_grad():
        inner = lifted.encoder(rows, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(inner, cut_layers(whole.encoder, 2)(rows).last_hidden_state)
    model = build_model(source, "blank_transformer", {"ae_transformer": lifted})
    assert len(model.encoder.layers) == 4 and not any(p.requires_grad for p in model.encoder.parameters())
    found = measure(source, tmp_path, "half_depth", "half_depth_copy", "whole_copy")
    assert 0 < found["half_depth"]["cosine_whole"]["mean"] < 0.9999
    assert found["half_depth"]["retention_whole"]["loss"] != found["half_depth"]["retention_lifted"]["loss"]
    sizes = {name: found[name]["parameters"]["total"] for name in ("half_depth_copy", "whole_copy")}
    layer = sum(p.numel() for p in whole.encoder.layers[0].parameters())
    assert sizes["half_depth_copy"] - sizes["whole_copy"] == 2 * layer
    assert found["half_depth_copy"]["memory"]["num_tokens"] == found["whole_copy"]["no_memory"]["num_tokens"] == 512


def test_random_tokens_are_all_ids_alike_and_never_those_of_the_test(source: Source, tmp_path: Path):
    ids = variants.random_ids(source, (200, 64), seed=0)
    counts = torch.bincount(ids.flatten(), minlength=source.vocab_size)
    assert len(counts) == source.vocab_size and counts.min() > 10 and counts.max() < 100
    assert not torch.equal(ids, variants.random_ids(source, (200, 64), seed=1))
    found = measure(source, tmp_path, "random_tokens")["random_tokens"]
    assert found["uniform_loss"] == pytest.approx(math.log(source.vocab_size))
    assert found["random"]["loss"] != found["text"]["loss"] and len(found["train_losses"]) == 2


def test_an_overflow_in_float16_is_counted(source: Source, tmp_path: Path):
    found = measure(source, tmp_path, "half_precision_ae")["half_precision_ae"]
    assert found["float16"]["non_finite_share"] == 0 and found["float16"]["loss"] != found["bfloat16"]["loss"]
    model = source.load("ae")
    model.expansion.projection.register_forward_hook(lambda module, inputs, output: output * 1e9)
    rows = source.test_rows(16)[:4]
    assert largest_activation(model, rows) > 65_504
    monkey = pytest.MonkeyPatch()
    monkey.setattr(type(source), "load", lambda self, name: model)
    try:
        metrics = variants.half_precision_variant("ae").measure(source, tmp_path, tmp_path / "none")["metrics"]
    finally:
        monkey.undo()
    assert metrics["float16"]["non_finite_share"] > 0 and metrics["float16"]["loss"] is None
    assert metrics["bfloat16"]["non_finite_share"] == 0 and metrics["bfloat16"]["loss"] > 0


def test_what_waits_for_a_stage_says_so_after_all_others_were_measured(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr("benchmarks.claims.source.SCORED_TOKENS", 256)
    source = tiny_run(tmp_path / "study", ["ae"])
    names = ("oracle_full_context", "half_precision_ae")
    with pytest.raises(ValueError, match="oracle_full_context for full_context.*Call again"):
        measure(source, tmp_path / "cells", *names)
    assert set(read_cells(tmp_path / "cells")) == {"half_precision_ae"}
    for name in ("decoder", "full_context"):
        add_stage(source, name)
    assert set(measure(source, tmp_path / "cells", *names)) == set(names)
    with pytest.raises(ValueError, match="half_depht: no such measurement; known: recurrent_100"):
        measure(source, tmp_path / "cells", "half_depht")
    with pytest.raises(ValueError, match="holds no run"):
        measure_variants(tmp_path / "nothing", tmp_path / "cells")


def test_the_command_measures_what_it_is_asked_for(source: Source, tmp_path: Path, monkeypatch: Any, capsys: Any):
    monkeypatch.setattr("benchmarks.claims.source.load_recipe", lambda name: source.recipe)
    words = [str(source.folder), "--to", str(tmp_path), "--only", "half_precision_ae,half_depth", "--threads", "1"]
    assert variants.main(words) == 0 and set(read_cells(tmp_path)) == {"half_precision_ae", "half_depth"}
    assert variants.main([str(source.folder), "--to", str(tmp_path), "--only", "oracle_full_context"]) == 2
    assert "wait for stages" in capsys.readouterr().err


def test_rows_are_those_that_stages_are_scored_on(source: Source):
    text = scoring.ClaimsText(source.inputs.tokenizer, {"books": source.inputs.tokens["test"]}, {})
    assert torch.equal(source.test_rows(128), text.rows("books", 128, 512))
