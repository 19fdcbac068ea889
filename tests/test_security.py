"""A published folder runs no code but the package's, reads no pickle, opens no connection and writes nothing."""

import os
import socket
import subprocess
import sys

import pytest

from modeling_memory import MemoryProcessor
from tests.conftest import build_tiny_tokenizer
from tests.memory_models import CHUNK, WINDOW, build_model
from training.clean_process import Guard
from training.hub_folder import PublishError, write_hub_folder
from training.verification import verify_hub_folder


@pytest.mark.parametrize(
    "attack",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "open({mark!r}, 'w').close()",
        "import pickle; pickle.loads(pickle.dumps(pickle.PickleError))",
        "import subprocess; subprocess.run(['true'])",
        "import sys; sys.path.insert(0, {folder!r}); import stranger",
    ],
    ids=["connection", "write", "pickle", "process", "foreign code"],
)
def test_a_guarded_process_stops_at_what_a_model_must_not_do(attack, tmp_path):
    """The guard by itself, as it is armed before a folder is loaded."""
    (tmp_path / "stranger.py").write_text("")
    attack = attack.format(mark=str(tmp_path / "mark"), folder=str(tmp_path))
    code = (
        "import sys, os, pathlib, torch, transformers\n"
        "sys.path.insert(0, os.getcwd())\n"
        "from training.clean_process import Guard, check_origins\n"
        "before = set(sys.modules)\n"
        f"sys.addaudithook(Guard([pathlib.Path({str(tmp_path / 'home')!r})]))\n"
        f"{attack}\n"
        "check_origins(set(sys.modules) - before, [pathlib.Path(os.__file__).parent])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode, done.stdout
    last = done.stderr.strip().splitlines()[-1]
    assert "loading must not do this" in last or "stranger was imported from" in last
    assert not (tmp_path / "mark").exists()


def test_the_guard_lets_a_model_read_and_the_library_write_its_cache(tmp_path):
    guard = Guard([tmp_path])
    guard("open", (str(tmp_path / "a" / "code.py"), "w", 0))
    guard("open", ("/etc/hosts", "r", os.O_RDONLY))
    guard("open", (os.devnull, None, os.O_WRONLY))
    guard("os.mkdir", (str(tmp_path / "a"), 0o777, -1))
    guard("import", ("json", None, None, None, None))
    for event, arguments in (
        ("open", ("/etc/hosts", "a", 0)),
        ("open", (str(tmp_path) + "else/x", None, os.O_RDWR | os.O_CREAT)),
        ("os.remove", ("/etc/hosts", -1)),
        ("socket.connect", (socket.socket, ("127.0.0.1", 9))),
        ("pickle.find_class", ("os", "system")),
    ):
        with pytest.raises(PermissionError, match=f"loading must not do this: {event}"):
            guard(event, arguments)


def test_a_folder_whose_code_does_more_than_a_model_is_refused(tmp_path):
    """The whole way: code smuggled into a folder's modeling file is found when the folder is verified."""
    processor = MemoryProcessor(build_tiny_tokenizer(), chunk_length=CHUNK, window_length=WINDOW)
    model = build_model()
    folder = write_hub_folder(model, processor, tmp_path / "hub")
    mark = tmp_path / "mark"
    with (folder / "modeling_memory.py").open("a") as file:
        file.write(f"\nopen({str(mark)!r}, 'w').close()\n".replace(str(tmp_path), str(tmp_path)))
    with pytest.raises(PublishError, match="a place on this machine|loading must not do this: open"):
        verify_hub_folder(folder, model)
    text = (folder / "modeling_memory.py").read_text().replace(f"open({str(mark)!r}, 'w').close()", "")
    (folder / "modeling_memory.py").write_text(text + "\nopen('left_behind.txt', 'w').close()\n")
    with pytest.raises(PublishError, match="loading must not do this: open"):
        verify_hub_folder(folder, model)
    assert not mark.exists()
