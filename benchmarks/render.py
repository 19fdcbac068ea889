"""Tables and figures from records: what README and docs show is what `benchmarks/results/*.json` say.

```bash
python -m benchmarks.render            # rewrite tables between markers, draw figures into docs/figures
python -m benchmarks.render --check    # exit status 1 if a page or figure differs from the records
```

A page asks for a table by two lines, `<!-- table:NAME -->` and `<!-- end -->`; what stands between them is replaced.
`TABLES` lists the names. A record `benchmarks/results/X.json` has the form of the file that the benchmark, or
`python -m training.run`, wrote.
"""

import argparse
import hashlib
import inspect
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

import training.records.figures
from benchmarks import cost_tables, drawings, quality_tables, score_tables, smollm2_tables, store_tables
from benchmarks.drawings import DRAWINGS
from benchmarks.table import Record, Table, print_table, source
from training.places import REPOSITORY
from training.recipes.strict_yaml import nearest
from training.records.record import data_digest, read_json

PAGES = ("README.md", "docs/*.md", "benchmarks/README.md", "configuration/README.md")
BLOCK = re.compile(
    # No second opening inside: a block that was left open must not swallow the next one.
    r"^<!-- table:(?P<name>[\w-]+) -->\n(?P<body>(?:(?!^<!-- table:).)*?)^<!-- end -->$",
    re.MULTILINE | re.DOTALL,
)
OPENING = re.compile(r"^<!-- table:([\w-]+) -->$", re.MULTILINE)
STAMP = "record"


@dataclass(frozen=True)
class Entry:
    """A table's name on a page stands for this.

    Attributes:
        records (`tuple[str, ...]`): Names of the records it is made from.
        make (`Callable`): Records to [`Table`].
        command (`str`): Writes the first record.
        lines (`Callable`, *optional*): In the place of `make`: record and link to lines of Markdown.
    """

    records: tuple[str, ...]
    make: Callable[..., Table] | None
    command: str
    lines: Callable[[Record, str], list[str]] | None = None


def _entries(record: str, command: str, *tables: Callable[..., Table]) -> dict[str, Entry]:
    """Tables of one record, named by their functions."""
    return {table.__name__: Entry((record,), table, command) for table in tables}


_QUICKSTART = "python -m training.run configuration/recipes/quickstart.yaml"
TABLES: dict[str, Entry] = {
    **_entries(
        "quickstart",
        _QUICKSTART,
        quality_tables.quickstart,
        quality_tables.quickstart_stages,
        quality_tables.quickstart_sample,
    ),
    **_entries("starters", "python -m benchmarks.starters", quality_tables.starters, quality_tables.works),
    "reproduced": Entry(("quickstart", "starters", "rolling"), quality_tables.reproduced, _QUICKSTART),
    **_entries("probe", "python -m training.probe", quality_tables.probe),
    **_entries("fidelity", "python -m training.evaluate runs/quickstart/hub", quality_tables.fidelity),
    **_entries(
        "smollm2",
        "python -m benchmarks.smollm2 runs/smollm2/hub --questions xquad_en.jsonl.gz",
        smollm2_tables.smollm2_continue,
        smollm2_tables.smollm2_gain,
        smollm2_tables.smollm2_copy,
        smollm2_tables.smollm2_questions,
        smollm2_tables.smollm2_first_token,
    ),
    **_entries(
        "scores",
        "python -m training.evaluate MODEL --suite benchmarks --data FOLDER",
        score_tables.scores,
        score_tables.retention,
        score_tables.language_kept,
        score_tables.published,
    ),
    **_entries("presses", "python -m benchmarks.presses FOLDER", score_tables.presses),
    **_entries(
        "retrieval",
        "python -m benchmarks.retrieval model_cards/starter-tiny xquad_en.jsonl.gz",
        store_tables.retrieval,
    ),
    **_entries(
        "any_text",
        "python -m benchmarks.any_text model_cards/starter-tiny",
        store_tables.any_text,
        store_tables.formats,
    ),
    "store": Entry(("store", "store_million"), store_tables.store, "python -m benchmarks.store"),
    **_entries("workers", "python -m benchmarks.workers model_cards/starter-tiny TEXTS", store_tables.workers),
    **_entries("short_chunks", "python -m benchmarks.any_text starter-autoencoder-64", store_tables.short_chunks),
    **_entries("speed", "python -m benchmarks.speed", cost_tables.speed),
}


def render_page(text: str, page: Path, root: Path) -> str:
    """Fill the tables of a page.

    Args:
        text (`str`): The page.
        page (`Path`): Where it stands: links to records are relative to it.
        root (`Path`): The repository.

    Raises:
        ValueError: If a marker names no table or is not closed, or a record lacks what a table shows.
    """

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"{page.name} asks for table {name!r}{nearest(name, list(TABLES))}; known: {known()}")
        body = "\n".join(table_lines(TABLES[name], page, root))
        return f"<!-- table:{name} -->\n{body}\n<!-- end -->"

    closed = {match.start() for match in BLOCK.finditer(text)}
    for match in OPENING.finditer(text):
        if match.start() not in closed:
            raise ValueError(f"{page.name}: table {match[1]} is not closed; write <!-- end --> on a line of its own")
    return BLOCK.sub(fill, text)


