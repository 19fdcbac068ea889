"""The page on the architecture names what there is: files, functions, classes and fields of this repository."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "docs" / "architecture.md", ROOT / "CONTRIBUTING.md"]
# What stands in backticks and belongs to others: torch, transformers, SQLite, the shell, or a run that is to come.
FOREIGN = {"no_grad", "requires_grad", "inputs_embeds", "from .file import name", "memories.sqlite"}


def quoted(page: Path) -> list[str]:
    """Everything between single backticks, outside of code blocks."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", text)]


def tracked() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return listed.stdout.splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_folders_that_a_page_names_exist(page: Path) -> None:
    files = tracked()
    names = [name for name in quoted(page) if re.fullmatch(r"[\w./-]+(\.(py|md|yaml|toml|txt|json)|/)", name)]
    assert names
    for name in names:
        assert any(f"/{name.rstrip('/')}/" in f"/{file}/" for file in files), f"{page.name} names {name}: not here"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_functions_classes_and_fields_that_a_page_names_exist(page: Path) -> None:
    code = "\n".join(
        (ROOT / file).read_text("utf-8")
        for file in tracked()
        if file.endswith(".py") and file.split("/")[0] in ("modeling_memory", "training") and (ROOT / file).exists()
    )
    names = {name for name in quoted(page) if re.fullmatch(r"_?[A-Za-z]\w*([_.]\w+|[A-Z]\w*)(\(\w*\))?", name)}
    names = {name for name in names if not name.endswith((".py", ".md", ".toml", ".txt"))} - FOREIGN
    assert names
    for name in names:
        for part in re.split(r"\W+", name.rstrip("()")):
            assert re.search(rf"(def|class) {part}\b|^ *{part}\b.*[:=]|[\"']{part}\b", code, re.M), (page.name, name)
