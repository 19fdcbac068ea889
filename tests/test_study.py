"""The study's arms train, resume and measure; its parts are read as written; each word is given when it should be."""

import doctest
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import study, study_page
from benchmarks.study_page import Found, Part, Statement, find, statements, word
from training.records.record import read_json
from training.train import fit as fit_module
from training.train.fit import Budget, Validation, fit

RUN = {"steps": 600, "converged": True, "fall": 0.001, "validation_loss": 1.0}


def run_of(converged: bool = True, **metrics: float) -> dict[str, Any]:
    return {**RUN, "converged": converged, "metrics": metrics}


# ---------------------------------------------------------------------------------------------------------------------
# plan and statements


def test_the_plan_names_parents_before_their_children_and_every_rate_that_is_taken_is_swept():
    arms, seen = study.plan(), set()
    for arm in arms.values():
        assert set(arm.parents.values()) <= seen, arm.name
        seen.add(arm.name)
        if arm.swept is not None:
            assert {f"@{scale}.".join(arm.swept.split(".")) for scale in study.SCALES} <= set(arms)
    for tier, arm in ((arm.tier, arm) for arm in arms.values()):
        assert all(arms[parent].tier <= tier for parent in arm.parents.values()), arm.name


def test_a_statement_rests_upon_all_models_that_came_before_but_not_upon_one_that_was_stopped_on_purpose():
    needed = study.rests_upon(study.plan())
    assert needed["combined-frozen.m"] == ["curriculum.m", "blank.m", "ae.m"]
    assert needed["probe-early.m"] == [] and needed["ae.t"] == []


def test_every_arm_of_a_statement_is_planned_and_every_metric_is_measured_of_its_kind():
    arms, asked = study.plan(), []
    assert len(statements()) == 27
    for statement in statements():
        for line in statement.parts:
            for part in Part.read(line):
                part.value(lambda arm, metric: asked.append((arm, metric)) or len(asked))
    known = {
        "ae": {"accuracy", "loss", "random_loss"},
        "lm": {"accuracy", "loss"},
        "recurrent": {"causal_loss"},
        "oracle": {"loss"},
        "probe": {"accuracy", "information"},
        "memory": {
            *("causal_loss", "causal_border_loss", "copy_accuracy", "copy_no_memory_accuracy"),
            *("blank_copy_accuracy", "free_accuracy", "random_loss"),
        },
    }
    for name, metric in asked:
        kinds = known[arms[name].kind] | ({"int8_loss"} if "bottleneck" in arms[name].options else set())
        assert metric in kinds, f"{name}:{metric}"


def test_examples_in_docstrings_are_true():
    for module in (study_page, fit_module):
        assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


def test_a_part_needs_arms_and_parents_at_their_plateau():
    (part,) = Part.read("ours over theirs | a.m - b.m:loss > 0.1")
    arms = {
        "a.m": {"0": run_of(accuracy=0.9), "1": run_of(accuracy=0.5), "2": run_of(converged=False, accuracy=0.9)},
        "b.m": {seed: run_of(loss=0.5) for seed in "012"},
        "c.m": {"0": run_of(converged=False), "1": run_of()},
    }
    found = find(arms, {}, part)
    assert found.values == pytest.approx((0.4, 0.0)) and found.falling == 1 and found.holds is None
    assert find(arms, {"a.m": ["c.m"]}, part).values == pytest.approx((0.0,))
    assert "seeds disagree" in found.text and "0.000 to +0.400, 2 seeds" in found.text


def verdict(*found: tuple[tuple[float, ...], int], about_load: bool = False) -> str:
    part = Part("more", "a.m", low=0.5)
    statement = Statement("1", "", "", "", "", about_load=about_load)
    return word(statement, [Found(part, values, falling) for values, falling in found])


def test_each_word_is_given_when_it_should_be():
    yes, no = (0.9, 0.8, 0.7), (0.1, 0.2, 0.3)
    assert verdict((yes, 0), (yes, 0)) == "reproduced"
    assert verdict((yes, 0), about_load=True) == "reproduced in part"
    assert verdict((yes[:2], 0)) == "reproduced in part"  # fewer seeds
    assert verdict((yes, 0), ((), 0)) == "reproduced in part"  # a part was not run
    assert verdict((yes, 0), (no, 0)) == "reproduced in part"
    assert verdict(((0.9, 0.1, 0.9), 0)) == "reproduced in part"  # seeds disagree
    assert verdict((no, 0), (no, 0)) == "not reproduced"
    assert verdict((no, 0), ((), 0)) == "not tested"
    assert verdict((no[:2], 0)) == "not tested"  # two seeds against it refute nothing
    assert verdict((no, 1)) == verdict(((), 3)) == "not converged here"
    assert verdict() == verdict(((), 0)) == "not tested"


def test_the_page_shows_what_is_there_with_counts_of_every_word():
    probes = {f"probe-{name}.m": value for name, value in (("autoencoder", 0.99), ("causal", 0.2), ("untrained", 0.3))}
    arms = {
        name: {seed: run_of(accuracy=value, information=value, loss=1.0) for seed in "012"}
        for name, value in probes.items()
    }
    record = {"metrics": {"planned_runs": 9, "parents": {}, "arms": arms}}
    results = study.REPOSITORY / "benchmarks" / "results"
    shipped, rolling = (read_json(results / f"{name}.json") for name in ("starters", "rolling"))
    table = study_page.reproduced(record, shipped, rolling)
    assert len(table.rows) == 28 and "9 of 9 planned runs" in table.note
    assert table.cell("2", "word") == "**reproduced in part**"
    assert "ratio, autoencoder over untrained, mixers: +69.0% (+69.0% to +69.0%, 3 seeds), holds" in table.cell(
        "2", "here"
    )
    assert table.cell("22", "word") == "**not tested**" and table.cell("23", "word") == "**reproduced**"
    for row in table.rows[1:]:
        assert all(row), row[0]  # load, vocabulary and text stand beside each figure
    arms_table = study_page.study_arms(record)
    assert arms_table.cell("probe-causal.m", "test") == "right 20.0%, nats 1.000"


