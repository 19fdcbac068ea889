"""What README and docs show is what the records say: values of cells, pages, figures."""

import copy
import doctest
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cost_tables, drawings, quality_tables, render, smollm2_tables, speed, table
from benchmarks.table import Table
from training.places import REPOSITORY
from training.records.record import read_json

RESULTS = REPOSITORY / "benchmarks" / "results"
PAGE = "\n".join(f"Before {name}.\n\n<!-- table:{name} -->\nold\n<!-- end -->\n" for name in render.TABLES)
# A table whose record is not there yet says so on its page; its own tests make it from a small one.
MADE = {
    name: entry
    for name, entry in render.TABLES.items()
    if entry.make is not None and all((RESULTS / f"{record}.json").is_file() for record in entry.records)
}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def make(name: str, **changed: dict[str, Any]) -> Table:
    """A table from the committed records, some of them replaced."""
    entry = render.TABLES[name]
    assert entry.make is not None
    return entry.make(*(changed.get(record, load(record)) for record in entry.records))


def changed(record: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a record with another value at a dotted path."""
    record = copy.deepcopy(record)
    *keys, last = path.split(".")
    place = record
    for key in keys:
        place = place[key]
    place[last] = value
    return record


@pytest.mark.parametrize("module", [table, quality_tables, cost_tables, smollm2_tables])
def test_examples_in_docstrings_are_true(module: Any):
    assert doctest.testmod(module).failed == 0


# ---------------------------------------------------------------------------------------------------------------------
# values


@pytest.mark.parametrize("name", MADE)
def test_every_table_is_whole_and_speaks_to_strangers(name: str):
    made = make(name)
    assert made.text or len(made.rows) > 1
    assert all(len(row) == len(made.rows[0]) for row in made.rows)
    text = " ".join([made.note, *(cell for row in made.rows for cell in row)])
    text = re.sub("`[^`]*`", "", text)  # keys of a recipe are meant to be typed
    for internal in ("_", " behind ", "in clear", "freely", "None", "nan"):
        assert internal not in text, internal


VALUES: list[tuple[str, str, str | int, Callable[[dict[str, Any]], str]]] = [
    (
        "quickstart",
        "copy, teacher-forced",
        "reached",
        lambda r: f"{r['metrics']['copy']['memory']['token_accuracy']:.1%}",
    ),
    (
        "quickstart",
        "copy, free-running: texts without an error",
        "reached",
        lambda r: f"{r['metrics']['copy']['memory']['exact_match']:.0%}",
    ),
    (
        "quickstart",
        "next-token loss after memories (nats per token)",
        "reached",
        lambda r: f"{r['metrics']['clm']['memory']['loss']:.3f}",
    ),
    ("quickstart_stages", "**all**", "seconds", lambda r: f"**{sum(r['times'].values()):.0f}**"),
    ("speed", "encode 64 contexts of 8 chunks of 32 tokens", 3, lambda r: f"{_ratio(r, 'encode'):.1f}"),
    (
        "fidelity",
        "free-running: texts without an error",
        "news",
        lambda r: f"{r['metrics']['fidelity, news']['memory']['text']['exact_match']:.1%}",
    ),
    (
        "probe",
        "MiniLM-L6, mean, 384",
        "32 tokens",
        lambda r: f"{_model(r, 'MiniLM-L6')['32']['embedding']['token_accuracy']:.1%}",
    ),
]


def _ratio(record: dict[str, Any], name: str) -> float:
    return record["metrics"][name]["ratio"]["median"]


def _model(record: dict[str, Any], name: str) -> dict[str, Any]:
    return next(model["lengths"] for model in record["metrics"]["models"] if model["name"] == name)


@pytest.mark.parametrize(
    ("name", "row", "column", "value"), VALUES, ids=lambda value: "" if callable(value) else str(value)[:40]
)
def test_a_cell_shows_its_record(name: str, row: str, column: str | int, value: Callable[[dict[str, Any]], str]):
    assert make(name).cell(row, column).startswith(value(load(render.TABLES[name].records[0])))


def test_goals_of_the_main_job_are_those_asked_for():
    """Just met, then just missed, one at a time."""
    record = load("quickstart")
    record = changed(record, "metrics.clm.memory.loss", record["metrics"]["clm"]["no_memory_model"]["loss"] - 1e-4)
    tokens, rows = (record["metrics"]["blank_copy"]["memory"][key] for key in ("num_tokens", "num_rows"))
    edges: list[tuple[str, Any, Any]] = [
        ("times", {"all": 1200.0}, {"all": 1201.0}),
        ("metrics.autoencoder.memory.token_accuracy", 0.99, 0.9899),
        ("recipe.stages", *([{"name": "autoencoder", "model": {"chunk_length": n}}] for n in (16, 15))),
        ("metrics.blank_copy.memory.token_accuracy", 0.95, 0.9499),
        ("metrics.blank_copy.memory.num_rows", rows, tokens // 16),
        ("metrics.blank_copy.no_memory.token_accuracy", 0.2499, 0.25),
        ("metrics.blank_copy.wrong_memory.token_accuracy", 0.2499, 0.25),
        ("metrics.copy.memory.token_accuracy", 0.98, 0.9799),
        ("metrics.clm.memory.loss", 3.0, 5.0),
        ("peak_memory_bytes.process", 4 * 2**30, 4 * 2**30 + 1),
        ("peak_memory_bytes.largest_child", 4 * 2**30, 4 * 2**30 + 1),
    ]
    for path, met, missed in edges:
        for value, number in ((met, 0), (missed, 1)):
            rows_shown = quality_tables.quickstart(changed(record, path, value)).rows
            assert sum("(missed)" in row[2] for row in rows_shown) == number, (path, value)


def test_a_starter_shows_free_running_beside_teacher_forced():
    record = load("starters")
    for row in make("starters").rows[1:]:
        if row[1].startswith("copy"):
            assert "of 32" in row[5] and "%" in row[4]
    memory = "metrics.starters.starter-tiny.splits"
    splits = copy.deepcopy(record["metrics"]["starters"]["starter-tiny"]["splits"])
    splits["wikinews, test"]["copy"]["memory"] |= {
        **{"exact_match": 0.2, "exact_match_interval": [0.1, 0.3], "num_generated_rows": 10}
    }
    shown = quality_tables.starters(changed(record, memory, splits)).rows
    free = next(row[5] for row in shown if row[0] == "starter-tiny" and row[1].startswith("copy"))
    assert free == "20% (10 to 30) of 10 (wikinews, test)", "the worst split that was measured"


def test_a_probe_that_read_nothing_is_marked_and_never_called_private():
    made = make("probe")
    assert "\\*" in made.cell("MiniLM-L6, mean, 384", "64 tokens")
    assert "\\*" not in made.cell("MiniLM-L6, mean, 384", "8 tokens")
    assert "lower bound" in made.note


def test_a_table_of_ragged_rows_is_refused():
    with pytest.raises(ValueError, match=r"rows of \[1, 2\] cells"):
        table.print_table(Table([["a", "b"], ["c"]]), [])


# ---------------------------------------------------------------------------------------------------------------------
# pages and figures


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository of two pages that ask for every table, with the committed records."""
    shutil.copytree(RESULTS, tmp_path / "benchmarks" / "results")
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"# Title\n\n{PAGE}\nThe end.\n")
    (tmp_path / "docs" / "page.md").write_text("<!-- table:quickstart -->\n<!-- end -->\n")
    return tmp_path


