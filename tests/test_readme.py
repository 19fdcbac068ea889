"""The README's commands exist and are the ones that CI runs; its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8") if (ROOT / "README.md").exists() else ""
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("training/corpora/*/README.md")])
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def block_after(marker: str) -> list[str]:
    """Commands of the code block that follows a marker, as `.ci/run` takes them."""
    found = re.search(rf"<!-- {marker} -->\s*\n```\w*\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    assert found, f"README.md has no code block after <!-- {marker} -->"
    return [line for line in found.group(1).splitlines() if line.strip()]


def test_the_install_command_takes_the_tested_versions():
    assert 'pip install -c constraints.txt -e ".[train,dev]"' in "\n".join(block_after("ci:setup"))


def test_the_main_job_runs_a_recipe_that_ships():
    words = [word for line in block_after("ci:main") for word in shlex.split(line, comments=True)]
    assert words[:3] == ["python", "-m", "training.run"]
    recipe = next(word for word in words if word.endswith(".yaml"))
    assert (ROOT / recipe).is_file()
    assert (ROOT / recipe).with_name("debug_cpu.yaml").is_file()


def test_ci_takes_its_commands_from_the_readme():
    script = (ROOT / ".ci" / "run").read_text("utf-8")
    assert all(f"readme_block {marker}" in script for marker in ("ci:setup", "ci:main", "ci:test"))


def test_the_test_command_ends_with_the_summary_of_pytest():
    assert block_after("ci:test")[-1].startswith("python -m pytest")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_modules_that_a_page_runs_exist(page):
    for module in re.findall(r"python -m ((?:training|benchmarks)(?:\.\w+)+)", page.read_text("utf-8")):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_within_the_repository_lead_somewhere(page):
    text = CODE.sub("", page.read_text("utf-8"))
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    for target in targets:
        if target and "://" not in target:
            assert (page.parent / target).exists(), target
