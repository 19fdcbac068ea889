"""What a user's machine has that a test's process lacks: clean processes, installed packages, groups of processes."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from training.places import REPOSITORY


def run_clean(words: list[str], folder: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run Python in a folder, without what this process's environment says to Python and to the Hub's client."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment = {**kept, **environment, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)


def run_snippet(page: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run the first Python block of a page in a folder, as if our package were not installed, and without network."""
    snippet = re.search(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert snippet is not None
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, "-P", "-c", f"import sys; sys.modules['modeling_memory'] = None\n{snippet[1]}"],
        cwd=folder,
        env={**kept, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
        check=False,
    )


def write_metadata(place: Path, module: str, version: str) -> None:
    """Let a folder of modules look like one into which a distribution with this module was installed."""
    info = place / f"{module}-{version}.dist-info"
    info.mkdir()
    name = module.replace("_", "-")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "top_level.txt").write_text(f"{module}\n")
    (info / "RECORD").write_text(f"{module}/__init__.py,,\n")


def run_two(module: str, folder: Path) -> None:
    """Run a module as two processes, each of which calls [`be_one_of_two`]."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", module, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


def be_one_of_two(main: Callable[[Path], None]) -> None:
    """Run `main` with the folder on the command line, on one thread; leave when all have come so far."""
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
