"""What README and docs show is what the records say."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import render, snippet, speed
from benchmarks.measure import fit_exponent, spread
from training.record import read_json
from training.strict_yaml import REPOSITORY

CODE = {"commit": "0123456789abcdef", "dirty": False, "versions": {"torch": "2.13.0"}}
HARDWARE = {"device": "cpu", "cpu": "Some CPU", "cores": 2, "threads": 2, "processes": 1}
RUN = {"created_at": "2026-01-02T03:04:05+00:00", "status": "success"}


def condition(accuracy: float, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "token_accuracy": accuracy,
        "token_accuracy_interval": [accuracy - 0.001, accuracy + 0.001],
        "loss": loss,
        "num_rows": 10,
        "num_tokens": 1280,
        "token_accuracy_by_position": [accuracy] * 32,
        **more,
    }


def controlled(accuracy: float, **more: Any) -> dict[str, Any]:
    return {"memory": condition(accuracy, **more), "wrong_memory": condition(0.012), "no_memory": condition(0.034)}


def quickstart_record() -> dict[str, Any]:
    series = [
        {"step": 1, "reconstruction_loss": 7.0, "reconstruction_token_accuracy": 0.01},
        {"step": 9, "reconstruction_loss": 1.0, "reconstruction_token_accuracy": 0.8},
    ]
    losses = {"memory": 3.21, "no_memory_model": 3.45, "full_context_model": 3.05}
    return {
        "run": RUN,
        "code": CODE,
        "hardware": HARDWARE,
        "recipe": {
            "stages": [{"name": "autoencoder", "model": {"chunk_length": 32}}],
            "evaluation": {"autoencoder": "autoencoder"},
        },
        "stages": {
            "autoencoder": {"steps": 1200, "text_tokens": 2457600, "text_tokens_per_second": 6789.4, "series": series}
        },
        "times": {"tokenizer and text": 12.4, "stage autoencoder": 361.0, "evaluation": 40.0},
        "metrics": {
            "autoencoder": controlled(0.9912),
            "blank_copy": controlled(0.9634),
            "copy": controlled(0.9871, exact_match=0.75, num_generated_rows=32),
            "clm": {name: condition(0.3, loss) for name, loss in losses.items()} | {"share_of_gap_recovered": 0.6},
        },
        "peak_memory_bytes": {"process": 2 * 2**30, "largest_child": 3 * 2**29},
        "sample": {
            "text": "the cat",
            "num_tokens": 2,
            "num_memories": 1,
            "memory_width": 8,
            "memories": [{"norm": 1.5, "first": [0.1, -0.2]}],
            "tokens": [["the", True], [" dog", False]],
            "num_right": 1,
        },
    }


def comparison(given: dict[str, int]) -> dict[str, Any]:
    seconds = {"fast": [0.1, 0.1, 0.1], "plain": [0.3, 0.4, 0.5]}
    return {
        "given": given,
        "seconds": seconds,
        "spread": {name: spread(values) for name, values in seconds.items()},
        "ratio": spread([3.0, 4.0, 5.0]),
    }


def scaling(chunk_length: int, exponent: float) -> dict[str, Any]:
    windows = [2, 4, 8]
    cost = {
        "spread": {str(n): spread([0.5 * n**exponent]) for n in windows},
        "fit": fit_exponent(windows, [0.5 * n**exponent for n in windows]),
    }
    given = {"chunk_length": chunk_length, "window_length": 256, "memories_per_chunk": 1, "windows": windows}
    return {"given": given, "train_step": cost, "read": cost}


def speed_record() -> dict[str, Any]:
    return {
        "run": RUN,
        "code": CODE,
        "hardware": HARDWARE,
        "repetitions": 3,
        "metrics": {
            "encode": comparison({"contexts": 64, "chunks": 8, "chunk_length": 32}),
            "train_step": comparison({"texts": 16, "tokens": 256, "windows": 4}),
            "generate": comparison({"texts": 1, "prompt_tokens": 96, "new_tokens": 96, "roll_overs": 1}),
            "scaling": {**scaling(256, 1.0), "target_exponent": 1.1},
            "scaling_short_chunks": scaling(16, 1.25),
        },
        "peak_memory_bytes": {"process": 2**30},
    }


def time_record() -> dict[str, Any]:
    def side(seconds: float, steps: int, accuracy: float) -> dict[str, Any]:
        curve = [
            {"step": steps // 2, "seconds": seconds / 2, "token_accuracy": accuracy / 2},
            {"step": steps, "seconds": seconds, "token_accuracy": accuracy},
        ]
        return {"steps": steps, "seconds": seconds, "token_accuracy": accuracy, "curve": curve}

    return {
        "run": RUN,
        "code": CODE,
        "hardware": HARDWARE,
        "target": 0.9,
        "given": {"recipe": "quickstart", "tokens_per_memory": 32.0, "baseline": {"learning_rate": 5e-4}},
        "metrics": {
            "recipe": side(100.0, 400, 0.903),
            "baseline": side(1051.0, 1000, 0.61),
            "ratio": 10.51,
            "is_lower_bound": True,
        },
    }


def use_record() -> dict[str, Any]:
    return {
        "run": RUN,
        "code": CODE,
        "hardware": HARDWARE,
        "snippet": "print('the output')\n",
        "output": "the output\n",
    }


def probe_record() -> dict[str, Any]:
    def cell(accuracy: float) -> dict[str, Any]:
        return condition(accuracy, information_ratio=0.5, numbers_per_text=64, unknown_test_tokens=128,
                         bits_per_byte=1.234)  # fmt: skip

    lengths = {length: {"embedding": cell(0.5), "shuffled": cell(0.04)} for length in ("8", "16")}
    decoder = {"model_type": "masked_mixer", "hidden_size": 256, "num_hidden_layers": 2, "expansion": "unroll"}
    return {
        "run": RUN,
        "code": CODE,
        "hardware": HARDWARE,
        "recipe": {"decoder": decoder, "budget": {"steps": 100, "batch_tokens": 1024}},
        "metrics": {"models": [{"name": "some model", "position": "mean", "lengths": lengths}]},
        "seconds": 120.0,
    }


def written(gain: float) -> dict[str, Any]:
    return condition(0.9, gain_nats=gain, gain_nats_interval=[gain - 1, gain + 1], exact_match=0.5, num_texts=4,
                     curve=[{"step": step, "loss": 1 / (step + 1)} for step in (0, 10)])  # fmt: skip


def ceiling_record() -> dict[str, Any]:
    parts = {name: written(gain) for name, gain in (("one_pass", 90.0), ("refined", 95.0), ("optimised", 99.0))}
    result = {**parts, "ceiling": written(100.0), "percent_of_nats": 90.0, "percent_of_nats_interval": [88.0, 92.0]}
    result |= {"num_vectors": 2, "objective": "blank_copy", "without": {"loss": 3.0}}
    recipe = {"recipe": {"steps": 120}}
    return {"run": RUN, "code": CODE, "hardware": HARDWARE, **recipe, "metrics": {"against_ceiling": result}}


def capacity_record() -> dict[str, Any]:
    result = {"num_vectors": 1, "by_length": {"8": written(20.0), "16": written(30.0)}}
    recipe = {"recipe": {"steps": 250}}
    return {"run": RUN, "code": CODE, "hardware": HARDWARE, **recipe, "metrics": {"capacity": result}}


def retrieval_record() -> dict[str, Any]:
    found = {"num_texts": 512, "chance": 1 / 512, "top_1": 0.25, "top_1_interval": [0.2, 0.3], "recall_at_10": 0.5}
    kinds = {"ngram_7": found, "bag_7": {**found, "top_1": 0.125}}
    models = [{"name": "causal", "before": kinds, "after": {**kinds, "ngram_7": {**found, "top_1": 0.75}}}]
    recipe = {"query": "ngram", "query_tokens": 7, "length": 16, "steps": 100, "batch_tokens": 1024}
    return {"run": RUN, "code": CODE, "hardware": HARDWARE, "recipe": recipe, "metrics": {"models": models},
            "seconds": 120.0}  # fmt: skip


def fidelity_record() -> dict[str, Any]:
    share = {"exact_match": 0.5, "character_precision": 0.9, "digits_kept": 0.8, "names_kept": 0.7}
    text = share | {f"{name}_interval": [value - 0.1, value + 0.1] for name, value in share.items()}
    text |= {"bleu": 86.54, "num_texts": 32, "num_digits": 5, "num_dates": 0, "num_names": 20, "dates_kept": None}
    parts = {"start": 0.91, "middle": 0.92, "end": 0.93, "boundary": 0.94}
    more = {
        "text": text,
        "by_part": parts,
        "bits_per_byte": 0.0155,
        "bits_per_byte_with_memory": 164.6,
        "num_rows": 64,
    }
    controls = {"wrong_memory": condition(0.01), "no_memory": condition(0.2), "random_tokens": condition(0.6)}
    metrics = {"fidelity": {"memory": condition(0.97, **more), **controls}}
    metrics["fidelity, news"] = metrics["fidelity"] | {"memory": condition(0.88, **more)}
    return {"run": RUN, "code": CODE, "hardware": HARDWARE, "metrics": metrics}


RECORDS = {
    "use": use_record,
    "quickstart": quickstart_record,
    "speed": speed_record,
    "time_to_accuracy": time_record,
    "probe": probe_record,
    "ceiling": ceiling_record,
    "capacity": capacity_record,
    "retrieval": retrieval_record,
    "fidelity": fidelity_record,
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository of two pages that ask for every table, with all records."""
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    for name, build in RECORDS.items():
        write(tmp_path, name, build())
    blocks = [f"Before {name}.\n\n<!-- table:{name} -->\nold\n<!-- end -->\n" for name in render.TABLES]
    (tmp_path / "README.md").write_text("# Title\n\n" + "\n".join(blocks) + "\nThe end.\n")
    (tmp_path / "docs" / "page.md").write_text("<!-- table:speed -->\n<!-- end -->\n")
    return tmp_path


