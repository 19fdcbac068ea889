"""Folders with code of their own: each runs its own, in one process, also after a file was edited in place."""

import os
import re
import subprocess
import sys

import pytest

from modeling_memory import (
    MaskedMixerForCausalLM,
    MemoryAutoencoder,
    MemoryAutoencoderConfig,
    MemoryProcessor,
)
from tests.conftest import build_tiny_tokenizer, tiny_encoder_config
from tests.memory_models import CHUNK, WINDOW, build_model

# What each kind of model runs first, and files that it reaches only through others.
FILES = {
    "memory_encoder_decoder": ["modeling_memory.py", "memory_encoder.py", "memory_checkpoint.py"],
    "memory_autoencoder": ["modeling_memory_autoencoder.py", "memory_encoder.py", "modeling_masked_mixer.py"],
    "masked_mixer": ["modeling_masked_mixer.py", "memory_checkpoint.py"],
}
LOADER = """
import sys
sys.modules["modeling_memory"] = None
from pathlib import Path
from transformers import AutoModel, AutoModelForCausalLM
kind, *files = sys.argv[1:]
auto = AutoModel if kind == "memory_autoencoder" else AutoModelForCausalLM

def versions(folder):
    model = auto.from_pretrained(f"{folder}/model", trust_remote_code=True)
    package = type(model).__module__.rpartition(".")[0]
    return "".join(sys.modules[f"{package}.{file}"].VERSION for file in files)

found = [versions("A"), versions("B"), versions("A")]
path = Path(f"A/model/{files[-1]}.py")
path.write_text(path.read_text() + "\\nVERSION = 'C'\\n")
print(*found, versions("A"))
"""


def build(kind):
    mixer = tiny_encoder_config("masked_mixer")
    if kind == "masked_mixer":
        return MaskedMixerForCausalLM(mixer)
    if kind == "memory_autoencoder":
        return MemoryAutoencoder(MemoryAutoencoderConfig(encoder=mixer, decoder=mixer, chunk_length=CHUNK))
    return build_model()


@pytest.mark.parametrize("kind", FILES)
def test_two_folders_two_codes_one_process(kind, tmp_path):
    for version in ("A", "B"):
        folder = tmp_path / version / "model"
        build(kind).save_pretrained(folder)
        if kind == "memory_encoder_decoder":
            MemoryProcessor(build_tiny_tokenizer(), chunk_length=CHUNK, window_length=WINDOW).save_pretrained(folder)
        for file in FILES[kind]:
            with (folder / file).open("a") as code:
                code.write(f"\nVERSION = {version!r}\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    names = [file.removesuffix(".py") for file in FILES[kind]]
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOADER, kind, *names], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**environment, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    number = len(names)
    assert done.stdout.split() == ["A" * number, "B" * number, "A" * number, "A" * (number - 1) + "C"], done.stderr


@pytest.mark.parametrize("kind", FILES)
def test_a_saved_folder_holds_every_file_that_its_config_names(kind, tmp_path):
    build(kind).save_pretrained(tmp_path)
    for path in tmp_path.glob("*.py"):
        for name in re.findall(r"^\s*from\s+\.(\w+)\s+import", path.read_text(), re.MULTILINE):
            assert (tmp_path / f"{name}.py").exists(), f"{path.name} imports {name}"
    held = {path.name for path in tmp_path.glob("*.py")}
    assert set(FILES[kind]) <= held and ("processing_memory.py" in held) == (kind == "memory_encoder_decoder")