# ---------------------------------------------------------------------------------------------------------------------
# training to a plateau


def test_training_ends_at_the_first_plateau_of_the_rest_and_not_before():
    module = torch.nn.Linear(1, 1)
    curve = iter([2.0] * 3 + [1.9, 1.8, 1.7, 1.6, 1.6, 1.6] + [0.0] * 20)
    validation = Validation(lambda: next(curve), every=10, stop_after=50)
    budget = Budget(steps=200, bf16=False, rest=0.5, floor=0.1)
    losses = fit(module, lambda step: module(torch.ones(1, 1)).square().mean(), budget, validation=validation)
    assert len(losses) == 90 and validation.at_plateau and validation.points[-1] == (90, 1.6)
    assert validation.points[0] == (10, 2.0)  # level from the start, and yet it went on


def test_rates_rest_at_the_floor():
    module = torch.nn.Linear(1, 1)
    _, scheduler = fit_module._optimizer_and_schedule(module, Budget(steps=100, decay=0.25, rest=0.4, floor=0.1))
    factor = scheduler.lr_lambdas[0]
    assert factor(30) == 1.0 and 0.1 < factor(50) < 1.0
    assert {round(factor(step), 6) for step in range(60, 101)} == {0.1}


# ---------------------------------------------------------------------------------------------------------------------
# arms

TRIED = [
    *("curriculum.m", "combined.t", "probe-memory.m", "blank-memory.m", "recurrent.m", "probe-oracle.t", "random.m"),
    *("probe-retrieval.m", "noisy.m", "repeat.tm", "free.t", "ones.t", "markerless.t", "blank-lifted.t", "open32.m"),
]


@pytest.fixture(scope="module")
def small() -> dict[str, study.Arm]:
    return {name: replace(arm, steps=4) for name, arm in study.plan().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "TEST_TOKENS", 512)
    monkeypatch.setattr(study, "STEP_TOKENS", 256)


def train(lab: study.Lab, name: str) -> dict[str, Any]:
    """Run an arm after everything that it needs."""
    arm = lab.arms[name]
    if arm.swept is not None:
        for scale in study.SCALES:
            train(study.Lab(lab.folder, 0, lab.arms), f"@{scale}.".join(arm.swept.split(".")))
    for parent in arm.parents.values():
        train(lab, parent)
    assert lab.ready(arm)
    return lab.result(name) or lab.run(arm)


@pytest.mark.parametrize("name", TRIED)
def test_arms_of_every_kind_train_and_are_measured(name: str, folder: Path, small: dict[str, study.Arm]):
    lab = study.Lab(folder, 0, small)
    result = train(lab, name)
    assert result["steps"] in (3, 4) and all(value == value for value in result["metrics"].values())
    arm = small[name]
    if arm.kind != "probe":
        model = lab.load(name)
        frozen = {n for n, p in lab.build(arm).named_parameters() if not p.requires_grad}
        assert (not frozen) == ("encoder" not in arm.parents and name != "curriculum.m")
        assert sum(p.numel() for p in model.parameters()) > 100_000


def test_a_killed_run_goes_on_and_what_is_done_is_not_done_again(
    folder: Path, small: dict[str, study.Arm], monkeypatch: pytest.MonkeyPatch
):
    sweep = [name for name in small if name.startswith("ae@") and name.endswith(".m")]
    arms = {name: small[name] for name in [*sweep, "ae.m", "repeat.m"]}
    labs = {seed: study.Lab(folder / "killed", seed, arms) for seed in study.SEEDS}
    real, calls = study.fit, []

    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["label"])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(study, "fit", killed)
    with pytest.raises(KeyboardInterrupt):
        study.run_arms(folder / "killed", arms, hours=1)
    done, number = study.run_arms(folder / "killed", arms, hours=1)
    assert (done, number) == (9, 9) and len(calls) == 10  # each once, and the killed one again
    assert study.run_arms(folder / "killed", arms, hours=0) == (9, 9) and len(calls) == 10
    first = json.dumps(labs[1].result("ae.m")["metrics"])
    for ending in ("json", "pt"):
        labs[1].place("ae.m", ending).unlink()
    assert study.run_arms(folder / "killed", arms, hours=0)[0] == 8  # the time is up
    study.run_arms(folder / "killed", arms, hours=1)
    assert json.dumps(labs[1].result("ae.m")["metrics"]) == first  # the seed decides
    assert set(study.collect(folder / "killed", arms)["ae.m"]) == {"0", "1", "2"}
    out = folder / "record.json"
    monkeypatch.setattr(study, "plan", lambda: arms)
    assert study.main(["--report", "--folder", str(folder / "killed"), "--out", str(out)]) == 0
    assert read_json(out)["metrics"]["arms"]["ae.m"]["2"]["steps"] in (3, 4)


def test_nothing_to_report_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert study.main(["--report", "--folder", str(tmp_path)]) == 3
    assert "not all is measured yet" in capsys.readouterr().out