def write(root: Path, name: str, record: dict[str, Any]) -> None:
    (root / "benchmarks" / "results" / f"{name}.json").write_text(json.dumps(record))


def run(root: Path, *options: str) -> int:
    return render.main(["--root", str(root), *options])


def tables(page: Path, root: Path) -> str:
    return render.render_page(page.read_text(), page, root)


def test_pages_and_figures_are_made_from_the_records_and_checked(root: Path, capsys: pytest.CaptureFixture[str]):
    before = (root / "README.md").read_text()
    assert run(root, "--check") == 1
    printed = capsys.readouterr()
    assert "README.md differs" in printed.out and "docs/figures/speed_*.png differs" in printed.out
    assert "python -m benchmarks.render" in printed.err
    assert (root / "README.md").read_text() == before and not (root / "docs" / "figures").exists()

    assert run(root) == 0
    assert run(root, "--check") == 0
    readme = (root / "README.md").read_text()
    for line in (
        "| autoencoder, token accuracy, one vector per 32 tokens | 99 % | "
        "[99.1% (99.0 to 99.2)](benchmarks/results/quickstart.json) |",
        "| blank copy of 4 chunks through frozen memories, token accuracy | 95 % | "
        "[96.3% (96.2 to 96.4)](benchmarks/results/quickstart.json) |",
        "| the same with another text's memories, and with none | under 25 % | "
        "[1.2%, 3.4%](benchmarks/results/quickstart.json) |",
        "| whole run, package download not counted | 20 min | [6.9 min](benchmarks/results/quickstart.json) |",
        "| copy written freely, rows without an error | reported | [75% of 32](benchmarks/results/quickstart.json) |",
        "| causal loss with memory (nats per token) | under no memory | [3.210; no memory 3.450, full context 3.050: "
        "60% of the gap recovered](benchmarks/results/quickstart.json) |",
        "| peak memory of a process | 4 GiB | [2.0 GiB](benchmarks/results/quickstart.json) |",
        "| stage autoencoder | 361 | 1,200 | 2,457,600 | 6,789 |",
        "| **all** | **413** |  |  |  |",
        "| encode 64 contexts of 8 chunks of 32 tokens | 400 ms | 100 ms | "
        "[4.0](benchmarks/results/speed.json) (3.5 to 4.5) |",
        "| training step, 256 tokens per memory | 1.00 s | 2.00 s | 4.00 s | "
        "[1.000](benchmarks/results/speed.json) (at most 1.1) | 1.000 |",
        "| float32, AdamW at 0.0005, plain loop | 1,000 | 1051 | 1.05 s | 61.0% |",
        "| recipe quickstart as shipped | 400 | 100 | 250 ms | 90.3% |",
        "[Record](benchmarks/results/speed.json): commit 0123456, 2 threads on Some CPU, 2026-01-02.",
        "| some model, mean, 64 | 90% | [50.0%](benchmarks/results/probe.json) (49.9 to 50.1), 0.50, 1.23 | "
        "[50.0%](benchmarks/results/probe.json) (49.9 to 50.1), 0.50, 1.23 |",
        "| some model, another text's embedding | 90% | 4.0% (3.9 to 4.1), 0.50, 1.23 | "
        "4.0% (3.9 to 4.1), 0.50, 1.23 |",
        "| the encoder's, one pass | 90.0% | 50% | 1.0000 | 90.0 (89.0 to 91.0) |",
        "| gain over none (nats a text) | 20.0 | 30.0 |",
        "| causal, trained | [75.0%](benchmarks/results/retrieval.json) (20.0 to 30.0) | 50.0% | "
        "[12.5%](benchmarks/results/retrieval.json) (20.0 to 30.0) | 50.0% |",
        "| | books | news |",
        "| digits kept | 80.0% (70.0 to 90.0) of 5 | 80.0% (70.0 to 90.0) of 5 |",
        "| dates kept | none there | none there |",
        "  the[ dog]",
        "the output",
        "Before speed.",
        "The end.",
    ):
        assert line in readme.splitlines() or any(one.endswith(line) for one in readme.splitlines()), line
    assert "reaches [90.0 %](benchmarks/results/ceiling.json) (88.0 to 92.0) of the ceiling's gain" in readme
    assert "More than [10.5 times](benchmarks/results/time_to_accuracy.json) faster to 90% of the" in readme
    assert "old" not in readme.split("\n") and "missed" not in readme
    assert "(../benchmarks/results/speed.json)" in (root / "docs" / "page.md").read_text()

    names = {path.name for path in (root / "docs" / "figures").iterdir()}
    assert names == {
        "quickstart_loss.png",
        "quickstart_token_accuracy.png",
        "quickstart_accuracy_by_position.png",
        "speed_scaling.png",
        "time_to_accuracy_curves.png",
        "probe_accuracy.png",
        "ceiling_curve.png",
        "capacity_curve.png",
    }
    assert all((root / "docs" / "figures" / name).stat().st_size > 3000 for name in names)

    times = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run(root) == 0
    assert capsys.readouterr().out == ""
    assert times == {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_a_changed_number_or_record_is_found(root: Path, capsys: pytest.CaptureFixture[str]):
    run(root)
    page = root / "README.md"
    text = page.read_text()
    page.write_text(text.replace("99.1%", "99.9%"))
    assert run(root, "--check") == 1
    page.write_text(text)
    assert run(root, "--check") == 0
    record = speed_record()
    record["metrics"]["encode"]["ratio"]["median"] = 4.5
    write(root, "speed", record)
    capsys.readouterr()
    assert run(root, "--check") == 1
    out = capsys.readouterr().out
    assert "README.md" in out and "docs/page.md" in out and "docs/figures/speed_*.png" in out
    assert "quickstart" not in out and "time_to_accuracy" not in out
    assert run(root) == 0 and run(root, "--check") == 0


def test_a_figure_that_misses_its_goal_says_so(root: Path):
    record = quickstart_record()
    record["metrics"]["copy"]["memory"].update(condition(0.97))
    record["metrics"]["blank_copy"]["wrong_memory"] = condition(0.3)
    record["times"]["evaluation"] = 1000.0
    write(root, "quickstart", record)
    slow, short = speed_record(), time_record()
    slow["metrics"]["scaling"].update(scaling(256, 1.2))
    slow["code"] = {**CODE, "dirty": True}
    short["metrics"].update(ratio=8.0, is_lower_bound=False)
    write(root, "speed", slow)
    write(root, "time_to_accuracy", short)
    readme, page = (tables(root / name, root) for name in ("README.md", "docs/page.md"))
    missed = [line for line in readme.splitlines() if "missed" in line]
    starts = (
        "| whole run",
        "| the same with another",
        "| copy, token",
        "| training step, 256",
        "| reading, 256",
        "[8.0",
    )
    assert len(missed) == 6 and all(line.startswith(start) for line, start in zip(missed, starts, strict=True))
    assert "with changes that are not committed" in page


def test_goals_of_the_main_job_are_those_asked_for():
    """Just met, then just missed, one at a time."""
    edges: list[tuple[str, Any, Any]] = [
        ("times", {"all": 1200.0}, {"all": 1201.0}),
        ("metrics.autoencoder.memory.token_accuracy", 0.99, 0.9899),
        ("recipe.stages", *([{"name": "autoencoder", "model": {"chunk_length": n}}] for n in (16, 15))),
        ("metrics.blank_copy.memory.token_accuracy", 0.95, 0.9499),
        ("metrics.blank_copy.memory.num_tokens", 640, 320),
        ("metrics.blank_copy.no_memory.token_accuracy", 0.2499, 0.25),
        ("metrics.blank_copy.wrong_memory.token_accuracy", 0.2499, 0.25),
        ("metrics.copy.memory.token_accuracy", 0.98, 0.9799),
        ("metrics.clm.memory.loss", 3.4499, 3.45),
        ("peak_memory_bytes.process", 4 * 2**30, 4 * 2**30 + 1),
        ("peak_memory_bytes.largest_child", 4 * 2**30, 4 * 2**30 + 1),
    ]
    for path, met, missed in edges:
        for value, number in ((met, 0), (missed, 1)):
            record = copy.deepcopy(quickstart_record())
            *keys, last = path.split(".")
            place = record
            for key in keys:
                place = place[key]
            place[last] = value
            assert [row.met for row in render.quickstart_rows(record)].count(False) == number, (path, value)


def test_without_a_record_a_page_names_the_command(root: Path):
    for path in (root / "benchmarks" / "results").iterdir():
        path.unlink()
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
    record = quickstart_record()
    del record["metrics"]["clm"]["full_context_model"]
    write(root, "quickstart", record)
    assert run(root) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: quickstart.json: the record has no full_context_model.loss")


def test_what_the_benchmark_writes_can_be_rendered(root: Path):
    """The sample above may age; this record is fresh."""
    assert speed.main(["--quick", "--repetitions", "1", "--out", str(root / "benchmarks/results/speed.json")]) == 0
    assert "| encode 2 contexts of 2 chunks of 4 tokens |" in tables(root / "README.md", root)
    assert render.draw_speed(read_json(root / "benchmarks/results/speed.json"), root) == ["scaling.png"]


def test_committed_pages_and_figures_agree_with_the_committed_records():
    assert render.render(REPOSITORY, check=True) == []


def test_committed_records_are_whole_and_full_sized():
    for path in (REPOSITORY / "benchmarks" / "results").glob("*.json"):
        record = read_json(path)
        assert record["run"]["status"] == "success", path.name
        assert record["code"]["commit"] and record["hardware"]["threads"], path.name
        assert not record.get("quick", False), path.name


# ---------------------------------------------------------------------------------------------------------------------
# snippets


def test_the_readme_shows_what_its_present_snippet_printed():
    record = read_json(REPOSITORY / "benchmarks" / "results" / "use.json")
    code = snippet.find_snippet((REPOSITORY / "README.md").read_text(), "use")
    compile(code, "README.md", "exec")
    assert record is None or record["snippet"] == code, "run python -m benchmarks.snippet use"


def test_a_snippet_is_run_as_it_stands_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page, out = tmp_path / "page.md", tmp_path / "use.json"
    code = "from pathlib import Path\n\nprint(Path('README.md').exists(), 6 * 7)\n"
    page.write_text(f"text\n\n<!-- snippet:use -->\n```python\n{code}```\n\nmore\n\n```python\nraise\n```\n")
    assert snippet.main(["use", "--page", str(page), "--out", str(out)]) == 0
    record = read_json(out)
    assert record["snippet"] == code and record["output"] == "True 42\n"
    assert record["code"]["commit"] and str(tmp_path) not in out.read_text()
    assert render.use_table(record, "x")[:3] == ["```text", "True 42", "```"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- snippet:other -->\n```python\n1\n```\n", "no python block behind <!-- snippet:use -->"),
        ("<!-- snippet:use -->\n```python\n1 / 0\n```\n", "status 1: ZeroDivisionError: division by zero"),
    ],
)
def test_a_snippet_that_is_missing_or_fails_leaves_no_record(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "page.md").write_text(text)
    assert snippet.main(["use", "--page", str(tmp_path / "page.md"), "--out", str(tmp_path / "use.json")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "use.json").exists()