@pytest.fixture
def quick_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw two figures only: the rest is the same."""
    monkeypatch.setattr(render, "DRAWINGS", {name: render.DRAWINGS[name] for name in ("quickstart", "probe")})


def run(root: Path, *options: str) -> int:
    return render.main(["--root", str(root), *options])


@pytest.mark.usefixtures("quick_figures")
def test_a_check_writes_nothing_and_names_what_differs(root: Path, capsys: pytest.CaptureFixture[str]):
    before = (root / "README.md").read_text()
    assert run(root, "--check") == 1
    printed = capsys.readouterr()
    assert "README.md differs" in printed.out and "docs/figures/quickstart_*.png differs" in printed.out
    assert "python -m benchmarks.render" in printed.err
    assert (root / "README.md").read_text() == before and not (root / "docs" / "figures").exists()


@pytest.mark.usefixtures("quick_figures")
def test_pages_and_figures_are_made_from_the_records_once(root: Path, capsys: pytest.CaptureFixture[str]):
    assert run(root) == 0
    assert run(root, "--check") == 0
    readme = (root / "README.md").read_text()
    assert "old" not in readme.split("\n") and "Before quickstart." in readme and "The end." in readme
    assert "[Record](benchmarks/results/quickstart.json):" in readme
    assert "(../benchmarks/results/quickstart.json)" in (root / "docs" / "page.md").read_text()
    names = {path.name for path in (root / "docs" / "figures").iterdir()}
    assert names == {"quickstart_loss.png", "probe_accuracy.png"}

    times = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(root) == 0
    assert capsys.readouterr().out == ""
    assert times == {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("quick_figures")
def test_a_changed_number_record_or_drawing_is_found(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    run(root)
    page = root / "README.md"
    text = page.read_text()
    page.write_text(text.replace("99.7%", "99.9%"))
    assert run(root, "--check") == 1
    page.write_text(text)
    assert run(root, "--check") == 0
    record = load("quickstart")
    record["metrics"]["autoencoder"]["memory"]["token_accuracy"] = 0.5
    (root / "benchmarks" / "results" / "quickstart.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert run(root, "--check") == 1
    out = capsys.readouterr().out
    assert "README.md" in out and "docs/page.md" in out and "docs/figures/quickstart_*.png" in out
    assert "probe" not in out
    gone = root / "docs/figures/quickstart_gone.png"
    shutil.copy(root / "docs/figures/quickstart_loss.png", gone)
    assert run(root) == 0 and run(root, "--check") == 0
    assert not gone.exists(), "no code draws it"
    source = render.inspect.getsource
    monkeypatch.setattr(render.inspect, "getsource", lambda module: source(module) + "\nimport os\n# said better\n")
    assert run(root, "--check") == 0
    monkeypatch.setattr(render.inspect, "getsource", lambda module: source(module) + "\nLINE_WIDTH = 2\n")
    capsys.readouterr()
    assert run(root, "--check") == 1
    assert "docs/figures/quickstart_*.png" in capsys.readouterr().out


@pytest.mark.parametrize("name", render.DRAWINGS)
def test_every_figure_is_drawn_from_its_record(name: str, tmp_path: Path):
    names = drawings.DRAWINGS[name](load(name), tmp_path)
    assert names and all((tmp_path / drawn).stat().st_size > 3000 for drawn in names)


@pytest.mark.usefixtures("quick_figures")
def test_without_a_record_a_page_names_the_command(root: Path):
    shutil.rmtree(root / "benchmarks" / "results")
    assert run(root) == 0 and run(root, "--check") == 0
    assert "*Not measured yet: `python -m benchmarks.speed` writes the record.*" in (root / "README.md").read_text()
    assert not (root / "docs" / "figures").exists()


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- table:sped -->\n<!-- end -->\n", "asks for table 'sped' (did you mean speed?)"),
        ("<!-- table:speed -->\n", "table speed is not closed"),
        ("<!-- table:speed -->\n<!-- table:speed -->\n<!-- end -->\n", "table speed is not closed"),
    ],
)
def test_wrong_markers_are_refused_and_nothing_is_lost(
    root: Path, page: str, message: str, capsys: pytest.CaptureFixture[str]
):
    (root / "docs" / "page.md").write_text(page)
    assert run(root) == 2
    assert message in capsys.readouterr().err
    assert (root / "docs" / "page.md").read_text() == page


def test_a_record_that_lacks_a_number_is_named(root: Path, capsys: pytest.CaptureFixture[str]):
    record = load("quickstart")
    del record["metrics"]["clm"]["full_context_model"]
    (root / "benchmarks" / "results" / "quickstart.json").write_text(json.dumps(record))
    assert run(root) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: quickstart.json: the record has no full_context_model.loss")


@pytest.mark.usefixtures("quick_figures")
def test_what_the_benchmark_writes_can_be_rendered(root: Path):
    out = root / "benchmarks" / "results" / "speed.json"
    assert speed.main(["--quick", "--repetitions", "1", "--out", str(out)]) == 0
    assert run(root) == 0
    assert "| encode 2 contexts of 2 chunks of 4 tokens |" in (root / "README.md").read_text()


def test_committed_pages_and_figures_agree_with_the_committed_records():
    assert render.render(REPOSITORY, check=True) == []


def test_every_figure_stands_on_a_page_and_every_page_in_the_index():
    pages = {path.name: path.read_text("utf-8") for path in (REPOSITORY / "docs").glob("*.md")}
    text = "\n".join(pages.values())
    for figure in (REPOSITORY / "docs" / "figures").iterdir():
        assert f"figures/{figure.name})" in text, figure.name
    for page in pages.keys() - {"README.md"}:
        assert f"]({page})" in pages["README.md"], page


def test_committed_records_are_whole_and_full_sized():
    for path in RESULTS.glob("*.json"):
        record = read_json(path)
        assert record["run"]["status"] == "success", path.name
        assert record["code"]["commit"] and record["hardware"]["threads"], path.name
        assert not record.get("quick", False), path.name
