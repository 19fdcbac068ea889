"""Every statement is decided from the record alone, by criteria that can come out either way."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import render
from benchmarks.claims.evidence import (
    Number,
    Reading,
    Study,
    Verdict,
    close,
    higher,
    joint_verdict,
    lower,
    not_lower,
    reaches,
    stays_under,
    times,
)
from benchmarks.claims.figures import ENCODERS, FIGURES, READERS, draw_claims
from benchmarks.claims.probes import encoders
from benchmarks.claims.report import decide_all, heading_of, slug
from benchmarks.claims.statements import load_statements, verdict_of
from benchmarks.claims.variants import variants
from tests.claims_record import SHARE, build_record, metrics, paths_read
from training.places import REPOSITORY
from training.records.record import read_json, write_json

KEYS = [*map(str, range(1, 24)), "a", "b", "c", "d"]
ONE, OTHER = Reading("one", "one"), Reading("other", "other")


def two(one: tuple[float, float], other: tuple[float, float], half_width: float = 0.005) -> Study:
    """A study of two cells, each given by token accuracy and loss."""
    cells = {}
    for name, (accuracy, loss) in (("one", one), ("other", other)):
        found = metrics(name) | {"token_accuracy": accuracy, "loss": loss}
        found["token_accuracy_rows_interval"] = [accuracy - half_width, accuracy + half_width]
        found["loss_interval"] = [loss - half_width, loss + half_width]
        cells[name] = {"name": name, "metrics": found}
    return Study({"metrics": {"cells": cells}, "stages": {}, "recipe": {"tokenizer": {"vocab_size": 2048}}})


@pytest.mark.parametrize(
    ("part", "holds", "fails", "undecided"),
    [
        (higher("", ONE, OTHER), ((0.5, 1), (0.4, 1)), ((0.4, 1), (0.5, 1)), ((0.41, 1), (0.4, 1))),
        (higher("", ONE, OTHER, by=0.3), ((0.8, 1), (0.4, 1)), ((0.5, 1), (0.4, 1)), ((0.702, 1), (0.4, 1))),
        (lower("", ONE, OTHER), ((0, 1.0), (0, 1.1)), ((0, 1.1), (0, 1.0)), ((0, 1.0), (0, 1.01))),
        (times("", ONE, OTHER, 5), ((0.9, 1), (0.1, 1)), ((0.4, 1), (0.1, 1)), ((0.5, 1), (0.1, 1))),
        (close("", ONE, OTHER, 0.05), ((0.5, 1), (0.49, 1)), ((0.6, 1), (0.5, 1)), ((0.55, 1), (0.5, 1))),
        (not_lower("", ONE, OTHER), ((0.5, 1), (0.5, 1)), ((0.4, 1), (0.5, 1)), ((0.48, 1), (0.5, 1))),
        (reaches("", ONE, 0.9), ((0.95, 1), (0, 1)), ((0.8, 1), (0, 1)), ((0.9, 1), (0, 1))),
        (reaches("", ONE, 0.9, decisive=False), ((0.95, 1), (0, 1)), None, ((0.8, 1), (0, 1))),
        (times("", ONE, OTHER, 5, decisive=False), ((0.9, 1), (0.1, 1)), None, ((0.4, 1), (0.1, 1))),
        (stays_under("", ONE, 0.2), ((0.1, 1), (0, 1)), ((0.3, 1), (0, 1)), ((0.2, 1), (0, 1))),
    ],
)
def test_each_comparison_can_hold_fail_and_be_undecided(part: Any, holds: Any, fails: Any, undecided: Any):
    expected = (Verdict.HOLDS, Verdict.FAILS, Verdict.UNDECIDED)
    for numbers, verdict in zip((holds, fails, undecided), expected, strict=True):
        if numbers is None:
            continue
        lines, found = part.outcome(two(*numbers))
        assert found is verdict, (numbers, lines)
    assert part.outcome(Study({"metrics": {"cells": {}}, "stages": {}}))[1] is Verdict.NOT_RUN


def test_rows_are_compared_in_pairs_and_kept_for_a_record_without_rows():
    study = two((0, 2.0), (0, 1.9), half_width=0.5)
    for name, rows in (("one", [1.0, 2.0, 3.0]), ("other", [0.9, 1.9, 2.9])):
        study.record["metrics"]["cells"][name]["metrics"]["row_losses"] = rows
    assert higher("", ONE, OTHER, kind="loss").outcome(study)[1] is Verdict.HOLDS
    plain = two((0, 2.0), (0, 1.9), half_width=0.5)
    assert higher("", ONE, OTHER, kind="loss").outcome(plain)[1] is Verdict.UNDECIDED
    plain.record["metrics"]["paired"] = study.paired
    assert higher("", ONE, OTHER, kind="loss").outcome(Study(plain.record))[1] is Verdict.HOLDS


def test_independent_intervals_add_in_squares():
    found = Number(0.5, 0.47, 0.53, "accuracy").minus(Number(0.3, 0.26, 0.34, "accuracy"))
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.15, 0.25))


def test_one_part_against_a_statement_is_enough():
    holds, fails, undecided, not_run = Verdict.HOLDS, Verdict.FAILS, Verdict.UNDECIDED, Verdict.NOT_RUN
    assert joint_verdict([holds, undecided, fails]) is fails and joint_verdict([holds, undecided]) is undecided
    assert joint_verdict([holds, not_run]) is holds and joint_verdict([not_run]) is not_run


def test_there_is_every_statement():
    assert list(load_statements()) == KEYS


def test_statements_read_only_what_something_measures():
    record = build_record()
    stages = {f"stage_{stage['name']}" for stage in record["recipe"]["stages"]}
    foreign = {"domain_tinystories", "domain_wikipedia", "pretrained_base", "pretrained_brief", "pretrained_long"}
    measured = stages | set(variants()) | set(encoders()) | foreign
    figures = {*ENCODERS, *(path.split(".")[0] for path in READERS)}
    assert {path.split(".")[0] for path in paths_read(record)} | figures <= measured


def test_a_full_record_decides_everything_that_can_be_run():
    record = build_record()
    not_run = {
        (key, one.part.claim)
        for key, (_, decided) in decide_all(record).items()
        for one in decided
        if one.verdict is Verdict.NOT_RUN
    }
    assert not_run == {("11", "before a mixer decoder the gap nearly closes")}


def test_what_is_missing_is_not_run_and_no_error():
    record = build_record()
    record["metrics"].update(cells={}, records={})
    record["stages"] = {}
    assert {verdict_of(decided) for _, decided in decide_all(record).values()} == {Verdict.NOT_RUN}


def test_other_numbers_give_another_verdict():
    """No part is decided whatever comes out: random records bring each to more than one verdict."""
    numbers = random.Random(0)
    found: dict[tuple[str, str], set[Verdict]] = {}
    record = build_record()
    paths = sorted(paths_read(record))
    for trial in range(60):
        for path in paths:
            name, *keys = path.split(".")
            place = record["metrics"]["cells"][name]["metrics"]
            for key in keys:
                place = place[key]
            if "loss" in place:
                accuracy, loss = numbers.choice((0.01, 0.1, 0.5, 0.52, 0.99)), numbers.choice((0.01, 2.0, 2.04, 9.0))
                place.update(metrics("", accuracy, loss))
        if trial == 30:
            change_others(record)
        if trial >= 30:
            follow_books(record)
        study = Study(record)
        for key, statement in load_statements().items():
            for one in statement.decide(study):
                found.setdefault((key, one.part.claim), set()).add(one.verdict)
    always = {claim: verdicts for claim, verdicts in found.items() if len(verdicts) == 1}
    assert always == {("11", "before a mixer decoder the gap nearly closes"): {Verdict.NOT_RUN}}


def follow_books(record: dict[str, Any]) -> None:
    for number, cell in enumerate(record["metrics"]["cells"].values()):
        for condition in ("memory", "news") if "retention" in cell["metrics"] else ():
            cell["metrics"]["retention"][condition]["loss"] = 1.0 + number / 100


def change_others(record: dict[str, Any]) -> None:
    others = record["metrics"]["records"]
    record["metrics"]["paired"][SHARE]["interval"] = [0.55, 0.7]
    others["speed"]["metrics"]["read_exponents"]["windows of 256"] = 2.0
    others["quickstart"]["metrics"]["autoencoder"]["memory"].update(loss=3.0, loss_interval=[2.9, 3.1])
    for name, cell in others["rolling"]["metrics"].items():
        if name.startswith("first_token"):
            cell["cpu_ratio"]["stored_16"] = 1.0
        elif name.startswith("generation"):
            cell["cache_columns"]["memories"] = 9000
    for model in others["probe"]["metrics"].values():
        for cells in model.values():
            cells["embedding"].update(metrics("flat", 0.3), bits_per_byte=1.0)
    for stage in record["stages"].values():
        stage["gradient_norms"] = {"median": 1.0, "largest": 50.0}
    for name, cell in record["metrics"]["cells"].items():
        if name.startswith("half_precision"):
            cell["metrics"]["float16"] = {"non_finite_share": 0.5}


def page_of(record: dict[str, Any], root: Path) -> Path:
    page = root / "docs" / "reproducing.md"
    page.parent.mkdir(parents=True)
    page.write_text((REPOSITORY / "docs" / "reproducing.md").read_text(encoding="utf-8"), encoding="utf-8")
    write_json(root / "benchmarks" / "results" / "claims.json", record)
    return page


def test_the_page_follows_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(render, "DRAWINGS", {})
    record = build_record()
    page = page_of(record, tmp_path)
    assert render.render(tmp_path) == ["docs/reproducing.md"] and render.render(tmp_path, check=True) == []
    text = page.read_text(encoding="utf-8")
    for key, statement in load_statements().items():
        assert f"\n### {heading_of(key, statement)}\n" in text
        assert f"](#{slug(heading_of(key, statement))})" in text
    changed = copy.deepcopy(record)
    changed["metrics"]["cells"]["stage_blank_only"]["metrics"]["blank_copy"]["memory"]["token_accuracy"] = 0.123
    write_json(tmp_path / "benchmarks" / "results" / "claims.json", changed)
    assert render.render(tmp_path, check=True) == ["docs/reproducing.md"]


def test_every_figure_is_drawn_and_none_of_nothing(tmp_path: Path):
    record = build_record()
    assert draw_claims(record, tmp_path) == [f"{name}.png" for name in FIGURES]
    assert all((tmp_path / f"{name}.png").stat().st_size > 10_000 for name in FIGURES)
    record["metrics"]["cells"], record["stages"] = {}, {}
    assert draw_claims(record, tmp_path / "none") == []


def test_the_committed_page_has_every_statement_of_the_committed_record():
    record = read_json(REPOSITORY / "benchmarks" / "results" / "claims.json")
    text = (REPOSITORY / "docs" / "reproducing.md").read_text(encoding="utf-8")
    assert record is not None
    for key, (statement, decided) in decide_all(record).items():
        part = text.partition(f"\n### {heading_of(key, statement)}\n")[2].partition("\n### ")[0]
        assert f"Verdict: **{verdict_of(decided).value}**" in part, key
