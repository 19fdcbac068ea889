"""Everything that a page prints runs: README, docs, guides and cards, block by block, on the models that ship.

A block runs unless the line before it is `<!-- not run: REASON -->` (it is then parsed only) or a `ci:` marker (then
`.ci/run` runs it). The Python blocks of a page share their names, as they would in the reader's session.
"""

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for pattern in (
        "*.md",
        "docs/**/*.md",
        "configuration/*.md",
        "benchmarks/*.md",
        "model_cards/*/README.md",
    )
    for page in ROOT.glob(pattern)
)
CORPORA = sorted(ROOT.glob("training/**/corpora/*/README.md"))
LANGUAGES = ("python", "bash", "shell")
COMMAND = re.compile(r"^\s*(?:accelerate launch .*?-m|python -m) ((?:training|benchmarks)\.\w+)(?: (.*))?$", re.M)
FENCE = re.compile(r"^(?:<!-- (?P<marker>[^\n]*?) -->\s*\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """A fenced block: its language, its text, the marker before it, and the line on which it begins."""

    language: str
    code: str
    marker: str
    line: int

    @property
    def runs(self) -> bool:
        return not self.marker.startswith(("not run: ", "ci:"))


def blocks_of(page: Path, *languages: str) -> list[Block]:
    text = page.read_text("utf-8")
    found = [
        Block(match["language"], match["code"], match["marker"] or "", text[: match.start("code")].count("\n") + 1)
        for match in FENCE.finditer(text)
    ]
    return [block for block in found if block.language in languages]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder like a fresh checkout: what is tracked is linked, what a block writes under runs/ is its own."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in sorted({line.split("/")[0] for line in tracked.splitlines()}):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


# Snippets of cards are run by tests/test_starters.py, where this package cannot be imported.
RUN = [page for page in PAGES if (ROOT / "model_cards") not in page.parents]
RUN = [page for page in RUN if any(block.runs for block in blocks_of(page, *LANGUAGES))]


@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_the_blocks_of_a_page_run_in_order_and_print_what_it_shows(page: Path, checkout: Path) -> None:
    session: list[str] = []  # the reader's Python session so far
    shown, before = [], ""  # what the page says that it prints, right after the code
    for block in blocks_of(page, *LANGUAGES, "text"):
        if block.language == "text":
            shown += [block.code] * (before == "python")
        elif block.runs and block.language == "python":
            session.append(f"\n# {name_of(page)}, line {block.line}\n{block.code}")
        elif block.runs:
            run(["bash", "-euo", "pipefail", "-c", block.code], checkout)
        before = block.language
    printed = run([sys.executable, "-c", "".join(session)], checkout) if session else ""
    for text in shown:
        assert text in printed


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_that_are_not_run_can_be_parsed(page: Path) -> None:
    for block in blocks_of(page, *LANGUAGES):
        if block.language == "python":
            ast.parse(block.code, f"{name_of(page)}:{block.line}")
            continue
        subprocess.run(["bash", "-n", "-c", block.code], check=True)
        for module, words in COMMAND.findall(block.code.replace("\\\n", " ").replace("&&", "\n")):
            if hasattr(command := importlib.import_module(module), "build_parser"):
                command.build_parser().parse_args(shlex.split(words, comments=True))


def commands_after(marker: str) -> list[str]:
    """Lines of the README's block after a marker, as `.ci/run` takes them."""
    blocks = [block for block in blocks_of(ROOT / "README.md", "bash") if block.marker == marker]
    assert len(blocks) == 1, f"README.md has {len(blocks)} blocks after <!-- {marker} -->"
    return [line for line in blocks[0].code.splitlines() if line.strip()]


def test_ci_takes_its_commands_from_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    for marker in ("ci:setup", "ci:main", "ci:test"):
        assert f"readme_block {marker}" in script and commands_after(marker)
    assert 'pip install -c constraints.txt -e ".[train,dev]"' in "\n".join(commands_after("ci:setup"))
    assert commands_after("ci:test")[-1].startswith("python -m pytest")


def test_the_main_job_runs_a_recipe_that_ships() -> None:
    words = [word for line in commands_after("ci:main") for word in shlex.split(line, comments=True)]
    assert words[:3] == ["python", "-m", "training.run"]
    recipe = ROOT / next(word for word in words if word.endswith(".yaml"))
    assert recipe.is_file() and recipe.with_name("debug_cpu.yaml").is_file()


@pytest.mark.parametrize("page", [*PAGES, *CORPORA], ids=name_of)
def test_modules_that_a_page_names_exist(page: Path) -> None:
    for module in re.findall(r"python -m ((?:training|benchmarks)(?:\.\w+)+)", page.read_text("utf-8")):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module


@pytest.mark.parametrize("page", [*PAGES, *CORPORA], ids=name_of)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text("utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        place = target.partition("#")[0]
        assert not place or "://" in place or (page.parent / place).exists(), target
