"""Every encoder of the claims is probed by one protocol, read as what it is, once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.claims import probes
from benchmarks.claims.cells import read_cell, read_cells
from benchmarks.claims.probes import Encoder, encoders, measure_probe, measure_probes, measure_retrieval
from benchmarks.claims.source import Source
from benchmarks.claims.variants import keep_encoder
from tests.claims_run import add_stage, tiny_run
from training.measure.frozen import load_encoder
from training.measure.inversion import DecoderSize
from training.probe import weights_checksum
from training.train.fit import Budget

STAGES = ("ae", "clm_mixer", "decoder", "untrained", "memory")
BUDGET = Budget(steps=2, batch_tokens=64)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    torch.set_num_threads(1)
    return tiny_run(tmp_path_factory.mktemp("claims") / "study", STAGES)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "SIZE", DecoderSize(hidden_size=16, num_hidden_layers=1, num_heads=2))
    monkeypatch.setattr(probes, "SCORED_TOKENS", 256)
    monkeypatch.setattr(probes, "FOUND_TEXTS", 20)


@torch.no_grad()
def test_each_encoder_is_read_as_what_it_is(source: Source, tmp_path: Path):
    def read(encoder: Encoder) -> Any:
        return load_encoder(encoder.place(source, tmp_path))

    assert weights_checksum(read(Encoder("ae")).body) == weights_checksum(source.load("ae").encoder)
    assert weights_checksum(read(Encoder("memory")).body) == weights_checksum(source.load("memory").encoder)
    assert read(Encoder("clm_mixer")).position == "last" and read(Encoder("ae")).position == "own"
    fresh, trained = read(Encoder("untrained")), read(Encoder("ae"))
    assert fresh.body.config.num_hidden_layers == trained.body.config.num_hidden_layers == 2
    assert weights_checksum(fresh.body) != weights_checksum(trained.body)
    transformer = read(Encoder("untrained_transformer"))
    assert transformer.body.config.model_type == "llama"
    assert weights_checksum(transformer.body) != weights_checksum(source.load("decoder").model)


def test_all_are_probed_by_one_protocol(source: Source):
    settings = [probes.setting_of(source, encoder, BUDGET) for encoder in encoders().values()]
    assert all(setting.settings() == settings[0].settings() for setting in settings)
    assert settings[0].train_tokens == BUDGET.steps * BUDGET.batch_tokens  # every text once
    names = set(encoders())
    assert {"probe_ae_64_64", "probe_ae_16_shuffled", "probe_oracle_token_64", "probe_retrieval_ae_16"} <= names


def test_a_probe_is_made_once_and_its_control_is_another(source: Source, tmp_path: Path, monkeypatch: Any):
    calls = []
    probe = probes.probe
    monkeypatch.setattr(probes, "probe", lambda *args: calls.append(args[0]) or probe(*args))
    own = measure_probe(source, tmp_path, Encoder("ae"), BUDGET)
    control = measure_probe(source, tmp_path, Encoder("ae", shuffled=True), BUDGET)
    assert own["steps"] == 2 and own["text_tokens"] == own["metrics"]["train_tokens_read"] == 128
    assert own["metrics"]["num_tokens"] == 256 and own["metrics"]["loss"] != control["metrics"]["loss"]
    assert measure_probe(source, tmp_path, Encoder("ae"), BUDGET) == own and len(calls) == 2
    assert measure_probe(source, tmp_path, Encoder("ae"), replace(BUDGET, seed=1)) != own and len(calls) == 3


def test_a_tuned_encoder_is_kept_and_probed(source: Source, tmp_path: Path):
    cell = measure_retrieval(source, tmp_path, "clm_mixer", replace(probes.TUNING, steps=2, batch_tokens=128))
    assert cell["metrics"]["before"]["ngram_7"]["num_texts"] == 20
    kept = load_encoder(Encoder("retrieval_clm_mixer").place(source, tmp_path))
    start = load_encoder(str(source.model_folder("clm_mixer")))
    assert kept.position == "last" and weights_checksum(kept.body) != weights_checksum(start.body)
    tuned = measure_probe(source, tmp_path, Encoder("retrieval_clm_mixer"), BUDGET)
    plain = measure_probe(source, tmp_path, Encoder("clm_mixer"), BUDGET)
    assert tuned["metrics"]["loss"] != plain["metrics"]["loss"]
    keep_encoder(start.body, source, tmp_path, "retrieval_clm_mixer")  # another tuning is another encoder
    again = measure_retrieval(source, tmp_path, "clm_mixer", replace(probes.TUNING, steps=1, batch_tokens=128))
    assert again != cell and measure_probe(source, tmp_path, Encoder("retrieval_clm_mixer"), BUDGET) != tuned


def test_what_waits_for_a_model_says_so_after_all_others_were_measured(tmp_path: Path, monkeypatch: Any, capsys: Any):
    source, cells = tiny_run(tmp_path / "study", ["ae"]), tmp_path / "cells"
    monkeypatch.setattr(probes, "measure_probe", lambda *args, own=measure_probe: own(*args, BUDGET))
    names = ["probe_memory_16", "probe_oracle_token_64", "probe_untrained_16"]
    with pytest.raises(ValueError, match="probe_memory_16 for the stage memory; .* the measurement oracle_token"):
        measure_probes(source.folder, cells, names, source.recipe)
    assert set(read_cells(cells)) == {"probe_untrained_16"}
    for stage in ("untrained", "decoder", "memory"):
        add_stage(source, stage)
    measure_probes(source.folder, cells, names[:1], source.recipe)
    assert read_cell(cells, "probe_memory_16")["metrics"]["num_vectors"] == 1
    monkeypatch.setattr("benchmarks.claims.source.load_recipe", lambda name: source.recipe)
    assert probes.main([str(source.folder), "--to", str(cells), "--only", "probe_memory_16"]) == 0
    assert probes.main([str(source.folder), "--to", str(cells), "--only", "probe_memory"]) == 2
    assert "probe_memory: no such measurement" in capsys.readouterr().err