def known() -> str:
    """Names of the tables, for messages."""
    return ", ".join(TABLES)


def table_lines(entry: Entry, page: Path, root: Path) -> list[str]:
    """Lines of a table, or the command that would write its record."""
    sources = []
    for name in entry.records:
        path = root / "benchmarks" / "results" / f"{name}.json"
        record = read_json(path)
        if record is None:
            return [f"*Not measured yet: `{entry.command}` writes the record.*"]
        sources.append((record, Path(os.path.relpath(path, page.parent)).as_posix()))
    try:
        if entry.lines is not None:
            *before, last = entry.lines(*sources[0])
            return [*before, f"{last} {source(*sources[0])}"]
        assert entry.make is not None
        return print_table(entry.make(*(record for record, _ in sources)), sources)
    except ValueError as error:
        raise ValueError(f"{', '.join(f'{name}.json' for name in entry.records)}: {error}") from error


def find_pages(root: Path) -> Iterator[Path]:
    """Yield the pages that may hold tables."""
    for pattern in PAGES:
        yield from sorted(root.glob(pattern))


def stamp_of(record: Record) -> str:
    """Fingerprint of a record and of the code that draws figures, so that a change of either draws them again.

    Comments, blank lines and imports count for nothing: where a function is imported from changes no figure.
    """
    lines = [
        line.strip()
        for module in (drawings, training.records.figures)
        for line in inspect.getsource(module).splitlines()
        if line.strip() and not line.startswith(("import ", "from ", "#"))
    ]
    code = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return f"{data_digest(record)} {code[:16]}"


def figure_path(root: Path, record: str, name: str) -> Path:
    """Where a figure of a record stands."""
    return root / "docs" / "figures" / f"{record}_{name}"


def render_figures(root: Path, *, check: bool) -> list[str]:
    """Draw the figures that are missing or older than their record or their code; returns their names."""
    changed = []
    for name, draw in DRAWINGS.items():
        record = read_json(root / "benchmarks" / "results" / f"{name}.json")
        if record is None:
            continue
        stamp = stamp_of(record)
        present = sorted(figure_path(root, name, "x").parent.glob(f"{name}_*.png"))
        if present and all(read_stamp(path) == stamp for path in present):
            continue
        if check:
            changed.append(f"docs/figures/{name}_*.png")
            continue
        with tempfile.TemporaryDirectory() as folder:
            names = draw(record, Path(folder))
            for path in {*present} - {figure_path(root, name, drawn) for drawn in names}:
                path.unlink()  # drawn by an older version, and by none any more
            for drawn in names:
                path = figure_path(root, name, drawn)
                write_stamped(Path(folder) / drawn, path, stamp)
                changed.append(path.relative_to(root).as_posix())
    return changed


def read_stamp(path: Path) -> str | None:
    """Return what a figure says it was drawn from."""
    with Image.open(path) as image:
        return image.info.get(STAMP)


def write_stamped(drawn: Path, path: Path, stamp: str) -> None:
    """Copy a figure with its stamp in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = PngInfo()
    text.add_text(STAMP, stamp)
    with Image.open(drawn) as image:
        # A palette of 256 colours is a third of the size and looks the same for lines and text.
        image.convert("RGB").quantize(256).save(path, pnginfo=text, optimize=True)


def render(root: Path, *, check: bool = False) -> list[str]:
    """Bring pages and figures up to date, or only find those that are not.

    Args:
        root (`Path`): The repository.
        check (`bool`): Write nothing.

    Returns:
        `list[str]`: Pages and figures that were, or would be, changed.

    Raises:
        ValueError: If a marker or a record is wrong.
    """
    changed = []
    for page in find_pages(root):
        text = page.read_text(encoding="utf-8")
        filled = render_page(text, page, root)
        if filled != text:
            changed.append(page.relative_to(root).as_posix())
            if not check:
                page.write_text(filled, encoding="utf-8")
    return changed + render_figures(root, check=check)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.render",
        description="Fill the tables of README and docs from benchmarks/results/*.json and draw docs/figures.",
        epilog=f"tables: {known()}",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something differs")
    parser.add_argument("--root", default=str(REPOSITORY), help="folder with README.md, docs and benchmarks/results")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 1 if `--check` found a difference, 2 for a user's mistake."""
    options = build_parser().parse_args(arguments)
    try:
        changed = render(Path(options.root), check=options.check)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in changed:
        print(f"{name} differs from the records" if options.check else f"{name} written")
    if options.check and changed:
        print("run python -m benchmarks.render", file=sys.stderr)
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
