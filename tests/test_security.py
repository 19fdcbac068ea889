"""A published folder runs no code but the package's, reads no pickle, opens no connection and writes nothing."""

import os
import socket
import subprocess
import sys

import pytest

from modeling_memory import MemoryProcessor
from tests.conftest import build_tiny_tokenizer
from tests.memory_models import CHUNK, WINDOW, build_model
from training.publishing.clean_process import Guard
from training.publishing.hub_folder import REPOSITORY, PublishError, write_hub_folder
from training.publishing.verification import verify_hub_folder

ATTACKS = {
    "connection": "import socket; socket.create_connection(('127.0.0.1', 9))",
    "write": "open('mark', 'w').close()",
    "folder": "import os; os.mkdir('mark')",
    "pickle": "import pickle; pickle.loads(pickle.dumps(pickle.PickleError))",
    "torch pickle": "import io, torch; torch.load(io.BytesIO(PICKLED), weights_only=False)",
    "process": "import subprocess; subprocess.run(['true'])",
    "system": "import os; os.system('touch mark')",
    "foreign code": "import sys; sys.path.insert(0, ''); import stranger; check_origins({'stranger'}, LIBRARIES)",
}


def test_a_guarded_process_stops_at_what_a_model_must_not_do(tmp_path):
    """The guard by itself, armed as it is before a folder is loaded; every attack is tried in one process."""
    (tmp_path / "stranger.py").write_text("")
    code = f"""
import io, os, pathlib, sys, torch
sys.path.insert(0, {str(REPOSITORY)!r})
from training.publishing.clean_process import Guard, check_origins
LIBRARIES = [pathlib.Path(os.__file__).parent]
buffer = io.BytesIO()
torch.save({{"model": torch.nn.Linear(1, 1)}}, buffer)
PICKLED = buffer.getvalue()
import pickle, socket, subprocess
sys.addaudithook(Guard([pathlib.Path("home")]))
for name, attack in {ATTACKS!r}.items():
    try:
        exec(attack)
    except (PermissionError, SystemExit) as error:
        print(f"{{name}}: {{error}}")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    found = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert found.keys() == ATTACKS.keys(), done.stdout + done.stderr
    for name, message in found.items():
        assert ("stranger was imported from" if name == "foreign code" else "loading must not do this") in message
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
    with (folder / "modeling_memory.py").open("a") as file:
        file.write("\nopen('left_behind.txt', 'w').close()\n")
    with pytest.raises(PublishError, match="loading must not do this: open"):
        verify_hub_folder(folder, model)
